"""The result of a calibration: a range for each tensor and channel means, as a JSON file tied to model and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe import files
from optframe.errors import InputError
from optframe.graph import fingerprint
from optframe.precision.calibrator import Calibrator, calibrator_text
from optframe.types import Feeds

FORMAT = 1
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TensorRange:
    """`threshold`: the magnitude that 127 stands for. `means`: the mean of each index along an axis, by axis."""

    threshold: float | None = None
    means: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranges:
    """Ranges by tensor name, with what they were measured on.

    They hold for the model after its channels are divided by the factors of `equalization`, by name of their group.
    `model` is the fingerprint of the model, `data` a hash of the feeds, `calibrator` its name and options, `samples`
    how many feeds there were, `input_shapes` the shapes of the first.
    """

    tensors: Mapping[str, TensorRange]
    equalization: Mapping[str, tuple[float, ...]]
    model: str
    data: str
    calibrator: str
    samples: int
    input_shapes: Mapping[str, tuple[int, ...]]

    def save(self, path: Path) -> Path:
        """Write a JSON file.

        Raises:
            InputError, EnvironmentLacks: it cannot be written.
        """
        document = {
            "format": FORMAT,
            "model": self.model,
            "data": self.data,
            "calibrator": self.calibrator,
            "samples": self.samples,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "equalization": dict(self.equalization),
            "tensors": {
                name: {"threshold": tensor.threshold, "means": {str(axis): m for axis, m in tensor.means.items()}}
                for name, tensor in self.tensors.items()
            },
        }
        return files.write_text(path, json.dumps(document, indent=1))

    def check(
        self, model: ir.Model | None = None, data: str | None = None, calibrator: Calibrator | None = None
    ) -> None:
        """Check that the ranges were measured on `model`, on feeds of hash `data`, by `calibrator`, where given.

        Raises:
            InputError: they were not.
        """
        differing = []
        if model is not None and fingerprint(model) != self.model:
            differing.append("another model")
        if data is not None and data != self.data:
            differing.append("other data")
        if calibrator is not None and calibrator_text(calibrator) != self.calibrator:
            differing.append(f"another calibrator ({self.calibrator})")
        if differing:
            raise InputError(f"these INT8 ranges are of {' and '.join(differing)}: calibrate again")


def load_ranges(path: Path) -> Ranges:
    """Return the ranges in the file at `path`.

    Raises:
        InputError: there is no such file, or it holds no ranges.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read INT8 ranges from {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} holds no INT8 ranges: it is no JSON; calibrate again") from error
    try:
        return _read(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} holds no INT8 ranges of format {FORMAT}; calibrate again") from error


def _read(document: Mapping[str, object]) -> Ranges:
    if document["format"] != FORMAT:
        raise ValueError("another format")
    return Ranges(
        tensors={name: _read_tensor(entry) for name, entry in document["tensors"].items()},  # type: ignore[attr-defined]
        equalization={name: _finite(group) for name, group in document["equalization"].items()},  # type: ignore[attr-defined]
        model=str(document["model"]),
        data=str(document["data"]),
        calibrator=str(document["calibrator"]),
        samples=int(document["samples"]),  # type: ignore[call-overload]
        input_shapes={name: tuple(shape) for name, shape in document["input_shapes"].items()},  # type: ignore[attr-defined]
    )


def _read_tensor(entry: Mapping[str, object]) -> TensorRange:
    threshold = entry["threshold"]
    means = {int(axis): _finite(values) for axis, values in entry["means"].items()}  # type: ignore[attr-defined]
    if threshold is None:
        return TensorRange(None, means)
    (magnitude,) = _finite([threshold])
    if magnitude < 0:
        raise ValueError("a threshold below zero")
    return TensorRange(magnitude, means)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    """Return numbers as floats; INT8 scales and biases are made of them, in float32."""
    numbers = tuple(map(float, values))
    if not all(abs(number) <= _LARGEST for number in numbers):  # NaN neither
        raise ValueError("a number that is not finite in float32")
    return numbers


class DataHash:
    """SHA-256 over names, dtypes, shapes and contents of feeds, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, feeds: Feeds) -> None:
        """Take in one sample."""
        for name, array in sorted(feeds.items()):
            self._digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            self._digest.update(np.ascontiguousarray(array).data)

    def text(self) -> str:
        """Return the hash so far."""
        return self._digest.hexdigest()


def hash_feeds(feeds: Iterable[Feeds]) -> str:
    """Return the hash by which `Ranges.data` tells calibration data apart."""
    digest = DataHash()
    for sample in feeds:
        digest.add(sample)
    return digest.text()
