"""How a node of an older opset is written in a newer one, op by op: every change of ONNX from opset 7 to 18.

An adapter looks at a node and returns the edit to make, or raises `CannotLift`; nothing is changed before all nodes of
a model have been looked at. Ops in `COMPATIBLE` only gained types, options or broadcasting: they mean the same.
Source: ONNX's operator changelog (docs/Changelog.md), and for Upsample and Resize below opset 11, where that says
nothing on rounding, what onnxruntime computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from optframe.passes import PassContext
from optframe_passes.edit import Array, FreshNames, graph_of, small_constant
from optframe_passes.propagate import Propagation

Edit: TypeAlias = Callable[[], None]

_FLOAT_MAX = float(np.finfo(np.float32).max)


class CannotLift(Exception):
    """A node has no exact equivalent in the newer opset."""


class Lift:
    """What adapters share: knowledge of the model as it was, and the making of constants."""

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self._model = model
        self._context = context
        self._names = FreshNames(model)

    @cached_property
    def known(self) -> Propagation:
        """Types and shapes, which few adapters need; there are none of values in functions."""
        return Propagation.of(self._model)

    def prepend(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], hint: str, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Value:
        """Put a new node before `node` and return its output."""
        new = ir.Node("", op_type, inputs, attributes)
        new.outputs[0].name = self._names(f"{node.outputs[0].name or node.op_type}_{hint}")
        self._context.stamp([new], [node])
        graph_of(node).insert_before(node, new)
        return new.outputs[0]

    def constant(self, node: ir.Node, array: Array, hint: str) -> ir.Value:
        """Put a Constant before `node` and return its output."""
        output = self.prepend(node, "Constant", [], hint, [ir.AttrTensor("value", ir.tensor(array))])
        output.dtype, output.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        return output

    def ints(self, node: ir.Node, attribute: ir.Attr, hint: str) -> ir.Value:
        """Put a Constant before `node` that holds an attribute's integers, be it by reference in a function."""
        if not attribute.is_ref():
            return self.constant(node, np.array(attribute.as_ints(), np.int64), hint)
        assert attribute.ref_attr_name is not None, "a reference names an attribute"
        reference = ir.RefAttr("value_ints", attribute.ref_attr_name, ir.AttributeType.INTS)
        return self.prepend(node, "Constant", [], hint, [reference])

    def scalar(self, node: ir.Node, number: float | ir.Attr, dtype: ir.DataType | None, hint: str) -> ir.Value:
        """Put a scalar before `node`, of the type of its first input: `dtype`, None where that is not known."""
        source = node.inputs[0]
        assert source is not None, "the first input of these ops is not optional"
        if isinstance(number, ir.Attr):
            assert number.ref_attr_name is not None, "a number that is an attribute is one by reference"
            reference = ir.RefAttr("value_float", number.ref_attr_name, ir.AttributeType.FLOAT)
            single = self.prepend(node, "Constant", [], f"{hint}_float", [reference])
        elif dtype is not None:
            return self.constant(node, np.array(number, dtype.numpy()), hint)
        else:
            single = self.constant(node, np.array(number, np.float32), f"{hint}_float")
        return self.prepend(node, "CastLike", [single, source], hint)


Adapter: TypeAlias = Callable[[ir.Node, Lift], Edit]


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _plain(node: ir.Node, name: str) -> ir.Attr | None:
    """Return an attribute that must not be a reference, None if absent."""
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise CannotLift(f"attribute '{name}' of {node.op_type} is given by the caller of its function")
    return attribute


def _nothing() -> None:
    """Leave a node as it is."""


def ints_to_inputs(*places: tuple[str, int]) -> Adapter:
    """Return the adapter that makes integer attributes inputs: (attribute name, input index)."""

    def adapt(node: ir.Node, lift: Lift) -> Edit:
        def edit() -> None:
            for name, index in places:
                attribute = node.attributes.pop(name, None)
                if attribute is not None and (attribute.is_ref() or attribute.as_ints()):
                    _set_input(node, index, lift.ints(node, attribute, name))

        return edit

    return adapt


def _batch_normalization_9(node: ir.Node, lift: Lift) -> Edit:
    spatial = _plain(node, "spatial")
    if spatial is not None and spatial.as_int() != 1:
        raise CannotLift("statistics for each activation (spatial=0) left BatchNormalization with opset 9")
    return partial(_drop, node, "spatial")


