"""Ops that compute each element by itself: arithmetic, comparisons, activations, casts, quantisation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.backends.torch.dtypes import torch_dtype
from optframe.backends.torch.registry import Call, OpNode, enter_calls, op


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide as in C."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """The result has the base's type, whatever the exponent's."""
    return torch.pow(base, exponent).to(base.dtype)


def _sign(x: Tensor) -> Tensor:
    """NaN has none; torch says 0."""
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def _sum(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms)


def _mean(*terms: Tensor) -> Tensor:
    return _sum(*terms) / len(terms)


enter_calls(
    {
        "Abs": torch.abs,
        "Neg": torch.neg,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Reciprocal": torch.reciprocal,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
        "Round": torch.round,
        "Sign": _sign,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Tan": torch.tan,
        "Asin": torch.asin,
        "Acos": torch.acos,
        "Atan": torch.atan,
        "Sinh": torch.sinh,
        "Cosh": torch.cosh,
        "Asinh": torch.asinh,
        "Acosh": torch.acosh,
        "Atanh": torch.atanh,
        "Erf": torch.erf,
        "Not": torch.logical_not,
        "IsNaN": torch.isnan,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Relu": torch.relu,
        "Softsign": F.softsign,
        "HardSwish": F.hardswish,
        "Mish": F.mish,
        "Softplus": lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device)),
        "Identity": lambda x: x,
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Div": _divide,
        "Pow": _power,
        "And": torch.logical_and,
        "Or": torch.logical_or,
        "Xor": torch.logical_xor,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "BitwiseNot": torch.bitwise_not,
        "Equal": torch.eq,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "Where": torch.where,
        "Min": lambda *terms: functools.reduce(torch.minimum, terms),
        "Max": lambda *terms: functools.reduce(torch.maximum, terms),
        "Sum": _sum,
        "Mean": _mean,
        "CastLike": lambda x, like: _cast(x, like.dtype),
        "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    }
)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts to bool ask for unequal zero, which torch's do too."""
    return x.to(dtype)


@op("Cast")
def _build_cast(node: OpNode) -> Call:
    dtype = torch_dtype(node.get("to"), f"the result of Cast '{node.name}'")
    return lambda x: _cast(x, dtype)


@op("LeakyRelu")
def _leaky_relu(node: OpNode) -> Call:
    return lambda x: F.leaky_relu(x, node.get("alpha", 0.01))


@op("ThresholdedRelu")
def _thresholded_relu(node: OpNode) -> Call:
    return lambda x: torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@op("Elu")
def _elu(node: OpNode) -> Call:
    return lambda x: F.elu(x, node.get("alpha", 1.0))


@op("Celu")
def _celu(node: OpNode) -> Call:
    return lambda x: F.celu(x, node.get("alpha", 1.0))


@op("Selu")
def _selu(node: OpNode) -> Call:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return lambda x: gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@op("HardSigmoid")
def _hard_sigmoid(node: OpNode) -> Call:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


@op("Gelu")
def _gelu(node: OpNode) -> Call:
    approximate = node.choice("approximate", "none", "tanh")
    return lambda x: F.gelu(x, approximate=approximate)


@op("Swish")
def _swish(node: OpNode) -> Call:
    alpha = node.get("alpha", 1.0)
    return lambda x: x * torch.sigmoid(x * alpha)


@op("Shrink")
def _shrink(node: OpNode) -> Call:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)

    def shrink(x: Tensor) -> Tensor:
        moved = torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))
        return moved.to(x.dtype)  # integers moved by a fraction are floating point

    return shrink


@op("IsInf")
def _is_inf(node: OpNode) -> Call:
    tests: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {
        (1, 1): torch.isinf,
        (1, 0): torch.isneginf,
        (0, 1): torch.isposinf,
        (0, 0): lambda x: torch.zeros_like(x, dtype=torch.bool),
    }
    return tests[node.get("detect_negative", 1), node.get("detect_positive", 1)]


