"""Compiles CUDA C++ and runs it under the emulator; skips where there is no NVRTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from optframe.types import KernelLaunch, TensorInfo
from optframe_trt import emulator, nvrtc

Array = np.ndarray[Any, Any]
Emulate = Callable[..., list[Array]]

HEADERS = {"__half": "#include <cuda_fp16.h>\n", "__nv_bfloat16": "#include <cuda_bf16.h>\n"}
"""By the type that they declare; compiling them takes longer than compiling most kernels here."""


@pytest.fixture
def emulate(needs_nvrtc: None) -> Emulate:
    """`emulate(source, inputs, outputs, grid=, block=, ...)` -> outputs of the kernel `k`."""

    def run(
        source: str,
        inputs: Sequence[Array],
        outputs: Sequence[TensorInfo],
        *,
        grid: int = 1,
        block: int | tuple[int, int, int] = 32,
        shared: int = 0,
        extras: tuple[int, ...] = (),
        offset: int = 0,
        checks: emulator.Checks | None = None,
        overlap: bool = False,
    ) -> list[Array]:
        headers = "".join(header for name, header in HEADERS.items() if name in source)
        threads = block if isinstance(block, tuple) else (block, 1, 1)
        launch = KernelLaunch("k", (), (grid, 1, 1), threads, shared, extras, overlap)
        ptx = nvrtc.compile_ptx(headers + source, targets=emulator.targets(launch)[-1:]).text
        return emulator.run_on_arrays(ptx, launch, inputs, outputs, offset=offset, checks=checks)

    return run
