"""Finds races in shared memory: accesses of two warps to a byte, one of them a write, with no barrier between.

For each byte it is noted which warp wrote it and which read it since its block's last barrier (the happens-before of a
barrier's epochs; compute-sanitizer's racecheck asks the same). Within a warp, nothing is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator.values import repeated

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine
    from optframe_trt.emulator.ptx import Instruction

Array = np.ndarray[Any, Any]

_MANY = 0xFF
"""The code of bytes that several warps read; a warp's own is its number from 1 up."""

_ATOMIC = 0xFE
"""The code of bytes that atomics wrote."""


class RaceDetector:
    """What warps did to the shared memory of the blocks of a batch; `codes` is each thread's warp, from 1 up."""

    def __init__(self, blocks: int, stride: int, codes: Array) -> None:
        self._stride = stride
        self._writer = np.zeros(blocks * stride, np.uint8)
        self._reader = np.zeros(blocks * stride, np.uint8)
        self._codes = {size: codes.astype(f"uint{8 * size}") * repeated(1, size) for size in (1, 2, 4, 8)}
        self._used = False

    def synchronize(self, blocks: Sequence[int] | None) -> None:
        """Forget what `blocks` (None: all) did."""
        if not self._used:
            return
        if blocks is None:
            self._writer[:] = 0
            self._reader[:] = 0
            self._used = False
            return
        for block in blocks:
            part = slice(block * self._stride, (block + 1) * self._stride)
            self._writer[part] = 0
            self._reader[part] = 0

    def read(self, machine: Machine, by: Instruction, index: Array, size: int) -> None:
        """Note a read of `size` bytes at places counted in such."""
        for at, words in _split(index, size):
            mine = self._mine(machine, words)
            self._require(machine, by, self._writer, at, mine, "wrote")
            self._note_read(at, mine)

    def write(self, machine: Machine, by: Instruction, index: Array, size: int, atomic: bool = False) -> None:
        """Note a write of `size` bytes at places counted in such."""
        for at, words in _split(index, size):
            mine = self._mine(machine, words)
            allowed = repeated(_ATOMIC, words) if atomic else None
            self._require(machine, by, self._writer, at, mine, "wrote", allowed)
            self._require(machine, by, self._reader, at, mine, "read", allowed)
            writer = self._writer.view(mine.dtype)
            writer[at] = mine if allowed is None else allowed
            if allowed is None:  # two warps at once
                self._require(machine, by, self._writer, at, mine, "wrote")

    def _mine(self, machine: Machine, size: int) -> Array:
        codes = self._codes[size]
        self._used = True
        return codes if machine.active is None else np.asarray(codes.take(machine.active))

    def _note_read(self, at: Array, mine: Array) -> None:
        reader = self._reader.view(mine.dtype)
        found = reader.take(at)
        many = repeated(_MANY, mine.itemsize)
        fine = (found == 0) | (found == mine)
        if not fine.all():
            if ((found & mine.dtype.type(0xFF)) * repeated(1, mine.itemsize) != found).any():
                self._note_read_bytes(at, mine)
                return
            mine = np.where(fine, mine, many)
        reader[at] = mine
        clash = reader.take(at) != mine  # several warps at once
        if clash.any():
            reader[at[clash]] = many

    def _note_read_bytes(self, at: Array, mine: Array) -> None:
        size = mine.itemsize
        places = (at[:, None] * size + np.arange(size)).reshape(-1)
        self._note_read(places, np.repeat(mine.astype(np.uint8), size))

    def _require(
        self,
        machine: Machine,
        by: Instruction,
        table: Array,
        at: Array,
        mine: Array,
        verb: str,
        allowed: Any = None,
    ) -> None:
        """Raise KernelFault where `table` names another warp than `mine`, or what is allowed too."""
        found = table.view(mine.dtype).take(at)
        wrong = (found != 0) & (found != mine)
        if allowed is not None:
            wrong &= found != allowed
        if not wrong.any():
            return
        for place in np.flatnonzero(wrong):
            own, other = mine[place : place + 1].view(np.uint8), found[place : place + 1].view(np.uint8)
            clash = (other != 0) & (other != own)
            if allowed is not None:
                clash &= other != _ATOMIC
            if clash.any():
                byte = (int(at[place]) * mine.itemsize + int(clash.argmax())) % self._stride
                code = int(other[clash.argmax()])
                who = {_MANY: "other warps", _ATOMIC: "atomics of other warps"}.get(code, f"warp {code - 1}")
                text = f"a race on shared address {byte}: {who} {verb} it with no barrier between"
                machine.fault(by, text, int(place))


def _split(index: Array, size: int) -> list[tuple[Array, int]]:
    """Return places in words of at most 8 bytes, with their size."""
    return [(index, size)] if size <= 8 else [(index * 2, 8), (index * 2 + 1, 8)]
