"""`compose-linear`: two matrices become one where that is no more work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.flops import count_flops
from optframe.passes import PassContext
from optframe_passes.compose_linear import ComposeLinear

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

SHAPES = {
    "u": (4, 8),
    "v": (8, 6),
    "w": (6, 3),
    "b": (8,),
    "c": (5, 6),
    "d": (),
    "narrow": (4, 1),
    "e": (1,),
    "wide": (1, 6),
}

# Three layers are multiplied in another order: some fifty products, 6e-8 each, that may cancel.
FP32 = 5e-5


def model_of(body: str, parse: Parse, weigh: Weigh, rng: np.random.Generator) -> ir.Model:
    used = [name for name in SHAPES if re.search(rf"[(,] ?{name}[,)]", body)]
    inputs = "".join(f", float {name}" for name in used)
    model = parse(f"g (float[N,5,4] x{inputs}) => (float[A,B,C] y) {{ {body} }}")
    return weigh(model, **{name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in used})


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("p = MatMul (x, u)  y = MatMul (p, v)", {"MatMul": 1}),
        ("p = MatMul (x, u)  q = Add (p, b)  y = MatMul (q, v)", {"MatMul": 1, "Add": 1}),
        ("p = MatMul (x, u)  q = MatMul (p, v)  r = Add (q, c)  y = MatMul (r, w)", {"MatMul": 1, "Add": 1}),
        ("p = MatMul (x, u)  q = Add (p, d)  y = MatMul (q, v)", {"MatMul": 1, "Add": 1}),
    ],
)
def test_layers_are_composed(body: str, ops: Any, parse: Parse, weigh: Weigh, check: Check, rng: Any) -> None:
    model = model_of(body, parse, weigh, rng)
    outcome = check(ComposeLinear(), model, allowed=FP32)
    assert outcome.ops == ops
    shapes = {"x": (2, 5, 4)}
    assert count_flops(outcome.model, input_shapes=shapes).total < count_flops(model, input_shapes=shapes).total


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("p = MatMul (x, u)  q = Relu (p)  y = MatMul (q, v)", None),
        ("p = MatMul (x, u)  q = MatMul (p, v)  s = ReduceSum (p)  y = Add (q, s)", None),
        ("p = MatMul (x, narrow)  q = Add (p, e)  y = MatMul (q, wide)", "more work"),
    ],
)
def test_layers_stay(
    body: str, reason: str | None, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    outcome = check(ComposeLinear(), model_of(body, parse, weigh, rng))
    assert not outcome.result.modified
    assert reason is None or reason in outcome.reasons[0]


def test_products_are_computed_in_float64(parse: Parse, weigh: Weigh, rng: np.random.Generator) -> None:
    model = model_of("p = MatMul (x, u)  y = MatMul (p, v)", parse, weigh, rng)
    left, right = (graph.constant(model.graph.initializers[name]) for name in "uv")
    assert left is not None
    assert right is not None
    ComposeLinear().run(model, PassContext())
    (matmul,) = model.graph
    found = graph.constant(matmul.inputs[1])
    assert found is not None
    # Rounded once: half a unit in the last place of each element.
    np.testing.assert_array_max_ulp(found, (left.astype(np.float64) @ right).astype(np.float32), maxulp=1)
