"""What each calibrator makes of distributions whose best threshold is known."""

import numpy as np
import pytest

from optframe.errors import InputError
from optframe.precision import Histogram
from optframe_trt.calibrators import (
    EntropyCalibrator,
    MinMaxCalibrator,
    MseCalibrator,
    PercentileCalibrator,
    _divergences,
)

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


def divergence(bins: np.ndarray, kept: int) -> float:
    """Return KL(P || Q) of `bins` with `kept` of them left, as the pseudocode of Migacz (GTC 2017) has it."""
    reference = bins[:kept].astype(np.float64)
    reference[-1] += bins[kept:].sum()
    quantized = np.zeros(kept)
    owner = np.array([next(m for m in range(128) if kept * (m + 1) // 128 > i) for i in range(kept)])
    for magnitude in range(128):
        inside = owner == magnitude
        filled = inside & (bins[:kept] > 0)
        if filled.any():
            quantized[filled] = bins[:kept][inside].sum() / filled.sum()
    p, q = reference / reference.sum(), quantized / quantized.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * np.log(p / q), 0.0).sum())


@pytest.mark.parametrize("share_of_zeros", [0.0, 0.7])
def test_entropy_is_that_of_the_published_pseudocode(share_of_zeros: float, rng: np.random.Generator) -> None:
    # Few values, in a range in which many bins stay empty: that is where implementations differ.
    values = rng.laplace(size=3000) * rng.choice([0.2, 1.0], 3000) * (rng.random(3000) >= share_of_zeros)
    made = histogram(values)
    bins = made.counts[: made.used].copy()
    bins[0] = bins[1]
    candidates = rng.choice(np.arange(128, made.used + 1), 60, replace=False)
    expected = np.array([divergence(bins, kept) for kept in candidates])
    found = _divergences(bins.astype(np.float64))[candidates - 128]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)  # float64 sums in another order
    threshold = EntropyCalibrator().threshold(made)
    chosen = divergence(bins, int(np.ceil(threshold / made.width - 1e-9)))
    assert chosen <= expected.min() + 1e-12
