"""A whole run on a small ONNX file: report, engines, cache, and what bad input gets."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optframe import api, graph
from optframe.cli import main
from optframe.errors import CheckFailed, EnvironmentLacks, InputError
from optframe.onnx_model import OnnxFileModel
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.stages import RunRequest
from optframe.store import Store
from optframe.types import Precision

PIPELINE = "fold-constants,eliminate-identity,eliminate-dead-code"


def small_model(seed: int = 0) -> ir.Model:
    """Return Conv, Relu, an Identity to remove, GlobalAveragePool, Flatten, Gemm on images (1, 3, 12, 10)."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> ir.Value:
        array = (rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)
        value = ir.val(name, ir.DataType.FLOAT, shape)
        value.const_value = ir.tensor(array, name=name)
        return value

    images = ir.val("images", ir.DataType.FLOAT, (1, 3, 12, 10))
    weights = [weight("w", 8, 3, 3, 3), weight("b", 8), weight("v", 5, 8), weight("c", 5)]
    conv = ir.node("Conv", [images, *weights[:2]], name="conv")
    relu = ir.node("Relu", conv.outputs, name="relu")
    same = ir.node("Identity", relu.outputs, name="same")
    pool = ir.node("GlobalAveragePool", same.outputs, name="pool")
    flat = ir.node("Flatten", pool.outputs, name="flat")
    gemm = ir.node("Gemm", [flat.outputs[0], *weights[2:]], {"transB": 1}, name="gemm")
    scores = gemm.outputs[0]
    scores.name, scores.dtype, scores.shape = "scores", ir.DataType.FLOAT, ir.Shape((1, 5))
    nodes = [conv, relu, same, pool, flat, gemm]
    return ir.Model(
        ir.Graph([images], [scores], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="small"),
        ir_version=10,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return graph.save(small_model(), tmp_path / "small.onnx")


@pytest.fixture
def inputs(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Images of a colour each: averages of noise alone differ so little that FP16's error counts for much beside it."""
    path = tmp_path / "inputs.npz"
    images = rng.standard_normal((6, 1, 3, 12, 10)) + rng.standard_normal((6, 1, 3, 1, 1))
    np.savez(path, images=images.astype(np.float32))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path / "cache"))


