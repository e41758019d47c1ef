"""The pass `compose-linear`: two linear layers with nothing between them become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import times, trimmed
from optframe_passes.edit import Array, is_onnx
from optframe_passes.surgery import Surgery, only_reader


@dataclass(frozen=True)
class ComposeLinear(GraphPass):
    """Multiply the constant matrices of two MatMuls in a row into one, where that is no more work.

    (x V + b) W becomes x (V W) + b W for constants V (K, M), W (M, N) and b, if nothing else reads what lies between
    and K N <= K M + M N: a narrow middle (a low-rank product) stays as it is. Computed in float64 and rounded once.

    Example:
        before: `y = MatMul(MatMul(x, v), w)`, v and w of shape (256, 256)
        after:  `y = MatMul(x, vw)`
    """

    name: ClassVar[str] = "compose-linear"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Compose in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes():
            while node.graph is not None and surgery.is_linear(node):
                composed = _compose(surgery, node)
                if composed is None:
                    break
                node = composed
        return surgery.result


def _compose(surgery: Surgery, first: ir.Node) -> ir.Node | None:
    """Compose `first` with the linear layer behind it; return the new MatMul, None if there is nothing to compose."""
    addition, second = _followers(surgery, first)
    if second is None:
        return None
    left, right = surgery.constant(first.inputs[1]), surgery.constant(second.inputs[1])
    if left is None or right is None:
        return None
    depth, middle, columns = left.shape[0], left.shape[1], right.shape[1]
    if depth * columns > depth * middle + middle * columns:
        surgery.context.near_miss(first, f"{depth} x {columns} at once are more work than by way of {middle}")
        return None
    weight = surgery.fits(left @ right, first.inputs[1])
    bias = None if addition is None else _bias_behind(surgery, addition, right)
    if weight is None or (addition is not None and bias is None):
        surgery.context.near_miss(first, "the product of the weights does not fit their type")
        return None
    if not surgery.context.allow(first):
        return None
    nodes = [first, *([addition] if addition is not None else []), second]
    new = [surgery.copy(second, [first.inputs[0], surgery.like(second, 1, weight)])]
    if addition is not None and bias is not None:
        side = surgery.constant_side(addition) or 0
        inputs = [new[0].outputs[0]] * 2
        inputs[side] = surgery.like(addition, side, bias)
        new.append(surgery.copy(addition, inputs))
    surgery.replace(nodes, new)
    return new[0]


def _followers(surgery: Surgery, first: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """Return the addition of a constant behind `first`, if any, and the linear layer that alone reads the result."""
    addition, second = None, only_reader(first.outputs[0])
    if second is not None and is_onnx(second, "Add") and surgery.constant_side(second) is not None:
        addition, second = second, only_reader(second.outputs[0])
    if not surgery.is_linear(second):
        return None, None
    dims = surgery.known.dims(first.outputs[0])
    widened = addition is not None and (dims is None or surgery.known.dims(addition.outputs[0]) != dims)
    return (None, None) if widened else (addition, second)


def _bias_behind(surgery: Surgery, addition: ir.Node, weight: Array) -> Array | None:
    """Return the constant of `addition` as it is behind a multiplication by `weight`, None if it does not fit."""
    value = addition.inputs[surgery.constant_side(addition) or 0]
    array = surgery.constant(value)
    if array is None:
        return None
    return surgery.fits(trimmed(times(array, weight)), value)
