"""The pass `fold-conv-scale`: scale and offset of each channel behind a convolution become part of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.graph import all_nodes, constant
from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import Array, FreshNames, add_initializer, graph_of, is_onnx

_FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True)
class Affine:
    """y * scale + offset for each channel, in float64; arrays of shape (channels,)."""

    scale: Array
    offset: Array

    def then(self, later: Affine) -> Affine:
        """Return what both do, this one first."""
        return Affine(self.scale * later.scale, self.offset * later.scale + later.offset)


@dataclass(frozen=True)
class FoldConvScale(GraphPass):
    """Fold BatchNormalization, and Mul, Div, Add and Sub by a constant for each channel, into the Conv before them.

    FrozenBatchNorm is a Mul and an Add of this kind. Conv and ConvTranspose with constant weights take part, with any
    number of groups and dimensions, and Gemm, whose columns are the channels; the chain behind them must have no other
    reader. Scale and offset of a chain are gathered in float64 and rounded once to the type of the weights.

    Example:
        before: `y = Add(Mul(Conv(x, w), scale), offset)`, scale and offset of shape (1, channels, 1, 1)
        after:  `y = Conv(x, w * scale, offset)`
    """

    name: ClassVar[str] = "fold-conv-scale"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Fold in place."""
        names = FreshNames(model)
        rewrites = 0
        for node in list(all_nodes(model)):
            if node.graph is not None and is_onnx(node, "Conv", "ConvTranspose", "Gemm"):
                rewrites += _fold(node, names, context)
        return PassResult(rewrites > 0, rewrites)


def _fold(conv: ir.Node, names: FreshNames, context: PassContext) -> bool:
    follower = _only_reader(conv)
    if follower is None or not is_onnx(follower, *_READERS):
        return False
    weight, bias = constant(conv.inputs[1]), _bias(conv)
    if weight is None or bias is None or weight.dtype.type not in _FLOATS:
        context.near_miss(conv, f"its weights are not constant, so the {follower.op_type} behind it stays")
        return False
    if conv.op_type == "Gemm" and not _is_plain(conv, weight, bias):
        context.near_miss(conv, "it scales its operands, or adds something else than one number for each column")
        return False
    chain, total = _chain(conv, _channels(conv, weight), weight.ndim, context)
    if not chain:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        new_weight = np.empty_like(weight)  # the product is float64, piece by piece: no second copy in memory
        np.multiply(weight, _along_weight(conv, weight, total.scale), out=new_weight, casting="same_kind")
        new_bias = (bias.reshape(-1).astype(np.float64) * total.scale + total.offset).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        context.near_miss(conv, f"scaled weights would leave the range of {weight.dtype}")
        return False
    _replace(conv, chain, new_weight, new_bias, names, context)
    return True


def _replace(
    conv: ir.Node, chain: list[ir.Node], weight: Array, bias: Array, names: FreshNames, context: PassContext
) -> None:
    graph = graph_of(conv)
    base = conv.inputs[1].name if conv.inputs[1] is not None and conv.inputs[1].name else "weight"
    values = [add_initializer(graph, names(f"{base}_{what}"), a) for what, a in (("scaled", weight), ("bias", bias))]
    new = ir.Node("", conv.op_type, [conv.inputs[0], *values], conv.attributes, name=conv.name)
    context.replace([conv, *chain], [new], chain[-1].outputs, new.outputs)


def _chain(conv: ir.Node, channels: int, rank: int, context: PassContext) -> tuple[list[ir.Node], Affine]:
    """Return the foldable nodes behind `conv`, one after another, and what they do together."""
    total = Affine(np.ones(channels), np.zeros(channels))
    chain: list[ir.Node] = []
    node = _only_reader(conv)
    while node is not None and is_onnx(node, *_READERS):
        step = _affine(node, (chain[-1] if chain else conv).outputs[0], channels, rank)
        if step is None:
            if any(constant(value) is not None for value in node.inputs):
                context.near_miss(node, "its other operands are not constants with one number for each channel")
            break
        if not context.allow(node):
            break
        chain.append(node)
        total = total.then(step)
        node = _only_reader(node)
    return chain, total


def _only_reader(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads the output of `node`, in its own graph, if nobody else does."""
    value = node.outputs[0]
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    reader = next(iter(uses)).node
    return reader if reader.graph is node.graph else None


def _is_plain(gemm: ir.Node, weight: Array, bias: Array) -> bool:
    """Return whether a Gemm is a product and a vector (or number) added to each row."""
    unscaled = gemm.attributes.get_float("alpha", 1.0) == gemm.attributes.get_float("beta", 1.0) == 1
    return unscaled and bias.size in (1, _channels(gemm, weight)) and bias.shape[-1:] in ((), (bias.size,))


def _channels(conv: ir.Node, weight: Array) -> int:
    if conv.op_type == "Gemm":
        return int(weight.shape[1 - conv.attributes.get_int("transB", 0)])
    if conv.op_type == "Conv":
        return int(weight.shape[0])
    return int(weight.shape[1]) * conv.attributes.get_int("group", 1)


def _along_weight(conv: ir.Node, weight: Array, scale: Array) -> Array:
    """Return `scale` in a shape that multiplies the weights of each output channel.

    Weights are (out, in / groups, ...) for Conv and (in, out / groups, ...) for ConvTranspose, whose inputs of one
    group lie side by side; (in, out) for Gemm, or transposed.
    """
    if conv.op_type == "Gemm":
        return scale.reshape((-1, 1) if conv.attributes.get_int("transB", 0) else (1, -1))
    ones = (1,) * (weight.ndim - 2)
    if conv.op_type == "Conv":
        return scale.reshape(-1, 1, *ones)
    groups = conv.attributes.get_int("group", 1)
    return np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0).reshape(weight.shape[:2] + ones)


def _bias(conv: ir.Node) -> Array | None:
    """Return the bias of `conv`, zero if absent, None if not constant."""
    if len(conv.inputs) < 3 or conv.inputs[2] is None:
        return np.zeros(())
    return constant(conv.inputs[2])


def _affine(node: ir.Node, source: ir.Value, channels: int, rank: int) -> Affine | None:
    """Return what `node` does to each channel of `source`, None if it does something else."""
    if node.op_type == "BatchNormalization":
        return _normalization(node, source)
    side = 0 if node.inputs[0] is source else 1
    number = _per_channel(constant(node.inputs[1 - side]), channels, rank)
    if number is None or (node.op_type == "Div" and (side == 1 or not number.all())):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type in ("Mul", "Div"):
        return Affine(number if node.op_type == "Mul" else 1 / number, zero)
    if node.op_type == "Add":
        return Affine(one, number)
    return Affine(one, -number) if side == 0 else Affine(-one, number)


def _per_channel(array: Array | None, channels: int, rank: int) -> Array | None:
    """Return one number for each channel (axis 1 of `rank`) out of an operand that is constant along other axes."""
    if array is None or array.dtype.type not in _FLOATS or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))


def _normalization(node: ir.Node, source: ir.Value) -> Affine | None:
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, as BatchNormalization defines it at inference."""
    trains = node.attributes.get_int("training_mode", 0) or any(value.name != "" for value in node.outputs[1:])
    arrays = [constant(value) for value in node.inputs[1:]]
    numbers = [array.astype(np.float64) for array in arrays if array is not None]
    if trains or node.inputs[0] is not source or len(numbers) != 4 or node.attributes.get_int("spatial", 1) != 1:
        return None
    scale, bias, mean, variance = numbers
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return Affine(factor, bias - mean * factor)


_READERS = ("Add", "BatchNormalization", "Div", "Mul", "Sub")
