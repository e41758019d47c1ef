"""Layer normalisation by other threads a row, rows a block and registers than the launch rule's, to choose it by."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import kernels
import timing
import torch

from optframe.types import KernelLaunch
from optframe_anchordetr.kernels import LAYERNORM

LANES = (8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = (32, 64, 128, 256)
MOST_STEPS = 8
"""Accesses a thread: more of them spill registers."""


def variants(launch: KernelLaunch, resident: Sequence[int]) -> Iterator[tuple[str, KernelLaunch]]:
    """Yield launches of the same work by other threads, so many `resident` on a multiprocessor, and their names."""
    given = dict(launch.defines)
    (rows,), columns, vector = launch.extras, int(given["LN_COLUMNS"]), int(given["LN_VECTOR"])
    resident = resident or [int(given["LN_BLOCKS"]) * launch.block[0]]
    earlies = (0,) if int(given["LN_LONG"]) else (0, 1)  # rows that are read twice have their parameters late
    for lanes, block, early, kept in itertools.product(LANES, BLOCKS, earlies, resident):
        groups = block // lanes if lanes < block else 1
        steps = -(-columns // (lanes * vector))
        wasteful = (lanes > 32 and block != BLOCKS[0]) or (lanes // 2) * vector >= columns or lanes * groups < 32
        if wasteful or steps > MOST_STEPS:
            continue
        threads = lanes * groups
        blocks = max(kept // threads, 1)
        changed = {"LN_LANES": lanes, "LN_GROUPS": groups, "LN_BLOCKS": blocks, "LN_EARLY": early}
        defines = given | {key: str(value) for key, value in changed.items()}
        when = "early" if early else "late"
        name = f"{lanes:>4} lanes, {groups} rows a block, parameters {when}, {blocks * threads} threads resident"
        sizes = {"grid": (-(-rows // groups), 1, 1), "block": (threads, 1, 1)}
        yield name, dataclasses.replace(launch, defines=tuple(defines.items()), **sizes)


def measure(rows: int, columns: int, dtype: torch.dtype, best: int, resident: Sequence[int]) -> None:
    """Print the fastest variants, the rule's among them, and the copy and peers in the same run."""
    sets = timing.buffer_sets(2 * rows * columns * dtype.itemsize, cold=False)
    xs = [torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(sets)]
    ys = [torch.full_like(x, torch.nan) for x in xs]
    scale, bias = (torch.randn(columns, device="cuda", dtype=dtype) for _ in range(2))
    expected = torch.nn.functional.layer_norm(xs[0].double(), (columns,), scale.double(), bias.double())
    rule = kernels.Prepared.of_op(LAYERNORM, [xs[0], scale, bias], [ys[0]], epsilon=1e-5)
    calls: dict[str, timing.Call] = {}
    for name, launch in [("the launch rule's", rule.launch), *variants(rule.launch, resident)]:
        prepared = kernels.Prepared(LAYERNORM.read_source(), launch)
        ys[0].fill_(torch.nan)
        prepared([xs[0], scale, bias], [ys[0]])
        kernels.require_close(ys[0], expected, 1e-6 if dtype == torch.float32 else 1e-3)
        calls[name] = lambda i, prepared=prepared: prepared([xs[i], scale, bias], [ys[i]])  # type: ignore[misc]
    del expected
    calls |= kernels.layernorm_peers(xs, ys, scale, bias)
    times = timing.median_us(calls, sets)
    print(f"{rows} x {columns} {str(dtype).removeprefix('torch.')}")
    ours = sorted((name for name in times if "lanes" in name), key=times.__getitem__)
    for name in [
        *ours[:best],
        "the launch rule's",
        *(name for name in times if "lanes" not in name and "rule" not in name),
    ]:
        print(f"  {times[name]:9.2f} us  {name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows-columns", nargs=2, type=int, action="append", help="sizes; default: those of kernels.py"
    )
    parser.add_argument(
        "--resident", nargs="+", type=int, default=[], help="threads a multiprocessor is to hold (default: the rule's)"
    )
    parser.add_argument("--best", type=int, default=6, help="how many variants to show of each size")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU is available to torch: nothing was measured")
        return 0
    torch.manual_seed(0)
    for rows, columns in arguments.rows_columns or kernels.LAYERNORM_SIZES:
        for dtype in (torch.float32, torch.float16):
            measure(rows, columns, dtype, arguments.best, arguments.resident)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
