"""Loads, stores and copies under the emulator, in all state spaces."""

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


@pytest.mark.parametrize("bytes_", [1, 2, 4, 8, 16])
def test_loads_and_stores_of_all_sizes(emulate: Emulate, rng: np.random.Generator, bytes_: int) -> None:
    kind = {1: "char", 2: "short", 4: "int", 8: "int2", 16: "int4"}[bytes_]
    source = f"""extern "C" __global__ void k(const {kind}* x, {kind}* y) {{
      __shared__ {kind} turned[64];
      turned[63 - threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = turned[threadIdx.x];
    }}"""
    x = rng.integers(0, 256, (64, bytes_)).astype(np.uint8)
    (y,) = emulate(source, [x], [TensorInfo((64, bytes_), "uint8")], block=64)
    np.testing.assert_array_equal(y, x[::-1])


def test_hints_to_caches_change_nothing(emulate: Emulate, rng: np.random.Generator) -> None:
    source = """extern "C" __global__ void k(const uint4* x, uint4* y) {
      unsigned long long policy, part;
      uint4 kept;
      asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
      asm("createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %0, 0.5;" : "=l"(part));
      asm("ld.global.L1::evict_last.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
          : "=r"(kept.x), "=r"(kept.y), "=r"(kept.z), "=r"(kept.w) : "l"(x + threadIdx.x), "l"(policy));
      asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;"
          :: "l"(y + threadIdx.x), "r"(kept.x), "r"(kept.y), "l"(part) : "memory");
      uint4 streamed = __ldcs(x + 64 + threadIdx.x);
      streamed.x = kept.z, streamed.y = kept.w;
      __stcs(y + 64 + threadIdx.x, streamed);
    }"""
    x = rng.integers(1, 2**32, (128, 4), dtype=np.uint32)
    (y,) = emulate(source, [x], [TensorInfo((128, 4), "uint32")], block=64)
    np.testing.assert_array_equal(y[:64, :2], x[:64, :2])
    np.testing.assert_array_equal(y[64:], np.concatenate([x[:64, 2:], x[64:, 2:]], axis=1))


def test_sign_extension(emulate: Emulate) -> None:
    source = """extern "C" __global__ void k(const signed char* x, const unsigned char* z, int* y) {
      y[threadIdx.x] = x[threadIdx.x] * 1000 + z[threadIdx.x];
    }"""
    x = np.arange(-128, 128).astype(np.int8)
    (y,) = emulate(source, [x, x.view(np.uint8)], [info(256, "int32")], block=256)
    np.testing.assert_array_equal(y, x.astype(int) * 1000 + x.view(np.uint8))


def test_local_arrays_tables_and_generic_pointers(emulate: Emulate, rng: np.random.Generator) -> None:
    source = """__constant__ int primes[6] = {2, 3, 5, 7, 11, 13};
    __device__ float halves[2] = {0.5f, -0.5f};
    extern "C" __global__ void k(const int* x, float* y) {
      __shared__ int pool[64];
      int t = threadIdx.x, stack[32];
      pool[t] = t * 2;
      for (int i = 0; i < 32; ++i) stack[i] = x[(t + i) % 64];
      const int* from = t % 3 == 0 ? (const int*)pool + t : t % 3 == 1 ? x + t : stack + x[t] % 32;
      __syncthreads();
      y[t] = (*from + stack[x[(t + 5) % 64] % 32] * primes[x[t] % 6]) * halves[x[t] % 2];
    }"""
    x = rng.integers(0, 1000, 64).astype(np.int32)
    (y,) = emulate(source, [x], [info(64, "float32")], block=64)
    expected = []
    for t in range(64):
        stack = [int(x[(t + i) % 64]) for i in range(32)]
        start = (t * 2, int(x[t]), stack[x[t] % 32])[t % 3]
        value = start + stack[x[(t + 5) % 64] % 32] * (2, 3, 5, 7, 11, 13)[x[t] % 6]
        expected.append(value * (0.5, -0.5)[x[t] % 2])
    assert y.tolist() == expected


def test_asynchronous_copies(emulate: Emulate, rng: np.random.Generator) -> None:
    """Two stages; the last copy is cut short, so that zeros follow."""
    source = """extern "C" __global__ void k(const float* x, float* y) {
      __shared__ __align__(16) float slab[2][128];
      int t = threadIdx.x;
      unsigned to = (unsigned)__cvta_generic_to_shared(&slab[0][t * 4]);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(x + t * 4));
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                   :: "r"(to + 512), "l"(x + 128 + t * 4), "r"(t < 31 ? 16 : 4));
      asm volatile("cp.async.commit_group;\\ncp.async.wait_group 1;" ::: "memory");
      __syncwarp();
      float first = slab[0][127 - t];
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncwarp();
      for (int i = t; i < 128; i += 32) y[i] = slab[1][i] + (i < 32 ? first : 0);
    }"""
    x = rng.standard_normal(256 - 3).astype(np.float32)
    (y,) = emulate(source, [x], [info(128, "float32")])
    expected = np.concatenate([x[128:], np.zeros(3, np.float32)])
    expected[:32] += x[127:95:-1]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("offset", [4, 8, 12])
def test_pointers_lose_their_alignment(emulate: Emulate, offset: int) -> None:
    source = 'extern "C" __global__ void k(const float* x, int* y) { y[threadIdx.x] = (size_t)(x + threadIdx.x) % 16; }'
    (y,) = emulate(source, [np.zeros(32, np.float32)], [info(32, "int32")], offset=offset)
    np.testing.assert_array_equal(y, (offset + 4 * np.arange(32)) % 16)


def test_an_address_of_32_bits_wraps(emulate: Emulate) -> None:
    source = """extern "C" __global__ void k(int* y) {
      __shared__ int s[32];
      s[threadIdx.x] = threadIdx.x * 3;
      __syncwarp();
      unsigned at = (unsigned)__cvta_generic_to_shared(s);  // 0
      asm volatile("ld.shared.b32 %0, [%1+124];" : "=r"(y[threadIdx.x]) : "r"(at - 4 * (int)threadIdx.x) : "memory");
    }"""
    (y,) = emulate(source, [], [info(32, "int32")])
    np.testing.assert_array_equal(y, 3 * np.arange(32)[::-1])


def test_nothing_to_launch_and_what_is_not_written(emulate: Emulate) -> None:
    source = 'extern "C" __global__ void k(int n, float* y) { if (threadIdx.x < n) y[threadIdx.x] = 1; }'
    (y,) = emulate(source, [], [info(32, "float32")], extras=(7,))
    np.testing.assert_array_equal(np.isnan(y), np.arange(32) >= 7)
    (y,) = emulate(source, [], [info(32, "float32")], grid=0, extras=(7,))
    assert np.isnan(y).all()
