"""Measures the CUDA kernels of Anchor DETR beside their peers; see README.md for the method."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from torch import Tensor

from optframe.cuda import launches_overlap
from optframe.types import Defines, KernelLaunch, KernelSpec, TensorInfo
from optframe_anchordetr.kernels import LAYERNORM, RCDA
from optframe_trt import driver, nvrtc

EPSILON = 1e-5
HEADS, HEAD_SIZE = 8, 32

LAYERNORM_SIZES = (
    (900, 256),
    (3350, 256),
    (32768, 256),
    (262144, 256),
    (32768, 512),
    (32768, 1024),
    (32768, 4096),
)
COLD_SIZES = ((900, 256), (3350, 256))
RCDA_KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
RCDA_SIZES = ((3350, 50, 67), (900, 50, 67), (7056, 84, 84), (900, 84, 84), (1600, 40, 40))


@cache
def _kernel(source: str, entry: str, defines: Defines) -> driver.Kernel:
    targets = (driver.compute_capability(),)
    return driver.Kernel(nvrtc.compile_ptx(source, defines=defines, targets=targets).text, entry)


class Prepared:
    """A kernel with its launch, called on tensors on torch's current stream."""

    def __init__(self, source: str, launch: KernelLaunch) -> None:
        self.kernel = _kernel(source, launch.entry, launch.defines)
        self.launch = launch

    @classmethod
    def of_op(
        cls, spec: KernelSpec, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **attributes: object
    ) -> Prepared:
        launch = spec.launch_rule()([_info(t) for t in inputs], [_info(t) for t in outputs], attributes)
        return cls(spec.read_source(), launch)

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self.kernel(self.launch, [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs], stream)


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _random(sets: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(shape, device="cuda", dtype=dtype) * scale for _ in range(sets)]


def require_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """A figure of a kernel that computes something else is worth nothing."""
    error = (actual.double() - expected).norm() / expected.norm()
    if not error <= tolerance:
        raise SystemExit(f"the kernel is wrong: relative error {error:.1e}")


