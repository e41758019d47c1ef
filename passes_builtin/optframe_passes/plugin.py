"""Registers the builtin passes and pipelines."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import PassSpec, PipelineSpec


@hookimpl
def optframe_passes() -> Iterable[PassSpec]:
    """Register every generic pass."""
    return []


@hookimpl
def optframe_pipelines() -> Iterable[PipelineSpec]:
    """Register the named pipelines."""
    return []
