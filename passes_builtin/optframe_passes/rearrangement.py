"""What a chain of Reshapes and Transposes does as a whole, and the fewest nodes that do the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from optframe_passes.broadcast import groups, is_rearrangement, permutation
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import Dim, Product

Step: TypeAlias = tuple[str, tuple[Dim, ...]]
"""("Reshape", dimensions of the result) or ("Transpose", permutation)."""


@dataclass(eq=False)
class _Atom:
    """A factor of a dimension that no step of a chain divides, or one that was divided into `parts`."""

    size: Dim
    parts: tuple[_Atom, ...] = ()

    def leaves(self) -> list[_Atom]:
        """Return the factors that are not divided further, outermost first."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def split(self, outer: int) -> tuple[_Atom, _Atom] | None:
        """Divide by `outer` (the slower factor), None if that is impossible."""
        if not isinstance(self.size, int) or self.size % outer:
            return None
        self.parts = (_Atom(outer), _Atom(self.size // outer))
        return self.parts


_Axes: TypeAlias = list[list[_Atom]]
"""For each axis the factors of its size, without those of 1."""


def compose(nodes: Sequence[ir.Node], known: Propagation) -> list[Step] | None:
    """Return the fewest steps that do what the chain `nodes` does, None where sizes are not known well enough.

    Dimensions are taken apart into the factors that the chain moves: at most Reshape, Transpose, Reshape are left.
    """
    first = known.dims(nodes[0].inputs[0])
    if first is None or 0 in first:
        return None
    if all(node.op_type != "Transpose" for node in nodes):
        last = known.dims(nodes[-1].outputs[0])
        return None if last is None or 0 in last else [] if last == first else [("Reshape", last)]
    start: _Axes = [[_Atom(dim)] if dim != 1 else [] for dim in first]
    axes = [list(axis) for axis in start]
    dims = first
    for index, node in enumerate(nodes):
        result = known.dims(node.outputs[0])
        if result is None or 0 in result or not is_rearrangement(node):
            return None
        if node.op_type == "Transpose":
            axes = [axes[axis] for axis in permutation(node, len(dims))]
        elif index + 1 < len(nodes) and nodes[index + 1].op_type != "Transpose":
            continue  # the next Reshape alone says what comes out, and needs no common factors
        else:
            regrouped = _regroup(axes, dims, result)
            if regrouped is None:
                return None
            axes = regrouped
        dims = result
    return _fewest_steps(_leaves(start), _leaves(axes), first, dims)


def _leaves(axes: _Axes) -> _Axes:
    return [[leaf for atom in axis for leaf in atom.leaves()] for axis in axes]


def _regroup(axes: _Axes, dims: Sequence[Dim], result: Sequence[Dim]) -> _Axes | None:
    """Return the axes behind a Reshape from `dims` to `result`."""
    axes = _leaves(axes)
    regrouped: _Axes = [[] for _ in result]
    for taken, places in groups(dims, result):
        left = [atom for axis in taken for atom in axes[axis]]
        for place in places:
            atoms = _take(left, result[place])
            if atoms is None:
                return None
            regrouped[place] = atoms
        if left:
            return None
    return regrouped


def _take(left: list[_Atom], dim: Dim) -> list[_Atom] | None:
    """Take atoms of product `dim` from the front of `left`, dividing the last one if need be."""
    taken: list[_Atom] = []
    rest: Product | None = Product.of(dim)
    while rest is not None and rest != Product(1, ()):
        if not left:
            return None
        atom = left.pop(0)
        remaining = rest.over(Product.of(atom.size))
        if remaining is None:
            parts = atom.split(rest.number) if not rest.names else None
            if parts is None:
                return None
            atom, remaining = parts[0], Product(1, ())
            left.insert(0, parts[1])
        taken.append(atom)
        rest = remaining
    return taken


def _fewest_steps(start: _Axes, end: _Axes, first: tuple[Dim, ...], last: tuple[Dim, ...]) -> list[Step] | None:
    before = [atom for axis in start for atom in axis]
    after = [atom for axis in end for atom in axis]
    if before == after:
        return [] if first == last else [("Reshape", last)]
    direct = _transposed_axes(start, after)
    if direct is not None:
        return _transpose_then_reshape(direct, start, end, first, last)
    inverse = _transposed_axes(end, before)
    if inverse is not None:
        order = tuple(inverse.index(axis) for axis in range(len(last)))
        return [("Reshape", tuple(last[axis] for axis in inverse)), ("Transpose", order)]
    return _through_runs(before, after, last)


def _transposed_axes(axes: _Axes, order: list[_Atom]) -> list[int] | None:
    """Return how to order whole `axes` so that their atoms come in `order`, None if that is impossible.

    Axes of size 1 stay behind the axis that they follow.
    """
    at = {id(atom): index for index, atom in enumerate(order)}
    position, keys = -1, []
    for axis in axes:
        indices = [at[id(atom)] for atom in axis]
        if indices != list(range(indices[0], indices[0] + len(indices))) if indices else False:
            return None
        position = indices[0] if indices else position
        keys.append(position)
    return sorted(range(len(axes)), key=lambda axis: keys[axis])


def _transpose_then_reshape(
    order: list[int], start: _Axes, end: _Axes, first: tuple[Dim, ...], last: tuple[Dim, ...]
) -> list[Step]:
    exact = _exact_order(start, end)
    if exact is not None:
        return [("Transpose", exact)]
    transposed = tuple(first[axis] for axis in order)
    steps: list[Step] = [("Transpose", tuple(order))]
    return steps if transposed == last else [*steps, ("Reshape", last)]


def _exact_order(start: _Axes, end: _Axes) -> tuple[int, ...] | None:
    """Return the permutation that alone turns axes `start` into `end`, axes of size 1 included, if there is one."""
    if len(start) != len(end):
        return None
    at = {tuple(map(id, axis)): index for index, axis in enumerate(start) if axis}
    ones = [index for index, axis in enumerate(start) if not axis]
    order: list[int] = []
    for axis in end:
        found = at.get(tuple(map(id, axis))) if axis else (ones.pop(0) if ones else None)
        if found is None:
            return None
        order.append(found)
    return tuple(order)


def _through_runs(before: list[_Atom], after: list[_Atom], last: tuple[Dim, ...]) -> list[Step] | None:
    """Reshape into runs of atoms that stay together, order those, and give the result its shape."""
    at = {id(atom): index for index, atom in enumerate(after)}
    runs: list[list[_Atom]] = []
    for atom in before:
        if runs and at[id(atom)] == at[id(runs[-1][-1])] + 1:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    sizes = [Product.of(*(atom.size for atom in run)).element() for run in runs]
    if None in sizes:
        return None
    dims = tuple(size for size in sizes if size is not None)
    order = tuple(sorted(range(len(runs)), key=lambda run: at[id(runs[run][0])]))
    return [("Reshape", dims), ("Transpose", order), ("Reshape", last)]


def reshape_target(source: Sequence[Dim] | None, result: Sequence[Dim]) -> list[int] | None:
    """Return the second input of a Reshape from `source` to `result`, None if too many dimensions are open.

    An open dimension is copied (0) where `source` has it at the same place; one more may be -1.
    """
    source = source or ()
    target = [
        dim if isinstance(dim, int) else 0 if index < len(source) and source[index] == dim else -1
        for index, dim in enumerate(result)
    ]
    return target if target.count(-1) <= 1 and 0 not in result else None
