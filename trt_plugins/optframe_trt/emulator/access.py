"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe.cuda import WAIT_ARCHITECTURE
from optframe_trt.emulator import values
from optframe_trt.emulator.memory import LOCAL_WINDOW, SHARED_WINDOW, within
from optframe_trt.emulator.program import Binder, Builder, Step, require_none, take, unsupported
from optframe_trt.emulator.ptx import Address, Instruction, Name, Operand, Register, Vector, operands_of

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]

_SPACES = {"global": "global", "const": "global", "shared": "shared", "shared::cta": "shared", "local": "local"}
_ORDER = {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "nc"}
_CACHE = {"ca", "cg", "cs", "cv", "lu", "wb", "wt"}
_POLICY = "L2::cache_hint"
_TYPES = (*values.INTEGERS, "f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


def _is_hint(word: str) -> bool:
    """Whether a modifier changes how fast an access is or when others see it, but not what it does here."""
    return word in _ORDER or word in _CACHE or word.startswith(("L1::", "L2::"))


@dataclass(frozen=True)
class Place:
    """An address operand: a register or constant of `file` bits, and an offset in bytes."""

    slot: int
    file: int
    offset: int

    def of(self, machine: Machine) -> Array:
        """Return the address of each selected thread."""
        if self.file == 64:
            base = machine.gather("s64", self.slot)
            return base + self.offset if self.offset else base
        narrow = machine.gather("u32", self.slot).astype(np.int64)
        return narrow + self.offset & 0xFFFFFFFF if self.offset else narrow


def place_of(binder: Binder, by: Instruction, operand: Operand | None) -> Place:
    """Return an address operand; names of variables are constants."""
    if not isinstance(operand, Address):
        raise unsupported(by)
    if isinstance(operand.base, Register):
        return Place(operand.base.index, operand.base.file, operand.offset)
    return Place(binder.slot(by, operand.base, "u64"), 64, operand.offset)


def _space(by: Instruction, words: list[str]) -> str:
    """Remove the state space from an instruction's words and return it; generic where none is named."""
    found = next((word for word in words if word in _SPACES), None)
    if found is None:
        return "generic"
    words.remove(found)
    return _SPACES[found]


def _parts(space: str, addresses: Array) -> list[tuple[str, Array | None, Array]]:
    """Return (space, which of the selected threads or None for all, their addresses): generic addresses taken apart."""
    if space != "generic":
        return [(space, None, addresses)]
    found = []
    rest = np.ones(len(addresses), bool)
    for name, start in (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW)):
        inside = within(addresses, start)
        if inside.any():
            found.append((name, inside, addresses[inside] - start))
            rest &= ~inside
    if rest.any():
        found.append(("global", rest, addresses[rest]))
    return [(name, None if which.all() else which, part) for name, which, part in found]


def _load_part(machine: Machine, by: Instruction, space: str, addresses: Array, item: int, count: int) -> Array:
    if space == "shared":
        return machine.shared.load(machine, by, addresses, item, count)
    if space == "global":
        index = machine.memory.places(machine, by, addresses, item * count, writing=False)
        return machine.memory.words.load(index, item, count)
    index = machine.local.places(machine, by, addresses, item * count)
    return machine.local.words.load(index, item, count)


def _store_part(machine: Machine, by: Instruction, space: str, addresses: Array, words: Array) -> None:
    if space == "shared":
        machine.shared.store(machine, by, addresses, words)
    elif space == "global":
        index = machine.memory.places(machine, by, addresses, words.itemsize * words.shape[1], writing=True)
        machine.memory.words.store(index, words)
    else:
        index = machine.local.places(machine, by, addresses, words.itemsize * words.shape[1])
        machine.local.words.store(index, words)


