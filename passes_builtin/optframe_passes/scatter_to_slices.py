"""The pass `scatter-to-slices`: scattering into a slice of a tensor as Split and Concat, or as an addition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import of_rank
from optframe_passes.constant_pool import tensor_of
from optframe_passes.edit import Array, is_onnx, remove
from optframe_passes.forward_concat import slice_range
from optframe_passes.rearrangement import reshape_target
from optframe_passes.surgery import LARGEST_WEIGHT, Surgery, only_reader


@dataclass(frozen=True)
class ScatterToSlices(GraphPass):
    """Replace ScatterND and ScatterElements whose constant indices cover a slice along one axis.

    That is how exporters write `x[..., a:b] = y`. The result is a Concat of the parts of `x` in front of and behind
    the slice, which a Split makes, with the updates between them. A Slice of `x` that takes the same part, as in
    `x[..., a:b] += y`, becomes the Split's part in the middle; without one the model gets one node more, which reads
    no tensor of indices. Updates that cover all of `x` are the result. Where the updates are the slice plus a
    constant, a single Add of the constant, zero outside of the slice, takes the place of all.

    Indices must list the elements in their order; with `reduction=add` the updates are added to the part.

    Example:
        before: `y = ScatterND(x, indices, Add(Slice(x, [0], [2], [1]), d))`, x of shape (900, 4), indices (900, 2, 2)
        after:  `a, b = Split(x, [2, 2], axis=1)`, `y = Concat(Add(a, d), b, axis=1)`
    """

    name: ClassVar[str] = "scatter-to-slices"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes() if surgery.opset >= 13 else ():
            if node.graph is not None and is_onnx(node, "ScatterND", "ScatterElements"):
                _rewrite(surgery, node)
        return surgery.result


@dataclass(frozen=True)
class _Part:
    """Entries `start` to `end` along `axis` of a tensor whose `size` there is known."""

    axis: int
    start: int
    end: int
    size: int

    @property
    def is_all(self) -> bool:
        """Whether nothing else is there along the axis."""
        return self.end - self.start == self.size

    @property
    def sizes(self) -> list[int]:
        """Sizes of what lies in front of it, of the part, and of what lies behind it, without empty ones."""
        return [size for size in (self.start, self.end - self.start, self.size - self.end) if size]


def _rewrite(surgery: Surgery, node: ir.Node) -> None:
    dims, tensor = surgery.known.dims(node.inputs[0]), tensor_of(node.inputs[1])
    if dims is None or tensor is None or not tensor.size or tensor.nbytes > LARGEST_WEIGHT:
        return
    reduction = node.attributes.get_string("reduction", "none")
    indices = tensor.numpy()
    part = _of_nd(indices, dims) if node.op_type == "ScatterND" else _of_elements(node, indices, dims)
    if part is None or reduction not in ("none", "add"):
        why = f"its reduction is {reduction}" if part else "its indices are not a slice along one axis, in order"
        surgery.context.near_miss(node, why)
        return
    shape = [dim if axis != part.axis else part.end - part.start for axis, dim in enumerate(dims)]
    target = None if surgery.known.dims(node.inputs[2]) == tuple(shape) else reshape_target(None, shape)
    if target is None and surgery.known.dims(node.inputs[2]) != tuple(shape):
        surgery.context.near_miss(node, "its updates need a reshape whose sizes are not fixed")
    elif surgery.context.allow(node):
        padded = None if target or reduction != "none" else _as_addition(surgery, node, part, len(dims))
        if padded is None:
            surgery.replace([node], _as_concat(surgery, node, part, target, reduction == "add"))
        else:
            surgery.replace(*padded)


def _of_nd(indices: Array, dims: Sequence[int | str]) -> _Part | None:
    """Return the part that ScatterND's `indices` (..., k) cover: all of the first k axes but a range along one."""
    depth = indices.shape[-1]
    if depth == 0 or depth > len(dims):
        return None
    sizes = [dim for dim in dims[:depth] if isinstance(dim, int)]
    if len(sizes) != depth or 0 in sizes:
        return None
    rows = indices.reshape(-1, depth).astype(np.int64)
    rows = np.where(rows < 0, rows + np.array(sizes), rows)
    if (rows < 0).any() or (rows >= np.array(sizes)).any():
        return None
    first, last = rows[0], rows[-1]
    counts = last - first + 1
    open_axes = [axis for axis, (count, size) in enumerate(zip(counts, sizes, strict=True)) if count != size]
    if len(open_axes) > 1 or (counts < 1).any() or math.prod(counts) != len(rows):
        return None
    grid = np.stack(np.unravel_index(np.arange(len(rows)), tuple(counts)), axis=-1) + first
    axis = open_axes[0] if open_axes else 0
    return _Part(axis, int(first[axis]), int(last[axis]) + 1, sizes[axis]) if (grid == rows).all() else None


