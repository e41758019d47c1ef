"""Arithmetic and conversions of the emulator, element by element, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optframe.types import TensorInfo

Array = np.ndarray[Any, Any]
Emulate = Callable[..., list[Array]]

BFLOAT16 = ml_dtypes.bfloat16
CTYPES: dict[str, str] = {
    **{"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"},
    **{"int32": "int", "uint32": "unsigned", "int64": "long long", "uint64": "unsigned long long"},
    **{"int8": "signed char", "uint8": "unsigned char", "int16": "short", "uint16": "unsigned short"},
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38, 65504.0, 0.5, 2.5, -3.5, 1e9, -5e9]


def elementwise(emulate: Emulate, expression: str, arrays: list[Array], result: str) -> Array:
    """Compute y = expression of a, b, c for each element."""
    names = "abc"[: len(arrays)]
    parameters = ", ".join(f"const {CTYPES[a.dtype.name]}* p{n}" for n, a in zip(names, arrays, strict=True))
    values = " ".join(f"{CTYPES[a.dtype.name]} {n} = p{n}[i];" for n, a in zip(names, arrays, strict=True))
    source = f"""extern "C" __global__ void k({parameters}, int n, {CTYPES[result]}* y) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      {values}
      y[i] = {expression};
    }}"""
    count = arrays[0].size
    outputs = [TensorInfo((count,), result)]
    (y,) = emulate(source, arrays, outputs, grid=-(-count // 96), block=96, extras=(count,))
    return y


def floats(rng: np.random.Generator, dtype: Any, count: int = 2000) -> Array:
    drawn = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4, count)
    with np.errstate(over="ignore"):
        return rng.permutation(np.concatenate([drawn, np.tile(SPECIAL, 20)])).astype(dtype)


def integers(rng: np.random.Generator, dtype: Any, count: int = 2000) -> Array:
    limits = np.iinfo(dtype)
    edges = [limits.min, limits.max, 0, 1, limits.max // 2]
    small = rng.integers(max(limits.min, -50), 50, count)
    wide = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    return rng.permutation(np.concatenate([small.astype(dtype), wide, np.tile(np.array(edges, dtype), 20)]))


def assert_same(actual: Array, expected: Array) -> None:
    """Equal bits, but for the bits of NaN."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, expected)
        return
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[finite].view(np.uint8), expected[finite].view(np.uint8))


def trunc_div(a: Array, b: Array) -> Array:
    wide = [x.astype(object) for x in (a, b)]
    return np.array([abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(*wide, strict=True)], object)


def permuted(x: int, chosen: tuple[int, ...]) -> int:
    """Take bytes of x and, from the fifth on, of 0x11223344; the lowest is chosen first."""
    data = (x | 0x11223344 << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(data[i] for i in chosen), "little")


