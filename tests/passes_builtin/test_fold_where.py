"""`fold-where`: masks that are the same everywhere, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optframe_passes.fold_where import FoldWhere

Check = Callable[..., Any]

MASKS = "bool[1] no = {0}, bool[1] yes = {1}, bool[2] mixed = {0, 1}, int64[2] shape = {3, 2}, float[1] low = {-9}"


def graph(body: str, inputs: str = "float[3,2] x, bool[3,2] m", output: str = "float[A,B] y") -> str:
    return f"g ({inputs}) => ({output}) <{MASKS}> {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("w = Where (no, low, x) y = Relu (w)", {"Relu": 1}),
        ("w = Where (yes, x, low) y = Relu (w)", {"Relu": 1}),
        ("e = Expand (no, shape) w = Where (e, low, x) y = Relu (w)", {"Expand": 1, "Relu": 1}),
        ("n = Not (yes) w = Where (n, low, x) y = Relu (w)", {"Not": 1, "Relu": 1}),
        ("w = Where (yes, low, x) y = Relu (w)", {"Expand": 1, "Relu": 1}),
        ("a = And (m, yes) y = Where (a, low, x)", {"Where": 1}),
        ("a = Or (no, m) y = Where (a, low, x)", {"Where": 1}),
        ("a = Xor (m, no) y = Where (a, low, x)", {"Where": 1}),
        ("a = And (no, m) w = Where (a, low, x) y = Relu (w)", {"Expand": 1, "Relu": 1}),
    ],
)
def test_folded(body: str, ops: dict[str, int], check: Check) -> None:
    assert check(FoldWhere(), graph(body)).ops == ops


@pytest.mark.parametrize(
    "body",
    [
        "w = Where (mixed, low, x) y = Relu (w)",
        "w = Where (m, low, x) y = Relu (w)",
        "a = Or (no, mixed) o = Or (m, a) n = Not (o) y = Where (n, low, x)",
        "a = Xor (m, yes) y = Where (a, low, x)",
        "y = Where (no, low, x)",
    ],
)
def test_left_alone(body: str, check: Check) -> None:
    outcome = check(FoldWhere(), graph(body))
    assert outcome.ops.get("Where") == 1


def test_a_shape_that_is_not_known_stays(check: Check) -> None:
    outcome = check(FoldWhere(), graph("w = Where (yes, low, x) y = Relu (w)", "float[N,2] x"))
    assert not outcome.result.modified
    assert outcome.reasons == ["is decided, but the shape that it broadcasts to is not known"]


def test_dynamic_shapes_that_are_equal_fold(check: Check) -> None:
    assert check(FoldWhere(), graph("w = Where (no, low, x) y = Relu (w)", "float[N,2] x")).ops == {"Relu": 1}


def test_equal_branches_need_no_mask(check: Check) -> None:
    assert check(FoldWhere(), graph("c = Equal (x, low) w = Where (c, x, x) y = Relu (w)")).ops == {
        "Equal": 1,
        "Relu": 1,
    }
