"""The pass `fold-where`: Where, And, Or and Xor under a mask that is the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import all_nodes
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.constant_pool import tensor_of
from optframe_passes.edit import bypass, can_bypass, is_onnx, remove
from optframe_passes.surgery import LARGEST_WEIGHT, Surgery, producer_of

_MASK_RANGE = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
"""Ops whose output holds nothing but elements of their first input."""


@dataclass(frozen=True)
class FoldWhere(GraphPass):
    """Replace Where by the branch that a mask of one value always takes, and logic on such masks by its result.

    A mask is known where it is constant, where it was only expanded, reshaped or tiled from such a one, and behind
    Not, And, Or and Xor of known masks (And needs one false, Or one true); where both branches are the same value the
    mask does not matter. If the branch is smaller than the result
    of the Where, because the mask or the other branch broadcasts it, an Expand takes the place of the Where.
    Masks that differ from element to element stay.

    Example:
        before: `y = Softmax(Where(Expand(false, shape), -inf, scores))`
        after:  `y = Softmax(scores)`
    """

    name: ClassVar[str] = "fold-where"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold in place."""
        surgery = Surgery(model, context)
        masks = _Masks(surgery)
        for node in list(all_nodes(model)):
            if node.graph is None or node.op_identifier() in model.functions:
                continue
            if is_onnx(node, "Where") and len(node.inputs) == 3:
                decided = masks.value(node.inputs[0])
                if node.inputs[1] is node.inputs[2]:
                    _take(surgery, node, node.inputs[1])
                elif decided is not None:
                    _take(surgery, node, node.inputs[1 if decided else 2])
            elif is_onnx(node, "And", "Or", "Xor"):
                _simplify(surgery, masks, node)
        return surgery.result


class _Masks:
    """Which boolean values hold the same everywhere."""

    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery
        self._found: dict[ir.Value, bool | None] = {}

    def value(self, mask: ir.Value | None, depth: int = 32) -> bool | None:
        """Return what all elements of `mask` are, None if they differ or are not known."""
        if mask is None or depth == 0:
            return None
        if mask not in self._found:
            self._found[mask] = self._find(mask, depth)
        return self._found[mask]

    def _find(self, mask: ir.Value, depth: int) -> bool | None:
        tensor = tensor_of(mask)
        if tensor is not None:
            return self._of_tensor(tensor)
        node = producer_of(mask)
        if node is None or node.op_type not in (*_MASK_RANGE, "And", "Not", "Or", "Xor"):
            return None
        known = [self.value(value, depth - 1) for value in node.inputs]
        if node.op_type in _MASK_RANGE:
            return known[0]
        if node.op_type == "Not":
            return None if known[0] is None else not known[0]
        return _logic(node.op_type, known[0], known[1])

    @staticmethod
    def _of_tensor(tensor: ir.TensorProtocol) -> bool | None:
        if tensor.dtype != ir.DataType.BOOL or not tensor.size or tensor.nbytes > LARGEST_WEIGHT:
            return None
        array = tensor.numpy()
        first = bool(array.reshape(-1)[0])
        return first if (array == first).all() else None


def _logic(op_type: str, left: bool | None, right: bool | None) -> bool | None:
    decisive = {"And": False, "Or": True}.get(op_type)
    if decisive is not None and decisive in (left, right):
        return decisive
    if left is None or right is None:
        return None
    return left != right if op_type == "Xor" else left


def _simplify(surgery: Surgery, masks: _Masks, node: ir.Node) -> None:
    """Hand on the mask that the other one does not change, or the one that decides."""
    for mask, other in (node.inputs, reversed(node.inputs)):
        decided = masks.value(mask)
        if decided is None or (node.op_type == "Xor" and decided):
            continue
        _take(surgery, node, mask if decided == {"And": False, "Or": True}.get(node.op_type) else other)
        return


def _take(surgery: Surgery, node: ir.Node, source: ir.Value | None) -> None:
    """Let `source` be the result of `node`, expanded where it is smaller."""
    result = node.outputs[0]
    dims, wanted = surgery.known.dims(source), surgery.known.static(result)
    if source is None:
        return
    if dims is not None and dims == surgery.known.dims(result):
        if not can_bypass(result, source):
            surgery.context.near_miss(node, "is decided, but makes a graph output out of a value that cannot be one")
        elif surgery.context.allow(node):
            bypass(result, source)
            remove([node])
            surgery.rewrites += 1
    elif dims is None or wanted is None:
        surgery.context.near_miss(node, "is decided, but the shape that it broadcasts to is not known")
    elif surgery.context.allow(node):
        _expand(surgery, node, source, wanted)


def _expand(surgery: Surgery, node: ir.Node, source: ir.Value, wanted: tuple[int, ...]) -> None:
    shape = surgery.initializer(node, f"{node.outputs[0].name or 'value'}_shape", np.array(wanted, np.int64))
    surgery.replace([node], [surgery.new("Expand", [source, shape], [node])])
