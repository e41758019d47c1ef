"""Small edits of a graph that passes share: fresh names, new constants, a value bypassed, a node taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe.graph import ONNX_DOMAINS, RANDOM_OPS, constant_tensor, nodes_within, subgraphs

Array = np.ndarray[Any, np.dtype[Any]]


def onnx_version(model: ir.Model) -> int:
    """Return the version of ONNX's own opset that `model` imports, 0 for a model of foreign ops alone."""
    return next((model.opset_imports[domain] for domain in ONNX_DOMAINS if domain in model.opset_imports), 0)


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """Return whether `node` is an op of ONNX's own domain, and one of `op_types` if any are given."""
    return node.domain in ONNX_DOMAINS and (not op_types or node.op_type in op_types)


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that `node` belongs to."""
    assert node.graph is not None, "a node under a pass belongs to a graph"
    return node.graph


def deterministic(node: ir.Node) -> bool:
    """Return whether equal inputs always give equal outputs: no random op, no Dropout that trains."""
    if node.op_type in RANDOM_OPS:
        return False
    return node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None


def ints_option(node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """Return what `node` has as attribute `name` (older opsets) or as constant input `index` (newer ones).

    An option that is absent gives (); one that is no constant gives None.
    """
    if name in node.attributes:
        attribute = node.attributes[name]
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    if index >= len(node.inputs) or node.inputs[index] is None:
        return ()
    content = small_constant(node.inputs[index])
    return None if content is None else tuple(int(entry) for entry in content.reshape(-1))


def small_constant(value: ir.Value | None, limit: int = 1024) -> Array | None:
    """Return the array behind a constant `value` of at most `limit` elements, else None; weights stay on disk."""
    tensor = constant_tensor(value)
    return None if tensor is None or tensor.size > limit else tensor.numpy()


class FreshNames:
    """Names of values that no graph or function of a model uses: moved and new values never shadow others."""

    def __init__(self, model: ir.Model) -> None:
        self._uses: Counter[str] = Counter()
        self._last: Counter[str] = Counter()
        bodies = [function.graph for function in model.functions.values()]
        for graph in [*model.graphs(), *bodies, *(inner for body in bodies for inner in body.subgraphs())]:
            self._uses.update({*graph.initializers, *(value.name for value in graph.inputs if value.name)})
            self._uses.update(value.name for node in graph for value in node.outputs if value.name)

    def __call__(self, hint: str) -> str:
        """Return `hint`, or `hint` with a number behind it where that name is taken."""
        name = hint
        while not name or self._uses[name]:
            self._last[hint] += 1  # goes on where it ended before: thousands of names may share a hint
            name = f"{hint}_{self._last[hint]}"
        self._uses[name] += 1
        return name

    def moved(self, name: str) -> str:
        """Return a name for the value that had `name` and moves to another graph: `name`, if it alone had it."""
        self._uses[name] -= 1
        return self(name)


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Return a new initialiser of `graph` that holds `array`; `name` must be free."""
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def can_bypass(old: ir.Value, new: ir.Value) -> bool:
    """Return whether `new` can take every use of `old`.

    A graph output must be made by a node of its own graph, and only once: an input, an initialiser, a value of an
    outer graph, or one that leaves under another name already cannot take its place.
    """
    if not old.is_graph_output():
        return True
    producer = new.producer()
    return producer is not None and producer.graph is old.graph and not new.is_graph_output()


def bypass(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take every use of `old` (see `can_bypass`); where `old` leaves the graph, `new` takes its name."""
    is_output = old.is_graph_output()
    if new.type is None or is_output:
        new.type = old.type if old.type is not None else new.type
    if new.shape is None or is_output:
        new.shape = old.shape if old.shape is not None else new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        new.name = old.name


def remove(nodes: Iterable[ir.Node]) -> None:
    """Take unused `nodes`, of any graphs, out of them, and with them what their subgraphs used of outer graphs."""
    listed = list(nodes)
    for node in listed:
        _detach(node)
        for subgraph in subgraphs(node):
            for inner in nodes_within(subgraph):
                _detach(inner)
    for node in listed:
        graph_of(node).remove(node, safe=True)


def _detach(node: ir.Node) -> None:
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
