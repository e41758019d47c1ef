"""What must hold of a model's structure after a pass: wiring, interface, op domains, checker, shapes and types."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from optframe.errors import InputError
from optframe.graph import ONNX_DOMAINS, subgraphs
from optframe.snapshot import Snapshot, ops_of
from optframe.worker import Worker, WorkerFailure

Dims: TypeAlias = "tuple[int | str | None, ...]"
TensorType: TypeAlias = "tuple[int, Dims | None]"
"""Element type (0: unknown) and shape of a tensor; free dimensions are names or None."""

UNKNOWN: TensorType = (0, None)


def wiring_problem(model: ir.Model) -> str | None:
    """Return what is wrong with how values are connected, in one line, or None.

    Every value that is read must have been made before: by a node, as an input or as an initialiser. No node may write
    a value by the name of another one that it sees; inputs and initialisers of a subgraph may hide outer values.
    """
    scopes = [(model.graph, "")] + [(f.graph, f"in function '{f.name}': ") for f in model.functions.values()]
    for graph, where in scopes:
        for problem in _wiring_problems(graph, {}):
            return where + problem
    return None


def require_wired(model: ir.Model, label: str = "the model") -> None:
    """Refuse a model that `wiring_problem` finds fault with; passes and copies of models rely on this.

    Raises:
        InputError: the message calls the model `label`.
    """
    problem = wiring_problem(model)
    if problem:
        raise InputError(f"{label} is invalid: {problem}")


def _wiring_problems(graph: ir.Graph, outer: Mapping[str, ir.Value]) -> Iterator[str]:
    known = {**outer, **{value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}}
    for node in graph:
        for read in node.inputs:
            if read is not None and known.get(read.name or "") is not read:
                yield f"{_label(node)} reads '{read.name}', which nothing before it makes"
        for inner in subgraphs(node):
            yield from _wiring_problems(inner, known)
        for value in node.outputs:
            if value.name and value.name in known:
                yield f"two values are called '{value.name}'"
            known[value.name or ""] = value
    for value in graph.outputs:
        if known.get(value.name or "") is not value:
            yield f"graph output '{value.name}' is made by nothing"


def _label(node: ir.Node) -> str:
    return f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} node"


def interface_problem(before: Snapshot, after: Snapshot) -> str | None:
    """Return how inputs or outputs differ in name, order, type or fixed dimensions, or None.

    A free dimension may be renamed or become fixed, since shape inference may find its size; whether that is true
    shows when the model runs.
    """
    sides = (("input", before.inputs, after.inputs), ("output", before.proto.graph.output, after.proto.graph.output))
    for kind, old_values, new_values in sides:
        old_names, new_names = [v.name for v in old_values], [v.name for v in new_values]
        if old_names != new_names:
            return f"the graph's {kind}s were {', '.join(old_names)} and are {', '.join(new_names) or 'none'}"
        for old, new in zip(old_values, new_values, strict=True):
            if types_clash(tensor_type(old), tensor_type(new), refined=True):
                return f"{kind} '{old.name}' was {show_type(tensor_type(old))} and is {show_type(tensor_type(new))}"
    return None


def foreign_domains(before: Snapshot, after: Snapshot, declared: Collection[str]) -> str | None:
    """Return a sentence on op domains that came in without being `declared`, or None."""
    allowed = {*ONNX_DOMAINS, *declared, *_domains(before)}
    foreign = sorted(_domains(after) - allowed)
    return f"it brought in ops of a domain that it does not declare: {', '.join(foreign)}" if foreign else None


def _domains(snapshot: Snapshot) -> set[str]:
    nodes = [*snapshot.proto.graph.node, *(node for f in snapshot.proto.functions for node in f.node)]
    return {domain for domain, _, _ in ops_of(nodes)}


def tensor_type(value: onnx.ValueInfoProto) -> TensorType:
    """Return element type and shape that `value` declares; nothing is known of what is no tensor."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(_dim(dim) for dim in tensor.shape.dim)


