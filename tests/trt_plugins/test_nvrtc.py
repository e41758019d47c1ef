"""Compiling CUDA source to PTX without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe_trt import nvrtc

SOURCE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern "C" __global__ void scale(const TYPE* x, int count, TYPE* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = static_cast<TYPE>(static_cast<float>(x[i]) * FACTOR);
}
"""


@pytest.fixture(params=nvrtc.toolkits() or [None], ids=lambda toolkit: str(toolkit and toolkit.version))
def toolkit(request: pytest.FixtureRequest) -> nvrtc.Toolkit:
    if request.param is None:
        pytest.skip("no NVRTC is installed (extra optframe[nvrtc])")
    found: nvrtc.Toolkit = request.param
    return found


def compile_scale(toolkit: nvrtc.Toolkit, **options: object) -> nvrtc.Ptx:
    defines = (("TYPE", "__half"), ("FACTOR", "0.75f"))
    return nvrtc.compile_ptx(SOURCE, defines=defines, toolkit=toolkit, **options)  # type: ignore[arg-type]


def test_ptx_says_what_it_needs(toolkit: nvrtc.Toolkit) -> None:
    ptx = compile_scale(toolkit)
    assert ".entry scale(" in ptx.text
    assert "0f3F400000" in ptx.text, "0.75 as a float literal: the define arrived"
    assert f".version {ptx.isa[0]}.{ptx.isa[1]}\n.target sm_80\n" in ptx.text
    assert (ptx.target, ptx.nvrtc) == (80, toolkit.version)
    assert ptx.isa[0] == {12: 8, 13: 9}[toolkit.version[0]], "CUDA 12 emits ISA 8, which CUDA 12 drivers load"


def test_the_lowest_target_counts(toolkit: nvrtc.Toolkit) -> None:
    ptx = compile_scale(toolkit, targets=(120, 89, 90))
    assert ptx.target == 89
    assert ".target sm_89" in ptx.text


def test_the_same_again(toolkit: nvrtc.Toolkit) -> None:
    assert compile_scale(toolkit) == compile_scale(toolkit)


@pytest.mark.parametrize("targets", [(), (20,), (7000,)])
def test_unknown_targets(toolkit: nvrtc.Toolkit, targets: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"compiles for .*80.*, not for"):
        compile_scale(toolkit, targets=targets)


def test_a_source_that_does_not_compile(toolkit: nvrtc.Toolkit) -> None:
    with pytest.raises(PluginError, match=r"mine\.cu does not compile .*mine\.cu\(1\): error: .*nowhere"):
        nvrtc.compile_ptx('extern "C" __global__ void f() { nowhere(); }', name="mine.cu", toolkit=toolkit)


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    assert nvrtc.toolkits() == ()
    with pytest.raises(EnvironmentLacks, match="nvidia-cuda-nvrtc-cu12"):
        nvrtc.compile_ptx(SOURCE)


def test_a_library_without_headers_is_no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lib64" / "libnvrtc.so.12"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(nvrtc, "_candidates", lambda: nvrtc._installed(tmp_path))
    assert nvrtc.toolkits() == ()


def test_cuda_12_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = []
    for version in ("13", "12"):
        include = tmp_path / version / "include"
        include.mkdir(parents=True)
        (include / "cuda_fp16.h").touch()
        pairs.append((tmp_path / version / "libnvrtc.so", include))
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(pairs))
    monkeypatch.setattr(nvrtc, "_load", lambda library: library)
    monkeypatch.setattr(nvrtc, "_version", lambda library: (int(library.parent.name), 0))
    assert [toolkit.version for toolkit in nvrtc.toolkits()] == [(12, 0), (13, 0)]
