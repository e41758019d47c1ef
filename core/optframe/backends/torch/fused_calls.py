"""Calls that do several ONNX nodes' work on a GPU, and how the fastest form of each is chosen."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.backends.torch import measure
from optframe.types import TensorInfo

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Linear:
    """x @ w + bias + other, then Relu if asked; x (..., K), w (K, N), bias (N), other of the result's shape."""

    relu: bool = False
    form: str = "cublas"

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        flat = None if other is None else other.reshape(-1, w.shape[1])
        if self.form == "cublas":
            result = _cublas(rows, w, bias, flat, self.relu)
        else:
            from optframe.backends.torch.triton_linear import linear

            result = linear(
                self.form, rows.contiguous(), w, bias, None if flat is None else flat.contiguous(), self.relu
            )
        return result.reshape(*x.shape[:-1], w.shape[1])


@dataclass(frozen=True)
class ParallelLinear:
    """Products of one x (..., K) with several matrices w (B, K, N), plus bias (B, N) or other (B, rows, N), then Relu.

    Returns B tensors (..., N), one behind the other in memory.
    """

    relu: bool = False
    form: str = "cublas"

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None = None, other: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], w.shape[-1])
        if self.form != "cublas":
            from optframe.backends.torch.triton_linear import linear

            return tuple(y.reshape(shape) for y in linear(self.form, rows.contiguous(), w, bias, other, self.relu))
        parts = [(w[i], None if bias is None else bias[i], None if other is None else other[i]) for i in range(len(w))]
        return tuple(_cublas(rows, *part, self.relu).reshape(shape) for part in parts)


def _cublas(x: Tensor, w: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> Tensor:
    """cuBLAS adds a bias and applies Relu itself; a second operand takes calls of its own."""
    if bias is None:
        y = torch.mm(x, w) if other is None else torch.addmm(other, x, w)
        return y.relu_() if relu else y
    if other is None:
        return torch._addmm_activation(bias, x, w) if relu else torch.addmm(bias, x, w)
    y = torch.addmm(bias, x, w).add_(other)
    return y.relu_() if relu else y


@dataclass(frozen=True)
class Convolution:
    """A convolution with bias, then plus `other`, then Relu, as far as asked; 4-D tensors with channels last."""

    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilations: tuple[int, ...]
    group: int
    relu: bool = False
    form: str = "cudnn"

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
        sizes = (self.strides, self.padding, self.dilations)
        if self.form == "fused":
            if other is None:
                return torch.cudnn_convolution_relu(x, w, bias, *sizes, self.group)
            return torch.cudnn_convolution_add_relu(x, w, other, 1.0, bias, *sizes, self.group)
        if self.form == "cudnn":
            y = torch.convolution(x, w, bias, *sizes, False, (0, 0), self.group)
            y = y if other is None else y.add_(other)
            return y.relu_() if self.relu else y
        return self._as_product(x, w, bias, other)

    def _as_product(self, x: Tensor, w: Tensor, bias: Tensor | None, other: Tensor | None) -> Tensor:
        """A 1x1 convolution is a product of matrices, a strided one of fewer rows."""
        if self.strides != (1, 1):
            x = x[:, :, :: self.strides[0], :: self.strides[1]]
        linear = Linear(self.relu, self.form)
        turned = None if other is None else other.permute(0, 2, 3, 1)
        y = linear(x.permute(0, 2, 3, 1), w.flatten(1).t(), bias, turned)
        return y.permute(0, 3, 1, 2)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _product_forms(dtype: str) -> list[str]:
    if dtype not in HALF or not _has_triton():
        return ["cublas"]
    from optframe.backends.torch.triton_linear import CONFIGS

    return ["cublas", *CONFIGS]


@cache
def choose_linear(x: TensorInfo, w: TensorInfo, bias: bool, other: bool, relu: bool, transposed: bool) -> Linear:
    """Return the fastest form for tensors such as these; `transposed` says that w's columns are contiguous."""
    forms = {form: Linear(relu, form) for form in _product_forms(x.dtype)}
    if len(forms) == 1 or not x.shape:
        return forms["cublas"]
    given = measure.random_like(x.shape, x.dtype)
    weight = measure.random_like(w.shape[::-1], w.dtype).t() if transposed else measure.random_like(w.shape, w.dtype)
    vector = measure.random_like(w.shape[1:], w.dtype) if bias else None
    matrix = measure.random_like((*x.shape[:-1], w.shape[1]), x.dtype) if other else None
    calls = {name: lambda call=call: call(given, weight, vector, matrix) for name, call in forms.items()}
    return forms[measure.fastest(calls, "cublas")]


@cache
def choose_parallel(x: TensorInfo, w: TensorInfo, bias: bool, other: bool, relu: bool) -> ParallelLinear:
    """Return the fastest form for tensors such as these; the products one by one are among them."""
    forms = {form: ParallelLinear(relu, form) for form in _product_forms(x.dtype)}
    given, weight = measure.random_like(x.shape, x.dtype), measure.random_like(w.shape, w.dtype)
    count, rows, columns = w.shape[0], math.prod(x.shape[:-1]), w.shape[-1]
    vectors = measure.random_like((count, columns), w.dtype) if bias else None
    matrices = measure.random_like((count, rows, columns), w.dtype) if other else None
    calls = {name: lambda call=call: call(given, weight, vectors, matrices) for name, call in forms.items()}
    return forms[measure.fastest(calls, "cublas")]


@cache
def choose_convolution(
    x: TensorInfo, w: TensorInfo, y: TensorInfo, bias: bool, other: bool, relu: bool, geometry: tuple[Any, ...]
) -> Convolution:
    """Return the fastest form for tensors such as these; `geometry` is strides, padding, dilations and group."""
    names = ["cudnn", *(["fused"] if relu else [])]
    strides, padding, dilations, group = geometry
    if w.shape[2:] == (1, 1) and group == 1 and not any(padding):
        names += _product_forms(x.dtype)
    forms = {name: Convolution(strides, padding, dilations, group, relu, name) for name in names}
    given, weight = (measure.random_like(info.shape, info.dtype, channels_last=True) for info in (x, w))
    vector = measure.random_like(w.shape[:1], w.dtype) if bias else None
    tensor = measure.random_like(y.shape, y.dtype, channels_last=True) if other else None
    calls = {name: lambda call=call: call(given, weight, vector, tensor) for name, call in forms.items()}
    return forms[measure.fastest(calls, "cudnn")]


@dataclass(frozen=True)
class Attention:
    """softmax(scale q k + mask) v with k given transposed, (..., D, keys), as ONNX's MatMul wants it."""

    scale: float = 1.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, attn_mask=mask, scale=self.scale)
