"""The CUDA driver's calls and launches, as far as they need no GPU; tests of kernels and of the backend run them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from optframe import cuda
from optframe.errors import EnvironmentLacks
from optframe.types import KernelLaunch

LAUNCH = KernelLaunch("shift", (), (3, 2, 1), (64, 1, 1), 16, (7, -1))
FUNCTION = ctypes.c_void_p(5)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda, "call", lambda *arguments: calls.append(arguments))
    return calls


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda.driver.cache_clear()
    with pytest.raises(EnvironmentLacks, match=r"no NVIDIA driver was found \(libcuda"):
        cuda.ensure_context()


def test_structures_are_the_drivers() -> None:
    """Sizes and offsets of CUlaunchConfig and CUlaunchAttribute in cuda.h of CUDA 12 and 13, on 64-bit systems."""
    assert (ctypes.sizeof(cuda._Config), ctypes.sizeof(cuda._Attribute)) == (56, 72)
    config = cuda._Config
    assert [config.stream.offset, config.attributes.offset, config.attribute_count.offset] == [32, 40, 48]
    assert cuda._Attribute.value.offset == 8


def test_a_prepared_launch_fills_in_addresses(called: list[tuple[Any, ...]]) -> None:
    prepared = cuda.PreparedLaunch(FUNCTION, LAUNCH, 2, 1)
    for inputs, output, stream in (([10, 20], 30, 0), ([11, 2**40], 31, 99)):
        prepared(inputs, [output], stream)
        name, config, function, parameters, _ = called[-1]
        assert (name, function.value) == ("cuLaunchKernelEx", 5)
        config = config._obj
        assert [*config.grid, *config.block, config.shared_bytes] == [3, 2, 1, 64, 1, 1, 16]
        assert (config.stream or 0, config.attribute_count) == (stream, 0)
        kinds = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint64]
        values = [kind.from_address(address).value for kind, address in zip(kinds, parameters, strict=True)]
        assert values == [*inputs, 7, -1, output]
    assert [called[0][i] is called[1][i] for i in range(len(called[0]))] == [True] * len(called[0]), "nothing was made"
    with pytest.raises(ValueError):
        prepared([1], [2])


def test_an_empty_grid_launches_nothing(called: list[tuple[Any, ...]]) -> None:
    cuda.PreparedLaunch(FUNCTION, KernelLaunch("shift", (), (0, 1, 1), (32, 1, 1)), 1, 1)([0], [0])
    assert not called


def test_an_overlapping_launch_says_so(called: list[tuple[Any, ...]]) -> None:
    cuda.PreparedLaunch(FUNCTION, LAUNCH, 1, 1, overlap=True)([1], [2])
    config = called[0][1]._obj
    attribute = config.attributes[0]
    assert (config.attribute_count, attribute.id, attribute.value) == (1, 6, 1)


@pytest.mark.parametrize(
    ("code", "architecture", "driver", "expected"),
    [
        ("griddepcontrol.wait;", 90, 12030, True),
        ("griddepcontrol.wait;", 120, 13000, True),
        ("griddepcontrol.wait;", 80, 13000, False),  # compiled for a GPU without the instruction
        ("griddepcontrol.wait;", 90, 12020, False),
        ("griddepcontrol.launch_dependents;", 90, 13000, False),
    ],
)
def test_kernels_overlap_that_wait(
    monkeypatch: pytest.MonkeyPatch, code: str, architecture: int, driver: int, expected: bool
) -> None:
    def answer(name: str, result: Any, *_: object) -> None:
        values: dict[str, Callable[[], int]] = {
            "cuFuncGetAttribute": lambda: architecture,
            "cuDriverGetVersion": lambda: driver,
        }
        result._obj.value = values[name]()

    monkeypatch.setattr(cuda, "call", answer)
    assert cuda.may_overlap(code, FUNCTION) is expected
