"""`optframe diff`: how one ONNX file differs from another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optframe import diff as library
from optframe.commands import options as shared
from optframe.errors import CheckFailed
from optframe.provenance import NodeOrigin
from optframe.report.figures import flops, number
from optframe.session import Session


def diff(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A.onnx", help="The one model.")],
    b: Annotated[Path, typer.Argument(metavar="B.onnx", help="The other.")],
    inputs: shared.Inputs = None,
    max_abs: Annotated[
        float | None, typer.Option(help="Largest absolute difference of an equal output.", min=0.0)
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Compute and compare the outputs.")] = True,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where the models differ in anything.")
    ] = False,
    limit: Annotated[int, typer.Option(help="How many lines of each kind to show.", min=0)] = 20,
    as_json: shared.AsJson = False,
) -> None:
    """Compare ops, nodes and what made them, types, weights, FLOPs and outputs of A.onnx and B.onnx.

    Exit status 1: the outputs differ by more than --max-abs (default: rounding, relative to their size).
    """
    session: Session = context.obj
    found = library.diff(a, b, inputs=inputs, max_abs=max_abs, run=run, registry=session.registry)
    if as_json:
        verdict = {"outputs_differ": found.outputs_differ, "anything": found.anything}
        session.print_json({**asdict(found), **verdict})
    else:
        for line in _lines(found, limit):
            session.console.print(line)
        _show_outputs(session.console, found)
    if found.outputs_differ:
        raise CheckFailed(f"the outputs of {b} differ from those of {a}: {_reason(found)}")
    if exit_code and found.anything:
        raise CheckFailed(f"{b} differs from {a}")


def _reason(found: library.ModelDiff) -> str:
    return found.clash or "; ".join(f"'{each.name}': {each.reason}" for each in found.outputs or () if not each.equal)


def _lines(found: library.ModelDiff, limit: int) -> Iterator[str]:
    yield f"nodes   {found.nodes[0]} → {found.nodes[1]}"
    yield f"FLOPs   {flops(found.flops[0])} → {flops(found.flops[1])}"
    if found.ops:
        changes = [f"{after - before:+d} {op}" for op, (before, after) in found.ops.items()]
        yield escape(f"ops     {', '.join(changes)}")
    for title, pairs in (
        ("opsets", found.opsets),
        ("inputs and outputs", found.interface),
        ("types of values inside", found.shapes),
        ("weights", found.weights),
    ):
        yield from _pairs(title, pairs, limit)
    yield from _nodes("removed", found.removed, limit)
    if found.added:
        makers = Counter(node.passes[-1] if node.passes else "another tool" for node in found.added)
        yield escape(f"made by {', '.join(f'{name}: {count}' for name, count in makers.most_common())}")
    yield from _nodes("added", found.added, limit)


def _pairs(title: str, pairs: Mapping[str, library.Pair], limit: int) -> Iterator[str]:
    if pairs:
        yield f"{title}: {len(pairs)} differ"
    for name, (before, after) in list(pairs.items())[:limit]:
        if before is None or after is None:
            yield escape(f"  {'+' if before is None else '-'} {name} {after or before}")
        else:
            yield escape(f"  {name}: {before} → {after}")
    if len(pairs) > limit:
        yield f"  … and {len(pairs) - limit} more"


def _nodes(title: str, nodes: tuple[NodeOrigin, ...], limit: int) -> Iterator[str]:
    if nodes:
        yield f"nodes {title}: {len(nodes)}"
    for node in nodes[:limit]:
        passes = f" by {', '.join(node.passes)}" if node.passes else ""
        others = [name for name in node.origins if name != node.name]
        origins = f" from {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else ""
        modules = f" in {', '.join(node.modules[:2])}" if node.modules else ""
        yield escape(f"  {node.op_type} {node.name or '(unnamed)'}{passes}{origins}{modules}")
    if len(nodes) > limit:
        yield f"  … and {len(nodes) - limit} more"


def _show_outputs(console: Console, found: library.ModelDiff) -> None:
    if found.outputs is None:
        console.print(escape(f"outputs not compared: {found.clash or found.not_compared}"))
        return
    table = Table("output", "equal", "max abs", "median rel", "RMS rel", "err / response")
    for output in found.outputs:
        error = output.error
        figures = (error.max_abs, error.median_rel, error.rms_rel, error.err_over_response)
        table.add_row(escape(output.name), "yes" if output.equal else "no", *map(number, figures))
    console.print(table)
