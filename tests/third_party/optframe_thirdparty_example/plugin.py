"""Registers everything; imports nothing heavy, since every call of `optframe` imports it."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import CommandSpec, KernelSpec, ModelSpec, OpAttribute, OpParameter, OpSpec, PassSpec

PACKAGE = "optframe_thirdparty_example"

SWISH = OpSpec(
    name="Swish",
    domain="example.thirdparty",
    inputs=(OpParameter("x", ("float32", "float16")),),
    outputs=(OpParameter("y", ("float32", "float16")),),
    attributes={"beta": OpAttribute("float", 1.0)},
    function=f"{PACKAGE}.swish:swish_function",
    shape_rule=f"{PACKAGE}.swish:swish_shapes",
    kernel=KernelSpec(f"{PACKAGE}:swish.cu", f"{PACKAGE}.swish:swish_launch"),
    summary="x * sigmoid(beta * x)",
)


@hookimpl
def optframe_models() -> Iterable[ModelSpec]:
    """Register the network."""
    return [ModelSpec("swishnet", f"{PACKAGE}.swishnet:SwishNetAdapter", "a convolution, swish, and a linear layer")]


@hookimpl
def optframe_passes() -> Iterable[PassSpec]:
    """Register the fusion."""
    return [PassSpec("fuse-swish", f"{PACKAGE}.fuse_swish:FuseSwish", "x * sigmoid(beta * x) -> Swish")]


@hookimpl
def optframe_ops() -> Iterable[OpSpec]:
    """Register the op that the fusion makes."""
    return [SWISH]


@hookimpl
def optframe_commands() -> Iterable[CommandSpec]:
    """Register a command."""
    return [CommandSpec("count-swish", f"{PACKAGE}.command:count_swish", "Count the Swish calls of a model.")]
