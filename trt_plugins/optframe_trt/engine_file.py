"""An engine on disk: the raw file, which any TensorRT tool loads, and beside it a JSON that says what it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optframe import environment, files, store, typed_json
from optframe.engines import sidecar
from optframe.errors import EnvironmentLacks, InputError
from optframe.types import Precision
from optframe_trt import flavours
from optframe_trt.builder import KernelFacts, TensorFacts
from optframe_trt.flavours import Flavour
from optframe_trt.layers import Origin
from optframe_trt.settings import present_target

FORMAT = 1

DRIVER_OF_ISA = {
    (8, 0): 525,
    (8, 1): 530,
    (8, 2): 535,
    (8, 3): 545,
    (8, 4): 550,
    (8, 5): 555,
    (8, 6): 565,
    (8, 7): 570,
    (8, 8): 575,
    (9, 0): 580,
}
"""PTX ISA -> the first driver branch for Linux that loads it (PTX ISA guide, release history; CUDA release notes)."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is and needs.

    `version` is TensorRT's; `targets` the compute capabilities that it runs on ("sm89"); `plugins` identifier ->
    version of the ops of ours that it needs, `embedded` of those that it brings along; `kernels` their PTX inside it;
    `layers` layer of the parsed network -> ONNX nodes; `origins` ONNX node -> where it comes from; `hashes` SHA-256 of
    the engine and of the ONNX file.
    """

    backend: str
    version: str
    precision: Precision
    targets: tuple[str, ...]
    size: int
    hashes: Mapping[str, str]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    plugins: Mapping[str, int] = field(default_factory=dict)
    embedded: Mapping[str, int] = field(default_factory=dict)
    kernels: tuple[KernelFacts, ...] = ()
    profiles: tuple[Mapping[str, Mapping[str, Sequence[int]]], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    device: str = "cuda"
    format: int = FORMAT

    @property
    def ptx_isa(self) -> tuple[int, int] | None:
        """The newest PTX ISA inside, which the driver must know; None without plugins."""
        return max((kernel.isa for kernel in self.kernels), default=None)


def write(engine: Path, facts: EngineFacts) -> Path:
    """Write the facts beside `engine`."""
    return files.write_text(sidecar(engine), json.dumps({**asdict(facts), "ptx_isa": facts.ptx_isa}, indent=1) + "\n")


def read(engine: Path) -> EngineFacts:
    """Return the facts beside `engine`, the engine itself unread.

    Raises:
        InputError: a file is missing, or the facts are damaged or of a later optframe.
    """
    if not engine.is_file():
        raise InputError(f"no such engine: {engine}")
    path = sidecar(engine)
    if not path.is_file():
        raise InputError(f"{engine} has no {path.name} beside it, which says what it needs: copy both files")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise InputError(
                f"{path} was written by another optframe (format {data['format']}): build the engine again"
            )
        return typed_json.read(EngineFacts, data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): build the engine again") from error


def check_file(engine: Path, facts: EngineFacts) -> None:
    """See that the engine is the file that `facts` are of.

    Raises:
        InputError: it is cut off, or another one.
    """
    size = engine.stat().st_size
    if size < facts.size:
        raise InputError(f"{engine} is cut off: {size} of {facts.size} bytes; copy or build it again")
    if size != facts.size or store.hash_file(engine) != facts.hashes.get("engine"):
        raise InputError(f"{engine} is not the engine that {sidecar(engine).name} describes: copy or build both again")


def check_here(engine: Path, facts: EngineFacts) -> None:
    """See that the engine can run here: flavour, version, weights, GPU, and a driver that loads its PTX.

    Raises:
        InputError: the engine is of another flavour or version than is installed, or has no weights.
        EnvironmentLacks: the flavour, a GPU that it is for, or a driver that is new enough is missing.
    """
    other = next((name for name in flavours.KINDS if name != facts.backend and flavours.is_installed(name)), None)
    if facts.backend in flavours.KINDS and not flavours.is_installed(facts.backend) and other:
        raise InputError(
            f"{engine} is an engine of {facts.backend}, and only {other} is installed: "
            f"{flavours.KINDS[facts.backend].install}, or build it again with --backend {other}"
        )
    flavour = flavours.load(facts.backend)
    if facts.version != flavour.version and not _loads_later(facts, flavour):
        newer = ", and engines load in later versions alone" if facts.settings.get("version_compatible") else ""
        raise InputError(
            f"{engine} was built with {facts.backend} {facts.version}, {flavour.version} is installed{newer}: "
            f"build it again, or install {facts.version}"
        )
    if facts.settings.get("strip"):
        raise InputError(f"{engine} was built without its weights (strip): refit it with TensorRT before it is run")
    check_gpu(engine, facts)


def _loads_later(facts: EngineFacts, flavour: Flavour) -> bool:
    """Return whether the engine is version-compatible, and what is installed no older than what built it."""
    built, installed = map(flavours.parse_version, (facts.version, flavour.version))
    return bool(facts.settings.get("version_compatible")) and built <= installed


def check_gpu(engine: Path, facts: EngineFacts) -> None:
    """See that the GPU and the driver here can run the engine.

    Raises:
        EnvironmentLacks: they cannot; the message says why.
    """
    present = present_target()
    if present is None:
        raise EnvironmentLacks(f"{engine} runs on an NVIDIA GPU ({', '.join(facts.targets)}), and there is none here")
    if present not in facts.targets:
        raise EnvironmentLacks(
            f"{engine} is for {', '.join(facts.targets)}, the GPU here is {present}: "
            f"build it again with --compute-capability {present}"
        )
    needed, driver = driver_needed(facts), environment.gpus()[0]["driver_version"]
    if needed is not None and int(driver.split(".")[0]) < needed:
        isa = ".".join(map(str, facts.ptx_isa or ()))
        raise EnvironmentLacks(
            f"{engine} holds PTX {isa}, which needs driver {needed} or newer, here is {driver}: update the driver, "
            "or build it with an older NVRTC"
        )


def driver_needed(facts: EngineFacts) -> int | None:
    """Return the first driver branch that loads the engine's PTX; None without plugins."""
    isa = facts.ptx_isa
    if isa is None:
        return None
    return next((driver for known, driver in DRIVER_OF_ISA.items() if known >= isa), max(DRIVER_OF_ISA.values()))
