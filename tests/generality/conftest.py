"""Every registered pipeline on models that no pass was written for: valid, equal, idempotent, never more nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optframe import gate, graph, numerics
from optframe.backends.onnxruntime import OnnxRuntimeRunner, SessionSettings, create_session
from optframe.pipeline import Pipeline
from optframe.registry import Registry, default_registry
from optframe.snapshot import Snapshot

Feeds = Mapping[str, np.ndarray[Any, Any]]

MAX_TOLERANCE_FACTOR = 10
"""Whole networks may differ by this many of the tolerances of one rewrite (see `optframe.numerics.TOLERANCES`)."""


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The registry of all installed plugins."""
    return default_registry()


@pytest.fixture
def check_pipelines(registry: Registry, tmp_path: Path) -> Callable[..., None]:
    """`check_pipelines(model, feeds, honest=True)` sends a model through every registered pipeline.

    `feeds` are of two shapes where shapes are free. A model that is not `honest` declares shapes for its outputs that
    they do not have: the checker then goes without shape inference.
    """

    def check(model: ir.Model, feeds: Sequence[Feeds], honest: bool = True) -> None:
        path = graph.save(model.clone(), tmp_path / "original.onnx")
        expected = run(path, feeds)
        for spec in registry.pipelines():
            try:
                check_pipeline(spec.name, model, feeds, expected, honest)
            except Exception as error:
                error.add_note(f"pipeline '{spec.name}'")
                raise

    def check_pipeline(name: str, model: ir.Model, feeds: Sequence[Feeds], expected: list[Any], honest: bool) -> None:
        pipeline = Pipeline.parse(name, registry)
        once = optimize(model, pipeline)
        path = graph.save(once.clone(), tmp_path / f"{name}.onnx")
        onnx.checker.check_model(str(path), full_check=honest)
        assert_equal(expected, run(path, feeds), tolerance(model))
        kernels = registry.kernel_ops()
        assert graph.count_nodes(once, kernels) <= graph.count_nodes(model, kernels)
        if not is_part(name, registry):
            twice = optimize(once, pipeline)
            unchanged = Snapshot.take(once).same(Snapshot.take(twice), types=False)
            assert unchanged, "a second run changes the model"

    def optimize(model: ir.Model, pipeline: Pipeline) -> ir.Model:
        return gate.optimize(model.clone(), pipeline, ops=registry.ops(), verify="off").model

    return check


def is_part(name: str, registry: Registry) -> bool:
    """Whether other pipelines are made of this one: it may leave work to what follows it there."""
    texts = [spec.text.split(",") for spec in registry.pipelines()]
    return any(name in map(str.strip, text) for text in texts)


def run(path: Path, feeds: Sequence[Feeds]) -> list[Mapping[str, Any]]:
    """Return the outputs of a model, run as it stands."""
    session = create_session(path, "cpu", SessionSettings(optimization="disable"))
    with OnnxRuntimeRunner(session, str(path)) as runner:
        return [runner.run(sample) for sample in feeds]


def tolerance(model: ir.Model) -> float:
    """Return the tolerance for the coarsest float type in `model`."""
    dtypes = {value.dtype for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value}
    return MAX_TOLERANCE_FACTOR * numerics.tolerance(dtype.value for dtype in dtypes if dtype is not None)


def assert_equal(expected: Sequence[Any], actual: Sequence[Any], allowed: float) -> None:
    """Compare outputs by name, for each of the inputs."""
    for number, (old, new) in enumerate(zip(expected, actual, strict=True)):
        assert list(old) == list(new)
        for name, array in old.items():
            verdict = numerics.compare(array, new[name], allowed)
            assert verdict.status == "equal", f"'{name}' for input {number}: {verdict.reason}"
