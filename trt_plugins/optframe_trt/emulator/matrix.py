"""Matrix instructions of a warp: mma and ldmatrix.

Fragments lie as the PTX ISA's figures say. Products of 16-bit floats are exact in float32; sums are float32's, in an
order of their own, as hardware's are.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from optframe_trt.emulator import values
from optframe_trt.emulator.access import place_of
from optframe_trt.emulator.control import together
from optframe_trt.emulator.program import Binder, Control, ControlBuilder, require_none, take, unsupported
from optframe_trt.emulator.ptx import Instruction, Operand, Vector, operands_of
from optframe_trt.emulator.warp import warps

if TYPE_CHECKING:
    from optframe_trt.emulator.machine import Machine

Array = np.ndarray[Any, Any]

_ROWS, _COLUMNS = 16, 8
_DEPTHS = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}


def _size(kind: str, depth: int) -> int:
    """Return how many elements a matrix has: "a" is (16, depth), "b" (depth, 8), "c" (16, 8)."""
    return {"a": _ROWS * depth, "b": depth * _COLUMNS, "c": _ROWS * _COLUMNS}[kind]


@cache
def _places(kind: str, depth: int, bits: int) -> Array:
    """Return where each element of so many bits lies in its matrix's fragment, flattened as (register, lane, item)."""
    per, size = 32 // bits, _size(kind, depth)
    register, lane, item = np.indices((size // (32 * per), 32, per)).reshape(3, -1)
    group, within = lane // 4, lane % 4
    if kind == "b":
        row, column = within * per + item + 4 * per * register, group
    elif kind == "a":
        row, column = group + 8 * (register % 2), within * per + item + 4 * per * (register // 2)
    elif per == 1:
        row, column = group + 8 * (register // 2), within * 2 + register % 2
    else:
        row, column = group + 8 * register, within * 2 + item
    result = np.empty(size, np.int64)
    result[row * (depth if kind == "a" else _COLUMNS) + column] = np.arange(size)
    return result


def _matrix(machine: Machine, slots: list[int], kind: str, depth: int, type_: str) -> Array:
    """Return a fragment as matrices (warps, rows, columns), floats in float32, integers in int64."""
    bits = values.width(type_)
    registers = np.stack([warps(machine, "u32", slot) for slot in slots])  # (registers, warps, lanes)
    items = registers[..., None].view(values.DTYPES[type_])
    flat = items.transpose(1, 0, 2, 3).reshape(items.shape[1], -1)
    matrix = flat.take(_places(kind, depth, bits), axis=1)
    columns = depth if kind == "a" else _COLUMNS
    matrix = matrix.reshape(len(matrix), -1, columns)
    if type_ == "bf16":
        return values.widen(matrix, type_).astype(np.float32)
    if type_ == "tf32":
        matrix = matrix.view(np.uint32) & np.uint32(0xFFFFE000)
        return np.asarray(matrix.view(np.float32))
    return np.asarray(matrix.astype(np.float32 if type_ in ("f16", "f32") else np.int64))


def _write_matrix(machine: Machine, slots: list[int], matrix: Array, type_: str) -> None:
    """Put matrices (warps, 16, 8) to a fragment of accumulators."""
    bits = values.width(type_)
    dtype = np.dtype(values.DTYPES[type_])
    if dtype.kind in "iu":
        matrix = (matrix & 0xFFFFFFFF).astype(np.uint32)
    flat = np.empty((len(matrix), _ROWS * _COLUMNS), np.uint32 if dtype.kind in "iu" else dtype)
    flat[:, _places("c", 0, bits)] = matrix.reshape(len(matrix), -1)
    items = flat.reshape(len(matrix), len(slots), 32, 32 // bits).view(np.uint32)[..., 0]
    for number, slot in enumerate(slots):
        machine.write("u32", slot, items[:, number].reshape(-1))


def _modifiers(by: Instruction) -> list[str]:
    """Return the modifiers behind `.sync.aligned`, which must be there."""
    if by.modifiers[:2] != ("sync", "aligned"):
        raise unsupported(by)
    return list(by.modifiers[2:])


def _multiply(binder: Binder, by: Instruction) -> Control:
    modifiers = _modifiers(by)
    shape = take(modifiers, tuple(f"m16n8k{depth}" for depth in (4, 8, 16, 32)))
    layouts = take(modifiers, ("row",)), take(modifiers, ("col",))
    saturating = take(modifiers, ("satfinite",))
    types = [take(modifiers, ("f32", "f16", "bf16", "tf32", "s32", "s8", "u8")) for _ in range(4)]
    require_none(by, modifiers)
    result, first, second, added = types
    depth = int(shape.rpartition("k")[2] or 0)
    floats = first not in ("s8", "u8")
    alike = first == second if floats else second in ("s8", "u8")
    accumulates = result == added and result in (("f32", "f16") if floats else ("s32",))
    if not all(layouts) or saturating or depth not in _DEPTHS.get(first, ()) or not alike or not accumulates:
        raise unsupported(by)
    kinds = (("c", result), ("a", first), ("b", second), ("c", added))
    fragments = [
        _fragment(binder, by, operand, kind, depth, type_)
        for operand, (kind, type_) in zip(operands_of(by, (4,)), kinds, strict=True)
    ]

    def step(machine: Machine) -> None:
        a = _matrix(machine, fragments[1], "a", depth, first)
        b = _matrix(machine, fragments[2], "b", depth, second)
        c = _matrix(machine, fragments[3], "c", depth, added)
        total = np.matmul(a, b) + c
        _write_matrix(machine, fragments[0], total.astype(np.float16) if result == "f16" else total, result)

    return together(binder, by, step)


def _fragment(binder: Binder, by: Instruction, operand: Operand | None, kind: str, depth: int, type_: str) -> list[int]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != _size(kind, depth) * values.width(type_) // (32 * 32):
        raise unsupported(by)
    return [binder.slot(by, item, "u32") for item in items]


def _load_matrices(binder: Binder, by: Instruction) -> Control:
    modifiers = _modifiers(by)
    shape = take(modifiers, ("m8n8",))
    count = int((take(modifiers, ("x1", "x2", "x4")) or "x0")[1:])
    transposed = bool(take(modifiers, ("trans",)))
    space = take(modifiers, ("shared", "shared::cta"))
    type_ = take(modifiers, ("b16",))
    require_none(by, modifiers)
    target, address = operands_of(by, (2,))
    items = target.items if isinstance(target, Vector) else (target,)
    if not (shape and count and space and type_) or len(items) != count:
        raise unsupported(by)
    place = place_of(binder, by, address)
    slots = [binder.slot(by, item, "u32") for item in items]
    wanted = np.arange(32) < 8 * count  # lanes whose addresses count

    def step(machine: Machine) -> None:
        chosen = np.tile(wanted, machine.threads // 32)
        rows = np.zeros((machine.threads, 8), np.uint16)
        with machine.narrowed(chosen):
            rows[machine.active] = machine.shared.load_matrix_rows(machine, by, place.of(machine))
        matrices = rows.reshape(-1, 4, 8, 8)[:, :count]  # (warps, matrices, rows, columns)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        words = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, matrices, rows, 4): lane = 4 row + pair
        for number, slot in enumerate(slots):
            machine.write("u32", slot, words[:, number].reshape(-1))

    return together(binder, by, step)


CONTROLS: dict[str, ControlBuilder] = {"mma": _multiply, "ldmatrix": _load_matrices}
