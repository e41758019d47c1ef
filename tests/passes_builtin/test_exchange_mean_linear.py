"""`exchange-mean-linear`: means and sums are taken before layers that commute with them, and then cost less."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.flops import count_flops
from optframe.passes import ORIGIN_KEY, PassContext
from optframe_passes.exchange_mean_linear import ExchangeMeanLinear
from optframe_passes.merge_duplicates import MergeDuplicates

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]

# Means of some twenty numbers and sums of four products, in another order: 6e-8 each, with some cancellation.
FP32 = 5e-5

SHAPES = {
    "w": (4, 6),
    "b": (6,),
    "r": (3, 1, 6),
    "c": (1, 5, 6),
    "d": (1, 5, 1),
    "s": (),
    "v": (4, 3, 1, 1),
    "e": (4,),
    "k": (4, 2),
}
REDUCTION = re.compile(r"(\w+) = (Mean|Sum)(Kept)?\[([-\d, ]*)\] \((\w+)\)")


def written(body: str, opset: int) -> str:
    """Return `body` with `y = MeanKept[1, 2] (x)` and the like as that opset writes them."""

    def reduction(match: re.Match[str]) -> str:
        result, kind, kept, axes, source = match.groups()
        keep = int(kept is not None)
        if opset < (18 if kind == "Mean" else 13):
            return f"{result} = Reduce{kind} <axes = [{axes}], keepdims = {keep}> ({source})"
        constant = f"{result}_axes = Constant <value_ints = [{axes}]> ()"
        return f"{constant}  {result} = Reduce{kind} <keepdims = {keep}> ({source}, {result}_axes)"

    return REDUCTION.sub(reduction, body)


def model_of(body: str, parse: Parse, weigh: Weigh, rng: np.random.Generator, opset: int = 18) -> ir.Model:
    used = [name for name in SHAPES if re.search(rf"[(,] ?{name}[,)]", body)]
    inputs = "".join(f", float {name}" for name in used)
    outputs = ", ".join(f"float {name}" for name in ("y", "z") if f" {name} = " in f" {body}")
    model = parse(f"g (float[N,3,5,4] x{inputs}) => ({outputs}) {{ {written(body, opset)} }}", opset=opset)
    for value in model.graph.outputs:
        value.shape = None
    return weigh(model, **{name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in used})


FORMS = {
    "dropped-axis": "m = MatMul (x, w)  y = Mean[1] (m)",
    "kept-axis": "m = MatMul (x, w)  y = MeanKept[2] (m)",
    "axes-from-the-end": "m = MatMul (x, w)  y = Mean[-3, -2] (m)",
    "bias": "m = MatMul (x, w)  a = Add (b, m)  y = Mean[1] (a)",
    "bias-that-varies": "m = MatMul (x, w)  a = Add (m, r)  y = Mean[1] (a)",
    "bias-that-is-broadcast": "m = MatMul (x, w)  a = Add (m, c)  y = Mean[1] (a)",
    "kept-bias": "m = MatMul (x, w)  a = Sub (c, m)  y = MeanKept[1, 2] (a)",
    "sum": "m = MatMul (x, w)  a = Add (m, b)  y = Sum[1, 2] (a)",
    "sum-of-a-bias-that-varies": "m = MatMul (x, w)  a = Sub (m, r)  y = SumKept[2, 1] (a)",
    "scaled": "m = MatMul (x, w)  a = Mul (m, s)  d1 = Div (a, d)  y = Sum[1] (d1)",
    "transposed": "m = MatMul (x, w)  t = Transpose <perm = [2, 0, 3, 1]> (m)  y = Mean[3] (t)",
    "transposed-kept": "m = MatMul (x, w)  t = Transpose <perm = [2, 0, 3, 1]> (m)  y = MeanKept[0, 3] (t)",
    "reversed": "m = MatMul (x, w)  t = Transpose (m)  y = Sum[1] (t)",
    "batch": "m = MatMul (x, w)  y = Mean[0] (m)",
}


@pytest.mark.parametrize("opset", [12, 17, 18])
@pytest.mark.parametrize("form", FORMS)
def test_reductions_come_first(
    form: str, opset: int, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = model_of(FORMS[form], parse, weigh, rng, opset)
    outcome = check(ExchangeMeanLinear(), model, allowed=FP32)
    first = next(node for node in outcome.model.graph if node.op_type != "Constant")
    assert first.op_type.startswith("Reduce")
    assert first.inputs[0] is outcome.model.graph.inputs[0]
    shapes = {"x": (2, 3, 5, 4)}
    assert count_flops(outcome.model, input_shapes=shapes).total < count_flops(model, input_shapes=shapes).total


def test_sums_over_a_free_dimension_stop_at_a_bias(parse: Parse, weigh: Weigh, check: Check, rng: Any) -> None:
    bias = model_of("m = MatMul (x, w)  a = Add (m, b)  y = Sum[0] (a)", parse, weigh, rng)
    assert not check(ExchangeMeanLinear(), bias).result.modified
    mean = model_of("m = MatMul (x, w)  a = Add (m, b)  y = Mean[0] (a)", parse, weigh, rng)
    assert check(ExchangeMeanLinear(), mean, allowed=FP32).result.rewrites == 2


STAY = {
    "over-the-columns": "m = MatMul (x, w)  y = Mean[3] (m)",
    "over-everything": "m = MatMul (x, w)  y = Mean[1, 2, -1] (m)",
    "another-reader": "m = MatMul (x, w)  y = Mean[1] (m)  z = Relu (m)",
    "graph-output": "z = MatMul (x, w)  y = Mean[1] (z)",
    "nonlinear": "m = MatMul (x, w)  n = Relu (m)  y = Mean[1] (n)",
    "factor-that-varies": "n = Sin (x)  m = Mul (d, n)  y = Mean[2] (m)",
    "divided-by": "n = Exp (x)  m = Div (d, n)  y = Mean[1] (m)",
    "broadcast-along-the-axis": "n = MeanKept[2] (x)  o = Exp (n)  m = Add (o, d)  y = Mean[2] (m)",
    "operand-of-as-many-axes": "t = Transpose <perm = [0, 1, 3, 2]> (x)  m = MatMul (x, t)  y = Mean[1] (m)",
}


@pytest.mark.parametrize("form", STAY)
def test_reductions_stay(form: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    assert not check(ExchangeMeanLinear(), model_of(STAY[form], parse, weigh, rng)).result.modified


def test_equal_reductions_become_one(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    body = "m = MatMul (x, w)  p = Mean[1] (m)  q = Mean[-3] (m)  y = Sub (p, q)"
    assert check(ExchangeMeanLinear(), model_of(body, parse, weigh, rng), allowed=FP32).ops == {
        "ReduceMean": 1,
        "MatMul": 1,
        "Sub": 1,
    }


def test_layers_share_the_mean_of_their_input(parse: Parse, weigh: Weigh, rng: np.random.Generator) -> None:
    body = "m = MatMul (x, w)  n = MatMul (x, k)  y = Mean[1] (m)  z = Mean[1] (n)"
    model = model_of(body, parse, weigh, rng)
    for step in (ExchangeMeanLinear(), MergeDuplicates()):
        step.run(model, PassContext(pass_name=step.name))
    assert graph.op_histogram(model) == {"ReduceMean": 1, "MatMul": 2}


def test_different_reductions_repeat_a_layer_only_if_that_is_less_work(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    less = model_of("m = MatMul (x, w)  y = Mean[1] (m)  z = Mean[2] (m)", parse, weigh, rng)
    assert check(ExchangeMeanLinear(), less, allowed=FP32).ops == {"ReduceMean": 2, "MatMul": 2}
    unknown = model_of("m = MatMul (x, w)  y = Mean[1] (m)  z = Mean[0] (m)", parse, weigh, rng)
    outcome = check(ExchangeMeanLinear(), unknown)
    assert not outcome.result.modified
    assert "more work" in outcome.reasons[0]


def test_row_and_column_keys(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    """The keys of Anchor DETR's attention: 20 tokens are projected to find 4 keys and 5 keys."""
    model = parse("""g (float[1,5,4,8] x, float wr, float wc, float br, float bc) => (float[A,B,C] r, float[D,E,F] c)
        { m = MatMul (x, wr)  [rows] a = Add (m, br)  n = MatMul (x, wc)  b = Add (n, bc)
          h = Constant <value_ints = [1]> ()  v = Constant <value_ints = [2]> ()
          r = ReduceMean <keepdims = 0> (a, h)  c = ReduceMean <keepdims = 0> (b, v) }""")
    weigh(model, **{name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wr", "wc")})
    weigh(model, br=rng.standard_normal((1, 1, 4, 8)).astype(np.float32), bc=rng.standard_normal(8).astype(np.float32))
    outcome = check(ExchangeMeanLinear(), model, allowed=FP32)
    assert count_flops(model).total == 2 * 2 * 20 * 64
    assert count_flops(outcome.model).total == 2 * (4 + 5) * 64
    addition = next(node for node in outcome.model.graph if node.outputs[0].name == "r")
    assert "rows" in addition.metadata_props[ORIGIN_KEY].split(",")


@pytest.mark.parametrize("reduction", ["GlobalAveragePool (m)", "MeanKept[2, 3] (m)", "MeanKept[-1] (m)"])
def test_pointwise_convolutions(
    reduction: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    model = model_of(f"m = Conv (x, v, e)  y = {reduction}", parse, weigh, rng)
    outcome = check(ExchangeMeanLinear(), model, allowed=FP32)
    assert outcome.node("Conv").outputs[0].name == "y"
    assert outcome.ops == {"Conv": 1, "GlobalAveragePool" if "Pool" in reduction else "ReduceMean": 1}


@pytest.mark.parametrize(
    "body",
    [
        "m = Conv <strides = [2, 2]> (x, v, e)  y = GlobalAveragePool (m)",
        "m = Conv <pads = [1, 0, 1, 0]> (x, v, e)  y = GlobalAveragePool (m)",
        "m = Conv (x, v, e)  y = Mean[2, 3] (m)",
        "m = Conv (x, v, e)  y = MeanKept[1] (m)",
        "m = Conv (x, v, e)  y = SumKept[2] (m)",
    ],
)
def test_other_convolutions_stay(body: str, parse: Parse, weigh: Weigh, check: Check, rng: Any) -> None:
    assert not check(ExchangeMeanLinear(), model_of(body, parse, weigh, rng)).result.modified


@pytest.mark.parametrize(("op", "exchanged"), [("ReduceMean", True), ("ReduceSum", False)])
def test_fp16(op: str, exchanged: bool, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    model = parse(f"""g (float16[N,3,8] x, float16 w, float16 b) => (float16[A,B] y) <int64[1] axes = {{1}}>
        {{ m = MatMul (x, w)  a = Add (m, b)  y = {op} <keepdims = 0> (a, axes) }}""")
    weigh(model, w=rng.standard_normal((8, 4)).astype(np.float16), b=rng.standard_normal(4).astype(np.float16))
    assert check(ExchangeMeanLinear(), model, allowed=1e-2).result.modified == exchanged


def test_a_mean_of_integers_is_cut_off_and_stays(check: Check) -> None:
    text = (
        "g (int32[3,4] x) => (int32[1,2] y) <int32[4,2] w = {3, -2, 1, 1, -3, 2, 2, 1}, int64[1] a = {0}>"
        "{ m = MatMul (x, w)  y = ReduceMean (m, a) }"
    )
    assert not check(
        ExchangeMeanLinear(), text, [{"x": np.arange(12, dtype=np.int32).reshape(3, 4) % 5}]
    ).result.modified


def test_a_scalar_output_keeps_its_shape(check: Check) -> None:
    text = "g (float[N] x) => (float y) { t = Transpose <perm = [0]> (x)  y = ReduceMean <keepdims = 0> (t) }"
    outcome = check(ExchangeMeanLinear(), text)
    assert outcome.result.modified
    assert outcome.model.graph.outputs[0].shape == ()
