"""Asynchronous copies to shared memory: the bytes arrive when their group is waited for, and are poison until then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.driver import POISON
from optframe_trt.emulator.values import repeated

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine
    from optframe_trt.emulator.ptx import Instruction

Array = np.ndarray[Any, Any]


@dataclass
class _Copy:
    """One instruction's copies: threads, each one's group, targets and words."""

    by: Instruction
    threads: Array
    groups: Array
    targets: Array
    words: Array


class PendingCopies:
    """The copies that the threads of a machine started and did not wait for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._copies: list[_Copy] = []
        self._open: Array | None = None

    def _groups(self) -> Array:
        """Return the number of each thread's open group."""
        if self._open is None:
            self._open = np.zeros(self._machine.threads, np.int64)
        return self._open

    def start(self, by: Instruction, targets: Array, words: Array) -> None:
        """Start copies of the selected threads: `words` (threads, count) to the shared addresses `targets`."""
        machine = self._machine
        machine.shared.store(machine, by, targets, np.full_like(words, repeated(POISON, words.itemsize)))
        threads = machine.active_threads
        self._copies.append(_Copy(by, threads, self._groups()[threads], targets, words))

    def commit(self) -> None:
        """Close the open group of the selected threads."""
        self._groups()[self._machine.active_threads] += 1

    def wait(self, still_open: int | None) -> None:
        """Let copies of the selected threads arrive, but for the last groups; None: those not committed too."""
        machine, groups = self._machine, self._groups()
        kept = []
        for copy in self._copies:
            arrived = machine.selected[copy.threads]
            if still_open is not None:
                arrived &= copy.groups < groups[copy.threads] - still_open
            if arrived.any():
                self._arrive(copy, arrived)
            left = ~arrived
            if left.any():
                kept.append(_Copy(copy.by, copy.threads[left], copy.groups[left], copy.targets[left], copy.words[left]))
        self._copies = kept

    def _arrive(self, copy: _Copy, arrived: Array) -> None:
        machine = self._machine
        chosen = np.zeros(machine.threads, bool)
        chosen[copy.threads[arrived]] = True
        with machine.narrowed(chosen):
            machine.shared.store(machine, copy.by, copy.targets[arrived], copy.words[arrived])
