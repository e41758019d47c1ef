"""Chooses among calls that compute the same by timing each on the GPU, in a CUDA graph as they will run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CALLS = 10
"""In one graph, so that what a replay costs the host stays out of the time of a small kernel."""

ROUNDS = 5

Candidate = Callable[[], Any]


def random_like(shape: Sequence[int], dtype: str, *, channels_last: bool = False) -> Tensor:
    """Return a random CUDA tensor; on zeros some products run faster than on any real data."""
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.randn(tuple(shape), device="cuda").to(getattr(torch, dtype), memory_format=layout)


def microseconds(call: Candidate) -> float | None:
    """Return the median time of a call, or None for one that does not run here."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    except Exception:  # a library refuses in its own ways, and then another candidate is taken
        torch.cuda.synchronize()
        return None
    return statistics.median(_replay(graph) for _ in range(ROUNDS))


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / CALLS


def fastest(candidates: Mapping[str, Candidate], fallback: str) -> str:
    """Return the name of the fastest candidate; `fallback` where none runs."""
    times = {name: time for name, call in candidates.items() if (time := microseconds(call)) is not None}
    return min(times, key=lambda name: times[name]) if times else fallback
