"""Facts about the machine and the Python environment, for the report and `optframe doctor`; imports nothing heavy."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ENTRY_POINT_GROUP = "optframe"
OTHER_DISTRIBUTIONS = ("onnxruntime-gpu", "torch", "cupy-cuda13x")
"""Distributions that matter where they are there, though nothing of ours need require them."""

CGROUP = Path("/sys/fs/cgroup")
GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")


def describe() -> dict[str, Any]:
    """Return the facts as JSON-ready data: platform, Python, CPU, memory (GB), GPUs, versions of distributions."""
    return {
        "platform": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": {"model": cpu_model(), "cores": usable_cores(), "threads": usable_threads()},
        "memory_gb": memory_gb(),
        "gpus": [dict(gpu) for gpu in gpus()],
        "packages": packages(),
    }


def machine_name(device: str = "cpu") -> str:
    """Return in a few words what a measurement on `device` ("cpu" or "cuda") ran on."""
    if device == "cuda" and gpus():
        return gpus()[0]["name"]
    cores = usable_cores()
    return f"{cpu_model()}, {cores} core{'s' if cores != 1 else ''}"


@functools.cache
def cpu_model() -> str:
    """Return the processor's marketing name, or its architecture where the platform does not tell."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def usable_threads() -> int:
    """Return how many hardware threads this process may use: its affinity, capped by the container's CPU quota."""
    return min(len(_affinity()), _cpu_quota())


def usable_cores() -> int:
    """Return how many physical cores this process may use, which is the right number of compute threads."""
    return min(len({_core_of(cpu) for cpu in _affinity()}), _cpu_quota())


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> str:
    """Return what the hardware threads of one core share; on a platform that does not tell, each is its own core."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return _text(siblings).strip() or str(cpu)


def _cpu_quota() -> int:
    """Return the container's CPU quota, rounded up to whole CPUs, or a number no machine reaches."""
    quota, _, period = _text(CGROUP / "cpu.max").strip().partition(" ")
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return sys.maxsize
    return max(1, -(-int(quota) // int(period)))


def memory_gb() -> float | None:
    """Return the memory that this machine or container has, in GB (1e9 bytes), or None where it cannot be told."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _text(CGROUP / "memory.max").strip()
    return round(min(total, int(limit) if limit.isdigit() else total) / 1e9, 1)


@functools.cache
def gpus() -> tuple[dict[str, str], ...]:
    """Return name, driver_version, memory.total and compute_cap of each NVIDIA GPU that `nvidia-smi` lists."""
    rows = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader").splitlines()
    split = [[cell.strip() for cell in row.split(",")] for row in rows]
    return tuple(dict(zip(GPU_FIELDS, cells, strict=True)) for cells in split if len(cells) == len(GPU_FIELDS))


def packages() -> dict[str, str]:
    """Return name -> version of the distributions with plugins and of what they require, as far as installed."""
    plugins = [
        d for d in metadata.distributions() if f"[{ENTRY_POINT_GROUP}]" in (d.read_text("entry_points.txt") or "")
    ]
    wanted = {name for plugin in plugins for name in (plugin.metadata["Name"], *_requirements(plugin)) if name}
    names = wanted | set(OTHER_DISTRIBUTIONS)
    versions = {name: version(name) for name in sorted(names, key=str.lower)}
    return {name: found for name, found in versions.items() if found}


def version(distribution: str) -> str | None:
    """Return the installed version of `distribution`, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of `distributions` that are installed."""
    found = {name: version(name) for name in distributions}
    return {name: number for name, number in found.items() if number}


def _requirements(distribution: metadata.Distribution) -> list[str]:
    """Return the distributions that `distribution` requires, those for developing it left out."""
    wanted = [text for text in distribution.requires or [] if not re.search(r"extra == .dev.", text)]
    return [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in wanted]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Return what `command` prints, or nothing where it is missing, fails, or takes over 10 s (a hung driver)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
