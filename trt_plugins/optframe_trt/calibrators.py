"""Ways to choose INT8 ranges from a histogram: entropy, min-max, percentile, mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from optframe.errors import InputError
from optframe.precision.calibrator import Histogram

Array = np.ndarray[Any, np.dtype[np.float64]]

MAGNITUDES = 128
"""Magnitudes that the entropy method tells apart, as TensorRT's does: those of signed 8-bit integers, with zero."""

LEVELS = 127
"""Magnitudes above zero of symmetric INT8."""


@dataclass(frozen=True)
class MinMaxCalibrator:
    """The largest magnitude seen: nothing saturates, and outliers cost resolution."""

    name: ClassVar[str] = "min-max"

    def threshold(self, histogram: Histogram) -> float:
        """Return the largest magnitude."""
        return histogram.maximum


@dataclass(frozen=True)
class PercentileCalibrator:
    """The magnitude that `percent` per cent of all elements do not exceed, to within a bin of the histogram."""

    name: ClassVar[str] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise InputError(f"calibrator percentile: percent={self.percent} is not above 0 and up to 100")

    def threshold(self, histogram: Histogram) -> float:
        """Return the upper edge of the bin in which the percentile lies, at most the largest magnitude."""
        reached = np.cumsum(histogram.counts) >= self.percent / 100 * histogram.counts.sum()
        return min(float(np.argmax(reached) + 1) * histogram.width, histogram.maximum)


@dataclass(frozen=True)
class MseCalibrator:
    """The threshold of least mean squared error between values and their INT8 counterparts, of `candidates` tried."""

    name: ClassVar[str] = "mse"
    candidates: int = 100

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise InputError(f"calibrator mse: candidates={self.candidates} is less than 1")

    def threshold(self, histogram: Histogram) -> float:
        """Return the best of evenly spaced parts of the largest magnitude; values count as their bins' centres."""
        if not histogram.maximum:
            return 0.0
        counts = histogram.counts[: histogram.used]
        centres = (np.arange(histogram.used) + 0.5) * histogram.width
        thresholds = histogram.maximum * np.arange(1, self.candidates + 1) / self.candidates
        steps = thresholds[:, None] / LEVELS
        rounded = np.minimum(np.rint(centres / steps), LEVELS) * steps
        errors = np.square(rounded - centres) @ counts
        return float(thresholds[np.argmin(errors)])


@dataclass(frozen=True)
class EntropyCalibrator:
    """The threshold that keeps most information: the least Kullback-Leibler divergence of the quantised distribution.

    Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017 (slides 38 to 40: pseudocode). For each
    number of bins kept, the reference distribution P has the outliers added to its last bin, and Q has the bins kept,
    merged to 128 and spread evenly over those of them that are not empty. As NVIDIA's pytorch-quantization does, the
    bin of zeros counts as much as its neighbour: after a ReLU it would outweigh all others, and is exact anyway. All
    numbers of bins are evaluated at once, by cumulative sums.
    """

    name: ClassVar[str] = "entropy"

    def threshold(self, histogram: Histogram) -> float:
        """Return the upper edge of the last bin to keep, at most the largest magnitude."""
        bins = histogram.counts[: histogram.used].astype(np.float64)
        if bins.size <= MAGNITUDES:
            return histogram.maximum
        bins[0] = bins[1]
        if not bins.any():
            return histogram.maximum
        divergences = _divergences(bins)
        kept = bins.size - int(np.argmin(divergences[::-1]))  # of equals the one that saturates least
        return min(kept * histogram.width, histogram.maximum)


def _divergences(bins: Array) -> Array:
    """Return KL(P || Q) for every number of bins kept, from 128 to all; infinity where P has what Q lacks."""
    kept = np.arange(MAGNITUDES, bins.size + 1)
    total = bins.sum()
    mass, filled = (_cumulated(a) for a in (bins, bins > 0))
    edges = kept[:, None] * np.arange(MAGNITUDES + 1) // MAGNITUDES
    merged, merged_filled = np.diff(mass[edges]), np.diff(filled[edges])
    outliers = total - mass[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = merged / merged_filled / mass[kept][:, None]  # Q in each bin of a magnitude that is not empty
        p = merged / total
        p[:, -1] += outliers / total
        cross = np.where(p > 0, p * np.log(spread), 0.0).sum(axis=1)
        divergences: Array = _negative_entropy(bins, kept, outliers, total) - cross
        divergences[(bins[kept - 1] == 0) & (outliers > 0)] = np.inf
    return np.where(np.isfinite(divergences), divergences, np.inf)


def _negative_entropy(bins: Array, kept: Any, outliers: Array, total: float) -> Array:
    """Return the sum of P log P, whose last bin has the outliers too."""
    p = bins / total
    with np.errstate(divide="ignore", invalid="ignore"):
        before_last = _cumulated(np.where(p > 0, p * np.log(p), 0.0))[kept - 1]
        last = p[kept - 1] + outliers / total
        result: Array = before_last + np.where(last > 0, last * np.log(last), 0.0)
    return result


def _cumulated(array: Any) -> Array:
    return np.concatenate([[0.0], np.cumsum(array)])
