"""Arithmetic on small integer tensors of which some elements are only known by name: the insides of shape chains.

An element is an int, a name (a dimension that is not known but the same wherever the name stands; never negative), or
None. Tensors are numpy object arrays of rank 0 or 1. Every evaluator returns None where it knows nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import onnx_ir as ir

Dim: TypeAlias = int | str
Element: TypeAlias = int | str | None
Elements: TypeAlias = np.ndarray[Any, np.dtype[np.object_]]

UNKNOWN = "?"
"""First letter of the names given to dimensions that the model leaves unnamed; they are never written to a model."""

MAX_ELEMENTS = 64
_LONGEST_NAME = 80
_TIMES = "\u00b7"
_INT64 = range(-(2**63), 2**63)


def elements(entries: Sequence[Element] | Element) -> Elements:
    """Return `entries` as a tensor: a sequence as rank 1, a single entry as rank 0."""
    if entries is None or isinstance(entries, int | str):
        scalar = np.empty((), dtype=object)
        scalar[()] = entries
        return scalar
    vector = np.empty(len(entries), dtype=object)
    vector[:] = entries
    return vector


def is_complete(data: Elements) -> bool:
    """Return whether every element is a number that int64 holds."""
    return all(isinstance(entry, int) and entry in _INT64 for entry in data.reshape(-1))


@dataclass(frozen=True)
class Product:
    """A number times names, in sorted order: what dimensions are multiplied and cancelled as."""

    number: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, *entries: Dim) -> Product:
        """Return the product of `entries`; a name that stands for a product is taken apart."""
        number, names = 1, []
        for entry in entries:
            for part in entry.removeprefix(UNKNOWN).split(_TIMES) if _is_product(entry) else (entry,):
                if isinstance(part, int) or part.isdecimal():
                    number *= int(part)
                else:
                    names.append(part)
        return cls(number, tuple(sorted(names)))

    def over(self, other: Product) -> Product | None:
        """Return the quotient if it is a product too, else None."""
        rest = Counter(self.names)
        rest.subtract(other.names)
        if other.number == 0 or self.number % other.number or min(rest.values(), default=0) < 0:
            return None
        return Product(self.number // other.number, tuple(sorted(rest.elements())))

    def element(self) -> Element:
        """Return the number, or a name for the product; None where that would grow out of hand."""
        if not self.names or self.number == 0:
            return self.number
        if self.number == 1 and len(self.names) == 1:
            return self.names[0]
        name = UNKNOWN + _TIMES.join(([str(self.number)] if self.number != 1 else []) + list(self.names))
        return name if len(name) <= _LONGEST_NAME else None


def _is_product(entry: Dim) -> TypeGuard[str]:
    return isinstance(entry, str) and _TIMES in entry and entry.startswith(UNKNOWN)


def add(left: Element, right: Element) -> Element:
    """Return left + right where that is a number or one of the two."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    if left == 0 or right == 0:
        return right if left == 0 else left
    return None


def multiply(left: Element, right: Element) -> Element:
    """Return left * right; a product of dimensions has a name too."""
    if left is None or right is None:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    negative = any(isinstance(entry, int) and entry < 0 for entry in (left, right))
    return None if negative else Product.of(left, right).element()


def subtract(left: Element, right: Element) -> Element:
    """Return left - right where that is a number or `left`."""
    if isinstance(left, int) and isinstance(right, int):
        return left - right
    if left is not None and left == right:
        return 0
    return left if right == 0 else None


def divide(left: Element, right: Element) -> Element:
    """Return left / right rounded to zero, as ONNX divides integers, where that is a number or a product."""
    if left is None or right is None or right == 0:
        return None
    if isinstance(left, int) and isinstance(right, int):
        quotient = abs(left) // abs(right)
        return quotient if (left < 0) == (right < 0) else -quotient
    if any(isinstance(entry, int) and entry < 0 for entry in (left, right)):
        return None
    quotient_product = Product.of(left).over(Product.of(right))
    return None if quotient_product is None else quotient_product.element()


def equal(left: Element, right: Element) -> Element:
    """Return 1 or 0 for left == right, or None; a dimension never equals a negative number."""
    if left is None or right is None:
        return None
    if left == right:
        return 1
    if isinstance(left, int) and isinstance(right, int):
        return 0
    return 0 if any(isinstance(entry, int) and entry < 0 for entry in (left, right)) else None


def choose(condition: Element, left: Element, right: Element) -> Element:
    """Return what Where gives for one element."""
    if isinstance(condition, int):
        return left if condition else right
    return left if left == right else None


