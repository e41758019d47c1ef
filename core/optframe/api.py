"""The public Python API, re-exported by `optframe`; the command line is a thin layer over it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import onnx_ir as ir

from optframe import accuracy, engines, files, gate, graph, latency
from optframe import feeds as feeds_module
from optframe.accuracy import OutputError
from optframe.backend import BuildOptions, Engine, Runner
from optframe.details import DetailedRunner, EngineDetails
from optframe.engines import ONNX_SUFFIX
from optframe.errors import InputError, unknown_name
from optframe.gate import OptimizeResult, Verify
from optframe.latency import Latency
from optframe.onnx_model import OnnxFileModel, OnnxFileOptions
from optframe.pass_options import option_default
from optframe.pipeline import Pipeline
from optframe.registry import Registry, default_registry
from optframe.store import Store
from optframe.types import DEFAULT_CALIBRATOR, Feeds, Outputs, Precision

if TYPE_CHECKING:  # what not every call needs is imported by those that do
    from optframe.precision import Ranges, Sensitivity
    from optframe.report import RunReport
    from optframe.stages import RunRequest, Source

ModelLike = ir.Model | str | os.PathLike[str]
FeedsLike = Sequence[Feeds] | str | os.PathLike[str] | None

T = TypeVar("T")


def load(model: ModelLike) -> ir.Model:
    """Return the model at a path, external weights left on disk; a model is returned as it is.

    Raises:
        InputError: no such file, or no usable ONNX model.
    """
    return model if isinstance(model, ir.Model) else graph.load(model)


def read_inputs(inputs: FeedsLike, model: ir.Model) -> Sequence[Feeds]:
    """Return `inputs` as samples; a path is read as `.npz`, None gives one random sample.

    Raises:
        InputError: the file does not fit the model, or nothing can be drawn for it.
    """
    if inputs is None:
        return [feeds_module.random_feeds(model, 0)]
    return feeds_module.read_feeds(Path(inputs), model) if isinstance(inputs, str | os.PathLike) else inputs


def optimize(
    model: ModelLike,
    pipeline: str | Pipeline = "portable",
    *,
    verify: Verify = "each",
    inputs: FeedsLike = None,
    dump: Path | None = None,
    stop_after: str | None = None,
    reproducers: Path | None = None,
    registry: Registry | None = None,
) -> OptimizeResult:
    """Run `pipeline` on `model` and return the new model with a record of every pass; `model` itself stays as it is.

    `verify`: "each" compares after every pass, "end" once at the end, "off" never. `inputs` are real inputs to compare
    on, besides random ones. `dump` gets the model after each pass, `reproducers` what repeats a failure.

    Raises:
        InputError: the model or pipeline text is wrong.
        CheckFailed: with `verify="end"`, the result does not equal the model.
    """
    registry = registry or default_registry()
    loaded = load(model)
    parsed = Pipeline.parse(pipeline, registry) if isinstance(pipeline, str) else pipeline
    return gate.optimize(
        loaded.clone() if isinstance(model, ir.Model) else loaded,
        parsed,
        ops=registry.ops(),
        verify=verify,
        inputs=read_inputs(inputs, loaded) if inputs is not None else (),
        dump=dump,
        stop_after=stop_after,
        reproducer_folder=reproducers,
        on_pass=registry.host.pass_finished,
        on_start=registry.host.pass_started,
    )


def convert_precision(
    model: ModelLike,
    to: Precision,
    *,
    calibration: FeedsLike = None,
    calibrator: str = DEFAULT_CALIBRATOR,
    keep: Collection[str] = (),
    ranges: str | os.PathLike[str] | Ranges | None = None,
    int8_base: Literal["fp32", "fp16"] = "fp32",
    registry: Registry | None = None,
) -> ir.Model:
    """Return `model` in another precision: "fp16" by casts, "int8" by explicit Q/DQ calibrated on `calibration`.

    `keep` are name patterns of nodes that stay out of INT8, and `int8_base` is the precision of all that does.
    `ranges`, or the file of them, take the place of
    `calibration` and `calibrator`.

    Raises:
        InputError: int8 without calibration data, an unknown precision or calibrator, or ranges of another model.
    """
    from optframe import precision

    loaded = load(model)
    registry = registry or default_registry()
    if to == "fp32":
        return loaded
    if to == "fp16":
        return precision.to_fp16(loaded, ops=registry.ops())
    if to != "int8":
        raise unknown_name("precision", to, ("fp32", "fp16", "int8"))
    if ranges is None:
        if calibration is None:
            raise InputError("int8 needs data to calibrate on: pass calibration=..., a list of inputs or an .npz file")
        chosen = registry.make_calibrator(calibrator)
        ranges = precision.calibrate(loaded, read_inputs(calibration, loaded), chosen)
    elif not isinstance(ranges, precision.Ranges):
        ranges = precision.load_ranges(Path(ranges))
    return precision.quantize(loaded, ranges, keep=tuple(keep), base=int8_base, ops=registry.ops())


def build(
    model: ModelLike,
    folder: str | os.PathLike[str],
    *,
    backend: str = "onnxruntime",
    options: BuildOptions | None = None,
    registry: Registry | None = None,
) -> Engine:
    """Build an engine from `model` into `folder` with `backend`.

    Raises:
        InputError: the backend is unknown, or cannot honour the model or an option.
        EnvironmentLacks: a library or device is missing.
    """
    target = Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(model) if not isinstance(model, ir.Model) else graph.save(model, Path(scratch) / "model.onnx")
        registry = registry or default_registry()
        chosen = options or BuildOptions()
        chosen = chosen if chosen.ops else replace(chosen, ops=registry.ops())
        with files.folder_for(target):
            return engines.build(registry.load_backend(backend), path, target, chosen)


def load_engine(
    path: str | os.PathLike[str], *, backend: str | None = None, device: str = "auto", registry: Registry | None = None
) -> Runner:
    """Return a runner for the engine at `path`, after all that it needs has been checked; a context manager.

    What the engine is stands in `<path>.json` beside it, as `build` wrote it. An ONNX file is an engine of the backend
    onnxruntime, unless `backend` says otherwise.

    Raises:
        InputError: a file is missing or damaged, or the engine is of another backend or version than is installed.
        EnvironmentLacks: a library, a driver or a GPU that it is for is missing.
    """
    engine = engines.find(Path(path), backend, device)
    return engines.open_runner((registry or default_registry()).load_backend(engine.backend), engine)


def compare(
    actual: ModelLike,
    reference: ModelLike,
    *,
    inputs: FeedsLike = None,
    backend: str = "onnxruntime",
    registry: Registry | None = None,
) -> dict[str, OutputError]:
    """Return the error of each output of `actual` against `reference`, the worst over all `inputs`.

    Without `inputs`, two random ones are drawn from the types that the reference declares.

    Raises:
        InputError: a file is no model, or the inputs do not fit.
        CheckFailed: the models' outputs differ in name, shape or dtype.
    """
    samples = comparison_inputs(inputs, load(reference))
    return errors_of(*(run_model(model, samples, backend=backend, registry=registry) for model in (actual, reference)))


def comparison_inputs(inputs: FeedsLike, model: ir.Model) -> Sequence[Feeds]:
    """Return `inputs` as samples, or two random ones drawn from the types that `model` declares.

    Raises:
        InputError: the file does not fit the model, or nothing can be drawn for it.
    """
    if inputs is not None:
        return read_inputs(inputs, model)
    return [feeds_module.random_feeds(model, seed) for seed in range(2)]


def sample_shapes(inputs: FeedsLike, model: ir.Model) -> dict[str, list[int]]:
    """Return the shapes of the first of `inputs`, or of a random one; none where `model` leaves them open."""
    try:
        return feeds_module.input_shapes(comparison_inputs(inputs, model)[0])
    except InputError:
        return {}


def errors_of(actual: Sequence[Outputs], expected: Sequence[Outputs]) -> dict[str, OutputError]:
    """Return the error of each output, the worst over all samples; the response is that to the sample before.

    Raises:
        CheckFailed: the outputs differ in name, shape or dtype.
    """
    others = [expected[i - 1] if len(expected) > 1 else None for i in range(len(expected))]
    return accuracy.aggregate(
        [
            accuracy.compare_outputs(a, b, other if _same_shapes(b, other) else None)
            for a, b, other in zip(actual, expected, others, strict=True)
        ]
    )


def _same_shapes(a: Mapping[str, Any], b: Mapping[str, Any] | None) -> bool:
    return b is not None and all(a[name].shape == b[name].shape for name in a)


def run_model(
    model: ModelLike, samples: Sequence[Feeds], *, backend: str = "onnxruntime", registry: Registry | None = None
) -> list[dict[str, Any]]:
    """Return the outputs of `model` for each of `samples`."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = build(model, scratch, backend=backend, registry=registry)
        chosen = (registry or default_registry()).load_backend(backend)
        return [dict(outputs) for outputs in engines.run_samples(chosen, engine, samples)]


