"""The ways to run Anchor DETR that optframe is measured beside: PyTorch and ONNX Runtime, in all their modes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

Run = Callable[[], Any]
Fetch = Callable[[], list[Array]]


@dataclass(frozen=True)
class Peer:
    """One way to run the model; `make(module, images, folder)` returns a run on the device and what fetches outputs."""

    name: str
    precision: str
    make: Callable[[torch.nn.Module, Array, Path], tuple[Run, Fetch]]


def _outputs(held: list[Any]) -> Fetch:
    return lambda: [tensor.float().cpu().numpy() for tensor in held[-1]]


def _module(module: torch.nn.Module, images: Array, precision: str) -> tuple[torch.nn.Module, Tensor]:
    """Return module and input on the GPU; in FP16 all of the module, with channels last, which is fastest there."""
    module, x = module.cuda().float(), torch.from_numpy(images).cuda()
    if precision == "fp16":
        return module.half().to(memory_format=torch.channels_last), x.half()
    return module, x


def _captured(call: Callable[[], Any], held: list[Any]) -> Run:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held.append(call())
    return graph.replay


def _pytorch(
    module: torch.nn.Module,
    images: Array,
    folder: Path,
    *,
    precision: str,
    compile_mode: str | None = None,
    graph: bool = False,
) -> tuple[Run, Fetch]:
    placed, x = _module(module, images, precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = True
    held: list[Any] = []
    called: Callable[..., Any] = placed
    if compile_mode is not None:
        torch.compiler.reset()
        called = torch.compile(placed, mode=compile_mode, dynamic=False)
    call = functools.partial(called, x)
    for _ in range(3):
        call()
    if graph:
        return _captured(call, held), _outputs(held)

    def run() -> None:
        held[:] = [call()]

    return run, _outputs(held)


def _onnxruntime(
    module: torch.nn.Module, images: Array, folder: Path, *, precision: str, slim: bool, graph: bool
) -> tuple[Run, Fetch]:
    import onnxruntime

    path = _onnx_file(folder, precision, slim)
    onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = {
        "use_tf32": int(precision != "fp32"),
        "enable_cuda_graph": int(graph),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    session = onnxruntime.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", provider)])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("onnxruntime's CUDA provider did not start")
    binding = session.io_binding()
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda")]
    binding.bind_ortvalue_input(session.get_inputs()[0].name, kept[0])
    for output in session.get_outputs():
        shape = [images.shape[0] if not isinstance(dim, int) else dim for dim in output.shape]
        kept.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda"))
        binding.bind_ortvalue_output(output.name, kept[-1])

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    for _ in range(3):
        run()
    return run, lambda: [value.numpy() for value in kept[1:]]


def _onnx_file(folder: Path, precision: str, slim: bool) -> Path:
    """Return the raw export in `folder`, after onnxslim and in FP16 as far as asked."""
    path = folder / "raw.onnx"
    if slim:
        import onnx
        import onnxslim

        slimmed = folder / "slim.onnx"
        if not slimmed.exists():
            onnx.save(onnxslim.slim(str(path)), slimmed)
        path = slimmed
    if precision != "fp16":
        return path
    half = path.with_name(f"{path.stem}_fp16.onnx")
    if not half.exists():
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), half)
    return half


def _all() -> Mapping[str, Peer]:
    found: list[Peer] = []
    for precision in ("fp32", "tf32", "fp16"):
        for graph in (False, True):
            name = "PyTorch eager" + (", CUDA graph" if graph else "")
            found.append(Peer(name, precision, functools.partial(_pytorch, precision=precision, graph=graph)))
    for mode, graph in (("default", True), ("reduce-overhead", False), ("max-autotune-no-cudagraphs", True)):
        name = f"torch.compile {mode.removesuffix('-no-cudagraphs')}" + (", CUDA graph" if graph else "")
        for precision in ("fp16", "tf32"):
            make = functools.partial(_pytorch, precision=precision, compile_mode=mode, graph=graph)
            found.append(Peer(name, precision, make))
    for slim in (False, True):
        for precision in ("fp32", "tf32", "fp16"):
            for graph in (False, True):
                name = "ONNX Runtime CUDA" + (", onnxslim" if slim else "") + (", CUDA graph" if graph else "")
                make = functools.partial(_onnxruntime, precision=precision, slim=slim, graph=graph)
                found.append(Peer(name, precision, make))
    return {f"{peer.name} {peer.precision}": peer for peer in found}


PEERS = _all()

if __name__ == "__main__":
    print("\n".join(PEERS))
    sys.exit(0)
