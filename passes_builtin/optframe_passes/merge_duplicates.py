"""The pass `merge-duplicates`: equal initialisers and equal nodes, of which one is enough."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from optframe.graph import subgraphs
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import bypass, can_bypass, deterministic, is_onnx, remove

_Key: TypeAlias = Callable[[ir.Value], Hashable]

_SAMPLE_BYTES = 4096
"""Weights of equal size are first compared by their first, middle and last bytes."""


@dataclass(frozen=True)
class MergeDuplicates(GraphPass):
    """Keep one of several initialisers that hold the same, and one of several nodes that compute the same.

    Initialisers are compared within equal type, shape and size alone, first by their place in a weight file, then by
    samples, and read as a whole only where the samples agree. Nodes are equal where op, attributes and inputs are;
    random ops, ops with subgraphs and ops of domains that the model has no function for are left alone. Each graph and
    subgraph is taken by itself; the bodies of functions stay as they are.

    Example:
        before: `a = Relu(x)`, `b = Relu(x)`, `y = Add(a, b)`
        after:  `a = Relu(x)`, `y = Add(a, a)`
    """

    name: ClassVar[str] = "merge-duplicates"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Merge in place."""
        rewrites = 0
        for graph in list(model.graphs()):
            rewrites += _merge_initializers(graph, context)
        pure = _pure_functions(model)
        for graph in list(model.graphs()):
            rewrites += _merge_nodes(graph, pure, context)
        return PassResult(rewrites > 0, rewrites)


def _merge_initializers(graph: ir.Graph, context: PassContext) -> int:
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and not value.is_graph_output():
            groups.setdefault((tensor.dtype, tensor.shape.numpy(), tensor.nbytes), []).append(value)
    merged = 0
    for group in groups.values():
        for equal in _equal_values(group):
            merged += sum(_merge_values(graph, equal[0], value, context) for value in equal[1:])
    return merged


def _merge_values(graph: ir.Graph, kept: ir.Value, value: ir.Value, context: PassContext) -> bool:
    if not context.allow(value):
        return False
    value.replace_all_uses_with(kept)
    graph.initializers.pop(str(value.name))
    return True


def _equal_values(group: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """Return the sets of values of `group`, which agree in type, shape and size, that hold the same bytes."""
    result: list[list[ir.Value]] = []
    for alike in _classes(group, _sample) if len(group) > 1 else ():
        result += _classes(alike, _digest)
    return result


def _classes(values: Sequence[ir.Value], key: _Key) -> list[list[ir.Value]]:
    classes: dict[Hashable, list[ir.Value]] = {}
    for value in values:
        classes.setdefault(key(value), []).append(value)
    return [members for members in classes.values() if len(members) > 1]


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """Return the content of `tensor` without a copy where it lies in memory or in a mapped file."""
    array = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype == ir.DataType.STRING:
        return memoryview(repr(array.tolist()).encode())
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _sample(value: ir.Value) -> Hashable:
    assert value.const_value is not None, "initialisers under comparison have content"
    data = _bytes_of(value.const_value)
    middle = len(data) // 2
    return bytes(data[:_SAMPLE_BYTES]), bytes(data[middle : middle + _SAMPLE_BYTES]), bytes(data[-_SAMPLE_BYTES:])


def _digest(value: ir.Value) -> Hashable:
    tensor = value.const_value
    assert tensor is not None, "initialisers under comparison have content"
    return hashlib.sha256(_bytes_of(tensor)).digest()


def _pure_functions(model: ir.Model) -> frozenset[ir.OperatorIdentifier]:
    """Return the functions that compute the same from the same inputs, as far as their bodies tell."""
    pure: frozenset[ir.OperatorIdentifier] = frozenset()
    for _ in model.functions:  # functions call one another without recursion, at most this deep
        pure = frozenset(
            identifier
            for identifier, function in model.functions.items()
            if all(_is_pure(node, model, pure) for node in function.all_nodes())
        )
    return pure


def _is_pure(node: ir.Node, model: ir.Model, pure: Collection[ir.OperatorIdentifier]) -> bool:
    if node.op_identifier() in model.functions:
        return node.op_identifier() in pure
    return is_onnx(node) and deterministic(node)


def _merge_nodes(graph: ir.Graph, pure: Collection[ir.OperatorIdentifier], context: PassContext) -> int:
    seen: dict[Hashable, ir.Node] = {}
    merged = 0
    for node in graph:
        if node.op_identifier() not in pure and not (is_onnx(node) and deterministic(node)):
            continue
        key = _node_key(node)
        if key is None:
            continue
        if key in seen:
            merged += _merge_node(seen[key], node, context)
        else:
            seen[key] = node
    return merged


def _merge_node(kept: ir.Node, node: ir.Node, context: PassContext) -> bool:
    pairs = list(zip(node.outputs, kept.outputs, strict=True))
    if not all(can_bypass(old, new) for old, new in pairs):
        context.near_miss(node, f"computes what {kept.name or 'another node'} does, but both make a graph output")
        return False
    if not context.allow(node):
        return False
    for old, new in pairs:
        bypass(old, new)
    remove([node])
    return True


def _node_key(node: ir.Node) -> Hashable | None:
    """Return what nodes that compute the same have in common, None for a node that is never merged."""
    if next(subgraphs(node), None) is not None:
        return None
    attributes = sorted((name, _attribute_key(attribute)) for name, attribute in node.attributes.items())
    outputs = tuple(value.name == "" for value in node.outputs)
    return node.op_identifier(), tuple(map(id, node.inputs)), outputs, tuple(attributes)


def _attribute_key(attribute: ir.Attr) -> tuple[str, Hashable]:
    """Return a key that tells 0.0 from -0.0, and takes equal NaNs as equal."""
    kind = attribute.type.name
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        numbers: Iterable[float] = [attribute.value] if attribute.type == ir.AttributeType.FLOAT else attribute.value
        return kind, b"".join(struct.pack("<d", number) for number in numbers)
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return kind, (tensor.dtype, tensor.shape.numpy(), hashlib.sha256(_bytes_of(tensor)).digest())
    return kind, repr(attribute.value)
