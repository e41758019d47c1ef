"""Registers Anchor DETR: the model, its passes, its plugin ops and its pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import ModelSpec, OpSpec, PassSpec, PipelineSpec
from optframe_anchordetr.ops import OPS


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
    return [
        PassSpec(
            "fuse-layernorm-plugin",
            "optframe_anchordetr.passes.fuse_layernorm_plugin:FuseLayerNormPlugin",
            "make the plugin op LayerNorm of native and written-out layer normalisations",
        ),
        PassSpec(
            "fuse-rcda",
            "optframe_anchordetr.passes.fuse_rcda:FuseRCDA",
            "make the plugin op RCDA of row-column decoupled attentions",
        ),
        PassSpec(
            "fuse-skip-layernorm-plugin",
            "optframe_anchordetr.passes.fuse_layernorm_plugin:FuseSkipLayerNormPlugin",
            "let the plugin op LayerNorm make the sum that it normalises",
        ),
        PassSpec(
            "precompute-inverse-sigmoid",
            "optframe_anchordetr.passes.precompute_inverse_sigmoid:PrecomputeInverseSigmoid",
            "compute the logits of a fixed anchor table once, in float64",
        ),
        PassSpec(
            "remove-glue-ops",
            "optframe_anchordetr.passes.remove_glue_ops:RemoveGlueOps",
            "take the exporter's shape arithmetic out, with graphsurgeon",
        ),
    ]


@hookimpl
def optframe_pipelines() -> Iterable[PipelineSpec]:
    """Register the pipelines that `optframe run anchordetr` uses: one for each kind of backend."""
    return [
        PipelineSpec(
            "anchordetr-start",
            "infer-shapes,remove-glue-ops,precompute-inverse-sigmoid,clean,fuse-layernorm,fold-conv-scale",
            "what the pipelines of Anchor DETR begin with",
        ),
        PipelineSpec(
            "anchordetr-end",
            "fuse-layernorm-plugin,fuse-skip-layernorm-plugin,tidy",
            "what the pipelines of Anchor DETR end with: LayerNorm as plugin op, with the sum before it",
        ),
        PipelineSpec(
            "anchordetr",
            "anchordetr-start,fuse-rcda,select,linear,layout,anchordetr-end",
            "what portable does, and the plugin ops of Anchor DETR, which carry their meaning in standard ops",
        ),
        PipelineSpec(
            "anchordetr-tensorrt",
            "anchordetr-start,fuse-rcda{rows=true},select,linear,compose-linear,"
            "merge-parallel-matmuls{min_biased=4},distribute-constant-add,layout,compose-linear,select-gemm,anchordetr-end",
            "what tensorrt does, with the plugin ops",
        ),
        PipelineSpec(
            "anchordetr-cuda",
            "anchordetr-start,fuse-rcda{rows=true},select,linear,compose-linear,layout,compose-linear,select-gemm,anchordetr-end",
            "as anchordetr-tensorrt, but products of one input stay apart: the kernels take whole tensors, not slices",
        ),
    ]


@hookimpl
def optframe_ops() -> Iterable[OpSpec]:
    """Register the plugin ops."""
    return OPS
