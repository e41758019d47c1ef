"""The cache: what goes in comes out, damage and racing writers are survived, the size limit holds."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from optframe import store as store_module
from optframe.errors import EnvironmentLacks, InputError
from optframe.store import MANIFEST, Store, default_limit_bytes, default_root, hash_tree

KEY = "ab" + "0" * 62


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_an_entry_comes_back_as_it_went_in(tmp_path: Path) -> None:
    cache = Store(tmp_path / "cache")
    source = folder_with(tmp_path / "source", model="weights", log="line")
    (source / "deep").mkdir()
    (source / "deep" / "file").write_text("below")
    cache.put(KEY, "export", source, {"opset": 17})
    into = tmp_path / "into"
    into.mkdir()
    entry = cache.get(KEY, into)
    assert entry is not None
    assert (entry.stage, entry.size) == ("export", len("weights") + len("line") + len("below"))
    assert {p.relative_to(into).as_posix(): p.read_text() for p in into.rglob("*") if p.is_file()} == {
        "model": "weights",
        "log": "line",
        "deep/file": "below",
    }


def test_an_unknown_key_is_a_miss(tmp_path: Path) -> None:
    assert Store(tmp_path).get(KEY, tmp_path) is None


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone", "manifest"])
def test_a_damaged_entry_is_a_miss(tmp_path: Path, damage: str) -> None:
    cache = Store(tmp_path / "cache")
    cache.put(KEY, "export", folder_with(tmp_path / "source", model="weights"), {})
    stored = cache.root / "entries" / "ab" / KEY
    target = stored / (MANIFEST if damage == "manifest" else "model")
    if damage == "gone":
        target.unlink()
    else:
        content = target.read_text()
        target.unlink()
        target.write_text({"truncated": content[:3], "changed": "weighty", "manifest": content[:-5]}[damage])
    into = tmp_path / "into"
    into.mkdir()
    assert cache.get(KEY, into) is None


def test_a_reader_keeps_its_files_when_the_cache_is_cleared(tmp_path: Path) -> None:
    cache = Store(tmp_path / "cache")
    cache.put(KEY, "export", folder_with(tmp_path / "source", model="weights"), {})
    with cache.work_folder() as work:
        assert cache.get(KEY, work)
        assert cache.clear() == (1, len("weights"))
        assert (work / "model").read_text() == "weights"
    assert cache.entries() == []


def test_the_least_recently_used_entries_go_when_the_limit_is_passed(tmp_path: Path) -> None:
    cache = Store(tmp_path / "cache", limit_bytes=25)
    keys = [f"{i:02d}" + "0" * 62 for i in range(3)]
    for i, key in enumerate(keys):
        cache.put(key, "export", folder_with(tmp_path / f"source{i}", model="x" * 10), {})
        used = time.time() - 100 + i
        os.utime(cache.root / "entries" / key[:2] / key / MANIFEST, (used, used))
        if i == 1:  # the first is used again, so the second has to go
            into = tmp_path / "into"
            into.mkdir()
            assert cache.get(keys[0], into)
    assert {entry.key for entry in cache.entries()} == {keys[0], keys[2]}


def test_work_that_a_dead_run_left_is_removed_after_a_day(tmp_path: Path) -> None:
    cache = Store(tmp_path / "cache")
    old, fresh = (folder_with(cache.root / "work" / name, part="x") for name in ("old", "fresh"))
    os.utime(old, (time.time() - 2 * store_module.STALE_WORK_SECONDS,) * 2)
    cache.prune()
    assert not old.exists()
    assert fresh.exists()


def _publish(root: str, source: str, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    for i in range(20):
        Store(Path(root)).put(f"{i:02d}" + "0" * 62, "export", Path(source), {})


def test_two_writers_at_once_leave_whole_entries(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "source", model="weights" * 1000)
    context = multiprocessing.get_context("spawn")
    start = time.time() + 0.5
    writers = [context.Process(target=_publish, args=(str(tmp_path / "cache"), str(source), start)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = Store(tmp_path / "cache")
    assert len(cache.entries()) == 20
    for entry in cache.entries():
        into = tmp_path / "into" / entry.key
        into.mkdir(parents=True)
        assert cache.get(entry.key, into)
    assert list((cache.root / "work").iterdir()) == []


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Store(tmp_path / "cache")

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(EnvironmentLacks, match=r"No space left on device.*optframe cache clear"):
        cache.put(KEY, "export", folder_with(tmp_path / "source", model="x"), {})
    assert cache.entries() == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentLacks, match="OPTFRAME_CACHE"):
        Store(tmp_path / "file" / "cache")


def test_place_and_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path))
    monkeypatch.setenv("OPTFRAME_CACHE_LIMIT_GB", "0.5")
    assert default_root() == tmp_path
    assert default_limit_bytes() == 500_000_000
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("OPTFRAME_CACHE_LIMIT_GB", wrong)
        with pytest.raises(InputError, match="no positive number"):
            default_limit_bytes()


def test_a_tree_hash_sees_names_and_contents_but_no_byte_code(tmp_path: Path) -> None:
    tree = folder_with(tmp_path / "tree", **{"a.py": "x = 1", "kernel.cu": "__global__"})
    before = hash_tree(tree)
    folder_with(tree / "__pycache__", **{"a.pyc": "binary"})
    assert hash_tree(tree) == before
    (tree / "kernel.cu").write_text("__global__ void")
    changed = hash_tree(tree)
    assert changed != before
    (tree / "kernel.cu").rename(tree / "other.cu")
    assert hash_tree(tree) not in (before, changed)


def test_the_manifest_says_what_the_entry_was_made_from(tmp_path: Path) -> None:
    cache = Store(tmp_path / "cache")
    cache.put(KEY, "export", folder_with(tmp_path / "source", model="x"), {"options": {"opset": 17}})
    manifest = json.loads((cache.root / "entries" / "ab" / KEY / MANIFEST).read_text())
    assert manifest["description"] == {"options": {"opset": 17}}