def profile(
    model: ModelLike,
    *,
    inputs: FeedsLike = None,
    backend: str = "onnxruntime",
    options: BuildOptions | None = None,
    registry: Registry | None = None,
) -> Latency:
    """Return the latency of `model` on the first of `inputs`, or on a random one; see `optframe.latency.measure`.

    Raises:
        InputError: the model or the inputs are wrong.
        EnvironmentLacks: a library or device is missing.
    """
    return profile_in_detail(model, inputs=inputs, backend=backend, options=options, registry=registry)[0]


def profile_in_detail(
    model: ModelLike,
    *,
    inputs: FeedsLike = None,
    backend: str = "onnxruntime",
    options: BuildOptions | None = None,
    registry: Registry | None = None,
) -> tuple[Latency, EngineDetails | None]:
    """Return the latency of `model`, and what its engine's own tools tell, where the backend has such.

    A path that is no `.onnx` file is an engine that `build` made, which has its own backend and options.

    Raises:
        InputError: the model or the inputs are wrong.
        EnvironmentLacks: a library or device is missing.
    """
    registry = registry or default_registry()
    if not isinstance(model, ir.Model) and Path(model).suffix != ONNX_SUFFIX:
        engine = engines.find(Path(model))
        sample = read_inputs(inputs, engines.signature(engine.path))[0]
        return _profile_engine(engine, sample, registry)
    sample = read_inputs(inputs, load(model))[0]
    with tempfile.TemporaryDirectory() as scratch:
        return _profile_engine(
            build(model, scratch, backend=backend, options=options, registry=registry), sample, registry
        )


