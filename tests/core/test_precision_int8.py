"""Where Q/DQ goes, what the quantised weights and biases are, and that equalised channels compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import flops, graph
from optframe.errors import InputError
from optframe.precision import Ranges, TensorRange, calibrate, quantize
from optframe.precision.equalization import channel_groups, equalize, factors
from optframe.precision.placement import place
from optframe.shapes import inferred
from optframe.testing import model_from_text
from optframe_trt.calibrators import MinMaxCalibrator

Array = np.ndarray[Any, Any]

STEPS = 127


def run(model: ir.Model, *, optimise: bool = True, **feeds: Array) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def f32(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def producer_op(value: ir.Value | None) -> str:
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else ""


def scale_of(value: ir.Value | None) -> Array:
    """Return the scale of the DequantizeLinear that makes `value`."""
    assert value is not None
    dequantize = value.producer()
    assert dequantize is not None
    scale = graph.constant(dequantize.inputs[1])
    assert scale is not None
    return scale


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def quantized(model: ir.Model, samples: Sequence[dict[str, Array]], **options: Any) -> ir.Model:
    before = graph.fingerprint(model)
    scope = {"scope": options["scope"]} if "scope" in options else {}
    result = quantize(model, calibrate(model, samples, MinMaxCalibrator(), **scope), **options)
    assert graph.fingerprint(model) == before
    return result


BOTTLENECKS = """g (float[1,8,12,9] x, float[8,8,1,1] w0, float[8,8,3,3] w1, float[8] b1, float[16,8,1,1] w2,
                    float[16,8,1,1] w3, float[8,16,1,1] w4, float[16,8,1,1] w5, float[8,16,1,1] w6, float[4,8,1,1] w7)
              => (float[1,4,4,3] y) {
    a0 = Conv(x, w0)
    a1 = Relu(a0)
    p = MaxPool<kernel_shape = [2,2], strides = [3,3]>(a1)
    c1 = Conv<pads = [1,1,1,1]>(p, w1, b1)
    r1 = Relu(c1)
    main1 = Conv(r1, w2)
    short = Conv(p, w3)
    s1 = Add(main1, short)
    out1 = Relu(s1)
    c4 = Conv(out1, w4)
    r4 = Relu(c4)
    main2 = Conv(r4, w5)
    s2 = Add(main2, out1)
    out2 = Relu(s2)
    c6 = Conv(out2, w6)
    y = Conv(c6, w7)
}"""


def bottlenecks(rng: np.random.Generator) -> ir.Model:
    shapes = {"w0": (8, 8, 1, 1), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (16, 8, 1, 1), "w3": (16, 8, 1, 1)}
    shapes |= {"w4": (8, 16, 1, 1), "w5": (16, 8, 1, 1), "w6": (8, 16, 1, 1), "w7": (4, 8, 1, 1)}
    return model_from_text(BOTTLENECKS, **{name: uneven(rng, shape) for name, shape in shapes.items()})


def uneven(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return weights that keep activations near 1, with channels of different ranges, as trained networks have them."""
    gains = np.exp(0.7 * f32(rng, shape[0])) / np.sqrt(np.prod(shape[1:]))
    return f32(rng, *shape) * gains.reshape(-1, *(1,) * (len(shape) - 1)).astype(np.float32)


def images(rng: np.random.Generator, count: int = 4) -> list[dict[str, Array]]:
    return [{"x": f32(rng, 1, 8, 12, 9)} for _ in range(count)]


