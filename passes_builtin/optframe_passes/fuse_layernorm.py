"""The pass `fuse-layernorm`: layer normalisations written out in simpler ops become native nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import opset
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import FreshNames
from optframe_passes.layernorm_matcher import LayerNormMatch, find_layernorms, inline_layernorms
from optframe_passes.propagate import Propagation

NATIVE_OPSET = 17
"""The opset that brought LayerNormalization."""


@dataclass(frozen=True)
class FuseLayerNorm(GraphPass):
    """Replace mean, difference, variance, root and quotient, with scale and bias, by one LayerNormalization.

    Found over one or more trailing axes, given as attribute or input; the square as Pow or Mul, the root as Sqrt or
    Pow, the quotient as Div or as Reciprocal and Mul, operands in either order, the difference computed once or twice;
    scale and bias optional, constant or not; with the scale in the divisor, and as x * s + (bias - mean * s), which is
    how TensorFlow writes it; with casts to float32 inside, which LayerNormalization makes itself (its statistics are
    float32, never less exact than what they replace). Model-local functions that hold one are inlined first.

    Left alone, with the reason as near-miss: statistics that others use too, variances over other axes or with ddof,
    an epsilon that is not constant or not under the root, float64, models below opset 17. A scale or bias that does
    not fit the normalised axes stays behind as Mul or Add.

    Example:
        before: `d = x - ReduceMean(x, axes=[-1]); y = d / Sqrt(ReduceMean(Pow(d, 2), axes=[-1]) + 1e-5) * g + b`
        after:  `y = LayerNormalization(x, g, b, axis=-1, epsilon=1e-5)`
    """

    name: ClassVar[str] = "fuse-layernorm"
    after: ClassVar[tuple[str, ...]] = ("lift-opset",)

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fuse in place."""
        version = opset(model)
        inlined = version >= NATIVE_OPSET and inline_layernorms(model, context)
        known = Propagation.of(model) if inlined else None
        matches = [match for match in find_layernorms(model, context, known) if not match.native]
        if version < NATIVE_OPSET:
            reason = f"LayerNormalization needs opset {NATIVE_OPSET}, the model has {version}: run lift-opset first"
            for match in matches:
                context.near_miss(match.nodes[-1], reason)
            return PassResult(False)
        names = FreshNames(model)
        rewrites = inlined + sum(_fuse(match, names, context) for match in reversed(matches))
        return PassResult(rewrites > 0, rewrites)


def _fuse(match: LayerNormMatch, names: FreshNames, context: PassContext) -> bool:
    dims = match.static_dims
    if dims is not None and 0 in dims:  # onnxruntime's kernel refuses to normalise nothing
        return False
    if match.scale is None and dims is None:
        context.near_miss(match.nodes[-1], "it has no scale, and the size of one made of ones is not fixed")
        return False
    if not context.allow(match.nodes[-1]):
        return False
    inputs = [match.x, _scale(match, names)]
    if match.bias is not None:
        inputs.append(match.parameter(match.bias, names))
    node = ir.node("LayerNormalization", inputs, {"axis": match.axis, "epsilon": match.epsilon})
    context.replace(match.nodes, [node], [match.output], node.outputs)
    return True


def _scale(match: LayerNormMatch, names: FreshNames) -> ir.Value:
    """Return the scale that LayerNormalization needs, made of ones where the match has none."""
    if match.scale is not None:
        return match.parameter(match.scale, names)
    assert match.static_dims is not None
    return match.constant(np.ones(match.static_dims, match.dtype.numpy()), "layernorm_ones", names)
