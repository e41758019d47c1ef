"""The facts beside an engine, and what is said of an engine that cannot run here."""

import json
import math
import types
from dataclasses import replace
from pathlib import Path

import pytest

from optframe import engines, environment, store
from optframe.engines import sidecar
from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe_anchordetr.ops import LAYER_NORM
from optframe_trt import engine_file, flavours
from optframe_trt.builder import KernelFacts, TensorFacts
from optframe_trt.engine_file import EngineFacts
from optframe_trt.layers import Origin
from optframe_trt.runner import plugin_ops


def make(tmp_path: Path, **changes: object) -> tuple[Path, EngineFacts]:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine" * 100)
    facts = EngineFacts(
        backend="tensorrt-rtx",
        version="1.7.1.116",
        precision="fp16",
        targets=("sm86", "sm89"),
        size=600,
        hashes={"engine": store.hash_file(engine), "model": "0" * 64},
        inputs=(TensorFacts("x", "float16", (-1, 3)),),
        outputs=(TensorFacts("y", "float32", (-1, 5)),),
        plugins={LAYER_NORM.identifier: 1},
        kernels=(KernelFacts("norm", "layernorm", 86, (8, 8), (12, 9), "ab"),),
        profiles=({"x": {"min": (1, 3), "opt": (2, 3), "max": (4, 3)}},),
        settings={"version_compatible": False},
        layers={"norm": ("norm",)},
        origins={"norm": Origin("LayerNormalization", "encoder.norm", ("a", "b"), ("fuse-layernorm",))},
        warnings=("beware",),
    )
    return engine, replace(facts, **changes)  # type: ignore[arg-type]


def here(monkeypatch: pytest.MonkeyPatch, capability: str | None = "8.9", driver: str = "580.65") -> None:
    """Make this machine one with that GPU, driver and TensorRT-RTX 1.7.1.116."""
    facts = {"name": "GPU", "driver_version": driver, "memory.total": "1 MiB", "compute_cap": capability or ""}
    monkeypatch.setattr(environment, "gpus", lambda: (facts,) if capability else ())
    abilities = flavours.KINDS["tensorrt-rtx"].abilities((1, 7))
    module = types.ModuleType("tensorrt_rtx")
    monkeypatch.setattr(flavours, "load", lambda name: flavours.Flavour(name, "1.7.1.116", module, abilities))
    monkeypatch.setattr(flavours, "is_installed", lambda name: name == "tensorrt-rtx")


def test_facts_come_back_as_they_were_written(tmp_path: Path) -> None:
    engine, facts = make(tmp_path)
    engine_file.write(engine, facts)
    assert engine_file.read(engine) == facts
    assert json.loads(sidecar(engine).read_text())["ptx_isa"] == [8, 8]
    engine_file.check_file(engine, facts)


def test_an_engine_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    engine_file.check_here(*make(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "is damaged"),
        (lambda text: text.replace('"targets"', '"aims"'), r"is damaged \(TypeError: targets is missing"),
        (lambda text: text.replace('"sm86"', "86"), r"is damaged \(TypeError: targets\[0\] is no str"),
        (lambda text: text.replace('"size": 600', '"size": "600"'), r"is damaged \(TypeError: size is no int"),
        (lambda text: text.replace('"hashes": {', '"hashes": [], "was": {'), r"is damaged \(TypeError: hashes is no"),
        (lambda text: text.replace('"precision": "fp16"', '"precision": "fp8"'), "is damaged"),
        (lambda text: "[" * 100_000, "is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "written by another optframe"),
        (lambda text: "[]", "is damaged"),
    ],
)
def test_damaged_facts_are_refused(tmp_path: Path, change: object, message: str) -> None:
    engine, facts = make(tmp_path)
    path = engine_file.write(engine, facts)
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        engine_file.read(engine)


def test_facts_without_a_hash_are_of_no_engine(tmp_path: Path) -> None:
    engine, facts = make(tmp_path, hashes={})
    with pytest.raises(InputError, match="is not the engine that"):
        engine_file.check_file(engine, facts)


