"""The pass `fuse-groupnorm`: group normalisations written out with InstanceNormalization become native nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import all_nodes, opset
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import Array, FreshNames, add_initializer, graph_of, is_onnx, small_constant
from optframe_passes.lift_opset import raise_to_21
from optframe_passes.propagate import Propagation
from optframe_passes.surgery import only_reader

NATIVE_OPSET = 21
"""GroupNormalization takes scale and bias for each channel from here on. That of opset 18 takes them for each group,
which no exporter means, and was withdrawn."""


@dataclass(frozen=True)
class FuseGroupNorm(GraphPass):
    """Replace Reshape, InstanceNormalization, Reshape and the scale and bias behind them by one GroupNormalization.

    Where there is one, a model of opset 18 to 20 is raised to 21, unless that gives one of its ops another meaning.

    In `tensorrt` and `cuda` alone (docs/pipelines.md): TensorRT's parser makes a normalisation layer of the node and
    torch has one kernel for it, where the written-out form takes five. onnxruntime's CPU provider has no kernel; it
    takes the node apart into others that take 1.8 to 4.5 times as long as InstanceNormalization between reshapes.

    Example:
        before: `y = Reshape(InstanceNormalization(Reshape(x, [0, 32, -1]), ones, zeros), Shape(x)) * g + b`
        after:  `y = GroupNormalization(x, g, b, num_groups=32)`
    """

    name: ClassVar[str] = "fuse-groupnorm"
    after: ClassVar[tuple[str, ...]] = ("lift-opset", "fold-constants")

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fuse in place."""
        norms = [node for node in all_nodes(model) if is_onnx(node, "InstanceNormalization")]
        if not norms:
            return PassResult(False)
        known, names = context.facts.of(model, Propagation.of), FreshNames(model)
        rewrites = 0
        for node in norms:
            match = _match(node, known)
            if isinstance(match, str):
                context.near_miss(node, match)
            elif context.allow(node):
                reason = raise_to_21(model) if opset(model) < NATIVE_OPSET else None
                if reason is not None:
                    context.near_miss(node, f"GroupNormalization needs opset {NATIVE_OPSET}, but {reason}")
                    continue
                _fuse(match, names, context)
                rewrites += 1
        return PassResult(rewrites > 0, rewrites)


@dataclass(frozen=True)
class _Match:
    """The group normalisation of x; `scale` and `bias` (C,), `nodes` with the one that makes the output last."""

    x: ir.Value
    groups: int
    scale: Array
    bias: Array
    epsilon: float
    nodes: tuple[ir.Node, ...]


def _match(norm: ir.Node, known: Propagation) -> _Match | str:
    """Return the match around the InstanceNormalization `norm`, or why there is none."""
    grouped, group_scale, group_bias = norm.inputs[0], small_constant(norm.inputs[1]), small_constant(norm.inputs[2])
    split = grouped.producer() if grouped is not None else None
    merge = only_reader(norm.outputs[0])
    if split is None or merge is None or not is_onnx(split, "Reshape") or not is_onnx(merge, "Reshape"):
        return "it does not stand between two reshapes: no group normalisation"
    x, shape, inner = split.inputs[0], known.dims(split.inputs[0]), known.dims(grouped)
    if x is None or shape is None or inner is None or len(shape) < 3 or known.dims(merge.outputs[0]) != shape:
        return "the reshapes do not lead to groups and back"
    channels, groups = shape[1], inner[1]
    if not isinstance(channels, int) or not isinstance(groups, int) or shape[0] != inner[0]:
        return "the channels are not split into groups of one size"
    if not channels or not groups or channels % groups:
        return f"{channels} channels are not split into {groups} groups of one size"
    if group_scale is None or group_bias is None:
        return "its scale and bias are not constant"
    if only_reader(split.outputs[0]) is not norm:
        return "the grouped input is used elsewhere too"
    scale, bias = (np.repeat(parameter, channels // groups) for parameter in (group_scale, group_bias))
    nodes = [split, norm, merge]
    for op_type in ("Mul", "Add"):
        node = only_reader(nodes[-1].outputs[0])
        vector = _per_channel(node, nodes[-1].outputs[0], channels, len(shape)) if node is not None else None
        if node is not None and vector is not None and is_onnx(node, op_type):
            scale, bias = (scale * vector, bias * vector) if op_type == "Mul" else (scale, bias + vector)
            nodes.append(node)
    return _Match(x, groups, scale, bias, norm.attributes.get_float("epsilon", 1e-5), tuple(nodes))


def _per_channel(node: ir.Node, value: ir.Value, channels: int, rank: int) -> Array | None:
    """Return the constant (C,) that a binary `node` applies to `value` (N, C, ...), None if it is anything else."""
    if not is_onnx(node, "Mul", "Add"):
        return None
    array = small_constant(node.inputs[1] if node.inputs[0] is value else node.inputs[0], limit=1 << 20)
    if array is None or array.ndim > rank:
        return None
    aligned = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if aligned.size not in (1, aligned.shape[1]) or aligned.shape[1] not in (1, channels):
        return None
    return np.broadcast_to(aligned.reshape(-1), (channels,))


def _fuse(match: _Match, names: FreshNames, context: PassContext) -> None:
    graph, output = graph_of(match.nodes[-1]), match.nodes[-1].outputs[0]
    parameters = [
        add_initializer(graph, names(f"{output.name}_{name}"), array)
        for name, array in (("scale", match.scale), ("bias", match.bias))
    ]
    attributes = {"epsilon": match.epsilon, "num_groups": match.groups}
    node = ir.node("GroupNormalization", [match.x, *parameters], attributes)
    context.replace(match.nodes, [node], [output], node.outputs)
