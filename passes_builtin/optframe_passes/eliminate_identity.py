"""The pass `eliminate-identity`: nodes that hand on what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import onnx_ir as ir

from optframe.graph import all_nodes
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import (
    bypass,
    can_bypass,
    deterministic,
    graph_of,
    ints_option,
    is_onnx,
    remove,
    small_constant,
)
from optframe_passes.propagate import Propagation

_NO_END = 2**31 - 1
"""Slices to this index or beyond go to the end of any dimension that fits into memory."""


@dataclass(frozen=True)
class EliminateIdentity(GraphPass):
    """Remove nodes whose output equals one of their inputs, in type, shape and value.

    Identity; Dropout at inference; Cast to the type it already is; Transpose, Reshape, Flatten, Expand, Squeeze,
    Unsqueeze, Slice, Pad, Tile and Split that change nothing; Concat, Sum, Mean, Max and Min of one input; addition
    and subtraction of 0, multiplication and division by 1, power of 1, where broadcasting changes no shape; And with
    true, Or with false; Clip without bounds; Neg of Neg, Not of Not. Dynamic dimensions count as equal where they
    provably are. (Adding 0 turns -0.0 into 0.0; the pass ignores that.)

    A node that alone connects an input, an initialiser or another output with a graph output stays: an output needs
    a node that makes it.

    Example:
        before: `y = Relu(Reshape(Identity(x), [0, 3]))`, x of shape (batch, 3)
        after:  `y = Relu(x)`
    """

    name: ClassVar[str] = "eliminate-identity"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Remove in place."""
        known = context.facts.of(model, Propagation.of)
        rewrites = 0
        for node in list(all_nodes(model)):
            if node.graph is None or not is_onnx(node) or node.op_identifier() in model.functions:
                continue
            source = _source(node, known)
            if source is not None and _eliminate(node, source, context):
                rewrites += 1
        return PassResult(rewrites > 0, rewrites)


def _eliminate(node: ir.Node, source: ir.Value, context: PassContext) -> bool:
    if not can_bypass(node.outputs[0], source):
        if node.op_type != "Identity":
            context.near_miss(node, "does nothing, but makes a graph output out of a value that cannot be one itself")
        return False
    if not context.allow(node):
        return False
    bypass(node.outputs[0], source)
    remove([node])
    return True


def _source(node: ir.Node, known: Propagation) -> ir.Value | None:
    """Return the input that the only used output of `node` equals, None if there is none."""
    rule = _RULES.get(node.op_type)
    others_used = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if rule is None or not node.inputs or not node.outputs or others_used:
        return None
    return rule(node, known)


Rule: TypeAlias = Callable[[ir.Node, Propagation], ir.Value | None]


def _first(node: ir.Node, known: Propagation) -> ir.Value | None:
    return node.inputs[0]


def _only(node: ir.Node, known: Propagation) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _dropout(node: ir.Node, known: Propagation) -> ir.Value | None:
    training = small_constant(node.inputs[2]) if len(node.inputs) > 2 else None
    inference = deterministic(node) or (training is not None and not training.any())
    return node.inputs[0] if inference and known.version >= 7 else None  # before, an attribute said so


def _cast(node: ir.Node, known: Propagation) -> ir.Value | None:
    dtype = known.dtype(node.inputs[0])
    return node.inputs[0] if dtype is not None and dtype == known.dtype(node.outputs[0]) else None


def _same_shape(node: ir.Node, known: Propagation) -> ir.Value | None:
    """For ops that keep the order of the elements: equal shapes are all there is to it."""
    dims = known.dims(node.inputs[0])
    return node.inputs[0] if dims is not None and dims == known.dims(node.outputs[0]) else None


def _transpose(node: ir.Node, known: Propagation) -> ir.Value | None:
    dims, order = known.dims(node.inputs[0]), node.attributes.get_ints("perm")
    if order is None:  # then the axes are reversed
        return node.inputs[0] if dims is not None and len(dims) < 2 else None
    return node.inputs[0] if list(order) == sorted(order) else None


def _pad(node: ir.Node, known: Propagation) -> ir.Value | None:
    pads = ints_option(node, "pads", 1)
    return node.inputs[0] if pads is not None and not any(pads) else None


def _tile(node: ir.Node, known: Propagation) -> ir.Value | None:
    repeats = small_constant(node.inputs[1]) if len(node.inputs) == 2 else None
    return node.inputs[0] if repeats is not None and (repeats == 1).all() else None


def _slice(node: ir.Node, known: Propagation) -> ir.Value | None:
    starts, ends = ints_option(node, "starts", 1), ints_option(node, "ends", 2)
    axes, steps = ints_option(node, "axes", 3), ints_option(node, "steps", 4)
    dims = known.dims(node.inputs[0])
    if not starts or ends is None or axes is None or steps is None or dims is None or set(steps) - {1}:
        return None
    sliced = [dims[axis] for axis in axes or range(len(starts))]
    whole = [end >= _NO_END or (isinstance(dim, int) and end >= dim) for end, dim in zip(ends, sliced, strict=False)]
    return node.inputs[0] if not any(starts) and len(whole) == len(starts) and all(whole) else None


def _split(node: ir.Node, known: Propagation) -> ir.Value | None:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _neutral(number: float, sides: tuple[int, ...]) -> Rule:
    """Return the rule of a binary op for which `number`, on one of `sides`, leaves the other operand as it is."""

    def rule(node: ir.Node, known: Propagation) -> ir.Value | None:
        for side in sides if len(node.inputs) == 2 else ():
            operand, other = node.inputs[side], node.inputs[1 - side]
            content = small_constant(operand)
            dims, dtype = known.dims(other), known.dtype(other)
            unchanged = dims == known.dims(node.outputs[0]) and dtype == known.dtype(node.outputs[0])
            if content is not None and dims is not None and unchanged and (content == number).all():
                return other
        return None

    return rule


def _clip(node: ir.Node, known: Propagation) -> ir.Value | None:
    bounds = [value for value in node.inputs[1:] if value is not None]
    return node.inputs[0] if not bounds and known.version >= 11 else None  # before, the default bounds were finite


def _twice(node: ir.Node, known: Propagation) -> ir.Value | None:
    """For an op that undoes itself."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_onnx(inner, node.op_type) or inner.graph is not graph_of(node):
        return None
    return inner.inputs[0]


_RULES: dict[str, Rule] = {
    "Add": _neutral(0, (1, 0)),
    "And": _neutral(True, (1, 0)),
    "Cast": _cast,
    "CastLike": _cast,
    "Clip": _clip,
    "Concat": _only,
    "Div": _neutral(1, (1,)),
    "Dropout": _dropout,
    "Expand": _same_shape,
    "Flatten": _same_shape,
    "Identity": _first,
    "Max": _only,
    "Mean": _only,
    "Min": _only,
    "Mul": _neutral(1, (1, 0)),
    "Neg": _twice,
    "Not": _twice,
    "Or": _neutral(False, (1, 0)),
    "Pad": _pad,
    "Pow": _neutral(1, (1,)),
    "Reshape": _same_shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _same_shape,
    "Sub": _neutral(0, (1,)),
    "Sum": _only,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _same_shape,
}
