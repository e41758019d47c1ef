"""`select-gemm`: Gemm against MatMul and Add, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import PassContext
from optframe_passes.select_gemm import SelectGemm

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

# Products are summed in another order, and the bias first or last: a few roundings of 6e-8, with some cancellation.
FP32 = 2e-5

SHAPES = {"w": (4, 6), "t": (6, 4), "b": (6,), "row": (1, 6), "full": (5, 6), "column": (5, 1), "one": ()}


def model_of(body: str, parse: Parse, weigh: Weigh, rng: np.random.Generator, inputs: str, opset: int = 18) -> ir.Model:
    used = [name for name in SHAPES if re.search(rf"[(,] ?{name}[,)]", body)]
    rank = "A,B,C" if "x3" in inputs else "A,B"
    model = parse(f"g ({inputs}{''.join(f', float {n}' for n in used)}) => (float[{rank}] y) {{ {body} }}", opset=opset)
    return weigh(model, **{name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in used})


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize("bias", ["b", "row", "full", "column", "one"])
def test_matrices_become_a_gemm(
    bias: str, opset: int, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    order = f"m, {bias}" if rng.random() < 0.5 else f"{bias}, m"
    model = model_of(f"m = MatMul (x, w)  y = Add ({order})", parse, weigh, rng, "float[5,4] x", opset)
    assert check(SelectGemm(), model, allowed=FP32).ops == {"Gemm": 1}


def test_rows_may_be_dynamic_and_the_right_operand_too(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = model_of("m = MatMul (x, k)  y = Add (m, b)", parse, weigh, rng, "float[N,4] x, float[4,6] k")
    assert check(SelectGemm(), model, allowed=FP32).ops == {"Gemm": 1}


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("m = MatMul (x3, w)  y = Add (m, b)", "float[N,5,4] x3"),
        ("m = MatMul (x, w)  n = Relu (m)  y = Add (n, b)", "float[5,4] x"),
        ("m = MatMul (x, w)  a = Add (m, b)  y = Mul (a, m)", "float[5,4] x"),
        ("m = MatMul (x, w)  y = Add (m, m)", "float[5,4] x"),
        ("m = MatMul (x, w)  y = Add (m, full)", "float[1,4] x"),
        ("m = MatMul (x, w)  y = Sub (m, b)", "float[5,4] x"),
    ],
)
def test_other_products_stay(
    body: str, inputs: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    assert not check(SelectGemm(), model_of(body, parse, weigh, rng, inputs)).result.modified


GEMMS = {
    "plain": ("y = Gemm (x, w, b)", {"MatMul": 1, "Add": 1}),
    "without-bias": ("y = Gemm (x, w)", {"MatMul": 1}),
    "transposed": ("y = Gemm <transB = 1> (x, t, full)", {"MatMul": 1, "Add": 1}),
    "scaled": ("y = Gemm <alpha = 0.3, beta = -2.0, transB = 1> (x, t, row)", {"MatMul": 1, "Add": 1}),
    "bias-without-weight": ("y = Gemm <alpha = 0.3, beta = 0.0> (x, w, b)", {"MatMul": 1}),
    "operands-that-are-no-constants": ("k = Transpose (t)  c = Neg (b)  y = Gemm (x, k, c)", None),
}


@pytest.mark.parametrize("form", GEMMS)
def test_a_gemm_is_taken_apart_and_back(
    form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    body, ops = GEMMS[form]
    outcome = check(SelectGemm(prefer="matmul"), model_of(body, parse, weigh, rng, "float[5,4] x"), allowed=FP32)
    assert outcome.ops == (ops or {"Transpose": 1, "Neg": 1, "MatMul": 1, "Add": 1})
    if ops and "Add" in ops:
        assert check(SelectGemm(), outcome.model, allowed=FP32).ops == {"Gemm": 1}


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm <transA = 1> (x, w, b)",
        "k = Neg (w)  y = Gemm <alpha = 0.5> (z, k, b)",
        "k = Neg (t)  y = Gemm <transB = 1> (z, k, b)",
        "c = Neg (b)  y = Gemm <beta = 0.5> (z, w, c)",
    ],
)
def test_other_gemms_stay(body: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body = body.replace("(z,", "(x,")
    inputs = "float[4,5] x" if "transA" in body else "float[5,4] x"
    outcome = check(SelectGemm(prefer="matmul"), model_of(body, parse, weigh, rng, inputs))
    assert not outcome.result.modified
    assert "no constant" in outcome.reasons[0]


def test_a_transposed_weight_is_made_once_for_all_its_readers(parse: Parse, weigh: Weigh, rng: Any) -> None:
    model = model_of(
        "a = Gemm <transB = 1> (x, t, b)  c = Sin (x)  d = Gemm <transB = 1> (c, t, b)  y = Add (a, d)",
        parse,
        weigh,
        rng,
        "float[5,4] x",
    )
    weight = graph.constant(model.graph.initializers["t"])
    assert weight is not None
    SelectGemm(prefer="matmul").run(model, PassContext())
    first, second = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"]
    assert first is second
    found = graph.constant(first)
    assert found is not None
    np.testing.assert_array_equal(found, weight.T)


def test_fp16_and_integers(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    text = "g ({0}[N,4] x, {0} w, {0} b) => ({0}[A,B] y) {{ m = MatMul (x, w)  y = Add (m, b) }}"
    for name, dtype, gemms in (("float16", np.float16, 1), ("int32", np.int32, 0)):
        arrays = {"w": rng.integers(-2, 3, (4, 6)).astype(dtype), "b": rng.integers(-2, 3, 6).astype(dtype)}
        outcome = check(SelectGemm(), weigh(parse(text.format(name)), **arrays))
        assert outcome.ops.get("Gemm", 0) == gemms


@pytest.mark.parametrize(
    ("nodes", "attributes"),
    [
        ("t = Transpose (x)  y = Gemm (t, w, b)", (1, 0)),
        ("t = Transpose (x)  y = Gemm <transA = 1> (t, w, b)", (0, 0)),
        ("t = Transpose (x)  m = MatMul (t, w)  y = Add (m, b)", (1, 0)),
        ("r = Relu (x)  t = Transpose <perm = [1, 0]> (r)  y = Gemm (z, t)", (0, 1)),
    ],
)
def test_a_gemm_transposes_itself(
    nodes: str, attributes: tuple[int, int], parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    inputs = "float[6,4] x" if "transA = 1" not in nodes else "float[4,4] x"
    inputs += ", float[5,4] z" if "z" in nodes else ""
    weights = {"w": (4 if "transA" in nodes else 6, 4), "b": (4,)}
    used = {name: shape for name, shape in weights.items() if f" {name})" in nodes or f" {name}," in nodes}
    model = parse(f"g ({inputs}{''.join(f', float {name}' for name in used)}) => (float[A,B] y) {{ {nodes} }}")
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in used.items()}
    outcome = check(SelectGemm(), weigh(model, **arrays))
    gemm = outcome.node("Gemm")
    assert "Transpose" not in outcome.ops
    assert (gemm.attributes.get_int("transA", 0), gemm.attributes.get_int("transB", 0)) == attributes


def test_a_transpose_with_other_readers_stays(parse: Parse, weigh: Weigh, check: Check) -> None:
    model = parse("""g (float[6,4] x, float w) => (float[A,B] y, float[C,D] t)
        { t = Transpose (x)  y = Gemm (t, w) }""")
    weights = {"w": np.eye(6, dtype=np.float32)}
    assert not check(SelectGemm(), weigh(model, **weights)).result.modified
