"""Memory as kernels see it: global memory with the arrays of a launch, shared memory of blocks, local of threads.

Addresses are int64 arrays, one for each thread that takes part; every access is checked for alignment and bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from optframe_trt.driver import POISON
from optframe_trt.emulator.races import RaceDetector
from optframe_trt.emulator.values import repeated

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine
    from optframe_trt.emulator.ptx import Instruction

Array = np.ndarray[Any, Any]

GLOBAL_BASE = 1 << 40
SHARED_WINDOW, LOCAL_WINDOW, WINDOW = 1 << 50, 1 << 51, 1 << 32
"""Where shared and local memory lie in generic addresses, and how much of those they take."""


def within(addresses: Array, window: int) -> Array:
    """Return which generic addresses lie in the window that starts there."""
    return np.asarray((addresses >= window) & (addresses < window + WINDOW))


SHIFTS = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}


class Words:
    """Bytes seen as words of other sizes."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self._views = {size: data.view(f"uint{8 * size}") for size in (1, 2, 4, 8)}

    def load(self, index: Array, item: int, count: int) -> Array:
        """Return `count` items of `item` bytes from each place, counted in all their bytes: (places, count)."""
        return self._views[item].reshape(-1, count).take(index, axis=0)

    def store(self, index: Array, values: Array) -> None:
        """Put values (places, count) to places counted in their bytes; of several to one place, one stays."""
        self._views[values.itemsize].reshape(-1, values.shape[1])[index] = values


@dataclass(frozen=True)
class Region:
    """An array in global memory, `start` and `end` its addresses."""

    name: str
    start: int
    end: int
    writable: bool


