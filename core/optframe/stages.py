"""The stages of a run and their order: the one file that knows both. Each takes artefacts and leaves artefacts.

export, optimize, reference; then for each precision: calibrate, precision, build, verify, profile; then the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from optframe import accuracy, environment, feeds, flops, graph, latency, precision, report
from optframe.accuracy import Limits, OutputError
from optframe.backend import Backend, BuildOptions, Engine
from optframe.errors import InputError
from optframe.gate import OptimizeResult, Verify, optimize
from optframe.latency import Latency
from optframe.passes import NearMiss
from optframe.pipeline import Pipeline
from optframe.registry import Kind, Registry
from optframe.report import Change, EngineRun, PassRow, RunReport
from optframe.stage_runner import StageResult, StageRunner, Worker
from optframe.types import PRECISIONS, ModelAdapter, Outputs, Precision

MODEL_FILE = "model.onnx"
SAMPLES_FILE = "samples.npz"
FACTS_FILE = "facts.json"
ENGINE_FILE = "engine.json"
RANGES_FILE = "ranges.json"
DUMP_FOLDER = "passes"
REPRODUCERS_FOLDER = "reproducers"


@dataclass(frozen=True)
class RunRequest:
    """What a run is asked for; `pipeline` None means the model's own, `keep` names nodes that stay out of INT8."""

    precisions: tuple[Precision, ...] = PRECISIONS
    backends: tuple[str, ...] = ("onnxruntime",)
    pipeline: str | None = None
    calibrator: str = "entropy"
    keep: tuple[str, ...] = ()
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


class Run:
    """One run of all stages for one model; `execute` gives the report, `artefacts` the files a user wants to keep."""

    def __init__(self, source: Source, request: RunRequest, registry: Registry, runner: StageRunner) -> None:
        self.source = source
        self.adapter = source.adapter
        self.request = request
        self.registry = registry
        self.runner = runner
        self.pipeline = Pipeline.parse(request.pipeline or source.adapter.pipeline, registry)
        self.backends = {name: registry.load_backend(name) for name in request.backends}
        self.artefacts: dict[str, Path] = {}
        self.warnings: list[str] = []
        self._check_inputs()

    def execute(self, command: str = "") -> RunReport:
        """Run every stage and return the report; nothing is written outside the runner's work folder."""
        exported = self._export()
        optimized = self._optimize(exported)
        expected = self._reference()
        runs, outputs = [], {self.adapter.source: expected[0]}
        for kind in self.request.precisions:
            model = self._convert(optimized.folder / MODEL_FILE, kind)
            for name, backend in self.backends.items():
                run, samples = self._measure(model, kind, name, backend, expected)
                runs.append(run)
                outputs[f"{kind.upper()}{f' {name}' if len(self.backends) > 1 else ''}"] = samples[0]
        return self._report(exported, optimized, runs, outputs, command)

    def _check_inputs(self) -> None:
        """Look at the user's data before the work of minutes begins."""
        self.adapter.feeds()
        if "int8" in self.request.precisions:
            self.registry.load_calibrator(self.request.calibrator)
            if next(iter(self.adapter.calibration_feeds()), None) is None:
                raise InputError("int8 needs data to calibrate on, and there is none: leave int8 out of --precision")

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

    def _convert(self, model: Path, kind: Precision) -> Path:
        """Return the optimised model in precision `kind`."""
        if kind == "fp32":
            return model
        inputs = {"model": model}
        if kind == "int8":
            inputs["ranges"] = self._calibrate(model) / RANGES_FILE

        def action(folder: Path) -> None:
            loaded, ops = graph.load(model), self.registry.ops()
            warnings: list[str] = []
            if kind == "fp16":
                converted = precision.to_fp16(loaded, ops=ops, warn=warnings.append)
            else:
                ranges = precision.load_ranges(inputs["ranges"])
                converted = precision.quantize(loaded, ranges, keep=self.request.keep, ops=ops, warn=warnings.append)
            graph.save(converted, folder / MODEL_FILE)
            _write_json(folder / FACTS_FILE, {"warnings": warnings})

        options = {"precision": kind, "keep": self.request.keep}
        workers = [self._owner("op", name) for name in self.registry.ops()]
        result = self.runner.run("precision", action, label=kind, inputs=inputs, options=options, workers=workers)
        self.warnings += _read_json(result.folder / FACTS_FILE)["warnings"]
        return result.folder / MODEL_FILE

    def _calibrate(self, model: Path) -> Path:
        calibrator = self.request.calibrator

        def action(folder: Path) -> None:
            ranges = precision.calibrate(
                graph.load(model), self.adapter.calibration_feeds(), self.registry.load_calibrator(calibrator)()
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
    ) -> tuple[EngineRun, list[dict[str, Any]]]:
        """Build, verify and profile one precision on one backend; return its row and its outputs."""
        worker = self._owner("backend", name)
        built = self._build(model, kind, name, backend, worker)
        engine = _load_engine(built)
        samples = self._verify(built, engine, backend, worker)
        profiled = self._profile(built, engine, backend, worker)
        loaded = graph.load(model)
        share = (
            flops.int8_fractions(loaded, input_shapes=self._input_shapes, ops=self.registry.ops())
            if kind == "int8"
            else None
        )
        run = EngineRun(
            backend=name,
            precision=kind,
            pipeline=str(self.pipeline),
            nodes=graph.count_nodes(loaded, self.registry.kernel_ops()),
            outputs=_errors(samples, expected),
            limits=self.request.limits.get(kind, Limits()),
            latency=Latency(**_read_json(profiled.folder / FACTS_FILE)),
            latency_cached=profiled.cached,
            device=engine.device,
            int8_flops_fraction=share.all if share else None,
            int8_conv_flops_fraction=share.convolutions if share else None,
        )
        self.artefacts[f"engines/{name}-{kind}"] = built.folder
        return run, samples

    def _build(self, model: Path, kind: Precision, name: str, backend: Backend, worker: Worker) -> StageResult:
        options = BuildOptions(kind, self.request.device, self.request.backend_options)

        def action(folder: Path) -> None:
            engine = backend.build(model, folder, options)
            facts = asdict(engine) | {"path": engine.path.relative_to(folder).as_posix()}
            _write_json(folder / ENGINE_FILE, facts)

        return self.runner.run(
            "build",
            action,
            label=f"{name} {kind}",
            inputs={"model": model},
            options={"backend": name, "versions": backend.versions(), **asdict(options)},
            workers=[worker],
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
            _write_json(folder / FACTS_FILE, asdict(measured))

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
            stages=tuple(self.runner.results),
            illustrations=tuple(self.adapter.illustrate(outputs)),
            environment=environment.describe(),
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
    return Engine(**{**facts, "path": built.folder / facts["path"]})


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
