"""What tests of passes share: models from text, random inputs for them, and a pass checked on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.testing import assert_pass_contract

Array = np.ndarray[Any, Any]

DIMENSIONS: Mapping[str, tuple[int, ...]] = {"N": (3, 5), "H": (4, 7), "W": (6, 3)}
"""Sizes that free dimensions take in turn; others take 2 and 1."""


@dataclass
class Outcome:
    """A model after a pass, and what the pass said."""

    model: ir.Model
    result: PassResult
    context: PassContext = field(repr=False)

    @property
    def ops(self) -> dict[str, int]:
        """Op type -> count, without Constant nodes."""
        return dict(graph.op_histogram(self.model))

    @property
    def reasons(self) -> list[str]:
        """Why nodes were nearly rewritten."""
        return [miss.reason for miss in self.context.near_misses]

    def node(self, op_type: str) -> ir.Node:
        """The only node of `op_type`."""
        (found,) = [node for node in self.model.graph.all_nodes() if node.op_type == op_type]
        return found


def random_feeds(model: ir.Model, rng: np.random.Generator, turn: int = 0) -> dict[str, Array]:
    """Return random inputs of the declared types; floats are normal, integers 0 to 2."""
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else DIMENSIONS.get(str(d.value), (2, 1))[turn] for d in value.shape]
        dtype = value.dtype.numpy()
        feeds[str(value.name)] = (
            rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, 3, shape).astype(dtype)
        )
    return feeds


def build(text: str, opset: int = 18, functions: str = "", ir_version: int = 8) -> ir.Model:
    """Return the model of a graph in onnx's textual syntax."""
    imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
    return ir.from_proto(
        onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]> {text} {functions}")
    )


@pytest.fixture
def parse() -> Callable[..., ir.Model]:
    """`parse("g (float[2] x) => (float[2] y) { y = Relu (x) }", opset=18)` gives a model."""
    return build


@pytest.fixture
def weigh() -> Callable[..., ir.Model]:
    """`weigh(model, w=array, ...)` puts initialisers in the place of inputs of these names."""

    def put(model: ir.Model, **weights: Array) -> ir.Model:
        for name, array in weights.items():
            (value,) = [value for value in model.graph.inputs if value.name == name]
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=name)
            value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
            model.graph.register_initializer(value)
        return model

    return put


@pytest.fixture
def draw(rng: np.random.Generator) -> Callable[..., dict[str, Array]]:
    """`draw(model, turn=0)` gives random inputs for a model; another turn gives another size."""
    return lambda model, turn=0: random_feeds(model, rng, turn)


@pytest.fixture
def check(rng: np.random.Generator) -> Callable[..., Outcome]:
    """`check(pass_, model or its text, feeds=None, allowed=None)` holds a pass to the contract of all passes.

    Without feeds, random ones of two sizes are drawn. Returns the model after the pass; the given one stays.
    """

    def run(
        pass_: GraphPass,
        model: ir.Model | str,
        feeds: Sequence[Mapping[str, Array]] | None = None,
        allowed: float | None = None,
        **options: Any,
    ) -> Outcome:
        given = build(model, **options) if isinstance(model, str) else model
        drawn = [random_feeds(given, rng, turn) for turn in (0, 1)] if feeds is None else feeds
        assert_pass_contract(pass_, given, drawn, allowed=allowed)
        changed, context = given.clone(), PassContext(pass_name=pass_.name)
        return Outcome(changed, pass_.run(changed, context), context)

    return run
