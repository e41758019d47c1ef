"""`remove-glue-ops`: shape arithmetic and ops that do nothing go, through the graphsurgeon dialect and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph
from optframe.dialect import GraphSurgeonView
from optframe.passes import PassContext
from optframe.snapshot import Snapshot
from optframe_anchordetr.passes.remove_glue_ops import RemoveGlueOps
from optframe_passes.infer_shapes import InferShapes

Array = np.ndarray[Any, Any]


def model_of(text: str, opset: int) -> ir.Model:
    """Return the model, with the shapes recorded that the pass reads."""
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}'))
    for value in model.graph.initializers.values():  # as bytes, which is how graphsurgeon writes what it has read
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    InferShapes().run(model, PassContext())
    return model


def run(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, dict(feeds))


def removed(model: ir.Model, rng: np.random.Generator) -> tuple[ir.Model, PassContext]:
    """Return the model after the pass, shown to compute the same, and to be done."""
    context = PassContext(pass_name="remove-glue-ops")
    view = GraphSurgeonView(model)
    before = Snapshot.take(view.to_model())
    modified = RemoveGlueOps().run(view.graph, context).modified
    after = view.to_model()
    assert modified != before.same(Snapshot.take(after))
    assert not RemoveGlueOps().run(GraphSurgeonView(after).graph, PassContext()).modified
    sizes = [3 if not isinstance(dim, int) else dim for dim in model.graph.inputs[0].shape or ()]
    feeds = {"x": rng.standard_normal(sizes).astype(np.float32)}
    for old, new in zip(run(model, feeds), run(after, feeds), strict=True):
        np.testing.assert_array_equal(old, new)
    return after, context


GLUE = {
    "shape-gather-concat": (
        12,
        """g (float[2,3,4] x) => (float[A,B] y) <int64 i = {1}, int64[1] m = {-1}> { s = Shape (x)  d = Gather (s, i)
           u = Unsqueeze <axes = [0]> (d)  t = Concat <axis = 0> (u, m)  p = Transpose <perm = [1, 0, 2]> (x)
           y = Reshape (p, t) }""",
        {"Transpose": 1, "Reshape": 1},
    ),
    "arithmetic": (
        12,
        """g (float[2,7,4] x) => (float[A,B,C] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
           int64[1] k = {3}> { s = Shape (x)  n = Slice (s, one, two, zero)  h = Div (n, k)  d = Mul (h, k)
           e = Sub (n, d)  f = Add (h, e)  y = Slice (x, zero, f, one) }""",
        {"Slice": 1},
    ),
    "constant-of-shape-and-expand": (
        12,
        """g (float[2,3] x) => (float[A,B] y) <float[1,3] w = {1.0, 2.0, 3.0}> { s = Shape (x)
           o = ConstantOfShape <value = float[1] {2.0}> (s)  e = Expand (w, s)  p = Mul (x, o)  y = Add (p, e) }""",
        {"Mul": 1, "Add": 1},
    ),
    "expand-idiom": (
        12,
        """g (float[1,3] x) => (float[A,B] y) <int64[2] t = {4, -1}, int64[1] two = {2}> {
           o = ConstantOfShape <value = int64[1] {1}> (two)  k = Constant <value = int64 {-1}> ()  m = Mul (o, k)
           q = Equal (t, m)  w = Where (q, o, t)  y = Expand (x, w) }""",
        {"Expand": 1},
    ),
    "mask-that-masks-nothing": (
        12,
        """g (float[2,4] x) => (float[A,B] y) <float low = {-1000.0}, int64[2] s = {2, 4}> {
           m = ConstantOfShape <value = bool[1] {0}> (s)  w = Where (m, low, x)  y = Softmax <axis = 1> (w) }""",
        {"Softmax": 1},
    ),
    "no-ops": (
        17,
        """g (float[2,4] x) => (float[A,B] y) <int64[2] r = {0, -1}, int64[2] t = {1, 1}, int64[1] z = {0},
           int64[1] f = {4}, int64[1] a = {1}> { i = Identity (x)  c = Cast <to = 1> (i)  h = Reshape (c, r)
           l = Tile (h, t)  s = Slice (l, z, f, a)  e = Exp (s)  y = Neg (e) }""",
        {"Exp": 1, "Neg": 1},
    ),
    "axes-as-inputs": (
        18,
        """g (float[2,3,4] x) => (float[A,B] y) <int64 i = {2}, int64[1] z = {0}, int64[1] m = {-1}> {
           s = Shape <start = -2> (x)  n = Shape <end = 1> (x)  q = Squeeze (n, z)  u = Unsqueeze (q, z)
           t = Concat <axis = 0> (u, m)  y = Reshape (x, t) }""",
        {"Reshape": 1},
    ),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_goes(name: str, rng: np.random.Generator) -> None:
    opset, text, left = GLUE[name]
    after, context = removed(model_of(text, opset), rng)
    assert dict(graph.op_histogram(after)) == left
    assert not context.near_misses


STAYS = {
    "dynamic-shape": (
        """g (float[N,4] x) => (float[A] y) <int64 z = {0}> { s = Shape (x)  d = Gather (s, z)
           u = Unsqueeze <axes = [0]> (d)  h = ReduceMax <keepdims = 0> (x)  y = Expand (h, u) }""",
        "not static",
    ),
    "model-arithmetic": (
        "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { a = Add (w, w)  y = Mul (x, a) }",
        None,
    ),
    "graph-output": ("g (float[2] x) => (float[2] y, int64[1] s) { s = Shape (x)  y = Identity (x) }", None),
    "mask-that-masks": (
        """g (float[2] x) => (float[2] y) <bool[2] m = {0, 1}, float low = {0.0}>
           { w = Where (m, low, x)  y = Neg (w) }""",
        None,
    ),
    "mask-that-broadcasts": (
        """g (float[1,2] x) => (float[A,B] y) <bool[3,1] m = {0, 0, 0}, float low = {0.0}>
           { w = Where (m, low, x)  y = Neg (w) }""",
        None,
    ),
    "reshape-of-other-order": (
        """g (float[2,3] x) => (float[A,B] y) <int64[2] t = {2, 3}>
           { p = Transpose (x)  r = Reshape (p, t)  y = Neg (r) }""",
        None,
    ),
    "backward-slice": (
        """g (float[4] x) => (float[A] y) <int64[1] b = {-1}, int64[1] e = {-9}, int64[1] a = {0}>
           { r = Slice (x, b, e, a, b)  y = Neg (r) }""",
        None,
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_no_glue_stays(name: str, rng: np.random.Generator) -> None:
    text, reason = STAYS[name]
    model = model_of(text, 12)
    after, context = removed(model, rng)
    assert graph.op_histogram(after) == graph.op_histogram(model)
    assert [reason in miss.reason for miss in context.near_misses] == ([True] if reason else [])


def test_branches_read_what_became_constant(rng: np.random.Generator) -> None:
    model = model_of(
        """g (float[2,3] x) => (float[A,B] y) <bool c = {1}> { s = Shape (x)  y = If (c) <
           then_branch = t () => (float[C,D] p) { n = Neg (x)  p = Reshape (n, s) },
           else_branch = e () => (float[E,F] q) { q = Expand (x, s) } > }""",
        12,
    )
    after, _ = removed(model, rng)
    assert "Shape" not in graph.op_histogram(after)


def test_refused_rewrites_are_not_made(rng: np.random.Generator) -> None:
    model = model_of(GLUE["no-ops"][1], 17)
    for node in model.graph:
        node.name = node.op_type
    view = GraphSurgeonView(model)
    context = PassContext(pass_name="glue", allow_rewrite=lambda text: text != "glue at Tile")
    assert RemoveGlueOps().run(view.graph, context).modified
    assert dict(graph.op_histogram(view.to_model())) == {"Tile": 1, "Exp": 1, "Neg": 1}