def test_all_precisions_are_built_measured_and_reported(model: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.run(model, options={"inputs": inputs}, request=RunRequest(pipeline=PIPELINE), out=out, store=Store())
    data = json.loads((out / "report.json").read_text())
    assert data["nodes"] == {"exported": 6, "optimized": 5}
    assert data["input_shapes"] == {"images": [1, 3, 12, 10]}
    assert [row["name"] for row in data["passes"]] == PIPELINE.split(",")
    assert all(row["verified"] for row in data["passes"])
    fp32, fp16, int8 = data["runs"]
    assert [run["precision"] for run in data["runs"]] == ["fp32", "fp16", "int8"]
    assert fp32["outputs"]["scores"]["max_abs"] < 1e-5  # float32 sums of 27 products
    # FP16 keeps 11 bits: it must differ from FP32, and by little
    assert 0 < fp16["outputs"]["scores"]["err_over_response"] < 0.05
    assert int8["outputs"]["scores"]["err_over_response"] < 0.2
    assert int8["int8_flops_fraction"] > 0.9  # the convolution has 27 of every 28 products
    for run in data["runs"]:
        latency = run["latency_ms"]
        assert 0 < latency["min"] <= latency["median"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert (out / "engines" / f"onnxruntime-{run['precision']}" / "model.onnx").is_file()
    assert report.passed
    assert "<html" in (out / "report.html").read_text()
    names = [node.name for node in graph.load(out / "optimized.onnx").graph]
    assert "same" not in names


def test_a_second_run_is_served_from_the_cache_and_says_so(model: Path, inputs: Path, tmp_path: Path) -> None:
    runs = [
        api.run(
            model,
            options={"inputs": inputs},
            request=RunRequest(pipeline=PIPELINE, precisions=("fp32",)),
            out=tmp_path / "out",
            store=Store(),
        )
        for _ in range(2)
    ]
    assert not any(stage.cached for stage in runs[0].stages)
    assert all(stage.cached for stage in runs[1].stages)
    assert runs[1].runs[0].latency_cached
    assert runs[1].runs[0].latency is not None
    assert runs[1].runs[0].latency.measured_at in (tmp_path / "out" / "report.json").read_text()


def test_an_interrupted_run_resumes(model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    request = RunRequest(pipeline=PIPELINE, precisions=("fp32",))
    with monkeypatch.context() as patch:
        patch.setattr("optframe.stages.engines.latency.measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.run(model, options={"inputs": inputs}, request=request, out=tmp_path / "out", store=Store())
    assert not (tmp_path / "out" / "report.json").exists()
    assert list((tmp_path / "cache" / "work").iterdir()) == []
    resumed = api.run(model, options={"inputs": inputs}, request=request, out=tmp_path / "out", store=Store())
    assert {stage.stage for stage in resumed.stages if not stage.cached} == {"profile"}


def test_a_changed_option_runs_what_depends_on_it(model: Path, inputs: Path) -> None:
    request = RunRequest(pipeline=PIPELINE, precisions=("fp32",))
    api.run(model, options={"inputs": inputs}, request=request, store=Store())
    other = RunRequest(pipeline="eliminate-dead-code", precisions=("fp32",))
    again = api.run(model, options={"inputs": inputs}, request=other, store=Store())
    cached = {stage.stage: stage.cached for stage in again.stages}
    assert cached["export"]
    assert cached["reference"]
    assert not cached["optimize"]


def test_the_backend_decides_on_the_pipeline_unless_one_is_given(model: Path, inputs: Path) -> None:
    def pipeline(given: str | None) -> str:
        request = RunRequest(pipeline=given, precisions=("fp32",), backends=("torch",))
        return api.run(model, options={"inputs": inputs}, request=request).runs[0].pipeline

    assert pipeline(None) == str(Pipeline.parse("cuda", default_registry()))
    assert pipeline("") == ""


def test_a_limit_that_is_missed_is_named_with_output_and_figure(model: Path, inputs: Path) -> None:
    from optframe.accuracy import Limits

    request = RunRequest(pipeline=PIPELINE, precisions=("fp16",), limits={"fp16": Limits(err_over_response=1e-9)})
    report = api.run(model, options={"inputs": inputs}, request=request)
    assert not report.passed
    [finding] = report.runs[0].findings
    assert (finding.output, finding.figure, finding.limit) == ("scores", "err_over_response", 1e-9)


def optframe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optframe", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "nosuch"], 2, "unknown model 'nosuch'"),
        (["run", "missing.onnx"], 2, "no such file: missing.onnx"),
        (["run", "text.onnx"], 2, "text.onnx is no ONNX model"),
        (["run", "small.onnx", "--precision", "fp8"], 2, "did you mean 'fp32'"),
        (["run", "small.onnx", "--precision", "fp32,fp32"], 2, "list of different names"),
        (["run", "small.onnx", "--pipeline", "fold-constant"], 2, "did you mean 'fold-constants'"),
        (["run", "small.onnx", "--backend", "onnxruntim"], 2, "did you mean 'onnxruntime'"),
        (["run", "small.onnx", "--precision", "int8"], 2, "--inputs FILE.npz"),
        (["run", "small.onnx", "--inputs", "text.onnx"], 2, "no readable .npz"),
        (["run", "small.onnx", "--mask"], 2, "unknown option of model small.onnx 'mask'"),
        (
            ["run", "small.onnx", "--stop-after", "lift-opset", "--pipeline", PIPELINE],
            2,
            "unknown pass of this pipeline",
        ),
        (["run", "small.onnx", "--out", "text.onnx/out"], 2, "cannot write text.onnx/out"),
        (["run", "small.onnx", "--precision", "fp32", "--device", "cuda"], 3, "onnxruntime"),
        (["optimize", "small.onnx", "-o", "text.onnx/o.onnx", "--pipeline", PIPELINE], 2, "cannot write"),
        (["optimize", "missing.onnx", "-o", "text.onnx/o.onnx"], 2, "cannot write"),  # said before any work
        (["compare", "small.onnx", "other.onnx", "--max-abs", "1e-6"], 1, "the absolute difference is over 1e-06"),
        (["profile", "small.onnx", "--inputs", "missing.npz"], 2, "no such file: missing.npz"),
    ],
)
def test_bad_input_is_one_line_with_the_right_status(
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    graph.save(small_model(seed=1), tmp_path / "other.onnx")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "runs" / "small" / "report.json").exists()


def test_a_file_without_data_runs_in_what_needs_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "small.onnx", "--pipeline", PIPELINE]) == 0
    data = json.loads((tmp_path / "runs" / "small" / "report.json").read_text())
    assert [run["precision"] for run in data["runs"]] == ["fp32", "fp16"]
    random_inputs, left_out = data["notes"]
    assert "measured on random inputs" in random_inputs
    assert "INT8 was left out" in left_out
    assert main(["run", "small.onnx", "--pipeline", PIPELINE, "--precision", "fp32"]) == 0  # INT8 was not asked for
    assert json.loads((tmp_path / "runs" / "small" / "report.json").read_text())["notes"] == [random_inputs]


