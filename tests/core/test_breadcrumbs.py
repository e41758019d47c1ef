"""What is told of a plugin author's code while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from optframe import breadcrumbs
from optframe.errors import PluginError
from optframe.types import KernelSpec, OpParameter, OpSpec, TensorInfo

RULES = """
    def shape(inputs, attributes):
        return (inputs[0],)

    def function(opset, dtypes):
        raise ZeroDivisionError
"""
OP = OpSpec(
    name="Op",
    domain="acme",
    inputs=(OpParameter("x"),),
    outputs=(OpParameter("y"),),
    function="acme_rules:function",
    shape_rule="acme_rules:shape",
    kernel=KernelSpec("acme_rules:op.cu", "acme_rules:absent"),
)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    told: list[str] = []
    breadcrumbs.listen(told.append)
    yield told
    breadcrumbs.listen(None)


def test_each_call_is_told_with_its_place_and_its_end(install_plugin: Callable[..., None], heard: list[str]) -> None:
    install_plugin("acme-rules", "1", "", acme_rules=RULES)
    x = TensorInfo((2, 3), "float32")
    with breadcrumbs.at("node 'n'"), pytest.raises(PluginError, match="raised ZeroDivisionError"):
        OP.build_function(18, {})
    assert OP.infer([x], {}) == (x,)
    assert OP.kernel is not None
    with pytest.raises(PluginError, match="cannot load 'acme_rules:absent'"):
        OP.kernel.launch_rule()([x], [x], {})
    reuse = replace(OP.kernel, reuse="acme_rules:function").reuse_rule()
    assert reuse is not None
    with pytest.raises(PluginError, match="raised TypeError"):
        reuse([x], [x], {}, ())
    assert heard == [
        "node 'n': function acme_rules:function",
        "",
        "shape rule acme_rules:shape",
        "",
        "launch rule acme_rules:absent",
        "",
        "reuse rule acme_rules:function",
        "",
    ]


def test_nobody_need_listen(install_plugin: Callable[..., None]) -> None:
    install_plugin("acme-rules", "1", "", acme_rules=RULES)
    x = TensorInfo((2, 3), "float32")
    assert OP.infer([x], {}) == (x,)
