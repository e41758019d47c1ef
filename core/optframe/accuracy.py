"""Accuracy figures: how far a run's outputs are from the reference's, and whether that is within limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from optframe.errors import CheckFailed
from optframe.types import Outputs, Precision

Array = np.ndarray[Any, Any]
Figure = Literal["max_abs", "median_rel", "rms_rel", "err_over_response"]
FIGURES: tuple[Figure, ...] = ("max_abs", "median_rel", "rms_rel", "err_over_response")

RELATIVE_FLOOR = 1e-5
"""Added to |b| in the relative difference, so that a reference of zero does not divide by zero."""


@dataclass(frozen=True)
class OutputError:
    """How far one output `a` is from the reference's `b`; all figures are computed in float64.

    `max_abs`: largest |a - b|. `median_rel`: median of |a - b| / (|b| + 1e-5). `rms_rel`: rms(a - b) / rms(b).
    `err_over_response`: rms(a - b) / rms(b - b'), where b' is the reference's output for another input: the error
    against what the model has to say (a model that looks at the wrong input scores 1); None without such a b', or
    where it equals b. `mismatched`: how many of `elements` differ, for integers, booleans and text only.

    NaN in both and equal infinities are no difference; NaN or infinity in one only is an infinite one.
    """

    max_abs: float
    median_rel: float
    rms_rel: float
    err_over_response: float | None = None
    elements: int = 0
    mismatched: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Largest figures that pass; None judges nothing."""

    max_abs: float | None = None
    err_over_response: float | None = None


# What the rounding of each precision costs Anchor DETR, the deepest model at hand, with headroom. FP32: re-ordered sums
# of some hundred layers on outputs near 1, some 1e-5. FP16: 11 bits of mantissa. INT8: 8 bits, per-tensor activations.
DEFAULT_LIMITS: Mapping[Precision, Limits] = {
    "fp32": Limits(max_abs=2e-4),
    "fp16": Limits(err_over_response=0.03),
    "int8": Limits(err_over_response=0.2),
}


@dataclass(frozen=True)
class Finding:
    """A figure of an output that is over its limit, or that has a limit but no value (`value` None)."""

    output: str
    figure: Figure
    value: float | None
    limit: float

    @property
    def missed(self) -> bool:
        """Whether the limit is known to be missed."""
        return self.value is not None

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.output}: {self.figure} could not be judged against its limit {self.limit:g}"
        ratio = self.value / self.limit if self.limit else float("inf")
        by = f" ({ratio:.2g} times as large)" if ratio < 100 else ""
        return f"{self.output}: {self.figure} {self.value:.3g} is over its limit {self.limit:g}{by}"


def compare_outputs(actual: Outputs, expected: Outputs, other: Outputs | None = None) -> dict[str, OutputError]:
    """Return the error of each output of `actual` against the reference's `expected`.

    `other` are the reference's outputs for another input, which `err_over_response` needs.

    Raises:
        CheckFailed: names, shapes or dtypes of the outputs are not those expected.
    """
    _check_names(actual, expected)
    return {
        name: compare_arrays(name, actual[name], array, None if other is None else other.get(name))
        for name, array in expected.items()
    }


