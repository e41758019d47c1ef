"""Shapes of a dynamic model at sample sizes: what holds at two unrelated sizes is taken to hold at all.

Symbols say too little of a dynamic export: whether a mask resized by an index has the width of the features depends on
arithmetic that no shape inference follows. With numbers for the inputs' dimensions every shape is a number.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from optframe_passes.propagate import Propagation

SAMPLES = 2


def sampled_shapes(model: ir.Model) -> list[Propagation]:
    """Return what is known of the values of `model`: at its own sizes, or at two samples where sizes are dynamic."""
    declared = {value: value.shape for value in model.graph.inputs if value.shape is not None}
    if all(shape.is_static() for shape in declared.values()):
        return [Propagation.of(model)]
    try:
        return [_at_sample(model, declared, index) for index in range(SAMPLES)]
    finally:
        for value, shape in declared.items():
            value.shape = shape


def _at_sample(model: ir.Model, declared: Mapping[ir.Value, ir.Shape], index: int) -> Propagation:
    """Return what is known at sample `index`; leaves the inputs with shapes of that sample."""
    sizes: dict[object, int] = {}
    for value, shape in declared.items():
        value.shape = ir.Shape([dim if isinstance(dim, int) else _size(dim, sizes, index) for dim in shape])
    return Propagation.of(model)


def _size(dim: ir.SymbolicDim, sizes: dict[object, int], index: int) -> int:
    """Return the size of dimension `dim`: multiples of 32, as detectors want them; no two alike in any way."""
    place = len(sizes)
    return sizes.setdefault(dim.value or object(), 32 * (7 + 2 * place, 8 + 4 * place)[index])
