"""Parses PTX text: variables, parameters and the instructions of the one kernel, names of registers resolved."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from optframe_trt.emulator.faults import Unsupported

FILES = {"pred": 1, "8": 16, "16": 16, "32": 32, "64": 64, "16x2": 32}
"""Width of the register file that holds a type, by what follows the kind's letters; predicates lie in file 1."""


@dataclass(frozen=True)
class Register:
    """A register: its file (1, 16, 32 or 64) and its number therein."""

    file: int
    index: int


@dataclass(frozen=True)
class Immediate:
    """A number: the bits of a float where `width` is 32 or 64, an integer where it is 0."""

    value: int
    width: int = 0

    def bits(self, width: int) -> int:
        """Return the number in so many bits; a float32 may be written with the bits of a double."""
        if self.width == 64 and width == 32:
            (double,) = struct.unpack("<d", self.value.to_bytes(8, "little"))
            return int.from_bytes(struct.pack("<f", double), "little")
        return self.value % (1 << width)


@dataclass(frozen=True)
class Name:
    """A special register, a variable, a parameter or a label."""

    text: str


@dataclass(frozen=True)
class Address:
    """What stands in brackets: a base and an offset in bytes."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """What stands in braces; None for the sink `_`."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Pair:
    """A result and a predicate: `%r1|%p1`; None for the sink `_`."""

    first: Operand | None
    second: Operand | None


@dataclass(frozen=True)
class Negated:
    """A predicate with `!` before it."""

    register: Operand


Operand = Register | Immediate | Name | Address | Vector | Pair | Negated


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is its predicate and whether it runs where that is true."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: tuple[Register, bool] | None = None


@dataclass(frozen=True)
class Variable:
    """A variable of a state space, with its initial bytes where it has such; `size` is None where the launch says."""

    name: str
    space: str
    align: int
    size: int | None
    data: bytes = b""


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter and its size in bytes."""

    name: str
    size: int


@dataclass
class Kernel:
    """A parsed kernel: `labels` say before which instruction they stand, `registers` how many a file has."""

    name: str
    parameters: list[Parameter]
    variables: list[Variable]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=lambda: dict.fromkeys((1, 16, 32, 64), 0))


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINES = re.compile(r"^\s*\.(?:version|target|address_size|file|loc)\b[^\n]*$", re.MULTILINE)
_PIECE = re.compile(r"[;{}]|[^;{}]+")
_LABEL = re.compile(r"\s*([\w$.%]+)\s*:(?!:)")
_HEADER = re.compile(r"(?:\.\w+\s+)*\.(?:entry|func)\b")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)?\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.([bsuf]\d+)\s+([\w$%.]+)((?:\s*\[\s*\d*\s*\])*)(?:\s*=\s*(.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)(?:\s+\.ptr[^,]*?)?\s+([\w$%]+)\s*(?:\[(\d+)\])?\s*$"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", re.DOTALL)
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:\+\s*(-?\w+))?$|([\w$%.]+)\s*(-\s*\w+)$")
_BRACKETS = re.compile(r"[{(\[]")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def parse(text: str, entry: str) -> Kernel:
    """Return the kernel `entry` of a PTX text with the module's variables.

    Raises:
        Unsupported: it has no such kernel, or holds what is not understood.
    """
    return _Parser(entry).parse(text)


class _Parser:
    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.kernel: Kernel | None = None
        self.module: list[Variable] = []
        self.names: list[dict[str, Register]] = []
        self.inside = False

    def parse(self, text: str) -> Kernel:
        for kind, statement in _statements(_LINES.sub("", _COMMENT.sub(" ", text))):
            if kind == "header":
                self._header(statement)
            elif kind == "open":
                self.names.append({})
            elif kind == "close":
                self.names.pop()
                self.inside = self.inside and bool(self.names)
            elif kind == "label" and self.inside:
                self._kernel().labels[statement] = len(self._kernel().instructions)
            elif kind == "statement":
                self._statement(statement)
        return self._kernel()

    def _kernel(self) -> Kernel:
        if self.kernel is None:
            raise Unsupported(f"the PTX has no kernel {self.entry}")
        return self.kernel

    def _header(self, text: str) -> None:
        match = re.search(r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?", text)
        assert match, text
        self.names.append({})
        if match[1] == "entry" and match[2] == self.entry:
            parameters = [_parameter(part) for part in (match[3] or "").split(",") if part.strip()]
            self.kernel = Kernel(self.entry, parameters, self.module)
            self.inside = True

    def _statement(self, text: str) -> None:
        if not text or text.startswith(".pragma") or (self.names and text.startswith(".param")):
            return  # parameters inside a kernel are those of calls
        if text.startswith(".") and not text.startswith((".reg", ".branchtargets")):
            if not self.names or self.inside:
                self._variable(text)
        elif not self.inside:
            return
        elif text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".branchtargets"):
            self._targets(text)
        else:
            self._kernel().instructions.append(self._instruction(text))

    def _variable(self, text: str) -> None:
        if _HEADER.match(text):
            return  # a declaration of a function; calls of it are errors when they are met
        match = _VARIABLE.match(text)
        if match is None:
            raise Unsupported(f"the emulator does not know the PTX declaration '{_short(text)}'")
        space, align, kind, name, dimensions, initial = match.groups()
        item = int(kind[1:]) // 8
        count: int | None = 1
        for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
            count = count * int(dimension) if dimension and count is not None else None
        size = None if count is None else item * count
        data = _initial(initial, kind, text) if initial else b""
        self.module.append(Variable(name, space, int(align or item), size, data))

    def _registers(self, text: str) -> None:
        kind, names = text[len(".reg") :].split(None, 1)
        digits = kind.lstrip(".bsuf")
        file = FILES.get("pred" if kind == ".pred" else digits)
        if file is None:
            raise Unsupported(f"the emulator does not know the PTX declaration '{_short(text)}'")
        registers = self._kernel().registers
        for name in names.split(","):
            prefix, _, count = name.strip().rstrip(">").partition("<")
            for one in [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]:
                self.names[-1][one] = Register(file, registers[file])
                registers[file] += 1

    def _targets(self, text: str) -> None:
        kernel = self._kernel()
        (label,) = [name for name, at in kernel.labels.items() if at == len(kernel.instructions)][-1:]
        kernel.tables[label] = [part.strip() for part in text[len(".branchtargets") :].split(",")]

    def _instruction(self, text: str) -> Instruction:
        match = _INSTRUCTION.match(text)
        if match is None:
            raise Unsupported(f"the emulator does not know the PTX instruction '{_short(text)}'")
        negated, guard, opcode, modifiers, rest = match.groups()
        operands = tuple(self._operand(part, text) for part in _split(rest)) if rest else ()
        predicate = self._register(guard) if guard else None
        if guard and predicate is None:
            raise Unsupported(f"the PTX instruction '{_short(text)}' has an unknown guard")
        pair = (predicate, not negated) if predicate else None
        return Instruction(_short(text), opcode, tuple(modifiers.split(".")[1:]), operands, pair)

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.names):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str, whole: str) -> Operand | None:
        if text[0] == "%" and (register := self._register(text)):
            return register
        if text == "_":
            return None
        if text[0] == "{":
            return Vector(tuple(self._operand(part, whole) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1].strip(), whole)
        if text[0] == "!":
            negated = self._operand(text[1:].strip(), whole)
            assert negated is not None
            return Negated(negated)
        if "|" in text:
            first, second = (self._operand(part.strip(), whole) for part in text.split("|"))
            return Pair(first, second)
        return self._register(text) or _number(text) or Name(text)

    def _address(self, text: str, whole: str) -> Address:
        match = _ADDRESS.match(text)
        if match is None:
            raise Unsupported(f"the emulator does not know the address in the PTX instruction '{_short(whole)}'")
        offset = (match[2] or match[4] or "0").replace(" ", "")
        base = self._operand(match[1] or match[3], whole)
        assert base is not None
        return Address(base, int(offset, 0))


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text): a function's header, the braces of scopes, labels, and statements without semicolon."""
    pending, depth = "", 0
    for piece in _PIECE.findall(text):
        if piece not in (";", "{", "}"):
            pending += piece
            continue
        if not depth:
            while match := _LABEL.match(pending):
                yield "label", match[1]
                pending = pending[match.end() :]
        if piece == "{" and not depth and (not pending.strip() or _HEADER.match(pending.strip())):
            yield ("header", pending.strip()) if pending.strip() else ("open", "")
            pending = ""
        elif piece == ";":
            yield "statement", pending.strip()
            pending = ""
        elif piece == "}" and not depth:
            yield "close", ""
        else:
            depth += 1 if piece == "{" else -1
            pending += piece