def compare_arrays(name: str, actual: Array, expected: Array, other: Array | None = None) -> OutputError:
    """Return the error of one output; see `compare_outputs`."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"output '{name}' has shape {actual.shape}, the reference's has {expected.shape}")
    if actual.dtype != expected.dtype:
        raise CheckFailed(f"output '{name}' is {actual.dtype}, the reference's is {expected.dtype}")
    if not expected.size:
        return OutputError(0.0, 0.0, 0.0, remarks=("has no elements",))
    differs = actual != expected if expected.dtype.kind in "biuOSUT" else None
    a, b = _numbers(actual, expected)
    error = _absolute_error(a, b)
    if differs is not None:
        error = np.maximum(error, differs)  # large integers can differ and still be the same in float64
    response, response_remark = _response(expected, other)
    return OutputError(
        max_abs=float(error.max()),
        median_rel=float(np.median(_relative_error(error, b))),
        rms_rel=_ratio(_rms(error), _rms(b[np.isfinite(b)])),
        err_over_response=_ratio(_rms(error), response) if response else None,
        elements=expected.size,
        mismatched=None if differs is None else int(np.count_nonzero(differs)),
        remarks=(*_remarks(a, b), *response_remark),
    )


def _check_names(actual: Outputs, expected: Outputs) -> None:
    missing, unknown = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not expected: {', '.join(unknown)}"] * bool(unknown)
    if parts:
        raise CheckFailed(f"the outputs are not the reference's ({'; '.join(parts)})")


def _numbers(actual: Array, expected: Array) -> tuple[Array, Array]:
    """Return both as float64; text as 1 where it differs from an expected 0."""
    if expected.dtype.kind in "OSUT":
        return (actual != expected).astype(np.float64), np.zeros(expected.shape)
    return actual.astype(np.float64), expected.astype(np.float64)


def _absolute_error(a: Array, b: Array) -> Array:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(a - b))
    error[np.isnan(error)] = np.inf
    return error


def _relative_error(error: Array, b: Array) -> Array:
    scale = np.where(np.isfinite(b), np.abs(b), 0.0) + RELATIVE_FLOOR
    with np.errstate(over="ignore"):
        return np.asarray(error / scale)


def _rms(values: Array) -> float:
    """Return the root mean square; scaled first, so that squares neither overflow nor vanish."""
    scale = float(np.abs(values).max(initial=0.0))
    if scale == 0.0 or not np.isfinite(scale):
        return scale
    return scale * float(np.sqrt(np.mean(np.square(values / scale))))


def _ratio(error: float, signal: float) -> float:
    if error == 0.0:
        return 0.0
    return error / signal if signal else float("inf")


def _response(expected: Array, other: Array | None) -> tuple[float | None, tuple[str, ...]]:
    """Return rms(b - b') over the elements that are finite in both, or None and perhaps why."""
    if other is None or expected.dtype.kind in "OSUT" or other.dtype != expected.dtype:
        return None, ()
    if other.shape != expected.shape:
        return None, ("its shape differs between the two inputs, so err_over_response has no meaning",)
    b, other_b = expected.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(b) & np.isfinite(other_b)
    response = _rms(b[finite] - other_b[finite])
    if response == 0.0:
        return None, ("the reference gives the same for two different inputs: this output may not depend on them",)
    return response, ()


def _remarks(a: Array, b: Array) -> tuple[str, ...]:
    checks = {
        "NaN in {n} elements where the reference has none": np.isnan(a) & ~np.isnan(b),
        "no NaN in {n} elements where the reference has one": ~np.isnan(a) & np.isnan(b),
        "NaN in both in {n} elements": np.isnan(a) & np.isnan(b),
        "infinite in {n} elements where the reference is finite": np.isinf(a) & np.isfinite(b),
    }
    counts = {text: int(np.count_nonzero(where)) for text, where in checks.items()}
    return tuple(text.format(n=n) for text, n in counts.items() if n)


def aggregate(samples: Sequence[Mapping[str, OutputError]]) -> dict[str, OutputError]:
    """Return the worst of each figure over several inputs: the largest errors, elements and mismatches added up.

    `samples` holds the result of `compare_outputs` for each input: at least one, all with the same outputs.
    """
    return {name: _worst([sample[name] for sample in samples]) for name in samples[0]}


def _worst(errors: Sequence[OutputError]) -> OutputError:
    over_response = [error.err_over_response for error in errors if error.err_over_response is not None]
    mismatched = [error.mismatched for error in errors if error.mismatched is not None]
    return OutputError(
        max_abs=max(error.max_abs for error in errors),
        median_rel=max(error.median_rel for error in errors),
        rms_rel=max(error.rms_rel for error in errors),
        err_over_response=max(over_response, default=None),
        elements=sum(error.elements for error in errors),
        mismatched=sum(mismatched) if mismatched else None,
        remarks=tuple(dict.fromkeys(remark for error in errors for remark in error.remarks)),
    )


def judge(errors: Mapping[str, OutputError], limits: Limits) -> list[Finding]:
    """Return a finding for each figure of each output that is over its limit, or that has one but no value."""
    return [finding for name, error in errors.items() for finding in _judge_output(name, error, limits)]


def _judge_output(name: str, error: OutputError, limits: Limits) -> Iterable[Finding]:
    pairs: tuple[tuple[Figure, float | None, float | None], ...] = (
        ("max_abs", error.max_abs, limits.max_abs),
        ("err_over_response", error.err_over_response, limits.err_over_response),
    )
    for figure, value, limit in pairs:
        if limit is not None and (value is None or value > limit):
            yield Finding(name, figure, value, limit)
