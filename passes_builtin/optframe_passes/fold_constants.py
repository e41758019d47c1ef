"""The pass `fold-constants`: what can be computed before the first inference is computed, shape arithmetic included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import constant_tensor, subgraphs
from optframe.onnx_file import NUMERIC
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes import shape_data
from optframe_passes.constant_pool import WORKING_BYTES, ConstantPool
from optframe_passes.edit import Array, FreshNames, add_initializer, deterministic, graph_of, is_onnx, remove
from optframe_passes.infer_shapes import record_shapes
from optframe_passes.inline_branch import inline_branch

_QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""Left alone: a backend needs to see them around the weights to run in INT8."""


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Compute before the first inference what does not depend on an input.

    Nodes whose inputs are all constant are evaluated by onnxruntime's CPU kernels, all of them in one session or few,
    and become initialisers, as Constant nodes do. Shape, Size and the integer arithmetic on them are followed element
    by element, so that whatever is fixed beside a dynamic batch is folded too, and Reshape gets a constant target
    where at most one dimension is open (0 copies a dimension, -1 takes the rest). An If under a constant condition
    gives way to the branch taken. Works inside subgraphs; the bodies of functions stay as they are. As a by-product
    the shapes and types found are recorded on the values.

    Left alone: random ops, quantisation, ops of foreign domains, ops that onnxruntime has no kernel for, and results
    of more than `max_bytes` each (a near-miss then gives the reason).

    Example:
        before: `Reshape(x, Concat(Gather(Shape(x), 0), [900], [-1]))`, x of shape (batch, 30, 30, 256)
        after:  `Reshape(x, [0, 900, -1])`
    """

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 16 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold in place."""
        folding = _Folding(model, context)
        folding.sweep(model.graph, trusted=True)
        folding.finish(self.max_bytes)
        recorded = record_shapes(model, folding.known)
        return PassResult(folding.rewrites > 0 or recorded > 0, folding.rewrites)


