"""Keeps compiled PTX on disk, which also keeps it the same for kernels that NVRTC compiles differently each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from optframe import files, store
from optframe_trt import nvrtc
from optframe_trt.nvrtc import Ptx


def compile_ptx(source: str, *, name: str, defines: Sequence[tuple[str, str]], targets: Sequence[int]) -> Ptx:
    """Return what `nvrtc.compile_ptx` does, the same text each time that the same compiler is asked for the same.

    Raises:
        EnvironmentLacks, InputError, PluginError: see `nvrtc.compile_ptx`.
    """
    versions = [toolkit.version for toolkit in nvrtc.toolkits()[:1]]
    key = store.hash_json([source, name, list(defines), list(targets), versions])
    path = store.default_root() / "ptx" / f"{key}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        (a, b), (c, d) = kept["isa"], kept["nvrtc"]
        return Ptx(kept["text"], kept["target"], (a, b), (c, d))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        made = nvrtc.compile_ptx(source, name=name, defines=defines, targets=targets)
        files.write_text(path, json.dumps(asdict(made)))
        return made
