"""Anchor DETR as engines of TensorRT-RTX, really built without a GPU: every precision, our kernels inside."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import optframe
from optframe import environment, graph
from optframe.backend import BuildOptions
from optframe.precision import calibrate, quantize, to_fp16
from optframe.registry import Registry, default_registry
from optframe.types import Feeds, Precision
from optframe_anchordetr.adapter import AnchorDETRAdapter, AnchorDETROptions
from optframe_anchordetr.config import ExportOptions
from optframe_anchordetr.export import export
from optframe_anchordetr.model import AnchorDETR
from optframe_trt import flavours

pytestmark = pytest.mark.skipif(not flavours.is_installed("tensorrt-rtx"), reason="needs tensorrt-rtx-cu13")

SMALL = (1, 3, 64, 96)
FULL = (1, 3, 800, 1066)
TARGETS = "sm86,sm89,sm120"
PROFILE = "batch=1/1/4,height=320/800/1344,width=512/1066/1344"


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests here, and no GPU, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFRAME_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(environment, "gpus", lambda: ())
        yield


@pytest.fixture(scope="module")
def registry() -> Registry:
    return default_registry()


def optimized(exported: Path, pipeline: str, registry: Registry) -> Path:
    """Optimise; the passes' own tests verify them."""
    result = optframe.optimize(exported, pipeline, verify="off", registry=registry)
    return graph.save(result.model, exported.with_name("fp32.onnx"))


def converted(path: Path, samples: Sequence[Feeds], registry: Registry) -> dict[Precision, Path]:
    """Return the model at `path` in every precision; ranges from few samples suffice to build."""
    ops = registry.ops()
    ranges = calibrate(graph.load(path), samples, registry.load_calibrator("min-max")())
    return {
        "fp32": path,
        "fp16": graph.save(to_fp16(graph.load(path), ops=ops), path.with_name("fp16.onnx")),
        "int8": graph.save(quantize(graph.load(path), ranges, ops=ops), path.with_name("int8.onnx")),
    }


def build(model: Path, folder: Path, registry: Registry, precision: Precision, **options: str) -> tuple[bytes, dict]:
    """Return the engine's bytes and facts."""
    chosen = BuildOptions(precision, options={"compute_capability": "sm89", **options}, ops=registry.ops())
    engine = optframe.build(model, folder, backend="tensorrt-rtx", options=chosen, registry=registry)
    return engine.path.read_bytes(), json.loads((folder / "model.engine.json").read_text())


def assert_layernorm_inside(data: bytes, facts: dict, target: int) -> None:
    assert "optframe.anchordetr::LayerNorm" in facts["plugins"]
    entries = {kernel["entry"] for kernel in facts["kernels"]}
    assert "layernorm" in entries
    assert all(f".entry {entry}(".encode() in data for entry in entries)
    assert all(f".target sm_{kernel['target']}".encode() in data for kernel in facts["kernels"])
    assert {kernel["target"] for kernel in facts["kernels"]} == {target}


@pytest.fixture(scope="module")
def small(
    small_model: AnchorDETR, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> dict[Precision, Path]:
    """A model of one encoder and one decoder layer, in every precision."""
    exported = export(small_model, tmp_path_factory.mktemp("small") / "exported.onnx", ExportOptions(SMALL))
    rng = np.random.default_rng(0)
    samples = [{"images": rng.standard_normal(SMALL).astype(np.float32)} for _ in range(2)]
    return converted(optimized(exported, AnchorDETRAdapter.pipelines["tensorrt"], registry), samples, registry)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_small_one_is_built(
    small: dict[Precision, Path], tmp_path: Path, registry: Registry, precision: Precision
) -> None:
    data, facts = build(small[precision], tmp_path, registry, precision)
    assert_layernorm_inside(data, facts, 89)
    assert [tensor["name"] for tensor in facts["outputs"]] == ["pred_logits", "pred_boxes"]
    assert facts["origins"]["/backbone/body/conv1/Conv"]["module"].startswith("backbone")


def test_a_small_one_is_built_without_plugins(small: dict[Precision, Path], tmp_path: Path, registry: Registry) -> None:
    native, facts = build(small["fp32"], tmp_path, registry, "fp32", plugins="none")
    assert b".entry " not in native
    assert facts["plugins"] == {}


@pytest.fixture(scope="module")
def full(
    seeded_model: AnchorDETR, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> dict[Precision, Path]:
    """The real model, in every precision. What its ranges are does not matter to a build, so one image does."""
    exported = export(seeded_model, tmp_path_factory.mktemp("full") / "exported.onnx", ExportOptions(FULL))
    samples = [{"images": np.random.default_rng(0).standard_normal(FULL).astype(np.float32)}]
    return converted(optimized(exported, AnchorDETRAdapter.pipelines["tensorrt"], registry), samples, registry)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_full_size_is_built_the_same_twice(
    full: dict[Precision, Path],
    tmp_path: Path,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
) -> None:
    """Also where nothing is cached, as on another machine."""
    start = time.perf_counter()
    data, facts = build(full[precision], tmp_path / "a", registry, precision)
    assert time.perf_counter() - start < 60, "it takes 5 s where nothing else runs"
    assert_layernorm_inside(data, facts, 89)
    assert facts["inputs"][0]["shape"] == list(FULL)
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path / "cache"))
    again, _ = build(full[precision], tmp_path / "b", registry, precision)
    assert data == again


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_full_size_is_built_for_several_gpus_at_once(
    full: dict[Precision, Path], tmp_path: Path, registry: Registry, precision: Precision
) -> None:
    data, facts = build(full[precision], tmp_path, registry, precision, compute_capability=TARGETS)
    assert facts["targets"] == TARGETS.split(",")
    assert_layernorm_inside(data, facts, 86)


@pytest.fixture(scope="module")
def dynamic(
    seeded_model: AnchorDETR, tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> dict[Precision, Path]:
    """The real model for any batch, height and width, in every precision; ranges of one small image do for a build."""
    options = AnchorDETROptions(dynamic=True).export
    exported = export(seeded_model, tmp_path_factory.mktemp("dynamic") / "exported.onnx", options)
    samples = [{"images": np.random.default_rng(0).standard_normal((1, 3, 320, 512)).astype(np.float32)}]
    return converted(optimized(exported, AnchorDETRAdapter.pipelines["tensorrt"], registry), samples, registry)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_dynamic_shapes_are_built_within_their_profile(
    dynamic: dict[Precision, Path], tmp_path: Path, registry: Registry, precision: Precision
) -> None:
    """Attention in FP16 has a kernel for the optimal shapes, and one for all; INT8 leaves it in FP32."""
    data, facts = build(dynamic[precision], tmp_path, registry, precision, profile=PROFILE)
    assert_layernorm_inside(data, facts, 89)
    (profile,) = facts["profiles"]
    assert profile["images"] == {"min": [1, 3, 320, 512], "opt": [1, 3, 800, 1066], "max": [4, 3, 1344, 1344]}
    attention = Counter(kernel["node"] for kernel in facts["kernels"] if kernel["entry"] == "rcda")
    assert set(attention.values()) == ({2} if precision == "fp16" else {1})
