"""`broadcast`: constants behind Reshape, Transpose and the like, against adding them in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optframe_passes.broadcast import before, behind, collapsed, groups, of_rank, reshaped, times, trimmed
from optframe_passes.propagate import Propagation

Parse = Callable[..., ir.Model]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw two shapes of equally many elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=5))
    shapes = []
    for _ in range(2):
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(factor)
            else:
                shape[-1] *= factor
        shapes.append(shape)
    return shapes[0], shapes[1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes=reshapes(), data=st.data())
def test_reshaped_constants_broadcast_to_the_same(shapes: tuple[list[int], list[int]], data: st.DataObject) -> None:
    dims, result = shapes
    kept = [size if data.draw(st.booleans()) else 1 for size in dims]
    array = np.arange(math.prod(kept), dtype=np.float64).reshape(kept)
    found = reshaped(array, dims, result)
    assert found is not None
    expected = np.broadcast_to(array, dims).reshape(result)
    np.testing.assert_array_equal(np.broadcast_to(found, result), expected)
    assert found.shape == collapsed(expected).shape


def test_groups_of_axes() -> None:
    assert list(groups([1, 50, 67, 256], [1, 3350, 8, 32])) == [([1, 2], [1]), ([3], [2, 3])]
    assert list(groups(["N", 6, 4], ["N", 2, 3, 4])) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert list(groups(["N", "M", 4], ["M", "N", 4])) == [([0, 1], [0, 1]), ([2], [2])]
    assert list(groups(["N", 4], ["?1", 2])) == [([0, 1], [0, 1])]
    assert list(groups([0, 4], [4, 0])) == [([0, 1], [0, 1])]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Transpose <perm = [2, 0, 1, 3]> (x)", (1, 3, 1, 5)),
        ("y = Transpose (x)", (2, 1, 4, 1)),
        ("y = Reshape (x, t)", (1, 1, 1, 5)),
        ("y = Reshape (x, t)", (2, 1, 4, 5)),
        ("y = Flatten <axis = 2> (x)", (1, 3, 1, 1)),
        ("y = Unsqueeze (x, u)", (1, 1, 4, 1)),
    ],
)
def test_behind_and_before(text: str, shape: tuple[int, ...], parse: Parse) -> None:
    model = parse(f"g (float[2,3,4,5] x) => (float y) <int64[3] t = {{6, 2, 10}}, int64[2] u = {{0, 3}}> {{ {text} }}")
    known, node = Propagation.of(model), model.graph[0]
    array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    found = behind(node, array, known)
    assert found is not None
    assert found.ndim == len(known.dims(node.outputs[0]) or ())
    back = before(node, found, known)
    assert back is not None
    np.testing.assert_array_equal(np.broadcast_to(back, (2, 3, 4, 5)), np.broadcast_to(array, (2, 3, 4, 5)))


def test_dynamic_axes_hold_what_does_not_vary(parse: Parse) -> None:
    model = parse("g (float[N,6,8] x) => (float y) <int64[4] t = {0, 6, 2, 4}> { y = Reshape (x, t) }")
    known, node = Propagation.of(model), model.graph[0]
    found = behind(node, np.arange(8.0).reshape(1, 1, 8), known)
    assert found is not None
    assert found.shape == (1, 1, 2, 4)
    mixed = parse("g (float[N,M,8] x) => (float y) <int64[2] t = {-1, 4}> { y = Reshape (x, t) }")
    assert behind(mixed.graph[0], np.arange(8.0).reshape(1, 1, 8), Propagation.of(mixed)) is None


def test_ranks() -> None:
    assert of_rank(np.zeros((3, 1)), 4).shape == (1, 1, 3, 1)
    assert trimmed(np.zeros((1, 1, 3, 1))).shape == (3, 1)
    assert trimmed(np.zeros((1, 1))).shape == ()
    assert collapsed(np.array([[1.0, 1.0], [2.0, 2.0]])).shape == (2, 1)


def test_a_broadcast_last_axis_is_summed_over() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((5, 4))
    for shape in [(5,), (1,), (3, 1), (2, 3, 5), (2, 1, 1), (0, 5)]:
        array = rng.standard_normal(shape)
        rows = np.broadcast_to(array, (*shape[:-1], 5))
        assert np.allclose(times(array, matrix), rows @ matrix, rtol=1e-14, atol=1e-14)  # sums in another order
        assert times(array, matrix).shape == (*shape[:-1], 4)
