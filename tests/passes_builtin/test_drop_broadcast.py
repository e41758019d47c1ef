"""`drop-broadcast`: which Expands and Tiles their readers do not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optframe_passes.drop_broadcast import DropBroadcast

Check = Callable[..., Any]


def graph(body: str, inputs: str = "float[1,4] a, float[3,4] b", outputs: str = "float[A,B] y") -> str:
    constants = "int64[2] wide = {3, 4}, int64[2] three = {3, 1}, int64[3] deep = {2, 3, 4}, int64[2] cols = {1, 2}"
    return f"g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        ("e = Expand (a, wide) y = Add (b, e)", "float[1,4] a, float[3,4] b", "float[A,B] y"),
        ("e = Tile (a, three) y = Sub (e, b)", "float[1,4] a, float[3,4] b", "float[A,B] y"),
        ("e = Expand (a, wide) c = Less (e, b) y = Where (c, e, b)", "float[1,4] a, float[3,4] b", "float[A,B] y"),
        ("e = Expand (a, wide) y = Max (e, b, b)", "float[4] a, float[3,4] b", "float[A,B] y"),
        ("e = Expand (a, deep) y = MatMul (b, e)", "float[1,3,4] a, float[2,5,3] b", "float[A,B,C] y"),
        ("s = Shape (b) e = Expand (a, s) y = Mul (b, e)", "float[1,4] a, float[N,4] b", "float[A,B] y"),
        ("e = Expand (a, wide) y = PRelu (b, e)", "float[1,4] a, float[3,4] b", "float[A,B] y"),
    ],
)
def test_dropped(body: str, inputs: str, outputs: str, check: Check) -> None:
    outcome = check(DropBroadcast(), graph(body, inputs, outputs))
    assert outcome.result.modified
    assert not {"Expand", "Tile"} & {*outcome.ops}


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("e = Expand (a, wide) y = Mul (e, e)", "float[1,4] a, float[3,4] b", "Mul needs the size"),
        ("e = Expand (a, wide) y = Relu (e)", "float[1,4] a, float[3,4] b", "Relu needs the size"),
        ("e = Expand (a, wide) y = PRelu (e, b)", "float[1,4] a, float[3,4] b", "PRelu needs the size"),
        ("y = Expand (a, wide)", "float[1,4] a, float[3,4] b", "graph output"),
        ("e = Tile (a, cols) y = Add (e, b)", "float[1,2] a, float[3,4] b", None),
        (
            "e = Expand (a, wide) z = Add (e, b) t = Transpose (b) y = MatMul (e, t)",
            "float[1,4] a, float[3,4] b",
            "MatMul",
        ),
    ],
)
def test_kept(body: str, inputs: str, reason: str | None, check: Check) -> None:
    outcome = check(DropBroadcast(), graph(body, inputs))
    assert not outcome.result.modified
    assert reason is None or reason in outcome.reasons[0]


def test_of_two_expands_one_stays(check: Check) -> None:
    body = "e = Expand (a, wide) f = Expand (b, wide) y = Add (e, f)"
    outcome = check(DropBroadcast(), graph(body, "float[1,4] a, float[1,4] b"))
    assert outcome.ops == {"Expand": 1, "Add": 1}


def test_one_expansion_of_another_goes_with_it(check: Check) -> None:
    text = graph("e = Expand (a, wide) f = Tile (e, ones) y = Add (b, f)").replace(
        "<int64", "<int64[2] ones = {1, 1}, int64", 1
    )
    assert check(DropBroadcast(), text).ops == {"Add": 1}
