"""How one model differs from another: ops, nodes and where they come from, shapes, weights, FLOPs, outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from optframe import api, flops, graph, numerics
from optframe.accuracy import OutputError
from optframe.api import FeedsLike, ModelLike
from optframe.errors import CheckFailed, InputError
from optframe.gate.structure import require_wired
from optframe.provenance import NodeOrigin, node_origin
from optframe.registry import Registry, default_registry
from optframe.snapshot import same_tensor
from optframe.types import Outputs

Pair: TypeAlias = "tuple[str | None, str | None]"
"""What something was in the one model and is in the other, in words; None where it isn't there."""


@dataclass(frozen=True)
class OutputDiff:
    """An output that both models have: its error, and whether it counts as equal; `reason` says why not."""

    name: str
    error: OutputError
    equal: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelDiff:
    """Differences from model A to model B, by name.

    `ops`: op type -> (count in A, in B) where they differ. `opsets`, `interface` (inputs and outputs), `shapes` (values
    inside) and `weights`: name -> what it was and is. `added` and `removed` are nodes: one that makes the same values
    in both by the same op is neither. `nodes` and `flops` are of A and B, as reports count them, for the first input.
    `outputs` is None where they were not compared: `clash` says how their names, shapes or dtypes differ, or
    `not_compared` why nobody knows.
    """

    nodes: tuple[int, int]
    flops: tuple[int, int]
    ops: Mapping[str, tuple[int, int]]
    opsets: Mapping[str, Pair]
    interface: Mapping[str, Pair]
    shapes: Mapping[str, Pair]
    weights: Mapping[str, Pair]
    added: tuple[NodeOrigin, ...]
    removed: tuple[NodeOrigin, ...]
    outputs: tuple[OutputDiff, ...] | None = None
    clash: str = ""
    not_compared: str = ""

    @property
    def outputs_differ(self) -> bool:
        """Whether the outputs are known to differ, in values or because their names or types do."""
        return bool(self.clash) or any(not output.equal for output in self.outputs or ())

    @property
    def anything(self) -> bool:
        """Whether the models differ in anything at all."""
        structure = (self.ops, self.opsets, self.interface, self.shapes, self.weights, self.added, self.removed)
        return any(structure) or self.outputs_differ


def diff(
    a: ModelLike,
    b: ModelLike,
    *,
    inputs: FeedsLike = None,
    max_abs: float | None = None,
    run: bool = True,
    registry: Registry | None = None,
) -> ModelDiff:
    """Return how `b` differs from `a`; their outputs are compared on `inputs`, or on two random ones.

    Outputs are equal within `max_abs`, or else within `optframe.numerics.TOLERANCES`. With `run=False` they are not
    computed. Weights on disk are read only where both models have one of the same name, dtype and shape.

    Raises:
        InputError: a file is no model, a model is invalid, or the inputs do not fit.
    """
    registry = registry or default_registry()
    old, new = api.load(a), api.load(b)
    require_wired(old, "the first model")
    require_wired(new, "the second model")
    kernels = registry.kernel_ops()
    counts = graph.op_histogram(old, kernels), graph.op_histogram(new, kernels)
    interface = _changes(_interface(old), _interface(new))
    shapes = api.sample_shapes(inputs, old)
    compared = _compare(old, new, inputs, max_abs, registry) if run else {"not_compared": "nobody asked"}
    return ModelDiff(
        nodes=(counts[0].total(), counts[1].total()),
        flops=(_flops(old, registry, shapes), _flops(new, registry, shapes)),
        ops={
            op: (counts[0][op], counts[1][op]) for op in sorted(counts[0] | counts[1]) if counts[0][op] != counts[1][op]
        },
        opsets=_changes(_opsets(old), _opsets(new)),
        interface=interface,
        shapes=_shapes(old, new, interface),
        weights=_weights(old, new),
        added=_nodes(new, old),
        removed=_nodes(old, new),
        **compared,
    )


def _flops(model: ir.Model, registry: Registry, shapes: Mapping[str, Sequence[int]]) -> int:
    known = {value.name: shapes[value.name] for value in model.graph.inputs if value.name and value.name in shapes}
    return flops.count_flops(model, input_shapes=known, ops=registry.ops()).total


