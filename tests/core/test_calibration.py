"""Histograms, ranges and their file, and calibration in groups, sample by sample."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optframe.errors import InputError, PluginError
from optframe.precision import Histogram, Ranges, calibrate, calibration, calibrator_text, hash_feeds, load_ranges
from optframe.precision.ranges import TensorRange
from optframe_trt.calibrators import EntropyCalibrator, MinMaxCalibrator, PercentileCalibrator

Array = np.ndarray[Any, Any]

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n,3,h,w] x) => (float[n,2,h,w] y) {
    a = Conv(x, w1)
    r = Relu(a)
    b = Conv(r, w2)
    s = Relu(b)
    c = Conv(s, w3)
    y = Conv(c, w4)
}"""
SHAPES = {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "w3": (5, 6, 1, 1), "w4": (2, 5, 1, 1)}


def build(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return ir.from_proto(proto)


def sample(rng: np.random.Generator, height: int = 6, width: int = 5) -> dict[str, Array]:
    return {"x": rng.standard_normal((1, 3, height, width)).astype(np.float32)}


def expected_tensors(model: ir.Model, ranges: Ranges, x: Array) -> dict[str, Array]:
    """Return the tensors to quantise in float64, channels divided by the factors of the equalisation."""
    weights = {name: v.const_value.numpy()[:, :, 0, 0] for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    a = np.einsum("oi,nihw->nohw", weights["w1"].astype(np.float64), x)
    b = np.einsum("oi,nihw->nohw", weights["w2"].astype(np.float64), np.maximum(a, 0))
    tensors = {"x": x.astype(np.float64), "r": np.maximum(a, 0), "s": np.maximum(b, 0)}
    for tensor, group in (("r", "a"), ("s", "b")):
        tensors[tensor] = tensors[tensor] / np.array(ranges.equalization[group])[:, None, None]
    return tensors


def test_ranges_are_those_of_the_equalised_tensors(rng: np.random.Generator) -> None:
    model, samples = build(), [sample(rng) for _ in range(5)]
    ranges = calibrate(model, samples, MinMaxCalibrator())
    every = [expected_tensors(model, ranges, each["x"]) for each in samples]
    assert ranges.tensors.keys() == {"x", "r", "s"}  # the input of the last Conv, a head, is not among them
    for name, tensor in ranges.tensors.items():
        together = np.concatenate([tensors[name] for tensors in every])
        assert tensor.threshold == pytest.approx(np.abs(together).max(), rel=1e-5)  # float32 sums of eight products
        np.testing.assert_allclose(tensor.means[1], together.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert ranges.samples == 5
    assert ranges.input_shapes == {"x": (1, 3, 6, 5)}


def test_groups_of_tensors_give_the_same_ranges(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(rng) for _ in range(3)]
    together = calibrate(build(), samples, MinMaxCalibrator())
    opened: list[list[str]] = []
    open_one = calibration._open
    monkeypatch.setattr(calibration, "GROUP_BYTES", 1)
    monkeypatch.setattr(calibration, "_open", lambda m, names, f: opened.append(list(names)) or open_one(m, names, f))
    assert calibrate(build(), samples, MinMaxCalibrator()) == together
    assert all(len(names) == 1 for names in opened)


def test_samples_of_several_sizes_fit_a_dynamic_model(rng: np.random.Generator) -> None:
    samples = [sample(rng, 4, 4), sample(rng, 9, 3), sample(rng, 2, 11)]
    ranges = calibrate(build(), samples, MinMaxCalibrator())
    assert ranges.tensors["x"].threshold == max(float(np.abs(each["x"]).max()) for each in samples)
    means = np.concatenate([each["x"].reshape(3, -1) for each in samples], axis=1).mean(axis=1)
    np.testing.assert_allclose(ranges.tensors["x"].means[1], means, rtol=1e-4, atol=1e-6)


class Tracked(np.ndarray):  # type: ignore[type-arg]
    """An array that a weak reference can watch."""


def test_samples_are_not_kept(rng: np.random.Generator) -> None:
    alive: list[weakref.ref[Tracked]] = []
    most = 0

    def feeds() -> Iterator[dict[str, Array]]:
        nonlocal most
        for _ in range(12):
            array = sample(rng)["x"].view(Tracked)
            alive.append(weakref.ref(array))
            most = max(most, sum(reference() is not None for reference in alive))
            yield {"x": array}
            del array

    done: list[int] = []
    calibrate(build(), feeds(), MinMaxCalibrator(), progress=done.append)
    assert done == list(range(1, 13))
    assert most <= 4  # two for the equalisation, one at work, one on its way


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_a_tensor_that_is_not_finite_is_named(bad: float, place: int, rng: np.random.Generator) -> None:
    samples = [sample(rng) for _ in range(5)]
    samples[place]["x"][0, 1, 2, 3] = bad
    with pytest.raises(InputError, match=rf"tensor '\w+' has NaN or infinity for calibration sample {place + 1}:"):
        calibrate(build(), samples, MinMaxCalibrator())


@dataclass(frozen=True)
class Saying:
    """A calibrator that says `threshold` of everything."""

    name: ClassVar[str] = "saying"
    said: Any = None

    def threshold(self, histogram: Histogram) -> Any:
        return self.said


@pytest.mark.parametrize("said", [None, "3.5", np.nan, np.inf, -1.0, 0.0, np.array([1.0])])
def test_a_calibrator_that_says_no_magnitude_is_named(said: Any, rng: np.random.Generator) -> None:
    with pytest.raises(
        PluginError, match=r"calibrator saying{said=.*}: its threshold of tensor 'x' is .*, not a finite"
    ):
        calibrate(build(), [sample(rng)], Saying(said))


@pytest.mark.parametrize("said", [2, np.float32(2), np.float64(2)])
def test_a_threshold_is_any_kind_of_number(said: Any, rng: np.random.Generator) -> None:
    assert calibrate(build(), [sample(rng)], Saying(said)).tensors["x"].threshold == 2.0


def test_zero_is_the_threshold_of_zeros_alone(rng: np.random.Generator) -> None:
    nothing = {"x": np.zeros((1, 3, 6, 5), np.float32)}
    assert calibrate(build(), [nothing], Saying(0.0)).tensors["x"].threshold == 0.0


def test_a_sample_that_does_not_fit_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="image"):
        calibrate(build(), [{"image": sample(rng)["x"]}], MinMaxCalibrator())
    with pytest.raises(InputError, match="x"):
        calibrate(build(), [{"x": sample(rng)["x"][:, :2]}], MinMaxCalibrator())


def test_a_file_holds_everything_and_is_tied_to_model_data_and_calibrator(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    model, samples = build(), [sample(rng) for _ in range(3)]
    ranges = calibrate(model, samples, PercentileCalibrator(percent=99.0))
    path = ranges.save(tmp_path / "deeper" / "ranges.json")
    assert load_ranges(path) == ranges
    assert ranges.calibrator == "percentile{percent=99.0}"
    assert ranges.data == hash_feeds(samples)
    ranges.check(model, hash_feeds(samples), PercentileCalibrator(percent=99.0))
    with pytest.raises(InputError, match=r"of another model and other data and another calibrator \(percentile"):
        ranges.check(build(1), hash_feeds(samples[:2]), EntropyCalibrator())


def test_data_is_told_apart_by_every_property(rng: np.random.Generator) -> None:
    x = sample(rng)["x"]
    changed = x.copy()
    changed[0, 0, 0, 0] += 1
    variants = [x, changed, x.reshape(3, 1, 6, 5), x.view(np.int32)]
    hashes = {hash_feeds([{"x": array}]) for array in variants} | {hash_feeds([{"y": x}]), hash_feeds([{"x": x}] * 2)}
    assert len(hashes) == 6


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '{"format": 99}', '{"format": 1, "tensors": 3}'])
def test_what_is_no_file_of_ranges_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"ranges\.json holds no INT8 ranges"):
        load_ranges(path)
    with pytest.raises(InputError, match="cannot read"):
        load_ranges(tmp_path / "missing.json")


