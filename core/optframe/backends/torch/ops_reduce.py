"""Ops that reduce along axes or order elements: sums, extrema, softmax, top-k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optframe.backends.torch.dtypes import in_float
from optframe.backends.torch.registry import Call, OpNode, op

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _add(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    return torch.div(_add(x, axes, keep), math.prod(x.shape[axis] for axis in axes), rounding_mode="trunc")


def _extremum(find: Callable[..., Tensor], lowest: bool) -> Reduction:
    """Return max or min; of nothing it is what no element exceeds: an infinity, or the end of the integers."""

    def extremum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if math.prod(x.shape[axis] for axis in axes):
            return find(x, axes, keepdim=keep)
        shape = torch.sum(x, axes, keepdim=keep).shape
        return torch.full(shape, _end(x.dtype, lowest), dtype=x.dtype, device=x.device)

    return extremum


def _end(dtype: torch.dtype, lowest: bool) -> float:
    if dtype.is_floating_point:
        return -math.inf if lowest else math.inf
    if dtype == torch.bool:
        return not lowest
    limits = torch.iinfo(dtype)
    return limits.min if lowest else limits.max


def _in_float(reduction: Reduction) -> Reduction:
    """Return the reduction in floating point of enough range for intermediate results, its result in x's type."""

    def reduce(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        return reduction(in_float(x), axes, keep).to(x.dtype)

    return reduce


REDUCTIONS: dict[str, Reduction] = {
    "ReduceMean": _mean,
    "ReduceSum": _add,
    "ReduceMax": _extremum(torch.amax, lowest=True),
    "ReduceMin": _extremum(torch.amin, lowest=False),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: _add(torch.abs(x), axes, keep),
    "ReduceL2": _in_float(lambda x, axes, keep: torch.sqrt(_add(x * x, axes, keep))),
    "ReduceLogSum": _in_float(lambda x, axes, keep: torch.log(_add(x, axes, keep))),
    "ReduceLogSumExp": _in_float(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceSumSquare": lambda x, axes, keep: _add(x * x, axes, keep),
}


@op(*REDUCTIONS, host=(1,))
def _reduce(node: OpNode) -> Call:
    """Axes are an attribute in older opsets and an input in newer ones; none means all, or nothing if asked."""
    reduction, keep = REDUCTIONS[node.op_type], bool(node.get("keepdims", 1))

    def reduce(x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen: Sequence[int] = node.get("axes", ()) if axes is None else axes.tolist()
        if not chosen and node.get("noop_with_empty_axes", 0):
            return reduction(x.unsqueeze(0), (0,), False)
        return reduction(x, tuple(chosen) or tuple(range(x.ndim)), keep) if x.ndim else reduction(x[None], (0,), False)

    return reduce


@op("ArgMax", "ArgMin")
def _arg_extremum(node: OpNode) -> Call:
    find: Callable[..., Tensor] = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    axis, keep, last = node.get("axis", 0), bool(node.get("keepdims", 1)), node.get("select_last_index", 0)

    def arg_extremum(x: Tensor) -> Tensor:
        if last:
            return torch.rsub(find(x.flip(axis), axis, keepdim=keep), x.shape[axis] - 1)
        return find(x, axis, keepdim=keep)

    return arg_extremum


def _softmax_like(node: OpNode, function: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
    """Before opset 13 the axes from `axis` on count as one."""
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    if node.opset >= 13:
        return lambda x: function(x, axis)

    def flattened(x: Tensor) -> Tensor:
        start = axis % max(x.ndim, 1)
        return function(x.flatten(start), start).reshape(x.shape)

    return flattened


@op("Softmax")
def _softmax(node: OpNode) -> Call:
    return _softmax_like(node, torch.softmax)


@op("LogSoftmax")
def _log_softmax(node: OpNode) -> Call:
    return _softmax_like(node, torch.log_softmax)


@op("Hardmax")
def _hardmax(node: OpNode) -> Call:
    def hardmax(x: Tensor, axis: int) -> Tensor:
        hot = torch.zeros_like(x)
        return hot.scatter_(axis, torch.argmax(x, axis, keepdim=True), 1.0) if x.numel() else hot

    return _softmax_like(node, hardmax)


@op("CumSum", host=(1,))
def _cumulative_sum(node: OpNode) -> Call:
    exclusive, reverse = node.get("exclusive", 0), node.get("reverse", 0)

    def cumulative_sum(x: Tensor, axis: Tensor) -> Tensor:
        dim = int(axis)
        x = x.flip(dim) if reverse else x
        if exclusive:  # not the sum less the element, which cancels
            size = x.shape[dim]
            zero = torch.zeros_like(x.narrow(dim, 0, min(size, 1)))
            x = torch.cat([zero, x.narrow(dim, 0, max(size - 1, 0))], dim)
        total = torch.cumsum(x, dim, dtype=x.dtype)
        return total.flip(dim) if reverse else total

    return cumulative_sum


@op("TopK", host=(1,))
def _top_k(node: OpNode) -> Call:
    axis, largest = node.get("axis", -1), bool(node.get("largest", 1))

    def top_k(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A stable sort: of equal elements the first comes first, as ONNX asks."""
        count = int(node.get("k", 0) if k is None else k)
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return top_k
