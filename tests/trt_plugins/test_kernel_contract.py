"""The contracts of kernels find what is wrong with an author's rules and source, and say so."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optframe.errors import EnvironmentLacks, PluginError
from optframe.types import KernelSpec, OpParameter, OpSpec
from optframe_trt import nvrtc, testing

Array = np.ndarray[Any, Any]

SOURCE = """
#include <cuda_fp16.h>
extern "C" __global__ void twice(const TYPE* x, int count, TYPE* y) {
  for (int i = threadIdx.x; i < count && i < WIDTH; i += blockDim.x) y[i] = x[i] + x[i];
}
"""

RULES = """
from optframe.errors import InputError
from optframe.types import KernelLaunch

def shapes(inputs, attributes):
    return (inputs[0],)

def made(x, width):
    defines = (("TYPE", {"float32": "float", "float16": "__half"}[x.dtype]), ("WIDTH", str(width)))
    return KernelLaunch("twice", defines, (1, 1, 1), (32, 1, 1), 0, x.shape)

def launch(inputs, outputs, attributes):
    return made(inputs[0], -(-inputs[0].shape[0] // 8) * 8)

def no_launch(*arguments):
    pass

def width(defines):
    return int(dict(defines)["WIDTH"])

def reuse(inputs, outputs, attributes, defines):
    if inputs[0].shape[0] > width(defines):
        raise InputError("too wide")
    return made(inputs[0], width(defines))

def reuse_too_wide(inputs, outputs, attributes, defines):
    return made(inputs[0], width(defines))

def reuse_of_another(inputs, outputs, attributes, defines):
    return made(inputs[0], width(defines) + 8)
"""

_numbers = itertools.count()


def draw(rng: np.random.Generator) -> dict[str, Array]:
    return {"x": rng.standard_normal(rng.integers(1, 40))}


def twice(x: Array) -> Array:
    return 2 * x


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpSpec]:
    """`make(launch=, reuse=, source=)` returns an op whose rules and kernel lie in a package of its own."""
    try:
        nvrtc.compile_ptx("")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))

    def op(launch: str = "launch", reuse: str = "", source: str = SOURCE) -> OpSpec:
        package = f"twice_op{next(_numbers)}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(RULES)
        (tmp_path / package / "twice.cu").write_text(source)
        importlib.invalidate_caches()
        x, y = (OpParameter(name, ("float32", "float16")) for name in "xy")
        kernel = KernelSpec(f"{package}:twice.cu", f"{package}:{launch}", f"{package}:{reuse}" if reuse else "")
        return OpSpec("Twice", "acme", (x,), (y,), f"{package}:function", f"{package}:shapes", kernel=kernel)

    monkeypatch.syspath_prepend(tmp_path)
    return op


def runs(spec: OpSpec, seed: int) -> int:
    return testing.assert_kernel_contract(spec, draw, twice, seed=seed, device="emulator")


def test_a_reuse_rule_is_asked_about_other_shapes_of_the_same_types(make: Callable[..., OpSpec], seed: int) -> None:
    """It need not know kernels for other dtypes, since an engine never has them for one node."""
    assert runs(make(reuse="reuse"), seed) > runs(make(), seed)


def test_a_kernel_that_is_too_small_is_found(make: Callable[..., OpSpec], seed: int) -> None:
    with pytest.raises(AssertionError, match=r"\) by the kernel for acme::Twice\(x float"):
        runs(make(reuse="reuse_too_wide"), seed)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"launch": "no_launch"}, "launch rule .*:no_launch gives None, not a KernelLaunch"),
        ({"reuse": "no_launch"}, "reuse rule .*:no_launch gives None, not a KernelLaunch"),
        ({"reuse": "reuse_of_another"}, "its reuse rule launches another kernel than it was given"),
        ({"reuse": "nowhere"}, "cannot load"),
        ({"source": SOURCE.replace("TYPE* y", "TYPO* y")}, "does not compile"),
    ],
)
def test_wrong_rules_and_sources(rules: dict[str, str], message: str, make: Callable[..., OpSpec], seed: int) -> None:
    with pytest.raises(PluginError, match=message):
        runs(make(**rules), seed)


def test_a_source_that_does_not_compile_is_no_matter_of_other_processes(make: Callable[..., OpSpec]) -> None:
    with pytest.raises(PluginError, match=r'identifier "TYPO" is undefined'):
        testing.assert_ptx_contract(make(source=SOURCE.replace("TYPE* y", "TYPO* y")), draw, seed=0)