def _copy(words: int, x: Tensor, y: Tensor) -> Prepared:
    count = x.numel() * x.element_size() // 16
    defines = (("COPY_WORDS", str(words)),)
    launch = KernelLaunch("copy", defines, (-(-count // (256 * words)), 1, 1), (256, 1, 1), 0, (count,), overlap=True)
    return Prepared((Path(__file__).parent / "copy.cu").read_text(), launch)


def _torch_layernorm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)


def layernorm_peers(
    xs: Sequence[Tensor], ys: Sequence[Tensor], scale: Tensor, bias: Tensor
) -> dict[str, Callable[[int], Any]]:
    """Return copies of x, and layer normalisation by PyTorch, torch.compile and Triton, of buffer set i."""
    import triton_layernorm

    copies = {words: _copy(words, xs[0], ys[0]) for words in (1, 4)}
    torch.compiler.reset()
    compiled = torch.compile(_torch_layernorm, dynamic=False, mode="max-autotune-no-cudagraphs")
    overlapping: dict[str, Callable[[int], Any]] = {}
    if launches_overlap(driver.compute_capability()):
        for name, form in triton_layernorm.overlapping(xs[0].shape[1]).items():
            overlapping[f"triton_overlapping {name}"] = lambda i, form=form: form(xs[i], scale, bias, ys[i], EPSILON)
    return {
        "copy 1": lambda i: copies[1]([xs[i]], [ys[i]]),
        "copy 4": lambda i: copies[4]([xs[i]], [ys[i]]),
        "copy torch": lambda i: ys[i].copy_(xs[i]),
        "torch_us": lambda i: _torch_layernorm(xs[i], scale, bias),
        "compile_us": lambda i: compiled(xs[i], scale, bias),
        "triton_us": lambda i: triton_layernorm.layernorm(xs[i], scale, bias, ys[i], EPSILON),
        **overlapping,
    }


def layernorm_row(rows: int, columns: int, dtype: torch.dtype, *, cold: bool) -> dict[str, Any]:
    """Time layer normalisation of (rows, columns) and its peers."""
    import timing

    sets = timing.buffer_sets(2 * rows * columns * dtype.itemsize, cold=cold)
    xs = _random(sets, rows, columns, dtype=dtype)
    ys = [torch.full_like(x, torch.nan) for x in xs]
    scale, bias = _random(2, columns, dtype=dtype)
    ours = Prepared.of_op(LAYERNORM, [xs[0], scale, bias], [ys[0]], epsilon=EPSILON)
    ours([xs[0], scale, bias], [ys[0]])
    expected = _torch_layernorm(xs[0].double(), scale.double(), bias.double())
    require_close(ys[0], expected, 1e-6 if dtype == torch.float32 else 1e-3)
    del expected
    peers = layernorm_peers(xs, ys, scale, bias)
    times = timing.median_us({"us": lambda i: ours([xs[i], scale, bias], [ys[i]]), **peers}, sets)
    for best in ("copy", "triton_overlapping"):
        found = [time for name, time in times.items() if name.startswith(f"{best} ")]
        if found:
            times[f"{best}_us"] = min(found)
    fields = ("us", "copy_us", "torch_us", "compile_us", "triton_us", "triton_overlapping_us")
    return {
        "rows": rows,
        "columns": columns,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: round(times[name], 3) for name in fields if name in times},
    }


def _show_layernorm(row: dict[str, Any]) -> None:
    us, peers = row["us"], {name: row[f"{name}_us"] for name in ("torch", "compile", "triton")}
    overlapping = row.get("triton_overlapping_us")
    moved = 2 * row["rows"] * row["columns"] * (4 if row["dtype"] == "float32" else 2)
    print(
        f"{row['rows']:>7} x {row['columns']:<5} {row['dtype']:<9} {us:>8.2f} us {moved / us / 1e3:>6.0f} GB/s",
        f"{100 * row['copy_us'] / us:>4.0f} % of copy ({row['copy_us']:.2f} us)",
        *(f"{name} {time:.2f}" for name, time in peers.items()),
        f"{min(peers.values()) / us:.3f} x the best peer",
        *([f"{overlapping / us:.3f} x Triton with overlapping launches ({overlapping:.2f})"] if overlapping else []),
        flush=True,
    )


def layernorm_table(sizes: Sequence[tuple[int, int]], *, cold: bool) -> list[dict[str, Any]]:
    table = []
    for rows, columns in sizes:
        for dtype in (torch.float32, torch.float16):
            table.append(layernorm_row(rows, columns, dtype, cold=cold))
            _show_layernorm(table[-1])
            torch.cuda.empty_cache()
    return table


def _split_heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, HEADS, HEAD_SIZE).transpose(1, 2)


