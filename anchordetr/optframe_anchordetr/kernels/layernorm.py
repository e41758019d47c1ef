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

_WORD = 16
"""Bytes of an access, where columns and pointers allow."""

_MOST_COLUMNS = 2**30
"""The kernel counts columns in 32 bits, and up to a step past the end of a row."""

_WARP_COLUMNS = 768
"""Rows up to this are done by a warp, and several by a block."""

_MOST_VALUES = 32
"""Elements of a row that a thread keeps in registers; longer rows are read twice."""

_EARLY_BYTES = 4096
"""The parameters of longer rows are loaded after the statistics, since they take registers that hide latency; not where
accesses are narrower than a word."""

_BLOCK = 128
"""Threads of a block that takes several rows: small, since small blocks spread evenly and leave early."""

_ONCE_BYTES = 2**24
"""A matrix from this size on counts as too large for caches: with its output it takes more than half of an H200's."""


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
    require(columns <= _MOST_COLUMNS, f"{op}: {columns} columns are more than the {_MOST_COLUMNS} that a kernel takes")
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
    """Return who normalises a row of `columns`, and how; measured best on an H100 for 256 to 16384 columns.

    A warp or a part of it does a short row, and a block a longer one: a thread for every two words, at most 512, or 256
    where accesses are narrower. 1024 threads do a row that is read twice.
    """
    row_bytes, vector = columns * item_bytes, math.gcd(columns, _WORD // item_bytes)
    words, whole = cdiv(row_bytes, _WORD), vector * item_bytes == _WORD
    wanted = min(words, 32) if columns <= _WARP_COLUMNS else min(cdiv(words, 2), 512 if whole else 256)
    lanes = 1 << (wanted - 1).bit_length()
    groups = max(_BLOCK // lanes, 1) if lanes <= 32 else 1
    values = cdiv(columns, lanes * vector) * vector
    long, early = values > _MOST_VALUES, row_bytes <= _EARLY_BYTES or not whole
    if long:
        lanes, groups = 1024, 1
    return {
        "LN_COLUMNS": columns,
        "LN_VECTOR": vector,  # elements an access
        "LN_LANES": lanes,
        "LN_GROUPS": groups,
        "LN_BLOCKS": max(_resident(values * 3 if early else values, whole) // (lanes * groups), 1),
        "LN_LONG": int(long),
        "LN_EARLY": int(early),
        "LN_ONCE_ROWS": cdiv(_ONCE_BYTES, row_bytes),
    }


def _resident(floats: int, whole: bool) -> int:
    """Return the threads that a multiprocessor is to hold at least, by the numbers that each keeps in registers.

    The compiler, left to itself, takes more registers, and fewer rows hide each other's latency.
    """
    if not whole or floats > 48:
        return 640
    return 1536 if floats <= 24 else 1024
