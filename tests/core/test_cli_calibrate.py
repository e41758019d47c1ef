"""`optframe calibrate`, and the file it writes in `optframe run` and `optframe optimize`; images as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import flops, graph
from optframe.cli import main
from optframe.errors import InputError
from optframe.images import ImageFolder
from optframe.precision import load_ranges

pillow = pytest.importorskip("PIL.Image")

Array = np.ndarray[Any, Any]

CONVOLUTIONS = 5


def model_of(rng: np.random.Generator, size: int = 10) -> ir.Model:
    """Return five convolutions on images (1, 3, `size`, 12), with ReLUs between and a Dropout to optimise away."""
    x = ir.val("images", ir.DataType.FLOAT, (1, 3, size, 12))
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    value, channels = x, 3
    for index in range(CONVOLUTIONS):
        array = (rng.standard_normal((8, channels, 1, 1)) / np.sqrt(channels)).astype(np.float32)
        weights.append(ir.val(f"w{index}", const_value=ir.tensor(array, name=f"w{index}")))
        nodes.append(ir.node("Conv", [value, weights[-1]], name=f"stage[{index}]/conv"))
        nodes.append(ir.node("Relu", nodes[-1].outputs, name=f"relu{index}"))
        value, channels = nodes[-1].outputs[0], 8
    nodes.append(ir.node("Identity", [value], name="same"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
    y = nodes[-1].outputs[0]
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape((1, 8, size, 12))
    made = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="five")
    return ir.Model(made, ir_version=10)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv("OPTFRAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    graph.save(model_of(rng), tmp_path / "five.onnx")
    np.savez(tmp_path / "in.npz", images=rng.standard_normal((6, 1, 3, 10, 12)).astype(np.float32))


def call(*arguments: str, status: int = 0) -> None:
    assert main(list(arguments)) == status


def calibrate(*more: str, status: int = 0) -> None:
    call("calibrate", "five.onnx", "-o", "out/ranges.json", *more, status=status)


def test_ranges_are_measured_on_what_the_run_quantises(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz", "--calibrator", "min-max")
    ranges = load_ranges(Path("out/ranges.json"))
    assert (ranges.samples, ranges.calibrator) == (4, "min-max")  # of six, two are left to measure errors on
    capsys.readouterr()
    data = ("--inputs", "in.npz", "--calibration-cache", "out/ranges.json")
    call("run", "five.onnx", *data, "--precision", "int8", "--json", "--out", "report")
    report = json.loads(capsys.readouterr().out)
    assert "calibrate" not in [stage["stage"] for stage in report["stages"]]
    assert report["runs"][0]["int8_flops_fraction"] > 0.7


def test_a_default_run_takes_int8_where_there_are_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz")
    capsys.readouterr()
    call("run", "five.onnx", "--calibration-cache", "out/ranges.json", "--json", "--out", "report")
    assert [run["precision"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["fp32", "fp16", "int8"]


def test_optimize_quantises_with_ranges_and_keeps_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz")
    options = ("--precision", "int8", "--calibration-cache", "out/ranges.json")
    call("optimize", "five.onnx", "-o", "int8.onnx", *options)
    call("optimize", "five.onnx", "-o", "kept.onnx", *options, "--int8-keep", "stage[[]1]*", "--int8-keep", "*2]/conv")
    whole, kept = (flops.int8_fractions(graph.load(f"{name}.onnx")).all for name in ("int8", "kept"))
    assert whole - kept == pytest.approx(2 * 64 / (24 + 4 * 64))  # two of the larger layers, by multiplications
    call("optimize", "five.onnx", "-o", "half.onnx", "--precision", "fp16")
    assert any(node.op_type == "Cast" for node in graph.load("half.onnx").graph)


def test_what_stays_out_of_int8_can_be_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz")
    data = ("--inputs", "in.npz", "--calibration-cache", "out/ranges.json")
    options = ("--int8-base", "fp16", "--int8-keep", "stage[[]1]*", "--precision", "int8")
    call("run", "five.onnx", *data, *options, "--out", "report")
    made = graph.load("report/engines/onnxruntime-int8/model.onnx")
    kept = next(node for node in made.graph if node.name == "stage[1]/conv")
    assert {value.dtype for value in kept.inputs if value is not None and value.const_value is not None} == {
        ir.DataType.FLOAT16
    }


def test_sensitivity_ranks_all_layers_and_proposes_patterns_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz", "--sensitivity", "--error", "1e-9", "--json", status=1)
    worst = json.loads(capsys.readouterr().out)["sensitivity"]["curve"][0]["outputs"]
    target = max(worst.values()) * 0.8
    calibrate("--inputs", "in.npz", "--sensitivity", "--error", str(target))
    shown = capsys.readouterr().out
    found = json.loads(Path("out/ranges-sensitivity.json").read_text())
    assert {layer["name"] for layer in found["layers"]} == {f"stage[{i}]/conv" for i in range(CONVOLUTIONS - 1)}
    assert 0 < len(found["keep"]) < CONVOLUTIONS - 1
    assert f"--int8-keep '{found['keep'][0]}'" in shown
    keep = [word for pattern in found["keep"] for word in ("--int8-keep", pattern)]
    call(
        *("run", "five.onnx", "--inputs", "in.npz", "--calibration-cache", "out/ranges.json"),
        *("--precision", "int8", "--json", "--out", "report", *keep),
    )
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["int8_flops_fraction"] == pytest.approx(found["proposal"]["int8_flops"])
    # the same inputs in the same runtime; only the reference differs: the file before its passes
    measured = max(output["err_over_response"] for output in run["outputs"].values())
    assert measured == pytest.approx(max(found["proposal"]["outputs"].values()), rel=0.01)


def test_a_run_shows_the_curve_in_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    call("run", "five.onnx", "--inputs", "in.npz", "--sensitivity", "0.001", "--json", "--out", "report")
    shown = json.loads(capsys.readouterr().out)["int8_sensitivity"]
    assert len(shown["curve"]) >= 3
    page = Path("report/report.html").read_text()
    assert "INT8, layer by layer" in page
    assert page.count("<circle") == len(shown["curve"])
    call("run", "five.onnx", "--inputs", "in.npz", "--json", "--out", "report")
    assert json.loads(capsys.readouterr().out)["int8_sensitivity"] is None


def test_ranges_of_another_model_are_refused(capsys: pytest.CaptureFixture[str], rng: np.random.Generator) -> None:
    calibrate("--inputs", "in.npz")
    graph.save(model_of(rng), "other.onnx")
    data = ("--calibration-cache", "out/ranges.json")
    call("run", "other.onnx", *data, "--precision", "int8", "--out", "report", status=2)
    assert "another model" in capsys.readouterr().err
    call("optimize", "other.onnx", "-o", "int8.onnx", "--precision", "int8", *data, status=2)
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 1, 200, -3])
def test_a_file_that_was_cut_off_is_refused_before_any_work(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate("--inputs", "in.npz")
    whole = Path("out/ranges.json").read_text()
    Path("cut.json").write_text(whole[:length])
    capsys.readouterr()
    call("run", "five.onnx", "--calibration-cache", "cut.json", "--out", "report", status=2)
    error = capsys.readouterr().err
    assert "cut.json holds no INT8 ranges" in error
    assert "optimize" not in error


def test_what_cannot_be_written_or_found_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("mine")
    call("calibrate", "five.onnx", "--inputs", "in.npz", "-o", "photos", status=2)
    assert "photos is a folder: name a file in it" in capsys.readouterr().err
    assert Path("photos/a.txt").read_text() == "mine"
    call("calibrate", "five.onnx", "--inputs", "in.npz", "-o", "r.json", "--sensitivity", "--error", "0", status=2)
    error = capsys.readouterr().err
    assert "ask for one above 0" in error
    assert "optimize" not in error


def test_a_dump_leaves_what_is_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("mine")
    call("run", "five.onnx", "--precision", "fp32", "--dump", "photos", "--out", "report", "--pipeline", "clean")
    assert Path("photos/a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int8"), "needs --calibration-cache"),
        (("--precision", "fp16,int8"), "one file is of one precision"),
        (("--precision", "int4"), "unknown precision"),
        (("--precision", "int8", "--calibration-cache", "nowhere.json"), "cannot read INT8 ranges"),
    ],
)
def test_optimize_says_what_int8_lacks(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call("optimize", "five.onnx", "-o", "int8.onnx", *arguments, status=2)
    assert message in capsys.readouterr().err
    assert not Path("int8.onnx").exists()


def photographs(folder: Path, rng: np.random.Generator, count: int = 4) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = rng.integers(0, 256, (20 + index, 30, 3), np.uint8)
        pillow.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_a_folder_of_images_is_data_for_any_image_model(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photographs(tmp_path / "photos", rng)
    (folder / "notes.txt").write_text("no image")
    calibrate("--images", str(folder))
    assert load_ranges(Path("out/ranges.json")).samples == 2  # of four, two are left to measure errors on
    calibrate("--images", str(folder), "--inputs", "in.npz")
    assert load_ranges(Path("out/ranges.json")).samples == 4
    images = ImageFolder(folder, graph.load("five.onnx"), "unit")
    assert len(images) == 4
    assert len(images[1:3]) == 2
    np.testing.assert_array_equal(images[1:3][1]["images"], images[2]["images"])
    first = images[0]["images"]
    assert (first.shape, first.dtype) == ((1, 3, 10, 12), np.float32)
    assert 0 <= first.min() < first.max() <= 1
    same = np.asarray(pillow.open(folder / "0.png").resize((12, 10), pillow.Resampling.BILINEAR))
    np.testing.assert_array_equal(first[0].transpose(1, 2, 0), same.astype(np.float32) / 255)
    scaled = next(iter(ImageFolder(folder, graph.load("five.onnx"))))["images"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (first[0] - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(scaled[0], expected, atol=1e-5)  # float32 against float64


def test_bad_folders_of_images(rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    broken = photographs(tmp_path / "broken", rng)
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:200])
    for folder, message in (("none", "no such folder"), ("empty", "no images in"), ("broken", "1.png")):
        calibrate("--images", str(tmp_path / folder), status=2)
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
        assert not Path("out/ranges.json").exists()


def test_images_need_a_model_of_one_image(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", rng)
    for shape in ((1, 4, 10, 12), (2, 3, 10, 12), (1, 3, "h", 12), (3, 10)):
        model = model_of(rng)
        model.graph.inputs[0].shape = ir.Shape(shape)
        with pytest.raises(InputError, match="use --inputs"):
            ImageFolder(folder, model)
    with pytest.raises(InputError, match="unknown preprocessing 'imagnet': did you mean 'imagenet'"):
        ImageFolder(folder, model_of(rng), "imagnet")
