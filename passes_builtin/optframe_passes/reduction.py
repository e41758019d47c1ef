"""Means and sums over axes: what a node does, and what it does to a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optframe_passes.broadcast import of_rank, trimmed
from optframe_passes.edit import Array, ints_option, is_onnx


@dataclass(frozen=True)
class Reduction:
    """What a ReduceMean, ReduceSum or GlobalAveragePool does; `axes` are sorted and not negative."""

    mean: bool
    axes: tuple[int, ...]
    keepdims: bool

    @classmethod
    def of(cls, node: ir.Node, rank: int) -> Reduction | None:
        """Return what `node` does to a tensor of `rank`, None if it is no such reduction, or over unknown axes."""
        if is_onnx(node, "GlobalAveragePool"):
            return cls(True, tuple(range(2, rank)), True)
        if not is_onnx(node, "ReduceMean", "ReduceSum"):
            return None
        axes = ints_option(node, "axes", 1)
        if axes == () and not node.attributes.get_int("noop_with_empty_axes", 0):
            axes = tuple(range(rank))
        if not axes:
            return None
        keepdims = bool(node.attributes.get_int("keepdims", 1))
        return cls(node.op_type == "ReduceMean", tuple(sorted({axis % rank for axis in axes})), keepdims)

    def of_constant(self, array: Array, rank: int, dims: Sequence[int | str]) -> Array | None:
        """Return the reduction of a constant that is broadcast to `dims`; None if it depends on an unknown size."""
        full = of_rank(array, rank)
        if self.mean:
            reduced = full.mean(axis=self.axes, keepdims=True)
        else:
            repeated = [dims[axis] for axis in self.axes if full.shape[axis] == 1]
            times = math.prod(size for size in repeated if isinstance(size, int))
            if any(isinstance(size, str) for size in repeated):
                return None
            reduced = full.sum(axis=self.axes, keepdims=True) * times
        return trimmed(reduced if self.keepdims else reduced.squeeze(self.axes))

    def over(self, axes: Sequence[int]) -> Reduction:
        """Return the same reduction over other axes."""
        return Reduction(self.mean, tuple(sorted(axes)), self.keepdims)
