"""A matrix product in Triton that adds a bias and a second operand and applies Relu before it writes anything."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from optframe.cuda import launches_overlap

CONFIGS: dict[str, tuple[int, int, int, int, int]] = {
    f"triton-{m}x{n}x{k}-{warps}w{stages}": (m, n, k, warps, stages)
    for m, n, k, warps, stages in (
        (32, 32, 64, 2, 4),
        (64, 32, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
    )
}
"""Rows, columns and depth of a block, warps, and stages of the pipeline; each is worth it for some sizes."""


@triton.jit  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x,
    w,
    bias,
    other,
    y,
    M,
    N,
    K,
    w_k,
    w_n,
    HAS_BIAS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the next kernel may begin once all blocks have; this one may have begun while the one before runs
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    w += batch * K * N
    bias += batch * N
    other += batch * M * N
    y += batch * M * N
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    m = (first + program % (GROUP * columns) % height) * BM + tl.arange(0, BM)
    n = program % (GROUP * columns) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside_m, inside_n = (m < M)[:, None], (n < N)[None, :]
    x_at = x + m[:, None].to(tl.int64) * K + k[None, :]
    w_at = w + k[:, None] * w_k + n[None, :] * w_n
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        left = tl.load(x_at, mask=inside_m & (k[None, :] < K - start), other=0.0)
        right = tl.load(w_at, mask=inside_n & (k[:, None] < K - start), other=0.0)
        total = tl.dot(left, right, total)
        x_at += BK
        w_at += BK * w_k
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if HAS_OTHER:
        total += tl.load(other + at, mask=inside_m & inside_n, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside_m & inside_n)


@cache
def _overlaps(device: torch.device) -> bool:
    """Say whether launches may overlap on a device; see `optframe.types.KernelLaunch`."""
    major, minor = torch.cuda.get_device_capability(device)
    return hasattr(tl.extra.cuda, "gdc_wait") and launches_overlap(10 * major + minor)


def linear(config: str, x: Tensor, w: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> Tensor:
    """Return x @ w + bias + other, then Relu if asked: x (M, K), w (K, N) of any strides, bias (N), other (M, N).

    With w (B, K, N), bias (B, N) and other (B, M, N), all contiguous, B products of the same x: (B, M, N). x and other
    are contiguous; all are float16 or bfloat16; sums are float32.
    """
    (rows, depth), columns, batch = x.shape, w.shape[-1], w.shape[:-2]
    m, n, k, warps, stages = CONFIGS[config]
    y = torch.empty((*batch, rows, columns), dtype=x.dtype, device=x.device)
    overlap = _overlaps(x.device)
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n), *(batch or (1,)))
    _linear[grid](
        x, w, x if bias is None else bias, x if other is None else other, y,
        rows, columns, depth, w.stride(-2), w.stride(-1), bias is not None, other is not None, relu,
        m, n, k, 8, overlap, num_warps=warps, num_stages=stages, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return y
