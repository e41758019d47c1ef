"""`compose-slices`: which Slices join, and what they then take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from optframe.passes import PassContext
from optframe_passes.compose_slices import ComposeSlices

Check = Callable[..., Any]
Weigh = Callable[..., ir.Model]
Parse = Callable[..., ir.Model]

Cut = tuple[int, int, int, int]
"""Start, end, axis, step."""

FAR = 2**62


def sliced(parse: Parse, weigh: Weigh, *cuts: Sequence[Cut], shape: str = "8,9") -> ir.Model:
    """Return Slices of x in a row; each takes all its cuts at once."""
    declared, body, constants, source = [], [], {}, "x"
    for index, group in enumerate(cuts):
        for name, entries in zip("seat", zip(*group, strict=True), strict=True):
            declared.append(f"int64[{len(entries)}] {name}{index}")
            constants[f"{name}{index}"] = np.array(entries, np.int64)
        result = "y" if index == len(cuts) - 1 else f"v{index}"
        body.append(f"{result} = Slice ({source}, s{index}, e{index}, a{index}, t{index})")
        source = result
    text = f"g (float[{shape}] x, {', '.join(declared)}) => (float[A,B] y) {{ {' '.join(body)} }}"
    return weigh(parse(text), **constants)


def test_slices_of_two_axes_join(parse: Parse, weigh: Weigh, check: Check) -> None:
    outcome = check(ComposeSlices(), sliced(parse, weigh, [(1, 7, 0, 1)], [(-4, FAR, 1, 1)], shape="N,9"))
    assert outcome.ops == {"Slice": 1}
    assert len(outcome.node("Slice").inputs) == 4, "steps of 1 are left out"


@pytest.mark.parametrize(
    ("first", "second", "start", "end", "step"),
    [
        ((1, 9, 1, 1), (2, 4, 1, 1), 3, 5, 1),
        ((-6, FAR, -1, 2), (1, FAR, 1, 1), 5, 9, 2),
        ((8, -FAR, 1, -1), (0, 3, 1, 1), 8, 5, -1),
        ((3, -FAR, 1, -1), (0, FAR, 1, 1), 3, -(2**63), -1),
    ],
)
def test_cuts_of_the_same_axis(
    first: Cut, second: Cut, start: int, end: int, step: int, parse: Parse, weigh: Weigh, check: Check
) -> None:
    outcome = check(ComposeSlices(), sliced(parse, weigh, [first], [second]))
    numbers = [value.const_value.numpy().tolist() for value in outcome.node("Slice").inputs[1:]]
    assert [*numbers, [1]][:4] == [[start], [end], [1], [step]]


def test_three_in_a_row_become_one(parse: Parse, weigh: Weigh, check: Check) -> None:
    outcome = check(ComposeSlices(), sliced(parse, weigh, [(1, 7, 0, 1)], [(0, 3, 1, 1)], [(1, 3, 0, 1)]))
    assert outcome.ops == {"Slice": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v = Slice (x, n1, n5, n0) y = Slice (v, n0, n2, n0)", "not known"),
        ("v = Slice (x, k, n5, n1) y = Slice (v, n0, n2, n0)", "not known beforehand"),
        ("v = Slice (x, n1, n5, n1) y = Slice (v, n5, n5, n1)", "leave nothing"),
        ("v = Slice (x, n1, n5, n1) w = Slice (v, n0, n2, n0) y = Concat <axis = 0> (v, w)", None),
    ],
)
def test_the_rest_stays(text: str, reason: str | None, check: Check) -> None:
    numbers = ", ".join(f"int64[1] n{number} = {{{number}}}" for number in range(6))
    outcome = check(ComposeSlices(), f"g (float[N,9] x, int64[1] k) => (float[A,B] y) <{numbers}> {{ {text} }}")
    assert not outcome.result.modified
    assert reason is None or reason in outcome.reasons[0]


ENTRIES = st.sampled_from([-FAR, -7, -3, -1, 0, 1, 2, 4, 6, 9, FAR])
CUTS = st.lists(
    st.tuples(ENTRIES, ENTRIES, st.integers(-2, 1), st.sampled_from([-2, -1, 1, 2, 3])),
    min_size=1,
    max_size=2,
    unique_by=lambda cut: cut[2] % 2,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(first=CUTS, second=CUTS, third=CUTS)
def test_generated_slices(first: list[Cut], second: list[Cut], third: list[Cut], parse: Parse, weigh: Weigh) -> None:
    model = sliced(parse, weigh, first, second, third)
    x = np.arange(72, dtype=np.float32).reshape(8, 9)
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    ComposeSlices().run(model, PassContext())
    (actual,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(actual, expected)
