"""`compose-layout`: which chains get shorter, and that they still do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optframe_passes.compose_layout import ComposeLayout

Check = Callable[..., Any]


def chain(source: str, *steps: str, output: str = "A,B,C,D,E", dtype: str = "float") -> str:
    """Return the text of a graph of `steps`, each an op with `%` for its input, or `Reshape 2,3`."""
    lines, initializers, name = [], [], "x"
    for index, step in enumerate(steps):
        target = "y" if index == len(steps) - 1 else f"v{index}"
        op, _, argument = step.partition(" ")
        if op in ("Reshape", "Squeeze", "Unsqueeze"):
            numbers = argument.split(",")
            initializers.append(f"int64[{len(numbers)}] c{index} = {{{argument}}}")
            lines.append(f"{target} = {op} ({name}, c{index})")
        else:
            lines.append(f"{target} = {op} {argument} ({name})")
        name = target
    constants = f"<{', '.join(initializers)}>" if initializers else ""
    return f"g ({dtype}[{source}] x) => ({dtype}[{output}] y) {constants} {{ {' '.join(lines)} }}"


@pytest.mark.parametrize(
    ("source", "rank", "steps", "ops"),
    [
        ("4,6", 2, ("Reshape 2,12", "Reshape 3,8"), {"Reshape": 1}),
        ("4,6", 2, ("Reshape 2,12", "Reshape 4,6", "Relu"), {"Relu": 1}),
        ("4,6,5", 3, ("Transpose <perm = [1, 2, 0]>", "Transpose <perm = [1, 2, 0]>"), {"Transpose": 1}),
        ("4,6,5", 3, ("Transpose <perm = [1, 2, 0]>", "Transpose <perm = [2, 0, 1]>", "Relu"), {"Relu": 1}),
        ("4,1,6", 3, ("Transpose <perm = [1, 0, 2]>",), {"Reshape": 1}),
        ("1,8,9,1,4", 3, ("Squeeze 3", "Transpose <perm = [0, 2, 1, 3]>", "Reshape 1,9,32"),
         {"Transpose": 1, "Reshape": 1}),
        ("4,6", 4, ("Unsqueeze 0", "Unsqueeze 3"), {"Reshape": 1}),
        ("4,6", 2, ("Unsqueeze 1", "Squeeze 1", "Relu"), {"Relu": 1}),
        ("4,6,5", 2, ("Flatten <axis = 2>", "Reshape 8,15"), {"Reshape": 1}),
        ("6,4", 2, ("Reshape 2,3,4", "Transpose <perm = [0, 2, 1]>", "Transpose <perm = [0, 2, 1]>", "Reshape 4,6"),
         {"Reshape": 1}),
        ("2,3,4", 3, ("Transpose", "Reshape 2,2,3,2", "Transpose <perm = [2, 3, 0, 1]>", "Reshape 3,2,4"),
         {"Transpose": 1}),
        ("N,6,4", 3, ("Reshape 0,24", "Reshape 0,4,6"), {"Reshape": 1}),
        ("N,6,4", 3, ("Transpose <perm = [1, 0, 2]>", "Transpose <perm = [1, 0, 2]>", "Relu"), {"Relu": 1}),
        ("N,M,6", 3, ("Reshape 0,0,2,3", "Transpose <perm = [1, 0, 2, 3]>", "Reshape 0,0,-1"), {"Transpose": 1}),
        ("N,6,4", 2, ("Reshape 0,2,3,4", "Transpose <perm = [0, 2, 1, 3]>", "Reshape 0,6,4", "Reshape -1,4"),
         {"Reshape": 2, "Transpose": 1}),
    ],
)  # fmt: skip
def test_shorter(source: str, rank: int, steps: tuple[str, ...], ops: dict[str, int], check: Check) -> None:
    outcome = check(ComposeLayout(), chain(source, *steps, output=",".join("ABCDE"[:rank])))
    assert outcome.ops == ops
    assert outcome.result.modified


@pytest.mark.parametrize(
    ("source", "rank", "steps"),
    [
        ("4,6", 2, ("Transpose",)),
        ("4,6", 2, ("Reshape 8,3",)),
        ("6,4", 2, ("Reshape 2,3,4", "Transpose <perm = [1, 0, 2]>", "Reshape 4,6")),
        ("4,6", 2, ("Transpose", "Reshape 8,3")),
        ("4,6", 2, ("Reshape 8,3", "Relu", "Reshape 4,6")),
        ("N,M,6", 1, ("Transpose <perm = [1, 0, 2]>", "Reshape -1")),
        ("0,6", 2, ("Reshape 0,2,3", "Reshape 0,6")),
    ],
)
def test_left_alone(source: str, rank: int, steps: tuple[str, ...], check: Check) -> None:
    assert not check(ComposeLayout(), chain(source, *steps, output=",".join("ABCDE"[:rank]))).result.modified


def test_a_chain_with_readers_half_way_is_rewritten_where_that_saves(check: Check) -> None:
    """The second Reshape has two readers: the third one reads the input at once, no node more."""
    text = """g (float[4,6] x) => (float[A,B] y, float[C,D,E] z)
        <int64[2] p = {2,12}, int64[3] q = {2,3,4}, int64[2] r = {4,6}>
        { a = Reshape (x, p) b = Reshape (a, q) z = Relu (b) c = Reshape (b, r) y = Relu (c) }"""
    assert check(ComposeLayout(), text).ops == {"Reshape": 1, "Relu": 2}


def test_graph_output_half_way_stays(check: Check) -> None:
    text = """g (float[4,6] x) => (float[A,B] a, float[C,D] y) <int64[2] p = {2,12}, int64[2] q = {4,6}>
        { a = Reshape (x, p) y = Reshape (a, q) }"""
    assert check(ComposeLayout(), text).ops == {"Reshape": 2}


def test_inside_subgraphs(check: Check) -> None:
    text = """g (float[4,6] x, bool c) => (float[A,B] y) <int64[2] p = {2,12}, int64[2] q = {3,8}> {
        y = If (c) <then_branch = t () => (float[D,E] u) { a = Reshape (x, p) u = Reshape (a, q) },
                    else_branch = e () => (float[F,G] w) { w = Reshape (x, q) }> }"""
    feeds = [{"x": np.arange(24, dtype=np.float32).reshape(4, 6), "c": np.array(c)} for c in (True, False)]
    assert check(ComposeLayout(), text, feeds).ops == {"If": 1, "Reshape": 2}


KINDS = st.sampled_from(["reshape", "transpose", "unsqueeze", "squeeze", "relu"])
STEPS = st.lists(st.tuples(KINDS, st.randoms()), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(dims=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), drawn=STEPS)
def test_random_chains(dims: list[int], drawn: list[tuple[str, Any]], check: Check) -> None:
    """Never more nodes, equal results."""
    steps, shape = [], list(dims)
    for kind, random in drawn:
        if kind == "reshape":
            shape = _random_shape(int(np.prod(shape)), random)
            steps.append("Reshape " + ",".join(map(str, shape)))
        elif kind == "transpose":
            order = random.sample(range(len(shape)), len(shape))
            shape = [shape[axis] for axis in order]
            steps.append(f"Transpose <perm = {order}>")
        elif kind == "unsqueeze" and len(shape) < 6:
            axis = random.randint(0, len(shape))
            shape.insert(axis, 1)
            steps.append(f"Unsqueeze {axis}")
        elif kind == "squeeze" and 1 in shape and len(shape) > 1:
            axis = shape.index(1)
            del shape[axis]
            steps.append(f"Squeeze {axis}")
        else:
            steps.append("Relu")
    outcome = check(ComposeLayout(), chain(",".join(map(str, dims)), *steps, output=",".join(map(str, shape))))
    assert sum(outcome.ops.values()) <= len(steps)


def _random_shape(size: int, random: Any) -> list[int]:
    shape: list[int] = []
    while size > 1 and len(shape) < 4:
        divisor = random.choice([n for n in range(1, size + 1) if size % n == 0])
        shape.append(divisor)
        size //= divisor
    return [*shape, size]


def test_what_is_read_by_one_chain_fewer_is_looked_at_again(check: Check) -> None:
    text = (
        "g (float[2,N] x) => (float[A,B,C,D,E,F] y, float[G,H] z)"
        "<int64[2] a = {0, 3}, int64[2] b = {1, 5}, int64[2] c = {0, 3}>"
        "{ u = Unsqueeze (x, a)  y = Unsqueeze (u, b)  s = Squeeze (u, c)  z = Neg (s) }"
    )
    assert check(ComposeLayout(), text).ops == {"Reshape": 1, "Neg": 1}
