"""The comparison of graph optimisers, on a model that takes no time: rows, limits, and what a failure looks like."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.parser
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "graph"
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> {
    a = Identity (x)
    b = MatMul (a, w)
    y = Relu (b)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.fixture
def measure(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("graph/measure.py")


def bench(model: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    out = model.with_name("out.json")
    command = [sys.executable, FOLDER / "run.py", model, "--out", out, "--repeat", 1, "--rounds", 2, *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_tools_stand_side_by_side(model: Path) -> None:
    results, shown = bench(model, "--tools", "optframe,onnxruntime basic")
    ours, theirs = results["models"]["model.onnx"]
    assert (ours["tool"], theirs["tool"]) == ("optframe", "onnxruntime basic")
    for row in (ours, theirs):
        assert row["error"] is None
        assert row["checker"] == "ok"
        assert row["equal"]
        assert row["nodes"] == 2
        assert row["gflop"] > 0
        assert row["max_abs"]["y"] < 1e-6
        assert 0 < row["work_s"] < row["seconds"]
        assert row["peak_mb"] > 10
        assert row["median_ms"] > 0
    assert ours["ratio"] == ours["times_first"] == 1
    assert "onnxruntime" in shown
    assert {"date", "command", "machine"} <= results.keys()


def test_a_tool_that_fails_says_so_in_its_row(model: Path) -> None:
    results, _ = bench(model, "--tools", "optframe,onnxruntime basic", "--timeout", 0.01)
    assert [row["error"] for row in results["models"]["model.onnx"]] == ["not done after 0 s"] * 2


def test_memory_is_limited(measure: ModuleType, model: Path) -> None:
    attempt = measure.attempt("onnxruntime basic", model, model.with_name("o.onnx"), timeout=60, memory_gb=0.001)
    assert attempt.error is not None
    assert attempt.error.startswith("exit ")


def test_a_wrong_result_shows(measure: ModuleType, model: Path) -> None:
    wrong = model.with_name("wrong.onnx")
    onnx.save(onnx.parser.parse_model(TEXT.replace("4.0", "4.5")), wrong)
    found = measure.inspect(wrong, model, measure.draw_samples(model))
    assert not found["equal"]
    assert found["max_abs"]["y"] > 0.01


def test_unknown_tools_are_refused(model: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), str(model), "--tools", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown tools: nothing" in done.stderr
