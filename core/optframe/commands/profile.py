"""`optframe profile`: the latency of an ONNX file on a backend."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from optframe import api
from optframe.backend import BuildOptions
from optframe.commands import options as shared
from optframe.details import EngineDetails
from optframe.report.figures import number
from optframe.session import Session

SLOWEST_LAYERS = 10

SHOWN = ("median", "mean", "min", "max", "p90", "p95", "p99")


def profile(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file, or an engine, to time.")],
    inputs: shared.Inputs = None,
    backend: shared.Backend = "onnxruntime",
    device: shared.Device = "auto",
    backend_option: shared.BackendOption = None,
    as_json: shared.AsJson = False,
) -> None:
    """Time MODEL after a warm-up: at least 30 runs, or 10 seconds, whichever is first.

    An engine that `build` made runs on the backend that made it. TensorRT's tell more: copies, host and GPU apart, and
    each layer.
    """
    session: Session = context.obj
    options = BuildOptions(device=device, options=shared.read_pairs(backend_option, "--backend-option"))
    measured, details = api.profile_in_detail(
        model, inputs=inputs, backend=backend, options=options, registry=session.registry
    )
    if as_json:
        session.print_json({**asdict(measured), "details": asdict(details) if details else None})
        return
    table = Table("latency", "ms")
    for name in SHOWN:
        table.add_row(name, number(getattr(measured, name)))
    session.console.print(table)
    session.console.print(
        f"{number(measured.throughput_per_s)} inferences/s, {measured.runs} runs on {measured.machine}", highlight=False
    )
    if details:
        session.console.print(_parts_table(details), _layers_table(details))
    for remark in (*measured.remarks, *(details.warnings if details else ())):
        session.warn(remark)


def _parts_table(details: EngineDetails) -> Table:
    table = Table("part, ms", *SHOWN, title=f"{number(details.throughput_per_s)} inferences/s with copies")
    for name, series in details.series.items():
        table.add_row(name, *(number(getattr(series, figure)) for figure in SHOWN))
    return table


def _layers_table(details: EngineDetails) -> Table:
    table = Table("slowest layers", "ms", "ONNX nodes")
    for layer in details.layers[:SLOWEST_LAYERS]:
        table.add_row(*map(escape, (layer.name, number(layer.milliseconds, 3), ", ".join(layer.nodes))))
    return table
