"""`infer-shapes` and the propagation under it: what is found out, and what is not believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe_passes.infer_shapes import InferShapes
from optframe_passes.propagate import Propagation

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]


def shapes(model: ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.shape) for node in model.graph for value in node.outputs}


def test_types_and_shapes_are_recorded_and_names_kept(check: Check) -> None:
    text = """g (float[N,3,H,8] x) => (float[A,B,C] y) <int64[3] t = {0, -1, 8}> {
        a = Transpose <perm = [0, 2, 1, 3]> (x)  s = Shape (a)  b = Cast <to = 10> (a)  c = Cast <to = 1> (b)
        y = Reshape (c, t) }"""
    outcome = check(InferShapes(), text, allowed=1e-2)  # halves have eleven bits
    assert shapes(outcome.model) == {"a": "[N,H,3,8]", "s": "[4]", "b": "[N,H,3,8]", "c": "[N,H,3,8]", "y": "[A,B,C]"}
    assert outcome.node("Transpose").outputs[0].dtype == ir.DataType.FLOAT
    assert outcome.model.graph[2].outputs[0].dtype == ir.DataType.FLOAT16


def test_wrong_declarations_inside_are_corrected(check: Check, parse: Parse) -> None:
    """An exporter that traced with a batch of 2 wrote it into the shapes between."""
    model = parse("g (float[N,4] x) => (float[N,4] y) { a = Relu (x)  b = Exp (a)  y = Neg (b) }")
    declared = model.graph[1].outputs[0]
    declared.shape, declared.dtype = ir.Shape(["N", 5]), ir.DataType.FLOAT
    known = Propagation.of(model)
    assert known.dims(declared) == ("N", 4)


def test_declared_shapes_of_foreign_ops_are_believed(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[A] y) { f = elsewhere.Unheard (x)  y = Relu (f) }")
    foreign = model.graph[0].outputs[0]
    foreign.shape, foreign.dtype = ir.Shape(["K", 7]), ir.DataType.FLOAT
    assert Propagation.of(model).dims(model.graph[1].outputs[0]) == ("K", 7)


def test_a_declared_shape_fills_what_a_function_leaves_open(parse: Parse) -> None:
    model = parse(
        "g (float[3,4] x) => (float[A,B] y) { f = local.Same (x)  y = Relu (f) }",
        functions="""<opset_import: ["" : 18], domain: "local"> Same (x) => (y)
            { s = Shape (x)  y = Reshape (x, s) }""",
    )
    call = model.graph[0].outputs[0]
    assert None not in [Propagation.of(model).dims(call)]
    assert Propagation.of(model).static(call) is None, "contents are not followed into functions"
    call.shape = ir.Shape([3, 4])
    assert Propagation.of(model).dims(model.graph[1].outputs[0]) == (3, 4)


def test_functions_are_inferred_through_their_bodies(check: Check) -> None:
    outcome = check(
        InferShapes(),
        "g (float[N,4] x) => (float[A] y) { f = local.Total <axis = 1> (x)  y = Neg (f) }",
        functions="""<opset_import: ["" : 18], domain: "local"> Total <axis> (x) => (y)
            { a = Constant <value_int: int = @axis> ()  m = Constant <value_ints = [-1]> ()  r = Reshape (a, m)
              y = ReduceSum <keepdims = 0> (x, r) }""",
    )
    assert outcome.model.graph[0].outputs[0].dtype == ir.DataType.FLOAT


def test_branches_agree_on_what_they_share(parse: Parse) -> None:
    model = parse("""g (float[N,4] x, bool c) => (float[A,B] y)
        <int64[2] t = {4, 4}, float[1,4] w = {1.0, 2.0, 3.0, 4.0}>
        { r = If (c) < then_branch = a () => (float[C,D] p) { p = Exp (x) },
                       else_branch = b () => (float[E,F] q) { q = Expand (w, t) } >  y = Neg (r) }""")
    dims = Propagation.of(model).dims(model.graph[-1].outputs[0])
    assert dims is not None
    assert dims[1] == 4
    assert dims[0] not in ("N", 4)


def test_negative_dimensions_are_free_ones(parse: Parse) -> None:
    """Some exporters write -1 for a free batch."""
    model = parse("g (float[N,4] x) => (float[A,B] y) { a = Relu (x)  y = Add (a, x) }")
    model.graph.inputs[0].shape = ir.Shape([-1, 4])
    known = Propagation.of(model)
    dims = known.dims(model.graph[1].outputs[0])
    assert dims == known.dims(model.graph.inputs[0])
    assert known.static(model.graph.inputs[0]) is None


def test_equal_free_dimensions_are_known_to_be_equal(parse: Parse) -> None:
    model = parse("""g (float[1,3,H,W] x, float[2,3,3,3] w) => (float[A,B,C] y) <int64[3] t = {0, 2, -1}>
        { c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)  e = Exp (c)  y = Reshape (e, t) }""")
    known = Propagation.of(model)
    conv, exp, reshape = (known.dims(node.outputs[0]) for node in model.graph)
    assert conv == exp
    assert conv is not None
    assert reshape is not None
    assert len({*conv, "H", "W"}) == 6, "halved dimensions are neither the old ones nor equal to each other"
    assert known.elements(model.graph.initializers["t"]).tolist() == [0, 2, -1]


def test_sequences_have_a_type_and_no_shape(parse: Parse) -> None:
    model = parse("""g (float[N,6] x) => (float[A,B] y)
        { s = SplitToSequence (x)  y = ConcatFromSequence <axis = 0> (s) }""")
    known = Propagation.of(model)
    assert isinstance(known.type_of(model.graph[0].outputs[0]), ir.SequenceType)
    assert known.dims(model.graph[0].outputs[0]) is None


def test_nodes_out_of_order_do_no_harm(parse: Parse) -> None:
    model = parse("g (float[N,6] x) => (float[A,B] y) { a = Relu (x)  y = Neg (a) }")
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    assert Propagation.of(model).dims(model.graph[1].outputs[0]) == ("N", 6)


def test_shapes_of_weights_are_known_however_large(check: Check) -> None:
    text = """g (float[N,4] x) => (float[A,B] y) <float[4,100] w = {%s}> { s = Shape <start = 1> (w)  m = Shape (x)
        n = Gather (m, z)  t = Concat <axis = 0> (n, f)  y = Reshape (x, t) }"""
    text = text.replace("<float[4,100]", "<int64[1] z = {0}, int64[1] f = {4}, float[4,100]")
    outcome = check(InferShapes(), text % ",".join(["1"] * 400))
    known = Propagation.of(outcome.model)
    assert known.elements(outcome.model.graph[0].outputs[0]).tolist() == [100]
    assert known.dims(outcome.model.graph[-1].outputs[0]) == ("N", 4)
    assert known.dtype(outcome.model.graph[0].outputs[0]).numpy() == np.int64
