"""`sink-split`: a Split goes behind the ops that follow on all of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from optframe.passes import ORIGIN_KEY
from optframe_passes.sink_split import SinkSplit

Check = Callable[..., Any]

MOVE: dict[str, tuple[str, dict[str, int]]] = {
    "elementwise": ("a, b = Split <axis = -1> (x, s)  y = Relu (a)  z = Relu (b)", {"Relu": 1}),
    "with-attributes": (
        "a, b = Split <axis = 2> (x, s)  y = Elu <alpha = 0.5> (a)  z = Elu <alpha = 0.5> (b)",
        {"Elu": 1},
    ),
    "heads": (
        "a, b = Split <axis = -1> (x, s)  c = Reshape (a, h2)  d = Reshape (b, h4)"
        "  y = Transpose <perm = [0, 2, 1, 3]> (c)  z = Transpose <perm = [0, 2, 1, 3]> (d)",
        {"Reshape": 1, "Transpose": 1},
    ),
    "one-transpose-differs": (
        "a, b, c = Split <axis = -1> (x, t)  d = Transpose <perm = [1, 0, 2]> (a)"
        "  y = Transpose <perm = [1, 2, 0]> (b)  z = Transpose <perm = [1, 0, 2]> (c)  u = Relu (d)",
        {"Transpose": 2, "Relu": 1},
    ),
    "leading-axis-merged": ("a, b = Split <axis = 1> (x, r)  y = Reshape (a, m2)  z = Reshape (b, m3)", {"Reshape": 1}),
}

TEXT = """g (float[N,5,12] x) => (float{y} y, float{z} z{more}) <int64[2] s = {{4, 8}}, int64[3] t = {{4, 4, 4}},
    int64[2] r = {{2, 3}}, int64[4] h2 = {{0, 5, 2, 2}}, int64[4] h4 = {{0, 5, 4, 2}}, int64[4] odd = {{0, 5, 2, 4}},
    int64[2] m2 = {{-1, 24}}, int64[2] m3 = {{-1, 36}}, int64[3] wild = {{-1, 10, 2}}> {{ {body} }}"""


def text_of(body: str) -> str:
    ranks = {"heads": "[A,B,C,D]", "merged": "[A,B]"}
    rank = ranks["heads"] if "h2" in body or "odd" in body else ranks["merged"] if "m2" in body else "[A,B,C]"
    letters = [rank, rank.translate(str.maketrans("ABCD", "EFGH"))]
    more = ", float[I,J,K] u" if " u = " in body else ""
    return (
        TEXT.replace("{y}", letters[0])
        .replace("{z}", letters[1])
        .replace("{more}", more)
        .replace("{body}", body)
        .replace("{{", "{")
        .replace("}}", "}")
    )


@pytest.mark.parametrize("form", MOVE)
def test_ops_come_before_the_split(form: str, check: Check) -> None:
    body, ops = MOVE[form]
    outcome = check(SinkSplit(), text_of(body), allowed=0.0)  # nothing is computed in another way
    assert outcome.ops == {"Split": 1, **ops}


def test_opset_11_splits_by_an_attribute(check: Check) -> None:
    text = """g (float[N,6] x) => (float[A,B] y, float[C,D] z)
        { a, b = Split <axis = 1, split = [2, 4]> (x)  y = Relu (a)  z = Relu (b) }"""
    outcome = check(SinkSplit(), text, opset=11, allowed=0.0)
    assert outcome.ops == {"Relu": 1, "Split": 1}
    assert outcome.node("Split").attributes.get_ints("split") == (2, 4)


STAY = {
    "different-ops": "a, b = Split <axis = -1> (x, s)  y = Relu (a)  z = Sigmoid (b)",
    "different-attributes": "a, b = Split <axis = 2> (x, s)  y = Elu <alpha = 0.5> (a)  z = Elu <alpha = 1.0> (b)",
    "an-op-along-the-axis": "a, b = Split <axis = -1> (x, s)  y = Softmax (a)  z = Softmax (b)",
    "two-readers": "a, b = Split <axis = -1> (x, s)  y = Relu (a)  z = Relu (b)  u = Neg (b)",
    "different-transposes": "a, b = Split <axis = -1> (x, s)  y = Transpose (a)  z = Transpose <perm = [0, 2, 1]> (b)",
    "heads-of-different-size": "a, b = Split <axis = -1> (x, s)  y = Reshape (a, h2)  z = Reshape (b, odd)",
    "reshape-across-the-axis": "a, b = Split <axis = -1> (x, s)  y = Reshape (a, wild)  z = Reshape (b, wild)",
    "graph-output": "a, y = Split <axis = -1> (x, s)  z = Relu (a)  u = Relu (y)",
}


@pytest.mark.parametrize("form", STAY)
def test_splits_stay(form: str, check: Check) -> None:
    assert not check(SinkSplit(), text_of(STAY[form])).result.modified


def test_nodes_know_where_they_come_from(check: Check) -> None:
    body = "[s] a, b = Split <axis = -1> (x, s)  [one] y = Relu (a)  [two] z = Relu (b)"
    outcome = check(SinkSplit(), text_of(body), allowed=0.0)
    assert outcome.node("Relu").metadata_props[ORIGIN_KEY] == "one"
    assert [value.name for value in outcome.node("Split").outputs] == ["y", "z"]


def test_parts_in_subgraphs_stay(check: Check, parse: Callable[..., ir.Model]) -> None:
    import numpy as np

    model = parse("""g (float[2,4] x, bool c) => (float[2,2] y) <int64[2] s = {2, 2}> {
        a, b = Split <axis = 1> (x, s)  d = Relu (a)
        e = If (c) <then_branch = t () => (float[2,2] p) { p = Relu (b) },
                    else_branch = f () => (float[2,2] q) { q = Neg (d) }>
        y = Add (d, e) }""")
    drawn = [{"x": np.eye(2, 4, dtype=np.float32), "c": np.array(flag)} for flag in (True, False)]
    assert not check(SinkSplit(), model, drawn).result.modified
