"""Plugins inside engines of the full TensorRT, on a GPU: ahead of time and in Python, against the ops' functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph, ops
from optframe.backend import BuildOptions
from optframe.types import OpSpec
from optframe_anchordetr.ops import LAYER_NORM, RCDA, SKIP_LAYER_NORM
from optframe_trt.backend import TensorRTBackend

pytestmark = pytest.mark.gpu_tensorrt

Array = np.ndarray[Any, Any]

CALLS = [
    (LAYER_NORM, {"x": (2, 37, 256), "scale": (256,), "bias": (256,)}, {"epsilon": 1e-5}),
    (LAYER_NORM, {"x": (2, 37, 255), "bias": (255,)}, {"epsilon": 1e-5}),
    (SKIP_LAYER_NORM, {"x": (33, 256), "skip": (33, 256), "scale": (256,), "bias": (256,)}, {"epsilon": 1e-5}),
    (
        RCDA,
        {"q_row": (2, 45, 64), "q_col": (2, 45, 64), "k_row": (2, 7, 64), "k_col": (2, 6, 64), "v": (2, 6, 7, 64)},
        {"num_heads": 2},
    ),
]
TOLERANCE = 1e-5
"""Values of order 1 after some ten float32 roundings each, on either side."""

LOAD_WITHOUT_US = """
import sys
import tensorrt as trt
engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(open(sys.argv[1], "rb").read())
assert engine is not None
assert not any(name.startswith("optframe") for name in sys.modules)
"""


def write_model(path: Path, spec: OpSpec, shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any]) -> Path:
    """Write a model of one call, with the op's function."""
    inputs = {name: ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()}
    model = ir.Model(ir.Graph(list(inputs.values()), [], nodes=[], opset_imports={"": 18}, name="call"), ir_version=8)
    node = ops.call(model, spec, [inputs.get(parameter.name) for parameter in spec.inputs], attributes)
    model.graph.append(node)
    for value, parameter in zip(node.outputs, spec.outputs, strict=True):
        value.name, value.type = parameter.name, ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    return graph.save(model, path)


@pytest.mark.parametrize("aot", ["true", "false"])
@pytest.mark.parametrize(("spec", "shapes", "attributes"), CALLS)
def test_an_engine_computes_what_the_function_says(
    aot: str,
    spec: OpSpec,
    shapes: dict[str, tuple[int, ...]],
    attributes: dict[str, Any],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    model = write_model(tmp_path / "model.onnx", spec, shapes, attributes)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, feeds)
    backend = TensorRTBackend()
    engine = backend.build(model, tmp_path, BuildOptions("fp32", "cuda", {"aot": aot}))
    with backend.open(engine) as runner:
        outputs = runner.run(feeds)
    for parameter, want in zip(spec.outputs, expected, strict=True):
        np.testing.assert_allclose(outputs[parameter.name], want, rtol=TOLERANCE, atol=TOLERANCE)
    if aot == "true":
        subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, str(engine.path)], check=True)
