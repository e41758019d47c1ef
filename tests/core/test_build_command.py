"""`optframe build`, and loading what it built."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import optframe
from optframe import engines, graph
from optframe.backend import BuildOptions, Engine
from optframe.cli import main
from optframe.commands.options import engine_options
from optframe.details import EngineDetails, LayerTime, summarize
from optframe.errors import InputError
from optframe.feeds import random_feeds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x = ir.val("x", ir.DataType.FLOAT, ("n", 3))
    node = ir.node("Neg", [x], name="neg")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, x.shape
    return graph.save(
        ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 18}, name="g"), ir_version=10), tmp_path / "m.onnx"
    )


def test_an_engine_is_built_and_loaded(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(model), "--out", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["backend"], facts["precision"], facts["warnings"]) == ("onnxruntime", "fp32", [])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with optframe.load_engine(facts["path"]) as runner:
        np.testing.assert_array_equal(runner.run({"x": x})["y"], -x)


def test_the_precision_is_what_the_graph_has(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = optframe.convert_precision(small_product(), "fp16")
    path = graph.save(half, tmp_path / "half.onnx")
    assert main(["build", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "(fp16, " in capsys.readouterr().out
    assert main(["build", str(model), "--out", str(tmp_path / "out"), "--precision", "fp16"]) == 2
    assert "no float16" in capsys.readouterr().err


def small_product() -> ir.Model:
    x, w = ir.val("x", ir.DataType.FLOAT, (2, 3)), ir.val("w", ir.DataType.FLOAT, (3, 4))
    w.const_value = ir.tensor(np.ones((3, 4), np.float32), name="w")
    node = ir.node("MatMul", [x, w], name="product")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape((2, 4))
    return ir.Model(ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 18}, name="g"), ir_version=10)


def test_options_of_other_backends_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(model), "--out", str(tmp_path / "out"), "--plugins", "none"]) == 2
    assert "unknown option of backend onnxruntime 'plugins'" in capsys.readouterr().err


def test_flags_are_options_by_name() -> None:
    profiles = ["n=1/2/4", "n=8"]
    assert engine_options("all", "sm89", profiles, 64, 5, ["tf32=true"]) == {
        "tf32": "true",
        "plugins": "all",
        "compute_capability": "sm89",
        "profile": "n=1/2/4;n=8",
        "workspace": "64",
        "optimization_level": "5",
    }
    assert engine_options(None, None, None, None, None, None) == {}


def test_the_registered_ops_reach_the_backend(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BuildOptions] = []

    def build(self: object, path: Path, folder: Path, options: BuildOptions) -> Engine:
        seen.append(options)
        return Engine(path, "onnxruntime", "fp32", "cpu")

    monkeypatch.setattr("optframe.backends.onnxruntime.OnnxRuntimeBackend.build", build)
    registry = optframe.api.default_registry()
    optframe.build(model, tmp_path, registry=registry)
    assert seen[0].ops == registry.ops()


def test_an_engine_whose_facts_say_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"?")
    (tmp_path / "a.engine.json").write_text("[1]")
    with pytest.raises(InputError, match="is damaged"):
        optframe.load_engine(path)
    (tmp_path / "a.engine.json").write_text('{"backend": "tensorflow"}')
    with pytest.raises(InputError, match="unknown backend 'tensorflow'"):
        optframe.load_engine(path)


class DetailedRunner:
    """A runner that tells of its parts and layers."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return {"y": -feeds["x"]}

    def details(self, feeds: Mapping[str, np.ndarray]) -> EngineDetails:
        parts = {"enqueue": [4.5], "h2d": [1.0], "gpu": [5.0], "d2h": [2.0]}
        return replace(summarize(parts, 0.01), layers=(LayerTime("fused[0]", 0.75, ("neg",)),))

    def __enter__(self) -> "DetailedRunner":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_an_engine_file_is_profiled_by_its_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"?")
    facts = {
        "backend": "onnxruntime",
        "precision": "fp16",
        "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 3]}],
        "profiles": [{"x": {"min": [1, 3], "opt": [5, 3], "max": [9, 3]}}],
    }
    (tmp_path / "m.engine.json").write_text(json.dumps(facts))
    opened: list[Engine] = []

    def open_engine(self: object, engine: Engine) -> DetailedRunner:
        opened.append(engine)
        return DetailedRunner()

    monkeypatch.setattr("optframe.backends.onnxruntime.OnnxRuntimeBackend.open", open_engine)
    assert main(["profile", str(path)]) == 0
    shown = capsys.readouterr()
    assert "enqueue-bound" in shown.err
    assert "fused[0]" in shown.out
    assert (opened[0].path, opened[0].precision) == (path, "fp16")
    assert main(["profile", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["details"]
    assert told["series"]["gpu"]["median"] == 5.0
    assert told["layers"][0]["nodes"] == ["neg"]


def test_inputs_are_drawn_in_the_shape_that_an_engine_is_fast_for(tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"?")
    facts = {
        "inputs": [{"name": "x", "dtype": "float16", "shape": [-1, 3]}, {"name": "n", "dtype": "int64", "shape": [2]}],
        "profiles": [{"x": {"min": [1, 3], "opt": [5, 3], "max": [9, 3]}}],
    }
    (tmp_path / "m.engine.json").write_text(json.dumps(facts))
    drawn = random_feeds(engines.signature(path), 0)
    assert {name: (array.shape, array.dtype) for name, array in drawn.items()} == {
        "x": ((5, 3), np.float16),
        "n": ((2,), np.int64),
    }
    (tmp_path / "m.engine.json").write_text("{}")
    with pytest.raises(InputError, match="does not tell the engine's inputs"):
        engines.signature(path)


def test_what_cannot_be_built_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16"):
        optframe.build(model, tmp_path / "new" / "engine", options=BuildOptions(precision="fp16"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(InputError, match="fp16"):
        optframe.build(model, tmp_path / "kept", options=BuildOptions(precision="fp16"))
    assert (tmp_path / "kept").is_dir()
