"""What a model cannot run faster than on a GPU, by class of op: its arithmetic, or the bytes it has to move."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch

PRODUCT = 8192
"""Rows and columns of the matrix product that says what arithmetic the card reaches."""

COPY_BYTES = 2**28
"""What is copied to say how fast memory is: many times a second-level cache."""


@dataclass(frozen=True)
class Rates:
    """What the card reached: operations a second in products of a precision, and bytes a second in a copy."""

    flops: float
    bytes: float


def measured_rates(dtype: torch.dtype) -> Rates:
    """Return what a large matrix product of `dtype` and a large copy reach on this card, each the best of ten."""
    x = torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype)
    source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: x @ x) for _ in range(10))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    return Rates(2 * PRODUCT**3 / product, 2 * COPY_BYTES / copy)


def _seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def floor_us(model: ir.Model, rates: Rates) -> dict[str, float]:
    """Return microseconds by class of op: arithmetic of products, and every input and output of a norm moved once.

    All else has no floor, since it can be part of another op. Shapes have to be known. Classes as in `anchordetr.py`:
    convolutions of one pixel are matrix products, products of two activations are attention.
    """
    flops: collections.Counter[str] = collections.Counter()
    moved = 0
    for node in model.graph:
        if node.op_type == "Conv":
            kernel = _shape(node.inputs[1])
            kind = "convolutions" if math.prod(kernel[2:]) > 1 else "matrix products"
            flops[kind] += 2 * math.prod(_shape(node.outputs[0])) * math.prod(kernel[1:])
        elif node.op_type in ("Gemm", "MatMul"):
            second = node.inputs[1]
            kind = "matrix products" if second is not None and second.const_value is not None else "attention"
            inner = _shape(node.inputs[0])[0 if node.attributes.get_int("transA", 0) else -1]
            flops[kind] += 2 * math.prod(_shape(node.outputs[0])) * inner
        elif node.op_type == "RCDA":
            flops["attention"] += 2 * _rcda_products(node)
        elif "LayerNorm" in node.op_type or node.op_type in ("LayerNormalization", "InstanceNormalization"):
            values = [value for value in (*node.inputs, *node.outputs) if value is not None]
            moved += sum(math.prod(_shape(value)) * _item_bytes(value) for value in values)
    floors = {kind: count / rates.flops * 1e6 for kind, count in flops.items()}
    return floors | {"norms": moved / rates.bytes * 1e6}


def _rcda_products(node: ir.Node) -> int:
    """Return the multiplications of an attended value, of both scores and of the column weights' sum."""
    queries, _, row_keys, column_keys, _ = (_shape(value) for value in node.inputs[:5])
    width, channels = row_keys[1:]
    height, rows = column_keys[1], math.prod(queries[:-1])
    return rows * channels * (height * width + height + width + height)


def _shape(value: ir.Value | None) -> list[int]:
    assert value is not None
    assert value.shape is not None, f"{value.name} has no shape"
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    assert len(dims) == len(value.shape), f"{value.name} is dynamic: {value.shape}"
    return dims


def _item_bytes(value: ir.Value) -> float:
    assert value.dtype is not None
    return value.dtype.itemsize