class GlobalMemory:
    """Global memory: poison, with regions that a kernel may read, and write where they are writable."""

    def __init__(self, size: int) -> None:
        self.words = Words(np.full(-(-size // 256) * 256, POISON, np.uint8))
        self.regions: list[Region] = []
        self._readable = np.zeros(self.words.data.size, bool)
        self._writable = np.zeros(self.words.data.size, bool)
        self._allowed: dict[tuple[int, bool], Array] = {}
        self._early = False  # whether a thread read a variable before it waited for the kernel before

    def place(self, name: str, address: int, data: Array | bytes, writable: bool) -> None:
        """Put bytes at an address and open them to the kernel."""
        content = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        start, end = address - GLOBAL_BASE, address - GLOBAL_BASE + content.size
        self.words.data[start:end] = content
        self._readable[start:end] = True
        self._writable[start:end] = writable
        self.regions.append(Region(name, address, address + content.size, writable))
        self._allowed.clear()

    def read(self, address: int, size: int) -> Array:
        """Return bytes."""
        return self.words.data[address - GLOBAL_BASE : address - GLOBAL_BASE + size]

    def places(self, machine: Machine, by: Instruction, addresses: Array, size: int, writing: bool) -> Array:
        """Return where accesses of `size` bytes lie, counted in such.

        Raises:
            KernelFault: one is out of bounds, misaligned, or writes to what is not to be written.
        """
        offsets = addresses - GLOBAL_BASE
        if machine.unwaited is not None or self._early:
            self._watch(machine, by, offsets, writing)
        union = int(np.bitwise_or.reduce(offsets))
        if union >= 0 and not union & (size - 1):
            index = offsets >> SHIFTS[size]
            allowed = self._of(size, writing)
            if int(index.max()) < allowed.size and allowed.take(index).all():
                return index
        return self._fault(machine, by, addresses, size, writing)

    def _watch(self, machine: Machine, by: Instruction, offsets: Array, writing: bool) -> None:
        """Report accesses of threads that have not waited for the kernel before.

        Its own variables a thread may read, as long as no launch writes them: the one before may be of the same kernel.
        """
        tensors = offsets >= machine.program.layout.global_bytes  # which lie behind the variables
        if machine.unwaited is not None:
            accessing = np.zeros(machine.threads, bool)
            accessing[machine.active_threads] = tensors | writing
            machine.require_waited(by, accessing, "writes" if writing else "reads")
            early = machine.unwaited[machine.active_threads]
            self._early = self._early or bool((early & ~tensors).any())
        if writing and self._early and not tensors.all():
            machine.fault(by, "writes a variable that was read before the wait", int((~tensors).argmax()))

    def _of(self, size: int, writing: bool) -> Array:
        key = (size, writing)
        if key not in self._allowed:
            table = self._writable if writing else self._readable
            self._allowed[key] = np.asarray(table.reshape(-1, size).all(1))
        return self._allowed[key]

    def _fault(self, machine: Machine, by: Instruction, addresses: Array, size: int, writing: bool) -> NoReturn:
        offsets = addresses - GLOBAL_BASE
        misaligned = offsets & (size - 1) != 0
        if misaligned.any():
            at = int(misaligned.argmax())
            machine.fault(by, f"{size} bytes at an address that is {addresses[at] % size} off their alignment", at)
        allowed = self._of(size, writing)
        inside = (offsets >= 0) & (offsets < self.words.data.size)
        fine = inside & allowed.take(np.where(inside, offsets, 0) // size)
        at = int((~fine).argmax())
        verb = "writes" if writing else "reads"
        machine.fault(by, f"{verb} {size} bytes {self._describe(int(addresses[at]))}", at)

    def _describe(self, address: int) -> str:
        for region in self.regions:
            if region.start <= address < region.end:
                part = "which is not to be written" if not region.writable else "reaching past its end"
                return f"at byte {address - region.start} of {region.name}, {part}"
        near = [r for r in self.regions if address - r.start > -4096 and address - r.end < 1 << 20]
        if not near:
            return f"at the address {address:#x}, where no tensor is"
        region = min(near, key=lambda r: min(abs(address - r.start), abs(address - r.end)))
        if address < region.start:
            return f"out of bounds: {region.start - address} bytes before {region.name}"
        return f"out of bounds: {address - region.end} bytes past the end of {region.name}"


class SharedMemory:
    """Shared memory of the blocks of a batch: reads of what nobody wrote and races between warps are faults."""

    def __init__(self, machine: Machine, size: int, blocks: int, lanes: int) -> None:
        self.size = size
        self.stride = -(-size // 256) * 256
        self.words = Words(np.full(blocks * self.stride, POISON, np.uint8))
        self._written = Words(np.zeros(blocks * self.stride, np.uint8))
        self._base = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride, lanes)
        warps = lanes // 32
        races = machine.checks.races and warps > 1 and size > 0
        codes = np.tile(np.repeat(np.arange(1, warps + 1, dtype=np.uint8), 32), blocks)
        self.races = RaceDetector(blocks, self.stride, codes) if races else None
        self._uninitialised = machine.checks.uninitialised

    def places(self, machine: Machine, by: Instruction, addresses: Array, size: int) -> Array:
        """Return where accesses of `size` bytes lie, counted in such.

        Raises:
            KernelFault: one is out of bounds or misaligned.
        """
        union = int(np.bitwise_or.reduce(addresses))
        if union < 0 or union & (size - 1) or int(addresses.max()) > self.size - size:
            self._fault(machine, by, addresses, size)
        base = self._base if machine.active is None else self._base.take(machine.active)
        return (addresses + base) >> SHIFTS[size]

    def _fault(self, machine: Machine, by: Instruction, addresses: Array, size: int) -> NoReturn:
        misaligned = addresses & (size - 1) != 0
        if misaligned.any():
            at = int(misaligned.argmax())
            text = f"{size} bytes at the shared address {addresses[at]}, which is {addresses[at] % size} off alignment"
        else:
            at = int(((addresses < 0) | (addresses > self.size - size)).argmax())
            text = f"{size} bytes at the shared address {addresses[at]}, out of bounds: the block has {self.size} bytes"
        machine.fault(by, text, at)

    def load(self, machine: Machine, by: Instruction, addresses: Array, item: int, count: int) -> Array:
        """Return (threads, count) items; see `places`, and that they were written and no other warp writes them."""
        size = item * count
        index = self.places(machine, by, addresses, size)
        self._require_written(machine, by, addresses, index, item, count)
        if self.races:
            self.races.read(machine, by, index, size)
        return self.words.load(index, item, count)

    def _require_written(
        self, machine: Machine, by: Instruction, addresses: Array, index: Array, item: int, count: int
    ) -> None:
        if not self._uninitialised:
            return
        missing = self._written.load(index, item, count) != repeated(0xFF, item)
        if missing.any():
            at = int(missing.any(1).argmax())
            machine.fault(by, f"reads shared address {addresses[at]}, which nobody wrote", at)

    def load_matrix_rows(self, machine: Machine, by: Instruction, addresses: Array) -> Array:
        """Return (threads, 8) words of 16 bits; rows that nobody wrote are poison, since tiles may reach past data."""
        index = self.places(machine, by, addresses, 16)
        if self.races:
            self.races.read(machine, by, index, 16)
        return self.words.load(index, 2, 8)

    def store(self, machine: Machine, by: Instruction, addresses: Array, values: Array) -> None:
        """Put values (threads, count); see `places`, and that no other warp reads or writes there."""
        size = values.itemsize * values.shape[1]
        index = self.places(machine, by, addresses, size)
        if self.races:
            self.races.write(machine, by, index, size)
        self.words.store(index, values)
        if self._uninitialised:
            self._written.store(index, np.full((1, values.shape[1]), repeated(0xFF, values.itemsize)))

    def note_atomic(self, machine: Machine, by: Instruction, addresses: Array, index: Array, size: int) -> None:
        """Note an atomic access, which may meet those of other warps."""
        self._require_written(machine, by, addresses, index, size, 1)
        if self.races:
            self.races.write(machine, by, index, size, atomic=True)

    def synchronize(self, blocks: Sequence[int] | None) -> None:
        """Let what `blocks` (None: all) did so far happen before what they do from now on."""
        if self.races:
            self.races.synchronize(blocks)


class LocalMemory:
    """Local memory: each thread's own."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        self.words = Words(np.full(threads * self.stride, POISON, np.uint8))
        self._base = np.arange(threads, dtype=np.int64) * self.stride

    def places(self, machine: Machine, by: Instruction, addresses: Array, size: int) -> Array:
        """Return where accesses of `size` bytes lie, counted in such.

        Raises:
            KernelFault: one is out of bounds or misaligned.
        """
        wrong = (addresses < 0) | (addresses > self.size - size) | (addresses & (size - 1) != 0)
        if wrong.any():
            at = int(wrong.argmax())
            machine.fault(by, f"{size} bytes at the local address {addresses[at]}, misaligned or out of bounds", at)
        base = self._base if machine.active is None else self._base.take(machine.active)
        return (addresses + base) >> SHIFTS[size]
