"""The options of a TensorRT build: read from text, and checked against what a flavour can do."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from optframe import environment
from optframe.errors import EnvironmentLacks, InputError
from optframe_trt.flavours import Flavour

ALL, NONE = "all", "none"

MOST_WORKSPACE = 2**30
"""MiB: a petabyte. TensorRT counts bytes in 64 bits."""


@dataclass(frozen=True)
class BuildSettings:
    """The options of both TensorRT backends; each is text on the command line.

    `plugins`: which ops of ours run as plugin kernels: all, none, or identifiers (domain::name) separated by commas.
    `aot`: they are compiled ahead of time where the flavour can do that, so that the engine runs without Python.
    `compute_capability`: what GPUs the engine is for ("sm86,sm89"), or "" for the GPU that is here.
    `profile`: see `optframe_trt.profiles.parse`. `workspace`: MiB of scratch memory that a layer may take, 0 for
    whatever there is. `optimization_level`: how much the builder tries, 0 to 5. `tf32`: whether FP32 products may be
    rounded to TF32; false by default, since FP32 is what was asked for. `timing_cache`: a file of timings to start from
    and to add to; "" keeps one in optframe's cache, none does without. `version_compatible`: later versions of
    TensorRT can load the engine. `strip`: leave out weights, which the user refits. `layer_names`: keep the names of
    all layers in the engine, for profiles.
    """

    plugins: str = ALL
    aot: bool = True
    compute_capability: str = ""
    profile: str = ""
    workspace: int = 0
    optimization_level: int = 3
    tf32: bool = False
    timing_cache: str = ""
    version_compatible: bool = False
    strip: bool = False
    layer_names: bool = True

    def check(self, flavour: Flavour) -> None:
        """See that `flavour` can honour every setting.

        Raises:
            InputError: it cannot; the message says which, and why.
            EnvironmentLacks: it could, with a GPU here.
        """
        where = f"{flavour.name} {flavour.version}"
        if not 0 <= self.optimization_level <= flavour.can.optimization_levels:
            raise InputError(f"optimization_level is 0 to {flavour.can.optimization_levels}: {self.optimization_level}")
        if not 0 <= self.workspace <= MOST_WORKSPACE:
            raise InputError(f"workspace is a number of MiB up to {MOST_WORKSPACE}, not {self.workspace}")
        if self.version_compatible and not flavour.can.version_compatible:
            raise InputError(f"{where} builds no version-compatible engines: leave version_compatible out")
        if self.timing_cache and not flavour.can.timing_cache:
            raise InputError(f"{where} times no tactics when it builds, so it has no timing cache: leave it out")
        if self.strip and present_target() is None:  # RTX fails inside its compiler; the full one needs a GPU anyway
            raise EnvironmentLacks(f"{where} leaves weights out only where a GPU is, and there is none here: no strip")


OPTION_NAMES = frozenset(field.name for field in fields(BuildSettings))


def choose_targets(flavour: Flavour, wanted: str) -> tuple[str, ...]:
    """Return the compute capabilities to build for ("sm86", "sm89"), in rising order.

    `wanted` is what the user asked for. Without it: the GPU that is here; without a GPU, where the flavour can do
    without, every capability that it knows.

    Raises:
        InputError: the flavour does not build for one of them.
        EnvironmentLacks: a GPU is needed and missing, or the one here is none that the flavour builds for.
    """
    present = present_target()
    if not flavour.can.targets:
        return _present_only(flavour, wanted, present)
    known = [f"sm{code}" for code in flavour.can.device_codes]
    if wanted:
        words = [word.strip().lower() for word in wanted.split(",")]
        for word in words:
            if word not in known:
                raise InputError(f"{flavour.name} builds nothing for '{word}', only for {', '.join(known)}")
        return tuple(name for name in known if name in words)
    if present is None:
        return tuple(known)
    if present not in known:
        raise EnvironmentLacks(
            f"{flavour.name} {flavour.version} builds nothing for the GPU here ({present}); "
            f"for another one say --compute-capability {known[0]} (known: {', '.join(known)})"
        )
    return (present,)


def _present_only(flavour: Flavour, wanted: str, present: str | None) -> tuple[str, ...]:
    if present is None:
        raise EnvironmentLacks(
            f"{flavour.name} builds on the GPU that the engine is for, and nvidia-smi lists none here"
        )
    if wanted and wanted.strip().lower() != present:
        raise InputError(
            f"{flavour.name} builds for the GPU that is here ({present}), not for {wanted}: "
            "leave --compute-capability out"
        )
    return (present,)


def present_target() -> str | None:
    """Return the compute capability of the first GPU here ("sm89"), or None."""
    for gpu in environment.gpus():
        if re.fullmatch(r"\d+\.\d", gpu["compute_cap"]):
            return f"sm{gpu['compute_cap'].replace('.', '')}"
    return None
