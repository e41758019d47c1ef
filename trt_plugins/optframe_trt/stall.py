"""Notices that a process waits for what will never come: neither a word from it nor any work by its threads."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

STALL_SECONDS = 300.0
"""How long a build may do nothing at all. TensorRT keeps a thread busy, also while it waits for the GPU."""

GRACE_SECONDS = 10.0
"""How long a process may take to write where it was, before it is killed."""

CHECKS = 20
"""How often it is looked at in that time."""


class StallWatch:
    """Ends `process` with SIGABRT, then SIGKILL, once it has done nothing for so many seconds.

    `heard` says that it sent something. Its work is the processor time of all its threads, which only Linux tells;
    elsewhere nothing is ended.
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
                    self._process.kill()
                return

    def _state(self) -> tuple[int, int] | None:
        """Return what changes while the process works, or None where that is not known."""
        try:
            # proc(5): fields 14 and 15, user and system time in ticks; the name before them may hold spaces.
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return self._heard, int(fields[11]) + int(fields[12])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
