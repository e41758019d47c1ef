"""What a model cannot run faster than on a GPU, by class of op: its arithmetic, or the bytes it has to move."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass

import onnx_ir as ir
import timing
import torch

from optframe.flops import count_flops
from optframe.registry import default_registry
from optframe.shapes import static_shape

PRODUCT = 8192
"""Rows and columns of the matrix product that says what arithmetic the card reaches."""

COPY_BYTES = 2**28
"""What is copied to say how fast memory is: many times a second-level cache."""

NORMS = ("LayerNorm", "SkipLayerNorm", "LayerNormalization", "InstanceNormalization")


@dataclass(frozen=True)
class Rates:
    """What the card reached: operations a second in products of a precision, and bytes a second in a copy."""

    flops: float
    bytes: float


def measured_rates(dtype: torch.dtype) -> Rates:
    """Return what a large matrix product of `dtype` and a large copy reach on this card."""
    x = torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype)
    source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    us = timing.median_us({"product": lambda _: x @ x, "copy": lambda _: target.copy_(source)}, sets=1)
    return Rates(2 * PRODUCT**3 / us["product"] * 1e6, 2 * COPY_BYTES / us["copy"] * 1e6)


def floor_us(model: ir.Model, rates: Rates) -> dict[str, float]:
    """Return microseconds by class of op: arithmetic of products, and every input and output of a norm moved once.

    All else has no floor, since it can be part of another op. Shapes have to be known. Classes as in `anchordetr.py`:
    convolutions of one pixel are matrix products, products of two activations are attention.
    """
    report = count_flops(model, ops=default_registry().ops())
    flops: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        flops[_kind(node)] += report.by_node.get(node.name or "", 0)
    norms = [node for node in model.graph if node.op_type in NORMS]
    moved = sum(_bytes(value) for node in norms for value in (*node.inputs, *node.outputs) if value is not None)
    return {kind: count / rates.flops * 1e6 for kind, count in (+flops).items()} | {"norms": moved / rates.bytes * 1e6}


def _kind(node: ir.Node) -> str:
    """Return the class that the products of a node belong to."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return "attention"
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return "attention"
    pixels = math.prod((static_shape(weight) or ())[2:])
    return "convolutions" if node.op_type == "Conv" and pixels > 1 else "matrix products"


def _bytes(value: ir.Value) -> float:
    shape = static_shape(value)
    assert shape is not None, f"the shape of {value.name} is not known"
    assert value.dtype is not None
    return math.prod(shape) * value.dtype.itemsize
