"""The pass `fold-scale`: multiplication by a constant becomes part of the weights before or behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import before, behind, collapsed, is_rearrangement, of_rank
from optframe_passes.edit import Array, is_onnx
from optframe_passes.surgery import Surgery, only_reader, producer_of

_FARTHEST = 100
"""How many nodes are looked at around a factor."""

_HOMOGENEOUS = ("Abs", "LeakyRelu", "Relu")
"""f(s x) = s f(x) for positive s."""


@dataclass(frozen=True)
class FoldScale(GraphPass):
    """Fold multiplication and division by a constant into the constant weights and biases of a neighbour.

    MatMul, Gemm, Conv and ConvTranspose take a scale, and so does another constant factor. It reaches those before it
    through addition of constants (which are scaled), Reshape, Transpose, Squeeze and Unsqueeze and, where it is one
    positive number, through Relu and through a MatMul of two activations: the 1/sqrt(d) of attention becomes part of
    the query's weights. Those behind it, through the same ops but for the last, take it where all readers of the
    product do. A scale has one number, or one
    for each column or channel that the weights have. Computed in float64 and rounded once; where FP16 weights would
    leave their range the scale stays.

    A weight with other readers is copied, and a bias grows to the shape of the scale, up to `max_copy_bytes`.

    Example:
        before: `y = Transpose(Reshape(Add(MatMul(x, w), b), shape)) * 0.125`
        after:  `y = Transpose(Reshape(Add(MatMul(x, 0.125 * w), 0.125 * b), shape))`
    """

    name: ClassVar[str] = "fold-scale"
    max_copy_bytes: int = 4 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold in place."""
        surgery = Surgery(model, context)
        while True:  # a factor that goes may open the way for another
            rewrites = surgery.rewrites
            factors = [node for node in surgery.nodes() if is_onnx(node, "Mul", "Div")]
            stuck = [node for node in factors if node.graph and not _Folding(surgery, node, self.max_copy_bytes).run()]
            if surgery.rewrites == rewrites:
                break
        for node in stuck:
            context.near_miss(node, "no constant weights before or behind it can take the factor")
        return surgery.result


Steps: TypeAlias = dict[ir.Node, dict[int, Array]]
"""Nodes to rebuild, in topological order, and the constants that they read then by index of input."""


