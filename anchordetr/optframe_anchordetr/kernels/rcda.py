"""Launch rule of row-column decoupled attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from optframe.types import Defines, KernelLaunch, TensorInfo
from optframe_anchordetr.kernels.checks import (
    CUDA_TYPES,
    INT32_MAX,
    ITEM_BYTES,
    cdiv,
    pad,
    require,
    require_float,
    require_same,
)

SHARED_BYTES = 48 * 1024
"""What a block gets without a special request, which an ahead-of-time TensorRT plugin cannot make."""

_OP = "RCDA"

_ENOUGH_BLOCKS = 132
"""So many large blocks fill a large GPU (an H200 has 132 multiprocessors); small blocks do better where fewer come."""

_MANY_QUERIES, _FEW_QUERIES = 16, 8
"""Queries of a warp on the general path: many make more of each value that is read, if shared memory holds them."""

_MOST_GROUPS = 24
"""Groups of 8 columns, times tiles, whose row weights a warp's registers hold without spilling: 192 columns."""


@dataclass(frozen=True)
class RCDASizes:
    """Sizes of one row-column decoupled attention: queries of an image, keys of a column and of a row."""

    images: int
    queries: int
    height: int
    width: int
    heads: int
    head_size: int


def rcda_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> KernelLaunch:
    """Return the launch for out[q] = sum_y A_col[q, y] * sum_x A_row[q, x] * v[y, x], for each image and head.

    Inputs q_row (N, L, C), q_col (N, L, C), both projected and scaled, k_row (N, w, C), k_col (N, h, C),
    v (N, h, w, C), optional row mask (N, w) and column mask (N, h), bool, true where padded (None or left out where
    absent). Output like q_row. Queries and value may have other axes in front of C that hold as many rows. Attributes
    num_heads, and allow_tf32: whether factors in float32 may be rounded to TF32. One dtype for all but the masks. A_row
    and A_col are softmaxes over w and h; one whose keys are all masked gives NaN. Heads of 32 channels in float16,
    bfloat16 or TF32 use tensor cores with float32 accumulation, as far as registers and shared memory reach; all else
    float32 arithmetic.

    Raises:
        InputError: shapes, dtypes or num_heads do not fit, or h + w is beyond the kernel.
    """
    sizes, common = _checked(inputs, outputs, attributes)
    path = _tensor_cores(sizes, _multiplied(outputs[0].dtype, attributes)) or _general(sizes)
    return path.launch(sizes, (*common, *path.defines()))


def rcda_reuse(
    inputs: Sequence[TensorInfo | None],
    outputs: Sequence[TensorInfo],
    attributes: Mapping[str, object],
    defines: Defines,
) -> KernelLaunch:
    """Return the launch, as `rcda_launch` does, of the kernel that has these `defines`: one for wider and higher maps.

    Raises:
        InputError: the call does not fit the op or this kernel.
    """
    sizes, common = _checked(inputs, outputs, attributes)
    path = _path_of(dict(defines), _multiplied(outputs[0].dtype, attributes))
    require((*common, *path.defines()) == defines, f"{_OP}: the kernel is one for other tensors or heads")
    require(path.fits(sizes), f"{_OP}: {sizes.height} x {sizes.width} is too large for this kernel")
    return path.launch(sizes, defines)


