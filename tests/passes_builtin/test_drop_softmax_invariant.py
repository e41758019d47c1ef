"""`drop-softmax-invariant`: biases that attention cancels or hands on, with and without masks, in any layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph
from optframe.passes import PassContext
from optframe_passes.drop_softmax_invariant import DropSoftmaxInvariant

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

# Softmax's arguments change by a common number of up to 10, so roundings of 1e-6 enter its exponentials.
FP32 = 5e-5

ATTENTION = """g (float[N,5,8] x{inputs}) => (float[A,B,C] y) <
    int64[4] heads = {{0, 5, 2, 4}}, int64[3] tokens = {{0, 5, 8}},
    float infinity = {{-inf}}, float large = {{-1e4}}> {{
    q0 = MatMul (x, wq)  q1 = Reshape (q0, heads)  q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul (x, wk)  k1 = {key}  k2 = Reshape (k1, heads)  k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (x, wv)  v1 = {value}  v2 = Reshape (v1, heads)  v = Transpose <perm = [0, 2, 1, 3]> (v2)
    s0 = MatMul (q, k)  s = {mask}  p = Softmax <axis = -1> (s)  o0 = MatMul (p, v)
    o1 = Transpose <perm = [0, 2, 1, 3]> (o0)  o2 = Reshape (o1, tokens)  o3 = MatMul (o2, wo)  y = {out} }}"""

SHAPES = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 6), "bk": (8,), "bv": (1, 1, 8), "bo": (6,), "third": ()}
SHAPES |= {"rows": (5, 8), "wide": (5, 6), "perhead": (2, 1, 1)}


def attention(
    parse: Parse, weigh: Weigh, rng: np.random.Generator, *, key: str, value: str, mask: str, out: str, opset: int = 18
) -> ir.Model:
    text = ATTENTION.replace("{key}", key).replace("{value}", value).replace("{mask}", mask).replace("{out}", out)
    used = [name for name in SHAPES if re.search(rf"[(,] ?{name}[,)]", text)]
    inputs = "".join(f", float {name}" for name in used)
    inputs += ", bool[N,1,1,5] m" if "(m," in mask else ", float[N,1,1,5] f" if "f)" in mask else ""
    model = parse(text.replace("{inputs}", inputs).replace("{{", "{").replace("}}", "}"), opset=opset)
    return weigh(model, **{name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in used})


def feeds(model: ir.Model, rng: np.random.Generator) -> list[dict[str, Array]]:
    """Return inputs of two sizes, with masks that leave at least one key to each query."""
    found = []
    for batch in (1, 3):
        feed: dict[str, Array] = {"x": rng.standard_normal((batch, 5, 8)).astype(np.float32)}
        mask = rng.random((batch, 1, 1, 5)) < 0.4
        mask[..., 0] = False
        if any(value.name == "m" for value in model.graph.inputs):
            feed["m"] = mask
        if any(value.name == "f" for value in model.graph.inputs):
            feed["f"] = np.where(mask, -np.inf, rng.standard_normal(mask.shape)).astype(np.float32)
        found.append(feed)
    return found


PLAIN = {"key": "Add (k0, bk)", "value": "Add (v0, bv)", "mask": "Div (s0, third)", "out": "Add (o3, bo)"}
MASKS = {
    "scale": "Div (s0, third)",
    "scale-of-each-head": "Mul (perhead, s0)",
    "masked-fill": "Where (m, infinity, s0)",
    "keep": "Where (m, s0, infinity)",
    "added-mask": "Add (s0, f)",
    "none": "Identity (s0)",
}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_biases_of_keys_and_values_go(
    mask: str, opset: int, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = attention(parse, weigh, rng, **(PLAIN | {"mask": MASKS[mask]}), opset=opset)
    drawn = feeds(model, rng)
    if mask == "keep":  # the other way round: what is true stays
        for feed in drawn:
            feed["m"] = ~feed["m"]
    outcome = check(DropSoftmaxInvariant(), model, drawn, allowed=FP32)
    assert outcome.ops["Add"] == 1 + (mask == "added-mask")
    assert outcome.result.rewrites == 2


def test_a_row_that_is_masked_as_a_whole_stays_nan(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = attention(parse, weigh, rng, **(PLAIN | {"mask": MASKS["masked-fill"]}))
    feed = feeds(model, rng)[1]
    feed["m"][1] = True
    changed = model.clone()
    assert DropSoftmaxInvariant().run(changed, PassContext()).rewrites == 2
    before, after = run(model, feed), run(changed, feed)
    assert np.isnan(before[1]).all()
    np.testing.assert_array_equal(np.isnan(before), np.isnan(after))
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], rtol=1e-4, atol=1e-5)  # outputs of about 1; see FP32


def run(model: ir.Model, feed: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (result,) = session.run(None, feed)
    return np.asarray(result)


def test_the_bias_behind_takes_over(parse: Parse, weigh: Weigh, rng: np.random.Generator) -> None:
    model = attention(parse, weigh, rng, **(PLAIN | {"out": "Add (wide, o3)"}))
    bv, wo, wide = (graph.constant(model.graph.initializers[name]) for name in ("bv", "wo", "wide"))
    assert bv is not None
    assert wo is not None
    assert wide is not None
    DropSoftmaxInvariant().run(model, PassContext())
    addition = model.graph[-1]
    found = graph.constant(addition.inputs[0])
    assert found is not None
    expected = wide + (bv.astype(np.float64) @ wo)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # one rounding of numbers below 16


STAY = {
    "keys-that-vary": PLAIN | {"key": "Add (k0, rows)", "value": "Identity (v0)"},
    "values-that-vary": PLAIN | {"key": "Identity (k0)", "value": "Add (v0, rows)"},
    "no-constant-behind": PLAIN | {"key": "Identity (k0)", "out": "Relu (o3)"},
    "scores-bent": PLAIN | {"mask": "Tanh (s0)", "value": "Identity (v0)"},
    "finite-fill": PLAIN | {"mask": "Where (m, large, s0)", "value": "Identity (v0)"},
    "subtracted-from": PLAIN | {"key": "Sub (bk, k0)", "value": "Sub (bv, v0)"},
}


@pytest.mark.parametrize("form", STAY)
def test_other_additions_stay(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = attention(parse, weigh, rng, **STAY[form])
    outcome = check(DropSoftmaxInvariant(), model, feeds(model, rng))
    assert not outcome.result.modified


def test_numbers_of_whole_rows_drop_out_of_scores(check: Check) -> None:
    outcome = check(
        DropSoftmaxInvariant(),
        """g (float[N,3,4] s) => (float[N,3,4] p) <float[3,1] t = {10.0, -20.0, 0.5}, float[1] u = {3.0}> {
            r = Relu (s)  a = Add (r, t)  b = Sub (a, u)  p = Softmax (b) }""",
        allowed=FP32,
    )
    assert outcome.ops == {"Relu": 1, "Softmax": 1}
    assert outcome.result.rewrites == 2


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (s, t)  p = Softmax <axis = 1> (a)",
        "a = Add (s, w)  p = Softmax (a)",
        "a = Add (s, t)  b = Softmax (a)  p = Add (a, b)",
    ],
)
def test_other_scores_stay(body: str, check: Check) -> None:
    text = f"""g (float[N,3,4] s) => (float[N,3,4] p) <float[3,1] t = {{10.0, -20.0, 0.5}},
        float[4] w = {{1.0, 2.0, 3.0, 4.0}}> {{ {body} }}"""
    assert not check(DropSoftmaxInvariant(), text).result.modified


def test_infinite_constants_stay(parse: Parse) -> None:
    model = parse("""g (float[N,3,4] s) => (float[N,3,4] p) <float[3,1] t = {inf, -inf, nan}>
        { a = Add (s, t)  p = Softmax (a) }""")
    assert not DropSoftmaxInvariant().run(model, PassContext()).modified


def test_row_and_column_attention_hand_on_the_bias_of_the_value(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    """Anchor DETR's attention: over the 4 columns for all 5 rows at once, then over the rows."""
    model = parse("""g (float[1,5,4,6] x, float[1,2,7,4] r, float[1,2,7,5] c, float wv, float bv, float wo, float bo)
        => (float[A,B,C] y) <int64[5] split = {1, 5, 4, 2, 3}, int64[4] rows = {1, 2, 4, 15},
            int64[5] columns = {1, 2, 7, 5, 3}, int64[3] tokens = {1, 7, 6}, int64[1] three = {3}> {
        v0 = MatMul (x, wv)  v1 = Add (v0, bv)  v2 = Reshape (v1, split)  v3 = Transpose <perm = [0,3,2,1,4]> (v2)
        v = Reshape (v3, rows)  pr = Softmax (r)  pc = Softmax (c)  o0 = MatMul (pr, v)  o1 = Reshape (o0, columns)
        pu = Unsqueeze (pc, three)  o2 = MatMul (pu, o1)  o3 = Squeeze (o2, three)
        o4 = Transpose <perm = [0,2,1,3]> (o3)  o5 = Reshape (o4, tokens)  o6 = MatMul (o5, wo)  y = Add (bo, o6) }""")
    arrays = {"wv": (6, 6), "bv": (6,), "wo": (6, 4), "bo": (4,)}
    weigh(model, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()})
    outcome = check(DropSoftmaxInvariant(), model, allowed=FP32)
    assert outcome.ops["Add"] == 1
    assert outcome.ops["MatMul"] == 4


def test_fp16(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = parse("""g (float16[N,3,4] s, float16[N,4,8] v0, float16 bv, float16 w, float16 b) => (float16[A,B,C] y)
        { p = Softmax (s)  v = Add (v0, bv)  o = MatMul (p, v)  m = MatMul (o, w)  y = Add (m, b) }""")
    arrays = {"bv": (8,), "w": (8, 4), "b": (4,)}
    weigh(model, **{name: rng.standard_normal(shape).astype(np.float16) for name, shape in arrays.items()})
    # In FP16 the rows of a softmax sum to 1 within 5e-4.
    assert check(DropSoftmaxInvariant(), model, allowed=1e-2).ops["Add"] == 1
