"""Optimisation profiles: the smallest, usual and largest shape of each dynamic input, from text and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optframe.errors import InputError, unknown_name

Shape = tuple[int, ...]
Dim = int | str | None

EXAMPLE = "--profile batch=1/1/4,height=320/800/1344, or --profile images=1x3x320x512/1x3x800x1066/4x3x1344x1344"


@dataclass(frozen=True)
class ShapeRange:
    """The smallest shape that an input may have, the one to be fast for, and the largest."""

    min: Shape
    opt: Shape
    max: Shape


LARGEST = 2**31 - 1
"""TensorRT multiplies sizes in 64 bits, and refuses tensors far smaller than this size squared."""

Profile = Mapping[str, ShapeRange]
"""Input name -> its shapes, for every dynamic input."""


def input_dims(model: ir.Model) -> dict[str, tuple[Dim, ...]]:
    """Return input name -> dimensions as the graph declares them: a size, a name, or None."""
    return {value.name or "": _dims(value) for value in model.graph.inputs if not value.is_initializer()}


def _dims(value: ir.Value) -> tuple[Dim, ...]:
    if value.shape is None:
        raise InputError(f"input '{value.name}' declares no shape; TensorRT needs to know how many dimensions it has")
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def resolve(text: str, inputs: Mapping[str, Sequence[Dim]]) -> tuple[Profile, ...]:
    """Return the profiles that `text` asks for, one for each part between semicolons; none for a static model.

    A part is a list of `name=min/opt/max`, separated by commas. The name is an input with three shapes
    (`images=1x3x320x512/1x3x800x1066/4x3x1344x1344`), or a named dimension with three sizes (`batch=1/1/4`), which then
    holds for every input that has it. One value in place of three stands for all of them.

    Raises:
        InputError: the text is no profile, names what the model has not, contradicts the graph, or leaves a dynamic
            dimension open.
    """
    parts = [part for part in text.split(";") if part.strip()]
    dynamic = {name: dims for name, dims in inputs.items() if not all(isinstance(dim, int) for dim in dims)}
    if parts and not dynamic:
        raise InputError("a profile is given, but every input of the model has a fixed shape: leave --profile out")
    if dynamic and not parts:
        described = ", ".join(f"{name} {_show(dims)}" for name, dims in dynamic.items())
        raise InputError(f"the model has dynamic shapes ({described}): say in what range, such as {EXAMPLE}")
    return tuple(_resolve_one(part, dynamic, inputs) for part in parts)


def _resolve_one(text: str, dynamic: Mapping[str, Sequence[Dim]], inputs: Mapping[str, Sequence[Dim]]) -> Profile:
    given: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name, shapes in _entries(text):
        if name in given:
            raise InputError(f"the profile names '{name}' twice; several profiles are given by --profile each")
        given[name] = shapes
    symbols = {dim for dims in dynamic.values() for dim in dims if isinstance(dim, str)}
    for name in given:
        if name not in symbols and name not in inputs:
            raise unknown_name("input or named dimension in --profile", name, symbols | dynamic.keys())
    return {name: _range(name, dims, given) for name, dims in dynamic.items()}


def _entries(text: str) -> Iterator[tuple[str, tuple[Shape, Shape, Shape]]]:
    for entry in text.split(","):
        name, equals, value = entry.partition("=")
        shapes = [_sizes(word) for word in value.split("/")]
        if not (name.strip() and equals) or len(shapes) not in (1, 3) or None in shapes:
            raise InputError(f"'{entry.strip()}' is no part of a profile; write it like {EXAMPLE}")
        low, usual, high = (shape or () for shape in (shapes * 3 if len(shapes) == 1 else shapes))
        yield name.strip(), (low, usual, high)


def _sizes(text: str) -> Shape | None:
    words = text.strip().lower().split("x")
    return tuple(map(int, words)) if all(word.isascii() and word.isdigit() for word in words) else None


def _range(name: str, dims: Sequence[Dim], given: Mapping[str, tuple[Shape, Shape, Shape]]) -> ShapeRange:
    """Return the shapes of one input, from its own entry or from those of its dimensions."""
    low, usual, high = given[name] if name in given else _from_symbols(name, dims, given)
    for shape in (low, usual, high):
        fits = len(shape) == len(dims) and all(
            not isinstance(d, int) or d == s for d, s in zip(dims, shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"profile of input '{name}': {_show(shape)} contradicts the graph, which has {_show(dims)}"
            )
    _check_symbols(name, dims, given, (low, usual, high))
    if max((*low, *usual, *high), default=0) > LARGEST:
        raise InputError(f"profile of input '{name}': sizes are at most {LARGEST}")
    if any(size == 0 and dim != 0 for size, dim in zip(high, dims, strict=True)):
        raise InputError(f"profile of input '{name}': max {_show(high)} leaves nothing that the engine could run on")
    if any(not a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
        raise InputError(
            f"profile of input '{name}': min {_show(low)}, opt {_show(usual)}, max {_show(high)} do not rise"
        )
    return ShapeRange(low, usual, high)


def _from_symbols(
    name: str, dims: Sequence[Dim], given: Mapping[str, tuple[Shape, Shape, Shape]]
) -> tuple[Shape, Shape, Shape]:
    columns = []
    for index, dim in enumerate(dims):
        if isinstance(dim, int):
            columns.append((dim, dim, dim))
        elif dim is not None and dim in given:
            columns.append(_scalars(dim, given[dim]))
        else:
            open_dim = f"'{dim}'" if dim else f"number {index}"
            raise InputError(f"the profile leaves dimension {open_dim} of input '{name}' {_show(dims)} open: {EXAMPLE}")
    low, usual, high = zip(*columns, strict=True)
    return low, usual, high


def _scalars(name: str, shapes: tuple[Shape, Shape, Shape]) -> tuple[int, int, int]:
    if any(len(shape) != 1 for shape in shapes):
        raise InputError(f"'{name}' in the profile is a dimension and takes sizes, such as {name}=1/2/4")
    return shapes[0][0], shapes[1][0], shapes[2][0]


def _check_symbols(
    name: str,
    dims: Sequence[Dim],
    given: Mapping[str, tuple[Shape, Shape, Shape]],
    shapes: tuple[Shape, Shape, Shape],
) -> None:
    """See that an input's own entry agrees with the entries of its dimensions."""
    for index, dim in enumerate(dims):
        if isinstance(dim, str) and dim in given and _scalars(dim, given[dim]) != tuple(s[index] for s in shapes):
            raise InputError(f"the profile says two things of dimension '{dim}' of input '{name}': give it once")


def _show(dims: Sequence[Dim]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims)
