"""`optframe calibrate`: measure INT8 ranges into a file, and find out which layers INT8 hurts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from optframe import api, files
from optframe.commands import options as shared
from optframe.commands.progress import Progress
from optframe.commands.run import model_options
from optframe.errors import CheckFailed, InputError
from optframe.precision import DEFAULT_ERROR, DEFAULT_RUNS, Ranges, Sensitivity
from optframe.report.figures import number, percent
from optframe.report.verdict import proposal_text
from optframe.session import Session
from optframe.stages import RunRequest
from optframe.store import Store
from optframe.types import DEFAULT_CALIBRATOR

SHOWN_LAYERS = 20


def calibrate(
    context: typer.Context,
    model: shared.ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CACHE.json", help="Where the ranges go.")],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Images to calibrate on.")] = None,
    inputs: shared.Inputs = None,
    checkpoint: shared.Checkpoint = None,
    shape: shared.Shape = None,
    model_option: shared.ModelOption = None,
    pipeline: shared.Pipeline = None,
    verify: shared.Verify = "each",
    calibrator: shared.Calibrator = DEFAULT_CALIBRATOR,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank layers by the error that INT8 in them causes.")
    ] = False,
    error: Annotated[
        float, typer.Option(help="Error over response for which --sensitivity proposes layers to keep.", min=0.0)
    ] = DEFAULT_ERROR,
    runs: Annotated[
        int, typer.Option(help="Variants of the model that --sensitivity may run to rank layers.", min=1)
    ] = DEFAULT_RUNS,
    cache: shared.Cache = True,
    as_json: shared.AsJson = False,
) -> None:
    """Export and optimise MODEL as `optframe run` does, measure its INT8 ranges, and write them to CACHE.json.

    `optframe run` and `optframe optimize` take the file as --calibration-cache; it holds for this very model alone.
    """
    session: Session = context.obj
    chosen = {
        "calibration_images": images,
        "inputs": inputs,
        "checkpoint": checkpoint,
        "shape": shared.read_shape(shape) if shape else None,
    }
    options = model_options(chosen, model_option, model, session.registry)
    request = RunRequest(
        pipeline=pipeline,
        calibrator=calibrator,
        verify=verify,
        sensitivity=error if sensitivity else None,
        sensitivity_runs=runs,
    )
    if sensitivity and error <= 0:
        raise InputError(f"--error {error:g}: INT8 always causes an error; ask for one above 0")
    if output.is_dir():
        raise InputError(f"{output} is a folder: name a file in it, such as {output / 'ranges.json'}")
    progress = Progress(session)
    with files.folder_for(output.parent), progress.observing():
        ranges, found = api.calibrate(
            model,
            options=options,
            request=request,
            on_work=progress.count,
            store=Store() if cache else None,
            registry=session.registry,
        )
    ranges.save(output)
    if found is not None:
        found.save(sensitivity_path(output))
    show(session, ranges, found, output, as_json)
    if found is not None and found.curve[0].error > found.target and found.proposal is None:
        raise CheckFailed(f"no layer can be in INT8 for an error of {found.target:g}: stay with FP16")


def sensitivity_path(output: Path) -> Path:
    """Return where the figures of the layers go, beside the ranges at `output`."""
    return output.with_name(f"{output.stem}-sensitivity.json")


def show(session: Session, ranges: Ranges, found: Sensitivity | None, output: Path, as_json: bool) -> None:
    """Print what was measured; of the layers, the most sensitive, the curve and the proposal."""
    if as_json:
        head = replace(ranges, tensors={}, equalization={})
        facts = {name: value for name, value in asdict(head).items() if name not in ("tensors", "equalization")}
        session.print_json({**facts, "tensors": len(ranges.tensors), "sensitivity": asdict(found) if found else None})
        return
    if found is not None:
        session.console.print(layer_table(found))
        session.console.print(layer_note(found), highlight=False)
        session.console.print(curve_table(found))
        wrapped = session.console.is_terminal  # a log keeps a line whole, to be searched
        session.console.print(proposal_text(found), markup=False, highlight=False, soft_wrap=not wrapped)
    session.console.print(
        f"{len(ranges.tensors)} tensors on {ranges.samples} samples with {ranges.calibrator}: {output}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def layer_table(found: Sensitivity) -> Table:
    """Return a row for each of the most sensitive layers. Fits 80 columns; long names lose their beginning."""
    table = Table(title=Text("INT8 in one layer alone"), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("op", no_wrap=True)
    for heading in ("err/resp", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in found.layers[:SHOWN_LAYERS]:
        error = number(layer.error, 2) if layer.alone else f"~{number(layer.error, 2)}"
        table.add_row(_shortened(layer.name), layer.op_type, error, percent(layer.flops))
    return table


def layer_note(found: Sensitivity) -> str:
    """Return what the rows of `layer_table` leave unsaid."""
    more = len(found.layers) - SHOWN_LAYERS
    rest = f"and {more} layers more; " if more > 0 else ""
    groups = "; ~: an even share of what a group of neighbours causes" * any(not layer.alone for layer in found.layers)
    return f"{rest}{found.runs} variants of the model were run{groups}.\n"


def _shortened(name: str, width: int = 46) -> str:
    return name if len(name) <= width else f"…{name[1 - width :]}"


def curve_table(found: Sensitivity) -> Table:
    """Return the error against the share of FLOPs in INT8, as the most sensitive layers are kept out of it."""
    table = Table(title=Text("Error against the share in INT8"), box=SIMPLE_HEAD, title_justify="left")
    for heading in ("layers kept", "FLOPs in INT8", "convolutions'", "err/resp"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for point in found.curve:
        shares = (percent(point.int8_flops), percent(point.int8_convolutions))
        mark = "← proposed" if point == found.proposal and found.keep else ""
        table.add_row(str(point.kept), *shares, number(point.error, 2), mark)
    return table
