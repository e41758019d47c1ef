"""The named pipelines on graphs that once took them two runs: one pass opened the way for another before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from optframe import gate, graph
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.snapshot import Snapshot


def optimized(model: ir.Model, name: str) -> ir.Model:
    registry = default_registry()
    return gate.optimize(model.clone(), Pipeline.parse(name, registry), ops=registry.ops(), verify="end").model


WHOLE_SCATTER = """g (float[N,4,6] x) => (float[A,B,C] y) <int64[4,1] rows = {0, 1, 2, 3}, float half = {0.5}> {
    a = Add (x, half)  b = Transpose <perm = [1, 0, 2]> (a)  c = Transpose <perm = [1, 0, 2]> (x)
    d = ScatterND (c, rows, b)  e = Transpose <perm = [1, 0, 2]> (d)  y = Relu (e) }"""

EXPANDED_CONSTANT = """g (float[N,4,6] x) => (float[A,B,C] y) <float one = {1.0}, float two = {2.0}> {
    s = Shape (x)  a = Expand (one, s)  b = Add (x, two)  c = Add (a, b)  y = Sigmoid (c) }"""

FACTORS_AROUND_A_SUM = """g (float[3,5,6] x) => (float[A,B] y)
    <float p = {3.0}, float q = {7.0}, int64[1] one = {1}> {
    a = Div (x, p)  b = ReduceSum <keepdims = 0> (a, one)  y = Div (b, q) }"""

SLICES_OF_SPLITS = """g (float[N,4,6] x) => (float[A,B,C] y) <int64[2] s = {1, 3}, int64[2] t = {1, 5}> {
    a, b = Split <axis = 1> (x, s)  c, y = Split <axis = 2> (b, t) }"""

CASES = {
    "whole-scatter": (WHOLE_SCATTER, {"Add": 1, "Relu": 1}),
    "expanded-constant": (EXPANDED_CONSTANT, {"Add": 1, "Sigmoid": 1}),
    "factors-around-a-sum": (FACTORS_AROUND_A_SUM, {"ReduceSum": 1, "Div": 1}),
    "slices-of-splits": (SLICES_OF_SPLITS, {"Slice": 1}),
}


@pytest.mark.parametrize("name", ["portable", "cpu", "tensorrt", "anchordetr", "anchordetr-tensorrt"])
@pytest.mark.parametrize("case", CASES)
def test_one_run_is_enough(name: str, case: str, parse: Callable[..., ir.Model]) -> None:
    text, ops = CASES[case]
    once = optimized(parse(text), name)
    assert dict(graph.op_histogram(once)) == ops
    assert Snapshot.take(once).same(Snapshot.take(optimized(once, name)), types=False)


def test_products_that_meet_when_what_is_between_them_goes(
    parse: Callable[..., ir.Model], weigh: Callable[..., ir.Model], rng: np.random.Generator
) -> None:
    text = """g (float[N,4,6] x, float[1,3] v, float[3,2] w) => (float[A,B] y)
        <int64[4] longer = {0, 4, 6, 1}, int64[3] rows = {0, 24, 3}, int64[2] flat = {0, 48}> {
        a = Reshape (x, longer)  b = MatMul (a, v)  c = Reshape (b, rows)  d = MatMul (c, w)  y = Reshape (d, flat) }"""
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("v", (1, 3)), ("w", (3, 2)))}
    once = optimized(weigh(parse(text), **weights), "tensorrt")
    assert graph.op_histogram(once)["MatMul"] == 1
    assert Snapshot.take(once).same(Snapshot.take(optimized(once, "tensorrt")), types=False)


@pytest.mark.parametrize("name", ["portable", "cpu", "tensorrt"])
def test_biases_behind_convolutions_with_channels_last(
    name: str, parse: Callable[..., ir.Model], weigh: Callable[..., ir.Model], rng: np.random.Generator
) -> None:
    text = """g (float[1,3,8,8] x, float[4,3,3,3] w, float[4] k) => (float[A,B,C,D] y) {
        c = Conv (x, w)  d = Transpose <perm = [0, 2, 3, 1]> (c)
        e = Add (d, k)   y = Transpose <perm = [0, 3, 1, 2]> (e) }"""
    shapes = {"w": (4, 3, 3, 3), "k": (4,)}
    weights = {given: rng.standard_normal(shape).astype(np.float32) for given, shape in shapes.items()}
    once = optimized(weigh(parse(text), **weights), name)
    assert "Add" not in graph.op_histogram(once)
    assert "Transpose" not in graph.op_histogram(once)
    assert Snapshot.take(once).same(Snapshot.take(optimized(once, name)), types=False)


def test_lifted_shares_are_no_positions(
    parse: Callable[..., ir.Model], weigh: Callable[..., ir.Model], rng: np.random.Generator
) -> None:
    text = "g (float[2,3,8] x, float[8,5] w) => (float[A,B,C] y) { p = Softmax (x) y = MatMul (p, w) }"
    once = optimized(weigh(parse(text), w=rng.standard_normal((8, 5)).astype(np.float32)), "cpu")
    assert dict(graph.op_histogram(once)) == {"Softmax": 1, "Max": 1, "MatMul": 1}
    assert Snapshot.take(once).same(Snapshot.take(optimized(once, "cpu")), types=False)
