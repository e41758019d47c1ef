"""Matrix instructions of the emulator against NumPy: small integers, so that every sum is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optframe.types import TensorInfo

Array = np.ndarray[Any, Any]
Emulate = Callable[..., list[Array]]

TYPES = {"f16": ("__half", np.float16), "bf16": ("__nv_bfloat16", ml_dtypes.bfloat16)}

SOURCE = """extern "C" __global__ void k(const TYPE* left, const TYPE* right, float* y) {
  __shared__ __align__(16) TYPE l[16][DEPTH], r[DEPTH][8];
  int t = threadIdx.x;
  for (int i = t; i < 16 * DEPTH; i += 32) l[i / DEPTH][i % DEPTH] = left[blockIdx.x * 16 * DEPTH + i];
  for (int i = t; i < 8 * DEPTH; i += 32) r[i / 8][i % 8] = right[blockIdx.x * 8 * DEPTH + i];
  __syncwarp();
  unsigned a[4], b[2], h[2] = {0, 0};
  float c[4] = {0, 0, 0, 0};
  unsigned at = (unsigned)__cvta_generic_to_shared(&l[t % 16][t / 16 * 8 % DEPTH]);
  unsigned bt = (unsigned)__cvta_generic_to_shared(&r[t % DEPTH][0]);
  asm volatile(LOAD_A);
  asm volatile(LOAD_B);
  for (int times = 0; times < 2; ++times) asm volatile(MULTIPLY);
  if (HALVES) for (int i = 0; i < 4; ++i) c[i] = (float)((__half*)h)[i];
  for (int i = 0; i < 4; ++i) y[blockIdx.x * 128 + (t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = c[i];
}"""


def listed(form: str, count: int, first: int = 0) -> str:
    return ", ".join(form.format(i, number=first + i) for i in range(count))


def source_of(kind: str, depth: int, accumulator: str) -> str:
    """Return a kernel that multiplies tiles twice, operands loaded by ldmatrix."""
    lefts, rights = depth // 4, depth // 8
    name, results = ("h", 2) if accumulator == "f16" else ("c", 4)
    place = "%{number}"
    load = "ldmatrix.sync.aligned.m8n8.x{}.{}shared.b16"
    texts = {
        "LOAD_A": f'"{load.format(lefts, "")} {{{listed(place, lefts)}}}, [%{lefts}];" : '
        + listed('"=r"(a[{}])', lefts)
        + ' : "r"(at) : "memory"',
        "LOAD_B": f'"{load.format(rights, "trans.")} {{{listed(place, rights)}}}, [%{rights}];" : '
        + listed('"=r"(b[{}])', rights)
        + ' : "r"(bt) : "memory"',
        "MULTIPLY": f'"mma.sync.aligned.m16n8k{depth}.row.col.{accumulator}.{kind}.{kind}.{accumulator} '
        f"{{{listed(place, results)}}}, {{{listed(place, lefts, results)}}}, "
        f'{{{listed(place, rights, results + lefts)}}}, {{{listed(place, results)}}};" : '
        + listed(f'"+{"r" if name == "h" else "f"}"({name}[{{}}])', results)
        + " : "
        + listed('"r"(a[{}])', lefts)
        + ", "
        + listed('"r"(b[{}])', rights),
        "HALVES": str(int(name == "h")),
        "TYPE": TYPES[kind][0],
        "DEPTH": str(depth),
    }
    source = SOURCE
    for word, text in texts.items():
        source = source.replace(word, text)
    return source


@pytest.mark.parametrize(
    ("kind", "depth", "accumulator"),
    [("f16", 16, "f32"), ("f16", 8, "f32"), ("bf16", 16, "f32"), ("bf16", 8, "f32"), ("f16", 16, "f16")],
)
def test_a_product_of_tiles(
    emulate: Emulate, rng: np.random.Generator, kind: str, depth: int, accumulator: str
) -> None:
    dtype = TYPES[kind][1]
    left, right = rng.integers(-4, 5, (3, 16, depth)), rng.integers(-4, 5, (3, depth, 8))
    inputs = [left.astype(dtype), right.astype(dtype)]
    (y,) = emulate(source_of(kind, depth, accumulator), inputs, [TensorInfo((3, 16, 8), "float32")], grid=3)
    np.testing.assert_array_equal(y, 2 * left @ right)


def test_integers_and_tf32(emulate: Emulate, rng: np.random.Generator) -> None:
    """Fragments are laid out by hand here, after the figures of the PTX ISA."""
    source = """extern "C" __global__ void k(const signed char* a, const signed char* b, const float* p, const float* q,
                                     int* y, float* z) {
      int t = threadIdx.x, g = t / 4, w = t % 4;
      unsigned l[4], r[2];
      int c[4] = {0, 0, 0, 0};
      for (int i = 0; i < 4; ++i) l[i] = *(const unsigned*)(a + (g + i % 2 * 8) * 32 + i / 2 * 16 + w * 4);
      for (int i = 0; i < 2; ++i) {
        signed char bytes[4];
        for (int j = 0; j < 4; ++j) bytes[j] = b[(i * 16 + w * 4 + j) * 8 + g];
        r[i] = *(unsigned*)bytes;
      }
      asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
      float d[4] = {0, 0, 0, 0};
      for (int i = 0; i < 4; ++i)
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(l[i]) : "f"(p[(g + i % 2 * 8) * 8 + i / 2 * 4 + w]));
      for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(q[(i * 4 + w) * 8 + g]));
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
      for (int i = 0; i < 4; ++i) {
        int at = (g + i / 2 * 8) * 8 + w * 2 + i % 2;
        y[at] = c[i];
        z[at] = d[i];
      }
    }"""
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8))
    p, q = rng.integers(-9, 9, (16, 8)), rng.integers(-9, 9, (8, 8))
    inputs = [a.astype(np.int8), b.astype(np.int8), p.astype(np.float32), q.astype(np.float32)]
    y, z = emulate(source, inputs, [TensorInfo((16, 8), "int32"), TensorInfo((16, 8), "float32")])
    np.testing.assert_array_equal(y, a @ b)
    np.testing.assert_array_equal(z, p @ q)
