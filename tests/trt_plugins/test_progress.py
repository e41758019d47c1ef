"""Nested phases as one fraction, which never goes back."""

from types import SimpleNamespace

import pytest

from optframe_trt.flavours import KINDS, Flavour
from optframe_trt.progress import Phases, monitor


def test_a_phase_takes_one_step_of_its_parent() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    phases.step("build", 0)
    assert phases.fraction("build") == pytest.approx(1 / 4)
    phases.start("optimize", "build", 10)
    phases.step("optimize", 4)
    assert phases.fraction("optimize") == pytest.approx((1 + 5 / 10) / 4)
    phases.finish("optimize")
    phases.step("build", 1)
    assert phases.fraction("build") == pytest.approx(2 / 4)


def test_the_fraction_neither_goes_back_nor_beyond_one() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    phases.step("build", 1)
    phases.start("again", "build", 0)
    phases.step("again", 7)
    assert phases.fraction("again") == 1.0
    phases.start("late", "a phase that nobody began", 100)
    assert phases.fraction("late") == 1.0


def test_the_monitor_tells_and_cancels() -> None:
    base = type("IProgressMonitor", (), {})
    flavour = Flavour(
        "tensorrt", "10.13", SimpleNamespace(IProgressMonitor=base), KINDS["tensorrt"].abilities((10, 13))
    )
    told: list[tuple[str, float]] = []
    stop = False
    made = monitor(flavour, lambda name, fraction: told.append((name, fraction)), lambda: stop)
    made.phase_start("build", None, 2)
    assert made.step_complete("build", 0) is True
    stop = True
    assert made.step_complete("build", 1) is False
    made.phase_finish("build")
    assert told == [("build", 0.0), ("build", 0.5), ("build", 1.0)]
