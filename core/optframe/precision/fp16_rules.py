"""Which nodes of a model compute in FP16.

The rules follow PyTorch's autocast ("Automatic Mixed Precision package", CUDA op reference), with one change: what lies
behind an FP32 op is FP32 only where nothing but FP32 comes of it, so that a residual stream is FP16 between its norms.

- Products (convolutions, matrix products, recurrences) compute in FP16, all operands alike.
- Ops whose arguments or results FP16 cannot hold or resolve compute in FP32, and so does the arithmetic that leads to
  nothing else: logarithms, exponentials, powers, roots, sines (and so positions and inverse sigmoids), cumulative sums,
  quotients of two computed tensors, conversions to integers. So do reductions (and so a LayerNorm's statistics).
- LayerNormalization and RMSNormalization have FP32 statistics by definition (`stash_type`), and take and give FP16.
- A Softmax is FP32 where it gets FP32, or where its axis is so long that its probabilities would be subnormal.
- A node with a finite constant beyond 65504 stays FP32. So do subgraphs, functions, and ops that take no FP16.
- Averages that keys of an attention are made of are centred first, see `precision.centring`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from optframe import graph
from optframe.precision.nodes import Warn, is_constant, is_standard, selects
from optframe.shapes import dtype_name, static_shape
from optframe.types import OpSpec

FLOAT = ir.DataType.FLOAT
LARGEST = float(np.finfo(np.float16).max)

PRODUCTS = frozenset(["Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN", "Attention"])

SENSITIVE = frozenset(
    [
        "Log",
        "Exp",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Sin",
        "Cos",
        "Tan",
        "Asin",
        "Acos",
        "Atan",
        "Sinh",
        "Cosh",
        "Asinh",
        "Acosh",
        "Atanh",
        "Softplus",
        "CumSum",
        "CumProd",
        "Range",
        "Mod",
        "RandomNormal",
        "RandomUniform",
    ]
)
"""FP32, and FP32 has to be what leads to them alone."""

EXACT = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
        "LpNormalization",
        "LpPool",
        "GlobalLpPool",
        "MeanVarianceNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "LRN",
        "Det",
        "GridSample",
        "RoiAlign",
        "CastLike",
        "EyeLike",
    ]
)
"""FP32, whatever leads to them."""

FOLLOWING = frozenset(("Softmax", "LogSoftmax"))
"""FP32 where they get FP32."""

UNTYPED = frozenset(("Cast", "Shape", "Size"))
"""Take a tensor of either type as it comes."""

SOFTMAX_LIMIT = 1024
"""Longest axis of an FP16 Softmax: the mean probability, 1/1024, is 16 times FP16's smallest normal number."""

Kind = Literal["product", "sensitive", "exact", "following", "sink", "neutral"]
"""Besides the sets above: a sink has no FP32 outputs and takes what it gets; neutral is what fits its surroundings."""


