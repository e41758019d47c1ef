"""Modules that a library imports for seldom uses: they load when they are first looked into, not before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LAZY = frozenset({"sympy", "onnx_ir._symbolic_shapes"})
"""onnx_ir computes with names of dimensions by sympy, which takes longer to import than all that optframe needs."""


_lock = threading.RLock()
"""Held while a module loads, so that no other thread sees half of it, as `importlib.util.LazyLoader` lets it before
Python 3.12."""


class _Unloaded(ModuleType):
    """A module that loads when it is first looked into."""

    def __getattribute__(self, name: str) -> Any:
        with _lock:
            loader = object.__getattribute__(self, "__dict__").pop("_deferred", None)
            if loader is not None:
                loader.exec_module(self)
                object.__setattr__(self, "__class__", ModuleType)
        return ModuleType.__getattribute__(self, name)


class _Deferred(Loader):
    """Makes the module that `loader` makes, but leaves loading it for later."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__dict__["_deferred"] = self._loader
        object.__setattr__(module, "__class__", _Unloaded)


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
            spec.loader = _Deferred(spec.loader)
        return spec


def install() -> None:
    """Have the modules of `LAZY` that are not imported yet imported lazily from now on."""
    sys.meta_path.insert(0, LazyFinder(LAZY))
