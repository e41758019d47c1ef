"""The pass `drop-softmax-invariant`: biases of keys and values that attention cancels or hands on unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import behind, collapsed, is_rearrangement, of_rank, permutation, trimmed
from optframe_passes.edit import Array, is_onnx
from optframe_passes.surgery import Surgery, only_reader, producer_of

_FARTHEST = 20
"""How many nodes are looked at between a Softmax and the scores."""


@dataclass(frozen=True)
class DropSoftmaxInvariant(GraphPass):
    """Remove additions of constants that a Softmax over the last axis makes needless.

    softmax(s + t) = softmax(s) where t is constant along the axis. So a constant added to all scores of a row drops
    out, and with it the bias of the keys: q (k + b)^T = q k^T + q b^T, one number for each query. Masks in between stay
    exact, whether they are added or put -inf in the place of scores.

    The rows of a softmax sum to 1. So a bias b of the values passes attention unchanged, A (v + b) = A v + b, and
    becomes part of the next constant that is added: directly, or behind a projection w as b w. A row whose scores
    are all masked is NaN before and after. Attention over rows followed by one over columns is passed as well.

    The additions are found through Reshape, Transpose, Squeeze and Unsqueeze; nothing else may read what lies between.
    The constant behind attention may take `max_bytes`.

    Example:
        before: `p = Softmax(MatMul(q, Transpose(Add(k, bk))))`, `y = Add(MatMul(MatMul(p, Add(v, bv)), w), b)`
        after:  `p = Softmax(MatMul(q, Transpose(k)))`, `y = Add(MatMul(MatMul(p, v), w), b + bv w)`
    """

    name: ClassVar[str] = "drop-softmax-invariant"
    max_bytes: int = 4 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Remove in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes():
            if node.graph is None:
                continue
            if _is_softmax(surgery, node):
                _drop_from_scores(surgery, node)
            elif is_onnx(node, "MatMul") and _rows_sum_to_one(surgery, node.inputs[0]):
                _ValueBias(surgery, node, self.max_bytes).move()
        return surgery.result


Path: TypeAlias = list[ir.Node]
"""An addition of a constant and the nodes behind it, each reading the one before."""


def _is_softmax(surgery: Surgery, node: ir.Node) -> bool:
    """Return whether `node` is a Softmax over the last axis."""
    rank = surgery.rank(node.inputs[0]) if is_onnx(node, "Softmax") else None
    default = -1 if surgery.opset >= 13 else 1
    return bool(rank) and node.attributes.get_int("axis", default) in (-1, (rank or 0) - 1)


def _rows_sum_to_one(surgery: Surgery, value: ir.Value | None) -> bool:
    """Return whether `value` is a Softmax over its last axis, or a rearrangement that keeps this axis."""
    node = producer_of(value)
    while node is not None and is_rearrangement(node) and _keeps_last_axis(surgery, node):
        node = producer_of(node.inputs[0])
    return node is not None and _is_softmax(surgery, node)


def _keeps_last_axis(surgery: Surgery, node: ir.Node) -> bool:
    """Return whether the last axis in front of a rearrangement is the last one behind it."""
    dims, result = surgery.known.dims(node.inputs[0]), surgery.known.dims(node.outputs[0])
    if not dims or not result:
        return False
    if node.op_type == "Transpose":
        return permutation(node, len(dims))[-1] == len(dims) - 1
    return dims[-1] == result[-1]


def _drop_from_scores(surgery: Surgery, softmax: ir.Node) -> None:
    while True:
        path = _invariant_scores(surgery, softmax.inputs[0])
        if not path or not surgery.context.allow(path[0]):
            return
        softmax = surgery.rebuild([*path, softmax], _skipping(surgery, path[0]), {})


def _skipping(surgery: Surgery, addition: ir.Node) -> tuple[ir.Node, int]:
    """Return an addition of a constant and the index of its other operand."""
    return addition, 1 - (surgery.constant_side(addition) or 0)


def _invariant_scores(surgery: Surgery, value: ir.Value | None, farthest: int = _FARTHEST) -> Path | None:
    """Return the path from an addition that is constant along the last axis of `value` to the node that makes it."""
    node = producer_of(value)
    if value is None or node is None or only_reader(value) is None or farthest == 0:
        return None
    if node.op_type == "MatMul":
        path = _constant_keys(surgery, node.inputs[1])
        return None if path is None else [*path, node]
    addend = _addend(surgery, node)
    if addend is not None and addend.shape[-1] == 1:
        return [node]
    for operand in _score_operands(surgery, node):
        path = _invariant_scores(surgery, operand, farthest - 1)
        if path is not None:
            return [*path, node]
    return None


def _score_operands(surgery: Surgery, node: ir.Node) -> Sequence[ir.Value | None]:
    """Return the inputs of `node` to which adding a constant along the last axis adds one behind `node`, or nothing."""
    if is_rearrangement(node) and _keeps_last_axis(surgery, node):
        return node.inputs[:1]
    if node.op_type == "Add":
        return node.inputs
    if node.op_type == "Where":
        fills = [_is_minus_infinity(surgery, value) for value in node.inputs]
        return node.inputs[2:] if fills[1] else node.inputs[1:2] if fills[2] else ()
    side = surgery.constant_side(node) if node.op_type in ("Div", "Mul") else None
    factor = None if side is None else surgery.constant(node.inputs[side])
    if side is None or factor is None or (node.op_type == "Div" and side == 0):
        return ()
    return [node.inputs[1 - side]] if factor.ndim == 0 or collapsed(factor).shape[-1] == 1 else ()


def _is_minus_infinity(surgery: Surgery, value: ir.Value | None) -> bool:
    tensor = surgery.tensor(value)
    return tensor is not None and bool(np.isneginf(tensor.numpy()).all())


def _constant_keys(surgery: Surgery, value: ir.Value | None) -> Path | None:
    """Return the path from an addition to keys `value`, columns of a product's right operand, equal for all columns."""
    found = _rearranged_addend(surgery, value)
    if found is None or found[1].ndim < 2:
        return None
    path, addend = found
    if addend.shape[-1] != 1:
        surgery.context.near_miss(path[0], "its constant is not the same for all keys")
        return None
    return path


