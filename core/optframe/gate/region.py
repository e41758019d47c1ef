"""The regions that passes changed, merged into one model that computes before and after of each and compares them.

Between two snapshots, nodes and initialisers are matched by what they are and by the names they read and write. Those
that have no match are the changed region. Its results that unchanged nodes or the graph's outputs use are its
boundary: if they are the same tensors as before, the whole model computes the same. So a sequence of passes becomes one
graph: the model before the first pass, and for each pass the nodes that it changed, fed from what is already there.
Running it once verifies all of them: nothing is computed twice, and no tensor has to be kept between two runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from optframe.graph import ONNX_DOMAINS, RANDOM_OPS, OpId
from optframe.snapshot import Snapshot, consumed, is_weight, ops_of, raw_bytes, same_tensor, subgraphs

COMPARE_DOMAIN = "optframe.compare"

REACH = 16
"""How many nodes further on a moved tensor may be back in its place; beyond that the model's outputs decide."""


@dataclass(frozen=True)
class Change:
    """What a pass changed: indices of new nodes and names of new initialisers of the main graph, and the boundary."""

    nodes: tuple[int, ...]
    initializers: frozenset[str]
    boundary: tuple[str, ...]


def find_change(before: Snapshot, after: Snapshot, moved: Collection[str] = ()) -> Change:
    """Return what of `after` is not in `before`; both import the same opsets.

    An unchanged node counts as changed if it reads an initialiser that took the place of another one, or one of the
    tensors `moved`, or what comes of these within `REACH` nodes: a pass that rescales or rearranges a tensor sees to
    it that this is undone behind.
    """
    known, nodes = set(before.signatures), after.proto.graph.node
    initializers = frozenset(
        name for name, tensor in after.initializers.items() if not same_tensor(before.initializers.get(name), tensor)
    )
    reads = [consumed(node) for node in nodes]
    followed = (initializers & before.initializers.keys()) | _downstream(nodes, reads, moved)
    changed = [
        signature not in known or not followed.isdisjoint(read)
        for signature, read in zip(after.signatures, reads, strict=True)
    ]
    made = {name for node, new in zip(nodes, changed, strict=True) if new for name in node.output if name}
    used = {name for read, new in zip(reads, changed, strict=True) if not new for name in read}
    used |= {value.name for value in after.proto.graph.output}
    boundary = tuple(sorted(used & (made | initializers)))
    return Change(tuple(i for i, new in enumerate(changed) if new), initializers, boundary)


def _downstream(nodes: Sequence[onnx.NodeProto], reads: Sequence[set[str]], names: Collection[str]) -> set[str]:
    """Return `names` and what is made of them within `REACH` nodes."""
    distance = dict.fromkeys(names, 0)
    for node, read in zip(nodes, reads, strict=True):
        near = min((distance[name] for name in read if name in distance), default=REACH)
        if near < REACH:
            for name in node.output:
                distance.setdefault(name, near + 1)
    return set(distance)


@dataclass(frozen=True)
class Pair:
    """A tensor that step `step` must leave as it was: `name` in the model, and both its names in the merged graph.

    `branch` is set for a result of an If whose condition was forced: inputs seldom take both branches.
    """

    step: int
    name: str
    before: str
    after: str
    branch: str = ""


class MergeError(Exception):
    """A step cannot be merged; its whole model has to be compared instead."""


@dataclass(frozen=True)
class Program:
    """A model to run: a protobuf, and by name the weights that it lacks."""

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]


