"""What hits the cache of stages, what misses it, and what observers hear."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from optframe.errors import InputError
from optframe.stages import runner as stage_runner
from optframe.stages.runner import StageResult, StageRunner, Worker, library_versions
from optframe.store import Store


class Recorder:
    """An observer that keeps what it hears, and an action that counts its runs."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []
        self.runs = 0

    def stage_started(self, stage: str, options: Mapping[str, Any]) -> None:
        self.heard.append((stage, dict(options)))

    def stage_finished(self, stage: str, seconds: float, cached: bool) -> None:
        assert seconds >= 0
        self.heard.append((stage, cached))

    def action(self, folder: Path) -> None:
        self.runs += 1
        (folder / "artefact").write_text("made")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text("content")
    return path


@pytest.fixture
def plugin(tmp_path: Path) -> Worker:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "kernel.cu").write_text("one")
    return Worker(tmp_path / "plugin", "no-such-distribution")


def run(tmp_path: Path, recorder: Recorder, source: Path, plugin: Worker, **options: object) -> StageResult:
    stage_runner.tree_hash.cache_clear()
    stage_runner.library_versions.cache_clear()
    store = Store(tmp_path / "cache")
    with store.work_folder() as work:
        result = StageRunner(work, store, recorder).run(
            "export", recorder.action, inputs={"source": source}, options=options, workers=[plugin]
        )
        assert (result.folder / "artefact").read_text() == "made"
    return result


def test_the_same_again_is_served_and_says_when_it_was_made(tmp_path: Path, source: Path, plugin: Worker) -> None:
    recorder = Recorder()
    first = run(tmp_path, recorder, source, plugin, opset=17)
    second = run(tmp_path, recorder, source, plugin, opset=17)
    assert recorder.runs == 1
    assert (first.cached, second.cached) == (False, True)
    assert second.created == pytest.approx(first.created, abs=5)  # the entry is written right after the action
    assert recorder.heard == [
        ("export", {"opset": 17, "label": ""}),
        ("export", False),
        ("export", {"opset": 17, "label": ""}),
        ("export", True),
    ]


@pytest.mark.parametrize("change", ["input", "option", "code", "version"])
def test_a_change_misses(
    tmp_path: Path, source: Path, plugin: Worker, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    run(tmp_path, recorder, source, plugin, opset=17)
    if change == "input":
        source.write_text("Content")
    elif change == "code":
        (plugin.root / "kernel.cu").write_text("two")
    elif change == "version":
        monkeypatch.setattr(stage_runner.metadata, "version", lambda name: "99.0")
    assert not run(tmp_path, recorder, source, plugin, opset=18 if change == "option" else 17).cached
    assert recorder.runs == 2


def test_where_a_file_lies_does_not_matter(tmp_path: Path, source: Path, plugin: Worker) -> None:
    recorder = Recorder()
    run(tmp_path, recorder, source, plugin)
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("content")
    assert run(tmp_path, recorder, elsewhere, plugin).cached


def test_a_stage_that_fails_leaves_nothing_and_runs_again(tmp_path: Path, source: Path, plugin: Worker) -> None:
    store = Store(tmp_path / "cache")
    recorder = Recorder()

    def failing(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise InputError("no")

    with store.work_folder() as work, pytest.raises(InputError):
        StageRunner(work, store, recorder).run("export", failing, inputs={"source": source}, workers=[plugin])
    assert store.entries() == []
    assert not run(tmp_path, recorder, source, plugin).cached


def test_without_a_store_everything_runs(tmp_path: Path, source: Path) -> None:
    recorder = Recorder()
    runner = StageRunner(tmp_path, None, recorder)
    results = [runner.run("export", recorder.action, inputs={"source": source}) for _ in range(2)]
    assert recorder.runs == 2
    assert [result.cached for result in results] == [False, False]
    assert results[0].folder != results[1].folder


def test_library_versions_are_those_of_the_direct_requirements() -> None:
    stage_runner.library_versions.cache_clear()
    versions = dict(library_versions("optframe"))
    assert {"optframe", "numpy", "onnx", "onnxruntime"} <= versions.keys()


def test_a_stage_that_failed_leaves_room_for_the_next(tmp_path: Path) -> None:
    runner = StageRunner(tmp_path, None, Recorder())

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        runner.run("build", fails)
    assert not (runner.run("build", lambda folder: None).folder / "half").exists()
