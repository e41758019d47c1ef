"""Builds an engine from an ONNX file with TensorRT's own objects; runs in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optframe import files, graph
from optframe.errors import InputError
from optframe.types import OpSpec
from optframe_trt import aot, creators, flavours, preflight
from optframe_trt.fields import INPUTS
from optframe_trt.flavours import Flavour
from optframe_trt.preflight import Unsupported
from optframe_trt.profiles import Profile
from optframe_trt.progress import Tell, monitor
from optframe_trt.registration import Registration
from optframe_trt.settings import BuildSettings

if TYPE_CHECKING:
    import tensorrt as trt

MIB = 1 << 20

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""TensorRT's names of types that differ from ours by more than case."""


@dataclass(frozen=True)
class BuildRequest:
    """A build: the prepared ONNX file, where the engine goes, and how.

    `plugins` are the ops that run as plugins, ahead-of-time ones with `aot`; `source` is the ONNX file before it was
    prepared for them.
    """

    flavour: str
    source: Path
    model: Path
    engine: Path
    settings: BuildSettings
    targets: tuple[str, ...]
    plugins: tuple[OpSpec, ...] = ()
    aot: bool = False
    profiles: tuple[Profile, ...] = ()
    timing_cache: Path | None = None


@dataclass(frozen=True)
class TensorFacts:
    """An input or output of an engine; a dynamic dimension is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerFacts:
    """A layer of the network that the parser made: its name, type, and the ONNX nodes that TensorRT says it is from."""

    name: str
    type: str
    metadata: str


@dataclass(frozen=True)
class KernelFacts:
    """The PTX of a plugin inside the engine: its node, entry, target (89), ISA (8, 8), compiler and hash."""

    node: str
    entry: str
    target: int
    isa: tuple[int, int]
    nvrtc: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class BuildResult:
    """What a build found out, besides the engine that it wrote."""

    version: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    layers: tuple[LayerFacts, ...]
    kernels: tuple[KernelFacts, ...]
    warnings: tuple[str, ...]


class UnsupportedNodes(Exception):
    """The parser does not take these nodes; the caller, who has the model, says it in words."""

    def __init__(self, nodes: Sequence[Unsupported]) -> None:
        super().__init__(f"{len(nodes)} nodes")
        self.nodes = tuple(nodes)


class Cancelled(Exception):
    """The build was cancelled."""


@dataclass
class Log:
    """What TensorRT's logger heard."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def build(request: BuildRequest, tell: Tell, cancelled: Callable[[], bool]) -> BuildResult:
    """Build the engine and write it.

    Raises:
        UnsupportedNodes: the parser does not take the model.
        InputError: the builder does not, or a setting cannot be honoured.
        PluginError: a plugin failed.
        EnvironmentLacks: the flavour or NVRTC is missing.
        Cancelled: `cancelled` returned True.
    """
    flavour = flavours.load(request.flavour)
    flavour.require_safe_parser()
    log = Log()
    logger = make_logger(flavour, log)
    registration = _register(flavour, request)
    builder: trt.Builder = flavour.module.Builder(logger)
    network = _parse(flavour, builder, request, logger, registration)
    config = _configure(flavour, builder, request)
    config.progress_monitor = monitor(flavour, tell, cancelled)
    _add_profiles(builder, config, network, request.profiles)
    serialized: Any = builder.build_serialized_network(network, config)
    registration.raise_errors()
    if serialized is None:
        raise Cancelled if cancelled() else _build_error(flavour, log)
    files.write_bytes(request.engine, memoryview(serialized))
    _keep_timings(config, request.timing_cache)
    return _facts(flavour, network, registration, log)


def _register(flavour: Flavour, request: BuildRequest) -> Registration:
    if request.aot:
        return aot.register(flavour, request.plugins, request.targets, graph.load(request.source))
    return creators.register(flavour, request.plugins, request.targets)


_loggers: list[Any] = []
"""TensorRT writes to the first logger of a process until the process ends, so none may be freed."""


def make_logger(flavour: Flavour, log: Log) -> Any:
    """Return an `ILogger` that keeps warnings and errors in `log`, and prints nothing."""
    base: Any = flavour.module.ILogger
    severities: Any = base.Severity

    class Logger(base):  # type: ignore[misc]  # the base is known only once a flavour is loaded
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                log.errors.append(message)
            elif severity == severities.WARNING and INPUTS not in message:  # an attribute of ours that may be absent
                log.warnings.append(message)

    _loggers.append(Logger())
    return _loggers[-1]


