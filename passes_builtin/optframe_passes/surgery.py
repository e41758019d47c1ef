"""What passes that move constants through a graph share: one run over a model, chains of nodes rebuilt, new weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from optframe.graph import ONNX_DOMAINS, all_nodes, subgraphs, weight_bytes
from optframe.passes import PassContext, PassResult
from optframe_passes.constant_pool import tensor_of
from optframe_passes.edit import Array, FreshNames, add_initializer, graph_of, is_onnx, onnx_version, remove
from optframe_passes.propagate import Propagation, op_schema

FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})
"""Types whose constants are computed with: in float64, rounded once."""

LARGEST_WEIGHT = 64 << 20
"""Bytes of the largest constant that is read or made."""

_HEAVY_MODEL = 1 << 30
_LARGEST_WEIGHT_OF_HEAVY_MODEL = 1 << 20
"""A model of gigabytes keeps its weights on disk, untouched, but for small ones."""


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads `value`, once and in the same graph, if nothing else does."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    reader, producer = next(iter(uses)).node, value.producer()
    return reader if producer is None or reader.graph is producer.graph else None


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes `value` if it is an ONNX op, of `op_types` where any are given."""
    node = None if value is None else value.producer()
    return node if node is not None and is_onnx(node, *op_types) else None


def rounded(array: Array, dtype: ir.DataType, axis: int | None = None) -> Array | None:
    """Return float64 `array` in `dtype`, None if that costs more than a rounding of its largest element.

    It does so where the range of `dtype` ends: above (FP16: 65504), or for all elements below (FP16: 6e-5). With an
    `axis` the largest element of each slice along it counts.
    """
    others = None if axis is None else tuple(other for other in range(array.ndim) if other != axis % array.ndim)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result: Array = array.astype(dtype.numpy())
        largest = np.maximum(array.max(axis=others, initial=0.0), -array.min(axis=others, initial=0.0))
        kind = np.finfo(result.dtype)
        if ((largest >= kind.tiny) & (largest <= kind.max)).all():  # so no element is off by more
            return result
        error = np.abs(result.astype(np.float64) - array).max(axis=others, initial=0.0)
        exact = error <= kind.eps * largest
    return result if exact.all() else None


def _is_sound(graph: ir.Graph, outer: Collection[ir.Value], opset: int) -> bool:
    made = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        op = op_schema(node.op_type, opset) if is_onnx(node) else None
        present = [value for value in node.inputs if value is not None]
        if not made.issuperset(present) or not node.outputs or (op is not None and len(node.inputs) < op.min_input):
            return False
        if not all(_is_sound(inner, made, opset) for inner in subgraphs(node)):
            return False
        made.update(node.outputs)
    return True


