"""Runs one stage of work, or serves it from the cache under a hash of everything that shapes its artefacts."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from optframe.store import Store, disk_errors, hash_file, hash_json, hash_tree

CORE_ROOT = Path(__file__).resolve().parents[1]


class StageObserver(Protocol):
    """Who is told of stages; the plugin host passes it on to every plugin."""

    def stage_started(self, stage: str, options: Mapping[str, Any]) -> None: ...

    def stage_finished(self, stage: str, seconds: float, cached: bool) -> None: ...


@dataclass(frozen=True)
class Worker:
    """A package or module that does a stage's work, and its distribution, "" for one registered in process."""

    root: Path
    distribution: str


CORE = Worker(CORE_ROOT, "optframe")


@dataclass(frozen=True)
class StageResult:
    """What a stage left: the folder of its artefacts, whether they came from the cache, and when they were made."""

    stage: str
    label: str
    folder: Path
    seconds: float
    cached: bool
    created: float


@dataclass
class StageRunner:
    """Runs stages in `work`, serving from `store` (None: no cache) what has been made before from the same things."""

    work: Path
    store: Store | None
    observer: StageObserver
    results: list[StageResult] = field(default_factory=list)

    def run(
        self,
        stage: str,
        action: Callable[[Path], None],
        *,
        label: str = "",
        inputs: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
        workers: Iterable[Worker] = (),
    ) -> StageResult:
        """Run `action(folder)`, which writes the artefacts of `stage`, unless the cache holds them; return the result.

        The key is made of the contents of `inputs`, the `options`, and code and library versions of `workers` and core.
        """
        start = time.perf_counter()
        self.observer.stage_started(stage, {**(options or {}), "label": label})
        description = _describe(stage, inputs or {}, options or {}, [CORE, *workers])
        key = hash_json(description)
        folder = self.work / f"{len(self.results):02d}-{stage}"
        folder.mkdir()
        entry = self.store.get(key, folder) if self.store else None
        if entry is None:
            _empty(folder)
            with disk_errors(self.work), _removed_on_failure(folder):
                action(folder)
            if self.store:
                self.store.put(key, stage, folder, description)
        result = StageResult(
            stage,
            label,
            folder,
            time.perf_counter() - start,
            cached=entry is not None,
            created=entry.created if entry else time.time(),
        )
        self.results.append(result)
        self.observer.stage_finished(stage, result.seconds, result.cached)
        return result


def _empty(folder: Path) -> None:
    """Remove what a damaged cache entry may have left half-linked."""
    shutil.rmtree(folder)
    folder.mkdir()


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Leave no half-made folder behind: a caller may go on after a stage that failed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _describe(
    stage: str, inputs: Mapping[str, Path], options: Mapping[str, Any], workers: Iterable[Worker]
) -> dict[str, Any]:
    distinct = {worker.root: worker for worker in workers}
    return {
        "stage": stage,
        "inputs": {name: hash_path(path) for name, path in inputs.items()},
        "options": dict(options),
        "code": {str(worker.distribution): tree_hash(root) for root, worker in distinct.items()},
        "versions": {
            name: version for worker in distinct.values() for name, version in library_versions(worker.distribution)
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def hash_path(path: Path) -> str:
    """Return a hash of a file's content, or of all files below a folder."""
    return hash_tree(path) if path.is_dir() else hash_file(path)


@functools.cache
def tree_hash(root: Path) -> str:
    """Return the hash of a package's or module's files, computed once: running code does not change under itself."""
    return hash_path(root)


@functools.cache
def library_versions(distribution: str) -> tuple[tuple[str, str], ...]:
    """Return (name, version) of `distribution` and of those of its direct requirements that are installed."""
    if not distribution:  # a plugin registered in process
        return ()
    found: dict[str, str] = {}
    try:
        found[distribution] = metadata.version(distribution)
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return ()
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return tuple(sorted(found.items()))
