"""Graph optimisers side by side on the same ONNX files: nodes, seconds, memory, FLOPs, equality, CPU latency.

    python benchmarks/graph/run.py MODEL.onnx ... [--tools optframe,onnxslim] [--rounds 7] [--out FILE.json]

Each tool runs in a process of its own with limits on time and memory, `--repeat` times in turn with the others, so that
a slow moment of the machine hits all of them; the median counts. A tool that is not installed says so in its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
import tools
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def main() -> None:
    """Read the command line, run everything, print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tools", default=",".join(tools.TOOLS))
    parser.add_argument("--repeat", type=int, default=3, help="processes per tool and model")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of paired latency; 0 for none")
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument("--memory-gb", type=float, default=12.0)
    parser.add_argument("--inputs", type=Path, help="an .npz file of real inputs, for models of one interface")
    parser.add_argument("--flush-denormals", action="store_true", help="CPUs take numbers below 1.2e-38 for zero")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measure.FLUSH_DENORMALS = options.flush_denormals
    unknown = set(options.tools.split(",")) - set(tools.TOOLS)
    if unknown:
        parser.error(f"unknown tools: {', '.join(sorted(unknown))}; known: {', '.join(tools.TOOLS)}")
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/graph/run.py " + " ".join(path.name for path in options.models),
        "flush_denormals": options.flush_denormals,
        "machine": measure.machine(),
        "models": {path.name: bench(path, options) for path in options.models},
    }
    console = Console()
    wide = console if console.is_terminal else Console(width=FILE_WIDTH)
    for name, rows in results["models"].items():
        wide.print(table(name, rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def bench(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each tool on `model`."""
    names = options.tools.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: Path(scratch) / f"{index}.onnx" for index, name in enumerate(names)}
        attempts: dict[str, list[measure.Attempt]] = {name: [] for name in names}
        for _ in range(options.repeat):
            for name in names:
                if not any(attempt.error for attempt in attempts[name]):  # what failed once needs no second try
                    limits = {"timeout": options.timeout, "memory_gb": options.memory_gb}
                    attempts[name].append(measure.attempt(name, model, made[name], **limits))
        samples = measure.draw_samples(model, options.inputs)
        rows = [describe(name, attempts, made[name], model, samples) for name in names]
        valid = {row["tool"]: made[row["tool"]] for row in rows if "max_abs" in row}
        if options.rounds and valid:
            latencies = measure.paired_latency(valid, samples[0], options.rounds)
            rows = [row | latencies.get(row["tool"], {}) for row in rows]
    return rows


def describe(
    name: str, attempts: dict[str, list[measure.Attempt]], made: Path, model: Path, samples: Any
) -> dict[str, Any]:
    """Return what is known of a tool's work before its result is timed.

    `times_first` is the median over the rounds of its seconds over the first tool's in the same round.
    """
    own, first = attempts[name], next(iter(attempts.values()))
    row: dict[str, Any] = {
        "tool": name,
        "seconds": statistics.median(attempt.seconds for attempt in own),
        "work_s": statistics.median(attempt.work_s for attempt in own),
        "peak_mb": max(attempt.peak_mb for attempt in own),
        "times_first": statistics.median(a.seconds / b.seconds for a, b in zip(own, first, strict=False)),
        "error": next((attempt.error for attempt in own if attempt.error), None),
    }
    if row["error"]:
        return row
    try:
        return row | measure.inspect(made, model, samples)
    except Exception as error:  # a model that a tool broke may fail in any way
        return row | {"error": f"its result does not run: {str(error).splitlines()[0][:120]}"}


COLUMNS = ("tool", "nodes", "seconds", "work s", "times", "peak MB", "GFLOP", "max abs", "equal", "checker")
LATENCY = ("CPU ms", "ratio")
FILE_WIDTH = 150
"""Columns of a table that goes to a file."""


def table(model: str, rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    shown = Table(*COLUMNS, *LATENCY, title=model)
    for row in rows:
        if row["error"]:
            shown.add_row(row["tool"], "", f"{row['seconds']:.1f}", *[""] * (len(COLUMNS) - 4), escape(row["error"]))
            continue
        shown.add_row(
            row["tool"],
            str(row["nodes"]),
            f"{row['seconds']:.1f}",
            f"{row['work_s']:.1f}",
            f"{row['times_first']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{'≥ ' if row['flops_unknown'] else ''}{row['gflop']:.1f}",
            f"{max(row['max_abs'].values()):.1e}",
            "yes" if row["equal"] else "NO",
            escape(row["checker"]),
            *([f"{row['median_ms']:.0f}", f"{row['ratio']:.2f}"] if "ratio" in row else []),
        )
    return shown


if __name__ == "__main__":
    main()
