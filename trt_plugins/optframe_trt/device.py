"""Device memory, streams, events and CUDA graphs through the CUDA driver, as running an engine needs them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from optframe import cuda

Array = np.ndarray[Any, Any]

_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1


class _Handle:
    """A handle of the driver, until it is closed."""

    destroy = ""

    def __init__(self) -> None:
        cuda.ensure_context()
        self.handle = ctypes.c_void_p()

    @property
    def value(self) -> int:
        """The handle as a number; 0 once it is closed."""
        return self.handle.value or 0

    def close(self) -> None:
        """Destroy it; once is enough."""
        if self.handle.value:
            cuda.call(self.destroy, self.handle)
            self.handle = ctypes.c_void_p()


class Stream(_Handle):
    """A CUDA stream of its own, which does not wait for the default one."""

    destroy = "cuStreamDestroy_v2"

    def __init__(self) -> None:
        super().__init__()
        cuda.call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(_NON_BLOCKING))

    def synchronize(self) -> None:
        """Wait for everything in the stream; errors of its kernels show here."""
        cuda.call("cuStreamSynchronize", self.handle)


class Event(_Handle):
    """A point in a stream, which tells the time."""

    destroy = "cuEventDestroy_v2"

    def __init__(self) -> None:
        super().__init__()
        cuda.call("cuEventCreate", ctypes.byref(self.handle), ctypes.c_uint(0))

    def record(self, stream: Stream) -> None:
        """Put the event into the stream."""
        cuda.call("cuEventRecord", self.handle, stream.handle)

    def milliseconds_since(self, start: Event) -> float:
        """Return the time between two events that have both passed."""
        elapsed = ctypes.c_float()
        cuda.call("cuEventElapsedTime", ctypes.byref(elapsed), start.handle, self.handle)
        return elapsed.value


class Buffer(_Handle):
    """Device memory of `size` bytes; an engine wants an address even for none."""

    destroy = "cuMemFree_v2"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        cuda.call("cuMemAlloc_v2", ctypes.byref(self.handle), ctypes.c_size_t(max(size, 1)))

    def upload(self, array: Array, stream: Stream) -> None:
        """Copy a C-contiguous `array` to the device; it must live until the stream has been waited for."""
        if array.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            cuda.call("cuMemcpyHtoDAsync_v2", self.handle, pointer, ctypes.c_size_t(array.nbytes), stream.handle)

    def download(self, array: Array, stream: Stream) -> None:
        """Copy the device's bytes into `array`, which is filled once the stream has been waited for."""
        if array.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            cuda.call("cuMemcpyDtoHAsync_v2", pointer, self.handle, ctypes.c_size_t(array.nbytes), stream.handle)


class Graph(_Handle):
    """What was put into a stream, captured, to be launched as one."""

    destroy = "cuGraphExecDestroy"

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        super().__init__()
        with _captured(stream, work) as graph:
            cuda.call("cuGraphInstantiateWithFlags", ctypes.byref(self.handle), graph, ctypes.c_ulonglong(0))

    def launch(self, stream: Stream) -> None:
        """Put the graph into the stream."""
        cuda.call("cuGraphLaunch", self.handle, stream.handle)


@contextmanager
def _captured(stream: Stream, work: Callable[[], None]) -> Iterator[ctypes.c_void_p]:
    """Yield the graph of what `work` puts into the stream; the capture ends whatever happens."""
    graph = ctypes.c_void_p()
    cuda.call("cuStreamBeginCapture_v2", stream.handle, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
    try:
        work()
    finally:
        cuda.call("cuStreamEndCapture", stream.handle, ctypes.byref(graph))
    try:
        yield graph
    finally:
        cuda.call("cuGraphDestroy", graph)
