"""Centring: takes out of averaged tensors, before FP16 rounds them, the part that no softmax sees.

The mean of many elements changes little from one place to the next, so that FP16 spends its bits on what all places
have in common. Where such a tensor only makes keys of an attention, or scores, that part drops out anyway:
softmax(q (k + s)^T) = softmax(q k^T) for one and the same s added to all keys. So its mean is subtracted in FP32, and
what is left is rounded to its own size. Zhang et al., "SageAttention", ICLR 2025, section 4.2, smooths keys so.

For the same reason a constant that is added before the average (a position) stays FP32: places that share it share its
rounding, which no average takes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe import graph
from optframe.precision.nodes import LAYOUT_OPS, Names, is_constant, is_standard
from optframe.shapes import static_shape
from optframe.types import OpSpec

Array = np.ndarray[Any, Any]

AXES_INPUT_OPSET = 18
"""The opset in which ReduceMean's axes became an input."""


def centre(model: ir.Model, ops: Mapping[str, OpSpec]) -> set[ir.Node]:
    """Centre averages of the main graph of `model`, whose types are inferred, in place where that changes no result.

    Constants added to them on the way to the attention are centred too. Returns the nodes that are to be FP32: the
    subtractions, and what adds constants before the averages.
    """
    names = Names(model)
    exact: set[ir.Node] = set()
    for node in list(model.graph):
        if is_standard(node) and node.op_type == "ReduceMean" and node.outputs[0].dtype == ir.DataType.FLOAT:
            found = _shiftable_axis(model, node.outputs[0], ops)
            if found is not None:
                axis, additions = found
                exact.add(_subtract_mean(model, node, axis, names))
                exact.update(_sum_before(node))
                for addition in additions:
                    _centre_constant(model.graph, addition, names)
    return exact


@dataclass(frozen=True)
class _Addition:
    """A constant added to a tensor: which input of the node it is, and the axis of the result that may be centred."""

    node: ir.Node
    index: int
    axis: int


def _shiftable_axis(model: ir.Model, value: ir.Value, ops: Mapping[str, OpSpec]) -> tuple[int, list[_Addition]] | None:
    """Return an axis along which adding the same to all of `value` changes no output, and the constants on the way."""
    shape = value.shape
    for axis in range(len(shape) if shape is not None else 0):
        if shape is not None and shape[axis] != 1:
            search = _Search(model, ops)
            if search.drops(value, axis):
                return axis, search.additions
    return None


class _Search:
    """Follows a shift, constant along an axis, from a tensor to the softmaxes in which it drops out."""

    def __init__(self, model: ir.Model, ops: Mapping[str, OpSpec]) -> None:
        self.additions: list[_Addition] = []
        self._graph = model.graph
        self._opset = graph.opset(model)
        self._ops = ops

    def drops(self, value: ir.Value, axis: int) -> bool:
        """Return whether a shift of `value`, the same all along `axis`, drops out wherever it goes."""
        uses = value.uses()
        if not uses or value.is_graph_output():
            return False
        return all(use.node.graph is self._graph and self._drops_in(use.node, use.idx, axis) for use in uses)

    def _drops_in(self, node: ir.Node, index: int, axis: int) -> bool:
        if not is_standard(node):
            spec = self._ops.get(f"{node.domain}::{node.op_type}")
            return spec is not None and index < len(spec.inputs) and spec.inputs[index].shift_invariant_axis == axis
        rank = len(node.inputs[index].shape or ())  # type: ignore[union-attr]
        if node.op_type == "Softmax":
            return self._opset >= 13 and node.attributes.get_int("axis", -1) % rank == axis
        after = self._axis_after(node, index, axis, rank)
        return after is not None and self.drops(node.outputs[0], after)

    def _axis_after(self, node: ir.Node, index: int, axis: int, rank: int) -> int | None:
        """Return along which axis of its result a node leaves the shift constant; None where it does not."""
        if node.op_type == "Transpose":
            return list(node.attributes.get_ints("perm", range(rank)[::-1])).index(axis)
        if node.op_type == "Reshape" and index == 0:
            before, behind = static_shape(node.inputs[0]), static_shape(node.outputs[0])
            return axis if before and behind and before[: axis + 1] == behind[: axis + 1] else None
        if node.op_type == "Add":
            return self._axis_after_sum(node, index, axis, rank)
        if node.op_type in ("MatMul", "Gemm"):
            return _axis_after_product(node, index, axis, rank)
        return None

    def _axis_after_sum(self, node: ir.Node, index: int, axis: int, rank: int) -> int | None:
        if node.outputs[0].shape is None or len(node.outputs[0].shape) != rank or node.inputs[0] is node.inputs[1]:
            return None
        if is_constant(node.inputs[1 - index]):
            self.additions.append(_Addition(node, 1 - index, axis))
        return axis


