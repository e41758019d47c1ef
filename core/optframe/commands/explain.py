"""`optframe explain`: what a pass would do to a model, and why it leaves alone what nearly matched."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optframe import api, gate
from optframe.commands import options as shared
from optframe.errors import InputError
from optframe.gate import bisect as library
from optframe.passes import GraphPass
from optframe.pipeline import Pipeline, show_step
from optframe.report.as_json import grouped_near_misses
from optframe.session import Session


def explain(
    context: typer.Context,
    step: Annotated[str, typer.Argument(metavar="PASS", help="A pass, with options if you like: name{key=value}.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to look at; nothing is written.")],
    after: Annotated[
        str, typer.Option("--after", metavar="PIPELINE", help="Passes to run first, such as 'clean'.")
    ] = "",
    limit: Annotated[int, typer.Option(help="How many matches and near misses to show.", min=0)] = 20,
    as_json: shared.AsJson = False,
) -> None:
    """Print the matches of PASS in MODEL.onnx and its near misses with their reasons; the model stays as it is."""
    session: Session = context.obj
    registry = session.registry
    chosen = _only_step(Pipeline.parse(step, registry), step)
    loaded = api.load(model)
    if after:
        loaded = gate.optimize(loaded, Pipeline.parse(after, registry), ops=registry.ops(), verify="off").model
    found = library.explain(loaded, chosen, registry.ops())
    if as_json:
        session.print_json(_facts(chosen, found))
    else:
        _show(session.console, chosen, found, limit)


def _only_step(pipeline: Pipeline, text: str) -> GraphPass:
    if len(pipeline.steps) != 1:
        raise InputError(f"'{text}' stands for {len(pipeline.steps)} passes; explain one, and name others in --after")
    return pipeline.steps[0]


def _facts(step: GraphPass, found: library.Explanation) -> dict[str, Any]:
    return {
        "pass": show_step(step),
        "modified": found.modified,
        "nodes_before": found.nodes_before,
        "nodes_after": found.nodes_after,
        "op_changes": dict(found.op_changes),
        "rewrites": list(found.rewrites),
        "near_misses": [asdict(miss) for miss in found.near_misses],
    }


def _show(console: Console, step: GraphPass, found: library.Explanation, limit: int) -> None:
    console.print(f"{len(found.rewrites)} rewrites, {found.nodes_before} → {found.nodes_after} nodes")
    if found.op_changes:
        console.print(escape(", ".join(f"{change:+d} {op}" for op, change in found.op_changes.items())))
    for rewrite in found.rewrites[:limit]:
        console.print(f"  {escape(rewrite)}")
    if len(found.rewrites) > limit:
        console.print(f"  … and {len(found.rewrites) - limit} more (--limit, --json)")
    if not found.near_misses:
        console.print("no near misses")
        return
    table = Table("near miss", "count", "left alone because", "nodes")
    kinds = list(grouped_near_misses(found.near_misses))
    for kind in kinds[:limit]:
        nodes = ", ".join(kind["nodes"][:3]) + (", …" if kind["count"] > 3 else "")
        table.add_row(*map(escape, (kind["op_type"], str(kind["count"]), kind["reason"], nodes)))
    console.print(table)
    if len(kinds) > limit:
        console.print(f"… and {len(kinds) - limit} more kinds (--limit, --json)")
