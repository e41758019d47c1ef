"""Graphs that are no valid ONNX: no pass crashes on one, or makes it valid by accident."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from optframe.passes import GraphPass, PassContext
from optframe_passes.compose_linear import ComposeLinear
from optframe_passes.compose_slices import ComposeSlices
from optframe_passes.distribute_constant_add import DistributeConstantAdd
from optframe_passes.drop_broadcast import DropBroadcast
from optframe_passes.drop_softmax_invariant import DropSoftmaxInvariant
from optframe_passes.eliminate_dead_code import EliminateDeadCode
from optframe_passes.eliminate_identity import EliminateIdentity
from optframe_passes.exchange_mean_linear import ExchangeMeanLinear
from optframe_passes.fold_constants import FoldConstants
from optframe_passes.fold_conv_scale import FoldConvScale
from optframe_passes.fold_scale import FoldScale
from optframe_passes.infer_shapes import InferShapes
from optframe_passes.lift_denormals import LiftDenormals
from optframe_passes.lift_opset import LiftOpset
from optframe_passes.merge_duplicates import MergeDuplicates
from optframe_passes.merge_parallel_matmuls import MergeParallelMatMuls
from optframe_passes.scatter_to_slices import ScatterToSlices
from optframe_passes.select_gemm import SelectGemm
from optframe_passes.sink_split import SinkSplit
from optframe_passes.tile_rows import TileRows
from optframe_passes.winograd_conv import WinogradConv

Parse = Callable[..., ir.Model]

PASSES = (
    LiftOpset,
    LiftDenormals,
    InferShapes,
    FoldConstants,
    FoldConvScale,
    EliminateIdentity,
    MergeDuplicates,
    EliminateDeadCode,
    ComposeLinear,
    ComposeSlices,
    DistributeConstantAdd,
    DropBroadcast,
    DropSoftmaxInvariant,
    ExchangeMeanLinear,
    FoldScale,
    MergeParallelMatMuls,
    ScatterToSlices,
    SelectGemm,
    SinkSplit,
    TileRows,
    WinogradConv,
)


def cyclic(parse: Parse) -> ir.Model:
    model = parse("g (float[2] x) => (float[2] y) { a = Add (x, x)  b = Identity (a)  y = Relu (b) }", 11)
    model.graph[0].replace_input_with(1, model.graph[1].outputs[0])
    return model


def unsorted(parse: Parse) -> ir.Model:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { a = Sqrt (w)  b = Neg (a)  y = Mul (x, b) }", 11
    )
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    return model


def too_few_inputs(parse: Parse) -> ir.Model:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }", 11)
    for op in ("Add", "Clip", "Conv", "If", "Identity", "Pad", "Reshape", "Slice", "Tile", "TopK", "Where", "Dropout"):
        model.graph.append(ir.node(op, []))
    return model


def unknown_op(parse: Parse) -> ir.Model:
    return parse("g (float[2] x) => (float[2] y) { a = Unheard (x)  y = Relu (a) }", 11)


def no_opset(parse: Parse) -> ir.Model:
    model = parse("g (float[2] x) => (float[2] y) { y = elsewhere.Unheard (x) }")
    model.opset_imports.clear()
    model.opset_imports["elsewhere"] = 1
    return model


def output_from_nowhere(parse: Parse) -> ir.Model:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }", 11)
    model.graph.outputs.append(ir.Value(name="nowhere"))
    return model


def if_without_branches(parse: Parse) -> ir.Model:
    model = parse("g (float[2] x) => (float[2] y) <bool c = {1}> { y = Relu (x) }", 11)
    model.graph.append(ir.node("If", [model.graph.initializers["c"]]))
    return model


def contradicting_shapes(parse: Parse) -> ir.Model:
    return parse("g (float[2] x) => (float[3] y) <float[3] w = {1.0, 2.0, 3.0}> { a = Add (x, w)  y = Relu (a) }", 11)


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
@pytest.mark.parametrize(
    "broken",
    [
        cyclic,
        unsorted,
        too_few_inputs,
        unknown_op,
        no_opset,
        output_from_nowhere,
        if_without_branches,
        contradicting_shapes,
    ],
)
def test_invalid_graphs_do_no_harm(step: type[GraphPass], broken: Callable[[Parse], ir.Model], parse: Parse) -> None:
    model = broken(parse)
    outputs = [value.name for value in model.graph.outputs]
    step().run(model, PassContext(pass_name=step.name))
    assert [value.name for value in model.graph.outputs] == outputs
    assert not step().run(model, PassContext(pass_name=step.name)).modified


def test_unsorted_graphs_are_folded_as_far_as_they_go(parse: Parse) -> None:
    model = unsorted(parse)
    FoldConstants().run(model, PassContext())
    (multiply,) = model.graph
    np.testing.assert_array_equal(multiply.inputs[1].const_value.numpy(), -np.sqrt([1, 2]).astype(np.float32))
