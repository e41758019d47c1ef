"""Puts the branch of an If that is always taken in the place of the If."""

from __future__ import annotations

import onnx_ir as ir

from optframe.passes import PassContext
from optframe_passes.edit import FreshNames, bypass, can_bypass, graph_of, remove


def inline_branch(node: ir.Node, branch: ir.Graph, names: FreshNames, context: PassContext) -> None:
    """Move what `branch` holds to right behind the If `node`, let its results take the If's outputs, remove the If.

    Values are renamed where another graph of the model has the same name: branches of different Ifs may share names.
    """
    graph = graph_of(node)
    results = list(branch.outputs)
    branch.outputs.clear()
    _move_initializers(branch, graph, names)
    last = _move_nodes(branch, node, names)
    for old, new in zip(node.outputs, results, strict=True):
        if not can_bypass(old, new):
            identity = ir.node("Identity", [new])
            context.stamp([identity], [node])
            graph.insert_after(last, identity)
            last, new = identity, identity.outputs[0]
        bypass(old, new)
    remove([node])


def _move_initializers(branch: ir.Graph, graph: ir.Graph, names: FreshNames) -> None:
    for name, value in list(branch.initializers.items()):
        branch.initializers.pop(name)
        value.name = names.moved(name)
        graph.register_initializer(value)


def _move_nodes(branch: ir.Graph, after: ir.Node, names: FreshNames) -> ir.Node:
    moved = list(branch)
    branch.remove(moved)
    taken = {node.name for node in graph_of(after)}
    for node in moved:
        if node.name in taken:  # onnxruntime refuses a graph with two nodes of one name; None asks for a new one
            node.name = None
        for value in node.outputs:
            if value.name:
                value.name = names.moved(value.name)
    graph_of(after).insert_after(after, moved)
    return moved[-1] if moved else after