def load_words(machine: Machine, by: Instruction, space: str, addresses: Array, item: int, count: int) -> Array:
    """Return (selected threads, count) unsigned words of `item` bytes from a state space."""
    result = np.empty((len(addresses), count), f"uint{8 * item}")
    for name, which, part in _parts(space, addresses):
        if which is None:
            return _load_part(machine, by, name, part, item, count)
        with machine.narrowed(_spread(machine, which)):
            result[which] = _load_part(machine, by, name, part, item, count)
    return result


def store_words(machine: Machine, by: Instruction, space: str, addresses: Array, words: Array) -> None:
    """Put (selected threads, count) unsigned words to a state space."""
    for name, which, part in _parts(space, addresses):
        if which is None:
            _store_part(machine, by, name, part, words)
            continue
        with machine.narrowed(_spread(machine, which)):
            _store_part(machine, by, name, part, words[which])


def _spread(machine: Machine, which: Array) -> Array:
    """Return which threads of all are the chosen ones of those selected."""
    result = np.zeros(machine.threads, bool)
    result[machine.active_threads] = which
    return result


def _shape(by: Instruction) -> tuple[str, int, str]:
    """Return the state space, the number of items and their type of a load or store."""
    words = [word for word in by.modifiers if not _is_hint(word)]
    space = _space(by, words)
    count = int((take(words, ("v2", "v4", "v8")) or "v1")[1:])
    type_ = take(words, _TYPES)
    require_none(by, words)
    if not type_ or count * values.width(type_) > 128:
        raise unsupported(by)
    return space, count, type_


def _operands(by: Instruction) -> tuple[Operand | None, ...]:
    """Return a load's or store's operands without the cache policy, which is a hint too."""
    return operands_of(by, (3,))[:2] if _POLICY in by.modifiers else operands_of(by, (2,))