def rcda_reference(q_row: Tensor, q_col: Tensor, k_row: Tensor, k_col: Tensor, v: Tensor) -> Tensor:
    """The reference sequence of ops: two softmaxes, then one sum, materialised, and the other."""
    row = (_split_heads(q_row) @ _split_heads(k_row).mT).softmax(-1)
    column = (_split_heads(q_col) @ _split_heads(k_col).mT).softmax(-1)
    n, h, w, _ = v.shape
    values = v.reshape(n, h, w, HEADS, HEAD_SIZE).permute(0, 3, 1, 2, 4)
    first, second = column, row
    if h < w:
        first, second, values = row, column, values.transpose(2, 3)
    partial = first @ values.flatten(3)
    partial = partial.unflatten(3, values.shape[3:])
    return (second.unsqueeze(3) @ partial).squeeze(3).transpose(1, 2).flatten(2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def rcda_row(queries: int, height: int, width: int, kind: str) -> dict[str, Any]:
    """Time row-column decoupled attention, the reference's ops, and flash attention over as many keys.

    `kind` is the dtype, or "tf32": float32 whose factors may be rounded, by our kernel and by the reference's ops.
    """
    import timing

    channels, sets = HEADS * HEAD_SIZE, 8
    dtype, tf32 = RCDA_KINDS[kind], kind == "tf32"
    shapes = ((queries,), (queries,), (width,), (height,), (height, width))
    scales = (0.5, 0.5, 0.5, 0.5, 1.0)
    inputs = [_random(sets, 1, *shape, channels, dtype=dtype, scale=s) for shape, s in zip(shapes, scales, strict=True)]
    outs = [torch.full((1, queries, channels), torch.nan, device="cuda", dtype=dtype) for _ in range(sets)]
    given = [[tensors[i] for tensors in inputs] for i in range(sets)]
    ours = Prepared.of_op(RCDA, given[0], [outs[0]], num_heads=HEADS, allow_tf32=int(tf32))
    ours(given[0], [outs[0]])
    tolerance = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "tf32": 3e-3}[kind]  # TF32 rounds the inputs, too
    require_close(outs[0], rcda_reference(*(t.double() for t in given[0])), tolerance)
    calls: dict[str, Any] = {
        "us": lambda i: ours(given[i], [outs[i]]),
        "reference_us": lambda i: rcda_reference(*given[i]),
    }
    if dtype != torch.float32:  # flash attention has no float32
        q, k, v = (
            [_split_heads(x).contiguous() for x in _random(sets, 1, length, channels, dtype=dtype)]
            for length in (queries, height * width, height * width)
        )
        calls["flash_us"] = lambda i: _flash(q[i], k[i], v[i])
    torch.backends.cuda.matmul.allow_tf32 = tf32
    times = timing.median_us(calls, sets)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {
        "queries": queries,
        "height": height,
        "width": width,
        "dtype": kind,
        **{name: round(times[name], 2) if name in times else None for name in ("us", "reference_us", "flash_us")},
    }


def rcda_table() -> list[dict[str, Any]]:
    table = []
    problems = [(size, kind) for kind in ("float16", "bfloat16", "tf32") for size in RCDA_SIZES]
    for size, kind in [*problems, (RCDA_SIZES[0], "float32")]:
        table.append(rcda_row(*size, kind))
        row = table[-1]
        flash = f"flash {row['flash_us']:.1f}" if row["flash_us"] else "no flash attention"
        print(
            f"{row['queries']:>6} queries {row['height']}x{row['width']} {row['dtype']:<9} {row['us']:>7.2f} us"
            f" reference {row['reference_us']:.1f} {flash}",
            flush=True,
        )
        torch.cuda.empty_cache()
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("layernorm", "rcda"), help="measure one table")
    parser.add_argument("--results", type=Path, help="the JSON file to put tables into (default: results/<card>.json)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU is available to torch: nothing was measured")
        return 0
    path = arguments.results or results.default_path()
    torch.manual_seed(0)
    compiler = nvrtc.compile_ptx("", targets=(driver.compute_capability(),))
    only = f" --only {arguments.only}" if arguments.only else ""
    how: dict[str, Any] = {
        "command": f"python benchmarks/gpu/kernels.py{only}",
        "nvrtc": list(compiler.nvrtc),
        "ptx_isa": list(compiler.isa),
        "target": f"sm_{compiler.target}",
    }
    if arguments.only != "rcda":
        how["rotation"] = "sets of 32 MB in all take turns where two fit (they stay in the cache), else of 150 MB"
        results.save(path, "layernorm", layernorm_table(LAYERNORM_SIZES, cold=False), **how)
        how["rotation"] = "sets of 150 MB in all take turns, so the cache holds none of them"
        results.save(path, "layernorm_cold", layernorm_table(COLD_SIZES, cold=True), **how)
    if arguments.only != "layernorm":
        how["rotation"] = "8 sets of inputs and outputs take turns"
        results.save(path, "rcda", rcda_table(), **how)
    print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
