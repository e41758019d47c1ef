"""What an engine's own tools tell beyond one latency: time of copies, GPU and host, and of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from optframe.types import Feeds

UNSTABLE_GPU = 0.025
"""A GPU at fixed clocks repeats a kernel within a per cent or so; trtexec's users expect to be told beyond 2.5 %."""

ENQUEUE_BOUND = 0.8
"""Above this share of the GPU's time, the host's work to start an inference begins to bound the throughput."""


@dataclass(frozen=True)
class Series:
    """Figures of one quantity over all timed inferences, in milliseconds."""

    min: float
    max: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class LayerTime:
    """A layer of an engine with its time (milliseconds, mean over runs), its ONNX nodes and torch modules."""

    name: str
    milliseconds: float
    nodes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineDetails:
    """Series by name: latency (all of the following but enqueue), enqueue, h2d, gpu, d2h; layers slowest first."""

    series: Mapping[str, Series]
    throughput_per_s: float
    layers: tuple[LayerTime, ...] = ()
    warnings: tuple[str, ...] = ()
    layer_information: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class DetailedRunner(Protocol):
    """A runner that can tell more of itself."""

    def details(self, feeds: Feeds) -> EngineDetails:
        """Run on `feeds` a number of times and return what was measured."""
        ...


def summarize(samples: Mapping[str, Sequence[float]], seconds: float) -> EngineDetails:
    """Return the figures of `samples`: milliseconds of enqueue, h2d, gpu and d2h for each inference.

    `seconds` is the wall time of all of them together, which the throughput is of. Percentiles interpolate linearly.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    latency = arrays["h2d"] + arrays["gpu"] + arrays["d2h"]
    count = latency.size
    return EngineDetails(
        series={name: _series(values) for name, values in {"latency": latency, **arrays}.items()},
        throughput_per_s=count / seconds if seconds else float("inf"),
        warnings=tuple(_warnings(arrays)),
    )


def _series(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Series:
    median, p90, p95, p99 = (float(value) for value in np.percentile(values, [50, 90, 95, 99]))
    return Series(float(values.min()), float(values.max()), float(values.mean()), median, p90, p95, p99)


def _warnings(arrays: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]) -> list[str]:
    gpu, found = arrays["gpu"], []
    median = {name: float(np.median(values)) for name, values in arrays.items()}
    if median["enqueue"] > ENQUEUE_BOUND * median["gpu"]:
        found.append(
            f"enqueue-bound: starting an inference takes the host {median['enqueue']:.3g} ms, the GPU computes "
            f"{median['gpu']:.3g} ms; use a CUDA graph"
        )
    for name, what in (("h2d", "to"), ("d2h", "from")):
        if median[name] > median["gpu"]:
            found.append(f"copies {what} the GPU take longer ({median[name]:.3g} ms) than it computes")
    spread = float(gpu.std() / gpu.mean()) if gpu.mean() else 0.0
    if spread > UNSTABLE_GPU:
        found.append(f"unstable GPU time: it varies by {spread:.1%}; lock the clocks (nvidia-smi -lgc), or run longer")
    return found
