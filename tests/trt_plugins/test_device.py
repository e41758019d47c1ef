"""Buffers, streams, events and CUDA graphs on a GPU."""

import ctypes
from itertools import pairwise

import numpy as np
import pytest

from optframe import cuda
from optframe_trt.device import Buffer, Event, Graph, Stream

pytestmark = pytest.mark.gpu


def test_bytes_go_there_and_come_back(rng: np.random.Generator) -> None:
    stream = Stream()
    for shape in ((3, 5), (0, 4), (), (1 << 20,)):
        array = rng.standard_normal(shape).astype(np.float32)
        buffer, back = Buffer(array.nbytes), np.full(shape, np.nan, np.float32)
        buffer.upload(np.ascontiguousarray(array), stream)
        buffer.download(back, stream)
        stream.synchronize()
        np.testing.assert_array_equal(back, array)
        buffer.close()
        buffer.close()
        assert buffer.value == 0
    stream.close()


def test_events_measure_the_stream() -> None:
    stream, events = Stream(), [Event() for _ in range(3)]
    array = np.zeros(64 << 20, np.uint8)
    buffer = Buffer(array.nbytes)
    events[0].record(stream)
    buffer.upload(array, stream)
    events[1].record(stream)
    events[2].record(stream)
    stream.synchronize()
    copied, nothing = (after.milliseconds_since(before) for before, after in pairwise(events))
    assert copied > nothing >= 0  # 64 MiB against nothing at all


def test_a_graph_repeats_what_was_captured(rng: np.random.Generator) -> None:
    stream = Stream()
    first, second = rng.integers(0, 255, (2, 4096)).astype(np.uint8)
    source, target = Buffer(first.nbytes), Buffer(first.nbytes)

    def copy() -> None:
        cuda.call("cuMemcpyDtoDAsync_v2", target.handle, source.handle, ctypes.c_size_t(4096), stream.handle)

    graph = Graph(stream, copy)
    for array in (first, second):
        back = np.zeros_like(array)
        source.upload(array, stream)
        graph.launch(stream)
        target.download(back, stream)
        stream.synchronize()
        np.testing.assert_array_equal(back, array)
    graph.close()


def test_a_capture_that_fails_leaves_the_stream_usable() -> None:
    stream, buffer = Stream(), Buffer(16)

    def waits() -> None:
        stream.synchronize()  # forbidden while the stream is captured

    with pytest.raises(cuda.DriverError):
        Graph(stream, waits)
    array = np.arange(16, dtype=np.uint8)
    back = np.zeros_like(array)
    buffer.upload(array, stream)
    buffer.download(back, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back, array)
