"""Streaming histograms, and the protocol of what chooses an INT8 range from one."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, ClassVar, Protocol

import numpy as np

BINS = 4096
CHUNK = 1 << 18
"""Elements that are binned at a time: what is worked on stays in the CPU's cache."""

LARGEST_FACTOR = 2.0**127
"""The largest power of two that float32 holds."""

Array = np.ndarray[Any, Any]


class Histogram:
    """How often each magnitude |x| occurs in a tensor, over any number of arrays; memory does not grow with them.

    `counts` (int64) of 4096 bins of equal `width` cover [0, `limit`), where `limit` is the power of two above the
    largest value, so that at least half of them are in use. When a larger value comes, neighbouring bins are merged.
    Since all edges are multiples of powers of two that is exact: the counts depend neither on the order of the
    arrays nor on how values are spread over them.
    """

    def __init__(self) -> None:
        self.counts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.maximum = 0.0

    @property
    def width(self) -> float:
        """Width of a bin; 0 as long as no value but zero was seen."""
        return self.limit / BINS

    @property
    def used(self) -> int:
        """How many bins reach up to the largest value."""
        return int(self.maximum / self.width) + 1 if self.limit else 1

    def add(self, array: Array) -> None:
        """Count the elements of a float array of any shape.

        Raises:
            ValueError: there is a NaN or an infinity among them.
        """
        if not array.size:
            return
        maximum = float(max(array.max(), -array.min()))
        if not math.isfinite(maximum):
            raise ValueError("NaN or infinity")
        self._make_room(maximum)
        flat = array.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            self._count(np.abs(flat[start : start + CHUNK]))

    def _make_room(self, maximum: float) -> None:
        self.maximum = max(self.maximum, maximum)
        needed = 2.0 ** math.frexp(self.maximum)[1] if self.maximum else 0.0
        if self.limit and needed > self.limit:
            merged = min(BINS, int(needed / self.limit))
            sums = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts = np.concatenate([sums, np.zeros(BINS - sums.size, np.int64)])
        self.limit = needed

    def _count(self, magnitudes: Array) -> None:
        if self.limit:
            bins = np.multiply(magnitudes, 1 / self.width, dtype=self._exact_type(magnitudes)).astype(np.int32)
            self.counts += np.bincount(bins, minlength=BINS)
        else:
            self.counts[0] += magnitudes.size

    def _exact_type(self, magnitudes: Array) -> np.dtype[Any]:
        """Return a type that holds the magnitudes' products with the power of two 1 / width."""
        least = np.float32 if 1 / self.width <= LARGEST_FACTOR else np.float64
        return np.promote_types(magnitudes.dtype, least)


class Calibrator(Protocol):
    """A frozen dataclass whose fields, all with defaults, are its options; a `CalibratorSpec` names the class."""

    name: ClassVar[str]

    def threshold(self, histogram: Histogram) -> float:
        """Return the magnitude that INT8's 127 shall stand for; larger ones saturate. 0 only if all values are 0."""
        ...


def calibrator_text(calibrator: Calibrator) -> str:
    """Return name and options of `calibrator` as text: `percentile{percent=99.99}`."""
    options = ",".join(f"{f.name}={getattr(calibrator, f.name)}" for f in fields(calibrator))  # type: ignore[arg-type]
    return f"{calibrator.name}{{{options}}}" if options else calibrator.name
