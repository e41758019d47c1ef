"""`optframe run`: from a model to checked engines and a report, in one command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import typer

from optframe import api
from optframe.commands import options as shared
from optframe.commands.progress import Progress
from optframe.errors import CheckFailed, InputError
from optframe.pass_options import read_option
from optframe.report import RunReport, summary_lines, summary_table
from optframe.session import Session
from optframe.stages import RunRequest
from optframe.store import Store
from optframe.types import DEFAULT_CALIBRATOR, PRECISIONS, Precision

if TYPE_CHECKING:
    from optframe.registry import Registry


def run(
    context: typer.Context,
    model: shared.ModelName,
    checkpoint: shared.Checkpoint = None,
    variant: shared.Variant = None,
    shape: shared.Shape = None,
    opset: shared.Opset = None,
    exporter: shared.Exporter = None,
    mask: shared.Mask = False,
    dynamic: shared.Dynamic = False,
    images: shared.MeasuredImages = None,
    calibration_images: shared.CalibrationImages = None,
    inputs: shared.Inputs = None,
    model_option: shared.ModelOption = None,
    precision: shared.Precisions = None,
    pipeline: shared.Pipeline = None,
    verify: shared.Verify = "each",
    stop_after: shared.StopAfter = None,
    dump: shared.Dump = None,
    calibrator: shared.Calibrator = DEFAULT_CALIBRATOR,
    int8_keep: shared.Int8Keep = None,
    int8_base: shared.Int8Base = "fp32",
    calibration_cache: shared.CalibrationCache = None,
    sensitivity: shared.SensitivityFor = None,
    backend: shared.Backends = "onnxruntime",
    backend_option: shared.BackendOption = None,
    plugins: shared.Plugins = None,
    compute_capability: shared.ComputeCapability = None,
    profile: shared.Profile = None,
    workspace: shared.Workspace = None,
    optimization_level: shared.OptimizationLevel = None,
    device: shared.Device = "auto",
    out: shared.RunFolder = None,
    cache: shared.Cache = True,
    as_json: shared.AsJson = False,
) -> None:
    """Export, optimise, convert, build, verify and time MODEL; write report.html, report.json and engines to --out."""
    session: Session = context.obj
    chosen = {
        "checkpoint": checkpoint,
        "variant": variant,
        "shape": shared.read_shape(shape) if shape else None,
        "opset": opset,
        "exporter": exporter,
        "mask": mask or None,
        "dynamic": dynamic or None,
        "images": images,
        "calibration_images": calibration_images,
        "inputs": inputs,
    }
    options = model_options(chosen, model_option, model, session.registry)
    request = RunRequest(
        precisions=shared.read_precisions(precision)
        if precision
        else default_precisions(model, inputs or calibration_images or calibration_cache),
        optional=precision is None,
        backends=shared.split(backend),
        pipeline=pipeline,
        calibrator=calibrator,
        keep=tuple(int8_keep or ()),
        int8_base=int8_base,
        ranges=calibration_cache,
        sensitivity=sensitivity,
        verify=verify,
        stop_after=stop_after,
        dump=dump is not None,
        device=device,
        backend_options=shared.engine_options(
            plugins, compute_capability, profile, workspace, optimization_level, backend_option
        ),
    )
    target = out or Path("runs") / Path(model).stem
    progress = Progress(session)
    with progress.observing():
        report = api.run(
            model,
            options=options,
            request=request,
            out=target,
            dump=dump,
            store=Store() if cache else None,
            registry=session.registry,
            command=shlex.join(["optframe", *sys.argv[1:]]),
            on_work=progress.count,
        )
    show(session, report, target, as_json)
    if not report.passed:
        raise CheckFailed(f"a check failed, see the warnings above and {target / 'report.html'}")


def default_precisions(model: str, data: Path | None) -> tuple[Precision, ...]:
    """Return all precisions; without INT8 for an ONNX file that comes without data to calibrate on."""
    if api.is_file(model) and data is None:
        return tuple(kind for kind in PRECISIONS if kind != "int8")
    return PRECISIONS


def model_options(chosen: Mapping[str, Any], texts: list[str] | None, model: str, registry: Registry) -> dict[str, Any]:
    """Return the model's options: those of `chosen` that were given, by flags of their own, and `--model-option`.

    Raises:
        InputError: a `--model-option` is not NAME=VALUE, or its value not of its option's type.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    return given | _read_model_options(shared.read_pairs(texts, "--model-option"), model, registry)


def _read_model_options(texts: dict[str, str], model: str, registry: Registry) -> dict[str, Any]:
    """Return `--model-option` values with the types of the model's options; unknown names are left to the API.

    Raises:
        InputError: a value is not of its option's type.
    """
    if not texts or api.is_file(model):
        return dict(texts)
    kinds = get_type_hints(registry.load_model(model).Options)
    return {name: _read(model, name, kinds[name], text) if name in kinds else text for name, text in texts.items()}


def _read(model: str, name: str, kind: Any, text: str) -> Any:
    if Path in (kind, *get_args(kind)):
        return Path(text)
    if get_origin(kind) is tuple:
        return shared.read_shape(text)
    try:
        return read_option(f"model {model}", name, kind, text)
    except ValueError as error:
        raise InputError(f"--model-option {name} {error}") from error


def show(session: Session, report: RunReport, target: Path, as_json: bool) -> None:
    """Print what a run gave: JSON for a script, or the table with its verdict and warnings."""
    if as_json:
        from optframe.report import to_json

        session.print_json(to_json(report))
        return
    session.console.print(summary_table(report))
    for line in summary_lines(report):
        wrapped = session.console.is_terminal  # a log keeps a line whole, to be searched
        session.console.print(line, markup=False, highlight=False, soft_wrap=not wrapped)
    session.console.print(f"report: {target / 'report.html'}", soft_wrap=True, markup=False, highlight=False)
