"""What every registered plugin op must keep, without a GPU: function, shape rule and launch rule tell one story."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optframe import graph, ops
from optframe.errors import InputError
from optframe.testing import assert_op_contract
from optframe.types import OpSpec, TensorInfo
from optframe_anchordetr import plugin

Array = np.ndarray[Any, Any]
SPECS = {spec.identifier: spec for spec in plugin.optframe_ops()}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "bool": np.bool_}
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
OPSETS = [15, 17, 18, 20, 22]


@dataclass(frozen=True)
class Case:
    """Inputs of one call (None: absent), its attributes, and the largest error that each output may have."""

    inputs: Sequence[Array | None]
    attributes: Mapping[str, float | int]
    reference: Callable[..., list[Array]]
    tolerance: Callable[..., float]

    def infos(self) -> list[TensorInfo | None]:
        return [None if a is None else TensorInfo(a.shape, a.dtype.name) for a in self.inputs]

    def expected(self) -> list[Array]:
        wide = [None if a is None else a if a.dtype == bool else a.astype(np.float64) for a in self.inputs]
        return self.reference(*wide, **self.attributes)


def normalized(x: Array, scale: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5) -> Array:
    deviation = x - x.mean(-1, keepdims=True)
    y = deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5) -> list[Array]:
    return [normalized(x, scale, bias, epsilon)]


def skip_layer_norm(
    x: Array, skip: Array, scale: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5
) -> list[Array]:
    return [normalized(x + skip, scale, bias, epsilon), x + skip]


def attention(q: Array, k: Array, mask: Array | None, heads: int) -> Array:
    scores = np.einsum("nlhd,nkhd->nhlk", *(a.reshape(*a.shape[:2], heads, -1) for a in (q, k)))
    scores = scores if mask is None else np.where(mask[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rcda(
    q_row: Array,
    q_col: Array,
    k_row: Array,
    k_col: Array,
    v: Array,
    row_mask: Array | None = None,
    column_mask: Array | None = None,
    num_heads: int = 1,
    allow_tf32: int = 0,
) -> list[Array]:
    row, column = attention(q_row, k_row, row_mask, num_heads), attention(q_col, k_col, column_mask, num_heads)
    values = v.reshape(*v.shape[:3], num_heads, -1)
    return [np.einsum("nhly,nhlx,nyxhd->nlhd", column, row, values).reshape(q_row.shape)]


def condition(x: Array, epsilon: float) -> float:
    """How much larger, at most, an error of x's values relative to them is relative to their deviation in a row."""
    rows = x.reshape(-1, x.shape[-1])
    spread = np.sqrt(rows.var(-1) + epsilon)
    return float(np.max(np.abs(rows).max(-1, initial=0) / spread, initial=1.0, where=np.isfinite(spread)))


def norm_tolerance(dtype: str) -> Callable[..., float]:
    """Relative to a row's values, mean and deviations are exact to a few float32 roundings; then y rounds once."""

    def tolerance(x: Array, *others: Array | None, epsilon: float) -> float:
        rows = x.astype(np.float64) + (others[0].astype(np.float64) if len(others) > 2 else 0)  # type: ignore[union-attr]
        stretch = condition(rows, epsilon)
        # A sum that rounds to 16 bits before it is normalised is off by that rounding.
        first = UNIT_ROUNDOFF[dtype] if len(others) > 2 else 2.0**-24 * 16
        return float((first * stretch + UNIT_ROUNDOFF[dtype]) * 16)  # |y| stays under 16 for up to 256 columns

    return tolerance


