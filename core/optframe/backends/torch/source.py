"""An ONNX graph made ready to be traced: every node with its torch call, or an error that names those without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from optframe import graph as graph_module
from optframe.backends.torch import (
    control,
    ops_arrays,
    ops_linear,
    ops_nn,
    ops_pointwise,
    ops_recurrent,
    ops_reduce,
    ops_resize,
)
from optframe.backends.torch.dtypes import to_torch, torch_dtype
from optframe.backends.torch.registry import TRANSLATIONS, Call, OpNode
from optframe.errors import InputError

FAMILIES = (ops_arrays, ops_linear, ops_nn, ops_pointwise, ops_recurrent, ops_reduce, ops_resize)
"""The modules that enter translations, all of them imported before anything is looked up."""

CONTROL_OPS = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}

OLDEST_OPSET = 7
"""Before it, operands broadcast by attributes of their own and several ops had training among their forms."""

PluginCalls = Mapping[str, Callable[[OpNode], Call]]
"""`domain::name` of a plugin op -> how its kernel is called."""


@dataclass
class Prepared:
    """A node with its call; `host` inputs are read in host memory; `bodies` are the graphs of a control flow op."""

    node: ir.Node
    op: OpNode
    call: Call | None
    host: tuple[int, ...] = ()
    data_shaped: bool = False
    bodies: dict[str, Body] = field(default_factory=dict)

    @property
    def is_shape(self) -> bool:
        """Whether the result tells the input's shape, not its values."""
        return self.op.op_type in ops_arrays.SHAPE_OPS


@dataclass
class Body:
    """A graph or subgraph: `captures` are the values of graphs around it that it reads, in order of first use."""

    inputs: list[ir.Value]
    outputs: list[ir.Value]
    nodes: list[Prepared]
    constants: dict[ir.Value, torch.Tensor]
    captures: list[ir.Value]


class Preparer:
    """Turns graphs into bodies, collecting what has no translation."""

    def __init__(self, opset: int, plugins: PluginCalls) -> None:
        self._opset = opset
        self._plugins = plugins
        self._missing: dict[str, str] = {}

    @classmethod
    def prepare(cls, model: ir.Model, plugins: PluginCalls) -> Body:
        """Return the body of the model's graph.

        Raises:
            InputError: naming every op that has no translation, or a form of an op or a dtype that has none; or the
                model is older than `OLDEST_OPSET`.
        """
        opset = graph_module.opset(model)
        if opset < OLDEST_OPSET:
            raise InputError(f"backend torch takes models of opset {OLDEST_OPSET} and newer, this one is of {opset}")
        preparer = cls(opset, plugins)
        body = preparer.body(model.graph)
        if preparer._missing:
            ops = ", ".join(f"{name} (node '{node}')" for name, node in sorted(preparer._missing.items()))
            raise InputError(f"backend torch has no translation of {ops}: use onnxruntime, or another pipeline")
        return body

    def body(self, graph: ir.Graph) -> Body:
        """Return the body of `graph`, its subgraphs' included."""
        constants = {
            value: to_torch(_checked(value).numpy())
            for value in graph.initializers.values()
            if value.const_value is not None
        }
        inputs = [value for value in graph.inputs if value not in constants]  # an input's default is its value here
        nodes = [self._node(node) for node in graph]
        own = set(inputs) | set(constants) | {output for node in graph for output in node.outputs}
        captures: dict[ir.Value, None] = {}
        for prepared in nodes:
            read = [value for value in prepared.node.inputs if value is not None]
            read += [value for body in prepared.bodies.values() for value in body.captures]
            captures.update(dict.fromkeys(value for value in read if value not in own))
        captures.update(dict.fromkeys(value for value in graph.outputs if value not in own))
        return Body(inputs, list(graph.outputs), nodes, constants, list(captures))

    def _node(self, node: ir.Node) -> Prepared:
        attributes = {
            name: attribute.value
            for name, attribute in node.attributes.items()
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        }
        present = tuple(value is not None for value in node.inputs)
        op = OpNode(node.op_type, attributes, self._opset, present, len(node.outputs), node.name or "")
        if node.domain not in graph_module.ONNX_DOMAINS:
            build = self._plugins.get(f"{node.domain}::{node.op_type}")
            if build is None:
                self._missing.setdefault(f"{node.domain}::{node.op_type}", op.name)
            return Prepared(node, op, build(op) if build else None)
        if node.op_type in CONTROL_OPS:
            control.check(op)
            bodies = {name: self.body(node.attributes[name].as_graph()) for name in CONTROL_OPS[node.op_type]}
            return Prepared(node, op, None, bodies=bodies)
        translation = TRANSLATIONS.get(node.op_type)
        if translation is None:
            self._missing.setdefault(node.op_type, op.name)
            return Prepared(node, op, None)
        try:
            call = translation.build(op)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise op.unsupported("attributes that are missing or malformed") from error
        return Prepared(node, op, call, translation.host, translation.data_shaped)


def _checked(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    torch_dtype(tensor.dtype, f"weight '{value.name}'")
    return tensor
