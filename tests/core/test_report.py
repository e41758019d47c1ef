"""The report: its sentences, its JSON, its page, its table."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from optframe import report as report_module
from optframe.accuracy import DEFAULT_LIMITS, OutputError
from optframe.errors import InputError
from optframe.latency import Latency, summarize
from optframe.passes import PASS_KEY, NearMiss
from optframe.precision import CurvePoint, LayerError, Sensitivity
from optframe.provenance import NodeOrigin, made_nodes
from optframe.report import Change, EngineRun, PassRow, RunReport
from optframe.report import figures as f
from optframe.report.charts import HISTOGRAM_FROM, curve_chart, latency_chart, op_bars
from optframe.stages.runner import StageResult
from optframe.types import Illustration, Precision

PNG = b"\x89PNG\r\n\x1a\n not a real picture"
HOSTILE = "<script>alert('x')</script>&\"quoted\""


def timing(ms: float, runs: int = 40, **options: Any) -> Latency:
    """Runs within 1 % of `ms`, whose median is `ms`."""
    seconds = ms / 1e3 * (1 + 0.01 * np.linspace(-1, 1, runs))
    defaults = {"machine": "a CPU, 2 cores", "measured_at": "2026-01-02T03:04:05+00:00"}
    return summarize(seconds.tolist(), **{**defaults, **options})


def engine_run(precision: Precision, ms: float | None, over_response: float = 0.01, **options: Any) -> EngineRun:
    outputs = {
        "logits": OutputError(2.9e-6, 3.1e-7, 4.2e-7, over_response, 100),
        "boxes": OutputError(1.3e-7, 1e-8, 2e-7, over_response / 2, 50),
    }
    base: dict[str, Any] = {
        "backend": "onnxruntime",
        "precision": precision,
        "pipeline": "portable",
        "nodes": 782,
        "outputs": outputs,
        "limits": DEFAULT_LIMITS[precision],
        "latency": timing(ms) if ms is not None else None,
    }
    return EngineRun(**{**base, **options})


@pytest.fixture
def report() -> RunReport:
    return RunReport(
        model="anchordetr",
        reference="PyTorch FP32",
        input_shapes={"images": (1, 3, 800, 1066)},
        nodes=Change(4042, 782),
        passes=(
            PassRow("fold-constants", True, 4042, 1839, 0.56, True, "equal", op_changes={"Shape": -377, "Add": 4}),
            PassRow(
                "fuse-layernorm",
                True,
                1839,
                782,
                0.29,
                True,
                "equal",
                rewrites=30,
                near_misses=tuple(NearMiss(f"n{i}", "ReduceMean", "its axis is not the last") for i in range(24)),
            ),
            PassRow("bad-pass", False, 782, 782, 0.1, False, "different", rolled_back=True, note="logits differ by 3"),
        ),
        runs=(
            engine_run("fp32", 2000.0),
            engine_run("fp16", 2500.0, latency_cached=True),
            engine_run("int8", 1000.0, 0.2, int8_flops_fraction=0.643, int8_conv_flops_fraction=0.978),
        ),
        op_histogram=Change({"Shape": 377, "Add": 300}, {"Add": 304, "com.example::LayerNorm": 30}),
        created="2026-01-02T03:05:00+00:00",
        command="optframe run anchordetr",
        warnings=("something to know",),
        notes=("The weights are seeded.",),
        flops=Change(328.4e9, 291.2e9),
        provenance={"": 700, "fuse-layernorm": 30},
        made=(NodeOrigin("norm", "LayerNormalization", ("fuse-layernorm",), ("sub", "div"), ("encoder.norm",)),),
        stages=(
            StageResult("export", "", Path("x"), 11.2, False, 0.0),
            StageResult("build", "a", Path(), 0.1, True, 1),
        ),
        illustrations=(Illustration("FP32", PNG, "2 detections"), Illustration("INT8", PNG)),
        environment={
            "python": "CPython 3.11.7",
            "cpu": {"model": "a CPU", "cores": 2},
            "memory_gb": 25.3,
            "gpus": [{"name": "NVIDIA H200"}],
            "packages": {"onnx": "1.23.2"},
        },
    )


def with_runs(report: RunReport, *runs: EngineRun) -> RunReport:
    return replace(report, runs=runs)


# Sentences


def test_headline_says_what_happened(report: RunReport) -> None:
    assert report_module.headline(report) == (
        "4042 → 782 nodes; FP32 equal to PyTorch FP32 within 2.9e-6; FP16 slower than FP32 (0.80×); "
        "INT8 2.0× as fast as FP32"
    )


def test_headline_names_missed_limits_and_outputs(report: RunReport) -> None:
    missed = with_runs(report, report.runs[0], engine_run("fp16", None, 0.05))
    assert not missed.passed
    assert report_module.headline(missed).endswith("; FP16 misses its limit at logits")
    warnings = report_module.all_warnings(missed)
    assert "FP16 at logits: err_over_response 0.05 is over its limit 0.03 (1.7 times as large)" in warnings
    assert not any("boxes" in warning for warning in warnings)  # 0.025 is within


@pytest.mark.parametrize(
    ("fp32", "fp16", "int8", "sentence"),
    [
        (10.0, 5.0, 6.0, "INT8 is not worth it on onnxruntime (a CPU, 2 cores): it takes 1.2× the time of FP16"),
        (10.0, 20.0, 12.0, "INT8 is not worth it on onnxruntime (a CPU, 2 cores): it takes 1.2× the time of FP32"),
        (10.0, 20.0, 9.9, "INT8 is not worth it on onnxruntime (a CPU, 2 cores): no faster than FP32"),
    ],
)
def test_int8_that_is_not_worth_it_is_told_plainly(
    fp32: float, fp16: float, int8: float, sentence: str, report: RunReport
) -> None:
    slow = with_runs(report, engine_run("fp32", fp32), engine_run("fp16", fp16), engine_run("int8", int8))
    assert any(warning.startswith(sentence) for warning in report_module.all_warnings(slow))
    assert any(line.startswith(f"warning: {sentence}") for line in report_module.summary_lines(slow))


def test_int8_beyond_its_limit_is_not_worth_it_however_fast(report: RunReport) -> None:
    bad = with_runs(report, engine_run("fp32", 10.0), engine_run("int8", 1.0, 0.9))
    sentence = "INT8 is not worth it on onnxruntime: logits: err_over_response 0.9 is over its limit"
    assert any(text.startswith(sentence) for text in report_module.gains(bad))
    assert any(text.startswith(sentence) for text in report_module.all_warnings(bad))


SENSITIVITY = Sensitivity(
    layers=(LayerError(HOSTILE, "Conv", 0.2, 0.1, True), LayerError("fc", "Gemm", 0.05, 0.02, False)),
    target=0.15,
    keep=("conv[[]1]",),
    proposal=CurvePoint(1, 0.6, 0.9, {"logits": 0.1, "boxes": 0.12}),
    curve=(
        CurvePoint(0, 0.7, 1.0, {"logits": 0.3, "boxes": 0.2}),
        CurvePoint(1, 0.6, 0.9, {"logits": 0.1, "boxes": 0.12}),
        CurvePoint(2, 0.0, None, {"logits": 0.0, "boxes": 0.0}),
    ),
    runs=9,
)


def test_layers_that_int8_hurts_are_in_the_report(report: RunReport) -> None:
    shown = replace(report, sensitivity=SENSITIVITY)
    sentence = (
        "For an error over response of 0.12, with 60.0\u202f% of all FLOPs in INT8, keep 1 layer: "
        "--int8-keep 'conv[[]1]'"
    )
    assert sentence in report_module.summary_lines(shown)
    page = report_module.render_html(shown)
    assert HOSTILE not in page
    assert page.count("<circle") == 3
    assert report_module.to_json(shown)["int8_sensitivity"]["curve"][1]["outputs"] == {"logits": 0.1, "boxes": 0.12}
    chart = curve_chart(SENSITIVITY)
    assert chart is not None
    (x0, y0, text), _, (x2, y2, _) = chart.points
    assert (x0, x2) == (70.0, 0.0)
    assert y0 < chart.target < y2 == 100  # y from above: the first point is over the target, the last at zero
    assert text == "0 layers kept: 70.0\u202f% of FLOPs in INT8, error 0.3"
    broken = replace(SENSITIVITY, curve=(CurvePoint(0, 0.7, 1.0, {"y": math.inf}), *SENSITIVITY.curve[1:]))
    chart = curve_chart(broken)
    assert chart is not None
    assert len(chart.points) == 2
    assert "circle" in report_module.render_html(replace(report, sensitivity=broken))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keep": (), "proposal": SENSITIVITY.curve[0], "target": 0.35}, "All layers can be in INT8"),
        ({"keep": ("a", "b"), "proposal": None}, "INT8 is not worth it: with any layer in it the error"),
    ],
)
def test_the_proposal_in_words(changes: dict[str, Any], sentence: str, report: RunReport) -> None:
    shown = replace(report, sensitivity=replace(SENSITIVITY, **changes))
    assert any(line.startswith(sentence) for line in report_module.summary_lines(shown))


def test_int8_that_pays_is_no_warning(report: RunReport) -> None:
    assert any(
        text.startswith("INT8 pays on onnxruntime (a CPU, 2 cores): 2.0× as fast")
        for text in report_module.gains(report)
    )
    assert not any("INT8" in warning for warning in report_module.all_warnings(report))


def test_latencies_of_different_places_are_not_compared(report: RunReport) -> None:
    for options in ({"backend": "tensorrt"}, {"device": "cuda"}, {"latency": timing(1, machine="another")}):
        other = with_runs(report, engine_run("fp32", 10.0), engine_run("int8", 1.0, **options))
        assert report_module.gains(other) == []
        assert "as fast" not in report_module.headline(other)


def test_warnings_come_from_every_figure(report: RunReport) -> None:
    outputs = {"labels": OutputError(3, 0, 0, 0.01, 900, 5, ("NaN in 2 elements where the reference has none",))}
    noisy = engine_run(
        "int8",
        None,
        outputs=outputs,
        latency=summarize([0.01, 0.02] * 20),
        int8_flops_fraction=0.41,
        int8_conv_flops_fraction=0.5,
    )
    warnings = "\n".join(report_module.all_warnings(with_runs(report, noisy)))
    assert "something to know" in warnings
    assert "INT8 at labels: 5 of 900 elements differ" in warnings
    assert "INT8 at labels: NaN in 2 elements" in warnings
    assert f"INT8: only 41.0{f.THIN}% of all FLOPs run in INT8" in warnings
    assert f"only 50.0{f.THIN}% of the convolutions' FLOPs" in warnings
    assert "unstable timing" in warnings


def test_cached_latencies_say_when_and_where(report: RunReport) -> None:
    (line,) = [line for line in report_module.summary_lines(report) if "earlier run" in line]
    assert line == "Latency of FP16: from an earlier run, measured on a CPU, 2 cores, 2026-01-02 03:04 UTC."


def test_labels_name_backend_and_device_where_they_differ(report: RunReport) -> None:
    fp32 = report.runs[0]
    assert report.label(fp32) == "FP32"
    several = with_runs(report, fp32, engine_run("fp32", 1.0, backend="tensorrt", device="cuda"))
    assert [several.label(run) for run in several.runs] == ["FP32 onnxruntime cpu", "FP32 tensorrt cuda"]


def test_provenance_counts_the_last_maker_of_each_node() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(a) y = Relu(b) }'
    )
    for node, makers in zip(model.graph, ("", "fold", "fold,fuse"), strict=True):
        node.metadata_props[PASS_KEY] = makers
    assert report_module.count_provenance(model) == {"": 1, "fold": 1, "fuse": 1}
    assert [node.passes for node in made_nodes(model)] == [("fold",), ("fold", "fuse")]


def test_made_nodes_show_what_made_them_from_what_and_where(report: RunReport) -> None:
    (node,) = report_module.to_json(report)["made_nodes"]
    assert node == {
        **{"name": "norm", "op_type": "LayerNormalization", "passes": ["fuse-layernorm"]},
        **{"origins": ["sub", "div"], "modules": ["encoder.norm"]},
    }
    text = Page(report_module.render_html(report)).text
    assert "1 nodes that passes made" in text
    assert all(word in text for word in ("sub, div", "encoder.norm"))


# Numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1897.1234, "1897"),
        (0.99999, "1.000"),
        (12.3456, "12.35"),
        (-12.3456, "−12.35"),
        (12345.6, f"12{f.THIN}346"),
        (0.00123456, "0.001235"),
        (0.000123456, "1.235e-4"),
        (123456789.0, "1.235e8"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "NaN"),
        (None, "–"),
    ],
)
def test_numbers_have_four_significant_digits(value: float | None, text: str) -> None:
    assert f.number(value) == text


def test_other_formats() -> None:
    assert [f.compact(v) for v in (2e-4, 0.04, 2500.0, 1)] == ["2e-4", "0.04", "2500", "1"]
    assert (f.count(4042), f.count(40420)) == ("4042", f"40{f.THIN}420")
    assert (f.signed(-5), f.signed(5), f.signed(0)) == ("−5", "+5", "0")
    assert f.change(4042, 782) == f"−81{f.THIN}%"
    assert f.change(100, 100.5) == f"+0.5{f.THIN}%"
    assert f.change(0, 5) == "–"
    assert f.flops(328.4e9) == f"328.4{f.THIN}GFLOP"
    assert (f.times(1.234), f.times(12.34)) == ("1.2×", "12.3×")
    assert f.shape((1, 3, 8)) == "1×3×8"
    assert f.day("yesterday") == "yesterday"


# JSON


def test_json_has_the_promised_fields(report: RunReport, tmp_path: Path) -> None:
    data = json.loads(report_module.write_json(report, tmp_path / "runs" / "report.json").read_text(encoding="utf-8"))
    assert data["model"] == "anchordetr"
    assert data["input_shapes"] == {"images": [1, 3, 800, 1066]}
    assert data["nodes"] == {"exported": 4042, "optimized": 782}
    first = data["passes"][0]
    wanted = {"name": "fold-constants", "modified": True, "nodes_before": 4042, "nodes_after": 1839, "verified": True}
    assert wanted.items() <= first.items()
    assert first["seconds"] == 0.56
    int8 = data["runs"][2]
    assert (int8["backend"], int8["precision"], int8["pipeline"], int8["nodes"]) == (
        "onnxruntime",
        "int8",
        "portable",
        782,
    )
    assert {"median", "mean", "min", "max", "p90", "p95", "p99"} <= int8["latency_ms"].keys()
    assert int8["latency_ms"]["median"] == pytest.approx(1000.0)
    assert int8["throughput_per_s"] == pytest.approx(1.0)
    assert int8["int8_flops_fraction"] == 0.643
    assert {"max_abs": 2.9e-6, "median_rel": 3.1e-7, "rms_rel": 4.2e-7, "err_over_response": 0.2}.items() <= int8[
        "outputs"
    ]["logits"].items()
    assert data["warnings"] == report_module.all_warnings(report)
    assert data["environment"]["packages"] == {"onnx": "1.23.2"}
    assert len(int8["measurement"]["samples_ms"]) == 40
    assert data["runs"][1]["latency_cached"] is True


def test_json_is_strict_and_tells_what_was_not_finite(report: RunReport) -> None:
    outputs = {"logits": OutputError(math.inf, math.nan, 0.5, None)}
    broken = with_runs(report, engine_run("fp32", None, outputs=outputs))
    data = report_module.to_json(broken)
    text = json.dumps(data, allow_nan=False)  # would raise
    assert json.loads(text)["runs"][0]["outputs"]["logits"]["max_abs"] is None
    assert data["not_finite"] == {
        "runs[0].outputs.logits.max_abs": "inf",
        "runs[0].outputs.logits.median_rel": "nan",
        "runs[0].findings[0].value": "inf",
    }
    assert data["runs"][0]["latency_ms"] is None


def test_json_groups_near_misses(report: RunReport) -> None:
    (miss,) = report_module.to_json(report)["passes"][1]["near_misses"]
    assert (miss["op_type"], miss["count"], len(miss["nodes"])) == ("ReduceMean", 24, 10)


def test_json_goes_back_into_a_latency(report: RunReport) -> None:
    run = report_module.to_json(report)["runs"][0]
    again = summarize([ms / 1e3 for ms in run["measurement"]["samples_ms"]])
    assert again.p99 == pytest.approx(run["latency_ms"]["p99"])


# Charts


def test_op_bars_are_sorted_scaled_and_complete(rng: np.random.Generator) -> None:
    before = {f"Op{i}": int(n) for i, n in enumerate(rng.integers(1, 500, 33))}
    after = {**{op: n // 3 for op, n in before.items()}, "com.example.net::LayerNorm": 900}
    bars = op_bars(before, after)
    assert (len(bars), bars[-1].op) == (21, "14 other ops")
    assert (bars[0].op, bars[0].label) == ("com.example.net::LayerNorm", "LayerNorm (net)")
    largest = [max(bar.before, bar.after) for bar in bars[:-1]]
    assert largest == sorted(largest, reverse=True)
    assert sum(bar.before for bar in bars) == sum(before.values())
    assert sum(bar.after for bar in bars) == sum(after.values())
    scale = max(max(bar.before, bar.after) for bar in bars)
    assert all(bar.before_width == pytest.approx(100 * bar.before / scale) for bar in bars)


def test_latencies_share_one_axis(report: RunReport) -> None:
    chart = latency_chart(report)
    assert chart is not None
    assert not chart.logarithmic
    fp32, fp16, int8 = chart.bands
    assert int8.median < fp32.median < fp16.median
    # the same scale for all: distances on the axis are as distances in time
    assert (fp16.median - fp32.median) / (fp32.median - int8.median) == pytest.approx(500 / 1000)
    ticks = {tick.text: tick.x for tick in chart.ticks}
    assert ticks["2000"] == pytest.approx(fp32.median)
    assert all(0 <= band.low <= band.quartile_low <= band.quartile_high <= band.high <= 100 for band in chart.bands)
    assert 4 <= len(chart.ticks) <= 9


def test_few_samples_are_drawn_one_by_one_and_many_as_a_histogram(report: RunReport) -> None:
    few = engine_run("fp32", None, latency=timing(10, runs=HISTOGRAM_FROM - 1))
    many = engine_run("fp32", None, latency=timing(12, runs=500))
    chart = latency_chart(with_runs(report, few, many))
    assert chart is not None
    assert (len(chart.bands[0].marks), chart.bands[0].bars) == (HISTOGRAM_FROM - 1, ())
    assert chart.bands[1].marks == ()
    assert max(height for _, _, height in chart.bands[1].bars) == 100.0


def test_latencies_far_apart_get_a_logarithmic_axis(report: RunReport) -> None:
    far = with_runs(report, engine_run("fp32", 3000.0), engine_run("int8", 3.0), engine_run("fp16", 95.0))
    chart = latency_chart(far)
    assert chart is not None
    assert chart.logarithmic
    fp32, int8, fp16 = (band.median for band in chart.bands)
    assert (fp32 - fp16) / (fp16 - int8) == pytest.approx(math.log(3000 / 95) / math.log(95 / 3))
    assert {"10", "100", "1000"} <= {tick.text for tick in chart.ticks}


@pytest.mark.parametrize("samples", [[0.01], [0.01] * 3, [0.0, 0.0], [1e-9, 2e-9]])
def test_degenerate_samples_still_make_a_chart(samples: list[float], report: RunReport) -> None:
    chart = latency_chart(with_runs(report, engine_run("fp32", None, latency=summarize(samples))))
    assert chart is not None
    places = [x for band in chart.bands for x in (*band.marks, band.low, band.high, band.median)]
    assert all(0 <= x <= 100 for x in places)


# The page


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = frozenset(["meta", "img", "br", "link", "hr", "input"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))  # thin spaces stay


def test_page_needs_nothing_beside_it(report: RunReport) -> None:
    html = report_module.render_html(report)
    page = Page(html)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert not [a for a in page.attributes if a[1].startswith("on")]
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert len(sources) == 2
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)


def test_page_shows_what_the_report_holds(report: RunReport) -> None:
    text = Page(report_module.render_html(report)).text
    assert f"{report_module.headline(report)}." in text
    for warning in report_module.all_warnings(report):
        assert warning in text
    for word in (
        "✓ within all limits",
        "images 1×3×800×1066",
        "2026-01-02 03:05 UTC",
        f"291.2{f.THIN}GFLOP",
        "Shape: 377 exported, 0 optimised",
        "LayerNorm (example)",
        "−377 Shape, +4 Add",
        "✗ rolled back",
        "logits differ by 3",
        "fuse-layernorm: 24 near misses",
        "its axis is not the last",
        "earlier run",
        "optframe run anchordetr",
        "NVIDIA H200",
        f"25.3{f.THIN}GB",
        "The weights are seeded.",
        "from the cache",
        "limit 2e-4",
        f"conv. 97.8{f.THIN}%",
    ):
        assert word in text, word


def test_page_marks_what_is_missed(report: RunReport) -> None:
    missed = with_runs(report, engine_run("fp16", None, 0.05))
    page = Page(report_module.render_html(missed))
    assert "✗ a limit is missed" in page.text
    assert page.text.count("✗ missed") == 2  # the run in the summary, and its logits; the boxes are within
    assert page.attributes.count(("i", "class", "over-limit")) == 1


def test_charts_have_a_text_for_those_who_do_not_see_them(report: RunReport) -> None:
    page = Page(report_module.render_html(report))
    labelled = [value.split() for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-labelledby")]
    assert len(labelled) == 2
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert all(label in ids for labels in labelled for label in labels)
    assert f"FP32: median 2000{f.THIN}ms" in page.text
    assert "Add: 300 to 304." in page.text
    assert [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")] == [
        "FP32: 2 detections",
        "INT8",
    ]


def test_page_escapes_every_name(report: RunReport) -> None:
    hostile = replace(
        report,
        model=HOSTILE,
        reference=HOSTILE,
        command=HOSTILE,
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
        input_shapes={HOSTILE: (1,)},
        op_histogram=Change({HOSTILE: 3}, {HOSTILE: 2}),
        provenance={HOSTILE: 1},
        made=(NodeOrigin(HOSTILE, HOSTILE, (HOSTILE,), (HOSTILE,), (HOSTILE,)),),
        passes=(
            replace(
                report.passes[0],
                name=HOSTILE,
                note=HOSTILE,
                op_changes={HOSTILE: 1},
                near_misses=(NearMiss(HOSTILE, HOSTILE, HOSTILE),),
            ),
        ),
        runs=(engine_run("fp32", 1.0, outputs={HOSTILE: OutputError(1, 1, 1)}, backend=HOSTILE, pipeline=HOSTILE),),
        illustrations=(Illustration(HOSTILE, PNG, HOSTILE, mime='image/png" onload="alert(1)'),),
        environment={HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}},
    )
    page = Page(report_module.render_html(hostile))
    assert page.tags["script"] == 0
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.text.count("<script>alert('x')</script>") > 10


def test_page_of_a_run_that_was_stopped_early(report: RunReport) -> None:
    bare = RunReport("m", "PyTorch FP32", {}, Change(0, 0), (), (), Change({}, {}), "2026-01-02T03:05:00+00:00")
    text = Page(report_module.render_html(bare)).text
    assert "nothing was run" in text
    assert "0 → 0 nodes." in text
    assert report_module.to_json(bare)["runs"] == []
    assert report_module.summary_lines(bare) == ["0 → 0 nodes"]


def test_an_output_folder_that_cannot_be_is_one_line(report: RunReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (report_module.write_html, report_module.write_json):
        with pytest.raises(InputError, match="cannot write"):
            write(report, tmp_path / "file" / "report")
    assert (
        report_module.write_html(report, tmp_path / "report.html")
        .read_text(encoding="utf-8")
        .startswith("<!doctype html>")
    )


# The table


@pytest.mark.parametrize("several", [False, True])
def test_table_fits_eighty_columns(several: bool, report: RunReport) -> None:
    if several:
        report = with_runs(report, *report.runs, engine_run("int8", 1234.5, backend="tensorrt-rtx"))
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(report_module.summary_table(report))
    assert isinstance(console.file, StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    flops = f"328.4{f.THIN}GFLOP → 291.2{f.THIN}GFLOP"
    assert lines[0] == f"anchordetr: 4042 → 782 nodes (−81{f.THIN}%), {flops}"
    (fp32,) = [line.split() for line in lines if line.lstrip().startswith("FP32")]
    assert fp32[-7:] == ["782", "2000", "0.500", "2.9e-6", "0.010", "–", "ok"]
    assert "…" not in "".join(lines)
    assert any("INT8 tensorrt-rtx" in line for line in lines) == several


def test_table_marks_missed_limits(report: RunReport) -> None:
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(report_module.summary_table(with_runs(report, engine_run("fp16", None, 0.07))))
    assert isinstance(console.file, StringIO)
    assert "missed" in console.file.getvalue()
