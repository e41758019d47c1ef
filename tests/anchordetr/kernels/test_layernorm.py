"""The launch rules of layer normalisation, and the kernels against float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optframe.errors import InputError
from optframe.types import Defines, KernelLaunch, KernelSpec, TensorInfo
from optframe_anchordetr.kernels import LAYERNORM, SKIP_LAYERNORM, layernorm
from optframe_trt import emulator, nvrtc

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Shape = tuple[int, ...]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
EPSILON = 1e-5


def layernorm64(x: Array, scale: Array | None, bias: Array | None, epsilon: float = EPSILON) -> Array:
    """The result in float64, and the sum of its terms' absolute values."""
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    factor = np.float64(1) if scale is None else scale.astype(np.float64)
    term = np.zeros(y.shape[-1]) if bias is None else bias.astype(np.float64)
    return np.stack([y * factor + term, (1 + np.abs(y)) * np.abs(factor) + np.abs(term)])


def assert_close(actual: Array, expected: Array, dtype: str) -> None:
    """The one rounding of the result, and float32 arithmetic: a dozen operations, each good to 2^-24 of its terms."""
    result, magnitude = expected
    tolerance = UNIT_ROUNDOFF[dtype] * np.abs(result) + 16 * 2.0**-24 * magnitude + 2.0**-24
    error = np.abs(actual.astype(np.float64) - result)
    assert (error <= tolerance).all(), f"largest error {error.max()}, {(error / tolerance).max():.1f} of the tolerance"


def draw(seed: int, shape: tuple[int, ...], dtype: str, offset: float = 0.0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + offset).astype(DTYPES[dtype])


def launch(spec: KernelSpec, *inputs: TensorInfo | None, outputs: int = 1, **attributes: object) -> Any:
    return spec.launch_rule()(inputs, [inputs[0]] * outputs, attributes)  # type: ignore[arg-type, list-item]


KERNELS = (LAYERNORM, SKIP_LAYERNORM)
SPECS = [pytest.param(LAYERNORM, id="plain"), pytest.param(SKIP_LAYERNORM, id="skip")]


def tensors(spec: KernelSpec, shape: Shape, dtype: str) -> list[TensorInfo]:
    """All that the op adds, without parameters; they are like its outputs."""
    return [TensorInfo(shape, dtype)] * (1 + KERNELS.index(spec))


def plain_launch(spec: KernelSpec, shape: Shape, dtype: str = "float16", **attributes: object) -> KernelLaunch:
    given = tensors(spec, shape, dtype)
    return spec.launch_rule()(given, given, attributes)


def reused(spec: KernelSpec, shape: Shape, dtype: str, defines: Defines) -> KernelLaunch:
    rule, given = spec.reuse_rule(), tensors(spec, shape, dtype)
    assert rule is not None
    return rule(given, given, {}, defines)


