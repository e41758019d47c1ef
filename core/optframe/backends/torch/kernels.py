"""Plugin ops on the GPU: their CUDA source compiled by NVRTC through CuPy, launched on torch's stream."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optframe.backends.torch.dtypes import info
from optframe.backends.torch.registry import Call, OpNode
from optframe.cuda import Function, PreparedLaunch, ensure_context
from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe.types import Defines, KernelLaunch, KernelSpec, OpSpec, TensorInfo

CUPY_COMMAND = "pip install cupy-cuda12x (or cupy-cuda13x, as the driver's CUDA is)"


def plugin_calls(specs: Mapping[str, OpSpec]) -> dict[str, Callable[[OpNode], Call]]:
    """Return how the ops that have a kernel are called, by `domain::name`.

    Raises:
        EnvironmentLacks: there are such ops and CuPy, which compiles them, is missing.
    """
    with_kernel = {name: spec for name, spec in specs.items() if spec.kernel is not None}
    if with_kernel and importlib.util.find_spec("cupy") is None:
        raise EnvironmentLacks(f"plugin kernels need CuPy: {CUPY_COMMAND}; or run with the option kernels=false")
    return {name: _builder(spec) for name, spec in with_kernel.items()}


def _builder(spec: OpSpec) -> Callable[[OpNode], Call]:
    return lambda node: KernelCall(spec, node.attributes)


class KernelCall:
    """A plugin op as a call on CUDA tensors; a launch is chosen once for each set of shapes and dtypes."""

    def __init__(self, spec: OpSpec, attributes: Mapping[str, Any]) -> None:
        assert spec.kernel is not None
        self._spec, self._kernel, self._attributes = spec, spec.kernel, attributes
        self._launches: dict[tuple[TensorInfo | None, ...], tuple[KernelLaunch, tuple[TensorInfo, ...]]] = {}

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return the outputs, on the inputs' device; inputs that are not contiguous are copied first.

        Raises:
            InputError: the inputs are not all on one GPU, or shapes or dtypes are not those that the kernel takes.
        """
        device = self._device(inputs)
        tensors = [None if tensor is None else tensor.contiguous() for tensor in inputs]
        key = tuple(None if tensor is None else info(tensor) for tensor in tensors)
        if key not in self._launches:
            outputs = self._spec.infer(key, self._attributes)
            self._launches[key] = self._kernel.launch_rule()(key, outputs, self._attributes), outputs
        launch, infos = self._launches[key]
        results = tuple(torch.empty(i.shape, dtype=getattr(torch, i.dtype), device=device) for i in infos)
        _launch(self._kernel, launch, [tensor for tensor in tensors if tensor is not None], results)
        return results

    def _device(self, inputs: Sequence[Tensor | None]) -> torch.device:
        devices = {tensor.device for tensor in inputs if tensor is not None}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices))) or "none"
            raise InputError(f"{self._spec.name} needs its inputs on one CUDA device, they are on: {names}")
        return devices.pop()


def _launch(kernel: KernelSpec, launch: KernelLaunch, inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> None:
    if 0 in launch.grid:
        return
    device = inputs[0].device.index or 0
    with torch.cuda.device(device):
        ensure_context(device)
        function = _compiled(kernel, launch.entry, launch.defines, device)
        prepared = PreparedLaunch(function, launch, len(inputs), len(outputs))
        stream = torch.cuda.current_stream().cuda_stream
        prepared([tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs], stream)


@cache
def _compiled(kernel: KernelSpec, entry: str, defines: Defines, device: int) -> Function:
    """Return the kernel, compiled by CuPy for the device at hand."""
    import cupy

    options = ("--std=c++17", *(f"-D{name}={value}" for name, value in defines))
    try:
        with cupy.cuda.Device(device):
            compiled = cupy.RawModule(code=kernel.read_source(), options=options, backend="nvrtc").get_function(entry)
            return Function(ctypes.c_void_p(compiled.kernel.ptr), owner=compiled)
    except cupy.cuda.compiler.CompileException as error:
        raise PluginError(f"{kernel.source} does not compile: {(str(error).splitlines() or [''])[0]}") from error
