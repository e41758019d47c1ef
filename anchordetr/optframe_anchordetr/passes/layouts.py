"""Symbolic layouts: which of an original tensor's axes lie in which axis after reshapes, transposes and products.

A layout lists the axes of a tensor; each is a group of named atoms, outermost first. (N, heads, L, h * D) may be
(("n",), ("heads",), ("l",), ("h", "d")). Atoms of size 1 are left out of every group: they may lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from optframe_passes.edit import is_onnx
from optframe_passes.propagate import Propagation
from optframe_passes.shape_data import Dim

Group: TypeAlias = tuple[str, ...]
Layout: TypeAlias = tuple[Group, ...]
Sizes: TypeAlias = Mapping[str, int]

MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Ops that only move elements; all but Transpose keep their order."""


def flat(layout: Iterable[Group]) -> Group:
    """Return the atoms in the order of the elements."""
    return tuple(atom for group in layout for atom in group)


def regroup(atoms: Sequence[str], sizes: Sizes, dims: Sequence[Dim] | None) -> Layout | None:
    """Return how `atoms`, outermost first, fill axes of sizes `dims`, or None if they do not come out even."""
    if dims is None:
        return None
    rest = [atom for atom in atoms if sizes[atom] != 1]
    layout: list[Group] = []
    for dim in dims:
        group: list[str] = []
        size = 1
        while size != dim and rest:
            group.append(rest.pop(0))
            size *= sizes[group[-1]]
        if size != dim:
            return None
        layout.append(tuple(group))
    return None if rest else tuple(layout)


def multiplied(left: Layout | None, right: Layout | None) -> Layout | None:
    """Return the layout of the matrix product of two tensors, or None if it mixes axes that are not the same."""
    if left is None or right is None or len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        return None
    batch = aligned(left[:-2], right[:-2])
    return None if batch is None else (*batch, left[-2], right[-1])


def aligned(left: Layout, right: Layout) -> Layout | None:
    """Return the layout of two broadcast tensors, or None where different axes meet."""
    rank = max(len(left), len(right))
    pairs = zip(((),) * (rank - len(left)) + left, ((),) * (rank - len(right)) + right, strict=True)
    groups: list[Group] = []
    for a, b in pairs:
        if a and b and a != b:
            return None
        groups.append(a or b)
    return tuple(groups)


def keeps_order(values: Sequence[ir.Value]) -> bool:
    """Return whether there are `values`, all of them made by moving ops that keep the order of the elements."""
    makers = [value.producer() for value in values]
    return bool(makers) and all(
        node is not None and is_onnx(node, *MOVING) and node.op_type != "Transpose" for node in makers
    )


def moved(chain: Sequence[ir.Value], layout: Layout | None, sizes: Sizes, known: Propagation) -> Layout | None:
    """Return the layout of the last value of `chain`, whose first has `layout`; moving ops make each of the next."""
    for value in chain[1:]:
        node = value.producer()
        if layout is None or node is None:
            return None
        if is_onnx(node, "Transpose"):
            order = node.attributes.get_ints("perm", tuple(reversed(range(len(layout)))))
            layout = tuple(layout[axis] for axis in order)
        else:
            layout = regroup(flat(layout), sizes, known.dims(value))
    return layout


def shape_of(layout: Layout, sizes: Sizes) -> tuple[int, ...]:
    """Return the sizes of the axes of `layout`."""
    return tuple(math.prod(sizes[atom] for atom in group) for group in layout)


def reshape_target(samples: Sequence[tuple[Sequence[Dim], Sequence[Dim]]]) -> list[int] | None:
    """Return a constant target that reshapes from the first to the second shape of every sample, None if none does.

    0 keeps the dimension at the same place, -1 stands for the only one that differs from sample to sample otherwise.
    """
    befores, afters = zip(*samples, strict=True)
    target: list[int] = []
    for index, sizes in enumerate(zip(*afters, strict=True)):
        copied = all(index < len(dims) and dims[index] == size for dims, size in zip(befores, sizes, strict=True))
        same = sizes[0] if len(set(sizes)) == 1 else None
        target.append(same if isinstance(same, int) else 0 if copied else -1)
    return target if target.count(-1) <= 1 else None
