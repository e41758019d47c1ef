"""An ONNX file as a model of its own: what `optframe run FILE.onnx` uses in place of a plugin's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from optframe import feeds, graph
from optframe.backend import Engine
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import InputError
from optframe.images import ImageFolder
from optframe.types import Feeds, Illustration, Outputs, Part


@dataclass(frozen=True)
class OnnxFileOptions:
    """`path` of the ONNX file; `inputs`: an `.npz` file of real inputs.

    `calibration_images` is a folder of images, for a model that takes one; `preprocessing` says what it makes of
    pixels, see `optframe.images.PREPROCESSING`. With inputs and images, errors are measured on the last two inputs and
    INT8 is calibrated on the images; with one of them, calibration sees all but the last two, where there are more.
    """

    path: Path
    inputs: Path | None = None
    calibration_images: Path | None = None
    preprocessing: str = "imagenet"


class OnnxFileModel:
    """Follows `ModelAdapter`; the reference is the file itself in onnxruntime, nothing optimised."""

    Options: ClassVar[type[OnnxFileOptions]] = OnnxFileOptions
    pipeline = "portable"
    source = "the ONNX file as given, in onnxruntime"

    def __init__(self, options: OnnxFileOptions) -> None:
        self.options = options
        self._model = graph.load(options.path)
        self._images = (
            ImageFolder(options.calibration_images, self._model, options.preprocessing)
            if options.calibration_images
            else None
        )

    def dependencies(self, of: Part) -> Mapping[str, object]:
        """Return the model file, and for inputs the inputs file."""
        if of == "export":
            return {"model": self.options.path}
        options = self.options
        if options.calibration_images and (of == "calibration" or options.inputs is None):
            facts = {"images": options.calibration_images, "preprocessing": options.preprocessing}
            return {**facts, "all": options.inputs is not None}
        return {"inputs": options.inputs or "random"}

    def notes(self, of: Part) -> Sequence[str]:
        """Say when figures come from random inputs."""
        if of != "feeds" or self._samples:
            return []
        return ["No --inputs were given: errors are measured on random inputs, which may not be what the model meets."]

    def export(self, path: Path) -> None:
        """Write the model, as it is, to `path`."""
        graph.save(graph.load(self.options.path), path)

    @cached_property
    def _samples(self) -> Sequence[Feeds]:
        """What errors are measured on: the last two."""
        if self.options.inputs:
            return feeds.read_feeds(self.options.inputs, self._model)
        return self._images or []

    def feeds(self) -> Sequence[Feeds]:
        """Return the last two samples, filled up with random ones where there are fewer."""
        chosen = [self._samples[i] for i in range(len(self._samples))[:-3:-1]]
        return chosen + [self.random_feeds(seed) for seed in range(2 - len(chosen))]

    def random_feeds(self, seed: int) -> Feeds:
        """Return one random input drawn from the graph's declared types."""
        return feeds.random_feeds(self._model, seed)

    def calibration_feeds(self) -> Iterable[Feeds]:
        """Return the calibration images, if inputs are given too; else all samples but the last two, as far as there
        are more.

        Raises:
            InputError: there are neither images nor an inputs file.
        """
        if self._images is not None and self.options.inputs:
            return self._images
        if not self._samples:
            raise InputError(
                "int8 needs data to calibrate on: pass --inputs FILE.npz or a folder of images "
                "(`run`: --calibration-images DIR, `calibrate`: --images DIR), or leave int8 out of --precision"
            )
        return self._samples[:-2] or self._samples[:-1] or self._samples

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
