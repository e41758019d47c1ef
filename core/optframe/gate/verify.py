"""Whether models compute the same: after each pass on the regions that changed, and as a whole, on several inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import onnx

from optframe.gate.comparison import RunFailed, compare_pairs
from optframe.gate.exchange import Exchange
from optframe.gate.region import MergedModel, MergeError, Pair, Program
from optframe.gate.samples import Sample, Sampler, run
from optframe.gate.structure import Inspector, is_fixed, tensor_type
from optframe.graph import RANDOM_OPS
from optframe.numerics import EQUAL, Verdict, compare, of_all_inputs, of_all_tensors, tolerance
from optframe.snapshot import Snapshot, ops_of
from optframe.types import Feeds
from optframe.worker import Arrays, WorkerFailure


@dataclass(frozen=True)
class Step:
    """What one pass did: the model before and after it."""

    index: int
    before: Snapshot
    after: Snapshot


@dataclass(frozen=True)
class _Moved:
    """Tensors at its boundary that a step changed, and what was said of that."""

    names: set[str]
    verdict: Verdict


Found: TypeAlias = list[tuple[Sample, dict[Pair, Verdict]]]
"""Input -> pair -> verdict."""


class Verifier:
    """Compares snapshots of one model, `original` being what it was first.

    `feeds` are real inputs; `draw` makes a random one from a seed. Everything native happens in the worker. With
    `max_abs`, outputs are judged by their largest absolute difference instead of the relative tolerances.
    """

    def __init__(
        self,
        exchange: Exchange,
        original: Snapshot,
        feeds: Sequence[Feeds],
        draw: Callable[[int], Feeds],
        max_abs: float | None = None,
    ) -> None:
        self._exchange = exchange
        self._inspector = Inspector(exchange.worker)
        self._original = original
        self._feeds = feeds
        self._draw = draw
        self._max_abs = max_abs
        self._sampler = Sampler(exchange, original)
        self._moved: dict[int, _Moved] = {}
        self._latest: deque[tuple[Snapshot, list[Path], list[Arrays | str]]] = deque(maxlen=2)

    @property
    def remarks(self) -> list[str]:
        """What the user should know about the inputs used so far."""
        return self._sampler.remarks

    @cached_property
    def _real(self) -> list[Sample]:
        return self._sampler.real(self._feeds)

    @cached_property
    def _random(self) -> list[Sample]:
        """Two where shapes are free, since a model may be right at one shape only, or where there are no real ones."""
        fixed = all(is_fixed(tensor_type(value)) for value in self._original.inputs)
        return self._sampler.random(self._draw, 1 if fixed and self._real else 2)

    @cached_property
    def _step_samples(self) -> list[Sample]:
        """What each pass is verified on: one real input if there is one, and the random ones."""
        return [*self._real[:1], *self._random]

    def add_step_sample(self, label: str) -> bool:
        """Verify each pass on the input called `label` too; return whether that is new."""
        present = {sample.label for sample in self._step_samples}
        new = [sample for sample in self._real if sample.label == label and label not in present]
        self._step_samples.extend(new)
        return bool(new)

    def feeds(self, label: str) -> Feeds | None:
        """Return the input called `label`, or any, for a reproducer; None if the model runs on none."""
        by_label = {sample.label: sample.feeds for sample in [*self._real, *self._random]}
        return by_label.get(label, next(iter(by_label.values()), None))

    def structure_problem(self, before: Snapshot, after: Snapshot) -> str | None:
        """Return what onnx's checker and shape inference say against `after` but not against `before`, or None."""
        try:
            return self._inspector.problem(before, after)
        except WorkerFailure as failure:
            return f"onnx's checker or shape inference fails on it: {failure}"

    def verify_whole(self, final: Snapshot) -> Verdict:
        """Compare the outputs of `final` with the original's, on all inputs."""
        samples = [*self._real, *self._random]
        return self._compare_outputs([s.outputs for s in samples], final, samples, excuse=self._max_abs is None)

    def verify_steps(self, steps: Sequence[Step]) -> list[Verdict]:
        """Return a verdict for each of `steps`, which follow one another, up to the first one that is different."""
        self._moved.clear()
        verdicts: list[Verdict] = []
        while len(verdicts) < len(steps) and not (verdicts and verdicts[-1].status == "different"):
            verdicts += self._verify_some(steps[len(verdicts) :])
        return verdicts

    def _verify_some(self, steps: Sequence[Step]) -> list[Verdict]:
        """Return verdicts for the first of `steps`, for at least one."""
        if not self._step_samples:
            return [self._no_samples()] * len(steps)
        merged, merging = self._merge(steps)
        if not merging:
            return [self._verify_outputs(steps[0], excuse=True)]
        try:
            found = self._compare_regions(merged)
        except RunFailed:
            if len(merging) > 1:
                return self._verify_some(merging[: len(merging) // 2])
            return [self._verify_outputs(steps[0], excuse=True)]
        return self._judge(merged, merging, found) or self._verify_some(steps)

    def _judge(self, merged: MergedModel, steps: Sequence[Step], found: Found) -> list[Verdict]:
        """Return verdicts for `steps` up to the first that changed a tensor at its boundary.

        Where that is news, what it moved is noted, so that a larger region is compared next; else the outputs decide.
        Either way, later steps were then fed what is no longer there, and have to be compared anew.
        """
        verdicts: list[Verdict] = []
        for step in steps:
            verdict, moved = _verdict(found, step.index), self._moved.get(step.index)
            differs = verdict.status == "different"
            if differs and not moved:
                self._note_moved(found, steps)
                return verdicts
            if differs:
                verdict = self._verify_outputs(step, excuse=False)
            if moved:
                same = Verdict("equal", f"{moved.verdict.reason}, but what comes of it is the same")
                verdict = same if verdict.status == "equal" else moved.verdict
            verdicts.append(of_all_tensors([verdict, self._compare_branches(merged, step)]))
            if differs or verdicts[-1].status == "different":
                return verdicts
        return verdicts

    def _note_moved(self, found: Found, steps: Sequence[Step]) -> None:
        for step in steps:
            names = _differing(found, step.index)
            if names:
                self._moved.setdefault(step.index, _Moved(names, _verdict(found, step.index)))

    def _merge(self, steps: Sequence[Step]) -> tuple[MergedModel, list[Step]]:
        """Return a merged model of as many of `steps` as possible, and these."""
        merged = MergedModel(steps[0].before)
        merging: list[Step] = []
        for step in steps:
            try:
                moved = self._moved.get(step.index)
                merged.add(step.index, step.after, moved.names if moved else ())
            except MergeError:
                break
            merging.append(step)
        return merged, merging

    def _compare_regions(self, merged: MergedModel) -> Found:
        """Compare the tensors at the boundaries, but not behind forced branches."""
        pairs = [pair for pair in merged.pairs if not pair.branch]
        found: Found = []
        for _, group in groupby(self._step_samples if pairs else [], key=lambda sample: sample.dims):
            samples = list(group)
            by_pair = compare_pairs(self._exchange, merged, pairs, samples)
            for i, sample in enumerate(samples):
                found.append((sample, {pair: verdicts[i] for pair, verdicts in by_pair.items()}))
        return found

    def _compare_branches(self, merged: MergedModel, step: Step) -> Verdict:
        """Compare what Ifs that the step changed give when their conditions are forced, on one input."""
        labels = sorted({pair.branch for pair in merged.pairs if pair.step == step.index and pair.branch})
        return of_all_tensors(self._compare_branch(merged, step, label) for label in labels)

    def _compare_branch(self, merged: MergedModel, step: Step, label: str) -> Verdict:
        pairs = [pair for pair in merged.pairs if pair.step == step.index and pair.branch == label]
        sample = self._step_samples[0]
        try:
            found = compare_pairs(self._exchange, merged, pairs, [sample])
        except RunFailed as failure:
            outputs = [onnx.ValueInfoProto(name=pair.before) for pair in pairs]
            alone = run(self._exchange, merged.program(outputs, [], sample.dims), [sample.path])[0]
            if isinstance(alone, str):
                return Verdict("equal", f"{label} of '{pairs[0].name}' cannot be tried: {alone}")
            return Verdict("different", f"{label} of '{pairs[0].name}' no longer runs: {failure}")
        verdict = of_all_tensors(_named(pair.name, verdicts[0]) for pair, verdicts in found.items())
        return Verdict(verdict.status, f"{label} of {verdict.reason}" if verdict.reason else "", sample.label)

    def _verify_outputs(self, step: Step, excuse: bool) -> Verdict:
        samples = self._step_samples
        if self._compare_outputs([s.outputs for s in samples], step.after, samples, excuse=False).status == "equal":
            return EQUAL  # to the original, whose outputs are there already: the model before need not run
        return self._compare_outputs(self._outputs(step.before, samples), step.after, samples, excuse)

    def _outputs(self, snapshot: Snapshot, samples: Sequence[Sample]) -> list[Arrays | str]:
        """Return what `snapshot` computes for `samples`."""
        if snapshot is self._original:
            return [sample.outputs for sample in samples]
        paths = [sample.path for sample in samples]
        for known, known_paths, outputs in self._latest:
            if known is snapshot and known_paths == paths:
                return outputs
        outputs = run(self._exchange, Program(snapshot.proto, snapshot.weights), paths)
        self._latest.append((snapshot, paths, outputs))
        return outputs

    def _compare_outputs(
        self, expected: Sequence[Arrays | str], after: Snapshot, samples: Sequence[Sample], excuse: bool
    ) -> Verdict:
        """Compare the outputs of `after` with those `expected`.

        A difference counts as unverified where the original draws random numbers, and with `excuse` also where it
        amplifies a few roundings as much.
        """
        if not samples:
            return self._no_samples()
        verdicts = []
        for sample, old, new in zip(samples, expected, self._outputs(after, samples), strict=True):
            verdict = self._compare_arrays(old, new)
            doubt = self._doubt(sample, excuse) if verdict.status == "different" else None
            if doubt and not isinstance(new, str):
                verdict = Verdict("unverified", f"{verdict.reason}, {doubt}")
            verdicts.append(replace(verdict, sample=sample.label))
        return of_all_inputs(verdicts)

    def _doubt(self, sample: Sample, excuse: bool) -> str | None:
        """Return why a difference on `sample` may say nothing about the models."""
        if self._random_ops:
            return f"but they are random: the model has {', '.join(self._random_ops)}"
        if excuse and self._amplifies(sample):
            return "but so do the original's when the input changes by a few roundings"
        return None

    @cached_property
    def _random_ops(self) -> list[str]:
        """The ops of the original that draw numbers, by which node they are, so that they differ after any change."""
        proto = self._original.proto
        bodies = [proto.graph.node, *(function.node for function in self._original.functions.values())]
        ops = {op for nodes in bodies for _, op, _ in ops_of(nodes)}
        return sorted(ops & RANDOM_OPS)

    def _amplifies(self, sample: Sample) -> bool:
        disturbed = self._sampler.disturbed(sample)
        return disturbed is not None and self._compare_arrays(sample.outputs, disturbed).status == "different"

    def _compare_arrays(self, old: Arrays | str, new: Arrays | str) -> Verdict:
        if isinstance(old, str):
            return Verdict("unverified", f"the model before does not run: {old}")
        if isinstance(new, str):
            return Verdict("different", f"the model no longer runs: {new}")
        if old.keys() != new.keys():
            return Verdict("different", f"its outputs were {', '.join(old)} and are {', '.join(new)}")
        absolute = self._max_abs is not None
        return of_all_tensors(_named(name, compare(old[name], new[name], self._allowed, absolute)) for name in old)

    @cached_property
    def _allowed(self) -> float:
        """The tolerance for outputs: the caller's, or that of the coarsest float type in the original."""
        if self._max_abs is not None:
            return self._max_abs
        graph = self._original.proto.graph
        declared = {tensor_type(value)[0] for value in (*graph.input, *graph.value_info, *graph.output)}
        weights = {tensor.dtype.value for tensor in self._original.weights.values()}
        try:
            inferred = {element for element, _ in self._inspector.inspect(self._original).inferred.values()}
        except WorkerFailure:
            inferred = set()
        return tolerance(declared | weights | inferred)

    def _no_samples(self) -> Verdict:
        return Verdict("unverified", self.remarks[-1] if self.remarks else "there is no input to try")


def _verdict(found: Found, step: int) -> Verdict:
    """Return what was found on all inputs at the boundary of `step`."""
    verdicts = []
    for sample, by_pair in found:
        own = [_named(pair.name, verdict) for pair, verdict in by_pair.items() if pair.step == step]
        verdicts.append(replace(of_all_tensors(own), sample=sample.label))
    return of_all_inputs(verdicts)


def _differing(found: Found, step: int) -> set[str]:
    """Return the names of the tensors at the boundary of `step` that differ on some input."""
    return {
        pair.name
        for _, by_pair in found
        for pair, verdict in by_pair.items()
        if pair.step == step and verdict.status == "different"
    }


def _named(name: str, verdict: Verdict) -> Verdict:
    return replace(verdict, reason=f"'{name}': {verdict.reason}" if verdict.reason else "")
