"""Compiles a kernel for given arrays and runs it; skips, saying why, where NVRTC or a GPU is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from optframe.errors import EnvironmentLacks
from optframe.types import KernelLaunch, KernelSpec, TensorInfo
from optframe_trt import driver, nvrtc

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


@cache
def load(source: str, launch: KernelLaunch) -> driver.Kernel:
    return driver.Kernel(nvrtc.compile_ptx(source, defines=launch.defines).text, launch.entry)


def info(array: Array) -> TensorInfo:
    return TensorInfo(array.shape, str(array.dtype))


@pytest.fixture
def run() -> Run:
    """`run(spec, inputs, outputs, attributes, offset=bytes)` -> the output arrays; None stands for an absent input."""
    try:
        driver.ensure_context()
        nvrtc.compile_ptx("")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))

    def run_kernel(
        spec: KernelSpec,
        inputs: Sequence[Array | None],
        outputs: Sequence[TensorInfo],
        attributes: Mapping[str, object],
        offset: int = 0,
    ) -> list[Array]:
        infos = [None if array is None else info(array) for array in inputs]
        launch = spec.launch_rule()(infos, outputs, attributes)  # type: ignore[arg-type]
        kernel = load(spec.read_source(), launch)
        present = [array for array in inputs if array is not None]
        return driver.run_on_arrays(kernel, launch, present, outputs, offset=offset)

    return run_kernel
