"""Launching PTX kernels through the CUDA driver."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from optframe.errors import EnvironmentLacks
from optframe.types import KernelLaunch, TensorInfo
from optframe_trt import driver, nvrtc

SOURCE = """
extern "C" __global__ void shift(const float* x, int count, int by, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i + by] = x[i];
}
"""


@pytest.fixture
def kernel() -> driver.Kernel:
    try:
        driver.ensure_context()
        return driver.Kernel(nvrtc.compile_ptx(SOURCE).text, "shift")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))


def launch(count: int, by: int) -> KernelLaunch:
    return KernelLaunch("shift", (), (-(-count // 32), 1, 1), (32, 1, 1), 0, (count, by))


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver._driver.cache_clear()
    with pytest.raises(EnvironmentLacks, match=r"no NVIDIA driver was found \(libcuda"):
        driver.ensure_context()


def test_a_prepared_launch_fills_in_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(driver, "call", lambda *arguments: called.append(arguments))
    wanted = KernelLaunch("shift", (), (3, 2, 1), (64, 1, 1), 16, (7, -1))
    prepared = driver.PreparedLaunch(object(), ctypes.c_void_p(5), wanted, 2, 1)  # type: ignore[arg-type]
    for inputs, output, stream in (([10, 20], 30, 0), ([11, 2**40], 31, 99)):
        prepared(inputs, [output], stream)
        name, function, *geometry, stream_slot, parameters, _ = called[-1]
        assert (name, function.value, stream_slot.value or 0) == ("cuLaunchKernel", 5, stream)
        assert [size.value for size in geometry] == [3, 2, 1, 64, 1, 1, 16]
        kinds = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint64]
        values = [kind.from_address(address).value for kind, address in zip(kinds, parameters, strict=True)]
        assert values == [*inputs, 7, -1, output]
    assert [called[0][i] is called[1][i] for i in range(len(called[0]))] == [True] * len(called[0]), "nothing was made"
    with pytest.raises(ValueError):
        prepared([1], [2])
    driver.PreparedLaunch(object(), ctypes.c_void_p(5), launch(0, 0), 1, 1)([0], [0])  # type: ignore[arg-type]
    assert len(called) == 2, "an empty grid launches nothing"


@pytest.mark.gpu
class TestOnGpu:
    def test_outputs_are_poisoned(self, kernel: driver.Kernel) -> None:
        x = np.arange(100, dtype=np.float32)
        (y,) = driver.run_on_arrays(kernel, launch(50, 0), [x], [TensorInfo((10, 10), "float32")])
        np.testing.assert_array_equal(y.reshape(-1)[:50], x[:50])
        assert np.isnan(y.reshape(-1)[50:]).all()

    @pytest.mark.parametrize("by", [-1, 1])
    def test_writing_outside_is_found(self, kernel: driver.Kernel, by: int) -> None:
        x = np.arange(64, dtype=np.float32)
        with pytest.raises(driver.DriverError, match="outside its output 0"):
            driver.run_on_arrays(kernel, launch(64, by), [x], [TensorInfo((64,), "float32")])

    def test_an_empty_grid_launches_nothing(self, kernel: driver.Kernel) -> None:
        kernel(launch(0, 0), [0], [0])

    def test_bad_ptx_and_bad_launch(self, kernel: driver.Kernel) -> None:
        with pytest.raises(driver.DriverError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_PTX"):
            driver.Kernel(".version 8.0\n.target sm_80\nnonsense", "shift")
        with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            kernel(KernelLaunch("shift", (), (1, 1, 1), (2048, 1, 1), 0, (0, 0)), [0], [0])

    def test_no_growth_over_10000_launches(self, kernel: driver.Kernel) -> None:
        x = np.arange(100, dtype=np.float32)

        def run(times: int) -> None:
            for _ in range(times):
                driver.run_on_arrays(kernel, launch(100, 0), [x], [TensorInfo((100,), "float32")])

        run(10)
        before = driver.free_bytes()
        run(10000)
        # Two leaked allocations a run, of 512 bytes at least, would be 10 MB; the driver itself takes pages of 2 MB.
        assert before - driver.free_bytes() <= 4 << 20
