"""The stages from a model in one precision to its figures on one backend: build, verify, profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optframe import accuracy, engines, environment, feeds, flops, graph, latency, typed_json
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
from optframe.details import DetailedRunner, EngineDetails
from optframe.errors import EnvironmentLacks, OptframeError, PluginError, a_type, unknown_name
from optframe.latency import Latency
from optframe.report import EngineRun
from optframe.stages.context import FACTS_FILE, SAMPLES_FILE, Context, read_json, write_json
from optframe.stages.runner import StageResult
from optframe.types import Outputs, Precision

DETAILS_FILE = "details.json"
ENGINE_FILE = "engine.json"


def check_options(names: Mapping[str, str], backends: Mapping[str, Backend]) -> None:
    """See that each option of backends is one of some backend's, if all tell theirs.

    Raises:
        InputError: one is not.
    """
    tell = [backend for backend in backends.values() if isinstance(backend, NamesOptions)]
    if len(tell) < len(backends):
        return
    known = {name for backend in tell for name in backend.option_names}
    for name in names:
        if name not in known:
            raise unknown_name(f"option of backend {', '.join(backends)}", name, known)


class EngineStages:
    """What a run does on one backend, called `name`. `pipeline` is the text that made the model."""

    def __init__(self, context: Context, name: str, backend: Backend, pipeline: str) -> None:
        self.context = context
        self.name = name
        self.backend = backend
        self.pipeline = pipeline
        self.worker = context.owner("backend", name)

    def check(self) -> None:
        """Look at what the backend needs and is asked for, before the work of minutes begins.

        Raises:
            EnvironmentLacks: it does not work here.
            InputError: an option is not to be honoured.
        """
        lacking = self.backend.missing()
        if not isinstance(lacking, str | None):
            raise PluginError(f"backend {self.name}: missing() gives {a_type(lacking)}, not None or text")
        if lacking:
            raise EnvironmentLacks(f"backend {self.name} does not work here: {lacking}")
        _ = self._versions  # which it may give wrongly
        if isinstance(self.backend, CheckingBackend):
            self.backend.check(self._options("fp32"))

    @cached_property
    def _versions(self) -> Mapping[str, str]:
        """What the backend says of itself and of what it builds with, asked once a run."""
        versions: object = self.backend.versions()
        if not isinstance(versions, Mapping):
            raise PluginError(f"backend {self.name}: versions() gives {a_type(versions)}, not a mapping")
        return versions

    def _options(self, kind: Precision) -> BuildOptions:
        """Return what the backend is asked to build: of all options those that are its own."""
        request, options = self.context.request, self.context.request.backend_options
        if isinstance(self.backend, NamesOptions):
            options = {name: value for name, value in options.items() if name in self.backend.option_names}
        return BuildOptions(kind, request.device, options, self.context.registry.ops())

    def measure(
        self, model: Path, kind: Precision, expected: Sequence[Outputs]
    ) -> Iterator[tuple[EngineRun, list[dict[str, Any]]]]:
        """Build, verify and profile `model`; yield each build's row and outputs, whose errors are against `expected`.

        Where engines cannot run here there are no outputs, and the row says why.
        """
        not_run = (self.backend.cannot_run() if isinstance(self.backend, BuildsElsewhere) else None) or ""
        common = self._common_facts(model, kind)
        for variant, built in self._variants(model, kind):
            engine = _load_engine(built)
            self.context.warnings += [f"{built.label}: {text}" for text in engine.warnings]
            samples: list[dict[str, Any]] = []
            run = EngineRun(
                backend=self.name,
                precision=kind,
                outputs={},
                device=engine.device,
                variant=variant,
                not_run=not_run,
                engine_bytes=engine.path.stat().st_size,
                **common,
            )
            if not not_run:
                samples = self._verify(built, engine)
                run = self._profiled(replace(run, outputs=_errors(samples, expected)), built, engine)
            yield run, samples

    def _variants(self, model: Path, kind: Precision) -> Iterator[tuple[str, StageResult]]:
        """Build every variant of `model` that the backend offers; one that fails gives a warning, if any is built."""
        options = self._options(kind)
        variants = self.backend.variants(model, options) if isinstance(self.backend, BuildsVariants) else {"": options}
        failures: list[OptframeError] = []
        for variant, chosen in variants.items():
            label = f"{self.name} {kind} {variant}".strip()
            try:
                built = self._build(model, label, chosen)
            except OptframeError as error:
                failures.append(error)
                self.context.warnings.append(f"{label}: cannot be built: {error}")
                continue
            self.context.artefacts[f"engines/{label.replace(' ', '-')}"] = built.folder
            yield variant, built
        if len(failures) == len(variants):
            raise failures[0]

    def _common_facts(self, model: Path, kind: Precision) -> dict[str, Any]:
        """Return what all builds of one model have in common in their rows."""
        loaded = graph.load(model)
        share = None
        if kind == "int8":
            share = flops.int8_fractions(
                loaded, input_shapes=self.context.input_shapes, ops=self.context.registry.ops()
            )
        return {
            "pipeline": self.pipeline,
            "nodes": graph.count_nodes(loaded, self.context.registry.kernel_ops()),
            "limits": self.context.request.limits.get(kind, Limits()),
            "int8_flops_fraction": share.all if share else None,
            "int8_conv_flops_fraction": share.convolutions if share else None,
        }

    def _profiled(self, run: EngineRun, built: StageResult, engine: Engine) -> EngineRun:
        """Return `run` with its latency."""
        profiled = self._profile(built, engine)
        latency_facts = Latency(**read_json(profiled.folder / FACTS_FILE))
        path = profiled.folder / DETAILS_FILE
        told = typed_json.read(EngineDetails, read_json(path)) if path.is_file() else None
        return replace(run, latency=latency_facts, latency_cached=profiled.cached, details=told)

    def _build(self, model: Path, label: str, options: BuildOptions) -> StageResult:
        def action(folder: Path) -> None:
            engine = engines.build(self.backend, model, folder, options)
            facts = asdict(engine) | {"path": engine.path.resolve().relative_to(folder.resolve()).as_posix()}
            write_json(folder / ENGINE_FILE, facts)

        return self.context.runner.run(
            "build",
            action,
            label=label,
            inputs={"model": model},
            options={
                "backend": self.name,
                "versions": self._versions,
                "precision": options.precision,
                "device": options.device,
                "options": dict(options.options),
            },
            workers=[self.worker, *self.context.owners("op", options.ops)],
        )

    def _on_engine(self, stage: str, action: Callable[[Path], None], built: StageResult, engine: Engine) -> StageResult:
        """Run a stage that opens `engine` and feeds it; what it finds holds for this machine and these versions."""
        inputs, options = self.context.key("feeds")
        place = {"machine": environment.machine_name(engine.device), "versions": self._versions}
        return self.context.runner.run(
            stage,
            action,
            label=built.label,
            inputs={"engine": built.folder, **inputs},
            options=options | place,
            workers=[self.context.source.worker, self.worker],
        )

    def _verify(self, built: StageResult, engine: Engine) -> list[dict[str, Any]]:
        """Return the engine's outputs for every real input."""

        def action(folder: Path) -> None:
            samples = engines.run_samples(self.backend, engine, self.context.adapter.feeds())
            feeds.save_samples(folder / SAMPLES_FILE, samples)

        return feeds.load_samples(self._on_engine("verify", action, built, engine).folder / SAMPLES_FILE)

    def _profile(self, built: StageResult, engine: Engine) -> StageResult:
        def action(folder: Path) -> None:
            feed = self.context.adapter.feeds()[0]
            with engines.open_runner(self.backend, engine) as runner:
                measured = latency.measure(runner, feed, device=engine.device)
                told = runner.details(feed) if isinstance(runner, DetailedRunner) else None
            write_json(folder / FACTS_FILE, asdict(measured))
            if told is not None:
                write_json(folder / DETAILS_FILE, asdict(told))

        return self._on_engine("profile", action, built, engine)


def _load_engine(built: StageResult) -> Engine:
    facts = read_json(built.folder / ENGINE_FILE)
    return Engine(**{**facts, "path": built.folder / facts["path"], "warnings": tuple(facts["warnings"])})


def _errors(samples: Sequence[Outputs], expected: Sequence[Outputs]) -> dict[str, OutputError]:
    """Return the worst error of each output over all inputs; each is judged against another input's response."""
    others = [expected[i - 1] if len(expected) > 1 else None for i in range(len(expected))]
    return accuracy.aggregate(
        [accuracy.compare_outputs(*triple) for triple in zip(samples, expected, others, strict=True)]
    )
