"""What a plugin's model answers is checked, and a wrong answer names the model and the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optframe import api
from optframe.errors import InputError, PluginError
from optframe.hookspec import hookimpl
from optframe.registry import Registry
from optframe.stages.checked_model import CheckedModel
from optframe.testing import host_with
from optframe.types import Illustration, ModelSpec

WHO = "model 'net' of plugin 'mine' (acme 1.0)"
ONE = {"x": np.zeros(3, np.float32)}


class Net:
    """An adapter that answers what it is told to; `answers` by name of the call."""

    pipeline = "portable"
    source = "NumPy"

    def __init__(self, **answers: Any) -> None:
        vars(self).update({name: answers.pop(name) for name in ("pipeline", "source", "pipelines") if name in answers})
        self.answers = answers

    def dependencies(self, of: str) -> Any:
        return self.answers.get("dependencies", {"width": 3, "file": Path("x"), "sizes": (1, 2), "none": None})

    def notes(self, of: str) -> Any:
        return self.answers.get("notes", ("seeded",))

    def export(self, path: Path) -> None:
        if self.answers.get("export", True):
            path.write_bytes(b"model")

    def feeds(self) -> Any:
        return self.answers.get("feeds", (ONE,))

    def random_feeds(self, seed: int) -> Any:
        return self.answers.get("random_feeds", ONE)

    def calibration_feeds(self) -> Any:
        return self.answers.get("calibration_feeds", iter([ONE]))

    def reference(self, feeds: Any) -> Any:
        return self.answers.get("reference", {"y": np.float32(1.5)})

    def illustrate(self, outputs: Any) -> Any:
        return self.answers.get("illustrate", [Illustration("title", b"image")])


CALLS: Mapping[str, Callable[[CheckedModel, Path], Any]] = {
    "dependencies": lambda model, _: model.dependencies("export"),
    "notes": lambda model, _: model.notes("export"),
    "export": lambda model, path: model.export(path / "model.onnx"),
    "feeds": lambda model, _: model.feeds(),
    "random_feeds": lambda model, _: model.random_feeds(0),
    "calibration_feeds": lambda model, _: list(model.calibration_feeds()),
    "reference": lambda model, _: model.reference(ONE),
    "illustrate": lambda model, _: model.illustrate({}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_right_answer_is_handed_on(call: str, tmp_path: Path) -> None:
    answer = CALLS[call](CheckedModel(Net(), WHO), tmp_path)
    assert (tmp_path / "model.onnx").is_file() if call == "export" else len(answer) >= 1


@pytest.mark.parametrize(
    ("call", "answer", "said"),
    [
        ("dependencies", None, "dependencies('export') gives None, not a mapping"),
        ("dependencies", {"a": object()}, "gives an object of type object as 'a', not a Path or a plain value"),
        ("dependencies", {"a": np.zeros(9)}, "gives an object of type ndarray as 'a', not a Path or a plain value"),
        ("dependencies", {"a": [Path("x")]}, "gives an object of type list as 'a', not a Path or a plain value"),
        ("notes", "seeded", "notes('export') gives an object of type str, not a sequence"),
        ("notes", [3], "notes('export') gives an object of type int, not a sequence of text"),
        ("export", False, "export() wrote no file model.onnx"),
        ("feeds", [], "feeds() returned no input"),
        ("feeds", iter([ONE]), "feeds() gives an object of type list_iterator, not a sequence"),
        ("feeds", [np.zeros(3)], "feeds() gives an object of type ndarray, not a mapping of names to arrays"),
        ("random_feeds", {"x": [1.0]}, "random_feeds() gives an object of type list as 'x', not a NumPy array"),
        ("calibration_feeds", None, "calibration_feeds() gives None, not an iterable of inputs"),
        ("calibration_feeds", [{"x": 1}], "calibration_feeds() gives an object of type int as 'x', not a NumPy array"),
        ("reference", None, "reference() gives None, not a mapping of names to arrays"),
        ("reference", {0: np.zeros(3)}, "reference() gives an object of type ndarray as 0, not a NumPy array with a"),
        ("illustrate", None, "illustrate() gives None, not a sequence"),
        ("illustrate", [b"png"], "illustrate() gives an object of type bytes, not Illustrations"),
    ],
)
def test_a_wrong_answer_names_the_model_and_the_call(call: str, answer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        CALLS[call](CheckedModel(Net(**{call: answer}), WHO), tmp_path)
    assert str(caught.value).startswith(f"{WHO}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("pipeline", None, "pipeline gives None, not text"),
        ("source", 3, "source gives an object of type int, not text"),
        ("pipelines", "cuda", "pipelines gives an object of type str, not a mapping"),
    ],
)
def test_what_a_model_has_is_checked(attribute: str, value: Any, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        CheckedModel(Net(**{attribute: value}), WHO)
    assert str(caught.value) == f"{WHO}: {said}"


# --- from a registry


@dataclass(frozen=True)
class NeedyOptions:
    width: int
    seed: int = 0


class Needy(Net):
    Options = NeedyOptions

    def __init__(self, options: NeedyOptions) -> None:
        super().__init__()
        self.width = options.width


class Mine:
    @hookimpl
    def optframe_models(self) -> list[ModelSpec]:
        return [ModelSpec("net", f"{__name__}:Needy")]


def test_a_registered_model_is_checked_and_an_option_without_default_asked_for() -> None:
    registry = Registry(host_with(Mine()))
    with pytest.raises(InputError, match="model net needs its option 'width': --model-option width=VALUE"):
        api.find_source("net", {"seed": 1}, registry)
    with pytest.raises(InputError, match="unknown option of model net 'widht': did you mean 'width'"):
        api.find_source("net", {"widht": 1}, registry)
    source = api.find_source("net", {"width": 7}, registry)
    assert isinstance(source.adapter, CheckedModel)
    assert source.adapter.source == "NumPy"
