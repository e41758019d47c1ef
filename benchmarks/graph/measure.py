"""What a tool made of a model: its size, whether it is valid and equal, and how fast it runs beside the others."""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from optframe import environment, feeds, flops, graph, numerics
from optframe.api import comparison_inputs

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Attempt:
    """How a tool's process ended: wall seconds, peak resident memory, and in one line what went wrong, if anything.

    `work_s` are the seconds without the start of Python: imports of the tool, load, optimisation, save.
    """

    seconds: float
    work_s: float
    peak_mb: float
    error: str | None


def attempt(tool: str, source: Path, target: Path, *, timeout: float, memory_gb: float) -> Attempt:
    """Run `tool` on `source` in a process with limits on time and on its data segment."""

    def limit() -> None:
        size = int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "tools.py"), tool, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Attempt(timeout, float("nan"), float("nan"), f"not done after {timeout:.0f} s")
    seconds = time.perf_counter() - start
    peak, work = (re.search(rf"{key} ([\d.]+)", stdout) for key in ("peak_kib", "work_s"))
    if process.returncode == 0 and target.is_file() and peak and work:
        return Attempt(seconds, float(work[1]), int(peak[1]) / 1024, None)
    last = ([line for line in stderr.splitlines() if line.strip()] or ["no message"])[-1]
    return Attempt(seconds, float("nan"), float("nan"), f"exit {process.returncode}: {last[:160]}")


def inspect(path: Path, source: Path, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return nodes, FLOPs, the checker's verdict, the largest difference to `source` of each output, whether equal.

    FLOPs are a lower bound where `flops_unknown` nodes could not be counted. Equal means within the tolerances
    of `optframe.numerics`, on all samples, whichever tool it was.
    """
    model = graph.load(path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
        checker = "ok"
    except Exception as error:  # the checker's verdict is the finding, whatever it raises
        checker = str(error).splitlines()[0][:120]
    expected, actual = (outputs(file, samples) for file in (source, path))
    differences = {
        name: max(_max_abs(a[name], e[name]) for a, e in zip(actual, expected, strict=True)) for name in expected[0]
    }
    verdicts = [
        numerics.compare(e[name], a[name], numerics.tolerance_of(e[name])).status
        for a, e in zip(actual, expected, strict=True)
        for name in e
    ]
    counted = flops.count_flops(model, input_shapes=feeds.input_shapes(samples[0]))
    return {
        "nodes": graph.count_nodes(model),
        "gflop": counted.total / 1e9,
        "flops_unknown": len(counted.unknown),
        "checker": checker,
        "max_abs": differences,
        "equal": set(verdicts) == {"equal"},
    }


def _max_abs(actual: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(actual, np.float64) - expected).max())


FLUSH_DENORMALS = False
"""Whether sessions take denormal numbers for zero. The first session of a process decides for its main thread."""


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> onnxruntime.InferenceSession:
    """Return a session on the CPU, one thread a core."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", str(int(FLUSH_DENORMALS)))
    options.log_severity_level = 4
    options.intra_op_num_threads = environment.usable_cores()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the outputs of `path` for each sample, nothing optimised."""
    runner = session(path, "ORT_DISABLE_ALL")
    names = [value.name for value in runner.get_outputs()]
    return [dict(zip(names, runner.run(names, dict(sample)), strict=True)) for sample in samples]


def paired_latency(paths: Mapping[str, Path], sample: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Time all models in turn, `rounds` times, each round beginning with another one.

    Returns for each its median in ms, and the median over rounds of its time over the first one's in the same round.
    """
    sessions = {name: session(path) for name, path in paths.items()}
    for runner in sessions.values():
        runner.run(None, dict(sample))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    names = list(sessions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            sessions[name].run(None, dict(sample))
            times[name].append(1000 * (time.perf_counter() - start))
    first = times[names[0]]
    return {
        name: {
            "median_ms": statistics.median(samples),
            "ratio": statistics.median(a / b for a, b in zip(samples, first, strict=True)),
        }
        for name, samples in times.items()
    }


def draw_samples(path: Path, inputs: Path | None = None) -> list[dict[str, Any]]:
    """Return the samples in the file `inputs`, or two random ones, for the model at `path`."""
    return [dict(sample) for sample in comparison_inputs(inputs, graph.load(path))]


def machine() -> dict[str, Any]:
    """Return versions and hardware of this machine."""
    return environment.describe() | {"pid_cores": len(os.sched_getaffinity(0))}