def test_residual_sums_and_pooling_are_quantised_with_shared_scales(rng: np.random.Generator) -> None:
    result = quantized(bottlenecks(rng), images(rng))
    first, second = nodes(result, "Add")
    # of either sum one side is a convolution that TensorRT fuses with it, the other is the quantised shortcut
    for add in (first, second):
        assert sorted(map(producer_op, add.inputs)) == ["Conv", "DequantizeLinear"]
    # the identity shortcut is the very tensor that the next convolution reads
    assert second.inputs[1] in {conv.inputs[0] for conv in nodes(result, "Conv")}
    [pool] = nodes(result, "MaxPool")
    [after] = [node for node in nodes(result, "QuantizeLinear") if node.inputs[0] is pool.outputs[0]]
    before = scale_of(pool.inputs[0])
    assert before == graph.constant(after.inputs[1])
    assert producer_op(nodes(result, "Conv")[-1].inputs[0]) != "DequantizeLinear"  # the last product: a head


def test_concat_shares_one_scale(rng: np.random.Generator) -> None:
    text = """g (float[1,3,6,6] x, float[4,3,1,1] a, float[2,3,1,1] b, float[5,6,1,1] c, float[2,5,1,1] d)
              => (float[1,2,6,6] y) {
        p = Conv(x, a)
        q = Conv(x, b)
        pq = Concat<axis = 1>(p, q)
        r = Conv(pq, c)
        y = Conv(r, d)
    }"""
    shapes = {"a": (4, 3, 1, 1), "b": (2, 3, 1, 1), "c": (5, 6, 1, 1), "d": (2, 5, 1, 1)}
    model = model_from_text(text, **{name: f32(rng, *shape) for name, shape in shapes.items()})
    samples = [{"x": f32(rng, 1, 3, 6, 6)} for _ in range(2)]
    result = quantized(model, samples)
    [concat] = nodes(result, "Concat")
    [after] = [node for node in nodes(result, "QuantizeLinear") if node.inputs[0] is concat.outputs[0]]
    scales = {float(scale_of(value)) for value in concat.inputs} | {float(graph.constant(after.inputs[1]))}  # type: ignore[arg-type]
    largest = max(float(np.abs(run(model_with_output(model, "pq"), **sample)[-1]).max()) for sample in samples)
    assert scales == {np.float32(largest) / np.float32(STEPS)}


def model_with_output(model: ir.Model, name: str) -> ir.Model:
    copy = inferred(model)
    copy.graph.outputs.append(next(v for node in copy.graph for v in node.outputs if v.name == name))
    return copy


ATTENTION = """g (float[1,6,16] x, float[16,16] q, float[16,16] k, float[16,16] v, float[16,16] o, float[16,64] up,
                  float[64] ub, float[64,16] down, float[16] gamma, float[16,5] head) => (float[1,6,5] y) {
    eight = Constant<value_float = 0.25>()
    qx = MatMul(x, q)
    qs = Mul(qx, eight)
    kx = MatMul(x, k)
    kt = Transpose<perm = [0,2,1]>(kx)
    scores = MatMul(qs, kt)
    p = Softmax(scores)
    vx = MatMul(x, v)
    mixed = MatMul(p, vx)
    out = MatMul(mixed, o)
    r = Add(out, x)
    n = LayerNormalization(r, gamma)
    u = MatMul(n, up)
    ubias = Add(u, ub)
    a = Relu(ubias)
    d = MatMul(a, down)
    r2 = Add(d, n)
    n2 = LayerNormalization(r2, gamma)
    y = MatMul(n2, head)
}"""


