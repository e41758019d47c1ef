"""The inputs on which models are compared: the user's and random ones, as far as the original model runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optframe.errors import InputError
from optframe.gate.exchange import Exchange
from optframe.gate.region import Program
from optframe.numerics import Array
from optframe.snapshot import Snapshot
from optframe.types import Feeds
from optframe.worker import Arrays, WorkerFailure

DRAWS = 6
"""How many random inputs are tried to find those that the model accepts."""

DISTURBANCE = 8
"""By how many roundings of its type an input is changed, to see whether a model amplifies rounding."""


@dataclass(frozen=True)
class Sample:
    """An input of the model: in words, as arrays, as a file, and what the original model makes of it."""

    label: str
    feeds: Feeds
    path: Path
    outputs: Arrays

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """Input name -> shape."""
        return {name: np.shape(array) for name, array in self.feeds.items()}


class Sampler:
    """Finds the samples for `original`. Those on which it does not run are left out, which `remarks` says."""

    def __init__(self, exchange: Exchange, original: Snapshot) -> None:
        self.remarks: list[str] = []
        self._exchange = exchange
        self._original = original

    def real(self, feeds: Sequence[Feeds]) -> list[Sample]:
        """Return a sample for each of the user's inputs."""
        return self._accepted([(f"input {i + 1}", each) for i, each in enumerate(feeds)])

    def random(self, draw: Callable[[int], Feeds], count: int) -> list[Sample]:
        """Return up to `count` samples drawn with different seeds; where shapes are free, they differ by seed."""
        samples: list[Sample] = []
        earlier = list(self.remarks)
        for seed in range(DRAWS):
            if len(samples) < count:
                try:
                    drawn = draw(seed)
                except InputError as error:
                    self._remark(str(error))
                else:
                    samples += self._accepted([(f"random input {seed}", drawn)])
        if samples:
            self.remarks[:] = earlier  # that other draws did not suit the model says nothing about it
        return samples

    def disturbed(self, sample: Sample) -> Arrays | None:
        """Return the original's outputs for `sample` with its floats changed by a few roundings; None if it fails."""
        rng = np.random.default_rng(0)
        path = self._exchange.save_feeds({name: _disturb(array, rng) for name, array in sample.feeds.items()})
        outputs = run(self._exchange, Program(self._original.proto, self._original.weights), [path])[0]
        return None if isinstance(outputs, str) else outputs

    def _accepted(self, tried: Sequence[tuple[str, Feeds]]) -> list[Sample]:
        saved = [(label, feeds, path) for label, feeds in tried for path in self._saved(label, feeds)]
        if not saved:
            return []
        program = Program(self._original.proto, self._original.weights)
        results = run(self._exchange, program, [path for _, _, path in saved])
        samples = []
        for (label, feeds, path), outputs in zip(saved, results, strict=True):
            if isinstance(outputs, str):
                self._remark(f"the model itself does not run: {outputs}", f" (on {label})")
            else:
                samples.append(Sample(label, feeds, path, outputs))
        return samples

    def _saved(self, label: str, feeds: Feeds) -> Iterator[Path]:
        try:
            yield self._exchange.save_feeds(feeds)
        except TypeError as error:
            self._remark(f"{label} cannot be used: {error}")

    def _remark(self, text: str, detail: str = "") -> None:
        if not any(remark.startswith(text) for remark in self.remarks):
            self.remarks.append(text + detail)


def _disturb(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f":
        return array
    noise = rng.uniform(-DISTURBANCE, DISTURBANCE, array.shape) * float(np.finfo(array.dtype).eps)
    return (array * (1 + noise)).astype(array.dtype)


def run(exchange: Exchange, program: Program, feeds: Sequence[Path]) -> list[Arrays | str]:
    """Return, for each of `feeds`, the outputs of `program`, or why there are none; a crash is such a reason."""
    try:
        return exchange.run(program, feeds)
    except WorkerFailure as failure:
        return [str(failure)] * len(feeds)
