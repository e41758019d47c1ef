"""Launch rules of layer normalisation, plain and after a residual addition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optframe.types import KernelLaunch, TensorInfo
from optframe_anchordetr.kernels.checks import (
    CUDA_TYPES,
    INT32_MAX,
    ITEM_BYTES,
    cdiv,
    float_attribute,
    pad,
    require,
    require_float,
    require_same,
)

LONGEST_IN_REGISTERS = 8192
"""Rows of more columns are read twice instead of being kept in registers."""

_BLOCK = 64
"""Threads of a block that takes several rows: small, since small blocks spread evenly and leave early."""


def layernorm_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> KernelLaunch:
    """Return the launch for y = (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Inputs x (..., C), optional scale (C) and bias (C) of any float dtypes (None or left out where absent); output y
    like x; attribute epsilon (1e-5). Statistics are float32. Outputs must not overlap inputs.

    Raises:
        InputError: shapes, dtypes or epsilon do not fit.
    """
    x, scale, bias = pad("LayerNorm", inputs, 1, 3)
    assert x is not None
    require(len(outputs) == 1, "LayerNorm has one output")
    return _launch("LayerNorm", "layernorm", x, scale, bias, outputs, attributes)


def skip_layernorm_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> KernelLaunch:
    """Return the launch for sum = x + skip, rounded to x's dtype, and y = the normalised sum.

    Inputs x (..., C), skip like x, optional scale (C), bias (C); outputs y and sum like x; else as `layernorm_launch`.

    Raises:
        InputError: shapes, dtypes or epsilon do not fit.
    """
    x, skip, scale, bias = pad("SkipLayerNorm", inputs, 2, 4)
    assert x is not None
    assert skip is not None
    require(len(outputs) == 2, "SkipLayerNorm has two outputs, y and sum")
    require_same("SkipLayerNorm", "skip", skip, x)
    return _launch("SkipLayerNorm", "skip_layernorm", x, scale, bias, outputs, attributes)


def _launch(
    op: str,
    entry: str,
    x: TensorInfo,
    scale: TensorInfo | None,
    bias: TensorInfo | None,
    outputs: Sequence[TensorInfo],
    attributes: Mapping[str, object],
) -> KernelLaunch:
    require_float(op, "x", x)
    require(bool(x.shape) and x.shape[-1] > 0, f"{op}: x needs a last axis with at least one column")
    for name, parameter in (("scale", scale), ("bias", bias)):
        if parameter is not None:
            require_float(op, name, parameter)
            require_same(op, name, parameter, TensorInfo(x.shape[-1:], parameter.dtype))
    for output in outputs:
        require_same(op, "an output", output, x)
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    require(rows <= INT32_MAX, f"{op}: {rows} rows are more than the {INT32_MAX} that a launch takes")
    geometry = _geometry(columns, ITEM_BYTES[x.dtype])
    defines = (
        ("LN_TYPE", CUDA_TYPES[x.dtype]),
        ("LN_SCALE_TYPE", CUDA_TYPES[scale.dtype if scale else "float32"]),
        ("LN_BIAS_TYPE", CUDA_TYPES[bias.dtype if bias else "float32"]),
        ("LN_SKIP", str(int(entry == "skip_layernorm"))),
        ("LN_SCALE", str(int(scale is not None))),
        ("LN_BIAS", str(int(bias is not None))),
        ("LN_EPSILON", float_attribute(op, attributes, "epsilon", 1e-5)),
        *((name, str(value)) for name, value in geometry.items()),
    )
    threads = geometry["LN_LANES"] * geometry["LN_GROUPS"]
    blocks = cdiv(rows, geometry["LN_GROUPS"])
    return KernelLaunch(entry, defines, (blocks, 1, 1), (threads, 1, 1), 0, (rows,))


def _geometry(columns: int, item_bytes: int) -> dict[str, int]:
    """Return who normalises a row of `columns`."""
    lanes = _lanes(columns, item_bytes)
    return {
        "LN_COLUMNS": columns,
        "LN_VECTOR": math.gcd(columns, 16 // item_bytes),  # elements an access: 16 bytes where the columns allow
        "LN_LANES": lanes,
        "LN_GROUPS": max(_BLOCK // lanes, 1),
        "LN_LONG": int(columns > LONGEST_IN_REGISTERS),
        "LN_EARLY": int(lanes <= 32),  # a warp or less a row has few parameters a thread
    }


def _lanes(columns: int, item_bytes: int) -> int:
    """Return the threads a row: two accesses of 16 bytes each, a power of two within a warp, at most 256 threads.

    Measured best on an H200 for 256 to 4096 columns: one access a thread gives 93 % of a copy's bandwidth, two 98 %.
    """
    if columns > LONGEST_IN_REGISTERS:
        return 1024
    wanted = cdiv(columns * item_bytes, 32)
    return 1 << (wanted - 1).bit_length() if wanted <= 32 else min(cdiv(wanted, 32) * 32, 256)
