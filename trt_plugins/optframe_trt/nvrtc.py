"""Compiles CUDA source to PTX with NVRTC, which needs no GPU and no CUDA toolkit beyond two wheels."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from optframe.errors import EnvironmentLacks, InputError, PluginError

DEFAULT_TARGETS = (80,)
"""Compute capabilities that PTX is made for where nobody says otherwise: all from Ampere on."""

INSTALL = "pip install 'nvidia-cuda-nvrtc-cu12' 'nvidia-cuda-runtime-cu12' (the extra optframe[nvrtc])"


@dataclass(frozen=True)
class Toolkit:
    """An NVRTC library with the CUDA headers of the same release, and its version (major, minor)."""

    library: Path
    include: Path
    version: tuple[int, int]


@dataclass(frozen=True)
class Ptx:
    """PTX text with what decides who can load it.

    `target` is the compute capability (80 for sm_80), which every later one runs; `isa` the PTX ISA version (8, 8),
    which the driver must know; `nvrtc` the version of the compiler.
    """

    text: str
    target: int
    isa: tuple[int, int]
    nvrtc: tuple[int, int]


def toolkits() -> tuple[Toolkit, ...]:
    """Return the NVRTC installations found: CUDA 12 first, since older drivers load its PTX; wheels before systems."""
    found = {library.resolve(): include for library, include in _candidates() if (include / "cuda_fp16.h").is_file()}
    known = [Toolkit(library, include, _version(_load(library))) for library, include in found.items()]
    return tuple(sorted(known, key=lambda toolkit: toolkit.version[0]))


def _candidates() -> Iterator[tuple[Path, Path]]:
    """Yield (library, include folder) of the `nvidia` wheels and of installed toolkits."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(location)
        for library in root.glob("cuda_nvrtc/lib/libnvrtc.so.*"):
            yield library, root / "cuda_runtime" / "include"
        for library in root.glob("cu*/lib/libnvrtc.so.*"):
            yield library, library.parents[1] / "include"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from _installed(Path(os.environ[variable]))
    yield from _installed(Path("/usr/local/cuda"))


def _installed(root: Path) -> Iterator[tuple[Path, Path]]:
    for library in (*root.glob("lib64/libnvrtc.so.*"), *root.glob("targets/*/lib/libnvrtc.so.*")):
        yield library, root / "include"


@cache
def _load(library: Path) -> ctypes.CDLL:
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone, and the 13.0 wheel has no search path of its own
    return ctypes.CDLL(str(library))


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_ptx(
    source: str,
    *,
    name: str = "kernel.cu",
    defines: Sequence[tuple[str, str]] = (),
    targets: Sequence[int] = DEFAULT_TARGETS,
    toolkit: Toolkit | None = None,
) -> Ptx:
    """Compile CUDA C++17 `source` (`name` appears in messages) to PTX that runs on all `targets`.

    `targets` are compute capabilities (80, 90, 120); the PTX is made for the lowest. Repeated calls give equal text.

    Raises:
        EnvironmentLacks: no NVRTC is installed.
        InputError: NVRTC does not know the target.
        PluginError: the source does not compile; the message holds the compiler's.
    """
    chosen = toolkit or _default_toolkit()
    nvrtc = _load(chosen.library)
    target = _lowest(nvrtc, chosen, targets)
    options = [
        f"--gpu-architecture=compute_{target}",
        "--std=c++17",
        f"--include-path={chosen.include}",
        *(f"-D{key}={value}" for key, value in defines),
    ]
    text = _compile(nvrtc, source, name, options)
    return Ptx(text, target, _isa(text), chosen.version)


def _default_toolkit() -> Toolkit:
    found = toolkits()
    if not found:
        raise EnvironmentLacks(f"no NVRTC with the CUDA headers was found, which compiles plugin kernels: {INSTALL}")
    return found[0]


def _lowest(nvrtc: ctypes.CDLL, toolkit: Toolkit, targets: Sequence[int]) -> int:
    """Return the lowest of `targets` once NVRTC is known to know it."""
    count = ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    if not targets or min(targets) not in known:
        version = ".".join(map(str, toolkit.version))
        raise InputError(f"NVRTC {version} compiles for {', '.join(map(str, known))}, not for {list(targets)}")
    return min(targets)


def _compile(nvrtc: ctypes.CDLL, source: str, name: str, options: Sequence[str]) -> str:
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), ctypes.c_int(0), None, None),
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, ctypes.c_int(len(options)), arguments)
        if status != 0:
            log = _text(nvrtc, program, "ProgramLog").strip()
            raise PluginError(f"the CUDA source {name} does not compile ({_message(nvrtc, status)}): {log}")
        return _text(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    """Return what nvrtcGet<what> holds."""
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode()


def _isa(ptx: str) -> tuple[int, int]:
    match = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    assert match, "PTX names its ISA"
    return int(match[1]), int(match[2])


def _message(nvrtc: ctypes.CDLL, status: int) -> str:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    message: bytes = nvrtc.nvrtcGetErrorString(ctypes.c_int(status))
    return message.decode()


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise EnvironmentLacks(f"NVRTC failed with {_message(nvrtc, status)}; reinstall it: {INSTALL}")
