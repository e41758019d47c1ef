"""Runs PTX kernels in NumPy, without a GPU, and watches what they do."""

from __future__ import annotations

from optframe_trt.emulator.faults import KernelFault, Unsupported
from optframe_trt.emulator.launch import run_on_arrays
from optframe_trt.emulator.machine import Checks

__all__ = ["Checks", "KernelFault", "Unsupported", "run_on_arrays"]
