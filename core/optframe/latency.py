"""Latency figures: warm-up, timed runs, and what the samples say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from optframe import environment
from optframe.backend import Runner
from optframe.types import Feeds

Clock = Callable[[], float]

MIN_RUNS_AT_LEAST = 3
"""However slow a model is: below three runs a median says nothing."""

MAX_SAMPLES = 1000
UNSTABLE_SPREAD = 0.2
"""On a quiet machine the middle 80 % of the runs lie within a few per cent of the median."""


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner that can keep inputs and outputs on its device, so that timing leaves the copies out."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Return a function that runs once on `feeds`, already on the device, and returns when the device is done."""
        ...


@dataclass(frozen=True)
class Latency:
    """Latency of one inference in milliseconds, and every sample of it in the order measured.

    Percentiles interpolate linearly between the sorted samples (Hyndman and Fan's definition 7, NumPy's default), so
    that `median` is the 50th; with fewer than 100 runs `p99` is close to `max`. `std` is that of the samples (ddof 0).
    `throughput_per_s` is inferences per second, one after the other: runs over the sum of their times.
    """

    median: float
    mean: float
    min: float
    max: float
    p90: float
    p95: float
    p99: float
    std: float
    throughput_per_s: float
    runs: int
    warmup_runs: int
    samples: tuple[float, ...]
    copies_included: bool
    """Whether each time includes copying inputs to and outputs from the device (nothing to copy on a CPU)."""
    measured_at: str
    """UTC, ISO 8601."""
    machine: str
    remarks: tuple[str, ...] = ()


def measure(
    runner: Runner,
    feeds: Feeds,
    *,
    warmup: int = 5,
    min_runs: int = 30,
    min_seconds: float = 0.5,
    max_seconds: float = 10.0,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    progress: Callable[[int, float], None] | None = None,
) -> Latency:
    """Time `runner` on `feeds`, one inference after the other, by the host's clock.

    Warm-up: `warmup` runs, cut short once they have taken a fifth of `max_seconds`. Then timed runs until there are
    `min_runs` that took at least `min_seconds` together (or 1000 of them), or until `max_seconds` are over, whichever
    is first, but at least 3. `progress` is told the number of timed runs so far and the seconds they took. `device`
    ("cpu" or "cuda") is where `runner` runs, for the record.
    """
    bound = isinstance(runner, DeviceRunner)
    step: Callable[[], object] = runner.bind(feeds) if isinstance(runner, DeviceRunner) else partial(runner.run, feeds)
    warmup_runs = _warm_up(step, warmup, max_seconds / 5, clock)
    samples: list[float] = []
    elapsed = 0.0
    while not _enough(len(samples), elapsed, min_runs, min_seconds, max_seconds):
        start = clock()
        step()
        samples.append(clock() - start)
        elapsed += samples[-1]
        if progress:
            progress(len(samples), elapsed)
    return summarize(
        samples,
        warmup_runs=warmup_runs,
        copies_included=not bound,
        machine=environment.machine_name(device),
    )


def _warm_up(step: Callable[[], object], runs: int, seconds: float, clock: Clock) -> int:
    start = clock()
    for done in range(runs):
        if done and clock() - start >= seconds:
            return done
        step()
    return runs


def _enough(runs: int, elapsed: float, min_runs: int, min_seconds: float, max_seconds: float) -> bool:
    if runs < MIN_RUNS_AT_LEAST:
        return False
    return elapsed >= max_seconds or (runs >= min_runs and (elapsed >= min_seconds or runs >= MAX_SAMPLES))


def summarize(
    seconds: Sequence[float],
    *,
    warmup_runs: int = 0,
    copies_included: bool = True,
    machine: str = "",
    measured_at: str | None = None,
) -> Latency:
    """Return the figures of samples given in seconds (at least one, in the order measured)."""
    samples = np.asarray(seconds, dtype=np.float64) * 1e3
    median, p90, p95, p99 = (float(value) for value in np.percentile(samples, [50, 90, 95, 99]))
    return Latency(
        median=median,
        mean=float(samples.mean()),
        min=float(samples.min()),
        max=float(samples.max()),
        p90=p90,
        p95=p95,
        p99=p99,
        std=float(samples.std()),
        throughput_per_s=1e3 * samples.size / float(samples.sum()) if samples.sum() else float("inf"),
        runs=samples.size,
        warmup_runs=warmup_runs,
        samples=tuple(samples.tolist()),
        copies_included=copies_included,
        measured_at=measured_at or datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        remarks=_remarks(samples),
    )


def _remarks(samples: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[str, ...]:
    low, median, high = np.percentile(samples, [10, 50, 90])
    spread = (high - low) / median if median else 0.0
    if spread <= UNSTABLE_SPREAD:
        return ()
    return (
        f"unstable timing: the middle 80 % of the runs spread over {spread:.0%} of the median; "
        "close other programs, or fix the clocks",
    )
