"""The pass `precompute-inverse-sigmoid`: the logits of a fixed anchor table, computed once and exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import constant
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import FreshNames, add_initializer, graph_of, is_onnx, remove
from optframe_passes.evaluate import evaluate_value

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PrecomputeInverseSigmoid(GraphPass):
    """Compute log(max(p, eps) / max(1 - p, eps)) of constant p beforehand, in float64, rounded once to p's type.

    The chain Clip, Clip, Sub, Clip, Div, Log that exporters write for the inverse sigmoid; bounds as inputs or as
    attributes, Max in the place of Clip, with or without the first Clip to [0, 1]. p may be computed from constants in
    any way (an Expand and a Tile in Anchor DETR). A chain whose p depends on an input is a near-miss: anchors that are
    refined from layer to layer have no fixed table.

    Example:
        before: `Log(Div(Clip(p, 1e-5), Clip(Sub(1, p), 1e-5)))`, p an initialiser
        after:  an initialiser
    """

    name: ClassVar[str] = "precompute-inverse-sigmoid"
    before: ClassVar[tuple[str, ...]] = ("fold-constants",)

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Compute in place."""
        names = FreshNames(model)
        rewrites = 0
        for node in list(model.graph.all_nodes()):
            match = _match(node) if is_onnx(node, "Log") else None
            if match is not None and _precompute(match, model, names, context):
                rewrites += 1
        return PassResult(rewrites > 0, rewrites)


@dataclass(frozen=True)
class _Match:
    """The nodes of a chain, last first, its input p, and its eps."""

    nodes: tuple[ir.Node, ...]
    p: ir.Value
    epsilon: float


def _precompute(match: _Match, model: ir.Model, names: FreshNames, context: PassContext) -> bool:
    log = match.nodes[0]
    table = evaluate_value(match.p, model.opset_imports)
    if table is None:
        context.near_miss(log, "an inverse sigmoid, but of something that depends on an input")
        return False
    output = log.outputs[0]
    if output.is_graph_output():
        context.near_miss(log, "an inverse sigmoid of a constant, but the model gives it out as it is")
        return False
    if not context.allow(log):
        return False
    new = add_initializer(graph_of(log), names(f"{output.name or 'log'}_table"), inverse_sigmoid(table, match.epsilon))
    output.replace_all_uses_with(new)
    _remove_unused(match.nodes)
    return True


def inverse_sigmoid(p: Array, epsilon: float) -> Array:
    """Return log(max(p, eps) / max(1 - p, eps)) with p clamped to [0, 1], in the type of `p`, rounded once."""
    exact = np.clip(p.astype(np.float64), 0, 1)
    logits: Array = np.log(np.maximum(exact, epsilon) / np.maximum(1 - exact, epsilon)).astype(p.dtype)
    return logits


def _remove_unused(nodes: Iterable[ir.Node]) -> None:
    for node in nodes:
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            remove([node])


def _match(log: ir.Node) -> _Match | None:
    division = _producer(log.inputs[0], "Div")
    upper = None if division is None else _lower_bounded(division.inputs[0])
    lower = None if division is None else _lower_bounded(division.inputs[1])
    if division is None or upper is None or lower is None or upper.bound != lower.bound:
        return None
    difference = _producer(lower.source, "Sub")
    if difference is None or _scalar(difference.inputs[0]) != 1 or difference.inputs[1] is not upper.source:
        return None
    nodes = (log, division, upper.node, lower.node, difference)
    clamp = _producer(upper.source, "Clip")
    if clamp is not None and _bounds(clamp) == (0, 1) and clamp.inputs[0] is not None:
        return _Match((*nodes, clamp), clamp.inputs[0], upper.bound)
    return _Match(nodes, upper.source, upper.bound)


@dataclass(frozen=True)
class _LowerBounded:
    """max(source, bound), and the node that computes it."""

    node: ir.Node
    source: ir.Value
    bound: float


def _lower_bounded(value: ir.Value | None) -> _LowerBounded | None:
    """Return what `value` is the maximum of, if it is that of something and a constant."""
    node = _producer(value, "Clip", "Max")
    if node is None:
        return None
    if node.op_type == "Clip":
        bound, high = _bounds(node)
        source = node.inputs[0] if high is None or high >= 1 else None
        return None if source is None or bound is None else _LowerBounded(node, source, bound)
    for index, operand in enumerate(node.inputs if len(node.inputs) == 2 else ()):
        bound, source = _scalar(operand), node.inputs[1 - index]
        if bound is not None and source is not None:
            return _LowerBounded(node, source, bound)
    return None


def _bounds(clip: ir.Node) -> tuple[float | None, float | None]:
    """Return the bounds of a Clip, attributes up to opset 10, then inputs; None for one that is absent or computed."""
    if clip.attributes:
        return clip.attributes.get_float("min", None), clip.attributes.get_float("max", None)
    inputs = [*clip.inputs, None, None]
    return _scalar(inputs[1]), _scalar(inputs[2])


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and is_onnx(node, *op_types) else None


def _scalar(value: ir.Value | None) -> float | None:
    content = None if value is None or (value.shape is not None and value.shape.rank() > 1) else constant(value)
    return float(content.reshape(())) if content is not None and content.size == 1 else None
