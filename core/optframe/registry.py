"""Names and what they stand for: everything that plugins contributed, by name, with what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from optframe.commands import BUILTIN_COMMANDS
from optframe.errors import InputError, PluginError, unknown_name
from optframe.host import Contribution, PluginHost, PluginProblem, Spec
from optframe.types import (
    BackendSpec,
    CalibratorSpec,
    CommandSpec,
    ModelAdapter,
    ModelSpec,
    OpSpec,
    PassSpec,
    PipelineSpec,
    load_target,
)

if TYPE_CHECKING:
    from optframe.backend import Backend
    from optframe.passes import GraphPass

SpecT = TypeVar("SpecT", bound=Spec)
Kind = Literal["model", "pass", "pipeline", "op", "calibrator", "backend", "command"]

KINDS: Mapping[type, Kind] = {
    ModelSpec: "model",
    PassSpec: "pass",
    PipelineSpec: "pipeline",
    OpSpec: "op",
    CalibratorSpec: "calibrator",
    BackendSpec: "backend",
    CommandSpec: "command",
}
