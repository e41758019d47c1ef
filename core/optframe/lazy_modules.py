"""Modules that a library imports for seldom uses: they load when they are first looked into, not before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

LAZY = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
"""onnx_ir computes with names of dimensions by sympy, which takes longer to import than all that optframe needs."""


class LazyFinder:
    """Finds the modules `names` as Python does, and has them loaded at the first access to an attribute."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load module `name`, None if it is none of ours, or not installed."""
        spec = PathFinder.find_spec(name, path, target) if name in self._names else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def install() -> None:
    """Have the modules of `LAZY` that are not imported yet imported lazily from now on."""
    sys.meta_path.insert(0, LazyFinder(LAZY))
