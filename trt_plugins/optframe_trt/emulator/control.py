"""Branches, exits and barriers, and what lanes of a warp do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator.faults import KernelFault, Unsupported
from optframe_trt.emulator.program import (
    Binder,
    Control,
    ControlBuilder,
    Step,
    guarded,
    require_none,
    take,
    unsupported,
)
from optframe_trt.emulator.ptx import Immediate, Instruction, Name, Operand, operands_of
from optframe_trt.emulator.values import LANE_BITS

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]

FULL = 0xFFFFFFFF


def _branch(binder: Binder, by: Instruction) -> Control:
    if by.opcode == "brx":
        return _indexed_branch(binder, by)
    modifiers = list(by.modifiers)
    take(modifiers, ("uni",))
    require_none(by, modifiers)
    (target,) = operands_of(by, (1,))
    there = binder.label(by, target)
    if by.guard is None:
        return lambda machine, here: machine.go(here, there)
    guard = by.guard
    return lambda machine, here: machine.part(here, machine.holds(guard), there)


def _indexed_branch(binder: Binder, by: Instruction) -> Control:
    index, table = operands_of(by, (2,))
    if by.modifiers[:1] != ("idx",) or not isinstance(table, Name) or by.guard:
        raise unsupported(by)
    slot = binder.slot(by, index, "u32")
    targets = np.array([binder.label(by, Name(label)) for label in binder.kernel.tables[table.text]])

    def branch(machine: Machine, here: int) -> int | None:
        chosen = machine.gather("u32", slot)
        if (chosen >= len(targets)).any():
            machine.fault(by, "has an index past its table", int((chosen >= len(targets)).argmax()))
        return machine.move(targets[chosen])

    return branch


def _exit(binder: Binder, by: Instruction) -> Control:
    modifiers = list(by.modifiers)
    take(modifiers, ("uni",))
    require_none(by, modifiers)
    guard = by.guard

    def end(machine: Machine, here: int) -> int | None:
        leaving = machine.selected if guard is None else machine.selected & machine.holds(guard)
        machine.require_waited(by, leaving, "ends")
        return machine.exit(leaving, here)

    return end


def _fails(binder: Binder, by: Instruction) -> Control:
    """A call or a trap: nothing that the emulator can run, so an error once a thread gets there."""
    kind, reason = {
        "trap": (KernelFault, "stops the kernel"),
        "call": (Unsupported, "calls a function that was not inlined, as assert and printf, which cannot be emulated"),
    }[by.opcode]

    def fail(machine: Machine) -> None:
        machine.fault(by, reason, kind=kind)

    step = guarded(fail, by.guard) if by.guard else fail

    def reached(machine: Machine, here: int) -> int | None:
        step(machine)
        return here + 1

    return reached


def _barrier(binder: Binder, by: Instruction) -> Control:
    if by.opcode == "bar" and by.modifiers[:1] == ("warp",):
        (members,) = operands_of(by, (1,))
        return together(binder, by, lambda machine: None, members)
    modifiers = list(by.modifiers)
    take(modifiers, ("cta",))
    kind = take(modifiers, ("sync", "red"))
    if not kind or by.guard:
        raise unsupported(by)
    if kind == "red":
        return _reducing_barrier(binder, by, modifiers)
    take(modifiers, ("aligned",))
    require_none(by, modifiers)
    operands = operands_of(by, (1, 2))
    return _Barrier(binder, by, operands[0], operands[1] if len(operands) == 2 else None)


class _Barrier:
    """A barrier of a block, or of so many of its threads."""

    def __init__(self, binder: Binder, by: Instruction, number: Operand | None, count: Operand | None) -> None:
        self.by = by
        self.aligned = by.opcode == "bar" or "aligned" in by.modifiers
        self.number = binder.slot(by, number, "u32")
        self.count = None if count is None else binder.slot(by, count, "u32")

    def finish(self, machine: Machine, threads: Array) -> None:
        """Do what the barrier does besides waiting, once `threads` of whole blocks are there."""

    def __call__(self, machine: Machine, here: int) -> int | None:
        if machine.converged and self.count is None and machine.views["u32"][self.number].ndim == 0:
            machine.shared.synchronize(None)
            self.finish(machine, machine.selected)
            return here + 1
        machine.stand(here)
        numbers = machine.read("u32", self.number).astype(np.int64) + 1
        machine.barriers[machine.selected] = numbers[machine.selected]
        ready = self._ready(machine, numbers)
        if not ready.any():
            return machine.block(here, machine.selected)
        machine.hold(machine.selected & ~ready)
        self.finish(machine, ready)
        machine.barriers[ready] = 0
        machine.shared.synchronize(np.flatnonzero(ready.reshape(-1, machine.lanes).any(1)).tolist())
        return machine.release(ready)

    def _ready(self, machine: Machine, numbers: Array) -> Array:
        """Return the threads at this barrier of those blocks of which all that count are there."""
        blocks = (-1, machine.lanes)
        chosen = np.where(machine.selected, numbers, 0).reshape(blocks).max(1, keepdims=True)
        arrived = machine.live.reshape(blocks) & (machine.barriers.reshape(blocks) == chosen) & (chosen > 0)
        if self.count is None:
            complete = (arrived == machine.live.reshape(blocks)).all(1) & arrived.any(1)
        else:
            wanted = machine.read("u32", self.count).reshape(blocks)[:, 0]
            warps = arrived.reshape(len(arrived), -1, 32).any(2).sum(1)
            complete = warps * 32 == wanted
        ready = np.asarray((arrived & complete[:, None]).reshape(-1))
        if self.aligned:
            self._require_whole_warps(machine, ready)
        return ready

    def _require_whole_warps(self, machine: Machine, ready: Array) -> None:
        warps = ready.reshape(-1, 32)
        places = machine.places.reshape(-1, 32)
        first = places[np.arange(len(places)), warps.argmax(1)][:, None]
        wrong = (warps & (places != first)).reshape(-1) | (
            (warps.any(1, keepdims=True) & machine.live.reshape(-1, 32) & ~warps).reshape(-1)
        )
        if wrong.any():
            machine.select(wrong)
            machine.fault(self.by, "is a barrier in divergent code: the lanes of a warp wait at different ones")


class _ReducingBarrier(_Barrier):
    """A barrier that counts or combines a predicate over the block."""

    def __init__(self, binder: Binder, by: Instruction, kind: str) -> None:
        target, number, *count, source = operands_of(by, (3, 4))
        super().__init__(binder, by, number, count[0] if count else None)
        self.aligned = True
        self.kind = kind
        self.type = "u32" if kind == "popc" else "pred"
        self.target = binder.slot(by, target, self.type)
        self.source, self.wanted = binder.predicate(by, source)

    def finish(self, machine: Machine, threads: Array) -> None:
        value = machine.read("pred", self.source) == self.wanted
        blocks = value.reshape(-1, machine.lanes), threads.reshape(-1, machine.lanes)
        if self.kind == "popc":
            result = (blocks[0] & blocks[1]).sum(1)
        else:
            result = (blocks[0] | ~blocks[1]).all(1) if self.kind == "and" else (blocks[0] & blocks[1]).any(1)
        target = machine.views[self.type][self.target]
        target[threads] = np.repeat(result, machine.lanes).astype(target.dtype)[threads]


def _reducing_barrier(binder: Binder, by: Instruction, modifiers: list[str]) -> Control:
    kind = take(modifiers, ("popc", "and", "or"))
    take(modifiers, ("aligned",))
    type_ = take(modifiers, ("u32", "pred"))
    require_none(by, modifiers)
    if not kind or (kind == "popc") != (type_ == "u32"):
        raise unsupported(by)
    return _ReducingBarrier(binder, by, kind)


def together(binder: Binder, by: Instruction, step: Step, members: Operand | None = None) -> Control:
    """Return the control that runs a step once all lanes are there that the mask `members` names and that live.

    Without `members` it takes whole warps, as `.aligned` wants them: a lane that exited is a fault.
    """
    if by.guard:
        raise unsupported(by)
    if members is None:
        return _whole_warps(by, step)
    full = isinstance(members, Immediate) and members.value % (1 << 32) == FULL
    slot = binder.slot(by, members, "u32")

    def run(machine: Machine, here: int) -> int | None:
        if machine.converged and full:
            step(machine)
            return here + 1
        return _run_ready(machine, here, step, _waiting(machine, by, slot))

    return run


def _waiting(machine: Machine, by: Instruction, slot: int) -> Array:
    """Return the selected threads that wait for lanes of their masks."""
    members = machine.read("u32", slot).reshape(-1, 32).astype(np.int64)
    stranger = machine.selected & ((members & LANE_BITS) == 0).reshape(-1)
    if stranger.any():
        machine.select(stranger)
        machine.fault(by, "is run by a lane that its mask of members lacks")
    present, live = (array.reshape(-1, 32) @ LANE_BITS for array in (machine.selected, machine.live))
    missing = members & (live & ~present)[:, None]
    return np.asarray(machine.selected & (missing != 0).reshape(-1))


def _whole_warps(by: Instruction, step: Step) -> Control:
    def run(machine: Machine, here: int) -> int | None:
        if machine.active is None:
            step(machine)
            return here + 1
        warps, live = machine.selected.reshape(-1, 32), machine.live.reshape(-1, 32)
        gone = warps.any(1) & ~live.all(1)
        if gone.any():
            machine.select(machine.selected & np.repeat(gone, 32))
            machine.fault(by, "needs all lanes of the warp, but some have exited or never were")
        return _run_ready(machine, here, step, machine.selected & np.repeat(~warps.all(1), 32))

    return run


def _run_ready(machine: Machine, here: int, step: Callable[[Machine], None], waiting: Array) -> int | None:
    """Run the step for all selected threads but those that are waiting."""
    if not waiting.any():
        step(machine)
        return machine.go(here, here + 1)
    with machine.narrowed(~waiting) as any_left:
        if any_left:
            step(machine)
    return machine.block(here, waiting)


CONTROLS: dict[str, ControlBuilder] = {
    "bra": _branch,
    "brx": _branch,
    "ret": _exit,
    "exit": _exit,
    "trap": _fails,
    "call": _fails,
    "bar": _barrier,
    "barrier": _barrier,
}
