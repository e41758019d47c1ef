"""The backends `tensorrt` and `tensorrt-rtx`: one implementation over a flavour."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from optframe import environment, files, graph, ops, progress, store
from optframe.backend import BuildOptions, Engine, Runner
from optframe.backends.onnxruntime import check_precision
from optframe.backends.settings import parse_settings
from optframe.errors import InputError, OptframeError, unknown_name
from optframe.types import OpSpec, Precision
from optframe_trt import calls, engine_file, flavours, nvrtc, preflight
from optframe_trt.builder import BuildRequest, BuildResult, UnsupportedNodes
from optframe_trt.engine_file import EngineFacts
from optframe_trt.flavours import Flavour
from optframe_trt.layers import layer_nodes, origins
from optframe_trt.profiles import input_dims, resolve
from optframe_trt.settings import ALL, NONE, OPTION_NAMES, BuildSettings, choose_targets, present_target
from optframe_trt.worker import build_in_worker

ENGINE_FILE = "model.engine"


class TensorRTBackend:
    """Follows `optframe.backend.Backend` for the flavour `name`. Options: see `optframe_trt.settings`."""

    name: ClassVar[str] = "tensorrt"
    option_names = OPTION_NAMES

    def missing(self) -> str | None:
        """Return None if the flavour is installed and can build here, else one line on what is missing."""
        try:
            flavour = flavours.load(self.name)
            if not flavour.can.targets:
                choose_targets(flavour, "")
        except OptframeError as error:
            return str(error)
        return None

    def check(self, options: BuildOptions) -> None:
        """See that the flavour can honour `options`, as far as that shows without a model.

        Raises:
            InputError: an option is unknown or cannot be honoured.
            EnvironmentLacks: the flavour, or a GPU that an option needs, is missing.
        """
        self._settings(options)

    def _settings(self, options: BuildOptions) -> tuple[Flavour, BuildSettings, tuple[str, ...]]:
        """Return the flavour, the options read, and the compute capabilities to build for."""
        settings = parse_settings(BuildSettings, self.name, options.options)
        if options.device == "cpu":
            raise InputError(f"backend {self.name} builds for GPUs, not for --device cpu")
        flavour = flavours.load(self.name)
        settings.check(flavour)
        return flavour, settings, choose_targets(flavour, settings.compute_capability)

    def cannot_run(self) -> str | None:
        """Return None if engines can run here, else why not; they may still be built."""
        present = present_target()
        if present is None:
            return "no GPU"
        flavour = flavours.load(self.name)
        codes = [f"sm{code}" for code in flavour.can.device_codes]
        return f"the GPU here is {present}, which {self.name} does not know" if codes and present not in codes else None

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the flavour and of NVRTC, and the GPU, which is what engines are built for."""
        compilers = ", ".join(".".join(map(str, toolkit.version)) for toolkit in nvrtc.toolkits())
        return {
            self.name: flavours.load(self.name).version,
            "nvrtc": compilers or f"none, so without plugins: {nvrtc.INSTALL}",
            "gpu": environment.machine_name("cuda") if environment.gpus() else "none",
        }

    def variants(self, model: Path, options: BuildOptions) -> Mapping[str, BuildOptions]:
        """Return what to build beside each other: with plugins and without, where nobody chose between them."""
        if "plugins" in options.options or not _plugin_ops(graph.load(model), ALL, options.ops):
            return {"": options}
        return {"": options, "no plugins": replace(options, options={**options.options, "plugins": NONE})}

    def build(self, model: Path, folder: Path, options: BuildOptions) -> Engine:
        """Build `folder`/model.engine, and model.engine.json beside it; neither is there before both are known.

        Raises:
            InputError: the model, precision, profile or an option cannot be honoured, which is found before the build.
            PluginError: a plugin op fails.
            EnvironmentLacks: the flavour, a GPU or NVRTC is missing.
        """
        flavour, settings, targets = self._settings(options)
        loaded = graph.load(model)
        check_precision(model, loaded, options.precision)
        profiles = resolve(settings.profile, input_dims(loaded))
        plugins = _plugin_ops(loaded, settings.plugins, options.ops)
        aot = settings.aot and flavour.can.aot_plugins
        if settings.tf32:
            ops.permit_tf32(loaded, plugins)
        prepare(loaded, plugins, aot=aot)
        engine = Engine(folder / ENGINE_FILE, self.name, options.precision, "cuda")
        with tempfile.TemporaryDirectory(prefix="optframe-") as scratch, files.replacing(engine.path) as built:
            request = BuildRequest(
                flavour=flavour.name,
                source=model.resolve(),
                model=graph.save(loaded, Path(scratch) / "model.onnx"),
                engine=built.resolve(),
                settings=settings,
                targets=targets,
                plugins=plugins,
                aot=aot,
                profiles=profiles,
                timing_cache=_timing_cache(flavour, settings),
            )
            result = _build(flavour, request, loaded, Path(scratch) / "worker.log")
            remarks = [*_remarks(flavour, request, options.precision), *_narrowed(loaded)]
            facts = _facts(options.precision, request, result, loaded, remarks)
            engine_file.write(engine.path, facts)
        return Engine(engine.path, self.name, options.precision, "cuda", facts.warnings)

    def open(self, engine: Engine) -> Runner:
        """Check the engine and everything it needs, then load it.

        Raises:
            InputError: the file is missing, cut off, damaged, or of another flavour or version.
            EnvironmentLacks: a GPU that it is for, a driver or a library is missing.
        """
        facts = engine_file.read(engine.path)
        engine_file.check_file(engine.path, facts)
        engine_file.check_here(engine.path, facts)
        from optframe_trt.runner import TensorRTRunner

        return TensorRTRunner.load(engine.path, facts)


