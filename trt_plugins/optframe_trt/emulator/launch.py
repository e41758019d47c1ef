"""Runs a kernel on arrays, as `driver.run_on_arrays` does on a GPU."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from optframe.cuda import WAIT_ARCHITECTURE
from optframe.types import KernelLaunch, TensorInfo
from optframe_trt.driver import POISON, numpy_dtype
from optframe_trt.emulator.faults import KernelFault
from optframe_trt.emulator.machine import Checks, Machine
from optframe_trt.emulator.memory import GLOBAL_BASE, GlobalMemory
from optframe_trt.emulator.program import Program, load
from optframe_trt.nvrtc import DEFAULT_TARGETS

Array = np.ndarray[Any, Any]

_GUARD = 1 << 16
"""Bytes around each array that belong to none."""

_BATCH = 4096
"""Threads that run in lockstep, at least a block: enough that NumPy's calls are long, few enough for the cache."""

_SHARED_BYTES = 48 * 1024
"""What a block gets of shared memory without a special request, which neither our driver calls nor TensorRT make."""

_LIMITS = {"block": (1024, 1024, 64), "grid": (2**31 - 1, 65535, 65535)}


def targets(launch: KernelLaunch) -> tuple[int, ...]:
    """Return the compute capabilities to compile a launch's kernel for, so that all is seen that may go wrong.

    They are the usual ones; 9.0 is added where launches may overlap, since a kernel waits from then on.
    """
    return (*DEFAULT_TARGETS, WAIT_ARCHITECTURE) if launch.overlap else DEFAULT_TARGETS


def run_on_arrays(
    ptx: str,
    launch: KernelLaunch,
    inputs: Sequence[Array],
    outputs: Sequence[TensorInfo],
    *,
    offset: int = 0,
    checks: Checks | None = None,
) -> list[Array]:
    """Run the kernel of a PTX text on `inputs` and poisoned outputs without a GPU, and return the outputs.

    Arguments are the addresses of the inputs, the launch's `extras` as int32, and the addresses of the outputs.
    `offset` bytes are put before each array, so that pointers lose their alignment.

    Raises:
        KernelFault: the kernel does what must not be.
        Unsupported: its PTX holds what the emulator does not know.
    """
    program = load(ptx, launch.entry)
    results = [np.full(info.shape, 0, numpy_dtype(info.dtype)) for info in outputs]
    _check_launch(program, launch, len(inputs), len(results))
    memory, addresses = _memory(program, inputs, results, offset)
    extras = launch.extras
    kinds = "q" * len(inputs) + "i" * len(extras) + "q" * len(results)
    values = [*addresses[: len(inputs)], *extras, *addresses[len(inputs) :]]
    parameters = struct.pack(f"@{kinds}", *values)
    count = math.prod(launch.grid)
    each = max(1, _BATCH // math.prod(launch.block))
    with np.errstate(all="ignore"):
        for first in range(0, count, each):
            blocks = np.arange(first, min(first + each, count), dtype=np.int64)
            Machine(program, launch, blocks, memory, parameters, checks or Checks()).run()
    for result, address in zip(results, addresses[len(inputs) :], strict=True):
        result.reshape(-1).view(np.uint8)[:] = memory.read(address, result.nbytes)
    return results


def _check_launch(program: Program, launch: KernelLaunch, inputs: int, outputs: int) -> None:
    sizes = [parameter.size for parameter in program.kernel.parameters]
    given = [8] * inputs + [4] * len(launch.extras) + [8] * outputs
    if sizes != given:
        raise KernelFault(
            f"the kernel {launch.entry} has parameters of {sizes} bytes, but a launch gives {given}: the inputs, "
            f"{len(launch.extras)} int32 extras, the outputs"
        )
    threads = math.prod(launch.block)
    if not 0 < threads <= 1024:
        raise KernelFault(f"the kernel {launch.entry} is launched with {threads} threads a block, not 1 to 1024")
    shared = program.layout.shared_bytes + launch.shared_bytes
    if not 0 <= shared <= _SHARED_BYTES:
        raise KernelFault(
            f"the kernel {launch.entry} is launched with {shared} bytes of shared memory a block, "
            f"but {_SHARED_BYTES} are the most"
        )
    for name, most in _LIMITS.items():
        got = getattr(launch, name)
        if any(size > limit for size, limit in zip(got, most, strict=True)):
            raise KernelFault(f"the kernel {launch.entry} is launched with a {name} of {got}, but {most} is the most")


def _memory(
    program: Program, inputs: Sequence[Array], results: Sequence[Array], offset: int
) -> tuple[GlobalMemory, list[int]]:
    """Return memory with a kernel's variables and a launch's arrays, and the addresses of these."""
    address = GLOBAL_BASE + -(-program.layout.global_bytes // 256) * 256
    addresses = []
    for array in (*inputs, *results):
        address += _GUARD
        addresses.append(address + offset)
        address += -(-(array.nbytes + offset) // 256) * 256 + _GUARD
    memory = GlobalMemory(address - GLOBAL_BASE)
    for variable in program.kernel.variables:
        if variable.space in ("global", "const") and variable.size:
            data = variable.data.ljust(variable.size, b"\0")
            place = program.layout.addresses[variable.name]
            memory.place(f"the variable {variable.name}", place, data, variable.space == "global")
    names = [*(f"input {i}" for i in range(len(inputs))), *(f"output {i}" for i in range(len(results)))]
    for name, array, place in zip(names, (*inputs, *results), addresses, strict=True):
        output = name.startswith("output")
        given = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory.place(name, place, np.full_like(given, POISON) if output else given, output)
    return memory, addresses