class MergedModel:
    """The model before the first of several steps, and what each step changed, in one graph.

    `pairs` are the tensors to compare, step by step; `replaced` has, by step, the values around the nodes that went.
    Equal constants, equal operations on the same tensors, and an Identity and its input are one tensor here: what
    differs in these only is equal without being computed.
    """

    def __init__(self, base: Snapshot) -> None:
        self.pairs: list[Pair] = []
        self.replaced: dict[int, frozenset[str]] = {}
        self.opsets = dict(base.opsets)
        self._base = self._last = base
        self._ir_version = base.proto.ir_version
        self._functions = _Functions(base)
        self._constants = _Constants()
        self._nodes: list[onnx.NodeProto] = []
        self._known: dict[bytes, list[str]] = {}
        self._depths: dict[str, int] = {}
        self._taken = _all_names(base.proto.graph)
        self._serial = 0
        self._names = {value.name: value.name for value in base.inputs}
        whole = Change(tuple(range(len(base.proto.graph.node))), frozenset(base.initializers), ())
        self._names = self._emit(base, whole, {})

    def add(self, step: int, after: Snapshot, moved: Collection[str] = ()) -> None:
        """Add what `after` changed against the last snapshot, as step number `step`; see `find_change` for `moved`.

        Raises:
            MergeError: it imports another version of an opset, or writes a boundary tensor that was not there.
        """
        if any(self.opsets.get(domain, version) != version for domain, version in after.opsets.items()):
            raise MergeError("the opset changed")
        change = find_change(self._last, after, moved)
        if not self._names.keys() >= set(change.boundary):
            raise MergeError("its boundary is new")
        self.opsets |= after.opsets
        self._ir_version = max(self._ir_version, after.proto.ir_version)
        self.replaced[step] = self._replaced(after)
        former_calls, calls = self._functions.calls, self._functions.add(after)
        new = self._emit(after, change, calls)
        self._pair(step, {name: (self._names[name], new[name]) for name in change.boundary})
        for node, old in _changed_ifs(self._last, after, change):
            for branch, outer, inner in _ways(node):
                before = self._emit_forced(old, self._names, former_calls, outer, inner)
                forced = self._emit_forced(node, new, calls, outer, inner)
                self._pair(step, {name: (before[name], forced[name]) for name in before}, branch)
        unchanged = {name: self._names[name] for name in change.boundary}
        self._names = {name: unchanged.get(name, new[name]) for name in _outer_names(after)}
        self._last = after

    def _pair(self, step: int, names: Mapping[str, tuple[str, str]], branch: str = "") -> None:
        self.pairs += [Pair(step, name, a, b, branch) for name, (a, b) in names.items() if a != b]

    def program(
        self,
        outputs: Sequence[onnx.ValueInfoProto],
        comparisons: Sequence[Sequence[onnx.NodeProto]],
        dims: Mapping[str, Sequence[int]],
    ) -> Program:
        """Return the model that computes `outputs`, some of them by the nodes of `comparisons`, and nothing else.

        `dims` are the shapes of the inputs by name. Onnxruntime starts with what the last node needs, so comparisons
        that need least come last: tensors then die early (0.85 GB instead of 2.6 on Anchor DETR at 256x320).
        """
        ordered = sorted(comparisons, key=self._depth_of, reverse=True)
        nodes = _needed([*self._nodes, *(node for nodes in ordered for node in nodes)], {v.name for v in outputs})
        read = {name for node in nodes for name in consumed(node)} | {value.name for value in outputs}
        graph = onnx.GraphProto(name="merged", node=nodes, output=outputs)
        graph.input.extend(_with_dims(value, dims[value.name]) for value in self._base.inputs)
        weights: dict[str, ir.TensorProtocol] = {}
        for name, tensor in self._constants.tensors.items():
            if name in read and is_weight(tensor):
                weights[name] = tensor
            elif name in read:
                graph.initializer.append(ir.to_proto(tensor))
                graph.initializer[-1].name = name
        proto = onnx.ModelProto(ir_version=self._ir_version, graph=graph, functions=self._functions.protos.values())
        proto.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in self.opsets.items())
        return Program(proto, weights)

    def _depth_of(self, nodes: Sequence[onnx.NodeProto]) -> int:
        """Return the length of the longest way from the inputs to `nodes`."""
        return max((self._depths.get(name, 0) for node in nodes for name in consumed(node)), default=0)

    def _replaced(self, after: Snapshot) -> frozenset[str]:
        kept, last = set(after.signatures), self._last
        gone = [n for n, signature in zip(last.proto.graph.node, last.signatures, strict=True) if signature not in kept]
        return frozenset(self._names[name] for n in gone for name in (*n.input, *n.output) if name in self._names)

    def _emit(self, after: Snapshot, change: Change, calls: Mapping[OpId, str]) -> dict[str, str]:
        """Add the changed initialisers and nodes; return name of `after` -> name in the merged graph."""
        names = dict(self._names)
        for name in change.initializers:
            names[name] = self._constants.add(after.initializers[name], self._fresh(name))
        for index in change.nodes:
            names |= self._emit_node(_copy(after.proto.graph.node[index]), names, calls)
        return names

    def _emit_forced(
        self, node: onnx.NodeProto, names: Mapping[str, str], calls: Mapping[OpId, str], outer: bool, inner: bool
    ) -> dict[str, str]:
        copy = _copy(node)
        _force(copy, self._condition(outer), self._condition(inner))
        return self._emit_node(copy, names, calls)

    def _emit_node(self, node: onnx.NodeProto, names: Mapping[str, str], calls: Mapping[OpId, str]) -> dict[str, str]:
        """Add `node`, which is renamed in place, unless it is there; return its outputs' names in the merged graph."""
        own = [name for name in node.output if name]
        if node.domain in ONNX_DOMAINS and node.op_type == "Identity" and node.input[0] in names:
            return {own[0]: names[node.input[0]]}
        if _is_constant(node):
            return {own[0]: self._constants.add(ir.from_proto(node.attribute[0].t), self._fresh(own[0]))}
        self._rename_inside(node, names)
        node.input[:] = [names.get(name, name) for name in node.input]
        _call([node], calls)
        outputs = self._known.setdefault(_key(node), []) if _is_repeatable(node) else []
        if not outputs:
            outputs += [self._fresh(name) for name in own]
            fresh = dict(zip(own, outputs, strict=True))
            node.output[:] = [fresh.get(name, name) for name in node.output]
            node.name = self._fresh(node.name)
            self._nodes.append(node)
            self._depths |= dict.fromkeys(outputs, self._depth_of([node]) + 1)
        return dict(zip(own, outputs, strict=True))

    def _rename_inside(self, node: onnx.NodeProto, names: Mapping[str, str]) -> None:
        """Rename what the subgraphs of `node` read from outside; names of their own become fresh ones."""
        for graph in subgraphs(node):
            inside = [*(v.name for v in graph.input), *(t.name for t in graph.initializer)]
            inside += [name for inner in graph.node for name in inner.output if name]
            inner_names = {**names, **{name: self._fresh(name) for name in inside}}
            for entry in (*graph.input, *graph.initializer, *graph.output):
                entry.name = inner_names.get(entry.name, entry.name)
            del graph.value_info[:]
            for inner in graph.node:
                self._rename_inside(inner, inner_names)
                inner.input[:] = [inner_names.get(name, name) for name in inner.input]
                inner.output[:] = [inner_names.get(name, name) for name in inner.output]

    def _condition(self, value: bool) -> str:
        """Return the name of a constant condition."""
        return self._constants.add(ir.tensor(np.array(value)), f"{COMPARE_DOMAIN}.{value}")

    def _fresh(self, name: str) -> str:
        while True:
            self._serial += 1
            candidate = f"{name}@{self._serial}"
            if candidate not in self._taken:
                self._taken.add(candidate)
                return candidate


