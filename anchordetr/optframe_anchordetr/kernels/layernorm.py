"""Launch rules of layer normalisation, plain and after a residual addition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optframe.errors import InputError
from optframe.types import Defines, KernelLaunch, TensorInfo
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

_WARP_WORDS = {1: 128, 2: 96}
"""Rows of so many words in each of one or two inputs are done by a warp, and several by a block."""

_WARP_COLUMNS = 768
"""The same where accesses are narrower than a word."""

_MOST_VALUES = 32
"""Elements of a row that a lane keeps in registers; a block of 1024 lanes reads rows of more twice."""

_LONG_BYTES = 8192
"""Rows from this size on are read twice, a word an access, which costs less than the registers that would hold them."""

_LONG_COLUMNS = 8192
"""Longer rows are kept again, as far as they fit: of float32, a lane would read more than four words twice."""

_EARLY_COLUMNS, _EARLY_BYTES = 1024, 192
"""The parameters of longer rows, or of which a lane needs more bytes, are loaded after the statistics, since they take
registers that hide latency; not where accesses are narrower than a word."""

_BLOCK = 64
"""Threads of a block that takes several rows, or half of them: small blocks spread evenly and leave early."""

_FEW_BLOCKS, _MANY_BLOCKS = 1024, 8192
"""From more small blocks than the first, for each matrix read, half as many large ones do the work: to begin 1000 takes
longer than a microsecond. A matrix without a residual that takes more than the second hides that."""

_LARGE_BYTES = 2**24
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
    return _launch(_plain(inputs, outputs), attributes)


def layernorm_reuse(
    inputs: Sequence[TensorInfo | None],
    outputs: Sequence[TensorInfo],
    attributes: Mapping[str, object],
    defines: Defines,
) -> KernelLaunch:
    """Return the launch, as `layernorm_launch` does, of the kernel that has these `defines`: one for other rows.

    Raises:
        InputError: the call does not fit the op or this kernel.
    """
    return _relaunch(_plain(inputs, outputs), attributes, defines)


def skip_layernorm_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> KernelLaunch:
    """Return the launch for sum = x + skip, rounded to x's dtype, and y = the normalised sum.

    Inputs x (..., C), skip like x, optional scale (C), bias (C); outputs y and sum like x; else as `layernorm_launch`.

    Raises:
        InputError: shapes, dtypes or epsilon do not fit.
    """
    return _launch(_with_skip(inputs, outputs), attributes)


def skip_layernorm_reuse(
    inputs: Sequence[TensorInfo | None],
    outputs: Sequence[TensorInfo],
    attributes: Mapping[str, object],
    defines: Defines,
) -> KernelLaunch:
    """Return what `layernorm_reuse` does, for a call of `skip_layernorm_launch`.

    Raises:
        InputError: the call does not fit the op or this kernel.
    """
    return _relaunch(_with_skip(inputs, outputs), attributes, defines)


class _Call(NamedTuple):
    """A call of an op whose kernel is `entry`, with the numbers of inputs and outputs known to be right."""

    op: str
    entry: str
    x: TensorInfo
    scale: TensorInfo | None
    bias: TensorInfo | None
    outputs: Sequence[TensorInfo]


def _plain(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo]) -> _Call:
    x, scale, bias = pad("LayerNorm", inputs, 1, 3)
    assert x is not None
    require(len(outputs) == 1, "LayerNorm has one output")
    return _Call("LayerNorm", "layernorm", x, scale, bias, outputs)


def _with_skip(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo]) -> _Call:
    x, skip, scale, bias = pad("SkipLayerNorm", inputs, 2, 4)
    assert x is not None
    assert skip is not None
    require(len(outputs) == 2, "SkipLayerNorm has two outputs, y and sum")
    require_same("SkipLayerNorm", "skip", skip, x)
    return _Call("SkipLayerNorm", "skip_layernorm", x, scale, bias, outputs)


def _relaunch(call: _Call, attributes: Mapping[str, object], defines: Defines) -> KernelLaunch:
    for block in (_BLOCK, 2 * _BLOCK):
        launch = _launch(call, attributes, block)
        if launch.defines == defines:
            return launch
    raise InputError(f"{call.op}: the kernel is one for other columns, dtypes, parameters or epsilon")


def _launch(call: _Call, attributes: Mapping[str, object], block: int | None = None) -> KernelLaunch:
    """Return the launch; blocks that take several rows have `block` threads, or as many as are best."""
    op, entry, x, scale, bias, outputs = call
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
    parameter_bytes = sum(ITEM_BYTES[parameter.dtype] for parameter in (scale, bias) if parameter)
    geometry = _geometry(rows, columns, ITEM_BYTES[x.dtype], parameter_bytes, 1 + (entry == "skip_layernorm"), block)
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
    return KernelLaunch(entry, defines, (blocks, 1, 1), (threads, 1, 1), 0, (rows,), overlap=True)


def _geometry(
    rows: int, columns: int, item_bytes: int, parameter_bytes: int, matrices: int, block: int | None
) -> dict[str, int]:
    """Return who normalises a row of `columns` of each of `matrices` inputs, and how.

    How many `rows` there are decides no more than the threads of a block that takes several, where `block` does not, so
    that no result depends on it.

    Measured best on an H200 for 256 to 8192 columns: a lane has two or three words, of all inputs together, or of each
    where rows are read twice; more where a warp does rows up to _WARP_WORDS, or a block of 512 threads longer ones.
    `parameter_bytes` are those of scale and bias together, for one column. Rows that are read twice ask for 2048
    threads a multiprocessor; GPUs that hold 1536 leave such a kernel its registers.
    """
    row_bytes, vector = columns * item_bytes, math.gcd(columns, _WORD // item_bytes)
    whole, short = vector * item_bytes == _WORD, row_bytes < _LONG_BYTES
    lanes = _lanes(columns, cdiv(row_bytes, _WORD), whole, matrices if short else 1)
    values = cdiv(columns, lanes * vector) * vector
    too_long = values > _MOST_VALUES
    long = too_long or (whole and not short and columns <= _LONG_COLUMNS)
    if too_long:
        lanes = 1024
    early = not whole or (columns <= _EARLY_COLUMNS and values * parameter_bytes <= _EARLY_BYTES)
    groups = (block or _block(rows * lanes, matrices)) // lanes if lanes <= 32 else 1
    if long:
        resident = 2048 if values * item_bytes <= 2 * _WORD and matrices == 1 else 1536
    else:
        kept_bytes = item_bytes if lanes <= 32 else 4  # a block's lanes convert what they keep
        held = values * kept_bytes
        if early:
            held += values * parameter_bytes
        elif parameter_bytes > 2 * item_bytes:  # late ones wider than x need more registers than are free by then
            held += vector * parameter_bytes
        resident = _resident(held // 4, lanes, whole)
    return {
        "LN_COLUMNS": columns,
        "LN_VECTOR": vector,  # elements an access
        "LN_LANES": lanes,
        "LN_GROUPS": groups,
        "LN_BLOCKS": max(resident // (lanes * groups), 1),
        "LN_LONG": int(long),
        "LN_EARLY": int(early),
        "LN_LARGE_ROWS": cdiv(_LARGE_BYTES, row_bytes),
    }


def _block(threads: int, matrices: int) -> int:
    """Return the threads of a block that takes several rows, if all rows together take so many."""
    blocks = cdiv(threads, _BLOCK)
    few, many = blocks <= _FEW_BLOCKS * matrices, blocks > _MANY_BLOCKS
    return _BLOCK if few or (many and matrices == 1) else 2 * _BLOCK


def _lanes(columns: int, words: int, whole: bool, matrices: int) -> int:
    """Return the lanes of a row of so many words in each of `matrices`; `whole`: accesses are of words, not less."""
    if not whole:
        return _power_of_two(min(words, 32) if columns <= _WARP_COLUMNS else min(cdiv(words, 2), 256))
    lanes = min(_power_of_two(cdiv(words * matrices, 3)), 32 if words <= _WARP_WORDS[matrices] else 512)
    return lanes if lanes <= 32 else min(lanes, cdiv(words, 32) * 32)  # no warp without a word


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _resident(registers: int, lanes: int, whole: bool) -> int:
    """Return the threads that a multiprocessor is to hold at least, if each keeps so much of a row and its parameters.

    The compiler, left to itself, takes more registers, and fewer rows hide each other's latency; with too few registers
    it loads parameters late. Both cost up to 5 %.
    """
    if not whole or registers > 48 or (registers > 40 and lanes > 32):
        return 640
    if registers > 40:
        return 768
    if registers <= 16:
        return 1536
    if lanes > 32:
        return 1280 if registers <= 32 else 1024
    return 1152 if registers <= 24 else 1024