def dot4(x: int, others: tuple[int, ...]) -> int:
    data = (x % 2**32).to_bytes(4, "little")
    return sum((byte - 256 * (byte > 127)) * other for byte, other in zip(data, others, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a + b", np.add),
        ("a - b", np.subtract),
        ("a * b", np.multiply),
        ("a / b", np.divide),
        ("sqrt(a)", lambda a, b: np.sqrt(a)),
        ("-a", lambda a, b: -a),
        ("fabs(a)", lambda a, b: np.abs(a)),
        ("a < b ? a : b", lambda a, b: np.where(a < b, a, b)),
        ("!(a >= b) ? a : b", lambda a, b: np.where(~(a >= b), a, b)),
        ("a != b ? a : b", lambda a, b: np.where(a != b, a, b)),
        ("copysign(a, b)", np.copysign),
        ("floor(a) + ceil(b)", lambda a, b: np.floor(a) + np.ceil(b)),
        ("rint(a)", lambda a, b: np.rint(a)),
        ("trunc(a)", lambda a, b: np.trunc(a)),
        ("isnan(a) + 2 * isinf(b)", lambda a, b: np.isnan(a) + np.array(2, a.dtype) * np.isinf(b)),
    ],
)
def test_ieee(
    emulate: Emulate, rng: np.random.Generator, dtype: Any, expression: str, expected: Callable[..., Array]
) -> None:
    a, b = floats(rng, dtype), floats(rng, dtype)
    with np.errstate(all="ignore"):
        assert_same(elementwise(emulate, expression, [a, b], a.dtype.name), expected(a, b).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("largest", [False, True])
def test_minimum_and_maximum(emulate: Emulate, rng: np.random.Generator, dtype: Any, largest: bool) -> None:
    """A number wins over NaN, and -0 is below +0."""
    a, b = floats(rng, dtype), floats(rng, dtype)
    name = "max" if largest else "min"
    expression = f"f{name}f(a, b)" if dtype is np.float32 else f"__h{name}(a, b)"
    actual = elementwise(emulate, expression, [a, b], np.dtype(dtype).name)
    wide = a.astype(np.float64), b.astype(np.float64)
    expected = (np.fmax if largest else np.fmin)(*wide)
    both = (wide[0] == 0) & (wide[1] == 0)
    signs = np.signbit(wide[0]), np.signbit(wide[1])
    negative = signs[0] & signs[1] if largest else signs[0] | signs[1]
    assert_same(actual, np.where(both, np.where(negative, -0.0, 0.0), expected).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_narrow_floats(emulate: Emulate, rng: np.random.Generator, dtype: Any, operation: str) -> None:
    """Sums and products of two are exact in float64, or so near that one rounding to the type shows nothing of it."""
    a, b = floats(rng, dtype), floats(rng, dtype)
    function = {"+": np.add, "-": np.subtract, "*": np.multiply}[operation]
    with np.errstate(all="ignore"):
        expected = function(a.astype(np.float64), b.astype(np.float64)).astype(dtype)
    name = np.dtype(dtype).name
    assert_same(elementwise(emulate, f"a {operation} b", [a, b], name), expected)


@pytest.mark.parametrize(("dtype", "function"), [(np.float32, "fmaf"), (np.float16, "__hfma"), (BFLOAT16, "__hfma")])
def test_fma(emulate: Emulate, rng: np.random.Generator, dtype: Any, function: str) -> None:
    a, b, c = (floats(rng, dtype) for _ in range(3))
    actual = elementwise(emulate, f"{function}(a, b, c)", [a, b, c], np.dtype(dtype).name)
    wide = [x.astype(np.float64) for x in (a, b, c)]
    with np.errstate(all="ignore"):
        expected = (wide[0] * wide[1] + wide[2]).astype(dtype)
    for i in np.flatnonzero(np.isfinite(expected.astype(np.float64))):
        exact = Fraction(wide[0][i]) * Fraction(wide[1][i]) + Fraction(wide[2][i])
        expected[i] = nearest(exact, expected[i : i + 1])
    assert_same(actual, expected)


def nearest(exact: Fraction, guess: Array) -> Any:
    """Return the value nearest to `exact`, of two the one with even bits, in the dtype of a guess next to it."""
    if exact == 0:
        return guess[0]
    bits = guess.view(f"u{guess.dtype.itemsize}")
    around = np.concatenate([bits, bits + bits.dtype.type(1), bits - bits.dtype.type(1)]).view(guess.dtype)
    finite = [
        (abs(Fraction(float(x)) - exact), int(x.view(bits.dtype)) & 1, x) for x in around if abs(float(x)) < np.inf
    ]
    return min(finite, key=lambda item: item[:2])[2]


def test_one_rounding_in_a_narrow_fma(emulate: Emulate) -> None:
    """The product lies half way between two values; a term below float64's reach decides."""
    c = np.array([2.0**-70, -(2.0**-70), 0.0], BFLOAT16)
    a, b = np.full(3, 1.0078125, BFLOAT16), np.full(3, 1.5, BFLOAT16)
    actual = elementwise(emulate, "__hfma(a, b, c)", [a, b, c], "bfloat16")
    np.testing.assert_array_equal(actual.astype(np.float64), [1.515625, 1.5078125, 1.515625])


@pytest.mark.parametrize(
    ("expression", "up"),
    [("__fadd_{}(a, b)", False), ("__fmul_{}(a, b)", False), ("__fmaf_{}(a, b, 1.0f)", True)],
)
@pytest.mark.parametrize("mode", ["rd", "ru", "rz"])
def test_directed_roundings(emulate: Emulate, rng: np.random.Generator, expression: str, up: bool, mode: str) -> None:
    a, b = (rng.standard_normal(2000).astype(np.float32) for _ in range(2))
    wide = a.astype(np.longdouble), b.astype(np.longdouble)
    exact = wide[0] + wide[1] if "add" in expression else wide[0] * wide[1] + (1 if up else 0)
    actual = elementwise(emulate, expression.format(mode), [a, b], "float32").astype(np.longdouble)
    step = np.spacing(np.abs(actual).astype(np.float32)).astype(np.longdouble)
    difference = actual - exact
    down = difference <= 0 if mode == "rd" else difference >= 0
    assert (np.abs(actual) <= np.abs(exact) if mode == "rz" else down).all()
    assert (np.abs(difference) < step).all()


@pytest.mark.parametrize(
    ("expression", "expected", "units"),
    [
        ("expf(a)", np.exp, 2),  # CUDA's guide: 1 unit in the last place; one more where the reference is rounded
        ("__expf(a)", np.exp, 90),  # 2 + 1.16 |a|, |a| < 75
        ("exp2f(a)", np.exp2, 2),
        ("logf(fabsf(a))", lambda a: np.log(np.abs(a)), 2),
        ("rsqrtf(fabsf(a))", lambda a: 1 / np.sqrt(np.abs(a)), 2),
        ("sinf(a)", np.sin, 2),
        ("cosf(a * 1e5f)", lambda a: np.cos((a * np.float32(1e5)).astype(np.float64)), 2),
        ("tanhf(a)", np.tanh, 3),
        ("erff(a)", None, 3),
        ("1.0f / (1.0f + expf(-a))", lambda a: 1 / (1 + np.exp(-a)), 4),
        ("powf(fabsf(a), 1.7f)", lambda a: np.abs(a) ** np.float64(np.float32(1.7)), 5),
    ],
)
def test_functions(
    emulate: Emulate, rng: np.random.Generator, expression: str, expected: Callable[..., Array] | None, units: int
) -> None:
    a = (rng.standard_normal(1000) * 15).clip(-75, 75).astype(np.float32)
    if expected is None:
        torch = pytest.importorskip("torch")
        wanted = torch.erf(torch.from_numpy(a.astype(np.float64))).numpy()
    else:
        argument = a if "1e5" in expression else a.astype(np.float64)
        wanted = expected(argument)
    actual = elementwise(emulate, expression, [a], "float32").astype(np.float64)
    unit = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
    assert (np.abs(actual - wanted) <= units * unit).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a + b", np.add),
        ("a - b", np.subtract),
        ("a * b", np.multiply),
        ("a / (b ? b : 1)", lambda a, b: trunc_div(a, np.where(b == 0, b.dtype.type(1), b))),
        ("a % (b ? b : 1)", lambda a, b: np.fmod(a, np.where(b == 0, b.dtype.type(1), b))),
        ("a & ~b | b ^ 12345", lambda a, b: a & ~b | b ^ a.dtype.type(12345)),
        ("a << (b & 31)", lambda a, b: a << (b & b.dtype.type(31))),
        ("a >> (b & 31)", lambda a, b: a >> (b & b.dtype.type(31))),
        ("a < b ? a : b", np.minimum),
        ("max(a, b)", np.maximum),
    ],
)
def test_integers(
    emulate: Emulate, rng: np.random.Generator, dtype: Any, expression: str, expected: Callable[..., Array]
) -> None:
    a, b = integers(rng, dtype), integers(rng, dtype)
    with np.errstate(all="ignore"):
        wanted = np.asarray(expected(a, b))
    if wanted.dtype == object:
        bits = 8 * np.dtype(dtype).itemsize
        wanted = (wanted % (1 << bits)).astype(f"uint{bits}").view(dtype)
    assert_same(elementwise(emulate, expression, [a, b], a.dtype.name), wanted)


