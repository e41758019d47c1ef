"""The launch rule of row-column decoupled attention, and the kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optframe.errors import InputError
from optframe.types import KernelLaunch, TensorInfo
from optframe_anchordetr.kernels import RCDA
from optframe_anchordetr.kernels.rcda import SHARED_BYTES
from optframe_anchordetr.ops import RCDA as OP
from optframe_trt import dims, kernels, nvrtc

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "tf32": np.float32}
"""Kinds of arithmetic and the dtypes of their arrays: TF32 is float32 whose factors are rounded."""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-11}


@dataclass(frozen=True)
class Size:
    images: int
    queries: int
    height: int
    width: int
    heads: int = 2
    head_size: int = 32

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    @property
    def out(self) -> tuple[int, int, int]:
        return self.images, self.queries, self.channels

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        n, h, w, c = self.images, self.height, self.width, self.channels
        return [self.out, self.out, (n, w, c), (n, h, c), (n, h, w, c)]


def dtype_of(kind: str) -> str:
    return str(np.dtype(KINDS[kind]))


def attributes_of(size: Size, kind: str) -> dict[str, object]:
    return {"num_heads": size.heads, **({"allow_tf32": 1} if kind == "tf32" else {})}


def factors(array: Array, kind: str) -> Array:
    """What is multiplied: in TF32 the nearest number of 11 bits, and of two the one away from zero."""
    if kind != "tf32":
        return array
    bits = (array.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.asarray(bits.view(np.float32))


def draw(seed: int, size: Size, kind: str) -> list[Array]:
    """Inputs whose scores have a deviation of about 2, so that softmaxes are neither flat nor one key alone."""
    rng = np.random.default_rng(seed)
    spread = 1.4 * size.head_size**-0.25
    factors = (spread, spread, spread, spread, 1.0)
    pairs = zip(size.shapes, factors, strict=True)
    return [(rng.standard_normal(shape) * factor).astype(KINDS[kind]) for shape, factor in pairs]


def softmax64(queries: Array, keys: Array, mask: Array | None, heads: int) -> Array:
    """Attention (N, heads, L, keys) in float64."""
    split = [a.astype(np.float64).reshape(*a.shape[:2], heads, -1) for a in (queries, keys)]
    scores = np.einsum("nlhd,nkhd->nhlk", *split)
    if mask is not None:
        scores = np.where(mask[:, None, None, :], -np.inf, scores)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def rcda64(
    arrays: list[Array], heads: int, kind: str, row_mask: Array | None = None, column_mask: Array | None = None
) -> Array:
    """(out, the same for absolute values of v) in float64."""
    arrays = [factors(array, kind) for array in arrays]
    row = softmax64(arrays[0], arrays[2], row_mask, heads)
    column = softmax64(arrays[1], arrays[3], column_mask, heads)
    v = arrays[4].astype(np.float64).reshape(*arrays[4].shape[:3], heads, -1)
    both = [np.einsum("nhly,nhlyd->nlhd", column, np.einsum("nhlx,nyxhd->nhlyd", row, u)) for u in (v, np.abs(v))]
    return np.stack([part.reshape(arrays[0].shape) for part in both])


def assert_close(actual: Array, expected: Array, kind: str) -> None:
    """Row weights and their sum are rounded as factors are, column weights to float16, the result to its dtype; the
    rest is float32 arithmetic, where no weight is rounded."""
    out, magnitude = expected
    weights = 0.0 if kind == "float32" else 2 * UNIT_ROUNDOFF[kind] + 2 * UNIT_ROUNDOFF["float16"]
    tolerance = weights * magnitude + UNIT_ROUNDOFF[dtype_of(kind)] * np.abs(out) + 64 * 2.0**-24 * magnitude
    error = np.abs(actual.astype(np.float64) - out)
    assert (error <= tolerance).all(), f"largest error {error.max()}, {(error / tolerance).max():.1f} of the tolerance"


def infos(size: Size, kind: str) -> list[TensorInfo]:
    return [TensorInfo(shape, dtype_of(kind)) for shape in size.shapes]


def outputs(size: Size, kind: str) -> list[TensorInfo]:
    return [TensorInfo(size.out, dtype_of(kind))]


def launch(size: Size, kind: str, *masks: TensorInfo | None) -> KernelLaunch:
    inputs = [*infos(size, kind), *masks]
    return RCDA.launch_rule()(inputs, outputs(size, kind), attributes_of(size, kind))  # type: ignore[arg-type]


def reused(size: Size, kind: str, kernel: KernelLaunch) -> KernelLaunch:
    rule = RCDA.reuse_rule()
    assert rule is not None
    return rule(infos(size, kind), outputs(size, kind), attributes_of(size, kind), kernel.defines)


def warps(chosen: KernelLaunch) -> int:
    return chosen.block[0] // 32


def queries_of_warp(chosen: KernelLaunch) -> int:
    given = defines(chosen)
    return int(given.get("RCDA_QUERIES", 0)) or int(given["RCDA_TILES"]) * 16


def defines(chosen: KernelLaunch) -> dict[str, str]:
    return dict(chosen.defines)


class TestLaunchRule:
    @pytest.mark.parametrize(("height", "width"), [(50, 67), (67, 50), (84, 84), (1, 1), (25, 192), (120, 20)])
    @pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
    def test_tensor_cores_within_plain_shared_memory(self, height: int, width: int, kind: str) -> None:
        if kind == "tf32" and width > 84:
            pytest.skip("rows of V take twice the shared memory")
        chosen = launch(Size(1, 900, height, width, heads=8), kind)
        assert defines(chosen)["RCDA_TENSOR_CORES"] == "1"
        assert int(defines(chosen)["RCDA_WIDTH_GROUPS"]) * 8 >= width
        assert chosen.shared_bytes <= SHARED_BYTES
        assert chosen.extras == (900, height, width)

    @pytest.mark.parametrize(
        ("size", "kind"),
        [
            (Size(1, 10, 50, 67), "float32"),
            (Size(1, 10, 50, 67, head_size=40), "float16"),
            (Size(1, 10, 50, 67, head_size=40), "tf32"),
            (Size(1, 10, 25, 192), "tf32"),
            (Size(1, 10, 50, 300), "float16"),
            (Size(1, 10, 800, 30), "float16"),
        ],
    )
    def test_the_general_path_takes_the_rest(self, size: Size, kind: str) -> None:
        chosen = launch(size, kind)
        assert defines(chosen)["RCDA_TENSOR_CORES"] == "0"
        assert chosen.shared_bytes <= SHARED_BYTES

    def test_one_general_kernel_does_all_shapes_of_a_profile(self) -> None:
        sizes = [Size(n, q, h, w, heads=8) for n, q, h, w in ((1, 640, 20, 32), (1, 3350, 50, 67), (4, 7056, 84, 84))]
        launches = [launch(size, "float32") for size in sizes]
        assert len({chosen.defines for chosen in launches}) == 1
        for size, chosen in zip(sizes, launches, strict=True):
            queries = warps(chosen) * queries_of_warp(chosen)
            assert chosen.grid == (-(-size.queries // queries), size.heads, size.images)

    @pytest.mark.parametrize(("height", "width", "queries"), [(300, 400, "16"), (700, 500, "8")])
    def test_high_maps_leave_room_in_shared_memory(self, height: int, width: int, queries: str) -> None:
        chosen = launch(Size(1, 900, height, width, heads=8), "float32")
        assert defines(chosen)["RCDA_QUERIES"] == queries
        assert chosen.block[0] >= 32
        assert chosen.shared_bytes <= SHARED_BYTES

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_kernel_of_the_largest_map_does_all(self, kind: str) -> None:
        largest = Size(4, 7056, 84, 84, heads=8)
        kernel = launch(largest, kind)
        for size in (largest, Size(1, 3350, 50, 67, heads=8), Size(1, 900, 20, 32, heads=8), Size(2, 1, 1, 1, heads=8)):
            chosen = reused(size, kind, kernel)
            assert chosen.defines == kernel.defines
            assert (chosen.block, chosen.extras) == (kernel.block, (size.queries, size.height, size.width))
            assert chosen.grid[0] * warps(chosen) * queries_of_warp(chosen) >= size.queries
            assert chosen.shared_bytes <= kernel.shared_bytes
        assert reused(largest, kind, kernel) == kernel

    @pytest.mark.parametrize("largest", [Size(4, 7056, 84, 84, heads=8), Size(4, 900, 300, 400, heads=8)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_launches_are_expressions_of_dimensions(self, kind: str, largest: Size) -> None:
        """Those of the kernel for all shapes of a profile, also where it is the best for the optimal ones."""
        attributes, kernel = attributes_of(largest, kind), launch(largest, kind)
        shapes = [(None, None, 256)] * 4 + [(None, None, None, 256)]

        def rule(known: list[tuple[int, ...]]) -> KernelLaunch:
            given = [TensorInfo(shape, dtype_of(kind)) for shape in known]
            return kernels.reuse_launch(OP, (given, OP.infer(given, attributes)), attributes, kernel)

        for optimal in (largest, Size(1, 7, 5, 9, heads=8)):
            traced = dims.trace(rule, shapes, optimal.shapes)
            for size in (largest, Size(1, 1, 1, 1, heads=8), Size(3, 77, 30, 50, heads=8)):
                wanted = reused(size, kind, kernel)
                found = [traced.grid, traced.block, (traced.shared_bytes,), traced.extras]
                values = [tuple(dims.evaluate(dim, size.shapes) for dim in part) for part in found]
                assert values == [wanted.grid, wanted.block, (wanted.shared_bytes,), wanted.extras]

    @pytest.mark.parametrize(
        ("kind", "made", "asked", "message"),
        [
            ("float16", (50, 67), (50, 73), "50 x 73 is too large"),
            ("float16", (50, 67), (300, 67), "300 x 67 is too large"),
            ("float32", (50, 67), (150, 67), "150 x 67 is too large"),
            ("tf32", (50, 67), (50, 73), "50 x 73 is too large"),
            ("tf32", (50, 67), (100, 67), "100 x 67 is too large"),
        ],
    )
    def test_a_kernel_does_no_larger_maps(
        self, kind: str, made: tuple[int, int], asked: tuple[int, int], message: str
    ) -> None:
        kernel = launch(Size(1, 900, *made, heads=8), kind)
        with pytest.raises(InputError, match=message):
            reused(Size(1, 900, *asked, heads=8), kind, kernel)

    def test_a_kernel_does_no_other_tensors(self) -> None:
        kernel = launch(Size(1, 900, 50, 67, heads=8), "float16")
        for size, kind in ((Size(1, 900, 50, 67, heads=8), "bfloat16"), (Size(1, 900, 50, 67, heads=4), "float16")):
            with pytest.raises(InputError, match="one for other tensors or heads"):
                reused(size, kind, kernel)
        with pytest.raises(InputError, match="one for other tensors or heads"):
            reused(Size(1, 900, 50, 67, heads=8), "float16", KernelLaunch("rcda", (), (1, 1, 1), (1, 1, 1)))
        with pytest.raises(InputError, match="one for other tensors or heads"):
            reused(Size(1, 900, 50, 67, heads=8), "float32", launch(Size(1, 900, 50, 67, heads=8), "tf32"))

    @pytest.mark.parametrize("wrong", [2, -1, "yes", None])
    def test_bad_allow_tf32(self, wrong: object) -> None:
        size = Size(1, 9, 6, 7)
        with pytest.raises(InputError, match="but must be 0 or 1"):
            RCDA.launch_rule()(infos(size, "float32"), outputs(size, "float32"), {"num_heads": 2, "allow_tf32": wrong})

    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    def test_tf32_is_no_matter_of_16_bits(self, kind: str) -> None:
        size = Size(1, 900, 50, 67, heads=8)
        allowed = RCDA.launch_rule()(infos(size, kind), outputs(size, kind), {"num_heads": 8, "allow_tf32": 1})
        assert allowed == launch(size, kind)

    def test_few_queries_get_small_blocks(self) -> None:
        few, many = (launch(Size(1, queries, 50, 67, heads=8), "float16") for queries in (900, 3350))
        assert (defines(few)["RCDA_TILES"], defines(many)["RCDA_TILES"]) == ("1", "2")
        assert (few.grid, many.grid) == ((15, 8, 1), (27, 8, 1))

    @pytest.mark.parametrize("size", [Size(3, 1000, 50, 67, heads=8), Size(1, 5, 3, 4), Size(1, 900, 84, 84, heads=8)])
    def test_blocks_cover_the_queries(self, size: Size) -> None:
        chosen = launch(size, "float16")
        queries = warps(chosen) * queries_of_warp(chosen)
        assert chosen.grid == (-(-size.queries // queries), size.heads, size.images)

    @pytest.mark.parametrize("size", [Size(1, 0, 5, 5), Size(0, 4, 5, 5)])
    def test_nothing_to_launch(self, size: Size) -> None:
        assert 0 in launch(size, "float16").grid

    @pytest.mark.parametrize(
        ("position", "wrong", "message"),
        [
            (0, TensorInfo((1, 9, 65), "float16"), "q_row"),
            (1, TensorInfo((1, 8, 64), "float16"), "q_col"),
            (2, TensorInfo((1, 6, 64), "float16"), "k_row"),
            (3, TensorInfo((1, 7, 64), "float16"), "k_col"),
            (3, TensorInfo((1, 6, 64), "float32"), "k_col is float32"),
            (4, TensorInfo((1, 6, 7), "float16"), "v is float16"),
            (4, TensorInfo((1, 6, 6, 64), "float16"), "v has 36 rows"),
            (2, TensorInfo((7, 64), "float16"), "k_row has shape"),
            (4, TensorInfo((1, 6, 7, 64), "int32"), "v is int32"),
            (5, TensorInfo((1, 6), "bool"), "row mask"),
            (5, TensorInfo((1, 7), "int32"), "row mask"),
            (6, TensorInfo((1, 7), "bool"), "column mask"),
        ],
    )
    def test_bad_tensors(self, position: int, wrong: TensorInfo, message: str) -> None:
        size = Size(1, 9, 6, 7)
        inputs = [*infos(size, "float16"), TensorInfo((1, 7), "bool"), TensorInfo((1, 6), "bool")]
        inputs[position] = wrong
        with pytest.raises(InputError, match=message):
            RCDA.launch_rule()(inputs, [TensorInfo(size.out, "float16")], {"num_heads": 2})

    def test_rows_may_have_any_axes(self) -> None:
        size = Size(2, 12, 5, 7, heads=8)
        given = infos(size, "float16")
        for index, shape in ((0, (24, 256)), (1, (24, 256)), (4, (70, 256))):
            given[index] = TensorInfo(shape, "float16")
        chosen = RCDA.launch_rule()(given, [given[0]], {"num_heads": 8})
        assert chosen == launch(size, "float16")

    def test_images_share_the_rows(self) -> None:
        given = infos(Size(2, 12, 5, 7), "float16")
        given[0] = given[1] = TensorInfo((25, 64), "float16")
        with pytest.raises(InputError, match="25 rows, which 2 images cannot share"):
            RCDA.launch_rule()(given, [given[0]], {"num_heads": 2})

    @pytest.mark.parametrize("heads", [None, 0, 3, "2"])
    def test_bad_heads(self, heads: object) -> None:
        size = Size(1, 9, 6, 7)
        with pytest.raises(InputError, match="num_heads"):
            RCDA.launch_rule()(infos(size, "float16"), [TensorInfo(size.out, "float16")], {"num_heads": heads})

    def test_too_large(self) -> None:
        with pytest.raises(InputError, match="1536"):
            launch(Size(1, 9, 1500, 37), "float32")


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "instruction"),
    [
        ("float16", "m16n8k16.row.col.f32.f16"),
        ("bfloat16", "m16n8k16.row.col.f32.bf16"),
        ("tf32", "m16n8k8.row.col.f32.tf32"),
        ("float32", "fma.rn.f32"),
    ],
)
def test_compiles(kind: str, instruction: str, masked: bool) -> None:
    masks = (TensorInfo((1, 67), "bool"), TensorInfo((1, 50), "bool")) if masked else ()
    chosen = launch(Size(1, 900, 50, 67, heads=8), kind, *masks)
    ptx = nvrtc.compile_ptx(RCDA.read_source(), defines=chosen.defines).text
    parameters = ptx.split(".entry rcda(")[1].split(")")[0]
    assert parameters.count(".param .u64") == 6 + len(masks)
    assert parameters.count(".param .u32") == 3
    assert instruction in ptx


class TestKernel:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "size",
        [
            pytest.param(Size(1, 900, 50, 67), marks=pytest.mark.large),
            pytest.param(Size(2, 3350, 50, 67, heads=3), marks=pytest.mark.large),
            Size(2, 130, 67, 50),
            pytest.param(Size(1, 257, 84, 84), marks=pytest.mark.large),
            Size(1, 1, 1, 1),
            Size(3, 17, 2, 9, heads=1),
            Size(1, 65, 9, 100),
            Size(1, 20, 5, 192),
            pytest.param(Size(1, 20, 120, 20), marks=pytest.mark.large),
            Size(1, 21, 12, 201),
            Size(1, 40, 13, 11, head_size=40),
            Size(1, 40, 13, 11, head_size=7),
        ],
    )
    def test_equals_float64(self, run: Run, size: Size, kind: str) -> None:
        arrays = draw(size.queries, size, kind)
        (out,) = run(RCDA, arrays, outputs(size, kind), attributes_of(size, kind))
        assert_close(out, rcda64(arrays, size.heads, kind), kind)

    @pytest.mark.parametrize("key", [0, 1])
    def test_tf32_rounds_values_to_the_nearest(self, run: Run, key: int) -> None:
        size = Size(1, 20, 1, 2)
        arrays = draw(6, size, "tf32")
        mask = np.arange(2)[None] != key  # all the weight is on one key
        (out,) = run(RCDA, [*arrays, mask], outputs(size, "tf32"), attributes_of(size, "tf32"))
        wanted = factors(arrays[4], "tf32")[:, 0, key : key + 1]
        np.testing.assert_array_equal(out, np.broadcast_to(wanted, out.shape))

    @pytest.mark.parametrize("operand", ["queries", "keys"])
    def test_tf32_rounds_scores_factors_to_the_nearest(self, run: Run, operand: str) -> None:
        """Channels in two halves, and a key for each: the factors there, and what they round to, give equal scores."""
        size = Size(1, 20, 1, 2, heads=1)
        rng = np.random.default_rng(7)
        arrays = [np.zeros(shape, np.float32) for shape in size.shapes]
        factor = rng.uniform(4, 8, (16, 2)).astype(np.float32)
        exact = factors(factor, "tf32")
        queries, keys = arrays[0], arrays[2]
        queries[:, :, :16], keys[:, 0, :16] = (factor[:, 0], exact[:, 1]) if operand == "queries" else exact.T
        queries[:, :, 16:], keys[:, 1, 16:] = exact.T
        if operand == "keys":
            keys[:, 0, :16] = factor[:, 1]
        arrays[4][:, 0, 0] = 1
        (out,) = run(RCDA, arrays, outputs(size, "tf32"), attributes_of(size, "tf32"))
        # Sums of 16 products of some 600 in all; truncated factors would leave 0.46 of the weight.
        assert (np.abs(out - 0.5) <= 600 * 16 * 2.0**-24 / 4 + 2.0**-11).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("largest", [Size(1, 900, 84, 84), Size(4, 3000, 13, 84), Size(1, 900, 9, 190)])
    @pytest.mark.parametrize("size", [Size(1, 65, 9, 84), Size(2, 33, 5, 67), Size(1, 17, 9, 20), Size(1, 130, 1, 1)])
    def test_a_kernel_made_for_larger_maps(self, run: Run, size: Size, largest: Size, kind: str) -> None:
        arrays = draw(size.width, size, kind)
        made_for = infos(largest, kind), outputs(largest, kind)
        (out,) = run(RCDA, arrays, outputs(size, kind), attributes_of(size, kind), made_for=made_for)
        assert_close(out, rcda64(arrays, size.heads, kind), kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_masks_of_a_kernel_made_for_larger_maps(self, run: Run, kind: str) -> None:
        size, largest = Size(2, 40, 9, 20), Size(2, 900, 84, 84)
        arrays = draw(1, size, kind)
        masks = [np.arange(20) >= np.array([[20], [13]]), np.arange(9) >= np.array([[3], [9]])]
        wide = [TensorInfo((2, 84), "bool")] * 2
        made_for = [*infos(largest, kind), *wide], outputs(largest, kind)
        (out,) = run(RCDA, [*arrays, *masks], outputs(size, kind), attributes_of(size, kind), made_for=made_for)
        assert_close(out, rcda64(arrays, 2, kind, *masks), kind)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
    def test_masks(self, run: Run, kind: str, present: tuple[bool, bool]) -> None:
        size = Size(2, 70, 21, 30)
        arrays = draw(1, size, kind)
        row_mask = np.arange(30) >= np.array([[30], [13]]) if present[0] else None
        column_mask = np.arange(21) >= np.array([[8], [21]]) if present[1] else None
        inputs = [*arrays, row_mask, column_mask]
        (out,) = run(RCDA, inputs, outputs(size, kind), attributes_of(size, kind))
        assert_close(out, rcda64(arrays, 2, kind, row_mask, column_mask), kind)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("axis", ["row", "column"])
    def test_all_masked_gives_nan_in_its_image(self, run: Run, kind: str, axis: str) -> None:
        size = Size(2, 40, 12, 18)
        arrays = draw(2, size, kind)
        mask = np.zeros((2, 18 if axis == "row" else 12), bool)
        mask[1] = True
        masks = [mask, None] if axis == "row" else [None, mask]
        (out,) = run(RCDA, [*arrays, *masks], outputs(size, kind), attributes_of(size, kind))
        assert np.isnan(out[1].astype(np.float32)).all()
        assert_close(out[0], rcda64(arrays, 2, kind)[:, 0], kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_nan_and_infinity_stay_where_they_belong(self, run: Run, kind: str) -> None:
        size = Size(1, 70, 12, 18)
        arrays = draw(3, size, kind)
        arrays[0][0, 5, 3] = np.nan  # query 5, head 0
        arrays[1][0, 33, 40] = np.inf  # query 33, head 1
        arrays[4][0, 2, 17, 63] = np.nan  # channel 63
        (out,) = run(RCDA, arrays, outputs(size, kind), attributes_of(size, kind))
        ill = np.zeros(size.out, bool)
        ill[0, 5, :32] = ill[0, 33, 32:] = ill[..., 63] = True
        np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), ill)
        clean = [np.where(np.isfinite(a.astype(np.float32)), a, 0).astype(a.dtype) for a in arrays]
        expected = rcda64(clean, 2, kind)
        assert_close(out[~ill], expected[:, ~ill], kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_unaligned_pointers(self, run: Run, kind: str) -> None:
        size = Size(1, 70, 12, 18)
        arrays = draw(4, size, kind)
        offset = np.dtype(KINDS[kind]).itemsize
        (out,) = run(RCDA, arrays, outputs(size, kind), attributes_of(size, kind), offset=offset)
        assert_close(out, rcda64(arrays, 2, kind), kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_large_scores_and_values(self, run: Run, kind: str) -> None:
        size = Size(1, 70, 12, 18)
        arrays = draw(5, size, kind)
        arrays[0] *= 8  # scores of 20 and more: softmaxes close to one key
        arrays[4] = (arrays[4].astype(np.float32) + 1e4).astype(KINDS[kind])
        (out,) = run(RCDA, arrays, outputs(size, kind), attributes_of(size, kind))
        assert_close(out, rcda64(arrays, 2, kind), kind)
