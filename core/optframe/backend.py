"""The protocols of a backend: it builds an engine from an ONNX file, opens it, and the runner runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from optframe.types import Feeds, OpSpec, Outputs, Precision


@dataclass(frozen=True)
class BuildOptions:
    """What a backend is asked to build.

    `precision` is what the graph already is: a backend never converts, and refuses what it cannot honour. `device` is
    "cpu", "cuda", or "auto": the best one present. `options` are the backend's own, `ops` the registered plugin ops by
    identifier, for backends that run their kernels.
    """

    precision: Precision = "fp32"
    device: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)
    ops: Mapping[str, OpSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine on disk: what `Backend.build` made and `Backend.open` runs; `warnings` are what its user must know."""

    path: Path
    backend: str
    precision: Precision
    device: str
    warnings: tuple[str, ...] = ()


class Runner(Protocol):
    """A loaded engine, ready to run; a context manager, since it may hold device memory or a process."""

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference and return all outputs by name, as NumPy arrays in host memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class CheckingBackend(Protocol):
    """What a backend may offer besides: a look at device and options before any work is done for it."""

    def check(self, options: BuildOptions) -> None:
        """Do nothing if `options` can be honoured here, as far as that shows without a model.

        Raises:
            InputError: an option or the device is unknown.
            EnvironmentLacks: a library or the device is missing.
        """
        ...


@runtime_checkable
class BuildsElsewhere(Protocol):
    """A backend that can also build where its engines cannot run."""

    def cannot_run(self) -> str | None:
        """Return None if engines can run here, else in a few words why not ("no GPU")."""
        ...


@runtime_checkable
class BuildsVariants(Protocol):
    """A backend that offers several builds of one model, which a report shows beside each other."""

    def variants(self, model: Path, options: BuildOptions) -> Mapping[str, BuildOptions]:
        """Return label -> options for each build of the ONNX file `model`; the label of the usual one is empty."""
        ...


@runtime_checkable
class NamesOptions(Protocol):
    """A backend that tells which options it takes; where several backends run, each is given its own."""

    option_names: Collection[str]


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
