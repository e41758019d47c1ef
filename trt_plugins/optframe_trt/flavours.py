"""The two TensorRTs and their versions: how each is imported, and the one table of what each can do."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optframe import store
from optframe.errors import EnvironmentLacks, unknown_name

Version = tuple[int, ...]

_RTX_LIBRARY = "libtensorrt_rtx.so"
_RTX_SONAME = "libtensorrt_rtx.so.1"
_RTX_PARSER = "libtensorrt_onnxparser_rtx.so.1"


@dataclass(frozen=True)
class Abilities:
    """What a flavour can do in one version.

    `strongly_typed_flag`: whether a network must be asked to be strongly typed; where not, it always is.
    `targets`: whether an engine is built for named compute capabilities, and without a GPU; else for the GPU present.
    `device_codes`: the compute capabilities that can be named. `timing_cache`: the builder reuses timings of tactics;
    `runtime_cache`: engines compile kernels when they first run, and can keep them. `version_compatible`: engines that
    later versions load. `aot_plugins`: plugins compiled ahead of time (`tensorrt.plugin.aot_impl`).
    `optimization_levels` is the highest; `int8_remark` what users of INT8 must know.

    What all supported versions share has no entry: the parser's `supports_model_v2`, the registry's `get_creator`,
    STRIP_PLAN, IProgressMonitor, DETAILED layer names.
    """

    strongly_typed_flag: bool
    targets: bool
    device_codes: tuple[int, ...]
    timing_cache: bool
    runtime_cache: bool
    version_compatible: bool
    aot_plugins: bool
    optimization_levels: int = 5
    int8_remark: str = ""


@dataclass(frozen=True)
class Kind:
    """A flavour before it is imported: its module, its versions (from, below), how to get it, and its abilities."""

    name: str
    module: str
    versions: tuple[Version, Version]
    install: str
    abilities: Callable[[Version], Abilities]


def _full(version: Version) -> Abilities:
    return Abilities(
        strongly_typed_flag=version < (11,),
        targets=False,
        device_codes=(),
        timing_cache=True,
        runtime_cache=False,
        version_compatible=True,
        aot_plugins=True,
    )


def _rtx(_: Version) -> Abilities:
    return Abilities(
        strongly_typed_flag=False,
        targets=True,
        device_codes=(80, 86, 89, 120, 121),  # 75 can be named too, but has no FP32 GEMM
        timing_cache=False,
        runtime_cache=True,
        version_compatible=False,  # the flag is there, the lean runtime that it needs is not
        aot_plugins=False,
        int8_remark="TensorRT-RTX documents INT8 for weights alone: that an engine is built does not show that it runs",
    )


KINDS = {
    "tensorrt": Kind("tensorrt", "tensorrt", ((10, 9), (12,)), "pip install 'tensorrt>=10.9,<12'", _full),
    "tensorrt-rtx": Kind(
        "tensorrt-rtx", "tensorrt_rtx", ((1, 7), (1, 8)), "pip install 'optframe[tensorrt-rtx]'", _rtx
    ),
}


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that is imported: its name, version, Python module, and what it can do.

    `module` is `tensorrt` or `tensorrt_rtx`; what both have is typed in `tensorrt-stubs`.
    """

    name: str
    version: str
    module: Any
    can: Abilities
    safe_parser: bool = True
    """Whether the ONNX parser can meet a plugin without aborting the process; see `_link_parser`."""

    def require_safe_parser(self) -> None:
        """See that the ONNX parser can be used in this process.

        Raises:
            EnvironmentLacks: it would abort the process.
        """
        if not self.safe_parser:
            raise EnvironmentLacks(
                f"{self.module.__name__} was imported before optframe could load its parser: "
                f"call optframe_trt.flavours.load({self.name!r}) first"
            )


def load(name: str) -> Flavour:
    """Import and return the flavour "tensorrt" or "tensorrt-rtx".

    Raises:
        InputError: there is no such flavour.
        EnvironmentLacks: it is not installed, its libraries do not load, or its version is not one that is known.
    """
    if name not in KINDS:
        raise unknown_name("TensorRT flavour", name, KINDS)
    return _load(KINDS[name])


@functools.cache
def _load(kind: Kind) -> Flavour:
    if not is_installed(kind.name):
        raise EnvironmentLacks(f"{kind.name} is not installed: {kind.install}")
    safe_parser = _link_parser() if kind.module == "tensorrt_rtx" else True
    try:
        module = importlib.import_module(kind.module)
    except (ImportError, OSError) as error:
        raise EnvironmentLacks(f"{kind.name} is installed but does not load ({error}): {kind.install}") from error
    version: str = module.__version__
    low, high = kind.versions
    if not low <= parse_version(version) < high:
        wanted = f"{_dotted(low)} up to, not including, {_dotted(high)}"
        raise EnvironmentLacks(f"{kind.name} {version} is not supported, only {wanted}: {kind.install}")
    return Flavour(kind.name, version, module, kind.abilities(parse_version(version)), safe_parser)


def is_installed(name: str) -> bool:
    """Return whether the flavour's module is there, without importing it; type stubs alone do not count."""
    spec = importlib.util.find_spec(KINDS[name].module)
    return spec is not None and spec.origin is not None


def parse_version(text: str) -> Version:
    """Return the leading numbers of a version: "10.13.3.9.post1" is (10, 13, 3, 9)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


@functools.cache
def _link_parser() -> bool:
    """Load RTX's ONNX parser from a folder where it finds its library; return whether it can meet plugins now.

    The parser opens `libtensorrt_rtx.so` in its own folder ($ORIGIN) once it meets a plugin, and the process aborts
    where the wheel ships `libtensorrt_rtx.so.1` alone. So a folder of ours holds links to both under all their names,
    and the parser is loaded from there before the bindings load it; afterwards it is too late, since the loader keeps
    one library of a name.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if sys.platform != "linux" or spec is None or spec.origin is None:
        return True  # a system's installation, which has its links
    libraries = Path(spec.origin).resolve().parent
    if (libraries / _RTX_LIBRARY).exists() or not (libraries / _RTX_SONAME).exists():
        return True
    if "tensorrt_rtx" in sys.modules:
        return False
    folder = _links(libraries)
    ctypes.CDLL(str(folder / _RTX_SONAME))
    ctypes.CDLL(str(folder / _RTX_PARSER))
    return True


def _links(libraries: Path) -> Path:
    """Return a folder of the cache with links to the libraries of the folder `libraries`."""
    folder = store.default_root() / "tensorrt-rtx" / hashlib.sha256(str(libraries).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in ((_RTX_LIBRARY, _RTX_SONAME), (_RTX_SONAME, _RTX_SONAME), (_RTX_PARSER, _RTX_PARSER)):
        link = folder / name
        if not link.exists():
            _link(link, libraries / target)
    return folder


def _link(link: Path, target: Path) -> None:
    """Make or mend a link in one step, since several processes may do so at once."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, link)