class Surgery:
    """One run of a pass: what is known of the model's values, names for new ones, and the count of rewrites."""

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self.context = context
        self.opset = onnx_version(model)
        self.rewrites = 0
        self._model = model
        self._copied: set[str | None] = set()
        self._last_number: Counter[str | None] = Counter()

    @cached_property
    def known(self) -> Propagation:
        """What is known of the model's values, found out when it is first asked for, or by a pass before."""
        return Propagation.of(self._model) if self.rewrites else self.context.facts.of(self._model, Propagation.of)

    @cached_property
    def _names(self) -> FreshNames:
        return FreshNames(self._model)

    @cached_property
    def _node_names(self) -> set[str | None]:
        return {node.name for node in all_nodes(self._model) if node.name}

    @cached_property
    def _limit(self) -> int:
        heavy = weight_bytes(self._model) > _HEAVY_MODEL
        return _LARGEST_WEIGHT_OF_HEAVY_MODEL if heavy else LARGEST_WEIGHT

    @property
    def result(self) -> PassResult:
        """What the pass reports at its end."""
        return PassResult(self.rewrites > 0, self.rewrites)

    def nodes(self) -> list[ir.Node]:
        """Return all nodes, subgraphs included, in topological order; none if the model is not sound.

        It is not where a value is read that nothing before made, where a node lacks inputs that its op needs, and where
        functions redefine ops of ONNX. Looking around a node is safe in a model that is sound.
        """
        redefined = any(domain in ONNX_DOMAINS for domain, _, _ in self._model.functions)
        if redefined or not _is_sound(self._model.graph, frozenset(), self.opset):
            return []
        return list(all_nodes(self._model))

    def tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """Return the tensor, unread, behind a constant float `value` that is small enough to compute with."""
        tensor = self.any_tensor(value)
        return tensor if tensor is not None and tensor.dtype in FLOATS else None

    def any_tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """Return the tensor, unread and of any type, behind a constant `value` that is not too large."""
        tensor = None if value is None else tensor_of(value)
        return tensor if tensor is not None and tensor.nbytes <= self._limit else None

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return the content of `tensor(value)` in float64."""
        tensor = self.tensor(value)
        return None if tensor is None else tensor.numpy().astype(np.float64)

    def constant_side(self, node: ir.Node) -> int | None:
        """Return which of the two inputs of `node` is a float constant; None unless it is just one."""
        sides = [index for index, value in enumerate(node.inputs) if self.tensor(value) is not None]
        return sides[0] if len(node.inputs) == 2 and len(sides) == 1 else None

    def is_linear(self, node: ir.Node | None) -> bool:
        """Return whether `node` is a MatMul of something by a constant matrix (K, N)."""
        if node is None or not is_onnx(node, "MatMul") or self.constant_side(node) != 1:
            return False
        tensor = self.tensor(node.inputs[1])
        return tensor is not None and len(tensor.shape) == 2

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of dimensions of `value`, None if not known."""
        dims = self.known.dims(value)
        return None if dims is None else len(dims)

    def fits(
        self, array: Array, value: ir.Value | None, max_bytes: int | None = None, axis: int | None = None
    ) -> Array | None:
        """Return `array` in the type of `value`, None if it does not fit there (see `rounded`) or in `max_bytes`."""
        dtype = self.known.dtype(value)
        if dtype not in FLOATS or array.size * dtype.itemsize > (self._limit if max_bytes is None else max_bytes):
            return None
        return rounded(array, dtype, axis)

    def name(self, hint: str) -> str:
        """Return a name that no value has, `hint` if it is free."""
        return self._names(hint)

    def initializer(self, node: ir.Node, hint: str, array: Array) -> ir.Value:
        """Return a new initialiser in the graph of `node`."""
        return add_initializer(graph_of(node), self.name(hint), array)

    def like(self, node: ir.Node, index: int, array: Array) -> ir.Value:
        """Return a new initialiser that takes the place of input `index` of `node`."""
        old = node.inputs[index]
        return self.initializer(node, (old.name if old is not None else None) or "weight", array)

    def new(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        origin: Sequence[ir.Node],
        attributes: Mapping[str, int | float | Sequence[int] | ir.Graph] | None = None,
        num_outputs: int = 1,
    ) -> ir.Node:
        """Return a node that comes from the nodes of `origin` and is named after the last; it is in no graph yet."""
        hint = f"{origin[-1].outputs[0].name or 'value'}/{op_type}"
        outputs = [ir.Value(name=self.name(hint)) for _ in range(num_outputs)]
        name = f"{origin[-1].name}/{op_type}" if origin[-1].name else None
        node = ir.node(op_type, inputs, attributes, outputs=outputs, name=self._node_name(name))
        self.context.stamp([node], origin)
        return node

    def split(self, value: ir.Value, axis: int, sizes: Sequence[int], origin: Sequence[ir.Node]) -> ir.Node:
        """Return a Split of `value` into parts of `sizes`, written as the opset wants it; see `new`."""
        inputs: list[ir.Value | None] = [value]
        attributes: dict[str, int | Sequence[int]] = {"axis": axis}
        if self.opset >= 13:
            inputs.append(self.initializer(origin[-1], f"{value.name}/sizes", np.array(sizes, np.int64)))
        else:
            attributes["split"] = sizes
        return self.new("Split", inputs, origin, attributes, len(sizes))

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
        """Return a node like `node` that reads `inputs`; its outputs have new names, and it is in no graph yet."""
        outputs = [ir.Value(name=value.name and self.name(value.name)) for value in node.outputs]
        attributes = node.attributes.values()
        name = node.name if node.name not in self._copied else self._node_name(node.name)
        self._copied.add(node.name)
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name)
        self.context.stamp([copy], [node])
        return copy

    def _node_name(self, hint: str | None) -> str | None:
        """Return a name that no node has, made from `hint`; onnxruntime refuses two nodes of one name."""
        name = hint
        while name in self._node_names:
            self._last_number[hint] += 1
            name = f"{hint}_{self._last_number[hint]}"
        if name:
            self._node_names.add(name)
        return name

    def insert(self, position: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Put `nodes` behind `position` and find out the types of what they make."""
        graph_of(position).insert_after(position, nodes)
        self.learn(nodes)

    def learn(self, nodes: Sequence[ir.Node]) -> None:
        """Find out the types of what new `nodes` make, and record them."""
        for node in nodes:
            self.known.visit(node)
            for value in node.outputs:
                dims = self.known.static(value)
                value.type = self.known.type_of(value)
                value.shape = None if dims is None else ir.Shape(dims)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new`, made by a new node, take every use of `old`, its name, and its place among the graph outputs."""
        new.type = new.type if old.type is None else old.type
        new.shape = new.shape if old.shape is None else old.shape  # that of a scalar is empty, not missing
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = new.name, old.name

    def replace(self, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
        """Put `new` behind the last of `old`; the last of `new` takes over from the last of `old`. One rewrite."""
        self.context.stamp(new, old)
        self.insert(old[-1], new)
        self.take_over(old[-1].outputs[0], new[-1].outputs[0])
        remove(old)
        self.rewrites += 1

    def rebuild(
        self,
        nodes: Sequence[ir.Node],
        skipped: tuple[ir.Node, int],
        constants: Mapping[ir.Node, Mapping[int, Array]],
    ) -> ir.Node:
        """Replace `nodes`, in topological order, by copies; one of them is skipped: its input of that index goes on.

        The copies read new `constants`, by node and index of input. What lies between them gets new names, as its
        content changes; values that are read from elsewhere keep theirs. One rewrite. Returns the last copy.
        """
        values: dict[ir.Value | None, ir.Value | None] = {}
        copy = nodes[-1]
        for node in nodes:
            inputs = [values.get(value, value) for value in node.inputs]
            if node is skipped[0]:
                values[node.outputs[0]] = inputs[skipped[1]]
                continue
            for index, array in constants.get(node, {}).items():
                inputs[index] = self.like(node, index, array)
            copy = self.copy(node, inputs)
            self.context.stamp([copy], [skipped[0]])
            self.insert(node, [copy])
            values.update(zip(node.outputs, copy.outputs, strict=True))
        self._hand_over(nodes, values)
        remove(nodes)
        self.rewrites += 1
        return copy

    def _hand_over(self, nodes: Sequence[ir.Node], values: Mapping[ir.Value | None, ir.Value | None]) -> None:
        for old in [value for node in nodes for value in node.outputs]:
            new = values[old]
            read_elsewhere = old.is_graph_output() or any(use.node not in nodes for use in old.uses())
            if read_elsewhere and new is not None:
                self.take_over(old, new)
