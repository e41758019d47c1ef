"""Progress on stderr: a live line in a terminal, plain lines elsewhere; fed by the same hooks that plugins observe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optframe import progress
from optframe.hookspec import hookimpl
from optframe.session import Session

if TYPE_CHECKING:
    from rich.status import Status

    from optframe.gate import PassRecord


BAR = 20
"""Characters of a progress bar, which shares the line with what is being done."""


class Progress:
    """A plugin of its own that prints which stage runs, and each one's time when it ends."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._console = session.progress_console
        self._status: Status | None = None
        self._stage = ""
        self._begun = self._verified = 0

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Listen to the session's plugin host, and leave a clean line at the end, whatever happens."""
        self._session.registry.host.register(self, "progress")
        with self._listening():
            yield

    @contextmanager
    def building(self, backend: str) -> Iterator[None]:
        """Show the progress of one build outside a run."""
        self._stage = f"build {backend}"
        self._show(f"{self._stage} …")
        with self._listening():
            yield

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            with progress.listening(self._told):
                yield
        finally:
            self._stop()

    def _told(self, what: str, fraction: float) -> None:
        """Show how far the stage is, as a bar."""
        filled = round(BAR * fraction)
        self._show(f"{self._stage} {'━' * filled}{'╌' * (BAR - filled)} {fraction:4.0%} {what}")

    def _show(self, text: str) -> None:
        """Put `text` in the live line, if there is a terminal for one."""
        if self._status:
            self._status.update(text)
        elif self._console.is_terminal:
            self._status = self._console.status(text)
            self._status.start()

    def _stop(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None

    @hookimpl
    def optframe_stage_started(self, stage: str, options: Mapping[str, Any]) -> None:
        """Show the stage as under way; its label tells precisions and backends apart."""
        self._begun = self._verified = 0
        self._stage = f"{stage} {options.get('label', '')}".strip()
        self._show(f"{self._stage} …")

    @hookimpl
    def optframe_pass_started(self, name: str) -> None:
        """Show which pass runs; passes run ahead of their verification."""
        self._begun += 1
        self._show(f"optimize … pass {self._begun}: {name}")

    @hookimpl
    def optframe_pass_finished(self, record: PassRecord) -> None:
        """Count what is verified, since a gate that compares after each pass takes its time."""
        self._verified += 1
        self._show(f"optimize … {self._verified} passes done, {record.nodes_after} nodes after {record.name}")

    def count(self, what: str, done: int) -> None:
        """Show how many of `what`, samples or variants of the model, have been run."""
        self._show(f"{self._stage} … {done} {what}")

    @hookimpl
    def optframe_stage_finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Print the stage with its time."""
        self._stop()
        note = "  (from the cache)" if cached else ""
        self._console.print(f"{self._stage:<26} {seconds:7.1f} s{note}", highlight=False)
