"""The pass `lift-opset`: a model of an older ONNX opset becomes one of the opset that all passes know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import onnx
import onnx_ir as ir
from onnx import defs

from optframe.errors import InputError
from optframe.graph import ONNX_DOMAINS
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import is_onnx, onnx_version
from optframe_passes.opset_adapters import ADAPTERS, COMPATIBLE, CannotLift, Edit, Lift

_OLDEST_IN_TABLE = 7
_SMALL_BYTES = 1024
"""Weights up to this size go to onnx's converter, which reads some of them; larger ones would only be copied."""

_IR_VERSION = 8
"""The IR version that came with opset 18; older ones know neither functions nor initialisers that are no inputs."""

_INPUTS_ARE_INITIALIZERS = 4
"""Below this IR version every initialiser had to be listed as an input as well, without being one."""


@dataclass(frozen=True)
class LiftOpset(GraphPass):
    """Write a model of an older opset in opset `to` (13 to 18); newer models stay as they are.

    Nodes whose op has another form in the newer opset are edited, one rule an op (see `opset_adapters`), subgraphs and
    model-local functions included; everything else, names and metadata with it, is untouched. A model older than
    opset 7, or with an op that the rules don't know, goes through onnx's own converter; metadata is put back by the
    names of outputs. Where a node has no exact equivalent the whole model stays as it is, and a near-miss says why.

    Example:
        before: opset 12, `Squeeze(x)` with attribute `axes=[1]`
        after:  opset 18, `Squeeze(x, [1])`
    """

    name: ClassVar[str] = "lift-opset"
    to: int = 18

    def __post_init__(self) -> None:
        """Refuse opsets that there are no rules for."""
        if not 13 <= self.to <= 18:
            raise InputError(f"lift-opset lifts to opset 13 to 18, not to {self.to}")

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Lift in place."""
        version = onnx_version(model)
        if version == 0 or version >= self.to:
            return PassResult(False)
        known = all(_in_table(node, written_in) for node, written_in in _nodes(model))
        lift = _lift_by_table if known and version >= _OLDEST_IN_TABLE else _lift_by_converter
        if not lift(model, self.to, context):
            return PassResult(False)
        _raise_ir_version(model)
        return PassResult(True, 1)


_NEW_MEANING = {"DFT": 20, "GridSample": 20, "GroupNormalization": 21}
"""Ops that opsets 19 to 21 gave another form (ONNX's operator changelog); all others only gained types and options."""

_IR_VERSION_21 = 10
"""The IR version that came with opset 21."""


def raise_to_21(model: ir.Model) -> str | None:
    """Let a model of opset 18 to 20 be one of opset 21, in place; return why not, None if it is one then.

    No node is edited: a model with an op that would mean something else stays as it is.
    """
    if onnx_version(model) < 18:
        return f"it is of opset {onnx_version(model)}: run lift-opset first"
    for node, version in _nodes(model):
        if version < _NEW_MEANING.get(node.op_type, 0):
            return f"its {node.op_type} means something else from opset {_NEW_MEANING[node.op_type]} on"
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        for domain in ONNX_DOMAINS:
            if imports.get(domain, 21) < 21:
                imports[domain] = 21
    model.ir_version = max(model.ir_version, _IR_VERSION_21)
    return None


def _lift_by_table(model: ir.Model, to: int, context: PassContext) -> bool:
    edits = _edits(model, to, context)
    if edits is None or not context.allow(model.graph):
        return False
    for node, edit in edits:
        edit()
        context.stamp([node], [node])
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        for domain in ONNX_DOMAINS:
            if imports.get(domain, to) < to:
                imports[domain] = to
    return True


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Yield every node of ONNX's domain, of functions too, with the opset that it is written in."""
    scopes: list[tuple[ir.Graph | ir.Function, dict[str, int]]] = [(model.graph, model.opset_imports)]
    scopes += [(function, function.opset_imports) for function in model.functions.values()]
    for scope, imports in scopes:
        version = next((imports[domain] for domain in ONNX_DOMAINS if domain in imports), None)
        if version is None:
            continue
        for node in scope.all_nodes():
            if is_onnx(node) and node.op_identifier() not in model.functions:
                yield node, version


@lru_cache(maxsize=1024)
def _known_change(op_type: str, version: int) -> bool:
    try:
        newest = defs.get_schema(op_type, 18, "").since_version
        current = defs.get_schema(op_type, version, "")
    except defs.SchemaError:
        return False
    return newest <= version or (not current.deprecated and (op_type in ADAPTERS or op_type in COMPATIBLE))


def _in_table(node: ir.Node, version: int) -> bool:
    return version >= _OLDEST_IN_TABLE and _known_change(node.op_type, version)


def _edits(model: ir.Model, to: int, context: PassContext) -> list[tuple[ir.Node, Edit]] | None:
    """Return the edits to make, None where some node cannot be lifted."""
    lift = Lift(model, context)
    edits: list[tuple[ir.Node, Edit]] = []
    possible = True
    for node, version in _nodes(model):
        for boundary, adapter in ADAPTERS.get(node.op_type, ()):
            if not version < boundary <= to:
                continue
            try:
                edits.append((node, adapter(node, lift)))
            except CannotLift as reason:
                context.near_miss(node, f"the model stays at opset {onnx_version(model)}: {reason}")
                possible = False
    return edits if possible else None


def _raise_ir_version(model: ir.Model) -> None:
    if model.ir_version < _INPUTS_ARE_INITIALIZERS:
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        model.graph.inputs.clear()
        model.graph.inputs.extend(inputs)
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _lift_by_converter(model: ir.Model, to: int, context: PassContext) -> bool:
    """Let onnx's converter do it, without the large weights, and put those and the metadata back."""
    stays = f"the model stays at opset {onnx_version(model)}:"
    if model.functions:
        context.near_miss(model.graph, f"{stays} it has functions beside ops that there are no rules for")
        return False
    if not context.allow(model.graph):
        return False
    try:
        proto = onnx.version_converter.convert_version(_without_weights(model), to)
        # The converter broadcasts wrongly from opset 6 (`axis`), which contradicts the shapes that it leaves behind.
        onnx.checker.check_model(proto, full_check=True)
        converted = ir.from_proto(proto)
    except Exception as error:  # the converter is native code with errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        context.near_miss(model.graph, f"{stays} onnx's converter failed: {reason}")
        return False
    _put_back_weights(converted.graph, model.graph)
    _put_back_metadata(converted.graph, model.graph, context)
    model.graph = converted.graph
    return True


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return `model`, which stays as it is, with its large initialisers as inputs."""
    graph = model.graph
    inputs, initializers = list(graph.inputs), list(graph.initializers.values())
    try:
        for value in initializers:
            if value.const_value is not None and value.const_value.nbytes > _SMALL_BYTES:
                graph.initializers.pop(str(value.name))
                if not value.is_graph_input():
                    graph.inputs.append(value)
        return ir.to_proto(model)
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.clear()
        for value in initializers:
            graph.initializers.add(value)


def _put_back_weights(converted: ir.Graph, original: ir.Graph) -> None:
    named = {value.name: value for value in converted.inputs}
    for name, weight in original.initializers.items():
        if name in converted.initializers or name not in named:
            continue
        if not weight.is_graph_input():
            converted.inputs.remove(named[name])
        named[name].const_value = weight.const_value
        converted.register_initializer(named[name])


def _put_back_metadata(converted: ir.Graph, original: ir.Graph, context: PassContext) -> None:
    """Give nodes that make a value of the same name the name and the metadata back that they had."""
    converted.metadata_props.update(original.metadata_props)
    before = {value.name: node for node in original.all_nodes() for value in node.outputs}
    for node in converted.all_nodes():
        source = next((before[value.name] for value in node.outputs if value.name in before), None)
        if source is not None:
            node.name = source.name
            node.doc_string = source.doc_string
        context.stamp([node], [] if source is None else [source])