@op("Clip")
def _clip(node: OpNode) -> Call:
    if node.opset < 11:
        return lambda x: torch.clamp(x, node.get("min"), node.get("max")) if node.attributes else x

    def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        if low is not None:
            x = torch.maximum(x, low)
        return x if high is None else torch.minimum(x, high)

    return clip


@op("Mod")
def _mod(node: OpNode) -> Call:
    return torch.fmod if node.get("fmod", 0) else torch.remainder


@op("BitShift")
def _bit_shift(node: OpNode) -> Call:
    left = node.choice("direction", "RIGHT", "LEFT") == "LEFT"
    shift = torch.bitwise_left_shift if left else torch.bitwise_right_shift

    def bit_shift(x: Tensor, by: Tensor) -> Tensor:
        """torch shifts no unsigned integers but bytes; exporters of PyTorch shift int64 as uint64."""
        if x.dtype == torch.uint64:
            bits, count = x.view(torch.int64), by.view(torch.int64)
            if not left:  # one place with a 0 for the sign, then the others
                moved = (bits >> 1) & torch.iinfo(torch.int64).max
                return torch.where(count > 0, moved >> (count - 1).clamp(min=0), bits).view(torch.uint64)
            return shift(bits, count).view(torch.uint64)
        return shift(x, by) if x.dtype == torch.uint8 else shift(x.long(), by.long()).to(x.dtype)

    return bit_shift


@op("Dropout", host=(2,))
def _dropout(node: OpNode) -> Call:
    def dropout(x: Tensor, _: Tensor | None = None, training: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if training is not None and training:
            raise node.unsupported("training")
        mask = torch.ones_like(x, dtype=torch.bool if node.opset >= 10 else x.dtype)
        return x if node.outputs < 2 else (x, mask)

    return dropout


def _per_axis(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Return a scale or zero point so that it broadcasts against x: one, one along an axis, or one a block of it."""
    if block:
        return parameter.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    if parameter.ndim == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


@op("QuantizeLinear")
def _quantize_linear(node: OpNode) -> Call:
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    given = node.get("output_dtype", 0)
    asked = torch_dtype(given, f"the result of QuantizeLinear '{node.name}'") if given else torch.uint8

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        dtype = asked if zero_point is None else zero_point.dtype
        level = torch.round(x.float() / _per_axis(scale.float(), x, axis, block))
        if zero_point is not None:
            level = level + _per_axis(zero_point.float(), x, axis, block)
        limits = torch.iinfo(dtype)
        return level.clamp(limits.min, limits.max).to(dtype)

    return quantize


@op("DequantizeLinear")
def _dequantize_linear(node: OpNode) -> Call:
    axis, block, given = node.get("axis", 1), node.get("block_size", 0), node.get("output_dtype", 0)
    asked = torch_dtype(given, f"the result of DequantizeLinear '{node.name}'") if given else None

    def dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        level = x.to(torch.float64 if x.dtype == torch.int32 else torch.float32)
        if zero_point is not None:
            level = level - _per_axis(zero_point.to(level.dtype), x, axis, block)
        return (level * _per_axis(scale.to(level.dtype), x, axis, block)).to(asked or scale.dtype)

    return dequantize


@op("DynamicQuantizeLinear")
def _dynamic_quantize_linear(node: OpNode) -> Call:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        with_zero = torch.cat([x.reshape(-1), zero.reshape(1)])  # the range takes in 0, if only that
        low, high = with_zero.amin(), with_zero.amax()
        scale = torch.where(high == low, torch.ones_like(low), (high - low) / 255)
        zero_point = torch.round(torch.clamp(-low / scale, 0, 255))
        level = torch.round(x / scale) + zero_point
        return level.clamp(0, 255).to(torch.uint8), scale, zero_point.to(torch.uint8)

    return quantize