def transformer(rng: np.random.Generator) -> ir.Model:
    shapes = dict.fromkeys("qkvo", (16, 16)) | {"up": (16, 64), "ub": (64,), "down": (64, 16), "gamma": (16,)}
    return model_from_text(ATTENTION, **{n: f32(rng, *s) / 4 for n, s in (shapes | {"head": (16, 5)}).items()})


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("default", {"up", "down"}),
        ("linear", {"q", "k", "v", "o", "up", "down", "head"}),
        ("all", {"q", "k", "v", "o", "up", "down", "head", "scores", "mixed"}),
    ],
)
def test_the_scope_decides_on_projections_heads_and_products(
    scope: Any, expected: set[str], rng: np.random.Generator
) -> None:
    model = transformer(rng)
    placement = place(inferred(model), scope)
    found = {node.inputs[1].name if node.inputs[1].const_value else node.outputs[0].name for node in placement.products}  # type: ignore[union-attr]
    assert found == expected
    samples = [{"x": f32(rng, 1, 6, 16)} for _ in range(3)]
    result = quantized(model, samples, scope=scope)
    for norm in nodes(result, "LayerNormalization"):
        assert producer_op(norm.inputs[0]) == "Add"
    for add in nodes(result, "Add"):  # sums before a normalisation stay as they are
        assert "DequantizeLinear" not in map(producer_op, add.inputs)
    (expected_y,), (found_y,) = run(model, **samples[0]), run(result, **samples[0])
    assert 0 < np.abs(found_y - expected_y).max() < 0.25 * expected_y.std()  # 8 bits in up to nine products


def test_positions_and_what_is_constant_stay(rng: np.random.Generator) -> None:
    text = """g (float[4,8] x, float[4,8] place, float[8,8] a, float[8,8] b, float[8,8] c) => (float[4,8] y) {
        wave = Sin(place)
        p1 = MatMul(wave, a)
        p2 = Relu(p1)
        p3 = MatMul(p2, b)
        sum = Add(x, p3)
        h = MatMul(sum, c)
        r = Relu(h)
        y = MatMul(r, a)
    }"""
    model = inferred(model_from_text(text, **{name: f32(rng, 8, 8) for name in "abc"}))
    assert [node.inputs[1].name for node in place(model).products] == ["c"]  # type: ignore[union-attr]


def test_small_linear_layers_behind_the_last_norm_are_a_head(rng: np.random.Generator) -> None:
    text = """g (float[1,512,64] x, float[64,512] up, float[512,64] down, float[64] gamma, float[64,8] h1,
                      float[8,4] h2) => (float[1,512,4] y, float[1,512,64] z) {
        u = MatMul(x, up)
        a = Relu(u)
        d = MatMul(a, down)
        z = LayerNormalization(d, gamma)
        e = MatMul(z, h1)
        f = Relu(e)
        y = MatMul(f, h2)
    }"""
    shapes = {"up": (64, 512), "down": (512, 64), "gamma": (64,), "h1": (64, 8), "h2": (8, 4)}
    model = inferred(model_from_text(text, **{name: f32(rng, *shape) for name, shape in shapes.items()}))
    assert [node.inputs[1].name for node in place(model).products] == ["up", "down"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("rows", "placed"), [(512, "up down"), (5, "s1 s2 up down")])
def test_the_smallest_linear_layers_stay_out_where_they_are_negligible_together(
    rows: int, placed: str, rng: np.random.Generator
) -> None:
    """With 5 rows each of s1 and s2 has 1.2 % of all FLOPs, but both have more than the 2 % of what is negligible."""
    text = f"""g (float[1,{rows},64] x, float[1,1,64] z, float[64,64] s1, float[64,64] s2, float[64,512] up,
                      float[512,64] down, float[64,8] head) => (float[1,{rows},8] y) {{
        a = MatMul(z, s1)
        b = Relu(a)
        c = MatMul(b, s2)
        d = Add(x, c)
        e = MatMul(d, up)
        f = Relu(e)
        g = MatMul(f, down)
        h = Relu(g)
        y = MatMul(h, head)
    }}"""
    shapes = {"s1": (64, 64), "s2": (64, 64), "up": (64, 512), "down": (512, 64), "head": (64, 8)}
    model = inferred(model_from_text(text, **{name: f32(rng, *shape) for name, shape in shapes.items()}))
    names = [node.inputs[1].name for node in place(model).products]  # type: ignore[union-attr]
    assert names == placed.split()
    assert len(place(model, "linear").products) == 5


