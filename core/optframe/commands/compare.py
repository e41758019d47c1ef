"""`optframe compare`: how far one model's outputs are from another's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from optframe import api
from optframe.commands import options as shared
from optframe.errors import CheckFailed
from optframe.report.figures import number
from optframe.session import Session


def compare(
    context: typer.Context,
    actual: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to judge.")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE.onnx", help="What it should compute.")],
    inputs: shared.Inputs = None,
    backend: shared.Backend = "onnxruntime",
    max_abs: Annotated[
        float | None, typer.Option(help="Exit with 1 where an absolute difference is larger.", min=0.0)
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Run both models on the same inputs and print the errors of each output of MODEL.onnx."""
    session: Session = context.obj
    errors = api.compare(actual, reference, inputs=inputs, backend=backend, registry=session.registry)
    if as_json:
        session.print_json({name: asdict(error) for name, error in errors.items()})
    else:
        table = Table("output", "max abs", "median rel", "RMS rel", "err / response")
        for name, error in errors.items():
            figures = (error.max_abs, error.median_rel, error.rms_rel, error.err_over_response)
            table.add_row(name, *map(number, figures))
        session.console.print(table)
    over = [name for name, error in errors.items() if max_abs is not None and not error.max_abs <= max_abs]
    if over:
        raise CheckFailed(f"{', '.join(over)}: the absolute difference is over {max_abs:g}")
