"""A plugin's model as a run sees it: what the adapter answers is checked, so that a wrong answer names the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from optframe.errors import PluginError, a_type
from optframe.types import Feeds, Illustration, ModelAdapter, Outputs, Part


class CheckedModel:
    """Follows `ModelAdapter`, and hands every call on to `adapter`; `who` is the model in words, with its plugin.

    An answer of the wrong kind raises PluginError. What the adapter raises passes through as it is.
    """

    Options: ClassVar[type[Any]] = object

    def __init__(self, adapter: ModelAdapter, who: str) -> None:
        self._adapter = adapter
        self._who = who
        self.pipeline = self._check("pipeline", getattr(adapter, "pipeline", None), str, "text")
        self.source = self._check("source", getattr(adapter, "source", None), str, "text")
        self.pipelines = self._check("pipelines", getattr(adapter, "pipelines", {}), Mapping, "a mapping")

    def dependencies(self, of: Part) -> Mapping[str, object]:
        """Return the adapter's dependencies, which are files or plain values: others have no text to be told apart."""
        call = f"dependencies({of!r})"
        found: Mapping[str, object] = self._check(call, self._adapter.dependencies(of), Mapping, "a mapping")
        for name, value in found.items():
            if not isinstance(value, Path) and not _is_plain(value):
                raise self._wrong(call, f"{a_type(value)} as '{name}'", "a Path or a plain value")
        return found

    def notes(self, of: Part) -> Sequence[str]:
        """Return the adapter's notes."""
        call = f"notes({of!r})"
        notes = self._sequence(call, self._adapter.notes(of))
        return [self._check(call, note, str, "a sequence of text") for note in notes]

    def export(self, path: Path) -> None:
        """Let the adapter write the model."""
        self._adapter.export(path)
        if not path.is_file():
            raise PluginError(f"{self._who}: export() wrote no file {path.name}")

    def feeds(self) -> Sequence[Feeds]:
        """Return the adapter's inputs, of which there is at least one."""
        feeds = self._sequence("feeds()", self._adapter.feeds())
        if not feeds:
            raise PluginError(f"{self._who}: feeds() returned no input")
        return [self._arrays("feeds()", feed) for feed in feeds]

    def random_feeds(self, seed: int) -> Feeds:
        """Return the adapter's random input."""
        return self._arrays("random_feeds()", self._adapter.random_feeds(seed))

    def calibration_feeds(self) -> Iterator[Feeds]:
        """Yield the adapter's inputs for calibration."""
        found = self._adapter.calibration_feeds()
        for feed in self._check("calibration_feeds()", found, Iterable, "an iterable of inputs"):
            yield self._arrays("calibration_feeds()", feed)

    def reference(self, feeds: Feeds) -> Outputs:
        """Return the outputs of the adapter's source."""
        return self._arrays("reference()", self._adapter.reference(feeds))

    def illustrate(self, outputs: Mapping[str, Outputs]) -> Sequence[Illustration]:
        """Return the adapter's pictures."""
        pictures = self._sequence("illustrate()", self._adapter.illustrate(outputs))
        return [self._check("illustrate()", picture, Illustration, "Illustrations") for picture in pictures]

    def _arrays(self, call: str, value: Any) -> Mapping[str, Any]:
        arrays: Mapping[str, Any] = self._check(call, value, Mapping, "a mapping of names to arrays")
        for name, array in arrays.items():
            if not isinstance(name, str) or not isinstance(array, np.ndarray | np.generic):
                raise self._wrong(call, f"{a_type(array)} as {name!r}", "a NumPy array with a name")
        return arrays

    def _sequence(self, call: str, value: Any) -> Sequence[Any]:
        if isinstance(value, str | bytes):
            raise self._wrong(call, a_type(value), "a sequence")
        checked: Sequence[Any] = self._check(call, value, Sequence, "a sequence")
        return checked

    def _check(self, call: str, value: Any, kind: Any, wanted: str) -> Any:
        if not isinstance(value, kind):
            raise self._wrong(call, a_type(value), wanted)
        return value

    def _wrong(self, call: str, found: str, wanted: str) -> PluginError:
        return PluginError(f"{self._who}: {call} gives {found}, not {wanted}")


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
