"""When two results of the same computation count as equal, and what to say where they don't."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

Array = np.ndarray[Any, Any]
Status = Literal["equal", "different", "unverified"]

TOLERANCES: Mapping[int, float] = {
    onnx.TensorProto.DOUBLE: 1e-10,
    onnx.TensorProto.FLOAT: 1e-4,
    onnx.TensorProto.FLOAT16: 1e-2,
    onnx.TensorProto.BFLOAT16: 8e-2,
}
"""Largest |a - b| / (|a| + rms(a)) of an element, by the coarsest float type that took part.

A sum of K products taken in another order errs by about sqrt(K) roundings of its terms: for K = 2304, a 3x3
convolution of 256 channels, by 3e-6 in FP32 (a rounding is 6e-8). 1e-4 leaves a factor of 30 for cancellation and for
several operations in a row, and lies below what a wrong weight, epsilon or axis does. FP64 has the same factor and
more, since constants may have passed through FP32 arithmetic of an exporter. FP16 and BF16 round by 5e-4 and 4e-3 at
each operation that is not fused: 20 roundings. Integers, booleans and text are exact.
"""


@dataclass(frozen=True)
class Verdict:
    """What a comparison showed, and why it is not simply equal; "unverified" means that it could not tell.

    `sample` names the input on which it showed.
    """

    status: Status
    reason: str = ""
    sample: str = ""


EQUAL = Verdict("equal")


def of_all_tensors(verdicts: Iterable[Verdict]) -> Verdict:
    """Return what the verdicts on all tensors of one run mean together: each of them has to be equal."""
    return _first_of(("different", "unverified", "equal"), verdicts)


def of_all_inputs(verdicts: Iterable[Verdict]) -> Verdict:
    """Return what the verdicts on several inputs mean together: one difference is enough, and one input that tells."""
    return _first_of(("different", "equal", "unverified"), verdicts)


def _first_of(order: tuple[Status, ...], verdicts: Iterable[Verdict]) -> Verdict:
    given = list(verdicts)
    for status in order:
        found = [verdict for verdict in given if verdict.status == status]
        if found:
            remarks = [verdict for verdict in given if verdict.status == "unverified" and status == "equal"]
            reasons = dict.fromkeys(verdict.reason for verdict in [*found, *remarks] if verdict.reason)
            return Verdict(status, "; ".join(list(reasons)[:3]), found[0].sample)
    return EQUAL


def tolerance(element_types: Iterable[int]) -> float:
    """Return the tolerance where tensors of these ONNX element types took part."""
    return max((TOLERANCES[each] for each in element_types if each in TOLERANCES), default=0.0)


def tolerance_of(array: Array) -> float:
    """Return the tolerance for arrays of the type of `array`."""
    return tolerance([onnx.helper.np_dtype_to_tensor_dtype(array.dtype)] if array.dtype.kind == "f" else [])


def relative_difference(before: Array, after: Array) -> Array:
    """Return |a - b| / (|a| + rms(a)) of each element; 0 where both are 0, infinite where only all of `before` is."""
    a, b = before.astype(np.float64), after.astype(np.float64)
    error = np.abs(a - b)
    scale = np.abs(a) + np.sqrt(np.mean(np.square(a)))
    relative: Array = np.divide(error, scale, out=np.where(error > 0, np.inf, 0.0), where=scale > 0)
    return relative


def _absolute_difference(before: Array, after: Array) -> Array:
    return np.abs(before.astype(np.float64) - after.astype(np.float64))


def compare(before: Array, after: Array, allowed: float, absolute: bool = False) -> Verdict:
    """Compare a tensor `before` and `after` a change; `allowed` is the difference that floats may have.

    It is relative as `relative_difference` defines it, or with `absolute` |a - b| of an element. NaN and infinities
    have to be where they were. Where `before` is NaN and `after` is not, nobody can tell.
    """
    if before.shape != after.shape:
        return Verdict("different", f"its shape was {list(before.shape)} and is {list(after.shape)}")
    if before.dtype != after.dtype and {before.dtype.kind, after.dtype.kind} != {"U"}:
        return Verdict("different", f"it was {before.dtype} and is {after.dtype}")
    if before.dtype.kind not in "fc":
        wrong = np.count_nonzero(before != after)
        return Verdict("different", f"{wrong} of {before.size} elements differ") if wrong else EQUAL
    if before.dtype.kind == "c":
        before, after = (np.stack([array.real, array.imag]) for array in (before, after))
    return _compare_floats(before, after, allowed, absolute)


def _compare_floats(before: Array, after: Array, allowed: float, absolute: bool) -> Verdict:
    finite = np.isfinite(before)
    lost = np.count_nonzero(finite & ~np.isfinite(after)) + np.count_nonzero(np.isinf(before) & (before != after))
    if lost:
        return Verdict("different", f"{lost} of {before.size} elements became, or are no longer, infinite or NaN")
    if finite.any():
        difference = _absolute_difference if absolute else relative_difference
        worst = float(difference(before[finite], after[finite]).max())
        if worst > allowed:
            return Verdict("different", too_large(worst, allowed, absolute))
    missing = np.isnan(before)
    if missing.any() and (missing.all() or not np.isnan(after[missing]).all()):
        return Verdict("unverified", f"{np.count_nonzero(missing)} of {before.size} elements were NaN already")
    return EQUAL


def too_large(worst: float, allowed: float, absolute: bool = False) -> str:
    """Say that the difference `worst` is more than `allowed`."""
    return f"its values differ by {worst:.2g}{'' if absolute else ' of their size'}, {allowed:.2g} is allowed"
