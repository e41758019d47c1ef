"""What the core itself contributes through the hooks that everyone uses: its backends."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import BackendSpec


@hookimpl
def optframe_backends() -> Iterable[BackendSpec]:
    """Register the backends that need nothing beyond the core's dependencies."""
    return [
        BackendSpec(
            "onnxruntime",
            "optframe.backends.onnxruntime:OnnxRuntimeBackend",
            "ONNX Runtime on the CPU, and on CUDA where its provider is installed",
        ),
        BackendSpec(
            "torch",
            "optframe.backends.torch.backend:TorchBackend",
            "the graph as torch calls on the CPU, and as one CUDA graph with plugin kernels on a GPU",
            pipeline="cuda",
        ),
    ]
