"""The errors a user can meet, each with the exit status the command line gives it."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePath


class OptframeError(Exception):
    """Base of all errors shown to a user: one line that says what is wrong and what to do."""

    exit_status = 1


class CheckFailed(OptframeError):
    """A check of the model failed: accuracy, verification, an export that does not equal its source."""

    exit_status = 1


class InputError(OptframeError):
    """The user's input or usage is wrong: a file, a name, an option, a combination."""

    exit_status = 2


class EnvironmentLacks(OptframeError):
    """The machine or the Python environment lacks something that the request needs."""

    exit_status = 3


class PluginError(InputError):
    """A plugin or one of its contributions is at fault; the message names plugin, distribution and version."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a `name` of `kind` ("pass", "model", ...) that nobody registered, with a suggestion."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"
    return InputError(f"unknown {kind} '{name}': {hint}")


PLUGIN_ERRORS = (Exception, SystemExit)
"""What a plugin's code may raise without taking the program down."""


def a_type(value: object) -> str:
    """Return in words of which type a `value` is that should have been something else."""
    return "None" if value is None else f"an object of type {type(value).__name__}"


def describe(error: BaseException) -> str:
    """Return type and first line of any `error`, with the file and line that raised it."""
    text = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
