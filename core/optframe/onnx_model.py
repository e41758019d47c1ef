"""An ONNX file as a model of its own: what `optframe run FILE.onnx` uses in place of a plugin's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from optframe import feeds, graph
from optframe.backend import Engine
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import InputError
from optframe.types import Feeds, Illustration, Outputs


@dataclass(frozen=True)
class OnnxFileOptions:
    """`path` of the ONNX file; `inputs`: an `.npz` file of real inputs, the last of which calibration never sees."""

    path: Path
    inputs: Path | None = None


class OnnxFileModel:
    """Follows `ModelAdapter`; the reference is the file itself in onnxruntime, nothing optimised."""

    Options: ClassVar[type[OnnxFileOptions]] = OnnxFileOptions
    pipeline = "portable"
    source = "the ONNX file as given, in onnxruntime"

    def __init__(self, options: OnnxFileOptions) -> None:
        self.options = options
        self._model = graph.load(options.path)

    def dependencies(self, of: Literal["export", "feeds", "calibration"]) -> Mapping[str, object]:
        """Return the model file, and for inputs the inputs file."""
        if of == "export":
            return {"model": self.options.path}
        return {"inputs": self.options.inputs or "random"}

    def notes(self) -> Sequence[str]:
        """Say when figures come from random inputs."""
        if self.options.inputs:
            return []
        return [
            "No --inputs were given: errors are measured on random inputs, which may not be what the model meets, "
            "and there is nothing to calibrate INT8 on."
        ]

    def export(self, path: Path) -> None:
        """Write the model, as it is, to `path`."""
        graph.save(graph.load(self.options.path), path)

    @cached_property
    def _samples(self) -> list[Feeds]:
        return feeds.read_feeds(self.options.inputs, self._model) if self.options.inputs else []

    def feeds(self) -> Sequence[Feeds]:
        """Return the last two samples of the inputs file, filled up with random ones where there are fewer."""
        chosen = list(self._samples[-2:][::-1])
        return chosen + [self.random_feeds(seed) for seed in range(2 - len(chosen))]

    def random_feeds(self, seed: int) -> Feeds:
        """Return one random input drawn from the graph's declared types."""
        return feeds.random_feeds(self._model, seed)

    def calibration_feeds(self) -> Iterable[Feeds]:
        """Return all samples but the last; with a single one, that one.

        Raises:
            InputError: there is no inputs file.
        """
        if not self._samples:
            raise InputError("int8 needs data to calibrate on: pass --inputs FILE.npz, or --precision fp32,fp16")
        return self._samples[:-1] or self._samples

    def reference(self, feeds: Feeds) -> Outputs:
        """Return what the file as given computes for `feeds`."""
        with OnnxRuntimeBackend().open(self._raw_engine) as runner:
            return runner.run(feeds)

    @cached_property
    def _raw_engine(self) -> Engine:
        return Engine(self.options.path, "onnxruntime", "fp32", "cpu")

    def illustrate(self, outputs: Mapping[str, Outputs]) -> Sequence[Illustration]:
        """Return nothing: what the outputs mean is unknown."""
        return []
