"""What a report says of engines that were built and not run, of variants side by side, and of their insides."""

import json
from pathlib import Path

import pytest

from optframe.accuracy import OutputError
from optframe.details import LayerTime, summarize
from optframe.latency import summarize as latency_of
from optframe.report import Change, EngineRun, RunReport, summary_lines, summary_table, write_html, write_json


def engine(variant: str = "", **options: object) -> EngineRun:
    facts = {"backend": "trt", "precision": "fp16", "pipeline": "p", "nodes": 9, "outputs": {}, "device": "cuda"}
    return EngineRun(**{**facts, "variant": variant, **options})  # type: ignore[arg-type]


def timed(ms: float, variant: str = "", **options: object) -> EngineRun:
    outputs = {"y": OutputError(1e-4, 1e-5, 1e-5, 0.01, 10)}
    latency = latency_of([ms / 1e3] * 40, machine="a GPU", copies_included=False)
    return engine(variant, outputs=outputs, latency=latency, **options)


def report(*runs: EngineRun) -> RunReport:
    return RunReport(
        model="m",
        reference="PyTorch FP32",
        input_shapes={"x": (1, 3)},
        nodes=Change(20, 9),
        passes=(),
        runs=runs,
        op_histogram=Change({"Add": 20}, {"Add": 9}),
        created="2026-01-02T03:05:00+00:00",
    )


def written(made: RunReport, tmp_path: Path) -> tuple[dict, str]:
    data = json.loads(write_json(made, tmp_path / "r.json").read_text())
    return data, write_html(made, tmp_path / "r.html").read_text()


def test_an_engine_that_was_not_run_passes_nothing(tmp_path: Path) -> None:
    made = report(engine(not_run="no GPU", engine_bytes=167_270_564), engine("no plugins", not_run="no GPU"))
    data, page = written(made, tmp_path)
    first, second = data["runs"]
    assert (first["label"], second["label"]) == ("FP16", "FP16 no plugins")
    assert (first["not_run"], first["passed"], first["latency_ms"]) == ("no GPU", None, None)
    assert "built, not run" in page
    assert "✓ ok" not in page
    assert "167\u202fMB" in page
    assert any("FP16: built for trt, not run here: no GPU" in line for line in summary_lines(made))
    assert [str(cell) for cell in summary_table(made).columns[-1].cells] == ["built", "built"]


def test_variants_are_compared_with_their_own_kind() -> None:
    slow = timed(2.0, "no plugins", precision="fp32")
    fast = timed(1.9, precision="fp32")
    half = timed(1.0)
    gains = [line for line in summary_lines(report(fast, slow, half)) if "pays" in line]
    assert gains == ["FP16 pays on trt (a GPU): 1.9× as fast as FP32 (1.000\u202fms against 1.900\u202fms)."]


@pytest.mark.parametrize("layers", [0, 30])
def test_the_inside_of_an_engine_is_shown(tmp_path: Path, layers: int) -> None:
    parts = {"enqueue": [4.9], "h2d": [1.0], "gpu": [5.0], "d2h": [2.0]}
    told = summarize(parts, 0.01)
    times = tuple(LayerTime(f"layer<{i}>", 3.0 / (i + 1), (f"node{i}",), ("encoder.norm",)) for i in range(layers))
    details = type(told)(told.series, told.throughput_per_s, times, told.warnings)
    data, page = written(report(timed(8.0, details=details)), tmp_path)
    assert data["runs"][0]["details"]["series"]["latency"]["median"] == 8.0
    assert len(data["runs"][0]["details"]["layers"]) == layers
    assert "Inside the engines" in page
    assert page.count("layer&lt;") == min(layers, 20)
    assert any("enqueue-bound" in text for text in data["warnings"])
