"""What the builtin passes register: all of it loads, is documented, and forms valid pipelines."""

from __future__ import annotations

import inspect

import pytest

from optframe.pipeline import Pipeline
from optframe.testing import assert_plugin_contract
from optframe_passes import plugin

PASSES = plugin.optframe_passes()
PIPELINES = plugin.optframe_pipelines()


@pytest.mark.parametrize("name", [spec.name for spec in PASSES])
def test_passes_load_and_show_an_example(name: str) -> None:
    registry = assert_plugin_contract(plugin)
    documentation = inspect.getdoc(registry.load_pass(name)) or ""
    assert "Example:" in documentation
    assert "before:" in documentation
    assert "after:" in documentation


@pytest.mark.parametrize("name", [spec.name for spec in PIPELINES])
def test_pipelines_read_back_from_what_they_print(name: str) -> None:
    registry = assert_plugin_contract(plugin)
    pipeline = Pipeline.parse(name, registry)
    assert pipeline.steps
    assert Pipeline.parse(str(pipeline), registry) == pipeline


def test_portable_begins_with_the_clean_up() -> None:
    registry = assert_plugin_contract(plugin)
    clean, portable = (Pipeline.parse(name, registry).steps for name in ("clean", "portable"))
    assert portable[: len(clean)] == clean
