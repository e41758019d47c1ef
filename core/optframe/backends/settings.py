"""A backend's own options, a frozen dataclass: read from text, and kept as JSON beside an engine that is an ONNX file.

A field is of a type that `optframe.pass_options` knows; what else a value must be is checked in `__post_init__`.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optframe import files, typed_json
from optframe.engines import sidecar
from optframe.errors import InputError, unknown_name
from optframe.pass_options import read_option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def parse_settings(kind: type[Settings], backend: str, options: Mapping[str, str]) -> Settings:
    """Return the settings that `options` of `backend` ask for.

    Raises:
        InputError: an option is unknown, or its value is not one that it takes.
        PluginError: an option is of a type that no text can be of.
    """
    hints = typing.get_type_hints(kind)
    kinds = {field.name: hints[field.name] for field in fields(kind)}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in kinds:
            raise unknown_name(f"option of backend {backend}", name, kinds)
        try:
            values[name] = read_option(f"backend {backend}", name, kinds[name], text)
        except ValueError as error:
            raise InputError(f"backend {backend}: {name} {error}") from error
    return kind(**values)


def save_settings(settings: DataclassInstance, engine: Path) -> None:
    """Write `settings` beside `engine`.

    Raises:
        InputError: the folder cannot be written.
        EnvironmentLacks: the disk is full.
    """
    files.write_text(sidecar(engine), json.dumps(asdict(settings), indent=1))


def load_settings(kind: type[Settings], engine: Path) -> Settings:
    """Return what `save_settings` wrote beside `engine`, the defaults where nothing is there.

    Raises:
        InputError: what is there is damaged.
    """
    path = sidecar(engine)
    if not path.is_file():
        return kind()
    try:
        return typed_json.read(kind, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise InputError(f"{path} is damaged; build the engine again") from error