def _opsets(model: ir.Model) -> dict[str, str]:
    return {domain or "ai.onnx": str(version) for domain, version in model.opset_imports.items()}


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, Pair]:
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def _interface(model: ir.Model) -> dict[str, str]:
    kinds = (("input", model.graph.inputs), ("output", model.graph.outputs))
    return {f"{kind} {value.name}": _type(value) for kind, values in kinds for value in values}


def _type(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
    return dtype + (str(value.shape) if value.shape is not None else "")


def _shapes(old: ir.Model, new: ir.Model, interface: Mapping[str, Pair]) -> dict[str, Pair]:
    """Return the values inside, made by nodes of both models, whose types are declared differently."""
    known = [
        {v.name: _type(v) for n in model.graph.all_nodes() for v in n.outputs if v.name and v.shape is not None}
        for model in (old, new)
    ]
    inside = known[0].keys() & known[1].keys() - {name.partition(" ")[2] for name in interface}
    return {name: (known[0][name], known[1][name]) for name in sorted(inside) if known[0][name] != known[1][name]}


def _weights(old: ir.Model, new: ir.Model) -> dict[str, Pair]:
    sides = [dict(_initializers(model)) for model in (old, new)]
    changed: dict[str, Pair] = {}
    for name in {**sides[0], **sides[1]}:
        before, after = (side.get(name) for side in sides)
        if not same_tensor(before, after):
            changed[name] = (_describe(before), _describe(after, before))
    return changed


def _initializers(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for each in model.graphs():
        yield from ((name, value.const_value) for name, value in each.initializers.items() if value.const_value)


def _describe(tensor: ir.TensorProtocol | None, before: ir.TensorProtocol | None = None) -> str | None:
    """Return dtype and shape; of a tensor that only changed its content, by how much."""
    if tensor is None:
        return None
    text = f"{tensor.dtype.name.lower()}{list(tensor.shape)}"
    alike = before is not None and before.dtype == tensor.dtype and list(before.shape) == list(tensor.shape)
    if before is None or not alike or tensor.dtype == ir.DataType.STRING:
        return text
    a, b = (each.numpy().astype(np.float64) for each in (before, tensor))
    return f"{text}, by up to {float(np.abs(a - b).max()):.3g}"


def _nodes(of: ir.Model, other: ir.Model) -> tuple[NodeOrigin, ...]:
    """Return the nodes of `of` whose values `other` makes by another op, or not at all."""
    there = {(node.op_identifier(), *(v.name for v in node.outputs)) for node in other.graph.all_nodes()}
    nodes = [node for node in of.graph.all_nodes() if graph.op_name(node) != "Constant"]
    return tuple(
        node_origin(node) for node in nodes if (node.op_identifier(), *(v.name for v in node.outputs)) not in there
    )


def _compare(
    old: ir.Model, new: ir.Model, inputs: FeedsLike, max_abs: float | None, registry: Registry
) -> dict[str, Any]:
    """Return the fields of `ModelDiff` that speak of the outputs."""
    samples = None if inputs is None else api.read_inputs(inputs, old)
    try:
        samples = api.comparison_inputs(samples, old)
        after, before = (api.run_model(model, samples, registry=registry) for model in (new, old))
        errors = api.errors_of(after, before)
    except CheckFailed as failure:
        return {"clash": str(failure)}
    except InputError as error:
        return {"not_compared": str(error)}
    return {"outputs": tuple(_judge(name, error, after, before, max_abs) for name, error in errors.items())}


def _judge(
    name: str, error: OutputError, new: Sequence[Outputs], old: Sequence[Outputs], max_abs: float | None
) -> OutputDiff:
    allowed = numerics.tolerance_of(old[0][name]) if max_abs is None else max_abs
    verdict = numerics.of_all_inputs(
        numerics.compare(b[name], a[name], allowed, absolute=max_abs is not None) for a, b in zip(new, old, strict=True)
    )
    return OutputDiff(name, error, verdict.status != "different", verdict.reason)
