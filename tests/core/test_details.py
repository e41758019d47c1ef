"""Statistics of timed inferences, and the warnings that they give rise to."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from optframe import details, typed_json
from optframe.details import EngineDetails, LayerTime


def samples(**changes: float) -> dict[str, list[float]]:
    """Return ten inferences of 1 ms up, 5 ms on the GPU, 2 ms down, and 0.5 ms to enqueue."""
    parts = {"enqueue": 0.5, "h2d": 1.0, "gpu": 5.0, "d2h": 2.0} | changes
    return {name: [value] * 10 for name, value in parts.items()}


def test_figures_are_those_of_the_samples(rng: np.random.Generator) -> None:
    gpu = rng.uniform(1, 2, 101)
    told = details.summarize({**{k: [v[0]] * 101 for k, v in samples().items()}, "gpu": list(gpu)}, seconds=2.0)
    assert told.throughput_per_s == pytest.approx(101 / 2)
    assert told.series["gpu"].median == pytest.approx(np.sort(gpu)[50])
    assert told.series["gpu"].p90 == pytest.approx(np.sort(gpu)[90])
    assert (told.series["gpu"].min, told.series["gpu"].max) == (gpu.min(), gpu.max())
    assert told.series["latency"].mean == pytest.approx(3.0 + gpu.mean())  # h2d + gpu + d2h, without enqueue


def test_a_quiet_run_has_no_warnings() -> None:
    assert details.summarize(samples(), 1.0).warnings == ()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"enqueue": 4.5}, "enqueue-bound: starting an inference takes the host 4.5 ms, the GPU computes 5 ms"),
        ({"h2d": 6.0}, "copies to the GPU take longer"),
        ({"d2h": 6.0}, "copies from the GPU take longer"),
    ],
)
def test_what_bounds_the_run_is_told(changes: dict[str, float], warning: str) -> None:
    (told,) = details.summarize(samples(**changes), 1.0).warnings
    assert told.startswith(warning)


@pytest.mark.parametrize(("spread", "warned"), [(0.02, False), (0.03, True)])
def test_unstable_gpu_time_is_told(spread: float, warned: bool) -> None:
    varied = {**samples(), "gpu": [5 * (1 - spread), 5 * (1 + spread)] * 5}
    warnings = details.summarize(varied, 1.0).warnings
    assert bool(warnings) == warned
    assert all(f"varies by {spread:.1%}" in text for text in warnings)


def test_details_survive_json() -> None:
    summary = details.summarize(samples(h2d=9.0), 1.0)
    told = EngineDetails(
        summary.series, 3.0, (LayerTime("conv", 0.5, ("a",), ("m",)),), summary.warnings, {"Layers": ["conv"]}
    )
    assert typed_json.read(details.EngineDetails, json.loads(json.dumps(asdict(told)))) == told
