"""What each calibrator makes of distributions whose best threshold is known."""

import numpy as np
import pytest

from optframe.errors import InputError
from optframe.precision import Histogram
from optframe_trt.calibrators import EntropyCalibrator, MinMaxCalibrator, MseCalibrator, PercentileCalibrator

ALL = (EntropyCalibrator(), MinMaxCalibrator(), MseCalibrator(), PercentileCalibrator())


def histogram(*arrays: object) -> Histogram:
    made = Histogram()
    for array in arrays:
        made.add(np.asarray(array, np.float32))
    return made


def quantisation_error(values: np.ndarray, threshold: float) -> float:
    scale = threshold / 127
    restored = np.clip(np.round(values / scale), -127, 127) * scale
    return float(np.mean((values - restored) ** 2))


def test_min_max_and_percentile_are_order_statistics(rng: np.random.Generator) -> None:
    values = rng.standard_normal(200_000).astype(np.float32)
    made = histogram(values)
    assert MinMaxCalibrator().threshold(made) == np.abs(values).max()
    found = PercentileCalibrator(percent=99.0).threshold(made)
    assert found == pytest.approx(np.percentile(np.abs(values), 99), abs=made.width)  # to within a bin


def test_mse_is_as_good_as_a_fine_search(rng: np.random.Generator) -> None:
    values = rng.laplace(size=100_000).astype(np.float32)
    found = quantisation_error(values, MseCalibrator().threshold(histogram(values)))
    best = min(quantisation_error(values, t) for t in np.linspace(0.02, 1, 400) * np.abs(values).max())
    assert found <= 1.02 * best  # 100 candidates against 400: a flat minimum


@pytest.mark.parametrize("calibrator", [EntropyCalibrator(), MseCalibrator(), PercentileCalibrator()])
def test_a_lone_outlier_does_not_decide(calibrator: object, rng: np.random.Generator) -> None:
    values = rng.standard_normal(500_000).astype(np.float32)
    with_outlier = histogram(values, [60.0])
    threshold = calibrator.threshold(with_outlier)  # type: ignore[attr-defined]
    assert 2.5 < threshold < 30  # the normal distribution ends near 5, the outlier's own error counts a little
    assert quantisation_error(values, threshold) < quantisation_error(values, 60.0)


def test_entropy_keeps_a_uniform_distribution_whole(rng: np.random.Generator) -> None:
    values = rng.uniform(-1, 1, 200_000).astype(np.float32)
    assert EntropyCalibrator().threshold(histogram(values)) > 0.9


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.name)
def test_thresholds_scale_with_the_values(calibrator: object, rng: np.random.Generator) -> None:
    values = rng.standard_normal(50_000).astype(np.float32)
    small, large = (calibrator.threshold(histogram(values * f)) for f in (1.0, 1024.0))  # type: ignore[attr-defined]
    assert large == pytest.approx(1024 * small, rel=1e-6)  # powers of two keep all bins


@pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.name)
def test_zeros_alone_and_few_values(calibrator: object) -> None:
    assert calibrator.threshold(histogram(np.zeros(10))) == 0.0  # type: ignore[attr-defined]
    assert 0 < calibrator.threshold(histogram([0.25])) <= 0.25  # type: ignore[attr-defined]


def test_bad_options_are_refused() -> None:
    with pytest.raises(InputError):
        PercentileCalibrator(percent=0)
    with pytest.raises(InputError):
        MseCalibrator(candidates=0)