def _items(by: Instruction, operand: Operand | None, count: int) -> tuple[Operand | None, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise unsupported(by)
    return items


def _load(binder: Binder, by: Instruction) -> Step:
    if "param" in by.modifiers:
        return _load_parameter(binder, by)
    space, count, type_ = _shape(by)
    target, address = _operands(by)
    place, item = place_of(binder, by, address), values.width(type_) // 8
    registers = [None if one is None else binder.register(by, one) for one in _items(by, target, count)]
    puts = [(number, *_holder(one, type_)) for number, one in enumerate(registers) if one is not None]
    narrow = values.DTYPES[type_ if type_[0] in "us" else f"u{8 * item}"]

    def step(machine: Machine) -> None:
        words = load_words(machine, by, space, place.of(machine), item, count).view(narrow)
        for number, slot, holder in puts:
            machine.scatter(holder, slot, words[:, number])

    return step


def _holder(register: Register, type_: str) -> tuple[int, str]:
    """Return a register and the integer type that extends a loaded value to its width."""
    return register.index, f"{'s' if type_[0] == 's' else 'u'}{register.file}"


def _load_parameter(binder: Binder, by: Instruction) -> Step:
    words = [word for word in by.modifiers if word != "param"]
    count = int((take(words, ("v2", "v4")) or "v1")[1:])
    type_ = take(words, _TYPES)
    require_none(by, words)
    target, address = operands_of(by, (2,))
    starts = parameter_offsets([parameter.size for parameter in binder.kernel.parameters])
    names = [parameter.name for parameter in binder.kernel.parameters]
    if not type_ or not isinstance(address, Address) or not isinstance(address.base, Name):
        raise unsupported(by)
    if address.base.text not in names:
        return lambda machine: machine.fault(by, "reads what a call returned, and the emulator runs no calls")
    start = starts[names.index(address.base.text)] + address.offset
    item = values.width(type_) // 8
    narrow = np.dtype(values.DTYPES[type_ if type_[0] in "us" else f"u{8 * item}"])
    registers = [binder.register(by, one) for one in _items(by, target, count)]

    def step(machine: Machine) -> None:
        words = np.frombuffer(machine.parameters, narrow, count, start)
        for word, register in zip(words, registers, strict=True):
            slot, holder = _holder(register, type_)
            machine.write(holder, slot, np.asarray(word).astype(values.DTYPES[holder]))

    return step


def parameter_offsets(sizes: list[int]) -> list[int]:
    """Return where parameters of so many bytes lie, each aligned to its size."""
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // min(size, 8)) * min(size, 8)
        offsets.append(start)
        end = start + size
    return offsets


def _store(binder: Binder, by: Instruction) -> Step | None:
    if "param" in by.modifiers:
        return None  # an argument of a call, which is an error once it is reached
    space, count, type_ = _shape(by)
    address, source = _operands(by)
    place, item = place_of(binder, by, address), values.width(type_) // 8
    word = np.dtype(f"uint{8 * item}")
    sources = []
    for one in _items(by, source, count):
        holder = f"u{one.file}" if isinstance(one, Register) else f"u{max(8 * item, 16)}"
        sources.append((holder, binder.slot(by, one, holder)))

    def step(machine: Machine) -> None:
        addresses = place.of(machine)
        words = np.empty((len(addresses), count), word)
        for number, (holder, slot) in enumerate(sources):
            words[:, number] = machine.gather(holder, slot)
        store_words(machine, by, space, addresses, words)

    return step


_ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, value: old + value,
    "min": lambda old, value: min(old, value),
    "max": lambda old, value: max(old, value),
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "cas": lambda old, compare, value: value if old == compare else old,
    "inc": lambda old, value: old.dtype.type(0) if old >= value else old + old.dtype.type(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - old.dtype.type(1),
}


def _atomic(binder: Binder, by: Instruction) -> Step:
    words = [word for word in by.modifiers if not _is_hint(word)]
    space = _space(by, words)
    operation = take(words, tuple(_ATOMICS))
    take(words, ("noftz",))
    type_ = take(words, _TYPES)
    require_none(by, words)
    floats = type_ in values.FLOATS
    if not operation or not type_ or (floats and operation not in ("add", "exch", "min", "max")):
        raise unsupported(by)
    sources = 2 if operation == "cas" else 1
    operands = operands_of(by, (sources + (1 if by.opcode == "red" else 2),))
    target = None if by.opcode == "red" or operands[0] is None else binder.slot(by, operands[0], type_)
    place = place_of(binder, by, operands[-1 - sources])
    slots = [binder.slot(by, operand, type_) for operand in operands[-sources:]]
    function = _ATOMICS[operation]
    item, word = values.width(type_) // 8, f"uint{values.width(type_)}"
    if floats and operation != "exch":
        function = _on_floats(type_, function)

    def step(machine: Machine) -> None:
        addresses = place.of(machine)
        given = [machine.gather(type_, slot) for slot in slots]
        old = np.empty(given[0].shape, values.DTYPES[type_])
        for name, which, part in _parts(space, addresses):
            chosen = np.arange(len(addresses)) if which is None else np.flatnonzero(which)
            with machine.narrowed(machine.selected if which is None else _spread(machine, which)):
                table, index = _atomic_table(machine, by, name, part, item, word)
            typed = table.view(values.DTYPES[type_]).reshape(-1, *old.shape[1:])
            for thread, at in zip(chosen.tolist(), index.tolist(), strict=True):
                old[thread] = typed[at]
                typed[at] = function(typed[at], *(value[thread] for value in given))
        if target is not None:
            machine.scatter(type_, target, old)

    return step


def _on_floats(type_: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def operate(old: Any, value: Any) -> Any:
        wide = function(values.widen(np.asarray(old), type_), values.widen(np.asarray(value), type_))
        return values.narrow(np.asarray(wide), type_)

    def extreme(old: Any, value: Any) -> Any:
        wide = (values.widen(np.asarray(one), type_) for one in (old, value))
        return values.narrow(np.asarray((np.fmin if function is _ATOMICS["min"] else np.fmax)(*wide)), type_)

    return operate if function is _ATOMICS["add"] else extreme


def _atomic_table(
    machine: Machine, by: Instruction, space: str, addresses: Array, item: int, word: str
) -> tuple[Array, Array]:
    """Return memory as words, and where the addresses lie in it."""
    if space == "shared":
        index = machine.shared.places(machine, by, addresses, item)
        machine.shared.note_atomic(machine, by, addresses, index, item)
        return machine.shared.words.data.view(word), index
    if space == "global":
        index = machine.memory.places(machine, by, addresses, item, writing=True)
        return machine.memory.words.data.view(word), index
    machine.fault(by, "is an atomic on local memory")


def _copy(binder: Binder, by: Instruction) -> Step:
    """cp.async: copies of 4, 8 or 16 bytes from global to shared memory, and their groups."""
    words = [word for word in by.modifiers if not word.startswith("L2::")]
    kind = ".".join(words)
    if kind == "async.commit_group":
        return lambda machine: machine.copies.commit()
    if kind == "async.wait_all":
        return lambda machine: machine.copies.wait(None)
    if kind == "async.wait_group":
        (number,) = operands_of(by, (1,))
        slot = binder.slot(by, number, "u32")
        return lambda machine: machine.copies.wait(int(machine.views["u32"][slot]))
    if words[:1] != ["async"] or words[1:2] not in (["ca"], ["cg"]) or words[3:] != ["global"]:
        raise unsupported(by)
    if words[2] not in ("shared", "shared::cta"):
        raise unsupported(by)
    target, source, size, *rest = operands_of(by, (3, 4))
    to, start = place_of(binder, by, target), place_of(binder, by, source)
    bytes_, given = binder.slot(by, size, "u32"), [binder.slot(by, one, "u32") for one in rest]

    def step(machine: Machine) -> None:
        whole = int(machine.views["u32"][bytes_])
        targets, sources = to.of(machine), start.of(machine)
        if not given:
            copied = load_words(machine, by, "global", sources, 4, whole // 4)
        else:
            copied = _partial(machine, by, sources, whole, np.minimum(machine.gather("u32", given[0]), whole))
        machine.copies.start(by, targets, copied)

    return step


def _partial(machine: Machine, by: Instruction, sources: Array, whole: int, sizes: Array) -> Array:
    """Return words of which only the first `sizes` bytes are read; zeros follow."""
    copied = np.zeros((len(sources), whole), np.uint8)
    for byte in range(whole):
        wanted = sizes > byte
        if wanted.any():
            with machine.narrowed(_spread(machine, wanted)):
                copied[wanted, byte] = load_words(machine, by, "global", sources[wanted] + byte, 1, 1)[:, 0]
    return copied.view(np.uint32)


def _nothing(binder: Binder, by: Instruction) -> None:
    """Bind what changes nothing here: fences, since all threads see memory alike; prefetches and pauses."""


def _dependency(binder: Binder, by: Instruction) -> Step | None:
    """griddepcontrol: waits for the kernel before, which a launch without one only notes, or calls the next one."""
    if by.modifiers not in (("wait",), ("launch_dependents",)) or binder.architecture < WAIT_ARCHITECTURE:
        raise unsupported(by)
    return (lambda machine: machine.wait()) if by.modifiers == ("wait",) else None


def _active_mask(binder: Binder, by: Instruction) -> Step:
    if by.modifiers != ("b32",):
        raise unsupported(by)
    (target,) = operands_of(by, (1,))
    out = binder.slot(by, target, "u32")

    def step(machine: Machine) -> None:
        machine.write("u32", out, np.repeat(machine.active_masks.astype(np.uint32), 32))

    return step


def _create_policy(binder: Binder, by: Instruction) -> Step:
    """createpolicy: a number that says nothing, since no cache is imitated."""
    target, *_ = operands_of(by, (1, 2, 3))
    out = binder.slot(by, target, "u64")
    return lambda machine: machine.write("u64", out, np.zeros(machine.threads, np.uint64))


BUILDERS: dict[str, Builder] = {
    "createpolicy": _create_policy,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy,
    "activemask": _active_mask,
    "griddepcontrol": _dependency,
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "nanosleep"), _nothing),
}