class _Constants:
    """The constants of the merged graph; equal ones are one."""

    def __init__(self) -> None:
        self.tensors: dict[str, ir.TensorProtocol] = {}
        self._alike: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)

    def add(self, tensor: ir.TensorProtocol, name: str) -> str:
        """Return the name of a constant equal to `tensor`: `name`, if there is none yet."""
        alike = self._alike[_outline(tensor)]
        for other in alike:
            if same_tensor(self.tensors[other], tensor):
                return other
        self.tensors[name] = tensor
        alike.append(name)
        return name


def _outline(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Return what equal tensors share and others seldom do."""
    head = b"" if tensor.dtype == ir.DataType.STRING else raw_bytes(tensor)[:256].tobytes()
    return tensor.dtype, tensor.shape.numpy(), head


class _Functions:
    """The functions of the merged graph. One whose content changed gets a name of its own; its callers follow."""

    def __init__(self, base: Snapshot) -> None:
        self.protos = dict(base.functions)
        self.calls: dict[OpId, str] = {}
        self._targets = {(op, digest): op for op, digest in base.function_digests.items()}

    def add(self, after: Snapshot) -> dict[OpId, str]:
        """Add the functions of `after`; return, for each of its ops, the op type that calls it in the merged graph."""
        keys = list(after.function_digests.items())
        for (domain, name, overload), digest in keys:
            free = name if (domain, name, overload) not in self.protos else f"{name}@{digest.hex()}"
            self._targets.setdefault(((domain, name, overload), digest), (domain, free, overload))
        self.calls = {op: self._targets[op, digest][1] for op, digest in keys}
        for op, digest in keys:
            target = self._targets[op, digest]
            if target not in self.protos:
                function = onnx.FunctionProto()
                function.CopyFrom(after.functions[op])
                function.name = target[1]
                _call(function.node, self.calls)
                self.protos[target] = function
        return self.calls


def _call(nodes: Iterable[onnx.NodeProto], calls: Mapping[OpId, str]) -> None:
    """Make `nodes`, and those in their subgraphs, call functions by the names in `calls`."""
    for node in nodes:
        node.op_type = calls.get((node.domain, node.op_type, node.overload), node.op_type)
        for graph in subgraphs(node):
            _call(graph.node, calls)


def _changed_ifs(before: Snapshot, after: Snapshot, change: Change) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Yield the changed nodes with an If in them, each with the node before that made the same outputs."""
    former = {name: node for node in before.proto.graph.node for name in node.output if name}
    for index in change.nodes:
        node = after.proto.graph.node[index]
        old = next((former[name] for name in node.output if name in former), node)
        same_kind = old.op_type == node.op_type and list(old.output) == list(node.output)
        if same_kind and list(old.attribute) != list(node.attribute):
            yield node, old


def _ways(node: onnx.NodeProto) -> Iterator[tuple[str, bool, bool]]:
    """Yield how the conditions in `node` can be forced: in words, its own condition, and those of Ifs within it."""
    own = node.op_type == "If"
    within = any(op == "If" for graph in subgraphs(node) for _, op, _ in ops_of(graph.node))
    for outer in (True, False) if own else (True,):
        for inner in (True, False) if within else (True,):
            words = [f"the {outer} branch".lower()] * own + [f"inner {inner} branches".lower()] * within
            if words:
                yield " and ".join(words), outer, inner


def _force(node: onnx.NodeProto, outer: str, inner: str) -> None:
    """Make `node`, if it is an If, take the branch of condition `outer`, and Ifs within it that of `inner`."""
    if node.op_type == "If":
        node.input[0] = outer
    for graph in subgraphs(node):
        for each in graph.node:
            _force(each, inner, inner)


def _is_constant(node: onnx.NodeProto) -> bool:
    own = node.domain in ONNX_DOMAINS and node.op_type == "Constant"
    return own and [attribute.name for attribute in node.attribute] == ["value"]


def _is_repeatable(node: onnx.NodeProto) -> bool:
    """Whether an equal node makes equal tensors, and can be found by its bytes: no random op, no subgraph."""
    return node.op_type not in RANDOM_OPS | {"Dropout"} and not any(subgraphs(node))


def _key(node: onnx.NodeProto) -> bytes:
    """Return bytes that nodes share which do the same to the same tensors."""
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.ClearField("name")
    bare.ClearField("doc_string")
    bare.output[:] = ["x" if name else "" for name in node.output]
    content: bytes = bare.SerializeToString(deterministic=True)
    return content


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("metadata_props")
    return copy


def _outer_names(snapshot: Snapshot) -> Iterator[str]:
    """Yield the names of all values of the main graph."""
    yield from (value.name for value in snapshot.proto.graph.input)
    yield from snapshot.initializers
    yield from (name for node in snapshot.proto.graph.node for name in node.output if name)


def _all_names(graph: onnx.GraphProto) -> set[str]:
    """Return every name in `graph` and its subgraphs."""
    names = {node.name for node in graph.node} | {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        names |= {*node.input, *node.output}.union(*(_all_names(inner) for inner in subgraphs(node)))
    return names


def _needed(nodes: Sequence[onnx.NodeProto], wanted: Collection[str]) -> list[onnx.NodeProto]:
    """Return those of `nodes`, which are in topological order, that `wanted` depends on."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed |= consumed(node)
    return kept[::-1]


def _with_dims(value: onnx.ValueInfoProto, dims: Sequence[int]) -> onnx.ValueInfoProto:
    element = value.type.tensor_type.elem_type
    return onnx.helper.make_tensor_value_info(value.name, element, dims)
