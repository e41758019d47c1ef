"""A model frozen between two passes: its structure as a protobuf without the weights, and the weights by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir

from optframe.graph import ONNX_DOMAINS, OpId, hold_in_memory

WEIGHT_BYTES = 1024
"""Initialisers above this size are kept beside the structure; shapes, axes and the like stay in it."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model that no longer changes.

    `model` is the snapshot's own copy, which shares tensors with the model it was taken of; `proto` is its serialised
    form without the tensors of `weights`, which are initialisers of the main graph.
    """

    model: ir.Model
    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]

    @classmethod
    def take(cls, model: ir.Model) -> Snapshot:
        """Freeze the present state of `model`, which must be wired properly (see `structure.wiring_problem`)."""
        copy = model.clone()
        initializers = dict(copy.graph.initializers)
        weights = {name: value.const_value for name, value in initializers.items() if is_weight(value.const_value)}
        for name in weights:
            copy.graph.initializers.pop(name)
        for graph in copy.graphs():  # what stays in the structure must not refer to files
            hold_in_memory(graph.initializers.values())
        proto = ir.to_proto(copy)
        copy.graph.initializers.clear()
        copy.graph.initializers.update(initializers)
        return cls(copy, proto, {name: tensor for name, tensor in weights.items() if tensor is not None})

    @cached_property
    def initializers(self) -> Mapping[str, ir.TensorProtocol]:
        """All initialisers of the main graph."""
        small: dict[str, ir.TensorProtocol] = {t.name: ir.from_proto(t) for t in self.proto.graph.initializer}
        return {**small, **self.weights}

    @cached_property
    def inputs(self) -> tuple[onnx.ValueInfoProto, ...]:
        """The inputs that a caller feeds: those without an initialiser as their default."""
        return tuple(value for value in self.proto.graph.input if value.name not in self.initializers)

    @cached_property
    def opsets(self) -> Mapping[str, int]:
        """Domain -> version; ONNX's own domain is always called ''."""
        imports = self.proto.opset_import
        return {"" if entry.domain in ONNX_DOMAINS else entry.domain: entry.version for entry in imports}

    @cached_property
    def functions(self) -> Mapping[OpId, onnx.FunctionProto]:
        """The model-local functions."""
        return {(f.domain, f.name, f.overload): f for f in self.proto.functions}

    @cached_property
    def function_digests(self) -> Mapping[OpId, bytes]:
        """For each function a digest of all that it computes, functions that it calls included."""
        digests: dict[OpId, bytes] = {}
        for identifier in self.functions:
            self._function_digest(identifier, digests)
        return digests

    def _function_digest(self, identifier: OpId, digests: dict[OpId, bytes]) -> bytes:
        if identifier not in digests:
            digests[identifier] = b""  # functions cannot be recursive; an invalid model must not hang us
            function = self.functions[identifier]
            called = sorted({op for op in ops_of(function.node) if op in self.functions})
            parts = [
                function.SerializeToString(deterministic=True),
                *(self._function_digest(op, digests) for op in called),
            ]
            digests[identifier] = hashlib.sha256(b"".join(parts)).digest()
        return digests[identifier]

    @cached_property
    def signatures(self) -> tuple[bytes, ...]:
        """For each node of the main graph, bytes that say what it computes from and to which names."""
        return tuple(self._signature(node) for node in self.proto.graph.node)

    def _signature(self, node: onnx.NodeProto) -> bytes:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        for field in ("name", "doc_string", "metadata_props"):
            bare.ClearField(field)
        called = {op for op in ops_of([node]) if op in self.functions}
        content: bytes = bare.SerializeToString(deterministic=True)
        return content + b"".join(self.function_digests[op] for op in sorted(called))

    def same(self, other: Snapshot, types: bool = True) -> bool:
        """Whether both are the same model; without `types`, those written beside values may differ."""
        if self is other:
            return True
        digests = (self._typed_digest, other._typed_digest) if types else (self._digest_of_ops, other._digest_of_ops)
        return digests[0] == digests[1] and self._same_weights(other)

    @cached_property
    def _typed_digest(self) -> bytes:
        return _digest(self.proto, types=True)

    @cached_property
    def _digest_of_ops(self) -> bytes:
        return _digest(self.proto, types=False)

    def _same_weights(self, other: Snapshot) -> bool:
        return self.weights.keys() == other.weights.keys() and all(
            same_tensor(tensor, other.weights[name]) for name, tensor in self.weights.items()
        )


def is_weight(tensor: ir.TensorProtocol | None) -> bool:
    """Whether `tensor` is kept beside a model's structure."""
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > WEIGHT_BYTES


def _digest(proto: onnx.ModelProto, types: bool) -> bytes:
    """Return a digest of `proto`, whatever the order of what has none; without the types of values unless `types`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in [copy.graph, *(inner for node in copy.graph.node for inner in subgraphs(node, recursive=True))]:
        for unordered in (graph.initializer, graph.value_info):
            unordered.sort(key=lambda entry: entry.name)
        if not types:
            del graph.value_info[:]
    for function in copy.functions if not types else ():
        del function.value_info[:]
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).digest()


def subgraphs(node: onnx.NodeProto, recursive: bool = False) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in the attributes of `node`, and on request those within them."""
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield graph
            if recursive:
                for inner in graph.node:
                    yield from subgraphs(inner, recursive=True)


def ops_of(nodes: Iterable[onnx.NodeProto]) -> set[OpId]:
    """Return the ops that `nodes` and the nodes of their subgraphs use."""
    found: set[OpId] = set()
    for node in nodes:
        found.add((node.domain, node.op_type, node.overload))
        for graph in subgraphs(node):
            found |= ops_of(graph.node)
    return found


def consumed(node: onnx.NodeProto) -> set[str]:
    """Return the names that `node` reads: its inputs, and what its subgraphs take from outside."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        inside |= {name for inner in graph.node for name in inner.output}
        read = {name for inner in graph.node for name in consumed(inner)} | {value.name for value in graph.output}
        names |= read - inside
    return names


def same_tensor(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    """Whether `a` and `b` hold the same bytes of the same type and shape; weights on disk compare by their place."""
    if a is b or a is None or b is None:
        return a is b
    if a.dtype != b.dtype or list(a.shape) != list(b.shape):
        return False
    if a.dtype == ir.DataType.STRING:
        return np.array_equal(a.numpy(), b.numpy())
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor) and _place(a) == _place(b):
        return True
    return np.array_equal(raw_bytes(a), raw_bytes(b))


def _place(tensor: ir.ExternalTensor) -> tuple[str, int, int | None]:
    return (tensor.path, tensor.offset or 0, tensor.length)


def raw_bytes(tensor: ir.TensorProtocol) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the content of a numeric `tensor` as bytes, if possible without a copy."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
