"""ONNX nodes that compare two tensors and give two figures: the largest difference, and the sum of all.

The sum is there because it is NaN or infinite as soon as one difference is, which no maximum promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
EXACT = frozenset(
    getattr(TensorProto, name)
    for name in ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)
TINY = 1e-30
"""Keeps 0 / 0 out of the comparison; far below the size of any tensor that means something."""


def figures(name: str) -> onnx.ValueInfoProto:
    """Return the output called `name` that the figures of one comparison make."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])


def compare_nodes(before: str, after: str, element: int, output: str) -> list[onnx.NodeProto]:
    """Return nodes that write the figures of tensors `before` and `after`, both of type `element`, to `output`.

    Their shapes have to be the same, and not empty.
    """
    work = element if element == TensorProto.DOUBLE else TensorProto.FLOAT if element in FLOATS else TensorProto.INT64
    nodes = _Nodes(output)
    a, b = (name if element == work else nodes.add("Cast", name, to=work) for name in (before, after))
    if element in EXACT:
        difference = nodes.add("Cast", nodes.add("Not", nodes.add("Equal", a, b)), to=TensorProto.FLOAT)
    else:
        # |a - b| / (|a| + rms(a)), as numerics.relative_difference defines it
        root = nodes.add("Sqrt", nodes.add("Cast", nodes.add("Size", a), to=work))
        rms = nodes.add("Div", nodes.add("ReduceL2", a, keepdims=0), root)
        tiny = nodes.constant(np.array(TINY, helper.tensor_dtype_to_np_dtype(work)))
        scale = nodes.add("Add", nodes.add("Abs", a), nodes.add("Add", rms, tiny))
        difference = nodes.add("Div", nodes.add("Abs", nodes.add("Sub", a, b)), scale)
    one = nodes.constant(np.array([1]))
    both = [nodes.add(reduce, difference, keepdims=0) for reduce in ("ReduceMax", "ReduceSum")]
    joined = nodes.add("Concat", *(nodes.add("Reshape", figure, one) for figure in both), axis=0)
    nodes.last("Cast", [joined], to=TensorProto.FLOAT)
    return nodes.made


def guarded_nodes(before: str, after: str, element: int, output: str) -> list[onnx.NodeProto]:
    """Return nodes as `compare_nodes` does, for tensors of one rank whose shapes show at run time only.

    The figures are NaN where the shapes differ or the tensors are empty.
    """
    nodes = _Nodes(output)
    shape, other = nodes.add("Shape", before), nodes.add("Shape", after)
    same = nodes.add("Cast", nodes.add("Equal", shape, other), to=TensorProto.INT64)
    sound = nodes.add("ReduceMin", nodes.add("Concat", same, shape, axis=0), keepdims=0)
    condition = nodes.add("Cast", sound, to=TensorProto.BOOL)
    inside = f"{output}.inside"
    branch = helper.make_graph(compare_nodes(before, after, element, inside), "same", [], [figures(inside)])
    unknown = _Nodes(f"{output}.unknown")
    unknown.last("Constant", [], value=numpy_helper.from_array(np.full(2, np.nan, np.float32)))
    otherwise = helper.make_graph(unknown.made, "different", [], [figures(unknown.output)])
    nodes.last("If", [condition], then_branch=branch, else_branch=otherwise)
    return nodes.made


class _Nodes:
    """Nodes in the making, the last of which writes `output`."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.made: list[onnx.NodeProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of what it makes."""
        name = f"{self.output}.{len(self.made)}"
        self.made.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """Add a constant; return its name."""
        return self.add("Constant", value=numpy_helper.from_array(array))

    def last(self, op: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add the node that writes the output."""
        self.made.append(helper.make_node(op, inputs, [self.output], **attributes))
