"""`fold-scale`: constant factors go into weights before or behind them, exactly, and stay where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import ORIGIN_KEY, PASS_KEY, PassContext
from optframe_passes.fold_scale import FoldScale

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

# Sums of at most a hundred products in another order: their roundings are 6e-8 each, relative to the largest.
FP32 = 2e-5

FORMS: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, int]]] = {
    "behind-matmul": (
        "float[N,5,4] x, float w, float s) => (float[A,B,C] y) { a = MatMul (x, w)  y = Mul (a, s) }",
        {"w": (4, 6), "s": ()},
        {"MatMul": 1},
    ),
    "columns-divided-behind-a-bias": (
        "float[N,5,4] x, float w, float b, float s) => (float[A,B,C] y)"
        "{ a = MatMul (x, w)  c = Add (b, a)  y = Div (c, s) }",
        {"w": (4, 6), "b": (5, 6), "s": (1, 1, 6)},
        {"MatMul": 1, "Add": 1},
    ),
    "scalar-bias-becomes-a-vector": (
        "float[N,4] x, float w, float b, float s) => (float[A,B] y)"
        "{ a = MatMul (x, w)  c = Sub (b, a)  y = Mul (s, c) }",
        {"w": (4, 6), "b": (), "s": (6,)},
        {"MatMul": 1, "Sub": 1},
    ),
    "of-heads": (
        "float[2,5,4] x, float w, float b, float s) => (float[A,B,C,D] y) <int64[4] t = {0, 5, 3, 2}>"
        "{ a = MatMul (x, w)  c = Add (a, b)  d = Reshape (c, t)"
        "  e = Transpose <perm = [0, 2, 1, 3]> (d)  y = Mul (e, s) }",
        {"w": (4, 6), "b": (6,), "s": (3, 1, 2)},
        {"MatMul": 1, "Add": 1, "Reshape": 1, "Transpose": 1},
    ),
    "of-scores": (
        "float[N,3,5,4] q, float[N,3,4,7] k, float w, float s) => (float[A,B,C,D] y)"
        "{ a = MatMul (q, w)  p = MatMul (a, k)  y = Div (p, s) }",
        {"w": (4, 4), "s": (1,)},
        {"MatMul": 2},
    ),
    "of-scores-by-way-of-the-keys": (
        "float[N,3,5,4] q, float[N,7,4] k, float w, float s) => (float[A,B,C,D] y) <int64[1] one = {1}>"
        "{ a = MatMul (k, w)  t = Transpose <perm = [0, 2, 1]> (a)  u = Unsqueeze (t, one)  p = MatMul (q, u)"
        "  y = Mul (p, s) }",
        {"w": (4, 4), "s": ()},
        {"MatMul": 2, "Transpose": 1, "Unsqueeze": 1},
    ),
    "through-relu": (
        "float[N,4] x, float w, float s) => (float[A,B] y) { a = MatMul (x, w)  r = Relu (a)  y = Mul (r, s) }",
        {"w": (4, 6), "s": (1, 1)},
        {"MatMul": 1, "Relu": 1},
    ),
    "gemm-of-transposed": (
        "float[5,4] x, float w, float b, float s) => (float[A,B] y)"
        "{ a = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)  y = Mul (a, s) }",
        {"w": (6, 4), "b": (5, 1), "s": (6,)},
        {"Gemm": 1},
    ),
    "conv-by-way-of-reshape": (
        "float[N,3,5,5] x, float w, float b, float s) => (float[A,B,C] y) <int64[3] t = {0, 4, -1}>"
        "{ a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  r = Reshape (a, t)  y = Mul (r, s) }",
        {"w": (4, 3, 3, 3), "b": (4,), "s": (1, 4, 1)},
        {"Conv": 1, "Reshape": 1},
    ),
    "conv-transpose": (
        "float[N,3,5,5] x, float w, float b, float s) => (float[A,B,C,D] y)"
        "{ a = ConvTranspose (x, w, b)  y = Mul (a, s) }",
        {"w": (3, 4, 2, 2), "b": (4,), "s": ()},
        {"ConvTranspose": 1},
    ),
    "factors-in-a-row": (
        "float[N,4] x, float s, float t, float u) => (float[A,B] y)"
        "{ a = Sin (x)  b = Mul (a, s)  c = Div (b, t)  y = Mul (u, c) }",
        {"s": (4,), "t": (), "u": (1,)},
        {"Sin": 1, "Mul": 1},
    ),
    "of-a-quotient": (
        "float[N,4] x, float s, float t) => (float[A,B] y) { a = Exp (x)  b = Div (s, a)  y = Mul (b, t) }",
        {"s": (4,), "t": ()},
        {"Exp": 1, "Div": 1},
    ),
    "in-front-of-conv": (
        "float[N,3,5,5] x, float w, float s) => (float[A,B,C,D] y)"
        "{ a = Div (x, s)  y = Conv <pads = [1, 1, 1, 1]> (a, w) }",
        {"w": (4, 3, 3, 3), "s": (3, 1, 1)},
        {"Conv": 1},
    ),
    "in-front-of-conv-transpose": (
        "float[N,3,5,5] x, float w, float s) => (float[A,B,C,D] y) { a = Mul (x, s)  y = ConvTranspose (a, w) }",
        {"w": (3, 4, 2, 2), "s": (3, 1, 1)},
        {"ConvTranspose": 1},
    ),
    "in-front-of-grouped-conv": (
        "float[N,4,5,5] x, float w, float s) => (float[A,B,C,D] y) { a = Mul (x, s)  y = Conv <group = 2> (a, w) }",
        {"w": (4, 2, 3, 3), "s": ()},
        {"Conv": 1},
    ),
    "in-front-of-several": (
        "float[N,3,4] x, float w, float v, float s) => (float[A,B,C] y)"
        "{ a = Mul (x, s)  t = Transpose <perm = [1, 0, 2]> (a)  b = MatMul (t, w)  c = MatMul (a, v)"
        "  d = Transpose <perm = [1, 0, 2]> (c)  y = Add (b, d) }",
        {"w": (4, 6), "v": (4, 6), "s": (4,)},
        {"Transpose": 2, "MatMul": 2, "Add": 1},
    ),
    "in-front-of-gemm": (
        "float[5,4] x, float w, float b, float s) => (float[A,B] y)"
        "{ a = Mul (x, s)  y = Gemm <transB = 1, alpha = 0.5> (a, w, b) }",
        {"w": (6, 4), "b": (6,), "s": (4,)},
        {"Gemm": 1},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_factors_go_into_weights(form: str, parse: Parse, weigh: Weigh, check: Check, rng: Any) -> None:
    text, shapes, ops = FORMS[form]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    scales = {name: rng.uniform(0.3, 3, shapes[name]).astype(np.float32) for name in "stu" if name in shapes}
    outcome = check(FoldScale(), weigh(parse(f"g ({text}"), **(arrays | scales)), allowed=FP32)
    assert outcome.ops == ops


STAY = {
    "no-weights": "{ a = Sin (x)  y = Mul (a, s) }",
    "another-reader": "{ a = MatMul (x, w)  b = Mul (a, s)  y = Add (a, b) }",
    "nonlinear-between": "{ a = MatMul (x, w)  b = Tanh (a)  y = Mul (b, s) }",
    "negative-behind-relu": "{ a = MatMul (x, w)  b = Relu (a)  y = Mul (b, minus) }",
    "one-reader-of-two-takes-it": "{ a = Mul (x, s)  b = MatMul (a, w)  y = Add (a, b) }",
    "rows": "{ a = MatMul (x, w)  y = Mul (a, rows) }",
    "sum-of-activations": "{ a = MatMul (x, w)  c = Add (a, x)  y = Mul (c, s) }",
    "divided-by": "{ a = MatMul (x, w)  y = Div (s, a) }",
    "by-zero": "{ a = MatMul (x, w)  y = Mul (a, zero) }",
    "broadcasts": "{ a = MatMul (x, w)  y = Mul (a, deep) }",
}


@pytest.mark.parametrize("form", STAY)
def test_factors_stay(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    shapes = {"w": (4, 4), "s": (), "rows": (5, 1), "deep": (2, 5, 4)}
    arrays = {name: rng.uniform(0.5, 2, shape) for name, shape in shapes.items()}
    arrays |= {"minus": np.array(-0.5), "zero": np.zeros(())}
    dims = "A,B,C" if form == "broadcasts" else "A,B"
    inputs = "".join(f", float {name}" for name in arrays)
    model = parse(f"g (float[5,4] x{inputs}) => (float[{dims}] y) {STAY[form]}")
    weigh(model, **{name: array.astype(np.float32) for name, array in arrays.items()})
    outcome = check(FoldScale(), model)
    assert not outcome.result.modified
    assert outcome.reasons == [] or "no constant weights" in outcome.reasons[0]


def test_weights_are_rounded_once_and_know_where_they_come_from(parse: Parse, weigh: Weigh, rng: Any) -> None:
    weight, scale = rng.standard_normal((32, 32)).astype(np.float32), np.float32(1 / np.sqrt(32))
    model = parse("""g (float[1,9,32] x, float w, float s) => (float[A,B,C,D] y) <int64[4] t = {1, 9, 4, 8}>
        { [project] a = MatMul (x, w)  [heads] b = Reshape (a, t)  [scale] y = Mul (b, s) }""")
    weigh(model, w=weight, s=np.array(scale))
    FoldScale().run(model, PassContext(pass_name="fold-scale"))
    matmul, reshape = model.graph
    expected = (weight.astype(np.float64) * np.float64(scale)).astype(np.float32)
    np.testing.assert_array_equal(graph.constant(matmul.inputs[1]), expected)
    assert matmul.metadata_props[ORIGIN_KEY] == "project"
    assert matmul.metadata_props[PASS_KEY] == "fold-scale"
    assert reshape.outputs[0].name == "y"
    assert matmul.outputs[0].name != "a"  # its content is another one


def test_fp16_weights_stay_in_range(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    text = "g (float16[3,4] x, float16 w, float16 s) => (float16[A,B] y) { a = MatMul (x, w)  y = Mul (a, s) }"
    for scale, weight, folds in ((0.18, 1.0, True), (300.0, 300.0, False), (1e-3, 1e-3, False)):
        arrays = {"w": weight * rng.uniform(0.9, 1, (4, 5)), "s": np.array(scale)}
        model = weigh(parse(text), **{name: array.astype(np.float16) for name, array in arrays.items()})
        feeds = {"x": rng.uniform(-0.01, 0.01, (3, 4)).astype(np.float16)}
        outcome = check(FoldScale(), model, [feeds])
        assert outcome.result.modified == folds


def test_fp16_operands_of_a_product_are_not_enlarged(parse: Parse, weigh: Weigh, check: Check) -> None:
    text = """g (float16[3,4] x, float16[4,3] k, float16 w, float16 s) => (float16[A,B] y)
        { a = MatMul (x, w)  p = MatMul (a, k)  y = Mul (p, s) }"""
    for scale, folds in ((0.5, True), (2.0, False)):
        model = weigh(parse(text), w=np.eye(4, dtype=np.float16), s=np.array(scale, np.float16))
        assert check(FoldScale(), model).result.modified == folds


def test_sums_do_not_grow_until_they_overflow(parse: Parse, weigh: Weigh, check: Check) -> None:
    """8000 * 0.001 + 60 is 68, but 8000 + 60 / 0.001 is no FP16."""
    text = """g ({0}[3,4] x, {0}[4] s, {0}[4] c, {0}[4,5] w) => ({0}[A,B] y)
        {{ t = Mul (x, s)  u = Add (t, c)  y = MatMul (u, w) }}"""
    for kind, dtype, scale, folds in (
        ("float16", np.float16, 0.001, False),
        ("float", np.float32, 0.001, True),
        ("float", np.float32, 1e-20, False),
    ):
        constants = {"s": np.full(4, scale), "c": np.full(4, 60.0), "w": np.ones((4, 5))}
        model = weigh(parse(text.format(kind)), **{name: array.astype(dtype) for name, array in constants.items()})
        assert check(FoldScale(), model).result.modified == folds, (kind, scale)


def test_large_shared_weights_are_not_copied(parse: Parse, weigh: Weigh, check: Check, rng: Any) -> None:
    text = """g (float[3,8] x, float w, float s) => (float[A,B] y, float[C,D] z)
        { a = MatMul (x, w)  y = Mul (a, s)  b = Sin (x)  z = MatMul (b, w) }"""
    model = weigh(parse(text), w=rng.standard_normal((8, 8)).astype(np.float32), s=np.array(0.5, np.float32))
    assert check(FoldScale(), model, allowed=FP32).ops == {"MatMul": 2, "Sin": 1}
    assert not check(FoldScale(max_copy_bytes=255), model).result.modified


def test_inside_subgraphs(check: Check) -> None:
    outcome = check(
        FoldScale(),
        """g (float[2] x, bool c) => (float[2] y) <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float s = {0.5}> {
            y = If (c) <then_branch = t () => (float[2] p) { a = MatMul (x, w)  p = Mul (a, s) },
                        else_branch = e () => (float[2] q) { q = Neg (x) }> }""",
        [{"x": np.array([1, 2], np.float32), "c": np.array(flag)} for flag in (True, False)],
    )
    assert outcome.ops == {"If": 1, "MatMul": 1, "Neg": 1}


def test_a_factor_before_a_product_with_a_vector(check: Check, parse: Parse, weigh: Weigh) -> None:
    text = "g (float[N,5,4] x, float s, float v) => (float[A,B] y) { a = Mul (x, s)  y = MatMul (a, v) }"
    model = weigh(parse(text), s=np.array(0.5, np.float32), v=np.array([3, -1, 2, 5], np.float32))
    assert check(FoldScale(), model, allowed=FP32).ops == {"MatMul": 1}
