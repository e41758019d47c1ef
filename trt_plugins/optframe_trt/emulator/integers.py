"""Arithmetic and logic on integers and bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator import values
from optframe_trt.emulator.program import Binder, Builder, Step, require_none, take, unsupported
from optframe_trt.emulator.ptx import Immediate, Instruction, operands_of

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]

ARITHMETIC = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
_TWICE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _simple(function: Function, types: tuple[str, ...], count: int) -> Builder:
    """Return the builder for one NumPy function of `count` operands of one type."""

    def build(binder: Binder, by: Instruction) -> Step:
        modifiers = list(by.modifiers)
        type_ = take(modifiers, types)
        require_none(by, modifiers)
        operands = operands_of(by, (count + 1,))
        if not type_:
            raise unsupported(by)
        target, *sources = (binder.slot(by, operand, type_) for operand in operands)
        return _bind(function, type_, target, sources)

    return build


def _bind(function: Function, type_: str, target: int, sources: list[int]) -> Step:
    if isinstance(function, np.ufunc) and len(sources) == 2:
        first, second = sources

        def direct(machine: Machine) -> None:
            view = machine.views[type_]
            function(view[first], view[second], out=view[target], where=machine.where_of(view[target]))

        return direct

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        machine.write(type_, target, function(*(view[source] for source in sources)))

    return step


def _add(binder: Binder, by: Instruction, sign: int = 1) -> Step:
    modifiers = list(by.modifiers)
    saturating = take(modifiers, ("sat",))
    carry = take(modifiers, ("cc",))
    type_ = take(modifiers, (*ARITHMETIC, "u16x2", "s16x2"))
    require_none(by, modifiers)
    target, *sources = (binder.slot(by, operand, type_) for operand in operands_of(by, (3,)))
    if carry or by.opcode in ("addc", "subc"):
        return _add_with_carry(by, type_, target, sources, sign, bool(carry))
    if not saturating:
        return _bind(np.add if sign > 0 else np.subtract, type_, target, sources)
    if type_ != "s32":
        raise unsupported(by)

    def saturate(machine: Machine) -> None:
        a, b = (machine.views["s32"][source].astype(np.int64) for source in sources)
        machine.write("s32", target, np.clip(a + sign * b, -(2**31), 2**31 - 1).astype(np.int32))

    return saturate


def _add_with_carry(by: Instruction, type_: str, target: int, sources: list[int], sign: int, sets: bool) -> Step:
    """Add or subtract 32-bit words with the carry (or borrow) of the words before."""
    if type_ not in ("u32", "s32"):
        raise unsupported(by)
    takes = by.opcode in ("addc", "subc")

    def step(machine: Machine) -> None:
        a, b = (machine.views["u32"][source].astype(np.int64) for source in sources)
        total = a + sign * b + (sign * machine.carry if takes else 0)
        machine.write("u32", target, (total & 0xFFFFFFFF).astype(np.uint32))
        if sets:
            np.copyto(machine.carry, (total < 0) | (total > 0xFFFFFFFF), where=machine.where)

    return step


def _subtract(binder: Binder, by: Instruction) -> Step:
    return _add(binder, by, -1)


def _high(a: Array, b: Array) -> Array:
    """Return the upper half of products."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
        return np.asarray((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    signed = a.dtype.kind == "i"
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x & low) * (y >> shift) + ((x & low) * (y & low) >> shift)
    other = (x >> shift) * (y & low) + (middle & low)
    result = (x >> shift) * (y >> shift) + (middle >> shift) + (other >> shift)
    if signed:
        zero = np.uint64(0)
        result = result - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return np.asarray(result).view(a.dtype)


def _multiply(binder: Binder, by: Instruction) -> Step:
    """mul and mad: the lower or upper half, or the whole product."""
    modifiers = list(by.modifiers)
    which = take(modifiers, ("lo", "hi", "wide"))
    carry = take(modifiers, ("cc",))
    type_ = take(modifiers, ARITHMETIC)
    require_none(by, modifiers)
    adds = by.opcode in ("mad", "madc")
    target, first, second, *third = operands_of(by, (4 if adds else 3,))
    if not which or not type_ or (which == "wide" and type_ not in _TWICE):
        raise unsupported(by)
    result = _TWICE[type_] if which == "wide" else type_
    a, b = binder.slot(by, first, type_), binder.slot(by, second, type_)
    out = binder.slot(by, target, result)
    c = binder.slot(by, third[0], result) if adds else None
    if which == "lo" and c is None:
        return _bind(np.multiply, type_, out, [a, b])
    wide = values.DTYPES[result]
    if carry or by.opcode == "madc":
        return _multiply_with_carry(by, type_, which, (out, a, b, c or 0), bool(carry))

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        if which == "wide":
            product = np.multiply(view[a], view[b], dtype=wide)
        else:
            product = np.multiply(view[a], view[b]) if which == "lo" else _high(view[a], view[b])
        machine.write(result, out, product if c is None else product + machine.views[result][c])

    return step


def _multiply_with_carry(by: Instruction, type_: str, which: str, slots: tuple[int, ...], sets: bool) -> Step:
    if type_ not in ("u32", "s32") or which == "wide":
        raise unsupported(by)
    target, a, b, c = slots
    takes = by.opcode == "madc"

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        product = np.multiply(view[a], view[b]) if which == "lo" else _high(view[a], view[b])
        total = np.asarray(product).view(np.uint32).astype(np.int64) + machine.views["u32"][c]
        total = total + (machine.carry if takes else 0)
        machine.write("u32", target, (total & 0xFFFFFFFF).astype(np.uint32))
        if sets:
            np.copyto(machine.carry, total > 0xFFFFFFFF, where=machine.where)

    return step


def _multiply24(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    which = take(modifiers, ("lo",))
    type_ = take(modifiers, ("u32", "s32"))
    require_none(by, modifiers)
    if not which:
        raise unsupported(by)
    adds = by.opcode == "mad24"
    target, *sources = (binder.slot(by, operand, type_) for operand in operands_of(by, (4 if adds else 3,)))
    shift = values.DTYPES[type_]

    def step(machine: Machine) -> None:
        eight = np.dtype(shift).type(8)
        a, b, *c = (machine.views[type_][source] for source in sources)
        product = ((a << eight) >> eight) * ((b << eight) >> eight)
        machine.write(type_, target, product + c[0] if c else product)

    return step


def _quotient(a: Array, b: Array) -> Array:
    """Return quotients rounded to zero; all ones for division by zero."""
    whole = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~np.zeros_like(b), (a - np.fmod(a, whole)) // whole)


def _remainder(a: Array, b: Array) -> Array:
    """Return remainders with the sign of `a`; `a` for division by zero."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _shift(left: bool) -> Builder:
    function = np.left_shift if left else np.right_shift
    types = BITS if left else (*BITS, *ARITHMETIC)

    def build(binder: Binder, by: Instruction) -> Step:
        modifiers = list(by.modifiers)
        type_ = take(modifiers, types)
        require_none(by, modifiers)
        target, source, amount = operands_of(by, (3,))
        if not type_:
            raise unsupported(by)
        out, a = binder.slot(by, target, type_), binder.slot(by, source, type_)
        if isinstance(amount, Immediate) or type_ in ("b32", "u32"):
            return _bind(function, type_, out, [a, binder.slot(by, amount, type_)])
        by_type, dtype = binder.slot(by, amount, "u32"), values.DTYPES[type_]
        most = values.width(type_)

        def step(machine: Machine) -> None:
            shift = np.minimum(machine.views["u32"][by_type], most).astype(dtype)
            machine.write(type_, out, function(machine.views[type_][a], shift))

        return step

    return build


def _funnel(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    side = take(modifiers, ("l", "r"))
    mode = take(modifiers, ("clamp", "wrap"))
    type_ = take(modifiers, ("b32",))
    require_none(by, modifiers)
    if not (side and mode and type_):
        raise unsupported(by)
    target, *sources = (binder.slot(by, operand, "b32") for operand in operands_of(by, (4,)))

    def step(machine: Machine) -> None:
        low, high, amount = (machine.views["b32"][source].astype(np.uint64) for source in sources)
        amount = np.minimum(amount, np.uint64(32)) if mode == "clamp" else amount & np.uint64(31)
        both = high << np.uint64(32) | low
        result = both << amount >> np.uint64(32) if side == "l" else both >> amount
        machine.write("b32", target, result.astype(np.uint32))

    return step


def _lop3(binder: Binder, by: Instruction) -> Step:
    if by.modifiers != ("b32",):
        raise unsupported(by)
    target, a, b, c, table = operands_of(by, (5,))
    if not isinstance(table, Immediate):
        raise unsupported(by)
    slots = [binder.slot(by, operand, "b32") for operand in (a, b, c)]
    out, lut = binder.slot(by, target, "b32"), table.value

    def step(machine: Machine) -> None:
        x, y, z = (machine.views["b32"][slot] for slot in slots)
        result = np.zeros_like(x | y | z)
        for row in range(8):
            if lut >> row & 1:
                result = result | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
        machine.write("b32", out, result)

    return step


def _permute(binder: Binder, by: Instruction) -> Step:
    if by.modifiers != ("b32",):
        raise unsupported(by)
    target, *sources = (binder.slot(by, operand, "b32") for operand in operands_of(by, (4,)))

    def step(machine: Machine) -> None:
        low, high, control = (machine.views["b32"][source].astype(np.uint64) for source in sources)
        both = high << np.uint64(32) | low
        result = np.zeros((), np.uint64)
        for byte in range(4):
            chosen = control >> np.uint64(4 * byte) & np.uint64(15)
            value = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            value = np.where(chosen & np.uint64(8), np.where(value & np.uint64(128), 255, 0).astype(np.uint64), value)
            result = result | value << np.uint64(8 * byte)
        machine.write("b32", target, result.astype(np.uint32))

    return step


def _extract(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    type_ = take(modifiers, ("u32", "s32", "u64", "s64"))
    require_none(by, modifiers)
    target, source, position, length = operands_of(by, (4,))
    if not type_:
        raise unsupported(by)
    out, a = binder.slot(by, target, type_), binder.slot(by, source, type_)
    at, count = binder.slot(by, position, "u32"), binder.slot(by, length, "u32")
    bits, signed = values.width(type_), type_[0] == "s"

    def step(machine: Machine) -> None:
        value = machine.views[f"s{bits}" if signed else f"u{bits}"][a].astype(object)
        first = (machine.views["u32"][at] & np.uint32(255)).astype(object)
        size = np.minimum(machine.views["u32"][count] & np.uint32(255), bits).astype(object)
        field = (value >> first) & ((1 << size) - 1)  # exact: Python's integers
        if signed:
            last = np.minimum(first + size - 1, bits - 1)
            negative = ((value >> last) & 1).astype(bool) & (size > 0)
            field = np.where(negative, field - (1 << size), field)
            kept = np.where(first + size > bits, value >> np.minimum(first, bits - 1), field)
            field = np.where(size > 0, kept, 0)
        machine.write(type_, out, (np.asarray(field) % (1 << bits)).astype(f"uint{bits}").view(values.DTYPES[type_]))

    return step


def _insert(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    type_ = take(modifiers, ("b32", "b64"))
    require_none(by, modifiers)
    target, field, base, position, length = operands_of(by, (5,))
    if not type_:
        raise unsupported(by)
    out, f, b = (binder.slot(by, operand, type_) for operand in (target, field, base))
    at, count = binder.slot(by, position, "u32"), binder.slot(by, length, "u32")
    bits = values.width(type_)

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        first = (machine.views["u32"][at] & np.uint32(255)).astype(object)
        size = (machine.views["u32"][count] & np.uint32(255)).astype(object)
        mask = (((1 << size) - 1) << first) & ((1 << bits) - 1)
        result = (view[b].astype(object) & ~mask) | ((view[f].astype(object) << first) & mask)
        machine.write(type_, out, np.asarray(result).astype(f"uint{bits}"))

    return step


def _leading_zeros(x: Array) -> Array:
    """Return the number of zero bits above the highest set bit."""
    result = np.full(x.shape, x.dtype.itemsize * 8, np.uint32)
    for bit in range(x.dtype.itemsize * 8):
        result = np.where(x >> x.dtype.type(bit) & x.dtype.type(1), np.uint32(x.dtype.itemsize * 8 - 1 - bit), result)
    return result


def _reverse(x: Array) -> Array:
    bits = x.dtype.itemsize * 8
    result, one = np.zeros_like(x), x.dtype.type(1)
    for bit in range(bits):
        result = result | (x >> x.dtype.type(bit) & one) << x.dtype.type(bits - 1 - bit)
    return result


def _count(function: Callable[[Array], Array], types: tuple[str, ...]) -> Builder:
    """Return the builder for a function whose result is u32."""

    def build(binder: Binder, by: Instruction) -> Step:
        modifiers = list(by.modifiers)
        type_ = take(modifiers, types)
        require_none(by, modifiers)
        target, source = operands_of(by, (2,))
        if not type_:
            raise unsupported(by)
        out, a = binder.slot(by, target, "u32"), binder.slot(by, source, type_)
        return lambda machine: machine.write("u32", out, function(machine.views[type_][a]))

    return build


def _ones(x: Array) -> Array:
    return np.bitwise_count(x).astype(np.uint32) if hasattr(np, "bitwise_count") else _ones_slowly(x)


def _ones_slowly(x: Array) -> Array:
    bits = range(x.dtype.itemsize * 8)
    return np.asarray(sum((x >> x.dtype.type(bit) & x.dtype.type(1)).astype(np.uint32) for bit in bits))


def _highest(x: Array) -> Array:
    """Return the place of the highest bit that is not the sign's: all ones where there is none."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).view(f"u{x.dtype.itemsize}")
    last = x.dtype.itemsize * 8 - 1
    return np.asarray(last - _leading_zeros(x).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def _distance(x: Array) -> Array:
    """Return how far the highest bit is from the top: all ones where there is none."""
    place = _highest(x)
    return np.where(place == 0xFFFFFFFF, place, x.dtype.itemsize * 8 - 1 - place)


def _find(binder: Binder, by: Instruction) -> Step | None:
    types = ("u32", "s32", "u64", "s64")
    if by.modifiers[:1] == ("shiftamt",):
        return _count(_distance, types)(binder, replace(by, modifiers=by.modifiers[1:]))
    return _count(_highest, types)(binder, by)


def _dot4(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    first, second = (take(modifiers, ("u32", "s32")) for _ in range(2))
    require_none(by, modifiers)
    if not first or not second:
        raise unsupported(by)
    target, a, b, c = (binder.slot(by, operand, "u32") for operand in operands_of(by, (4,)))

    def step(machine: Machine) -> None:
        view = machine.views["u32"]
        pairs = [
            np.asarray(view[slot]).reshape(-1, 1).view(np.uint8 if type_ == "u32" else np.int8).astype(np.int64)
            for slot, type_ in ((a, first), (b, second))
        ]
        total = (pairs[0] * pairs[1]).sum(1) + view[c]
        machine.write("u32", target, (total & 0xFFFFFFFF).astype(np.uint32))

    return step


def _absolute_difference(a: Array, b: Array, c: Array) -> Array:
    return np.asarray(np.where(a > b, a - b, b - a) + c)


BUILDERS: dict[str, Builder] = {
    "add": _add,
    "addc": _add,
    "sub": _subtract,
    "subc": _subtract,
    "mul": _multiply,
    "mad": _multiply,
    "madc": _multiply,
    "mul24": _multiply24,
    "mad24": _multiply24,
    "div": _simple(_quotient, ARITHMETIC, 2),
    "rem": _simple(_remainder, ARITHMETIC, 2),
    "min": _simple(np.minimum, (*ARITHMETIC, "u16x2", "s16x2"), 2),
    "max": _simple(np.maximum, (*ARITHMETIC, "u16x2", "s16x2"), 2),
    "abs": _simple(np.abs, ("s16", "s32", "s64"), 1),
    "neg": _simple(np.negative, ("s16", "s32", "s64"), 1),
    "sad": _simple(_absolute_difference, ARITHMETIC, 3),
    "and": _simple(np.bitwise_and, ("pred", *BITS), 2),
    "or": _simple(np.bitwise_or, ("pred", *BITS), 2),
    "xor": _simple(np.bitwise_xor, ("pred", *BITS), 2),
    "not": _simple(np.bitwise_not, ("pred", *BITS), 1),
    "cnot": _simple(lambda x: (x == 0).astype(x.dtype), BITS, 1),
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "shf": _funnel,
    "lop3": _lop3,
    "prmt": _permute,
    "bfe": _extract,
    "bfi": _insert,
    "brev": _simple(_reverse, ("b32", "b64"), 1),
    "popc": _count(_ones, ("b32", "b64")),
    "clz": _count(_leading_zeros, ("b32", "b64")),
    "bfind": _find,
    "dp4a": _dot4,
}
"""Builders of instructions on integer types."""