def _drop(node: ir.Node, name: str) -> None:
    node.attributes.pop(name, None)


def _batch_normalization_14(node: ir.Node, lift: Lift) -> Edit:
    if sum(value.name != "" for value in node.outputs) > 1:
        raise CannotLift("a BatchNormalization with several outputs trains")
    return _nothing


def _clip(node: ir.Node, lift: Lift) -> Edit:
    dtype = lift.known.dtype(node.inputs[0])

    def edit() -> None:
        for index, (name, default) in enumerate((("min", -_FLOAT_MAX), ("max", _FLOAT_MAX)), start=1):
            attribute = node.attributes.pop(name, None)
            if attribute is not None:
                number = attribute if attribute.is_ref() else attribute.as_float()
            elif dtype == ir.DataType.FLOAT16:
                continue  # the default bound, the largest float32, is infinite there
            else:
                number = default
            _set_input(node, index, lift.scalar(node, number, dtype, name))

    return edit


def _dropout(node: ir.Node, lift: Lift) -> Edit:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise CannotLift("opset 12 changed what Dropout's mask holds at inference")

    def edit() -> None:
        node.attributes.pop("ratio", None)
        node.resize_outputs(1)

    return edit


def _pad(node: ir.Node, lift: Lift) -> Edit:
    number = _plain(node, "value")
    dtype = lift.known.dtype(node.inputs[0])

    def edit() -> None:
        ints_to_inputs(("pads", 1))(node, lift)()
        node.attributes.pop("value", None)
        if number is not None and number.as_float() != 0:
            _set_input(node, 2, lift.scalar(node, number.as_float(), dtype, "value"))

    return edit


def _resize_11(node: ir.Node, lift: Lift) -> Edit:
    mode = _plain(node, "mode")
    rounding = "floor"
    if mode is None or mode.as_string() == "nearest":
        rounding = _nearest_mode(small_constant(node.inputs[1]))
    return partial(_as_resize, node, node.inputs[1], rounding)


def _nearest_mode(scales: Array | None) -> str:
    """Return how onnxruntime's Resize of opset 10 rounds: up where it shrinks a dimension, else down."""
    if scales is None:
        raise CannotLift("Resize of opset 10 rounds by the direction of its scales, which are not constant")
    if (scales >= 1).all():
        return "floor"
    if (scales <= 1).all():
        return "ceil"
    raise CannotLift("Resize of opset 10 rounds differently where it grows and where it shrinks; here it does both")


def _as_resize(node: ir.Node, scales: ir.Value | None, rounding: str) -> None:
    node.op_type = "Resize"
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    node.attributes.add(ir.AttrString("nearest_mode", rounding))


def _resize_13(node: ir.Node, lift: Lift) -> Edit:
    mode = _plain(node, "coordinate_transformation_mode")
    if mode is not None and mode.as_string() == "tf_half_pixel_for_nn":
        raise CannotLift("tf_half_pixel_for_nn left Resize with opset 13")
    return partial(_drop_empty_inputs, node)


def _drop_empty_inputs(node: ir.Node) -> None:
    """Leave out `roi` and `scales` that are there, empty, only because opset 11 wants them."""
    for index in (1, 2):
        content = small_constant(node.inputs[index]) if index < len(node.inputs) else None
        if content is not None and content.size == 0:
            node.replace_input_with(index, None)


def _roi_align(node: ir.Node, lift: Lift) -> Edit:
    return lambda: node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def _scan_9(node: ir.Node, lift: Lift) -> Edit:
    raise CannotLift("Scan of opset 8 has a batch axis, which later ones lack")


def _scatter(node: ir.Node, lift: Lift) -> Edit:
    return partial(setattr, node, "op_type", "ScatterElements")


def _softmax(node: ir.Node, lift: Lift) -> Edit:
    """Before opset 13 these ops work on a matrix: all dimensions from `axis` on, taken together."""
    attribute = _plain(node, "axis")
    axis = 1 if attribute is None else attribute.as_int()
    dims = lift.known.dims(node.inputs[0])
    if dims is not None and 0 in dims:  # no element, so any axis will do
        axis = -1
    elif dims is not None and axis < 0:
        axis += len(dims)
    one_dimension = axis == -1 or (dims is not None and all(dim == 1 for dim in dims[axis + 1 :]) and axis < len(dims))
    if one_dimension:
        return partial(node.attributes.add, ir.AttrInt64("axis", axis))
    return partial(_softmax_of_matrix, node, lift, axis)


