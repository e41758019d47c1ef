"""Registers Anchor DETR: the model, its passes, its plugin ops and its pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import ModelSpec, OpSpec, PassSpec, PipelineSpec


@hookimpl
def optframe_models() -> Iterable[ModelSpec]:
    """Register the model."""
    return [
        ModelSpec(
            "anchordetr",
            "optframe_anchordetr.adapter:AnchorDETRAdapter",
            "Anchor DETR object detector (R50/R101, C5/DC5, RCDA or plain attention)",
        )
    ]


@hookimpl
def optframe_passes() -> Iterable[PassSpec]:
    """Register the passes that know Anchor DETR."""
    return []


@hookimpl
def optframe_pipelines() -> Iterable[PipelineSpec]:
    """Register the pipeline that `optframe run anchordetr` uses."""
    return []


@hookimpl
def optframe_ops() -> Iterable[OpSpec]:
    """Register the plugin ops."""
    return []
