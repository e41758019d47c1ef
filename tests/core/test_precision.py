"""FP16 and INT8 as graph transformations, and the histograms behind INT8, on a small convolutional network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import flops, graph, precision
from optframe.accuracy import compare_outputs
from optframe.errors import InputError
from optframe_trt.calibrators import MinMaxCalibrator

Arrays = dict[str, np.ndarray[Any, Any]]


def build(rng: np.random.Generator, *, gain: float = 1.0) -> ir.Model:
    """Return Conv-Relu-Conv with a residual Add, mean over the image, LayerNormalization, MatMul, Add, Softmax."""

    def weight(name: str, *shape: int, scale: float = 1.0) -> ir.Value:
        array = scale * rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        value = ir.val(name, ir.DataType.FLOAT, shape)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        return value

    x = ir.val("x", ir.DataType.FLOAT, (1, 16, 14, 10))
    w1, b1, w2, b2 = (
        weight("w1", 16, 16, 3, 3, scale=gain),
        weight("b1", 16),
        weight("w2", 16, 16, 1, 1),
        weight("b2", 16),
    )
    scale, bias, matrix, shift = weight("s", 16), weight("t", 16), weight("m", 16, 7), weight("c", 7)
    axes = ir.val("axes", ir.DataType.INT64, (2,))
    axes.const_value = ir.tensor(np.array([2, 3], np.int64), name="axes")
    conv1 = ir.node("Conv", [x, w1, b1], {"pads": [1, 1, 1, 1]}, name="conv1")
    relu = ir.node("Relu", conv1.outputs, name="relu")
    conv2 = ir.node("Conv", [relu.outputs[0], w2, b2], name="conv2")
    add = ir.node("Add", [conv2.outputs[0], x], name="residual")
    mean = ir.node("ReduceMean", [add.outputs[0], axes], {"keepdims": 0}, name="mean")
    norm = ir.node("LayerNormalization", [mean.outputs[0], scale, bias], name="norm")
    product = ir.node("MatMul", [norm.outputs[0], matrix], name="product")
    shifted = ir.node("Add", [product.outputs[0], shift], name="shifted")
    softmax = ir.node("Softmax", shifted.outputs, name="softmax")
    nodes = [conv1, relu, conv2, add, mean, norm, product, shifted, softmax]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
    y = softmax.outputs[0]
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape((1, 7))
    weights = [w1, b1, w2, b2, scale, bias, matrix, shift, axes]
    return ir.Model(
        ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="net"), ir_version=10
    )


def run(model: ir.Model, feeds: Arrays) -> Arrays:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def images(rng: np.random.Generator, count: int) -> list[Arrays]:
    return [{"x": rng.standard_normal((1, 16, 14, 10)).astype(np.float32)} for _ in range(count)]


def weight_type(model: ir.Model, name: str) -> ir.DataType | None:
    """Return the dtype of the weight that node `name` reads."""
    [node] = [node for node in model.graph if node.name == name]
    assert node.inputs[1] is not None
    return node.inputs[1].dtype


def error(model: ir.Model, converted: ir.Model, samples: list[Arrays]) -> float:
    expected = [run(model, sample) for sample in samples]
    found = compare_outputs(run(converted, samples[0]), expected[0], expected[1])["softmax_out"].err_over_response
    assert found is not None
    return found


def test_fp16_keeps_the_interface_and_stores_half_the_weights(rng: np.random.Generator) -> None:
    model = build(rng)
    before = graph.fingerprint(model)
    half = precision.to_fp16(model)
    assert graph.fingerprint(model) == before  # a new model is returned
    assert [value.dtype for value in (*half.graph.inputs, *half.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert weight_type(half, "conv1") == ir.DataType.FLOAT16
    assert graph.weight_bytes(half) < 0.6 * graph.weight_bytes(model)
    # FP16 keeps 11 bits, about 5e-4 of each value, in nine nodes; where the means of all channels are nearly equal, the
    # normalisation enlarges that against what another sample changes
    assert 0 < error(model, half, images(rng, 2)) < 0.2


def test_fp16_never_multiplies_mixed_types(rng: np.random.Generator) -> None:
    for node in precision.to_fp16(build(rng)).graph:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Add"):
            assert len({value.dtype for value in node.inputs if value is not None}) == 1, node.name


def test_fp16_leaves_a_weight_it_cannot_hold_in_fp32_and_says_so(rng: np.random.Generator) -> None:
    heard: list[str] = []
    half = precision.to_fp16(build(rng, gain=3e6), warn=heard.append)
    assert weight_type(half, "conv1") == ir.DataType.FLOAT
    assert any("conv1" in line for line in heard)
    small = {"x": 1e-5 * images(rng, 1)[0]["x"]}  # so that activations, unlike the weight, are in reach of FP16
    out = run(half, small)["softmax_out"]
    assert np.isfinite(out).all()


def test_fp16_keeps_named_nodes(rng: np.random.Generator) -> None:
    half = precision.to_fp16(build(rng), keep=["conv2"])
    assert weight_type(half, "conv2") == ir.DataType.FLOAT
    assert weight_type(half, "conv1") == ir.DataType.FLOAT16


def test_int8_is_symmetric_per_channel_with_float_biases(rng: np.random.Generator) -> None:
    model = build(rng)
    ranges = precision.calibrate(model, images(rng, 4), MinMaxCalibrator())
    quantized = precision.quantize(model, ranges)
    constants = {v.name: v.const_value for v in quantized.graph.initializers.values()}
    seen: list[str] = []
    for node in quantized.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants.get(node.inputs[2].name) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        assert zero is None or not zero.numpy().any()
        seen += [str(value.name) for value in node.inputs[1:] if value is not None]
    for conv in (node for node in quantized.graph if node.op_type == "Conv"):
        dequantize = conv.inputs[1].producer() if conv.inputs[1] is not None else None
        assert dequantize is not None
        assert constants[dequantize.inputs[1].name].numpy().shape == (16,)  # a scale for each output channel
        assert conv.inputs[2] is not None
        assert conv.inputs[2].dtype == ir.DataType.FLOAT
    share = flops.int8_fractions(quantized)
    assert share.convolutions == 1.0
    # 8 bits keep 1/254 of the range, three products and a mean over 140 positions
    assert error(model, quantized, images(rng, 2)) < 0.2


def test_each_consumer_of_a_constant_has_its_own(rng: np.random.Generator) -> None:
    model = build(rng)
    quantized = precision.quantize(model, precision.calibrate(model, images(rng, 2), MinMaxCalibrator()))
    scales = [node.inputs[1] for node in quantized.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len({value.name for value in scales if value is not None}) == len(scales)
    names = [node.name for node in quantized.graph]
    assert len(set(names)) == len(names)


def test_int8_leaves_kept_nodes_alone(rng: np.random.Generator) -> None:
    model = build(rng)
    ranges = precision.calibrate(model, images(rng, 2), MinMaxCalibrator())
    quantized = precision.quantize(model, ranges, keep=["conv1"])
    [conv1] = [node for node in quantized.graph if node.name == "conv1"]
    assert conv1.inputs[1] is not None
    assert conv1.inputs[1].is_initializer()
    assert flops.int8_fractions(quantized).convolutions == pytest.approx(1 / 10, abs=0.01)  # 1x1 beside 3x3 kernels


def test_int8_without_data_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="needs data"):
        precision.calibrate(build(rng), [], MinMaxCalibrator())


def test_a_sample_with_nan_is_named(rng: np.random.Generator) -> None:
    bad = images(rng, 1)[0]
    bad["x"][0, 3, 2, 1] = np.nan
    with pytest.raises(InputError, match=r"NaN"):
        precision.calibrate(build(rng), [bad], MinMaxCalibrator())


def test_ranges_come_back_from_their_file_and_refuse_another_model(rng: np.random.Generator, tmp_path: Path) -> None:
    model = build(rng)
    ranges = precision.calibrate(model, images(rng, 2), MinMaxCalibrator())
    ranges.save(tmp_path / "ranges.json")
    back = precision.load_ranges(tmp_path / "ranges.json")
    assert back.tensors == ranges.tensors
    with pytest.raises(InputError):
        precision.quantize(build(np.random.default_rng(99)), back)
    (tmp_path / "ranges.json").write_text("{}")
    with pytest.raises(InputError):
        precision.load_ranges(tmp_path / "ranges.json")


def chunks(rng: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    for scale in (0.01, 3.0, 0.5, 40.0):
        yield (scale * rng.standard_normal(5000)).astype(np.float32)


def test_a_histogram_counts_exactly_whatever_the_order(rng: np.random.Generator) -> None:
    arrays = list(chunks(rng))
    forward, backward = precision.Histogram(), precision.Histogram()
    for array in arrays:
        forward.add(array)
    for array in reversed(arrays):
        backward.add(array)
    values = np.abs(np.concatenate(arrays))
    expected, _ = np.histogram(values, bins=len(forward.counts), range=(0, forward.limit))
    np.testing.assert_array_equal(forward.counts, expected)
    np.testing.assert_array_equal(backward.counts, expected)
    assert forward.maximum == values.max()
