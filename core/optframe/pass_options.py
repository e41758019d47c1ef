"""Options of a pass or calibrator as text: read by each field's annotation, printed so that they read back the same."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, TypeAlias

from optframe.errors import PluginError
from optframe.passes import GraphPass

BARE = re.compile(r"[A-Za-z0-9_.+\-:/*]+")
"""Text that needs no quotes."""

NONE = "none"
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): NONE}


@dataclass(frozen=True)
class Word:
    """A value as written, without its quotes; `column` counts from 1."""

    text: str
    quoted: bool
    column: int


@dataclass(frozen=True)
class Words:
    """A parenthesised list of values as written."""

    items: tuple[Word, ...]
    column: int


Written: TypeAlias = Word | Words


def option_types(cls: type[Any]) -> Mapping[str, Any]:
    """Return option name -> annotation of the fields of `cls`, a dataclass with a `name`.

    Raises:
        PluginError: an annotation cannot be resolved, or is of a kind that has no text form.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # a plugin's annotation may name anything
        raise PluginError(f"{cls.name}: its options' types cannot be resolved ({error})") from error
    kinds = {field.name: hints[field.name] for field in fields(cls) if field.init}
    for name, kind in kinds.items():
        require_text_form(cls.name, name, kind)
    return kinds


def require_text_form(owner: str, name: str, kind: Any) -> None:
    """See that the option `name` of `owner`, annotated as `kind`, can be written as text.

    Raises:
        PluginError: it cannot.
    """
    if not _has_text_form(kind):
        raise PluginError(f"{owner}: option '{name}' is of a type with no text form: {kind}")


def read_option(owner: str, name: str, kind: Any, text: str) -> Any:
    """Return the value that `text`, given alone, has for the option `name` of `owner`, annotated as `kind`.

    Raises:
        PluginError: no text can be of that type.
        ValueError: this one is not; the message goes behind the option's name.
    """
    require_text_form(owner, name, kind)
    return read_value(kind, Word(text, quoted=False, column=1))


def option_default(field: Field[Any]) -> Any:
    """Return the default of an option, MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _has_text_form(kind: Any) -> bool:
    if _is_tuple(kind):
        return _has_text_form(typing.get_args(kind)[0]) and not _is_tuple(typing.get_args(kind)[0])
    if _is_union(kind):
        return all(map(_has_text_form, typing.get_args(kind)))
    return kind in NAMES or typing.get_origin(kind) is Literal


def _is_tuple(kind: Any) -> bool:
    arguments = typing.get_args(kind)
    return typing.get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def describe_type(kind: Any) -> str:
    """Return in words what values of annotation `kind` look like."""
    if _is_tuple(kind):
        return f"a list like ({describe_type(typing.get_args(kind)[0])}, ...)"
    if _is_union(kind):
        return " or ".join(describe_type(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(str(choice) for choice in typing.get_args(kind))}"
    return NAMES[kind]


def read_value(kind: Any, written: Written) -> Any:
    """Return the value of annotation `kind` that `written` stands for.

    Raises:
        ValueError: it stands for none; the message says what was expected.
    """
    try:
        return _read(kind, written)
    except ValueError:
        raise ValueError(f"wants {describe_type(kind)}, not {_show_written(written)}") from None


def _read(kind: Any, written: Written) -> Any:
    if _is_union(kind):
        return _read_first(typing.get_args(kind), written)
    if isinstance(written, Words):
        if not _is_tuple(kind):
            raise ValueError
        return tuple(_read(typing.get_args(kind)[0], item) for item in written.items)
    if typing.get_origin(kind) is Literal:
        return _read_choice(typing.get_args(kind), written)
    if kind is str:
        return written.text
    if written.quoted or kind not in NAMES:
        raise ValueError
    return _read_bare(kind, written.text)


def _read_first(kinds: tuple[Any, ...], written: Written) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is str):  # text takes anything, so it comes last
        try:
            return _read(kind, written)
        except ValueError:
            continue
    raise ValueError


def _read_choice(choices: tuple[Any, ...], written: Word) -> Any:
    for choice in choices:
        if isinstance(choice, str) and choice == written.text:
            return choice
        if not isinstance(choice, str) and not written.quoted and show_bare(choice) == written.text:
            return choice
    raise ValueError


def _read_bare(kind: Any, text: str) -> Any:
    if kind is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if kind is float and text.lower() != "nan":
        return float(text)
    by_text: dict[str, Any] = {"true": True, "false": False} if kind is bool else {NONE: None}
    if kind in (int, float) or text not in by_text:
        raise ValueError
    return by_text[text]


def show_value(kind: Any, value: Any) -> str:
    """Return `value`, of annotation `kind`, as text that `read_value` takes back to it."""
    if isinstance(value, tuple):
        member = next(typing.get_args(k)[0] for k in (kind, *typing.get_args(kind)) if _is_tuple(k))
        return f"({','.join(show_value(member, item) for item in value)})"
    if not isinstance(value, str):
        return show_bare(value)
    if BARE.fullmatch(value) and _reads_as(kind, value):
        return value
    return json.dumps(value)


def show_bare(value: Any) -> str:
    """Return a number, truth value or None as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return NONE if value is None else repr(value)


def _reads_as(kind: Any, text: str) -> bool:
    """Whether `text` without quotes reads as itself, and not as a number, a truth value or None."""
    value = read_value(kind, Word(text, quoted=False, column=0))
    return isinstance(value, str) and value == text


def _show_written(written: Written) -> str:
    if isinstance(written, Words):
        return f"({','.join(map(_show_written, written.items))})"
    return json.dumps(written.text) if written.quoted else f"'{written.text}'"


def show_options(step: GraphPass) -> str:
    """Return the options of `step` that differ from their defaults, as `a=1,b=two`; empty where none does."""
    kinds = option_types(type(step))
    options = [(field.name, getattr(step, field.name), option_default(field)) for field in fields(step) if field.init]
    return ",".join(f"{name}={show_value(kinds[name], value)}" for name, value, default in options if value != default)
