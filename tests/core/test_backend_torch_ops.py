"""Every translated op against onnxruntime, or ONNX's reference evaluator where onnxruntime has no kernel."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from optframe.backends.torch import source
from optframe.backends.torch.backend import TorchSettings, open_model
from optframe.backends.torch.ops_resize import MOST_TAPS
from optframe.backends.torch.registry import TRANSLATIONS
from optframe.errors import InputError

Array = np.ndarray[Any, Any]
assert source.FAMILIES, "the translations are entered when these modules are imported"


@dataclass(frozen=True)
class Case:
    """A node on random inputs: shapes (float32), arrays as they are, None for one left out."""

    op: str
    inputs: Sequence[tuple[int, ...] | Array | None] = ((2, 3, 4),)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    positive: bool = False
    constant: tuple[int, ...] = ()
    """Inputs that are initialisers."""
    note: str = ""


def ints(*values: int, dtype: str = "int64") -> Array:
    return np.array(values, dtype)


def scalar(value: float, dtype: str = "int64") -> Array:
    return np.array(value, dtype)


POINTWISE = "Abs Neg Exp Floor Ceil Round Sign Sin Cos Tan Atan Sinh Cosh Asinh Erf IsNaN Sigmoid Tanh Relu"
POINTWISE += (
    " Softsign HardSwish Softplus Identity LeakyRelu Elu Selu Celu HardSigmoid ThresholdedRelu Gelu Mish Shrink"
)
BINARY = "Add Sub Mul Div Less LessOrEqual Greater GreaterOrEqual Equal Min Max Sum Mean PRelu"
HALF = np.linspace(-0.9, 0.9, 24, dtype=np.float32).reshape(2, 3, 4)
BOOLS = (np.array([[True, False], [True, True]]), np.array([[True, True], [False, True]]))
BITS = (ints(6, 5, 255, dtype="uint8"), ints(3, 1, 2, dtype="uint8"))
RECURRENT = [(5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32), None, (1, 2, 4), (1, 2, 4)]

CASES = [
    *(Case(op) for op in POINTWISE.split()),
    *(Case(op, positive=True) for op in ("Log", "Sqrt", "Reciprocal")),
    *(Case(op, [HALF]) for op in ("Asin", "Acos", "Atanh")),
    Case("Acosh", [HALF + 2]),
    *(Case(op, [(2, 3, 4), (3, 1)]) for op in BINARY.split()),
    *(Case(op, BOOLS) for op in ("And", "Or", "Xor")),
    Case("Not", BOOLS[:1]),
    *(Case(op, BITS) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    Case("BitwiseNot", BITS[:1]),
    *(Case("BitShift", BITS, {"direction": direction}) for direction in ("LEFT", "RIGHT")),
    Case("Swish", opset=24),
    Case("Gelu", attributes={"approximate": "tanh"}, note="tanh"),
    Case("Pow", [(2, 3), scalar(2)], positive=True),
    Case("Div", [ints(-7, 7, 9), ints(2, -2, 3)], note="integers"),
    Case("Mod", [ints(-7, 7, 9), ints(2, -2, 3)]),
    Case("Mod", [(2, 3), (2, 3)], {"fmod": 1}, note="fmod"),
    Case("Clip", [(2, 3), scalar(-0.5, "float32"), scalar(0.5, "float32")]),
    Case("Clip", [(2, 3)], {"min": -0.5, "max": 0.25}, opset=7, note="attributes"),
    Case("Where", [BOOLS[0], (2, 2), (2, 2)]),
    Case("Cast", [(2, 3)], {"to": TensorProto.INT32}),
    Case("Cast", [(2, 3)], {"to": TensorProto.FLOAT16}, note="half"),
    Case("CastLike", [(2, 3), ints(1)]),
    Case("IsInf", [np.array([np.inf, -np.inf, 1, np.nan], np.float32)], {"detect_negative": 0}),
    Case("Dropout", outputs=2),
    *(
        Case(
            f"Reduce{name}", [(2, 3, 4), ints(0, -1)], {"keepdims": keep}, positive=True, constant=(1,), note=str(keep)
        )
        for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
        for keep in (0, 1)
    ),
    Case("ReduceMean", [(2, 3, 4)], {"axes": [1]}, opset=13, note="attribute"),
    Case("ReduceSum", [(2, 3, 4)], {"noop_with_empty_axes": 1}, note="noop"),
    *(
        Case(op, attributes={"axis": 1}, note=str(opset), opset=opset)
        for op in ("ArgMax", "ArgMin")
        for opset in (11, 20)
    ),
    Case("ArgMax", [ints(3, 1, 3)], {"select_last_index": 1, "keepdims": 0}, note="last"),
    *(
        Case(op, attributes={"axis": 1}, opset=o, note=str(o))
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for o in (11, 13)
    ),
    Case("CumSum", [(2, 5), scalar(1)], constant=(1,)),
    Case("CumSum", [(2, 5), scalar(0)], {"exclusive": 1, "reverse": 1}, constant=(1,), note="exclusive, reverse"),
    Case("TopK", [(3, 6), ints(2)], {"axis": 1}, outputs=2, constant=(1,)),
    Case("TopK", [ints(3, 1, 3, 1, 2), ints(4)], {"largest": 0, "axis": 0}, outputs=2, note="ties"),
    Case("Shape", attributes={"start": 1}),
    Case("Size"),
    Case("Constant", [], {"value_floats": [1.0, 2.5]}),
    Case("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(np.array([7], np.int32))}),
    Case("Range", [scalar(1), scalar(9), scalar(3)]),
    Case("EyeLike", [(3, 5)], {"k": 1}),
    Case("Reshape", [(2, 3, 4), ints(0, -1)]),
    Case("Reshape", [(2, 3, 4), ints(4, 6)], constant=(1,), note="constant"),
    Case("Flatten", attributes={"axis": 2}),
    Case("Flatten", attributes={"axis": 0}, note="0"),
    Case("Transpose", attributes={"perm": [2, 0, 1]}),
    Case("Transpose", note="reversed"),
    Case("Squeeze", [(2, 1, 3, 1), ints(1)], constant=(1,)),
    Case("Squeeze", [(2, 1, 3, 1)], note="all"),
    Case("Unsqueeze", [(2, 3), ints(0, -1)], constant=(1,)),
    Case("Unsqueeze", [(2, 3)], {"axes": [1]}, opset=11, note="attribute"),
    Case("Expand", [(3, 1), ints(2, 1, 4)]),
    Case("Tile", [(2, 3), ints(2, 1)]),
    Case("Concat", [(2, 3), (2, 1)], {"axis": 1}),
    Case("Split", [(6, 2), ints(1, 5)], {"axis": 0}, outputs=2, constant=(1,)),
    Case("Split", [(7, 2)], {"axis": 0, "num_outputs": 3}, outputs=3, note="uneven"),
    Case("Slice", [(6, 5), ints(1, -1), ints(9, -6), ints(0, 1), ints(2, -2)], constant=(1, 2, 3, 4)),
    Case("Slice", [(6, 5), ints(1), ints(3)], note="computed"),
    Case("Slice", [(6, 5)], {"starts": [1], "ends": [-1], "axes": [1]}, opset=9, note="attributes"),
    *(Case("Pad", [(1, 2, 4), ints(0, 1, 2, 0, 0, 1)], {"mode": mode}, note=mode) for mode in ("constant", "edge")),
    Case("Pad", [(1, 2, 4), ints(0, 0, 2, 0, 0, 3)], {"mode": "reflect"}, note="reflect"),
    Case("Pad", [(1, 2, 4), ints(0, 0, 2, 0, 0, 3)], {"mode": "wrap"}, note="wrap"),
    Case("Pad", [(4, 2), ints(-1, 0, 2, 0), scalar(1.5, "float32")], note="negative"),
    Case("Gather", [(4, 3), np.array([[0, -1], [2, 1]])], {"axis": 0}),
    Case("GatherElements", [(3, 3), np.array([[1, -2, 0], [2, 0, 0]])], {"axis": 0}),
    Case("GatherND", [(2, 3, 4), np.array([[[1]], [[-1]]])], {"batch_dims": 1}),
    Case("ScatterElements", [(3, 3), np.array([[1, 0, 2]]), (1, 3)], {"axis": 0}),
    Case("ScatterElements", [(1, 5), np.array([[1, 1]]), (1, 2)], {"axis": 1, "reduction": "add"}, note="add"),
    Case("Scatter", [(3, 3), np.array([[1, 0, 2]]), (1, 3)], {"axis": 0}, opset=9),
    Case("ScatterND", [(4, 3), np.array([[1], [-1]]), (2, 3)]),
    Case("ScatterND", [(4, 3), np.array([[1], [1]]), (2, 3)], {"reduction": "max"}, note="max"),
    Case("OneHot", [ints(0, 2, -1), scalar(3), np.array([0, 1], np.float32)], {"axis": 0}, constant=(1,)),
    Case("Trilu", [(4, 5), scalar(1)], {"upper": 0}, constant=(1,)),
    *(Case("DepthToSpace", [(1, 8, 2, 3)], {"blocksize": 2, "mode": mode}, note=mode) for mode in ("DCR", "CRD")),
    Case("SpaceToDepth", [(1, 2, 4, 6)], {"blocksize": 2}),
    Case("SpaceToDepth", [(1, 2, 4, 6)], {"blocksize": 2, "mode": "CRD"}, opset=28, note="CRD"),
    Case("ReverseSequence", [(5, 3), ints(2, 5, 1)], {"time_axis": 0, "batch_axis": 1}),
    Case("NonZero", [np.array([[1, 0], [0, 2]], np.float32)]),
    Case("Compress", [(3, 2), np.array([True, False, True])], {"axis": 0}),
    Case("MatMul", [(2, 3, 4), (4, 5)]),
    Case("MatMul", [ints(1, 2, 3, dtype="int32"), np.arange(6, dtype=np.int32).reshape(3, 2)], note="integers"),
    Case("Gemm", [(3, 4), (3, 5), (5,)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [(3, 4), (5, 4)], {"transB": 1}, note="no bias"),
    Case("Einsum", [(2, 3), (3, 4)], {"equation": "ij, jk -> ik"}),
    Case("Conv", [(1, 4, 9, 8), (6, 2, 3, 3), (6,)], {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", [(1, 2, 12), (3, 2, 3)], {"dilations": [2], "auto_pad": "SAME_UPPER"}, note="1d, same"),
    Case("Conv", [(1, 1, 4, 5, 6), (2, 1, 2, 2, 2)], note="3d"),
    Case(
        "ConvTranspose",
        [(1, 2, 4, 5), (2, 3, 3, 3), (3,)],
        {"strides": [2, 1], "pads": [1, 0, 1, 1], "output_padding": [1, 0]},
    ),
    Case("ConvTranspose", [(1, 2, 4, 4), (2, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, note="same"),
    Case("MaxPool", [(1, 2, 7, 8)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", [(1, 2, 7, 8)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, note="ceil"),
    Case("AveragePool", [(1, 2, 7, 8)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}),
    Case(
        "AveragePool",
        [(1, 2, 7, 8)],
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
        note="pad",
    ),
    Case("LpPool", [(1, 2, 6, 6)], {"kernel_shape": [2, 2]}),
    *(Case(op, [(2, 3, 4, 5)]) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    Case("BatchNormalization", [(2, 3, 4), (3,), (3,), (3,), np.array([1, 2, 3], np.float32)]),
    Case("InstanceNormalization", [(2, 3, 4, 5), (3,), (3,)]),
    Case("GroupNormalization", [(2, 4, 3, 3), (4,), (4,)], {"num_groups": 2}, opset=21),
    Case("LayerNormalization", [(2, 3, 4), (4,), (4,)]),
    Case("LayerNormalization", [(2, 3, 4), (1, 4)], {"axis": 1}, note="broadcast scale"),
    Case("RMSNormalization", [(2, 3, 4), (4,)], opset=23),
    Case("LpNormalization", [(2, 3)], {"axis": 1, "p": 2}),
    Case("MeanVarianceNormalization", [(2, 3, 4, 5)]),
    Case("LRN", [(1, 6, 3, 3)], {"size": 3}),
    Case("GridSample", [(1, 2, 5, 6), (1, 3, 4, 2)], {"mode": "linear"}),
    *(
        Case(
            "Resize",
            [(1, 2, 5, 6), None, np.array([1, 1, 1.6, 0.5], np.float32)],
            {"mode": mode, "coordinate_transformation_mode": how},
            note=f"{mode}, {how}",
            constant=(2,),
        )
        for mode in ("nearest", "linear", "cubic")
        for how in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    Case("Resize", [(1, 2, 5, 6), None, None, ints(1, 2, 8, 9)], {"mode": "linear"}, note="sizes"),
    Case("Resize", [(1, 2, 4, 4), np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, opset=10, note="opset 10"),
    Case("Upsample", [(1, 2, 4, 4), np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, opset=9),
    Case("QuantizeLinear", [(2, 3), scalar(0.05, "float32"), scalar(7, "int8")]),
    Case("QuantizeLinear", [(2, 3), np.array([0.1, 0.02, 0.05], np.float32)], {"axis": 1}, note="channels"),
    Case("DequantizeLinear", [ints(1, -5, 7, dtype="int8"), scalar(0.5, "float32"), scalar(2, "int8")]),
    Case(
        "DequantizeLinear",
        [ints(1, -5, 7, dtype="int8"), scalar(0.3, "float32")],
        {"output_dtype": TensorProto.FLOAT16},
        opset=23,
        note="FP16",
    ),
    Case("DynamicQuantizeLinear", outputs=3),
    Case(
        "MatMulInteger",
        [np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(12, dtype=np.int8).reshape(3, 4), scalar(3, "uint8")],
    ),
    Case(
        "ConvInteger",
        [
            np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4),
            np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2),
            scalar(5, "uint8"),
        ],
        {"pads": [1, 1, 1, 1]},
    ),
    Case("LSTM", RECURRENT, {"hidden_size": 4}, outputs=3),
    Case("LSTM", RECURRENT[:4], {"hidden_size": 4, "direction": "reverse"}, outputs=3, note="reverse"),
    Case(
        "LSTM",
        [(5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32)],
        {"hidden_size": 4, "direction": "bidirectional"},
        outputs=3,
        note="both",
    ),
    *(
        Case(
            "GRU",
            [(5, 2, 3), (2, 12, 3), (2, 12, 4), (2, 24)],
            {"hidden_size": 4, "direction": "bidirectional", "linear_before_reset": first},
            outputs=2,
            note=str(first),
        )
        for first in (0, 1)
    ),
    Case("RNN", [(5, 2, 3), (1, 4, 3), (1, 4, 4), (1, 8)], {"hidden_size": 4}, outputs=2),
]

NAN = np.array([np.nan, -2, 0.5, 3], np.float32)
EMPTY = np.zeros((2, 0, 3), np.float32)
BIG = np.array([[1 << 30, 3], [-7, (1 << 31) - 1]], np.int32)
HALVES = np.array([[300, 400], [6e4, 6e4]], np.float16)
BYTES = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4) * 9

FORMS = [
    *(Case("Range", [scalar(5), scalar(2), scalar(step)], note=f"empty, {step}") for step in (1, 3)),
    Case("Range", [scalar(1, "float32"), scalar(4, "float32"), scalar(-0.5, "float32")], note="empty, -0.5"),
    *(
        Case("Slice", [(4, 5), *map(ints, cut)], note=f"backwards {cut}")
        for cut in ((-9, -9, 0, -1), (1, 3, 0, -1), (-5, -9, 1, -2), (9, -9, 1, -3), (2, 2, 1, -1))
    ),
    *(
        Case(
            "BitShift",
            [np.array([0, 5, 1 << 15, np.iinfo(dtype).max], dtype), np.array([3, 0, 2, 7], dtype)],
            {"direction": direction},
            note=f"{dtype} {direction}",
        )
        for dtype in ("uint16", "uint32", "uint64")
        for direction in ("LEFT", "RIGHT")
    ),
    *(Case("Split", [(n, 2)], {"num_outputs": 3}, opset=18, outputs=3, note=f"{n} in 3") for n in (4, 2, 0)),
    Case("Split", [(0, 2)], opset=13, outputs=2, note="nothing in 2"),
    Case("Pad", [ints(1, 2), ints(1, 0), scalar(-(1 << 60) - 1)], note="with a big integer"),
    Case("Pad", [(2, 4), ints(0, -1, 0, 2)], {"mode": "wrap"}, opset=19, note="cut off, then wrap"),
    Case("ScatterND", [(3, 0), np.array([[1], [2]]), (2, 0)], note="empty rows"),
    Case("MatMul", [BIG, BIG], note="beyond float64"),
    Case("Gemm", [BIG.astype(np.int64) << 20, BIG.astype(np.int64), ints(1, 2)], {"beta": 2.0}, note="beyond float64"),
    Case("Einsum", [BIG % 9], {"equation": "ij->"}, note="integers"),
    Case(
        "MatMulInteger",
        [
            np.full((2, 2, 3), 5, np.uint8),
            np.full((2, 3, 2), 7, np.uint8),
            np.arange(4, dtype=np.uint8).reshape(2, 2, 1),
        ],
        note="a zero point with all axes",
    ),
    Case(
        "ConvTranspose",
        [(1, 1, 5, 2), (1, 2, 3, 3), (2,)],
        {"strides": [3, 2], "auto_pad": "SAME_UPPER", "output_shape": [14, 6]},
        note="larger than it reaches",
    ),
    Case("MaxPool", [ints(*range(-4, 4), dtype="int8").reshape(1, 2, 4)], {"kernel_shape": [2]}, note="1d integers"),
    *(
        Case(
            op, [np.arange(48).reshape(1, 2, 2, 4, 3).astype(np.float16)], {"kernel_shape": [1, 2, 2]}, note="3d, FP16"
        )
        for op in ("AveragePool", "LpPool")
    ),
    Case("LpPool", [HALVES.reshape(1, 1, 4)], {"kernel_shape": [2]}, note="beyond FP16"),
    Case("GlobalLpPool", [HALVES.reshape(2, 1, 2) / 2], {"p": 3}, note="beyond FP16"),
    Case("MeanVarianceNormalization", [HALVES[:1] + np.float16(1000)], {"axes": [1]}, note="FP16 off centre"),
    *(Case(op, [(1, 3, 1), (3,), (3,)], note="one element") for op in ("InstanceNormalization",)),
    Case("GroupNormalization", [(1, 3, 1), (3,), (3,)], {"num_groups": 3}, opset=21, note="one element"),
    Case("Hardmax", [EMPTY], {"axis": 1}, note="empty"),
    Case("DynamicQuantizeLinear", [EMPTY], outputs=3, note="empty"),
    Case("DynamicQuantizeLinear", [np.zeros(3, np.float32)], outputs=3, note="zeros"),
    Case("Sign", [NAN], note="NaN"),
    Case("ThresholdedRelu", [NAN], note="NaN"),
    Case("Shrink", [ints(-3, 0, 2, dtype="int16")], {"bias": 0.5, "lambd": 1.5}, note="integers"),
    Case("Dropout", [(2, 3), scalar(0.5, "float32"), np.array(False)], note="training off"),
    *(
        Case(f"Reduce{name}", [EMPTY.astype(dtype)], {"axes": [1]}, opset=13, note=f"of nothing, {dtype}")
        for name in ("Max", "Min")
        for dtype in ("float32", "int32")
    ),
    Case("ReduceMax", [np.zeros((0, 2), bool), ints(0)], opset=20, note="of nothing, bool"),
    *(Case(f"Reduce{n}", [ints(3, 4, 9, dtype="int32")], note="integers") for n in ("L2", "LogSum", "LogSumExp")),
    *(Case(f"Reduce{n}", [HALVES, ints(1)], note="beyond FP16") for n in ("L2", "LogSum")),
    *(
        Case("CumSum", [np.array([1, 1e8, 1, np.inf, 1], np.float32), scalar(0)], {"exclusive": 1, "reverse": r})
        for r in (0, 1)
    ),
    Case("CumSum", [EMPTY, scalar(1)], {"exclusive": 1}, note="empty"),
    *(
        Case("Resize", [BYTES, None, None, ints(1, 2, 7, 5)], {"mode": mode, "coordinate_transformation_mode": how})
        for mode, how in (("linear", "asymmetric"), ("linear", "half_pixel"), ("cubic", "half_pixel"))
    ),
    Case(
        "Resize",
        [(1, 2, 3, 4), None, np.array([1.5, 2], np.float32)],
        {"mode": "linear", "axes": [2, -1]},
        note="negative axes",
    ),
    Case("Resize", [(1, 1, 10), None, np.array([1, 1, 0.9], np.float32)], {"mode": "linear"}, note="9 by float32"),
    Case("Resize", [(1, 1, 10), np.array([1, 1, 0.6], np.float32)], opset=10, note="opset 10, smaller"),
    Case("Upsample", [BYTES, np.array([1, 1, 2, 1.5], np.float32)], {"mode": "linear"}, opset=9, note="integers"),
]
"""What the ops above get wrong first: empty tensors, NaN, integers, FP16, negative steps and axes, ends of ranges."""


def test_every_translation_has_a_case() -> None:
    assert set(TRANSLATIONS) - {case.op for case in CASES} == set()


def build(case: Case, seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for i, given in enumerate(case.inputs):
        if isinstance(given, tuple):
            drawn = rng.standard_normal(given).astype(np.float32)
            arrays[f"x{i}"] = np.abs(drawn) + np.float32(0.5) if case.positive else drawn
        elif given is not None:
            arrays[f"x{i}"] = given
    names = [f"x{i}" if given is not None else "" for i, given in enumerate(case.inputs)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="node", **case.attributes)
    constants = {f"x{i}" for i in case.constant}
    graph = helper.make_graph(
        [node],
        "case",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
            if n not in constants
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(arrays[name], name) for name in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)
    return model, {name: array for name, array in arrays.items() if name not in constants}


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Any]:
    """onnxruntime's outputs, or those of ONNX's own evaluator for a form that onnxruntime has no kernel for."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs: list[Any] = session.run(None, feeds)
    except Exception:  # it says NotImplemented, Fail or InvalidGraph
        from onnx.reference import ReferenceEvaluator

        return list(ReferenceEvaluator(model).run(None, feeds))  # type: ignore[arg-type]
    return outputs


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [*CASES, *FORMS], ids=lambda case: f"{case.op} {case.note}".strip())
def test_op(case: Case, seed: int) -> None:
    model, feeds = build(case, seed)
    runner = open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")
    actual = runner.run(feeds)
    for name, expected in zip(actual, reference(model, feeds), strict=True):
        expected = np.asarray(expected)
        assert actual[name].shape == expected.shape
        assert actual[name].dtype == expected.dtype
        # sums of at most a few dozen float32 terms in another order; steep functions magnify what inputs round to
        rtol = 2e-3 if expected.dtype == np.float16 else 2e-5  # FP16 rounds to 2^-11, here twice
        np.testing.assert_allclose(actual[name], expected, rtol=rtol, atol=2e-6)
    again = runner.run(feeds)
    for name, array in actual.items():
        np.testing.assert_array_equal(again[name], array, err_msg="the program differs from the run that made it")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("MaxPool", [(1, 2, 4, 4)], {"kernel_shape": [2, 2]}, outputs=2), "indices"),
        (Case("LSTM", [*RECURRENT[:4], ints(5, 5, dtype="int32")], {"hidden_size": 4}, outputs=2), "sequence_lens"),
        (Case("Resize", [(1, 1, 4, 4), None, np.array([1, 1, 2, 2], np.float32)], {"antialias": 1}), "antialias"),
        (Case("Bernoulli"), "no translation of Bernoulli"),
        (Case("LpPool", [(1, 2, 4, 4)], {"kernel_shape": [2, 2], "dilations": [1, 2]}), "LpPool with dilations"),
        (Case("Add", [(2,), (2,)], {"broadcast": 1}, opset=6), "opset 7 and newer, this one is of 6"),
        (Case("BatchNormalization", [(2, 3), *[(3,)] * 4], {"spatial": 0}, opset=8), r"spatial = 0"),
        (Case("MaxPool", [(1, 2, 2, 2, 2, 2)], {"kernel_shape": [1] * 4}), "a window of 4 axes"),
        (Case("Gather", [ints(1, 2), ints(5)], constant=(0, 1)), r"cannot run Gather \(node 'node'\) .*out of range"),
        (
            Case("QuantizeLinear", [(2,), scalar(1, "float32")], {"output_dtype": TensorProto.UINT4}, opset=21),
            "the result of QuantizeLinear 'node' is a tensor of uint4",
        ),
    ],
)
def test_forms_without_a_translation_are_named_before_anything_runs(case: Case, words: str) -> None:
    model, _ = build(case, 0)
    with pytest.raises(InputError, match=words):
        open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")


