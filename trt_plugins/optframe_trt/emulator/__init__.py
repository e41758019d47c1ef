"""Runs PTX kernels in NumPy, without a GPU, and watches what they do.

`run_on_arrays` takes what `driver.run_on_arrays` takes, with PTX text (NVRTC makes it without a GPU) for the loaded
kernel. It is for checking kernels on small shapes: results are a GPU's but for the last bits of approximate functions
and the order of sums on tensor cores, and errors are found that a GPU passes over. A `KernelFault` names the
instruction, its block and its thread:

- global memory: accesses out of bounds or misaligned, writes to inputs; outputs are poison (NaN) until written;
- shared memory: accesses out of bounds or misaligned, reads of what nobody wrote, races between warps: two accesses to
  a byte, one of them a write, with no barrier between. `cp.async` puts poison there until its group is waited for.
  `ldmatrix` may read rows that nobody wrote, as tiles that reach past the data do, and gets poison;
- barriers: in divergent code, or never left; lanes that an instruction of a warp waits for and that do not come. Lanes
  that have exited do not count, as on a GPU: a barrier that some pass by on their way to the end is no fault;
- launches that may overlap, of code for compute capability 9.0 or later: threads that read or write tensors, or end,
  before they ran `griddepcontrol.wait`, and writes to variables that were read before it;
- launches beyond a GPU's limits, such as 48 KB of shared memory a block;
- steps without end, `trap`, and calls of functions that were not inlined, which are errors once they are reached.

Registers hold poison until they are written, and so do shuffles from lanes that are not there. What it does not watch:
races in global memory, and within a warp. Threads run in lockstep, the lowest place in the code first, so a kernel
whose threads wait for each other by spinning runs into the limit of steps. Clocks stand still. An instruction that it
does not know is the error `Unsupported`, before anything runs.
"""

from __future__ import annotations

from optframe_trt.emulator.faults import KernelFault, Unsupported
from optframe_trt.emulator.launch import run_on_arrays, targets
from optframe_trt.emulator.machine import Checks

__all__ = ["Checks", "KernelFault", "Unsupported", "run_on_arrays", "targets"]
