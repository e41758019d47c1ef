"""Models as onnx-graphsurgeon graphs, for passes written in that dialect, and back without loss.

graphsurgeon itself drops metadata, doc strings, overloads, and some kinds of attributes and types, copies all weights,
and exports the weights that only a subgraph uses into that subgraph. What it drops is kept here by node and by name;
weights that no pass asks for are never copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from optframe.errors import InputError, describe
from optframe.graph import EXTERNAL_THRESHOLD_BYTES, OpId, count_ops, weight_bytes
from optframe.passes import provenance
from optframe.snapshot import Snapshot, same_tensor, subgraphs

CARRIED_TYPES = ("tensor_type", "sequence_type")
"""Kinds of values that graphsurgeon can write; the types of others are restored by name."""

_KINDS = onnx.AttributeProto
DROPPED_ATTRIBUTES = frozenset(
    {_KINDS.TENSORS, _KINDS.SPARSE_TENSOR, _KINDS.SPARSE_TENSORS, _KINDS.TYPE_PROTO, _KINDS.TYPE_PROTOS}
)
"""Kinds of attributes that graphsurgeon leaves out."""

EMPTY_LISTS = frozenset({_KINDS.INTS, _KINDS.FLOATS, _KINDS.STRINGS})
"""Kinds of attributes that it cannot write when they are empty."""


class _Weight(LazyValues):  # type: ignore[misc]
    """The values of an initialiser, read when a pass asks for them; `stub` is their type and shape without data."""

    def __init__(self, stub: LazyValues, content: ir.TensorProtocol) -> None:
        self.shape, self.dtype, self.nbytes = stub.shape, stub.dtype, stub.nbytes
        self.stub = stub
        self.content = content

    @property
    def tensor(self) -> onnx.TensorProto:
        """What graphsurgeon exports, where a pass has it do so."""
        return ir.to_proto(self.content)

    def load(self) -> np.ndarray[Any, Any]:
        """Return a copy of the values."""
        return np.array(self.content.numpy())


@dataclass
class _Extras:
    """What graphsurgeon does not keep of `node`; `source` is the node that it was, None if a pass made it."""

    node: gs.Node
    name: str
    metadata: Mapping[str, str]
    outputs: tuple[str, ...]
    source: ir.Node | None = None
    temporary_name: str | None = None


class GraphSurgeonView:
    """A model as a graphsurgeon graph, for as many passes in a row as work on it.

    `graph` is what passes change. Nodes without a name, or with one that another node has, get a temporary one.

    Raises:
        InputError: the model is too large for graphsurgeon, or has something that it cannot hold.
    """

    def __init__(self, model: ir.Model) -> None:
        size = weight_bytes(model)
        if size >= EXTERNAL_THRESHOLD_BYTES:
            raise InputError(
                f"graphsurgeon's dialect loads all weights, and these have {size / 2**30:.1f} GiB; "
                "leave passes of that dialect out of the pipeline"
            )
        snapshot = Snapshot.take(model)
        self._model = snapshot.model
        self._weights = snapshot.weights
        self.graph = _import(snapshot)
        self._nodes = _name_nodes(self.graph, self._model.graph)
        functions = zip(self.graph.functions, self._model.functions.values(), strict=True)
        self._functions = {id(each): (each, _function_bytes(each), source) for each, source in functions}

    def stamp(self, pass_name: str) -> None:
        """Record that pass `pass_name` made the nodes that are new, from those that made the same tensors before."""
        makers = {name: extras for extras in self._nodes.values() for name in extras.outputs}
        for node in _nodes(self.graph):
            outputs = tuple(tensor.name for tensor in node.outputs if tensor.name)
            if id(node) not in self._nodes:
                origin = list({id(makers[name]): makers[name] for name in outputs if name in makers}.values())
                metadata = provenance(pass_name, [each.metadata for each in origin], [each.name for each in origin])
                self._nodes[id(node)] = _Extras(node, node.name, metadata, outputs)
            self._nodes[id(node)].outputs = outputs

    def op_histogram(self, kernel_ops: Collection[str] = ()) -> Counter[str]:
        """Return op type -> count of the present state, counted as `graph.op_histogram` does."""
        functions = {(each.domain, each.name, ""): _op_ids(each) for each in self.graph.functions}
        return count_ops(_op_ids(self.graph), functions, kernel_ops)

    def to_model(self) -> ir.Model:
        """Return the present state as a model of its own; the view can go on being used."""
        proto, lazy = self._export()
        model = ir.from_proto(proto)
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                value.const_value = lazy.get(name) or self._same_weight(value)
        _hoist(model.graph, {}, self._model.graph.initializers.keys(), model.graph)
        for node, copy in _pairs(self.graph, model.graph):
            _restore_node(copy, self._nodes[id(node)])
        _restore_values(model, self._model)
        _restore_inputs(model.graph, self._model.graph)
        _restore_header(model, self._model)
        functions = [self._function(each) for each in self.graph.functions]
        model.functions.clear()
        model.functions.update({function.identifier(): function for function in functions})
        return model

    def _export(self) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
        """Return the graph as a protobuf, and by name the weights that it lacks."""
        weights = [tensor for tensor in _constants(self.graph) if isinstance(tensor._values, _Weight)]
        lazy = {tensor.name: tensor._values.content for tensor in weights}
        held = [tensor._values for tensor in weights]
        try:
            for tensor in weights:
                tensor._values = tensor._values.stub
            return gs.export_onnx(self.graph, do_type_check=False), lazy
        finally:
            for tensor, values in zip(weights, held, strict=True):
                tensor._values = values

    def _same_weight(self, value: ir.Value) -> ir.TensorProtocol | None:
        """Return the original tensor where a pass only read it, so that nobody has to compare it again."""
        original = self._weights.get(value.name or "")
        return original if same_tensor(original, value.const_value) else value.const_value

    def _function(self, function: gs.Function) -> ir.Function:
        if id(function) in self._functions:
            _, content, source = self._functions[id(function)]
            if _function_bytes(function) == content:
                return source.clone()
        changed: ir.Function = ir.from_proto(OnnxExporter.export_function(function))
        return changed


def _import(snapshot: Snapshot) -> gs.Graph:
    proto = onnx.ModelProto()
    proto.CopyFrom(snapshot.proto)
    for node in proto.graph.node:
        _drop_attributes(node)
    proto.graph.initializer.extend(_stub(name, tensor) for name, tensor in snapshot.weights.items())
    try:
        graph = gs.import_onnx(proto)
    except Exception as error:  # graphsurgeon raises its own and Python's errors for what it cannot hold
        raise InputError(f"graphsurgeon cannot read this model ({describe(error)})") from error
    for tensor in _constants(graph):
        if tensor.name in snapshot.weights:
            tensor._values = _Weight(tensor._values, snapshot.weights[tensor.name])
    for tensor in _tensors(graph):
        if isinstance(tensor, gs.Variable) and tensor.type not in CARRIED_TYPES:
            tensor.dtype = None
    return graph


def _stub(name: str, content: ir.TensorProtocol) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=content.dtype.value, dims=content.shape.numpy())


def _drop_attributes(node: onnx.NodeProto) -> None:
    kept = [attribute for attribute in node.attribute if not _is_dropped(attribute)]
    if len(kept) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(kept)
    for graph in subgraphs(node):
        for inner in graph.node:
            _drop_attributes(inner)


def _is_dropped(attribute: onnx.AttributeProto) -> bool:
    if attribute.type in EMPTY_LISTS and not attribute.ref_attr_name:
        return not (attribute.ints or attribute.floats or attribute.strings)
    if attribute.type == onnx.AttributeProto.GRAPHS:
        raise InputError(f"graphsurgeon cannot hold attribute '{attribute.name}', a list of graphs")
    return attribute.type in DROPPED_ATTRIBUTES


def _name_nodes(graph: gs.Graph, source: ir.Graph) -> dict[int, _Extras]:
    """Give each node a name that no other has; return what graphsurgeon does not keep, by the node's id."""
    names = Counter(node.name for node in _nodes(graph))
    table: dict[int, _Extras] = {}
    for number, (node, original) in enumerate(_pairs(graph, source)):
        outputs = tuple(tensor.name for tensor in node.outputs if tensor.name)
        table[id(node)] = _Extras(node, original.name or "", original.metadata_props, outputs, original)
        if names[node.name] > 1 or not node.name:
            node.name = table[id(node)].temporary_name = f"unnamed_{node.op}_{number}"
    return table


