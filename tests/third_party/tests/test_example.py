"""How a third party tests its plugin: with optframe.testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from optframe_thirdparty_example import plugin
from optframe_thirdparty_example.fuse_swish import FuseSwish
from optframe_thirdparty_example.swishnet import SwishNetAdapter, SwishNetOptions

from optframe import graph
from optframe.errors import EnvironmentLacks
from optframe.passes import PassContext
from optframe.testing import assert_op_contract, assert_pass_contract, assert_plugin_contract
from optframe_trt import flavours, nvrtc
from optframe_trt.testing import assert_build_contract, assert_kernel_contract

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


def draw(rng: np.random.Generator) -> dict[str, Array]:
    return {"x": 3 * rng.standard_normal(rng.integers(1, 9, rng.integers(1, 5)))}


def fresh_seed() -> int:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return seed


def test_the_op_means_what_it_says() -> None:
    seed = fresh_seed()
    for beta in (1.0, -0.5):
        shown = assert_op_contract(plugin.SWISH, draw, swish, seed=seed, attributes={"beta": beta})
        assert shown == [{"x": "float32"}, {"x": "float16"}]


def test_engines_hold_the_kernel() -> None:
    try:
        nvrtc.compile_ptx("")
        flavour = flavours.load("tensorrt-rtx")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))
    assert_build_contract(flavour, plugin.SWISH, draw, seed=fresh_seed())


def test_the_kernel_computes_what_the_op_means() -> None:
    try:
        nvrtc.compile_ptx("")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))
    assert_kernel_contract(plugin.SWISH, draw, swish, seed=fresh_seed(), empty=lambda _: {"x": np.zeros((3, 0))})


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
