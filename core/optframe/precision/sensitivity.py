"""Which layers INT8 hurts: the error of each, the fewest layers to keep out of it, and error against its share."""

from __future__ import annotations

import glob
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe import accuracy, files, flops, graph
from optframe.accuracy import OutputError
from optframe.backend import Engine
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import InputError
from optframe.flops import FlopReport
from optframe.precision.int8 import quantize
from optframe.precision.nodes import node_name
from optframe.precision.placement import Scope, place
from optframe.precision.ranges import Ranges
from optframe.shapes import inferred
from optframe.types import Feeds, OpSpec, Outputs

Vector = np.ndarray[Any, np.dtype[np.float64]]

DEFAULT_ERROR = 0.2
"""Largest error over response that a proposal aims for."""

DEFAULT_RUNS = 48
"""How many quantised variants of the model are run at most to find the layers' errors."""

CURVE_SHARES = (0.25, 0.5, 0.7, 0.85)
"""Shares of the layers' FLOPs in INT8 at which the curve has a point, besides what the search for a proposal ran."""


@dataclass(frozen=True)
class LayerError:
    """What INT8 in one layer costs while all others stay FP32.

    `error`: the worst error over response of all outputs and samples. `flops`: the layer's share of the model's FLOPs.
    `alone` is False where only a group of neighbours was measured, whose error its layers share evenly.
    """

    name: str
    op_type: str
    error: float
    flops: float
    alone: bool


@dataclass(frozen=True)
class CurvePoint:
    """A variant that was run: how many layers stayed out of INT8, shares of FLOPs in INT8, error of each output."""

    kept: int
    int8_flops: float
    int8_convolutions: float | None
    outputs: Mapping[str, float]

    @property
    def error(self) -> float:
        """The worst error over response of all outputs."""
        return max(self.outputs.values())


@dataclass(frozen=True)
class Sensitivity:
    """`layers`, the most sensitive first; `keep` are patterns of the fewest of them, in this order, that have to stay
    out of INT8 for an error of `target`; `proposal` is the model with them kept, None where even one layer is too much;
    `curve` goes from all layers in INT8 to few. `runs` counts the variants that were run."""

    layers: tuple[LayerError, ...]
    target: float
    keep: tuple[str, ...]
    proposal: CurvePoint | None
    curve: tuple[CurvePoint, ...]
    runs: int

    def save(self, path: Path) -> Path:
        """Write a JSON file.

        Raises:
            InputError, EnvironmentLacks: it cannot be written.
        """
        return files.write_text(path, json.dumps(asdict(self), indent=1))


def load_sensitivity(path: Path) -> Sensitivity:
    """Return what `Sensitivity.save` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    proposal = document["proposal"]
    return Sensitivity(
        layers=tuple(LayerError(**layer) for layer in document["layers"]),
        target=document["target"],
        keep=tuple(document["keep"]),
        proposal=None if proposal is None else CurvePoint(**proposal),
        curve=tuple(CurvePoint(**point) for point in document["curve"]),
        runs=document["runs"],
    )


@dataclass
class _Group:
    """Neighbouring layers, and the squared errors (sample and output) that INT8 in all of them together causes."""

    layers: Sequence[ir.Node]
    energy: Vector

    @property
    def weight(self) -> float:
        return float(self.energy.max())

    def each(self) -> Vector:
        """Return what one layer is taken to cause: squared errors of independent roundings add up."""
        return self.energy / len(self.layers)


def analyse(
    model: ir.Model,
    ranges: Ranges,
    feeds: Sequence[Feeds],
    *,
    target: float = DEFAULT_ERROR,
    runs: int = DEFAULT_RUNS,
    scope: Scope = "default",
    ops: Mapping[str, OpSpec] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Rank the layers of the FP32 `model` that INT8 takes by the error each causes on `feeds`, run in onnxruntime.

    With fewer layers than `runs` each is quantised alone. Otherwise neighbours are quantised together, and the group
    that causes most is halved until the runs are used up. Then the fewest layers to keep for an error of `target` are
    found by bisection, in about log2(layers) further runs. `feeds` should be samples that calibration has not seen;
    with a single one errors are relative to the output. `progress` is called with the number of variants run.

    Raises:
        InputError: there are no feeds, they or `ranges` do not fit the model, `target` or `runs` is not above 0, or
            INT8 takes no layer of the model.
    """
    if not feeds:
        raise InputError("sensitivity needs at least one sample to measure errors on")
    if not target > 0 or runs < 1:
        raise InputError(f"sensitivity needs a target error and a number of runs above 0, not {target:g} and {runs}")
    variants = _Variants(model, ranges, feeds, scope, dict(ops or {}), progress)
    if not variants.layers:
        raise InputError("INT8 takes no layer of this model: there is nothing to rank")
    groups = _split(variants, runs)
    order = sorted(((node, g) for g in groups for node in g.layers), key=lambda pair: -float(pair[1].each().max()))
    layers = tuple(variants.describe(node, group) for node, group in order)
    search = _Search(variants, [node for node, _ in order], [group.each() for _, group in order], target)
    kept = search.fewest()
    curve = search.curve()
    proposal = search.points.get(kept) if kept < len(order) else None
    patterns = tuple(glob.escape(layer.name) for layer in layers[:kept])
    return Sensitivity(layers, target, patterns, proposal, curve, variants.count)


