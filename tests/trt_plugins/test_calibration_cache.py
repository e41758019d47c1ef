"""TensorRT's calibration cache: text written and read, exchanged with ranges, and what is wrong with bad ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.cli import main
from optframe.errors import InputError
from optframe.precision import calibrate, load_ranges, quantize
from optframe_trt.calibration_cache import CalibrationCache, from_ranges, load_cache, parse, to_ranges
from optframe_trt.calibrators import MinMaxCalibrator

Array = np.ndarray[Any, Any]

WRITTEN_BY_TENSORRT = """TRT-8601-EntropyCalibration2
images: 3caa1b2c
(Unnamed Layer* 3) [Convolution]_output: 3d0102ff
/backbone/conv1/Conv_output_0: 3f800000
odd: name: 00000000
"""


def small(rng: np.random.Generator) -> ir.Model:
    """Return two convolutions with a ReLU between; the second is the head."""
    x = ir.val("x", ir.DataType.FLOAT, (1, 3, 9, 7))
    w, v = (
        ir.val(name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("w", (6, 3, 3, 3)), ("v", (2, 6, 1, 1)))
    )
    first = ir.node("Conv", [x, w], name="first")
    relu = ir.node("Relu", first.outputs, name="relu")
    second = ir.node("Conv", [relu.outputs[0], v], name="second")
    for node in (first, relu, second):
        node.outputs[0].name = f"{node.name}_out"
    y = second.outputs[0]
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape((1, 2, 7, 5))
    made = ir.Graph([x], [y], nodes=[first, relu, second], initializers=[w, v], opset_imports={"": 18}, name="small")
    return ir.Model(made, ir_version=10)


def samples(rng: np.random.Generator, count: int = 3) -> list[dict[str, Array]]:
    return [{"x": rng.standard_normal((1, 3, 9, 7)).astype(np.float32)} for _ in range(count)]


def test_a_file_of_tensorrt_is_read_to_the_bit_and_written_the_same() -> None:
    cache = parse(WRITTEN_BY_TENSORRT)
    assert (cache.version, cache.algorithm) == ("8601", "EntropyCalibration2")
    assert cache.scales["images"] == struct.unpack("!f", bytes.fromhex("3caa1b2c"))[0]
    assert cache.scales["/backbone/conv1/Conv_output_0"] == 1.0
    assert cache.scales["odd: name"] == 0.0
    assert cache.text() == WRITTEN_BY_TENSORRT


def test_every_float_tensor_is_exported_as_it_is(rng: np.random.Generator) -> None:
    model, feeds = small(rng), samples(rng)
    cache = from_ranges(calibrate(model, feeds, MinMaxCalibrator(), everywhere=True), "101303")
    assert cache.text().startswith("TRT-101303-MinMaxCalibration\n")
    assert set(cache.scales) == {"x", "first_out", "relu_out", "second_out"}
    largest = max(float(np.abs(feed["x"]).max()) for feed in feeds)
    assert cache.scales["x"] == pytest.approx(largest / 127, rel=1e-6)  # float64 division of a float32
    assert cache.scales["relu_out"] <= cache.scales["first_out"]


def test_an_exported_cache_quantises_like_ranges_without_equalisation(rng: np.random.Generator, tmp_path: Path) -> None:
    model, feeds = small(rng), samples(rng)
    everywhere = calibrate(model, feeds, MinMaxCalibrator(), everywhere=True)
    path = from_ranges(everywhere).save(tmp_path / "trt.cache")
    warnings: list[str] = []
    ranges = to_ranges(load_cache(path), model, scope="linear", warn=warnings.append)
    assert warnings == []
    assert set(ranges.tensors) == {"x", "relu_out"}
    for name, tensor in ranges.tensors.items():
        assert tensor.threshold == pytest.approx(everywhere.tensors[name].threshold, rel=2**-23)  # float32 in the file
    converted = quantize(model, ranges, scope="linear")
    assert sum(node.op_type == "QuantizeLinear" for node in converted.graph) == 2


def test_ranges_of_equalised_channels_are_refused(rng: np.random.Generator) -> None:
    ranges = calibrate(small(rng), samples(rng), MinMaxCalibrator(), scope="linear")
    assert ranges.equalization
    with pytest.raises(InputError, match="equalised"):
        from_ranges(ranges)


def test_layers_of_tensorrt_are_warned_of_and_lacking_tensors_refused(rng: np.random.Generator) -> None:
    model = small(rng)
    warnings: list[str] = []
    extra = CalibrationCache({"x": 0.1, "relu_out": 0.2, "(Unnamed Layer* 1) [Constant]_output": 0.3})
    to_ranges(extra, model, scope="linear", warn=warnings.append)
    assert len(warnings) == 1
    assert "Unnamed Layer* 1" in warnings[0]
    with pytest.raises(InputError, match=r"lacks relu_out of 2 tensors.*another model"):
        to_ranges(CalibrationCache({"x": 0.1}), model, scope="linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no TensorRT calibration cache"),
        ('{"format": 1}', "no TensorRT calibration cache"),
        ("TRT-8601-EntropyCalibration2\n", "no tensor"),
        (WRITTEN_BY_TENSORRT[:-40], "cut off or damaged in line 4"),
        (WRITTEN_BY_TENSORRT[: WRITTEN_BY_TENSORRT.index("1b2c")], "line 2"),
        (WRITTEN_BY_TENSORRT[: WRITTEN_BY_TENSORRT.index("/conv1")], "line 4"),
        ("TRT-8601-EntropyCalibration2\nx: 7f800000\n", "line 2"),  # infinity
        ("TRT-8601-EntropyCalibration2\nx: bc000000\n", "line 2"),  # negative
        ("TRT-8601-EntropyCalibration2\nx: 0.03\n", "line 2"),
    ],
)
def test_damaged_files_are_told_from_good_ones(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.cache"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_cache(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_cache(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not text"):
        load_cache(tmp_path / "binary")


def test_a_version_that_is_no_number_is_refused(rng: np.random.Generator) -> None:
    ranges = calibrate(small(rng), samples(rng), MinMaxCalibrator(), everywhere=True)
    with pytest.raises(InputError, match=r"not '10\.13'"):
        from_ranges(ranges, "10.13")


def test_the_command_exports_and_imports(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = graph.save(small(rng), tmp_path / "small.onnx")
    np.savez(tmp_path / "in.npz", x=np.stack([sample["x"] for sample in samples(rng)]))
    cache, ranges = tmp_path / "trt.cache", tmp_path / "ranges.json"
    export = ["trt-cache", "export", str(model), "--inputs", str(tmp_path / "in.npz"), "-o", str(cache)]
    assert main(export) == 0
    assert "4 tensors on 3 samples" in capsys.readouterr().out
    assert main(["trt-cache", "import", str(cache), str(model), "-o", str(ranges)]) == 0
    assert load_ranges(ranges).calibrator == "TRT-101303-EntropyCalibration2"
    assert main(["trt-cache", "export", str(model), "-o", str(cache)]) == 2
    assert "either --inputs" in capsys.readouterr().err