class _Folding:
    """The attempt to fold one Mul or Div; a scale has the rank of the value that it multiplies, and float64."""

    def __init__(self, surgery: Surgery, node: ir.Node, max_copy_bytes: int) -> None:
        self._surgery = surgery
        self._known = surgery.known
        self._node = node
        self._max_copy_bytes = max_copy_bytes
        self._budget = _FARTHEST

    def run(self) -> bool:
        """Fold it; return False if it is the product with a constant, but nothing can take that."""
        side = self._surgery.constant_side(self._node)
        scale = None if side is None else self._scale(side)
        if side is None or scale is None:
            return True
        steps = self._steps(side, scale)
        if steps is not None and self._surgery.context.allow(self._node):
            self._surgery.rebuild(list(steps), (self._node, 1 - side), steps)
        return steps is not None

    def _scale(self, side: int) -> Array | None:
        data, output = self._known.dims(self._node.inputs[1 - side]), self._known.dims(self._node.outputs[0])
        number = self._surgery.constant(self._node.inputs[side])
        divides = self._node.op_type == "Div"
        if data is None or data != output or number is None or (divides and side == 0):
            return None
        if not (np.isfinite(number).all() and number.all()):
            return None
        return of_rank(collapsed(1 / number if divides else number), len(data))

    def _steps(self, side: int, scale: Array) -> Steps | None:
        above = self._climb(self._node.inputs[1 - side], scale)
        if above is not None:
            return {**above, self._node: {}}
        below = self._descend(self._node, scale)
        return None if below is None else {self._node: {}, **below}

    def _climb(self, value: ir.Value | None, scale: Array) -> Steps | None:
        """Return how to scale `value`, which has no other reader, by scaling constants that it is made from."""
        node = producer_of(value)
        self._budget -= 1
        if value is None or node is None or only_reader(value) is None or len(node.outputs) != 1 or self._budget < 0:
            return None
        if is_rearrangement(node):
            return self._after(node, 0, before(node, scale, self._known))
        if node.op_type in _HOMOGENEOUS:
            return self._after(node, 0, scale if scale.size == 1 and scale.item() > 0 else None)
        if node.op_type in ("Add", "Sub"):
            return self._climb_addition(node, scale)
        if node.op_type in ("Mul", "Div"):
            return self._into_factor(node, scale)
        if node.op_type == "MatMul" and self._surgery.constant_side(node) is None:
            return self._climb_product(node, scale)
        return self._into_outputs(node, scale)

    def _after(self, node: ir.Node, index: int, scale: Array | None) -> Steps | None:
        """Return the steps that scale input `index` of `node`, then `node` itself."""
        steps = None if scale is None else self._climb(node.inputs[index], scale)
        return None if steps is None else {**steps, node: {}}

    def _climb_addition(self, node: ir.Node, scale: Array) -> Steps | None:
        side = self._surgery.constant_side(node)
        if side is None:
            return None
        if self._known.dims(node.inputs[1 - side]) != self._known.dims(node.outputs[0]):
            return None
        scaled = self._scaled_constant(node, side, scale)
        steps = None if scaled is None else self._climb(node.inputs[1 - side], scale)
        return None if scaled is None or steps is None else {**steps, node: {side: scaled}}

    def _climb_product(self, node: ir.Node, scale: Array) -> Steps | None:
        """A product of two activations is scaled by scaling either; in FP16 a larger operand could overflow."""
        grows = abs(scale.item()) > 1 if scale.size == 1 else True
        if scale.size != 1 or (grows and self._known.dtype(node.outputs[0]) == ir.DataType.FLOAT16):
            return None
        for index in (0, 1):
            rank = self._surgery.rank(node.inputs[index])
            steps = None if rank is None else self._after(node, index, scale.reshape((1,) * rank))
            if steps is not None:
                return steps
        return None

    def _into_factor(self, node: ir.Node, scale: Array) -> Steps | None:
        side = self._surgery.constant_side(node)
        if side is None:
            return None
        inverse = node.op_type == "Div" and side == 1
        scaled = self._scaled_constant(node, side, 1 / scale if inverse else scale)
        return None if scaled is None else {node: {side: scaled}}

    def _scaled_constant(self, node: ir.Node, index: int, scale: Array) -> Array | None:
        """Return the constant that is input `index` of `node`, times `scale`, with as few axes as that allows."""
        array = self._surgery.constant(node.inputs[index])
        if array is None or array.ndim > scale.ndim:
            return None
        product = collapsed(scale) * array
        while product.ndim > array.ndim and product.shape[0] == 1:
            product = product[0]
        return self._replaced(node, index, product)

    def _replaced(self, node: ir.Node, index: int, array: Array, axis: int | None = None) -> Array | None:
        """Return `array` in the type of the constant whose place it takes, None if it may not take it."""
        value = node.inputs[index]
        grows = value is not None and (len(value.uses()) > 1 or self._surgery.known.static(value) != array.shape)
        return self._surgery.fits(array, value, self._max_copy_bytes if grows else None, axis)

    def _into_outputs(self, node: ir.Node, scale: Array) -> Steps | None:
        """Scale the weights of `node`, and its bias, so that what it makes is scaled."""
        axis = scale.ndim - 1 if node.op_type in ("Gemm", "MatMul") else 1
        vector = _vector(scale, axis)
        index = 0 if node.op_type == "MatMul" and self._surgery.constant_side(node) == 0 else 1
        if vector is None or node.op_type not in _WEIGHTED or (index == 0 and vector.size != 1):
            return None
        scaled = self._scaled_weight(node, index, vector, _output_axis(node))
        steps = None if scaled is None else {index: scaled}
        if steps is None or len(node.inputs) < 3 or node.inputs[2] is None:
            return None if steps is None else {node: steps}
        bias = self._surgery.constant(node.inputs[2])
        scaled_bias = None if bias is None else self._replaced(node, 2, bias * vector)
        return None if scaled_bias is None else {node: {**steps, 2: scaled_bias}}

    def _scaled_weight(self, node: ir.Node, index: int, vector: Array, axis: int | None) -> Array | None:
        """Return the weights that are input `index` of `node`, times `vector` along `axis`."""
        weight = self._surgery.constant(node.inputs[index])
        if weight is None or (vector.size != 1 and (axis is None or weight.ndim < 2)):
            return None
        shape = [1] * weight.ndim
        if axis is not None and vector.size > 1:
            shape[axis] = vector.size
        return self._replaced(node, index, weight * vector.reshape(shape), axis if vector.size > 1 else None)

    def _descend(self, node: ir.Node, scale: Array) -> Steps | None:
        """Return how to scale what all readers of `node` make of it by scaling constants of theirs instead."""
        value = node.outputs[0]
        self._budget -= 1
        if value.is_graph_output() or not value.uses() or self._budget < 0:
            return None
        steps: Steps = {}
        for use in value.uses():
            found = self._into_reader(use.node, use.idx, scale) if use.node.graph is node.graph else None
            if found is None or not steps.keys().isdisjoint(found):
                return None
            steps |= found
        return steps

    def _into_reader(self, node: ir.Node, index: int, scale: Array) -> Steps | None:
        if is_rearrangement(node) and index == 0:
            found = behind(node, scale, self._known)
            return None if found is None else self._before(node, found)
        if is_onnx(node, *_HOMOGENEOUS):
            return self._before(node, scale) if scale.size == 1 and scale.item() > 0 else None
        if is_onnx(node, "Add", "Sub"):
            return self._before_addition(node, index, scale)
        if index != 0 or not is_onnx(node, *_WEIGHTED) or self._surgery.tensor(node.inputs[0]) is not None:
            return None
        return self._into_inputs(node, scale)

    def _before(self, node: ir.Node, scale: Array) -> Steps | None:
        steps = self._descend(node, scale)
        return None if steps is None else {node: {}, **steps}

    def _before_addition(self, node: ir.Node, index: int, scale: Array) -> Steps | None:
        """Let what is behind the addition of a constant take the scale, and divide the constant by it.

        The sum grows by as much: not where that could overflow, in FP16 or by more than a model's numbers should bear.
        """
        side = self._surgery.constant_side(node)
        grows = np.abs(scale).min(initial=1.0)
        if grows < (1.0 if self._known.dtype(node.outputs[0]) == ir.DataType.FLOAT16 else _MOST_GROWTH):
            return None
        if side is None or side == index or self._known.dims(node.inputs[index]) != self._known.dims(node.outputs[0]):
            return None
        scaled = self._scaled_constant(node, side, 1 / scale)
        steps = None if scaled is None else self._descend(node, scale)
        return None if scaled is None or steps is None else {node: {side: scaled}, **steps}

    def _into_inputs(self, node: ir.Node, scale: Array) -> Steps | None:
        """Scale the weights of `node` so that its input needs no scale."""
        axis = scale.ndim - 1 if node.op_type in ("Gemm", "MatMul") else 1
        vector = _vector(scale, axis)
        if vector is None or (vector.size > 1 and node.attributes.get_int("group", 1) != 1):
            return None
        if node.attributes.get_int("transA", 0) and vector.size > 1:
            return None
        scaled = self._scaled_weight(node, 1, vector, _input_axis(node))
        return None if scaled is None else {node: {1: scaled}}


def _vector(scale: Array, axis: int) -> Array | None:
    """Return `scale` as a vector along `axis`, None if it varies along another."""
    varies = [index for index, size in enumerate(scale.shape) if size != 1]
    return scale.reshape(-1) if all(index == axis for index in varies) else None


def _output_axis(node: ir.Node) -> int | None:
    """Return the axis of the weights of `node` that belongs to its output's columns or channels, None if none does."""
    if node.op_type == "Gemm":
        return 1 - node.attributes.get_int("transB", 0)
    return {"MatMul": -1, "Conv": 0}.get(node.op_type)


def _input_axis(node: ir.Node) -> int | None:
    """Return the axis of the weights of `node` that belongs to its first input's columns or channels."""
    if node.op_type == "Gemm":
        return node.attributes.get_int("transB", 0)
    return {"MatMul": -2, "Conv": 1, "ConvTranspose": 0}.get(node.op_type)


_MOST_GROWTH = 1e-6
"""The smallest scale by which a constant of FP32 is divided: sums grow by its inverse at most."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
