"""The pass `eliminate-dead-code`: what no output depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx import defs

from optframe.graph import ONNX_DOMAINS, all_nodes, subgraphs
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import is_onnx, onnx_version, remove


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """Remove what no output of the model depends on.

    Nodes without a used output, in subgraphs and function bodies too; optional outputs of other nodes; the outputs of
    an If, and the scan outputs of a Loop, that nobody reads, with the computation behind them; initialisers, functions
    and opset imports without a user. Inputs of the model are its interface and stay, with their defaults.

    Example:
        before: `y = Relu(x)`, `z = Exp(x)`, and only y is an output
        after:  `y = Relu(x)`
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Remove in place."""
        rewrites = 0
        scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for scope in scopes:
            while removed := _sweep(scope, onnx_version(model), context):
                rewrites += removed
        for graph in model.graphs():
            rewrites += _remove_initializers(graph, context)
        rewrites += _remove_functions(model, context)
        rewrites += _remove_imports(model)
        return PassResult(rewrites > 0, rewrites)


def _sweep(graph: ir.Graph | ir.Function, version: int, context: PassContext) -> int:
    """Go through `graph` backwards once; return the number of changes, after which another sweep may find more."""
    changes = 0
    for node in reversed(graph):
        if node.outputs and not any(_is_used(value) for value in node.outputs):
            if context.allow(node):
                remove([node])
                changes += 1
            continue
        changes += _trim_outputs(node, version, context)
        if node.graph is None:  # it gave way to a node with fewer outputs, which the next sweep visits
            continue
        for subgraph in subgraphs(node):
            changes += _sweep(subgraph, version, context)
    return changes


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _trim_outputs(node: ir.Node, version: int, context: PassContext) -> int:
    unused = [index for index, value in enumerate(node.outputs) if value.name != "" and not _is_used(value)]
    if not unused or not is_onnx(node):
        return 0
    if node.op_type in ("If", "Loop"):
        return _trim_control_flow(node, unused, context)
    return _trim_optional(node, set(unused) & set(_optional_outputs(node, version)), context)


def _optional_outputs(node: ir.Node, version: int) -> Iterator[int]:
    """Yield the indices of the outputs that `node` may leave out without meaning anything else."""
    if node.op_type == "BatchNormalization":  # there their number, or training_mode, tells training from inference
        return
    try:
        schema = defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return
    for index, output in enumerate(schema.outputs):
        if output.option == defs.OpSchema.FormalParameterOption.Optional:
            yield index


def _trim_optional(node: ir.Node, unused: set[int], context: PassContext) -> int:
    if not unused or not context.allow(node):
        return 0
    for index in unused:
        node.outputs[index].name = ""
    count = len(node.outputs)
    while count and node.outputs[count - 1].name == "":
        count -= 1
    node.resize_outputs(count)
    return 1


def _trim_control_flow(node: ir.Node, unused: list[int], context: PassContext) -> int:
    """Put a node without the `unused` outputs in the place of an If or a Loop."""
    bodies = list(subgraphs(node))
    carried = max(len(node.inputs) - 2, 0) if node.op_type == "Loop" else 0
    offset = 1 if node.op_type == "Loop" else 0  # a body gives its condition first
    gone = [index for index in unused if index >= carried]
    fits = all(len(body.outputs) == len(node.outputs) + offset for body in bodies)
    if not gone or not fits or not context.allow(node):
        return 0
    for body in bodies:
        kept = [value for index, value in enumerate(body.outputs) if index - offset not in gone]
        body.outputs.clear()
        body.outputs.extend(kept)
    _with_fewer_outputs(node, gone, context)
    return 1


def _with_fewer_outputs(node: ir.Node, gone: list[int], context: PassContext) -> None:
    kept = [value for index, value in enumerate(node.outputs) if index not in gone]
    new = ir.Node(node.domain, node.op_type, node.inputs, node.attributes, num_outputs=len(kept), name=node.name)
    node.attributes.clear()  # the bodies now belong to the new node
    context.replace([node], [new], kept, new.outputs)


def _remove_initializers(graph: ir.Graph, context: PassContext) -> int:
    unused = [
        value
        for value in graph.initializers.values()
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    removed = [value for value in unused if context.allow(value)]
    for value in removed:
        graph.initializers.pop(str(value.name))
    return len(removed)


def _remove_functions(model: ir.Model, context: PassContext) -> int:
    called: set[ir.OperatorIdentifier] = set()
    stack: list[Iterator[ir.Node]] = [all_nodes(model)]
    while stack:
        for node in stack.pop():
            identifier = node.op_identifier()
            if identifier in model.functions and identifier not in called:
                called.add(identifier)
                stack.append(model.functions[identifier].all_nodes())
    unused = [identifier for identifier in model.functions if identifier not in called]
    removed = [identifier for identifier in unused if context.allow(model.functions[identifier])]
    for identifier in removed:
        del model.functions[identifier]
    return len(removed)


def _remove_imports(model: ir.Model) -> int:
    """Remove imports of foreign domains that have no node; ONNX's own stays, since a model states its opset."""
    needed = {node.domain for node in all_nodes(model)}
    removed = 0
    for function in model.functions.values():
        called = {node.domain for node in function.all_nodes()}
        removed += _drop_imports(function.opset_imports, called)
        needed |= {function.domain, *called}
    return removed + _drop_imports(model.opset_imports, needed)


def _drop_imports(imports: dict[str, int], needed: set[str]) -> int:
    unused = [domain for domain in imports if domain not in needed and domain not in ONNX_DOMAINS]
    for domain in unused:
        del imports[domain]
    return len(unused)
