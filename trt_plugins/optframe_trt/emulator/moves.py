"""Moves, selections, comparisons and conversions between types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator import values
from optframe_trt.emulator.memory import LOCAL_WINDOW, SHARED_WINDOW, within
from optframe_trt.emulator.program import Binder, Builder, Step, require_none, take, unsupported
from optframe_trt.emulator.ptx import Instruction, Operand, Pair, Register, Vector, operands_of

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]

TYPES = ("pred", *values.INTEGERS, *values.FLOATS)


def _type(by: Instruction, modifiers: list[str], known: tuple[str, ...] = TYPES) -> str:
    type_ = take(modifiers, known)
    if not type_:
        raise unsupported(by)
    return type_


def _move(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    type_ = _type(by, modifiers)
    require_none(by, modifiers)
    target, source = operands_of(by, (2,))
    if isinstance(source, Vector):
        return _pack(binder, by, type_, target, source)
    if isinstance(target, Vector):
        return _unpack(binder, by, type_, target, source)
    out, a = binder.slot(by, target, type_), binder.slot(by, source, type_)

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        np.copyto(view[out], view[a], where=machine.where_of(view[out]))

    return step


def _pack(binder: Binder, by: Instruction, type_: str, target: Operand | None, source: Vector) -> Step:
    part, items = _parts(binder, by, type_, source)
    slots = [item for item in items if item is not None]
    out = binder.slot(by, target, f"b{values.width(type_)}")
    whole = f"b{values.width(type_)}"

    def step(machine: Machine) -> None:
        view = machine.views[part]
        pieces = np.empty((machine.threads, len(slots)), values.DTYPES[part])
        for number, slot in enumerate(slots):
            pieces[:, number] = view[slot]
        machine.write(whole, out, pieces.view(values.DTYPES[whole])[:, 0])

    return step


def _unpack(binder: Binder, by: Instruction, type_: str, target: Vector, source: Operand | None) -> Step:
    part, slots = _parts(binder, by, type_, target)
    whole = f"b{values.width(type_)}"
    a = binder.slot(by, source, whole)

    def step(machine: Machine) -> None:
        pieces = np.ascontiguousarray(machine.read(whole, a)).reshape(-1, 1).view(values.DTYPES[part])
        for number, slot in enumerate(slots):
            if slot is not None:
                machine.write(part, slot, pieces[:, number])

    return step


def _parts(binder: Binder, by: Instruction, type_: str, vector: Vector) -> tuple[str, list[int | None]]:
    """Return the type of a vector's items and their registers."""
    bits = values.width(type_) // len(vector.items)
    if bits not in (16, 32):
        raise unsupported(by)
    part = f"b{bits}"
    return part, [None if item is None else binder.slot(by, item, part) for item in vector.items]


def _select(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    type_ = _type(by, modifiers)
    require_none(by, modifiers)
    target, first, second, predicate = operands_of(by, (4,))
    out, a, b = (binder.slot(by, operand, type_) for operand in (target, first, second))
    chosen = binder.slot(by, predicate, "pred")

    def step(machine: Machine) -> None:
        view = machine.views[type_]
        machine.write(type_, out, np.where(machine.views["pred"][chosen], view[a], view[b]))

    return step


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal},
    **{"hi": np.greater, "hs": np.greater_equal},
}
_UNORDERED = {f"{how}u": how for how in ("eq", "ne", "lt", "le", "gt", "ge")}
"""The comparisons that are true of NaN too."""

_COMPARISONS = (*_ORDERED, *_UNORDERED, "num", "nan")


def _compare(how: str, x: Array, y: Array) -> Array:
    if how in ("num", "nan"):
        return np.asarray((np.isnan(x) | np.isnan(y)) == (how == "nan"))
    if how in _UNORDERED:
        return np.asarray(np.isnan(x) | np.isnan(y) | _ORDERED[_UNORDERED[how]](x, y))
    result = np.asarray(_ORDERED[how](x, y))
    return result & (x == x) & (y == y) if how == "ne" and x.dtype.kind == "f" else result


def _operate(how: str, x: Array, y: Array) -> Array:
    return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[how](x, y)