def _op_ids(graph: gs.Graph) -> list[OpId]:
    return [(node.domain or "", node.op, "") for node in _nodes(graph)]


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for each in (graph, *graph.subgraphs(recursive=True)):
        yield from each.nodes


def _tensors(graph: gs.Graph) -> Iterator[gs.Tensor]:
    for each in (graph, *graph.subgraphs(recursive=True)):
        yield from each.tensors().values()


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    return list({id(tensor): tensor for tensor in _tensors(graph) if isinstance(tensor, gs.Constant)}.values())


def _pairs(graph: gs.Graph, other: ir.Graph) -> Iterator[tuple[gs.Node, ir.Node]]:
    """Yield the nodes of two forms of one graph side by side, subgraphs included."""
    for node, same in zip(graph.nodes, other, strict=True):
        yield node, same
        for name, attribute in node.attrs.items():
            if isinstance(attribute, gs.Graph):
                yield from _pairs(attribute, same.attributes[name].as_graph())


def _function_bytes(function: gs.Function) -> bytes:
    content: bytes = OnnxExporter.export_function(function).SerializeToString(deterministic=True)
    return content


def _hoist(graph: ir.Graph, outer: Mapping[str, ir.Value], originals: Collection[str], top: ir.Graph) -> None:
    """Undo that each graph got its own copy of the initialisers of graphs around it; `originals` belong to `top`."""
    for name, value in list(graph.initializers.items()) if graph is not top else []:
        if name in outer:
            value.replace_all_uses_with(outer[name])
            del graph.initializers[name]
        elif name in originals:  # of the top graph, used in subgraphs alone: the first brings it back for all
            del graph.initializers[name]
            if name in top.initializers:
                value.replace_all_uses_with(top.initializers[name])
            else:
                top.register_initializer(value)
    seen = {**outer, **top.initializers, **graph.initializers}
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                _hoist(attribute.as_graph(), seen, originals, top)


