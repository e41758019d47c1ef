"""`optframe optimize`: run a pipeline on an ONNX file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from optframe import api, graph
from optframe.commands import options as shared
from optframe.commands.progress import Progress
from optframe.errors import CheckFailed
from optframe.gate import OptimizeResult
from optframe.session import Session


def optimize(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to optimise.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Where the result goes.")],
    pipeline: shared.Pipeline = "portable",
    verify: shared.Verify = "each",
    inputs: shared.Inputs = None,
    dump: shared.Dump = None,
    stop_after: shared.StopAfter = None,
    as_json: shared.AsJson = False,
) -> None:
    """Run the passes of --pipeline on MODEL.onnx, prove each equal, and write OUT.onnx."""
    session: Session = context.obj
    with Progress(session).observing():
        result = api.optimize(
            model,
            pipeline or "portable",
            verify=verify,
            inputs=inputs,
            dump=dump,
            stop_after=stop_after,
            reproducers=output.with_name(f"{output.stem}-reproducers"),
            registry=session.registry,
        )
    graph.save(result.model, output)
    show(session, result, as_json)
    broken = [record.name for record in result.records if record.verified == "rolled-back"]
    if broken:
        raise CheckFailed(f"{', '.join(broken)} broke the model and was rolled back; {output} is without it")


def show(session: Session, result: OptimizeResult, as_json: bool) -> None:
    """Print a row for each pass, then the warnings."""
    if as_json:
        passes = [asdict(record) for record in result.records]
        session.print_json({"passes": passes, "warnings": list(result.warnings)})
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
        session.console.print(f"{first} → {last} nodes", highlight=False)
    for warning in result.warnings:
        session.warn(warning)
