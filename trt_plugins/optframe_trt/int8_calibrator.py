"""TensorRT's calibrator classes over optframe's data, for users' own implicit INT8 builds with TensorRT 10.x.

optframe's own builds are strongly typed and take INT8 from the graph; TensorRT 11 and TensorRT-RTX can do nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from optframe import cuda, files
from optframe.errors import InputError
from optframe.types import Feeds

Array = np.ndarray[Any, Any]

BASES = {"entropy": "IInt8EntropyCalibrator2", "min-max": "IInt8MinMaxCalibrator"}
"""optframe's name of a way to choose ranges -> TensorRT's class that does the same."""


class Device(Protocol):
    """Where batches lie while TensorRT reads them."""

    def upload(self, name: str, array: Array) -> int:
        """Copy a C-contiguous array to the device, in the place of the last of this `name`; return its address."""
        ...

    def close(self) -> None:
        """Free all memory."""
        ...


class CudaDevice:
    """Device memory through the CUDA driver, one allocation an input, kept from batch to batch."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}

    def upload(self, name: str, array: Array) -> int:
        """Copy `array` to the GPU; return its address.

        Raises:
            EnvironmentLacks: there is no driver or GPU.
            DriverError: there is no memory left.
        """
        cuda.ensure_context()
        address, size = self._buffers.get(name, (ctypes.c_uint64(), 0))
        if array.nbytes > size:
            self._free(name)
            cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
            self._buffers[name] = (address, array.nbytes)
        source = array.ctypes.data_as(ctypes.c_void_p)
        cuda.call("cuMemcpyHtoD_v2", address, source, ctypes.c_size_t(array.nbytes))
        return address.value

    def close(self) -> None:
        """Free all memory."""
        for name in list(self._buffers):
            self._free(name)

    def _free(self, name: str) -> None:
        address, size = self._buffers.pop(name, (ctypes.c_uint64(), 0))
        if size:
            cuda.call("cuMemFree_v2", address)


class CalibrationBatches:
    """What a TensorRT calibrator hands over: one sample after the other, and a cache file.

    TensorRT swallows what its callbacks raise: `error` keeps it, and ends the data, so that the build goes on without.
    """

    def __init__(self, feeds: Iterable[Feeds], cache: Path | None, device: Device) -> None:
        self.error: BaseException | None = None
        self.count = 0
        self._cache = cache
        self._device = device
        self._samples = iter(feeds)
        self._first = next(self._samples, None)
        if self._first is None:
            raise InputError("INT8 needs data to calibrate on, and there is none: give at least one sample")

    @property
    def batch_size(self) -> int:
        """The leading dimension of the first sample's first input."""
        first = next(iter((self._first or {}).values()))
        return int(first.shape[0]) if first.ndim else 1

    def next_addresses(self, names: Sequence[str]) -> list[int] | None:
        """Return the device addresses of the next sample's inputs `names`; None at the end of the data."""
        sample = self._first if self.count == 0 else next(self._samples, None)
        if sample is None or self.error is not None:
            return None
        lacking = [name for name in names if name not in sample]
        if lacking:
            raise InputError(
                f"calibration sample {self.count + 1} lacks input '{lacking[0]}' (has {', '.join(sample)})"
            )
        self.count += 1
        return [self._device.upload(name, np.ascontiguousarray(sample[name])) for name in names]

    def read_cache(self) -> bytes | None:
        """Return the cache file's content, None where there is no such file yet."""
        return self._cache.read_bytes() if self._cache is not None and self._cache.is_file() else None

    def write_cache(self, content: bytes) -> None:
        """Write the cache file."""
        if self._cache is not None:
            files.write_text(self._cache, bytes(content).decode("utf-8"))

    def guarded(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `action` gives; None where it raises, which `error` keeps."""
        try:
            return action(*arguments)
        except BaseException as error:
            self.error = self.error or error
            return None

    def finish(self) -> None:
        """Free device memory, and raise what a callback raised during the build."""
        self._device.close()
        if self.error is not None:
            raise self.error


def make_calibrator(
    trt: ModuleType,
    feeds: Iterable[Feeds],
    *,
    cache: Path | None = None,
    calibrator: str = "entropy",
    device: Device | None = None,
) -> Any:
    """Return a calibrator for `IBuilderConfig.int8_calibrator` that hands `feeds` to TensorRT one by one.

    `trt` is the imported module `tensorrt` 10.x; `cache` a file of TensorRT's own format, read if it is there and
    written after calibration. Its `batches.finish()` after the build frees memory and raises what went wrong.

    Raises:
        InputError: there are no feeds, the TensorRT at hand has no implicit INT8, or none of this way to choose ranges.
    """
    if calibrator not in BASES:
        raise InputError(f"TensorRT itself has no calibrator '{calibrator}': choose {' or '.join(BASES)}")
    base = getattr(trt, BASES[calibrator], None)
    if base is None:
        version = getattr(trt, "__version__", "at hand")
        raise InputError(
            f"TensorRT {version} has no {BASES[calibrator]}: use a graph with Q/DQ, as `optframe run` does"
        )
    return _class(base)(CalibrationBatches(feeds, cache, device or CudaDevice()))


def _class(base: type[Any]) -> type[Any]:
    """Return the class of a calibrator that derives from TensorRT's `base`."""

    class Calibrator(base):  # type: ignore[misc]
        """Hands `batches` to TensorRT."""

        def __init__(self, batches: CalibrationBatches) -> None:
            base.__init__(self)
            self.batches = batches

        def get_batch_size(self) -> int:
            return self.batches.batch_size

        def get_batch(self, names: Sequence[str], *_: Any) -> list[int] | None:
            addresses: list[int] | None = self.batches.guarded(self.batches.next_addresses, names)
            return addresses

        def read_calibration_cache(self, *_: Any) -> bytes | None:
            content: bytes | None = self.batches.guarded(self.batches.read_cache)
            return content

        def write_calibration_cache(self, cache: Any, *_: Any) -> None:
            self.batches.guarded(self.batches.write_cache, cache)

    Calibrator.__name__ = Calibrator.__qualname__ = f"Optframe{base.__name__[1:]}"
    return Calibrator
