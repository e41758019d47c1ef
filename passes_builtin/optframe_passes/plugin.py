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
            "compose-layout",
            "optframe_passes.compose_layout:ComposeLayout",
            "make chains of Reshape and Transpose as short as they can be",
        ),
        PassSpec(
            "compose-linear",
            "optframe_passes.compose_linear:ComposeLinear",
            "multiply the matrices of linear layers in a row",
        ),
        PassSpec(
            "compose-slices", "optframe_passes.compose_slices:ComposeSlices", "make one Slice of several in a row"
        ),
        PassSpec(
            "distribute-constant-add",
            "optframe_passes.distribute_constant_add:DistributeConstantAdd",
            "add positions behind linear layers, with their biases",
        ),
        PassSpec(
            "drop-broadcast",
            "optframe_passes.drop_broadcast:DropBroadcast",
            "remove Expand and Tile where broadcasting does the same",
        ),
        PassSpec(
            "drop-softmax-invariant",
            "optframe_passes.drop_softmax_invariant:DropSoftmaxInvariant",
            "remove biases of keys and values that attention makes needless",
        ),
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
            "exchange-mean-linear",
            "optframe_passes.exchange_mean_linear:ExchangeMeanLinear",
            "take means before linear layers, which then have less to do",
        ),
        PassSpec(
            "flatten-tokens",
            "optframe_passes.flatten_tokens:FlattenTokens",
            "let transformers work on matrices of tokens where that saves nodes",
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
            "fold-scale",
            "optframe_passes.fold_scale:FoldScale",
            "fold constant factors into weights before or behind them",
        ),
        PassSpec(
            "fold-where",
            "optframe_passes.fold_where:FoldWhere",
            "remove Where and logic under masks of one value",
        ),
        PassSpec(
            "forward-concat",
            "optframe_passes.forward_concat:ForwardConcat",
            "take what is taken from a Concat from its operand",
        ),
        PassSpec(
            "fuse-groupnorm",
            "optframe_passes.fuse_groupnorm:FuseGroupNorm",
            "make native GroupNormalization nodes (opset 21)",
        ),
        PassSpec(
            "fuse-layernorm", "optframe_passes.fuse_layernorm:FuseLayerNorm", "make native LayerNormalization nodes"
        ),
        PassSpec("infer-shapes", "optframe_passes.infer_shapes:InferShapes", "write inferred shapes into the model"),
        PassSpec(
            "lift-denormals",
            "optframe_passes.lift_denormals:LiftDenormals",
            "keep products from reading numbers that CPUs multiply slowly",
        ),
        PassSpec("lift-opset", "optframe_passes.lift_opset:LiftOpset", "raise an older model to opset 18"),
        PassSpec(
            "merge-duplicates",
            "optframe_passes.merge_duplicates:MergeDuplicates",
            "merge nodes and weights that are the same",
        ),
        PassSpec(
            "merge-parallel-matmuls",
            "optframe_passes.merge_parallel_matmuls:MergeParallelMatMuls",
            "make one MatMul of those that read the same input",
        ),
        PassSpec(
            "move-transposes",
            "optframe_passes.move_transposes:MoveTransposes",
            "move Transposes through other ops, so that they meet and cancel",
        ),
        PassSpec(
            "scatter-to-slices",
            "optframe_passes.scatter_to_slices:ScatterToSlices",
            "write a scatter into a slice as Split and Concat, or as an addition",
        ),
        PassSpec(
            "select-gemm",
            "optframe_passes.select_gemm:SelectGemm",
            "write products of matrices as Gemm, or as MatMul and Add",
        ),
        PassSpec(
            "sink-split",
            "optframe_passes.sink_split:SinkSplit",
            "do once before a Split what is done to each of its parts",
        ),
        PassSpec(
            "tile-rows",
            "optframe_passes.tile_rows:TileRows",
            "take large products through what follows some rows at a time, for the caches of CPUs",
        ),
        PassSpec(
            "winograd-conv",
            "optframe_passes.winograd_conv:WinogradConv",
            "compute 3x3 convolutions with fewer multiplications, for CPUs",
        ),
    ]


@hookimpl
def optframe_pipelines() -> Iterable[PipelineSpec]:
    """Register the named pipelines."""
    return [
        PipelineSpec(
            "tidy",
            "fold-constants,eliminate-identity,merge-duplicates,eliminate-dead-code",
            "constants, needless nodes, duplicates and dead code gone, as other passes leave them too",
        ),
        PipelineSpec("clean", "lift-opset,tidy", "what every model wants: a recent opset, and nothing needless"),
        PipelineSpec(
            "select",
            "scatter-to-slices,compose-slices,forward-concat,compose-slices,fold-where,drop-broadcast,"
            "eliminate-identity,compose-layout,eliminate-dead-code",
            "as few nodes that select, repeat or join elements as the model needs",
        ),
        PipelineSpec(
            "linear",
            "exchange-mean-linear,fold-scale,drop-softmax-invariant,distribute-constant-add,drop-softmax-invariant,"
            "merge-duplicates",
            "less arithmetic in and around matrix products, and positions in their biases",
        ),
        PipelineSpec(
            "layout",
            "move-transposes,flatten-tokens,compose-layout,move-transposes,forward-concat,"
            "compose-slices,drop-broadcast",
            "as few nodes that only move elements as the model needs",
        ),
        PipelineSpec(
            "portable",
            "clean,fuse-layernorm,fold-conv-scale,select,linear,layout,fold-conv-scale,select-gemm,tidy",
            "standard ops only: runs wherever the model ran",
        ),
        PipelineSpec(
            "cpu",
            "clean,fuse-layernorm,fold-conv-scale,select,linear,layout,fold-conv-scale,select-gemm,winograd-conv,"
            "lift-denormals,tile-rows,compose-layout,tidy",
            "standard ops in FP32 for a CPU: less arithmetic and traffic, though more nodes and larger weights",
        ),
        PipelineSpec(
            "tensorrt",
            "clean,fuse-layernorm,fuse-groupnorm,fold-conv-scale,select,linear,compose-linear,merge-parallel-matmuls{min_biased=4},"
            "distribute-constant-add,layout,fold-conv-scale,compose-linear,select-gemm,tidy",
            "few and large products in standard ops, for a builder that fuses what lies between them itself",
        ),
        PipelineSpec(
            "cuda", "tensorrt", "the same: few and large products suit a runtime that launches node by node as well"
        ),
    ]
