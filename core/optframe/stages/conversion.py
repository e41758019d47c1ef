"""The stages from an optimised model to its precisions: calibrate, precision, and what INT8 costs in each layer."""

from __future__ import annotations

from pathlib import Path

from optframe import graph, precision
from optframe.backends.onnxruntime import has_precision
from optframe.errors import InputError
from optframe.precision import Sensitivity, calibrator_text
from optframe.stages.context import FACTS_FILE, MODEL_FILE, Context, read_json, write_json
from optframe.types import Precision

RANGES_FILE = "ranges.json"
SENSITIVITY_FILE = "sensitivity.json"


class Conversion:
    """Makes the precisions that were asked for, and measures on the way what INT8 needs."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._ranges_file: Path | None = None

    def convert(self, model: Path, kind: Precision) -> Path | None:
        """Return the optimised model in precision `kind`; None if nothing in it can run so, and that may be."""
        if kind == "fp32":
            return model
        inputs = {"model": model}
        if kind == "int8":
            inputs["ranges"] = self.ranges(model)

        def action(folder: Path) -> None:
            loaded, ops = graph.load(model), self.context.registry.ops()
            warnings: list[str] = []
            if kind == "fp16":
                converted = precision.to_fp16(loaded, ops=ops, warn=warnings.append)
            else:
                ranges = precision.load_ranges(inputs["ranges"])
                converted = precision.quantize(
                    loaded,
                    ranges,
                    keep=self.context.request.keep,
                    base=self.context.request.int8_base,
                    ops=ops,
                    warn=warnings.append,
                )
            graph.save(converted, folder / MODEL_FILE)
            write_json(folder / FACTS_FILE, {"warnings": warnings, "converted": has_precision(converted, kind)})

        options = {"precision": kind, "keep": self.context.request.keep, "int8_base": self.context.request.int8_base}
        workers = self.context.owners("op", self.context.registry.ops())
        result = self.context.runner.run(
            "precision", action, label=kind, inputs=inputs, options=options, workers=workers
        )
        facts = read_json(result.folder / FACTS_FILE)
        if not facts["converted"]:
            self._leave_out(kind)
            return None
        self.context.warnings += facts["warnings"]
        return result.folder / MODEL_FILE

    def _leave_out(self, kind: Precision) -> None:
        problem, keep = f"{kind}: nothing in this model can run in it", self.context.request.keep
        if not self.context.request.optional:
            kept = f", since --int8-keep leaves out {', '.join(keep)}" if keep and kind == "int8" else ""
            raise InputError(f"{problem}{kept}; leave {kind} out of --precision")
        self.context.warnings.append(f"{problem}; it is left out")

    def ranges(self, model: Path) -> Path:
        """Return the file of INT8 ranges for `model`: the user's, or one measured."""
        if self._ranges_file is None:
            if self.context.request.ranges is not None:
                precision.load_ranges(self.context.request.ranges).check(graph.load(model))
            self._ranges_file = self.context.request.ranges or self._calibrate(model) / RANGES_FILE
        return self._ranges_file

    def sensitivity(self, model: Path) -> Sensitivity | None:
        """Return what INT8 costs in each layer of `model`, None if nobody asked."""
        target, runs = self.context.request.sensitivity, self.context.request.sensitivity_runs
        if target is None:
            return None
        ranges = self.ranges(model)

        def action(folder: Path) -> None:
            found = precision.analyse(
                graph.load(model),
                precision.load_ranges(ranges),
                self.context.adapter.feeds(),
                target=target,
                runs=runs,
                ops=self.context.registry.ops(),
                progress=lambda count: self.context.on_work("variants", count),
            )
            found.save(folder / SENSITIVITY_FILE)

        inputs, options = self.context.key("feeds")
        result = self.context.runner.run(
            "sensitivity",
            action,
            inputs={"model": model, "ranges": ranges, **inputs},
            options={"target": target, "runs": runs, **options},
            workers=[self.context.source.worker, *self.context.owners("op", self.context.registry.ops())],
        )
        return precision.load_sensitivity(result.folder / SENSITIVITY_FILE)

    def _calibrate(self, model: Path) -> Path:
        calibrator = self.context.registry.make_calibrator(self.context.request.calibrator)

        def action(folder: Path) -> None:
            ranges = precision.calibrate(
                graph.load(model),
                self.context.adapter.calibration_feeds(),
                calibrator,
                progress=lambda count: self.context.on_work("samples", count),
            )
            ranges.save(folder / RANGES_FILE)

        inputs, options = self.context.key("calibration")
        workers = [self.context.source.worker, self.context.owner("calibrator", calibrator.name)]
        options = {"calibrator": calibrator_text(calibrator), **options}
        return self.context.runner.run(
            "calibrate", action, inputs={"model": model, **inputs}, options=options, workers=workers
        ).folder
