"""A kernel made ready to run: each instruction bound to a Python function that knows its registers by number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator import ptx, values
from optframe_trt.emulator.faults import Unsupported
from optframe_trt.emulator.memory import GLOBAL_BASE
from optframe_trt.emulator.ptx import Immediate, Instruction, Name, Operand, Register

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]
Step = Callable[["Machine"], None]
"""Runs an instruction for the threads that the machine has selected."""

Control = Callable[["Machine", int], "int | None"]
"""Runs an instruction that may move or stop threads, given its place; returns the next place, None to choose anew."""

Builder = Callable[["Binder", Instruction], "Step | None"]
"""Binds an instruction; None where it has nothing to do here, such as a fence."""

ControlBuilder = Callable[["Binder", Instruction], Control]

SPECIALS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%clock", "%clock_hi"),
    *(f"%lanemask_{which}" for which in ("eq", "le", "lt", "ge", "gt")),
    *("%dynamic_smem_size", "%total_smem_size"),
)
"""The special registers of 32 bits that are known."""

WIDE_SPECIALS = ("%clock64", "%globaltimer")


@dataclass(frozen=True)
class Layout:
    """Where a kernel's variables lie: addresses of global ones, offsets of shared and local ones, and the sizes."""

    addresses: Mapping[str, int]
    global_bytes: int
    shared_bytes: int
    local_bytes: int


@dataclass
class Program:
    """A kernel with its bound instructions.

    `stops[i]` is the first place from i on whose instruction is a control; `steps` has such for all the others.
    `constants` are of the register files: bits, or the name of a special register. `architecture`: what it was
    compiled for, such as 90.
    """

    kernel: ptx.Kernel
    layout: Layout
    steps: list[Step | None] = field(default_factory=list)
    controls: dict[int, Control] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    constants: dict[int, list[int | str]] = field(default_factory=lambda: {file: [] for file in (1, 16, 32, 64)})
    architecture: int = 0


class Binder:
    """What builders of instructions ask: the numbers of registers and constants, places of labels, addresses."""

    def __init__(self, kernel: ptx.Kernel, layout: Layout, architecture: int) -> None:
        self.kernel = kernel
        self.layout = layout
        self.architecture = architecture
        self.constants: dict[int, dict[int | str, int]] = {file: {} for file in (1, 16, 32, 64)}

    def slot(self, by: Instruction, operand: Operand | None, type_: str) -> int:
        """Return the number of a register, constant, special register or address, read as `type_`.

        Raises:
            Unsupported: there is no such register or variable, or it is of another size.
        """
        file = values.file_of(type_)
        if isinstance(operand, Register) and operand.file == file:
            return operand.index
        if isinstance(operand, Immediate):
            return self.constant(file, operand.bits(file))
        if isinstance(operand, Name):
            known = {32: SPECIALS, 64: WIDE_SPECIALS}.get(file, ())
            if operand.text in known:
                return self.constant(file, operand.text)
            if operand.text in self.layout.addresses:
                return self.constant(file, self.layout.addresses[operand.text])
        raise Unsupported(f"the emulator does not know an operand of '{by.text}' as {type_}")

    def constant(self, file: int, value: int | str) -> int:
        """Return the number of a constant in a file, which lies behind the file's registers."""
        table = self.constants[file]
        return table.setdefault(value, self.kernel.registers[file] + len(table))

    def register(self, by: Instruction, operand: Operand | None) -> Register:
        """Return an operand that must be a register."""
        if not isinstance(operand, Register):
            raise Unsupported(f"the emulator wants a register in '{by.text}'")
        return operand

    def predicate(self, by: Instruction, operand: Operand | None) -> tuple[int, bool]:
        """Return the number of a predicate, and whether it counts as it is: false after `!`."""
        if isinstance(operand, ptx.Negated):
            return self.slot(by, operand.register, "pred"), False
        return self.slot(by, operand, "pred"), True

    def label(self, by: Instruction, operand: Operand | None) -> int:
        """Return the place that a label names."""
        if not isinstance(operand, Name) or operand.text not in self.kernel.labels:
            raise Unsupported(f"the emulator does not know the label of '{by.text}'")
        return self.kernel.labels[operand.text]


def unsupported(by: Instruction) -> Unsupported:
    """Return the error for an instruction that is not known."""
    return Unsupported(f"the emulator does not know the PTX instruction '{by.text}'")


def take(modifiers: list[str], known: tuple[str, ...], default: str = "") -> str:
    """Remove the first of `modifiers` if it is one of those known, and return it; else the default."""
    return modifiers.pop(0) if modifiers and modifiers[0] in known else default


def require_none(by: Instruction, modifiers: list[str]) -> None:
    """Raise Unsupported if modifiers are left that nobody took."""
    if modifiers:
        raise unsupported(by)


def guarded(step: Step, guard: tuple[Register, bool]) -> Step:
    """Return the step for those threads alone whose predicate is as the guard says."""

    def run(machine: Machine) -> None:
        with machine.narrowed(machine.holds(guard)) as any_left:
            if any_left:
                step(machine)

    return run


@lru_cache(maxsize=16)
def load(text: str, entry: str) -> Program:
    """Parse and bind the kernel `entry` of a PTX text.

    Raises:
        Unsupported: it holds what the emulator does not know.
    """
    from optframe_trt.emulator.instructions import BUILDERS, CONTROLS  # which need this module

    kernel = ptx.parse(text, entry)
    layout = _layout(kernel)
    found = re.search(r"^\s*\.target\s+sm_(\d+)", text, re.MULTILINE)
    architecture = int(found[1]) if found else 0
    binder, program = Binder(kernel, layout, architecture), Program(kernel, layout, architecture=architecture)
    for place, instruction in enumerate(kernel.instructions):
        if instruction.opcode in CONTROLS:
            program.controls[place] = CONTROLS[instruction.opcode](binder, instruction)
            program.steps.append(None)
            continue
        if instruction.opcode not in BUILDERS:
            raise unsupported(instruction)
        step = BUILDERS[instruction.opcode](binder, instruction) or _nothing
        program.steps.append(guarded(step, instruction.guard) if instruction.guard else step)
    program.stops = _stops(program)
    program.constants = {file: list(table) for file, table in binder.constants.items()}
    return program


def _nothing(machine: Machine) -> None:
    """Do nothing."""


def _stops(program: Program) -> list[int]:
    stops, stop = [], len(program.steps)
    for place in reversed(range(len(program.steps))):
        stop = place if place in program.controls else stop
        stops.append(stop)
    return stops[::-1]


def _layout(kernel: ptx.Kernel) -> Layout:
    """Lay the variables out, each space's from 0 on; shared memory that the launch gives follows the rest."""
    ends = {"global": GLOBAL_BASE, "const": 0, "shared": 0, "local": 0}
    addresses: dict[str, int] = {}
    for variable in sorted(kernel.variables, key=lambda v: v.size is None):
        space = "global" if variable.space == "const" else variable.space
        align = max(variable.align, 16) if variable.size is None else variable.align
        start = -(-ends[space] // align) * align
        addresses[variable.name] = start
        ends[space] = start + (variable.size or 0)
    return Layout(addresses, ends["global"] - GLOBAL_BASE, ends["shared"], ends["local"])
