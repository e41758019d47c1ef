"""Dimensions that TensorRT knows only at run time, followed through an op's rules, which are written for integers.

An op's shape rule and launch rule are plain Python on `TensorInfo`s. To learn how their results depend on a dynamic
dimension, they are run on `Dim`s: integers with a sample value that remember the arithmetic done with them. Where a
rule refuses samples that differ (two inputs must agree), the samples are made equal and the rule runs again. What a
rule derives from a `Dim` by other means than + - * // is a plain integer, true of the samples alone: whoever traces a
rule checks its results against the rule itself, on the shapes that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from optframe.errors import InputError

Leaf = tuple[int, int]
"""(number of the input, axis) of a dynamic dimension."""

Shapes = Sequence[Sequence[int | None]]
"""Shapes of inputs, with None where a dimension is dynamic."""

Result = TypeVar("Result")
Expression = TypeVar("Expression")

_SAMPLE = 5040
"""Samples are multiples of this, which many numbers divide: rules ask for divisibility."""

_DIVISOR = 2
"""The sample of a dimension that others must be multiples of: it divides what comes from samples. 1 would vanish."""

_ATTEMPTS = 200
"""So many samples are tried at most; five inputs of three axes that must all agree need fifteen."""


@dataclass(frozen=True)
class Term:
    """An operation of TensorRT's `DimensionOperation` on two dimensions or constants."""

    operation: str
    first: int
    second: int