LAYERS = {
    "Conv": ("y1 = Conv<group = 2>(x, w, b)", (6, 2, 3, 3), 0),
    "ConvTranspose": ("y1 = ConvTranspose(x, w, b)", (4, 6, 3, 3), 1),
    "Gemm": ("f = Flatten(x) y1 = Gemm(f, w, b)", (4 * 64, 6), 1),
    "Gemm, transposed": ("f = Flatten(x) y1 = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(f, w, b)", (6, 4 * 64), 0),
    "MatMul": ("f = Flatten(x) m = MatMul(f, w) y1 = Add(b, m)", (4 * 64, 6), 1),
}


def layer(kind: str, rng: np.random.Generator) -> tuple[ir.Model, int]:
    """Return a model with the layer, and another product behind it, so that the first is no head."""
    body, shape, axis = LAYERS[kind]
    rank = 2 if "Flatten" in body else 4
    behind = "float[6,3] v" if rank == 2 else "float[3,6,1,1] v"
    last = "MatMul(y2, v)" if rank == 2 else "Conv(y2, v)"
    outputs = "float[1,3] y, float[1,6] y1" if rank == 2 else "float[1,3,h,w] y, float[1,6,h,w] y1"
    dims = ",".join(map(str, shape))
    inputs = f"float[1,4,8,8] x, float[{dims}] w, float[6] b, {behind}"
    text = f"g ({inputs}) => ({outputs}) {{ {body} y2 = Relu(y1) y = {last} }}"
    gains = np.exp(2 * f32(rng, shape[axis]))  # a scale for each channel has to cope with a factor of 1000 between them
    weight = f32(rng, *shape) * np.expand_dims(gains, tuple(i for i in range(len(shape)) if i != axis))
    return model_from_text(text, w=weight, b=f32(rng, 6), v=f32(rng, *((6, 3) if rank == 2 else (3, 6, 1, 1)))), axis


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_rounded_per_output_channel(kind: str, rng: np.random.Generator) -> None:
    model, axis = layer(kind, rng)
    samples = [{"x": f32(rng, 1, 4, 8, 8)} for _ in range(2)]
    result = quantized(model, samples)
    [node] = [
        node for node in result.graph if node.op_type == kind.split(",")[0] and node.outputs[0].name in ("y1", "m")
    ]
    assert node.inputs[1] is not None
    dequantize = node.inputs[1].producer()
    assert dequantize is not None
    levels, scale = (graph.constant(value) for value in dequantize.inputs[:2])
    assert levels is not None
    assert scale is not None
    assert dequantize.attributes["axis"].as_int() == axis
    others = tuple(i for i in range(levels.ndim) if i != axis)
    weight = graph.constant(model.graph.initializers["w"])
    assert weight is not None
    np.testing.assert_array_equal(np.abs(levels.astype(int)).max(axis=others), STEPS)  # every channel uses its range
    # rounding is off by half a step at most, and by the last bit of float32
    assert (np.abs(levels * np.expand_dims(scale, others) - weight) <= 0.5001 * np.expand_dims(scale, others)).all()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "ConvTranspose"])
def test_biases_take_up_the_mean_error_of_the_weights(kind: str, rng: np.random.Generator) -> None:
    model, _ = layer(kind, rng)
    # Inputs with a large mean, so that errors of weights shift outputs the same way, and which rounding leaves alone.
    samples = [{"x": rng.integers(120, STEPS, (1, 4, 8, 8), endpoint=True).astype(np.float32)} for _ in range(4)]
    samples[0]["x"][0, 0, 0, 0] = STEPS
    ranges = calibrate(model, samples, MinMaxCalibrator())
    without = Ranges(**{**vars(ranges), "tensors": {n: TensorRange(t.threshold) for n, t in ranges.tensors.items()}})
    shifts = []
    for chosen in (ranges, without):
        result = quantize(model, chosen)
        differences = [run(result, **s)[1].astype(np.float64) - run(model, **s)[1] for s in samples]
        mean = np.mean(differences, axis=(0, *range(2, differences[0].ndim)))
        spread = np.std([run(model, **s)[1] for s in samples])
        shifts.append(np.abs(mean).max() / spread)
    assert shifts[0] < 0.5 * shifts[1]