def test_the_file_is_plain_json(rng: np.random.Generator, tmp_path: Path) -> None:
    calibrate(build(), [sample(rng)], MinMaxCalibrator()).save(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["tensors"].keys() == {"x", "r", "s"}


def test_calibrators_have_a_text() -> None:
    assert calibrator_text(MinMaxCalibrator()) == "min-max"
    assert calibrator_text(PercentileCalibrator()) == "percentile{percent=99.99}"


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=20), elements=floats)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(arrays, min_size=1, max_size=6), order=st.randoms())
def test_a_histogram_depends_on_the_elements_alone(parts: list[Array], order: Any) -> None:
    whole, pieces = Histogram(), Histogram()
    whole.add(np.concatenate([part.reshape(-1) for part in parts]))
    shuffled = [array for part in parts for array in np.array_split(part.reshape(-1), 3)]
    order.shuffle(shuffled)
    for array in shuffled:
        pieces.add(array)
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    assert (whole.limit, whole.maximum) == (pieces.limit, pieces.maximum)
    assert whole.counts.sum() == sum(part.size for part in parts)


@settings(deadline=None, max_examples=60)
@given(array=arrays)
def test_a_histogram_counts_as_numpy_does_in_float64(array: Array) -> None:
    histogram = Histogram()
    histogram.add(array)
    magnitudes = np.abs(array.astype(np.float64)).reshape(-1)
    assert histogram.maximum == magnitudes.max()
    if not histogram.limit:
        assert histogram.counts[0] == magnitudes.size
        return
    assert histogram.limit / 2 <= histogram.maximum < histogram.limit
    np.testing.assert_array_equal(
        histogram.counts, np.bincount((magnitudes / histogram.width).astype(int), minlength=len(histogram.counts))
    )
    assert not histogram.counts[histogram.used :].any()
    assert histogram.counts[histogram.used - 1]


def test_a_histogram_takes_half_precision_and_large_arrays(rng: np.random.Generator) -> None:
    array = rng.standard_normal(700_001)
    single, half = Histogram(), Histogram()
    single.add(array.astype(np.float16).astype(np.float32))
    half.add(array.astype(np.float16))
    np.testing.assert_array_equal(single.counts, half.counts)
    assert half.counts.sum() == array.size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_histogram_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Histogram().add(np.array([1.0, bad, 2.0], np.float32))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1.0, 1e300, "x", [1]])
def test_a_threshold_that_is_no_magnitude_is_refused(tmp_path: Path, threshold: object) -> None:
    ranges = Ranges({"x": TensorRange(1.0, {1: (0.5,)})}, {"g": (2.0,)}, "model", "data", "entropy", 1, {"x": (1,)})
    path = ranges.save(tmp_path / "ranges.json")
    assert load_ranges(path) == ranges
    document = json.loads(path.read_text())
    for change in (
        {"tensors": {"x": {"threshold": threshold, "means": {}}}},
        {"tensors": {"x": {"threshold": 1.0, "means": {"1": [threshold if threshold != -1.0 else "x"]}}}},
        {"equalization": {"g": [threshold if threshold != -1.0 else "x"]}},
    ):
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(InputError, match="holds no INT8 ranges"):
            load_ranges(path)


def test_a_file_of_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="holds no INT8 ranges"):
        load_ranges(tmp_path / "deep.json")