@pytest.mark.parametrize(
    ("expression", "dtype", "result", "expected"),
    [
        ("__popc(a)", np.uint32, "int32", lambda x: bin(x).count("1")),
        ("__popcll(a)", np.uint64, "int32", lambda x: bin(x).count("1")),
        ("__clz(a)", np.uint32, "int32", lambda x: 32 - x.bit_length()),
        ("__clzll(a)", np.uint64, "int32", lambda x: 64 - x.bit_length()),
        ("__brev(a)", np.uint32, "uint32", lambda x: int(f"{x:032b}"[::-1], 2)),
        ("__ffs(a)", np.uint32, "int32", lambda x: (x & -x).bit_length()),
        ("__byte_perm(a, 0x11223344u, 0x3715)", np.uint32, "uint32", lambda x: permuted(x, (5, 1, 7, 3))),
        ("__umulhi(a, 0xdeadbeefu)", np.uint32, "uint32", lambda x: x * 0xDEADBEEF >> 32),
        ("__umul64hi(a, 0xdeadbeefdeadbeefull)", np.uint64, "uint64", lambda x: x * 0xDEADBEEFDEADBEEF >> 64),
        ("__mulhi(a, -77777777)", np.int32, "int32", lambda x: x * -77777777 >> 32),
        ("__mul64hi(a, -777777777777777777ll)", np.int64, "int64", lambda x: x * -777777777777777777 >> 64),
        ("__funnelshift_l(a, 0x80000001u, 5)", np.uint32, "uint32", lambda x: (0x80000001 << 5 | x >> 27) % 2**32),
        ("__funnelshift_r(a, 0x80000001u, 5)", np.uint32, "uint32", lambda x: (x >> 5 | 1 << 27) % 2**32),
        ("(a >> 7) & 0x1ff", np.uint32, "uint32", lambda x: x >> 7 & 0x1FF),
        ("a / 7u * 3u + a % 10u", np.uint32, "uint32", lambda x: (x // 7 * 3 + x % 10) % 2**32),
        ("(long long)a * a", np.int32, "int64", lambda x: x * x),
        ("__dp4a((int)a, 0x7f80ff02, 5)", np.int32, "int32", lambda x: 5 + dot4(x, (2, -1, -128, 127))),
    ],
)
def test_bits(
    emulate: Emulate,
    rng: np.random.Generator,
    expression: str,
    dtype: Any,
    result: str,
    expected: Callable[[int], int],
) -> None:
    a = integers(rng, dtype, 300)
    actual = elementwise(emulate, expression, [a], result)
    assert actual.tolist() == [expected(int(x)) for x in a]


@pytest.mark.parametrize("source", [np.float32, np.float16, BFLOAT16, np.float64])
@pytest.mark.parametrize("target", [np.float32, np.float16, BFLOAT16, np.float64])
def test_between_floats(emulate: Emulate, rng: np.random.Generator, source: Any, target: Any) -> None:
    a = floats(rng, source)
    name = np.dtype(target).name
    through = "(float)" if target is np.float64 and a.dtype.itemsize == 2 else ""
    with np.errstate(all="ignore"):
        expected = a.astype(target)
    if source is np.float64 and target is BFLOAT16:  # NumPy's cast rounds twice
        for i in np.flatnonzero(np.isfinite(expected.astype(np.float64))):
            expected[i] = nearest(Fraction(a[i]), expected[i : i + 1])
    assert_same(elementwise(emulate, f"({CTYPES[name]}){through}a", [a], name), expected)


@pytest.mark.parametrize("source", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("target", ["int32", "uint32", "int64", "uint64"])
def test_floats_to_integers_saturate(emulate: Emulate, rng: np.random.Generator, source: Any, target: str) -> None:
    """PTX: the nearest of the range, 0 for NaN."""
    a = floats(rng, source)
    through = "(float)" if source is np.float16 else ""
    actual = elementwise(emulate, f"({CTYPES[target]}){through}a", [a], target)
    limits = np.iinfo(target)
    wide = [float(x) for x in a]
    expected = [0 if x != x else int(min(max(x, -1e30), 1e30)) for x in wide]
    assert actual.tolist() == [min(max(x, limits.min), limits.max) for x in expected]


@pytest.mark.parametrize("target", ["int16", "uint16", "int8", "uint8"])
def test_floats_to_narrow_integers(emulate: Emulate, rng: np.random.Generator, target: str) -> None:
    limits = np.iinfo(target)
    a = rng.uniform(limits.min, limits.max, 500).astype(np.float32)
    assert_same(elementwise(emulate, f"({CTYPES[target]})a", [a], target), np.trunc(a).astype(target))


@pytest.mark.parametrize("source", [np.int32, np.uint32, np.int64, np.uint64, np.int8, np.uint16])
@pytest.mark.parametrize("target", ["float32", "float64", "int8", "uint16", "int32", "int64"])
def test_from_integers(emulate: Emulate, rng: np.random.Generator, source: Any, target: str) -> None:
    a = integers(rng, source)
    assert_same(elementwise(emulate, f"({CTYPES[target]})a", [a], target), a.astype(target))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("__float2int_rn(a)", np.rint), ("__float2int_rd(a)", np.floor), ("__float2int_ru(a)", np.ceil)],
)
def test_roundings_to_integers(
    emulate: Emulate, rng: np.random.Generator, expression: str, expected: Callable[..., Array]
) -> None:
    a = (rng.standard_normal(1000) * 10).round(1).astype(np.float32)
    a[:100] = rng.integers(-9, 9, 100) + 0.5
    assert_same(elementwise(emulate, expression, [a], "int32"), expected(a).astype(np.int32))


def test_pairs_of_halves(emulate: Emulate, rng: np.random.Generator) -> None:
    a, b = (floats(rng, np.float16)[:2000] for _ in range(2))
    source = """extern "C" __global__ void k(const __half2* a, const __half2* b, int n, __half2* y, __half2* z) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      y[i] = __hmul2(a[i], __halves2half2(__high2half(b[i]), __low2half(b[i])));
      z[i] = __hmax2(__hgt2(a[i], b[i]), __float2half2_rn(0.25f));
    }"""
    outputs = [TensorInfo((2000,), "float16")] * 2
    y, z = emulate(source, [a, b], outputs, grid=8, block=128, extras=(1000,))
    swapped = b.reshape(-1, 2)[:, ::-1].reshape(-1)
    with np.errstate(all="ignore"):
        assert_same(y, a * swapped)
        assert_same(z, np.where(a > b, 1, 0.25).astype(np.float16))


def test_flushing(emulate: Emulate) -> None:
    """`.ftz` makes zeros of subnormal operands and results; ex2 without it keeps them."""
    a = np.array([1e-40, -1e-40, 2e-38, -1.2e-38, -130.0, 1.0], np.float32)
    source = """extern "C" __global__ void k(const float* a, float* y, float* z) {
      int i = threadIdx.x;
      asm("mul.ftz.f32 %0, %1, 0f3F000000;" : "=f"(y[i]) : "f"(a[i]));
      asm("ex2.approx.f32 %0, %1;" : "=f"(z[i]) : "f"(a[i]));
    }"""
    y, z = emulate(source, [a], [TensorInfo((6,), "float32")] * 2, block=6)
    assert_same(y, np.array([0.0, -0.0, 0.0, -0.0, -65.0, 0.5], np.float32))
    assert_same(z, np.exp2(a.astype(np.float64)).astype(np.float32))
    assert 0 < z[4] < 1e-38
