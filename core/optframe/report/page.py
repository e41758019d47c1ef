"""The report as one HTML page that needs nothing beside it: styles, charts and pictures are inside, scripts are not."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optframe import files
from optframe.accuracy import FIGURES, Figure, OutputError
from optframe.report import figures, verdict
from optframe.report.as_json import grouped_near_misses
from optframe.report.charts import HISTOGRAM_FROM, curve_chart, latency_chart, op_bars
from optframe.report.record import EngineRun, RunReport
from optframe.types import Illustration

if TYPE_CHECKING:
    import jinja2


SLOWEST_LAYERS = 20
"""How many layers of an engine the page shows."""


SENSITIVE_LAYERS = 20
"""How many layers the page shows of those that INT8 hurts; the JSON has all."""


def write_html(report: RunReport, path: Path) -> Path:
    """Write the page to `path`.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    return files.write_text(path, render_html(report))


def render_html(report: RunReport) -> str:
    """Return the page as text."""
    context = {
        "report": report,
        "headline": verdict.headline(report),
        "warnings": verdict.all_warnings(report),
        "gains": verdict.paying(report),
        "fastest": _fastest(report),
        "ops": op_bars(report.op_histogram.exported, report.op_histogram.optimized),
        "latencies": latency_chart(report),
        "curve": curve_chart(report.sensitivity),
        "sensitive_layers": SENSITIVE_LAYERS,
        "int8_proposal": verdict.proposal_text(report.sensitivity) if report.sensitivity else "",
        "histogram_from": HISTOGRAM_FROM,
        "slowest_layers": SLOWEST_LAYERS,
        "accuracy": _accuracy_rows(report),
        "pipelines": list(dict.fromkeys(run.pipeline for run in report.runs)),
        "largest_step": max((abs(row.nodes_after - row.nodes_before) for row in report.passes), default=0),
        "near_misses": {row.name: list(grouped_near_misses(row.near_misses)) for row in report.passes},
        "machine": _machine_rows(report.environment),
        "stage_seconds": sum(stage.seconds for stage in report.stages),
    }
    return _template().render(context)


def _fastest(report: RunReport) -> EngineRun | None:
    """Return the run of least latency, of those within their limits where there is one."""
    timed = [(run.latency.median, run) for run in report.runs if run.latency]
    return min([pair for pair in timed if pair[1].passed] or timed, key=lambda pair: pair[0], default=(0.0, None))[1]


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optframe.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (
        figures.number,
        figures.compact,
        figures.count,
        figures.percent,
        figures.signed,
        figures.flops,
        figures.shape,
        figures.change,
        figures.with_unit,
        figures.megabytes,
    )
    environment.filters.update({function.__name__: function for function in formats})
    environment.filters.update({"data_uri": _data_uri, "day": figures.day, "op_changes": _op_changes})
    return environment.get_template("page.html")


def _data_uri(shown: Illustration) -> str:
    return f"data:{shown.mime};base64,{base64.b64encode(shown.image).decode('ascii')}"


def _op_changes(changes: Mapping[str, int], shown: int = 3) -> str:
    """Return the largest changes of op counts in a few words."""
    largest = sorted(changes.items(), key=lambda item: (-abs(item[1]), item[0]))
    more = f", {len(largest) - shown} more" if len(largest) > shown else ""
    return ", ".join(f"{figures.signed(change)} {op}" for op, change in largest[:shown]) + more


@dataclass(frozen=True)
class AccuracyCell:
    """A figure of an output, and how much of its limit it takes up (None where it has no limit)."""

    value: float | None
    limit: float | None

    @property
    def share(self) -> float | None:
        """Per cent of the limit; None where there is none, or no finite value."""
        if self.limit is None or self.value is None:
            return None
        return min(100.0, 100 * self.value / self.limit)

    @property
    def missed(self) -> bool:
        """Whether the value is over its limit."""
        return self.limit is not None and self.value is not None and self.value > self.limit


@dataclass(frozen=True)
class AccuracyRow:
    """One output of one run."""

    output: str
    run: EngineRun
    label: str
    error: OutputError
    cells: Mapping[Figure, AccuracyCell]
    missed: bool
    judged: bool


def _accuracy_rows(report: RunReport) -> dict[str, list[AccuracyRow]]:
    """Return output name -> a row for each run that has it."""
    rows: dict[str, list[AccuracyRow]] = {}
    for run in report.runs:
        for name, error in run.outputs.items():
            cells = {f: AccuracyCell(getattr(error, f), getattr(run.limits, f, None)) for f in FIGURES}
            found = [finding for finding in run.findings if finding.output == name]
            judged = any(cell.share is not None for cell in cells.values())
            missed = any(finding.missed for finding in found)
            rows.setdefault(name, []).append(AccuracyRow(name, run, report.label(run), error, cells, missed, judged))
    return rows


def _machine_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what `environment.describe` found, or whatever else there is, as lines of a table."""
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        if name == "packages" or not value:
            continue
        title = name.replace("_gb", "").replace("_", " ")
        if isinstance(value, Mapping):
            rows.append((title, ", ".join(f"{v}" if k in ("model", "name") else f"{k} {v}" for k, v in value.items())))
        elif isinstance(value, list | tuple):
            rows += [
                (title.removesuffix("s"), ", ".join(map(str, v.values() if isinstance(v, Mapping) else [v])))
                for v in value
            ]
        else:
            rows.append((title, f"{value}{figures.THIN}GB" if name.endswith("_gb") else str(value)))
    return rows