def _split(text: str) -> Iterator[str]:
    """Yield the parts between commas that stand in no brackets."""
    if not _BRACKETS.search(text):
        yield from (part.strip() for part in text.split(","))
        return
    depth, start = 0, 0
    for index, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            yield text[start:index].strip()
            start = index + 1
    yield text[start:].strip()


def _number(text: str) -> Immediate | None:
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Immediate(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Immediate(int(text[2:], 16), 64)
    return Immediate(_integer(text)) if _NUMBER.match(text) else None


def _integer(text: str) -> int:
    text = text.rstrip("U")
    digits = text.lstrip("-")
    octal = len(digits) > 1 and digits.isdecimal() and digits[0] == "0"
    return int(text, 8) if octal else int(text, 0)


def _parameter(text: str) -> Parameter:
    match = _PARAMETER.match(text.strip())
    if match is None:
        raise Unsupported(f"the emulator does not know the PTX parameter '{_short(text)}'")
    return Parameter(match[3], int(match[2][1:]) // 8 * int(match[4] or 1))


def _initial(text: str, kind: str, whole: str) -> bytes:
    """Return the bytes of an initialiser's numbers; nested braces hold rows that follow each other."""
    item = int(kind[1:]) // 8
    found = []
    for part in re.split(r"[{},\s]+", text.strip()):
        number = _number(part) if part else None
        if part and number is None:
            raise Unsupported(f"the emulator knows numbers alone as initial values, not '{_short(whole)}'")
        if number is not None:
            found.append(number.bits(8 * item).to_bytes(item, "little"))
    return b"".join(found)


def _short(text: str) -> str:
    return " ".join(text.split())


def operands_of(instruction: Instruction, counts: Sequence[int]) -> tuple[Operand | None, ...]:
    """Return the operands once there are as many as `counts` allows.

    Raises:
        Unsupported: there are not.
    """
    if len(instruction.operands) not in counts:
        raise Unsupported(f"the emulator does not know the operands of '{instruction.text}'")
    return instruction.operands
