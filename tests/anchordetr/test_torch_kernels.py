"""The plugin ops as calls of the torch backend: their kernels on a GPU, and what is refused before a launch."""

from __future__ import annotations

import pytest
import torch

from optframe.backends.torch.kernels import KernelCall
from optframe.errors import InputError
from optframe_anchordetr.ops import LAYER_NORM, RCDA

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")


def test_tensors_of_the_host_are_refused() -> None:
    with pytest.raises(InputError, match="LayerNorm needs its inputs on one CUDA device, they are on: cpu"):
        KernelCall(LAYER_NORM, {})(torch.zeros(2, 8))


@pytest.mark.gpu
@needs_gpu
def test_tensors_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 8, device="cuda")
    with pytest.raises(InputError, match="on: cpu, cuda:0"):
        KernelCall(LAYER_NORM, {})(x, torch.ones(8))
    with pytest.raises(InputError, match="scale"):
        KernelCall(LAYER_NORM, {})(x, torch.ones(7, device="cuda"))
    with pytest.raises(InputError):
        KernelCall(LAYER_NORM, {})(x.to(torch.int32))
    shapes = ((1, 9, 64), (1, 9, 64), (1, 7, 64), (1, 6, 64), (1, 6, 7, 64))
    with pytest.raises(InputError, match="num_heads"):
        KernelCall(RCDA, {"num_heads": 3})(*(torch.zeros(shape, device="cuda") for shape in shapes))


@pytest.mark.gpu
@needs_gpu
def test_tensors_in_any_layout_are_taken() -> None:
    x = torch.randn(64, 33, device="cuda").t()
    (y,) = KernelCall(LAYER_NORM, {"epsilon": 1e-5})(x)
    exact = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-5)
    assert (y.double() - exact).abs().max().item() < 32 * 2**-24 * exact.abs().max().item()  # a dozen float32 roundings


@pytest.mark.gpu
@needs_gpu
def test_many_launches_take_no_memory() -> None:
    call, x = KernelCall(LAYER_NORM, {"epsilon": 1e-5}), torch.randn(900, 256, device="cuda")
    call(x)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    for _ in range(10_000):
        call(x)
    torch.cuda.synchronize()
    assert (torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()) == before
