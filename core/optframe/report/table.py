"""The report as a table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from optframe.report.figures import change, count, flops, number, percent
from optframe.report.record import EngineRun, RunReport


def summary_table(report: RunReport) -> Table:
    """Return one row a run: nodes, latency, throughput, its worst errors, share of FLOPs in INT8. Fits 80 columns."""
    nodes = report.nodes
    title = f"{count(nodes.exported)} → {count(nodes.optimized)} nodes ({change(nodes.exported, nodes.optimized)})"
    if report.flops:
        title += f", {flops(report.flops.exported)} → {flops(report.flops.optimized)}"
    table = Table(title=Text(f"{report.model}: {title}"), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("run", min_width=17)
    for heading in ("nodes", "ms", "per s", "max abs", "err/resp", "int8"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for run in report.runs:
        table.add_row(report.label(run), *_cells(run), _mark(run))
    table.caption = Text(
        f"ms: median latency. Errors against {report.reference}, the worst of all outputs and inputs.\n"
        "err/resp: RMS error over the RMS change of the output from one input to another."
    )
    table.caption_justify = "left"
    return table


def _cells(run: EngineRun) -> list[str]:
    latency = run.latency
    return [
        count(run.nodes),
        number(latency.median if latency else None),
        number(latency.throughput_per_s if latency else None, 3),
        number(run.worst("max_abs"), 2),
        number(run.worst("err_over_response"), 2),
        percent(run.int8_flops_fraction),
    ]


def _mark(run: EngineRun) -> Text:
    if run.not_run:
        return Text("built", style="yellow")
    return Text("ok", style="green") if run.passed else Text("missed", style="bold red")
