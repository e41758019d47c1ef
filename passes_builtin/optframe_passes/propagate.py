"""Forward propagation of types, shapes and small integer contents, node by node in one sweep.

Each node is inferred by ONNX's own C++ rule for it (`onnx.shape_inference.infer_node_outputs`, about 20 us a node).
Two things are added that ONNX's whole-model inference lacks: dimensions without a name get one, so that equal unknowns
are recognised as equal; and shape arithmetic is followed element by element, so that Shape, Gather, Concat, Reshape
chains with a dynamic batch give every dimension that is in fact fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, shape_inference

from optframe.graph import ONNX_DOMAINS, constant_tensor, subgraphs
from optframe_passes import shape_data
from optframe_passes.edit import Array, onnx_version, small_constant
from optframe_passes.shape_data import MAX_ELEMENTS, UNKNOWN, Dim, Element, Elements

SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
} | {
    f"Reduce{kind}": (1,)
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}
"""Op type -> inputs whose content, not only shape, decides the shape of the output."""

_ELEMENT_TYPES: dict[int, range] = {
    onnx.TensorProto.INT64: range(-(2**63), 2**63),
    onnx.TensorProto.INT32: range(-(2**31), 2**31),
    onnx.TensorProto.BOOL: range(2),
}


@lru_cache(maxsize=1024)
def op_schema(op_type: str, version: int) -> defs.OpSchema | None:
    """Return what ONNX says of `op_type` in opset `version`, None if that has no such op."""
    try:
        return defs.get_schema(op_type, version, "")
    except defs.SchemaError:
        return None


def _inferred(
    op_type: str,
    version: int,
    node: bytes,
    types: tuple[tuple[str, bytes], ...],
    data: tuple[tuple[str, bytes], ...],
    opsets: tuple[tuple[str, int], ...],
) -> dict[str, onnx.TypeProto]:
    """Return the types of the outputs of `node`, as far as ONNX's rule for it finds them, as messages of their own."""
    found: dict[str, onnx.TypeProto] = {}
    for name, content in _rule(op_type, version, node, types, data, opsets):
        found[name] = onnx.TypeProto.FromString(content)
    return found


