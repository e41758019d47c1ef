"""Dynamic dimensions followed through rules that are written for integers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from optframe.errors import InputError
from optframe_trt import dims

Known = list[tuple[int, ...]]


def require(condition: bool) -> None:
    if not condition:
        raise InputError("refused")


@pytest.mark.parametrize(
    "formula",
    [
        lambda a, b: a + b,
        lambda a, b: 3 - a + 2 * b,
        lambda a, b: a * b // 7,
        lambda a, b: -(-a // 8),
        lambda a, b: -(-(a * b) // 6) * 6,
        lambda a, b: (a + 3) // 4,
        lambda a, b: 5040 // a + b,
        lambda a, b: math.prod((a, b, 2)),
        lambda a, b: sum((a, b, 2)),
        lambda a, b: -a + b,
        lambda a, b: max(a, 1) * b,
    ],
)
def test_arithmetic_holds_for_other_sizes(formula: Callable[[int, int], int], rng: np.random.Generator) -> None:
    traced = dims.trace(lambda known: formula(*known[0]), [(None, None)])
    for a, b in rng.integers(1, 1000, (20, 2)).tolist():
        assert dims.evaluate(traced, [(a, b)]) == formula(a, b)


def test_known_sizes_stay_integers() -> None:
    fixed, free = dims.trace(lambda known: known[0], [(8, None)])
    assert not isinstance(fixed, dims.Dim)
    assert (fixed, isinstance(free, dims.Dim)) == (8, True)


def test_inputs_that_must_agree_are_made_to() -> None:
    def rule(known: Known) -> int:
        x, y, scale = known
        require(x == y)
        require(scale == x[-1:])
        return x[0]

    traced = dims.trace(rule, [(None, None, 4), (None, None, 4), (None,)])
    assert dims.evaluate(traced, [(3, 5, 4), (3, 5, 4), (4,)]) == 3


def test_products_that_must_agree_are_made_to() -> None:
    def rule(known: Known) -> int:
        (n, rows), (keys, columns), (images, queries) = known
        require(rows % n == 0)
        require(rows // n == keys * columns)
        require(images == n)
        return queries // images

    traced = dims.trace(rule, [(None, None), (None, None), (None, None)])
    assert dims.evaluate(traced, [(2, 24), (3, 4), (2, 10)]) == 5


def test_a_rule_that_refuses_everything_says_why() -> None:
    def rule(known: Known) -> int:
        require(known[0][0] == 3)
        raise InputError("never")

    with pytest.raises(InputError, match="refused"):  # the reason of the first samples
        dims.trace(rule, [(None,)])


def test_samples_to_begin_with() -> None:
    seen = []
    dims.trace(lambda known: seen.append([int(size) for size in known[0]]), [(None, 4, None)], [(7, 4, 9)])
    assert seen == [[7, 4, 9]]


def test_a_dimension_whose_sample_is_1_stays_a_factor() -> None:
    """Such as the batch, where a profile's optimal one is a single image."""
    traced = dims.trace(lambda known: math.prod(known[0]), [(None, None, 4)], [(1, 7, 4)])
    assert dims.evaluate(traced, [(3, 5, 4)]) == 60


def test_what_cannot_be_followed_is_true_of_the_samples_alone() -> None:
    traced = dims.trace(lambda known: max(*known[0]), [(None, None)], [(7, 9)])
    assert dims.evaluate(traced, [(7, 9)]) == 9
    assert dims.evaluate(traced, [(12, 9)]) == 9  # so callers compare with the rule itself


def test_a_dimension_that_must_divide_others_is_made_to(rng: np.random.Generator) -> None:
    def rule(known: Known) -> tuple[int, int]:
        (images, length, channels), (rows, _), (cells, _) = known
        require(rows % max(images, 1) == 0)
        require(cells % images == 0)
        require(cells // images == length * 3)
        return rows // images, channels

    traced = dims.trace(rule, [(None, None, 8), (None, 8), (None, 8)])
    for images, length, each in rng.integers(1, 50, (20, 3)).tolist():
        shapes = [(images, length, 8), (images * each, 8), (images * length * 3, 8)]
        assert [dims.evaluate(size, shapes) for size in traced] == [each, 8]


def test_a_fixed_divisor_that_does_not_fit_is_refused() -> None:
    def rule(known: Known) -> int:
        require(known[0][0] % 11 == 0)
        return known[0][0]

    with pytest.raises(InputError, match="refused"):
        dims.trace(rule, [(None,)])
