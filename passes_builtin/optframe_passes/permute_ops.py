"""What an op becomes when the axes of all it reads and makes are in another order: its attributes, its constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optframe_passes.edit import Array, ints_option, is_onnx, small_constant
from optframe_passes.surgery import Surgery

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Cos",
    "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
})
_REDUCTIONS = frozenset({
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
})
# fmt: on


@dataclass(frozen=True)
class Permuted:
    """How a node works on permuted tensors.

    `data` are the indices of the inputs that are permuted (constants among them too); `attributes` and `inputs` take
    the place of those that it has; `swapped`: its two inputs change places.
    """

    data: tuple[int, ...] = (0,)
    attributes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    inputs: Mapping[int, Array] = field(default_factory=dict)
    swapped: bool = False


Order = tuple[int, ...]
"""The permutation of a Transpose: axis `order[i]` of the original is axis i of what is permuted."""


def inverse(order: Sequence[int]) -> Order:
    """Return the permutation that undoes `order`."""
    return tuple(int(axis) for axis in np.argsort(order))


def permuted(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    """Return how `node` gives its outputs with axes in `order` from inputs in that order, None if it cannot."""
    rule = _elementwise if node.op_type in _ELEMENTWISE else _RULES.get(node.op_type)
    if rule is None or not is_onnx(node):
        return None
    used = [value for value in node.outputs if value.name != ""]
    if any(surgery.rank(value) != len(order) for value in used):
        return None
    found = rule(surgery, node, order)
    return found if found is not None and all(_fits(surgery, node, index, order) for index in found.data) else None


def accepts(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    """Return how `node` gives its outputs as they are from a first input in `order`, None if it cannot.

    It can if it removes axes, and leaves the others in their order.
    """
    if not is_onnx(node, *_REDUCTIONS) or bool(node.attributes.get_int("keepdims", 1)):
        return None
    axes = _axes(node, len(order))
    left = [axis for axis in order if axis not in (axes or ())]
    return _moved_axes(node, axes, order) if axes and left == sorted(left) else None


def _fits(surgery: Surgery, node: ir.Node, index: int, order: Order) -> bool:
    """Return whether input `index` can be permuted: of the same rank, a constant that can get it, or a scalar."""
    value = node.inputs[index]
    rank = surgery.rank(value)
    if value is None or rank == len(order) or rank == 0:
        return True
    return rank is not None and rank < len(order) and surgery.any_tensor(value) is not None


def _elementwise(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    """Ops that broadcast; none that repeats elements, as a Transpose behind it would have more to move."""
    dims = surgery.known.dims(node.outputs[0])
    same = any(surgery.known.dims(value) == dims for value in node.inputs if surgery.any_tensor(value) is None)
    return Permuted(tuple(range(len(node.inputs)))) if same else None


def _of_one(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    """Clip, whose other inputs are scalars."""
    return Permuted()


def _along_axis(default: int, *data: int) -> Rule:
    """Return the rule for ops whose attribute `axis` says along which axis they work."""

    def rule(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
        axis = int(node.attributes.get_int("axis", default))
        if not -len(order) <= axis < len(order):  # an invalid node stays invalid
            return None
        return Permuted(data or (0,), {"axis": order.index(axis % len(order))})

    return rule


def _softmax(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    return _along_axis(-1)(surgery, node, order) if surgery.opset >= 13 else None  # before, it worked on a matrix


def _concat(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    if any(surgery.rank(value) != len(order) for value in node.inputs):
        return None
    return _along_axis(0, *range(len(node.inputs)))(surgery, node, order)


def _gather(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    return _along_axis(0)(surgery, node, order) if surgery.rank(node.inputs[1]) == 1 else None


def _arg(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    return _along_axis(0)(surgery, node, order) if node.attributes.get_int("keepdims", 1) else None


def _axes(node: ir.Node, rank: int, index: int = 1) -> tuple[int, ...] | None:
    axes = ints_option(node, "axes", index)
    if axes is None or not all(-rank <= axis < rank for axis in axes):
        return None
    return tuple(axis % rank for axis in axes)


def _moved_axes(
    node: ir.Node, axes: Sequence[int], order: Order, index: int = 1, dtype: ir.DataType | None = None
) -> Permuted:
    """Give `node` the axes that are at the place of `axes`, as an attribute or input `index` of `dtype` (int64)."""
    places = [order.index(axis) for axis in axes]
    if "axes" in node.attributes:
        return Permuted(attributes={"axes": places})
    return Permuted(inputs={index: np.array(places, np.int64 if dtype is None else dtype.numpy())})


def _reduction(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    axes = _axes(node, len(order)) if node.attributes.get_int("keepdims", 1) else None
    return _moved_axes(node, axes, order) if axes else None


def _pad(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = _axes(node, len(order), 3)
        return _moved_axes(node, axes, order, 3) if axes else None
    pads = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or pads.size != 2 * len(order):
        return None
    return Permuted(inputs={1: pads.reshape(2, -1)[:, list(order)].reshape(-1)})


def _slice(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    starts = surgery.known.dims(node.inputs[1]) if len(node.inputs) > 2 else None
    axes = _axes(node, len(order), 3)
    if axes == () and starts is not None and isinstance(starts[0], int):
        axes = tuple(range(starts[0]))
    dtype = surgery.known.dtype(node.inputs[1]) if starts is not None else None  # all of a Slice's inputs have it
    return _moved_axes(node, axes, order, 3, dtype) if axes and dtype is not None else None


def _tile(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    repeats = small_constant(node.inputs[1]) if len(node.inputs) == 2 else None
    return None if repeats is None or repeats.size != len(order) else Permuted(inputs={1: repeats[list(order)]})


def _layer_norm(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    rank = len(order)
    last = node.attributes.get_int("axis", -1) % rank == rank - 1 == order[-1]
    return Permuted() if last and len([value for value in node.outputs if value.name != ""]) == 1 else None


def _matmul(surgery: Surgery, node: ir.Node, order: Order) -> Permuted | None:
    """Products of stacked matrices: their order is free, and (a b)' is b' a'; by one matrix: the rows are free."""
    rank = len(order)
    if rank > 2 and surgery.rank(node.inputs[1]) == 2:
        return Permuted() if order[-1] == rank - 1 else None
    if any(surgery.rank(value) != rank or surgery.any_tensor(value) is not None for value in node.inputs):
        return None
    if sorted(order[-2:]) != [rank - 2, rank - 1]:
        return None
    return Permuted((0, 1), swapped=order[-1] != rank - 1)


Rule = Callable[[Surgery, ir.Node, Order], Permuted | None]

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Clip": _of_one,
    "Concat": _concat,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "Pad": _pad,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _along_axis(0),
    "Tile": _tile,
}


def elements(dims: Sequence[int | str] | None, unknown: int = 16) -> int:
    """Return how many elements a tensor has, with sizes that are not known taken for `unknown`."""
    return math.prod(dim if isinstance(dim, int) else unknown for dim in dims or ())
