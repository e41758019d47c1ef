"""The pass `drop-broadcast`: Expand and Tile in front of ops that broadcast by themselves go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import is_onnx, remove
from optframe_passes.shape_data import Dim
from optframe_passes.surgery import Surgery

# fmt: off
_BROADCASTING = frozenset({
    "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor",
})
# fmt: on


@dataclass(frozen=True)
class DropBroadcast(GraphPass):
    """Let ops that broadcast their operands read what an Expand or Tile only repeated along axes of size 1.

    That holds for elementwise ops of several operands, and for the axes of MatMul in front of the last two, wherever
    the result has the same shape without it: because another operand has those sizes. All readers have to be such.
    Dynamic dimensions count where they are provably the same.

    Example:
        before: `y = Add(Expand(position, [2, 50, 67, 256]), x)`, position (1, 50, 1, 256), x (2, 50, 67, 256)
        after:  `y = Add(position, x)`
    """

    name: ClassVar[str] = "drop-broadcast"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Drop in place."""
        surgery = Surgery(model, context)
        for node in reversed(surgery.nodes()):  # one that reads another goes first
            if is_onnx(node, "Expand", "Tile"):
                _drop(surgery, node)
        return surgery.result


def _drop(surgery: Surgery, node: ir.Node) -> None:
    source, value = node.inputs[0], node.outputs[0]
    dims, result = surgery.known.dims(source), surgery.known.dims(value)
    if source is None or dims is None or result is None or not _repeats_ones(dims, result):
        return
    if value.is_graph_output():
        surgery.context.near_miss(node, "it makes a graph output")
        return
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    needing = [reader for reader in readers if not _broadcasts(surgery, reader, value, dims)]
    if needing or not readers:
        if readers:
            surgery.context.near_miss(node, f"{needing[0].op_type} needs the size that it makes")
        return
    if surgery.context.allow(node):
        value.replace_all_uses_with(source)
        surgery.context.stamp(readers, [*readers, node])
        remove([node])
        surgery.rewrites += 1


def _repeats_ones(dims: Sequence[Dim], result: Sequence[Dim]) -> bool:
    """Return whether a tensor of shape `dims` broadcasts to `result`."""
    padded = [1] * (len(result) - len(dims)) + list(dims)
    return all(dim in (1, size) for dim, size in zip(padded, result, strict=True))


def _broadcasts(surgery: Surgery, reader: ir.Node, value: ir.Value, dims: Sequence[Dim]) -> bool:
    """Return whether `reader` makes the same of `dims` in the place of `value`."""
    result = surgery.known.dims(reader.outputs[0])
    product = is_onnx(reader, "MatMul")
    if result is None or not (product or is_onnx(reader, *_BROADCASTING)):
        return False
    if is_onnx(reader, "PRelu") and value is not reader.inputs[1]:
        return False  # only the slope broadcasts
    shapes = [dims if operand is value else surgery.known.dims(operand) for operand in reader.inputs]
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return False
    if product:
        whole = surgery.known.dims(value) or ()
        if any(len(shape) < 2 for shape in known) or dims[-2:] != whole[-2:]:
            return False
        return _broadcast([shape[:-2] for shape in known]) == list(result[:-2])
    return _broadcast(known) == list(result)


def _broadcast(shapes: Sequence[Sequence[Dim]]) -> list[Dim] | None:
    """Return the shape that `shapes` broadcast to, None where it cannot be told."""
    rank = max(map(len, shapes))
    ones: list[Dim] = [1] * rank
    padded = [[*ones[len(shape) :], *shape] for shape in shapes]
    sizes = [{dim for dim in column if dim != 1} for column in zip(*padded, strict=True)]
    if any(len(found) > 1 for found in sizes):
        return None
    return [next(iter(found), 1) for found in sizes]
