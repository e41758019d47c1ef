"""Running PTX kernels on host arrays through the CUDA driver."""

from __future__ import annotations

import numpy as np
import pytest

from optframe import cuda
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
        cuda.ensure_context()
        return driver.Kernel(nvrtc.compile_ptx(SOURCE).text, "shift")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))


def launch(count: int, by: int) -> KernelLaunch:
    return KernelLaunch("shift", (), (-(-count // 32), 1, 1), (32, 1, 1), 0, (count, by))


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
        with pytest.raises(cuda.DriverError, match="outside its output 0"):
            driver.run_on_arrays(kernel, launch(64, by), [x], [TensorInfo((64,), "float32")])

    def test_an_empty_grid_launches_nothing(self, kernel: driver.Kernel) -> None:
        kernel(launch(0, 0), [0], [0])

    def test_bad_ptx_and_bad_launch(self, kernel: driver.Kernel) -> None:
        with pytest.raises(cuda.DriverError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_PTX"):
            driver.Kernel(".version 8.0\n.target sm_80\nnonsense", "shift")
        with pytest.raises(cuda.DriverError, match="CUDA_ERROR_INVALID_VALUE"):
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