def _of_elements(node: ir.Node, indices: Array, dims: Sequence[int | str]) -> _Part | None:
    """Return the part that ScatterElements' `indices` cover, which count up along the axis and are equal otherwise."""
    axis = node.attributes.get_int("axis", 0) % len(dims)
    size = dims[axis]
    others = [(index, dim) for index, dim in enumerate(dims) if index != axis]
    if not isinstance(size, int) or any(indices.shape[index] != dim for index, dim in others):
        return None
    count = indices.shape[axis]
    normal = np.where(indices < 0, indices + size, indices)
    start = int(normal.flat[0])
    if start < 0 or start + count > size:
        return None
    wanted = np.arange(start, start + count).reshape([-1 if index == axis else 1 for index in range(len(dims))])
    return _Part(axis, start, start + count, size) if (normal == wanted).all() else None


def _same_slices(surgery: Surgery, node: ir.Node, part: _Part) -> list[ir.Node]:
    """Return the Slices of the same tensor that take the same part."""
    source = node.inputs[0]
    assert source is not None, "a scatter reads a tensor"
    readers = [use.node for use in source.uses() if use.node.graph is node.graph and is_onnx(use.node, "Slice")]
    wanted = (part.start, part.end)
    return [reader for reader in readers if slice_range(surgery, reader, part.axis) == wanted]


def _as_addition(surgery: Surgery, node: ir.Node, part: _Part, rank: int) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """Return what goes and an Add of a constant to the whole tensor, if the updates are the part plus that constant."""
    updates = node.inputs[2]
    addition = None if updates is None else updates.producer()
    if addition is None or not is_onnx(addition, "Add") or only_reader(addition.outputs[0]) is not node:
        return None
    side = surgery.constant_side(addition)
    taken = [] if side is None else [addition.inputs[1 - side]]
    slices = [reader for reader in _same_slices(surgery, node, part) if reader.outputs[0] in taken]
    tensor = None if side is None else surgery.tensor(addition.inputs[side])
    if side is None or tensor is None or not slices or len(tensor.shape) > rank:
        return None
    padded = surgery.like(addition, side, _padded(of_rank(tensor.numpy(), rank), part))
    unused = [reader for reader in slices if only_reader(reader.outputs[0]) is addition]
    new = surgery.new("Add", [node.inputs[0], padded], [*unused, addition, node])
    return [*unused, addition, node], [new]


def _padded(array: Array, part: _Part) -> Array:
    """Return `array` along the whole axis, zero outside of the part."""
    shape = list(array.shape)
    shape[part.axis] = part.end - part.start
    widths = [(0, 0)] * array.ndim
    widths[part.axis] = (part.start, part.size - part.end)
    return np.pad(np.broadcast_to(array, shape), widths)


def _as_concat(surgery: Surgery, node: ir.Node, part: _Part, target: Sequence[int] | None, adds: bool) -> list[ir.Node]:
    """Return the nodes that put the updates between what is in front of and behind the part."""
    source, updates, nodes = node.inputs[0], node.inputs[2], list[ir.Node]()
    assert source is not None, "a scatter reads a tensor"
    if target is not None:
        shape = surgery.initializer(node, f"{node.outputs[0].name}/shape", np.array(target, np.int64))
        nodes.append(surgery.new("Reshape", [updates, shape], [node]))
        updates = nodes[-1].outputs[0]
    parts = [source] if part.is_all else _split(surgery, node, source, part)
    middle = 1 if part.start else 0
    if adds:
        nodes.append(surgery.new("Add", [parts[middle], updates], [node]))
        updates = nodes[-1].outputs[0]
    operands = [updates if index == middle else value for index, value in enumerate(parts)]
    if len(operands) == 1:
        return nodes or [surgery.new("Identity", operands, [node])]
    return [*nodes, surgery.new("Concat", operands, [node], {"axis": part.axis})]


def _split(surgery: Surgery, node: ir.Node, source: ir.Value, part: _Part) -> list[ir.Value]:
    """Split `source` right behind where it is made; Slices of the same part read the Split instead."""
    taken = [reader for reader in _same_slices(surgery, node, part) if not reader.outputs[0].is_graph_output()]
    split = surgery.split(source, part.axis, part.sizes, [*taken, node])
    position = next(reader for reader in node.graph or () if reader in (*taken, node))
    if node.graph is not None:
        node.graph.insert_before(position, split)
        surgery.learn([split])
    for reader in taken:
        reader.outputs[0].replace_all_uses_with(split.outputs[1 if part.start else 0])
    remove(taken)
    return list(split.outputs)
