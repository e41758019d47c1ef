"""Runs a batch of blocks in lockstep: an instruction works on all threads that stand at it, the lowest place first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from optframe.cuda import WAIT, WAIT_ARCHITECTURE
from optframe.errors import PluginError
from optframe.types import KernelLaunch
from optframe_trt.emulator import values
from optframe_trt.emulator.copies import PendingCopies
from optframe_trt.emulator.faults import KernelFault
from optframe_trt.emulator.memory import GlobalMemory, LocalMemory, SharedMemory
from optframe_trt.emulator.program import Program
from optframe_trt.emulator.ptx import Instruction, Register

Array = np.ndarray[Any, Any]

_GONE = np.iinfo(np.int32).max
"""The place of threads that exited."""


@dataclass(frozen=True)
class Checks:
    """What to watch: races in shared memory, reads of shared memory that nobody wrote, and steps without end."""

    races: bool = True
    uninitialised: bool = True
    max_steps: int = 5_000_000


class _Views(dict[str, list[Array]]):
    """Registers and constants of a file as arrays of a PTX type, made when a type is first asked for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __missing__(self, type_: str) -> list[Array]:
        made = self._machine.view_registers(type_)
        self[type_] = made
        return made


class Machine:
    """Some blocks of a launch, all their threads in arrays that hold whole warps: lanes past a block's end are gone.

    `where` is what NumPy takes to write registers: True where all threads that live are selected (what the others hold
    matters no more), else which are. `active` are the numbers of the selected threads, None for all of the arrays'.
    """

    def __init__(
        self,
        program: Program,
        launch: KernelLaunch,
        blocks: Array,
        memory: GlobalMemory,
        parameters: bytes,
        checks: Checks,
    ) -> None:
        self.program, self.launch, self.memory, self.checks = program, launch, memory, checks
        self.blocks = blocks
        self.parameters = parameters
        self.block_threads = math.prod(launch.block)
        self.lanes = -(-self.block_threads // 32) * 32  # of a block
        self.threads = self.lanes * len(blocks)
        self._registers = self._poisoned_registers()
        self.views = _Views(self)
        self.live = np.tile(np.arange(self.lanes) < self.block_threads, len(blocks))
        self._live_index = None if self.live.all() else np.flatnonzero(self.live)
        self._places = np.where(self.live, 0, _GONE).astype(np.int32)
        self._blocked = np.zeros(self.threads, bool)
        self.carry = np.zeros(self.threads, bool)  # of add.cc and its like
        waits = launch.overlap and program.architecture >= WAIT_ARCHITECTURE
        self.unwaited = np.ones(self.threads, bool) if waits else None  # for the kernel before; None: all have
        self.barriers = np.zeros(self.threads, np.int64)  # 1 + the number of the barrier that a thread waits at
        self._retrying = False
        self._merge_at: int = _GONE
        self.steps = 0
        self.converged = True
        self.selected = self.live
        self.where: Any = True
        self.active: Array | None = self._live_index
        shared = program.layout.shared_bytes
        shared = (-(-shared // 16) * 16 + launch.shared_bytes) if launch.shared_bytes else shared
        self.shared = SharedMemory(self, shared, len(blocks), self.lanes)
        self.local = LocalMemory(program.layout.local_bytes, self.threads)
        self.copies = PendingCopies(self)

    def _poisoned_registers(self) -> dict[int, Array]:
        made = {}
        for file, count in self.program.kernel.registers.items():
            dtype = np.dtype(np.bool_ if file == 1 else f"uint{file}")
            made[file] = np.full((count, self.threads), True if file == 1 else dtype.type(2**file - 1))
        return made

    def view_registers(self, type_: str) -> list[Array]:
        """Return the registers and constants of the type's file as arrays of its dtype; pairs have a last axis of 2."""
        file, dtype = values.file_of(type_), values.DTYPES[type_]
        pairs = type_.endswith("x2")
        table = self._registers[file].view(dtype)
        rows = list(table.reshape(len(table), self.threads, 2) if pairs else table)
        for constant in self.program.constants[file]:
            bits = self._special(constant) if isinstance(constant, str) else constant
            array = np.asarray(bits, np.bool_ if file == 1 else f"uint{file}")
            rows.append(array.reshape(*array.shape, 1).view(dtype) if pairs else array.view(dtype))
        return rows

    def _special(self, name: str) -> Array:
        """Return the values of a special register."""
        lane = np.arange(self.threads, dtype=np.int64) % 32
        thread = np.tile(np.arange(self.lanes, dtype=np.int64), len(self.blocks))
        axis = "xyz".find(name[-1])
        if name.startswith(("%tid", "%ctaid")):
            sizes = self.launch.block if name.startswith("%tid") else self.launch.grid
            number = thread if name.startswith("%tid") else np.repeat(self.blocks, self.lanes)
            return np.asarray(coordinates(number, sizes)[axis]).astype(np.uint32)
        if name.startswith(("%ntid", "%nctaid")):
            return np.asarray((self.launch.block if name.startswith("%ntid") else self.launch.grid)[axis])
        one = np.uint64(1) << lane.astype(np.uint64)
        simple = {
            "%laneid": lane,
            "%warpid": thread // 32,
            "%nwarpid": np.asarray(self.lanes // 32),
            "%dynamic_smem_size": np.asarray(self.launch.shared_bytes),
            "%total_smem_size": np.asarray(self.shared.size),
            "%lanemask_eq": one,
            "%lanemask_lt": one - 1,
            "%lanemask_le": 2 * one - 1,
            "%lanemask_gt": ~(2 * one - 1) & 0xFFFFFFFF,
            "%lanemask_ge": ~(one - 1) & 0xFFFFFFFF,
        }
        return simple.get(name, np.asarray(0))  # clocks stand still, and there is one multiprocessor

    @property
    def active_count(self) -> int:
        """How many threads are selected."""
        return self.threads if self.active is None else len(self.active)

    @property
    def active_threads(self) -> Array:
        """The numbers of the selected threads."""
        return np.arange(self.threads) if self.active is None else self.active

    @property
    def active_masks(self) -> Array:
        """The selected lanes of each warp as bits, (warps,) int64."""
        return np.asarray(self.selected.reshape(-1, 32) @ values.LANE_BITS)

    def where_of(self, result: Array) -> Any:
        """Return `where` for results that may have a last axis more than registers."""
        return self.where if self.where is True or result.ndim == 1 else self.where[:, None]

    def write(self, type_: str, slot: int, result: Array) -> None:
        """Write values of the type's dtype to a register of the selected threads."""
        target = self.views[type_][slot]
        np.copyto(target, result, where=self.where_of(target))

    def read(self, type_: str, slot: int) -> Array:
        """Return a register's, or a constant's, values for all threads; pairs have a last axis of 2."""
        source = self.views[type_][slot]
        shape = (self.threads, 2) if type_.endswith("x2") else (self.threads,)
        return source if source.shape == shape else np.broadcast_to(source, shape)

    def gather(self, type_: str, slot: int) -> Array:
        """Return what `read` does for the selected threads alone."""
        whole = self.read(type_, slot)
        return whole if self.active is None else whole.take(self.active, axis=0)

    def holds(self, guard: tuple[Register, bool]) -> Array:
        """Return where a predicate is as its guard wants it."""
        value = self.views["pred"][guard[0].index]
        return value if guard[1] else ~value

    def scatter(self, type_: str, slot: int, result: Array) -> None:
        """Write one value for each selected thread to a register."""
        target = self.views[type_][slot]
        if self.active is None:
            target[:] = result
        else:
            target[self.active] = result

    @contextmanager
    def narrowed(self, chosen: Array) -> Iterator[bool]:
        """Select for a while those selected threads that are `chosen` too; gives whether any is."""
        kept = self.selected, self.where, self.active
        self.select(self.selected & chosen)
        try:
            yield bool(self.active_count)
        finally:
            self.selected, self.where, self.active = kept

    def select(self, chosen: Array) -> None:
        """Select threads."""
        self.selected = self.where = chosen
        self.active = np.flatnonzero(chosen)

    def fault(self, by: Instruction, text: str, position: int = 0, kind: type[PluginError] = KernelFault) -> NoReturn:
        """Raise an error for the thread at `position` among those selected."""
        thread = position if self.active is None else int(self.active[position])
        raise kind(f"the kernel {self.program.kernel.name}, {self.describe(thread)}: '{by.text}' {text}")

    def wait(self) -> None:
        """Note that the selected threads have waited for the kernel before."""
        if self.unwaited is not None:
            self.unwaited = self.unwaited & ~self.selected
            if not (self.unwaited & self.live).any():
                self.unwaited = None

    def require_waited(self, by: Instruction, threads: Array, deed: str) -> None:
        """Report those of `threads`, marks of all, that have not waited for the kernel before."""
        if self.unwaited is not None and (threads & self.unwaited).any():
            self.select(threads & self.unwaited)
            self.fault(by, f"{deed} before the thread ran {WAIT}, as one whose launch may overlap has to")

    def describe(self, thread: int) -> str:
        """Return which block and thread a number stands for."""
        block = tuple(int(c) for c in coordinates(self.blocks[thread // self.lanes], self.launch.grid))
        inside = tuple(int(c) for c in coordinates(np.asarray(thread % self.lanes), self.launch.block))
        return f"block {block}, thread {inside}"

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            KernelFault: the kernel does what must not be.
        """
        steps, stops, controls = self.program.steps, self.program.stops, self.program.controls
        place: int | None = 0 if self.live.any() and steps else None
        while place is not None:
            if place >= len(steps):
                place = self.exit()
                continue
            stop = stops[place]
            end = min(stop, self._merge_at)
            for step in steps[place:end]:
                step(self)  # type: ignore[misc]  # None for controls alone, which end the slice
            self.steps += end - place + 1
            if self.steps > self.checks.max_steps:
                self._too_long(end)
            place = self.move(end) if end != stop or stop == len(steps) else controls[stop](self, stop)

    def _too_long(self, place: int) -> NoReturn:
        by = self.program.kernel.instructions[min(place, len(self.program.steps) - 1)]
        self.fault(by, f"is reached after {self.checks.max_steps} steps: the kernel seems to run for ever")

    def go(self, here: int, place: int) -> int | None:
        """Move the selected threads from `here` to a place; return it, or None if others are to run first."""
        return place if self.converged or here < place < self._merge_at else self.move(place)

    def move(self, places: int | Array) -> int | None:
        """Move the selected threads to a place, or each to its own."""
        self._places[self.selected] = places
        return self._regroup()

    def part(self, here: int, taken: Array, there: int) -> int | None:
        """Move those selected threads that are `taken` there, the others behind `here`."""
        taken = taken & self.selected
        count = int(np.count_nonzero(taken))
        if count == 0 or count == self.active_count:
            return self.go(here, there if count else here + 1)
        self._places[self.selected] = here + 1
        self._places[taken] = there
        return self._regroup()

    def exit(self, leaving: Array | None = None, here: int = 0) -> int | None:
        """End the selected threads, or those that are `leaving`; the others go on behind `here`."""
        gone = self.selected if leaving is None else self.selected & leaving
        self._places[self.selected] = here + 1
        self._places[gone] = _GONE
        self.live = self.live & ~gone
        self._live_index = np.flatnonzero(self.live)
        self._retrying = False
        return self._regroup()

    def block(self, here: int, waiting: Array) -> int | None:
        """Let those selected threads that are `waiting` stand at `here` until others come; the rest goes on."""
        going = self.selected & ~waiting
        self._places[self.selected & waiting] = here
        self._places[going] = here + 1
        self._blocked |= self.selected & waiting
        self._retrying = self._retrying and not going.any()
        return self._regroup()

    def release(self, threads: Array) -> int | None:
        """Let threads go on behind the places where they stand."""
        self._places[threads] += 1
        self._blocked &= ~threads
        self._retrying = False
        return self._regroup()

    def hold(self, threads: Array) -> None:
        """Let threads stand where they are until others come."""
        self._blocked |= threads

    @property
    def places(self) -> Array:
        """Where threads that are not selected stand; those that exited lie past the end."""
        return self._places

    def stand(self, place: int) -> None:
        """Note that the selected threads stand at a place."""
        self._places[self.selected] = place

    def _regroup(self) -> int | None:
        """Select the threads at the lowest place that may run, and return it; None where all exited.

        Raises:
            KernelFault: all that are left wait.
        """
        ready = self.live & ~self._blocked
        if not ready.any():
            if not self.live.any():
                return None
            if self._retrying:
                self._deadlock()
            self._retrying = True
            self._blocked[:] = False
            ready = self.live
        place = int(self._places[ready].min())
        chosen = (self._places == place) & self.live
        self._blocked &= ~chosen
        others = self._places[self.live & (self._places > place)]
        self._merge_at = int(others.min()) if others.size else _GONE
        self.select(chosen)
        self.converged = bool(np.array_equal(chosen, self.live))
        if self.converged:
            self.where = True
            self.active = None if self.live.all() else self._live_index
        return place

    def _deadlock(self) -> NoReturn:
        self.select(self.live)
        standing = self._places[self.live]
        by = self.program.kernel.instructions[standing[0]]
        others = {self.program.kernel.instructions[place].text for place in np.unique(standing)} - {by.text}
        besides = f"; others wait at '{min(others)}'" if others else ""
        self.fault(by, f"is never left, since threads that it waits for do not come{besides}")


def coordinates(number: Array, sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Return (x, y, z) of linear numbers, x running fastest."""
    return number % sizes[0], number // sizes[0] % sizes[1], number // (sizes[0] * sizes[1])