def _elementwise(function: Callable[..., Element]) -> Evaluator:
    def evaluate(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
        operands = [data for data in inputs if data is not None]
        if len(operands) != len(inputs):
            return None
        try:
            aligned = np.broadcast_arrays(*operands)
        except ValueError:
            return None
        flat = [function(*entries) for entries in zip(*(data.reshape(-1) for data in aligned), strict=True)]
        return elements(flat).reshape(aligned[0].shape)

    return evaluate


def _numbers(data: Elements | None) -> list[int] | None:
    if data is None or not is_complete(data):
        return None
    return [int(entry) for entry in data.reshape(-1)]


def _gather(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data, indices = inputs
    picks = _numbers(indices)
    if data is None or data.ndim != 1 or picks is None or indices is None:
        return None
    if any(not -len(data) <= pick < len(data) for pick in picks):
        return None
    return elements([data[pick] for pick in picks]).reshape(indices.shape)


def _concat(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    parts = [data for data in inputs if data is not None and data.ndim == 1]
    return np.concatenate(parts) if len(parts) == len(inputs) else None


def _slice(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data = inputs[0]
    if data is None or data.ndim != 1:
        return None
    if "starts" in node.attributes:
        starts, ends = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
        return data[slice(*starts, *ends)] if len(starts) == 1 == len(ends) else None
    bounds = [_numbers(part) for part in inputs[1:3]]
    steps = _numbers(inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    start, end = bounds
    if start is None or end is None or steps is None or not len(start) == len(end) == len(steps) == 1:
        return None
    return _sliced(data, start[0], end[0], steps[0])


def _sliced(data: Elements, start: int, end: int, step: int) -> Elements | None:
    if step <= 0:  # ONNX clamps the end of a backward slice in a way that Python's slice has no form for
        return None
    return data[start:end:step]


def _as_vector(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data = inputs[0]
    return data.reshape(1) if data is not None and data.ndim == 0 else None


def _as_scalar(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data = inputs[0]
    return data.reshape(()) if data is not None and data.shape == (1,) else None


def _reshape(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data, target = inputs[0], _numbers(inputs[1])
    if data is None or target is None or len(target) > 1:
        return None
    return data.reshape(-1) if target in ([-1], [data.size]) and data.size else _as_scalar(node, inputs)


def _cast(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data, to = inputs[0], node.attributes.get("to")
    if data is None or to is None or to.is_ref():
        return None
    if to.as_int() == ir.DataType.INT64:
        return data
    if to.as_int() == ir.DataType.INT32 and all(
        not isinstance(entry, int) or -(2**31) <= entry < 2**31 for entry in data.reshape(-1)
    ):
        return data
    return None


def _same(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    return inputs[0]


def _constant_of_shape(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    shape = _numbers(inputs[0])
    fill = node.attributes.get("value")
    if shape is None or len(shape) > 1 or fill is None or math.prod(shape) > MAX_ELEMENTS:
        return None
    array = fill.as_tensor().numpy()
    if array.size != 1 or array.dtype.kind not in "iub":
        return None
    entry = int(array.reshape(-1)[0])
    return elements([entry] * shape[0]) if shape else elements(entry)


def _reduce_product(node: ir.Node, inputs: Sequence[Elements | None]) -> Elements | None:
    data = inputs[0]
    if data is None or data.ndim != 1:
        return None
    product: Element = 1
    for entry in data:
        product = multiply(product, entry)
    return elements([product]) if node.attributes.get_int("keepdims", 1) else elements(product)


Evaluator: TypeAlias = Callable[[ir.Node, Sequence[Elements | None]], Elements | None]

EVALUATORS: dict[str, Evaluator] = {
    "Add": _elementwise(add),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(divide),
    "Equal": _elementwise(equal),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _elementwise(multiply),
    "ReduceProd": _reduce_product,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _as_scalar,
    "Sub": _elementwise(subtract),
    "Unsqueeze": _as_vector,
    "Where": _elementwise(choose),
}
"""Op type -> evaluator, for ops of ONNX's domain with one output. Shape and Size need no elements, but dimensions."""


def reshaped(dims: Sequence[Dim], target: Elements, allow_zero: bool) -> list[Element]:
    """Return the dimensions that Reshape gives a tensor of `dims`, None for what stays unknown."""
    result: list[Element] = []
    for index, entry in enumerate(target):
        copied = entry == 0 and not allow_zero
        result.append(dims[index] if copied and index < len(dims) else entry)
    if -1 in result:
        result[result.index(-1)] = _remaining(dims, [entry for entry in result if entry != -1])
    return result


def _remaining(dims: Sequence[Dim], taken: Sequence[Element]) -> Element:
    """Return the product of `dims` divided by that of `taken`."""
    known = [entry for entry in taken if entry is not None]
    quotient = Product.of(*dims).over(Product.of(*known)) if len(known) == len(taken) else None
    return None if quotient is None else quotient.element()


def expanded(dims: Sequence[Dim], target: Elements) -> list[Element]:
    """Return the dimensions that Expand gives a tensor of `dims`, None for what stays unknown."""
    rank = max(len(dims), len(target))
    left: list[Element] = [*(1,) * (rank - len(dims)), *dims]
    right: list[Element] = [*(1,) * (rank - len(target)), *target]
    return [broadcast(a, b) for a, b in zip(left, right, strict=True)]


def broadcast(left: Element, right: Element) -> Element:
    """Return the dimension that two broadcast ones give, None where that stays unknown."""
    if left == right or right == 1:
        return left
    if left == 1:
        return right
    numbers = [entry for entry in (left, right) if isinstance(entry, int)]
    return numbers[0] if len(numbers) == 1 else None
