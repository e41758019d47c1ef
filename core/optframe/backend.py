"""The protocols of a backend: it builds an engine from an ONNX file, opens it, and the runner runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from optframe.types import Feeds, Outputs, Precision


@dataclass(frozen=True)
class BuildOptions:
    """What a backend is asked to build.

    `precision` is what the graph already is: a backend never converts, and refuses what it cannot honour. `device` is
    "cpu", "cuda", or "auto": the best one present. `options` are the backend's own.
    """

    precision: Precision = "fp32"
    device: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine on disk: what `Backend.build` made and `Backend.open` runs."""

    path: Path
    backend: str
    precision: Precision
    device: str


class Runner(Protocol):
    """A loaded engine, ready to run; a context manager, since it may hold device memory or a process."""

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference and return all outputs by name, as NumPy arrays in host memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """Something that turns an ONNX file into an engine and runs it; constructed without arguments, cheaply."""

    name: str

    def missing(self) -> str | None:
        """Return None if the backend works here, else one line: what is missing, and the command that mends it."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the libraries that shape the engine, for the cache key and the report."""
        ...

    def build(self, model: Path, folder: Path, options: BuildOptions) -> Engine:
        """Build an engine from the ONNX file `model` into `folder`.

        Raises:
            InputError: the model, precision or an option cannot be honoured.
            EnvironmentLacks: a library or device is missing.
        """
        ...

    def open(self, engine: Engine) -> Runner:
        """Load `engine` and return its runner."""
        ...