def rcda_sizes(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> RCDASizes:
    """Return the sizes once all shapes and dtypes are known to fit each other; `inputs` has all seven entries.

    The keys (N, w, C) and (N, h, C) say what the rows of queries and value are, whatever axes those have.

    Raises:
        InputError: they do not fit, or num_heads does not divide C.
    """
    q_row, q_col, k_row, k_col, v = (info for info in inputs[:5] if info is not None)  # `pad` saw that all are there
    require(len(k_row.shape) == 3, f"{_OP}: k_row has shape {list(k_row.shape)}, but must be (N, w, C)")
    require(len(k_col.shape) == 3, f"{_OP}: k_col has shape {list(k_col.shape)}, but must be (N, h, C)")
    (images, width, channels), height = k_row.shape, k_col.shape[1]
    require_same(_OP, "k_col", k_col, TensorInfo((images, height, channels), k_row.dtype))
    queries = _rows("q_row", q_row, k_row, images)
    require_same(_OP, "q_col", q_col, q_row)
    positions = _rows("v", v, k_row, images)
    keys = f"{width} keys of k_row times {height} of k_col"
    fits = positions == height * width or not images
    require(fits, f"{_OP}: v has {positions} rows an image, which are not {keys}")
    for name, mask, length in (("row", inputs[5], width), ("column", inputs[6], height)):
        if mask is not None:
            require_same(_OP, f"the {name} mask", mask, TensorInfo((images, length), "bool"))
    heads = attributes.get("num_heads")
    divides = isinstance(heads, int) and heads > 0 and channels > 0 and channels % heads == 0
    require(divides, f"{_OP}: num_heads is {heads!r}, but must divide the {channels} channels")
    assert isinstance(heads, int)
    return RCDASizes(images, queries, height, width, heads, channels // heads)


def _rows(name: str, info: TensorInfo, keys: TensorInfo, images: int) -> int:
    """Return how many rows of C channels `info` has for each image."""
    fits = len(info.shape) > 1 and info.shape[-1] == keys.shape[-1]
    expected = f"{keys.dtype} (..., {keys.shape[-1]})"
    actual = f"{info.dtype}{list(info.shape)}"
    require(fits and info.dtype == keys.dtype, f"{_OP}: {name} is {actual}, but must be {expected} as the keys are")
    rows = math.prod(info.shape[:-1])
    require(rows % max(images, 1) == 0, f"{_OP}: {name} has {rows} rows, which {images} images cannot share")
    return rows // max(images, 1)


def _checked(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, object]
) -> tuple[RCDASizes, Defines]:
    """Return the sizes of what the kernels can do, and the defines that all of them have for such tensors."""
    given = pad(_OP, inputs, 5, 7)
    require(len(outputs) == 1, f"{_OP} has one output")
    sizes = rcda_sizes(given, attributes)
    q_row = given[0]
    assert q_row is not None
    require_float(_OP, "q_row", q_row)
    require_same(_OP, "the output", outputs[0], q_row)
    require(
        sizes.height > 0 and sizes.width > 0, f"{_OP}: v needs a row and a column, not {sizes.height} x {sizes.width}"
    )
    most = max(sizes.images, sizes.heads)
    require(most <= 65535, f"{_OP}: a launch takes 65535 images and heads at most")
    channels = sizes.heads * sizes.head_size
    require(
        sizes.queries * channels <= INT32_MAX, f"{_OP}: {sizes.queries} queries of {channels} channels are too many"
    )
    defines = {
        "RCDA_TYPE": CUDA_TYPES[q_row.dtype],
        "RCDA_HEADS": sizes.heads,
        "RCDA_HEAD_SIZE": sizes.head_size,
        "RCDA_ROW_MASK": int(given[5] is not None),
        "RCDA_COLUMN_MASK": int(given[6] is not None),
    }
    return sizes, _texts(defines)


def _multiplied(dtype: str, attributes: Mapping[str, object]) -> str | None:
    """Return the dtype if tensor cores may multiply it, float32 as TF32; else None."""
    allowed = attributes.get("allow_tf32", 0)
    require(allowed in (0, 1), f"{_OP}: allow_tf32 is {allowed!r}, but must be 0 or 1")
    return dtype if dtype != "float32" or allowed else None


def _texts(defines: Mapping[str, object]) -> Defines:
    return tuple((name, str(value)) for name, value in defines.items())


class _Path(Protocol):
    """One of the kernel's two ways to compute, with all that it is compiled for."""

    def defines(self) -> Defines: ...

    def fits(self, sizes: RCDASizes) -> bool:
        """Say whether a kernel compiled so can do these sizes."""
        ...

    def launch(self, sizes: RCDASizes, defines: Defines) -> KernelLaunch:
        """Return the launch of the kernel with all its `defines`."""
        ...


@dataclass(frozen=True)
class _TensorCores:
    """Warps of `tiles` times 16 queries, `stages` rows of V at hand, up to `groups` times 8 columns of `dtype`."""

    tiles: int
    stages: int
    groups: int
    dtype: str
    warps: int = 4

    @property
    def queries(self) -> int:
        return self.warps * self.tiles * 16

    def shared_bytes(self, height: int) -> int:
        """Rows of V, column keys and column weights, those padded against bank conflicts."""
        head_bytes = 32 * ITEM_BYTES[self.dtype]
        return self.stages * self.groups * 8 * head_bytes + cdiv(height, 8) * 8 * (
            head_bytes + (self.queries // 2 + 4) * 4
        )

    def fits(self, sizes: RCDASizes) -> bool:
        registers = cdiv(sizes.width, 8) <= self.groups and self.groups * self.tiles <= _MOST_GROUPS
        return registers and self.shared_bytes(sizes.height) <= SHARED_BYTES

    def defines(self) -> Defines:
        return _texts(
            {
                "RCDA_TENSOR_CORES": 1,
                "RCDA_BFLOAT16": int(self.dtype == "bfloat16"),
                "RCDA_TF32": int(self.dtype == "float32"),
                "RCDA_WARPS": self.warps,
                "RCDA_TILES": self.tiles,
                "RCDA_STAGES": self.stages,
                "RCDA_WIDTH_GROUPS": self.groups,
            }
        )

    def launch(self, sizes: RCDASizes, defines: Defines) -> KernelLaunch:
        return _launch(sizes, defines, self.warps, self.queries, self.shared_bytes(sizes.height))


@dataclass(frozen=True)
class _General:
    """Any dtype and head size: `warps` of `queries` each, whose weights lie in shared memory."""

    warps: int
    queries: int

    def shared_bytes(self, sizes: RCDASizes) -> int:
        return self.warps * self.queries * _query_bytes(sizes)

    def fits(self, sizes: RCDASizes) -> bool:
        return self.shared_bytes(sizes) <= SHARED_BYTES

    def defines(self) -> Defines:
        return _texts({"RCDA_TENSOR_CORES": 0, "RCDA_WARPS": self.warps, "RCDA_QUERIES": self.queries})

    def launch(self, sizes: RCDASizes, defines: Defines) -> KernelLaunch:
        return _launch(sizes, defines, self.warps, self.queries * self.warps, self.shared_bytes(sizes))


def _query_bytes(sizes: RCDASizes) -> int:
    """Return the bytes of a query's weights."""
    return (sizes.height + sizes.width) * 4


def _tensor_cores(sizes: RCDASizes, dtype: str | None) -> _TensorCores | None:
    """Return the first path that registers and shared memory hold, of those measured best on an H200; None if none.

    They were measured with 16-bit factors.
    """
    if dtype is None or sizes.head_size != 32:
        return None
    large_blocks = cdiv(sizes.queries, 128) * sizes.heads * sizes.images
    for tiles in (2, 1) if large_blocks >= _ENOUGH_BLOCKS else (1,):
        for stages in (3, 2):
            path = _TensorCores(tiles, stages, cdiv(sizes.width, 8), dtype)
            if path.fits(sizes):
                return path
    return None


def _general(sizes: RCDASizes) -> _General:
    """Return the path with as many queries and warps as shared memory holds: one for all shapes up to h + w = 192."""
    most = SHARED_BYTES // 4 // _FEW_QUERIES
    require(sizes.height + sizes.width <= most, f"{_OP}: h + w is {sizes.height + sizes.width}, but {most} is the most")
    queries = _MANY_QUERIES if _MANY_QUERIES * _query_bytes(sizes) <= SHARED_BYTES else _FEW_QUERIES
    return _General(min(4, SHARED_BYTES // (queries * _query_bytes(sizes))), queries)


def _path_of(defines: Mapping[str, str], dtype: str | None) -> _Path:
    """Return the path that a kernel with these defines takes, on tensor cores if they may multiply a `dtype`."""

    def number(name: str) -> int:
        return int(defines.get(name, "0"))

    if number("RCDA_TENSOR_CORES") and dtype is not None:
        names = ("RCDA_TILES", "RCDA_STAGES", "RCDA_WIDTH_GROUPS")
        tiles, stages, groups = map(number, names)
        return _TensorCores(tiles, stages, groups, dtype, number("RCDA_WARPS"))
    return _General(number("RCDA_WARPS"), number("RCDA_QUERIES"))


def _launch(sizes: RCDASizes, defines: Defines, warps: int, queries: int, shared_bytes: int) -> KernelLaunch:
    """Return the launch for blocks of `warps` that take `queries` together."""
    grid = (cdiv(sizes.queries, queries), sizes.heads, sizes.images)
    return KernelLaunch(
        "rcda", defines, grid, (warps * 32, 1, 1), shared_bytes, (sizes.queries, sizes.height, sizes.width)
    )
