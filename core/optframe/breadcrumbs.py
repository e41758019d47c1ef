"""What runs of a plugin author's code, told as it begins, so that a crash of the process can be laid to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str], None]
"""Told what runs and where, "node 'n' (acme::Norm): shape rule acme.rules:shape", or "" when it has ended."""

_listener: Listener | None = None
_places: list[str] = []


def listen(listener: Listener | None) -> None:
    """Let `listener` hear what begins and ends in this process, on whatever thread."""
    global _listener
    _listener = listener


@contextmanager
def at(place: str) -> Iterator[None]:
    """Note where in a model the code is called that runs inside the block; nobody is told of that alone."""
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()


@contextmanager
def running(code: str) -> Iterator[None]:
    """Tell the listener, if there is one, that an author's `code` runs inside the block, and where."""
    if _listener is None:
        yield
        return
    _listener(": ".join((*_places, code)))
    try:
        yield
    finally:
        _listener("")
