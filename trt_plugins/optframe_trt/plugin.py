"""Registers the calibrators, the backends and the command on calibration caches."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import BackendSpec, CalibratorSpec, CommandSpec

_MODULE = "optframe_trt.calibrators"


@hookimpl
def optframe_backends() -> Iterable[BackendSpec]:
    """Register TensorRT and TensorRT-RTX."""
    module = "optframe_trt.backend"
    return [
        BackendSpec(
            "tensorrt",
            f"{module}:TensorRTBackend",
            "TensorRT 10.9 to 11, on the GPU that is here",
            pipeline="tensorrt",
        ),
        BackendSpec(
            "tensorrt-rtx",
            f"{module}:TensorRTRTXBackend",
            "TensorRT-RTX; builds without a GPU, for several compute capabilities at once",
            pipeline="tensorrt",
        ),
    ]


@hookimpl
def optframe_calibrators() -> Iterable[CalibratorSpec]:
    """Register the ways to choose INT8 ranges."""
    return [
        CalibratorSpec("entropy", f"{_MODULE}:EntropyCalibrator", "least information lost (KL divergence), TensorRT's"),
        CalibratorSpec("min-max", f"{_MODULE}:MinMaxCalibrator", "the largest magnitude seen"),
        CalibratorSpec("mse", f"{_MODULE}:MseCalibrator", "least mean squared error"),
        CalibratorSpec("percentile", f"{_MODULE}:PercentileCalibrator", "the magnitude that 99.99 % do not exceed"),
    ]


@hookimpl
def optframe_commands() -> Iterable[CommandSpec]:
    """Register what exchanges INT8 ranges with TensorRT."""
    target = "optframe_trt.cache_command:trt_cache"
    return [CommandSpec("trt-cache", target, "Exchange INT8 ranges with TensorRT's calibration cache.")]
