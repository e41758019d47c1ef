"""Notices that a process waits for what will never come: neither a word from it nor any work by it or its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

STALL_SECONDS = 300.0
"""How long a build may do nothing at all. TensorRT keeps a thread busy, also while it waits for the GPU."""

GRACE_SECONDS = 10.0
"""How long a process may take to write where it was, before it is killed."""

CHECKS = 20
"""How often it is looked at in that time."""


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill `process` and, where it leads a group of its own, what it started: children may hold its pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a group keeps its number as long as anyone is in it
    process.kill()


class StallWatch:
    """Ends `process` with SIGABRT, then it and its group with SIGKILL, once it has done nothing for so many seconds.

    `heard` says that it sent something. Its work is the processor time of all its threads, and of the processes that
    it started and theirs, such as a compiler's, which only Linux tells; elsewhere nothing is ended.
    """

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.stalled = False
        self._process = process
        self._seconds = seconds
        self._heard = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        """Note that the process is at work."""
        self._heard += 1

    def _watch(self) -> None:
        state, since = self._state(), time.monotonic()
        while not self._end.wait(self._seconds / CHECKS):
            before, state = state, self._state()
            if state != before or state is None:
                since = time.monotonic()
            elif time.monotonic() - since >= self._seconds:
                self.stalled = True
                self._process.send_signal(signal.SIGABRT)
                if not self._end.wait(GRACE_SECONDS):
                    kill_group(self._process)
                return

    def _state(self) -> tuple[int, int] | None:
        """Return what changes while the process works, or None where that is not known."""
        ticks = _ticks_of_family(self._process.pid)
        return None if ticks is None else (self._heard, ticks)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def _ticks_of_family(pid: int) -> int | None:
    """Return the processor time of the process `pid` and all that descend from it, ended ones included, in ticks.

    One that lost its parent counts as long as it is in the session of `pid`. None where Linux's /proc is not.
    """
    known = {int(path.parent.name): stat for path in Path("/proc").glob("[0-9]*/stat") if (stat := _read_stat(path))}
    if pid not in known:
        return None
    family = {pid} | {each for each, stat in known.items() if stat.session == pid}
    while more := {each for each, stat in known.items() if stat.parent in family} - family:
        family |= more
    return sum(known[each].ticks for each in family)


class _Stat(NamedTuple):
    """Of a process: its parent, its session, and the processor time of it and of the children that it waited for."""

    parent: int
    session: int
    ticks: int


def _read_stat(path: Path) -> _Stat | None:
    """Return what the file `stat` of a process says, None where the process has ended meanwhile."""
    try:
        fields = path.read_text().rpartition(")")[2].split()  # the name in parentheses may hold spaces
    except OSError:
        return None
    # proc(5) counts from 1, with pid and name before: 4 parent, 6 session, 14 to 17 user and system time, children's
    return _Stat(int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])))
