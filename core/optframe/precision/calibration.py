"""Calibration: runs a model over samples and watches the tensors that INT8 will need ranges for."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from optframe import feeds as feeds_module
from optframe import graph
from optframe.backend import Engine, Runner
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import InputError, PluginError
from optframe.precision.calibrator import Calibrator, Histogram, calibrator_text
from optframe.precision.equalization import CHANNEL_AXIS, channel_groups, equalizable, equalize, factors
from optframe.precision.nodes import is_constant
from optframe.precision.placement import CONVOLUTIONS, Placement, Scope, place, weight_index
from optframe.precision.ranges import DataHash, Ranges, TensorRange
from optframe.shapes import inferred, static_shape
from optframe.types import Feeds, Outputs

Array = np.ndarray[Any, Any]

GROUP_BYTES = 3 << 29
"""Tensors are watched in groups of 1.5 GiB, each in a run of its own; Anchor DETR at 800x1066 is one group."""

UNKNOWN_BYTES = 1 << 26
"""What a tensor of unknown shape counts for."""

EQUALIZATION_SAMPLES = 2
"""Ranges of channels need not be exact, since only their roots count."""

NO_DATA = "INT8 needs data to calibrate on, and there is none: give at least one sample of real inputs"


def calibrate(
    model: ir.Model,
    feeds: Iterable[Feeds],
    calibrator: Calibrator,
    *,
    scope: Scope = "default",
    everywhere: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Ranges:
    """Return the ranges that `quantize` needs for `scope`, measured on every sample of `feeds` in onnxruntime.

    `model` is the FP32 model; it stays as it is. The first two samples serve to equalise channels (see
    `precision.equalization`), then all are run through the equalised model. Memory does not grow with the number of
    samples: a histogram of 4096 bins is kept for each tensor. With `everywhere`, all float tensors of the main graph
    are measured, of the model as it is, with no channel equalised: what a runtime that places INT8 itself needs.
    `progress` is called after each sample with how many are done.

    Raises:
        InputError: there are no samples, one does not fit the model, or a tensor gets NaN or infinity.
    """
    samples = iter(feeds)
    first = list(islice(samples, EQUALIZATION_SAMPLES))
    if not first:
        raise InputError(NO_DATA)
    shapes = {name: tuple(array.shape) for name, array in first[0].items()}
    typed = inferred(model)
    placement = place(typed, scope, input_shapes=shapes)
    sizes = _sizes(inferred(model, shapes))
    equalization = {} if everywhere else _measure_factors(typed, placement, sizes, first)
    equalize(typed, equalization)
    watch = _Watch(placement, _float_tensors(typed) if everywhere else ())
    data, count = DataHash(), 0
    with _runners(typed, watch.names(), sizes) as runners:
        for count, sample in enumerate(chain(first, samples), start=1):
            for tensors in _run(sample, runners):
                watch.add(tensors, count)
            data.add(sample)
            if progress is not None:
                progress(count)
    return Ranges(
        tensors=watch.ranges(calibrator),
        equalization=equalization,
        model=graph.fingerprint(model),
        data=data.text(),
        calibrator=calibrator_text(calibrator),
        samples=count,
        input_shapes=shapes,
    )


def _measure_factors(
    model: ir.Model, placement: Placement, sizes: Mapping[str, int], samples: Sequence[Feeds]
) -> dict[str, tuple[float, ...]]:
    """Return the factors of each group of channels that equalisation is to divide by."""
    groups = equalizable(channel_groups(model.graph), placement.sources.keys())
    measured = {name: [v.name or "" for v in g.values if v in placement.sources] for name, g in groups.items()}
    wanted = list(chain.from_iterable(measured.values()))
    maxima: dict[str, Array] = {}
    with _runners(model, wanted, sizes) as runners:
        for count, sample in enumerate(samples if groups else (), start=1):
            for tensors in _run(sample, runners):
                for name in tensors.keys() & set(wanted):
                    maxima[name] = np.maximum(maxima.get(name, 0.0), _channel_maxima(name, tensors[name], count))
    return {name: factors(group, [maxima[tensor] for tensor in measured[name]]) for name, group in groups.items()}


def _channel_maxima(name: str, array: Array, sample: int) -> Array:
    others = tuple(i for i in range(array.ndim) if i != CHANNEL_AXIS)
    maxima: Array = np.abs(array).max(axis=others)
    if not np.isfinite(maxima).all():
        raise _not_finite(name, sample)
    return maxima


def _not_finite(name: str, sample: int) -> InputError:
    return InputError(
        f"tensor '{name}' has NaN or infinity for calibration sample {sample}: leave that sample out, or mend the model"
    )


class _Watch:
    """Histograms of the sources of all tensors to quantise, and channel means of what meets constant weights."""

    def __init__(self, placement: Placement, more: Iterable[ir.Value] = ()) -> None:
        self._histograms = {_name(value): Histogram() for value in (*placement.sources.values(), *more)}
        self._means: dict[tuple[str, int], _Mean] = {}
        for node in placement.products:
            axis = channel_axis(node)
            if axis is not None:
                self._means[_name(node.inputs[0]), axis] = _Mean()

    def names(self) -> list[str]:
        """Return the names of all tensors to watch."""
        return list(dict.fromkeys([*self._histograms, *(name for name, _ in self._means)]))

    def add(self, tensors: Outputs, sample: int) -> None:
        """Take in what the tensors were for sample number `sample`."""
        for name, histogram in self._histograms.items():
            if name in tensors:
                _add(histogram, name, tensors[name], sample)
        for (name, axis), mean in self._means.items():
            if name in tensors:
                mean.add(tensors[name], axis)

    def ranges(self, calibrator: Calibrator) -> dict[str, TensorRange]:
        """Return threshold and means of each tensor."""
        thresholds = {name: _threshold(calibrator, name, histogram) for name, histogram in self._histograms.items()}
        means: dict[str, dict[int, tuple[float, ...]]] = {}
        for (name, axis), mean in self._means.items():
            means.setdefault(name, {})[axis] = mean.result()
        return {name: TensorRange(thresholds.get(name), means.get(name, {})) for name in self.names()}


def _threshold(calibrator: Calibrator, name: str, histogram: Histogram) -> float:
    """Return what `calibrator` says of the tensor `name`, which must be a magnitude; 0 is one of zeros alone.

    Raises:
        PluginError: it is none.
    """
    said = calibrator.threshold(histogram)
    if not isinstance(said, Real) or not math.isfinite(said) or said < 0 or (said == 0 and histogram.maximum > 0):
        least = "not below 0" if histogram.maximum == 0 else "above 0"
        raise PluginError(
            f"calibrator {calibrator_text(calibrator)}: its threshold of tensor '{name}' is {str(said)[:40]}, "
            f"not a finite number {least}"
        )
    return float(said)


def _add(histogram: Histogram, name: str, array: Array, sample: int) -> None:
    try:
        histogram.add(array)
    except ValueError as error:
        raise _not_finite(name, sample) from error


class _Mean:
    """The running mean of a tensor for each index along an axis, in float64."""

    def __init__(self) -> None:
        self._sum: Array | float = 0.0
        self._count = 0

    def add(self, array: Array, axis: int) -> None:
        others = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
        self._sum = self._sum + array.sum(axis=others, dtype=np.float64)
        self._count += array.size // array.shape[axis]

    def result(self) -> tuple[float, ...]:
        return tuple(np.atleast_1d(self._sum / max(self._count, 1)).tolist())


def channel_axis(node: ir.Node) -> int | None:
    """Return the axis of a product's first input that its weights' input channels go along, where bias correction can
    use the means along it: a Conv, or a MatMul or Gemm with its weights on the right."""
    if weight_index(node) != 1 or node.op_type == "ConvTranspose":
        return None
    if node.op_type in CONVOLUTIONS:
        return 1
    transposed = node.attributes.get("transA")
    return 0 if transposed is not None and transposed.as_int() else -1


def _name(value: ir.Value | None) -> str:
    if value is None or not value.name:
        raise InputError("a tensor to calibrate has no name: name all values of the model")
    return value.name


def _float_tensors(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the FP32 inputs of the main graph, and what its nodes compute in FP32 from anything but constants alone."""
    yield from (value for value in feeds_module.model_inputs(model) if value.dtype == ir.DataType.FLOAT)
    for node in model.graph:
        if not all(value is None or is_constant(value) for value in node.inputs):
            yield from (value for value in node.outputs if value.dtype == ir.DataType.FLOAT and value.name)


