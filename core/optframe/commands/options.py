"""Options that several commands share, as annotated types for typer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from optframe.errors import InputError, unknown_name
from optframe.types import PRECISIONS, Precision

VerifyChoice = Literal["each", "end", "off"]

MODEL_PANEL = "The model"
GRAPH_PANEL = "Graph and precision"
ENGINE_PANEL = "Engine and output"


def _option(panel: str, *names: str, **details: Any) -> Any:
    """Return the declaration of an option that the help shows in `panel`."""
    return typer.Option(*names, rich_help_panel=panel, **details)


_model, _graph, _engine = (partial(_option, panel) for panel in (MODEL_PANEL, GRAPH_PANEL, ENGINE_PANEL))

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or the path of an ONNX file.")]
Inputs = Annotated[Path | None, _model("--inputs", metavar="FILE.npz", help="Real inputs, arrays by input name.")]
Checkpoint = Annotated[Path | None, _model("--checkpoint", metavar="FILE", help="Weights; never executes code.")]
Variant = Annotated[str | None, _model("--variant", help="Which of its variants.")]
Shape = Annotated[str | None, _model("--shape", metavar="NxCxHxW", help="Input shape.")]
Opset = Annotated[int | None, _model("--opset", help="ONNX opset to export.")]
Exporter = Annotated[str | None, _model("--exporter", help="torchscript or dynamo.")]
Mask = Annotated[bool, _model("--mask", help="With a padding mask as second input.")]
Dynamic = Annotated[bool, _model("--dynamic", help="With free batch, height and width.")]
MeasuredImages = Annotated[Path | None, _model("--images", metavar="PATH", help="An image or a folder to measure on.")]
CalibrationImages = Annotated[
    Path | None, _model("--calibration-images", metavar="DIR", help="Images for INT8 ranges.")
]
ModelOption = Annotated[
    list[str] | None, _model("--model-option", metavar="NAME=VALUE", help="Another option of the model.")
]

Pipeline = Annotated[
    str | None, _graph("--pipeline", metavar="TEXT", help="Passes and pipelines, separated by commas.")
]
Verify = Annotated[VerifyChoice, _graph("--verify", help="Compare after each pass, once at the end, or not at all.")]
Dump = Annotated[Path | None, _graph("--dump", metavar="DIR", help="Keep the model after each pass here.")]
StopAfter = Annotated[str | None, _graph("--stop-after", metavar="PASS", help="End the pipeline after PASS.")]
Precisions = Annotated[
    str | None,
    _graph("--precision", metavar="LIST", help="Of fp32, fp16, int8; default: all that there is data for."),
]
Calibrator = Annotated[str, _graph("--calibrator", metavar="TEXT", help="How INT8 ranges are chosen.")]
Int8Keep = Annotated[list[str] | None, _graph("--int8-keep", metavar="PATTERN", help="Nodes to leave out of INT8.")]
Int8Base = Annotated[Literal["fp32", "fp16"], _graph("--int8-base", help="Precision of what stays out of INT8.")]
CalibrationCache = Annotated[
    Path | None, _graph("--calibration-cache", metavar="FILE", help="INT8 ranges that `optframe calibrate` wrote.")
]
SensitivityFor = Annotated[
    float | None,
    _graph(
        "--sensitivity",
        metavar="ERROR",
        help="Rank layers by what INT8 in them costs; say which to keep for this error over response.",
    ),
]

Backend = Annotated[str, _engine("--backend", metavar="NAME", help="What builds and runs the engine.")]
Backends = Annotated[str, _engine("--backend", metavar="LIST", help="What builds and runs engines.")]
BackendOption = Annotated[
    list[str] | None,
    _engine("--backend-option", metavar="NAME=VALUE", help="An option of the backend; `optframe doctor` lists them."),
]
Plugins = Annotated[
    str | None,
    _engine(
        "--plugins", metavar="all|none|LIST", help="Which ops run as plugin kernels; `run` builds with and without."
    ),
]
ComputeCapability = Annotated[
    str | None, _engine("--compute-capability", metavar="LIST", help="GPUs to build for, such as sm86,sm89,sm120.")
]
Profile = Annotated[
    list[str] | None,
    _engine(
        "--profile",
        metavar="NAME=MIN/OPT/MAX,...",
        help="Range of dynamic dimensions, by name, or of an input's shape; repeat for several profiles.",
    ),
]
Workspace = Annotated[
    int | None, _engine("--workspace", metavar="MIB", help="Scratch memory that a layer may take.", min=1)
]
OptimizationLevel = Annotated[
    int | None, _engine("--optimization-level", metavar="0-5", help="How much the builder tries.", min=0)
]
Device = Annotated[str, _engine("--device", metavar="NAME", help="cpu, cuda, or auto: the best there is.")]
RunFolder = Annotated[Path | None, _engine("--out", metavar="DIR", help="Default: runs/MODEL.")]
Cache = Annotated[bool, _engine("--cache/--no-cache", help="Reuse what did not change.")]
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
