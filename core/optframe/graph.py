"""Models as `onnx_ir.Model`: load, save, count, fingerprint, check, and the small questions every pass asks."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from optframe import files, onnx_file
from optframe.errors import InputError

OpId: TypeAlias = tuple[str, str, str]
"""Domain, op type and overload, as a node names its op and as a function is found."""

ONNX_DOMAINS = ("", "ai.onnx")
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Ops of ONNX that draw numbers, by which node they are; Dropout is not one in inference."""

EXTERNAL_THRESHOLD_BYTES = (1 << 31) - (64 << 20)
"""A protobuf message ends at 2 GiB: models with more weights are saved with them beside; nodes need room as well."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Return the model at `path`; external weights stay on disk until touched.

    Raises:
        InputError: there is no such file, it is no ONNX model, or its weights are missing or cut off.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"no such file: {source}")
    try:
        model = onnx_file.read(source) or ir.load(source)
    except Exception as error:  # protobuf and onnx_ir raise many types for a damaged file
        raise InputError(f"{source} is no ONNX model ({_root_cause(error)})") from error
    if not model.graph.outputs:
        raise InputError(f"{source} is no usable ONNX model: its graph has no outputs")
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_external(source, value.const_value)
            elif isinstance(value.const_value, ir.TensorProtoTensor):
                _check_internal(source, value.const_value)
    return model


def _check_internal(source: Path, tensor: ir.TensorProtoTensor) -> None:
    proto = tensor.raw
    if proto.HasField("raw_data") and len(proto.raw_data) != tensor.nbytes:
        raise InputError(
            f"{source} is no usable ONNX model: weight '{tensor.name}' has {len(proto.raw_data)} bytes, "
            f"its type and shape take {tensor.nbytes}"
        )


def _check_external(source: Path, tensor: ir.ExternalTensor) -> None:
    weights = Path(tensor.path)
    if not weights.resolve().is_relative_to(source.resolve().parent):
        raise InputError(
            f"{source}: weight '{tensor.name}' lies outside the model's folder ({tensor.location}); refused"
        )
    if not weights.is_file():
        raise InputError(f"{source}: its weight file {tensor.location} is missing; put it beside the model")
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if weights.stat().st_size < end:
        raise InputError(f"{source}: its weight file {tensor.location} is cut off at {weights.stat().st_size} bytes")


def _root_cause(error: BaseException) -> str:
    """Return type and first line of what `error` began with: onnx_ir wraps it once for each level of the graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def weight_bytes(model: ir.Model) -> int:
    """Return the size of all initialisers in bytes."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def save(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Write `model` to `path` under a temporary name and rename it; from 2 GiB on the weights go to `<name>.data`.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    target = Path(path)
    with files.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            temporary = Path(folder) / target.name
            if weight_bytes(model) < EXTERNAL_THRESHOLD_BYTES:
                for graph in model.graphs():
                    hold_in_memory(graph.initializers.values())
                onnx_file.write(model, temporary)
            else:
                ir.save(model, temporary, external_data=f"{target.name}.data")
                os.replace(f"{temporary}.data", f"{target}.data")
            os.replace(temporary, target)
    return target


def hold_in_memory(values: Iterable[ir.Value]) -> None:
    """Read those of the initialisers `values` that lie in a file of weights."""
    for value in values:
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)


def drop_repeated_names(model: ir.Model) -> None:
    """Leave nodes without a name where another of their graph has it: ONNX allows that, onnxruntime does not."""
    for graph in model.graphs():
        seen: set[str | None] = set()
        for node in graph:
            if node.name in seen:
                node.name = None
            seen.add(node.name)


def opset(model: ir.Model) -> int:
    """Return the version of ONNX's own opset that `model` imports."""
    for domain in ONNX_DOMAINS:
        if domain in model.opset_imports:
            return model.opset_imports[domain]
    raise InputError("the model imports no version of ONNX's own opset")


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the graph and its subgraphs, not of functions."""
    return nodes_within(model.graph)


def nodes_within(body: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield the nodes of `body`, behind each those of its subgraphs: several times as fast as onnx_ir's own walk."""
    for node in body:
        yield node
        for subgraph in subgraphs(node):
            yield from nodes_within(subgraph)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that `node` has as attributes (the branches of an If, the body of a Loop)."""
    for attribute in node.attributes.data.values():  # the dictionary within: the mapping looks each key up again
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def op_histogram(model: ir.Model, kernel_ops: Collection[str] = ()) -> Counter[str]:
    """Return op type -> count, the way every node count here is taken.

    Constant nodes are left out, nodes of subgraphs counted. A call of a model-local function counts as one node where
    its `domain::name` is among `kernel_ops` (it has a kernel); otherwise the nodes of its body are counted instead.
    """
    functions = {identifier: _op_ids(nodes_within(function)) for identifier, function in model.functions.items()}
    return count_ops(_op_ids(all_nodes(model)), functions, kernel_ops)


def op_name(node: ir.Node) -> str:
    """Return the op of `node` as counts show it: with its domain, unless that is ONNX's own."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def _op_ids(nodes: Iterable[ir.Node]) -> list[OpId]:
    return [node.op_identifier() for node in nodes]


def count_ops(
    ops: Iterable[OpId], functions: Mapping[OpId, Iterable[OpId]], kernel_ops: Collection[str]
) -> Counter[str]:
    """Return op type -> count for a graph given by its `ops`, subgraphs included; see `op_histogram`."""
    counts: Counter[str] = Counter()
    for identifier, number in Counter(ops).items():
        domain, op_type, _ = identifier
        name = op_type if domain in ONNX_DOMAINS else f"{domain}::{op_type}"
        if identifier in functions and f"{domain}::{op_type}" not in kernel_ops:
            body = count_ops(functions[identifier], functions, kernel_ops)
            counts.update({inner: number * count for inner, count in body.items()})
        elif name != "Constant":
            counts[name] += number
    return counts


def count_nodes(model: ir.Model, kernel_ops: Collection[str] = ()) -> int:
    """Return how many nodes `model` has; see `op_histogram` for what is counted."""
    return op_histogram(model, kernel_ops).total()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initialiser (no graph input) or of a Constant node, unread; None for other values.

    Nothing is written to the model, as `onnx_ir.convenience.get_const_tensor` does with the names of tensors.
    """
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is None:
        return value.const_value
    if node.op_type != "Constant" or node.domain not in ONNX_DOMAINS or len(node.attributes) != 1:
        return None
    return _tensor_of_attribute(next(iter(node.attributes.values())))


def _tensor_of_attribute(attribute: ir.Attr) -> ir.TensorProtocol | None:
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.is_ref():
        return None
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in dtypes:
        return ir.Tensor(np.array(attribute.value, dtypes[attribute.name]))
    if attribute.name in ("value_string", "value_strings"):
        return ir.StringTensor(np.array(attribute.value, np.bytes_))
    return None


def constant(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """Return the array behind `value` if it is an initialiser (no graph input) or the output of a Constant node."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def fingerprint(model: ir.Model) -> str:
    """Return a SHA-256 over everything that `model` computes: ops, attributes, wiring, weights, types, metadata."""
    return hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
