"""How a third party tests its plugin: with optframe.testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from optframe_thirdparty_example import plugin
from optframe_thirdparty_example.fuse_swish import FuseSwish
from optframe_thirdparty_example.swishnet import SwishNetAdapter, SwishNetOptions

from optframe import graph
from optframe.passes import PassContext
from optframe.testing import assert_op_contract, assert_pass_contract, assert_plugin_contract

Array = np.ndarray[Any, Any]


def swish(x: Array, beta: float) -> Array:
    return x / (1 + np.exp(-beta * x))


def exported(folder: Path) -> tuple[ir.Model, SwishNetAdapter]:
    adapter = SwishNetAdapter(SwishNetOptions(size=11, seed=7))
    adapter.export(folder / "swishnet.onnx")
    return graph.load(folder / "swishnet.onnx"), adapter


def test_everything_that_is_registered_loads() -> None:
    registry = assert_plugin_contract(plugin)
    assert [spec.name for spec in registry.passes()] == ["fuse-swish"]


def test_the_op_means_what_it_says() -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        return {"x": 3 * rng.standard_normal(rng.integers(1, 9, rng.integers(1, 5)))}

    for beta in (1.0, -0.5):
        shown = assert_op_contract(plugin.SWISH, draw, swish, seed=seed, attributes={"beta": beta})
        assert shown == [{"x": "float32"}, {"x": "float16"}]


def test_the_pass_keeps_its_contract(tmp_path: Path) -> None:
    model, adapter = exported(tmp_path)
    result = assert_pass_contract(FuseSwish(), model, [*adapter.feeds(), adapter.random_feeds(1)], ops=[plugin.SWISH])
    assert result.rewrites == 1


def test_a_sigmoid_that_is_used_elsewhere_is_a_near_miss(tmp_path: Path) -> None:
    model, _ = exported(tmp_path)
    sigmoid = next(node for node in model.graph if node.op_type == "Sigmoid")
    model.graph.outputs.append(sigmoid.outputs[0])
    context = PassContext({plugin.SWISH.identifier: plugin.SWISH}, pass_name="fuse-swish")
    assert not FuseSwish().run(model, context).modified
    assert [miss.reason for miss in context.near_misses] == ["a value inside it is used elsewhere"]
