"""Registers the builtin passes and pipelines."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import PassSpec, PipelineSpec


@hookimpl
def optframe_passes() -> Iterable[PassSpec]:
    """Register every generic pass."""
    return [
        PassSpec(
            "eliminate-dead-code",
            "optframe_passes.eliminate_dead_code:EliminateDeadCode",
            "remove nodes, weights and functions that nothing uses",
        ),
        PassSpec(
            "eliminate-identity",
            "optframe_passes.eliminate_identity:EliminateIdentity",
            "remove nodes that return what they were given",
        ),
        PassSpec(
            "fold-constants", "optframe_passes.fold_constants:FoldConstants", "evaluate what depends on constants alone"
        ),
        PassSpec(
            "fold-conv-scale",
            "optframe_passes.fold_conv_scale:FoldConvScale",
            "fold batch norms, scales and shifts into convolutions",
        ),
        PassSpec(
            "fuse-layernorm", "optframe_passes.fuse_layernorm:FuseLayerNorm", "make native LayerNormalization nodes"
        ),
        PassSpec("infer-shapes", "optframe_passes.infer_shapes:InferShapes", "write inferred shapes into the model"),
        PassSpec("lift-opset", "optframe_passes.lift_opset:LiftOpset", "raise an older model to opset 18"),
        PassSpec(
            "merge-duplicates",
            "optframe_passes.merge_duplicates:MergeDuplicates",
            "merge nodes and weights that are the same",
        ),
    ]


@hookimpl
def optframe_pipelines() -> Iterable[PipelineSpec]:
    """Register the named pipelines."""
    return [
        PipelineSpec(
            "clean",
            "lift-opset,fold-constants,eliminate-identity,merge-duplicates,eliminate-dead-code",
            "what every model wants: constants, duplicates and dead code gone",
        ),
        PipelineSpec("portable", "clean,fuse-layernorm,fold-conv-scale,eliminate-dead-code", "standard ops only"),
    ]
