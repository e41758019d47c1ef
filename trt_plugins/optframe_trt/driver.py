"""Loads PTX and launches its kernels through the CUDA driver, on device pointers or on host arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from optframe.errors import EnvironmentLacks, OptframeError
from optframe.types import KernelLaunch, TensorInfo

if TYPE_CHECKING:
    import numpy as np

POISON = 0xFF
"""The byte that outputs hold before a kernel runs on host arrays: NaN in every float type."""

_GUARD = 256
"""Poisoned bytes before and after each array."""


class DriverError(OptframeError):
    """A call of the CUDA driver failed."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EnvironmentLacks(f"no NVIDIA driver was found ({error}); kernels run on an NVIDIA GPU only") from error
    status = cuda.cuInit(ctypes.c_uint(0))
    if status != 0:
        raise EnvironmentLacks(f"the NVIDIA driver does not start ({_name(cuda, status)}); check `nvidia-smi`")
    return cuda


def _name(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def call(function: str, *arguments: Any) -> None:
    """Call a function of the CUDA driver.

    Raises:
        DriverError: it does not return success.
    """
    cuda = _driver()
    status = getattr(cuda, function)(*arguments)
    if status != 0:
        raise DriverError(f"{function} failed with {_name(cuda, status)}")


def ensure_context() -> int:
    """Make the primary context of device 0 current where the thread has none, as it does outside torch or TensorRT.

    Returns the handle of the current context; modules are loaded into one and run in it alone.

    Raises:
        EnvironmentLacks: there is no driver or no GPU.
    """
    current = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    if current.value:
        return current.value
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise EnvironmentLacks("the NVIDIA driver sees no GPU; check `nvidia-smi`")
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
    call("cuCtxSetCurrent", context)
    assert context.value, "a retained context has a handle"
    return context.value


def compute_capability() -> int:
    """Return the compute capability of the current context's device, such as 89."""
    ensure_context()
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuCtxGetDevice", ctypes.byref(device))
    call("cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(75), device)  # ..._COMPUTE_CAPABILITY_MAJOR
    call("cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(76), device)  # ..._COMPUTE_CAPABILITY_MINOR
    return 10 * major.value + minor.value


def free_bytes() -> int:
    """Return how much of the current device's memory is free."""
    ensure_context()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Kernel:
    """An entry point of a PTX text, compiled by the driver for the current context's device; it stays loaded."""

    def __init__(self, ptx: str, entry: str) -> None:
        ensure_context()
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), ptx.encode())
        call("cuModuleGetFunction", ctypes.byref(self._function), self._module, entry.encode())

    def prepare(self, launch: KernelLaunch, inputs: int, outputs: int) -> PreparedLaunch:
        """Return the launch with room for the addresses of so many `inputs` and `outputs`."""
        return PreparedLaunch(self, self._function, launch, inputs, outputs)

    def __call__(self, launch: KernelLaunch, inputs: Sequence[int], outputs: Sequence[int], stream: int = 0) -> None:
        """Launch on device addresses `inputs` (those that are present) and `outputs`, on a CUDA `stream` handle.

        Raises:
            DriverError: the launch fails; errors of earlier kernels may show here too.
        """
        self.prepare(launch, len(inputs), len(outputs))(inputs, outputs, stream)


class PreparedLaunch:
    """A launch whose argument buffers are laid out; a call fills in addresses and launches, and makes nothing else.

    Not for several threads at once.
    """

    def __init__(
        self, kernel: Kernel, function: ctypes.c_void_p, launch: KernelLaunch, inputs: int, outputs: int
    ) -> None:
        self._kernel = kernel  # keeps the module loaded
        self._empty = 0 in launch.grid
        self._inputs = [ctypes.c_uint64() for _ in range(inputs)]
        self._outputs = [ctypes.c_uint64() for _ in range(outputs)]
        self._extras = [ctypes.c_int32(extra) for extra in launch.extras]
        self._stream = ctypes.c_void_p()
        values = [*self._inputs, *self._extras, *self._outputs]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        geometry = [ctypes.c_uint(size) for size in (*launch.grid, *launch.block, launch.shared_bytes)]
        self._arguments = (function, *geometry, self._stream, parameters, None)

    def __call__(self, inputs: Sequence[int], outputs: Sequence[int], stream: int = 0) -> None:
        """Launch on device addresses, on a CUDA `stream` handle; a stream that is captured takes the launch up.

        Raises:
            DriverError: the launch fails; errors of earlier kernels may show here too.
        """
        if self._empty:
            return
        for slot, address in zip(self._inputs, inputs, strict=True):
            slot.value = address
        for slot, address in zip(self._outputs, outputs, strict=True):
            slot.value = address
        self._stream.value = stream
        call("cuLaunchKernel", *self._arguments)


class _Buffer:
    """Device memory, freed with the `with` block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = ctypes.c_uint64()

    def __enter__(self) -> _Buffer:
        call("cuMemAlloc_v2", ctypes.byref(self.address), ctypes.c_size_t(max(self.size, 1)))
        return self

    def __exit__(self, *_: object) -> None:
        _driver().cuMemFree_v2(self.address)


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
            call("cuMemsetD8_v2", buffer.address, ctypes.c_ubyte(POISON), ctypes.c_size_t(buffer.size))
        for array, address in zip(inputs, addresses, strict=False):
            data = np.ascontiguousarray(array)
            call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data.ctypes.data_as(ctypes.c_void_p), _size(data))
        kernel(launch, addresses[: len(inputs)], addresses[len(inputs) :])
        call("cuCtxSynchronize")
        for index, (result, buffer) in enumerate(zip(results, buffers[len(inputs) :], strict=True)):
            whole = np.empty(buffer.size, np.uint8)
            call("cuMemcpyDtoH_v2", whole.ctypes.data_as(ctypes.c_void_p), buffer.address, _size(whole))
            start, end = _GUARD + offset, _GUARD + offset + result.nbytes
            if (whole[:start] != POISON).any() or (whole[end:] != POISON).any():
                raise DriverError(f"the kernel {launch.entry} wrote outside its output {index}")
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
