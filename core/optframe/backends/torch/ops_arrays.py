"""Ops that make, shape, cut, join and index tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.backends.torch.dtypes import to_torch, torch_dtype
from optframe.backends.torch.registry import Call, OpNode, op

SHAPE_OPS = ("Shape", "Size")
"""What they return is known as soon as the shapes of a model's inputs are; it lives in host memory."""


@op(*SHAPE_OPS)
def _shape(node: OpNode) -> Call:
    if node.op_type == "Size":
        return lambda x: torch.tensor(x.numel())
    start, end = node.get("start", 0), node.get("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@op("Constant")
def _constant(node: OpNode) -> Call:
    tensor = _constant_tensor(node)
    return lambda: tensor


def _constant_tensor(node: OpNode) -> Tensor:
    for name, dtype in (("value_float", torch.float32), ("value_floats", torch.float32)):
        if name in node.attributes:
            return torch.tensor(node.get(name), dtype=dtype)
    for name in ("value_int", "value_ints"):
        if name in node.attributes:
            return torch.tensor(node.get(name), dtype=torch.int64)
    value = node.get("value")
    if not isinstance(value, ir.TensorProtocol):
        raise node.unsupported("a value that is no dense tensor")
    torch_dtype(value.dtype, f"Constant '{node.name}'")
    return to_torch(value.numpy())


@op("ConstantOfShape", host=(0,))
def _constant_of_shape(node: OpNode) -> Call:
    value = node.get("value")
    if value is not None:
        torch_dtype(value.dtype, f"the value of ConstantOfShape '{node.name}'")
    fill = torch.zeros(()) if value is None else to_torch(value.numpy()).reshape(())
    return lambda shape: fill.expand(shape.tolist())


@op("Range", host=(0, 1, 2))
def _range(node: OpNode) -> Call:
    def count(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, step = start.item(), delta.item()
        return torch.arange(first, _reachable(first, limit.item(), step), step, dtype=start.dtype)

    return count


def _reachable(first: float, limit: float, step: float) -> float:
    """Return the limit, or `first` for one that no step leads to: an empty range, which is an error in torch."""
    return max(first, limit) if step > 0 else min(first, limit)


@op("EyeLike")
def _eye_like(node: OpNode) -> Call:
    asked = torch_dtype(node.get("dtype"), f"the result of EyeLike '{node.name}'") if node.get("dtype") else None

    def eye(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
        diagonal: Tensor = columns[None, :] - rows[:, None]
        return torch.eq(diagonal, node.get("k", 0)).to(asked or x.dtype)

    return eye


@op("Reshape", host=(1,))
def _reshape(node: OpNode) -> Call:
    zero_is_zero = bool(node.get("allowzero", 0))

    def reshape(x: Tensor, shape: Tensor | None = None) -> Tensor:
        wanted: Sequence[int] = node.get("shape", ()) if shape is None else shape.tolist()
        if not zero_is_zero:
            wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
        return x.reshape(wanted)

    return reshape


@op("Flatten")
def _flatten(node: OpNode) -> Call:
    axis = node.get("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        start = axis % x.ndim if axis < 0 else axis
        rows = int(torch.Size(x.shape[:start]).numel())
        return x.reshape(rows, int(torch.Size(x.shape[start:]).numel()))

    return flatten


@op("Transpose")
def _transpose(node: OpNode) -> Call:
    perm = node.get("perm")
    return lambda x: x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


@op("Squeeze", host=(1,))
def _squeeze(node: OpNode) -> Call:
    def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = node.get("axes") if axes is None else axes.tolist()
        if chosen is None:
            return x.squeeze()
        if any(x.shape[axis] != 1 for axis in chosen):  # torch would let these be
            raise ValueError(f"axes {list(chosen)} of shape {list(x.shape)} are not all of size 1")
        return x.squeeze(tuple(chosen))

    return squeeze


@op("Unsqueeze", host=(1,))
def _unsqueeze(node: OpNode) -> Call:
    def unsqueeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen: Sequence[int] = node.get("axes", ()) if axes is None else axes.reshape(-1).tolist()
        rank = x.ndim + len(chosen)
        for axis in sorted(axis % rank for axis in chosen):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


@op("Expand", host=(1,))
def _expand(node: OpNode) -> Call:
    return lambda x, shape: x.expand(np.broadcast_shapes(x.shape, tuple(shape.tolist())))


@op("Tile", host=(1,))
def _tile(node: OpNode) -> Call:
    return lambda x, repeats: x.repeat(repeats.tolist())


@op("Concat")
def _concat(node: OpNode) -> Call:
    return lambda *parts: torch.cat(parts, node.get("axis", 0))


@op("Split", host=(1,))
def _split(node: OpNode) -> Call:
    axis = node.get("axis", 0)

    def split(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        chosen = node.get("split") if sizes is None else sizes.tolist()
        if chosen is None:  # as even as can be: the last parts get what is left, which may be nothing
            size = x.shape[axis]
            even = -(-size // node.outputs)
            chosen = [min(even, max(size - i * even, 0)) for i in range(node.outputs)]
        return torch.split(x, list(chosen), axis)

    return split


@op("Slice", host=(1, 2, 3, 4))
def _slice(node: OpNode) -> Call:
    def cut(
        x: Tensor,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        axes: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        from_, to = (
            node.get(name, ()) if given is None else given.tolist()
            for name, given in (("starts", starts), ("ends", ends))
        )
        along = (node.get("axes") or range(len(from_))) if axes is None else axes.tolist()
        strides = [1] * len(from_) if steps is None else steps.tolist()
        for start, end, axis, step in zip(from_, to, along, strides, strict=True):
            x = _cut_axis(x, start, end, axis % x.ndim, step)
        return x

    return cut


def _cut_axis(x: Tensor, start: int, end: int, axis: int, step: int) -> Tensor:
    """Cut as Python slices do; torch has no negative steps."""
    first, last, _ = slice(start, end, step).indices(x.shape[axis]) if step > 0 else (0, 0, 0)
    if step > 0:
        return x.narrow(axis, first, max(last - first, 0))[(slice(None),) * axis + (slice(None, None, step),)]
    size = x.shape[axis]
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = max(end + size if end < 0 else end, -1)
    return x.index_select(axis, torch.arange(first, _reachable(first, last, step), step, device=x.device))


@op("Pad", host=(1, 2, 3))
def _pad(node: OpNode) -> Call:
    mode = node.choice("mode", "constant", "edge", "reflect", "wrap")

    def pad(x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        amounts: Sequence[int] = node.get("pads", ()) if pads is None else pads.tolist()
        along = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes.tolist()]
        half = len(amounts) // 2
        around = {axis: (amounts[i], amounts[half + i]) for i, axis in enumerate(along)}
        fill = node.get("value", 0.0) if value is None else value.item()
        if mode == "constant":
            flat = [amount for axis in reversed(range(x.ndim)) for amount in around.get(axis, (0, 0))]
            return torch.constant_pad_nd(x, flat, fill)  # F.pad takes integers through float64
        return _pad_by_index(x, around, mode)

    return pad


def _pad_by_index(x: Tensor, around: dict[int, tuple[int, int]], mode: str) -> Tensor:
    """Repeat elements: the nearest (edge), mirrored without the edge (reflect), or from the other end (wrap).

    What negative amounts cut off is not repeated.
    """
    for axis, (before, after) in around.items():
        size = x.shape[axis] + min(before, 0) + min(after, 0)
        x = x.narrow(axis, max(-before, 0), size)
        before, after = max(before, 0), max(after, 0)
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            index = (index % max(2 * size - 2, 1)).minimum((-index) % max(2 * size - 2, 1))
        x = x.index_select(axis, index)
    return x


def _from_end(indices: Tensor, size: int) -> Tensor:
    """Return `indices` as int64, negative ones counted from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@op("Gather")
def _gather(node: OpNode) -> Call:
    axis = node.get("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        dim = axis % x.ndim
        taken = x.index_select(dim, _from_end(indices, x.shape[dim]).reshape(-1))
        return taken.reshape(x.shape[:dim] + indices.shape + x.shape[dim + 1 :])

    return gather


@op("GatherElements")
def _gather_elements(node: OpNode) -> Call:
    axis = node.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _from_end(indices, x.shape[axis]))


@op("GatherND")
def _gather_nd(node: OpNode) -> Call:
    batch = node.get("batch_dims", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        lead = [
            torch.arange(x.shape[axis], device=x.device).reshape(
                [-1 if i == axis else 1 for i in range(indices.ndim - 1)]
            )
            for axis in range(batch)
        ]
        rest = [_from_end(part, x.shape[batch + i]) for i, part in enumerate(indices.unbind(-1))]
        return x[tuple(lead + rest)]

    return gather


_REDUCE_NAMES = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter")
def _scatter_elements(node: OpNode) -> Call:
    axis, reduction = node.get("axis", 0), node.choice("reduction", "none", *_REDUCE_NAMES)

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = _from_end(indices, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, _REDUCE_NAMES[reduction])

    return scatter


def _checked(indices: Tensor, size: int) -> Tensor:
    """Return the indices, which on a CPU have to be in range; on a GPU looking would hold up the stream."""
    if indices.device.type == "cpu" and ((indices < 0) | (indices >= size)).any():
        raise IndexError(f"index out of range for an axis of {size} elements")
    return indices


@op("ScatterND")
def _scatter_nd(node: OpNode) -> Call:
    reduction = node.choice("reduction", "none", *_REDUCE_NAMES)

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
        for i, part in enumerate(indices.unbind(-1)):
            place = place * x.shape[i] + _checked(_from_end(part, x.shape[i]), x.shape[i])
        rest = int(torch.Size(x.shape[depth:]).numel())
        flat = x.reshape(int(torch.Size(x.shape[:depth]).numel()), rest)
        rows = updates.reshape(place.numel(), rest)
        where = place.reshape(-1, 1).expand(rows.shape)
        if reduction == "none":
            return flat.scatter(0, where, rows).reshape(x.shape)
        return flat.scatter_reduce(0, where, rows, _REDUCE_NAMES[reduction]).reshape(x.shape)

    return scatter


@op("OneHot", host=(1,))
def _one_hot(node: OpNode) -> Call:
    axis = node.get("axis", -1)

    def one_hot(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        size = int(depth.reshape(()))
        classes = torch.arange(size, device=indices.device)
        hot = _from_end(indices, size).unsqueeze(-1) == classes
        return torch.where(hot, values[1], values[0]).movedim(-1, axis)

    return one_hot


@op("Trilu", host=(1,))
def _trilu(node: OpNode) -> Call:
    cut = torch.triu if node.get("upper", 1) else torch.tril
    return lambda x, k=None: cut(x, 0 if k is None else int(k))


@op("DepthToSpace")
def _depth_to_space(node: OpNode) -> Call:
    block, by_column = node.get("blocksize"), node.choice("mode", "DCR", "CRD") == "CRD"

    def depth_to_space(x: Tensor) -> Tensor:
        if by_column:
            return F.pixel_shuffle(x, block)
        n, c, h, w = x.shape
        split = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return split.reshape(n, c // block**2, h * block, w * block)

    return depth_to_space


@op("SpaceToDepth")
def _space_to_depth(node: OpNode) -> Call:
    block, by_column = node.get("blocksize"), node.choice("mode", "DCR", "CRD") == "CRD"

    def space_to_depth(x: Tensor) -> Tensor:
        if by_column:
            return F.pixel_unshuffle(x, block)
        n, c, h, w = x.shape
        split = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return split.reshape(n, c * block**2, h // block, w // block)

    return space_to_depth


@op("ReverseSequence")
def _reverse_sequence(node: OpNode) -> Call:
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)

    def reverse(x: Tensor, lengths: Tensor) -> Tensor:
        turned = x.movedim((time, batch), (0, 1))
        steps = torch.arange(turned.shape[0], device=x.device)[:, None]
        source = torch.where(steps < lengths, lengths - 1 - steps, steps)
        index = source.reshape(source.shape + (1,) * (x.ndim - 2)).expand(turned.shape)
        return torch.gather(turned, 0, index).movedim((0, 1), (time, batch))

    return reverse


@op("NonZero", data_shaped=True)
def _non_zero(node: OpNode) -> Call:
    return lambda x: torch.nonzero(x).t() if x.ndim else torch.nonzero(x.reshape(1)).t()[:0]


@op("Compress", data_shaped=True)
def _compress(node: OpNode) -> Call:
    axis = node.get("axis")

    def compress(x: Tensor, condition: Tensor) -> Tensor:
        x = x.reshape(-1) if axis is None else x
        return x.index_select(axis or 0, torch.nonzero(condition).reshape(-1))

    return compress