@pytest.mark.parametrize(
    ("precisions", "calibrates", "notes"),
    [
        (("fp32", "fp16"), True, ("of export", "of feeds")),
        (("fp32", "int8"), True, ("of export", "of feeds", "of calibration")),
        (("int8",), False, ("of export", "of feeds")),
    ],
)
def test_notes_are_of_what_was_run(
    model: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precisions: tuple[Precision, ...],
    calibrates: bool,
    notes: tuple[str, ...],
) -> None:
    monkeypatch.setattr(OnnxFileModel, "notes", lambda self, of: [f"of {of}"])
    request = RunRequest(pipeline=PIPELINE, precisions=precisions, verify="off")
    options = {"inputs": inputs}
    if not calibrates:
        ranges, _ = api.calibrate(model, options=options, request=request)
        ranges.save(tmp_path / "ranges.json")
        request = replace(request, ranges=tmp_path / "ranges.json")
    assert api.run(model, options=options, request=request).notes == notes


INTEGERS = """
<ir_version: 8, opset_import: ["" : 17]>
integers (int64[4] x) => (int64[4] y) { y = Add(x, x) }
"""


def test_a_precision_that_does_nothing_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    path = graph.save(ir.from_onnx_text(INTEGERS), tmp_path / "integers.onnx")
    asked = ("fp32", "fp16")
    report = api.run(path, request=RunRequest(pipeline=PIPELINE, precisions=asked, optional=True))
    assert [run.precision for run in report.runs] == ["fp32"]
    assert "fp16: nothing in this model can run in it; it is left out" in report.warnings
    with pytest.raises(InputError, match="fp16: nothing in this model can run in it; leave fp16 out of --precision"):
        api.run(path, request=RunRequest(pipeline=PIPELINE, precisions=asked))


def test_int8_that_is_kept_out_of_everything_says_so(model: Path, inputs: Path) -> None:
    request = RunRequest(pipeline=PIPELINE, precisions=("int8",), keep=("*",))
    with pytest.raises(InputError, match=r"since --int8-keep leaves out \*; leave int8 out"):
        api.run(model, options={"inputs": inputs}, request=request)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--device", "gpu"], 2),
        (["--backend-option", "thread=2"], 2),
        (["--stop-after", "lift-opset", "--pipeline", PIPELINE], 2),
    ],
)
def test_what_shows_before_the_work_is_said_before_it(
    model: Path, tmp_path: Path, arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(model), "--out", str(tmp_path / "out"), *arguments]) == status
    assert "export" not in capfd.readouterr().err  # the first stage has not begun


def test_progress_tells_the_runs_apart(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(model), "--out", str(tmp_path / "out"), "--pipeline", PIPELINE]) == 0
    lines = [" ".join(line.split()[:-2]) for line in capfd.readouterr().err.splitlines() if line.endswith(" s")]
    assert lines[:3] == ["export", "optimize", "reference"]
    assert {"precision fp16", "build onnxruntime fp32", "verify onnxruntime fp16"} < set(lines)
    assert len(set(lines)) == len(lines)


def test_optimize_writes_the_model_and_its_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["optimize", "small.onnx", "-o", "made.onnx", "--pipeline", PIPELINE, "--dump", "steps"]) == 0
    assert graph.count_nodes(graph.load(tmp_path / "made.onnx")) == 5
    assert sorted(path.name for path in (tmp_path / "steps").iterdir())[-1] == "02-eliminate-identity.onnx"
    assert api.compare(tmp_path / "made.onnx", model)["scores"].max_abs < 1e-6  # the same kernels in the same order


def test_a_report_as_json_is_all_that_stdout_holds(model: Path, tmp_path: Path) -> None:
    result = optframe(
        "run", "small.onnx", "--precision", "fp32", "--pipeline", PIPELINE, "--json", "--out", "out", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["nodes"]["optimized"] == 5
    assert "Traceback" not in result.stderr


def test_int8_without_data_is_refused_by_the_api(model: Path) -> None:
    with pytest.raises(InputError, match="needs data"):
        api.convert_precision(model, "int8")
    with pytest.raises(InputError, match="unknown precision"):
        api.convert_precision(model, "int4")  # type: ignore[arg-type]


def test_compare_refuses_models_with_other_outputs(model: Path, tmp_path: Path) -> None:
    other = small_model()
    other.graph.outputs[0].name = "logits"
    with pytest.raises(CheckFailed):
        api.compare(other, model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(EnvironmentLacks, match="OPTFRAME_CACHE"):
        Store(tmp_path / "locked" / "cache")
