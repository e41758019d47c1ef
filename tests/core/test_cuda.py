"""The CUDA driver's calls and launches, as far as they need no GPU; tests of kernels and of the backend run them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest

from optframe import cuda
from optframe.errors import EnvironmentLacks
from optframe.types import KernelLaunch

LAUNCH = KernelLaunch("shift", (), (3, 2, 1), (64, 1, 1), 16, (7, -1))
HANDLE = ctypes.c_void_p(5)


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
    prepared = cuda.PreparedLaunch(cuda.Function(HANDLE), LAUNCH, 2, 1)
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
    empty = KernelLaunch("shift", (), (0, 1, 1), (32, 1, 1))
    cuda.PreparedLaunch(cuda.Function(HANDLE), empty, 1, 1)([0], [0])
    assert not called


@pytest.mark.parametrize(
    ("asked", "architecture", "driver", "overlaps"),
    [
        (True, 90, 12030, True),
        (True, 120, 13000, True),
        (True, 89, 13000, False),  # compiled for a GPU on which kernels cannot wait
        (True, 90, 12020, False),
        (False, 90, 13000, False),
    ],
)
def test_launches_overlap_of_kernels_that_wait(
    monkeypatch: pytest.MonkeyPatch, asked: bool, architecture: int, driver: int, overlaps: bool
) -> None:
    launched, asked_for = [], []

    def answer(name: str, *arguments: Any) -> None:
        if name == "cuFuncGetAttribute":
            result, attribute, function = arguments
            assert (attribute.value, function) == (5, HANDLE)  # CU_FUNC_ATTRIBUTE_PTX_VERSION
            asked_for.append(name)
            result._obj.value = architecture
        elif name == "cuDriverGetVersion":
            arguments[0]._obj.value = driver
        else:
            launched.append(arguments[0]._obj)

    monkeypatch.setattr(cuda, "call", answer)
    function = cuda.Function(HANDLE)
    for _ in range(2):
        cuda.PreparedLaunch(function, replace(LAUNCH, overlap=asked), 1, 1)([1], [2])
        config = launched[-1]
        assert config.attribute_count == overlaps
        assert (config.attributes[0].id, config.attributes[0].value) == (6, 1)  # programmatic stream serialization
    assert (len(launched), len(asked_for)) == (2, asked), "what a function can do is asked once"
