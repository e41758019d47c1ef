"""`forward-concat`: what is taken from a Concat, and what is left of the other operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optframe.graph import constant
from optframe_passes.forward_concat import ForwardConcat

Check = Callable[..., Any]

NUMBERS = "int64 i0 = {0}, int64 i1 = {1}, int64 last = {-1}, int64[1] l1 = {1}, int64[1] " + ", int64[1] ".join(
    f"n{number} = {{{number}}}" for number in range(8)
)
STACKED = "p = Relu (a) q = Sigmoid (b) u = Unsqueeze (p, n0) v = Unsqueeze (q, n0) c = Concat <axis = 0> (u, v)"
JOINED = "p = Relu (a) q = Sigmoid (b) c = Concat <axis = -1> (p, q)"


def graph(body: str, rank: int = 2, inputs: str = "float[3,4] a, float[3,2] b") -> str:
    return f"g ({inputs}) => (float[{','.join('ABCD'[:rank])}] y) <{NUMBERS}> {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (f"{JOINED} s = Slice (c, n4, n6, n1) y = Tanh (s)", {"Slice", "Gather", "Split"}),
        (f"{JOINED} s, t = Split <axis = 1> (c, sizes) m = Add (s, s) y = Concat <axis = 1> (t, m)", {"Split"}),
        ("p = Relu (a) s, t = Split <axis = 1, num_outputs = 2> (p) c = Concat <axis = -1> (s, t) y = Tanh (c)",
         {"Concat"}),
        ("p = Relu (a) s, t = Split <axis = 1, num_outputs = 2> (p) y = Tanh (t)", {"Split"}),
    ],
)  # fmt: skip
def test_forwarded(body: str, gone: set[str], check: Check) -> None:
    text = graph(body).replace("<int64 i0", "<int64[2] sizes = {4, 2}, int64 i0")
    outcome = check(ForwardConcat(), text)
    assert outcome.result.modified
    readers = [node.op_type for node in outcome.model.graph if any(value.uses() for value in node.outputs)]
    assert not gone & {*readers}


def test_a_slice_inside_of_one_operand_reads_that(check: Check) -> None:
    outcome = check(ForwardConcat(), graph(f"{JOINED} s = Slice (c, n1, n3, n1) y = Tanh (s)"))
    assert outcome.node("Slice").inputs[0].producer().op_type == "Relu"


def test_the_last_of_a_stack_is_the_value_that_was_stacked(check: Check) -> None:
    text = graph(f"{STACKED} s = Gather <axis = 0> (c, last) y = Tanh (s)", inputs="float[N,4] a, float[N,4] b")
    outcome = check(ForwardConcat(), text)
    assert outcome.node("Tanh").inputs[0].producer().op_type == "Sigmoid"


def test_a_gather_with_a_vector_keeps_its_axis(check: Check) -> None:
    text = graph(f"{STACKED} s = Gather <axis = 0> (c, l1) y = Tanh (s)", 3, "float[3,4] a, float[3,4] b")
    outcome = check(ForwardConcat(), text)
    assert outcome.node("Gather").inputs[0].producer().op_type == "Unsqueeze"


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{JOINED} s = Slice (c, n3, n5, n1) y = Tanh (s)", "float[3,4] a, float[3,2] b"),
        (f"{JOINED} s = Slice (c, n0, n2, n0) y = Tanh (s)", "float[3,4] a, float[3,2] b"),
        (f"{JOINED} s = Slice (c, n0, n2, n1, n2) y = Tanh (s)", "float[3,4] a, float[3,2] b"),
        (f"{JOINED} s = Slice (c, n1, n2, n1) y = Tanh (s)", "float[3,N] a, float[3,2] b"),
        (f"{JOINED} s, t = Split <axis = 1, num_outputs = 2> (c) y = Add (s, t)", "float[3,4] a, float[3,2] b"),
        ("s, t = Split <axis = 1, num_outputs = 2> (a) y = Concat <axis = 1> (t, s)", "float[3,4] a, float[3,2] b"),
    ],
)
def test_left_alone(body: str, inputs: str, check: Check) -> None:
    assert not check(ForwardConcat(), graph(body, inputs=inputs)).result.modified


def test_a_split_of_a_concat_goes_with_the_concat_of_its_parts(check: Check) -> None:
    body = "r = Relu (a) c = Concat <axis = 1> (r) s, t = Split <axis = 1> (c, i0) y = Concat <axis = 1> (s, t)"
    text = graph(body).replace("<int64 i0", "<int64[2] sizes = {1, 3}, int64 i0").replace("(c, i0)", "(c, sizes)")
    assert check(ForwardConcat(), text).ops == {"Relu": 1, "Concat": 1}


@pytest.mark.parametrize("first", ["slice", "split"])
def test_a_slice_that_takes_a_part_of_a_split_is_that_part(first: str, check: Check) -> None:
    slice_, split = "a = Slice (x, one, three, axis)", "b, c, d = Split <axis = 1> (x, s)"
    nodes = f"{slice_}  {split}" if first == "slice" else f"{split}  {slice_}"
    text = f"""g (float[N,6] x) => (float[N,2] y, float[N,1] b, float[N,3] d)
        <int64[1] one = {{1}}, int64[1] three = {{3}}, int64[1] axis = {{1}}, int64[3] s = {{1, 2, 3}}>
        {{ {nodes}  e = Relu (c)  f = Neg (a)  y = Add (e, f) }}"""
    outcome = check(ForwardConcat(), text, allowed=0.0)
    assert outcome.ops == {"Split": 1, "Relu": 1, "Neg": 1, "Add": 1}


@pytest.mark.parametrize(
    ("nodes", "ops"),
    [
        ("t = Concat <axis = 1> (x, z, q)  y = Slice (t, s, e, a)", {"Concat": 1}),
        ("t = Concat <axis = 1> (x, z)  y = Concat <axis = -2> (q, t, x)", {"Concat": 1}),
        ("t = Concat <axis = 2> (x, z)  y = Concat <axis = 1> (t, t)", {"Concat": 2}),
        ("t = Concat <axis = 1> (x, z, q)  y = Slice (t, a, e, a)", {"Concat": 1, "Slice": 1}),
        ("t = Concat <axis = 1> (x, z)  y = Gather <axis = 1> (t, a2)", {"Concat": 1, "Gather": 1}),
    ],
)
def test_several_entries_and_operands(nodes: str, ops: dict[str, int], check: Check) -> None:
    text = f"""g (float[N,4,6] x, float[N,4,6] z, float[N,4,6] q) => (float[A,B,C] y)
        <int64[2] a2 = {{1, 4}}, int64[1] s = {{4}}, int64[1] e = {{12}}, int64[1] a = {{1}}>
        {{ {nodes} }}"""
    assert check(ForwardConcat(), text, allowed=0.0).ops == ops


def test_entries_of_one_operand_are_gathered_from_it(check: Check) -> None:
    text = """g (float[N,4,6] x, float[N,4,6] z) => (float[A,B,C] y) <int64[3] i = {5, -1, 4}>
        { t = Concat <axis = 1> (x, z)  y = Gather <axis = 1> (t, i) }"""
    gather = check(ForwardConcat(), text, allowed=0.0).node("Gather")
    assert gather.inputs[0].name == "z"
    assert constant(gather.inputs[1]).tolist() == [1, 3, 0]


def test_a_slice_that_becomes_the_only_reader(check: Check) -> None:
    """The Split behind it goes first, as its parts are operands of the Concat."""
    text = """g (float[N,4] x, float[N,4] z) => (float[A,B] y, float[C,D] u, float[E,F] v)
        <int64[1] s = {4}, int64[1] e = {12}, int64[1] a = {1}, int64[2] parts = {4, 8}> {
        t = Concat <axis = 1> (x, z, x)  w = Slice (t, s, e, a)  y = Relu (w)
        p, q = Split <axis = 1> (t, parts)  u = Neg (p)  v = Neg (x) }"""
    assert check(ForwardConcat(), text, allowed=0.0).ops == {"Concat": 1, "Relu": 1, "Neg": 2}
