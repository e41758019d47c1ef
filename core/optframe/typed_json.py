"""Reads JSON back into frozen dataclasses, and refuses what is not of the declared types."""

from __future__ import annotations

import types
import typing
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

Kind = TypeVar("Kind")


def read(kind: type[Kind], data: object) -> Kind:
    """Return the dataclass `kind` that `data`, as `json.loads` returned it, describes; unknown names are left out.

    Fields may be of simple types, Path (text in JSON), dataclasses, tuples, mappings and sequences of such, Literal,
    Union and Any.

    Raises:
        TypeError: a value is missing or not of its field's type; the message names it like "inputs[0].shape".
    """
    return cast(Kind, _value(kind, data, ""))


def _value(kind: Any, data: object, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    if kind is Path:
        return Path(_checked(isinstance(data, str), data, kind, where))
    if origin is Literal:
        return _checked(isinstance(data, str) and data in arguments, data, kind, where)
    if origin in (Union, types.UnionType):
        return _first(arguments, data, where)
    if origin in (tuple, abc.Sequence):
        return _sequence(arguments, data, where)
    if origin is abc.Mapping:
        entries = _checked(isinstance(data, dict), data, dict, where).items()
        return {name: _value(arguments[1], entry, f"{where}['{name}']") for name, entry in entries}
    # bool is a subclass of int, but no number
    return _checked(isinstance(data, kind) and (kind is bool or not isinstance(data, bool)), data, kind, where)


def _checked(fits: bool, data: Any, kind: Any, where: str) -> Any:
    if not fits:
        raise TypeError(f"{where.removeprefix('.') or 'it'} is no {getattr(kind, '__name__', kind)}")
    return data


def _dataclass(kind: Any, data: object, where: str) -> Any:
    entries: Mapping[str, object] = _checked(isinstance(data, dict), data, dict, where)
    hints = typing.get_type_hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in entries:
            values[field.name] = _value(hints[field.name], entries[field.name], f"{where}.{field.name}")
        else:
            raise TypeError(f"{f'{where}.{field.name}'.removeprefix('.')} is missing")
    make = cast(Callable[..., Any], kind)
    return make(**values)


def _sequence(arguments: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
    entries: list[object] = _checked(isinstance(data, list), data, list, where)
    fixed = len(arguments) > 1 and arguments[1] is not Ellipsis
    _checked(not fixed or len(entries) == len(arguments), data, f"list of {len(arguments)}", where)
    kinds = arguments if fixed else arguments[:1] * len(entries)
    pairs = enumerate(zip(kinds, entries, strict=True))
    return tuple(_value(kind, entry, f"{where}[{number}]") for number, (kind, entry) in pairs)


def _first(kinds: tuple[Any, ...], data: object, where: str) -> Any:
    for kind in kinds:
        try:
            return _value(kind, data, where)
        except TypeError:
            continue
    return _checked(False, data, " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds), where)