@pytest.mark.parametrize(
    "case",
    [
        Case("Pad", [(2,), ints(1, 1)], {"mode": "no"}),
        Case("Resize", [(1, 1, 2), None, np.ones(3, np.float32)], {"mode": "no"}),
        Case("Resize", [(1, 1, 2), None, np.ones(3, np.float32)], {"coordinate_transformation_mode": "no"}),
        Case("Resize", [(1, 1, 2), None, np.ones(3, np.float32)], {"nearest_mode": "no"}),
        Case("ScatterElements", [(2,), ints(1), (1,)], {"reduction": "no"}),
        Case("ScatterND", [(2,), np.array([[1]]), (1,)], {"reduction": "no"}),
        Case("GridSample", [(1, 1, 2, 2), (1, 1, 1, 2)], {"padding_mode": "no"}),
        *(Case(op, [(1, 1, 4), (1, 1, 2)], {"auto_pad": "no"}) for op in ("Conv", "ConvTranspose")),
        *(
            Case(op, [(1, 1, 4)], {"auto_pad": "no", "kernel_shape": [2]})
            for op in ("MaxPool", "AveragePool", "LpPool")
        ),
        Case("Gelu", attributes={"approximate": "no"}),
        Case("DepthToSpace", [(1, 4, 2, 2)], {"blocksize": 2, "mode": "no"}),
        Case("BitShift", BITS, {"direction": "no"}),
        Case("LSTM", RECURRENT[:3], {"hidden_size": 4, "direction": "no"}),
    ],
    ids=lambda case: case.op,
)
def test_attributes_of_unknown_values_are_named_before_anything_runs(case: Case) -> None:
    model, _ = build(case, 0)
    with pytest.raises(InputError, match=f"no {case.op} with .* = no "):
        open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("MaxPool", [(1, 1, 4)]), "MaxPool with attributes that are missing or malformed"),
        (Case("Einsum", [(2,)]), "Einsum with attributes that are missing or malformed"),
        (Case("Cast", attributes={"to": 99}), "Cast with attributes that are missing or malformed"),
        (Case("EyeLike", [(2, 2)], {"dtype": TensorProto.STRING}), "result of EyeLike 'node' is a tensor of string"),
        (
            Case("ConstantOfShape", [ints(2)], {"value": helper.make_tensor("v", TensorProto.STRING, [1], [b"a"])}),
            "the value of ConstantOfShape 'node' is a tensor of string",
        ),
    ],
    ids=lambda value: value.op if isinstance(value, Case) else "",
)
def test_malformed_nodes_are_named_before_anything_runs(case: Case, words: str) -> None:
    model, _ = build(case, 0)
    with pytest.raises(InputError, match=words):
        open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("Squeeze", [(2, 1), ints(0)]), "axes .* are not all of size 1"),
        (Case("Dropout", [(2,), scalar(0.5, "float32"), np.array(True)]), "Dropout with training"),
        (Case("Gather", [(3,), ints(7)]), "cannot run Gather"),
        (Case("ScatterND", [(3, 3), np.array([[0, 5]]), (1,)]), "cannot run ScatterND .* for an axis of 3 elements"),
    ],
)
def test_inputs_that_an_op_does_not_take_are_named_in_every_run(case: Case, words: str) -> None:
    model, feeds = build(case, 0)
    runner = open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            runner.run(feeds)


