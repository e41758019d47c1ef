"""`scatter-to-slices`: which scatters are slices, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe.passes import PassContext
from optframe_passes.scatter_to_slices import ScatterToSlices

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Weigh = Callable[..., ir.Model]
Parse = Callable[..., ir.Model]

NUMBERS = ", ".join(f"int64[1] n{number} = {{{number}}}" for number in range(8))


def box(*ranges: range) -> Array:
    """Return the index tuples of a box, (..., number of ranges), as exporters fold them."""
    return np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).astype(np.int64)


def scatter(parse: Parse, weigh: Weigh, indices: Array, updates: str, body: str = "", **constants: Array) -> ir.Model:
    """Return y = ScatterND(relu(x), indices, u), x (4, 6, 5), u of shape `updates` or made by `body`."""
    shapes = {name: array.shape for name, array in ({"i": indices} | constants).items()}
    declared = ", ".join(
        f"{'int64' if name == 'i' else 'float'}[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items()
    )
    given = f", float[{updates}] u" if updates else ""
    text = f"g (float[4,6,5] x{given}, {declared}) => (float[4,6,5] y) <{NUMBERS}> {{ r = Relu (x) {body} }}"
    return weigh(parse(text), i=indices, **constants)


PLAIN = "y = ScatterND (r, i, u)"


@pytest.mark.parametrize(
    ("indices", "updates", "sizes"),
    [
        (box(range(1, 3)), "2,6,5", [1, 2, 1]),
        (box(range(4), range(2)), "4,2,5", [2, 4]),
        (box(range(4), range(6), range(2, 5)), "4,6,3", [2, 3]),
        (box(range(4), range(6), range(-2, 0)), "4,6,2", [3, 2]),
    ],
)
def test_a_box_is_a_split_and_a_concat(
    indices: Array, updates: str, sizes: list[int], parse: Parse, weigh: Weigh, check: Check
) -> None:
    outcome = check(ScatterToSlices(), scatter(parse, weigh, indices, updates, PLAIN))
    assert outcome.ops == {"Relu": 1, "Split": 1, "Concat": 1}
    assert outcome.node("Split").inputs[1].const_value.numpy().tolist() == sizes


def test_updates_of_another_shape_are_reshaped(parse: Parse, weigh: Weigh, check: Check) -> None:
    indices = box(range(4), range(6), range(2)).reshape(-1, 3)
    outcome = check(ScatterToSlices(), scatter(parse, weigh, indices, "48", PLAIN))
    assert outcome.ops == {"Relu": 1, "Reshape": 1, "Split": 1, "Concat": 1}


def test_updates_of_everything_are_the_result(parse: Parse, weigh: Weigh, check: Check) -> None:
    outcome = check(ScatterToSlices(), scatter(parse, weigh, box(range(4)), "4,6,5", PLAIN))
    assert outcome.ops == {"Relu": 1, "Identity": 1}


SLICED = "s = Slice (r, n2, n5, n1)"
MIDDLE = box(range(4), range(2, 5))


def test_the_slice_that_is_updated_comes_from_the_split(parse: Parse, weigh: Weigh, check: Check) -> None:
    body = f"{SLICED} a = Mul (s, u) y = ScatterND (r, i, a)"
    outcome = check(ScatterToSlices(), scatter(parse, weigh, MIDDLE, "4,3,5", body))
    assert outcome.ops == {"Relu": 1, "Split": 1, "Mul": 1, "Concat": 1}


@pytest.mark.parametrize("constant", [np.ones(1, np.float32), np.arange(15, dtype=np.float32).reshape(3, 5)])
def test_a_constant_added_to_a_slice_is_added_to_everything(
    constant: Array, parse: Parse, weigh: Weigh, check: Check
) -> None:
    body = f"{SLICED} a = Add (c, s) y = ScatterND (r, i, a)"
    outcome = check(ScatterToSlices(), scatter(parse, weigh, MIDDLE, "", body, c=constant))
    assert outcome.ops == {"Relu": 1, "Add": 1}


def test_what_another_slice_was_added_to_stays_a_concat(parse: Parse, weigh: Weigh, check: Check) -> None:
    body = "s = Slice (r, n1, n4, n1) a = Add (c, s) y = ScatterND (r, i, a)"
    outcome = check(ScatterToSlices(), scatter(parse, weigh, MIDDLE, "", body, c=np.ones(1, np.float32)))
    assert outcome.ops == {"Relu": 1, "Slice": 1, "Add": 1, "Split": 1, "Concat": 1}


def test_reduction_add(parse: Parse, weigh: Weigh, check: Check) -> None:
    body = 'y = ScatterND <reduction = "add"> (r, i, u)'
    outcome = check(ScatterToSlices(), scatter(parse, weigh, MIDDLE, "4,3,5", body))
    assert outcome.ops == {"Relu": 1, "Split": 1, "Add": 1, "Concat": 1}


@pytest.mark.parametrize("axis", [1, -2])
def test_scatter_elements(axis: int, parse: Parse, weigh: Weigh, check: Check) -> None:
    indices = np.broadcast_to(np.array([4, -1]).reshape(1, 2, 1), (4, 2, 5)).astype(np.int64)
    body = f"y = ScatterElements <axis = {axis}> (r, i, u)"
    outcome = check(ScatterToSlices(), scatter(parse, weigh, indices, "4,2,5", body))
    assert outcome.ops == {"Relu": 1, "Split": 1, "Concat": 1}


@pytest.mark.parametrize(
    ("indices", "updates", "body"),
    [
        (box(range(1, 3), range(2)), "2,2,5", PLAIN),
        (box(range(3, 1, -1)), "2,6,5", PLAIN),
        (np.array([[0], [2]]), "2,6,5", PLAIN),
        (np.array([[1], [1]]), "2,6,5", PLAIN),
        (box(range(1, 3)), "2,6,5", 'y = ScatterND <reduction = "max"> (r, i, u)'),
        (
            np.arange(1, 3).reshape(2, 1, 1).repeat(6, 1).repeat(5, 2),
            "2,6,5",
            "y = ScatterElements <axis = 1> (r, i, u)",
        ),
    ],
)
def test_other_scatters_stay_and_say_why(
    indices: Array, updates: str, body: str, parse: Parse, weigh: Weigh, check: Check
) -> None:
    outcome = check(ScatterToSlices(), scatter(parse, weigh, indices, updates, body))
    assert not outcome.result.modified
    assert outcome.reasons


def test_dynamic_axes_beside_the_slice(parse: Parse, weigh: Weigh, check: Check) -> None:
    text = f"g (float[4,N] x, float[2,N] u, int64[2,1] i) => (float[4,N] y) <{NUMBERS}> {{ y = ScatterND (x, i, u) }}"
    outcome = check(ScatterToSlices(), weigh(parse(text), i=box(range(2))))
    assert outcome.ops == {"Split": 1, "Concat": 1}


@pytest.mark.parametrize("index", [4, -5])
def test_indices_beyond_the_tensor_stay_the_runtime_s_matter(index: int, parse: Parse) -> None:
    for scattered in (f"ScatterND (x, i, u) <{index}>", f"ScatterElements <axis = 0> (x, i, u) <{index}>"):
        call = scattered.rpartition(" ")[0]
        model = parse(f"g (float[4,1] x, float[1,1] u) => (float[4,1] y) <int64[1,1] i = {{{index}}}> {{ y = {call} }}")
        assert not ScatterToSlices().run(model, PassContext()).modified
