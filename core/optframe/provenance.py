"""Where the nodes of an optimised model come from: the passes, the exported nodes, the torch modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from optframe.graph import op_name
from optframe.passes import ORIGIN_KEY, PASS_KEY, module_path


@dataclass(frozen=True)
class NodeOrigin:
    """A node that passes made or changed, by `op_name` and its name.

    `passes` had a hand in it, oldest first; `origins` are the names of the exported nodes that it stands for, `modules`
    the torch modules that these came from, where the exporter said so.
    """

    name: str
    op_type: str
    passes: tuple[str, ...]
    origins: tuple[str, ...]
    modules: tuple[str, ...]


def node_origin(node: ir.Node) -> NodeOrigin:
    """Return where `node` comes from, by its metadata; a node as exported has no `passes`, and stands for itself."""
    props, name = node.metadata_props, node.name or ""
    return NodeOrigin(
        name,
        op_name(node),
        _words(props.get(PASS_KEY, "")),
        _words(props.get(ORIGIN_KEY, name)),
        _words(module_path(props, name)),
    )


def made_nodes(model: ir.Model) -> Iterator[NodeOrigin]:
    """Yield the nodes of `model`, subgraphs included, that passes made or changed."""
    yield from (node_origin(node) for node in model.graph.all_nodes() if node.metadata_props.get(PASS_KEY))


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))
