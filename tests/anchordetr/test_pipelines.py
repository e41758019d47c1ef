"""The pipelines on the whole detector: how many nodes they leave, that they change no result, and who runs which."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from optframe import graph
from optframe.api import optimize
from optframe.host import PluginHost
from optframe.registry import Registry
from optframe.snapshot import Snapshot
from optframe.stages import wanted_pipeline
from optframe.types import Part
from optframe_anchordetr.adapter import AnchorDETRAdapter, AnchorDETROptions
from optframe_anchordetr.config import ExportOptions
from optframe_anchordetr.export import export
from optframe_anchordetr.model import AnchorDETR

Array = np.ndarray[Any, Any]

SHAPE = (1, 3, 160, 224)
"""How many nodes there are does not depend on the size."""

LIMITS = {"portable": 750, "tensorrt": 750, "anchordetr": 534, "anchordetr-tensorrt": 450, "anchordetr-cuda": 450}

MASKED_LIMITS = {"portable": 1000, "anchordetr-tensorrt": 660, "anchordetr-cuda": 680}  # cuda merges no products
"""With a mask that is an input, positions and padding are computed, not folded."""


def outputs(model: ir.Model, *inputs: Array) -> list[Array]:
    """Return logits and boxes in onnxruntime, nothing optimised."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    made: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
    return made


def nodes(model: ir.Model) -> int:
    """Return the count of nodes, a call of a plugin op that has a kernel as one."""
    with_kernel = {name for name, spec in Registry(PluginHost()).ops().items() if spec.kernel is not None}
    return graph.op_histogram(model, with_kernel).total()


def assert_as_good(actual: Sequence[Array], exported: Sequence[Array], exact: Sequence[Array]) -> None:
    """Check that results are no further from float64 than those of the export.

    FP32 puts the export itself 1e-5 (logits) and 4e-6 (boxes) from float64 with these weights, so that a comparison of
    two FP32 graphs says little. A third more than its RMS error: the two roundings are independent.
    """
    for ours, theirs, truth in zip(actual, exported, exact, strict=True):
        error, allowed = (float(np.sqrt(np.mean((array - truth) ** 2))) for array in (ours, theirs))
        assert error <= 1.33 * allowed + 1e-7


def assert_settled(optimized: ir.Model, pipeline: str) -> None:
    """Check that a second run finds nothing to do."""
    again = optimize(optimized.clone(), pipeline, verify="off").model
    assert Snapshot.take(optimized).same(Snapshot.take(again), types=False)


def check(model: AnchorDETR, folder: Path, options: ExportOptions, pipeline: str, limit: int) -> ir.Model:
    path = export(model, folder / "model.onnx", options)
    optimized = optimize(path, pipeline, verify="off").model
    onnx.checker.check_model(ir.to_proto(optimized), full_check=True)
    assert nodes(optimized) <= limit
    assert_settled(optimized, pipeline)
    image = np.random.default_rng(3).standard_normal(options.shape).astype(np.float32)
    with torch.inference_mode():
        exact = [array.numpy() for array in copy.deepcopy(model).double()(torch.from_numpy(image).double())]
    assert_as_good(outputs(optimized, image), outputs(graph.load(path), image), exact)
    return optimized


@pytest.mark.parametrize("pipeline", ["anchordetr-cuda"])
def test_nodes_and_results(seeded_model: AnchorDETR, pipeline: str, tmp_path: Path) -> None:
    check(seeded_model, tmp_path, ExportOptions(SHAPE, opset=17), pipeline, LIMITS[pipeline])


@pytest.mark.slow  # the whole detector, exported for each: 10 s a case
@pytest.mark.parametrize("pipeline", LIMITS)
@pytest.mark.parametrize(
    ("exporter", "opset"), [("torchscript", 12), ("torchscript", 17), ("torchscript", 18), ("dynamo", 18)]
)
def test_nodes_and_results_of_every_export(
    seeded_model: AnchorDETR, exporter: Any, opset: int, pipeline: str, tmp_path: Path
) -> None:
    check(seeded_model, tmp_path, ExportOptions(SHAPE, opset, exporter), pipeline, LIMITS[pipeline])


@pytest.mark.slow  # a minute
def test_the_pipeline_for_cpus_at_full_size(seeded_model: AnchorDETR, tmp_path: Path) -> None:
    """Only there convolutions and products are large enough for what it does beyond `portable`."""
    optimized = check(seeded_model, tmp_path, ExportOptions((1, 3, 800, 1066)), "cpu", 900)
    ops = Counter(node.op_type for node in optimized.graph)
    assert ops["Scan"] == 17, "loops over heads: twelve row-column attentions, five self-attentions of the decoder"
    assert ops["ConvTranspose"] > 0, "convolutions by Winograd's method"
    assert ops["Max"] > 0, "softmaxes whose weights are lifted out of the denormal numbers"


@pytest.mark.slow  # the whole detector, exported for each: 15 s a case
@pytest.mark.parametrize("pipeline", MASKED_LIMITS)
@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
def test_free_sizes_with_mask(
    seeded_model: AnchorDETR, exporter: Any, opset: int, pipeline: str, tmp_path: Path
) -> None:
    options = ExportOptions(SHAPE, opset, exporter, mask=True, dynamic=True)
    path = export(seeded_model, tmp_path / "model.onnx", options)
    optimized = optimize(path, pipeline, verify="off").model
    assert nodes(optimized) <= MASKED_LIMITS[pipeline]
    assert_settled(optimized, pipeline)
    images = np.random.default_rng(4).standard_normal((2, 3, 128, 161)).astype(np.float32)
    mask = np.zeros((2, 128, 161), bool)
    mask[1, 96:], mask[1, :, 100:] = True, True
    expected = outputs(graph.load(path), images, mask)
    for ours, theirs in zip(outputs(optimized, images, mask), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # two FP32 graphs, logits of about 10


@pytest.mark.parametrize(
    ("backends", "pipeline"),
    [
        (["onnxruntime"], "anchordetr"),
        (["torch"], "anchordetr-cuda"),
        (["tensorrt"], "anchordetr-tensorrt"),
        (["tensorrt-rtx", "onnxruntime"], "anchordetr-tensorrt"),
    ],
)
def test_each_backend_gets_its_pipeline(backends: Sequence[str], pipeline: str) -> None:
    adapter = AnchorDETRAdapter(AnchorDETROptions())
    assert wanted_pipeline(adapter, Registry(PluginHost()), backends) == pipeline


def test_a_model_without_pipelines_of_its_own_gets_the_backends() -> None:
    class Plain:
        pipeline = "portable"

    class Special:
        pipeline = "clean"

    registry = Registry(PluginHost())
    assert wanted_pipeline(Plain(), registry, ["torch"]) == "cuda"
    assert wanted_pipeline(Plain(), registry, ["onnxruntime"]) == "portable"
    assert wanted_pipeline(Special(), registry, ["torch"]) == "clean"


def test_notes_are_of_what_was_not_given(tmp_path: Path) -> None:
    bundled, own = AnchorDETROptions(), AnchorDETROptions(checkpoint=tmp_path, calibration_images=tmp_path)
    parts: list[tuple[Part, str]] = [("export", "seeded, not trained"), ("calibration", "two bundled photographs")]
    for of, said in parts:
        [note] = AnchorDETRAdapter(bundled).notes(of)
        assert said in note
        assert AnchorDETRAdapter(own).notes(of) == []
    assert AnchorDETRAdapter(bundled).notes("feeds") == []