def _profile_engine(engine: Engine, sample: Feeds, registry: Registry) -> tuple[Latency, EngineDetails | None]:
    with engines.open_runner(registry.load_backend(engine.backend), engine) as runner:
        measured = latency.measure(runner, sample, device=engine.device)
        return measured, runner.details(sample) if isinstance(runner, DetailedRunner) else None


def run(
    model: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    request: RunRequest | None = None,
    out: str | os.PathLike[str] | None = None,
    dump: Path | None = None,
    store: Store | None = None,
    registry: Registry | None = None,
    command: str = "",
    on_work: Callable[[str, int], None] | None = None,
) -> RunReport:
    """Take `model`, a registered name or the path of an ONNX file, through all stages and return the report.

    `options` are the model's own (fields of its adapter's `Options`). With `out`, report.json, report.html, the
    optimised model and the engines are written there; with `dump`, the model after each pass. `store` caches the
    stages; None runs everything anew. `on_work` is told how many "samples" and "variants" INT8 has been measured on.

    Raises:
        InputError: the model, an option or the request is wrong, or `out` cannot be written.
        CheckFailed: the exported graph does not equal its source.
        EnvironmentLacks: a library, a device or disk space is missing.
    """
    from optframe.stages import DUMP_FOLDER, Run, RunRequest
    from optframe.stages.runner import StageRunner

    registry = registry or default_registry()
    source = find_source(model, options or {}, registry)
    made = files.folder_for(Path(out)) if out is not None else contextlib.nullcontext()
    with made as target, store.work_folder() if store else tempfile.TemporaryDirectory() as work:
        runner = StageRunner(Path(work), store, registry.host)
        execution = Run(source, request or RunRequest(), registry, runner, on_work)
        result = execution.execute(command)
        if dump is not None and DUMP_FOLDER in execution.artefacts:
            for entry in execution.artefacts.pop(DUMP_FOLDER).iterdir():
                files.copy(entry, Path(dump) / entry.name)
        if target is not None:
            _publish(result, execution.artefacts, target)
    return result


