"""optframe: from a PyTorch or ONNX model to a fast, proven engine; everything that differs is a plugin."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from optframe import lazy_modules

if TYPE_CHECKING:
    from optframe.api import build, calibrate, compare, convert_precision, load, load_engine, optimize, profile, run

# onnxruntime's wheels report usage over the network from the moment they are imported, unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

lazy_modules.install()

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "build",
    "calibrate",
    "compare",
    "convert_precision",
    "load",
    "load_engine",
    "optimize",
    "profile",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `optframe --help` stays fast (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'optframe' has no attribute '{name}'")
    from optframe import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
