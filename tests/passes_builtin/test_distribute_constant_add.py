"""`distribute-constant-add`: constants move behind linear layers where the model does not grow by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import ORIGIN_KEY, PassContext
from optframe_passes.distribute_constant_add import DistributeConstantAdd

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

# (x + c) W against x W + c W: sums of a dozen products in another order, 6e-8 each, with some cancellation.
FP32 = 2e-5

SHAPES = {"w": (4, 6), "v": (4, 5), "b": (6,), "d": (5,), "p": (4,), "r": (1, 3, 1, 4), "k": (1, 1, 1, 4), "e": (3, 1)}

MOVES: dict[str, tuple[str, dict[str, int]]] = {
    "into-the-bias": ("a = Add (x, p)  m = MatMul (a, w)  y = Add (m, b)", {"MatMul": 1, "Add": 1}),
    "operands-swapped": ("a = Add (k, x)  m = MatMul (a, w)  y = Add (b, m)", {"MatMul": 1, "Add": 1}),
    "becomes-the-bias": ("a = Add (x, p)  y = MatMul (a, w)", {"MatMul": 1, "Add": 1}),
    "two-readers": (
        "a = Add (x, r)  m = MatMul (a, w)  y = Add (m, b)  n = MatMul (a, v)  z = Add (n, d)",
        {"MatMul": 2, "Add": 2},
    ),
    "one-of-two-without-a-bias": (
        "a = Add (x, r)  m = MatMul (a, w)  y = Add (m, b)  z = MatMul (a, v)",
        {"MatMul": 2, "Add": 2},
    ),
    "subtracted": ("a = Sub (x, r)  m = MatMul (a, w)  y = Sub (m, b)", {"MatMul": 1, "Sub": 1}),
    "bias-minus-product": ("a = Add (x, r)  m = MatMul (a, w)  y = Sub (b, m)", {"MatMul": 1, "Sub": 1}),
    "two-constants": ("a = Add (x, p)  y = Add (a, r)", {"Add": 1}),
    "through-two-layers": (
        "a = Add (x, p)  m = MatMul (a, w)  c = Add (m, b)  n = MatMul (c, u)  y = Add (n, d)",
        {"MatMul": 2, "Add": 1},
    ),
    "by-way-of-a-shared-product": (
        "a = Add (x, r)  m = MatMul (a, w)  y = Add (m, b)  z = Add (m, q)",
        {"MatMul": 1, "Add": 2},
    ),
    "past-a-reshape": (
        "a = Add (x, r)  s = Reshape (a, t)  m = MatMul (s, w)  y = Add (m, b)  n = MatMul (a, v)  z = Add (n, d)",
        {"MatMul": 2, "Add": 2, "Reshape": 1},
    ),
    "through-a-mean": (
        "a = Add (x, r)  s = ReduceMean (a, two)  m = MatMul (s, w)  y = Add (m, b)  n = MatMul (a, v)  z = Add (n, d)",
        {"MatMul": 2, "Add": 2, "ReduceMean": 1},
    ),
    "through-a-mean-that-it-varies-along": (
        "a = Add (x, r)  s = ReduceMean (a, one)  m = MatMul (s, w)  y = Add (m, b)",
        {"MatMul": 1, "Add": 1, "ReduceMean": 1},
    ),
    "past-a-reshape-with-a-wide-bias": (
        "a = Add (x, r)  s = Reshape (a, t)  m = MatMul (s, w)  y = Add (m, g)",
        {"MatMul": 1, "Add": 1, "Reshape": 1},
    ),
}


@pytest.mark.parametrize("form", MOVES)
def test_constants_move_behind(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body, ops = MOVES[form]
    shapes = SHAPES | {"u": (6, 5), "q": (2, 6), "g": (6, 6)}
    used = [name for name in shapes if re.search(rf"[(,] ?{name}[,)]", body)]
    outputs = ", float[A2,B2,C2,D2] z" if "  z = " in body else ""
    dims = "A,B,C" if "past" in form else "A,B,C,D"
    text = f"g (float[N,3,2,4] x{''.join(f', float {name}' for name in used)}) => (float[{dims}] y{outputs})"
    model = parse(f"{text} <int64[3] t = {{0, 6, -1}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{ {body} }}")
    weigh(model, **{name: rng.standard_normal(shapes[name]).astype(np.float32) for name in used})
    outcome = check(DistributeConstantAdd(), model, allowed=FP32)
    assert outcome.ops == ops
    assert outcome.result.modified


def test_a_mean_gives_the_bias_its_mean(parse: Parse, weigh: Weigh, check: Check) -> None:
    text = "g (float[2,3,4] x, float c, float w) => (float[A,B] y) <int64[1] one = {1}>"
    body = "{ a = Add (x, c)  s = ReduceMean <keepdims = 0> (a, one)  y = MatMul (s, w) }"
    constant = np.arange(12, dtype=np.float32).reshape(3, 4)
    model = weigh(parse(f"{text} {body}"), c=constant, w=np.eye(4, dtype=np.float32))
    outcome = check(DistributeConstantAdd(), model, allowed=FP32)
    assert outcome.ops == {"ReduceMean": 1, "MatMul": 1, "Add": 1}
    (bias,) = [value for value in outcome.node("Add").inputs if value.const_value is not None]
    np.testing.assert_array_equal(bias.const_value.numpy(), constant.mean(0))  # a few numbers that FP32 holds


STAYS = {
    "two-readers-without-a-bias": ("a = Add (x, p)  y = MatMul (a, w)  z = MatMul (a, v)", "no bias"),
    "nonlinear-reader": ("a = Add (x, p)  m = MatMul (a, w)  y = Add (m, b)  z = Relu (a)", "Relu reads the sum"),
    "graph-output": ("y = Add (x, p)  m = MatMul (y, w)  z = Add (m, b)", "graph output reads the sum"),
    "broadcasts": ("l = MatMul (x, one)  a = Add (l, p)  m = MatMul (a, w)  y = Add (m, b)", "broadcast"),
    "subtracted-from": ("a = Sub (p, x)  m = MatMul (a, w)  y = Add (m, b)", "subtracts from"),
    "right-operand": ("a = Add (x, p)  y = MatMul (left, a)", ""),
    "no-layer": ("a = Add (x, p)  y = Sigmoid (a)", ""),
    "reshape-of-the-last-axis": ("a = Add (x, p)  s = Reshape (a, t)  m = MatMul (s, o)  y = Add (m, b)", ""),
}


@pytest.mark.parametrize("form", STAYS)
def test_constants_stay(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body, reason = STAYS[form]
    shapes = SHAPES | {"one": (4, 1), "left": (2, 4), "o": (8, 6)}
    used = [name for name in shapes if re.search(rf"[(,] ?{name}[,)]", body)]
    outputs = ", float[E,F] z" if "  z = " in body else ""
    text = f"g (float[4,4] x{''.join(f', float {name}' for name in used)}) => (float[A,B] y{outputs})"
    model = parse(f"{text} <int64[2] t = {{2, 8}}> {{ {body} }}")
    weigh(model, **{name: rng.standard_normal(shapes[name]).astype(np.float32) for name in used})
    outcome = check(DistributeConstantAdd(), model)
    assert not outcome.result.modified
    assert not reason or any(reason in given for given in outcome.reasons)


def test_a_constant_that_raises_the_rank_stays(parse: Parse, weigh: Weigh, check: Check) -> None:
    text = "g (float[2,4] x, float p, float w, float c) => (float[1,2,3] y)"
    model = parse(f"{text} {{ a = Add (x, p)  m = MatMul (a, w)  y = Add (m, c) }}")
    ones = [np.ones(shape, np.float32) for shape in ((4,), (4, 3), (1, 1, 3))]
    outcome = check(DistributeConstantAdd(), weigh(model, **dict(zip("pwc", ones, strict=True))))
    assert not outcome.result.modified


def test_the_constant_keeps_its_broadcast_shape_and_is_rounded_once(parse: Parse, weigh: Weigh, rng: Any) -> None:
    rows, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 50, 1, 8), (8, 16), (16,)))
    model = parse("""g (float[1,50,67,8] x, float r, float w, float b) => (float[A,B,C,D] y)
        { [position] a = Add (x, r)  [project] m = MatMul (a, w)  [bias] y = Add (m, b) }""")
    DistributeConstantAdd().run(weigh(model, r=rows, w=weight, b=bias), PassContext())
    matmul, addition = model.graph
    wide = [array.astype(np.float64) for array in (rows, weight, bias)]
    expected = (wide[0][0] @ wide[1] + wide[2]).astype(np.float32)
    found = graph.constant(addition.inputs[1])
    assert found is not None
    assert found.shape == (50, 1, 16)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)  # one rounding of numbers up to 4
    assert matmul.metadata_props[ORIGIN_KEY] == "project"
    assert set(addition.metadata_props[ORIGIN_KEY].split(",")) >= {"bias"}


def test_large_constants_are_not_made(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = parse("g (float[N,9,4] x, float c, float w) => (float[A,B,C] y) { a = Add (x, c)  y = MatMul (a, w) }")
    weigh(model, c=rng.standard_normal((9, 4)).astype(np.float32), w=rng.standard_normal((4, 8)).astype(np.float32))
    assert check(DistributeConstantAdd(max_bytes=288), model).result.modified
    outcome = check(DistributeConstantAdd(max_bytes=287), model)
    assert not outcome.result.modified
    assert "max_bytes" in outcome.reasons[0]


def test_fp16(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = parse("""g (float16[N,8] x, float16 c, float16 w, float16 b) => (float16[A,B] y)
        { a = Add (x, c)  m = MatMul (a, w)  y = Add (m, b) }""")
    shapes = {"c": (8,), "w": (8, 4), "b": (4,)}
    weigh(model, **{name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()})
    # FP16 rounds x W, of magnitude 3, and the sum: 5e-4 each, relative to numbers that may cancel.
    assert check(DistributeConstantAdd(), model, allowed=1e-2).ops == {"MatMul": 1, "Add": 1}


def test_inside_subgraphs_only_what_stands_together_moves(check: Check) -> None:
    outcome = check(
        DistributeConstantAdd(),
        """g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2] p = {0.5, -1.0}> {
            a = Add (x, p)
            y = If (c) <then_branch = t () => (float[2,2] q) { q = MatMul (a, w) },
                        else_branch = e () => (float[2,2] r) { d = Add (x, p)  r = MatMul (d, w) }> }""",
        [{"x": np.eye(2, dtype=np.float32), "c": np.array(flag)} for flag in (True, False)],
    )
    assert outcome.result.rewrites == 1
    assert outcome.ops == {"If": 1, "MatMul": 2, "Add": 2}
