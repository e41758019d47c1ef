"""Nodes that constant folding has found to be computable, and their values as far as they have been computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from optframe.graph import constant_tensor
from optframe.passes import PassContext
from optframe_passes.edit import Array, is_onnx, onnx_version
from optframe_passes.evaluate import evaluate
from optframe_passes.propagate import Propagation

WORKING_BYTES = 256 << 20
"""What one node may make on the way to a smaller result."""

_KEPT_BYTES = 1 << 16
"""Results up to this size are kept when a shape needs an evaluation half-way; larger ones are computed again."""

_LARGEST_SHAPE_INPUT = 1024
"""Elements of a tensor that decides a shape."""


class ConstantPool:
    """Collects nodes in topological order and evaluates them together; `known` is what is known of shapes.

    Nodes in `left` are computed, because others need them, but stay in the graph.
    """

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self.known = Propagation(model, self.shape_content)
        self.arrays: dict[ir.Value, Array] = {}
        self._nodes: dict[ir.Node, None] = {}
        self._left: set[ir.Node] = set()
        self._context = context
        self._opsets = {"": onnx_version(model)}

    def __iter__(self) -> Iterator[ir.Node]:
        """Yield the nodes that go, in order."""
        return (node for node in self._nodes if node not in self._left)

    def add(self, node: ir.Node, content: Array | None = None) -> None:
        """Take in `node`, with the `content` of its only output if that is known already."""
        self._nodes[node] = None
        if content is not None:
            self.arrays[node.outputs[0]] = content

    def is_constant(self, value: ir.Value | None) -> bool:
        """Return whether `value` depends on no input (an absent one does not)."""
        if value is None or value in self.arrays:
            return True
        producer = value.producer()
        if producer in self._nodes:
            return True
        return (producer is None or is_onnx(producer, "Constant")) and constant_tensor(value) is not None

    def content(self, value: ir.Value) -> Array:
        """Return the array behind a constant `value` that has been evaluated, or never needs to be."""
        if value in self.arrays:
            return self.arrays[value]
        tensor = constant_tensor(value)
        assert tensor is not None, "asked only for what is constant"
        return tensor.numpy()

    def shape_content(self, value: ir.Value) -> Array | None:
        """Return a small constant that a shape depends on, evaluated if need be; None for what is not constant."""
        dims = self.known.static(value)
        if not self.is_constant(value) or dims is None or math.prod(dims) > _LARGEST_SHAPE_INPUT:
            return None
        return self.evaluate_now(value) if value.producer() in self._nodes else self.content(value)

    def evaluate_now(self, value: ir.Value) -> Array | None:
        """Return the array behind a constant `value`, in the middle of the sweep; None if it cannot be evaluated."""
        if value not in self.arrays:
            self._evaluate([value], keep_small=True)
        return self.arrays.get(value)

    def bytes(self, value: ir.Value) -> float:
        """Return the size of `value`, infinite if unknown."""
        dims, dtype = self.known.static(value), self.known.dtype(value)
        return math.inf if dims is None or dtype is None else math.prod(dims) * dtype.itemsize

    def settle(self, max_bytes: int) -> list[ir.Value]:
        """Evaluate and return the values that others use of the nodes that go.

        Nodes whose own results others use stay if those take more than `max_bytes`; what was computed from them goes.
        """
        while self._leave_large(max_bytes) or self._evaluate(self._frontier()):
            pass
        return self._frontier()

    def _leave_large(self, max_bytes: int) -> bool:
        large = {value.producer(): self.bytes(value) for value in self._frontier() if self.bytes(value) > max_bytes}
        for node, size in large.items():
            if node is not None:
                self._context.near_miss(node, f"constant, but its {size:.0f} bytes exceed max_bytes={max_bytes}")
                self._left.add(node)
        return bool(large)

    def _frontier(self) -> list[ir.Value]:
        going = self._nodes.keys() - self._left
        return [
            value
            for node in self
            for value in node.outputs
            if value.is_graph_output() or any(use.node not in going for use in value.uses())
        ]

    def _evaluate(self, wanted: Sequence[ir.Value], keep_small: bool = False) -> bool:
        """Evaluate `wanted` values; return whether nodes failed, which then are no longer here."""
        nodes = self._ancestors(wanted)
        small = [v for n in nodes for v in n.outputs if self.bytes(v) <= _KEPT_BYTES] if keep_small else []
        result = evaluate(nodes, {*wanted, *small}, self.content, self._opsets)
        self.arrays.update(result.arrays)
        for node, reason in result.failures.items():
            self._context.near_miss(node, f"onnxruntime cannot evaluate it: {reason}")
        self._give_up(result.failures)
        return bool(result.failures)

    def _ancestors(self, values: Iterable[ir.Value]) -> list[ir.Node]:
        """Return the nodes that have to run for `values`, in order."""
        found: set[ir.Node] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            producer = None if value in self.arrays else value.producer()
            if producer in self._nodes and producer not in found:
                found.add(producer)
                stack += [needed for needed in producer.inputs if needed is not None]
        return [node for node in self._nodes if node in found] if found else []

    def _give_up(self, failures: Iterable[ir.Node]) -> None:
        """Take failed nodes out, and those that depend on them without having been evaluated."""
        lost = set(failures)
        for node in list(self._nodes) if lost else ():
            depends = any(value is not None and value.producer() in lost for value in node.inputs)
            if node in lost or (depends and not all(value in self.arrays for value in node.outputs)):
                lost.add(node)
                del self._nodes[node]


tensor_of = constant_tensor
