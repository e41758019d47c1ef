"""Types and shapes of every value of a model, as ONNX's own inference finds them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from optframe import graph
from optframe.errors import unknown_name

Array = np.ndarray[Any, Any]

SHAPE_DATA_LIMIT = 64
"""Elements of a tensor that may be a shape, or part of computing one."""


def inferred(model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> ir.Model:
    """Return a copy of `model` with types and shapes inferred, for inputs of `input_shapes` where given.

    Weights are shared with `model`. What cannot be inferred stays as it was declared.

    Raises:
        InputError: `input_shapes` names an input that the model does not have.
    """
    copy = model.clone()
    if input_shapes:
        _set_input_shapes(copy, input_shapes)
    infer(copy)
    return copy


def infer(model: ir.Model) -> None:
    """Infer types and shapes of `model`'s values in place."""
    pass_logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    was_disabled, pass_logger.disabled = pass_logger.disabled, True  # a failed inference leaves the declared types
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        pass_logger.disabled = was_disabled


def _set_input_shapes(model: ir.Model, input_shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the inputs their shapes and forget those of all other values, which may be of other sizes."""
    inputs = {value.name: value for value in model.graph.inputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    for name, shape in input_shapes.items():
        if name not in inputs:
            raise unknown_name("input", name, filter(None, inputs))
        inputs[name].shape = ir.Shape(shape)


def fold_shape_arithmetic(model: ir.Model) -> bool:
    """Evaluate what the main graph computes from known shapes, in place; return whether there was any of it.

    ONNX's inference follows the contents of tensors through few ops; after this it can go on where it stopped.
    """
    folded = False
    for node in model.graph:
        arrays = _evaluated(node, graph.opset(model))
        for value, array in zip(node.outputs, arrays, strict=False):
            value.const_value = ir.tensor(array)
            constant = ir.val(f"{value.name}.folded", const_value=value.const_value)
            model.graph.register_initializer(constant)
            value.replace_all_uses_with(constant, replace_graph_outputs=True)
            folded = True
    return folded


def _evaluated(node: ir.Node, opset: int) -> list[Array]:
    """Return the outputs of `node` if it is a shape's query, or arithmetic on small known integers."""
    if node.domain not in graph.ONNX_DOMAINS or node.op_type == "Constant" or node.outputs[0].const_value is not None:
        return []
    arrays = {}
    for value in node.inputs:
        if value is not None and value.name:
            array = _shaped_like(value) if node.op_type == "Shape" else graph.constant(value)
            if array is None or not (node.op_type == "Shape" or _is_shape_data(array)):
                return []
            arrays[value.name] = array
    outputs = _run(node, arrays, opset) if arrays else []
    return outputs if all(map(_is_shape_data, outputs)) else []


def _shaped_like(value: ir.Value) -> Array | None:
    """Return an array of the value's shape that takes no memory."""
    shape = static_shape(value)
    return None if shape is None else np.broadcast_to(np.False_, shape)


def _is_shape_data(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.size <= SHAPE_DATA_LIMIT and array.dtype.kind in "bi"


def _run(node: ir.Node, arrays: Mapping[str, Array], opset: int) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset})
        return list(evaluator.run(None, dict(arrays)))
    except Exception:  # the evaluator raises many types for what it does not implement: then nothing is known
        return []


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of `value` if all its dimensions are known."""
    if value is None:
        return None
    shape = value.shape if value.shape is not None or value.const_value is None else value.const_value.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))


def dtype_name(value: ir.Value) -> str:
    """Return the dtype of `value` as specs of ops spell it: "float32", "float16", "bool"; "" if it is not known."""
    return "" if value.dtype is None else value.dtype.numpy().name