class TensorRTRTXBackend(TensorRTBackend):
    """The same for TensorRT-RTX."""

    name: ClassVar[str] = "tensorrt-rtx"


def prepare(model: ir.Model, plugins: Sequence[OpSpec], *, aot: bool = False) -> None:
    """Bring `model` into the form that the parser takes: calls of `plugins` as plugin nodes, other functions inlined.

    Every node gets a name of its own, by which TensorRT speaks of it. `aot` is for ahead-of-time plugins.
    """
    calls.prepare(model, plugins, aot=aot)
    ops.inline_functions(model)
    NameFixPass()(model)


def _plugin_ops(model: ir.Model, wanted: str, known: Mapping[str, OpSpec]) -> tuple[OpSpec, ...]:
    """Return the ops of `model` that run as plugins: those of `known` with a kernel, as far as `wanted`.

    Raises:
        InputError: `wanted` names an op that nobody registered, or that has no kernel.
    """
    with_kernel = {identifier: spec for identifier, spec in known.items() if spec.kernel is not None}
    if wanted == NONE:
        return ()
    chosen: Collection[str] = with_kernel
    if wanted != ALL:
        chosen = [word.strip() for word in wanted.split(",")]
        for word in chosen:
            if word not in with_kernel:
                raise unknown_name("plugin op (or all, none)", word, with_kernel)
    present = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()}
    return tuple(spec for identifier, spec in with_kernel.items() if identifier in chosen and identifier in present)


def _timing_cache(flavour: Flavour, settings: BuildSettings) -> Path | None:
    """Return the file of timings to use; they are of one version and GPU."""
    if not flavour.can.timing_cache or settings.timing_cache == NONE:
        return None
    if settings.timing_cache:
        return Path(settings.timing_cache).resolve()
    return store.default_root() / flavour.name / f"timings-{flavour.version}-{present_target()}.cache"


def _build(flavour: Flavour, request: BuildRequest, model: ir.Model, log: Path) -> BuildResult:
    try:
        return build_in_worker(request, progress.tell, log)
    except UnsupportedNodes as error:
        raise preflight.refusal(flavour, model, error.nodes) from None


def _remarks(flavour: Flavour, request: BuildRequest, precision: Precision) -> list[str]:
    """Return what the user must know of the engine besides what TensorRT warns of."""
    remarks = []
    if flavour.can.targets and not request.settings.compute_capability and present_target() is None:
        everything = f"no GPU is here, so it is built for all that {flavour.name} knows"
        remarks.append(f"{everything} ({', '.join(request.targets)}); name yours with --compute-capability")
    if precision == "int8" and flavour.can.int8_remark:
        remarks.append(flavour.can.int8_remark)
    return remarks


def _narrowed(model: ir.Model) -> list[str]:
    """Return that inputs and outputs of float64 have become float32, of which the parser says nothing."""
    values = (*model.graph.inputs, *model.graph.outputs)
    names = [value.name or "" for value in values if value.dtype == ir.DataType.DOUBLE]
    return [f"TensorRT has no float64: {', '.join(names)} are float32 in the engine"] if names else []


def _facts(
    precision: Precision, request: BuildRequest, result: BuildResult, model: ir.Model, remarks: Sequence[str]
) -> EngineFacts:
    inside = {spec.identifier: spec.version for spec in request.plugins}
    return EngineFacts(
        backend=request.flavour,
        version=result.version,
        precision=precision,
        targets=request.targets,
        size=request.engine.stat().st_size,
        hashes={"engine": store.hash_file(request.engine), "model": store.hash_file(request.source)},
        inputs=result.inputs,
        outputs=result.outputs,
        plugins={} if request.aot else inside,
        embedded=inside if request.aot else {},
        kernels=result.kernels,
        profiles=tuple({name: asdict(ranges) for name, ranges in profile.items()} for profile in request.profiles),
        settings=asdict(request.settings),
        layers=layer_nodes(result.layers),
        origins=origins(model),
        warnings=(*result.warnings, *remarks),
    )
