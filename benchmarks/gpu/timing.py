"""Times GPU work in CUDA graphs: candidates take turns, each over several sets of buffers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

IN_CACHE_BYTES = 32_000_000
"""What the sets of small buffers take together: half of the 60 MB second-level cache of an H200."""

COLD_BYTES = 150_000_000
"""What sets of buffers take together that the cache is to hold nothing of: 2.5 times its size."""

GRAPH_US = 1500.0
ROUNDS = 15
REPLAYS = 4

Call = Callable[[int], Any]
"""`call(i)` does the work on buffer set i and returns its outputs, which stay alive until the set's next turn."""


def buffer_sets(bytes_each: int, *, cold: bool) -> int:
    """Return how many sets of `bytes_each` take turns: in the cache where two or more fit, unless `cold`."""
    if not cold and 2 * bytes_each <= IN_CACHE_BYTES:
        return IN_CACHE_BYTES // bytes_each
    return max(2, -(-COLD_BYTES // bytes_each))


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    launches: int
    kept: list[Any]

    def microseconds(self) -> float:
        """Return the time of a launch, from one timed run of the replays."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / (REPLAYS * self.launches)


def _eager_us(call: Call, sets: int) -> float:
    """Warm up and return roughly what a call takes."""
    for index in range(min(sets, 3)):
        call(index)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for index in range(min(sets, 3)):
        call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / min(sets, 3)


def _capture(call: Call, sets: int) -> _Graph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches = max(1, round(GRAPH_US / (_eager_us(call, sets) * sets))) * sets
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = [None] * sets
    with torch.cuda.graph(graph, stream=stream):
        for launch in range(launches):
            kept[launch % sets] = call(launch % sets)
    return _Graph(graph, launches, kept)


def median_us(calls: Mapping[str, Call], sets: int) -> dict[str, float]:
    """Return the median time of each call in microseconds, over rounds in which every candidate has its turn."""
    graphs = {name: _capture(call, sets) for name, call in calls.items()}
    for graph in graphs.values():
        graph.microseconds()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(graph.microseconds())
    return {name: statistics.median(values) for name, values in times.items()}
