"""The stopping rule and the figures of a latency measurement, against a clock that the test controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, repeat
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from optframe.latency import Latency, measure, summarize


class FakeClock:
    """Stands still unless a run moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """A runner each run of which takes the next of `seconds`."""

    def __init__(self, clock: FakeClock, seconds: Iterator[float]) -> None:
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        self.runs += 1
        self.clock.now += next(self.seconds)
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class BoundRunner(FakeRunner):
    """A runner that keeps its buffers on a device."""

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], None]:
        def step() -> None:
            self.clock.now += 0.002

        return step


def timed(*seconds: float, then: float, **options: Any) -> tuple[Latency, FakeRunner]:
    clock = FakeClock()
    runner = FakeRunner(clock, chain(seconds, repeat(then)))
    return measure(runner, {}, clock=clock, **options), runner


def test_thirty_runs_that_take_long_enough_end_the_measurement() -> None:
    latency, runner = timed(then=0.1)
    assert (latency.runs, latency.warmup_runs, runner.runs) == (30, 5, 35)
    assert latency.median == pytest.approx(100.0)
    assert latency.throughput_per_s == pytest.approx(10.0)


def test_a_slow_model_stops_after_ten_seconds() -> None:
    latency, _ = timed(then=2.4)
    assert latency.runs == 5  # 9.6 s after four runs
    assert latency.warmup_runs == 1  # 2.4 s of warm-up are over its share of 2 s


def test_a_very_slow_model_is_still_run_three_times() -> None:
    latency, runner = timed(then=60.0)
    assert (latency.runs, runner.runs) == (3, 4)


def test_a_fast_model_runs_on_until_half_a_second_or_a_thousand_samples() -> None:
    assert timed(then=0.001)[0].runs == pytest.approx(500, abs=1)  # sums of 0.001 may fall just short of 0.5
    assert timed(then=1e-6)[0].runs == 1000


def test_warm_up_is_not_in_the_samples() -> None:
    latency, _ = timed(9.0, then=0.5, warmup=1)
    assert latency.max == pytest.approx(500.0)
    without, runner = timed(9.0, then=0.5, warmup=0, min_runs=4)
    assert (without.warmup_runs, runner.runs) == (0, without.runs)
    assert without.max == pytest.approx(9000.0)


def test_samples_keep_their_order_and_the_figures_are_numpys() -> None:
    seconds = [0.011, 0.013, 0.010, 0.030, 0.012]
    latency = summarize(seconds, measured_at="2026-01-02T03:04:05+00:00", machine="m")
    ms = np.array(seconds) * 1e3
    assert latency.samples == pytest.approx(ms)
    assert (latency.min, latency.max) == (ms.min(), ms.max())
    assert latency.median == pytest.approx(12.0)
    assert latency.p90 == pytest.approx(13 + 0.6 * (30 - 13))  # position 0.9 * 4 = 3.6 of the sorted samples
    assert latency.p95 == pytest.approx(13 + 0.8 * (30 - 13))
    assert latency.p99 == pytest.approx(13 + 0.96 * (30 - 13))
    assert latency.mean == pytest.approx(15.2)
    assert latency.std == pytest.approx(ms.std())
    assert latency.throughput_per_s == pytest.approx(5 / 0.076)
    assert (latency.measured_at, latency.machine) == ("2026-01-02T03:04:05+00:00", "m")


def test_unstable_timing_is_remarked_and_steady_timing_is_not() -> None:
    assert summarize([0.010] * 50 + [0.5]).remarks == ()  # one outlier is no unstable clock
    (remark,) = summarize([0.010, 0.014] * 20).remarks
    assert "spread over 33% of the median" in remark


def test_progress_is_told_of_each_timed_run() -> None:
    seen: list[tuple[int, float]] = []
    timed(then=4.0, progress=lambda runs, seconds: seen.append((runs, seconds)))
    assert seen == [(1, 4.0), (2, 8.0), (3, 12.0)]


def test_a_runner_that_binds_its_buffers_is_timed_without_the_copies() -> None:
    clock = FakeClock()
    runner = BoundRunner(clock, repeat(1.0))
    latency = measure(runner, {}, clock=clock)
    assert (latency.copies_included, runner.runs) == (False, 0)
    assert latency.median == pytest.approx(2.0)
    assert timed(then=0.1)[0].copies_included


def test_when_and_where_are_recorded() -> None:
    latency, _ = timed(then=0.1)
    assert latency.measured_at.endswith("+00:00")
    assert "core" in latency.machine
