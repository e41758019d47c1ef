"""Accuracy figures against their formulas, and what NaN, infinity, integers and mismatches do to them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from optframe.accuracy import (
    DEFAULT_LIMITS,
    Limits,
    OutputError,
    aggregate,
    compare_arrays,
    compare_outputs,
    judge,
)
from optframe.errors import CheckFailed


def test_figures_of_an_example_done_by_hand() -> None:
    expected = np.array([[1.0, -2.0], [4.0, 0.0]], np.float32)
    actual = np.array([[1.5, -2.0], [4.0, -0.5]], np.float32)
    other = expected + np.float32(2)
    error = compare_arrays("y", actual, expected, other)
    assert error.max_abs == 0.5
    # relative: 0.5 / 1.00001, 0, 0, 0.5 / 0.00001; the median lies between 0 and the first
    assert error.median_rel == pytest.approx(0.25 / 1.00001, rel=1e-12)
    assert error.rms_rel == pytest.approx(math.sqrt(0.5 / 21), rel=1e-12)
    assert error.err_over_response == pytest.approx(math.sqrt(0.5 / 4) / 2, rel=1e-12)
    assert (error.elements, error.mismatched, error.remarks) == (4, None, ())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_figures_are_computed_in_float64_for_every_float_type(dtype: type, rng: np.random.Generator) -> None:
    expected, actual, other = ((300 + rng.standard_normal((3, 7, 5)) * 20).astype(dtype) for _ in range(3))
    a, b, c = (array.astype(np.float64) for array in (actual, expected, other))
    error = compare_arrays("y", actual, expected, other)
    # both sides are float64 sums of 105 terms, so only their order of summation differs
    assert error.max_abs == np.abs(a - b).max()
    assert error.median_rel == pytest.approx(np.median(np.abs(a - b) / (np.abs(b) + 1e-5)), rel=1e-12)
    assert error.rms_rel == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-12)
    assert error.err_over_response == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b - c), rel=1e-12)


def test_a_model_that_looks_at_the_wrong_input_scores_one(rng: np.random.Generator) -> None:
    bias = 1e4  # hides the response from every relative figure
    right, wrong = (np.float32(bias) + rng.standard_normal(100, np.float32) for _ in range(2))
    error = compare_arrays("y", wrong, right, wrong)
    assert error.err_over_response == 1.0
    assert error.rms_rel < 1e-3


def test_equal_outputs_have_no_error(rng: np.random.Generator) -> None:
    array = rng.standard_normal((2, 3)).astype(np.float32)
    assert compare_arrays("y", array, array.copy(), -array) == OutputError(0.0, 0.0, 0.0, 0.0, 6)


def test_nan_and_infinity_in_both_are_equal() -> None:
    array = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    error = compare_arrays("y", array, array.copy(), np.zeros(4, np.float32))
    assert (error.max_abs, error.median_rel, error.rms_rel, error.err_over_response) == (0, 0, 0, 0)
    assert error.remarks == ("NaN in both in 1 elements",)


@pytest.mark.parametrize(
    ("actual", "expected", "remark"),
    [
        (np.nan, 1.0, "NaN in 1 elements where the reference has none"),
        (1.0, np.nan, "no NaN in 1 elements where the reference has one"),
        (np.inf, 1.0, "infinite in 1 elements where the reference is finite"),
        (-np.inf, np.inf, ""),
        (3.0, -np.inf, ""),
    ],
)
def test_nan_or_infinity_in_one_only_is_an_infinite_error(actual: float, expected: float, remark: str) -> None:
    a, b = np.array([actual, 0.0, 0.0], np.float32), np.array([expected, 0.0, 0.0], np.float32)
    error = compare_arrays("y", a, b, np.ones(3, np.float32))
    assert error.max_abs == error.rms_rel == error.err_over_response == math.inf
    assert error.median_rel == 0.0
    assert error.remarks == ((remark,) if remark else ())


def test_a_zero_reference_gives_finite_relative_figures_only_without_error() -> None:
    zero = np.zeros(5, np.float32)
    assert compare_arrays("y", zero, zero).rms_rel == 0.0
    off = compare_arrays("y", zero + np.float32(1e-3), zero)
    assert off.rms_rel == math.inf
    assert off.median_rel == pytest.approx(np.float32(1e-3) / 1e-5, rel=1e-12)


def test_huge_and_tiny_values_neither_overflow_nor_vanish() -> None:
    huge = np.array([1e200, -3e200])
    assert compare_arrays("y", huge * 1.5, huge).rms_rel == pytest.approx(0.5, rel=1e-12)
    tiny = np.array([1e-200, -3e-200])
    assert compare_arrays("y", tiny * 1.5, tiny).rms_rel == pytest.approx(0.5, rel=1e-12)


def test_response_is_unknown_without_another_input_or_with_one_that_changes_nothing() -> None:
    b = np.array([1.0, 2.0], np.float32)
    assert compare_arrays("y", b + 1, b).err_over_response is None
    constant = compare_arrays("y", b + 1, b, b.copy())
    assert constant.err_over_response is None
    assert "may not depend on them" in constant.remarks[0]
    reshaped = compare_arrays("y", b + 1, b, np.zeros(3, np.float32))
    assert reshaped.err_over_response is None
    assert "shape" in reshaped.remarks[0]


def test_integers_booleans_and_text_count_mismatches() -> None:
    labels = np.array([3, 5, 7, 9])
    error = compare_arrays("labels", np.array([3, 6, 7, 11]), labels)
    assert (error.mismatched, error.elements, error.max_abs) == (2, 4, 2.0)
    flags = np.array([True, False, True])
    assert compare_arrays("keep", ~flags, flags).mismatched == 3
    text = np.array(["cat", "dog"], object)
    assert compare_arrays("name", np.array(["cat", "cow"], object), text).mismatched == 1
    assert compare_arrays("name", text, text).max_abs == 0.0


def test_integers_that_float64_cannot_tell_apart_still_differ() -> None:
    error = compare_arrays("id", np.array([2**53 + 1]), np.array([2**53]))
    assert (error.mismatched, error.max_abs) == (1, 1.0)


def test_empty_outputs_are_equal() -> None:
    empty = np.zeros((0, 4), np.float32)
    error = compare_arrays("boxes", empty, empty)
    assert (error.max_abs, error.elements, error.remarks) == (0.0, 0, ("has no elements",))


def test_names_shapes_and_dtypes_must_be_the_references() -> None:
    one = np.zeros((1, 2), np.float32)
    with pytest.raises(CheckFailed, match=r"missing: boxes; not expected: box"):
        compare_outputs({"logits": one, "box": one}, {"logits": one, "boxes": one})
    with pytest.raises(CheckFailed, match=r"'logits' has shape \(2,\), the reference's has \(1, 2\)"):
        compare_outputs({"logits": one[0]}, {"logits": one})
    with pytest.raises(CheckFailed, match="'logits' is float16, the reference's is float32"):
        compare_outputs({"logits": one.astype(np.float16)}, {"logits": one})


def test_outputs_are_compared_by_name() -> None:
    a, b = np.array([1.0], np.float32), np.array([2.0], np.float32)
    errors = compare_outputs({"q": b, "p": a}, {"p": a, "q": b + 1}, {"p": b, "q": b})
    assert list(errors) == ["p", "q"]
    assert (errors["p"].max_abs, errors["q"].max_abs) == (0.0, 1.0)
    assert (errors["p"].err_over_response, errors["q"].err_over_response) == (0.0, 1.0)


def test_aggregate_takes_the_worst_of_each_figure() -> None:
    first = OutputError(1.0, 0.1, 0.5, None, 10, 2, ("has no elements",))
    second = OutputError(0.5, 0.2, 0.1, 0.3, 20, 1, ("has no elements", "x"))
    worst = aggregate([{"y": first}, {"y": second}])
    assert worst == {"y": OutputError(1.0, 0.2, 0.5, 0.3, 30, 3, ("has no elements", "x"))}
    assert aggregate([{"y": first}])["y"] == first


def test_judge_says_which_output_and_by_how_much() -> None:
    errors = {"logits": OutputError(3e-4, 0, 0, 0.08), "boxes": OutputError(1e-4, 0, 0, 0.01)}
    (finding,) = judge(errors, DEFAULT_LIMITS["fp32"])
    assert (finding.output, finding.figure, finding.missed) == ("logits", "max_abs", True)
    (finding,) = judge(errors, DEFAULT_LIMITS["fp16"])
    assert str(finding) == "logits: err_over_response 0.08 is over its limit 0.03 (2.7 times as large)"
    assert judge(errors, DEFAULT_LIMITS["int8"]) == []
    assert judge(errors, Limits()) == []


def test_a_limit_that_could_not_be_judged_is_told_but_not_missed() -> None:
    (finding,) = judge({"y": OutputError(1.0, 0, 0, None)}, DEFAULT_LIMITS["int8"])
    assert not finding.missed
    assert str(finding) == "y: err_over_response could not be judged against its limit 0.2"


def test_an_infinite_error_misses_its_limit_without_a_silly_factor() -> None:
    (finding,) = judge({"y": OutputError(math.inf, 0, 0)}, Limits(max_abs=0.1))
    assert str(finding) == "y: max_abs inf is over its limit 0.1"