def draw_norm(seed: int, dtypes: tuple[str, ...], skip: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    rows, columns = tuple(rng.integers(1, 6, rng.integers(0, 4))), int(rng.integers(2, 257))
    shape = (*(int(r) for r in rows), columns)
    data = [(rng.standard_normal(shape) * 2 + rng.uniform(-3, 3)).astype(DTYPES[dtypes[0]]) for _ in range(1 + skip)]
    parameters: list[Array | None] = [
        rng.uniform(-1, 1, columns).astype(DTYPES[dtype]) if rng.random() < 0.8 else None for dtype in dtypes[1:]
    ]
    reference = skip_layer_norm if skip else layer_norm
    return Case(
        [*data, *parameters], {"epsilon": float(10 ** rng.uniform(-6, -2))}, reference, norm_tolerance(dtypes[0])
    )


def draw_rcda(seed: int, dtypes: tuple[str, ...]) -> Case:
    rng = np.random.default_rng(seed)
    n, queries, h, w, heads, size = (int(rng.integers(1, top)) for top in (4, 40, 12, 12, 5, 33))
    c = heads * size
    shapes = [(n, queries, c), (n, queries, c), (n, w, c), (n, h, c), (n, h, w, c)]
    spread = 1.4 * size**-0.25  # scores deviate by about 2: neither flat nor one key alone
    inputs: list[Array | None] = [(rng.standard_normal(s) * spread).astype(DTYPES[dtypes[0]]) for s in shapes]
    for keys in (w, h):
        mask = rng.random((n, keys)) < 0.3
        mask[:, 0] = False
        inputs.append(mask if rng.random() < 0.6 else None)
    # Weights are a convex combination of values (|v| under 8), from scores of |s| under 32 with `size` roundings each.
    error = 8 * (2.0**-24 * 32 * 8 + UNIT_ROUNDOFF[dtypes[0]])
    return Case(inputs, {"num_heads": heads}, rcda, lambda *_, **__: error)


SAMPLERS: dict[str, Callable[[int, tuple[str, ...]], Case]] = {
    "optframe.anchordetr::LayerNorm": draw_norm,
    "optframe.anchordetr::SkipLayerNorm": lambda seed, dtypes: draw_norm(seed, dtypes, skip=True),
    "optframe.anchordetr::RCDA": draw_rcda,
}
MIXES = [
    ("float32", "float32", "float32"),
    ("float16", "float32", "float16"),
    ("float16", "float16", "float16"),
    ("bfloat16", "bfloat16", "float32"),
]


def calling_model(spec: OpSpec, case: Case, opset: int) -> ir.Model:
    """A model of one call. Its inputs and outputs are float32 or bool, since NumPy feeds onnxruntime no bfloat16."""
    inputs, casts, operands = [], [], []
    for parameter, array in zip(spec.inputs, case.inputs, strict=False):
        if array is None:
            operands.append(None)
            continue
        outer = ir.DataType.BOOL if array.dtype == bool else ir.DataType.FLOAT
        inputs.append(ir.Value(name=parameter.name, shape=ir.Shape(array.shape), type=ir.TensorType(outer)))
        casts.append(ir.node("Cast", [inputs[-1]], {"to": ir.DataType.from_numpy(array.dtype).value}))
        operands.append(casts[-1].outputs[0])
        operands[-1].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model = ir.Model(ir.Graph(inputs, [], nodes=casts, opset_imports={"": opset}, name="calls"), ir_version=8)
    node = ops.call(model, spec, operands, case.attributes)
    model.graph.append(node)
    infos = spec.infer(case.infos(), case.attributes)
    for parameter, value, info in zip(spec.outputs, node.outputs, infos, strict=True):
        back = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
        back.outputs[0].shape = ir.Shape(info.shape)
        back.outputs[0].name, back.outputs[0].type = parameter.name, ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(back)
        model.graph.outputs.append(back.outputs[0])
    return model


def run(model: ir.Model, spec: OpSpec, case: Case) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    pairs = zip(spec.inputs, case.inputs, strict=False)
    feeds = {p.name: a if a.dtype == bool else a.astype(np.float32) for p, a in pairs if a is not None}
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def assert_close(spec: OpSpec, case: Case, got: Sequence[Array]) -> None:
    tolerance = case.tolerance(*case.inputs, **{k: v for k, v in case.attributes.items() if k == "epsilon"})
    for parameter, array, expected in zip(spec.outputs, got, case.expected(), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=parameter.name)


def by_op(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())(function)


@by_op
def test_every_op_has_a_sampler_and_a_kernel(spec: OpSpec) -> None:
    assert spec.identifier in SAMPLERS
    assert spec.kernel is not None
    assert "__global__" in spec.kernel.read_source()


@by_op
def test_contract(spec: OpSpec, seed: int) -> None:
    """What `optframe.testing` asks of any op, over all opsets that the functions have different bodies for."""
    rng = np.random.default_rng(seed)
    case = SAMPLERS[spec.identifier](int(rng.integers(1 << 30)), MIXES[0])
    heads, epsilon = (case.attributes.get(name) for name in ("num_heads", "epsilon"))

    def suits(drawn: Case) -> bool:
        """The contract's tolerance knows nothing of the row of two columns that are almost equal, once in a while."""
        x, skip, *_ = drawn.inputs
        assert x is not None
        if heads is not None:
            return x.shape[-1] % heads == 0
        rows = x.astype(np.float64) + (skip if spec.identifier.endswith("SkipLayerNorm") else 0)  # type: ignore[operator]
        return condition(rows, epsilon) < 8  # type: ignore[arg-type]

    def draw(rng: np.random.Generator) -> Mapping[str, Array]:
        while True:
            drawn = SAMPLERS[spec.identifier](int(rng.integers(1 << 30)), MIXES[0])
            if suits(drawn):
                pairs = zip(spec.inputs, drawn.inputs, strict=False)
                return {parameter.name: array for parameter, array in pairs if array is not None}

    shown = assert_op_contract(
        spec, draw, case.reference, seed=seed, attributes=case.attributes, opsets=OPSETS, trials=2
    )
    assert {dtypes[spec.inputs[0].name] for dtypes in shown} >= {"float32", "float16"}


@by_op
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtypes", MIXES, ids="-".join)
def test_mixed_types_between_casts(spec: OpSpec, opset: int, dtypes: tuple[str, ...], seed: int) -> None:
    case = SAMPLERS[spec.identifier](seed, dtypes)
    model = calling_model(spec, case, opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_close(spec, case, run(model, spec, case))


@by_op
@pytest.mark.parametrize("dtypes", MIXES, ids="-".join)
def test_launch_rule_takes_what_the_shape_rule_takes(spec: OpSpec, dtypes: tuple[str, ...]) -> None:
    case = SAMPLERS[spec.identifier](5, dtypes)
    outputs = spec.infer(case.infos(), case.attributes)
    assert spec.kernel is not None
    launch = spec.kernel.launch_rule()(case.infos(), outputs, case.attributes)
    assert re.search(rf"\b{launch.entry}\b", spec.kernel.read_source())
    assert math.prod(launch.grid) > 0


@by_op
def test_shape_rule_refuses_what_does_not_fit(spec: OpSpec) -> None:
    case = SAMPLERS[spec.identifier](5, MIXES[0])
    infos = case.infos()
    for index, info in enumerate(infos):
        if info is not None and (index > 0 or len(infos) != 3 or any(infos[1:])):
            wrong = TensorInfo((*info.shape[:-1], info.shape[-1] + 1), info.dtype)
            with pytest.raises(InputError):
                spec.infer([*infos[:index], wrong, *infos[index + 1 :]], case.attributes)
    with pytest.raises(InputError):
        spec.infer([], case.attributes)


@by_op
def test_functions_are_deterministic_and_name_their_parameters(spec: OpSpec) -> None:
    dtypes = {p.name: p.dtypes[0] for p in spec.inputs}
    first, second = (ir.serde.serialize_function(spec.build_function(18, dtypes)) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    assert list(first.input) == [p.name for p in spec.inputs]
    assert list(first.output) == [p.name for p in spec.outputs]
    assert {node.domain for node in first.node} == {""}, "a meaning is in ONNX's own ops"
    assert {*first.attribute, *(a.name for a in first.attribute_proto)} == set(spec.attributes)


@by_op
def test_model_survives_the_file_and_inlining(spec: OpSpec, tmp_path: Path) -> None:
    case = SAMPLERS[spec.identifier](9, MIXES[0])
    path = graph.save(calling_model(spec, case, 18), tmp_path / "model.onnx")
    model = graph.load(path)
    assert graph.count_nodes(model, SPECS) == 1 + len(spec.outputs) + sum(a is not None for a in case.inputs)
    before = run(model, spec, case)
    assert ops.inline_functions(model)
    assert not model.functions
    for got, expected in zip(run(model, spec, case), before, strict=True):
        np.testing.assert_array_equal(got, expected)
