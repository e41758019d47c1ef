"""The public Python API, re-exported by `optframe`; the command line is a thin layer over it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optframe import accuracy, files, gate, graph, latency, precision
from optframe import feeds as feeds_module
from optframe.accuracy import OutputError
from optframe.backend import BuildOptions, Engine
from optframe.errors import InputError, unknown_name
from optframe.gate import OptimizeResult, Verify
from optframe.latency import Latency
from optframe.onnx_model import OnnxFileModel, OnnxFileOptions
from optframe.pipeline import Pipeline
from optframe.registry import Registry, default_registry
from optframe.report import RunReport, write_html, write_json
from optframe.stage_runner import CORE, StageRunner, Worker
from optframe.stages import DUMP_FOLDER, Run, RunRequest, Source
from optframe.store import Store
from optframe.types import Feeds, Precision

ModelLike = ir.Model | str | os.PathLike[str]
FeedsLike = Sequence[Feeds] | str | os.PathLike[str] | None
ONNX_SUFFIX = ".onnx"


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
    )


def convert_precision(
    model: ModelLike,
    to: Precision,
    *,
    calibration: FeedsLike = None,
    calibrator: str = "entropy",
    keep: Collection[str] = (),
    registry: Registry | None = None,
) -> ir.Model:
    """Return `model` in another precision: "fp16" by casts, "int8" by explicit Q/DQ calibrated on `calibration`.

    `keep` are name patterns of nodes that stay out of INT8.

    Raises:
        InputError: int8 without calibration data, or an unknown precision or calibrator.
    """
    loaded = load(model)
    registry = registry or default_registry()
    if to == "fp32":
        return loaded
    if to == "fp16":
        return precision.to_fp16(loaded, ops=registry.ops())
    if to != "int8":
        raise unknown_name("precision", to, ("fp32", "fp16", "int8"))
    if calibration is None:
        raise InputError("int8 needs data to calibrate on: pass calibration=..., a list of inputs or an .npz file")
    chosen = registry.load_calibrator(calibrator)()
    ranges = precision.calibrate(loaded, read_inputs(calibration, loaded), chosen)
    return precision.quantize(loaded, ranges, keep=tuple(keep), ops=registry.ops())


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
        files.make_folder(target)
        return (registry or default_registry()).load_backend(backend).build(path, target, options or BuildOptions())


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
    expected_model = load(reference)
    samples = read_inputs(inputs, expected_model) if inputs is not None else _two_random(expected_model)
    runs = [run_model(model, samples, backend=backend, registry=registry) for model in (actual, reference)]
    pairs = list(zip(*runs, strict=True))
    others = [pairs[i - 1][1] if len(pairs) > 1 else None for i in range(len(pairs))]
    return accuracy.aggregate(
        [
            accuracy.compare_outputs(a, b, other if _same_shapes(b, other) else None)
            for (a, b), other in zip(pairs, others, strict=True)
        ]
    )


def _two_random(model: ir.Model) -> list[Feeds]:
    return [feeds_module.random_feeds(model, seed) for seed in range(2)]


def _same_shapes(a: Mapping[str, Any], b: Mapping[str, Any] | None) -> bool:
    return b is not None and all(a[name].shape == b[name].shape for name in a)


def run_model(
    model: ModelLike, samples: Sequence[Feeds], *, backend: str = "onnxruntime", registry: Registry | None = None
) -> list[dict[str, Any]]:
    """Return the outputs of `model` for each of `samples`."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = build(model, scratch, backend=backend, registry=registry)
        with (registry or default_registry()).load_backend(backend).open(engine) as runner:
            return [dict(runner.run(sample)) for sample in samples]


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
    sample = read_inputs(inputs, load(model))[0]
    registry = registry or default_registry()
    with tempfile.TemporaryDirectory() as scratch:
        engine = build(model, scratch, backend=backend, options=options, registry=registry)
        with registry.load_backend(backend).open(engine) as runner:
            return latency.measure(runner, sample, device=engine.device)


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
) -> RunReport:
    """Take `model`, a registered name or the path of an ONNX file, through all stages and return the report.

    `options` are the model's own (fields of its adapter's `Options`). With `out`, report.json, report.html, the
    optimised model and the engines are written there; with `dump`, the model after each pass. `store` caches the
    stages; None runs everything anew.

    Raises:
        InputError: the model, an option or the request is wrong, or `out` cannot be written.
        CheckFailed: the exported graph does not equal its source.
        EnvironmentLacks: a library, a device or disk space is missing.
    """
    registry = registry or default_registry()
    source = find_source(model, options or {}, registry)
    target = files.make_folder(Path(out)) if out is not None else None
    with store.work_folder() if store else tempfile.TemporaryDirectory() as work:
        runner = StageRunner(Path(work), store, registry.host)
        execution = Run(source, request or RunRequest(), registry, runner)
        result = execution.execute(command)
        if dump is not None and DUMP_FOLDER in execution.artefacts:
            files.copy(execution.artefacts.pop(DUMP_FOLDER), dump)
        if target is not None:
            _publish(result, execution.artefacts, target)
    return result


def is_file(model: str | os.PathLike[str]) -> bool:
    """Return whether `model` means an ONNX file rather than a registered name."""
    name = os.fspath(model)
    return name.endswith(ONNX_SUFFIX) or os.sep in name or os.path.isfile(name)


def find_source(model: str | os.PathLike[str], options: Mapping[str, Any], registry: Registry) -> Source:
    """Return the source of a run: a registered model, or an ONNX file where `model` looks like a path.

    Raises:
        InputError: there is no such model or file, or the model does not take an option.
    """
    name = os.fspath(model)
    if is_file(model):
        file = OnnxFileModel(OnnxFileOptions(path=Path(name), **_known(OnnxFileOptions, name, options)))
        return Source(Path(name).name, file, CORE)
    claim = registry.contribution("model", name)
    adapter_class = registry.load_model(name)
    adapter = adapter_class(adapter_class.Options(**_known(adapter_class.Options, name, options)))  # type: ignore[call-arg]
    worker = Worker(registry.host.plugin_root(claim.plugin), claim.distribution)
    return Source(name, adapter, worker)


def _known(kind: type[Any], model: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `options` if all are fields of `kind`."""
    names = [field.name for field in fields(kind)]
    for name in options:
        if name not in names:
            raise unknown_name(f"option of model {model}", name, names)
    return options


def _publish(result: RunReport, artefacts: Mapping[str, Path], target: Path) -> None:
    """Copy what a run made to `target`, the report last, so that a report never speaks of what is not there."""
    for name, source in artefacts.items():
        files.copy(source, target / name)
    write_json(result, target / "report.json")
    write_html(result, target / "report.html")
