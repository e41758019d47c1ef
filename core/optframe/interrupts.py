"""Ctrl-C, SIGTERM and SIGHUP as one exception: what was begun is undone, and the exit status says which it was."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""Signals that ask a process to end, and what is said of one that did."""

TOGETHER_SECONDS = 1.0
"""A signal so soon after another is no second wish: `timeout` sends each to the process and to its group."""


class Interrupts:
    """Raises KeyboardInterrupt at a signal; a later one does so again, and ends what takes too long to clean up."""

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._last = 0.0

    @property
    def status(self) -> int:
        """The exit status after the first one, as shells expect it: 128 and the signal's number."""
        return 128 + self._signal

    @property
    def message(self) -> str:
        """What is said of the first one."""
        return SIGNALS[self._signal]

    @property
    def hung_up(self) -> bool:
        """Whether the first one says that the terminal may be gone: then whatever writes to it fails."""
        return self._first == signal.SIGHUP

    @property
    def _signal(self) -> signal.Signals:
        return self._first or signal.SIGINT  # typer raises for Ctrl-C at a prompt, which no handler hears

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal `number`."""
        now = time.monotonic()
        if self._first is not None and now - self._last < TOGETHER_SECONDS:
            return
        self._first, self._last = self._first or signal.Signals(number), now
        raise KeyboardInterrupt


@contextmanager
def raised() -> Iterator[Interrupts]:
    """Raise KeyboardInterrupt inside the block at each of `SIGNALS`, except those that whoever started us ignores.

    Only the main thread can: elsewhere the signals do what they did before.
    """
    heard, before = Interrupts(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, heard.hear)
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