def is_fixed(kind: TensorType) -> bool:
    """Whether element type and all dimensions are known."""
    element, dims = kind
    return bool(element) and dims is not None and all(isinstance(dim, int) for dim in dims)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def types_clash(old: TensorType, new: TensorType, refined: bool = False) -> bool:
    """Whether no tensor is of both types; with `refined`, whether `new` says less than `old`."""
    (old_element, old_dims), (new_element, new_dims) = old, new
    if old_element and (new_element or refined) and old_element != new_element:
        return True
    if old_dims is None or new_dims is None:
        return refined and old_dims is not None
    if len(old_dims) != len(new_dims):
        return True
    pairs = zip(old_dims, new_dims, strict=True)
    return any(isinstance(a, int) and (isinstance(b, int) or refined) and a != b for a, b in pairs)


def show_type(kind: TensorType) -> str:
    """Return a type as text, such as FLOAT[1, ?, 4]."""
    element, dims = kind
    name = onnx.TensorProto.DataType.Name(element) if element else "of unknown type"
    return name if dims is None else f"{name}[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


@dataclass
class Inspector:
    """Asks onnx's checker and shape inference about snapshots, in the `worker`, each snapshot once."""

    worker: Worker
    _seen: dict[int, tuple[Snapshot, Inspection]] = field(default_factory=dict)

    def problem(self, before: Snapshot, after: Snapshot) -> str | None:
        """Return what onnx's checker or inferred types say against `after` but not against `before`, or None.

        Raises:
            WorkerFailure: native code crashed on `after`, or took too long.
        """
        try:
            old = self.inspect(before)
        except WorkerFailure:
            return None
        new = self.inspect(after)
        self._seen = {id(each): self._seen[id(each)] for each in (before, after)}
        if new.checker and not old.checker:
            return f"onnx's checker refuses it: {new.checker}"
        for name, (declared, inferred) in new.clashes.items():
            # A false declaration that was there all along, and only now comes to light, is not the pass's fault.
            unchanged = old.declared.get(name) == declared
            if not unchanged or types_clash(old.inferred.get(name, UNKNOWN), inferred):
                return f"'{name}' is declared {show_type(declared)}, but shape inference finds {show_type(inferred)}"
        return None

    def inspect(self, snapshot: Snapshot) -> Inspection:
        """Return what is known of `snapshot`."""
        if id(snapshot) not in self._seen:
            self._seen[id(snapshot)] = (snapshot, self._ask(snapshot))  # the snapshot is kept, so its id stays its own
        return self._seen[id(snapshot)][1]

    def _ask(self, snapshot: Snapshot) -> Inspection:
        checker, inferred = ask_onnx(self.worker, snapshot.proto, snapshot.weights)
        graph = snapshot.proto.graph
        return Inspection(checker, {v.name: tensor_type(v) for v in (*graph.value_info, *graph.output)}, inferred)


@dataclass(frozen=True)
class Inspection:
    """What onnx says of a model: the `checker`'s complaint, and types by name, `declared` in it and `inferred` anew."""

    checker: str | None
    declared: Mapping[str, TensorType]
    inferred: Mapping[str, TensorType]

    @property
    def clashes(self) -> dict[str, tuple[TensorType, TensorType]]:
        """Name -> declared and inferred type, where no tensor can be of both."""
        return {
            name: (kind, self.inferred[name])
            for name, kind in self.declared.items()
            if name in self.inferred and types_clash(kind, self.inferred[name])
        }


def ask_onnx(
    worker: Worker, proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]
) -> tuple[str | None, Mapping[str, TensorType]]:
    """Return the checker's complaint about a model, and the types of its values, inferred from its inputs alone.

    Raises:
        WorkerFailure: native code crashed, or took too long.
    """
    path = worker.new_file(".onnx")
    onnx.save(_with_weights_as_inputs(proto, weights), path)
    reply = worker.inspect(path)
    path.unlink()
    if not reply["inferred"]:
        return reply["checker"], {}
    graph = onnx.load(reply["inferred"]).graph
    Path(reply["inferred"]).unlink()
    types = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    return reply["checker"], {
        **types,
        **{v.name: tensor_type(v) for v in (*graph.input, *graph.value_info, *graph.output)},
    }


def _with_weights_as_inputs(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    present = {value.name for value in model.graph.input}
    for name, tensor in weights.items():
        if name not in present:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, tensor.shape.numpy()))
    return model
