"""`optframe bisect`: the first pass of a pipeline, and its first rewrite, after which a model is no longer right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer

from optframe import api
from optframe.commands import options as shared
from optframe.errors import CheckFailed, InputError
from optframe.gate import bisect as library
from optframe.gate import checks
from optframe.pipeline import Pipeline
from optframe.session import Session


def bisect(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A model that is right as it is.")],
    pipeline: Annotated[str, typer.Option(metavar="TEXT", help="Passes and pipelines, separated by commas.")],
    check: Annotated[
        Path | None,
        typer.Option(metavar="SCRIPT", help="Run as SCRIPT MODEL.onnx: exit status 0 says that the model is right."),
    ] = None,
    max_abs: Annotated[
        float | None, typer.Option(help="Largest absolute difference of an output that is right.", min=0.0)
    ] = None,
    inputs: shared.Inputs = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that the script may take; more is wrong.", min=0.0)
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Find the first pass of --pipeline after which MODEL.onnx is no longer right, then the single rewrite in it.

    Right is what SCRIPT says, or else a model whose outputs equal those of MODEL.onnx, on --inputs and random ones.
    Exit status 0: nothing breaks the model. 1: something does.
    """
    session: Session = context.obj
    if check is not None and (max_abs is not None or inputs is not None):
        raise InputError("--check judges alone; leave --max-abs and --inputs out")
    parsed = Pipeline.parse(pipeline, session.registry)
    loaded = api.load(model)
    with _open_check(loaded, check, timeout, inputs, max_abs) as is_right:
        found = library.bisect(loaded, parsed, is_right, session.registry.ops())
    if as_json:
        facts = None if found is None else {**asdict(found), "pass_text": str(Pipeline((parsed.steps[found.index],)))}
        session.print_json({"passes": len(parsed.steps), "found": facts})
    elif found is None:
        session.console.print(f"nothing breaks the model: the check holds after all {len(parsed.steps)} passes")
    if found is not None:
        raise CheckFailed(str(found))


@contextmanager
def _open_check(
    model: ir.Model, script: Path | None, timeout: float | None, inputs: Path | None, max_abs: float | None
) -> Iterator[checks.Check]:
    if script is not None:
        yield checks.script_check(script, timeout)
        return
    samples = api.read_inputs(inputs, model) if inputs is not None else ()
    with checks.equal_outputs(model, inputs=samples, max_abs=max_abs) as check:
        yield check