@dataclass(frozen=True)
class Slots:
    """Indices of the FP32 inputs and outputs of a node that become FP16 when it computes in FP16."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def half_nodes(
    model: ir.Model, ops: Mapping[str, OpSpec], keep: Sequence[str], warn: Warn, exact: Collection[ir.Node] = ()
) -> dict[ir.Node, Slots]:
    """Return the nodes of the main graph of `model`, whose types are inferred, that are to compute in FP16.

    The nodes `exact`, and those that a pattern of `keep` selects, are not.
    """
    classifier = _Classifier(model, ops, keep, warn)
    kinds = {node: kind for node in model.graph if (kind := classifier.kind(node)) is not None}
    kinds |= dict.fromkeys(exact, "exact")
    full = _exact_nodes(model.graph, kinds)
    return {node: slots for node, slots in classifier.slots.items() if node in kinds and node not in full}


class _Classifier:
    """Sorts nodes into kinds; `slots` collects what of them can be FP16."""

    def __init__(self, model: ir.Model, ops: Mapping[str, OpSpec], keep: Sequence[str], warn: Warn) -> None:
        self.slots: dict[ir.Node, Slots] = {}
        self._opset = graph.opset(model)
        self._ops = ops
        self._keep = keep
        self._warn = warn

    def kind(self, node: ir.Node) -> Kind | None:
        """Return the kind of `node`; None if it has nothing to do with FP32 tensors."""
        if not any(map(_is_float, (*node.inputs, *node.outputs))) or _is_free(node):
            return None
        slots = None if selects(self._keep, node) else self._find_slots(node)
        if slots is None or self._overflows(node, slots):
            return "sensitive" if is_standard(node) and _is_sensitive(node) else "exact"
        self.slots[node] = slots
        return self._kind_by_op(node, slots)

    def _kind_by_op(self, node: ir.Node, slots: Slots) -> Kind:
        if is_standard(node):
            if node.op_type in PRODUCTS:
                return "product"
            if _is_sensitive(node):
                return "sensitive"
            if node.op_type in EXACT or _is_long_softmax(node, self._opset):
                return "exact"
            if node.op_type in FOLLOWING:
                return "following"
        return "neutral" if slots.outputs else "sink"

    def _find_slots(self, node: ir.Node) -> Slots | None:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)):
            return None
        if any(value is not None and value.dtype is None for value in node.inputs):
            return None
        if is_standard(node):
            return _standard_slots(node, self._opset)
        spec = self._ops.get(f"{node.domain}::{node.op_type}")
        return None if spec is None else _call_slots(node, spec, self._opset)

    def _overflows(self, node: ir.Node, slots: Slots) -> bool:
        """Return whether a constant that the node reads is finite, but too large for FP16."""
        for index in sorted(slots.inputs):
            array = graph.constant(node.inputs[index]) if is_constant(node.inputs[index]) else None
            if array is None or not array.size:
                continue
            largest = float(np.max(np.abs(array), where=np.isfinite(array), initial=0.0))
            if largest > LARGEST:
                self._warn(
                    f"FP16: node '{node.name}' ({node.op_type}) stays FP32, since its constant "
                    f"'{node.inputs[index].name}' has {largest:g}, beyond {LARGEST:g}"  # type: ignore[union-attr]
                )
                return True
        return False


def _attributes(node: ir.Node) -> Sequence[ir.Attr]:
    return list(node.attributes.values())


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT


def _is_free(node: ir.Node) -> bool:
    """Return whether the types of a node's inputs and outputs do not depend on each other."""
    return is_standard(node) and (
        node.op_type in ("Constant", "ConstantOfShape", "Shape", "Size")
        or (node.op_type == "Cast" and not _casts_to_integer(node))
    )


def _casts_to_integer(node: ir.Node) -> bool:
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and ir.DataType(to.as_int()).is_integer()


def _is_sensitive(node: ir.Node) -> bool:
    computed_divisor = node.op_type == "Div" and not is_constant(node.inputs[1])
    return node.op_type in SENSITIVE or computed_divisor or _casts_to_integer(node)


def _is_long_softmax(node: ir.Node, opset: int) -> bool:
    if node.op_type not in FOLLOWING:
        return False
    axis = node.attributes.get("axis")
    shape = static_shape(node.inputs[0])
    if shape is None:
        return True
    index = axis.as_int() if axis is not None else (-1 if opset >= 13 else 1)
    return shape[index] > SOFTMAX_LIMIT if opset >= 13 else int(np.prod(shape[index:])) > SOFTMAX_LIMIT


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _standard_slots(node: ir.Node, opset: int) -> Slots | None:
    """Return the slots by the op's schema: those whose type goes with the main output's, if FP16 is allowed there.

    Types of their own stay FP32: the scales of a Resize, the statistics of a BatchNormalization.
    """
    schema = _schema(node.op_type, opset)
    if schema is None:
        return None
    inputs = {i: _formal(schema.inputs, i) for i, value in enumerate(node.inputs) if _is_float(value)}
    outputs = {i: _formal(schema.outputs, i) for i, value in enumerate(node.outputs) if _is_float(value)}
    if _casts_to_integer(node):
        return Slots(frozenset(inputs), frozenset())
    half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    main = next(iter((outputs or inputs).values()))
    if main not in half:
        return None
    names = half if node.op_type in PRODUCTS else half.intersection((outputs or inputs).values())
    return Slots(
        frozenset(i for i, name in inputs.items() if name in names),
        frozenset(i for i, name in outputs.items() if name in names),
    )


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Return the type's name of parameter `index`; the last one may stand for any number."""
    return parameters[min(index, len(parameters) - 1)].type_str


