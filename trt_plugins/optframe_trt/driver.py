"""Loads PTX through the CUDA driver and runs its kernels, on device addresses or on host arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from optframe import cuda
from optframe.types import KernelLaunch, TensorInfo

if TYPE_CHECKING:
    import numpy as np

POISON = 0xFF
"""The byte that outputs hold before a kernel runs on host arrays: NaN in every float type."""

_GUARD = 256
"""Poisoned bytes before and after each array."""


def compute_capability() -> int:
    """Return the compute capability of the current context's device, such as 89."""
    cuda.ensure_context()
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.call("cuCtxGetDevice", ctypes.byref(device))
    cuda.call("cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(75), device)  # ..._COMPUTE_CAPABILITY_MAJOR
    cuda.call("cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(76), device)  # ..._COMPUTE_CAPABILITY_MINOR
    return 10 * major.value + minor.value


def free_bytes() -> int:
    """Return how much of the current device's memory is free."""
    cuda.ensure_context()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Kernel:
    """An entry point of a PTX text, compiled by the driver for the current context's device; it stays loaded."""

    def __init__(self, ptx: str, entry: str) -> None:
        cuda.ensure_context()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        cuda.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        self._function = cuda.Function(function)  # nothing unloads its module

    def prepare(self, launch: KernelLaunch, inputs: int, outputs: int) -> cuda.PreparedLaunch:
        """Return the launch with room for the addresses of so many `inputs` and `outputs`."""
        return cuda.PreparedLaunch(self._function, launch, inputs, outputs)

    def __call__(self, launch: KernelLaunch, inputs: Sequence[int], outputs: Sequence[int], stream: int = 0) -> None:
        """Launch on device addresses `inputs` (those that are present) and `outputs`, on a CUDA `stream` handle.

        Raises:
            DriverError: the launch fails; errors of earlier kernels may show here too.
        """
        self.prepare(launch, len(inputs), len(outputs))(inputs, outputs, stream)


class _Buffer:
    """Device memory, freed with the `with` block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = ctypes.c_uint64()

    def __enter__(self) -> _Buffer:
        cuda.call("cuMemAlloc_v2", ctypes.byref(self.address), ctypes.c_size_t(max(self.size, 1)))
        return self

    def __exit__(self, *_: object) -> None:
        cuda.driver().cuMemFree_v2(self.address)


def run_on_arrays(
    kernel: Kernel,
    launch: KernelLaunch,
    inputs: Sequence[np.ndarray[Any, Any]],
    outputs: Sequence[TensorInfo],
    *,
    offset: int = 0,
) -> list[np.ndarray[Any, Any]]:
    """Copy `inputs` to the GPU, run `kernel` on poisoned outputs, wait, and return the outputs.

    `offset` bytes are put before each array on the device, so that pointers lose their alignment; the bytes before and
    after each output are checked to be untouched.

    Raises:
        DriverError: the kernel fails, or it wrote outside its outputs.
    """
    import numpy as np

    results = [np.empty(info.shape, numpy_dtype(info.dtype)) for info in outputs]
    with ExitStack() as stack:
        buffers = [stack.enter_context(_Buffer(array.nbytes + 2 * _GUARD + offset)) for array in (*inputs, *results)]
        addresses = [buffer.address.value + _GUARD + offset for buffer in buffers]
        for buffer in buffers:
            cuda.call("cuMemsetD8_v2", buffer.address, ctypes.c_ubyte(POISON), ctypes.c_size_t(buffer.size))
        for array, address in zip(inputs, addresses, strict=False):
            data = np.ascontiguousarray(array)
            cuda.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data.ctypes.data_as(ctypes.c_void_p), _size(data))
        kernel(launch, addresses[: len(inputs)], addresses[len(inputs) :])
        cuda.call("cuCtxSynchronize")
        for index, (result, buffer) in enumerate(zip(results, buffers[len(inputs) :], strict=True)):
            whole = np.empty(buffer.size, np.uint8)
            cuda.call("cuMemcpyDtoH_v2", whole.ctypes.data_as(ctypes.c_void_p), buffer.address, _size(whole))
            start, end = _GUARD + offset, _GUARD + offset + result.nbytes
            if (whole[:start] != POISON).any() or (whole[end:] != POISON).any():
                raise cuda.DriverError(f"the kernel {launch.entry} wrote outside its output {index}")
            result.reshape(-1).view(np.uint8)[:] = whole[start:end]
    return results


def _size(array: np.ndarray[Any, Any]) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a tensor's: "bfloat16" too."""
    import numpy as np

    if name == "bfloat16":
        import ml_dtypes  # numpy has no bfloat16; onnx brings this package, which registers it

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype
