"""Layer normalisation in Triton, tuned over rows a program and warps: a peer of the CUDA kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl


def _small_enough(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    return [
        config for config in configs if config.kwargs["ROWS"] * arguments["columns"] <= 8192 * config.num_warps // 4
    ]


CONFIGS = [
    triton.Config({"ROWS": rows}, num_warps=warps)
    for rows, warps in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 4), (8, 4), (16, 8))
]


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, scale, bias, y, rows, columns, epsilon, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / columns
    centred = tl.where(inside, value - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 1) / columns + epsilon)
    scales = tl.load(scale + column, mask=column < columns, other=0.0).to(tl.float32)
    biases = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    result = centred * factor[:, None] * scales[None, :] + biases[None, :]
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


_tuned = triton.autotune(
    configs=CONFIGS, key=["rows", "columns"], prune_configs_by={"early_config_prune": _small_enough}
)(_kernel)


def layernorm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, epsilon: float) -> None:
    """Write the normalised rows of x (rows, columns) to y."""
    rows, columns = x.shape
    _tuned[lambda meta: (triton.cdiv(rows, meta["ROWS"]),)](
        x, scale, bias, y, rows, columns, epsilon, COLUMNS=triton.next_power_of_2(columns), OVERLAP=False
    )


def overlapping(columns: int) -> dict[str, Callable[..., None]]:
    """Return, for each form that suits so many columns, what `layernorm` does in launches that overlap.

    The tuner cannot choose among them: it times launches with pauses between. Compute capability 9.0 or later.
    """
    forms = _small_enough(CONFIGS, {"columns": columns})
    return {f"{form.kwargs['ROWS']} rows, {form.num_warps} warps": partial(_overlap, form) for form in forms}


def _overlap(
    form: Any, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, epsilon: float
) -> None:
    rows, columns = x.shape
    _kernel[(triton.cdiv(rows, form.kwargs["ROWS"]),)](
        x, scale, bias, y, rows, columns, epsilon, **form.kwargs, COLUMNS=triton.next_power_of_2(columns), OVERLAP=True,
        num_warps=form.num_warps, launch_pdl=True,
    )  # fmt: skip
