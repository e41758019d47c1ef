"""The pass `exchange-mean-linear`: a mean or sum is taken before a linear layer instead of behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import of_rank, permutation
from optframe_passes.edit import Array, is_onnx, remove
from optframe_passes.reduction import Reduction
from optframe_passes.surgery import FLOATS, Surgery


@dataclass(frozen=True)
class ExchangeMeanLinear(GraphPass):
    """Take ReduceMean and ReduceSum, over axes that a linear layer does not mix, before that layer.

    A mean commutes with MatMul by a matrix from the right, with addition, subtraction, multiplication and division by
    a constant (whose own mean is taken), with Transpose, and with a Conv of kernel size 1 (GlobalAveragePool too). The
    layer then works on what is left: where the keys of 50 rows of 67 tokens are averaged over the rows, 67 tokens are
    projected instead of 3350. Reductions of the same tensor over the same axes become one.

    A layer stays behind if something else than reductions reads what it makes; then nothing would be saved. Where
    reductions over different axes read it, it is repeated for each, if that is less work.

    Example:
        before: `k = ReduceMean(Add(MatMul(x, w), b), axes=[1])`, x of shape (1, 50, 67, 256), b (256)
        after:  `k = Add(MatMul(ReduceMean(x, axes=[1]), w), b')`; b' = b, or its mean where it varies
    """

    name: ClassVar[str] = "exchange-mean-linear"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Exchange in place."""
        surgery = Surgery(model, context)
        waiting = surgery.nodes()
        while waiting:  # the last one first: what is behind a node has been exchanged with it before it is its turn
            node = waiting.pop()
            reductions = _reductions(surgery, node) if is_onnx(node, *_RULES) else []
            if reductions:
                waiting += _Exchange(surgery, node, reductions).run()
        return surgery.result


def _reductions(surgery: Surgery, node: ir.Node) -> list[tuple[ir.Node, Reduction]]:
    """Return the readers of `node` if they are all reductions that stand in the same graph."""
    rank = surgery.rank(node.outputs[0]) if len(node.outputs) == 1 else None
    if rank is None or node.outputs[0].is_graph_output():
        return []
    if surgery.known.dtype(node.outputs[0]) not in FLOATS:  # a mean of integers is cut off
        return []
    found: list[tuple[ir.Node, Reduction]] = []
    for use in node.outputs[0].uses():
        reduction = Reduction.of(use.node, rank) if use.idx == 0 and use.node.graph is node.graph else None
        if reduction is None:
            return []
        found.append((use.node, reduction))
    return found


@dataclass(frozen=True)
class _Exchanged:
    """A node behind a reduction of its input `data`: what reduces that, and what changes about the node itself."""

    before: Reduction
    data: int = 0
    constant: Array | None = None
    permutation: tuple[int, ...] | None = None


class _Exchange:
    """The attempt to take the reductions that read `node` before it."""

    def __init__(self, surgery: Surgery, node: ir.Node, readers: Sequence[tuple[ir.Node, Reduction]]) -> None:
        self._surgery = surgery
        self._node = node
        self._groups: dict[Reduction, list[ir.Node]] = {}
        for reader, reduction in readers:
            self._groups.setdefault(reduction, []).append(reader)

    def run(self) -> list[ir.Node]:
        """Exchange in place; return what has taken the place of the node."""
        rule = _RULES[self._node.op_type]
        exchanged = [rule(self._surgery, self._node, reduction) for reduction in self._groups]
        problem = "it does not commute with the reduction behind it" if None in exchanged else self._problem()
        if problem:
            self._surgery.context.near_miss(self._node, problem)
        if problem or not self._surgery.context.allow(self._node):
            return []
        pairs = zip(self._groups.values(), exchanged, strict=True)
        new = [self._replace(readers, each) for readers, each in pairs if each is not None]
        remove([self._node])
        self._surgery.rewrites += 1
        return new

    def _problem(self) -> str | None:
        """Return why the exchange would not pay, or would break something."""
        merged = [readers for readers in self._groups.values() if len(readers) > 1]
        if any(reader.outputs[0].is_graph_output() for readers in merged for reader in readers):
            return "several equal reductions read it, and make graph outputs"
        overflows = self._surgery.known.dtype(self._node.outputs[0]) == ir.DataType.FLOAT16
        if overflows and any(not reduction.mean for reduction in self._groups):
            return "a sum of its FP16 input could overflow"
        if len(self._groups) > 1 and self._remaining() > 1:
            return "it would be repeated for each reduction, which is more work"
        return None

    def _remaining(self) -> float:
        """Return the share of its work that `node` has left with several reductions before it."""
        dims = self._surgery.known.dims(self._node.outputs[0]) or ()
        if self._node.op_type not in ("Conv", "MatMul"):
            return math.inf  # cheap, and a node more for each reduction
        sizes = [[size for axis in reduction.axes if isinstance(size := dims[axis], int)] for reduction in self._groups]
        return sum(1 / max(math.prod(each), 1) for each in sizes)

    def _replace(self, readers: Sequence[ir.Node], exchanged: _Exchanged) -> ir.Node:
        """Put the reduction, and what is left of `node` behind it, in the place of `readers`; return the latter."""
        surgery, node = self._surgery, self._node
        first = self._reduction(readers[0], exchanged)
        inputs = list(node.inputs)
        inputs[exchanged.data] = first.outputs[0]
        if exchanged.constant is not None:
            inputs[1 - exchanged.data] = surgery.like(node, 1 - exchanged.data, exchanged.constant)
        second = surgery.copy(node, inputs)
        if exchanged.permutation is not None:
            second.attributes.add(ir.AttrInt64s("perm", exchanged.permutation))
        surgery.context.stamp([second], [node, *readers])
        surgery.insert(node, [first, second])
        surgery.take_over(readers[0].outputs[0], second.outputs[0])
        for reader in readers[1:]:
            reader.outputs[0].replace_all_uses_with(second.outputs[0])
        remove(readers)
        return second

    def _reduction(self, old: ir.Node, exchanged: _Exchanged) -> ir.Node:
        """Return the node that reduces what `node` was given, written as the opset wants it."""
        source, reduction = self._node.inputs[exchanged.data], exchanged.before
        if is_onnx(old, "GlobalAveragePool") and self._node.op_type == "Conv":
            return self._surgery.copy(old, [source])
        inputs: list[ir.Value | None] = [source]
        attributes: dict[str, int | Sequence[int]] = {"keepdims": int(reduction.keepdims)}
        axes = list(reduction.axes)
        if self._surgery.opset >= (18 if reduction.mean else 13):
            inputs.append(self._surgery.initializer(old, f"{old.outputs[0].name}/axes", np.array(axes, np.int64)))
        else:
            attributes["axes"] = axes
        op_type = "ReduceMean" if reduction.mean else "ReduceSum"
        return self._surgery.new(op_type, inputs, [old], attributes)