def test_a_convolution_computes_what_its_integers_say(rng: np.random.Generator) -> None:
    model = bottlenecks(rng)
    samples = images(rng, 2)
    result = model_with_output(quantized(model, samples), "a0")
    conv = nodes(result, "Conv")[0]
    weight = graph.constant(conv.inputs[1].producer().inputs[0])  # type: ignore[union-attr]
    bias = graph.constant(conv.inputs[2])
    x_scale, w_scale = (scale_of(value).astype(np.float64) for value in conv.inputs[:2])
    x = samples[0]["x"].astype(np.float64)
    integers = np.clip(np.rint(x / x_scale), -STEPS, STEPS)
    products = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0].astype(np.float64), integers)  # type: ignore[index]
    expected = products * x_scale * w_scale[:, None, None] + bias[:, None, None]  # type: ignore[index]
    found = run(result, x=samples[0]["x"])[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())  # sums in float32


@pytest.mark.parametrize("opset", [18, 19])
def test_int8_over_fp16_has_no_float32_products(opset: int, rng: np.random.Generator) -> None:
    text = BOTTLENECKS
    model = bottlenecks(rng)
    model = model_from_text(text, opset, **{name: graph.constant(v) for name, v in model.graph.initializers.items()})  # type: ignore[arg-type]
    samples = images(rng)
    result = quantized(model, samples, base="fp16")
    assert graph.opset(result) == 19
    for node in nodes(result, "Conv"):
        assert {value.dtype for value in node.inputs if value is not None} == {ir.DataType.FLOAT16}
    scales = [graph.constant(node.inputs[1]) for node in nodes(result, "DequantizeLinear")]
    assert all((scale >= np.finfo(np.float16).tiny).all() for scale in scales if scale is not None)
    # onnxruntime's WeightBiasQuantization gives biases the product of two scales, in FP16: it underflows
    over_fp32 = quantized(model, samples)
    assert flops.int8_fractions(result) == flops.int8_fractions(over_fp32)
    (expected,), (found,) = (run(each, optimise=False, **samples[0]) for each in (over_fp32, result))
    # The integers are the same, but for those that FP16 rounds over the border of a step: one step of 127 here and
    # there in each of six layers, 1 % of the response as a rule and 4 % at most in three hundred draws.
    assert rms(found - expected) < 0.1 * rms(expected)


def test_int8_over_fp16_needs_a_lifted_model(rng: np.random.Generator) -> None:
    constants = {name: graph.constant(v) for name, v in bottlenecks(rng).graph.initializers.items()}
    with pytest.raises(InputError, match="needs opset 18 or later, the model has 17"):
        quantized(model_from_text(BOTTLENECKS, 17, **constants), images(rng, 1), base="fp16")  # type: ignore[arg-type]


