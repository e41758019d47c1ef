"""What the lanes of a warp exchange: shuffles, votes, matches, reductions.

A lane that is not there gives poison: PTX leaves open what is read from it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator.control import together
from optframe_trt.emulator.program import Binder, Control, ControlBuilder, require_none, take, unsupported
from optframe_trt.emulator.ptx import Instruction, Operand, Pair, operands_of
from optframe_trt.emulator.values import DTYPES, LANE_BITS

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]

_LANES = np.arange(32)


def warps(machine: Machine, type_: str, slot: int) -> Array:
    """Return a register, or a constant, as (warps, lanes)."""
    return machine.read(type_, slot).reshape(-1, 32)


def _asked(machine: Machine, mask: int) -> Array:
    """Return for each lane, as bits, which selected lanes of its warp the mask of members names."""
    return np.asarray(machine.active_masks[:, None] & warps(machine, "u32", mask))


def _targets(binder: Binder, by: Instruction, target: Operand | None) -> tuple[int | None, int | None]:
    """Return the registers for a result `a` or `a|p` and for its predicate, None where there is none."""
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    result = None if first is None else binder.slot(by, first, "u32")
    return result, None if second is None else binder.slot(by, second, "pred")


def _shuffle(binder: Binder, by: Instruction) -> Control:
    modifiers = list(by.modifiers)
    sync = take(modifiers, ("sync",))
    mode = take(modifiers, ("up", "down", "bfly", "idx"))
    type_ = take(modifiers, ("b32",))
    require_none(by, modifiers)
    target, source, by_lane, clamp, members = operands_of(by, (5,))
    if not (sync and mode and type_):
        raise unsupported(by)
    slots = [binder.slot(by, operand, "u32") for operand in (source, by_lane, clamp)]
    result, found = _targets(binder, by, target)

    def step(machine: Machine) -> None:
        values = warps(machine, "u32", slots[0])
        offsets, limits = (machine.views["s32"][slot] for slot in slots[1:])
        if offsets.ndim == limits.ndim == 0:
            lane, valid = _fixed_lanes(mode, int(offsets), int(limits))
            taken = values.take(lane, axis=1)
            absent = None if machine.active is None else ~machine.selected.reshape(-1, 32).take(lane, axis=1)
        else:
            lane, valid = _source_lanes(mode, warps(machine, "s32", slots[1]), warps(machine, "s32", slots[2]))
            taken = np.take_along_axis(values, lane, 1)
            absent = ~np.take_along_axis(machine.selected.reshape(-1, 32), lane, 1)
        if absent is not None:
            taken = np.where(absent, np.uint32(0xFFFFFFFF), taken)
        if result is not None:
            machine.write("u32", result, taken.reshape(-1))
        if found is not None:
            machine.write("pred", found, np.broadcast_to(valid, taken.shape).reshape(-1))

    return together(binder, by, step, members)


@cache
def _fixed_lanes(mode: str, offset: int, limit: int) -> tuple[Array, Array]:
    return _source_lanes(mode, offset, limit)


def _source_lanes(mode: str, offset: Any, limit: Any) -> tuple[Array, Array]:
    """Return the lane that each lane reads, and whether that is what it asked for (PTX: shfl.sync)."""
    offset, clamp, segment = offset & 31, limit & 31, limit >> 8 & 31
    most = (_LANES & segment) | (clamp & ~segment)
    least = _LANES & segment
    if mode == "up":
        lane = _LANES - offset
        valid = lane >= most
    else:
        lanes = {"down": _LANES + offset, "bfly": _LANES ^ offset, "idx": least | (offset & ~segment)}
        lane = lanes[mode]
        valid = lane <= most
    return np.where(valid, lane, _LANES), np.asarray(valid)


def _vote(binder: Binder, by: Instruction) -> Control:
    modifiers = list(by.modifiers)
    sync = take(modifiers, ("sync",))
    mode = take(modifiers, ("all", "any", "uni", "ballot"))
    type_ = take(modifiers, ("pred", "b32"))
    require_none(by, modifiers)
    target, source, members = operands_of(by, (3,))
    if not (sync and mode) or (mode == "ballot") != (type_ == "b32"):
        raise unsupported(by)
    result = binder.slot(by, target, "u32" if mode == "ballot" else "pred")
    slot, wanted = binder.predicate(by, source)
    mask = binder.slot(by, members, "u32")

    def step(machine: Machine) -> None:
        said = (warps(machine, "pred", slot) == wanted) & machine.selected.reshape(-1, 32)
        yes = (said @ LANE_BITS)[:, None] & warps(machine, "u32", mask)
        asked = _asked(machine, mask)
        if mode == "ballot":
            machine.write("u32", result, yes.astype(np.uint32).reshape(-1))
            return
        results = {"any": yes != 0, "all": yes == asked, "uni": (yes == asked) | (yes == 0)}
        machine.write("pred", result, results[mode].reshape(-1))

    return together(binder, by, step, members)


def _match(binder: Binder, by: Instruction) -> Control:
    modifiers = list(by.modifiers)
    mode = take(modifiers, ("any", "all"))
    sync = take(modifiers, ("sync",))
    type_ = take(modifiers, ("b32", "b64"))
    require_none(by, modifiers)
    target, source, members = operands_of(by, (3,))
    if not (sync and mode and type_):
        raise unsupported(by)
    slot, mask = binder.slot(by, source, type_), binder.slot(by, members, "u32")
    result, found = _targets(binder, by, target)

    def step(machine: Machine) -> None:
        value = warps(machine, type_, slot)
        asked = _asked(machine, mask)
        same = ((value[:, :, None] == value[:, None, :]) @ LANE_BITS) & asked
        whole = same == asked
        if result is not None:
            given = same if mode == "any" else np.where(whole, asked, 0)
            machine.write("u32", result, given.astype(np.uint32).reshape(-1))
        if found is not None:
            machine.write("pred", found, whole.reshape(-1))

    return together(binder, by, step, members)


def _reduce(binder: Binder, by: Instruction) -> Control:
    modifiers = list(by.modifiers)
    sync = take(modifiers, ("sync",))
    mode = take(modifiers, ("add", "min", "max", "and", "or", "xor"))
    type_ = take(modifiers, ("u32", "s32", "b32"))
    require_none(by, modifiers)
    target, source, members = operands_of(by, (3,))
    if not (sync and mode and type_):
        raise unsupported(by)
    result, slot, mask = binder.slot(by, target, type_), binder.slot(by, source, type_), binder.slot(by, members, "u32")
    functions: dict[str, np.ufunc] = {
        **{"add": np.add, "min": np.minimum, "max": np.maximum},
        **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    }
    function = functions[mode]
    limits = np.iinfo(DTYPES[type_])
    neutral = {"min": limits.max, "max": limits.min, "and": -1 if type_ == "s32" else limits.max}.get(mode, 0)

    def step(machine: Machine) -> None:
        value = warps(machine, type_, slot)
        asked = _asked(machine, mask)
        among = (asked[:, :, None] & LANE_BITS) != 0  # (warps, lanes that ask, lanes that give)
        given = np.where(among, value[:, None, :], value.dtype.type(neutral))
        machine.write(type_, result, function.reduce(given, axis=2).astype(value.dtype).reshape(-1))

    return together(binder, by, step, members)


CONTROLS: dict[str, ControlBuilder] = {"shfl": _shuffle, "vote": _vote, "match": _match, "redux": _reduce}
