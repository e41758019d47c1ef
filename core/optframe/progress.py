"""Progress inside a stage: whoever does long work tells, whoever shows it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, float], None]
"""Told what is being done, and how much of it is done, 0 to 1."""

_listener: ContextVar[Listener | None] = ContextVar("optframe.progress", default=None)


def tell(what: str, fraction: float) -> None:
    """Tell the listener, if there is one, that `fraction` (0 to 1) of the work is done, and `what` it is doing now."""
    listener = _listener.get()
    if listener is not None:
        listener(what, fraction)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear what this thread, or task, tells inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
