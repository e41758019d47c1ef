"""Plugin ops inside a model: calls of them with their meaning as model-local functions, which strip or inline again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from optframe.errors import InputError, PluginError
from optframe.graph import opset
from optframe.types import OpAttribute, OpSpec

FUNCTIONS_IR_VERSION = 8
"""The ONNX IR version that brought model-local functions."""

ALLOW_TF32 = "allow_tf32"
"""An attribute, int and 0 by default, that an op may declare: 1 lets its kernel round factors in float32 to TF32."""

OVERLOADS_IR_VERSION = 10
"""The ONNX IR version that brought functions of one name with several bodies (onnxruntime reads them from 1.28 on)."""


def refusal(spec: OpSpec, inputs: Sequence[ir.Value | None]) -> str | None:
    """Return why the op cannot take `inputs`: one too many, a required one missing, a dtype unknown or not taken."""
    if len(inputs) > len(spec.inputs):
        return f"{spec.identifier} takes {len(spec.inputs)} inputs, not {len(inputs)}"
    given = [*inputs, *[None] * (len(spec.inputs) - len(inputs))]
    for parameter, value in zip(spec.inputs, given, strict=True):
        if value is None:
            if not parameter.optional:
                return f"{spec.identifier} needs its input '{parameter.name}'"
        elif value.dtype is None:
            return f"the type of '{value.name}' is not known"
        elif _dtype(value) not in parameter.dtypes:
            return f"{spec.identifier} takes no {_dtype(value)} as '{parameter.name}'"
    return None


def call(
    model: ir.Model,
    spec: OpSpec,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, float | int | str | Sequence[int] | Sequence[float]] | None = None,
    outputs: int | None = None,
) -> ir.Node:
    """Return a new node, not yet in a graph, that calls the op, after attaching the op's function to `model`.

    `outputs` is how many of the op's outputs the node has; all of them if None.

    Raises:
        InputError: the inputs do not fit the op (see `refusal`), or an attribute is unknown or missing.
        PluginError: the model imports another version of the op's domain.
    """
    reason = refusal(spec, inputs)
    if reason is not None:
        raise InputError(reason)
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    dtypes = {p.name: _dtype(value) for p, value in zip(spec.inputs, inputs, strict=False) if value is not None}
    return ir.Node(
        spec.domain,
        spec.name,
        inputs,
        _attributes(spec, attributes or {}),
        overload=attach(model, spec, dtypes),
        num_outputs=len(spec.outputs) if outputs is None else outputs,
    )


def _dtype(value: ir.Value) -> str:
    """Return the dtype as specs spell it: "float32", "bool"."""
    assert value.dtype is not None, "checked by refusal"
    return {"float": "float32", "double": "float64"}.get(value.dtype.name.lower(), value.dtype.name.lower())


_ATTRIBUTE_TYPES: dict[str, ir.AttributeType] = {
    "float": ir.AttributeType.FLOAT,
    "int": ir.AttributeType.INT,
    "string": ir.AttributeType.STRING,
    "ints": ir.AttributeType.INTS,
    "floats": ir.AttributeType.FLOATS,
}


def _attributes(
    spec: OpSpec, given: Mapping[str, float | int | str | Sequence[int] | Sequence[float]]
) -> list[ir.Attr]:
    """Return every attribute of the op, written out: a kernel reads them from the node and knows no defaults."""
    unknown = given.keys() - spec.attributes.keys()
    if unknown:
        raise InputError(f"{spec.identifier} has no attribute '{min(unknown)}'")
    return [_attribute(spec, name, declared, given.get(name)) for name, declared in spec.attributes.items()]


def _attribute(
    spec: OpSpec, name: str, declared: OpAttribute, given: float | int | str | Sequence[int] | Sequence[float] | None
) -> ir.Attr:
    value = declared.default if given is None else given
    if value is None:
        raise InputError(f"{spec.identifier} needs its attribute '{name}'")
    return ir.Attr(name, _ATTRIBUTE_TYPES[declared.type], value)


def attach(model: ir.Model, spec: OpSpec, dtypes: Mapping[str, str]) -> str:
    """Make sure that `model` holds the op's function for the present inputs' `dtypes`; return its overload name.

    An equal function is used again. The first of an op has no overload name, so that runtimes which know no overloads
    run every model with one form of the op. The model imports the op's domain afterwards, and its IR version rises
    where functions or overloads need it.

    Raises:
        PluginError: the model imports another version of the op's domain.
    """
    present = model.opset_imports.setdefault(spec.domain, spec.version)
    if present != spec.version:
        raise PluginError(
            f"the model imports version {present} of '{spec.domain}', {spec.identifier} is {spec.version}"
        )
    function = spec.build_function(opset(model), dtypes)
    others = [f for f in model.functions.values() if (f.domain, f.name) == (spec.domain, spec.name)]
    for other in others:
        if _body(other) == _body(function):
            return other.overload
    if others:
        function.overload = "_".join(f"{name}_{dtype}" for name, dtype in dtypes.items())
    if function.identifier() in model.functions:
        raise PluginError(f"the model has another function {function.identifier()}; inline it first")
    model.functions[function.identifier()] = function
    needed = OVERLOADS_IR_VERSION if function.overload else FUNCTIONS_IR_VERSION
    model.ir_version = max(model.ir_version, needed)
    return function.overload


def _body(function: ir.Function) -> bytes:
    """Return what the function computes as bytes: everything but its overload, documentation and recorded shapes."""
    proto = ir.serde.serialize_function(function)
    for field in ("overload", "doc_string", "metadata_props", "value_info"):
        proto.ClearField(field)
    for node in proto.node:
        node.ClearField("metadata_props")
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _everywhere(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def write_defaults(node: ir.Node, spec: OpSpec) -> None:
    """Write out the attributes that a call of the op leaves to their defaults: kernels know none.

    Raises:
        InputError: an attribute that has no default is missing.
    """
    for name, declared in spec.attributes.items():
        if name not in node.attributes:
            node.attributes.add(_attribute(spec, name, declared, None))


def permit_tf32(model: ir.Model, specs: Iterable[OpSpec]) -> None:
    """Set `ALLOW_TF32` at every call of the ops that declare it: for backends whose setting `tf32` is on."""
    able = {(spec.domain, spec.name) for spec in specs if ALLOW_TF32 in spec.attributes}
    for node in _everywhere(model):
        if (node.domain, node.op_type) in able:
            node.attributes.add(ir.AttrInt64(ALLOW_TF32, 1))


def strip_functions(model: ir.Model, identifiers: Collection[str]) -> int:
    """Take the functions of the ops `identifiers` ("domain::name") out, so that a runtime's own kernels must run them.

    Calls lose their overload names; functions that only the removed ones called go too. Returns how many were removed.
    """
    before = len(model.functions)
    for key, function in list(model.functions.items()):
        if f"{function.domain}::{function.name}" in identifiers:
            del model.functions[key]
    for node in _everywhere(model):
        if f"{node.domain}::{node.op_type}" in identifiers:
            node.overload = ""
    if len(model.functions) != before:
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return before - len(model.functions)


def inline_functions(model: ir.Model, keep: Collection[str] = ()) -> bool:
    """Put the bodies of model-local functions in place of their calls, except for the ops `keep` ("domain::name").

    Returns whether there were any. For runtimes that know neither functions nor overloads.

    Raises:
        InputError: functions call each other in a circle, or one is written for another opset than the model's; nothing
            is changed then.
    """
    chosen = {key: f for key, f in model.functions.items() if f"{f.domain}::{f.name}" not in keep}
    for function in chosen.values():
        conflict = opset_conflict(model, function)
        if conflict is not None:
            raise InputError(f"the model's functions cannot be inlined: {conflict}")
    try:
        return common.InlinePass(criteria=lambda function: function.identifier() in chosen)(model).modified
    except (ValueError, ir.passes.InvariantError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the model's functions cannot be inlined: {reason}") from error


def opset_conflict(model: ir.Model, function: ir.Function) -> str | None:
    """Return why the function's body means something else in the model's graph, or None where opsets agree."""
    for domain, version in function.opset_imports.items():
        present = model.opset_imports.get(domain, version)
        if present != version:
            name = f"{function.domain}::{function.name}"
            return f"{name} is written for opset {version} of '{domain or 'ai.onnx'}', the model {present}"
    return None
