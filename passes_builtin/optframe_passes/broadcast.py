"""Broadcast constants behind ops that only rearrange elements: where they vary, and what shape they take there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from optframe_passes.edit import Array, is_onnx
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import Dim, Product

RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""Ops that keep the order of the elements."""

LARGEST = 1 << 22
"""Elements of the largest constant that is made on the way."""


def is_rearrangement(node: ir.Node | None) -> bool:
    """Return whether `node` only gives the elements of its first input other places."""
    if node is None or not is_onnx(node, "Transpose", *RESHAPES):
        return False
    order = node.attributes.get_ints("perm") if node.op_type == "Transpose" else None
    return order is None or sorted(order) == list(range(len(order)))  # another perm is an error to be kept


def of_rank(array: Array, rank: int) -> Array:
    """Return `array` with axes of size 1 in front, as broadcasting adds them."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def trimmed(array: Array) -> Array:
    """Return `array` without axes of size 1 in front."""
    while array.ndim and array.shape[0] == 1:
        array = array[0]
    return array


def times(array: Array, matrix: Array) -> Array:
    """Return `array`, its last axis broadcast to the rows of `matrix`, times `matrix`: one product, not a stack."""
    expanded = np.broadcast_to(array, array.shape[:-1] + matrix.shape[:1])
    product: Array = expanded.reshape(-1, len(matrix)) @ matrix
    return product.reshape(*array.shape[:-1], matrix.shape[1])


def collapsed(array: Array) -> Array:
    """Return `array` with size 1 along every axis that it does not vary along."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = array.take([0], axis)
            array = first if (array == first).all() else array
    return array


def behind(node: ir.Node, array: Array, known: Propagation) -> Array | None:
    """Return what adding `array` in front of a rearrangement adds behind it; the rank of `array` is the input's.

    Only axes that `array` varies along have a size; None where their sizes are not known.
    """
    dims, result = known.dims(node.inputs[0]), known.dims(node.outputs[0])
    if dims is None or result is None:
        return None
    if node.op_type == "Transpose":
        return array.transpose(permutation(node, len(dims)))
    return reshaped(array, dims, result)


def before(node: ir.Node, array: Array, known: Propagation) -> Array | None:
    """Return what has to be added in front of a rearrangement to add `array` behind it; see `behind`."""
    dims, result = known.dims(node.inputs[0]), known.dims(node.outputs[0])
    if dims is None or result is None:
        return None
    if node.op_type == "Transpose":
        return array.transpose(np.argsort(permutation(node, len(dims))))
    return reshaped(array, result, dims)


def permutation(node: ir.Node, rank: int) -> list[int]:
    """Return the axes of the input of a Transpose in the order in which it puts them."""
    order = node.attributes.get_ints("perm")
    return list(range(rank))[::-1] if order is None else list(order)


def reshaped(array: Array, dims: Sequence[Dim], result: Sequence[Dim]) -> Array | None:
    """Return what `array`, broadcast to `dims`, is after a reshape of those to `result`, with as few elements.

    None where it varies along axes of unknown size, or would have to be expanded too far.
    """
    expanded, target = [1] * len(dims), [1] * len(result)
    for axes, places in groups(dims, result):
        sizes: list[Dim] = [dims[axis] for axis in axes]
        sizes_behind: list[Dim] = [result[place] for place in places]
        if all(array.shape[axis] == 1 for axis in axes):
            continue
        if len(axes) == len(places) == 1:
            sizes = sizes_behind = [array.shape[axes[0]]]
        for entries, indices, numbers in ((expanded, axes, sizes), (target, places, sizes_behind)):
            for index, number in zip(indices, numbers, strict=True):
                if not isinstance(number, int):
                    return None
                entries[index] = number
    if math.prod(expanded) > LARGEST or math.prod(expanded) != math.prod(target):
        return None
    return collapsed(np.broadcast_to(array, expanded).reshape(target))


def groups(dims: Sequence[Dim], result: Sequence[Dim]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the axes of `dims` and of `result` that a reshape from one to the other turns into each other.

    Axes of size 1 are in no group. What cannot be told apart, because of unknown sizes, is one group.
    """
    left = [axis for axis, dim in enumerate(dims) if dim != 1]
    right = [axis for axis, dim in enumerate(result) if dim != 1]
    while left or right:
        taken = min(_equal_prefixes([dims[axis] for axis in left], [result[axis] for axis in right]), key=sum)
        yield left[: taken[0]], right[: taken[1]]
        left, right = left[taken[0] :], right[taken[1] :]


def _equal_prefixes(left: Sequence[Dim], right: Sequence[Dim]) -> Iterator[tuple[int, int]]:
    """Yield lengths of prefixes that hold equally many elements, at last those of everything."""
    products = [Product.of(*right[:length]) for length in range(1, len(right) + 1)]
    for length in range(1, len(left) + 1):
        if (product := Product.of(*left[:length])) in products and 0 not in left:
            yield length, products.index(product) + 1
    yield len(left), len(right)
