"""Matrix products and convolutions, in floating point and in integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.backends.torch.registry import Call, OpNode, enter_calls, op


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A GPU has no integer products in torch: there float64 stands in, exact as long as sums are below 2^53."""
    if a.is_floating_point() or a.device.type == "cpu":
        return torch.matmul(a, b)
    product: Tensor = torch.matmul(a.double(), b.double())
    return product.to(a.dtype)


enter_calls({"MatMul": _matmul})


@op("Gemm")
def _gemm(node: OpNode) -> Call:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    turn_a, turn_b = node.get("transA", 0), node.get("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if turn_a else a, b.t() if turn_b else b
        if not a.is_floating_point():
            total = _scaled(_matmul(a, b), alpha)
            return total if c is None else total + _scaled(c, beta)
        if c is None:
            return torch.mm(a, b) if alpha == 1 else alpha * torch.mm(a, b)
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)

    return gemm


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Return integers times a factor, rounded towards 0."""
    return x if factor == 1 else (x * factor).to(x.dtype)


@op("Einsum")
def _einsum(node: OpNode) -> Call:
    equation = node.get("equation").replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands).to(operands[0].dtype)


@op("MatMulInteger")
def _matmul_integer(node: OpNode) -> Call:
    def matmul(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        """A zero point is one number, or one a row of a, one a column of b, as a vector or with all axes."""
        left, right = a.double(), b.double()
        if a_zero is not None:
            left = left - (a_zero.double().unsqueeze(-1) if a_zero.ndim == 1 else a_zero.double())
        if b_zero is not None:
            right = right - b_zero.double()
        return torch.matmul(left, right).to(torch.int32)

    return matmul


def auto_pad(node: OpNode) -> str:
    """Return the attribute, which a translation asks for before anything runs."""
    return node.choice("auto_pad", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


def resolve_pads(node: OpNode, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Return what `auto_pad` or `pads` put before and after each spatial axis."""
    rank = len(kernel)
    auto = auto_pad(node)
    if auto == "VALID":
        return [(0, 0)] * rank
    if auto == "NOTSET":
        pads = node.get("pads") or [0] * (2 * rank)
        return [(pads[i], pads[rank + i]) for i in range(rank)]
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    around = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        around.append(_halves(total, auto))
    return around


def _halves(total: int, auto: str) -> tuple[int, int]:
    """Return what of a total comes before and after; the odd one is after for SAME_UPPER, before for others."""
    small = int(total / 2)  # towards 0 for negative totals as well
    return (small, total - small) if auto == "SAME_UPPER" else (total - small, small)


def pad_spatial(x: Tensor, around: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Return x with its last axes padded."""
    return F.pad(x, [amount for pair in reversed(around) for amount in pair], value=value)


@op("Conv")
def _conv(node: OpNode) -> Call:
    group = node.get("group", 1)
    auto_pad(node)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        around = resolve_pads(node, x.shape[2:], weight.shape[2:])
        if any(before != after for before, after in around):
            x, around = pad_spatial(x, around), [(0, 0)] * rank
        strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
        padding = [before for before, _ in around]
        return torch.convolution(x, weight, bias, strides, padding, dilations, False, [0] * rank, group)

    return conv


@op("ConvInteger")
def _conv_integer(node: OpNode) -> Call:
    conv = _conv(node)

    def conv_integer(x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        """float64 holds the sums of 8 bit products exactly; padding means the zero point, which is 0 after it."""
        data, kernel = x.double(), weight.double()
        if x_zero is not None:
            data = data - x_zero.double()
        if w_zero is not None:
            kernel = kernel - w_zero.double().reshape([-1] + [1] * (kernel.ndim - 1))
        result: Tensor = conv(data, kernel)
        return result.to(torch.int32)

    return conv_integer


@op("ConvTranspose")
def _conv_transpose(node: OpNode) -> Call:
    auto_pad(node)

    def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.ndim - 2
        strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
        extra = list(node.get("output_padding") or [0] * rank)
        around = _transposed_pads(node, x, weight, strides, dilations, extra)
        beyond = any(min(pair) < 0 for pair in around)  # the output is larger than what the kernel reaches
        full = torch.convolution(
            x, weight, None if beyond else bias, strides, [0] * rank, dilations, True, extra, node.get("group", 1)
        )
        if any(map(any, around)):
            full = pad_spatial(full, [(-before, -after) for before, after in around])
        return full + bias.reshape(-1, *[1] * rank) if beyond and bias is not None else full

    return conv_transpose


def _transposed_pads(
    node: OpNode, x: Tensor, weight: Tensor, strides: Sequence[int], dilations: Sequence[int], extra: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is cut off each end: `pads`, or what makes the output as large as asked."""
    rank = weight.ndim - 2
    wanted, auto = node.get("output_shape"), auto_pad(node)
    if wanted is None and auto in ("NOTSET", "VALID"):
        return resolve_pads(node, x.shape[2:], weight.shape[2:])
    if wanted is None:
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    around = []
    for i in range(rank):
        full = (x.shape[2 + i] - 1) * strides[i] + extra[i] + (weight.shape[2 + i] - 1) * dilations[i] + 1
        total = full - wanted[-rank:][i]
        around.append(_halves(total, auto))
    return around
