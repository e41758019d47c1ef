"""The pass `remove-glue-ops`: the exporter's shape arithmetic, taken out with graphsurgeon as TensorRT engineers do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from optframe.passes import Dialect, GraphPass, PassContext, PassResult

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MAX_ELEMENTS = 1 << 20
"""Elements of the largest tensor that is taken for glue; weights are not."""


@dataclass(frozen=True)
class RemoveGlueOps(GraphPass):
    """Remove ops that only carry static shapes around, and ops that hand on what they are given.

    The surgery of the original TensorRT deployment: Shape of a tensor whose shape is recorded becomes a constant, then
    so does what is computed from it (Gather, Unsqueeze, Concat, Slice, Cast, integer arithmetic, ConstantOfShape,
    Expand, Range, Equal, Where, ...). Identity, Cast to the same type, Reshape, Expand, Tile and Slice that change no
    shape, and Where under a mask that is all true or all false are bypassed. Shapes must have been recorded
    (`infer-shapes`); weights are never computed with.

    Example:
        before: `Reshape(x, Concat(Unsqueeze(Gather(Shape(x), 0)), [900], [256]))`, x of shape (1, 900, 8, 32)
        after:  `Reshape(x, [1, 900, 256])`
    """

    name: ClassVar[str] = "remove-glue-ops"
    dialect: ClassVar[Dialect] = "graphsurgeon"
    after: ClassVar[tuple[str, ...]] = ("infer-shapes",)

    def run(self, model: gs.Graph, context: PassContext) -> PassResult:
        """Remove in place."""
        rewrites = 0
        while removed := sum(_remove(node, model, context) for node in list(model.nodes)):
            rewrites += removed
        if rewrites:
            model.cleanup().toposort()
        return PassResult(rewrites > 0, rewrites)


def _remove(node: gs.Node, graph: gs.Graph, context: PassContext) -> bool:
    if node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1 or _is_output(node.outputs[0], graph):
        return False
    values = _fold(node)
    source = _source(node) if values is None else None
    if values is None and source is None:
        if node.op == "Shape" and node.inputs:
            context.near_miss(node, "the shape of its input is not recorded, or not static: run infer-shapes first")
        return False
    if not context.allow(node):
        return False
    output = node.outputs[0]
    if values is not None:
        output.to_constant(values)
    else:
        for consumer in list(output.outputs):
            consumer.inputs = [source if tensor is output else tensor for tensor in consumer.inputs]
    node.outputs.clear()
    return True


def _is_output(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    return any(tensor is output for output in graph.outputs)


def _fold(node: gs.Node) -> Array | None:
    """Return the value of a glue op, None if it is none or depends on an input of the model."""
    if node.op == "Shape":
        return _shape(node)
    if node.op == "Constant":
        value = node.attrs.get("value")
        return _values(value) if isinstance(value, gs.Constant) else None
    rule = _GLUE.get(node.op)
    operands = [_values(tensor) for tensor in node.inputs if not tensor.is_empty()]
    known = [operand for operand in operands if operand is not None]
    if rule is None or len(known) != len(node.inputs) or not _is_glue(node.op, known):
        return None
    try:
        result = rule(node, known)
    except (ValueError, IndexError, KeyError, TypeError):  # what numpy refuses is for the runtime to judge
        return None
    if result is None or result.size > MAX_ELEMENTS:
        return None
    return np.asarray(result)  # of one element, numpy returns a number


def _is_glue(op: str, operands: Sequence[Array]) -> bool:
    """Return whether the op moves data, or computes with integers: floats are the model's own arithmetic."""
    return op in _MOVING or all(operand.dtype.kind in "iub" for operand in operands)


def _values(tensor: gs.Tensor) -> Array | None:
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) > MAX_ELEMENTS:
        return None
    values: Array = tensor.values
    return values if isinstance(values, np.ndarray) else None


def _static(tensor: gs.Tensor) -> tuple[int, ...] | None:
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, int) and dim >= 0 for dim in shape):
        return None
    return tuple(shape)


def _shape(node: gs.Node) -> Array | None:
    shape = _static(node.inputs[0])
    if shape is None:
        return None
    return np.array(shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))], np.int64)


def _axes(node: gs.Node, operands: Sequence[Array]) -> tuple[int, ...] | None:
    """Return the axes of Squeeze and Unsqueeze: an attribute up to opset 12, then an input."""
    axes = node.attrs.get("axes") if len(operands) < 2 else operands[1].reshape(-1)
    return None if axes is None else tuple(int(axis) for axis in axes)


