"""An op's kernel for the tensors at hand: compiled to PTX at build time, loaded from PTX and launched at run time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from optframe import cuda
from optframe.errors import InputError, PluginError
from optframe.types import Defines, KernelLaunch, KernelSpec, OpSpec, TensorInfo
from optframe_trt import driver, nvrtc, ptx_cache


class Kernel(Protocol):
    """What tells one kernel of an op from the others: a launch has it, and a compiled kernel."""

    @property
    def entry(self) -> str: ...

    @property
    def defines(self) -> Defines: ...


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one set of defines, which decide what it can be launched for."""

    entry: str
    defines: Defines
    ptx: nvrtc.Ptx

    @property
    def sha256(self) -> str:
        """The hash of the PTX text."""
        return hashlib.sha256(self.ptx.text.encode()).hexdigest()


def kernel_of(spec: OpSpec) -> KernelSpec:
    """Return the op's kernel.

    Raises:
        InputError: it has none.
    """
    if spec.kernel is None:
        raise InputError(f"{spec.identifier} has no CUDA kernel, so it cannot be a plugin: keep its function")
    return spec.kernel


def source_hash(spec: OpSpec) -> str:
    """Return the hash of the kernel's source, which tells whether PTX and launch rule are of one version."""
    return hashlib.sha256(kernel_of(spec).read_source().encode()).hexdigest()


def capability(target: str | int) -> int:
    """Return the compute capability that "sm89", "8.9", "89" or 89 names: 89.

    Raises:
        InputError: `target` names none.
    """
    digits = str(target).lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdecimal() or not 50 <= int(digits) < 1000:
        raise InputError(f"'{target}' is no compute capability; write it like sm89")
    return int(digits)


Call = tuple[Sequence[TensorInfo | None], Sequence[TensorInfo]]
"""The inputs, None for an absent one, and the outputs of a call."""


def choose_launch(spec: OpSpec, call: Call, attributes: Mapping[str, object]) -> KernelLaunch:
    """Return the launch of the kernel that is best for a call.

    Raises:
        PluginError: the op's shape rule and the outputs disagree, or its launch rule returns no launch.
        InputError: the op's rules refuse the call.
    """
    inputs, outputs = call
    inferred = spec.infer(inputs, attributes)
    if tuple(inferred) != tuple(outputs):
        raise PluginError(f"its shape rule says {texts(inferred)} of {texts(inputs)}, not {texts(outputs)}")
    return kernel_of(spec).launch_rule()(inputs, outputs, attributes)


def reuse_launch(spec: OpSpec, call: Call, attributes: Mapping[str, object], kernel: Kernel) -> KernelLaunch:
    """Return the launch of `kernel`, which may have been made for other shapes, for a call.

    It is the reuse rule's, where there is one, also if the launch rule chooses this kernel: what the kernel fixes, such
    as threads a block, is a constant there, and no matter of shapes that an ahead-of-time plugin would have to follow.

    Raises:
        PluginError: the op's shape rule and the outputs disagree, or a rule returns no launch, or of another kernel.
        InputError: the kernel cannot do the call.
    """
    launch = choose_launch(spec, call, attributes)
    rule = kernel_of(spec).reuse_rule()
    if rule is not None:
        launch = rule(*call, attributes, kernel.defines)
    if is_same(launch, kernel):
        return launch
    if rule is None:
        raise InputError("its kernel is one for other shapes")
    found = differences([kernel, launch])
    raise PluginError(f"its reuse rule launches another kernel than it was given ({found})")


def is_same(first: Kernel, second: Kernel) -> bool:
    """Say whether these are one kernel."""
    return (first.entry, first.defines) == (second.entry, second.defines)


def choose_for_profile(spec: OpSpec, calls: Sequence[Call], attributes: Mapping[str, object]) -> KernelLaunch:
    """Return a launch of a kernel that does all `calls`, those at a profile's smallest, optimal and largest shapes.

    It is the best for the optimal shapes if that one does all, else the best for the largest, or the smallest.

    Raises:
        PluginError: the op's shape rule and the outputs disagree.
        InputError: the op's rules refuse a call, or no kernel does all.
    """
    smallest, optimal, largest = (choose_launch(spec, call, attributes) for call in calls)
    for launch in (optimal, largest, smallest):
        if all(try_launch(spec, call, attributes, launch) for call in calls):
            return launch
    found = differences([smallest, optimal, largest])
    reach = " to ".join(texts(inputs) for inputs, _ in (calls[0], calls[-1]))
    raise InputError(
        f"its kernel depends on the shape ({found}) and the profile has {reach}: "
        "give the dynamic dimensions one size a profile, or leave this op out of --plugins"
    )


def try_launch(spec: OpSpec, call: Call, attributes: Mapping[str, object], kernel: Kernel) -> KernelLaunch | None:
    """Return what `reuse_launch` does, None where the kernel cannot do the call."""
    try:
        return reuse_launch(spec, call, attributes, kernel)
    except PluginError:
        raise
    except InputError:
        return None


def texts(infos: Sequence[TensorInfo | None]) -> str:
    """Return tensors in words: "float16[2, 8], bool[2]"."""
    return ", ".join(f"{info.dtype}{list(info.shape)}" for info in infos if info is not None)


def differences(choices: Sequence[Kernel]) -> str:
    """Return in what kernels differ, such as "WIDTH: 3, 7"; nothing where they are equal."""
    table = [{"entry": kernel.entry, **dict(kernel.defines)} for kernel in choices]
    names = dict.fromkeys(name for row in table for name in row)
    values = {name: list(dict.fromkeys(row.get(name, "none") for row in table)) for name in names}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in values.items() if len(found) > 1)


def compile_kernel(spec: OpSpec, launch: KernelLaunch, targets: Sequence[int]) -> CompiledKernel:
    """Compile the op's kernel to one PTX that runs on all compute capabilities `targets`: for the lowest of them.

    PTX of one capability runs on every later one, so an engine for several carries one text.

    Raises:
        PluginError: the source does not compile, or lacks the entry.
        EnvironmentLacks: no NVRTC is installed.
    """
    if not targets:
        raise InputError(f"no compute capability is given to compile {spec.identifier} for")
    kernel = kernel_of(spec)
    name = kernel.source.rpartition("/")[2]
    ptx = _compile(kernel.read_source(), name, launch.defines, tuple(targets))
    if f".entry {launch.entry}(" not in ptx.text:
        raise PluginError(f"{spec.identifier}: {kernel.source} has no kernel '{launch.entry}' that is extern \"C\"")
    return CompiledKernel(launch.entry, launch.defines, ptx)


@cache
def _compile(source: str, name: str, defines: Defines, targets: tuple[int, ...]) -> nvrtc.Ptx:
    return ptx_cache.compile_ptx(source, name=name, defines=defines, targets=targets)


def prepare(kernel: CompiledKernel, launch: KernelLaunch, inputs: int, outputs: int) -> cuda.PreparedLaunch:
    """Load the kernel into the current CUDA context, once for each, and return the launch for so many tensors."""
    return _load(cuda.ensure_context(), kernel.ptx.text, kernel.entry).prepare(launch, inputs, outputs)


@cache
def _load(context: int, ptx: str, entry: str) -> driver.Kernel:
    """Return the loaded kernel; `context` is part of the key alone, since the driver loads into the current one."""
    return driver.Kernel(ptx, entry)
