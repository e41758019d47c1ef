"""Cross-layer equalisation: scales channels between convolutions, so that one INT8 scale suits all of a tensor.

Between convolutions, what ReLU, pooling and residual sums do commutes with a positive factor for each channel. So
channels of small range can be made larger, by the weights that make them, and smaller again by the weights that read
them; the model computes the same. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.1, for chains of layers; here for all tensors that residual sums tie together, and
with the factors of Xiao et al., "SmoothQuant", ICML 2023, equation 4 (alpha 0.5), which look at activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe import graph
from optframe.precision.nodes import Names, agree, is_constant, is_standard

Array = np.ndarray[Any, Any]

HOMOGENEOUS_OPS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
"""Ops of which f(s x) = s f(x) for s > 0, channel by channel."""

FLOOR = 1e-3
"""Least range of a channel, relative to the largest, so that a channel which calibration saw idle is not blown up."""

CHANNEL_AXIS = 1


@dataclass
class ChannelGroup:
    """Tensors (N, C, ...) that must be scaled alike, in order, with the convolutions that write and read them."""

    values: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the first tensor."""
        return self.values[0].name or ""


def channel_groups(main: ir.Graph) -> list[ChannelGroup]:
    """Return the groups of `main` that are between convolutions on all sides; types and shapes are inferred."""
    groups = _Groups()
    for node in main.all_nodes():
        groups.add(node, inside=node.graph is not main)
    for value in (*main.inputs, *main.outputs):
        groups.block(value)
    return [group for group in groups.found() if group.writers and group.readers]


class _Groups:
    """Union-find over tensors."""

    def __init__(self) -> None:
        self._parents: dict[ir.Value, ir.Value] = {}
        self._blocked: set[ir.Value] = set()
        self._convolutions: list[ir.Node] = []

    def add(self, node: ir.Node, *, inside: bool) -> None:
        """Take in a node of the main graph or, `inside`, of a subgraph, which may read tensors of the main graph."""
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and not is_constant(value)]
        if not inside and _is_plain_convolution(node):
            self._convolutions.append(node)
            for value in values:
                self._parents.setdefault(value, value)
        elif not inside and _ties(node):
            for value in values[1:]:
                self._parents[self._root(value)] = self._root(values[0])
        else:
            for value in values:
                self.block(value)

    def block(self, value: ir.Value) -> None:
        self._parents.setdefault(value, value)
        self._blocked.add(value)

    def found(self) -> Iterator[ChannelGroup]:
        blocked = {self._root(value) for value in self._blocked}
        groups: dict[ir.Value, ChannelGroup] = {}
        for value in self._parents:
            groups.setdefault(self._root(value), ChannelGroup()).values.append(value)
        for node in self._convolutions:
            groups[self._root(_required(node.inputs[0]))].readers.append(node)
            groups[self._root(node.outputs[0])].writers.append(node)
        return (group for root, group in groups.items() if root not in blocked)

    def _root(self, value: ir.Value) -> ir.Value:
        parent = self._parents.setdefault(value, value)
        while parent is not self._parents[parent]:
            parent = self._parents[parent]
        self._parents[value] = parent
        return parent


def _is_plain_convolution(node: ir.Node) -> bool:
    if not is_standard(node) or node.op_type != "Conv" or not is_constant(node.inputs[1]):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (bias is None or is_constant(bias)) and node.outputs[0].dtype == ir.DataType.FLOAT


def _ties(node: ir.Node) -> bool:
    """Return whether the node's tensors must be scaled alike: by a homogeneous op, or by a sum of as many."""
    if not is_standard(node) or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    if node.op_type != "Add":
        return node.op_type in HOMOGENEOUS_OPS
    first, second = (None if is_constant(value) else _required(value).shape for value in node.inputs)
    if first is None or second is None or not agree(first, second) or len(first) <= CHANNEL_AXIS:
        return False
    return isinstance(first[CHANNEL_AXIS], int) and first[CHANNEL_AXIS] == second[CHANNEL_AXIS]


def _required(value: ir.Value | None) -> ir.Value:
    assert value is not None, "these ops have no optional inputs in these places"
    return value


def factors(group: ChannelGroup, ranges: Sequence[Array]) -> tuple[float, ...]:
    """Return what to divide each channel of `group` by, for `ranges` (C,) of the tensors in it that are quantised.

    The root of activation range over weight range; its geometric mean is 1.
    """
    activation = np.max([_relative(channels) for channels in ranges], axis=0)
    weight = np.max([_relative(_input_ranges(node, activation.size)) for node in group.readers], axis=0)
    scales = np.sqrt(activation / weight)
    result: list[float] = (scales / np.exp(np.log(scales).mean())).tolist()
    return tuple(result)


def _relative(ranges: Array) -> Array:
    largest = ranges.max(initial=0.0)
    return np.maximum(ranges / largest, FLOOR) if largest else np.ones_like(ranges)


def _input_ranges(node: ir.Node, channels: int) -> Array:
    """Return the largest magnitude of a convolution's weights for each input channel."""
    weight = _weight(node)
    conv_groups = channels // weight.shape[1]
    parts = np.abs(weight).reshape(conv_groups, weight.shape[0] // conv_groups, weight.shape[1], -1)
    ranges: Array = parts.max(axis=(1, 3)).reshape(-1)
    return ranges


def _weight(node: ir.Node) -> Array:
    weight = graph.constant(node.inputs[1])
    assert weight is not None, "plain convolutions have constant weights"
    return weight


def equalize(model: ir.Model, factors_by_group: Mapping[str, Sequence[float]]) -> None:
    """Divide the channels of each group by its factors, by changing weights and biases of `model` in place.

    Groups that the mapping does not name stay as they are.
    """
    dividers: dict[ir.Value, Array] = {}
    convolutions: dict[ir.Node, None] = {}
    for group in channel_groups(model.graph):
        if group.name in factors_by_group:
            dividers.update(dict.fromkeys(group.values, np.array(factors_by_group[group.name])))
            convolutions.update(dict.fromkeys((*group.writers, *group.readers)))
    names = Names(model)
    for node in convolutions:
        _rescale(model.graph, node, dividers.get(_required(node.inputs[0])), dividers.get(node.outputs[0]), names)


def _rescale(main: ir.Graph, node: ir.Node, taken: Array | None, given: Array | None, names: Names) -> None:
    """Let `node` take its input divided by `taken`, and give its output divided by `given`."""
    weight = _weight(node).astype(np.float64)
    spatial = (1,) * (weight.ndim - 2)
    if taken is not None:
        by_output = taken.reshape(-1, weight.shape[1]).repeat(weight.shape[0] * weight.shape[1] // taken.size, axis=0)
        weight = weight * by_output.reshape(*by_output.shape, *spatial)
    if given is not None:
        weight = weight / given.reshape(-1, 1, *spatial)
        bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            _set_constant(main, node, 2, bias / given, names)
    _set_constant(main, node, 1, weight, names)


def _set_constant(main: ir.Graph, node: ir.Node, index: int, array: Array, names: Names) -> None:
    name = names.new(f"{_required(node.inputs[index]).name}_equalized")
    constant = ir.val(name, const_value=ir.tensor(array.astype(np.float32), name=name))
    main.register_initializer(constant)
    node.replace_input_with(index, constant)


def equalizable(groups: Sequence[ChannelGroup], quantized: Collection[ir.Value]) -> dict[str, ChannelGroup]:
    """Return by name the groups with a tensor among the `quantized` ones."""
    return {group.name: group for group in groups if any(value in quantized for value in group.values)}