def _restore_node(node: ir.Node, extras: _Extras) -> None:
    node.metadata_props.update(extras.metadata)
    source = extras.source
    if source is None:
        return
    if node.name == extras.temporary_name:
        node.name = source.name
    node.doc_string = source.doc_string
    if (node.domain, node.op_type) == (source.domain, source.op_type):
        node.overload = source.overload
        for name, attribute in source.attributes.items():
            if _is_lost(attribute, node.attributes.get(name)):
                node.attributes.add(attribute)


def _is_lost(attribute: ir.Attr, written: ir.Attr | None) -> bool:
    """Whether graphsurgeon left `attribute` out, or copied the tensor in it."""
    if written is None:
        return _is_dropped(ir.to_proto(attribute))
    tensors = attribute.type == written.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    return tensors and same_tensor(attribute.as_tensor(), written.as_tensor())


def _restore_values(model: ir.Model, source: ir.Model) -> None:
    """Give values their metadata, and types that graphsurgeon does not know, back by name."""
    originals = {value.name: value for value in _values(source)}
    for value in _values(model):
        original = originals.get(value.name)
        if original is not None:
            value.metadata_props.update(original.metadata_props)
            value.doc_string = original.doc_string
            if original.type is not None and not isinstance(original.type, ir.TensorType):
                value.type, value.shape = original.type, _copy_shape(original)


def _copy_shape(value: ir.Value) -> ir.Shape | None:
    return value.shape.copy() if value.shape is not None else None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _restore_inputs(graph: ir.Graph, source: ir.Graph) -> None:
    """Graphsurgeon leaves inputs that have an initialiser as their default out of the inputs."""
    present = {value.name for value in graph.inputs}
    for position, original in enumerate(source.inputs):
        name = original.name or ""
        if name in source.initializers and name not in present:
            if name not in graph.initializers:
                value = ir.Value(
                    name=name, type=original.type, shape=_copy_shape(original), const_value=original.const_value
                )
                graph.register_initializer(value)
            graph.inputs.insert(position, graph.initializers[name])


def _restore_header(model: ir.Model, source: ir.Model) -> None:
    model.domain, model.model_version, model.doc_string = source.domain, source.model_version, source.doc_string
    model.device_configurations = source.device_configurations
    model.metadata_props.update(source.metadata_props)
    model.graph.metadata_props.update(source.graph.metadata_props)
