"""Writing files: whole, readable, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from optframe import files
from optframe.errors import EnvironmentLacks, InputError


def test_folders_are_made_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "a" / "b" / "report.json", "größe → 1\n")
    assert path.read_text(encoding="utf-8") == "größe → 1\n"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a folder that can be written"):
        files.write_text(tmp_path / "file" / "report.json", "x")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "report.json", "old")

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentLacks, match="No space left on device; free space"):
        files.write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "inside").mkdir(parents=True)
    source = files.write_text(tmp_path / "source", "x")
    for write in (
        lambda: files.write_text(photos, "x"),
        lambda: files.write_bytes(photos, b"x"),
        lambda: files.copy(source, photos),
    ):
        with pytest.raises(InputError, match=r"photos: Is a directory; name a file in it"):
            write()
    assert (photos / "inside").is_dir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["photos", "source"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a", "new")
    files.write_text(tmp_path / "old" / "b", "old")
    files.copy(tmp_path / "new", tmp_path / "old")
    assert [entry.name for entry in (tmp_path / "old").iterdir()] == ["a"]


def test_work_that_fails_takes_only_its_own_folders_away(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for path in (tmp_path / "new" / ".." / "kept", tmp_path / "kept", tmp_path / "a" / "b"):
        with pytest.raises(RuntimeError), files.folder_for(path):
            raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] in (["kept"], ["kept", "new"], ["new", "kept"])
    half_done = tmp_path / "a" / "b" / "half.txt"
    with pytest.raises(FileNotFoundError), files.folder_for(half_done.parent):
        half_done.with_name(half_done.write_text("done so far") * "x").read_text()
    assert half_done.exists()
