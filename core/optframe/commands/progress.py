"""Progress on stderr: a live line in a terminal, plain lines elsewhere; fed by the same hooks that plugins observe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optframe.hookspec import hookimpl
from optframe.session import Session

if TYPE_CHECKING:
    from rich.status import Status

    from optframe.gate import PassRecord


class Progress:
    """A plugin of its own that prints which stage runs, and each one's time when it ends."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._console = session.progress_console
        self._status: Status | None = None
        self._passes = 0

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Listen to the session's plugin host, and leave a clean line at the end, whatever happens."""
        self._session.registry.host.register(self, "progress")
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None

    @hookimpl
    def optframe_stage_started(self, stage: str, options: Mapping[str, Any]) -> None:
        """Show the stage as under way."""
        self._passes = 0
        if self._console.is_terminal:
            self._status = self._console.status(f"{stage} …")
            self._status.start()

    @hookimpl
    def optframe_pass_finished(self, record: PassRecord) -> None:
        """Count passes, since a gate that compares after each takes its time."""
        self._passes += 1
        if self._status:
            self._status.update(f"optimize … {self._passes} passes, now {record.nodes_after} nodes ({record.name})")

    @hookimpl
    def optframe_stage_finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Print the stage with its time."""
        self._stop()
        note = "  (from the cache)" if cached else ""
        self._console.print(f"{stage:<10} {seconds:7.1f} s{note}", highlight=False)
