"""`precompute-inverse-sigmoid`: every form that exporters write, exact to a rounding, and what is no fixed table."""

from __future__ import annotations

import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import PassContext
from optframe.testing import assert_pass_contract
from optframe_anchordetr.passes.precompute_inverse_sigmoid import PrecomputeInverseSigmoid

TABLE = (0.0, 1e-7, 1e-5, 0.25, 0.5, 0.7, 0.99999, 1.0)

CONSTANTS = f"""<float[8] p = {{{", ".join(map(str, TABLE))}}}, float zero = {{0.0}}, float one = {{1.0}},
    float two = {{2.0}}, float half = {{0.5}}, float eps = {{0.00001}}, float[1] eps1 = {{0.00001}},
    int64[2] wide = {{3, 1}}>"""

FORMS = {
    "torchscript": (
        18,
        "e = Expand (p, wide)  c = Clip (e, zero, one)  u = Clip (c, eps)  s = Sub (one, c)  l = Clip (s, eps)",
    ),
    "attributes": (
        10,
        """c = Clip <min = 0.0, max = 1.0> (p)  u = Clip <min = 0.00001> (c)  s = Sub (one, c)
           l = Clip <min = 0.00001> (s)""",
    ),
    "maximum": (18, "c = Clip (p, zero, one)  u = Max (c, eps)  s = Sub (one, c)  l = Max (eps1, s)"),
    "unclamped": (18, "u = Clip (p, eps)  s = Sub (one, p)  l = Clip (s, eps)"),
    "clamped-above": (18, "c = Clip (p, zero, one)  u = Clip (c, eps, one)  s = Sub (one, c)  l = Clip (s, eps, one)"),
}


def model_of(body: str, opset: int = 18) -> ir.Model:
    text = f"g (float[8] x) => (float[A,B] y) {CONSTANTS} {{ {body}  d = Div (u, l)  r = Log (d)  y = Add (x, r) }}"
    if "wide" not in body:
        text = text.replace("[A,B]", "[A]")
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}'))


@pytest.mark.parametrize("form", FORMS)
def test_table_is_exact_to_half_a_unit(form: str) -> None:
    opset, body = FORMS[form]
    model = model_of(body, opset)
    # Single precision rounds the quotient and the logarithm: some units in the last place of numbers up to 12.
    assert_pass_contract(PrecomputeInverseSigmoid(), model, [{"x": np.zeros(8, np.float32)}], allowed=1e-5)
    PrecomputeInverseSigmoid().run(model, PassContext())
    assert graph.op_histogram(model).keys() <= {"Add", "Expand"}
    (add,) = [node for node in model.graph if node.op_type == "Add"]
    table = graph.constant(add.inputs[1])
    assert table is not None
    epsilon = float(np.float32(1e-5))
    numbers = [float(np.float32(p)) for p in TABLE]
    expected = np.array([math.log(max(p, epsilon) / max(1 - p, epsilon)) for p in numbers])
    np.testing.assert_array_equal(table.reshape(-1, 8)[0], expected.astype(np.float32))


@pytest.mark.parametrize(
    "body",
    [
        "c = Clip (p, zero, one)  u = Clip (c, eps)  s = Sub (one, c)  l = Clip (s, zero)",
        "c = Clip (p, zero, one)  u = Clip (c, eps)  s = Sub (two, c)  l = Clip (s, eps)",
        "c = Clip (p, zero, one)  u = Clip (p, eps)  s = Sub (one, c)  l = Clip (s, eps)",
        "c = Clip (p, zero, one)  u = Clip (c, eps, half)  s = Sub (one, c)  l = Clip (s, eps)",
        "c = Clip (p, zero, one)  u = Clip (c, eps)  s = Sub (c, one)  l = Clip (s, eps)",
    ],
)
def test_other_chains_stay(body: str) -> None:
    model = model_of(body)
    context = PassContext()
    assert not PrecomputeInverseSigmoid().run(model, context).modified
    assert not context.near_misses


@pytest.mark.parametrize("refined", ["q = Sigmoid (x)", "n = RandomUniformLike (p)  q = Identity (n)"])
def test_anchors_that_are_not_fixed_are_a_near_miss(refined: str) -> None:
    chain = "c = Clip (q, zero, one)  u = Clip (c, eps)  s = Sub (one, c)  l = Clip (s, eps)"
    model = model_of(f"{refined}  {chain}")
    context = PassContext()
    assert not PrecomputeInverseSigmoid().run(model, context).modified
    assert "depends on an input" in context.near_misses[0].reason


def test_values_that_others_read_stay() -> None:
    body = "c = Clip (p, zero, one)  u = Clip (c, eps)  s = Sub (one, c)  l = Clip (s, eps)"
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 18]> g (float[8] x) => (float[8] y, float[8] z) {CONSTANTS}
            {{ {body}  d = Div (u, l)  r = Log (d)  y = Add (x, r)  z = Mul (c, x) }}"""
        )
    )
    assert_pass_contract(PrecomputeInverseSigmoid(), model, [{"x": np.ones(8, np.float32)}], allowed=1e-5)
    PrecomputeInverseSigmoid().run(model, PassContext())
    assert [node.op_type for node in model.graph] == ["Clip", "Add", "Mul"]