@pytest.mark.parametrize("entry", ["backend", "precision", "device"])
def test_nothing_can_be_found_by_damaged_facts(tmp_path: Path, entry: str) -> None:
    engine, facts = make(tmp_path)
    path = engine_file.write(engine, facts)
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: [1]}))
    with pytest.raises(InputError, match="is damaged"):
        engines.find(engine)


@pytest.mark.parametrize("size", [math.inf, math.nan, None, "x", [1]])
def test_a_signature_needs_sizes(tmp_path: Path, size: object) -> None:
    engine, facts = make(tmp_path)
    path = engine_file.write(engine, facts)
    profiles = [{"x": {"opt": [size, 3]}}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "profiles": profiles}))
    if size in (None, "x"):
        assert engines.signature(engine).graph.inputs[0].shape is not None  # a dimension that is free
        return
    with pytest.raises(InputError, match="does not tell the engine's inputs"):
        engines.signature(engine)


def test_missing_files_are_told(tmp_path: Path) -> None:
    engine, _ = make(tmp_path)
    with pytest.raises(InputError, match=r"has no model\.engine\.json beside it"):
        engine_file.read(engine)
    with pytest.raises(InputError, match="no such engine"):
        engine_file.read(tmp_path / "other.engine")


def test_a_truncated_or_exchanged_file_is_told(tmp_path: Path) -> None:
    engine, facts = make(tmp_path)
    engine.write_bytes(b"engine" * 99)
    with pytest.raises(InputError, match="is cut off: 594 of 600 bytes"):
        engine_file.check_file(engine, facts)
    engine.write_bytes(b"Engine" * 100)
    with pytest.raises(InputError, match="is not the engine that"):
        engine_file.check_file(engine, facts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "tensorrt"}, InputError, "is an engine of tensorrt, and only tensorrt-rtx is installed"),
        ({"version": "1.6.0"}, InputError, r"built with tensorrt-rtx 1\.6\.0, 1\.7\.1\.116 is installed"),
        (
            {"version": "1.8.0", "settings": {"version_compatible": True}},
            InputError,
            r"built with tensorrt-rtx 1\.8\.0, 1\.7\.1\.116 is installed, and engines load in later versions alone",
        ),
        ({"settings": {"strip": True}}, InputError, r"built without its weights \(strip\): refit it"),
        ({"targets": ("sm80", "sm86")}, EnvironmentLacks, "is for sm80, sm86, the GPU here is sm89"),
    ],
)
def test_an_engine_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    here(monkeypatch)
    with pytest.raises(error, match=message):
        engine_file.check_here(*make(tmp_path, **changes))


def test_a_version_compatible_engine_may_be_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    engine_file.check_here(*make(tmp_path, version="1.6.0", settings={"version_compatible": True}))


def test_no_gpu_and_old_drivers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, capability=None)
    with pytest.raises(EnvironmentLacks, match="there is none here"):
        engine_file.check_here(*make(tmp_path))
    here(monkeypatch, driver="570.86")
    with pytest.raises(EnvironmentLacks, match=r"PTX 8\.8, which needs driver 575 or newer, here is 570\.86"):
        engine_file.check_here(*make(tmp_path))
    engine_file.check_here(*make(tmp_path, kernels=()))


@pytest.mark.parametrize(("isa", "driver"), [((8, 0), 525), ((8, 8), 575), ((8, 9), 580), ((9, 0), 580), ((9, 9), 580)])
def test_the_driver_that_an_isa_needs(tmp_path: Path, isa: tuple[int, int], driver: int) -> None:
    kernel = KernelFacts("n", "e", 86, isa, (12, 9), "ab")
    assert engine_file.driver_needed(make(tmp_path, kernels=(kernel,))[1]) == driver


def test_an_engine_needs_the_ops_that_it_calls(tmp_path: Path) -> None:
    engine, facts = make(tmp_path)
    assert plugin_ops(engine, facts, {LAYER_NORM.identifier: LAYER_NORM}) == [LAYER_NORM]
    with pytest.raises(PluginError, match=f"needs the plugin op {LAYER_NORM.identifier}"):
        plugin_ops(engine, facts, {})
    with pytest.raises(PluginError, match=r"needs version 1 of .*, 2 is installed"):
        plugin_ops(engine, facts, {LAYER_NORM.identifier: replace(LAYER_NORM, version=2)})