_Rule: TypeAlias = Callable[[Surgery, ir.Node, Reduction], _Exchanged | None]
"""Returns what is left of a node behind a reduction, None where the two do not commute."""


def _matmul(surgery: Surgery, node: ir.Node, reduction: Reduction) -> _Exchanged | None:
    rank, rank_of_matrix = surgery.rank(node.inputs[0]), surgery.rank(node.inputs[1])
    mixed = rank is None or rank - 1 in reduction.axes
    return None if mixed or rank_of_matrix != 2 else _Exchanged(reduction)


def _addition(surgery: Surgery, node: ir.Node, reduction: Reduction) -> _Exchanged | None:
    side = surgery.constant_side(node)
    return None if side is None else _with_constant(surgery, node, reduction, side, reduction)


def _scaling(surgery: Surgery, node: ir.Node, reduction: Reduction) -> _Exchanged | None:
    side = surgery.constant_side(node)
    array = None if side is None else surgery.constant(node.inputs[side])
    rank = surgery.rank(node.outputs[0])
    if side is None or array is None or rank is None or (node.op_type == "Div" and side == 0):
        return None
    full = of_rank(array, rank)
    if any(full.shape[axis] != 1 for axis in reduction.axes):
        return None
    return _with_constant(surgery, node, reduction, side, replace(reduction, mean=True))


def _with_constant(
    surgery: Surgery, node: ir.Node, reduction: Reduction, side: int, of_constant: Reduction
) -> _Exchanged | None:
    """Return `node` with its constant reduced too, if its other operand is not broadcast along the axes reduced."""
    array, value = surgery.constant(node.inputs[side]), node.inputs[1 - side]
    dims, result = surgery.known.dims(value), surgery.known.dims(node.outputs[0])
    if array is None or dims is None or result is None or len(dims) != len(result):
        return None
    if any(dims[axis] != result[axis] for axis in reduction.axes):
        return None
    reduced = of_constant.of_constant(array, len(dims), dims)
    constant = None if reduced is None else surgery.fits(reduced, value)
    return None if constant is None else _Exchanged(reduction, 1 - side, constant)


def _transpose(surgery: Surgery, node: ir.Node, reduction: Reduction) -> _Exchanged | None:
    rank = surgery.rank(node.inputs[0])
    if rank is None:
        return None
    order = permutation(node, rank)
    axes = [order[axis] for axis in reduction.axes]
    kept = [axis for axis in range(rank) if reduction.keepdims or axis not in axes]
    new_order = tuple(kept.index(axis) for axis in order if axis in kept)
    return _Exchanged(reduction.over(axes), permutation=new_order)


def _convolution(surgery: Surgery, node: ir.Node, reduction: Reduction) -> _Exchanged | None:
    dims = surgery.known.dims(node.inputs[1])
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    if dims is None or not reduction.keepdims or min(reduction.axes) < 2 or (biased and not reduction.mean):
        return None
    strides, pads = node.attributes.get_ints("strides", ()), node.attributes.get_ints("pads", ())
    pointwise = all(size == 1 for size in (*dims[2:], *(strides or ()))) and not any(pads or ())
    return _Exchanged(reduction) if pointwise else None


_RULES: dict[str, _Rule] = {
    "Add": _addition,
    "Conv": _convolution,
    "Div": _scaling,
    "MatMul": _matmul,
    "Mul": _scaling,
    "Sub": _addition,
    "Transpose": _transpose,
}
