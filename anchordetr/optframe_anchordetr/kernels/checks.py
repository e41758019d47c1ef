"""What the launch rules share: checks of tensors and attributes, and C++ names of dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optframe.errors import InputError
from optframe.types import TensorInfo

CUDA_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
"""C++ type of each float dtype that the kernels take."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

INT32_MAX = 2**31 - 1


def pad(op: str, inputs: Sequence[TensorInfo | None], required: int, total: int) -> list[TensorInfo | None]:
    """Return `inputs` filled up with None for optional ones that were left out at the end."""
    present = sum(info is not None for info in inputs[:required])
    if present != required or len(inputs) > total:
        raise InputError(f"{op} takes {required} to {total} inputs, the first {required} of them always")
    return [*inputs, *[None] * (total - len(inputs))]


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)


def require_float(op: str, name: str, info: TensorInfo) -> None:
    """Raise InputError unless the kernels can read the dtype."""
    require(info.dtype in CUDA_TYPES, f"{op}: {name} is {info.dtype}, but must be one of {', '.join(CUDA_TYPES)}")


def require_same(op: str, name: str, info: TensorInfo, expected: TensorInfo) -> None:
    """Raise InputError unless `info` has the expected shape and dtype."""
    require(
        info == expected,
        f"{op}: {name} is {info.dtype}{list(info.shape)}, but must be {expected.dtype}{list(expected.shape)}",
    )


def float_attribute(op: str, attributes: Mapping[str, object], name: str, default: float) -> str:
    """Return a finite, non-negative float attribute as a C++ literal."""
    value = attributes.get(name, default)
    ok = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    require(ok, f"{op}: the attribute {name} is {value!r}, but must be a number from 0 up")
    return f"{float(value)!r}f"  # type: ignore[arg-type]


def cdiv(value: int, divisor: int) -> int:
    """Return the quotient rounded up."""
    return -(-value // divisor)
