"""Resize and Upsample, one axis after the other: each output element is a weighted sum of a few along the axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optframe.backends.torch.dtypes import in_float
from optframe.backends.torch.registry import Call, OpNode, op

Taps = list[tuple[Tensor, Tensor | None]]
"""(index of the source of each output element, its weight or None for 1) for each of the elements that are summed."""

WHOLE = 1e-6
"""Far above what float64 loses in sums of 16-bit numbers, far below what a weight that is no rounding error makes."""

COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
)
"""Where on the input an output element lies; the default first. ONNX has tf_crop_and_resize besides."""

MOST_TAPS = 64
"""Of so many sizes, which values may choose, a node keeps its taps on a CPU. CUDA graphs read theirs: those stay."""

_Array = np.ndarray[Any, Any]


@op("Resize", host=(1, 2, 3))
def _resize(node: OpNode) -> Call:
    if node.get("antialias", 0) or node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.unsupported("antialiasing or a kept aspect ratio")
    resizer = _Resizer(node)
    if node.opset < 11:
        return lambda x, scales: resizer(x, scales, None)
    return lambda x, roi=None, scales=None, sizes=None: resizer(x, scales, sizes)


@op("Upsample", host=(1,))
def _upsample(node: OpNode) -> Call:
    resizer = _Resizer(node)
    return lambda x, scales=None: resizer(x, torch.tensor(node.get("scales")) if scales is None else scales, None)


class _Resizer:
    """Resizes by a node's attributes, keeping the taps of sizes it has seen on the device that needed them."""

    def __init__(self, node: OpNode) -> None:
        old = node.op_type == "Upsample" or node.opset < 11
        self._mode = node.choice("mode", "nearest", "linear", "cubic")
        self._coordinates = "asymmetric" if old else node.choice("coordinate_transformation_mode", *COORDINATES)
        self._nearest = None if old else node.choice("nearest_mode", *_ROUNDINGS)
        """None: as opset 10 has it, up when the tensor shrinks and down else."""
        self._cubic, self._exclude = node.get("cubic_coeff_a", -0.75), bool(node.get("exclude_outside", 0))
        self._axes = node.get("axes")
        self._taps: dict[tuple[object, ...], Taps] = {}

    def __call__(self, x: Tensor, scales: Tensor | None, sizes: Tensor | None) -> Tensor:
        axes: Sequence[int] = range(x.ndim) if self._axes is None else self._axes
        by_size = sizes is not None and sizes.numel() > 0
        given = sizes if by_size else scales
        assert given is not None, "ONNX asks for scales or sizes"
        dtype = x.dtype
        if self._mode != "nearest":  # the sums of all axes are rounded once
            x = in_float(x)
        for axis, number in zip((axis % x.ndim for axis in axes), given.tolist(), strict=True):
            before = x.shape[axis]
            # ONNX multiplies float32 by float32, which may round to a whole number that the product misses
            after = int(number) if by_size else int(np.floor(np.float32(before) * np.float32(number)))
            scale = after / before if by_size else number
            if scale != 1 or after != before:
                x = _apply(x, axis, self._taps_of(before, after, scale, x))
        return x if x.dtype == dtype else _rounded(x, dtype, cut=self._mode == "linear")

    def _taps_of(self, before: int, after: int, scale: float, x: Tensor) -> Taps:
        key = (before, after, scale, x.device, x.dtype)
        taps = self._taps.get(key)
        if taps is None:
            if x.device.type == "cpu" and len(self._taps) >= MOST_TAPS:
                self._taps.clear()
            taps = self._taps[key] = self._make_taps(before, after, scale, x)
        return taps

    def _make_taps(self, before: int, after: int, scale: float, x: Tensor) -> Taps:
        source = _source(self._coordinates, np.arange(after, dtype=np.float64), before, after, scale)
        if self._mode == "nearest":
            how = self._nearest or ("ceil" if scale < 1 else "floor")
            index = _ROUNDINGS[how](source).clip(0, before - 1)
            return [(torch.from_numpy(index.astype(np.int64)).to(x.device), None)]
        offsets = range(2) if self._mode == "linear" else range(-1, 3)
        floor = np.floor(source)
        if self._mode == "linear":
            weights = [1 - (source - floor), source - floor]
        else:
            weights = [_cubic(source - floor - offset, self._cubic) for offset in offsets]
        places = [floor + offset for offset in offsets]
        if self._exclude:
            inside = [weight * ((place >= 0) & (place < before)) for weight, place in zip(weights, places, strict=True)]
            weights = [weight / sum(inside) for weight in inside]
        return [
            (
                torch.from_numpy(place.clip(0, before - 1).astype(np.int64)).to(x.device),
                torch.from_numpy(weight).to(x.device, x.dtype),
            )
            for place, weight in zip(places, weights, strict=True)
        ]


def _apply(x: Tensor, axis: int, taps: Taps) -> Tensor:
    total: Tensor | None = None
    for index, weight in taps:
        part = x.index_select(axis, index)
        if weight is not None:
            part = part * weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        total = part if total is None else total + part
    assert total is not None
    return total


def _rounded(x: Tensor, dtype: torch.dtype, cut: bool) -> Tensor:
    """Return x in a smaller type: integers end at their limits and are rounded, as ONNX's reference does.

    `cut` cuts off the fraction, as onnxruntime does, unless the rounding of weights alone made it.
    """
    if dtype.is_floating_point:
        return x.to(dtype)
    whole = torch.round(x)
    x = torch.where((x - whole).abs() < WHOLE, whole, torch.trunc(x)) if cut else whole
    limits = torch.iinfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype)


def _source(mode: str, i: _Array, before: int, after: int, scale: float) -> _Array:
    """Return where on the input's axis each output element lies, as the ONNX operator defines it."""
    if mode == "align_corners":
        return i * (before - 1) / (after - 1) if after > 1 else i * 0
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode == "pytorch_half_pixel" and after == 1:
        return i * 0
    shift = 0.0
    if mode == "half_pixel_symmetric":
        shift = before / 2 * (1 - after / (scale * before))
    return shift + (i + 0.5) / scale - 0.5


_ROUNDINGS: dict[str, Callable[[_Array], _Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _cubic(distance: _Array, a: float) -> _Array:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15 with a for -1/2."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
