"""What all stages of a run share: the request, the model and its adapter, the registry, the runner, the warnings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optframe import accuracy, feeds, precision
from optframe.accuracy import Limits
from optframe.gate import Verify
from optframe.registry import Kind, Registry
from optframe.stages.runner import StageRunner, Worker
from optframe.types import DEFAULT_CALIBRATOR, PRECISIONS, ModelAdapter, Part, Precision

MODEL_FILE = "model.onnx"
SAMPLES_FILE = "samples.npz"
FACTS_FILE = "facts.json"


@dataclass(frozen=True)
class RunRequest:
    """What a run is asked for; `pipeline` None means the model's own, `keep` names nodes that stay out of INT8.

    A precision in which nothing of the model can run is an error, or with `optional` left out with a warning.
    `int8_base` is the precision of what stays out of INT8. `ranges` is a file of INT8 ranges to use instead of
    calibrating; `sensitivity` ranks the layers by what INT8 in them costs, and proposes which to keep for this error
    over response, in `sensitivity_runs` runs of the model or little more.
    """

    precisions: tuple[Precision, ...] = PRECISIONS
    optional: bool = False
    backends: tuple[str, ...] = ("onnxruntime",)
    pipeline: str | None = None
    calibrator: str = DEFAULT_CALIBRATOR
    keep: tuple[str, ...] = ()
    int8_base: Literal["fp32", "fp16"] = "fp32"
    ranges: Path | None = None
    sensitivity: float | None = None
    sensitivity_runs: int = precision.DEFAULT_RUNS
    verify: Verify = "each"
    stop_after: str | None = None
    dump: bool = False
    device: str = "auto"
    backend_options: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[Precision, Limits] = field(default_factory=lambda: accuracy.DEFAULT_LIMITS)


@dataclass(frozen=True)
class Source:
    """The model of a run: how it is called, its adapter, and who brought it."""

    name: str
    adapter: ModelAdapter
    worker: Worker


@dataclass
class Context:
    """What a run works with. `on_work` is told of what a long stage counts ("samples", "variants"), and how many."""

    source: Source
    request: RunRequest
    registry: Registry
    runner: StageRunner
    on_work: Callable[[str, int], None]
    warnings: list[str] = field(default_factory=list)
    artefacts: dict[str, Path] = field(default_factory=dict)

    @property
    def adapter(self) -> ModelAdapter:
        """The model's adapter."""
        return self.source.adapter

    @cached_property
    def input_shapes(self) -> dict[str, list[int]]:
        """The shapes of the first real input, by name."""
        return feeds.input_shapes(self.adapter.feeds()[0])

    def owner(self, kind: Kind, name: str) -> Worker:
        """Return whose code a contribution is."""
        contribution = self.registry.contribution(kind, name)
        return Worker(self.registry.host.plugin_root(contribution.plugin), contribution.distribution)

    def owners(self, kind: Kind, names: Iterable[str]) -> list[Worker]:
        """Return whose code several contributions are."""
        return [self.owner(kind, name) for name in names]

    def key(self, of: Part) -> tuple[dict[str, Path], dict[str, object]]:
        """Return the adapter's dependencies: inputs, which are hashed by content, and options."""
        items = {f"{of}.{name}": value for name, value in self.adapter.dependencies(of).items()}
        paths = {name: value for name, value in items.items() if isinstance(value, Path)}
        return paths, {name: value for name, value in items.items() if name not in paths}


def write_json(path: Path, value: Any) -> None:
    """Write what a stage found to a file in its folder."""
    path.write_text(json.dumps(value, default=str), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
