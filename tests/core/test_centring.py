"""Averages that only make keys of an attention are centred before FP16 rounds them, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph
from optframe.precision import to_fp16
from optframe.precision.centring import centre
from optframe.shapes import inferred
from optframe.testing import model_from_text
from optframe.types import OpParameter, OpSpec

Array = np.ndarray[Any, Any]

ATTENTION = """g (float[1,6,5,8] x, float[1,5,8] place, float[8,8] w, float[7,8] q) => (float[1,7,5] y) {
    mean = %s
    k = MatMul(mean, w)
    placed = Add(place, k)
    turned = Transpose<perm = [0,2,1]>(placed)
    scores = MatMul(q, turned)
    y = Softmax<axis = -1>(scores)
}"""
MEANS = {
    17: "ReduceMean<axes = [1], keepdims = 0>(x)",
    18: "ReduceMean<keepdims = 0>(x, one)",
}


def parse(text: str, opset: int = 18, **weights: Array) -> ir.Model:
    return model_from_text(text, opset, domains=["my"], one=np.array([1], np.int64), **weights)


def run(model: ir.Model, **feeds: Array) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Array = session.run(None, feeds)[0]
    return output


def attention(rng: np.random.Generator, opset: int = 18) -> ir.Model:
    """Keys are averages of much in common and little of their own: what FP16 resolves badly."""
    weights = {"place": (1, 5, 8), "w": (8, 8), "q": (7, 8)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    return parse(ATTENTION % MEANS[opset], opset, **{**arrays, "place": arrays["place"] / 20 + 3})


def image(rng: np.random.Generator) -> Array:
    common = 50 * rng.standard_normal((1, 1, 1, 8))
    return (common + 0.05 * rng.standard_normal((1, 6, 5, 8))).astype(np.float32)


@pytest.mark.parametrize("opset", [17, 18])
def test_centred_keys_compute_the_same(opset: int, rng: np.random.Generator) -> None:
    model = inferred(attention(rng, opset))
    centred = model.clone()
    exact = centre(centred, {})
    assert [node.op_type for node in exact] == ["Sub"]
    constants = [graph.constant(node.inputs[0]) for node in centred.graph if node.op_type == "Add"]
    assert constants[0] is not None
    assert np.abs(constants[0].mean(axis=1)).max() < 1e-6  # the constant on the way is centred as well: float32 sums
    x = image(rng)
    np.testing.assert_allclose(run(centred, x=x), run(model, x=x), atol=2e-3)  # scores near 1000, in float32


def test_fp16_resolves_keys_that_have_much_in_common(rng: np.random.Generator) -> None:
    model = attention(rng)
    x = image(rng)
    expected = run(model, x=x).astype(np.float64)
    half = to_fp16(model)
    [subtract] = [node for node in half.graph if node.op_type == "Sub"]
    assert subtract.outputs[0].dtype == ir.DataType.FLOAT
    blind = to_fp16(blinded(model))
    error, without = (np.abs(run(m, x=x) - expected).max() for m in (half, blind))
    assert error < 0.01  # scores below 1, of keys that are rounded to 11 bits
    assert error < 0.3 * without


def blinded(model: ir.Model) -> ir.Model:
    """Return a model that computes the same, in which the keys are an output too and so stay as they are."""
    copy = inferred(model)
    copy.graph.outputs.append(next(node.outputs[0] for node in copy.graph if node.op_type == "Transpose"))
    return copy


def test_positions_added_before_the_average_stay_fp32(rng: np.random.Generator) -> None:
    text = ATTENTION.replace("mean = %s", "sum = Add(x, bias) mean = ReduceMean<keepdims = 0>(sum, one)").replace(
        "float[1,5,8] place", "float[1,6,5,8] bias, float[1,5,8] place"
    )
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"bias": (1, 6, 5, 8), "place": (1, 5, 8), "w": (8, 8), "q": (7, 8)}.items()
    }
    half = to_fp16(parse(text, **arrays))
    first = next(node for node in half.graph if node.op_type == "Add")
    assert first.outputs[0].dtype == ir.DataType.FLOAT


OTHER_USES = {
    "an output": "y2 = Identity(mean)",
    "another axis": "y2 = Softmax<axis = 2>(mean)",
    "something else": "y2 = Relu(mean)",
    "itself": "turn = Transpose<perm = [0,2,1]>(mean) s = MatMul(mean, turn) y2 = Relu(s)",
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_averages_that_something_else_reads_stay(use: str, rng: np.random.Generator) -> None:
    text = (ATTENTION % MEANS[18]).replace("=> (float[1,7,5] y)", "=> (float[1,7,5] y, float[a,b,c] y2)")
    text = text.replace("k = MatMul", f"{OTHER_USES[use]} k = MatMul")
    weights = {"place": (1, 5, 8), "w": (8, 8), "q": (7, 8)}
    model = parse(text, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()})
    assert centre(inferred(model), {}) == set()


@pytest.mark.parametrize(("declared", "count"), [(1, 1), (0, 0), (None, 0)])
def test_an_op_says_along_which_axis_its_keys_may_shift(
    declared: int | None, count: int, rng: np.random.Generator
) -> None:
    text = """g (float[1,6,5,8] x, float[8,8] w) => (float[1,5,8] y) {
        mean = ReduceMean<keepdims = 0>(x, one)
        k = MatMul(mean, w)
        y = my.Keys(k)
    }"""
    parameter = OpParameter("k", shift_invariant_axis=declared)
    spec = OpSpec("Keys", "my", (parameter,), (OpParameter("y"),), "nowhere:f", "nowhere:s")
    model = inferred(parse(text, w=rng.standard_normal((8, 8)).astype(np.float32)))
    assert len(centre(model, {"my::Keys": spec})) == count
