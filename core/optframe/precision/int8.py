"""INT8 as a graph transformation: explicit QuantizeLinear and DequantizeLinear, symmetric, with float biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from optframe import graph
from optframe.errors import InputError
from optframe.passes import PassContext
from optframe.precision.calibration import channel_axis
from optframe.precision.equalization import equalize
from optframe.precision.fp16 import to_fp16
from optframe.precision.nodes import Keep, Names, Warn, is_constant, is_standard, log_warning
from optframe.precision.placement import CONVOLUTIONS, Placement, Scope, place, weight_index
from optframe.precision.ranges import Ranges, TensorRange
from optframe.shapes import inferred
from optframe.types import OpSpec

Array = np.ndarray[Any, Any]

PASS_NAME = "precision-int8"

LEVELS = 127
"""Magnitudes of symmetric INT8; -128 is not used."""

CHANNEL_SCALES_OPSET = 13
"""The opset that brought DequantizeLinear with a scale for each channel."""

HALF_SCALES_OPSET = 19
"""The opset that brought QuantizeLinear and DequantizeLinear of FP16. What it changed else only adds to opset 18."""


def quantize(
    model: ir.Model,
    ranges: Ranges,
    *,
    scope: Scope = "default",
    keep: Keep = (),
    base: Literal["fp32", "fp16"] = "fp32",
    ops: Mapping[str, OpSpec] | None = None,
    warn: Warn = log_warning,
) -> ir.Model:
    """Return a copy of the FP32 `model` whose products take INT8 operands where `precision.placement` puts them.

    Activations have one scale for each tensor, threshold / 127; weights one for each output channel, largest magnitude
    / 127; all zero points are 0. Channels are equalised first, see `precision.equalization`. Biases stay float, and
    take up the mean error that rounding the weights makes: the bias correction of Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with input means measured in calibration.
    Where a Conv or Gemm has no bias it gets one; a MatMul without an Add of a constant behind it goes uncorrected, and
    so does a ConvTranspose.

    `keep` are patterns of nodes to leave as they are, see `precision.nodes.selects`. The rest of the model is of
    precision `base`; for "fp16" `ops` are the registered plugin ops, see `to_fp16`, and opset 18 is raised to 19.

    Raises:
        InputError: `ranges` belong to another model or lack a tensor, or the opset is below 13, for "fp16" below 18.
    """
    ranges.check(model)
    least = CHANNEL_SCALES_OPSET if base == "fp32" else HALF_SCALES_OPSET - 1
    if graph.opset(model) < least:
        raise InputError(f"INT8 over {base} needs opset {least} or later, the model has {graph.opset(model)}: lift it")
    copy = inferred(model)
    equalize(copy, ranges.equalization)
    placement = place(copy, scope, keep, ranges.input_shapes)
    if not placement.products:
        warn("INT8: the model has no convolution or linear layer that may run in it")
    _Quantizer(copy, placement, ranges.tensors, half_scales=base == "fp16").run()
    common.RemoveUnusedNodesPass()(copy)
    if base == "fp32":
        return copy
    _raise_opset(copy)
    return to_fp16(copy, ops=ops, warn=warn)


def _raise_opset(model: ir.Model) -> None:
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        for domain in graph.ONNX_DOMAINS:
            if imports.get(domain) == HALF_SCALES_OPSET - 1:
                imports[domain] = HALF_SCALES_OPSET
    model.ir_version = max(model.ir_version, 9)  # the first with opset 19


class _Quantizer:
    """Writes Q/DQ into a model in place; each has constants of its own, with names of their own."""

    def __init__(
        self, model: ir.Model, placement: Placement, tensors: Mapping[str, TensorRange], *, half_scales: bool
    ) -> None:
        self._graph = model.graph
        self._placement = placement
        self._tensors = tensors
        self._half_scales = half_scales
        self._names = Names(model)
        self._context = PassContext(pass_name=PASS_NAME)
        self._dequantized: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in self._placement.products:
            index = weight_index(node)
            if index is not None:
                self._quantize_weight(node, index)
        for read in self._placement.reads:
            value = read.value
            if value not in self._dequantized:
                self._dequantized[value] = self._quantize_activation(value, read.node)
            read.node.replace_input_with(read.slot, self._dequantized[value])

    def _quantize_activation(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        scale = self._scale(np.float32(self._threshold(value)))
        quantized = self._node("QuantizeLinear", value, [value, *self._scale_inputs(value, scale, "quantize")])
        inputs = [quantized.outputs[0], *self._scale_inputs(value, scale, "dequantize")]
        dequantized = self._node("DequantizeLinear", value, inputs)
        quantized.outputs[0].dtype = ir.DataType.INT8
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [quantized, dequantized])
        else:
            self._graph.insert_after(producer, [quantized, dequantized])
        self._context.stamp([quantized, dequantized], [reader])
        return dequantized.outputs[0]

    def _threshold(self, value: ir.Value) -> float:
        """Return the largest threshold of the tensors that share a scale with `value`."""
        found = []
        for member in self._placement.groups[self._placement.sources[value]]:
            tensor = self._tensors.get(member.name or "")
            if tensor is None or tensor.threshold is None:
                raise InputError(f"the INT8 ranges lack tensor '{member.name}': calibrate again, with the same scope")
            found.append(tensor.threshold)
        return max(found)

    def _quantize_weight(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        weight = graph.constant(value)
        assert value is not None
        assert weight is not None
        axis = _channel_axis_of_weight(node, index, weight.ndim)
        others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
        scale = self._scale(np.abs(weight).max(axis=others))
        spread = scale if axis is None else np.expand_dims(scale, others or ())
        levels = np.clip(np.rint(weight / spread), -LEVELS, LEVELS)
        self._correct_bias(node, levels * spread.astype(np.float64) - weight)
        quantized = self._constant(f"{value.name}_int8", levels.astype(np.int8))
        inputs = [quantized, *self._scale_inputs(value, scale, "weight")]
        dequantize = self._node("DequantizeLinear", value, inputs, {} if axis is None else {"axis": axis})
        self._graph.insert_before(node, dequantize)
        self._context.stamp([dequantize], [node])
        node.replace_input_with(index, dequantize.outputs[0])

    def _correct_bias(self, node: ir.Node, error: Array) -> None:
        """Take from the bias of `node` what `error` of its weights adds to its output in the mean."""
        axis = channel_axis(node)
        first = node.inputs[0]
        tensor = self._tensors.get(first.name or "") if first is not None else None
        if axis is None or tensor is None or axis not in tensor.means:
            return
        shift = _mean_shift(node, error, np.array(tensor.means[axis]))
        if shift is None:
            return
        if node.op_type == "MatMul":
            self._shift_following_sum(node, shift)
        else:
            self._shift_own_bias(node, shift)

    def _shift_own_bias(self, node: ir.Node, shift: Array) -> None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not is_constant(bias):
            return
        old = np.float32(0) if bias is None else graph.constant(bias)
        assert old is not None, "checked above"
        name = f"{node.inputs[1].name}_bias" if bias is None else f"{bias.name}_corrected"  # type: ignore[union-attr]
        node.resize_inputs(3)
        node.replace_input_with(2, self._constant(name, np.asarray(old - shift, np.float32)))

    def _shift_following_sum(self, node: ir.Node, shift: Array) -> None:
        """Correct the constant that an Add, the only one to use the MatMul's result, adds to it."""
        uses = node.outputs[0].uses()
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return
        ((add, index),) = uses
        other = add.inputs[1 - index] if is_standard(add) and add.op_type == "Add" else None
        old = graph.constant(other) if is_constant(other) else None
        if other is not None and old is not None:
            corrected = self._constant(f"{other.name}_corrected", np.asarray(old - shift, np.float32))
            add.replace_input_with(1 - index, corrected)

    def _scale(self, threshold: Array | np.floating[Any]) -> Array:
        """Return threshold / 127 as float32, 1 for a threshold of 0; in base FP16 a normal number of that."""
        scale = np.asarray(threshold, np.float32) / np.float32(LEVELS)
        scale = np.where(scale > 0, scale, np.float32(1))
        if self._half_scales:
            limits = np.finfo(np.float16)
            scale = np.clip(scale, limits.tiny, limits.max).astype(np.float16).astype(np.float32)
        return scale

    def _scale_inputs(self, value: ir.Value, scale: Array, role: str) -> list[ir.Value]:
        """Return scale and zero point for one node."""
        zero = np.zeros(scale.shape, np.int8)
        return [
            self._constant(f"{value.name}_{role}_scale", scale),
            self._constant(f"{value.name}_{role}_zero_point", zero),
        ]

    def _constant(self, name: str, array: Array) -> ir.Value:
        unique = self._names.new(name)
        value = ir.val(unique, const_value=ir.tensor(array, name=unique))
        self._graph.register_initializer(value)
        return value

    def _node(
        self, op_type: str, value: ir.Value, inputs: Sequence[ir.Value], attributes: Mapping[str, int] | None = None
    ) -> ir.Node:
        """Return a Q or DQ for `value`, whose one output is typed like it."""
        name = self._names.new(f"{value.name}_{op_type}")
        output = ir.val(self._names.new(f"{name}_output"), dtype=value.dtype, shape=value.shape)
        return ir.node(op_type, inputs, attributes, outputs=[output], name=name)


def _channel_axis_of_weight(node: ir.Node, index: int, rank: int) -> int | None:
    """Return the axis of the output channels of a product's weight; None where it is the left factor."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if index == 0:
        return None
    transposed = node.attributes.get("transB")
    return 0 if transposed is not None and transposed.as_int() else rank - 1


def _mean_shift(node: ir.Node, error: Array, means: Array) -> Array | None:
    """Return by how much `error` of the weights shifts each output channel, for inputs of `means`; None if unknown."""
    if node.op_type in CONVOLUTIONS:
        groups = means.size // error.shape[1]
        summed = error.reshape(groups, error.shape[0] // groups, error.shape[1], -1).sum(axis=-1)
        shift: Array = np.einsum("goi,gi->go", summed, means.reshape(groups, -1)).reshape(-1)
        return shift
    if error.ndim != 2:
        return None
    alpha, beta, transposed = (node.attributes.get(name) for name in ("alpha", "beta", "transB"))
    if beta is not None and beta.as_float() == 0:
        return None
    shift = means @ (error.T if transposed is not None and transposed.as_int() else error)
    return shift * (alpha.as_float() if alpha else 1.0) / (beta.as_float() if beta else 1.0)
