"""Types and shapes of an op's outputs, read off its meaning in standard ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from optframe import ops
from optframe.errors import PluginError
from optframe.types import OpSpec, TensorInfo
from optframe_trt.fields import Value

_OPSET = 18
"""The opset that functions are asked for: the one that pipelines lift older models to."""

_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}
_OUR_NAMES = {theirs: ours for ours, theirs in _ONNX_NAMES.items()}


def onnx_type(dtype: str) -> ir.DataType:
    """Return the ONNX type of a dtype as specs spell it."""
    return ir.DataType[_ONNX_NAMES.get(dtype, dtype.upper())]


def output_dtypes(spec: OpSpec, dtypes: Mapping[str, str], attributes: Mapping[str, Value]) -> tuple[str, ...]:
    """Return the dtypes of the op's outputs for those of the inputs that are present, by name.

    Raises:
        InputError: the op does not take the inputs.
        PluginError: its function does not tell the types.
    """
    values = {name: ir.val(name, onnx_type(dtype)) for name, dtype in dtypes.items()}
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(calling_model(spec, values, attributes)))
    kinds = [ir.DataType(value.type.tensor_type.elem_type) for value in proto.graph.output]
    if ir.DataType.UNDEFINED in kinds:
        raise PluginError(
            f"the function of {spec.identifier} does not tell the types of its outputs for {dict(dtypes)}"
        )
    return tuple(_OUR_NAMES.get(kind.name, kind.name.lower()) for kind in kinds)


def check_shapes(
    spec: OpSpec, inputs: Mapping[str, TensorInfo], outputs: Sequence[TensorInfo], attributes: Mapping[str, Value]
) -> None:
    """See that the shape rule's `outputs` for `inputs`, by name, have the sizes that ONNX infers of the op's function.

    A size that it does not infer is not compared.

    Raises:
        PluginError: a size differs, which would become the shape of the engine's tensor.
    """
    values = {name: ir.val(name, onnx_type(info.dtype), info.shape) for name, info in inputs.items()}
    proto = ir.to_proto(calling_model(spec, values, attributes))
    for value, info in zip(onnx.shape_inference.infer_shapes(proto).graph.output, outputs, strict=True):
        if not value.type.tensor_type.HasField("shape"):
            continue
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        if len(dims) != len(info.shape) or any(d not in (None, s) for d, s in zip(dims, info.shape, strict=True)):
            meant = ["?" if dim is None else dim for dim in dims]
            raise PluginError(f"its shape rule gives '{value.name}' shape {list(info.shape)}, its function {meant}")


def calling_model(spec: OpSpec, inputs: Mapping[str, ir.Value], attributes: Mapping[str, Value]) -> ir.Model:
    """Return a model of one call, with the op's function; `inputs` are those that are present, by name."""
    graph = ir.Graph(list(inputs.values()), [], nodes=[], opset_imports={"": _OPSET}, name="call")
    model = ir.Model(graph, ir_version=ops.FUNCTIONS_IR_VERSION)
    node = ops.call(model, spec, [inputs.get(parameter.name) for parameter in spec.inputs], attributes)
    graph.append(node)
    for value, parameter in zip(node.outputs, spec.outputs, strict=True):
        value.name = parameter.name
    graph.outputs.extend(node.outputs)
    return model
