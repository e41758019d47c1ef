"""Registers the calibrators."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import CalibratorSpec

_MODULE = "optframe_trt.calibrators"


@hookimpl
def optframe_calibrators() -> Iterable[CalibratorSpec]:
    """Register the ways to choose INT8 ranges."""
    return [
        CalibratorSpec("entropy", f"{_MODULE}:EntropyCalibrator", "least information lost (KL divergence), TensorRT's"),
        CalibratorSpec("min-max", f"{_MODULE}:MinMaxCalibrator", "the largest magnitude seen"),
        CalibratorSpec("mse", f"{_MODULE}:MseCalibrator", "least mean squared error"),
        CalibratorSpec("percentile", f"{_MODULE}:PercentileCalibrator", "the magnitude that 99.99 % do not exceed"),
    ]
