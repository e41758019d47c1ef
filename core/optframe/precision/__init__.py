"""FP16 and INT8 as graph transformations, and the calibration that INT8 needs."""

from __future__ import annotations

from optframe.precision.calibration import calibrate
from optframe.precision.calibrator import Calibrator, Histogram, calibrator_text
from optframe.precision.fp16 import to_fp16
from optframe.precision.int8 import quantize
from optframe.precision.placement import Scope
from optframe.precision.ranges import Ranges, TensorRange, hash_feeds, load_ranges
from optframe.precision.sensitivity import (
    DEFAULT_ERROR,
    DEFAULT_RUNS,
    CurvePoint,
    LayerError,
    Sensitivity,
    analyse,
    load_sensitivity,
)

__all__ = [
    "DEFAULT_ERROR",
    "DEFAULT_RUNS",
    "Calibrator",
    "CurvePoint",
    "Histogram",
    "LayerError",
    "Ranges",
    "Scope",
    "Sensitivity",
    "TensorRange",
    "analyse",
    "calibrate",
    "calibrator_text",
    "hash_feeds",
    "load_ranges",
    "load_sensitivity",
    "quantize",
    "to_fp16",
]
