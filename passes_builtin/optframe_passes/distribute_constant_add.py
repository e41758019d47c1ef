"""The pass `distribute-constant-add`: a constant added before a linear layer is added behind it, with its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import of_rank, reshaped, times, trimmed
from optframe_passes.edit import Array, is_onnx, remove, small_constant
from optframe_passes.reduction import Reduction
from optframe_passes.surgery import Surgery, only_reader


@dataclass(frozen=True)
class DistributeConstantAdd(GraphPass):
    """Rewrite (x + c) W + b to x W + (c W + b) for constants c, W and b, and (x + c) + b to x + (c + b).

    So the positions that a transformer adds before its projections become part of their biases, and projections of x
    and of x + c become projections of one input. An addition moves only if all its readers let it through and the
    model gets no more nodes: each reader is a MatMul by a constant matrix, and all of them but one have a constant
    added behind them already. A Reshape in between that keeps the last axis goes behind the new addition, and what a
    ReduceMean or ReduceSum in between makes of the constant is added instead.
    The new constant keeps the broadcast shape of c: [1, 50, 1, 256] W is [1, 50, 1, columns]; it may take `max_bytes`.
    Subtraction of a constant counts as addition. Computed in float64.

    Example:
        before: `x1 = Add(x, position)`, `q = Add(MatMul(x1, wq), bq)`, `k = Add(MatMul(x1, wk), bk)`
        after:  `q = Add(MatMul(x, wq), bias_q)`, `k = Add(MatMul(x, wk), bias_k)`
    """

    name: ClassVar[str] = "distribute-constant-add"
    max_bytes: int = 4 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Distribute in place."""
        surgery = Surgery(model, context)
        waiting = [node for node in surgery.nodes() if _is_addition(surgery, node)]
        while waiting:
            waiting += _Distribution(surgery, waiting.pop(), self.max_bytes).run()
        return surgery.result


def _is_addition(surgery: Surgery, node: ir.Node) -> bool:
    return is_onnx(node, "Add", "Sub") and surgery.constant_side(node) is not None


@dataclass(frozen=True)
class _Taker:
    """Nodes in a row that take a constant from before them: each may be absent, but not the last two together.

    The Reshape keeps the last axis, and will stand behind the others. `addition` adds a constant already. There is a
    Reshape or a mean (or sum), if any, not both.
    """

    reshape: ir.Node | None = None
    mean: ir.Node | None = None
    product: ir.Node | None = None
    addition: ir.Node | None = None

    @classmethod
    def of(cls, surgery: Surgery, reader: ir.Node) -> _Taker | None:
        """Return the taker that begins with `reader`, None if there is none."""
        behind = only_reader(reader.outputs[0])
        if is_onnx(reader, "Reshape"):
            return cls._behind(surgery, behind, reshape=reader) if _keeps_last_axis(surgery, reader) else None
        if is_onnx(reader, "ReduceMean", "ReduceSum"):
            return cls._behind(surgery, behind, mean=reader)
        return cls._behind(surgery, reader)

    @classmethod
    def _behind(
        cls,
        surgery: Surgery,
        node: ir.Node | None,
        reshape: ir.Node | None = None,
        mean: ir.Node | None = None,
    ) -> _Taker | None:
        """Return the taker whose product or addition is `node`."""
        if node is None:
            return None
        if surgery.is_linear(node):
            addition = only_reader(node.outputs[0])
            biased = addition is not None and _is_addition(surgery, addition)
            return cls(reshape, mean, node, addition if biased else None)
        return cls(reshape, mean, None, node) if _is_addition(surgery, node) and reshape is None else None

    @property
    def nodes(self) -> list[ir.Node]:
        """All of them, first one first."""
        return [node for node in (self.reshape, self.mean, self.product, self.addition) if node is not None]

    def constant(self, surgery: Surgery, addend: Array) -> Array | None:
        """Return the constant to add behind the product, before the Reshape, in the place of `addend` before it."""
        if self.mean is not None:
            reduced = _reduced(surgery, self.mean, addend)
            if reduced is None:
                return None
            addend = reduced
        if self.product is not None:
            weight = surgery.constant(self.product.inputs[1])
            if weight is None:
                return None
            addend = times(addend, weight)
        side = None if self.addition is None else surgery.constant_side(self.addition)
        if self.addition is None or side is None:
            return trimmed(addend)
        bias = surgery.constant(self.addition.inputs[side])
        rank = surgery.rank(self.addition.inputs[1 - side])
        if bias is None or rank is None or bias.ndim > rank:  # it gives the result its rank, as written
            return None
        bias = self._before_reshape(surgery, bias)
        if bias is None:
            return None
        return trimmed(bias - addend if self.addition.op_type == "Sub" else bias + addend)

    def _before_reshape(self, surgery: Surgery, bias: Array | None) -> Array | None:
        """Return the constant of the addition as it is when the Reshape stands behind."""
        if bias is None or self.reshape is None or self.addition is None:
            return bias
        dims, result = (surgery.known.dims(value) for value in (self.reshape.inputs[0], self.addition.outputs[0]))
        if not dims or not result or bias.ndim > len(result) or len(result) != surgery.rank(self.reshape.outputs[0]):
            return None
        return reshaped(of_rank(bias, len(result)), result, (*dims[:-1], result[-1]))

    def moved(self, surgery: Surgery, source: ir.Node, data: ir.Value | None, constant: Array) -> list[ir.Node]:
        """Return the nodes that read `data` and add `constant`; `source` is the addition that goes."""
        new: list[ir.Node] = []
        if self.mean is not None:
            new.append(surgery.copy(self.mean, [data, *self.mean.inputs[1:]]))
            data = new[-1].outputs[0]
        if self.product is not None:
            new.append(surgery.copy(self.product, [data, self.product.inputs[1]]))
            data = new[-1].outputs[0]
        if self.addition is not None:
            side = surgery.constant_side(self.addition) or 0
            inputs = [data, data]
            inputs[side] = surgery.like(self.addition, side, constant)
            new.append(surgery.copy(self.addition, inputs))
        else:
            bias = surgery.like(source, surgery.constant_side(source) or 0, constant)
            new.append(surgery.new("Add", [data, bias], [source, *self.nodes]))
        if self.reshape is not None:
            target = surgery.initializer(self.reshape, f"{self.reshape.outputs[0].name}/shape", self._target(surgery))
            new.append(surgery.copy(self.reshape, [new[-1].outputs[0], target]))
        return new

    def _target(self, surgery: Surgery) -> Array:
        """Return the second input of the Reshape when it stands behind the product."""
        target = small_constant(self.reshape.inputs[1]) if self.reshape is not None else None
        weight = surgery.tensor(self.product.inputs[1]) if self.product is not None else None
        assert target is not None, "checked by _keeps_last_axis"
        assert weight is not None, "a linear layer has constant weights"
        return np.array([*target[:-1], weight.shape.numpy()[1]], np.int64)


