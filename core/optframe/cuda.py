"""The CUDA driver, without a package: its calls, and launches of kernels on device addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

from optframe.errors import EnvironmentLacks, OptframeError
from optframe.types import KernelLaunch

WAIT = "griddepcontrol.wait"
"""The PTX instruction by which a kernel waits until those before it have ended, and sees what they wrote."""

WAIT_ARCHITECTURE = 90
"""The first architecture that has it; code compiled for an earlier one does not wait."""

_PTX_VERSION = 5  # CU_FUNC_ATTRIBUTE_PTX_VERSION: the virtual architecture that a function was compiled for
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...
_OVERLAP_DRIVER = 12030
"""CUDA 12.3, from which on CUDA graphs take such launches up."""


class DriverError(OptframeError):
    """A call of the CUDA driver failed."""


@cache
def driver() -> ctypes.CDLL:
    """Return the driver's library, started.

    Raises:
        EnvironmentLacks: there is none, or it does not start.
    """
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
    cuda = driver()
    status = getattr(cuda, function)(*arguments)
    if status != 0:
        raise DriverError(f"{function} failed with {_name(cuda, status)}")


def ensure_context(device: int = 0) -> int:
    """Make the primary context of `device` current where the thread has none, as it does outside torch or TensorRT.

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
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
    call("cuCtxSetCurrent", context)
    assert context.value, "a retained context has a handle"
    return context.value


def launches_overlap(architecture: int) -> bool:
    """Say whether launches of kernels compiled for an architecture, such as 90, may overlap with the driver at hand.

    Source: "Programmatic Dependent Launch" in the CUDA C++ Programming Guide.
    """
    version = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    return architecture >= WAIT_ARCHITECTURE and version.value >= _OVERLAP_DRIVER


class Function:
    """A kernel that is loaded: the driver's handle, and whatever object keeps its module loaded."""

    def __init__(self, handle: ctypes.c_void_p, owner: object = None) -> None:
        self.handle = handle
        self._owner = owner

    @cached_property
    def can_overlap(self) -> bool:
        """Whether its launches may overlap: it was compiled for an architecture on which kernels can wait."""
        architecture = ctypes.c_int()
        call("cuFuncGetAttribute", ctypes.byref(architecture), ctypes.c_int(_PTX_VERSION), self.handle)
        return launches_overlap(architecture.value)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, its union as an int and the rest of its 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class PreparedLaunch:
    """A launch whose argument buffers are laid out; a call fills in addresses and launches, and makes nothing else.

    Not for several threads at once.
    """

    def __init__(self, function: Function, launch: KernelLaunch, inputs: int, outputs: int) -> None:
        self._function = function  # keeps the module loaded
        self._empty = 0 in launch.grid
        self._inputs = [ctypes.c_uint64() for _ in range(inputs)]
        self._outputs = [ctypes.c_uint64() for _ in range(outputs)]
        self._extras = [ctypes.c_int32(extra) for extra in launch.extras]
        values = [*self._inputs, *self._extras, *self._outputs]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        overlap = launch.overlap and function.can_overlap
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _Config(
            launch.grid, launch.block, launch.shared_bytes, None, ctypes.pointer(self._attribute), int(overlap)
        )
        self._arguments = (ctypes.byref(self._config), function.handle, parameters, None)

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
        self._config.stream = stream
        call("cuLaunchKernelEx", *self._arguments)
