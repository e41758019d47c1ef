"""What both precisions ask of nodes and values: is it constant, was it named by the user, how is it called anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import onnx_ir as ir

from optframe.graph import ONNX_DOMAINS
from optframe.passes import ORIGIN_KEY, module_path

Warn: TypeAlias = Callable[[str], None]
"""Takes a sentence for the user: something was done in another way than asked for."""

log_warning: Warn = logging.getLogger("optframe.precision").warning

LAYOUT_OPS = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
"""Ops that move or repeat elements and change none."""


def is_standard(node: ir.Node) -> bool:
    """Return whether the op is ONNX's own."""
    return node.domain in ONNX_DOMAINS


def is_constant(value: ir.Value | None) -> bool:
    """Return whether `value` is an initialiser that is no input, or a Constant node's output."""
    if value is None or value.is_graph_input():
        return False
    producer = value.producer()
    return value.const_value is not None or (
        producer is not None and producer.op_type == "Constant" and is_standard(producer)
    )


def agree(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    """Return whether two shapes are known to be of one rank and may be the same: free dimensions fit any size."""
    if first is None or second is None or len(first) != len(second):
        return False
    pairs = zip(first, second, strict=True)
    return all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


Keep: TypeAlias = Sequence[str] | Callable[[ir.Node], bool]
"""Which nodes stay as they are: patterns for `selects`, or what tells it of a node."""


def keeps(keep: Keep, node: ir.Node) -> bool:
    """Return whether `node` stays as it is."""
    return keep(node) if callable(keep) else selects(keep, node)


def selects(patterns: Sequence[str], node: ir.Node) -> bool:
    """Return whether a pattern (shell style: `*`, `?`, `[]`) matches the node.

    Compared are its name, its op type, the torch modules it came from, and the exported nodes that it stands for.
    """
    names = [node_name(node), node.op_type, *module_path(node.metadata_props, node.name or "").split(",")]
    names += node.metadata_props.get(ORIGIN_KEY, "").split(",")
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names if name)


def node_name(node: ir.Node) -> str:
    """Return how a node is called: by its name, or by its first output's where it has none."""
    return node.name or (node.outputs[0].name if node.outputs else None) or ""


class Names:
    """Gives out names that no value or node of the model has."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = set(_names(model))

    def new(self, wanted: str) -> str:
        """Return `wanted`, with a number behind it if it is taken."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def _names(model: ir.Model) -> Iterable[str]:
    for graph in model.graphs():
        yield from graph.initializers
        yield from (value.name for value in graph.inputs if value.name)
        for node in graph:
            if node.name:
                yield node.name
            yield from (value.name for value in node.outputs if value.name)
