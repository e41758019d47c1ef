"""The types of PTX as NumPy's, and IEEE arithmetic with the roundings that PTX names.

Registers are bit patterns. Narrow floats are computed in float64: products of two are exact there, and sums are rounded
to odd (Boldo and Melquiond 2008), so that one more rounding, to the type itself, gives what a single one would.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": f"uint{bits}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "tf32": np.float32},
    **{"bf16": np.uint16, "f16x2": np.float16, "bf16x2": np.uint16, "u16x2": np.uint16, "s16x2": np.int16},
}
"""The NumPy dtype of each PTX type; bfloat16 is read by its bits."""

INTEGERS = tuple(name for name in DTYPES if name[0] in "bus" and "x2" not in name and name != "bf16")
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")

UNSIGNED: dict[int, Any] = {size: np.dtype(f"uint{8 * size}").type for size in (1, 2, 4, 8)}
"""The NumPy types of words, by their bytes."""

LANE_BITS = np.int64(1) << np.arange(32, dtype=np.int64)
"""The bit of each lane of a warp in a mask."""


@cache
def width(type_: str) -> int:
    """Return the bits of a type: 32 for a pair of 16."""
    return 1 if type_ == "pred" else 32 if type_.endswith("x2") or type_ == "tf32" else int(type_.lstrip("bfstu"))


@cache
def file_of(type_: str) -> int:
    """Return the register file of a type; 8-bit values lie in registers of 16 bits or more."""
    return max(width(type_), 16) if type_ != "pred" else 1


def widen(bits: Array, type_: str) -> Array:
    """Return float64 values of a view of registers as `type_`."""
    if type_.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return np.asarray(bits, np.float64)


def narrow(values: Array, type_: str, rounding: str = "rn") -> Array:
    """Return float64 `values` (rounded to odd, if at all) in the float type, as the view of its registers holds them.

    `rounding` is rn (to nearest even), rz (to zero), rm (down) or rp (up).
    """
    if type_.startswith("bf16"):
        return _to_bfloat16(values, rounding)
    dtype = DTYPES[type_]
    result = values.astype(dtype)
    return result if rounding == "rn" or type_ == "f64" else _directed(result, values, rounding)


def _directed(nearest: Array, exact: Array, rounding: str) -> Array:
    """Return the neighbours of `exact` on the side that `rounding` asks for, given the nearest."""
    wide = nearest.astype(np.float64)
    down, up = np.array(-np.inf, nearest.dtype), np.array(np.inf, nearest.dtype)
    above, below = wide > exact, wide < exact
    if rounding in ("rm", "rz"):
        nearest = np.where(above & (rounding == "rm" or exact > 0), np.nextafter(nearest, down), nearest)
    if rounding in ("rp", "rz"):
        nearest = np.where(below & (rounding == "rp" or exact < 0), np.nextafter(nearest, up), nearest)
    return nearest


def _to_bfloat16(values: Array, rounding: str) -> Array:
    """Return the bits of float64 values as bfloat16, by way of float32 rounded to zero with a sticky last bit."""
    truncated = np.asarray(_directed(values.astype(np.float32), values, "rz"))
    bits = truncated.view(np.uint32) | (truncated != values).astype(np.uint32)
    if rounding == "rn":
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    elif rounding == "rz":
        rounded = bits
    else:
        away = np.signbit(values) == (rounding == "rm")
        rounded = bits + np.where(away, np.uint32(0xFFFF), np.uint32(0))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def add_odd(x: Array, y: Array) -> Array:
    """Return x + y in float64, rounded to odd: where the sum is inexact, the neighbour whose last bit is set."""
    total = np.asarray(x + y)
    part = total - x
    error = (x - (total - part)) + (y - part)  # exact (Knuth's TwoSum)
    bits = total.view(np.int64)
    adjust = (error != 0) & np.isfinite(error) & np.isfinite(total) & (bits & 1 == 0)
    if not adjust.any():
        return total
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(adjust, bits + step, bits).view(np.float64)


def flush(values: Array) -> Array:
    """Return float32 values with zeros of their sign for subnormal ones, as `.ftz` has it."""
    values = np.asarray(values, np.float32)
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values) if tiny.any() else values


def saturate(values: Array) -> Array:
    """Return values within 0 and 1; 0 for NaN."""
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


def relu(values: Array) -> Array:
    """Return values, 0 for those below; NaN stays."""
    return np.maximum(values, 0.0)


def repeated(byte: int, size: int) -> Any:
    """Return an unsigned word of `size` bytes, each of them `byte`."""
    return UNSIGNED[size](int.from_bytes(bytes([byte]) * size, "little"))


def to_integer(values: Array, type_: str) -> Array:
    """Return integral float values as the integer type: the nearest of its range, 0 for NaN (PTX: of cvt)."""
    limits = np.iinfo(DTYPES[type_])
    below, above = values <= float(limits.min), values >= float(limits.max)
    inner = np.where(below | above | np.isnan(values), 0, values).astype(limits.dtype)
    return np.where(below, limits.dtype.type(limits.min), np.where(above, limits.dtype.type(limits.max), inner))


def round_integral(values: Array, mode: str) -> Array:
    """Return values rounded to integral ones: rni (to nearest even), rzi, rmi or rpi."""
    functions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    return np.asarray(functions[mode](values))
