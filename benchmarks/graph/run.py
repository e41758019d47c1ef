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
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/graph/run.py " + " ".join(path.name for path in options.models),
        "machine": measure.machine(),
        "models": {path.name: bench(path, options) for path in options.models},
    }
    for name, rows in results["models"].items():
        Console().print(table(name, rows))
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
        samples = measure.draw_samples(model)
        rows = [describe(name, attempts[name], made[name], model, samples) for name in names]
        valid = {row["tool"]: made[row["tool"]] for row in rows if "max_abs" in row}
        if options.rounds and valid:
            latencies = measure.paired_latency(valid, samples[0], options.rounds)
            rows = [row | latencies.get(row["tool"], {}) for row in rows]
    return rows


def describe(name: str, attempts: list[measure.Attempt], made: Path, model: Path, samples: Any) -> dict[str, Any]:
    """Return what is known of a tool's work before its result is timed."""
    row: dict[str, Any] = {
        "tool": name,
        "seconds": statistics.median(attempt.seconds for attempt in attempts),
        "peak_mb": attempts[0].peak_mb,
        "error": next((attempt.error for attempt in attempts if attempt.error), None),
    }
    if row["error"]:
        return row
    try:
        return row | measure.inspect(made, model, samples)
    except Exception as error:  # a model that a tool broke may fail in any way
        return row | {"error": f"its result does not run: {str(error).splitlines()[0][:120]}"}


def table(model: str, rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    shown = Table("tool", "nodes", "seconds", "peak MB", "GFLOP", "max abs", "checker", "CPU ms", "ratio", title=model)
    for row in rows:
        if row["error"]:
            shown.add_row(row["tool"], "", f"{row['seconds']:.1f}", "", "", "", row["error"])
            continue
        worst = max(row["max_abs"].values())
        latency = [f"{row['median_ms']:.0f}", f"{row['ratio']:.2f}"] if "ratio" in row else []
        shown.add_row(
            row["tool"],
            str(row["nodes"]),
            f"{row['seconds']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['gflop']:.1f}",
            f"{worst:.1e}",
            row["checker"],
            *latency,
        )
    return shown


if __name__ == "__main__":
    main()
