"""Edges of the plugin ops' functions: empty inputs, NaN and infinite rows, large offsets, masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from optframe import ops
from optframe.errors import InputError
from optframe.types import OpSpec, TensorInfo
from optframe_anchordetr.ops import LAYER_NORM, MINIMUM_OPSET, OPS, RCDA, SKIP_LAYER_NORM

Array = np.ndarray[Any, Any]


def model_of(
    spec: OpSpec, arrays: Sequence[Array | None], opset: int = 18, **attributes: float | int
) -> onnx.ModelProto:
    """A model of one call with dynamic shapes; inputs and outputs are named as the op's."""
    values = [
        None
        if array is None
        else ir.Value(
            name=parameter.name,
            shape=ir.Shape([None] * array.ndim),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for parameter, array in zip(spec.inputs, arrays, strict=False)
    ]
    inputs = [value for value in values if value is not None]
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="call"), ir_version=8)
    node = ops.call(model, spec, values, attributes)
    for parameter, output in zip(spec.outputs, node.outputs, strict=True):
        output.name, output.type, output.shape = parameter.name, inputs[0].type, inputs[0].shape
    model.graph.append(node)
    model.graph.outputs.extend(node.outputs)
    return ir.to_proto(model)


def run(
    spec: OpSpec, arrays: Sequence[Array | None], opset: int = 18, optimized: bool = True, **attributes: float | int
) -> list[Array]:
    proto = model_of(spec, arrays, opset, **attributes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [parameter.name for parameter in spec.inputs]
    return session.run(None, {n: a for n, a in zip(names, arrays, strict=False) if a is not None})


def layer_norm64(x: Array, epsilon: float) -> Array:
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


OPSETS = [15, 17, 18]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (1, 1), (1,), (5, 1), (2, 3, 257)])
def test_layer_norm_of_odd_shapes(opset: int, affine: bool, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    scale, bias = (rng.standard_normal(shape[-1:]).astype(np.float32) for _ in range(2))
    (y,) = run(LAYER_NORM, [x, scale, bias] if affine else [x], opset, epsilon=1e-3)
    expected = layer_norm64(x, 1e-3) * (scale if affine else 1) + (bias if affine else 0)
    assert y.shape == shape
    # One column: x - mean is exactly 0. Else some ten float32 roundings of values up to 20.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_layer_norm_of_large_offsets(opset: int, offset: float, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((64, 256)) + offset).astype(np.float32)
    scale, bias = np.ones(256, np.float32), np.zeros(256, np.float32)
    (y,) = run(LAYER_NORM, [x, scale, bias], opset)
    # The mean of values near `offset` is off by a few of their roundings, which deviations of about 1 then show; a
    # variance from the mean of squares would be off by offset^2 of them instead.
    np.testing.assert_allclose(y, layer_norm64(x, 1e-5), rtol=0, atol=1e-5 + 4 * 2.0**-24 * offset)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_stays_alone(opset: int, bad: float, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 32)).astype(np.float32)
    good = layer_norm64(x, 1e-5)
    x[2, 5] = bad
    (y,) = run(LAYER_NORM, [x, np.ones(32, np.float32)], opset)
    assert np.isnan(y[2]).all()
    np.testing.assert_allclose(np.delete(y, 2, 0), np.delete(good, 2, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", OPSETS)
def test_float16_statistics_do_not_overflow(opset: int, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((8, 64)) * 8000).astype(np.float16)  # squares are far beyond float16's 65504
    (y,) = run(LAYER_NORM, [x, np.ones(64, np.float16), np.zeros(64, np.float16)], opset)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, layer_norm64(x, 1e-5), rtol=2.0**-10, atol=2.0**-10)


def test_float16_sum_is_rounded_before_it_is_normalised() -> None:
    x, skip = np.float16([[2048, 1, -1, 0]]), np.float16([[1, 0, 0, 0]])  # 2049 is no float16
    y, total = run(SKIP_LAYER_NORM, [x, skip, np.ones(4, np.float16), np.zeros(4, np.float16)])
    assert total.tolist() == [[2048, 1, -1, 0]]
    np.testing.assert_allclose(y, layer_norm64(total, 1e-5), rtol=2.0**-10, atol=2.0**-10)


def test_layer_norm_with_a_bias_but_no_scale(rng: np.random.Generator) -> None:
    x, bias = rng.standard_normal((3, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    (y,) = run(LAYER_NORM, [x, None, bias])
    np.testing.assert_allclose(y, layer_norm64(x, 1e-5) + bias, rtol=0, atol=1e-5)


def rcda_inputs(rng: np.random.Generator, n: int, queries: int, h: int, w: int, c: int) -> list[Array]:
    shapes = [(n, queries, c), (n, queries, c), (n, w, c), (n, h, c), (n, h, w, c)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def rcda64(arrays: Sequence[Array | None], heads: int) -> Array:
    """By the definition, one query, head and cell at a time in effect: an explicit weight for every cell."""
    q_row, q_col, k_row, k_col, v, *masks = [None if a is None else a.astype(np.float64) for a in arrays]
    assert q_row is not None
    assert q_col is not None
    assert k_row is not None
    assert k_col is not None
    assert v is not None
    row_mask, column_mask = [*masks, None, None][:2]
    out = np.zeros_like(q_row)
    size = q_row.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = []
        for q, k, mask in ((q_row, k_row, row_mask), (q_col, k_col, column_mask)):
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1)
            scores = scores if mask is None else np.where(mask[:, None] > 0, -np.inf, scores)
            exponentials = np.exp(scores - scores.max(-1, keepdims=True))
            weights.append(exponentials / exponentials.sum(-1, keepdims=True))
        cells = weights[1][:, :, :, None] * weights[0][:, :, None, :]  # (N, L, h, w)
        for image, weight in enumerate(cells):
            out[image, :, part] = np.tensordot(weight, v[image, ..., part], ((1, 2), (0, 1)))
    return out


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    "sizes", [(1, 7, 5, 9, 2), (2, 3, 9, 5, 4), (1, 1, 1, 1, 1), (3, 4, 1, 6, 1), (1, 4, 6, 1, 2)], ids=str
)
@pytest.mark.parametrize("masked", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_rcda_by_its_definition(
    opset: int, sizes: tuple[int, int, int, int, int], masked: tuple[bool, bool], rng: np.random.Generator
) -> None:
    n, queries, h, w, heads = sizes
    arrays: list[Array | None] = [*rcda_inputs(rng, n, queries, h, w, heads * 8)]
    for keys, present in zip((w, h), masked, strict=True):
        mask = rng.random((n, keys)) < 0.4
        mask[:, 0] = False
        arrays.append(mask if present else None)
    (out,) = run(RCDA, arrays, opset, num_heads=heads)
    # Scores of up to about 30 with relative error of 1e-7 each, weights that sum to 1, values up to 4.
    np.testing.assert_allclose(out, rcda64(arrays, heads), rtol=0, atol=3e-5)


@pytest.mark.parametrize("opset", OPSETS)
def test_rcda_of_rows_with_other_axes(opset: int, rng: np.random.Generator) -> None:
    arrays = rcda_inputs(rng, 2, 6, 3, 4, 16)
    shapes = ((12, 16), (12, 16), None, None, (24, 16))
    rows = [array if shape is None else array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]
    (out,) = run(RCDA, rows, opset, num_heads=2)
    np.testing.assert_allclose(out.reshape(2, 6, 16), rcda64(arrays, 2), rtol=0, atol=3e-5)  # as above


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("n", "queries"), [(2, 0), (0, 3)])
def test_rcda_of_no_images_or_queries(opset: int, n: int, queries: int, rng: np.random.Generator) -> None:
    masks = [np.zeros((n, 4), bool), np.zeros((n, 3), bool)]
    # onnxruntime's ReshapeFusion puts -1 for the sizes that the function computes, which an empty tensor cannot have.
    (out,) = run(RCDA, [*rcda_inputs(rng, n, queries, 3, 4, 16), *masks], opset, optimized=False, num_heads=2)
    assert out.shape == (n, queries, 16)


def test_a_query_whose_keys_are_all_masked_is_nan_alone(rng: np.random.Generator) -> None:
    arrays = rcda_inputs(rng, 2, 3, 4, 5, 16)
    mask = np.array([[False] * 5, [True] * 5])
    (out,) = run(RCDA, [*arrays, mask], num_heads=2)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("masked", [False, True])
def test_keys_may_shift_along_the_axis_that_the_op_declares(masked: bool, rng: np.random.Generator) -> None:
    arrays: list[Array | None] = list(rcda_inputs(rng, 2, 5, 3, 4, 8))
    arrays += [rng.random((2, 4)) < 0.3, rng.random((2, 3)) < 0.3] if masked else []
    (expected,) = run(RCDA, arrays, num_heads=2)
    shifted = list(arrays)
    for index, parameter in enumerate(RCDA.inputs):
        if parameter.shift_invariant_axis is not None:
            array = arrays[index]
            assert array is not None
            step = np.take(array, [0], axis=parameter.shift_invariant_axis) + np.float32(0.5)
            shifted[index] = array + step
    assert sum(a is not b for a, b in zip(arrays, shifted, strict=True)) == 2
    (found,) = run(RCDA, shifted, num_heads=2)
    np.testing.assert_allclose(found, expected, atol=2e-5)  # roundings of scores that are some units larger


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_functions_need_opset_15(spec: OpSpec) -> None:
    dtypes = {parameter.name: parameter.dtypes[0] for parameter in spec.inputs}
    with pytest.raises(InputError, match="needs opset 15, the model has 14: lift it first"):
        spec.build_function(MINIMUM_OPSET - 1, dtypes)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_functions_mean_the_same_to_onnx_itself(spec: OpSpec, rng: np.random.Generator) -> None:
    """onnx's own evaluator is slow and plain: it shares no kernels with onnxruntime."""
    if spec is RCDA:
        arrays, attributes = rcda_inputs(rng, 2, 3, 4, 5, 16), {"num_heads": 2}
    else:
        extra = [rng.standard_normal((3, 8)).astype(np.float32)] if spec is SKIP_LAYER_NORM else []
        x, scale, bias = (rng.standard_normal(s).astype(np.float32) for s in ((3, 8), (8,), (8,)))
        arrays, attributes = [x, *extra, scale, bias], {"epsilon": 1e-3}
    feeds = {p.name: a for p, a in zip(spec.inputs, arrays, strict=False)}
    evaluated = ReferenceEvaluator(model_of(spec, arrays, **attributes)).run(None, feeds)
    for ours, theirs in zip(run(spec, arrays, **attributes), evaluated, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # two float32 evaluations of values up to 10


def info(*shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(shape, dtype)


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        (LAYER_NORM, [info()], "x is a scalar"),
        (LAYER_NORM, [info(2, 8), info(4)], "scale or bias is float32[4], but must be float32[8]"),
        (LAYER_NORM, [None], "takes 1 to 3 inputs"),
        (SKIP_LAYER_NORM, [info(2, 8), info(1, 8)], "skip is float32[1, 8]"),
        (SKIP_LAYER_NORM, [info(2, 8), info(2, 8, dtype="float16")], "skip is float16[2, 8]"),
        (RCDA, [info(2, 8)] * 5, "k_row has shape [2, 8], but must be (N, w, C)"),
        (RCDA, [info(1, 2, 8)] * 5, "v has 2 rows an image, which are not 2 keys of k_row times 2 of k_col"),
        (
            RCDA,
            [info(1, 2, 8), info(1, 2, 8), info(1, 4, 8), info(1, 4, 8), info(1, 3, 4, 8)],
            "v has 12 rows an image, which are not 4 keys of k_row times 4 of k_col",
        ),
    ],
)
def test_shape_rules_say_what_is_wrong(spec: OpSpec, inputs: list[TensorInfo | None], message: str) -> None:
    with pytest.raises(InputError) as error:
        spec.infer(inputs, {"num_heads": 2})
    assert message in str(error.value)


@pytest.mark.parametrize("heads", [0, 3, "2"])
def test_heads_must_divide_the_channels(heads: object) -> None:
    inputs = [info(1, 2, 8), info(1, 2, 8), info(1, 4, 8), info(1, 3, 8), info(1, 3, 4, 8)]
    assert RCDA.infer(inputs, {"num_heads": 2}) == (info(1, 2, 8),)
    with pytest.raises(InputError, match="num_heads"):
        RCDA.infer(inputs, {"num_heads": heads})
