"""ONNX dtypes, NumPy arrays and torch tensors, into each other."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from optframe.errors import InputError
from optframe.types import TensorInfo

TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}
"""The dtypes that the backend holds; of the others (strings, 4 and 8 bit floats) torch has none, or no arithmetic."""


def torch_dtype(dtype: ir.DataType | int | None, what: str) -> torch.dtype:
    """Return torch's dtype; `what` names the tensor in the error.

    Raises:
        InputError: torch has none.
    """
    known = None if dtype is None else TORCH_TYPES.get(ir.DataType(dtype))
    if known is None:
        name = "of unknown type" if dtype is None else f"a tensor of {ir.DataType(dtype).name.lower()}"
        raise InputError(f"{what} is {name}, which backend torch does not hold")
    return known


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a CPU tensor with a copy of `array`; bfloat16, which torch does not take from NumPy, goes by its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C", copy=True))


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the tensor, from wherever it is, as an array of its own in host memory."""
    host = tensor.detach().to("cpu", copy=True).contiguous()
    if host.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = host.view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = host.numpy()
    return array


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return 16-bit floats as float32, whose range and digits intermediate results need; other tensors as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def in_float(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in floating point for intermediate results: integers as float64, floats as `wide` has them."""
    return wide(tensor) if tensor.is_floating_point() else tensor.double()


def info(tensor: torch.Tensor) -> TensorInfo:
    """Return shape and dtype as the specs of plugin ops spell them."""
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
