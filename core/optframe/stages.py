"""The stages of a run and their order: the one file that knows both. Each takes artefacts and leaves artefacts.

export, optimize, reference; then for each precision: calibrate, precision, build, verify, profile; then the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from optframe import accuracy, details, environment, feeds, flops, graph, latency, precision, report
from optframe.accuracy import Limits, OutputError
from optframe.backend import (
    Backend,
    BuildOptions,
    BuildsElsewhere,
    BuildsVariants,
    CheckingBackend,
    Engine,
    NamesOptions,
)
from optframe.backends.onnxruntime import has_precision
from optframe.details import DetailedRunner
from optframe.errors import EnvironmentLacks, InputError, OptframeError, unknown_name
from optframe.gate import OptimizeResult, Verify, optimize, until
from optframe.latency import Latency
from optframe.passes import NearMiss
from optframe.pipeline import Pipeline
from optframe.precision import Ranges, Sensitivity
from optframe.provenance import made_nodes
from optframe.registry import Kind, Registry
from optframe.report import Change, EngineRun, PassRow, RunReport
from optframe.stage_runner import StageResult, StageRunner, Worker
from optframe.types import PRECISIONS, ModelAdapter, Outputs, Precision

MODEL_FILE = "model.onnx"
SAMPLES_FILE = "samples.npz"
FACTS_FILE = "facts.json"
DETAILS_FILE = "details.json"
ENGINE_FILE = "engine.json"
RANGES_FILE = "ranges.json"
SENSITIVITY_FILE = "sensitivity.json"
DUMP_FOLDER = "passes"
REPRODUCERS_FOLDER = "reproducers"
PORTABLE = "portable"
"""The pipeline of a model, or a backend, that wants nothing special."""


@dataclass(frozen=True)
class RunRequest:
    """What a run is asked for; `pipeline` None means the model's own, `keep` names nodes that stay out of INT8.

    A precision in which nothing of the model can run is an error, or with `optional` left out with a warning.
    `int8_base` is the precision of what stays out of INT8. `ranges` is a file of INT8 ranges to use instead of
    calibrating; `sensitivity` ranks the layers by what INT8 in them costs, and proposes which to keep for this error
    over response, in `sensitivity_runs` runs of the model or little more.
    """

    precisions: tuple[Precision, ...] = PRECISIONS
    optional: bool = False
    backends: tuple[str, ...] = ("onnxruntime",)
    pipeline: str | None = None
    calibrator: str = "entropy"
    keep: tuple[str, ...] = ()
    int8_base: Literal["fp32", "fp16"] = "fp32"
    ranges: Path | None = None
    sensitivity: float | None = None
    sensitivity_runs: int = precision.DEFAULT_RUNS
    verify: Verify = "each"
    stop_after: str | None = None
    dump: bool = False
    device: str = "auto"
    backend_options: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[Precision, Limits] = field(default_factory=lambda: accuracy.DEFAULT_LIMITS)


@dataclass(frozen=True)
class Source:
    """The model of a run: how it is called, its adapter, and who brought it."""

    name: str
    adapter: ModelAdapter
    worker: Worker


def wanted_pipeline(adapter: ModelAdapter, registry: Registry, backends: Sequence[str]) -> str:
    """Return the pipeline that the first of `backends` asks for, or the model's own in its place.

    Several backends run the same graph, so that their results can be compared.
    """
    wanted = registry.backend(backends[0]).pipeline if backends else PORTABLE
    own: Mapping[str, str] = getattr(adapter, "pipelines", {})
    return own.get(wanted, wanted if adapter.pipeline == PORTABLE else adapter.pipeline)


class Run:
    """One run of all stages for one model; `execute` gives the report, `artefacts` the files a user wants to keep."""

    def __init__(
        self,
        source: Source,
        request: RunRequest,
        registry: Registry,
        runner: StageRunner,
        on_work: Callable[[str, int], None] | None = None,
    ) -> None:
        """`on_work` is told of "samples" calibrated on and "variants" run for the sensitivity, and how many so far."""
        self.source = source
        self.adapter = source.adapter
        self.request = request
        self.registry = registry
        self.runner = runner
        text = source.adapter.pipeline if request.pipeline is None else request.pipeline
        self.pipeline = Pipeline.parse(text, registry)
        self.backends = {name: registry.load_backend(name) for name in request.backends}
        self.artefacts: dict[str, Path] = {}
        self.warnings: list[str] = []
        self.sensitivity: Sensitivity | None = None
        self._ranges_file: Path | None = None
        self._on_work = on_work or (lambda what, count: None)
        self._check_inputs()

    def execute(self, command: str = "") -> RunReport:
        """Run every stage and return the report; nothing is written outside the runner's work folder."""
        exported = self._export()
        optimized = self._optimize(exported)
        if "int8" in self.request.precisions and self.request.ranges is not None:
            self._ranges(optimized.folder / MODEL_FILE)  # of another model: told before the work of minutes
        expected = self._reference()
        runs, outputs = [], {self.adapter.source: expected[0]}
        for kind in self.request.precisions:
            model = self._convert(optimized.folder / MODEL_FILE, kind)
            if model is None:
                continue
            for name, backend in self.backends.items():
                for run, samples in self._measure(model, kind, name, backend, expected):
                    runs.append(run)
                    if samples:
                        outputs[f"{kind.upper()}{f' {run.place}' if len(self.backends) > 1 else ''}"] = samples[0]
        if "int8" in self.request.precisions:
            self.sensitivity = self._sensitivity(optimized.folder / MODEL_FILE)
        return self._report(exported, optimized, runs, outputs, command)

    def calibrate(self) -> tuple[Ranges, Sensitivity | None]:
        """Run the stages up to calibration; return the ranges of the optimised model and, if asked for, its layers'."""
        model = self._optimize(self._export()).folder / MODEL_FILE
        return precision.load_ranges(self._ranges(model)), self._sensitivity(model)

    def _check_inputs(self) -> None:
        """Look at the user's data and options before the work of minutes begins."""
        until(self.pipeline.steps, self.request.stop_after)
        self._check_options()
        for name, backend in self.backends.items():
            self._check_backend(name, backend)
        self.adapter.feeds()
        if "int8" in self.request.precisions and self.request.ranges is not None:
            precision.load_ranges(self.request.ranges)
        elif "int8" in self.request.precisions:
            self.registry.load_calibrator(self.request.calibrator)
            if next(iter(self.adapter.calibration_feeds()), None) is None:
                raise InputError("int8 needs data to calibrate on, and there is none: leave int8 out of --precision")

    def _check_options(self) -> None:
        """See that each option of backends is one of some backend's, if all tell theirs."""
        if all(isinstance(backend, NamesOptions) for backend in self.backends.values()):
            known = {name for backend in self.backends.values() for name in backend.option_names}  # type: ignore[attr-defined]
            for name in self.request.backend_options:
                if name not in known:
                    raise unknown_name(f"option of backend {', '.join(self.backends)}", name, known)

    def _options(self, kind: Precision, backend: Backend) -> BuildOptions:
        """Return what `backend` is asked to build: of all options those that are its own."""
        options = self.request.backend_options
        if isinstance(backend, NamesOptions):
            options = {name: value for name, value in options.items() if name in backend.option_names}
        return BuildOptions(kind, self.request.device, options, self.registry.ops())

    def _check_backend(self, name: str, backend: Backend) -> None:
        lacking = backend.missing()
        if lacking:
            raise EnvironmentLacks(f"backend {name} does not work here: {lacking}")
        if isinstance(backend, CheckingBackend):
            backend.check(self._options("fp32", backend))

    @cached_property
    def _input_shapes(self) -> dict[str, list[int]]:
        return feeds.input_shapes(self.adapter.feeds()[0])

    def _flops(self, model: ir.Model) -> float:
        return flops.count_flops(model, input_shapes=self._input_shapes, ops=self.registry.ops()).total

    def _int8_fractions(self, model: ir.Model) -> flops.Int8Fractions:
        return flops.int8_fractions(model, input_shapes=self._input_shapes, ops=self.registry.ops())

    def _owner(self, kind: Kind, name: str) -> Worker:
        contribution = self.registry.contribution(kind, name)
        return Worker(self.registry.host.plugin_root(contribution.plugin), contribution.distribution)

    def _adapter_key(self, of: Literal["export", "feeds", "calibration"]) -> tuple[dict[str, Path], dict[str, object]]:
        """Return the adapter's dependencies as inputs, hashed by content, and options."""
        items = {f"{of}.{name}": value for name, value in self.adapter.dependencies(of).items()}
        files = {name: value for name, value in items.items() if isinstance(value, Path)}
        return files, {name: value for name, value in items.items() if name not in files}

    def _export(self) -> StageResult:
        def action(folder: Path) -> None:
            self.adapter.export(folder / MODEL_FILE)

        inputs, options = self._adapter_key("export")
        return self.runner.run("export", action, inputs=inputs, options=options, workers=[self.source.worker])

    def _optimize(self, exported: StageResult) -> StageResult:
        request = self.request

        def action(folder: Path) -> None:
            result = optimize(
                graph.load(exported.folder / MODEL_FILE),
                self.pipeline,
                ops=self.registry.ops(),
                verify=request.verify,
                inputs=self.adapter.feeds()[:1],
                random_inputs=self.adapter.random_feeds,
                dump=folder / DUMP_FOLDER if request.dump else None,
                stop_after=request.stop_after,
                reproducer_folder=folder / REPRODUCERS_FOLDER,
                on_pass=self.registry.host.pass_finished,
                on_start=self.registry.host.pass_started,
            )
            graph.save(result.model, folder / MODEL_FILE)
            _write_json(folder / FACTS_FILE, _optimize_facts(result))

        inputs, options = self._adapter_key("feeds")
        workers = [self._owner("pass", step.name) for step in self.pipeline.steps]
        workers += [self._owner("op", name) for name in self.registry.ops()]
        return self.runner.run(
            "optimize",
            action,
            inputs={"model": exported.folder / MODEL_FILE, **inputs},
            options={
                "pipeline": str(self.pipeline),
                "verify": request.verify,
                "stop_after": request.stop_after,
                "dump": request.dump,
                **options,
            },
            workers=[*workers, self.source.worker],
        )

    def _reference(self) -> list[dict[str, Any]]:
        """Return the source's outputs for every real input."""

        def action(folder: Path) -> None:
            samples = [self.adapter.reference(feed) for feed in self.adapter.feeds()]
            feeds.save_samples(folder / SAMPLES_FILE, samples)

        inputs, options = self._adapter_key("feeds")
        source_inputs, source_options = self._adapter_key("export")
        result = self.runner.run(
            "reference",
            action,
            inputs=inputs | source_inputs,
            options=options | source_options,
            workers=[self.source.worker],
        )
        return feeds.load_samples(result.folder / SAMPLES_FILE)

    def _convert(self, model: Path, kind: Precision) -> Path | None:
        """Return the optimised model in precision `kind`; None if nothing in it can run so, and that may be."""
        if kind == "fp32":
            return model
        inputs = {"model": model}
        if kind == "int8":
            inputs["ranges"] = self._ranges(model)

        def action(folder: Path) -> None:
            loaded, ops = graph.load(model), self.registry.ops()
            warnings: list[str] = []
            if kind == "fp16":
                converted = precision.to_fp16(loaded, ops=ops, warn=warnings.append)
            else:
                ranges = precision.load_ranges(inputs["ranges"])
                converted = precision.quantize(
                    loaded,
                    ranges,
                    keep=self.request.keep,
                    base=self.request.int8_base,
                    ops=ops,
                    warn=warnings.append,
                )
            graph.save(converted, folder / MODEL_FILE)
            _write_json(folder / FACTS_FILE, {"warnings": warnings, "converted": has_precision(converted, kind)})

        options = {"precision": kind, "keep": self.request.keep, "int8_base": self.request.int8_base}
        workers = [self._owner("op", name) for name in self.registry.ops()]
        result = self.runner.run("precision", action, label=kind, inputs=inputs, options=options, workers=workers)
        facts = _read_json(result.folder / FACTS_FILE)
        if not facts["converted"]:
            self._leave_out(kind)
            return None
        self.warnings += facts["warnings"]
        return result.folder / MODEL_FILE

    def _leave_out(self, kind: Precision) -> None:
        problem = f"{kind}: nothing in this model can run in it"
        if not self.request.optional:
            kept = f", since --int8-keep leaves out {', '.join(self.request.keep)}" if self.request.keep else ""
            raise InputError(f"{problem}{kept if kind == 'int8' else ''}; leave {kind} out of --precision")
        self.warnings.append(f"{problem}; it is left out")

    def _ranges(self, model: Path) -> Path:
        """Return the file of INT8 ranges for `model`: the user's, or one measured."""
        if self._ranges_file is None:
            if self.request.ranges is not None:
                precision.load_ranges(self.request.ranges).check(graph.load(model))
            self._ranges_file = self.request.ranges or self._calibrate(model) / RANGES_FILE
        return self._ranges_file

    def _sensitivity(self, model: Path) -> Sensitivity | None:
        target, runs = self.request.sensitivity, self.request.sensitivity_runs
        if target is None:
            return None
        ranges = self._ranges(model)

        def action(folder: Path) -> None:
            found = precision.analyse(
                graph.load(model),
                precision.load_ranges(ranges),
                self.adapter.feeds(),
                target=target,
                runs=runs,
                ops=self.registry.ops(),
                progress=lambda count: self._on_work("variants", count),
            )
            found.save(folder / SENSITIVITY_FILE)

        inputs, options = self._adapter_key("feeds")
        result = self.runner.run(
            "sensitivity",
            action,
            inputs={"model": model, "ranges": ranges, **inputs},
            options={"target": target, "runs": runs, **options},
            workers=[self.source.worker, *(self._owner("op", name) for name in self.registry.ops())],
        )
        return precision.load_sensitivity(result.folder / SENSITIVITY_FILE)

    def _calibrate(self, model: Path) -> Path:
        calibrator = self.request.calibrator

        def action(folder: Path) -> None:
            ranges = precision.calibrate(
                graph.load(model),
                self.adapter.calibration_feeds(),
                self.registry.load_calibrator(calibrator)(),
                progress=lambda count: self._on_work("samples", count),
            )
            ranges.save(folder / RANGES_FILE)

        inputs, options = self._adapter_key("calibration")
        workers = [self.source.worker, self._owner("calibrator", calibrator)]
        options = {"calibrator": calibrator, **options}
        return self.runner.run(
            "calibrate", action, inputs={"model": model, **inputs}, options=options, workers=workers
        ).folder

    def _measure(
        self, model: Path, kind: Precision, name: str, backend: Backend, expected: Sequence[Outputs]
    ) -> Iterator[tuple[EngineRun, list[dict[str, Any]]]]:
        """Build, verify and profile one precision on one backend; yield each build's row and outputs.

        Where engines cannot run here there are no outputs, and the row says why.
        """
        worker = self._owner("backend", name)
        not_run = (backend.cannot_run() if isinstance(backend, BuildsElsewhere) else None) or ""
        common = self._common_facts(model, kind)
        for variant, built in self._variants(model, kind, name, backend, worker):
            engine = _load_engine(built)
            self.warnings += [f"{built.label}: {text}" for text in engine.warnings]
            samples: list[dict[str, Any]] = []
            run = EngineRun(
                backend=name,
                precision=kind,
                outputs={},
                device=engine.device,
                variant=variant,
                not_run=not_run,
                engine_bytes=engine.path.stat().st_size,
                **common,
            )
            if not not_run:
                samples = self._verify(built, engine, backend, worker)
                run = self._profiled(replace(run, outputs=_errors(samples, expected)), built, engine, backend, worker)
            yield run, samples

    def _variants(
        self, model: Path, kind: Precision, name: str, backend: Backend, worker: Worker
    ) -> Iterator[tuple[str, StageResult]]:
        """Build every variant of `model` that the backend offers; one beside the usual that fails gives a warning."""
        options = self._options(kind, backend)
        variants = backend.variants(model, options) if isinstance(backend, BuildsVariants) else {"": options}
        for variant, chosen in variants.items():
            label = f"{name} {kind} {variant}".strip()
            try:
                built = self._build(model, label, chosen, name, backend, worker)
            except OptframeError as error:
                if not variant:
                    raise
                self.warnings.append(f"{label}: cannot be built: {error}")
                continue
            self.artefacts[f"engines/{label.replace(' ', '-')}"] = built.folder
            yield variant, built

    def _common_facts(self, model: Path, kind: Precision) -> dict[str, Any]:
        """Return what all builds of one model have in common in their rows."""
        loaded = graph.load(model)
        share = self._int8_fractions(loaded) if kind == "int8" else None
        return {
            "pipeline": str(self.pipeline),
            "nodes": graph.count_nodes(loaded, self.registry.kernel_ops()),
            "limits": self.request.limits.get(kind, Limits()),
            "int8_flops_fraction": share.all if share else None,
            "int8_conv_flops_fraction": share.convolutions if share else None,
        }

    def _profiled(
        self, run: EngineRun, built: StageResult, engine: Engine, backend: Backend, worker: Worker
    ) -> EngineRun:
        """Return `run` with its latency."""
        profiled = self._profile(built, engine, backend, worker)
        latency_facts = Latency(**_read_json(profiled.folder / FACTS_FILE))
        path = profiled.folder / DETAILS_FILE
        told = details.from_json(_read_json(path)) if path.is_file() else None
        return replace(run, latency=latency_facts, latency_cached=profiled.cached, details=told)

    def _build(
        self, model: Path, label: str, options: BuildOptions, name: str, backend: Backend, worker: Worker
    ) -> StageResult:
        def action(folder: Path) -> None:
            engine = backend.build(model, folder, options)
            facts = asdict(engine) | {"path": engine.path.relative_to(folder).as_posix()}
            _write_json(folder / ENGINE_FILE, facts)

        return self.runner.run(
            "build",
            action,
            label=label,
            inputs={"model": model},
            options={
                "backend": name,
                "versions": backend.versions(),
                "precision": options.precision,
                "device": options.device,
                "options": dict(options.options),
            },
            workers=[worker, *(self._owner("op", op) for op in options.ops)],
        )

    def _verify(self, built: StageResult, engine: Engine, backend: Backend, worker: Worker) -> list[dict[str, Any]]:
        """Return the engine's outputs for every real input."""

        def action(folder: Path) -> None:
            with backend.open(engine) as runner:
                samples = [runner.run(feed) for feed in self.adapter.feeds()]
            feeds.save_samples(folder / SAMPLES_FILE, samples)

        inputs, options = self._adapter_key("feeds")
        result = self.runner.run(
            "verify",
            action,
            label=built.label,
            inputs={"engine": built.folder, **inputs},
            options={**options, "machine": environment.machine_name(engine.device), "versions": backend.versions()},
            workers=[self.source.worker, worker],
        )
        return feeds.load_samples(result.folder / SAMPLES_FILE)

    def _profile(self, built: StageResult, engine: Engine, backend: Backend, worker: Worker) -> StageResult:
        def action(folder: Path) -> None:
            with backend.open(engine) as runner:
                measured = latency.measure(runner, self.adapter.feeds()[0], device=engine.device)
                told = runner.details(self.adapter.feeds()[0]) if isinstance(runner, DetailedRunner) else None
            _write_json(folder / FACTS_FILE, asdict(measured))
            if told is not None:
                _write_json(folder / DETAILS_FILE, asdict(told))

        inputs, options = self._adapter_key("feeds")
        return self.runner.run(
            "profile",
            action,
            label=built.label,
            inputs={"engine": built.folder, **inputs},
            options={**options, "machine": environment.machine_name(engine.device), "versions": backend.versions()},
            workers=[self.source.worker, worker],
        )

    def _report(
        self,
        exported: StageResult,
        optimized: StageResult,
        runs: Sequence[EngineRun],
        outputs: Mapping[str, Outputs],
        command: str,
    ) -> RunReport:
        before, after = (graph.load(stage.folder / MODEL_FILE) for stage in (exported, optimized))
        facts = _read_json(optimized.folder / FACTS_FILE)
        kernels = self.registry.kernel_ops()
        self.artefacts |= {
            "exported.onnx": exported.folder / MODEL_FILE,
            "optimized.onnx": optimized.folder / MODEL_FILE,
        }
        for name in (DUMP_FOLDER, REPRODUCERS_FOLDER):
            if (optimized.folder / name).is_dir():
                self.artefacts[name] = optimized.folder / name
        return RunReport(
            model=self.source.name,
            reference=self.adapter.source,
            input_shapes=self._input_shapes,
            nodes=Change(graph.count_nodes(before, kernels), graph.count_nodes(after, kernels)),
            passes=tuple(_pass_row(row) for row in facts["passes"]),
            runs=tuple(runs),
            op_histogram=Change(graph.op_histogram(before, kernels), graph.op_histogram(after, kernels)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            warnings=(*facts["warnings"], *self.warnings),
            notes=tuple(self.adapter.notes()),
            flops=Change(*(self._flops(model) for model in (before, after))),
            provenance=report.count_provenance(after),
            made=tuple(made_nodes(after)),
            stages=tuple(self.runner.results),
            illustrations=tuple(self.adapter.illustrate(outputs)),
            environment=environment.describe(),
            sensitivity=self.sensitivity,
        )


def _optimize_facts(result: OptimizeResult) -> dict[str, Any]:
    rows = [
        PassRow(
            name=record.name,
            modified=record.modified,
            nodes_before=record.nodes_before,
            nodes_after=record.nodes_after,
            seconds=record.seconds,
            verified=record.verified in ("equal", "unchanged"),
            status=record.verified,
            rolled_back=record.verified == "rolled-back",
            note=record.reason,
            rewrites=record.rewrites,
            op_changes=record.op_changes,
            near_misses=record.near_misses,
        )
        for record in result.records
    ]
    return {"passes": [asdict(row) for row in rows], "warnings": list(result.warnings), "verified": result.verified}


def _pass_row(facts: Mapping[str, Any]) -> PassRow:
    misses = tuple(NearMiss(**miss) for miss in facts["near_misses"])
    return PassRow(**{**facts, "near_misses": misses})


def _load_engine(built: StageResult) -> Engine:
    facts = _read_json(built.folder / ENGINE_FILE)
    return Engine(**{**facts, "path": built.folder / facts["path"], "warnings": tuple(facts["warnings"])})


def _errors(samples: Sequence[Outputs], expected: Sequence[Outputs]) -> dict[str, OutputError]:
    """Return the worst error of each output over all inputs; each is judged against another input's response."""
    others = [expected[i - 1] if len(expected) > 1 else None for i in range(len(expected))]
    return accuracy.aggregate(
        [accuracy.compare_outputs(*triple) for triple in zip(samples, expected, others, strict=True)]
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, default=str), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