def _rearranged_addend(surgery: Surgery, value: ir.Value | None) -> tuple[Path, Array] | None:
    """Return the path from the first addition of a constant to `value`, and the constant as it appears there."""
    path: Path = []
    while (node := producer_of(value)) is not None and value is not None and only_reader(value) is not None:
        path.insert(0, node)
        addend = _addend(surgery, node)
        if addend is not None:
            rearranged = _behind_all(surgery, path[1:], addend)
            return None if rearranged is None else (path, rearranged)
        if not is_rearrangement(node):
            return None
        value = node.inputs[0]
    return None


def _addend(surgery: Surgery, node: ir.Node) -> Array | None:
    """Return the finite constant that an Add or Sub adds, in the rank of its result; None for other nodes.

    It must leave the shape of what it is added to as it is.
    """
    side = surgery.constant_side(node) if is_onnx(node, "Add", "Sub") else None
    array = None if side is None else surgery.constant(node.inputs[side])
    dims = surgery.known.dims(node.outputs[0])
    if side is None or array is None or not dims or surgery.known.dims(node.inputs[1 - side]) != dims:
        return None
    if not np.isfinite(array).all() or (node.op_type == "Sub" and side == 0):
        return None
    return of_rank(collapsed(-array if node.op_type == "Sub" else array), len(dims))


def _behind_all(surgery: Surgery, nodes: Path, array: Array) -> Array | None:
    """Return what adding `array` in front of all the rearrangements `nodes` adds behind them."""
    rearranged: Array | None = array
    for node in nodes:
        rearranged = None if rearranged is None else behind(node, rearranged, surgery.known)
    return rearranged


class _ValueBias:
    """The attempt to move a bias of the values behind `attention`, a MatMul whose left operand's rows sum to 1."""

    def __init__(self, surgery: Surgery, attention: ir.Node, max_bytes: int) -> None:
        self._surgery = surgery
        self._attention = attention
        self._max_bytes = max_bytes

    def move(self) -> None:
        """Move it if a constant that is added later can take it."""
        surgery = self._surgery
        found = _rearranged_addend(surgery, self._attention.inputs[1])
        if found is None:
            return
        path, addend = found
        passed = self._passed(self._attention, addend)
        below = None if passed is None else self._below(passed)
        if below is None:
            surgery.context.near_miss(path[0], "no constant behind the attention can take this bias of its values")
        elif surgery.context.allow(path[0]):
            nodes, side, constant = below
            nodes = [*path, self._attention, *nodes]
            surgery.rebuild(nodes, _skipping(surgery, path[0]), {nodes[-1]: {side: constant}})

    def _passed(self, attention: ir.Node, addend: Array) -> Array | None:
        """Return what a constant added to all values alike adds behind `attention`."""
        rank = self._surgery.rank(attention.outputs[0])
        if rank is None or not 2 <= addend.ndim <= rank or addend.shape[-2] != 1:
            return None
        return of_rank(addend, rank)

    def _below(self, addend: Array) -> tuple[Path, int, Array] | None:
        """Return the nodes behind the attention down to an addition, which input its constant is, and the new one."""
        path: Path = []
        node = only_reader(self._attention.outputs[0])
        previous, current = self._attention.outputs[0], addend
        while node is not None:
            path.append(node)
            side = self._surgery.constant_side(node) if is_onnx(node, "Add", "Sub") else None
            if side is not None:
                constant = self._absorbed(node, side, current)
                return None if constant is None else (path, side, constant)
            moved = self._behind(node, previous, current)
            if moved is None:
                return None
            previous, current = node.outputs[0], moved
            node = only_reader(previous)
        return None

    def _behind(self, node: ir.Node, value: ir.Value, addend: Array) -> Array | None:
        """Return what adding `addend` to `value`, an input of `node`, adds behind `node`."""
        surgery = self._surgery
        if is_rearrangement(node):
            return behind(node, addend, surgery.known)
        if surgery.is_linear(node):
            weight = surgery.constant(node.inputs[1])
            assert weight is not None, "linear layers have constant weights"
            return np.broadcast_to(addend, addend.shape[:-1] + weight.shape[:1]) @ weight
        if is_onnx(node, "MatMul") and node.inputs[1] is value and _rows_sum_to_one(surgery, node.inputs[0]):
            return self._passed(node, addend)
        return None

    def _absorbed(self, node: ir.Node, side: int, addend: Array) -> Array | None:
        """Return the constant of the addition `node` with `addend` in it."""
        surgery = self._surgery
        bias = surgery.constant(node.inputs[side])
        if bias is None or surgery.known.dims(node.inputs[1 - side]) != surgery.known.dims(node.outputs[0]):
            return None
        total = bias - addend if node.op_type == "Sub" else bias + addend
        return surgery.fits(trimmed(total), node.inputs[side], self._max_bytes)
