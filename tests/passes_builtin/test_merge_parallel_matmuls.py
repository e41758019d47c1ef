"""`merge-parallel-matmuls`: layers of one input become one MatMul and a Split, where the model gets smaller by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe.flops import count_flops
from optframe.passes import ORIGIN_KEY
from optframe_passes.merge_parallel_matmuls import MergeParallelMatMuls

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

MERGE = MergeParallelMatMuls(min_count=3, min_depth=4)

# The same products in the same order but for how a kernel blocks them: a few roundings of 6e-8.
FP32 = 1e-5

SHAPES = {"u": (4, 6), "v": (4, 3), "w": (4, 1), "b": (6,), "c": (5, 3), "d": (1,), "o": (3, 4), "flat": (4, 6)}


def model_of(body: str, parse: Parse, weigh: Weigh, rng: np.random.Generator, opset: int = 18) -> ir.Model:
    used = [name for name in SHAPES if re.search(rf"[(,] ?{name}[,)]", body)]
    outputs = [name for name in ("y", "z", "t") if f" {name} = " in f" {body}"]
    inputs = "".join(f", float {name}" for name in used)
    declared = ", ".join(f"float[A{name},B{name},C{name}] {name}" for name in outputs)
    model = parse(f"g (float[N,5,4] x{inputs}) => ({declared}) {{ {body} }}", opset=opset)
    return weigh(model, **{name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in used})


FORMS: dict[str, tuple[str, dict[str, int]]] = {
    "without-biases": ("y = MatMul (x, u)  z = MatMul (x, v)  t = MatMul (x, w)", {"MatMul": 1, "Split": 1}),
    "two-with-biases": (
        "m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (c, n)",
        {"MatMul": 1, "Add": 1, "Split": 1},
    ),
    "one-without-a-bias": (
        "m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (c, n)  t = MatMul (x, w)",
        {"MatMul": 1, "Add": 1, "Split": 1},
    ),
    "a-bias-of-one-number": (
        "m = MatMul (x, u)  y = Add (m, d)  n = MatMul (x, v)  z = Add (n, d)",
        {"MatMul": 1, "Add": 1, "Split": 1},
    ),
    "readers-in-between": (
        "y = MatMul (x, u)  a = Relu (y)  s = ReduceSum (a)  n = MatMul (x, v)  z = Add (s, n)  t = MatMul (x, w)",
        {"MatMul": 1, "Split": 1, "Relu": 1, "ReduceSum": 1, "Add": 1},
    ),
}


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("form", FORMS)
def test_layers_are_merged(
    form: str, opset: int, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    body, ops = FORMS[form]
    model = model_of(body, parse, weigh, rng, opset)
    outcome = check(MERGE, model, allowed=FP32)
    assert outcome.ops == ops
    shapes = {"x": (3, 5, 4)}
    assert count_flops(outcome.model, input_shapes=shapes).total == count_flops(model, input_shapes=shapes).total


STAY: dict[str, str] = {
    "two-without-biases": "y = MatMul (x, u)  z = MatMul (x, v)",
    "two-with-one-bias": "m = MatMul (x, u)  y = Add (m, b)  z = MatMul (x, v)",
    "other-inputs": "r = Relu (x)  y = MatMul (x, u)  z = MatMul (r, v)  t = MatMul (o, x)",
    "one": "y = MatMul (x, u)",
}


@pytest.mark.parametrize("form", STAY)
def test_layers_stay(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body = STAY[form].replace("MatMul (o, x)", "Transpose (x)")
    assert not check(MERGE, model_of(body, parse, weigh, rng)).result.modified


def test_thin_and_few_layers_stay(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = model_of(FORMS["without-biases"][0], parse, weigh, rng)
    assert not check(MergeParallelMatMuls(min_count=3), model).result.modified
    assert not check(MergeParallelMatMuls(min_depth=4), model).result.modified


def test_few_layers_with_biases_stay_where_more_are_asked_for(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = model_of("m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (c, n)", parse, weigh, rng)
    assert check(MergeParallelMatMuls(min_depth=4), model, allowed=FP32).ops == {"MatMul": 1, "Add": 1, "Split": 1}
    outcome = check(MergeParallelMatMuls(min_depth=4, min_biased=3), model)
    assert "too few to merge" in outcome.reasons[0]


def test_constants_that_would_grow_too_large_stay_behind(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    body = "m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (c, n)  t = MatMul (x, w)"
    model = model_of(body, parse, weigh, rng)
    needed = 4 * 5 * (6 + 3 + 1)
    assert check(MergeParallelMatMuls(min_count=3, min_depth=4, max_bytes=needed), model, allowed=FP32).ops["Add"] == 1
    outcome = check(MergeParallelMatMuls(min_count=3, min_depth=4, max_bytes=needed - 1), model, allowed=FP32)
    assert outcome.ops == {"MatMul": 1, "Split": 1, "Add": 2}
    two = model_of("m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (c, n)", parse, weigh, rng)
    assert not check(MergeParallelMatMuls(min_count=3, min_depth=4, max_bytes=1), two).result.modified


def test_large_weights_with_other_readers_are_not_copied(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    body = "y = MatMul (x, u)  z = MatMul (x, v)  t = MatMul (x, w)  r = Relu (x)  q = MatMul (r, u)  t2 = Add (q, u)"
    model = model_of(body.replace("  t2 = Add (q, u)", ""), parse, weigh, rng)
    assert not check(MergeParallelMatMuls(min_count=3, min_depth=4, max_bytes=95), model).result.modified
    assert check(MergeParallelMatMuls(min_count=3, min_depth=4, max_bytes=96), model, allowed=FP32).ops["MatMul"] == 2


def test_each_subgraph_is_merged_for_itself(check: Check) -> None:
    weights = ", ".join(f"float[2,2] {name} = {{1.0, 2.0, 3.0, {i}.5}}" for i, name in enumerate("uvw"))
    outcome = check(
        MergeParallelMatMuls(min_count=3, min_depth=1),
        f"""g (float[2,2] x, bool flag) => (float[2,2] y) <{weights}> {{
            a = MatMul (x, w)  b = MatMul (x, v)  c = MatMul (x, u)  d = Sum (a, b, c)
            e = If (flag) <
                then_branch = t () => (float[2,2] p) {{
                    i = MatMul (x, w)  j = MatMul (x, v)  k = MatMul (x, u)  p = Max (i, j, k) }},
                else_branch = e () => (float[2,2] q) {{ q = MatMul (x, u) }}>
            y = Add (d, e) }}""",
        [{"x": np.eye(2, dtype=np.float32), "flag": np.array(flag)} for flag in (True, False)],
    )
    assert outcome.result.rewrites == 2
    assert outcome.ops["MatMul"] == 3


def test_all_layers_are_named_as_origins(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body = "[q] m = MatMul (x, u)  [bq] y = Add (m, b)  [k] n = MatMul (x, v)  [bk] z = Add (c, n)"
    outcome = check(MERGE, model_of(body, parse, weigh, rng), allowed=FP32)
    assert outcome.node("MatMul").metadata_props[ORIGIN_KEY] == "q,k,bq,bk"


def test_fp16(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = parse("""g (float16[N,4] x, float16 u, float16 b, float16 v, float16 c)
        => (float16[A,B] y, float16[C,D] z) { m = MatMul (x, u)  y = Add (m, b)  n = MatMul (x, v)  z = Add (n, c) }""")
    shapes = {"u": (4, 2), "b": (2,), "v": (4, 3), "c": (3,)}
    weigh(model, **{name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()})
    assert check(MERGE, model, allowed=1e-2).ops == {"MatMul": 1, "Add": 1, "Split": 1}
