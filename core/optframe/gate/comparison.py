"""Comparing pairs of tensors of a merged model: inside the graph where their types are known, else outside of it.

Inside, only two numbers a pair leave onnxruntime, and each tensor dies as soon as it is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from optframe.gate.comparison_nodes import EXACT, FLOATS, compare_nodes, figures, guarded_nodes
from optframe.gate.exchange import Exchange
from optframe.gate.region import COMPARE_DOMAIN, MergedModel, Pair
from optframe.gate.samples import Sample, run
from optframe.gate.structure import UNKNOWN, TensorType, ask_onnx, is_fixed, show_type, types_clash
from optframe.numerics import EQUAL, Verdict, compare, tolerance, tolerance_of, too_large
from optframe.worker import Arrays, WorkerFailure


class RunFailed(Exception):
    """A merged model does not run; the message says why."""


def compare_pairs(
    exchange: Exchange, merged: MergedModel, pairs: Sequence[Pair], samples: Sequence[Sample]
) -> dict[Pair, list[Verdict]]:
    """Return for each of `pairs` its verdict on each of `samples`, whose shapes are the same.

    Raises:
        RunFailed: the merged model does not run on one of them.
    """
    dims = samples[0].dims
    types = _infer(exchange, merged, pairs, dims)
    plans = []
    for index, pair in enumerate(pairs):
        involved = {pair.before, *merged.replaced[pair.step]}
        allowed = tolerance(types.get(name, UNKNOWN)[0] for name in involved)
        plans.append(_plan(pair, types, allowed, f"{COMPARE_DOMAIN}.{index}"))
    verdicts: dict[Pair, list[Verdict | None]] = {}
    while plans:
        results = _execute(exchange, merged, plans, samples)
        verdicts |= {each.pair: [each.judge(arrays) for arrays in results] for each in plans}
        plans = [replace(each, inside=False) for each in plans if None in verdicts[each.pair]]
    return {pair: [verdict for verdict in found if verdict] for pair, found in verdicts.items()}


def _infer(
    exchange: Exchange, merged: MergedModel, pairs: Sequence[Pair], dims: Mapping[str, Sequence[int]]
) -> Mapping[str, TensorType]:
    names = sorted({name for pair in pairs for name in (pair.before, pair.after)})
    program = merged.program([onnx.ValueInfoProto(name=name) for name in names], [], dims)
    try:
        return ask_onnx(exchange.worker, program.proto, program.weights)[1]
    except WorkerFailure as failure:
        raise RunFailed(str(failure)) from failure


def _execute(
    exchange: Exchange, merged: MergedModel, plans: Sequence[_PairPlan], samples: Sequence[Sample]
) -> list[Arrays]:
    outputs = [output for each in plans for output in each.outputs]
    if not outputs:
        return [{} for _ in samples]
    program = merged.program(outputs, [each.nodes for each in plans], samples[0].dims)
    results: list[Arrays] = []
    for result in run(exchange, program, [sample.path for sample in samples]):
        if isinstance(result, str):
            raise RunFailed(result)
        results.append(result)
    return results


@dataclass(frozen=True)
class _PairPlan:
    """How one pair is compared: by the figures that nodes in the graph make of it, or outside, by the tensors.

    `verdict` is set where the types alone decide. Names of nodes and outputs begin with `name`.
    """

    pair: Pair
    allowed: float
    name: str
    before: TensorType
    after: TensorType
    inside: bool = True

    @property
    def verdict(self) -> Verdict | None:
        """What the types say, if they are enough."""
        if types_clash(self.before, self.after):
            return Verdict("different", f"it was {show_type(self.before)} and is {show_type(self.after)}")
        return None

    @property
    def comparable(self) -> bool:
        """Whether nodes can compare the pair: a numeric type, one rank, and not known to be empty."""
        (element, dims), (other, other_dims) = self.before, self.after
        known = element == other and element in FLOATS | EXACT and dims is not None and other_dims is not None
        return known and bool(is_fixed(self.before) or dims) and 0 not in (dims or ())

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes that the merged model needs for this pair."""
        pair = self.pair
        if self.verdict:
            return []
        if not self.inside:
            sides = zip((pair.before, pair.after), self._tensors, strict=True)
            return [onnx.helper.make_node("Identity", [name], [output]) for name, output in sides]
        make = compare_nodes if is_fixed(self.before) and self.before == self.after else guarded_nodes
        return make(pair.before, pair.after, self.before[0], self.name)

    @property
    def outputs(self) -> list[onnx.ValueInfoProto]:
        """The outputs that the merged model needs for this pair."""
        if self.verdict:
            return []
        return [figures(self.name)] if self.inside else [onnx.ValueInfoProto(name=name) for name in self._tensors]

    @property
    def _tensors(self) -> tuple[str, str]:
        return f"{self.name}.before", f"{self.name}.after"

    def judge(self, arrays: Arrays) -> Verdict | None:
        """Return what `arrays`, the outputs of a run, say of the pair; None if the tensors themselves are needed."""
        if self.verdict:
            return self.verdict
        if not self.inside:
            before, after = (arrays[name] for name in self._tensors)
            return compare(before, after, max(self.allowed, tolerance_of(before)))
        worst, total = map(float, arrays[self.name])
        if not np.isfinite(total):
            return None
        return Verdict("different", too_large(worst, self.allowed)) if worst > self.allowed else EQUAL


def _plan(pair: Pair, types: Mapping[str, TensorType], allowed: float, name: str) -> _PairPlan:
    before, after = types.get(pair.before, UNKNOWN), types.get(pair.after, UNKNOWN)
    plan = _PairPlan(pair, allowed, name, before, after)
    return replace(plan, inside=plan.comparable)
