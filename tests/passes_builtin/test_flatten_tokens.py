"""`flatten-tokens`: which regions become matrices, what that saves, and that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optframe_passes.flatten_tokens import FlattenTokens
from optframe_passes.min_cut import MinCut

Check = Callable[..., Any]

ROUNDING = 2e-6
"""Gemm adds the bias before the sum is rounded: a unit or two in the last place of FP32, relative to the largest."""


def graph(body: str, shape: str = "2,3,8", output: str = "A,B,C", constants: str = "") -> str:
    """Return the text of a graph from `x` to `y` with weights `w` (8,8) and rows `b`, `g` (8)."""
    values = {
        "w": ("float[8,8]", np.cos(np.arange(64.0))),
        "b": ("float[8]", np.sin(np.arange(8.0))),
        "g": ("float[8]", np.arange(8.0) / 4 - 1),
    }
    made = [
        f"{kind} {name} = {{{', '.join(f'{number:.6f}' for number in array)}}}"
        for name, (kind, array) in values.items()
    ]
    initializers = ", ".join([*made, *([constants] if constants else [])])
    return f"g (float[{shape}] x) => (float[{output}] y) <{initializers}> {{ {body} }}"


HEADS = "int64[4] heads = {2,3,2,4}, int64[3] flat = {2,3,8}, int64[4] image = {1,2,3,8}"


@pytest.mark.parametrize(
    ("body", "shape", "rank", "ops"),
    [
        ("m = MatMul (x, w) a = Add (b, m) n = MatMul (a, w) c = Add (n, b) o = MatMul (c, w) y = Add (o, b)", "2,3,8",
         3, {"Reshape": 2, "Gemm": 3}),
        ("r = Reshape (x, flat) m = MatMul (r, w) a = Add (m, b) y = Reshape (a, heads)", "1,2,3,8",
         4, {"Reshape": 2, "Gemm": 1}),
        ("r = Reshape (x, flat) m = MatMul (r, w) s = Relu (m) y = Reshape (s, image)", "2,3,2,4",
         4, {"Reshape": 2, "MatMul": 1, "Relu": 1}),
        ("r = Reshape (x, flat) l = LayerNormalization <axis = 2> (r, g, b) m = MatMul (l, w) a = Add (m, b) "
         "e = Softmax <axis = 2> (a) t = Mul (e, l) y = Reshape (t, image)", "2,3,2,4",
         4, {"Reshape": 2, "LayerNormalization": 1, "Gemm": 1, "Softmax": 1, "Mul": 1}),
        ("p = Reshape (x, image) s = Relu (p) r = Reshape (s, flat) y = Sigmoid (r)", "2,3,8",
         3, {"Reshape": 2, "Relu": 1, "Sigmoid": 1}),
    ],
)  # fmt: skip
def test_flattened(body: str, shape: str, rank: int, ops: dict[str, int], check: Check) -> None:
    before = body.count("=") - body.count("axis =")
    text = graph(body, shape, ",".join("ABCD"[:rank]), HEADS)
    outcome = check(FlattenTokens(), text, allowed=ROUNDING)
    assert outcome.ops == ops
    assert sum(ops.values()) <= before


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul (x, w) y = Add (m, b)",
        "m = MatMul (x, w) a = Add (m, b) n = MatMul (a, w) y = Add (n, b)",
        "l = LayerNormalization <axis = 1> (x, big, big) s = Softmax <axis = 1> (l) y = Relu (s)",
        "y = Relu (x)",
    ],
)
def test_left_alone_where_no_node_is_saved(body: str, check: Check) -> None:
    text = graph(body, constants="float[3,8] big = {" + ",".join(["0.5"] * 24) + "}")
    assert not check(FlattenTokens(), text).result.modified


def layers(count: int, add: str = "") -> str:
    """Return the text of `count` linear layers from x to y, with `add` (from `%` to `%p`) after each."""
    lines, name = [], "x"
    for index in range(count):
        target = "y" if index == count - 1 else f"a{index}"
        between = add.replace("%", f"k{index}")
        source = f"k{index}p" if add else f"k{index}"
        lines.append(f"m{index} = MatMul ({name}, w) k{index} = Add (m{index}, b) {between} {target} = Relu ({source})")
        name = target
    return " ".join(lines)


def test_dynamic_dimensions_are_merged(check: Check) -> None:
    assert check(FlattenTokens(), graph(layers(3), "N,3,8"), allowed=ROUNDING).ops["Gemm"] == 3


def test_two_dynamic_dimensions_cannot_be_divided_again(check: Check) -> None:
    assert not check(FlattenTokens(), graph(layers(4), "N,H,8")).result.modified


def test_constants_are_expanded_where_they_fit(check: Check) -> None:
    """A position encoding of one axis: (3, 1, 8) does not broadcast to (6, 8)."""
    numbers = ",".join(str(number / 8) for number in range(16))
    text = graph(layers(4, "%p = Add (%, pos)"), "3,2,8", constants=f"float[1,2,8] pos = {{{numbers}}}")
    assert check(FlattenTokens(), text, allowed=ROUNDING).ops == {"Reshape": 2, "Gemm": 4, "Add": 4, "Relu": 4}
    assert check(FlattenTokens(max_bytes=100), text).result.modified is False


def test_a_constant_of_each_row_is_the_third_operand_of_a_gemm(check: Check) -> None:
    numbers = ",".join(str(number / 8) for number in range(16))
    text = graph(layers(4).replace("(m0, b)", "(m0, pos)"), "3,2,8", constants=f"float[2,8] pos = {{{numbers}}}")
    outcome = check(FlattenTokens(), text, allowed=ROUNDING)
    assert outcome.ops == {"Reshape": 2, "Gemm": 4, "Relu": 4}
    assert (6, 8) in [
        node.inputs[2].const_value.shape.numpy() for node in outcome.model.graph if node.op_type == "Gemm"
    ]


def test_masks_with_one_column_take_part(check: Check) -> None:
    text = graph(layers(4, "%m = ReduceMax <keepdims = 1> (%, last) %p = Mul (%, %m)"), constants="int64[1] last = {2}")
    check(FlattenTokens(), text, allowed=ROUNDING)


def test_rows_of_a_graph_input_take_part(check: Check) -> None:
    text = graph(layers(4, "%p = Add (%, row)")).replace("x) =>", "x, float[8] row) =>")
    assert check(FlattenTokens(), text, allowed=ROUNDING).ops == {"Reshape": 2, "Gemm": 4, "Add": 4, "Relu": 4}


def test_a_value_that_others_read_too_gets_its_shape_back(check: Check) -> None:
    text = graph(layers(4) + " z = ReduceSum <keepdims = 0> (a1, axes)", constants="int64[1] axes = {1}")
    outcome = check(FlattenTokens(), text.replace("y) <", "y, float[D,E] z) <"), allowed=ROUNDING)
    assert outcome.ops == {"Reshape": 3, "Gemm": 4, "Relu": 4, "ReduceSum": 1}


def test_a_graph_output_half_way_keeps_shape_and_name(check: Check) -> None:
    text = graph(layers(4)).replace("y) <", "y, float[D,E,F] a1) <")
    outcome = check(FlattenTokens(), text, allowed=ROUNDING)
    assert outcome.ops == {"Reshape": 3, "Gemm": 4, "Relu": 4}
    assert [value.name for value in outcome.model.graph.outputs] == ["y", "a1"]


def test_split_and_concat_along_the_last_axis(check: Check) -> None:
    body = (
        "p, q = Split <axis = 2, num_outputs = 2> (%) %p = Concat <axis = -1> (q, p)".replace("p,", "%s,")
        .replace("(q, p)", "(%t, %s)")
        .replace(" q =", " %t =")
    )
    outcome = check(FlattenTokens(), graph(layers(4, body)), allowed=ROUNDING)
    assert outcome.ops == {"Reshape": 2, "Gemm": 4, "Relu": 4, "Split": 4, "Concat": 4}


def test_matrix_readers_need_no_reshape(check: Check) -> None:
    """The input is a matrix given three axes, the output one that loses them."""
    text = graph(
        "r = Reshape (x, flat) m = MatMul (r, w) a = Add (m, b) y = Reshape (a, rows)",
        "6,8",
        "A,B",
        "int64[3] flat = {2,3,8}, int64[2] rows = {-1,8}",
    )
    assert check(FlattenTokens(), text, allowed=ROUNDING).ops == {"Gemm": 1}


STEPS = ["linear", "relu", "norm", "pos", "merge", "image", "swap", "skip", "mean"]
MEMBERS = st.lists(st.sampled_from(STEPS), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=MEMBERS)
def test_random_regions(steps: list[str], check: Check) -> None:
    """Never more nodes, equal results."""
    body, name, rank, previous = [], "x", 3, "x"
    for index, step in enumerate(steps):
        new = f"v{index}"
        wants_image = step == "image"
        swap = [0, 2, 1] if rank == 3 else [0, 1, 3, 2]
        lines = {
            "linear": f"m{index} = MatMul ({name}, w) {new} = Add (m{index}, b)",
            "relu": f"{new} = Relu ({name})",
            "norm": f"{new} = LayerNormalization <axis = -1> ({name}, g, b)",
            "pos": f"{new} = Add ({name}, pos)",
            "merge": f"{new} = Reshape ({name}, flat)",
            "image": f"{new} = Reshape ({name}, image)",
            "swap": f"{new} = Transpose <perm = {swap}> ({name})",
            "skip": f"{new} = Add ({name}, {previous})",
            "mean": f"m{index} = ReduceMean <keepdims = 1> ({name}, axes) {new} = Sub ({name}, m{index})",
        }
        line = lines[step]
        if step == "swap":
            line = f"s{index}{line.removeprefix(new)} {new} = Transpose <perm = {swap}> (s{index})"
        rank = 4 if wants_image else 3 if step == "merge" else rank
        previous = name if step in ("linear", "relu", "norm") else new
        body.append(line)
        name = new
    constants = f"{HEADS}, float[3,8] pos = {{{','.join(str(n / 9) for n in range(24))}}}, int64[1] axes = {{1}}"
    text = graph(" ".join([*body, f"y = Sigmoid ({name})"]), "2,3,8", "A,B,C,D"[: 2 * rank - 1], constants)
    # ten steps may add up what one rounds
    outcome = check(FlattenTokens(), text, allowed=10 * ROUNDING)
    before = 1 + sum(2 if step in ("linear", "swap", "mean") else 1 for step in steps)
    assert sum(outcome.ops.values()) <= before


@pytest.mark.parametrize("trial", range(20))
def test_min_cut_against_trying_everything(trial: int, rng: np.random.Generator) -> None:
    size = 6
    unless, chosen = rng.integers(0, 5, size), rng.integers(0, 5, size)
    without = rng.integers(0, 4, (size, size)) * (rng.random((size, size)) < 0.4)
    cut = MinCut()
    for one in range(size):
        cut.unless_chosen(one, int(unless[one]))
        cut.if_chosen(one, int(chosen[one]))
        for other in range(size):
            cut.if_without(one, other, int(without[one, other]))

    def cost(choice: np.ndarray[Any, Any]) -> int:
        return int(unless[~choice].sum() + chosen[choice].sum() + without[choice][:, ~choice].sum())

    every = [np.array([bool(number >> bit & 1) for bit in range(size)]) for number in range(1 << size)]
    least = min(map(cost, every))
    found = np.array([one in cut.chosen() for one in range(size)])
    assert cost(found) == least
    assert found.sum() == min(choice.sum() for choice in every if cost(choice) == least)
