"""Options that several commands share, as annotated types for typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from optframe.errors import InputError, unknown_name
from optframe.types import PRECISIONS, Precision

VerifyChoice = Literal["each", "end", "off"]

Inputs = Annotated[Path | None, typer.Option("--inputs", metavar="FILE.npz", help="Real inputs, arrays by input name.")]
Pipeline = Annotated[
    str | None, typer.Option("--pipeline", metavar="TEXT", help="Passes and pipelines, separated by commas.")
]
Verify = Annotated[
    VerifyChoice, typer.Option("--verify", help="Compare after each pass, once at the end, or not at all.")
]
Dump = Annotated[Path | None, typer.Option("--dump", metavar="DIR", help="Keep the model after each pass here.")]
StopAfter = Annotated[str | None, typer.Option("--stop-after", metavar="PASS", help="End the pipeline after PASS.")]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="What builds and runs the engine.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, or auto: the best there is.")]
BackendOption = Annotated[
    list[str] | None, typer.Option("--backend-option", metavar="NAME=VALUE", help="An option of the backend.")
]
Plugins = Annotated[
    str | None,
    typer.Option(
        "--plugins", metavar="all|none|LIST", help="Which ops run as plugin kernels; `run` builds with and without."
    ),
]
ComputeCapability = Annotated[
    str | None,
    typer.Option("--compute-capability", metavar="LIST", help="GPUs to build for, such as sm86,sm89,sm120."),
]
Profile = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME=MIN/OPT/MAX,...",
        help="Range of dynamic dimensions, by name, or of an input's shape; repeat for several profiles.",
    ),
]
Workspace = Annotated[
    int | None, typer.Option("--workspace", metavar="MIB", help="Scratch memory that a layer may take.", min=1)
]
OptimizationLevel = Annotated[
    int | None, typer.Option("--optimization-level", metavar="0-5", help="How much the builder tries.", min=0)
]
Int8Base = Annotated[Literal["fp32", "fp16"], typer.Option("--int8-base", help="Precision of what stays out of INT8.")]
CalibrationCache = Annotated[
    Path | None,
    typer.Option("--calibration-cache", metavar="FILE", help="INT8 ranges that `optframe calibrate` wrote."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def engine_options(
    plugins: str | None,
    compute_capability: str | None,
    profile: list[str] | None,
    workspace: int | None,
    optimization_level: int | None,
    backend_option: list[str] | None,
) -> dict[str, str]:
    """Return the options of a backend that have flags of their own, with those given as `--backend-option`."""
    flags = {
        "plugins": plugins,
        "compute_capability": compute_capability,
        "profile": ";".join(profile) if profile else None,
        "workspace": workspace,
        "optimization_level": optimization_level,
    }
    given = {name: str(value) for name, value in flags.items() if value is not None}
    return {**read_pairs(backend_option, "--backend-option"), **given}


def split(text: str) -> tuple[str, ...]:
    """Return the words of a list separated by commas.

    Raises:
        InputError: there is none, or one twice.
    """
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words or len(set(words)) < len(words):
        raise InputError(f"'{text}' is no list of different names separated by commas")
    return words


def read_precisions(text: str) -> tuple[Precision, ...]:
    """Return the precisions that `text` lists, in their own order.

    Raises:
        InputError: an unknown one.
    """
    for word in (words := split(text)):
        if word not in PRECISIONS:
            raise unknown_name("precision", word, PRECISIONS)
    return tuple(precision for precision in PRECISIONS if precision in words)


def read_shape(text: str) -> tuple[int, ...]:
    """Return "1x3x800x1066" as a tuple.

    Raises:
        InputError: it is no such text.
    """
    sizes = text.lower().replace("×", "x").split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"'{text}' is no shape; write it like 1x3x800x1066")
    return tuple(int(size) for size in sizes)


def read_pairs(texts: list[str] | None, flag: str) -> dict[str, str]:
    """Return repeated "name=value" options as a mapping.

    Raises:
        InputError: one has no name or no "=".
    """
    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"{flag} takes name=value, not '{text}'")
        pairs[name.strip().replace("-", "_")] = value
    return pairs
