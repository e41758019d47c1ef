"""What runners of engines have in common: what they run is theirs until they are closed."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, Self, TypeVar

Loaded = TypeVar("Loaded")


class ClosableRunner(Generic[Loaded]):
    """Holds what runs, `loaded`, as long as it is open: until the end of a `with` block."""

    def __init__(self, loaded: Loaded) -> None:
        self._open: Loaded | None = loaded

    @property
    def loaded(self) -> Loaded:
        """What runs.

        Raises:
            RuntimeError: the runner is closed.
        """
        if self._open is None:
            raise RuntimeError("this runner is closed")
        return self._open

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = None