def _reduced(surgery: Surgery, node: ir.Node, addend: Array) -> Array | None:
    """Return what the mean or sum `node` makes of a constant added before it, None if that is not known."""
    dims = surgery.known.dims(node.inputs[0])
    reduction = None if dims is None else Reduction.of(node, len(dims))
    return None if dims is None or reduction is None else reduction.of_constant(addend, len(dims), dims)


def _keeps_last_axis(surgery: Surgery, reshape: ir.Node) -> bool:
    """Return whether a Reshape to a constant shape leaves the last axis, of known size, as it is."""
    dims, result = surgery.known.dims(reshape.inputs[0]), surgery.known.dims(reshape.outputs[0])
    if not dims or not result or small_constant(reshape.inputs[1]) is None:
        return False
    return isinstance(dims[-1], int) and dims[-1] == result[-1] != 0


class _Distribution:
    """The attempt to move one addition of a constant behind its readers."""

    def __init__(self, surgery: Surgery, node: ir.Node, max_bytes: int) -> None:
        self._surgery = surgery
        self._node = node
        self._side = surgery.constant_side(node)
        self._max_bytes = max_bytes

    def run(self) -> list[ir.Node]:
        """Move it; return the additions that took its place."""
        if self._side is None or self._node.graph is None:
            return []
        readers = list(dict.fromkeys(use.node for use in self._node.outputs[0].uses()))
        takers = [taker for reader in readers if (taker := self._taker(reader)) is not None]
        if not takers:
            return []
        problem = self._problem(readers, takers)
        constants = self._constants(takers) if problem is None else None
        if problem is None and constants is None:
            problem = f"a constant behind its readers does not fit its type, its place or max_bytes={self._max_bytes}"
        if problem is not None:
            self._surgery.context.near_miss(self._node, problem)
        if constants is None or not self._surgery.context.allow(self._node):
            return []
        moved = [self._move(taker, constant) for taker, constant in zip(takers, constants, strict=True)]
        remove([self._node])
        return moved

    def _taker(self, reader: ir.Node) -> _Taker | None:
        return _Taker.of(self._surgery, reader) if reader.graph is self._node.graph else None

    def _problem(self, readers: Sequence[ir.Node], takers: Sequence[_Taker]) -> str | None:
        """Return why the addition would not vanish, or the model would get more nodes."""
        known, data = self._surgery.known, self._node.inputs[1 - (self._side or 0)]
        others = [reader.op_type for reader in readers if all(reader not in taker.nodes for taker in takers)]
        if others or self._node.outputs[0].is_graph_output():
            return f"{(*others, 'a graph output')[0]} reads the sum as well"
        growing = sum(taker.addition is None for taker in takers)
        if growing > 1:
            return f"{growing} of its readers have no bias that could take the constant"
        if known.dims(data) is None or known.dims(data) != known.dims(self._node.outputs[0]):
            return "it may broadcast what the constant is added to"
        return "it subtracts from the constant" if self._side == 0 and self._node.op_type == "Sub" else None

    def _constants(self, takers: Sequence[_Taker]) -> list[Array] | None:
        """Return the constant that each taker adds then, None if one of them does not fit."""
        addend = self._surgery.constant(self._node.inputs[self._side or 0])
        if addend is None:
            return None
        addend = -addend if self._node.op_type == "Sub" else addend
        constants = []
        for taker in takers:
            total = taker.constant(self._surgery, addend)
            array = None if total is None else self._surgery.fits(total, self._node.outputs[0], self._max_bytes)
            if array is None:
                return None
            constants.append(array)
        return constants

    def _move(self, taker: _Taker, constant: Array) -> ir.Node:
        """Let `taker` read the data and add `constant`; return that addition."""
        data = self._node.inputs[1 - (self._side or 0)]
        new = taker.moved(self._surgery, self._node, data, constant)
        self._surgery.context.stamp(new, [*taker.nodes, self._node])
        self._surgery.replace(taker.nodes, new)
        return next(node for node in new if is_onnx(node, "Add", "Sub"))