def _call_slots(node: ir.Node, spec: OpSpec, opset: int) -> Slots | None:
    """Return the slots of a plugin op's call: all inputs that it takes in FP16, and what its function makes of them."""
    given = {i: value for i, value in enumerate(node.inputs[: len(spec.inputs)]) if value is not None}
    inputs = frozenset(i for i, v in given.items() if _is_float(v) and "float16" in spec.inputs[i].dtypes)
    if not inputs:
        return None
    dtypes = {spec.inputs[i].name: "float16" if i in inputs else dtype_name(v) for i, v in given.items()}
    element_types = _output_types(node, spec.build_function(opset, dtypes), dtypes, [p.name for p in spec.inputs])
    outputs = frozenset(i for i, elem in enumerate(element_types) if elem == onnx.TensorProto.FLOAT16)
    return Slots(inputs, outputs) if outputs else None


def _output_types(node: ir.Node, function: ir.Function, dtypes: Mapping[str, str], names: Sequence[str]) -> list[int]:
    """Return the element type of each output of a call of `function` with inputs of `dtypes`, 0 if unknown."""
    types = []
    for name in names[: len(function.inputs)]:
        proto = onnx.TypeProto()
        if name in dtypes:
            proto.tensor_type.elem_type = ir.DataType[_ONNX_NAMES.get(dtypes[name], dtypes[name].upper())].value
        types.append(proto)
    attributes = [ir.serde.serialize_attribute(attribute) for attribute in _attributes(node)]
    inferred = onnx.shape_inference.infer_function_output_types(ir.to_proto(function), types, attributes)
    return [proto.tensor_type.elem_type for proto in inferred]


_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}


def _exact_nodes(main: ir.Graph, kinds: Mapping[ir.Node, Kind]) -> set[ir.Node]:
    """Return the nodes that compute in FP32."""
    fits, pulled = _fitting(main, kinds)
    exact = {node for node, kind in kinds.items() if kind in ("sensitive", "exact")} | pulled
    for node in main:
        kind = kinds.get(node)
        gets = any(_votes(value, exact, kinds) for value in node.inputs)
        if kind == "sink":
            gets = gets or any(_is_float(value) and value.is_graph_input() for value in node.inputs)  # type: ignore[union-attr]
        if gets and (kind in ("following", "sink") or (kind == "neutral" and node in fits)):
            exact.add(node)
    return exact


def _fitting(main: ir.Graph, kinds: Mapping[ir.Node, Kind]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Return the neutral nodes that FP32 would fit, since all that comes of them can be, and those that must be FP32,
    since a sensitive op is among it."""
    fits: set[ir.Node] = set()
    pulled: set[ir.Node] = set()
    for node in reversed(main):
        if kinds.get(node) not in ("neutral", "following"):
            continue
        users = [use.node for value in node.outputs for use in value.uses()]
        if all(
            user.graph is not main or kinds.get(user) in ("sensitive", "exact", "sink") or user in fits
            for user in users
        ):
            fits.add(node)
            if any(kinds.get(user) == "sensitive" or user in pulled for user in users):
                pulled.add(node)
    return fits, pulled


def _votes(value: ir.Value | None, exact: set[ir.Node], kinds: Mapping[ir.Node, Kind]) -> bool:
    """Return whether a tensor is FP32 because it has to be: not a constant, nor truth values as numbers."""
    producer = value.producer() if value is not None and _is_float(value) else None
    if producer is None or producer.op_type in ("Constant", "ConstantOfShape"):
        return False
    if producer.op_type == "Cast" and is_standard(producer):
        origin = producer.inputs[0]
        return origin is not None and origin.dtype not in (ir.DataType.BOOL, ir.DataType.FLOAT16)
    return producer in exact