def _sizes(model: ir.Model) -> dict[str, int]:
    """Return the bytes of every tensor that nodes of the main graph make."""
    return {value.name: _bytes(value) for node in model.graph for value in node.outputs if value.name}


def _bytes(value: ir.Value) -> int:
    shape = static_shape(value)
    return UNKNOWN_BYTES if shape is None else 4 * math.prod(shape)


def _groups(names: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """Return those of `names` that have a size in groups of bounded size."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if name in sizes:
            if sizes[name] > room:
                groups.append([])
                room = GROUP_BYTES
            groups[-1].append(name)
            room -= sizes[name]
    return groups


@contextmanager
def _runners(model: ir.Model, names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[Runner]]:
    """Open runners that give the tensors `names`, together all that are no inputs."""
    with tempfile.TemporaryDirectory(prefix="optframe-calibrate-") as folder, ExitStack() as stack:
        yield [
            stack.enter_context(_open(model, group, Path(folder) / str(index)))
            for index, group in enumerate(_groups(names, sizes))
        ]


def _open(model: ir.Model, names: Sequence[str], folder: Path) -> Runner:
    """Return a runner of what `names` need of `model`, with them as its outputs."""
    part = model.clone()
    values = {value.name: value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [values[name] for name in names]
    common.RemoveUnusedNodesPass()(part)
    path = graph.save(part, folder / "part.onnx")
    return OnnxRuntimeBackend().open(Engine(path, "onnxruntime", "fp32", "cpu"))


def _run(sample: Feeds, runners: Sequence[Runner]) -> Iterator[Outputs]:
    """Yield all watched tensors of one sample: the inputs themselves, then each runner's."""
    yield sample
    for runner in runners:
        yield runner.run(sample)
