"""optframe: from a PyTorch or ONNX model to a fast, proven engine; everything that differs is a plugin."""

from __future__ import annotations

__version__ = "0.1.0"
