"""TensorRT's calibrator classes over optframe's data: with a stand-in for the library, and with the real bindings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from optframe.errors import InputError
from optframe_trt.int8_calibrator import CudaDevice, make_calibrator

Array = np.ndarray[Any, Any]


class Memory:
    """A device that keeps what is uploaded; addresses count up from 1000."""

    def __init__(self) -> None:
        self.arrays: dict[int, Array] = {}
        self.closed = False

    def upload(self, name: str, array: Array) -> int:
        assert array.flags.c_contiguous
        address = 1000 + len(self.arrays)
        self.arrays[address] = array.copy()
        return address

    def close(self) -> None:
        self.closed = True


class Base:
    """What the bindings' classes ask of a subclass: their own `__init__` is called."""

    def __init__(self) -> None:
        self.initialised = True


@pytest.fixture
def trt() -> ModuleType:
    module = ModuleType("tensorrt")
    module.IInt8EntropyCalibrator2 = type("IInt8EntropyCalibrator2", (Base,), {})  # type: ignore[attr-defined]
    module.IInt8MinMaxCalibrator = type("IInt8MinMaxCalibrator", (Base,), {})  # type: ignore[attr-defined]
    return module


def feeds(rng: np.random.Generator, count: int = 3) -> list[dict[str, Array]]:
    return [
        {"x": rng.standard_normal((2, 3, 4)).astype(np.float32), "mask": rng.random((2, 4)) < 0.5} for _ in range(count)
    ]


def test_all_samples_reach_the_device_in_the_order_of_the_inputs(trt: ModuleType, rng: np.random.Generator) -> None:
    samples, memory = feeds(rng), Memory()
    calibrator = make_calibrator(trt, iter(samples), device=memory)
    assert isinstance(calibrator, trt.IInt8EntropyCalibrator2)
    assert calibrator.initialised
    assert calibrator.get_batch_size() == 2
    for sample in samples:
        mask, x = calibrator.get_batch(["mask", "x"])
        np.testing.assert_array_equal(memory.arrays[x], sample["x"])
        np.testing.assert_array_equal(memory.arrays[mask], sample["mask"])
    assert calibrator.get_batch(["mask", "x"]) is None
    calibrator.batches.finish()
    assert memory.closed


def test_the_cache_file_is_written_and_read(trt: ModuleType, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trt.cache"
    calibrator = make_calibrator(trt, feeds(rng), cache=path, calibrator="min-max", device=Memory())
    assert isinstance(calibrator, trt.IInt8MinMaxCalibrator)
    assert calibrator.read_calibration_cache() is None
    calibrator.write_calibration_cache(memoryview(b"TRT-101303-MinMaxCalibration\nx: 3f800000\n"))
    assert calibrator.read_calibration_cache() == path.read_bytes() == b"TRT-101303-MinMaxCalibration\nx: 3f800000\n"


def test_what_a_callback_raises_ends_the_data_and_is_raised_after_the_build(
    trt: ModuleType, rng: np.random.Generator
) -> None:
    def broken() -> Any:
        yield from feeds(rng, 1)
        raise InputError("cannot read image b.jpg")

    memory = Memory()
    calibrator = make_calibrator(trt, broken(), device=memory)
    assert calibrator.get_batch(["x"]) is not None
    assert calibrator.get_batch(["x"]) is None  # nothing may be raised through TensorRT
    with pytest.raises(InputError, match=r"b\.jpg"):
        calibrator.batches.finish()
    assert memory.closed


def test_an_input_that_no_sample_has(trt: ModuleType, rng: np.random.Generator) -> None:
    calibrator = make_calibrator(trt, feeds(rng), device=Memory())
    assert calibrator.get_batch(["other"]) is None
    with pytest.raises(InputError, match="lacks input 'other'"):
        calibrator.batches.finish()


def test_bad_requests_are_refused(trt: ModuleType, rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="there is none"):
        make_calibrator(trt, [], device=Memory())
    with pytest.raises(InputError, match="no calibrator 'mse'"):
        make_calibrator(trt, feeds(rng), calibrator="mse", device=Memory())
    later = ModuleType("tensorrt")
    later.__version__ = "11.4.0"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"TensorRT 11\.4\.0 has no IInt8EntropyCalibrator2"):
        make_calibrator(later, feeds(rng), device=Memory())


@pytest.mark.gpu
def test_samples_reach_the_gpu(rng: np.random.Generator) -> None:
    import ctypes

    from optframe import cuda

    device = CudaDevice()
    for size in (5, 1000, 7):  # the buffer grows, and is used again
        array = rng.standard_normal(size).astype(np.float32)
        address, back = device.upload("x", array), np.empty_like(array)
        pointer = back.ctypes.data_as(ctypes.c_void_p)
        cuda.call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(back.nbytes))
        np.testing.assert_array_equal(back, array)
    device.close()


REAL = """
import numpy as np, tensorrt as trt
from optframe_trt.int8_calibrator import make_calibrator
class Memory:
    def upload(self, name, array): return 4096
    def close(self): pass
made = make_calibrator(trt, [{"x": np.zeros((2, 3), np.float32)}], device=Memory())
assert isinstance(made, trt.IInt8EntropyCalibrator2)
assert made.get_algorithm() == trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2
print(made.get_batch_size(), made.get_batch(["x"]), made.get_batch(["x"]), made.read_calibration_cache())
"""


def test_the_real_bindings_take_the_class(full_tensorrt: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, env=full_tensorrt)
    if "has no IInt8EntropyCalibrator2" in done.stderr:  # TensorRT 11
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["2", "[4096]", "None", "None"]
