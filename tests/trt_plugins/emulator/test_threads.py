"""What threads do together under the emulator: divergence, barriers, shuffles, atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optframe.types import TensorInfo

Array = np.ndarray[Any, Any]
Emulate = Callable[..., list[Array]]


def info(count: int, dtype: str) -> TensorInfo:
    return TensorInfo((count,), dtype)


class TestDivergence:
    def test_loops_of_different_lengths(self, emulate: Emulate, rng: np.random.Generator) -> None:
        """Collatz steps, with an early exit and a nested branch."""
        source = """extern "C" __global__ void k(const int* x, int n, int* y) {
          int i = blockIdx.x * blockDim.x + threadIdx.x;
          if (i >= n) return;
          int value = x[i], steps = 0;
          while (value != 1) {
            if (value % 2) value = 3 * value + 1;
            else value /= 2;
            if (++steps == 60) { y[i] = -value; return; }
          }
          y[i] = steps;
        }"""
        x = rng.integers(1, 1000, 500).astype(np.int32)

        def collatz(value: int) -> int:
            for step in range(60):
                if value == 1:
                    return step
                value = 3 * value + 1 if value % 2 else value // 2
            return -value

        (y,) = emulate(source, [x], [info(500, "int32")], grid=8, block=70, extras=(500,))
        assert y.tolist() == [collatz(int(value)) for value in x]

    def test_a_switch(self, emulate: Emulate) -> None:
        cases = " ".join(f"case {i}: y[t] = x[t] * {i * i + 3} ^ {i}; break;" for i in range(9))
        source = f"""extern "C" __global__ void k(const int* x, int* y) {{
          int t = threadIdx.x;
          switch (x[t] % 11) {{ {cases} default: y[t] = -1; }}
        }}"""
        x = np.arange(64, dtype=np.int32)
        (y,) = emulate(source, [x], [info(64, "int32")], block=64)
        assert y.tolist() == [v * ((v % 11) ** 2 + 3) ^ v % 11 if v % 11 < 9 else -1 for v in range(64)]

    def test_lanes_meet_again_for_a_shuffle(self, emulate: Emulate) -> None:
        source = """extern "C" __global__ void k(const int* x, int* y) {
          int t = threadIdx.x, v = x[t];
          for (int i = 0; i < t % 5; ++i) v = v * 3 + i;
          y[t] = __shfl_xor_sync(~0u, v, 1);
        }"""
        x = np.arange(64, dtype=np.int32)
        expected = x.copy()
        for i in range(4):
            expected = np.where(i < np.arange(64) % 5, expected * 3 + i, expected)
        (y,) = emulate(source, [x], [info(64, "int32")], block=64)
        np.testing.assert_array_equal(y, expected.reshape(-1, 2)[:, ::-1].reshape(-1))

    def test_blocks_and_axes(self, emulate: Emulate) -> None:
        source = """extern "C" __global__ void k(int* y) {
          int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
          int size = blockDim.x * blockDim.y * blockDim.z;
          y[blockIdx.x * size + t] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x;
        }"""
        (y,) = emulate(source, [], [TensorInfo((300, 2, 3, 5), "int32")], grid=300, block=(5, 3, 2))
        b, z, y_, x = np.indices((300, 2, 3, 5))
        np.testing.assert_array_equal(y, x + 10 * y_ + 100 * z + 1000 * b)


class TestWarps:
    @pytest.mark.parametrize("width", [32, 8])
    @pytest.mark.parametrize(("mode", "by"), [("up", 3), ("down", 5), ("xor", 6), ("", 13)])
    def test_shuffles(self, emulate: Emulate, rng: np.random.Generator, mode: str, by: int, width: int) -> None:
        source = f"""extern "C" __global__ void k(const float* x, float* y) {{
          int t = threadIdx.x;
          y[t] = __shfl{"_" if mode else ""}{mode}_sync(~0u, x[t], {by}, {width});
        }}"""
        x = rng.standard_normal(96).astype(np.float32)
        (y,) = emulate(source, [x], [info(96, "float32")], block=96)
        lane = np.arange(32)
        first = lane // width * width
        wanted = {"up": lane - by, "down": lane + by, "xor": lane ^ by, "": first + by % width}[mode]
        inside = (wanted >= first) & (wanted < first + width)
        chosen = np.where(inside, wanted, lane)
        np.testing.assert_array_equal(y, x.reshape(-1, 32)[:, chosen].reshape(-1))

    def test_a_shuffle_by_a_register(self, emulate: Emulate, rng: np.random.Generator) -> None:
        source = """extern "C" __global__ void k(const int* x, const int* from, int* y) {
          y[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], from[threadIdx.x]);
        }"""
        x, chosen = (rng.integers(0, 32, 64).astype(np.int32) for _ in range(2))
        (y,) = emulate(source, [x, chosen], [info(64, "int32")], block=64)
        np.testing.assert_array_equal(y, np.take_along_axis(x.reshape(2, 32), chosen.reshape(2, 32), 1).reshape(-1))

    def test_votes_and_matches(self, emulate: Emulate, rng: np.random.Generator) -> None:
        source = """extern "C" __global__ void k(const int* x, int* y) {
          int t = threadIdx.x, v = x[t];
          unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
          y[t * 5] = __ballot_sync(~0u, v > 2);
          y[t * 5 + 1] = __any_sync(~0u, v == 4) + 2 * __all_sync(~0u, v < 5);
          y[t * 5 + 2] = __match_any_sync(~0u, v);
          y[t * 5 + 3] = __reduce_add_sync(half, v);
          y[t * 5 + 4] = __reduce_max_sync(half, v);
        }"""
        x = rng.integers(0, 6, (2, 32)).astype(np.int32)
        (y,) = emulate(source, [x], [TensorInfo((2, 32, 5), "uint32")], block=64)
        bits = 1 << np.arange(32, dtype=np.int64)
        np.testing.assert_array_equal(y[..., 0], np.repeat((x > 2) @ bits, 32).reshape(2, 32))
        votes = (x == 4).any(1) + 2 * (x < 5).all(1)
        np.testing.assert_array_equal(y[..., 1], np.repeat(votes, 32).reshape(2, 32))
        np.testing.assert_array_equal(y[..., 2], (x[:, :, None] == x[:, None]) @ bits)
        halves = x.reshape(2, 2, 16)
        np.testing.assert_array_equal(y[..., 3], np.repeat(halves.sum(-1), 16, 1))
        np.testing.assert_array_equal(y[..., 4], np.repeat(halves.max(-1), 16, 1))

    def test_a_lane_that_is_not_there_gives_poison(self, emulate: Emulate) -> None:
        source = """extern "C" __global__ void k(float* y) {
          y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 8);
        }"""
        (y,) = emulate(source, [], [info(48, "float32")], block=48)
        np.testing.assert_array_equal(np.isnan(y), np.arange(48) % 16 >= 16)
        (y,) = emulate(source, [], [info(40, "float32")], block=40)
        np.testing.assert_array_equal(np.isnan(y), np.arange(40) >= 32)


class TestBlocks:
    def test_a_sum_through_shared_memory(self, emulate: Emulate, rng: np.random.Generator) -> None:
        source = """extern "C" __global__ void k(const float* x, int n, float* y) {
          extern __shared__ float part[];
          __shared__ float scale;
          int t = threadIdx.x;
          float sum = 0;
          for (int i = t; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
          part[t] = sum;
          if (t == 0) scale = 2;
          for (int step = blockDim.x / 2; step > 0; step /= 2) {
            __syncthreads();
            if (t < step) part[t] += part[t + step];
          }
          if (t == 0) y[blockIdx.x] = part[0] * scale;
        }"""
        x = rng.standard_normal((50, 777)).astype(np.float32)
        (y,) = emulate(source, [x], [info(50, "float32")], grid=50, block=128, shared=512, extras=(777,))
        np.testing.assert_allclose(y, 2 * x.astype(np.float64).sum(1), rtol=0, atol=1e-4)  # float32 sums of 777 terms

    def test_warps_at_different_times_at_a_barrier(self, emulate: Emulate) -> None:
        """Each warp works for a while of its own before the barrier; some threads have left."""
        source = """extern "C" __global__ void k(int* y) {
          __shared__ int values[128];
          int t = threadIdx.x;
          if (t >= 96) return;
          int v = 0;
          for (int i = 0; i < t / 32 * 10; ++i) v += i * t;
          values[t] = v;
          __syncthreads();
          y[t] = values[95 - t];
        }"""
        (y,) = emulate(source, [], [info(96, "int32")], block=128)
        values = [sum(i * t for i in range(t // 32 * 10)) for t in range(96)]
        assert y.tolist() == values[::-1]

    def test_counting_barriers(self, emulate: Emulate, rng: np.random.Generator) -> None:
        source = """extern "C" __global__ void k(const int* x, int* y) {
          int v = x[blockIdx.x * blockDim.x + threadIdx.x];
          int count = __syncthreads_count(v > 3), all = __syncthreads_and(v), any = __syncthreads_or(v == 9);
          if (threadIdx.x == 0) y[blockIdx.x] = count * 4 + (all ? 2 : 0) + (any ? 1 : 0);
        }"""
        x = rng.integers(0, 10, (6, 64)).astype(np.int32)
        x[3:] = np.maximum(x[3:], 1)
        x[1:5] = np.minimum(x[1:5], 8)
        (y,) = emulate(source, [x], [info(6, "int32")], grid=6, block=64)
        np.testing.assert_array_equal(y, (x > 3).sum(1) * 4 + (x != 0).all(1) * 2 + (x == 9).any(1))

    def test_atomics(self, emulate: Emulate, rng: np.random.Generator) -> None:
        source = """extern "C" __global__ void k(const int* x, int n, int* histogram, float* sum, int* most,
                                         int* taken) {
          __shared__ int local[10], ticket;
          int t = threadIdx.x;
          if (t < 10) local[t] = 0;
          if (t == 0) { *sum = 0; *most = -1; ticket = 0; }
          __syncthreads();
          for (int i = t; i < n; i += blockDim.x) {
            atomicAdd(&local[x[i]], 1);
            atomicAdd(sum, 0.5f * x[i]);
            atomicMax(most, x[i] * 7 % 31);
          }
          taken[t] = atomicAdd(&ticket, 1);
          unsigned old = atomicCAS((unsigned*)&local[9], 100000u, 0u);
          __syncthreads();
          if (t < 10) histogram[t] = local[t] + 0 * old;
        }"""
        x = rng.integers(0, 10, 500).astype(np.int32)
        outputs = [info(10, "int32"), info(1, "float32"), info(1, "int32"), info(64, "int32")]
        histogram, total, most, taken = emulate(source, [x], outputs, block=64, extras=(500,))
        np.testing.assert_array_equal(histogram, np.bincount(x, minlength=10))
        assert total[0] == 0.5 * x.sum()  # halves: exact in float32
        assert most[0] == (x * 7 % 31).max()
        assert sorted(taken.tolist()) == list(range(64))

    def test_narrow_atomics(self, emulate: Emulate) -> None:
        source = """extern "C" __global__ void k(__half2* y) {
          if (threadIdx.x == 0) *y = __floats2half2_rn(0, 1);
          __syncthreads();
          atomicAdd(y, __floats2half2_rn(1, 0.5f));
        }"""
        (y,) = emulate(source, [], [info(2, "float16")], block=32)
        assert y.tolist() == [32, 17]
