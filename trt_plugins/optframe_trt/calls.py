"""Calls of plugin ops in a model, brought into the form in which TensorRT's ONNX parser finds the plugins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import onnx.defs
import onnx_ir as ir

from optframe import ops
from optframe.errors import InputError
from optframe.types import OpSpec
from optframe_trt.fields import INPUTS


def plugin_name(spec: OpSpec) -> str:
    """Return the name that the op's plugin has: the op's own, unless ONNX has an op of that name.

    TensorRT's parser takes a node for ONNX's op by its name alone, whatever its domain.
    """
    return f"{spec.name}Plugin" if onnx.defs.has(spec.name) else spec.name


def aot_name(spec: OpSpec, present: Sequence[str]) -> str:
    """Return the name of the ahead-of-time plugin for calls with the inputs `present`, which has fixed inputs."""
    absent = [parameter.name for parameter in spec.inputs if parameter.name not in present]
    return "_".join([plugin_name(spec), *(["without", *absent] if absent else [])])


def aot_namespace(spec: OpSpec) -> str:
    """Return the namespace of the op's ahead-of-time plugins, which may hold no dots."""
    return spec.domain.replace(".", "_")


def present_inputs(spec: OpSpec, node: ir.Node) -> tuple[str, ...]:
    """Return the names of the inputs that a call of the op has."""
    return tuple(p.name for p, value in zip(spec.inputs, node.inputs, strict=False) if value is not None)


def calls(model: ir.Model, specs: Iterable[OpSpec]) -> Iterator[tuple[ir.Node, OpSpec]]:
    """Yield every call of an op of `specs`, in the model's graphs and its functions."""
    known = {(spec.domain, spec.name): spec for spec in specs}
    for node in chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())):
        spec = known.get((node.domain, node.op_type))
        if spec is not None:
            yield node, spec


def prepare(model: ir.Model, specs: Sequence[OpSpec], *, aot: bool = False) -> int:
    """Make every call of the ops a call of their plugins, in place; return how many there were.

    The ops' functions go, which the parser would inline; other functions are inlined, since they may call the ops. A
    node gets a name, and all attributes and outputs of its op; absent inputs are dropped, since the parser takes none,
    and the rest is named in an attribute where the order does not tell. With `aot` the calls are of the plugins that
    `optframe_trt.aot` registers.

    Raises:
        InputError: a function cannot be inlined, or an attribute is missing or not of the type that its op declares.
    """
    identifiers = {spec.identifier for spec in specs}
    ops.inline_functions(model, keep=identifiers)
    ops.strip_functions(model, identifiers)
    count = 0
    for node, spec in list(calls(model, specs)):
        _check_attributes(node, spec)
        ops.write_defaults(node, spec)
        present = present_inputs(spec, node)
        _fill_outputs(node, len(spec.outputs))
        _drop_absent_inputs(node)
        node.name = node.name or f"{spec.name}_{count}"
        node.op_type = aot_name(spec, present) if aot else plugin_name(spec)
        node.attributes.add(ir.AttrString("plugin_namespace", aot_namespace(spec) if aot else spec.domain))
        node.attributes.add(ir.AttrString("plugin_version", "1" if aot else str(spec.version)))
        if aot:
            node.attributes.add(ir.AttrInt64("aot", 1))
        elif present != tuple(parameter.name for parameter in spec.inputs[: len(present)]):
            node.attributes.add(ir.AttrString(INPUTS, ",".join(present)))
        count += 1
    return count


def _check_attributes(node: ir.Node, spec: OpSpec) -> None:
    """See that the node's attributes have the declared types: TensorRT hands plugins their bytes, whatever they are."""
    for name, attribute in spec.attributes.items():
        given = node.attributes.get(name)
        if given is not None and given.type.name.lower() != attribute.type:
            raise InputError(
                f"node '{node.name}': attribute '{name}' of {spec.identifier} is {given.type.name.lower()}, "
                f"and has to be {attribute.type}"
            )


def _fill_outputs(node: ir.Node, count: int) -> None:
    missing = count - len(node.outputs)
    if missing > 0:
        node.resize_outputs(count)
    for number, value in enumerate(node.outputs):
        value.name = value.name or f"{node.outputs[0].name}_{number}"


def _drop_absent_inputs(node: ir.Node) -> None:
    given = [value for value in node.inputs if value is not None]
    for index, value in enumerate(given):
        node.replace_input_with(index, value)
    node.resize_inputs(len(given))
