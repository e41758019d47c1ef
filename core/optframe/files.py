"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from optframe.errors import EnvironmentLacks, InputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into one line about `path`.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind, advice = (EnvironmentLacks, "free space") if full else (InputError, "choose a folder that can be written")
        if error.errno == errno.EISDIR:
            advice = "name a file in it"
        raise kind(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, folders included, under a temporary name that is renamed at the end.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_bytes(path: Path, data: bytes | memoryview) -> Path:
    """Write `data` to `path`, folders included, under a temporary name that is renamed at the end.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """Make the folder `path`, and prove that a file can be written into it, before hours of work go there.

    Where the work inside fails, no folder that was made for it stays empty.

    Raises:
        InputError: it cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    whole = Path(os.path.abspath(path))  # without "..", which would lead elsewhere once a folder is there
    new = [folder for folder in (whole, *whole.parents) if not folder.exists()]
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it, which stays
            for folder in new:
                folder.rmdir()
        raise


def copy(source: Path, target: Path) -> Path:
    """Copy a file or a folder to `target`, in whose place nothing old remains; a file takes the place of no folder.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    with writing(target), replacing(target, folders=source.is_dir()) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary)
        else:
            shutil.copyfile(source, temporary)
    return target


@contextlib.contextmanager
def replacing(path: Path, *, folders: bool = False) -> Iterator[Path]:
    """Yield a name in a temporary folder beside `path`; what is there at the end takes the place of `path`.

    A folder at `path` is an error without `folders`: a file never takes its place, and what is in it would be lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}.") as folder:
        temporary = Path(folder) / "new"
        yield temporary
        if folders and path.is_dir() and not path.is_symlink():
            os.replace(path, Path(folder) / "old")  # a folder cannot be renamed onto one that is not empty
        os.replace(temporary, path)
