"""`optframe profile`: the latency of an ONNX file on a backend."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from optframe import api
from optframe.backend import BuildOptions
from optframe.commands import options as shared
from optframe.report.figures import number
from optframe.session import Session

SHOWN = ("median", "mean", "min", "max", "p90", "p95", "p99")


def profile(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to time.")],
    inputs: shared.Inputs = None,
    backend: shared.Backend = "onnxruntime",
    device: shared.Device = "auto",
    backend_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the backend.")
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Time MODEL.onnx after a warm-up: at least 30 runs, or 10 seconds, whichever is first."""
    session: Session = context.obj
    options = BuildOptions(device=device, options=shared.read_pairs(backend_option, "--backend-option"))
    measured = api.profile(model, inputs=inputs, backend=backend, options=options, registry=session.registry)
    if as_json:
        session.print_json(asdict(measured))
        return
    table = Table("latency", "ms")
    for name in SHOWN:
        table.add_row(name, number(getattr(measured, name)))
    session.console.print(table)
    session.console.print(
        f"{number(measured.throughput_per_s)} inferences/s, {measured.runs} runs on {measured.machine}", highlight=False
    )
    for remark in measured.remarks:
        session.warn(remark)
