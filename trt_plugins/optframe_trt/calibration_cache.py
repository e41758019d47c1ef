"""TensorRT's own calibration cache, a text file: read, written, and exchanged with optframe's INT8 ranges.

The first line names TensorRT's version and the algorithm, `TRT-101303-EntropyCalibration2`; each other line is
`tensor: 3c010a14`, the bits of the float32 scale (threshold / 127) in hexadecimal, the most significant first.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from optframe import files, graph
from optframe.errors import InputError
from optframe.precision import Ranges, Scope, TensorRange
from optframe.precision.placement import place
from optframe.shapes import inferred

HEADER = re.compile(r"TRT-(\d+)-(\w+)")
LINE = re.compile(r"(.+): ([0-9a-fA-F]{1,8})")
LEVELS = 127
SMALLEST = 2.0**-126
"""The smallest normal float32: a scale below it is a number that was cut off."""

DEFAULT_VERSION = "101303"
ALGORITHMS = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")
EXAMPLES = 3


@dataclass(frozen=True)
class CalibrationCache:
    """Scales by tensor name, and TensorRT's version ("101303" is 10.13.3) and algorithm that they are of.

    TensorRT takes a cache of its own version and of the calibrator's algorithm alone, and calibrates anew otherwise.
    """

    scales: Mapping[str, float]
    version: str = DEFAULT_VERSION
    algorithm: str = "EntropyCalibration2"

    @property
    def header(self) -> str:
        """The first line."""
        return f"TRT-{self.version}-{self.algorithm}"

    def text(self) -> str:
        """Return the file's content."""
        lines = [f"{name}: {struct.pack('!f', scale).hex()}" for name, scale in self.scales.items()]
        return "\n".join([self.header, *lines]) + "\n"

    def save(self, path: Path) -> Path:
        """Write the file.

        Raises:
            InputError, EnvironmentLacks: it cannot be written.
        """
        return files.write_text(path, self.text())


def load_cache(path: Path) -> CalibrationCache:
    """Return the cache in the file at `path`.

    Raises:
        InputError: there is no such file, it is no calibration cache, or it is cut off or damaged.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the calibration cache {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no TensorRT calibration cache: it is not text") from error
    except ValueError as error:
        raise InputError(f"{path} {error}") from error


def parse(text: str) -> CalibrationCache:
    """Return the cache that `text` holds.

    Raises:
        ValueError: what is wrong with it.
    """
    lines = text.splitlines()
    header = HEADER.fullmatch(lines[0].strip()) if lines else None
    if header is None:
        raise ValueError("is no TensorRT calibration cache: its first line is not like TRT-101303-EntropyCalibration2")
    scales = dict(_read_line(number, line) for number, line in enumerate(lines[1:], start=2) if line.strip())
    if not scales:
        raise ValueError("holds no tensor: calibrate again")
    return CalibrationCache(scales, header[1], header[2])


def _read_line(number: int, line: str) -> tuple[str, float]:
    found = LINE.fullmatch(line.rstrip())
    scale: float = struct.unpack("!f", bytes.fromhex(found[2].zfill(8)))[0] if found else math.nan
    if found is None or not (scale == 0 or SMALLEST <= scale < math.inf):
        raise ValueError(f"is cut off or damaged in line {number} ('{line[:60]}'): write or calibrate it again")
    return found[1], scale


def from_ranges(ranges: Ranges, version: str = DEFAULT_VERSION) -> CalibrationCache:
    """Return `ranges` as a cache for builds in which TensorRT places INT8 itself.

    A range of zero becomes a scale of 1: such a tensor is zero in any scale.

    Raises:
        InputError: the ranges are of equalised channels, so that they do not hold for the model as it is, or the
            version is no number.
    """
    if ranges.equalization:
        raise InputError("these ranges hold for equalised channels: calibrate the model as it is, with everywhere=True")
    if not version.isascii() or not version.isdigit():
        raise InputError(f"TensorRT's version is written like {DEFAULT_VERSION}, for 10.13.3, not '{version}'")
    measured = {name: tensor.threshold for name, tensor in ranges.tensors.items() if tensor.threshold is not None}
    algorithm = "MinMaxCalibration" if ranges.calibrator.startswith("min-max") else "EntropyCalibration2"
    return CalibrationCache({name: t / LEVELS or 1.0 for name, t in measured.items()}, version, algorithm)


def to_ranges(
    cache: CalibrationCache, model: ir.Model, *, scope: Scope = "default", warn: Callable[[str], None] | None = None
) -> Ranges:
    """Return what `cache` says of the FP32 `model` as ranges for `optframe.precision.quantize` at `scope`.

    Channels are not equalised and biases not corrected, which takes data. `warn` hears how many tensors of the cache
    the model does not have: TensorRT names its own after layers.

    Raises:
        InputError: the cache lacks a tensor that INT8 needs: it is of another model.
    """
    typed = inferred(model)
    needed = {source.name or "" for source in place(typed, scope).sources.values()}
    lacking = sorted(needed - cache.scales.keys())
    if lacking:
        more = f" and {len(lacking) - EXAMPLES} more" if len(lacking) > EXAMPLES else ""
        raise InputError(
            f"the calibration cache lacks {', '.join(lacking[:EXAMPLES])}{more} of {len(needed)} tensors that INT8 "
            "needs: it is of another model"
        )
    known = {value.name for node in typed.graph for value in node.outputs} | {v.name for v in typed.graph.inputs}
    unknown = cache.scales.keys() - known
    if unknown and warn is not None:
        warn(f"{len(unknown)} tensors of the calibration cache are not in the model ('{min(unknown)}' is one)")
    return Ranges(
        tensors={name: TensorRange(cache.scales[name] * LEVELS) for name in sorted(needed)},
        equalization={},
        model=graph.fingerprint(model),
        data="",
        calibrator=cache.header,
        samples=0,
        input_shapes={},
    )