def calibrate(
    model: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    request: RunRequest | None = None,
    on_work: Callable[[str, int], None] | None = None,
    store: Store | None = None,
    registry: Registry | None = None,
) -> tuple[Ranges, Sensitivity | None]:
    """Measure the INT8 ranges of `model`, as `run` quantises it: exported and optimised by the request's pipeline.

    Of `request`, `sensitivity` says whether the layers are ranked as well. Arguments are those of `run`; `on_work` is
    told how many "samples" and "variants" have been run. The ranges, saved to a file, are `RunRequest.ranges`.

    Raises:
        InputError: the model, an option or the request is wrong, or there is no usable data to calibrate on.
        EnvironmentLacks: a library or disk space is missing.
    """
    from optframe.stages import Run, RunRequest
    from optframe.stages.runner import StageRunner

    registry = registry or default_registry()
    source = find_source(model, options or {}, registry)
    with store.work_folder() if store else tempfile.TemporaryDirectory() as work:
        runner = StageRunner(Path(work), store, registry.host)
        asked = replace(request or RunRequest(), precisions=("int8",))
        return Run(source, asked, registry, runner, on_work).calibrate()


def is_file(model: str | os.PathLike[str]) -> bool:
    """Return whether `model` means an ONNX file rather than a registered name."""
    name = os.fspath(model)
    return name.endswith(ONNX_SUFFIX) or os.sep in name or os.path.isfile(name)


def find_source(model: str | os.PathLike[str], options: Mapping[str, Any], registry: Registry) -> Source:
    """Return the source of a run: a registered model, or an ONNX file where `model` looks like a path.

    Raises:
        InputError: there is no such model or file, or the model does not take an option.
    """
    from optframe.stages import Source
    from optframe.stages.checked_model import CheckedModel
    from optframe.stages.runner import CORE, Worker

    name = os.fspath(model)
    if is_file(model):
        file = OnnxFileModel(_make_options(OnnxFileOptions, name, {**options, "path": Path(name)}))
        return Source(Path(name).name, file, CORE)
    claim = registry.contribution("model", name)
    adapter_class = registry.load_model(name)
    adapter = adapter_class(_make_options(adapter_class.Options, name, options))  # type: ignore[call-arg]
    worker = Worker(registry.host.plugin_root(claim.plugin), claim.distribution)
    return Source(name, CheckedModel(adapter, registry.what("model", name)), worker)


def _make_options(kind: type[T], model: str, options: Mapping[str, Any]) -> T:
    """Return the options of `model`, which are of `kind`, a dataclass.

    Raises:
        InputError: one is unknown, or one without a default is missing.
    """
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of model {model}", name, known)
    for name, field in known.items():
        if name not in options and option_default(field) is MISSING:
            raise InputError(f"model {model} needs its option '{name}': --model-option {name}=VALUE")
    return kind(**options)


def _publish(result: RunReport, artefacts: Mapping[str, Path], target: Path) -> None:
    """Copy what a run made to `target`, the report last, so that a report never speaks of what is not there."""
    from optframe.report import write_html, write_json

    for name, source in artefacts.items():
        files.copy(source, target / name)
    write_json(result, target / "report.json")
    write_html(result, target / "report.html")
