"""The hooks that a plugin may implement, each typed, documented and with an example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from optframe.types import BackendSpec, CalibratorSpec, CommandSpec, ModelSpec, OpSpec, PassSpec, PipelineSpec

if TYPE_CHECKING:
    from optframe.gate import PassRecord

PROJECT = "optframe"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def optframe_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Contribute models that `optframe run NAME` can export.

    Example:
        return [ModelSpec("anchordetr", "optframe_anchordetr.adapter:AnchorDETRAdapter", "detection transformer")]
    """


@hookspec
def optframe_passes() -> Iterable[PassSpec]:  # type: ignore[empty-body]
    """Contribute graph passes.

    Example:
        return [PassSpec("fold-constants", "optframe_passes.fold_constants:FoldConstants", "evaluate constants")]
    """


@hookspec
def optframe_pipelines() -> Iterable[PipelineSpec]:  # type: ignore[empty-body]
    """Contribute named pipelines.

    Example:
        return [PipelineSpec("clean", "fold-constants,eliminate-dead-code", "what every model wants")]
    """


@hookspec
def optframe_ops() -> Iterable[OpSpec]:  # type: ignore[empty-body]
    """Contribute plugin ops: meaning in standard ops, shape rule, CUDA kernel.

    Example:
        return [OpSpec("LayerNorm", "com.example", inputs=(OpParameter("x"),), outputs=(OpParameter("y"),),
                       function="example.ops:layer_norm_function", shape_rule="example.ops:same_as_first")]
    """


@hookspec
def optframe_calibrators() -> Iterable[CalibratorSpec]:  # type: ignore[empty-body]
    """Contribute ways to choose INT8 ranges.

    Example:
        return [CalibratorSpec("entropy", "optframe_trt.calibrators:EntropyCalibrator", "least KL divergence")]
    """


@hookspec
def optframe_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Contribute backends that build and run engines.

    Example:
        return [BackendSpec("onnxruntime", "optframe.backends.onnxruntime:OnnxRuntimeBackend", "CPU and CUDA")]
    """


@hookspec
def optframe_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Contribute sub-commands of the command line.

    Example:
        return [CommandSpec("inspect", "example.cli:inspect", "show what an engine holds")]
    """


@hookspec
def optframe_stage_started(stage: str, options: Mapping[str, Any]) -> None:
    """Observe that `stage` ("export", "optimize", ...) begins, with its `options`. Return nothing.

    The option `label` tells the same stage of different runs apart, such as "onnxruntime int8"; else it is empty.

    Example:
        print(f"{stage} ...")
    """


@hookspec
def optframe_stage_finished(stage: str, seconds: float, cached: bool) -> None:
    """Observe that `stage` ended after `seconds`; `cached` says that its artefacts came from the cache.

    Example:
        print(f"{stage}: {seconds:.1f} s{' (cached)' if cached else ''}")
    """


@hookspec
def optframe_pass_started(name: str) -> None:
    """Observe that the pass `name` begins. Return nothing.

    Passes run ahead of their verification: those that ran after one that is rolled back begin anew.

    Example:
        print(f"{name} ...")
    """


@hookspec
def optframe_pass_finished(record: PassRecord) -> None:
    """Observe that a pass ended and has been verified; `record` is its row of the report.

    Example:
        print(record.name, record.nodes_before, record.nodes_after)
    """