def _parse(
    flavour: Flavour, builder: trt.Builder, request: BuildRequest, logger: Any, registration: Registration
) -> trt.INetworkDefinition:
    """Return the network of the model, once the pre-flight finds every node supported."""
    nodes = preflight.unsupported(flavour, request.model, logger)
    registration.raise_errors()
    if nodes:
        raise UnsupportedNodes(nodes)
    network = builder.create_network(preflight.network_flags(flavour))
    parser: trt.OnnxParser = flavour.module.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(request.model))
    registration.raise_errors()
    if not parsed:
        raise UnsupportedNodes(preflight.parser_errors(parser))
    return network


def _configure(flavour: Flavour, builder: trt.Builder, request: BuildRequest) -> trt.IBuilderConfig:
    settings, module = request.settings, flavour.module
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    flags: dict[trt.BuilderFlag, bool] = {
        module.BuilderFlag.TF32: settings.tf32,
        module.BuilderFlag.VERSION_COMPATIBLE: settings.version_compatible,
        module.BuilderFlag.STRIP_PLAN: settings.strip,
    }
    for flag, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(flag)
    if settings.workspace:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace * MIB)
    verbosity: type[trt.ProfilingVerbosity] = module.ProfilingVerbosity
    config.profiling_verbosity = verbosity.DETAILED if settings.layer_names else verbosity.NONE
    if flavour.can.targets:
        _set_targets(module, config, request.targets)
    if request.timing_cache is not None:
        known = request.timing_cache.read_bytes() if request.timing_cache.is_file() else b""
        # False where the timings are of another GPU or version: the build then starts without them.
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _set_targets(module: Any, config: Any, targets: Sequence[str]) -> None:
    """Name the compute capabilities; the stubs are of a TensorRT that has no such setting."""
    config.num_compute_capabilities = len(targets)
    for number, target in enumerate(targets):
        config.set_compute_capability(getattr(module.ComputeCapability, target.upper()), number)


def _add_profiles(
    builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, profiles: Sequence[Profile]
) -> None:
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        if tensor.is_shape_tensor and profiles:
            raise InputError(
                f"input '{tensor.name}' decides shapes by its values, which profiles here cannot give: "
                "export the model with that input as a constant"
            )
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            sizes: tuple[Any, Any, Any] = (shapes.min, shapes.opt, shapes.max)  # the stubs want Dims
            try:
                profile.set_shape(name, *sizes)
            except RuntimeError as error:
                raise _profile_error(ranges) from error
        if config.add_optimization_profile(profile) < 0:
            raise _profile_error(ranges)


def _profile_error(ranges: Profile) -> InputError:
    described = ", ".join(f"{name}: {shapes.min} to {shapes.max}" for name, shapes in ranges.items())
    return InputError(f"TensorRT refuses the profile {described}; see whether min, opt and max fit")


def _build_error(flavour: Flavour, log: Log) -> InputError:
    said = " ".join((log.errors or ["it does not say why"])[-1].split())
    return InputError(f"{flavour.name} {flavour.version} cannot build this model: {said[:400]}")


def _keep_timings(config: trt.IBuilderConfig, path: Path | None) -> None:
    if path is None:
        return
    cache: Any = config.get_timing_cache()
    if cache is not None:
        files.write_bytes(path, memoryview(cache.serialize()))


def _facts(flavour: Flavour, network: trt.INetworkDefinition, registration: Registration, log: Log) -> BuildResult:
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return BuildResult(
        version=flavour.version,
        inputs=tuple(_tensor(network.get_input(number)) for number in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(number)) for number in range(network.num_outputs)),
        layers=tuple(LayerFacts(layer.name, layer.type.name, layer.metadata) for layer in layers),
        kernels=tuple(_kernels(registration)),
        warnings=tuple(dict.fromkeys(" ".join(text.split()) for text in log.warnings)),
    )


def _tensor(tensor: trt.ITensor) -> TensorFacts:
    return TensorFacts(tensor.name, dtype_name(tensor.dtype), tuple(tensor.shape))


def dtype_name(dtype: trt.DataType) -> str:
    """Return TensorRT's type as "float32", "int8", ..."""
    name: str = dtype.name
    return DTYPES.get(name, name.lower())


def _kernels(registration: Registration) -> list[KernelFacts]:
    compiled: Mapping[str, Sequence[Any]] = registration.kernels
    return [
        KernelFacts(node, k.entry, k.ptx.target, k.ptx.isa, k.ptx.nvrtc, k.sha256)
        for node, kernels in sorted(compiled.items())
        for k in kernels
    ]