def test_a_model_without_products_is_left_alone(rng: np.random.Generator) -> None:
    model = model_from_text("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    heard: list[str] = []
    result = quantize(model, calibrate(model, [{"x": f32(rng, 2, 3)}], MinMaxCalibrator()), warn=heard.append)
    assert [node.op_type for node in result.graph] == ["Relu"]
    assert heard


def test_ranges_of_another_scope_are_refused(rng: np.random.Generator) -> None:
    model = transformer(rng)
    ranges = calibrate(model, [{"x": f32(rng, 1, 6, 16)}], MinMaxCalibrator())
    with pytest.raises(InputError, match="lack tensor"):
        quantize(model, ranges, scope="all")
    with pytest.raises(InputError, match="did you mean 'linear'"):
        quantize(model, ranges, scope="liner")  # type: ignore[arg-type]


def test_tied_channels_are_found(rng: np.random.Generator) -> None:
    groups = {group.name: [v.name for v in group.values] for group in channel_groups(inferred(bottlenecks(rng)).graph)}
    assert groups == {
        "a0": ["a0", "a1", "p"],
        "c1": ["c1", "r1"],
        "main1": ["main1", "short", "s1", "out1", "main2", "s2", "out2"],
        "c4": ["c4", "r4"],
        "c6": ["c6"],
    }


def test_equalised_channels_compute_the_same(rng: np.random.Generator) -> None:
    model = inferred(bottlenecks(rng))
    result = model.clone()
    sizes = {"a0": 8, "c1": 8, "main1": 16, "c4": 8}
    equalize(result, {name: tuple(np.exp(f32(rng, size)).tolist()) for name, size in sizes.items()})
    x = images(rng, 1)[0]["x"]
    inner, equalised = (run(model_with_output(m, "out1"), x=x)[-1] for m in (model, result))
    assert np.abs(inner - equalised).max() > 0.1 * inner.max()  # something was scaled
    expected, found = run(model, x=x)[0], run(result, x=x)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # re-ordered roundings


def test_grouped_convolutions_are_equalised_too(rng: np.random.Generator) -> None:
    text = """g (float[1,3,5,5] x, float[8,3,1,1] a, float[8] ab, float[8,1,3,3] depthwise, float[12,4,1,1] grouped,
                  float[2,12,1,1] d) => (float[1,2,5,5] y) {
        h = Conv(x, a, ab)
        k = LeakyRelu(h)
        m = Conv<group = 8, pads = [1,1,1,1]>(k, depthwise)
        n = Conv<group = 2>(m, grouped)
        y = Conv(n, d)
    }"""
    shapes = {"a": (8, 3, 1, 1), "ab": (8,), "depthwise": (8, 1, 3, 3), "grouped": (12, 4, 1, 1), "d": (2, 12, 1, 1)}
    model = inferred(model_from_text(text, **{name: f32(rng, *shape) for name, shape in shapes.items()}))
    result = model.clone()
    equalize(result, {n: tuple(np.exp(f32(rng, size)).tolist()) for n, size in (("h", 8), ("m", 8), ("n", 12))})
    x = f32(rng, 1, 3, 5, 5)
    (expected,), (found,) = run(model, x=x), run(result, x=x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "reader",
    ["z = Sigmoid(h)", "z = InstanceNormalization(h, s, s)", "z = Identity(h)", "z = Mul(h, k)"],
)
def test_channels_that_something_else_reads_are_not_scaled(reader: str, rng: np.random.Generator) -> None:
    text = f"""g (float[1,3,5,5] x, float[4,3,1,1] a, float[2,4,1,1] b, float[4] s, float[4,1,1] k)
               => (float[1,2,5,5] y, float[1,4,5,5] z) {{ h = Conv(x, a) y = Conv(h, b) {reader} }}"""
    shapes = {"a": (4, 3, 1, 1), "b": (2, 4, 1, 1), "s": (4,), "k": (4, 1, 1)}
    model = inferred(model_from_text(text, **{name: f32(rng, *shape) for name, shape in shapes.items()}))
    assert channel_groups(model.graph) == []


def test_factors_balance_activations_and_weights() -> None:
    inputs = "float[1,2,1,1] x, float[2,2,1,1] a, float[1,2,1,1] b"
    text = f"g ({inputs}) => (float[1,1,1,1] y) {{ h = Conv(x, a) y = Conv(h, b) }}"
    weights = {"a": np.ones((2, 2, 1, 1), np.float32), "b": np.array([1, 4], np.float32).reshape(1, 2, 1, 1)}
    [group] = channel_groups(inferred(model_from_text(text, **weights)).graph)
    # roots of (1, 0.25) over (0.25, 1) are (2, 0.5), of mean 1
    assert factors(group, [np.array([8.0, 2.0])]) == pytest.approx((2.0, 0.5))
    assert factors(group, [np.zeros(2)]) == pytest.approx((2**0.5, 2**-0.5))  # idle: weights alone
