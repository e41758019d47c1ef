"""`optframe build`: an engine from an ONNX file, on one backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optframe import api, graph
from optframe.backend import BuildOptions
from optframe.backends.onnxruntime import has_precision
from optframe.commands import options as shared
from optframe.commands.progress import Progress
from optframe.report.figures import megabytes
from optframe.session import Session
from optframe.types import PRECISIONS, Precision


def build(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model, in the precision that is wanted.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Default: engines/MODEL beside here.")
    ] = None,
    backend: shared.Backend = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the graph is; default: what its types say.")
    ] = None,
    plugins: shared.Plugins = None,
    compute_capability: shared.ComputeCapability = None,
    profile: shared.Profile = None,
    workspace: shared.Workspace = None,
    optimization_level: shared.OptimizationLevel = None,
    backend_option: shared.BackendOption = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Build an engine from MODEL.onnx as it is: nothing is converted, and what cannot be honoured is an error."""
    session: Session = context.obj
    chosen = shared.engine_options(plugins, compute_capability, profile, workspace, optimization_level, backend_option)
    kind = shared.read_precisions(precision)[0] if precision else _precision(model)
    options = BuildOptions(kind, device, chosen, session.registry.ops())
    with Progress(session).building(backend):
        engine = api.build(
            model, out or Path("engines") / model.stem, backend=backend, options=options, registry=session.registry
        )
    for warning in engine.warnings:
        session.warn(warning)
    if as_json:
        facts = {"path": str(engine.path), "backend": backend, "precision": kind, "warnings": list(engine.warnings)}
        session.print_json(facts)
        return
    size = megabytes(engine.path.stat().st_size)
    session.console.print(f"{engine.path} ({kind}, {size})", soft_wrap=True, markup=False, highlight=False)


def _precision(model: Path) -> Precision:
    """Return the lowest precision that the graph has something in."""
    loaded = graph.load(model)
    return next(kind for kind in reversed(PRECISIONS) if kind == "fp32" or has_precision(loaded, kind))