def _split(variants: _Variants, runs: int) -> list[_Group]:
    """Return groups of layers with their measured errors: single layers where `runs` suffice, or where it matters."""
    layers = variants.layers
    if len(layers) <= runs:
        return [_Group([node], variants.energy([node])) for node in layers]
    groups = [_Group(layers, variants.energy(layers))]
    while variants.count + 2 <= runs:
        largest = max((g for g in groups if len(g.layers) > 1), key=lambda g: g.weight, default=None)
        if largest is None:
            break
        middle = len(largest.layers) // 2
        halves = (largest.layers[:middle], largest.layers[middle:])
        groups.remove(largest)
        groups += [_Group(half, variants.energy(half)) for half in halves]
    return groups


class _Variants:
    """Runs the model with some of its layers in INT8."""

    def __init__(
        self,
        model: ir.Model,
        ranges: Ranges,
        feeds: Sequence[Feeds],
        scope: Scope,
        ops: Mapping[str, OpSpec],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.count = 0
        self._model, self._ranges, self._feeds = model, ranges, feeds
        self._scope, self._ops, self._progress = scope, ops, progress
        self.layers = place(inferred(model), scope, (), ranges.input_shapes).products
        self._flops: FlopReport = flops.count_flops(model, input_shapes=ranges.input_shapes, ops=ops)
        self._expected = self._run(model)

    def energy(self, layers: Sequence[ir.Node]) -> Vector:
        """Return the squared error over response of each sample's outputs, with `layers` alone in INT8."""
        _, errors = self._measure(layers)
        return np.square([[_figure(e) for e in sample.values()] for sample in errors]).reshape(-1)

    def point(self, layers: Sequence[ir.Node]) -> CurvePoint:
        """Return the errors and shares of FLOPs with `layers` in INT8."""
        variant, errors = self._measure(layers)
        shares = flops.int8_fractions(variant, input_shapes=self._ranges.input_shapes, ops=self._ops)
        outputs = {name: max(_figure(sample[name]) for sample in errors) for name in errors[0]}
        return CurvePoint(len(self.layers) - len(layers), shares.all, shares.convolutions, outputs)

    def share(self, node: ir.Node) -> float:
        """Return the layer's share of the model's FLOPs."""
        return self._flops.by_node.get(node_name(node), 0) / max(self._flops.total, 1)

    def describe(self, node: ir.Node, group: _Group) -> LayerError:
        error = math.sqrt(float(group.each().max()))
        return LayerError(node_name(node), node.op_type, error, self.share(node), len(group.layers) == 1)

    def _measure(self, layers: Sequence[ir.Node]) -> tuple[ir.Model, list[dict[str, OutputError]]]:
        chosen = {node.outputs[0].name for node in layers}
        variant = quantize(
            self._model,
            self._ranges,
            scope=self._scope,
            keep=lambda node: node.outputs[0].name not in chosen,
            warn=lambda _: None,
        )
        found = self._run(variant)
        self.count += 1
        if self._progress is not None:
            self._progress(self.count)
        expected = self._expected
        others = [expected[i - 1] if len(expected) > 1 else None for i in range(len(expected))]
        return variant, [accuracy.compare_outputs(*triple) for triple in zip(found, expected, others, strict=True)]

    def _run(self, model: ir.Model) -> list[Outputs]:
        with tempfile.TemporaryDirectory(prefix="optframe-sensitivity-") as folder:
            path = graph.save(model, Path(folder) / "variant.onnx")
            with OnnxRuntimeBackend().open(Engine(path, "onnxruntime", "int8", "cpu")) as runner:
                return [runner.run(sample) for sample in self._feeds]


def _figure(error: OutputError) -> float:
    """Return the error over response; the error relative to the output where no response is known."""
    return error.rms_rel if error.err_over_response is None else error.err_over_response


class _Search:
    """Runs variants that keep the first of the layers, in order of their errors; `points` by how many are kept."""

    def __init__(
        self, variants: _Variants, order: Sequence[ir.Node], energies: Sequence[Vector], target: float
    ) -> None:
        self.points: dict[int, CurvePoint] = {}
        self._variants, self._order, self._target = variants, order, target
        behind = np.cumsum(np.stack(energies)[::-1], axis=0)[::-1]
        self._predicted = [*(math.sqrt(float(sums.max())) for sums in behind), 0.0]

    def point(self, kept: int) -> CurvePoint:
        if kept not in self.points:
            self.points[kept] = self._variants.point(self._order[kept:])
        return self.points[kept]

    def fewest(self) -> int:
        """Return how many layers have to be kept; all of them where even the last one alone is too much."""
        if self.point(0).error <= self._target:
            return 0
        low, high = 0, len(self._order)
        guess = next(kept for kept, error in enumerate(self._predicted) if error <= self._target)
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            if self.point(middle).error <= self._target:
                high = middle
            else:
                low = middle
            guess = (low + high) // 2
        return high

    def curve(self) -> tuple[CurvePoint, ...]:
        """Return all points that were run, and some between, from the largest share in INT8 to the smallest."""
        shares = np.cumsum([self._variants.share(node) for node in self._order[::-1]])[::-1]
        for share in CURVE_SHARES:
            self.point(int(np.argmax(shares <= share * shares[0])))
        return tuple(self.points[kept] for kept in sorted(self.points))
