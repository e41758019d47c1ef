"""Arithmetic on floats: add, sub, mul, fma, div, roots, and the approximate functions.

float32 and float64 with plain rounding are NumPy's own operations, which are IEEE's. All else is computed in float64
and has one rounding, see `values`; but a subnormal result of a float32 fma has two, and a float64 fma may be wrong in
its last bit. Approximate functions give the nearest result, where hardware may be off by 2 units in the last place
(2^-11 relative for tanh).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator import values
from optframe_trt.emulator.program import Binder, Builder, Step, require_none, take, unsupported
from optframe_trt.emulator.ptx import Instruction, operands_of

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]

_REST, _HALF = np.int64((1 << 29) - 1), np.int64(1 << 28)
"""The bits of a float64 that a float32 lacks, and those of a number half way between two float32."""

ROUNDINGS = ("rn", "rz", "rm", "rp")


def _plain(binder: Binder, by: Instruction, type_: str, function: Function) -> Step:
    """Return the step that is one NumPy function of the type."""
    target, *sources = (binder.slot(by, operand, type_) for operand in by.operands)
    if len(sources) == 1:
        (only,) = sources

        def unary(machine: Machine) -> None:
            view = machine.views[type_]
            function(view[only], out=view[target], where=machine.where)

        return unary
    first, second = sources

    def binary(machine: Machine) -> None:
        view = machine.views[type_]
        function(view[first], view[second], out=view[target], where=machine.where)

    return binary


def _careful(binder: Binder, by: Instruction, type_: str, function: Function, how: Sequence[str]) -> Step:
    """Return the step that computes in float64 and rounds once; `how` has a rounding, ftz, sat or relu."""
    target, *sources = (binder.slot(by, operand, type_) for operand in by.operands)
    rounding = next((word for word in how if word in ROUNDINGS), "rn")

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        arguments = [view[source] for source in sources]
        if "ftz" in how and type_ == "f32":
            arguments = [values.flush(argument) for argument in arguments]
        wide = function(*(values.widen(argument, type_) for argument in arguments))
        if "sat" in how:
            wide = values.saturate(wide)
        if "relu" in how:
            wide = values.relu(wide)
        result = values.narrow(np.asarray(wide), type_, rounding)
        machine.write(type_, target, values.flush(result) if "ftz" in how and type_ == "f32" else result)

    return step


def _arithmetic(plain: np.ufunc, exact: Function) -> Builder:
    def build(binder: Binder, by: Instruction) -> Step:
        type_, how = _split(by)
        operands_of(by, (3,))
        if type_ in ("f32", "f64") and not {*how} - {"rn"}:
            return _plain(binder, by, type_, plain)
        return _careful(binder, by, type_, exact, how)

    return build


def _split(by: Instruction, words: Sequence[str] = (*ROUNDINGS, "ftz", "sat", "relu")) -> tuple[str, list[str]]:
    """Return the type and the modifiers before it, all of which must be among the words."""
    *how, type_ = by.modifiers or ("",)
    if type_ not in values.FLOATS or {*how} - {*words}:
        raise unsupported(by)
    if type_ == "f64" and {*how} - {"rn", "full", "approx", "ftz"}:
        raise unsupported(by)
    return type_, how


def _subtract(x: Array, y: Array) -> Array:
    return values.add_odd(x, -y)


def _fma_exact(a: Array, b: Array, c: Array) -> Array:
    return values.add_odd(a * b, c)


def _fma(binder: Binder, by: Instruction) -> Step:
    """Bind fma (or mad, which is the same for floats)."""
    type_, how = _split(by)
    operands_of(by, (4,))
    if type_ == "f64":
        return _fma64(binder, by)
    if type_ != "f32" or {*how} - {"rn"}:
        return _careful(binder, by, type_, _fma_exact, how)
    target, a, b, c = (binder.slot(by, operand, type_) for operand in by.operands)

    def step(machine: Machine) -> None:
        view = machine.views["f32"]
        product = np.multiply(view[a], view[b], dtype=np.float64)
        total = np.asarray(product + view[c])
        if ((total.view(np.int64) & _REST) == _HALF).any():  # half way between two float32, perhaps by rounding
            total = values.add_odd(product, view[c].astype(np.float64))
        np.copyto(view[target], total, where=machine.where, casting="same_kind")

    return step


def _fma64(binder: Binder, by: Instruction) -> Step:
    """A float64 fma whose product and sum keep their errors (Dekker, Knuth): right but for rare last bits."""
    target, *sources = (binder.slot(by, operand, "f64") for operand in by.operands)

    def step(machine: Machine) -> None:
        a, b, c = (np.asarray(machine.views["f64"][source]) for source in sources)
        product = a * b
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        low = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
        total = product + c
        part = total - product
        rest = ((product - (total - part)) + (c - part)) + low
        machine.write("f64", target, np.where(np.isfinite(rest) & np.isfinite(total), total + rest, total))

    return step


def _halves(x: Array) -> tuple[Array, Array]:
    scaled = x * 134217729.0  # 2^27 + 1 (Veltkamp)
    high = scaled - (scaled - x)
    return high, x - high


def _divide(binder: Binder, by: Instruction) -> Step:
    type_, how = _split(by, (*ROUNDINGS, "ftz", "approx", "full"))
    operands_of(by, (3,))
    if "ftz" not in how and not {*how} & {"rz", "rm", "rp"}:
        return _plain(binder, by, type_, np.divide)
    return _careful(binder, by, type_, np.divide, how)


def _unary(function: Function, plain: np.ufunc | None = None) -> Builder:
    """Return the builder for a function of one float, computed in float64; `plain` is IEEE's own for float32 and 64."""

    def build(binder: Binder, by: Instruction) -> Step:
        type_, how = _split(by, (*ROUNDINGS, "ftz", "approx"))
        operands_of(by, (2,))
        if plain is not None and type_ in ("f32", "f64") and not {*how} - {"rn", "approx"}:
            return _plain(binder, by, type_, plain)
        return _careful(binder, by, type_, function, how)

    return build


