"""What a backend builds, opens and runs is checked, and a wrong answer names the backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optframe import engines
from optframe.backend import BuildOptions, Engine
from optframe.errors import PluginError


class Runner:
    def __init__(self, outputs: object) -> None:
        self.outputs = outputs

    def run(self, feeds: object) -> Any:
        return self.outputs

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None: ...


class Backend:
    """A backend that answers what it is told to."""

    name = "mine"

    def __init__(self, built: Any = None, opened: Any = None) -> None:
        self.built, self.opened = built, opened

    def missing(self) -> None: ...

    def versions(self) -> dict[str, str]:
        return {}

    def build(self, model: Path, folder: Path, options: BuildOptions) -> Any:
        return self.built

    def open(self, engine: Engine) -> Any:
        return self.opened


def engine_at(path: Path) -> Engine:
    return Engine(path, "mine", "fp32", "cpu")


def test_an_engine_in_the_folder_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    engine = engine_at(tmp_path / "model.bin")
    assert engines.build(Backend(engine), tmp_path, tmp_path, BuildOptions()) is engine


def test_a_build_that_gives_no_engine_names_the_backend(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").touch()
    elsewhere = "build() gives an engine that is no file in the folder asked for"
    for built, said in (
        (None, "build() gives None, not an Engine"),
        ("model.bin", "build() gives an object of type str, not an Engine"),
        (engine_at(tmp_path / "inner/absent.bin"), elsewhere),
        (engine_at(tmp_path / "outside.bin"), elsewhere),
    ):
        with pytest.raises(PluginError) as caught:
            engines.build(Backend(built), tmp_path / "m.onnx", tmp_path / "inner", BuildOptions())
        assert str(caught.value) == f"backend mine: {said}"


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (None, "open() gives None, which lacks run, __enter__, __exit__"),
        (open, "open() gives an object of type builtin_function_or_method, which lacks run, __enter__, __exit__"),
        (Runner(None), "run() gives None, not outputs by name"),
        (Runner([np.zeros(3)]), "run() gives an object of type list, not outputs by name"),
        (Runner({}), "run() gives no outputs"),
    ],
)
def test_a_runner_that_gives_no_outputs_names_the_backend(opened: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        engines.run_samples(Backend(opened=opened), engine_at(tmp_path), [{}])
    assert str(caught.value) == f"backend mine: {said}"


def test_outputs_are_handed_on(tmp_path: Path) -> None:
    outputs = {"y": np.zeros(3)}
    assert engines.run_samples(Backend(opened=Runner(outputs)), engine_at(tmp_path), [{}, {}]) == [outputs, outputs]
