"""Pooling, normalisation and resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.backends.torch.dtypes import wide
from optframe.backends.torch.ops_linear import auto_pad, pad_spatial, resolve_pads
from optframe.backends.torch.registry import Call, OpNode, enter_calls, op


def _max_pool1d(x: Tensor, kernel: list[int], strides: list[int], padding: list[int], dilations: list[int]) -> Tensor:
    """Integers go as images of one row, since torch has them in images alone."""
    if x.is_floating_point():
        return F.max_pool1d(x, kernel, strides, padding, dilations)
    image = F.max_pool2d(x.unsqueeze(-2), [1, *kernel], [1, *strides], [0, *padding], [1, *dilations])
    return image.squeeze(-2)


_MAX_POOLS: dict[int, Callable[..., Tensor]] = {1: _max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _kernel(node: OpNode) -> list[int]:
    """Return a pool's window; one of more axes than torch's, or unknown padding, is named before anything runs."""
    auto_pad(node)
    kernel = list(node.get("kernel_shape"))
    if len(kernel) not in _MAX_POOLS:
        raise node.unsupported(f"a window of {len(kernel)} axes")
    return kernel


def _average(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    """Return the means of windows; on a CPU torch has none of volumes in 16 bits."""
    volume = len(kernel) == 3 and x.device.type == "cpu"
    return _AVERAGE_POOLS[len(kernel)](wide(x) if volume else x, kernel, strides).to(x.dtype)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


enter_calls(
    {
        "GlobalAveragePool": lambda x: torch.mean(x, _spatial(x), keepdim=True),
        "GlobalMaxPool": lambda x: torch.amax(x, _spatial(x), keepdim=True),
    }
)


def _ceil_pads(
    node: OpNode, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the pads with what ceil_mode adds behind, so that no window starts in the padding."""
    around = resolve_pads(node, x.shape[2:], kernel)
    if not node.get("ceil_mode", 0):
        return around
    for i, (before, after) in enumerate(around):
        padded, reach = x.shape[2 + i] + before + after, (kernel[i] - 1) * dilations[i] + 1
        count = -(-(padded - reach) // strides[i]) + 1
        if (count - 1) * strides[i] >= x.shape[2 + i] + before:
            count -= 1
        around[i] = (before, max(after, (count - 1) * strides[i] + reach - x.shape[2 + i] - before))
    return around


@op("MaxPool")
def _max_pool(node: OpNode) -> Call:
    if node.outputs > 1:
        raise node.unsupported("an output of indices")
    kernel = _kernel(node)
    rank = len(kernel)
    strides, dilations = list(node.get("strides") or [1] * rank), list(node.get("dilations") or [1] * rank)

    def max_pool(x: Tensor) -> Tensor:
        around = _ceil_pads(node, x, kernel, strides, dilations)
        small = all(before == after and 2 * before <= k for (before, after), k in zip(around, kernel, strict=True))
        if not small:
            lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            x, around = pad_spatial(x, around, lowest), [(0, 0)] * rank
        return _MAX_POOLS[rank](x, kernel, strides, [before for before, _ in around], dilations)

    return max_pool


@op("AveragePool")
def _average_pool(node: OpNode) -> Call:
    kernel = _kernel(node)
    strides = list(node.get("strides") or [1] * len(kernel))
    _refuse_dilations(node)

    def average_pool(x: Tensor) -> Tensor:
        around = _ceil_pads(node, x, kernel, strides, [1] * len(kernel))
        total = _average(pad_spatial(x, around), kernel, strides)
        if not any(map(any, around)):
            return total
        ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        if node.get("count_include_pad", 0):
            ones = pad_spatial(ones, resolve_pads(node, x.shape[2:], kernel), 1.0)
            around = [(0, (size - inner)) for size, inner in zip(_padded(x, around), ones.shape[2:], strict=True)]
        return total / _average(pad_spatial(ones, around), kernel, strides)

    return average_pool


def _refuse_dilations(node: OpNode) -> None:
    if any(dilation != 1 for dilation in node.get("dilations") or ()):
        raise node.unsupported("dilations")


def _padded(x: Tensor, around: Sequence[tuple[int, int]]) -> list[int]:
    return [size + before + after for size, (before, after) in zip(x.shape[2:], around, strict=True)]


@op("LpPool", "GlobalLpPool")
def _lp_pool(node: OpNode) -> Call:
    p = node.get("p", 2)
    if node.op_type == "GlobalLpPool":
        return lambda x: (torch.sum(_power(x, p), _spatial(x), keepdim=True) ** (1 / p)).to(x.dtype)
    kernel = _kernel(node)
    strides = list(node.get("strides") or [1] * len(kernel))
    _refuse_dilations(node)

    def lp_pool(x: Tensor) -> Tensor:
        around = _ceil_pads(node, x, kernel, strides, [1] * len(kernel))
        powers = pad_spatial(_power(x, p), around)
        return torch.pow(_average(powers, kernel, strides) * math.prod(kernel), 1 / p).to(x.dtype)

    return lp_pool


def _power(x: Tensor, p: float) -> Tensor:
    return torch.abs(wide(x)) ** p


@op("BatchNormalization")
def _batch_normalization(node: OpNode) -> Call:
    if node.get("training_mode", 0) or node.outputs > 1:
        raise node.unsupported("training")
    if not node.get("spatial", 1):
        raise node.unsupported("statistics for each element (spatial = 0)")
    epsilon = node.get("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)

    return normalize


@op("InstanceNormalization")
def _instance_normalization(node: OpNode) -> Call:
    epsilon = node.get("epsilon", 1e-5)
    # F.group_norm refuses groups of one element
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@op("GroupNormalization")
def _group_normalization(node: OpNode) -> Call:
    groups, epsilon = node.get("num_groups"), node.get("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Before opset 21 there was one scale a group."""
        if scale.shape[0] != x.shape[1]:
            scale, bias = (p.repeat_interleave(x.shape[1] // groups) for p in (scale, bias))
        return torch.group_norm(x, groups, scale, bias, epsilon)

    return normalize


@op("LayerNormalization")
def _layer_normalization(node: OpNode) -> Call:
    if node.outputs > 1:
        raise node.unsupported("outputs of mean and deviation")
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis % x.ndim :]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, shape, scale, bias, epsilon)
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    return normalize


@op("RMSNormalization")
def _rms_normalization(node: OpNode) -> Call:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.ndim, x.ndim))
        data = wide(x)
        return (data * torch.rsqrt(torch.mean(data * data, axes, keepdim=True) + epsilon)).to(x.dtype) * scale

    return normalize


@op("LpNormalization")
def _lp_normalization(node: OpNode) -> Call:
    def normalize(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return normalize


@op("MeanVarianceNormalization")
def _mean_variance_normalization(node: OpNode) -> Call:
    axes = tuple(node.get("axes") or (0, 2, 3))

    def normalize(x: Tensor) -> Tensor:
        data = wide(x)
        deviation = data - torch.mean(data, axes, keepdim=True)
        return (deviation / (torch.sqrt(torch.mean(deviation * deviation, axes, keepdim=True)) + 1e-9)).to(x.dtype)

    return normalize


@op("LRN")
def _local_response_normalization(node: OpNode) -> Call:
    size, alpha = node.get("size"), node.get("alpha", 1e-4)
    beta, bias = node.get("beta", 0.75), node.get("bias", 1.0)

    def normalize(x: Tensor) -> Tensor:
        """The window of `size` channels lies (size - 1) // 2 before and the rest behind."""
        before = (size - 1) // 2
        squares = F.pad((x * x).unsqueeze(1), [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
        sums = squares.unfold(2, size, 1).sum(-1).squeeze(1)
        return x / torch.pow(bias + alpha / size * sums, beta)

    return normalize


@op("GridSample")
def _grid_sample(node: OpNode) -> Call:
    mode = node.choice("mode", "bilinear", "bicubic", "nearest", "linear", "cubic")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding = node.choice("padding_mode", "zeros", "border", "reflection")
    corners = bool(node.get("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, corners)
