"""The report as strict JSON: what a script reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optframe import files
from optframe.latency import Latency
from optframe.passes import NearMiss
from optframe.report import verdict
from optframe.report.record import Change, EngineRun, PassRow, RunReport

FORMAT = 1
"""Raised when a field goes away or changes its meaning; new fields leave it alone."""

LATENCY_FIELDS = ("median", "mean", "min", "max", "p90", "p95", "p99", "std")
EXAMPLES = 10
"""How many nodes are named for each kind of near miss: there can be thousands."""


def write_json(report: RunReport, path: Path) -> Path:
    """Write `report` to `path`; see `to_json`.

    Raises:
        InputError: the folder cannot be made or written.
        EnvironmentLacks: the disk is full.
    """
    return files.write_text(path, json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_json(report: RunReport) -> dict[str, Any]:
    """Return `report` as data that strict JSON can hold.

    JSON knows neither NaN nor infinity: such a figure becomes null, and `not_finite` tells its path and value.
    """
    raw = {
        "format": FORMAT,
        "model": report.model,
        "reference": report.reference,
        "headline": verdict.headline(report),
        "passed": report.passed,
        "input_shapes": {name: list(shape) for name, shape in report.input_shapes.items()},
        "nodes": _change(report.nodes),
        "op_histogram": {name: _most_first(counts) for name, counts in _change(report.op_histogram).items()},
        "flops": _change(report.flops) if report.flops else None,
        "passes": [_pass(row) for row in report.passes],
        "runs": [_run(report, run) for run in report.runs],
        "gains": verdict.gains(report),
        "warnings": verdict.all_warnings(report),
        "notes": list(report.notes),
        "provenance": dict(report.provenance),
        "made_nodes": [asdict(node) for node in report.made],
        "illustrations": [{"title": shown.title, "caption": shown.caption} for shown in report.illustrations],
        "stages": [
            {"stage": s.stage, "label": s.label, "seconds": s.seconds, "cached": s.cached, "created": s.created}
            for s in report.stages
        ],
        "int8_sensitivity": asdict(report.sensitivity) if report.sensitivity else None,
        "environment": dict(report.environment),
        "command": report.command,
        "created": report.created,
    }
    not_finite: dict[str, str] = {}
    finite: dict[str, Any] = _finite(raw, "", not_finite)
    return {**finite, "not_finite": not_finite}


def _change(figures: Change[Any]) -> dict[str, Any]:
    return {"exported": figures.exported, "optimized": figures.optimized}


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _pass(row: PassRow) -> dict[str, Any]:
    names = ("name", "modified", "nodes_before", "nodes_after", "seconds", "verified")
    more = ("status", "rolled_back", "note", "rewrites")
    return {
        **{name: getattr(row, name) for name in (*names, *more)},
        "op_changes": dict(row.op_changes),
        "near_misses": list(grouped_near_misses(row.near_misses)),
    }


def grouped_near_misses(misses: Iterable[NearMiss]) -> Iterator[dict[str, Any]]:
    """Yield op type, reason, count and some node names of each kind of near miss, most first."""
    misses = tuple(misses)
    for (op_type, reason), times in Counter((miss.op_type, miss.reason) for miss in misses).most_common():
        nodes = [miss.node for miss in misses if (miss.op_type, miss.reason) == (op_type, reason)]
        yield {"op_type": op_type, "reason": reason, "count": times, "nodes": nodes[:EXAMPLES]}


def _run(report: RunReport, run: EngineRun) -> dict[str, Any]:
    return {
        "label": report.label(run),
        "backend": run.backend,
        "variant": run.variant,
        "precision": run.precision,
        "device": run.device,
        "pipeline": run.pipeline,
        "nodes": run.nodes,
        **_latency(run.latency),
        "latency_cached": run.latency_cached,
        "int8_flops_fraction": run.int8_flops_fraction,
        "int8_conv_flops_fraction": run.int8_conv_flops_fraction,
        "outputs": {name: asdict(error) for name, error in run.outputs.items()},
        "limits": asdict(run.limits),
        "not_run": run.not_run or None,
        "engine_bytes": run.engine_bytes,
        "details": asdict(run.details) if run.details else None,
        "passed": None if run.not_run else run.passed,
        "findings": [{**asdict(finding), "missed": finding.missed} for finding in run.findings],
    }


def _latency(latency: Latency | None) -> dict[str, Any]:
    if latency is None:
        return {"latency_ms": None, "throughput_per_s": None, "measurement": None}
    names = ("runs", "warmup_runs", "copies_included", "measured_at", "machine", "remarks")
    return {
        "latency_ms": {name: getattr(latency, name) for name in LATENCY_FIELDS},
        "throughput_per_s": latency.throughput_per_s,
        "measurement": {**{name: getattr(latency, name) for name in names}, "samples_ms": list(latency.samples)},
    }


def _finite(value: Any, path: str, not_finite: dict[str, str]) -> Any:
    """Return `value` with null for NaN and infinity; their paths and values go to `not_finite`."""
    if isinstance(value, float) and not math.isfinite(value):
        not_finite[path] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{path}.{key}".lstrip("."), not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}[{i}]", not_finite) for i, item in enumerate(value)]
    return value
