"""The order of a run's stages: the one place that knows it. Each takes artefacts and leaves artefacts.

export, optimize, reference; then for each precision: calibrate, precision, build, verify, profile; then the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optframe import environment, feeds, flops, graph, precision, report
from optframe.errors import InputError
from optframe.gate import OptimizeResult, optimize, until
from optframe.passes import NearMiss
from optframe.pipeline import Pipeline
from optframe.precision import Ranges, Sensitivity
from optframe.provenance import made_nodes
from optframe.registry import Registry
from optframe.report import Change, EngineRun, PassRow, RunReport
from optframe.stages.context import (
    FACTS_FILE,
    MODEL_FILE,
    SAMPLES_FILE,
    Context,
    RunRequest,
    Source,
    read_json,
    write_json,
)
from optframe.stages.conversion import Conversion
from optframe.stages.engines import EngineStages, check_options
from optframe.stages.runner import StageResult, StageRunner
from optframe.types import ModelAdapter, Outputs, Precision

DUMP_FOLDER = "passes"
REPRODUCERS_FOLDER = "reproducers"
PORTABLE = "portable"
"""The pipeline of a model, or a backend, that wants nothing special."""


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
        self.context = Context(source, request, registry, runner, on_work or (lambda what, count: None))
        text, where = request.pipeline, "pipeline"
        if text is None:
            text = wanted_pipeline(source.adapter, registry, request.backends)
            where = f"the pipeline that {source.name} has for {' and '.join(request.backends) or 'no backend'}"
        self.pipeline = Pipeline.parse(text, registry, where)
        self.conversion = Conversion(self.context)
        self.engines = [
            EngineStages(self.context, name, registry.load_backend(name), str(self.pipeline))
            for name in request.backends
        ]
        self._check_inputs()

    @property
    def artefacts(self) -> dict[str, Path]:
        """What a user wants to keep: name in the output folder -> file or folder."""
        return self.context.artefacts

    def execute(self, command: str = "") -> RunReport:
        """Run every stage and return the report; nothing is written outside the runner's work folder."""
        request, source = self.context.request, self.context.adapter.source
        exported = self._export()
        optimized = self._optimize(exported)
        model = optimized.folder / MODEL_FILE
        if "int8" in request.precisions and request.ranges is not None:
            self.conversion.ranges(model)  # of another model: told before the work of minutes
        expected = self._reference()
        runs, outputs = [], {source: expected[0]}
        for kind in request.precisions:
            converted = self.conversion.convert(model, kind)
            if converted is None:
                continue
            for engine in self.engines:
                for run, samples in engine.measure(converted, kind, expected):
                    runs.append(run)
                    if samples:
                        outputs[f"{kind.upper()}{f' {run.place}' if len(self.engines) > 1 else ''}"] = samples[0]
        sensitivity = self.conversion.sensitivity(model) if "int8" in request.precisions else None
        return self._report(exported, optimized, runs, outputs, sensitivity, command)

    def calibrate(self) -> tuple[Ranges, Sensitivity | None]:
        """Run the stages up to calibration; return the ranges of the optimised model and, if asked for, its layers'."""
        model = self._optimize(self._export()).folder / MODEL_FILE
        return precision.load_ranges(self.conversion.ranges(model)), self.conversion.sensitivity(model)

    def _check_inputs(self) -> None:
        """Look at the user's data and options before the work of minutes begins."""
        request, registry, adapter = self.context.request, self.context.registry, self.context.adapter
        until(self.pipeline.steps, request.stop_after)
        check_options(request.backend_options, {engine.name: engine.backend for engine in self.engines})
        for engine in self.engines:
            engine.check()
        adapter.feeds()
        if "int8" in request.precisions and request.ranges is not None:
            precision.load_ranges(request.ranges)
        elif "int8" in request.precisions:
            registry.make_calibrator(request.calibrator)
            if next(iter(adapter.calibration_feeds()), None) is None:
                raise InputError("int8 needs data to calibrate on, and there is none: leave int8 out of --precision")

    def _export(self) -> StageResult:
        def action(folder: Path) -> None:
            self.context.adapter.export(folder / MODEL_FILE)

        inputs, options = self.context.key("export")
        workers = [self.context.source.worker]
        return self.context.runner.run("export", action, inputs=inputs, options=options, workers=workers)

    def _optimize(self, exported: StageResult) -> StageResult:
        request = self.context.request

        def action(folder: Path) -> None:
            result = optimize(
                graph.load(exported.folder / MODEL_FILE),
                self.pipeline,
                ops=self.context.registry.ops(),
                verify=request.verify,
                inputs=self.context.adapter.feeds()[:1],
                random_inputs=self.context.adapter.random_feeds,
                dump=folder / DUMP_FOLDER if request.dump else None,
                stop_after=request.stop_after,
                reproducer_folder=folder / REPRODUCERS_FOLDER,
                on_pass=self.context.registry.host.pass_finished,
                on_start=self.context.registry.host.pass_started,
            )
            graph.save(result.model, folder / MODEL_FILE)
            write_json(folder / FACTS_FILE, _optimize_facts(result))

        inputs, options = self.context.key("feeds")
        workers = self.context.owners("pass", [step.name for step in self.pipeline.steps])
        workers += self.context.owners("op", self.context.registry.ops())
        return self.context.runner.run(
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
            workers=[*workers, self.context.source.worker],
        )

    def _reference(self) -> list[dict[str, Any]]:
        """Return the source's outputs for every real input."""

        def action(folder: Path) -> None:
            samples = [self.context.adapter.reference(feed) for feed in self.context.adapter.feeds()]
            feeds.save_samples(folder / SAMPLES_FILE, samples)

        inputs, options = self.context.key("feeds")
        source_inputs, source_options = self.context.key("export")
        result = self.context.runner.run(
            "reference",
            action,
            inputs=inputs | source_inputs,
            options=options | source_options,
            workers=[self.context.source.worker],
        )
        return feeds.load_samples(result.folder / SAMPLES_FILE)

    def _report(
        self,
        exported: StageResult,
        optimized: StageResult,
        runs: Sequence[EngineRun],
        outputs: Mapping[str, Outputs],
        sensitivity: Sensitivity | None,
        command: str,
    ) -> RunReport:
        before, after = (graph.load(stage.folder / MODEL_FILE) for stage in (exported, optimized))
        facts = read_json(optimized.folder / FACTS_FILE)
        kernels = self.context.registry.kernel_ops()
        self.artefacts.update(
            {
                "exported.onnx": exported.folder / MODEL_FILE,
                "optimized.onnx": optimized.folder / MODEL_FILE,
            }
        )
        for name in (DUMP_FOLDER, REPRODUCERS_FOLDER):
            if (optimized.folder / name).is_dir():
                self.artefacts[name] = optimized.folder / name
        return RunReport(
            model=self.context.source.name,
            reference=self.context.adapter.source,
            input_shapes=self.context.input_shapes,
            nodes=Change(graph.count_nodes(before, kernels), graph.count_nodes(after, kernels)),
            passes=tuple(_pass_row(row) for row in facts["passes"]),
            runs=tuple(runs),
            op_histogram=Change(graph.op_histogram(before, kernels), graph.op_histogram(after, kernels)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            warnings=(*facts["warnings"], *self.context.warnings),
            notes=tuple(self._notes({run.precision for run in runs})),
            flops=Change(*(self._flops(model) for model in (before, after))),
            provenance=report.count_provenance(after),
            made=tuple(made_nodes(after)),
            stages=tuple(self.context.runner.results),
            illustrations=tuple(self.context.adapter.illustrate(outputs)),
            environment=environment.describe(),
            sensitivity=sensitivity,
        )

    def _notes(self, precisions: Collection[Precision]) -> Iterator[str]:
        """Yield what the model says of the parts that it had in the run, and why a precision is not in it."""
        request, adapter = self.context.request, self.context.adapter
        yield from (*adapter.notes("export"), *adapter.notes("feeds"))
        if "int8" in precisions and request.ranges is None:
            yield from adapter.notes("calibration")
        if request.optional and "int8" not in request.precisions:
            yield "INT8 was left out: there is nothing to calibrate it on; pass --inputs or --calibration-images."

    def _flops(self, model: ir.Model) -> float:
        shapes, ops = self.context.input_shapes, self.context.registry.ops()
        return flops.count_flops(model, input_shapes=shapes, ops=ops).total


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
