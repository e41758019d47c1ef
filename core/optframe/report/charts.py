"""Geometry of the report's charts. Lengths along x are per cent of the plot, so that a chart fits any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optframe.report.figures import compact, percent, with_unit
from optframe.report.record import EngineRun, RunReport

if TYPE_CHECKING:
    from optframe.precision import Sensitivity

Samples = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

TOP_OPS = 20
BINS = 72
HISTOGRAM_FROM = 30
"""Fewer samples are drawn one by one: a histogram of them would show its own bins and little else."""
LOG_FROM = 20.0
"""Latencies that lie further apart than this factor get a logarithmic axis: the smaller would be a single line."""


@dataclass(frozen=True)
class OpBar:
    """An op type's count before and after, and both as per cent of the largest count; `op` with its domain, if any."""

    op: str
    label: str
    before: int
    after: int
    before_width: float
    after_width: float


def op_bars(before: Mapping[str, int], after: Mapping[str, int], top: int = TOP_OPS) -> list[OpBar]:
    """Return a bar for each of the `top` most frequent op types, most first, and one for all others together."""
    ops = sorted(before.keys() | after.keys(), key=lambda op: (-max(before.get(op, 0), after.get(op, 0)), op))
    rows = [(op, before.get(op, 0), after.get(op, 0)) for op in ops]
    shown, rest = rows[:top], rows[top:]
    if rest:
        shown.append((f"{len(rest)} other ops", sum(row[1] for row in rest), sum(row[2] for row in rest)))
    largest = max((max(b, a) for _, b, a in shown), default=0) or 1
    return [OpBar(op, _op_label(op), b, a, 100 * b / largest, 100 * a / largest) for op, b, a in shown]


def _op_label(op: str) -> str:
    """Return "LayerNorm (anchordetr)" for "com.optframe.anchordetr::LayerNorm"."""
    domain, _, name = op.rpartition("::")
    return f"{name} ({domain.rpartition('.')[2]})" if domain else name


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in per cent, and what it says."""

    x: float
    text: str


@dataclass(frozen=True)
class LatencyBand:
    """A run's latency: `marks` of samples, or `bars` (x, width, height) of a histogram; range, quartiles, median.

    All lengths are per cent of the plot; a bar's height is per cent of the highest one of its run.
    """

    label: str
    precision: str
    detail: str
    marks: tuple[float, ...]
    bars: tuple[tuple[float, float, float], ...]
    low: float
    high: float
    quartile_low: float
    quartile_high: float
    median: float
    median_text: str
    summary: str


@dataclass(frozen=True)
class LatencyChart:
    """All runs' latencies over one axis."""

    bands: tuple[LatencyBand, ...]
    ticks: tuple[Tick, ...]
    logarithmic: bool


def latency_chart(report: RunReport) -> LatencyChart | None:
    """Return the chart of all runs that have a latency, or None if none has."""
    runs = [run for run in report.runs if run.latency]
    samples = [np.asarray(run.latency.samples) for run in runs if run.latency]
    if not samples:
        return None
    everything = np.concatenate(samples)
    axis = _Axis.around(float(everything.min()), float(everything.max()))
    bands = tuple(_band(report, run, times, axis) for run, times in zip(runs, samples, strict=True))
    return LatencyChart(bands, axis.ticks(), axis.logarithmic)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def around(cls, low: float, high: float) -> _Axis:
        """Return the axis of values from `low` to `high` with a margin; linear unless they lie very far apart."""
        if low > 0 and high / low > LOG_FROM:
            return cls(low / 1.2, high * 1.2, True)
        margin = 0.06 * (high - low) or 0.05 * high or 1.0
        return cls(max(0.0, low - margin), high + margin, False)

    def place(self, value: float) -> float:
        """Return where `value` lies, in per cent."""
        if self.logarithmic:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def edges(self) -> Sequence[float]:
        """Return the edges of the histogram's bins, equally wide on the axis."""
        space = np.geomspace if self.logarithmic else np.linspace
        return [float(edge) for edge in space(self.low, self.high, BINS + 1)]

    def ticks(self) -> tuple[Tick, ...]:
        """Return round values that lie on the axis, some four to seven of them."""
        values = self._log_values() if self.logarithmic else self._linear_values()
        return tuple(Tick(self.place(value), compact(value)) for value in values if self.low <= value <= self.high)

    def _linear_values(self) -> list[float]:
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]

    def _log_values(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        return [factor * 10.0**decade for decade in decades for factor in factors]


def _band(report: RunReport, run: EngineRun, samples: Samples, axis: _Axis) -> LatencyBand:
    low, quartile_low, median, quartile_high, p90, high = (
        float(value) for value in np.percentile(samples, [0, 25, 50, 75, 90, 100])
    )
    few = samples.size < HISTOGRAM_FROM
    return LatencyBand(
        label=report.label(run),
        precision=run.precision,
        detail=f"{samples.size} runs",
        marks=tuple(axis.place(float(sample)) for sample in samples) if few else (),
        bars=() if few else _bars(samples, axis),
        low=axis.place(low),
        high=axis.place(high),
        quartile_low=axis.place(quartile_low),
        quartile_high=axis.place(quartile_high),
        median=axis.place(median),
        median_text=with_unit(median, "ms"),
        summary=f"median {with_unit(median, 'ms')}, 90 % under {with_unit(p90, 'ms')}",
    )


def _bars(samples: Samples, axis: _Axis) -> tuple[tuple[float, float, float], ...]:
    counts, edges = np.histogram(samples, axis.edges())
    places = [axis.place(float(edge)) for edge in edges]
    return tuple(
        (left, right - left, 100 * int(n) / int(counts.max()))
        for n, left, right in zip(counts, places[:-1], places[1:], strict=True)
        if n
    )


@dataclass(frozen=True)
class CurveChart:
    """Error against the share of FLOPs in INT8: `points` (x, y, what it says) from right to left, `ticks` of either
    axis, and where the error aimed for lies. All places are per cent of the plot, y from above."""

    points: tuple[tuple[float, float, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    target: float


def curve_chart(found: Sensitivity | None) -> CurveChart | None:
    """Return the chart of the variants that were run and whose errors are finite; None without any."""
    drawn = [point for point in found.curve if math.isfinite(point.error)] if found else []
    if found is None or not drawn:
        return None
    across = _Axis(0.0, 100.0, False)
    up = _Axis(0.0, 1.08 * max(found.target, *(point.error for point in drawn)), False)
    points = tuple(
        (
            100 * point.int8_flops,
            100 - up.place(point.error),
            f"{point.kept} layers kept: {percent(point.int8_flops)} of FLOPs in INT8, error {compact(point.error)}",
        )
        for point in drawn
    )
    flipped = tuple(Tick(100 - tick.x, tick.text) for tick in up.ticks())
    return CurveChart(points, across.ticks(), flipped, 100 - up.place(found.target))
