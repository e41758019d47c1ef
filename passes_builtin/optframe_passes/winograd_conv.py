"""The pass `winograd-conv`: 3x3 convolutions with fewer multiplications, in standard ops, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optframe.passes import GraphPass, PassContext, PassResult
from optframe_passes.edit import Array, is_onnx
from optframe_passes.surgery import Surgery

TILE = 4
"""Rows and columns of the output that are computed together, from `PATCH` rows and columns of the input."""

PATCH = TILE + 2

_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""Where the polynomials are evaluated, and at infinity. With these, and 256 channels, the result's RMS error in FP32 is
9e-7 of its RMS, against 2e-7 for the direct sum and 1.9e-6 with the usual points 0, 1, -1, 2, -2."""

_TRANSFORM_COST = 100
"""How many multiply-accumulates of a matrix product take as long as an element of a transformed tensor: measured with
onnxruntime 1.32 on a core with AVX-512 for 64 to 512 channels. Each phase of a dilated convolution beyond the first
adds PATCH * PATCH, the zeros in the kernels of its transformations."""

_WORTH_IT = 0.8
"""Largest share of the direct time, as estimated, that is worth the nodes and the weights."""


@dataclass(frozen=True)
class WinogradConv(GraphPass):
    """Compute 3x3 convolutions by Winograd's method F(4x4, 3x3), where that is faster on a CPU.

    Tiles of 4 x 4 outputs take 36 multiplications for each pair of channels instead of 144 (Lavin and Gray, "Fast
    algorithms for convolutional neural networks", 2015, section 4). The input's transformation is a Conv with one
    channel, the product of channels a MatMul of 36 matrices, the transformation back a ConvTranspose. Convolutions
    with constant weights, stride 1, one group and as much padding as keeps the size take part, dilated ones too, if the
    input's size is known (the batch may be free), and if an estimate of the time says that it is worth it: with
    100 x 134 pixels from 128 channels on, at half the size from 80.

    Transformed weights are four times as large, `max_bytes` at most for one convolution, and each takes nine nodes
    more. Not for GPUs, whose libraries have methods of their own. FP32 and FP64 alone: the
    error is five times that of the direct sum, see `_POINTS`.

    Example:
        before: `y = Conv(x, w, b)`, x of shape (1, 256, 50, 67), w (256, 256, 3, 3)
        after:  `t = Conv(Reshape(Pad(x), [1, 1, 13312, 67]), patches, strides=[4, 4])`,
                `m = MatMul(transformed_w, Reshape(t, [36, 1, 256, 221]))`,
                `r = ConvTranspose(Reshape(m, [1, 36, 3328, 17]), tiles, strides=[4, 4])`,
                `y = Add(Slice(Reshape(r, [1, 256, 52, 68])), b)`
    """

    name: ClassVar[str] = "winograd-conv"
    max_bytes: int = 64 << 20

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite in place."""
        surgery = Surgery(model, context)
        for node in surgery.nodes() if surgery.opset >= 13 else ():
            layer = _Layer.of(surgery, node) if is_onnx(node, "Conv") else None
            problem = None if layer is None else layer.problem(self.max_bytes)
            if problem:
                context.near_miss(node, problem)
            elif layer is not None and context.allow(node):
                _rewrite(surgery, node, layer)
        return surgery.result


@dataclass(frozen=True)
class _Layer:
    """A 3x3 convolution that keeps the size, and how its input is cut into tiles.

    A dilated convolution is one for each of its phases, every second row and column (at dilation 2) by itself; a tile
    then covers TILE rows and columns of each phase. The channels stand one above the other, each `rows` high, and end
    with rows of zeros: the padding of what stands above and below.
    """

    outputs: int
    channels: int
    size: tuple[int, int]
    dilations: tuple[int, int]
    itemsize: int

    @classmethod
    def of(cls, surgery: Surgery, conv: ir.Node) -> _Layer | None:
        """Return what `conv` does, None if it is another kind of convolution or its size is not known."""
        dims, tensor = surgery.known.dims(conv.inputs[0]), surgery.tensor(conv.inputs[1])
        kinds = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        if dims is None or len(dims) != 4 or tensor is None or tensor.dtype not in kinds:
            return None
        outputs, channels, *kernel = tensor.shape.numpy()
        height, width = dims[2:]
        dilations = tuple(conv.attributes.get_ints("dilations") or (1, 1))
        pads = tuple(conv.attributes.get_ints("pads") or (0, 0, 0, 0))
        strides = tuple(conv.attributes.get_ints("strides") or (1, 1))
        same = conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET" and pads == dilations * 2
        plain = strides == (1, 1) and kernel == [3, 3] and conv.attributes.get_int("group", 1) == 1
        if not plain or not same or not isinstance(height, int) or not isinstance(width, int):
            return None
        if len(conv.inputs) > 2 and conv.inputs[2] is not None and surgery.tensor(conv.inputs[2]) is None:
            return None
        return cls(outputs, channels, (height, width), (dilations[0], dilations[1]), tensor.dtype.numpy().itemsize)

    @property
    def phases(self) -> int:
        """How many convolutions a dilated one consists of."""
        return self.dilations[0] * self.dilations[1]

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns that a tile covers."""
        return TILE * self.dilations[0], TILE * self.dilations[1]

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles a channel is high and wide."""
        return -(-(self.size[0] + self.dilations[0]) // self.stride[0]), -(-self.size[1] // self.stride[1])

    @property
    def rows(self) -> int:
        """Rows of a channel, zeros included."""
        return self.tiles[0] * self.stride[0]

    def problem(self, max_bytes: int) -> str | None:
        """Return why this convolution is better left as it is, None if it is not."""
        elements = PATCH * PATCH * self.phases * self.tiles[0] * self.tiles[1]
        product = elements * self.outputs * self.channels
        transforms = elements * (self.outputs + self.channels)
        cost = product + transforms * (_TRANSFORM_COST + PATCH * PATCH * (self.phases - 1))
        direct = 9 * self.outputs * self.channels * self.size[0] * self.size[1]
        if cost > _WORTH_IT * direct:
            return f"transformed, it would take about {100 * cost // direct} % of its time"
        if PATCH * PATCH * self.outputs * self.channels * self.itemsize > max_bytes:
            return f"its transformed weights would take more than max_bytes={max_bytes}"
        return None


def _rewrite(surgery: Surgery, conv: ir.Node, layer: _Layer) -> None:
    chain = _Chain(surgery, conv)
    (height, width), (down, across), (high, wide) = layer.size, layer.dilations, layer.tiles
    backward, weights, forward = _transforms(chain.weight, layer.dilations)
    chain.add("Pad", chain.ints("pads", (0, 0, 0, 0, 0, 0, layer.rows - height, 0)))
    chain.reshape(1, 1, -1, width)
    right = layer.stride[1] * (wide - 1) + PATCH * across - across - width
    pads = (down, across, down, right)
    chain.add("Conv", chain.floats("patches", forward), strides=layer.stride, pads=pads)
    chain.reshape(PATCH * PATCH, -1, layer.channels, high * wide)
    chain.multiply(chain.floats("weights", weights))
    chain.reshape(1, PATCH * PATCH * layer.phases, -1, wide)
    chain.add("ConvTranspose", chain.floats("tiles", backward), strides=layer.stride)
    chain.reshape(-1, layer.outputs, layer.rows, wide * layer.stride[1])
    chain.add("Slice", chain.ints("starts", (0, 0)), chain.ints("ends", layer.size), chain.ints("axes", (2, 3)))
    bias = surgery.tensor(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is not None:
        chain.add("Add", chain.floats("bias", bias.numpy().reshape(-1, 1, 1)))
    surgery.replace([conv], chain.nodes)


class _Chain:
    """Nodes one after another that take the place of `conv`, and constants for them."""

    def __init__(self, surgery: Surgery, conv: ir.Node) -> None:
        self.nodes: list[ir.Node] = []
        self._surgery = surgery
        self._conv = conv
        weight = surgery.constant(conv.inputs[1])
        assert weight is not None, "a layer has constant weights"
        self.weight = weight

    @property
    def _last(self) -> ir.Value | None:
        return self.nodes[-1].outputs[0] if self.nodes else self._conv.inputs[0]

    def add(self, op_type: str, *operands: ir.Value, **attributes: Sequence[int]) -> None:
        """Add a node that reads the one before it, and `operands`."""
        self.nodes.append(self._surgery.new(op_type, [self._last, *operands], [self._conv], attributes))

    def multiply(self, left: ir.Value) -> None:
        """Add a MatMul by `left` from the left."""
        self.nodes.append(self._surgery.new("MatMul", [left, self._last], [self._conv]))

    def reshape(self, *target: int) -> None:
        """Add a Reshape."""
        self.add("Reshape", self.ints("shape", target))

    def ints(self, what: str, numbers: Sequence[int]) -> ir.Value:
        """Return a constant of integers."""
        return self._constant(what, np.array(numbers, np.int64))

    def floats(self, what: str, array: Array) -> ir.Value:
        """Return a constant in the type of the weights."""
        tensor = self._surgery.tensor(self._conv.inputs[1])
        assert tensor is not None, "a layer has constant weights"
        return self._constant(what, array.astype(tensor.dtype.numpy()))

    def _constant(self, what: str, array: Array) -> ir.Value:
        return self._surgery.initializer(self._conv, f"{self._conv.outputs[0].name}/{what}", array)


def _transforms(weight: Array, dilations: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Return weights (36 phases, 1, rows, columns), (36, 1, outputs, channels) and (36 phases, 1, rows, columns).

    The first go backward from products to tiles, the last forward from the input to what is multiplied. Cook's and
    Toom's method: polynomials are multiplied by evaluating them at six points and interpolating. The denominators of
    the interpolation go to the weights between, so that all other numbers are short binary fractions: exact.
    """
    backward, kernel, forward = np.zeros((PATCH, TILE)), np.zeros((PATCH, 3)), np.zeros((PATCH, PATCH))
    for index, point in enumerate(_POINTS):
        others = [other for other in _POINTS if other != point]
        backward[index] = point ** np.arange(TILE)
        kernel[index] = point ** np.arange(3) / np.prod([point - other for other in others])
        forward[index, :-1] = np.poly(others)[::-1]
    backward[-1, -1] = kernel[-1, -1] = 1
    forward[-1] = np.poly(_POINTS)[::-1]
    between = np.kron(kernel, kernel) @ weight.reshape(-1, 9).T
    return (
        _patches(backward, dilations),
        between.reshape(PATCH * PATCH, 1, *weight.shape[:2]),
        _patches(forward, dilations),
    )


def _patches(matrix: Array, dilations: tuple[int, int]) -> Array:
    """Return kernels (36 phases, 1, rows, columns) that apply `matrix` to rows and to columns of each phase."""
    down, across = (
        np.kron(matrix, np.eye(dilation)).reshape(PATCH, dilation, -1)  # every dilation-th entry of a row counts
        for dilation in dilations
    )
    kernels: Array = np.einsum("apr,bqc->abpqrc", down, across)
    return kernels.reshape(-1, 1, *kernels.shape[-2:])
