"""Engines on disk: built and opened by a backend; the JSON beside one says whose it is, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optframe.backend import Backend, BuildOptions, Engine, Runner
from optframe.errors import InputError, PluginError, a_type
from optframe.types import Feeds, Outputs

ONNX_SUFFIX = ".onnx"


def build(backend: Backend, model: Path, folder: Path, options: BuildOptions) -> Engine:
    """Return the engine that `backend` builds of the ONNX file `model` in `folder`.

    Raises:
        PluginError: what it returns is no engine in that folder. And whatever the backend raises.
    """
    engine: object = backend.build(model, folder, options)
    if not isinstance(engine, Engine):
        raise PluginError(f"backend {backend.name}: build() gives {a_type(engine)}, not an Engine")
    if not engine.path.is_file() or not engine.path.resolve().is_relative_to(folder.resolve()):
        raise PluginError(f"backend {backend.name}: build() gives an engine that is no file in the folder asked for")
    return engine


def open_runner(backend: Backend, engine: Engine) -> Runner:
    """Return the runner of `backend` for `engine`.

    Raises:
        PluginError: what it returns is none. And whatever the backend raises.
    """
    runner = backend.open(engine)
    lacking = [member for member in ("run", "__enter__", "__exit__") if not hasattr(runner, member)]
    if lacking:
        raise PluginError(f"backend {backend.name}: open() gives {a_type(runner)}, which lacks {', '.join(lacking)}")
    return runner


def run_samples(backend: Backend, engine: Engine, samples: Sequence[Feeds]) -> list[Outputs]:
    """Return the outputs of `engine` for each of `samples`.

    Raises:
        PluginError: a runner of `backend` gives no outputs by name. And whatever the backend raises.
    """
    with open_runner(backend, engine) as runner:
        results: list[Outputs] = [runner.run(sample) for sample in samples]
    for outputs in results:
        if not isinstance(outputs, Mapping):
            raise PluginError(f"backend {backend.name}: run() gives {a_type(outputs)}, not outputs by name")
        if not outputs:
            raise PluginError(f"backend {backend.name}: run() gives no outputs")
    return results


def sidecar(engine: Path) -> Path:
    """Return where the facts of `engine` lie: `<engine>.json` beside it."""
    return engine.with_name(f"{engine.name}.json")


def read_facts(engine: Path) -> dict[str, Any]:
    """Return what the JSON beside `engine` says; nothing if there is none.

    Raises:
        InputError: there is no such engine, or the JSON is damaged.
    """
    if not engine.is_file():
        raise InputError(f"no such engine: {engine}")
    path = sidecar(engine)
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): build the engine again") from error
    if not isinstance(facts, dict):
        raise InputError(f"{path} is damaged: build the engine again")
    return facts


def find(path: Path, backend: str | None = None, device: str = "auto") -> Engine:
    """Return the engine at `path` as its facts describe it; an ONNX file is one of the backend onnxruntime.

    Raises:
        InputError: there is no such file, or nothing says what it is.
    """
    facts = read_facts(path)
    if not all(isinstance(facts.get(entry, ""), str) for entry in ("backend", "precision", "device")):
        raise InputError(f"{sidecar(path)} is damaged: build the engine again")
    name = backend or facts.get("backend") or ("onnxruntime" if path.suffix == ONNX_SUFFIX else None)
    if name is None:
        raise InputError(f"{path} has no {sidecar(path).name} beside it, which says what it is: copy both files")
    return Engine(path, name, facts.get("precision", "fp32"), facts.get("device", device))


def signature(path: Path) -> ir.Model:
    """Return a model without nodes that has the inputs of the engine at `path`, to read or draw inputs for.

    Its facts have `inputs`, each with name, dtype and shape, in which -1 is free, and maybe `profiles`: of the first
    the shapes `opt` are taken.

    Raises:
        InputError: the facts are missing or damaged.
    """
    facts = read_facts(path)
    try:
        profile = (facts.get("profiles") or [{}])[0]
        inputs = [_input(tensor, profile) for tensor in facts["inputs"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{sidecar(path)} does not tell the engine's inputs: build the engine again") from error
    return ir.Model(ir.Graph(inputs, inputs, nodes=[], opset_imports={"": 18}, name=path.name), ir_version=10)


def _input(tensor: Mapping[str, Any], profile: Mapping[str, Any]) -> ir.Value:
    shape = profile[tensor["name"]]["opt"] if tensor["name"] in profile else tensor["shape"]
    dtype = ir.DataType.FLOAT if tensor["dtype"] == "float32" else ir.DataType[tensor["dtype"].upper()]
    return ir.val(tensor["name"], dtype, shape)
