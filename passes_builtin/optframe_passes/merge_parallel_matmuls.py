"""The pass `merge-parallel-matmuls`: linear layers of one input become one, whose result is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.broadcast import of_rank, trimmed
from optframe_passes.edit import Array, is_onnx, remove
from optframe_passes.surgery import Surgery, only_reader


@dataclass(frozen=True)
class MergeParallelMatMuls(GraphPass):
    """Merge MatMuls of one input by constant matrices into one MatMul by the matrices side by side, and a Split.

    Constants added behind them are merged as well, as long as the merged one, in the shape that they broadcast to,
    takes no more than `max_bytes`. At least `min_biased` layers must be there to be merged in that case; where there
    are no constants, or they stay behind the Split, `min_count`. A matrix with other readers is copied if it takes no
    more than `max_bytes`.

    What is saved are nodes, the more if `sink-split` follows: what comes behind the layers is then done once for all. A
    GPU launches fewer kernels. On a CPU the copy that a Split makes costs a little more than one wide product saves:
    with onnxruntime (2 cores, FP32, 256 columns each) the layers take 2 to 25 % longer, from 67 to 3350 rows, which is
    3 ms for three layers of 3350 rows. With less than `min_depth` rows of the matrices it would be a larger share.

    Example:
        before: `q = Add(MatMul(x, wq), bq)`, `k = Add(MatMul(x, wk), bk)`, `v = MatMul(x, wv)`
        after:  `q, k, v = Split(Add(MatMul(x, w), b), axis=-1)`
    """

    name: ClassVar[str] = "merge-parallel-matmuls"
    min_count: int = 4
    min_biased: int = 2
    min_depth: int = 64
    max_bytes: int = 4 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Merge in place."""
        surgery = Surgery(model, context)
        groups: dict[ir.Value | None, list[_Layer]] = {}
        for node in surgery.nodes():
            tensor = surgery.tensor(node.inputs[1]) if surgery.is_linear(node) else None
            if tensor is not None and self._may_merge(node, tensor):
                groups.setdefault(node.inputs[0], []).append(_Layer.of(surgery, node, tensor))
        for layers in groups.values():
            for graph in dict.fromkeys(layer.product.graph for layer in layers):
                self._merge(surgery, [layer for layer in layers if layer.product.graph is graph])
        return surgery.result

    def _may_merge(self, node: ir.Node, weight: ir.TensorProtocol) -> bool:
        """Return whether the weights of `node` have enough rows, and no other reader that would keep large ones."""
        shared = node.inputs[1] is not None and len(node.inputs[1].uses()) > 1
        return weight.shape.numpy()[0] >= self.min_depth and (not shared or weight.nbytes <= self.max_bytes)

    def _merge(self, surgery: Surgery, layers: Sequence[_Layer]) -> None:
        source = layers[0].product.inputs[0]  # what was there at the start may itself have been merged meanwhile
        if source is None or len(layers) < 2:
            return
        bias = _merged_bias(layers, self.max_bytes)
        removed = len(layers) + (sum(layer.addition is not None for layer in layers) if bias is not None else 0)
        added = 2 if bias is None else 3
        if removed <= added or len(layers) < (self.min_count if bias is None else self.min_biased):
            surgery.context.near_miss(layers[0].product, f"{len(layers)} layers read its input: too few to merge")
            return
        if surgery.context.allow(layers[0].product):
            weight = np.concatenate([layer.weight for layer in layers], axis=1)
            _replace(surgery, source, layers, weight, bias)


@dataclass(frozen=True)
class _Layer:
    """A MatMul by a constant matrix, and the addition of a constant behind it, if there is one."""

    product: ir.Node
    addition: ir.Node | None
    tensor: ir.TensorProtocol
    constant: ir.TensorProtocol | None

    @classmethod
    def of(cls, surgery: Surgery, product: ir.Node, tensor: ir.TensorProtocol) -> _Layer:
        """Return the layer of `product`, which multiplies by `tensor`; an addition counts if it keeps the shape."""
        reader, dims = only_reader(product.outputs[0]), surgery.known.dims(product.outputs[0])
        side = surgery.constant_side(reader) if reader is not None and is_onnx(reader, "Add") else None
        if reader is None or side is None or dims is None or surgery.known.dims(reader.outputs[0]) != dims:
            return cls(product, None, tensor, None)
        return cls(product, reader, tensor, surgery.tensor(reader.inputs[side]))

    @property
    def columns(self) -> int:
        """How many columns the layer makes."""
        return int(self.tensor.shape.numpy()[1])

    @property
    def weight(self) -> Array:
        """The matrix, of shape (depth, columns)."""
        return self.tensor.numpy()

    @property
    def bias(self) -> Array:
        """The constant that is added, or zero, its last axis as long as the layer has columns."""
        if self.constant is None:
            return np.zeros(self.columns, self.tensor.dtype.numpy())
        array = self.constant.numpy()
        return np.broadcast_to(array, (*array.shape[:-1], self.columns))


def _merged_bias(layers: Sequence[_Layer], max_bytes: int) -> Array | None:
    """Return all constants side by side, in the shape that they broadcast to; None if there are none, or too large."""
    if all(layer.constant is None for layer in layers):
        return None
    biases = [layer.bias for layer in layers]
    lead = np.broadcast_shapes(*(bias.shape[:-1] for bias in biases))
    if math.prod(lead) * sum(bias.shape[-1] for bias in biases) * biases[0].itemsize > max_bytes:
        return None
    full = [np.broadcast_to(of_rank(bias, len(lead) + 1), (*lead, bias.shape[-1])) for bias in biases]
    return trimmed(np.concatenate(full, axis=-1))


def _replace(surgery: Surgery, source: ir.Value, layers: Sequence[_Layer], weight: Array, bias: Array | None) -> None:
    products = [layer.product for layer in layers]
    additions = [layer.addition for layer in layers if layer.addition is not None and bias is not None]
    first, origin = products[0], [*products, *additions]
    nodes = [surgery.new("MatMul", [source, surgery.like(first, 1, weight)], origin)]
    if bias is not None:
        constant = surgery.initializer(first, f"{nodes[0].outputs[0].name}/bias", bias)
        nodes.append(surgery.new("Add", [nodes[0].outputs[0], constant], origin))
    sizes = [layer.columns for layer in layers]
    nodes.append(surgery.split(nodes[-1].outputs[0], -1, sizes, origin))
    surgery.insert(first, nodes)
    for layer, part in zip(layers, nodes[-1].outputs, strict=True):
        last = layer.addition if layer.addition in additions else layer.product
        surgery.take_over((last or layer.product).outputs[0], part)
    remove(origin)
    surgery.rewrites += 1
