"""FP16 as a graph transformation: weights and most tensors become FP16, and casts stand where FP32 is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from optframe import graph
from optframe.ops import attach
from optframe.passes import PassContext
from optframe.precision.centring import centre
from optframe.precision.fp16_rules import FLOAT, UNTYPED, Slots, half_nodes
from optframe.precision.nodes import Names, Warn, is_constant, is_standard, log_warning
from optframe.shapes import dtype_name, inferred
from optframe.types import OpSpec

HALF = ir.DataType.FLOAT16
PASS_NAME = "precision-fp16"
SUFFIXES = {FLOAT: "float32", HALF: "float16"}


def to_fp16(
    model: ir.Model,
    *,
    keep: Sequence[str] = (),
    ops: Mapping[str, OpSpec] | None = None,
    warn: Warn = log_warning,
) -> ir.Model:
    """Return a copy of the FP32 `model` that computes in FP16 where `precision.fp16_rules` say; inputs and outputs keep
    their types.

    Averages that make keys are centred, see `precision.centring`.
    Weights are stored as FP16, a tensor is cast at most once each way, and casts of casts are merged. Calls of
    registered plugin ops (`ops`, by `domain::name`) that take FP16 get their function for it. `keep` are patterns of
    nodes that stay FP32, see `precision.nodes.selects`. `warn` hears which nodes stay FP32 for constants too large,
    and how many constants are too small for FP16 and become 0.
    """
    copy = inferred(model)
    slots = half_nodes(copy, ops or {}, keep, warn, centre(copy, ops or {}))
    _Converter(copy, slots).run(warn)
    _attach_functions(copy, slots, ops or {})
    _merge_casts(copy.graph)
    common.RemoveUnusedNodesPass()(copy)
    return copy


class _Converter:
    """Puts a model's nodes in FP16 in place, with each tensor and constant converted once for all who need it."""

    def __init__(self, model: ir.Model, slots: Mapping[ir.Node, Slots]) -> None:
        self._graph = model.graph
        self._slots = slots
        self._names = Names(model)
        self._context = PassContext(pass_name=PASS_NAME)
        self._halved = {node.outputs[index] for node, slot in slots.items() for index in slot.outputs}
        self._converted: dict[ir.Value, ir.Value] = {}
        self._flushed = self._constants = 0

    def run(self, warn: Warn) -> None:
        for node in list(self._graph.all_nodes()):
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == FLOAT and not (is_standard(node) and node.op_type in UNTYPED):
                    wants_half = node in self._slots and index in self._slots[node].inputs
                    if wants_half != (value in self._halved):
                        node.replace_input_with(index, self._other_type(value, node))
        for index, value in enumerate(self._graph.outputs):
            if value in self._halved:
                self._graph.outputs[index] = self._as_output(value)
        for value in self._halved:
            value.type = ir.TensorType(HALF)  # a new one: copies of a model share their types
        if self._flushed:
            warn(f"FP16: {self._flushed} of {self._constants} elements of constants are too small for it and become 0")

    def _other_type(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return `value` in the other of the two types."""
        if value not in self._converted:
            self._converted[value] = self._constant(value) if is_constant(value) else self._cast(value, user)
        return self._converted[value]

    def _constant(self, value: ir.Value) -> ir.Value:
        array = graph.constant(value)
        assert array is not None, "checked by the caller"
        half = array.astype(np.float16)
        self._constants += array.size
        self._flushed += int(np.count_nonzero((half == 0) & (array != 0)))
        name = self._names.new(f"{value.name}_{SUFFIXES[HALF]}")
        constant = ir.val(name, const_value=ir.tensor(half, name=name))
        self._graph.register_initializer(constant)
        return constant

    def _cast(self, value: ir.Value, user: ir.Node) -> ir.Value:
        dtype = FLOAT if value in self._halved else HALF
        name = self._names.new(f"{value.name}_{SUFFIXES[dtype]}")
        output = ir.val(name, dtype=dtype, shape=value.shape)
        cast = ir.node("Cast", [value], {"to": dtype.value}, outputs=[output], name=self._names.new(f"{name}_Cast"))
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
        self._context.stamp([cast], [user])
        return output

    def _as_output(self, value: ir.Value) -> ir.Value:
        """Return `value` in FP32, under its name."""
        producer = value.producer()
        assert producer is not None, "what is FP16 was computed"
        output = self._other_type(value, producer)
        value.name, output.name = self._names.new(f"{value.name}_{SUFFIXES[HALF]}"), value.name
        output.metadata_props.update(value.metadata_props)
        return output


def _attach_functions(model: ir.Model, slots: Mapping[ir.Node, Slots], ops: Mapping[str, OpSpec]) -> None:
    """Give every call of a plugin op that is FP16 somewhere the function for its own types."""
    changed = {f"{node.domain}::{node.op_type}" for node in slots if not is_standard(node)}
    inside = {f"{n.domain}::{n.op_type}" for function in model.functions.values() for n in function.all_nodes()}
    for key, function in list(model.functions.items()):
        if f"{function.domain}::{function.name}" in changed - inside:
            del model.functions[key]
    for node in model.graph.all_nodes():
        spec = ops.get(f"{node.domain}::{node.op_type}")
        if spec is not None and spec.identifier in changed:
            given = zip(spec.inputs, node.inputs, strict=False)
            node.overload = attach(model, spec, {p.name: dtype_name(value) for p, value in given if value is not None})


def _merge_casts(main: ir.Graph) -> None:
    """Let a cast of a cast that lost nothing read what the first one read."""
    for node in main:
        inner = node.inputs[0].producer() if _is_cast(node) and node.inputs[0] is not None else None
        if inner is None or not _is_cast(inner) or inner.inputs[0] is None or inner.graph is not main:
            continue
        origin, output = inner.inputs[0], node.outputs[0]
        if inner.outputs[0].dtype == FLOAT and origin.dtype in (HALF, ir.DataType.BFLOAT16, *_integers()):
            if origin.dtype == output.dtype and not output.is_graph_output():
                output.replace_all_uses_with(origin)
            else:
                node.replace_input_with(0, origin)


def _is_cast(node: ir.Node) -> bool:
    return is_standard(node) and node.op_type == "Cast"


def _integers() -> Iterator[ir.DataType]:
    """Types whose values FP32 stands for at least as well as FP16 does."""
    yield ir.DataType.BOOL
    yield from (dtype for dtype in ir.DataType if dtype.is_integer())
