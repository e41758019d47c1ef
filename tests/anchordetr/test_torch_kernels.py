"""The plugin ops as calls of the torch backend: their kernels on a GPU, and what is refused before a launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from optframe import ops
from optframe.backends.torch import backend, kernels
from optframe.backends.torch.backend import TorchSettings
from optframe.backends.torch.kernels import KernelCall
from optframe.backends.torch.registry import Call, OpNode
from optframe.errors import InputError
from optframe.types import OpSpec
from optframe_anchordetr.ops import LAYER_NORM, RCDA, SKIP_LAYER_NORM

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


@pytest.mark.parametrize("tf32", [False, True])
def test_kernels_round_to_tf32_where_the_backend_may(monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    asked = []

    def plugin_calls(specs: Mapping[str, OpSpec]) -> dict[str, Callable[[OpNode], Call]]:
        def build(node: OpNode) -> Call:
            asked.append(node.attributes)
            return KernelCall(RCDA, node.attributes)

        return dict.fromkeys(specs, build)

    monkeypatch.setattr(kernels, "plugin_calls", plugin_calls)
    shapes = {"q_row": (1, 9, 64), "q_col": (1, 9, 64), "k_row": (1, 7, 64), "k_col": (1, 6, 64), "v": (1, 6, 7, 64)}
    inputs = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()]
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="g"), ir_version=10)
    model.graph.append(ops.call(model, RCDA, inputs, {"num_heads": 2}))
    model.graph.outputs.extend(model.graph[0].outputs)
    backend._prepare(model, "cuda", TorchSettings(tf32=tf32))
    assert asked == [{"num_heads": 2, "allow_tf32": int(tf32)}]


@pytest.mark.gpu
@needs_gpu
def test_tensors_in_any_layout_are_taken() -> None:
    x = torch.randn(64, 33, device="cuda").t()
    (y,) = KernelCall(LAYER_NORM, {"epsilon": 1e-5})(x)
    exact = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-5)
    assert (y.double() - exact).abs().max().item() < 32 * 2**-24 * exact.abs().max().item()  # a dozen float32 roundings


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "height", "width"), [("float16", 30, 41), ("float32", 3, 5), ("bfloat16", 84, 60)])
def test_overlapping_launches_see_what_was_written(dtype: str, height: int, width: int) -> None:
    """Kernels that read what the one before wrote, among torch's and on two streams, give what they give one by one."""
    norm, skip_norm = KernelCall(LAYER_NORM, {}), KernelCall(SKIP_LAYER_NORM, {})
    attend = KernelCall(RCDA, {"num_heads": 8})
    start = torch.randn(1, height, width, 256, device="cuda").to(getattr(torch, dtype))
    side = torch.cuda.Stream()

    def run(pause: Callable[[], object]) -> Tensor:
        x = start
        for _ in range(20):
            (y,) = norm(x)
            pause()
            rows, columns, queries = y.mean(1), y.mean(2), y.flatten(1, 2)
            pause()
            (z,) = attend(queries, queries, rows, columns, y)
            pause()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                (z,) = norm(z)
            torch.cuda.current_stream().wait_stream(side)
            pause()
            y, x = skip_norm(z.reshape(x.shape), x)
            pause()
            x = skip_norm(x, y)[0]
            pause()
        return x

    expected = run(torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(run(lambda: None), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(lambda: None)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


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