def _set_predicate(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    how = take(modifiers, _COMPARISONS)
    operation = take(modifiers, ("and", "or", "xor"))
    ftz = bool(take(modifiers, ("ftz",)))
    type_ = _type(by, modifiers)
    require_none(by, modifiers)
    if not how:
        raise unsupported(by)
    target, first, second, *rest = operands_of(by, (4 if operation else 3,))
    targets = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    outs = [None if one is None else binder.slot(by, one, "pred") for one in targets]
    a, b = binder.slot(by, first, type_), binder.slot(by, second, type_)
    other = binder.predicate(by, rest[0]) if rest else None
    if type_ not in values.FLOATS and outs[1] is None and other is None and how in _ORDERED:
        return _plain_comparison(type_, how, outs[0], a, b)
    pairs = type_.endswith("x2")

    def step(machine: Machine) -> None:
        result = _compared(machine, how, type_, a, b, ftz)
        results = [result[..., 0], result[..., 1]] if pairs else [result, ~result]
        for out, one in zip(outs, results, strict=True):
            if out is None:
                continue
            if other is not None:
                one = _operate(operation, one, machine.views["pred"][other[0]] == other[1])
            machine.write("pred", out, one)

    return step


def _plain_comparison(type_: str, how: str, out: int | None, a: int, b: int) -> Step:
    assert out is not None
    function: Any = _ORDERED[how]

    def compare(machine: Machine) -> None:
        view = machine.views[type_]
        function(view[a], view[b], machine.views["pred"][out], where=machine.where)

    return compare


def _compared(machine: Machine, how: str, type_: str, a: int, b: int, ftz: bool) -> Array:
    x, y = machine.views[type_][a], machine.views[type_][b]
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        x, y = values.widen(x, type_), values.widen(y, type_)
    if ftz and type_ == "f32":
        x, y = values.flush(x), values.flush(y)
    return _compare(how, x, y)


def _set(binder: Binder, by: Instruction) -> Step:
    """Comparison whose result is a number: 1.0 or all ones where true."""
    modifiers = list(by.modifiers)
    how = take(modifiers, _COMPARISONS)
    operation = take(modifiers, ("and", "or", "xor"))
    ftz = bool(take(modifiers, ("ftz",)))
    to, type_ = _type(by, modifiers), _type(by, modifiers)
    require_none(by, modifiers)
    if not how or operation:
        raise unsupported(by)
    out, a, b = (binder.slot(by, o, t) for o, t in zip(operands_of(by, (3,)), (to, type_, type_), strict=True))
    dtype = np.dtype(values.DTYPES[to])
    one = {"bf16": 0x3F80, "bf16x2": 0x3F80}.get(to, 1.0 if to in values.FLOATS else -1)
    true = np.array(one).astype(dtype)

    def step(machine: Machine) -> None:
        result = _compared(machine, how, type_, a, b, ftz)
        if type_.endswith("x2") and not to.endswith("x2"):  # u32 of two halves: each all ones or zeros
            halves = np.where(result, np.uint16(0xFFFF), np.uint16(0))
            machine.write("u16x2", out, halves)
            return
        machine.write(to, out, np.where(result, true, np.zeros((), dtype)))

    return step


def _convert(binder: Binder, by: Instruction) -> Step:
    *how, to, source = by.modifiers or ("", "")
    if to in ("f16x2", "bf16x2") and source == "f32":
        return _convert_pair(binder, by, how, to)
    if _is_cast(how, to, source) and _fits(by.operands[0], to) and _fits(by.operands[-1], source):
        return _cast(binder, by, to, source)
    known = {"rna"} if to == "tf32" else {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu"}
    numbers = (*values.INTEGERS, "f16", "bf16", "f32", "f64", "tf32")
    if {*how} - known or to not in numbers or source not in numbers:
        raise unsupported(by)
    target, operand = operands_of(by, (2,))
    source_file = operand.file if isinstance(operand, Register) and values.width(source) < 32 else 0
    wide = _holding(source, source_file)
    a = binder.slot(by, operand, wide)
    out_type = _holding(to, target.file if isinstance(target, Register) and values.width(to) < 32 else 0)
    if to == "tf32":
        out_type = "f32"
    out = binder.slot(by, target, out_type)
    function = _conversion(by, how, to, source)

    def step(machine: Machine) -> None:
        value = machine.views[wide][a]
        if wide != source and source not in ("f16", "bf16"):
            value = value.astype(values.DTYPES[source])
        result = function(value)
        machine.write(out_type, out, np.asarray(result).astype(values.DTYPES[out_type], copy=False))

    return step


def _is_cast(how: list[str], to: str, source: str) -> bool:
    """Whether NumPy's own cast does the conversion: from integers, and between floats with plain rounding."""
    known = (*(name for name in values.INTEGERS if values.width(name) >= 16), "f16", "f32", "f64")
    from_float, to_float = source in ("f16", "f32", "f64"), to in ("f16", "f32", "f64")
    return not {*how} - {"rn"} and source in known and to in known and (to_float or not from_float)


def _fits(operand: Operand | None, type_: str) -> bool:
    """Whether an operand's register is as wide as the type; the instruction takes wider ones too."""
    return not isinstance(operand, Register) or operand.file == values.file_of(type_)


def _cast(binder: Binder, by: Instruction, to: str, source: str) -> Step:
    target, operand = operands_of(by, (2,))
    out, a = binder.slot(by, target, to), binder.slot(by, operand, source)

    def step(machine: Machine) -> None:
        view = machine.views[to][out]
        np.copyto(view, machine.views[source][a], where=machine.where, casting="unsafe")

    return step


def _holding(type_: str, file: int) -> str:
    """Return the type of a register of `file` bits that holds a narrower value of `type_`; the type itself for 0."""
    if type_ in ("f16", "bf16", "tf32", "pred") or not file:
        return type_ if values.width(type_) > 8 else f"{type_[0]}16"
    return f"{type_[0]}{file}"


def _conversion(by: Instruction, how: list[str], to: str, source: str) -> Callable[[Array], Array]:
    rounding = next((word for word in how if word in ("rn", "rz", "rm", "rp")), "rn")
    integral = next((word for word in how if word in ("rni", "rzi", "rmi", "rpi")), "")
    floats = ("f16", "bf16", "f32", "f64", "tf32")
    from_float, to_float = source in floats, to in floats
    if to == "tf32":
        return _to_tf32
    if not from_float and not to_float:
        return _between_integers(to, source, "sat" in how)
    if not from_float:
        return _from_integer(by, to, source, rounding)

    def convert(value: Array) -> Array:
        if "ftz" in how and source == "f32":
            value = values.flush(value)
        wide = values.widen(value, source)
        if integral:
            wide = values.round_integral(wide, integral)
        if not to_float:
            return values.to_integer(wide, to)
        if "sat" in how:
            wide = values.saturate(wide)
        if "relu" in how:
            wide = values.relu(wide)
        result = values.narrow(wide, to, rounding)
        return values.flush(result) if "ftz" in how and to == "f32" else result

    return convert


def _to_tf32(value: Array) -> Array:
    """Return float32 values rounded to 10 bits of fraction, ties away from zero."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits).view(np.float32)


def _between_integers(to: str, source: str, saturating: bool) -> Callable[[Array], Array]:
    dtype = np.dtype(values.DTYPES[to])
    if not saturating:
        return lambda value: value.astype(dtype)
    limits = np.iinfo(dtype)

    def clip(value: Array) -> Array:
        low, high = np.iinfo(value.dtype).min, np.iinfo(value.dtype).max
        return np.clip(value, max(limits.min, low), min(limits.max, high)).astype(dtype)

    return clip


def _from_integer(by: Instruction, to: str, source: str, rounding: str) -> Callable[[Array], Array]:
    if values.width(source) < 64:
        return lambda value: values.narrow(value.astype(np.float64), to, rounding)
    if rounding != "rn" or to not in ("f32", "f64"):
        raise unsupported(by)
    return lambda value: value.astype(values.DTYPES[to])


def _convert_pair(binder: Binder, by: Instruction, how: list[str], to: str) -> Step:
    """cvt of two float32 to one register, the first into its upper half."""
    if {*how} - {"rn", "rz", "relu", "satfinite"} or "satfinite" in how:
        raise unsupported(by)
    target, high, low = operands_of(by, (3,))
    out, slots = binder.slot(by, target, to), [binder.slot(by, operand, "f32") for operand in (low, high)]
    rounding = "rz" if "rz" in how else "rn"

    def step(machine: Machine) -> None:
        wide = np.stack([machine.read("f32", slot) for slot in slots], -1).astype(np.float64)
        if "relu" in how:
            wide = values.relu(wide)
        machine.write(to, out, values.narrow(wide, to, rounding))

    return step


_WINDOWS = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}


def _convert_address(binder: Binder, by: Instruction) -> Step:
    """cvta: between generic addresses and those of a space; global ones are the same."""
    modifiers = list(by.modifiers)
    sign = -1 if take(modifiers, ("to",)) else 1
    space = take(modifiers, ("global", "const", "param", *_WINDOWS))
    type_ = take(modifiers, ("u64",))
    require_none(by, modifiers)
    if not type_ or space == "param":
        raise unsupported(by)
    target, source = operands_of(by, (2,))
    out, a = binder.slot(by, target, "s64"), binder.slot(by, source, "s64")
    shift = np.array(sign * _WINDOWS.get(space, 0), np.int64)

    def step(machine: Machine) -> None:
        view = machine.views["s64"]
        np.add(view[a], shift, view[out], where=machine.where)

    return step


def _is_space(binder: Binder, by: Instruction) -> Step:
    modifiers = list(by.modifiers)
    space = take(modifiers, ("global", *_WINDOWS))
    require_none(by, modifiers)
    target, source = operands_of(by, (2,))
    if not space:
        raise unsupported(by)
    out, a = binder.slot(by, target, "pred"), binder.slot(by, source, "s64")

    def step(machine: Machine) -> None:
        address = machine.views["s64"][a]
        inside = {name: within(address, start) for name, start in _WINDOWS.items()}
        machine.write("pred", out, inside[space] if space in inside else ~(inside["shared"] | inside["local"]))

    return step


BUILDERS: dict[str, Builder] = {
    "mov": _move,
    "selp": _select,
    "setp": _set_predicate,
    "set": _set,
    "cvt": _convert,
    "cvta": _convert_address,
    "isspacep": _is_space,
}
