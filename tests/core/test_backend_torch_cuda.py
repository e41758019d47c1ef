"""The torch backend on a GPU: CUDA graphs of several sizes, precisions, memory, against onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser

import optframe
from optframe.backend import Engine
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.backends.torch.backend import TorchSettings, open_model
from optframe.backends.torch.runner import CudaRunner
from optframe.errors import InputError

Array = np.ndarray[Any, Any]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]

BLOCK = """<ir_version: 8, opset_import: ["" : 18]>
graph (float[N, 3, H, 24] images) => (float[N, T, 16] y, float[N, 2, T, T] weights) {
    conv = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (images, filters, bias)
    seen = Relu (conv)
    flat_shape = Constant <value_ints = [0, 16, -1]> ()
    flat = Reshape (seen, flat_shape)
    tokens = Transpose <perm = [0, 2, 1]> (flat)
    normal = LayerNormalization <axis = -1> (tokens, scale, shift)
    q = MatMul (normal, wq)
    k = MatMul (normal, wk)
    v = MatMul (normal, wv)
    heads = Constant <value_ints = [0, 0, 2, 8]> ()
    qh = Reshape (q, heads)
    kh = Reshape (k, heads)
    vh = Reshape (v, heads)
    qt = Transpose <perm = [0, 2, 1, 3]> (qh)
    kt = Transpose <perm = [0, 2, 3, 1]> (kh)
    vt = Transpose <perm = [0, 2, 1, 3]> (vh)
    third = Constant <value_float = 0.35> ()
    qs = Mul (qt, third)
    scores = MatMul (qs, kt)
    weights = Softmax <axis = -1> (scores)
    mixed = MatMul (weights, vt)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    rows = Constant <value_ints = [0, 0, 16]> ()
    joined = Reshape (back, rows)
    y = Add (joined, tokens)
}"""


SHAPES = {"filters": (16, 3, 3, 3), "bias": (16,), "scale": (16,), "shift": (16,)} | dict.fromkeys(
    ("wq", "wk", "wv"), (16, 16)
)


def block(rng: np.random.Generator) -> onnx.ModelProto:
    """A convolution, a normalisation and an attention, whose weights keep what they pass on near 1."""
    model = parser.parse_model(BLOCK)
    for name, shape in SHAPES.items():
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return model


def expected(model: onnx.ModelProto, feeds: dict[str, Array], folder: Path) -> dict[str, Array]:
    path = folder / "reference.onnx"
    onnx.save(model, path)
    with OnnxRuntimeBackend().open(Engine(path, "onnxruntime", "fp32", "cpu")) as runner:
        return dict(runner.run(feeds))


@pytest.mark.parametrize(
    ("precision", "tf32", "tolerance"),
    [
        # Relative to the largest output. Scores reach 20, and their exponentials have that many of the roundings of
        # sums of a few dozen products:
        ("fp32", False, 256 * 2.0**-24),
        # factors, or all of it, rounded to 11 bits, and the same scores:
        ("fp32", True, 32 * 2.0**-11),
        ("fp16", False, 32 * 2.0**-11),
    ],
)
def test_sizes_come_and_go(
    tmp_path: Path, rng: np.random.Generator, precision: optframe.Precision, tf32: bool, tolerance: float
) -> None:
    """More sizes than graphs: each is captured, dropped and captured again, and always right on fresh inputs."""
    model = block(rng)
    converted = optframe.convert_precision(ir.from_proto(model), precision)
    with open_model(converted, "cuda", TorchSettings(tf32=tf32, graphs=2), "block") as runner:
        assert isinstance(runner, CudaRunner)
        for images, height in ((1, 16), (2, 16), (1, 16), (3, 10), (2, 16)):
            feeds = {"images": rng.standard_normal((images, 3, height, 24)).astype(np.float32)}
            outputs = runner.run(feeds)
            for name, wanted in expected(model, feeds, tmp_path).items():
                assert outputs[name].dtype == np.float32
                assert np.abs(outputs[name] - wanted).max() <= tolerance * np.abs(wanted).max(), (name, images)
            assert len(runner._graphs) <= 2


def test_ten_thousand_runs_take_no_memory(rng: np.random.Generator) -> None:
    feeds = {"images": rng.standard_normal((1, 3, 16, 24)).astype(np.float32)}
    with open_model(ir.from_proto(block(rng)), "cuda", TorchSettings(), "block") as runner:
        assert isinstance(runner, CudaRunner)
        step = runner.bind(feeds)
        runner.run(feeds)
        step()
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        for index in range(10_000):
            step() if index % 10 else runner.run(feeds)
        torch.cuda.synchronize()
        assert (torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()) == before


def test_bad_feeds_are_told_before_anything_runs(rng: np.random.Generator) -> None:
    with open_model(ir.from_proto(block(rng)), "cuda", TorchSettings(), "block") as runner:
        for array, message in (
            (np.zeros((1, 3, 16, 24)), "is float64"),
            (np.zeros((1, 3, 16, 25), np.float32), "has shape"),
        ):
            with pytest.raises(InputError, match=message):
                runner.run({"images": array})
        turned = np.asfortranarray(rng.standard_normal((1, 3, 16, 24)).astype(np.float32))
        straight = np.ascontiguousarray(turned)
        np.testing.assert_array_equal(runner.run({"images": turned})["y"], runner.run({"images": straight})["y"])
