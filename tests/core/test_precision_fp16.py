"""Where FP16 goes and where FP32 stays, on the constructions that break FP16 models."""

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
from optframe.passes import ORIGIN_KEY, SCOPE_KEY
from optframe.precision import to_fp16
from optframe.testing import model_from_text
from optframe.types import OpParameter, OpSpec

Array = np.ndarray[Any, Any]

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
HALF_EPSILON = 2.0**-11
"""Largest relative error of rounding to FP16."""


def parse(text: str, **weights: Array) -> ir.Model:
    return model_from_text(text, domains=["my"], **weights)


def run(model: ir.Model, **feeds: Array) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    """Return op type -> dtype of the first float tensor of the last node of that op."""
    found = {}
    for node in model.graph:
        floats = [v.dtype for v in (*node.outputs, *node.inputs) if v is not None and v.dtype in (HALF, FLOAT)]
        if node.op_type != "Cast" and floats:
            found[node.op_type] = floats[0]
    return found


def casts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Cast"]


def f32(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


LAYER_NORM = """g (float[3,5,32] x, float[32,32] w, float[32] gamma, float[32] beta) => (float[3,5,32] y) {
    h = MatMul(x, w)
    two = Constant<value_float = 2.0>()
    eps = Constant<value_float = 1e-5>()
    axis = Constant<value_ints = [-1]>()
    mean = ReduceMean(h, axis)
    centred = Sub(h, mean)
    square = Pow(centred, two)
    variance = ReduceMean(square, axis)
    shifted = Add(variance, eps)
    spread = Sqrt(shifted)
    normalised = Div(centred, spread)
    scaled = Mul(normalised, gamma)
    n = Add(scaled, beta)
    r = Sub(n, h)
    y = MatMul(r, w)
}"""


def test_a_written_out_layer_norm_keeps_its_statistics_in_fp32(rng: np.random.Generator) -> None:
    weights = {"w": f32(rng, 32, 32), "gamma": f32(rng, 32), "beta": f32(rng, 32)}
    half = to_fp16(parse(LAYER_NORM, **weights))
    kinds = types(half)
    assert {kinds[op] for op in ("ReduceMean", "Pow", "Sqrt", "Div")} == {FLOAT}
    assert {kinds[op] for op in ("MatMul", "Mul", "Add")} == {HALF}  # behind the norm the stream is FP16 again
    x = 100 * f32(rng, 3, 5, 32)  # (100 * sqrt(32))^2 is beyond FP16: squares in FP16 would be infinite
    (found,), (expected,) = run(half, x=x), run(parse(LAYER_NORM, **weights), x=x)
    # h and r are rounded once, y sums 32 products: the error is a few roundings of the largest h
    np.testing.assert_allclose(found, expected, atol=8 * HALF_EPSILON * np.abs(expected).max())


def test_positions_are_computed_in_fp32(rng: np.random.Generator) -> None:
    text = """g (bool[1,600] mask, float[16] frequency, float[16,8] w) => (float[1,600,8] y) {
        kept = Not(mask)
        number = Cast<to = 1>(kept)
        axis = Constant<value_int = 1>()
        count = CumSum(number, axis)
        half = Constant<value_float = 0.5>()
        centre = Sub(count, half)
        last = Constant<value_ints = [2]>()
        column = Unsqueeze(centre, last)
        angle = Mul(column, frequency)
        wave = Sin(angle)
        y = MatMul(wave, w)
    }"""
    weights = {"frequency": f32(rng, 16), "w": f32(rng, 16, 8)}
    model = parse(text, **weights)
    half = to_fp16(model)
    kinds = types(half)
    assert {kinds[op] for op in ("CumSum", "Sub", "Unsqueeze", "Mul", "Sin")} == {FLOAT}
    assert kinds["MatMul"] == HALF
    mask = np.arange(600)[None] > 571
    (found,), (expected,) = run(half, mask=mask), run(model, mask=mask)
    # angles reach 1000, where FP16 resolves half a radian: only FP32 angles give waves right to FP16's rounding
    np.testing.assert_allclose(found, expected, atol=16 * 4 * HALF_EPSILON)


def test_an_inverse_sigmoid_is_computed_in_fp32(rng: np.random.Generator) -> None:
    text = """g (float[7,4] x, float[7,4] p, float[4,4] w) => (float[7,4] y) {
        one = Constant<value_float = 1.0>()
        small = Constant<value_float = 1e-5>()
        h = MatMul(x, w)
        a = Max(p, small)
        rest = Sub(one, p)
        b = Max(rest, small)
        quotient = Div(a, b)
        logit = Log(quotient)
        sum = Add(h, logit)
        y = Sigmoid(sum)
    }"""
    kinds = types(to_fp16(parse(text, w=f32(rng, 4, 4))))
    assert {kinds[op] for op in ("Max", "Sub", "Div", "Log", "Add", "Sigmoid")} == {FLOAT}
    assert kinds["MatMul"] == HALF


def test_each_tensor_is_cast_once_and_casts_are_merged(rng: np.random.Generator) -> None:
    text = """g (float[2,8] x, bool[2,8] flag, float[8,8] w) => (float[2,8] y, float[2,8] z, float[2,8] h) {
        h = MatMul(x, w)
        k = MatMul(x, w)
        gate = Cast<to = 1>(flag)
        open = Mul(h, gate)
        e = Exp(open)
        l = Exp(open)
        back = Cast<to = 10>(e)
        again = Cast<to = 1>(back)
        s = MatMul(again, w)
        y = Add(s, k)
        z = Add(l, e)
    }"""
    half = to_fp16(parse(text, w=f32(rng, 8, 8)))
    sources = [node.inputs[0] for node in casts(half)]
    assert len(
        {(value, node.attributes["to"].as_int()) for value, node in zip(sources, casts(half), strict=True)}
    ) == len(sources)
    for value in sources:
        assert value is not None
        producer = value.producer()
        assert producer is None or producer.op_type != "Cast", f"{value.name} is cast twice"
    assert [value.name for value in half.graph.outputs] == ["y", "z", "h"]
    assert {value.dtype for value in half.graph.outputs} == {FLOAT}
    x = f32(rng, 2, 8)
    outputs = run(half, x=0.1 * x, flag=x > 0)
    assert all(np.isfinite(output).all() for output in outputs)


@pytest.mark.parametrize(("masked", "kind"), [("-inf", HALF), ("-3.4e38", FLOAT)])
def test_masks_do_not_turn_a_softmax_into_nan(masked: str, kind: ir.DataType, rng: np.random.Generator) -> None:
    text = """g (float[4,8] x, bool[4,8] mask, float[8,8] w, float[1] low) => (float[4,8] y) {
        s = MatMul(x, w)
        m = Where(mask, low, s)
        p = Softmax(m)
        y = MatMul(p, w)
    }"""
    model = parse(text, w=f32(rng, 8, 8), low=np.array([float(masked)], np.float32))
    heard: list[str] = []
    half = to_fp16(model, warn=heard.append)
    assert types(half)["Softmax"] == kind
    assert any("low" in line and "Where" in line for line in heard) == (kind == FLOAT)
    mask = np.zeros((4, 8), bool)
    mask[0] = kind == FLOAT  # a row masked all over: finite in FP32, so it has to be in the result
    mask[1, 3:] = True
    feeds = {"x": f32(rng, 4, 8), "mask": mask}
    np.testing.assert_allclose(run(half, **feeds)[0], run(model, **feeds)[0], atol=0.03)


def test_a_softmax_over_many_elements_stays_fp32() -> None:
    text = "g (float[2,%d] x) => (float[2,%d] z) { y = Relu(x) p = Softmax(y) z = Relu(p) }"
    assert types(to_fp16(parse(text % (512, 512))))["Softmax"] == HALF
    assert types(to_fp16(parse(text % (4096, 4096))))["Softmax"] == FLOAT


def test_subgraphs_stay_fp32_and_get_fp32(rng: np.random.Generator) -> None:
    text = """g (float[2,8] x, bool[1] c, float[8,8] w) => (float[2,8] y) {
        h = MatMul(x, w)
        flag = Squeeze(c)
        chosen = If (flag) <
            then_branch = t () => (float[2,8] a) { a = Exp(h) },
            else_branch = e () => (float[2,8] b) { b = Neg(h) }
        >
        y = MatMul(chosen, w)
    }"""
    model = parse(text, w=f32(rng, 8, 8))
    half = to_fp16(model)
    x = 0.3 * f32(rng, 2, 8)
    for flag in (True, False):
        feeds = {"x": x, "c": np.array([flag])}
        np.testing.assert_allclose(run(half, **feeds)[0], run(model, **feeds)[0], rtol=0.02, atol=0.05)
    assert types(half)["MatMul"] == HALF


def test_inputs_that_are_no_data_keep_their_types(rng: np.random.Generator) -> None:
    text = """g (float[1,2,4,4] x, float[2,2,1,1] w, float[4] scales) => (float[1,2,8,8] y, int64[1,2,4,4] i) {
        h = Conv(x, w)
        y = Resize<mode = "nearest">(h, , scales)
        i = Cast<to = 7>(x)
    }"""
    model = parse(text, w=f32(rng, 2, 2, 1, 1), scales=np.array([1, 1, 2, 2], np.float32))
    half = to_fp16(model)
    [resize] = [node for node in half.graph if node.op_type == "Resize"]
    assert [value.dtype if value else None for value in resize.inputs] == [HALF, None, FLOAT]
    x = 3000.5 + 5 * f32(rng, 1, 2, 4, 4)  # FP16 resolves 2 up there: indices would be wrong
    np.testing.assert_array_equal(run(half, x=x)[1], run(model, x=x)[1])


def double_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    text = f"""<domain: "my", opset_import: ["" : {opset}]>
        Double (x) => (y) {{ a = Cast<to = 1>(x) b = Add(a, a) y = CastLike(b, x) }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


DOUBLE = OpSpec("Double", "my", (OpParameter("x"),), (OpParameter("y"),), function="", shape_rule="")


def test_a_plugin_op_takes_fp16_with_its_function_and_a_plain_function_stays(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpSpec, "build_function", lambda self, opset, dtypes: double_function(opset, dtypes))
    text = """g (float[2,8] x, float[8,8] w) => (float[2,8] y) {
        h = MatMul(x, w)
        d = my.Double(h)
        y = MatMul(d, w)
    }"""
    model = parse(text, w=f32(rng, 8, 8))
    function = double_function(18, {"x": "float32"})
    model.functions[function.identifier()] = function
    x = f32(rng, 2, 8)
    for ops, kind in (({"my::Double": DOUBLE}, HALF), ({}, FLOAT)):
        half = to_fp16(model, ops=ops)
        assert types(half)["Double"] == kind
        assert len(half.functions) == 1
        np.testing.assert_allclose(run(half, x=x)[0], run(model, x=x)[0], atol=0.2, rtol=0.02)


def test_fp16_agrees_with_float64_to_its_rounding(rng: np.random.Generator) -> None:
    text = """g (float[6,40] x, float[40,50] w, float[50] b, float[50,3] v) => (float[6,3] y) {
        h = Gemm(x, w, b)
        r = Relu(h)
        y = MatMul(r, v)
    }"""
    w, b, v, x = f32(rng, 40, 50), f32(rng, 50), f32(rng, 50, 3), f32(rng, 6, 40)
    [found] = run(to_fp16(parse(text, w=w, b=b, v=v)), x=x)
    hidden = np.maximum(x.astype(np.float64) @ w + b, 0)
    expected = hidden @ v
    # Each of x, w, b, h, v and y is rounded once; the error of a sum is at most its magnitudes' sum times that.
    bound = 6 * HALF_EPSILON * ((np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(b)) @ np.abs(v))
    assert (np.abs(found - expected) <= bound).all()
    assert np.abs(found - expected).max() > 1e-6  # it did compute in FP16


def test_elements_too_small_for_fp16_are_reported(rng: np.random.Generator) -> None:
    w = f32(rng, 8, 8)
    w[0, :3] = 1e-9
    heard: list[str] = []
    to_fp16(parse("g (float[2,8] x, float[8,8] w) => (float[2,8] y) { y = MatMul(x, w) }", w=w), warn=heard.append)
    assert any(line.startswith("FP16: 3 of 64 elements") for line in heard)


@pytest.mark.parametrize("pattern", ["second*", "blocks.1.linear", "*/MatMul_7", "Relu"])
def test_nodes_are_kept_by_name_module_origin_or_op(pattern: str, rng: np.random.Generator) -> None:
    text = "g (float[2,8] x, float[8,8] w) => (float[2,8] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    model = parse(text, w=f32(rng, 8, 8))
    first, relu, second = model.graph
    first.name, relu.name, second.name = "first", "act", "second_one"
    second.metadata_props.update({SCOPE_KEY: "blocks.1.linear", ORIGIN_KEY: "/a/Add_1,/b/MatMul_7"})
    half = to_fp16(model, keep=[pattern])
    kinds = {node.name: node.inputs[0].dtype for node in half.graph if node.op_type != "Cast"}  # type: ignore[union-attr]
    kept = "act" if pattern == "Relu" else "second_one"
    assert kinds[kept] == FLOAT
    assert kinds["first"] == HALF


def test_a_second_conversion_changes_nothing(rng: np.random.Generator) -> None:
    weights = {"w": f32(rng, 32, 32), "gamma": f32(rng, 32), "beta": f32(rng, 32)}
    once = to_fp16(parse(LAYER_NORM, **weights))
    twice = to_fp16(once)
    assert graph.op_histogram(once) == graph.op_histogram(twice)