def _rsqrt(x: Array) -> Array:
    return np.asarray(1.0 / np.sqrt(x))


def _negate(binder: Binder, by: Instruction) -> Step:
    type_, how = _split(by, ("ftz",))
    return _sign(binder, by, type_, how, np.bitwise_xor)


def _absolute(binder: Binder, by: Instruction) -> Step:
    type_, how = _split(by, ("ftz",))
    return _sign(binder, by, type_, how, _clear)


def _clear(bits: Array, sign: Array) -> Array:
    return np.asarray(bits & ~sign)


def _sign(binder: Binder, by: Instruction, type_: str, how: list[str], function: Function) -> Step:
    """Return the step that changes sign bits."""
    operands_of(by, (2,))
    target, source = (binder.slot(by, operand, type_) for operand in by.operands)
    bits = f"b{values.width(type_)}"
    sign = {"f64": 1 << 63, "f32": 1 << 31, "f16x2": 0x80008000, "bf16x2": 0x80008000}.get(type_, 0x8000)
    constant = np.array(sign, values.DTYPES[bits])

    def step(machine: Machine) -> None:
        result = function(machine.views[bits][source], constant)
        if how and type_ == "f32":
            result = values.flush(np.asarray(result).view(np.float32)).view(np.uint32)
        machine.write(bits, target, result)

    return step


def _extreme(largest: bool) -> Builder:
    number, propagating = (np.fmax, np.maximum) if largest else (np.fmin, np.minimum)
    merge = np.bitwise_and if largest else np.bitwise_or

    def build(binder: Binder, by: Instruction) -> Step:
        type_, how = _split(by, ("ftz", "NaN"))
        operands_of(by, (3,))
        target, first, second = (binder.slot(by, operand, type_) for operand in by.operands)
        function = propagating if "NaN" in how else number

        def step(machine: Machine) -> None:
            view = machine.views[type_]
            a, b = view[first], view[second]
            if "ftz" in how and type_ == "f32":
                a, b = values.flush(a), values.flush(b)
            x, y = (a, b) if type_ in ("f32", "f64") else (values.widen(a, type_), values.widen(b, type_))
            result = np.asarray(function(x, y))
            zeros = (result == 0) & (x == y)
            if zeros.any():  # -0 is below +0
                signed = np.signbit(x), np.signbit(y)
                negative = merge(*signed)
                result = np.where(zeros, np.where(negative, -0.0, 0.0).astype(result.dtype), result)
            machine.write(type_, target, result if result.dtype == a.dtype else values.narrow(result, type_))

        return step

    return build


def _copy_sign(binder: Binder, by: Instruction) -> Step:
    type_, how = _split(by, ())
    require_none(by, how)
    target, sign, magnitude = (binder.slot(by, operand, type_) for operand in operands_of(by, (3,)))

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        machine.write(type_, target, np.copysign(view[magnitude], view[sign]))

    return step


def _test(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
    }
    which = take(modifiers, tuple(tests))
    type_ = take(modifiers, ("f32", "f64"))
    require_none(by, modifiers)
    target, source = operands_of(by, (2,))
    result, slot = binder.slot(by, target, "pred"), binder.slot(by, source, type_)
    return lambda machine: machine.write("pred", result, tests[which](machine.views[type_][slot]))


BUILDERS: dict[str, Builder] = {
    "add": _arithmetic(np.add, values.add_odd),
    "sub": _arithmetic(np.subtract, _subtract),
    "mul": _arithmetic(np.multiply, np.multiply),
    "fma": _fma,
    "mad": _fma,
    "div": _divide,
    "rcp": _unary(lambda x: 1.0 / x, np.reciprocal),
    "sqrt": _unary(np.sqrt, np.sqrt),
    "rsqrt": _unary(_rsqrt),
    "ex2": _unary(np.exp2),
    "lg2": _unary(np.log2),
    "sin": _unary(np.sin),
    "cos": _unary(np.cos),
    "tanh": _unary(np.tanh),
    "neg": _negate,
    "abs": _absolute,
    "min": _extreme(largest=False),
    "max": _extreme(largest=True),
    "copysign": _copy_sign,
    "testp": _test,
}
"""Builders of instructions on float types."""
