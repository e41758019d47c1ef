"""The passes that bring LayerNorm and SkipLayerNorm, the plugin ops, into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe import ops
from optframe.graph import opset
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.types import OpSpec
from optframe_anchordetr.ops import DOMAIN, LAYER_NORM, MINIMUM_OPSET, SKIP_LAYER_NORM
from optframe_anchordetr.passes.calls import may_call
from optframe_anchordetr.passes.sampled_shapes import sampled_shapes
from optframe_passes.edit import FreshNames, graph_of, is_onnx
from optframe_passes.layernorm_matcher import LayerNormMatch, find_layernorms, inline_layernorms
from optframe_passes.propagate import Propagation

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class FuseLayerNormPlugin(GraphPass):
    """Replace layer normalisations over the last axis, native or written out, by the plugin op LayerNorm.

    The op comes with its meaning as a model-local function, so that any runtime can run the model; one that has the
    op's kernel takes the function out first. The kernel's statistics are float32 and its scale and bias may have
    another type than x: where a float32 normalisation stands between casts from and to 16 bits, the casts go too.

    Example:
        before: `y = LayerNormalization(x, g, b, epsilon=1e-5)`
        after:  `y = optframe.anchordetr.LayerNorm(x, g, b, epsilon=1e-5)`
    """

    name: ClassVar[str] = "fuse-layernorm-plugin"
    after: ClassVar[tuple[str, ...]] = ("lift-opset", "fuse-layernorm")
    domains: ClassVar[tuple[str, ...]] = (DOMAIN,)

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fuse in place."""
        spec = context.op(LAYER_NORM.identifier)
        too_old = opset(model) < MINIMUM_OPSET
        inlined = not too_old and inline_layernorms(model, context, native=True)
        known, names = Propagation.of(model) if inlined else context.facts.of(model, Propagation.of), FreshNames(model)
        rewrites = int(inlined)
        for match in reversed(find_layernorms(model, context, known)):
            if too_old:
                context.near_miss(match.nodes[-1], f"the plugin op needs opset {MINIMUM_OPSET}: run lift-opset first")
                continue
            rewrites += _fuse(model, spec, _with_casts(match, known), known, names, context)
        return PassResult(rewrites > 0, rewrites)


@dataclass(frozen=True)
class _Call:
    """A match, and what the op reads and writes in its place: x and output of the match, or those beyond casts."""

    match: LayerNormMatch
    x: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def _with_casts(match: LayerNormMatch, known: Propagation) -> _Call:
    """Take along the casts of 16-bit data to a float32 normalisation and back, where they are there."""
    widen, consumers = match.x.producer(), {*match.output.consumers()}
    plain = _Call(match, match.x, match.output, match.nodes)
    if widen is None or not is_onnx(widen, "Cast") or len(consumers) != 1 or match.output.is_graph_output():
        return plain
    (narrow,) = consumers
    original = widen.inputs[0]
    if not is_onnx(narrow, "Cast") or narrow.graph is not widen.graph or original is None:
        return plain
    target = ir.DataType(narrow.attributes.get_int("to", 0))
    if match.dtype != ir.DataType.FLOAT or target not in HALVES or known.dtype(original) != target:
        return plain
    only_here = not match.x.is_graph_output() and {*match.x.consumers()} <= {*match.nodes}
    before = (widen,) if only_here and widen.graph is match.nodes[-1].graph else ()
    return _Call(match, original, narrow.outputs[0], (*before, *match.nodes, narrow))


def _fuse(
    model: ir.Model, spec: OpSpec, call: _Call, known: Propagation, names: FreshNames, context: PassContext
) -> bool:
    match, last = call.match, call.match.nodes[-1]
    if match.axis != -1:
        context.near_miss(last, f"it normalises {-match.axis} axes, the plugin op only the last one")
        return False
    if not may_call(spec, [call.x, match.scale, match.bias], known, last, context):
        return False
    parameters = [None if value is None else match.parameter(value, names) for value in (match.scale, match.bias)]
    node = ops.call(model, spec, [call.x, *parameters], {"epsilon": match.epsilon})
    context.replace(call.nodes, [node], [call.output], node.outputs)
    return True


@dataclass(frozen=True)
class FuseSkipLayerNormPlugin(GraphPass):
    """Let the plugin op LayerNorm make the sum that it normalises: one launch, and the sum is not read again.

    The sum is the second output of SkipLayerNorm, for whatever else uses it. Both terms must have the same shape.

    Example:
        before: `s = x + attended; y = optframe.anchordetr.LayerNorm(s, g, b)`
        after:  `y, s = optframe.anchordetr.SkipLayerNorm(x, attended, g, b)`
    """

    name: ClassVar[str] = "fuse-skip-layernorm-plugin"
    after: ClassVar[tuple[str, ...]] = ("fuse-layernorm-plugin",)
    domains: ClassVar[tuple[str, ...]] = (DOMAIN,)

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fuse in place."""
        spec = context.op(SKIP_LAYER_NORM.identifier)
        norms = [n for n in model.graph.all_nodes() if (n.domain, n.op_type) == (DOMAIN, LAYER_NORM.name)]
        known = sampled_shapes(model) if norms else []
        # The last one first: what the others read then stays known.
        rewrites = sum(_fuse_sum(model, spec, node, known, context) for node in reversed(norms))
        return PassResult(rewrites > 0, rewrites)


def _fuse_sum(model: ir.Model, spec: OpSpec, norm: ir.Node, known: Sequence[Propagation], context: PassContext) -> bool:
    total = norm.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or not is_onnx(add, "Add"):
        return False
    x, skip = add.inputs
    parameters = norm.inputs[1:]
    reason = _obstacle(add, norm, known)
    if reason is not None:
        context.near_miss(norm, reason)
        return False
    if not may_call(spec, [x, skip, *parameters], known[0], norm, context):
        return False
    node = ops.call(model, spec, [x, skip, *parameters], {"epsilon": norm.attributes["epsilon"].as_float()})
    # The new node takes the place of the sum, which others may read before the normalisation.
    context.replace([norm, add], [node], [norm.outputs[0], total], node.outputs)
    return True


def _obstacle(add: ir.Node, norm: ir.Node, known: Sequence[Propagation]) -> str | None:
    """Return why sum and normalisation cannot be one node at the place of the sum."""
    if add.graph is not norm.graph:
        return "the sum is made in another graph"
    pairs = [[shapes.dims(value) for value in add.inputs] for shapes in known]
    if any(first is None or first != second for first, second in pairs):
        return "the terms of the sum are not known to have the same shape"
    for value in norm.inputs[1:]:
        maker = value.producer() if value is not None else None
        if maker is not None and maker.graph is add.graph and _comes_before(add, maker):
            return "its scale or bias is made after the sum"
    return None


def _comes_before(first: ir.Node, second: ir.Node) -> bool:
    """Return whether `first` stands before `second` in their graph."""
    return next(node for node in graph_of(first) if node in (first, second)) is first