class TestLaunchRule:
    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("columns", [8, 256, 257, 1024, 4096])
    def test_rows_decide_the_rows_a_block_alone(self, spec: KernelSpec, columns: int) -> None:
        for rows in (1, 900, 3350, 8192, 100_000, 10**6):
            few, many = (plain_launch(spec, (count, columns)) for count in (3, rows))
            differ = {name for name, value in many.defines if dict(few.defines)[name] != value}
            assert differ <= {"LN_GROUPS", "LN_BLOCKS"}
            groups = dict_of(many)["LN_GROUPS"]
            assert (many.grid, many.extras) == ((-(-rows // groups), 1, 1), (rows,))
            resident = [c.block[0] * int(dict(c.defines)["LN_BLOCKS"]) for c in (few, many)]
            assert max(resident) - min(resident) < 128, "registers of a thread"

    @pytest.mark.parametrize(
        ("spec", "rows", "threads"),
        [
            *((LAYERNORM, 4096, 64), (LAYERNORM, 4097, 128), (LAYERNORM, 32768, 128), (LAYERNORM, 32772, 64)),
            *((SKIP_LAYERNORM, 4096, 64), (SKIP_LAYERNORM, 4097, 128), (SKIP_LAYERNORM, 10**6, 128)),
        ],
    )
    def test_threads_of_a_block(self, spec: KernelSpec, rows: int, threads: int) -> None:
        assert plain_launch(spec, (rows, 256)).block == (threads, 1, 1)

    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize(
        ("columns", "dtype"), [(256, "float16"), (768, "float32"), (33, "bfloat16"), (9000, "float32")]
    )
    def test_a_kernel_does_any_rows(self, spec: KernelSpec, columns: int, dtype: str) -> None:
        calls = [plain_launch(spec, (rows, columns), dtype) for rows in (0, 1, 577, 5000, 40_000)]
        for kernel in calls:
            for own in calls:
                (rows,) = own.extras
                used = reused(spec, (rows, columns), dtype, kernel.defines)
                assert (used.defines, used.block, used.extras) == (kernel.defines, kernel.block, (rows,))
                assert used.grid[0] == -(-rows // dict_of(kernel)["LN_GROUPS"])
                if own.defines == kernel.defines:
                    assert used == own

    @pytest.mark.parametrize("spec", SPECS)
    def test_kernels_for_other_calls_are_refused(self, spec: KernelSpec) -> None:
        other = KERNELS[1 - KERNELS.index(spec)]
        own = dict(plain_launch(spec, (3, 256)).defines)
        for defines in (
            plain_launch(spec, (3, 257)).defines,
            plain_launch(spec, (3, 256), "float32").defines,
            plain_launch(spec, (3, 256), epsilon=1e-3).defines,
            plain_launch(other, (3, 256)).defines,
            plain_launch(spec, (3, 256)).defines[1:],
            *(
                tuple((own | {"LN_GROUPS": groups, "LN_BLOCKS": "1"}).items())
                for groups in ("1", "1000000", "9" * 5000)
            ),
            (),
        ):
            with pytest.raises(InputError, match="the kernel is one for other columns, dtypes, parameters or epsilon"):
                reused(spec, (3, 256), "float16", defines)

    @pytest.mark.parametrize(
        ("spec", "columns", "dtype", "lanes"),
        [
            *((LAYERNORM, 768, "float16", 32), (LAYERNORM, 1024, "float16", 32), (LAYERNORM, 1032, "float16", 64)),
            *((LAYERNORM, 512, "float32", 32), (LAYERNORM, 768, "float32", 64), (LAYERNORM, 1024, "float32", 128)),
            *((SKIP_LAYERNORM, 768, "float16", 32), (SKIP_LAYERNORM, 1024, "float16", 128)),
            *((SKIP_LAYERNORM, 384, "float32", 32), (SKIP_LAYERNORM, 512, "float32", 128)),
            *((LAYERNORM, 767, "float16", 32), (LAYERNORM, 769, "float16", 64)),  # narrow accesses
        ],
    )
    def test_warps_and_blocks(self, spec: KernelSpec, columns: int, dtype: str, lanes: int) -> None:
        assert dict_of(plain_launch(spec, (7, columns), dtype))["LN_LANES"] == lanes

    @pytest.mark.parametrize(
        ("columns", "parameter", "early"),
        [(768, "float32", 1), (1024, "float16", 1), (1024, "float32", 0), (1032, "float16", 0), (1033, "float16", 1)],
    )
    def test_parameters_that_take_many_registers_are_loaded_late(
        self, columns: int, parameter: str, early: int
    ) -> None:
        vectors = [TensorInfo((columns,), parameter)] * 2
        defines = dict(launch(LAYERNORM, TensorInfo((7, columns), "float16"), *vectors).defines)
        assert int(defines["LN_EARLY"]) == early

    @pytest.mark.parametrize(
        "columns",
        [*range(1, 40), 255, 256, 257, 772, 1000, 1024, 1026, 1544, 3080, 4096, 8191, 8192, 8193, 16384, 16385, 10**6],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spec", [LAYERNORM, SKIP_LAYERNORM])
    def test_threads_cover_a_row(self, spec: KernelSpec, columns: int, dtype: str) -> None:
        chosen = plain_launch(spec, (7, columns), dtype)
        values = dict_of(chosen)
        lanes, groups = values["LN_LANES"], values["LN_GROUPS"]
        assert columns % values["LN_VECTOR"] == 0
        assert lanes in (1, 2, 4, 8, 16, 32) or (lanes % 32 == 0 and groups == 1)
        assert chosen.block == (lanes * groups, 1, 1)
        assert chosen.block[0] % 32 == 0
        assert chosen.block[0] <= 1024
        assert (lanes - 32) * values["LN_VECTOR"] < columns, "no warp has nothing of a row"
        kept = -(-columns // (lanes * values["LN_VECTOR"])) * values["LN_VECTOR"]
        assert values["LN_LONG"] or kept <= 32, "registers for the elements of a thread"
        assert lanes == 1024 or kept <= 32, "only rows that no block keeps are read by the largest"

    @pytest.mark.parametrize(
        ("columns", "dtype", "twice"),
        [
            *((2044, "float32", False), (2048, "float32", True), (4088, "float16", False), (4096, "float16", True)),
            *((8192, "float32", True), (8192, "float16", True), (16384, "float32", False), (16392, "float32", True)),
            *((4097, "float32", False), (8193, "float32", True), (8191, "float16", False)),  # narrow accesses
        ],
    )
    @pytest.mark.parametrize("spec", [LAYERNORM, SKIP_LAYERNORM])
    def test_long_rows_are_read_twice(self, spec: KernelSpec, columns: int, dtype: str, twice: bool) -> None:
        chosen = plain_launch(spec, (7, columns), dtype)
        assert dict_of(chosen)["LN_LONG"] == twice

    @pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("float16", 2)])
    @pytest.mark.parametrize("columns", [1, 256, 1000, 10**6])
    def test_large_matrices_begin_at_16_mib(self, columns: int, dtype: str, item_bytes: int) -> None:
        rows = dict_of(launch(LAYERNORM, TensorInfo((3, columns), dtype)))["LN_LARGE_ROWS"]
        assert (rows - 1) * columns * item_bytes < 2**24 <= rows * columns * item_bytes

    def test_absent_parameters_are_defines(self) -> None:
        values = dict(launch(LAYERNORM, TensorInfo((2, 8), "float16"), None, TensorInfo((8,), "float32")).defines)
        assert (values["LN_SCALE"], values["LN_BIAS"], values["LN_BIAS_TYPE"]) == ("0", "1", "float")

    def test_epsilon_is_baked(self) -> None:
        values = dict(launch(LAYERNORM, TensorInfo((2, 8), "float16"), epsilon=1e-12).defines)
        assert values["LN_EPSILON"] == "1e-12f"

    def test_zero_rows_launch_nothing(self) -> None:
        assert launch(LAYERNORM, TensorInfo((4, 0, 8), "float32")).grid == (0, 1, 1)

    @pytest.mark.parametrize(
        ("inputs", "attributes", "message"),
        [
            ([TensorInfo((2, 8), "int32")], {}, "x is int32"),
            ([TensorInfo((), "float32")], {}, "last axis"),
            ([TensorInfo((2, 0), "float32")], {}, "last axis"),
            ([TensorInfo((2, 8), "float32"), TensorInfo((2, 8), "float32")], {}, "scale"),
            ([TensorInfo((2, 8), "float32"), None, TensorInfo((9,), "float32")], {}, "bias"),
            ([TensorInfo((2, 8), "float32"), TensorInfo((8,), "int64")], {}, "scale is int64"),
            ([TensorInfo((2, 8), "float32")], {"epsilon": "small"}, "epsilon"),
            ([TensorInfo((2, 8), "float32")], {"epsilon": float("nan")}, "epsilon"),
            ([TensorInfo((2**31, 8), "float32")], {}, "rows"),
            ([TensorInfo((2, 2**30 + 1), "float32")], {}, "columns"),
            ([None], {}, "1 to 3 inputs"),
            ([TensorInfo((2, 8), "float32")] * 4, {}, "1 to 3 inputs"),
        ],
    )
    def test_bad_input(self, inputs: list[TensorInfo | None], attributes: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            LAYERNORM.launch_rule()(inputs, inputs[:1], attributes)  # type: ignore[arg-type]

    def test_output_and_skip_must_be_like_x(self) -> None:
        x = TensorInfo((2, 8), "float32")
        with pytest.raises(InputError, match="an output is float16"):
            LAYERNORM.launch_rule()([x], [TensorInfo((2, 8), "float16")], {})
        with pytest.raises(InputError, match="skip"):
            SKIP_LAYERNORM.launch_rule()([x, TensorInfo((1, 8), "float32")], [x, x], {})
        with pytest.raises(InputError, match="two outputs"):
            SKIP_LAYERNORM.launch_rule()([x, x], [x], {})


def dict_of(chosen: Any) -> dict[str, int]:
    names = ("LN_LANES", "LN_GROUPS", "LN_VECTOR", "LN_LONG", "LN_LARGE_ROWS")
    return {name: int(value) for name, value in chosen.defines if name in names}


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 256, 4096, 20000])
@pytest.mark.parametrize("spec", [LAYERNORM, SKIP_LAYERNORM])
def test_compiles(spec: KernelSpec, columns: int, dtype: str) -> None:
    x, parameter = TensorInfo((3, columns), dtype), TensorInfo((columns,), "float32")
    skips = int(spec is SKIP_LAYERNORM)
    chosen = launch(spec, *[x] * (1 + skips), parameter, parameter, outputs=1 + skips)
    ptx = nvrtc.compile_ptx(spec.read_source(), defines=chosen.defines).text
    later = nvrtc.compile_ptx(spec.read_source(), defines=chosen.defines, targets=(90,)).text
    for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        assert (instruction in ptx, instruction in later) == (False, chosen.overlap) == (False, True)
    parameters = ptx.split(f".entry {chosen.entry}(")[1].split(")")[0]
    assert parameters.count(".param .u64") == 4 + 2 * skips
    assert parameters.count(".param .u32") == 1
    assert bool(re.search(r"ld\.global(\.nc)?\.v4", ptx)) == (columns % 8 == 0), "16-byte loads where rows allow them"
    assert ("st.global.cs.v4" in ptx) == (columns % 8 == 0), "outputs are marked as not needed again"
    shared = dict_of(chosen)["LN_LANES"] < 32
    assert ("vote.sync.any" in ptx) == shared, "rows that share a warp shuffle together: a GPU hangs where only some do"


@pytest.mark.usefixtures("needs_nvrtc")
class TestDispatch:
    """Which way a launch takes, on PTX that is edited so that the ways differ; under the emulator alone."""

    @staticmethod
    def compiled(spec: KernelSpec, x: Array) -> tuple[KernelLaunch, str, list[Array], list[TensorInfo]]:
        """The launch for x, as all that the op adds, without parameters; its PTX, its inputs and its outputs."""
        chosen, infos = plain_launch(spec, x.shape, str(x.dtype)), tensors(spec, x.shape, str(x.dtype))
        ptx = nvrtc.compile_ptx(spec.read_source(), defines=chosen.defines).text
        return chosen, ptx, [x] * len(infos), infos

    @pytest.mark.parametrize(
        ("spec", "rows", "marked"), [(LAYERNORM, 31, False), (LAYERNORM, 32, True), (SKIP_LAYERNORM, 32, False)]
    )
    def test_loads_of_large_matrices_are_marked(
        self, monkeypatch: pytest.MonkeyPatch, spec: KernelSpec, rows: int, marked: bool
    ) -> None:
        monkeypatch.setattr(layernorm, "_LARGE_BYTES", 32 * 256 * 4)
        chosen, ptx, inputs, infos = self.compiled(spec, draw(18, (rows, 256), "float32"))
        stops_at_marks = re.sub(r"ld\.global\.cs[^;]*;", "trap;", ptx)
        if marked:
            with pytest.raises(emulator.KernelFault, match="stops the kernel"):
                emulator.run_on_arrays(stops_at_marks, chosen, inputs, infos)
        else:
            y, *_ = emulator.run_on_arrays(stops_at_marks, chosen, inputs, infos)
            assert_close(y, layernorm64(sum(inputs), None, None), "float32")  # type: ignore[arg-type]

    @pytest.mark.parametrize("spec", [LAYERNORM, SKIP_LAYERNORM])
    @pytest.mark.parametrize("mark", ["evict_last", "evict_first"])
    @pytest.mark.parametrize("aligned", [True, False])
    def test_long_rows_are_kept_until_they_are_read_again(self, spec: KernelSpec, mark: str, aligned: bool) -> None:
        chosen, ptx, inputs, infos = self.compiled(spec, draw(20, (2, 2048), "float32"))
        stops_at_marks, found = re.subn(rf"ld\.global\.L1::{mark}[^;]*;", "trap;", ptx)
        assert found
        assert f"createpolicy.fractional.L2::{mark}" in ptx
        if aligned:
            with pytest.raises(emulator.KernelFault, match="stops the kernel"):
                emulator.run_on_arrays(stops_at_marks, chosen, inputs, infos)
        else:
            y, *_ = emulator.run_on_arrays(stops_at_marks, chosen, inputs, infos, offset=4)
            assert_close(y, layernorm64(sum(inputs), None, None), "float32")  # type: ignore[arg-type]

    @pytest.mark.parametrize("moved", range(6))
    def test_one_unaligned_pointer(self, moved: int) -> None:
        """Any of x, skip, scale, bias, y and sum may start anywhere: here one of them an element into its array."""
        shapes = [(5, 64), (5, 64), (64,), (64,), (5, 64), (5, 64)]
        x, skip, scale, bias = arrays = [draw(19 + i, shape, "float32") for i, shape in enumerate(shapes[:4])]
        chosen = launch(SKIP_LAYERNORM, *(TensorInfo(shape, "float32") for shape in shapes[:4]), outputs=2)
        ptx = nvrtc.compile_ptx(SKIP_LAYERNORM.read_source(), defines=chosen.defines).text
        parameter = rf"ld\.param\.u64\s+(%rd\d+), \[skip_layernorm_param_{moved + (moved > 3)}\];"  # the fifth is rows
        ptx, found = re.subn(parameter, r"\g<0> add.s64 \1, \1, 4;", ptx)
        assert found
        given = [np.pad(array.ravel(), (int(i == moved), 0)) for i, array in enumerate(arrays)]
        outputs = [TensorInfo((5 * 64 + (i == moved),), "float32") for i in (4, 5)]
        results = emulator.run_on_arrays(ptx, chosen, given, outputs)
        y, total = (array[-5 * 64 :].reshape(5, 64) for array in results)
        np.testing.assert_array_equal(total, x + skip)
        assert_close(y, layernorm64(total, scale, bias), "float32")


class TestKernel:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "columns",
        [
            *(1, 7, 64, 100, 256, 257, 512, 1024, 2048, 5001, 9001, 20000),
            *(pytest.param(columns, marks=pytest.mark.large) for columns in (2, 32, 255, 768, 1000)),
            *(pytest.param(columns, marks=pytest.mark.large) for columns in (4096, 8191, 8192, 16384)),
        ],
    )
    @pytest.mark.parametrize("rows", [1, 37])
    def test_equals_float64(self, run: Run, dtype: str, columns: int, rows: int) -> None:
        seed = columns * 100 + rows
        x, scale, bias = draw(seed, (rows, columns), dtype), draw(1, (columns,), dtype), draw(2, (columns,), dtype)
        (y,) = run(LAYERNORM, [x, scale, bias], [TensorInfo(x.shape, dtype)], {"epsilon": EPSILON})
        assert_close(y, layernorm64(x, scale, bias), dtype)

    @pytest.mark.parametrize("columns", [16, 256, 257, 1024])
    @pytest.mark.parametrize("spec", SPECS)
    def test_kernels_for_other_rows_give_the_same_bits(self, run: Run, spec: KernelSpec, columns: int) -> None:
        arrays = [draw(24 + i, (37, columns), "float16") for i in range(1 + KERNELS.index(spec))]
        outputs = tensors(spec, (37, columns), "float16")
        own = run(spec, arrays, outputs, {})
        for rows in (1, 700, 200_000, 10**7):
            wide = tensors(spec, (rows, columns), "float16")
            for actual, expected in zip(run(spec, arrays, outputs, {}, made_for=(wide, wide)), own, strict=True):
                np.testing.assert_array_equal(actual, expected)

    @pytest.mark.parametrize("columns", [256, 4096, 20000])
    def test_large_offsets(self, run: Run, columns: int) -> None:
        x = draw(3, (65, columns), "float32", offset=1e4)
        (y,) = run(LAYERNORM, [x], [TensorInfo(x.shape, "float32")], {"epsilon": EPSILON})
        assert_close(y, layernorm64(x, None, None), "float32")

    @pytest.mark.parametrize("columns", [16, 128, 256, 257, 4096, pytest.param(16384, marks=pytest.mark.large), 20000])
    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_outliers_at_the_front(self, run: Run, columns: int, offset: float) -> None:
        """The elements that sums are taken from lie far from all others, in some rows."""
        x = draw(15, (40, columns), "float32", offset)
        x[3, 0], x[10:12, 0], x[20, :4] = 1e6, -1e5, 1e5
        (y,) = run(LAYERNORM, [x], [TensorInfo(x.shape, "float32")], {"epsilon": EPSILON})
        assert_close(y, layernorm64(x, None, None), "float32")

    @pytest.mark.parametrize("columns", [16, 64, 192, 256, 1024])
    def test_a_row_does_not_depend_on_its_neighbours(self, run: Run, columns: int) -> None:
        """Rows that share a warp share its shuffles, and one with outliers at its front needs a second pass."""
        x = draw(23, (40, columns), "float32", 2.5)
        near = x.copy()
        x[::5, :4], x[2::5, 0] = 1e4, np.nan
        results = [run(LAYERNORM, [given], [TensorInfo(x.shape, "float32")], {})[0] for given in (x, near, near[::-1])]
        kept = np.arange(40) % 5 % 2 == 1
        np.testing.assert_array_equal(results[0][kept], results[1][kept])
        np.testing.assert_array_equal(results[2][::-1], results[1], "wherever it lies")

    @pytest.mark.parametrize("value", [0.0, 1e4, 12345.678])
    @pytest.mark.parametrize("columns", [255, 4096, 20000])
    def test_constant_rows_give_zeros(self, run: Run, columns: int, value: float) -> None:
        x = np.full((5, columns), value, np.float32)
        (y,) = run(LAYERNORM, [x], [TensorInfo(x.shape, "float32")], {"epsilon": 1e-12})
        np.testing.assert_array_equal(y, 0)

    @pytest.mark.parametrize("parameter_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
    def test_parameters(self, run: Run, parameter_dtype: str, present: tuple[bool, bool]) -> None:
        x = draw(4, (33, 256), "float16")
        scale = draw(5, (256,), parameter_dtype) if present[0] else None
        bias = draw(6, (256,), parameter_dtype) if present[1] else None
        (y,) = run(LAYERNORM, [x, scale, bias], [TensorInfo(x.shape, "float16")], {"epsilon": 0.1})
        assert_close(y, layernorm64(x, scale, bias, 0.1), "float16")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("columns", [24, 256, 257, 1024, 1544, pytest.param(4096, marks=pytest.mark.large), 20000])
    @pytest.mark.parametrize("offset", [0, 4])
    def test_skip(self, run: Run, dtype: str, columns: int, offset: int) -> None:
        x, skip = draw(7, (35, columns), dtype), draw(8, (35, columns), dtype)
        scale, bias = draw(9, (columns,), dtype), draw(10, (columns,), dtype)
        outputs = [TensorInfo(x.shape, dtype)] * 2
        y, total = run(SKIP_LAYERNORM, [x, skip, scale, bias], outputs, {"epsilon": EPSILON}, offset=offset)
        np.testing.assert_array_equal(total, (x.astype(np.float32) + skip.astype(np.float32)).astype(DTYPES[dtype]))
        assert_close(y, layernorm64(total, scale, bias), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("columns", [256, 768, 1024, 1028])
    def test_a_matrix_that_no_cache_holds(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, dtype: str, columns: int
    ) -> None:
        """Loads then tell the caches so; here the limit is a byte, since such a matrix takes long to emulate."""
        monkeypatch.setattr(layernorm, "_LARGE_BYTES", 1)
        x, skip = draw(16, (21, columns), dtype), draw(17, (21, columns), dtype)
        scale, bias = draw(21, (columns,), dtype), draw(22, (columns,), dtype)
        y, total = run(SKIP_LAYERNORM, [x, skip, scale, bias], [TensorInfo(x.shape, dtype)] * 2, {"epsilon": EPSILON})
        assert_close(y, layernorm64(total, scale, bias), dtype)
        (large,) = run(LAYERNORM, [x, scale, bias], [TensorInfo(x.shape, dtype)], {"epsilon": EPSILON})
        assert_close(large, layernorm64(x, scale, bias), dtype)
        monkeypatch.undo()
        (small,) = run(LAYERNORM, [x, scale, bias], [TensorInfo(x.shape, dtype)], {"epsilon": EPSILON})
        np.testing.assert_array_equal(large, small, "the way that a matrix takes changes no bit")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("columns", [256, 2048, 20000])
    def test_unaligned_pointers(self, run: Run, dtype: str, columns: int) -> None:
        x, scale = draw(11, (9, columns), dtype), draw(12, (columns,), dtype)
        (y,) = run(LAYERNORM, [x, scale], [TensorInfo(x.shape, dtype)], {}, offset=np.dtype(DTYPES[dtype]).itemsize)
        assert_close(y, layernorm64(x, scale, None), dtype)

    @pytest.mark.parametrize("columns", [8, 64, 256, 4096, 20000])
    def test_nan_and_infinity_stay_in_their_rows(self, run: Run, columns: int) -> None:
        x = draw(13, (40, columns), "float16")
        x[3, 1], x[17, columns - 1], x[39, 0] = np.nan, np.inf, -np.inf
        (y,) = run(LAYERNORM, [x], [TensorInfo(x.shape, "float16")], {})
        ill = np.zeros(40, bool)
        ill[[3, 17, 39]] = True
        assert np.isnan(y[ill]).all()
        assert_close(y[~ill], layernorm64(x[~ill], None, None), "float16")

    def test_leading_axes_and_zero_rows(self, run: Run) -> None:
        x = draw(14, (2, 3, 5, 256), "float32")
        (y,) = run(LAYERNORM, [x], [TensorInfo(x.shape, "float32")], {})
        assert_close(y, layernorm64(x, None, None), "float32")
        (empty,) = run(LAYERNORM, [x[:0]], [TensorInfo((0, 3, 5, 256), "float32")], {})
        assert empty.shape == (0, 3, 5, 256)
