"""The content-addressed cache of stage artefacts: a folder an entry, published by one rename, checked when read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optframe.errors import EnvironmentLacks, InputError

CACHE_VARIABLE = "OPTFRAME_CACHE"
LIMIT_VARIABLE = "OPTFRAME_CACHE_LIMIT_GB"
DEFAULT_LIMIT_GB = 10.0
STALE_WORK_SECONDS = 24 * 3600
"""A work folder untouched for a day belongs to a run that died: no stage takes that long."""

MANIFEST = "entry.json"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_tree(folder: Path) -> str:
    """Return a SHA-256 over names and contents of all files below `folder`, byte-code left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value; keys are sorted, and anything else counts by its `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def default_root() -> Path:
    """Return the cache folder: `$OPTFRAME_CACHE`, or the platform's convention for caches."""
    from platformdirs import user_cache_path

    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("optframe", appauthor=False))


def default_limit_bytes() -> int:
    """Return the size limit: `$OPTFRAME_CACHE_LIMIT_GB`, or 10 GB.

    Raises:
        InputError: the variable holds no positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        raise InputError(f"{LIMIT_VARIABLE}={text} is no positive number of gigabytes")
    return int(limit * 1e9)


@dataclass(frozen=True)
class Entry:
    """An entry of the cache: its key, the stage that made it, when (seconds since 1970), and its size in bytes."""

    key: str
    stage: str
    created: float
    used: float
    size: int


class Store:
    """A cache folder that several runs may share: nothing in it is ever seen half-written.

    Raises:
        EnvironmentLacks: the folder cannot be made or written.
    """

    def __init__(self, root: Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = root or default_root()
        self.limit_bytes = limit_bytes if limit_bytes is not None else default_limit_bytes()
        self._entries = self.root / "entries"
        self._work = self.root / "work"
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentLacks(
                f"the cache folder {self.root} cannot be written ({error.strerror}); "
                f"set {CACHE_VARIABLE} to a folder that can"
            ) from error

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[Path]:
        """Yield an empty folder on the cache's disk, removed afterwards."""
        with disk_errors(self.root):
            holder = tempfile.TemporaryDirectory(dir=self._work, ignore_cleanup_errors=True)
        with holder as folder:
            yield Path(folder)

    def get(self, key: str, into: Path) -> Entry | None:
        """Link the files of entry `key` into the folder `into` and return the entry; None where there is no such entry.

        Linked rather than lent, so that another run which clears the cache meanwhile takes nothing away. A damaged
        entry is removed and counts as absent.
        """
        folder = self._folder(key)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            _link_files(folder, into, manifest["files"])
            os.utime(folder / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return self._entry(folder)

    def put(self, key: str, stage: str, source: Path, description: Mapping[str, Any]) -> None:
        """Publish the files of the folder `source` as entry `key`; whoever comes second finds it there and stops."""
        with disk_errors(self.root), tempfile.TemporaryDirectory(dir=self._work, ignore_cleanup_errors=True) as outer:
            fresh = Path(outer) / "entry"
            shutil.copytree(source, fresh, copy_function=_link_or_copy)
            files = {
                path.relative_to(fresh).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)}
                for path in sorted(fresh.rglob("*"))
                if path.is_file()
            }
            manifest = {"stage": stage, "created": time.time(), "files": files, "description": description}
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str))
            target = self._folder(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(fresh, target)
            except OSError as error:  # a folder that is not empty: another run published the same entry first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        self.prune()

    def entries(self) -> list[Entry]:
        """Return all entries, the least recently used first."""
        found = [self._entry(path.parent) for path in self._entries.glob(f"*/*/{MANIFEST}")]
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used)

    def prune(self) -> None:
        """Remove the least recently used entries until the size limit holds, and what died runs left behind."""
        self._remove_work(older_than=STALE_WORK_SECONDS)
        entries = self.entries()
        excess = sum(entry.size for entry in entries) - self.limit_bytes
        for entry in entries[:-1]:  # the newest stays even if it alone is over the limit
            if excess <= 0:
                break
            shutil.rmtree(self._folder(entry.key), ignore_errors=True)
            excess -= entry.size

    def clear(self) -> tuple[int, int]:
        """Remove every entry; return how many there were and their bytes. Runs under way keep what they hold."""
        entries = self.entries()
        for entry in entries:
            shutil.rmtree(self._folder(entry.key), ignore_errors=True)
        self._remove_work(older_than=STALE_WORK_SECONDS)
        return len(entries), sum(entry.size for entry in entries)

    def _folder(self, key: str) -> Path:
        return self._entries / key[:2] / key

    def _entry(self, folder: Path) -> Entry | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            used = (folder / MANIFEST).stat().st_mtime
            size = sum(int(file["size"]) for file in manifest["files"].values())
            return Entry(folder.name, manifest["stage"], manifest["created"], used, size)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remove_work(self, older_than: float) -> None:
        for path in self._work.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_than:
                    shutil.rmtree(path, ignore_errors=True)


def _link_files(folder: Path, into: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Link `files` of `folder` into `into`; raise ValueError for one that is not as the manifest says."""
    for name, facts in files.items():
        source, target = folder / name, into / name
        if source.stat().st_size != facts["size"] or hash_file(source) != facts["sha256"]:
            raise ValueError(f"{source} is damaged")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _link_or_copy(source, target)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link where the file system can; stage artefacts are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `root` into one line that says what to do; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise EnvironmentLacks(
            f"cannot write to {root}: {error.strerror}; free space (`optframe cache clear`) "
            f"or set {CACHE_VARIABLE} to a folder on another disk"
        ) from error