class _Folding:
    """One run: one sweep over the nodes, which collects what is constant, and then one evaluation of it."""

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self.rewrites = 0
        self._pool = ConstantPool(model, context)
        self.known = self._pool.known
        self._context = context
        self._names = FreshNames(model)
        self._functions = model.functions

    def sweep(self, graph: ir.Graph, trusted: bool) -> None:
        """Visit `graph` and its subgraphs in order; Constant nodes and decided Ifs are rewritten at once."""
        self.known.enter(graph, trusted)
        for node in graph:
            if is_onnx(node, "If") and self._fold_if(node):
                continue  # the branch taken now stands behind it, and comes next
            for subgraph in subgraphs(node):
                self.sweep(subgraph, trusted=False)
            self.known.visit(node)
            if is_onnx(node, "Constant"):
                self._fold_constant_node(node)
            elif is_onnx(node) and node.op_identifier() not in self._functions:
                self._consider(node)

    def finish(self, max_bytes: int) -> None:
        """Evaluate what was collected, put initialisers in the place of what others use of it, remove it."""
        for value in self._pool.settle(max_bytes):
            self._replace(value, self._pool.arrays[value])
        folded = list(self._pool)
        remove(folded)
        self.rewrites += len(folded)

    def _fold_constant_node(self, node: ir.Node) -> None:
        value = node.outputs[0]
        if value.is_graph_output() or len(node.attributes) != 1 or "sparse_value" in node.attributes:
            return
        tensor = constant_tensor(value)
        if tensor is None or not self._context.allow(node):
            return
        new = ir.Value(name=self._free_name(value), type=ir.TensorType(tensor.dtype), const_value=tensor)
        new.shape = ir.Shape(tensor.shape.numpy())
        tensor.name = new.name
        graph_of(node).register_initializer(new)
        value.replace_all_uses_with(new)
        remove([node])
        self.rewrites += 1

    def _replace(self, value: ir.Value, array: Array) -> None:
        node = value.producer()
        assert node is not None, "what is folded was made by a node"
        if value.is_graph_output():
            self._replace_output(node, value, array)
        else:
            value.replace_all_uses_with(add_initializer(graph_of(node), self._free_name(value), array))

    def _replace_output(self, node: ir.Node, value: ir.Value, array: Array) -> None:
        """A graph output keeps a node that makes it: a Constant."""
        constant = ir.node("Constant", [], {"value": ir.tensor(array, name=value.name)}, name=node.name)
        self._context.stamp([constant], [node])
        new = constant.outputs[0]
        new.name, new.type, new.shape = value.name, value.type, value.shape
        graph_of(node).insert_after(node, constant)
        value.replace_all_uses_with(new, replace_graph_outputs=True)

    def _free_name(self, value: ir.Value) -> str:
        """Return the name for the initialiser that takes the place of `value`: its own, if it alone has it."""
        return self._names.moved(value.name) if value.name else self._names("constant")

    def _consider(self, node: ir.Node) -> None:
        if not deterministic(node) or self._fold_elements(node):
            return
        if node.op_type in _QUANTIZING or next(subgraphs(node), None) is not None:
            return
        if not all(self._pool.is_constant(value) for value in node.inputs):
            self._fold_target(node)
        elif self._is_feasible(node) and self._context.allow(node):
            self._pool.add(node)
            self._learn_shapes(node)

    def _is_feasible(self, node: ir.Node) -> bool:
        outputs = [value for value in node.outputs if value.name != ""]
        if any(self.known.dtype(value) not in NUMERIC for value in (*node.inputs, *outputs) if value is not None):
            return False
        size = sum(self._pool.bytes(value) for value in outputs)
        if math.isinf(size):  # NonZero, Unique and the like: at most a few times the input
            size = 16 * sum(self._pool.bytes(value) for value in node.inputs if value is not None)
        if size > WORKING_BYTES:
            said = "are of unknown size" if math.isinf(size) else f"take {size:.0f} bytes"
            self._context.near_miss(node, f"constant, but its results {said}: too much to compute beforehand")
        return size <= WORKING_BYTES

    def _learn_shapes(self, node: ir.Node) -> None:
        """Find by evaluation the shapes that only the content of the inputs decides (NonZero, Unique)."""
        for value in node.outputs:
            if value.name != "" and self.known.static(value) is None:
                array = self._pool.evaluate_now(value)
                if array is not None:
                    self.known.learn(value, array)

    def _fold_elements(self, node: ir.Node) -> bool:
        """Fold a node of shape arithmetic whose result is known, although an input may not be constant."""
        value = node.outputs[0] if len(node.outputs) == 1 else None
        data, dtype = self.known.elements(value), self.known.dtype(value)
        if data is None or dtype is None or not shape_data.is_complete(data) or not self._context.allow(node):
            return False
        self._pool.add(node, data.astype(dtype.numpy()))
        return True

    def _fold_target(self, node: ir.Node) -> None:
        """Give a Reshape a constant target where one dimension at most is open."""
        if node.op_type != "Reshape" or self._pool.is_constant(node.inputs[1]):
            return
        target = self._open_target(node)
        if target is None:
            self._context.near_miss(node, "more than one dimension of its target is open")
        elif self._context.allow(node):
            name = self._names(f"{node.outputs[0].name or 'reshape'}_shape")
            node.replace_input_with(1, add_initializer(graph_of(node), name, np.array(target, np.int64)))
            node.attributes.pop("allowzero", None)
            self.known.visit(node)
            self.rewrites += 1

    def _open_target(self, node: ir.Node) -> list[int] | None:
        source, result = self.known.dims(node.inputs[0]), self.known.dims(node.outputs[0])
        if source is None or result is None or 0 in result:
            return None
        target = [
            dim if isinstance(dim, int) else 0 if index < len(source) and source[index] == dim else -1
            for index, dim in enumerate(result)
        ]
        return target if target.count(-1) <= 1 else None

    def _fold_if(self, node: ir.Node) -> bool:
        """Inline the branch that is always taken, if the condition is constant."""
        condition = node.inputs[0] if node.inputs else None
        decided = None if condition is None else self._pool.shape_content(condition)
        if decided is None or decided.size != 1:
            return False
        branch = node.attributes.get("then_branch" if decided.reshape(-1)[0] else "else_branch")
        if branch is None or not self._context.allow(node):
            return False
        inline_branch(node, branch.as_graph(), self._names, self._context)
        self.rewrites += 1
        return True