def _axis_after_product(node: ir.Node, index: int, axis: int, rank: int) -> int | None:
    """Return the axis behind a product: that of rows times a matrix, or of a right factor's columns."""
    other, result = node.inputs[1 - index] if index < 2 else None, node.outputs[0]
    if other is None or other is node.inputs[index] or other.shape is None or result.shape is None:
        return None
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transB")[index : index + 1]):
        return None
    if index == 0:
        return axis if axis != rank - 1 and len(other.shape) == 2 else None
    return len(result.shape) - 1 if axis == rank - 1 and rank >= 2 and len(other.shape) >= 2 else None


def _sum_before(average: ir.Node) -> list[ir.Node]:
    """Return the addition of a constant whose sum is averaged, with what changes its layout, or nothing."""
    nodes: list[ir.Node] = []
    node = _producer(average.inputs[0])
    while node is not None and is_standard(node) and node.op_type in LAYOUT_OPS:
        nodes.append(node)
        node = _producer(node.inputs[0])
    adds = node is not None and is_standard(node) and node.op_type == "Add" and any(map(is_constant, node.inputs))
    return [*nodes, node] if adds and node is not None else []


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _subtract_mean(model: ir.Model, node: ir.Node, axis: int, names: Names) -> ir.Node:
    """Put `value - mean(value, axis)` in the place of what `node` makes; return the subtraction."""
    value = node.outputs[0]
    inputs, attributes = [value], {"keepdims": 1}
    if graph.opset(model) >= AXES_INPUT_OPSET:
        inputs.append(_constant(model.graph, f"{value.name}_axis", np.array([axis], np.int64), names))
    else:
        attributes["axes"] = [axis]  # type: ignore[assignment]
    mean = ir.node("ReduceMean", inputs, attributes, name=names.new(f"{value.name}_mean"))
    subtract = ir.node("Sub", [value, mean.outputs[0]], name=names.new(f"{value.name}_centred"))
    for made, suffix in ((mean, "mean"), (subtract, "centred")):
        made.outputs[0].name = names.new(f"{value.name}_{suffix}_output")
        made.outputs[0].dtype = ir.DataType.FLOAT
    shape = list(value.shape or ())
    subtract.outputs[0].shape = ir.Shape(shape)
    mean.outputs[0].shape = ir.Shape([1 if i == axis else size for i, size in enumerate(shape)])
    value.replace_all_uses_with(subtract.outputs[0])
    mean.replace_input_with(0, value)
    subtract.replace_input_with(0, value)
    model.graph.insert_after(node, [mean, subtract])
    return subtract


def _centre_constant(main: ir.Graph, addition: _Addition, names: Names) -> None:
    value = addition.node.inputs[addition.index]
    array = graph.constant(value)
    shape = addition.node.outputs[0].shape
    assert value is not None
    assert array is not None
    assert shape is not None
    axis = addition.axis - (len(shape) - array.ndim)
    if axis < 0 or array.shape[axis] == 1:
        return
    centred = (array - array.mean(axis=axis, keepdims=True, dtype=np.float64)).astype(np.float32)
    addition.node.replace_input_with(addition.index, _constant(main, f"{value.name}_centred", centred, names))


def _constant(main: ir.Graph, name: str, array: Array, names: Names) -> ir.Value:
    unique = names.new(name)
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    main.register_initializer(value)
    return value
