"""`optframe optimize`: run a pipeline on an ONNX file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from optframe import api, files, flops, graph
from optframe.commands import options as shared
from optframe.commands.progress import Progress
from optframe.errors import CheckFailed, InputError
from optframe.gate import OptimizeResult
from optframe.session import Session
from optframe.types import Precision


def optimize(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to optimise.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where the result goes.")],
    pipeline: shared.Pipeline = "portable",
    verify: shared.Verify = "each",
    inputs: shared.Inputs = None,
    dump: shared.Dump = None,
    stop_after: shared.StopAfter = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="fp32, fp16, or int8, which needs --calibration-cache.")
    ] = "fp32",
    calibration_cache: shared.CalibrationCache = None,
    int8_keep: shared.Int8Keep = None,
    int8_base: shared.Int8Base = "fp32",
    as_json: shared.AsJson = False,
) -> None:
    """Run the passes of --pipeline on MODEL.onnx, prove each equal, and write OUT.onnx in --precision."""
    session: Session = context.obj
    kind = read_precision(precision, calibration_cache)
    with files.folder_for(output.parent), Progress(session).observing():
        result = api.optimize(
            model,
            "portable" if pipeline is None else pipeline,
            verify=verify,
            inputs=inputs,
            dump=dump,
            stop_after=stop_after,
            reproducers=output.with_name(f"{output.stem}-reproducers"),
            registry=session.registry,
        )
    graph.save(result.model, output)
    if kind != "fp32":
        converted = api.convert_precision(
            output,
            kind,
            ranges=calibration_cache,
            keep=tuple(int8_keep or ()),
            int8_base=int8_base,
            registry=session.registry,
        )
        graph.save(converted, output)
    show(session, result, as_json, None if verify == "off" else count_flops(model, inputs, result, session))
    broken = [record.name for record in result.records if record.verified == "rolled-back"]
    if broken:
        raise CheckFailed(f"{', '.join(broken)} broke the model and was rolled back; {output} is without it")


def read_precision(text: str, ranges: Path | None) -> Precision:
    """Return the one precision that `text` names, before work of minutes begins.

    Raises:
        InputError: an unknown one, several, or INT8 without a readable file of ranges.
    """
    kinds = shared.read_precisions(text)
    if len(kinds) > 1:
        raise InputError(f"--precision {text}: one file is of one precision")
    if kinds[0] == "int8" and ranges is None:
        raise InputError("int8 needs --calibration-cache: `optframe calibrate` makes it")
    if ranges is not None:
        from optframe.precision import load_ranges

        load_ranges(ranges)
    return kinds[0]


def count_flops(model: Path, inputs: Path | None, result: OptimizeResult, session: Session) -> tuple[int, int]:
    """Return the FLOPs of the first input before and after; that takes seconds, too long where nothing is verified."""
    original, ops = graph.load(model), session.registry.ops()
    shapes = api.sample_shapes(inputs, original)
    before, after = (flops.count_flops(m, input_shapes=shapes, ops=ops).total for m in (original, result.model))
    return before, after


def show(session: Session, result: OptimizeResult, as_json: bool, counted: tuple[int, int] | None) -> None:
    """Print a row for each pass, then nodes and FLOPs before and after, then the warnings."""
    if as_json:
        passes = [asdict(record) for record in result.records]
        session.print_json({"passes": passes, "flops": counted, "warnings": list(result.warnings)})
        return
    table = Table("pass", "nodes", "change", "seconds", "verified")
    for record in result.records:
        delta = record.nodes_after - record.nodes_before
        table.add_row(
            record.name,
            str(record.nodes_after),
            f"{delta:+d}" if delta else "",
            f"{record.seconds:.2f}",
            record.verified,
        )
    session.console.print(table)
    if result.records:
        first, last = result.records[0].nodes_before, result.records[-1].nodes_after
        session.console.print(f"{first} → {last} nodes{show_work(counted)}", highlight=False)
    for warning in result.warnings:
        session.warn(warning)


def show_work(counted: tuple[int, int] | None) -> str:
    """Return the FLOPs before and after as the end of a line, nothing where they were not counted."""
    if counted is None:
        return ""
    from optframe.report import figures

    return f", {figures.flops(counted[0])} → {figures.flops(counted[1])}"