def test_an_index_that_is_out_of_range_is_named_by_a_program_too() -> None:
    model, feeds = build(Case("Gather", [(3,), ints(1)]), 0)
    runner = open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")
    runner.run(feeds)
    with pytest.raises(InputError, match=r"cannot run Gather .*out of range"):
        runner.run({**feeds, "x1": ints(3)})


def test_outputs_that_a_transposed_convolution_does_not_reach_are_its_bias() -> None:
    """onnxruntime makes a smaller output here, against the operator's definition."""
    from onnx.reference import ReferenceEvaluator

    case = Case("ConvTranspose", [(1, 2, 3), (2, 2, 1), (2,)], {"strides": [3], "auto_pad": "SAME_UPPER"})
    model, feeds = build(case, 0)
    (expected,) = ReferenceEvaluator(model).run(None, feeds)  # type: ignore[arg-type]
    actual = open_model(ir.from_proto(model), "cpu", TorchSettings(), "case").run(feeds)["y0"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)  # sums of two products


def test_taps_of_sizes_that_values_choose_do_not_pile_up() -> None:
    model, feeds = build(Case("Resize", [(1, 1, 5), None, None, ints(1, 1, 5)], {"mode": "linear"}), 0)
    runner = open_model(ir.from_proto(model), "cpu", TorchSettings(), "case")
    call = runner.loaded.body.nodes[0].call
    assert call is not None
    kept = inspect.getclosurevars(call).nonlocals["resizer"]._taps
    for size in range(6, 6 + 3 * MOST_TAPS):
        assert runner.run({**feeds, "x3": ints(1, 1, size)})["y0"].shape == (1, 1, size)
        assert 0 < len(kept) <= MOST_TAPS
