"""Compiles a kernel for given arrays and runs it: under the emulator everywhere, and on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from optframe import cuda
from optframe.errors import EnvironmentLacks
from optframe.types import Defines, KernelSpec, TensorInfo
from optframe_trt import driver, emulator, nvrtc

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


@pytest.hookimpl(tryfirst=True)  # before skips are made of marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and callspec.params.get("run") == "emulator" and item.get_closest_marker("large"):
            item.add_marker(pytest.mark.slow)


@cache
def compiled(source: str, defines: Defines, targets: tuple[int, ...]) -> str:
    return nvrtc.compile_ptx(source, defines=defines, targets=targets).text


@cache
def load(ptx: str, entry: str) -> driver.Kernel:
    return driver.Kernel(ptx, entry)


def info(array: Array) -> TensorInfo:
    return TensorInfo(array.shape, str(array.dtype))


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(spec, inputs, outputs, attributes, offset=bytes)` -> the output arrays; None stands for an absent input.

    `made_for` are the inputs and outputs that another launch of the kernel was chosen for; it is used again for these.
    Tests marked `large` take long under the emulator, so that they are slow ones there.
    """
    try:
        compiled("", (), nvrtc.DEFAULT_TARGETS)
        if request.param == "gpu":
            cuda.ensure_context()
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))

    def run_kernel(
        spec: KernelSpec,
        inputs: Sequence[Array | None],
        outputs: Sequence[TensorInfo],
        attributes: Mapping[str, object],
        offset: int = 0,
        made_for: tuple[list[TensorInfo | None], list[TensorInfo]] | None = None,
    ) -> list[Array]:
        infos = [None if array is None else info(array) for array in inputs]
        launch = spec.launch_rule()(*(made_for or (infos, outputs)), attributes)
        if made_for:
            reuse = spec.reuse_rule()
            assert reuse is not None
            launch = reuse(infos, outputs, attributes, launch.defines)
        source = spec.read_source()
        targets = (driver.compute_capability(),) if request.param == "gpu" else emulator.targets(launch)[-1:]
        ptx = compiled(source, launch.defines, targets)
        present = [array for array in inputs if array is not None]
        if request.param == "gpu":
            return driver.run_on_arrays(load(ptx, launch.entry), launch, present, outputs, offset=offset)
        return emulator.run_on_arrays(ptx, launch, present, outputs, offset=offset)

    return run_kernel