def _softmax_of_matrix(node: ir.Node, lift: Lift, axis: int) -> None:
    source = node.inputs[0]
    assert source is not None, "Softmax has an input"
    matrix = lift.prepend(node, "Flatten", [source], "matrix", [ir.AttrInt64("axis", axis)])
    shape = lift.prepend(node, "Shape", [source], "shape")
    result = lift.prepend(node, node.op_type, [matrix], "rows", [ir.AttrInt64("axis", -1)])
    node.op_type = "Reshape"
    node.attributes.pop("axis", None)
    node.resize_inputs(2)
    node.replace_input_with(0, result)
    node.replace_input_with(1, shape)


def _split_18(node: ir.Node, lift: Lift) -> Edit:
    if len(node.inputs) > 1 or "split" in node.attributes:
        return _nothing
    return partial(node.attributes.add, ir.AttrInt64("num_outputs", len(node.outputs)))


def _top_k(node: ir.Node, lift: Lift) -> Edit:
    count = _plain(node, "k")
    if count is None:
        raise CannotLift("TopK lacks its k")

    def edit() -> None:
        node.attributes.pop("k")
        _set_input(node, 1, lift.constant(node, np.array([count.as_int()], np.int64), "k"))

    return edit


def _upsample_9(node: ir.Node, lift: Lift) -> Edit:
    scales = _plain(node, "scales")
    if scales is None:
        raise CannotLift("Upsample lacks its scales")

    def edit() -> None:
        node.attributes.pop("scales")
        _set_input(node, 1, lift.constant(node, np.array(scales.as_floats(), np.float32), "scales"))

    return edit


def _upsample_10(node: ir.Node, lift: Lift) -> Edit:
    return lambda: _as_resize(node, node.inputs[1], "floor")


_AXES = ints_to_inputs(("axes", 1))

ADAPTERS: dict[str, tuple[tuple[int, Adapter], ...]] = {
    "BatchNormalization": ((9, _batch_normalization_9), (14, _batch_normalization_14)),
    "Clip": ((11, _clip),),
    "Dropout": ((12, _dropout),),
    "Hardmax": ((13, _softmax),),
    "LogSoftmax": ((13, _softmax),),
    "Pad": ((11, _pad),),
    "ReduceL1": ((18, _AXES),),
    "ReduceL2": ((18, _AXES),),
    "ReduceLogSum": ((18, _AXES),),
    "ReduceLogSumExp": ((18, _AXES),),
    "ReduceMax": ((18, _AXES),),
    "ReduceMean": ((18, _AXES),),
    "ReduceMin": ((18, _AXES),),
    "ReduceProd": ((18, _AXES),),
    "ReduceSum": ((13, _AXES),),
    "ReduceSumSquare": ((18, _AXES),),
    "Resize": ((11, _resize_11), (13, _resize_13)),
    "RoiAlign": ((16, _roi_align),),
    "Scan": ((9, _scan_9),),
    "Scatter": ((11, _scatter),),
    "Slice": ((10, ints_to_inputs(("starts", 1), ("ends", 2), ("axes", 3))),),
    "Softmax": ((13, _softmax),),
    "Split": ((13, ints_to_inputs(("split", 1))), (18, _split_18)),
    "Squeeze": ((13, _AXES),),
    "TopK": ((10, _top_k),),
    "Unsqueeze": ((13, _AXES),),
    "Upsample": ((9, _upsample_9), (10, _upsample_10)),
}
"""Op type -> (first opset of another form, adapter to it), in ascending order."""

_COMPATIBLE = """
Abs Add ArgMax ArgMin AveragePool Cast Ceil Compress Concat Constant Conv ConvTranspose CumSum DepthToSpace
DequantizeLinear Div Equal Erf Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gemm Greater GreaterOrEqual
Identity If IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log Loop LpPool MatMul Max MaxPool MaxUnpool Mean
MeanVarianceNormalization Min Mod Mul Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero OneHot OptionalGetElement
OptionalHasElement PRelu Pow QuantizeLinear RNN Reciprocal Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign
Size SoftmaxCrossEntropyLoss SpaceToDepth Sqrt Sub Sum Tanh Tile Transpose Where
"""

COMPATIBLE = frozenset(_COMPATIBLE.split())
"""Ops that changed between opsets 7 and 18 without a node of the older form meaning anything else in the newer."""
