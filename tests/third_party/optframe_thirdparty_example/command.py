"""The command `optframe count-swish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optframe import graph


def count_swish(model: Annotated[Path, typer.Argument(help="An ONNX file.")]) -> None:
    """Count the calls of the op Swish in MODEL."""
    typer.echo(sum(node.op_type == "Swish" for node in graph.all_nodes(graph.load(model))))
