"""The pass `fuse-swish`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe import graph, ops
from optframe.passes import GraphPass, PassContext, PassResult


@dataclass(frozen=True)
class FuseSwish(GraphPass):
    """Fuse x * sigmoid(x), and x * sigmoid(beta * x) for a constant beta, to one call of the op Swish.

    With `scaled` false the second form is left alone.

    Example:
        before: `y = x * Sigmoid(x * 1.7)`
        after:  `y = Swish(x, beta=1.7)`
    """

    name: ClassVar[str] = "fuse-swish"
    domains: ClassVar[tuple[str, ...]] = ("example.thirdparty",)
    scaled: bool = True

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite every match in `model`."""
        muls = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == ("", "Mul")]
        rewrites = sum(self._rewrite(model, mul, context) for mul in muls)
        return PassResult(rewrites > 0, rewrites)

    def _rewrite(self, model: ir.Model, mul: ir.Node, context: PassContext) -> bool:
        match = self._match(mul, context)
        if match is None or not context.allow(mul):
            return False
        x, beta, nodes = match
        call = ops.call(model, context.op("example.thirdparty::Swish"), [x], {"beta": beta})
        context.replace(nodes, [call], mul.outputs, call.outputs)
        return True

    def _match(self, mul: ir.Node, context: PassContext) -> tuple[ir.Value, float, list[ir.Node]] | None:
        """Return x, beta and the nodes to replace, in order, if `mul` ends a swish."""
        for x, gate in (mul.inputs, mul.inputs[::-1]):
            sigmoid = gate.producer() if gate is not None else None
            if x is None or sigmoid is None or sigmoid.op_type != "Sigmoid":
                continue
            if x is sigmoid.inputs[0]:
                return self._usable(x, 1.0, [sigmoid, mul], context)
            scale = sigmoid.inputs[0].producer() if sigmoid.inputs[0] is not None else None
            if self.scaled and scale is not None and scale.op_type == "Mul" and x in scale.inputs:
                factor = graph.constant(scale.inputs[scale.inputs[0] is x])
                if factor is not None and factor.size == 1:
                    return self._usable(x, float(factor.item()), [scale, sigmoid, mul], context)
                context.near_miss(mul, "beta is not one constant number")
        return None

    @staticmethod
    def _usable(
        x: ir.Value, beta: float, nodes: list[ir.Node], context: PassContext
    ) -> tuple[ir.Value, float, list[ir.Node]] | None:
        """Return the match unless a value inside it is wanted elsewhere, or the op takes no such x."""
        reason = ops.refusal(context.op("example.thirdparty::Swish"), [x])
        inner = [node.outputs[0] for node in nodes[:-1]]
        if any(value.is_graph_output() or len(value.uses()) > 1 for value in inner):
            reason = "a value inside it is used elsewhere"
        if reason is not None:
            context.near_miss(nodes[-1], reason)
            return None
        return x, beta, nodes
