"""The backend `torch`: builds and opens engines, which are the ONNX file and a small JSON of settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from optframe import environment, graph
from optframe.backend import BuildOptions, Engine
from optframe.backends.inputs import ModelInput
from optframe.backends.onnxruntime import check_precision
from optframe.backends.settings import load_settings, parse_settings, save_settings
from optframe.errors import EnvironmentLacks, InputError, unknown_name
from optframe.ops import inline_functions, permit_tf32
from optframe.registry import default_registry

if TYPE_CHECKING:
    from optframe.backends.torch.runner import TorchRunner
    from optframe.backends.torch.source import Body

DISTRIBUTIONS = ("torch", "cupy-cuda12x", "cupy-cuda13x", "triton")


@dataclass(frozen=True)
class TorchSettings:
    """The backend's own options; docs/backends.md describes them to users.

    `graphs`: how many sets of input shapes keep a CUDA graph; 0 runs without. `kernels`: whether plugin ops run their
    CUDA kernels on a GPU. `fuse`: whether several calls become one where torch or a kernel of ours can. `tf32`: whether
    CUDA may round the factors of FP32 products to TF32; false by default, since FP32 is what was asked for.
    """

    graphs: int = 4
    kernels: bool = True
    fuse: bool = True
    tf32: bool = False

    def __post_init__(self) -> None:
        """Check the number of graphs.

        Raises:
            InputError: it is none.
        """
        if self.graphs < 0:
            raise InputError("backend torch: graphs is a number of CUDA graphs (0: none)")


class TorchBackend:
    """Follows `optframe.backend.Backend`. Options: see `TorchSettings`."""

    name = "torch"
    option_names = frozenset(field.name for field in fields(TorchSettings))

    def missing(self) -> str | None:
        """Return None if torch is installed, else the command that installs it."""
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install torch"
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the versions of torch, and of CuPy and Triton where they are installed."""
        return environment.versions(DISTRIBUTIONS)

    def check(self, options: BuildOptions) -> None:
        """Check the settings and the device that `options` ask for.

        Raises:
            InputError: an option or the device is unknown.
            EnvironmentLacks: torch or the device is missing.
        """
        parse_settings(TorchSettings, self.name, options.options)
        choose_device(options.device)

    def build(self, model: Path, folder: Path, options: BuildOptions) -> Engine:
        """Prove that every op of `model` has a torch call, then write `folder`/model.onnx and settings.

        Raises:
            InputError: an option is unknown, the model is not of `options.precision`, or ops have no translation.
            EnvironmentLacks: torch, the device, or CuPy for plugin kernels is missing.
        """
        settings = parse_settings(TorchSettings, self.name, options.options)
        device = choose_device(options.device)
        loaded = graph.load(model)
        check_precision(model, loaded, options.precision)
        _prepare(graph.load(model), device, settings)  # its own copy, which it changes
        engine = Engine(graph.save(loaded, folder / "model.onnx"), self.name, options.precision, device)
        save_settings(settings, engine.path)
        return engine

    def open(self, engine: Engine) -> TorchRunner:
        """Load `engine`, which may be any ONNX file: without settings beside it the defaults hold.

        Raises:
            InputError: the file is missing or no usable model, or ops have no translation.
            EnvironmentLacks: its device is missing here.
        """
        device, settings = choose_device(engine.device), load_settings(TorchSettings, engine.path)
        return open_model(graph.load(engine.path), device, settings, engine.path.name)


def open_model(model: ir.Model, device: str, settings: TorchSettings, label: str) -> TorchRunner:
    """Return the runner of `model` on `device` ("cpu" or "cuda"); the model's functions are inlined in place."""
    import torch

    from optframe.backends.torch.fuse import optimizer
    from optframe.backends.torch.runner import CudaRunner, TorchRunner
    from optframe.backends.torch.trace import Function, Weights, fold

    body = _prepare(model, device, settings)
    with torch.inference_mode():
        fold(body)
    optimize = optimizer(device) if settings.fuse else None
    function = Function(body, body.inputs, {}, torch.device(device), Weights(), optimize)
    inputs = [ModelInput.of(value) for value in body.inputs]
    outputs = [value.name or "" for value in body.outputs]
    if device == "cuda":
        return CudaRunner(function, inputs, outputs, label, tf32=settings.tf32, graphs=settings.graphs)
    return TorchRunner(function, inputs, outputs, label)


def _prepare(model: ir.Model, device: str, settings: TorchSettings) -> Body:
    """Return the model's body, plugin ops with a kernel kept on a GPU and put in standard ops elsewhere."""
    from optframe.backends.torch.dtypes import torch_dtype
    from optframe.backends.torch.kernels import plugin_calls
    from optframe.backends.torch.source import Preparer

    plugins = {}
    if device == "cuda" and settings.kernels:
        called = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()}
        specs = {name: spec for name, spec in default_registry().ops().items() if name in called}
        plugins = plugin_calls(specs)
        if settings.tf32:
            permit_tf32(model, specs.values())
    inline_functions(model, keep=plugins.keys())
    for value in model.graph.inputs:
        torch_dtype(value.dtype, f"input '{value.name}'")
    return Preparer.prepare(model, plugins)


def choose_device(device: str) -> str:
    """Return "cpu" or "cuda" for `device`, which may be "auto": CUDA where torch sees a GPU.

    Raises:
        InputError: no such device.
        EnvironmentLacks: torch is missing, or "cuda" is asked for and torch sees no GPU.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise unknown_name("device", device, ("cpu", "cuda", "auto"))
    missing = TorchBackend().missing()
    if missing:
        raise EnvironmentLacks(missing)
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise EnvironmentLacks("torch sees no CUDA GPU: install torch with CUDA and mend the driver, or use device cpu")
    return "cpu"
