"""The pass `infer-shapes`, and how what a propagation found is written to a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optframe.graph import all_nodes
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import UNKNOWN, Dim


@dataclass(frozen=True)
class InferShapes(GraphPass):
    """Record type and shape of every value, as far as they follow from the inputs and the weights.

    Dynamic dimensions keep their names through reshapes that neither merge nor split them. What a model declares
    stays where nothing better is known; declared outputs of the model are its interface and stay in any case.

    Example:
        before: `y = Reshape(x, [0, -1])`, x of shape (batch, 3, 4), nothing known of y
        after:  y is float32 of shape (batch, 12)
    """

    name: ClassVar[str] = "infer-shapes"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Record in place."""
        return PassResult(record_shapes(model, context.facts.of(model, Propagation.of)) > 0)


def record_shapes(model: ir.Model, known: Propagation) -> int:
    """Write what `known` says of the values of `model` to them; return how many that changed."""
    return sum(_record(value, known) for value in _values(model))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in all_nodes(model):
        for value in node.outputs:
            if value.name != "":
                yield value


def _record(value: ir.Value, known: Propagation) -> bool:
    changed = False
    if value.type is None and (found := known.type_of(value)) is not None:
        value.type = found
        changed = True
    dims = known.dims(value)
    if dims is None or (value.is_graph_output() and value.shape is not None):
        return changed
    shape = _written(dims, value.shape)
    if value.shape is None or shape != value.shape:
        value.shape = shape
        changed = True
    return changed


def _written(dims: tuple[Dim, ...], declared: ir.Shape | None) -> ir.Shape:
    """Return `dims` without the names given to unknowns; there, and for names, what was declared has its way."""
    known: tuple[int | ir.SymbolicDim | None, ...] = (None,) * len(dims)
    if declared is not None and len(declared) == len(dims):
        known = declared.dims
    return ir.Shape([_written_dim(dim, before) for dim, before in zip(dims, known, strict=True)])


def _written_dim(dim: Dim, declared: int | ir.SymbolicDim | None) -> int | str | ir.SymbolicDim | None:
    if isinstance(dim, int):
        return dim
    named = declared if isinstance(declared, int) or (declared is not None and declared.value is not None) else None
    if named is not None:
        return named
    return None if dim.startswith(UNKNOWN) else dim
