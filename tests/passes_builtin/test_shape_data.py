"""Shape arithmetic with named unknowns against NumPy on the numbers that the names stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optframe_passes import shape_data
from optframe_passes.shape_data import Dim, Element, Product

SIZES: Mapping[str, int] = {"batch": 6, "h": 10, "?1": 15}
"""What the names stand for; not prime to one another, so that a false cancellation shows."""


def value_of(entry: Element) -> int | None:
    """Return the number that `entry` stands for."""
    if entry is None or isinstance(entry, int):
        return entry
    product = Product.of(entry)
    return product.number * math.prod(SIZES[name] for name in product.names)


dims = st.one_of(st.integers(1, 12), st.sampled_from(sorted(SIZES)))
entries = st.one_of(st.none(), st.integers(-5, 12), st.sampled_from(sorted(SIZES)))


@settings(max_examples=100, deadline=None)
@given(left=entries, right=entries)
@pytest.mark.parametrize(
    ("ours", "truth"),
    [
        (shape_data.add, lambda a, b: a + b),
        (shape_data.subtract, lambda a, b: a - b),
        (shape_data.multiply, lambda a, b: a * b),
        (shape_data.divide, lambda a, b: math.trunc(a / b) if b else None),
        (shape_data.equal, lambda a, b: int(a == b)),
    ],
)
def test_what_is_said_of_two_elements_is_true(
    ours: Callable[..., Element], truth: Callable[[int, int], int | None], left: Element, right: Element
) -> None:
    said = ours(left, right)
    a, b = value_of(left), value_of(right)
    if a is None or b is None:
        assert said is None or 0 in (left, right) or right == 1
    elif said is not None:
        assert value_of(said) == truth(a, b)
    elif isinstance(left, int) and isinstance(right, int):
        assert truth(a, b) is None, "numbers are always known"


@settings(max_examples=150, deadline=None)
@given(source=st.lists(dims, min_size=1, max_size=4), data=st.data())
def test_reshape_with_an_open_dimension_is_true(source: list[Dim], data: st.DataObject) -> None:
    """Some factors of the source are asked for, in any order, the rest goes into -1."""
    kept = data.draw(st.permutations(source))[: data.draw(st.integers(0, len(source)))]
    place = data.draw(st.integers(0, len(kept)))
    asked: list[Element] = [*kept[:place], -1, *kept[place:]]
    result = shape_data.reshaped(source, shape_data.elements(asked), allow_zero=False)
    rest = math.prod(value_of(d) or 0 for d in source) // math.prod(value_of(d) or 0 for d in kept)
    assert [value_of(entry) for entry in result] == [value_of(d) for d in kept[:place]] + [rest] + [
        value_of(d) for d in kept[place:]
    ]


def test_reshape_copies_dimensions_for_zero_unless_told_otherwise() -> None:
    target = shape_data.elements([0, -1])
    assert shape_data.reshaped(["batch", 3, 4], target, allow_zero=False) == ["batch", 12]
    assert shape_data.reshaped([0, 3], shape_data.elements([3, 0]), allow_zero=True) == [3, 0]


def test_reshape_does_not_divide_what_may_not_go() -> None:
    assert shape_data.reshaped(["h", "batch"], shape_data.elements(["?1", -1]), allow_zero=False) == ["?1", None]
    assert shape_data.reshaped(["h", 4], shape_data.elements([8, -1]), allow_zero=False) == [8, None]


@settings(max_examples=100, deadline=None)
@given(source=st.lists(dims, max_size=3), target=st.lists(st.one_of(st.none(), dims), max_size=3))
def test_expand_is_true_wherever_it_is_allowed(source: list[Dim], target: list[Element]) -> None:
    result = shape_data.expanded(source, shape_data.elements(target))
    numbers = [[value_of(entry) for entry in shape] for shape in (source, target)]
    if None in numbers[1]:
        assert len(result) == max(len(source), len(target))
        return
    try:
        expected: Any = np.broadcast_shapes(*(tuple(shape) for shape in numbers))
    except ValueError:
        return
    assert all(said is None or value_of(said) == size for said, size in zip(result, expected, strict=True))


def test_products_are_taken_apart_again() -> None:
    area = shape_data.multiply(shape_data.multiply("h", 4), "?1")
    assert area == shape_data.multiply(shape_data.multiply("?1", "h"), 4)
    assert shape_data.divide(area, "h") == shape_data.multiply(4, "?1")
    assert shape_data.divide(area, 8) is None


def test_names_do_not_grow_without_end() -> None:
    entry: Element = "h"
    for _ in range(200):
        entry = shape_data.multiply(entry, "h")
    assert entry is None
