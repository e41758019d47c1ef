"""Progress of a build: TensorRT's nested phases as one fraction, and the way to cancel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optframe_trt.flavours import Flavour

Tell = Callable[[str, float], None]
"""Told of the innermost phase's name and how much of the whole build is done, 0 to 1."""


@dataclass
class _Phase:
    steps: int
    parent: str | None
    done: int = 0


class Phases:
    """The phases under way. A phase takes the share of its parent that one step of the parent has."""

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._reached = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Note that phase `name` begins."""
        self._open[name] = _Phase(max(steps, 1), parent)

    def step(self, name: str, step: int) -> None:
        """Note that step number `step` of the phase is done."""
        if name in self._open:
            self._open[name].done = step + 1

    def finish(self, name: str) -> None:
        """Note that the phase is done."""
        self._open.pop(name, None)

    def fraction(self, name: str) -> float:
        """Return how much of the whole build is done, as phase `name` sees it; it never goes back."""
        share = 0.0
        phase = self._open.get(name)
        while phase is not None:
            share = min(phase.done + share, phase.steps) / phase.steps
            phase = self._open.get(phase.parent) if phase.parent else None
        self._reached = max(self._reached, share)
        return self._reached


def monitor(flavour: Flavour, tell: Tell, cancelled: Callable[[], bool]) -> Any:
    """Return an `IProgressMonitor` that tells of progress, and ends the build once `cancelled` returns True.

    An exception cannot pass through TensorRT, so nothing here raises one but a broken `tell`.
    """
    base: Any = flavour.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the base is known only once a flavour is loaded
        def __init__(self) -> None:
            base.__init__(self)
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)
            tell(phase_name, self.phases.fraction(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            tell(phase_name, self.phases.fraction(phase_name))
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()