def _slice(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    data, starts, ends, *rest = operands
    axes = rest[0] if rest else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts), np.int64)
    if (steps <= 0).any():  # ONNX clamps the end of a backward slice as no Python slice does
        return None
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _cast(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    dtype = _numpy_type(node.attrs["to"])
    return None if dtype is None or operands[0].dtype.kind == "f" else operands[0].astype(dtype)


def _numpy_type(to: Any) -> np.dtype[Any] | None:
    """Return the numpy type of Cast's `to`, which graphsurgeon hands over as either number or numpy type."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to)) if isinstance(to, int) else np.dtype(to)
    return dtype if dtype.kind in "iufb" else None


def _divide(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    """Divide integers as ONNX does, rounding to zero."""
    left, right = operands
    if not right.all():
        return None
    quotient: Array = np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right))
    return quotient.astype(left.dtype)


def _constant_of_shape(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    fill = node.attrs.get("value")
    number = _values(fill) if isinstance(fill, gs.Constant) else fill
    number = np.zeros(1, np.float32) if number is None else np.asarray(number)
    if math.prod(operands[0].tolist()) > MAX_ELEMENTS:
        return None
    return np.full(operands[0].tolist(), number.reshape(-1)[0], number.dtype)


def _expand(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    shape = np.broadcast_shapes(operands[0].shape, tuple(operands[1].tolist()))
    return np.broadcast_to(operands[0], shape).copy() if math.prod(shape) <= MAX_ELEMENTS else None


def _reshape(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    data, target = operands
    if node.attrs.get("allowzero", 0):
        return None
    return data.reshape([data.shape[axis] if dim == 0 else int(dim) for axis, dim in enumerate(target)])


def _tile(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    size = operands[0].size * math.prod(operands[1].tolist())
    return np.tile(operands[0], operands[1]) if size <= MAX_ELEMENTS else None


def _range(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    start, limit, delta = (int(operand.reshape(())) for operand in operands)
    if delta == 0 or abs(limit - start) > MAX_ELEMENTS * abs(delta):
        return None
    return np.arange(start, limit, delta, dtype=operands[0].dtype)


def _squeeze(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    return np.squeeze(operands[0], _axes(node, operands))


def _unsqueeze(node: gs.Node, operands: Sequence[Array]) -> Array | None:
    axes = _axes(node, operands)
    return None if axes is None else np.expand_dims(operands[0], axes)


Rule: TypeAlias = Callable[[gs.Node, Sequence[Array]], Array | None]

_MOVING: dict[str, Rule] = {
    "Concat": lambda node, operands: np.concatenate(operands, node.attrs["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": lambda node, operands: np.take(operands[0], operands[1], node.attrs.get("axis", 0)),
    "Identity": lambda node, operands: operands[0],
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, operands: np.where(*operands),
}
"""Glue that moves data of any type."""

_GLUE: dict[str, Rule] = _MOVING | {
    "Add": lambda node, operands: operands[0] + operands[1],
    "Cast": _cast,
    "Div": _divide,
    "Equal": lambda node, operands: np.equal(*operands),
    "Mul": lambda node, operands: operands[0] * operands[1],
    "Range": _range,
    "Sub": lambda node, operands: operands[0] - operands[1],
}


def _source(node: gs.Node) -> gs.Tensor | None:
    """Return the input that the output of `node` equals, None if there is none."""
    output = node.outputs[0]
    if node.op == "Where":
        return _chosen(node)
    if node.op in ("Identity", "Cast"):
        same = node.op == "Identity" or _numpy_type(node.attrs["to"]) == _type(node.inputs[0])
        return node.inputs[0] if same else None
    if node.op in ("Expand", "Reshape", "Tile") or (node.op == "Slice" and _goes_forward(node)):
        shape = _static(node.inputs[0])
        return node.inputs[0] if shape is not None and shape == _static(output) else None
    return None


def _type(tensor: gs.Tensor) -> np.dtype[Any] | None:
    return None if tensor.dtype is None else _numpy_type(tensor.dtype)


def _goes_forward(node: gs.Node) -> bool:
    """Return whether a Slice does not turn an axis round."""
    if len(node.inputs) < 5:
        return True
    steps = _values(node.inputs[4])
    return steps is not None and bool((steps > 0).all())


def _chosen(node: gs.Node) -> gs.Tensor | None:
    """Return the branch that a Where under a uniform constant mask takes, if broadcasting does not change it."""
    mask = _values(node.inputs[0])
    if mask is None or not mask.size or (mask.any() and not mask.all()):
        return None
    branch = node.inputs[1 if mask.all() else 2]
    shape = _static(branch)
    return branch if shape is not None and shape == _static(node.outputs[0]) else None