class Dim(int):
    """A dynamic dimension, or one derived from such: an integer (the sample) that knows its origin."""

    origin: Leaf | Term
    trace: Trace

    def __new__(cls, value: int, origin: Leaf | Term, trace: Trace) -> Dim:
        """Make a dimension of sample `value`."""
        dim = super().__new__(cls, value)
        dim.origin, dim.trace = origin, trace
        return dim

    def __add__(self, other: int) -> int:
        return _term("SUM", self, other, int(self) + int(other))

    def __radd__(self, other: int) -> int:
        return _term("SUM", other, self, int(other) + int(self))

    def __sub__(self, other: int) -> int:
        return _term("SUB", self, other, int(self) - int(other))

    def __rsub__(self, other: int) -> int:
        return _term("SUB", other, self, int(other) - int(self))

    def __mul__(self, other: int) -> int:
        return _term("PROD", self, other, int(self) * int(other))

    def __rmul__(self, other: int) -> int:
        return _term("PROD", other, self, int(other) * int(self))

    def __floordiv__(self, other: int) -> int:
        negated = _negated(self)
        if negated is not None:  # -a // b rounds up, the usual way to write a ceiling: -(-a // b)
            return -_term("CEIL_DIV", negated, other, -(int(self) // int(other)))
        return _term("FLOOR_DIV", self, other, int(self) // int(other))

    def __rfloordiv__(self, other: int) -> int:
        return _term("FLOOR_DIV", other, self, int(other) // int(self))

    def __mod__(self, other: int) -> int:
        rest = int(self) % int(other)
        if rest:
            self.trace.refused, self.trace.divisor = None, other
        return rest

    def __neg__(self) -> int:
        negated = _negated(self)
        return _term("SUB", 0, self, -int(self)) if negated is None else negated

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int):
            return NotImplemented
        equal = int.__eq__(self, other)
        if not equal:
            self.trace.refused, self.trace.divisor = (self, other), None
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.__hash__(self)


def _term(operation: str, first: int, second: int, value: int) -> int:
    for factor, other in ((first, second), (second, first)) if operation == "PROD" else ():
        if factor == 1 and not isinstance(factor, Dim):  # math.prod begins with 1
            return other
    dim = first if isinstance(first, Dim) else second
    assert isinstance(dim, Dim)
    return Dim(value, Term(operation, first, second), dim.trace)


def _negated(dim: Dim) -> int | None:
    """Return a of a dimension that is -a."""
    origin = dim.origin
    return origin.second if isinstance(origin, Term) and origin.operation == "SUB" and origin.first == 0 else None


@dataclass
class Trace:
    """The samples that dynamic dimensions have, those of a group the same one.

    `refused` are the two dimensions that were last compared and found to differ, or `divisor` what a dimension was then
    found to be no multiple of; `settled` groups follow from others.
    """

    groups: Mapping[Leaf, Leaf]
    samples: Mapping[Leaf, int]
    settled: frozenset[Leaf] = frozenset()
    refused: tuple[int, int] | None = None
    divisor: int | None = None

    @classmethod
    def start(cls, shapes: Shapes, samples: Sequence[Sequence[int]] | None = None) -> Trace:
        """Return the samples given, or some that all differ."""
        leaves = [(i, axis) for i, shape in enumerate(shapes) for axis, size in enumerate(shape) if size is None]
        known = {(i, axis): samples[i][axis] for i, axis in leaves} if samples is not None else {}
        return cls({leaf: leaf for leaf in leaves}, {leaf: _SAMPLE * (n + 1) for n, leaf in enumerate(leaves)} | known)

    def dims(self, shapes: Shapes) -> list[tuple[int, ...]]:
        """Return `shapes` with a `Dim` for each dynamic dimension."""
        return [
            tuple(self._dim((i, axis)) if size is None else size for axis, size in enumerate(shape))
            for i, shape in enumerate(shapes)
        ]

    def _dim(self, leaf: Leaf) -> Dim:
        return Dim(self.samples[self.groups[leaf]], leaf, self)

    def repairs(self) -> Iterator[Trace]:
        """Yield samples with which the two dimensions that differed are equal; each settles one group more.

        A dimension that must divide others gets a sample that divides nearly all.
        """
        divisor = None if self.divisor is None else self._group(self.divisor)
        if divisor is not None and divisor not in self.settled:
            yield self._set(divisor, _DIVISOR)
        if self.refused is None:
            return
        first, second = self.refused
        for dim, other in ((first, second), (second, first)):
            group, target = self._group(dim), self._group(other)
            if group is not None and group not in self.settled:
                yield self._set(group, int(other)) if target is None else self._merge(group, target)
        for group in self.samples:
            root = None if group in self.settled else self._root(first, second, group)
            if root is not None:
                yield self._set(group, root)

    def _group(self, dim: int) -> Leaf | None:
        return self.groups[dim.origin] if isinstance(dim, Dim) and not isinstance(dim.origin, Term) else None

    def _set(self, group: Leaf, sample: int) -> Trace:
        return Trace(self.groups, {**self.samples, group: sample}, self.settled | {group})

    def _merge(self, group: Leaf, target: Leaf) -> Trace:
        groups = {leaf: target if of == group else of for leaf, of in self.groups.items()}
        return Trace(groups, self.samples, self.settled | {group})

    def _root(self, first: int, second: int, group: Leaf) -> int | None:
        """Return the sample of `group` that makes two derived dimensions equal, which are mostly linear in it."""
        sample = self.samples[group]
        gap, further = (self._gap(first, second, group, at) for at in (sample, 2 * sample))
        if further == gap:
            return None
        root, rest = divmod(sample * (further - 2 * gap), further - gap)
        return root if rest == 0 and root > 0 and self._gap(first, second, group, root) == 0 else None

    def _gap(self, first: int, second: int, group: Leaf, sample: int) -> int:
        """Return first - second if `group` had the `sample`."""
        numbers = _Numbers(self.groups, {**self.samples, group: sample})
        return express(first, numbers) - express(second, numbers)


def trace(
    rule: Callable[[list[tuple[int, ...]]], Result], shapes: Shapes, samples: Sequence[Sequence[int]] | None = None
) -> Result:
    """Return what `rule` gives for shapes whose dynamic dimensions are `Dim`s, with samples that it accepts.

    `samples` are shapes to begin with, such as a profile's.

    Raises:
        InputError: no samples were found that the rule accepts; it is the rule's, for the first ones.
    """
    states, refusal = [Trace.start(shapes, samples)], None
    for _ in range(_ATTEMPTS):
        state = states.pop()
        try:
            return rule(state.dims(shapes))
        except InputError as error:
            refusal = refusal or error
        states += reversed(list(state.repairs()))  # depth first: a repair, then what it leads to
        if not states:
            break
    assert refusal is not None
    raise refusal


class Algebra(Protocol[Expression]):
    """What makes expressions of one of TensorRT's interfaces."""

    def leaf(self, leaf: Leaf) -> Expression:
        """Return the dynamic dimension `leaf`."""
        ...

    def constant(self, value: int) -> Expression:
        """Return a constant."""
        ...

    def operation(self, name: str, first: Expression, second: Expression) -> Expression:
        """Return the operation `name` of `DimensionOperation`."""
        ...


def express(dim: int, algebra: Algebra[Expression]) -> Expression:
    """Return `dim` as an expression of dynamic dimensions and constants."""
    if not isinstance(dim, Dim):
        return algebra.constant(int(dim))
    if not isinstance(dim.origin, Term):
        return algebra.leaf(dim.origin)
    first, second = (express(operand, algebra) for operand in (dim.origin.first, dim.origin.second))
    return algebra.operation(dim.origin.operation, first, second)


def evaluate(dim: int, shapes: Sequence[Sequence[int]]) -> int:
    """Return `dim` for inputs of other shapes than it was traced with."""
    leaves = {(i, axis): size for i, shape in enumerate(shapes) for axis, size in enumerate(shape)}
    return express(dim, _Numbers({leaf: leaf for leaf in leaves}, leaves))


@dataclass(frozen=True)
class _Numbers:
    """What dimensions would be with other samples."""

    groups: Mapping[Leaf, Leaf]
    samples: Mapping[Leaf, int]

    def leaf(self, leaf: Leaf) -> int:
        return self.samples[self.groups[leaf]]

    def constant(self, value: int) -> int:
        return value

    def operation(self, name: str, first: int, second: int) -> int:
        if name.endswith("_DIV") and second == 0:
            return 0
        return _ARITHMETIC[name](first, second)


_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}
