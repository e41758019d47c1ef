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
    takes no more than `max_bytes`. At least `min_count` MatMuls are merged, or two that both have such a constant: then
    the model gets smaller.

    It pays where the product is compute-bound, since one wide product reuses each row of its left operand more often;
    the Split costs a copy. Measured with onnxruntime on the CPU (2 cores, 256 columns each, FP32): for 3350 rows 7 to
    30 % of the time of the separate layers is saved, for 900 rows it is even, for 67 rows a tenth of a millisecond is
    lost. With less than `min_depth` rows of the matrices the copy outweighs what is saved.

    Example:
        before: `q = Add(MatMul(x, wq), bq)`, `k = Add(MatMul(x, wk), bk)`, `v = MatMul(x, wv)`
        after:  `q, k, v = Split(Add(MatMul(x, w), b), axis=-1)`
    """

    name: ClassVar[str] = "merge-parallel-matmuls"
    min_count: int = 3
    min_depth: int = 64
    max_bytes: int = 4 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Merge in place."""
        surgery = Surgery(model, context)
        groups: dict[ir.Value, list[_Layer]] = {}
        for node in surgery.nodes():
            source = node.inputs[0] if surgery.is_linear(node) else None
            if source is not None and self._may_merge(surgery, node):
                groups.setdefault(source, []).append(_Layer.of(surgery, node))
        for source, layers in groups.items():
            for graph in dict.fromkeys(layer.product.graph for layer in layers):
                self._merge(surgery, source, [layer for layer in layers if layer.product.graph is graph])
        return surgery.result

    def _may_merge(self, surgery: Surgery, node: ir.Node) -> bool:
        """Return whether the weights of `node` have enough rows, and no other reader that would keep large ones."""
        weight = surgery.tensor(node.inputs[1])
        if weight is None or node.inputs[1] is None or weight.shape.numpy()[0] < self.min_depth:
            return False
        return len(node.inputs[1].uses()) == 1 or weight.nbytes <= self.max_bytes

    def _merge(self, surgery: Surgery, source: ir.Value, layers: Sequence[_Layer]) -> None:
        if len(layers) < 2:
            return
        bias = _merged_bias(surgery, source, layers, self.max_bytes)
        removed = len(layers) + (sum(layer.addition is not None for layer in layers) if bias is not None else 0)
        added = 2 if bias is None else 3
        if removed <= added or (len(layers) < self.min_count and bias is None):
            surgery.context.near_miss(layers[0].product, f"{len(layers)} layers read its input: too few to merge")
            return
        weights = [layer.weight(surgery) for layer in layers]
        weight = surgery.fits(np.concatenate(weights, axis=1), source)
        if weight is None:
            surgery.context.near_miss(layers[0].product, "the merged weights would be too large")
        elif surgery.context.allow(layers[0].product):
            _replace(surgery, source, layers, weight, bias)


@dataclass(frozen=True)
class _Layer:
    """A MatMul by constant weights, and the addition of a constant behind it, if there is one."""

    product: ir.Node
    addition: ir.Node | None

    @classmethod
    def of(cls, surgery: Surgery, product: ir.Node) -> _Layer:
        """Return the layer of `product`; an addition counts if it leaves the shape as it is."""
        reader, dims = only_reader(product.outputs[0]), surgery.known.dims(product.outputs[0])
        if reader is None or not is_onnx(reader, "Add") or surgery.constant_side(reader) is None:
            return cls(product, None)
        return cls(product, reader if dims is not None and surgery.known.dims(reader.outputs[0]) == dims else None)

    def columns(self, surgery: Surgery) -> int:
        """Return how many columns the layer makes."""
        tensor = surgery.tensor(self.product.inputs[1])
        assert tensor is not None, "the weights of a linear layer are constant"
        return int(tensor.shape.numpy()[1])

    def weight(self, surgery: Surgery) -> Array:
        """Return the matrix, of shape (depth, columns)."""
        array = surgery.constant(self.product.inputs[1])
        assert array is not None, "the weights of a linear layer are constant"
        return array

    def bias(self, surgery: Surgery) -> Array:
        """Return the constant that is added, its last axis as long as the layer has columns."""
        columns = self.columns(surgery)
        side = None if self.addition is None else surgery.constant_side(self.addition)
        array = None if self.addition is None or side is None else surgery.constant(self.addition.inputs[side])
        return np.zeros(columns) if array is None else np.broadcast_to(array, (*array.shape[:-1], columns))


def _merged_bias(surgery: Surgery, source: ir.Value, layers: Sequence[_Layer], max_bytes: int) -> Array | None:
    """Return all constants side by side, in the shape that they broadcast to; None if there are none, or too large."""
    if all(layer.addition is None for layer in layers):
        return None
    biases = [layer.bias(surgery) for layer in layers]
    lead = np.broadcast_shapes(*(bias.shape[:-1] for bias in biases))
    if math.prod(lead) * sum(bias.shape[-1] for bias in biases) > max_bytes:
        return None
    full = [np.broadcast_to(of_rank(bias, len(lead) + 1), (*lead, bias.shape[-1])) for bias in biases]
    return surgery.fits(trimmed(np.concatenate(full, axis=-1)), source, max_bytes)


def _replace(surgery: Surgery, source: ir.Value, layers: Sequence[_Layer], weight: Array, bias: Array | None) -> None:
    products = [layer.product for layer in layers]
    additions = [layer.addition for layer in layers if layer.addition is not None and bias is not None]
    first, origin = products[0], [*products, *additions]
    nodes = [surgery.new("MatMul", [source, surgery.like(first, 1, weight)], origin)]
    if bias is not None:
        constant = surgery.initializer(first, f"{nodes[0].outputs[0].name}/bias", bias)
        nodes.append(surgery.new("Add", [nodes[0].outputs[0], constant], origin))
    sizes = [layer.columns(surgery) for layer in layers]
    nodes.append(surgery.split(nodes[-1].outputs[0], -1, sizes, origin))
    surgery.insert(first, nodes)
    for layer, part in zip(layers, nodes[-1].outputs, strict=True):
        last = layer.addition if layer.addition in additions else layer.product
        surgery.take_over((last or layer.product).outputs[0], part)
    remove(origin)
    surgery.rewrites += 1