@lru_cache(maxsize=1 << 14)
def _rule(
    op_type: str,
    version: int,
    node: bytes,
    types: tuple[tuple[str, bytes], ...],
    data: tuple[tuple[str, bytes], ...],
    opsets: tuple[tuple[str, int], ...],
) -> tuple[tuple[str, bytes], ...]:
    """Apply ONNX's rule for an op to serialised messages: layers repeat, and so do passes over one model."""
    schema = op_schema(op_type, version)
    assert schema is not None, "asked only for ops that ONNX has"
    try:
        result = shape_inference.infer_node_outputs(
            schema,
            onnx.NodeProto.FromString(node),
            {name: onnx.TypeProto.FromString(content) for name, content in types},
            {name: onnx.TensorProto.FromString(content) for name, content in data},
            opset_imports=[onnx.helper.make_opsetid(domain, number) for domain, number in opsets],
        )
    except (shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return ()
    return tuple((name, kind.SerializeToString()) for name, kind in result.items() if kind.WhichOneof("value"))


class Propagation:
    """What is known of a model's values: types, shapes with named unknowns, contents of small integer tensors.

    Declared shapes are believed for graph inputs, for outputs of foreign ops and for what a function's outputs leave
    open, not for what can be inferred, since exporters are known to write wrong ones. `content` gives the array behind
    a constant value, or None.
    """

    def __init__(
        self, model: ir.Model, content: Callable[[ir.Value], Array | None] = lambda value: small_constant(value)
    ) -> None:
        self.version = onnx_version(model)
        self._opsets = tuple(
            ("" if domain in ONNX_DOMAINS else domain, number) for domain, number in model.opset_imports.items()
        )
        self._functions = model.functions
        self._function_protos: dict[ir.OperatorIdentifier, onnx.FunctionProto] = {}
        self._content = content
        self._types: dict[ir.Value, onnx.TypeProto] = {}
        self._elements: dict[ir.Value, Elements] = {}
        self._unnamed = 0

    @classmethod
    def of(cls, model: ir.Model) -> Propagation:
        """Return what is known of all values of `model`, its subgraphs included; functions are not entered."""
        propagation = cls(model)
        propagation.enter(model.graph)
        for node in model.graph:
            propagation.visit_deep(node)
        return propagation

    def visit_deep(self, node: ir.Node) -> None:
        """Visit the nodes of the subgraphs of `node`, then `node`."""
        for subgraph in subgraphs(node):
            self.enter(subgraph, trusted=False)
            for inner in subgraph:
                self.visit_deep(inner)
        self.visit(node)

    def enter(self, graph: ir.Graph, trusted: bool = True) -> None:
        """Take over the declared types of the inputs of `graph`; not `trusted`: without their shapes.

        The inputs of a Loop's body may change their shape from one iteration to the next, whatever they declare.
        """
        for value in graph.inputs:
            self._declare(value, with_shape=trusted)

    def visit(self, node: ir.Node) -> None:
        """Find out about the outputs of `node` from what is known of its inputs."""
        inferred = self._infer(node)
        for index, value in enumerate(node.outputs):
            if f"o{index}" in inferred:
                self._types[value] = self._name_dims(inferred[f"o{index}"])
            else:
                self._declare(value, with_shape=not self._is_control_flow(node))
        self._follow_elements(node)

    def learn(self, value: ir.Value, array: Array) -> None:
        """Take over type and shape of `value` from its content."""
        self._types[value] = onnx.helper.make_tensor_type_proto(
            onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Return the shape of tensor `value`: numbers, and names where equal names mean equal dimensions."""
        proto = self._type(value)
        if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
            return None
        return tuple(dim.dim_param or dim.dim_value for dim in proto.tensor_type.shape.dim)

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape of `value` if every dimension is a number."""
        dims = self.dims(value)
        if dims is None:
            return None
        numbers = tuple(dim for dim in dims if isinstance(dim, int))
        return numbers if len(numbers) == len(dims) else None

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of tensor `value`."""
        proto = self._type(value)
        if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
            return None
        return ir.DataType(proto.tensor_type.elem_type)

    def elements(self, value: ir.Value | None) -> Elements | None:
        """Return the content of a small integer tensor as far as it is known."""
        if value is None:
            return None
        if value not in self._elements:
            data = self._elements_of_constant(value)
            if data is None:
                return None
            self._elements[value] = data
        return self._elements[value]

    def type_of(self, value: ir.Value) -> ir.TypeProtocol | None:
        """Return the type of `value`: of a tensor, a sequence or an optional."""
        proto = self._type(value)
        return None if proto is None else ir.serde.deserialize_type_proto_for_type(proto)

    def _type(self, value: ir.Value | None) -> onnx.TypeProto | None:
        if value is None:
            return None
        if value not in self._types and value.producer() is None:
            self._declare(value, with_shape=True)
        return self._types.get(value)

    def _declare(self, value: ir.Value, with_shape: bool) -> None:
        tensor = value.const_value
        declared = value.type if tensor is None else ir.TensorType(tensor.dtype)
        shape = value.shape if tensor is None else tensor.shape
        if declared is None:
            return
        proto = onnx.TypeProto()
        ir.serde.serialize_type_into(proto, declared)
        if with_shape and shape is not None and proto.HasField("tensor_type"):
            ir.serde.serialize_shape_into(proto, shape)
        self._types[value] = self._name_dims(proto)

    def _name_dims(self, proto: onnx.TypeProto) -> onnx.TypeProto:
        for dim in proto.tensor_type.shape.dim if proto.HasField("tensor_type") else ():
            if not dim.dim_param and (not dim.HasField("dim_value") or dim.dim_value < 0):
                self._set_dim(dim, None)
        return proto

    def _set_dim(self, dim: onnx.TensorShapeProto.Dimension, entry: Element) -> None:
        if isinstance(entry, int) and entry >= 0:
            dim.dim_value = entry
        elif isinstance(entry, str):
            dim.dim_param = entry
        else:
            self._unnamed += 1
            dim.dim_param = f"{UNKNOWN}{self._unnamed}"

    def _is_control_flow(self, node: ir.Node) -> bool:
        return next(subgraphs(node), None) is not None

    def _infer(self, node: ir.Node) -> dict[str, onnx.TypeProto]:
        if node.op_identifier() in self._functions:
            return self._infer_call(node)
        if node.domain not in ONNX_DOMAINS:
            return {}
        if node.op_type == "If":
            return self._infer_if(node)
        if node.op_type == "Constant":
            return self._infer_constant(node)
        schema = op_schema(node.op_type, self.version)
        if schema is None or not schema.has_type_and_shape_inference_function or self._is_control_flow(node):
            return {}
        inferred = self._infer_by_schema(schema, node)
        return self._with_partial_shape(node, inferred)

    def _infer_by_schema(self, schema: defs.OpSchema, node: ir.Node) -> dict[str, onnx.TypeProto]:
        names = ["" if value is None else f"i{index}" for index, value in enumerate(node.inputs)]
        types = self._input_types(node)
        if types is None:
            return {}
        proto = onnx.NodeProto(op_type=node.op_type, input=names)
        proto.output.extend(f"o{index}" if value.name != "" else "" for index, value in enumerate(node.outputs))
        for attribute in node.attributes.values():
            ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)
        return _inferred(
            schema.name,
            self.version,
            proto.SerializeToString(),
            tuple((name, kind.SerializeToString()) for name, kind in types.items()),
            tuple((name, tensor.SerializeToString()) for name, tensor in self._shape_inputs(node).items()),
            self._opsets,
        )

    def _input_types(self, node: ir.Node) -> dict[str, onnx.TypeProto] | None:
        """Return the types of the present inputs, None if one is not known."""
        types: dict[str, onnx.TypeProto] = {}
        for index, value in enumerate(node.inputs):
            proto = self._type(value)
            if proto is not None:
                types[f"i{index}"] = proto
            elif value is not None:
                return None
        return types

    def _shape_inputs(self, node: ir.Node) -> dict[str, onnx.TensorProto]:
        found: dict[str, onnx.TensorProto] = {}
        for index in SHAPE_INPUTS.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None:
                continue
            array = self._content(value)
            if array is None:
                array = self._complete_elements(value)
            if array is not None and array.dtype.kind in "iufb":
                found[f"i{index}"] = onnx.numpy_helper.from_array(array)
        return found

    def _complete_elements(self, value: ir.Value) -> Array | None:
        data, dtype = self.elements(value), self.dtype(value)
        if data is None or dtype is None or not shape_data.is_complete(data):
            return None
        return data.astype(dtype.numpy())

    def _with_partial_shape(self, node: ir.Node, inferred: dict[str, onnx.TypeProto]) -> dict[str, onnx.TypeProto]:
        dims = self._dims_from_elements(node)
        proto = inferred.get("o0")
        if dims is None or proto is None or not proto.HasField("tensor_type"):
            return inferred
        shape = proto.tensor_type.shape
        if len(shape.dim) != len(dims):
            del shape.dim[:]
            shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in dims)
        for dim, entry in zip(shape.dim, dims, strict=True):
            if not dim.HasField("dim_value") and (entry is not None or not dim.dim_param):
                self._set_dim(dim, entry)
        return inferred

    def _dims_from_elements(self, node: ir.Node) -> list[Element] | None:
        """Return the output shape of an op whose target shape is known in part, None for other ops."""
        if node.op_type == "ConstantOfShape":
            target = self.elements(node.inputs[0])
            return None if target is None else list(target)
        if node.op_type not in ("Reshape", "Expand") or len(node.inputs) < 2:
            return None
        source, target = self.dims(node.inputs[0]), self.elements(node.inputs[1])
        if source is None or target is None or target.ndim != 1:
            return None
        if node.op_type == "Expand":
            return shape_data.expanded(source, target)
        return shape_data.reshaped(source, target, bool(node.attributes.get_int("allowzero", 0)))

    def _infer_constant(self, node: ir.Node) -> dict[str, onnx.TypeProto]:
        tensor = constant_tensor(node.outputs[0])
        if tensor is None:
            return {}
        return {"o0": onnx.helper.make_tensor_type_proto(tensor.dtype.value, tensor.shape.numpy())}

    def _infer_if(self, node: ir.Node) -> dict[str, onnx.TypeProto]:
        branches = [graph.outputs for graph in subgraphs(node)]
        if len(branches) != 2 or any(len(outputs) != len(node.outputs) for outputs in branches):
            return {}
        merged: dict[str, onnx.TypeProto] = {}
        for index, pair in enumerate(zip(*branches, strict=True)):
            left, right = (self._type(value) for value in pair)
            if left is not None and right is not None and left.WhichOneof("value") == right.WhichOneof("value"):
                merged[f"o{index}"] = _merged(left, right)
        return merged

    def _infer_call(self, node: ir.Node) -> dict[str, onnx.TypeProto]:
        function = self._functions[node.op_identifier()]
        types = self._input_types(node)
        if types is None or len(types) != len(function.inputs):
            return {}
        if node.op_identifier() not in self._function_protos:
            self._function_protos[node.op_identifier()] = ir.to_proto(function)
        attributes = [ir.to_proto(attribute) for attribute in node.attributes.values()]
        try:
            outputs = shape_inference.infer_function_output_types(
                self._function_protos[node.op_identifier()], list(types.values()), attributes
            )
        except (shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
            return {}
        for value, proto in zip(node.outputs, outputs, strict=False):
            _fill_open_dims(proto, value.shape)
        return {f"o{index}": proto for index, proto in enumerate(outputs) if proto.WhichOneof("value")}

    def _elements_of_constant(self, value: ir.Value) -> Elements | None:
        dims = self.static(value)
        if dims is None or len(dims) > 1 or int(np.prod(dims)) > MAX_ELEMENTS:
            return None
        array = self._content(value)
        if array is None or array.dtype not in (np.int64, np.int32, np.bool_):
            return None
        return shape_data.elements([int(entry) for entry in array.reshape(-1)]).reshape(array.shape)

    def _follow_elements(self, node: ir.Node) -> None:
        if len(node.outputs) != 1 or node.domain not in ONNX_DOMAINS:
            return
        output = node.outputs[0]
        proto = self._types.get(output)
        if proto is None or proto.tensor_type.elem_type not in _ELEMENT_TYPES:
            return
        data = self._evaluate(node)
        if data is None or data.shape != self.dims(output) or data.size > MAX_ELEMENTS:
            return
        allowed = _ELEMENT_TYPES[proto.tensor_type.elem_type]
        if all(not isinstance(entry, int) or entry in allowed for entry in data.reshape(-1)):
            self._elements[output] = data

    def _evaluate(self, node: ir.Node) -> Elements | None:
        if node.op_type in ("Shape", "Size"):
            return self._measure(node)
        evaluator = shape_data.EVALUATORS.get(node.op_type)
        if evaluator is None:
            return None
        return evaluator(node, [self.elements(value) for value in node.inputs])

    def _measure(self, node: ir.Node) -> Elements | None:
        dims = self.dims(node.inputs[0])
        if dims is None:
            return None
        if node.op_type == "Shape":
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
            return shape_data.elements(list(dims[start:end]))
        size: Element = 1
        for dim in dims:
            size = shape_data.multiply(size, dim)
        return shape_data.elements(size)


def _merged(left: onnx.TypeProto, right: onnx.TypeProto) -> onnx.TypeProto:
    """Return what holds for both types: their common element type, and the dimensions on which they agree."""
    if left == right:
        return left
    merged = onnx.TypeProto()
    if left.tensor_type.elem_type != right.tensor_type.elem_type or not left.HasField("tensor_type"):
        return merged
    merged.tensor_type.elem_type = left.tensor_type.elem_type
    shapes = (left.tensor_type.shape.dim, right.tensor_type.shape.dim)
    ranked = left.tensor_type.HasField("shape") and right.tensor_type.HasField("shape")
    if ranked and len(shapes[0]) == len(shapes[1]):
        merged.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
        for a, b in zip(*shapes, strict=True):
            merged.tensor_type.shape.dim.add().CopyFrom(a if a == b else onnx.TensorShapeProto.Dimension())
    return merged


def _fill_open_dims(proto: onnx.TypeProto, declared: ir.Shape | None) -> None:
    """Write the declared numbers where inference through a function, which follows no contents, left a dimension open.

    A call is a foreign op to whoever made it: its declared shape is believed as far as nothing better is known.
    """
    dims = proto.tensor_type.shape.dim if proto.HasField("tensor_type") else ()
    if declared is None or len(declared) != len(dims):
        return
    for dim, size in zip(dims, declared, strict=True):
        if isinstance(size, int) and not dim.HasField("dim_value"):
            dim.dim_value = size
