"""`fold-conv-scale`: what goes into the weights of a convolution, and how exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.passes import ORIGIN_KEY, PASS_KEY, PassContext
from optframe_passes.fold_conv_scale import FoldConvScale

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Parse = Callable[..., ir.Model]


def with_weights(model: ir.Model, **weights: Array) -> ir.Model:
    """Return `model` with initialisers in the place of inputs of the same names."""
    for name, array in weights.items():
        (value,) = [value for value in model.graph.inputs if value.name == name]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        model.graph.register_initializer(value)
    return model


BEHIND = {
    "mul-add": "m = Mul (c, s)  y = Add (m, t)",
    "operands-swapped": "m = Mul (s, c)  y = Add (t, m)",
    "div-sub": "m = Div (c, s)  y = Sub (m, t)",
    "subtracted-from": "m = Sub (t, c)  y = Mul (m, s)",
    "batch-normalization": "y = BatchNormalization <epsilon = 0.001> (c, s1, t1, m1, v1)",
    "normalised-and-scaled": "n = BatchNormalization (c, s1, t1, m1, v1)  y = Mul (n, scalar)",
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("op", "weight", "channels", "options"),
    [
        ("Conv", (6, 4, 3, 3), 6, "pads = [1, 1, 1, 1]"),
        ("Conv", (6, 2, 3, 1), 6, "group = 2"),
        ("ConvTranspose", (4, 6, 2, 2), 6, "strides = [2, 2]"),
        ("ConvTranspose", (4, 3, 2, 2), 6, "group = 2"),
    ],
)
def test_scale_and_offset_go_into_the_weights(
    behind: str, bias: bool, op: str, weight: Any, channels: int, options: str, parse: Parse, check: Check, rng: Any
) -> None:
    text = f"""g (float[N,4,5,7] x, float w, float b, float s, float t, float s1, float t1, float m1, float v1,
        float scalar) => (float[A,B,C,D] y) {{ c = {op} <{options}> (x, w{", b" * bias})  {BEHIND[behind]} }}"""
    model = parse(text)
    arrays = {name: rng.uniform(0.5, 2, (channels, 1, 1)) * rng.choice([-1, 1], (channels, 1, 1)) for name in "st"}
    arrays |= {name: rng.standard_normal(channels) for name in ("s1", "t1", "m1", "b")}
    arrays |= {"v1": rng.uniform(0.1, 2, channels), "w": rng.standard_normal(weight), "scalar": np.array(1.7)}
    with_weights(model, **{name: array.astype(np.float32) for name, array in arrays.items()})
    # About a hundred products are summed in another order: their roundings are 6e-8 each, relative to the largest.
    outcome = check(FoldConvScale(), model, allowed=2e-5)
    assert outcome.ops == {op: 1}


def test_weights_are_rounded_once(parse: Parse, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((8, 3, 1, 1)).astype(np.float32)
    scales = [rng.uniform(0.5, 2, (8, 1, 1)).astype(np.float32) for _ in range(3)]
    model = parse("""g (float[1,3,4,4] x, float w, float s0, float s1, float s2) => (float[A,B,C,D] y)
        { c = Conv (x, w)  d = Mul (c, s0)  e = Div (d, s1)  y = Mul (e, s2) }""")
    with_weights(model, w=weight, **{f"s{i}": scale for i, scale in enumerate(scales)})
    FoldConvScale().run(model, PassContext())
    factor = np.prod([scales[0], 1 / scales[1].astype(np.float64), scales[2]], axis=0, dtype=np.float64)
    expected = (weight.astype(np.float64) * factor[..., None]).astype(np.float32)
    (conv,) = model.graph
    np.testing.assert_array_max_ulp(graph.constant(conv.inputs[1]), expected, maxulp=1)


def test_provenance_names_all_that_it_stands_for(parse: Parse) -> None:
    model = parse("g (float[1,1,4,4] x, float w, float s) => (float[A,B,C,D] y) { c = Conv (x, w)  y = Mul (c, s) }")
    with_weights(model, w=np.ones((2, 1, 1, 1), np.float32), s=np.ones((2, 1, 1), np.float32))
    for node, name in zip(model.graph, ["stem", "scale"], strict=True):
        node.name = name
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "backbone.conv1"
    FoldConvScale().run(model, PassContext(pass_name="fold-conv-scale"))
    (conv,) = model.graph
    assert conv.name == "stem"
    assert conv.metadata_props[ORIGIN_KEY] == "stem,scale"
    assert conv.metadata_props[PASS_KEY] == "fold-conv-scale"
    assert conv.metadata_props["pkg.torch.onnx.name_scopes"] == "backbone.conv1"


STAYS = {
    "two readers": ("c = Conv (x, w)  m = Mul (c, s)  y = Add (m, c)", None),
    "graph output": ("c = Conv (x, w)  u = Mul (c, s)  y = Identity (c)", None),
    "not by channel": ("c = Conv (x, w)  y = Mul (c, row)", "for each channel"),
    "changes the rank": ("c = Conv (x, w)  y = Mul (c, five)", "for each channel"),
    "divides": ("c = Conv (x, w)  y = Div (s, c)", "for each channel"),
    "weights": ("c = Conv (x, free)  y = Mul (c, s)", "not constant"),
    "divides by zero": ("c = Conv (x, w)  y = Div (c, zeros)", "for each channel"),
    "overflow": ("c = Conv (x, w)  y = Mul (c, huge)", "range"),
}


@pytest.mark.parametrize("why", STAYS)
def test_what_stays(why: str, parse: Parse) -> None:
    body, reason = STAYS[why]
    model = parse(f"""g (float[1,2,3,3] x, float[2,2,1,1] free, float w, float s, float row, float five, float zeros,
        float huge) => (float[A,B,C,D] y) {{ {body} }}""")
    ones = np.ones((2, 1, 1), np.float32)
    with_weights(model, w=np.full((2, 2, 1, 1), 1e10, np.float32), s=ones, row=np.ones(3, np.float32), zeros=0 * ones)
    with_weights(model, five=np.ones((1, 1, 2, 1, 1), np.float32), huge=1e30 * ones)
    context = PassContext()
    assert not FoldConvScale().run(model, context).modified
    assert [reason in miss.reason for miss in context.near_misses] == ([True] if reason else [])


def test_batch_normalization_that_trains_stays(parse: Parse) -> None:
    model = parse("""g (float[1,1,3,3] x, float w, float p) => (float[A,B,C,D] y)
        { c = Conv (x, w)  y, a, b = BatchNormalization <training_mode = 1> (c, p, p, p, p) }""")
    with_weights(model, w=np.ones((2, 1, 1, 1), np.float32), p=np.ones(2, np.float32))
    assert not FoldConvScale().run(model, PassContext()).modified


def test_shared_weights_are_scaled_apart(parse: Parse, check: Check, rng: np.random.Generator) -> None:
    model = parse("""g (float[N,2,5,5] x, float w, float s, float t) => (float[A,B,C,D] y)
        { c = Conv (x, w)  m = Mul (c, s)  d = Conv (x, w)  n = Mul (d, t)  e = Conv (x, w)  p = Add (m, n)
          y = Add (p, e) }""")
    scale = rng.uniform(0.5, 2, (3, 1, 1)).astype(np.float32)
    with_weights(model, w=rng.standard_normal((3, 2, 3, 3)).astype(np.float32), s=scale, t=scale[::-1].copy())
    assert check(FoldConvScale(), model).ops == {"Conv": 3, "Add": 2}


def test_half_precision_keeps_its_type(parse: Parse, check: Check, rng: np.random.Generator) -> None:
    model = parse(
        "g (float16[N,2,5,5] x, float16 w, float16 s) => (float16[A,B,C,D] y) { c = Conv (x, w)  y = Mul (c, s) }"
    )
    weight = rng.standard_normal((3, 2, 3, 3)).astype(np.float16)
    with_weights(model, w=weight, s=rng.uniform(0.5, 2, (3, 1, 1)).astype(np.float16))
    outcome = check(FoldConvScale(), model)
    assert graph.constant(outcome.node("Conv").inputs[1]).dtype == np.float16


@pytest.mark.parametrize("bias", ["", ", b", ", one"])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(
    "nodes",
    ["y = BatchNormalization (a, s, b, b, v)", "c = Mul (a, s)  y = Add (b, c)", "c = Sub (a, b)  y = Div (c, v)"],
)
def test_columns_of_a_gemm_are_channels(
    nodes: str, transposed: int, bias: str, parse: Parse, check: Check, rng: np.random.Generator
) -> None:
    used = {name for name in ("s", "b", "v", "one") if name in nodes + bias}
    text = f"""g (float[N,4] x, float w{"".join(f", float {name}" for name in sorted(used))}) => (float[A,B] y)
        {{ a = Gemm <transB = {transposed}> (x, w{bias})  {nodes} }}"""
    weights = {name: rng.uniform(0.5, 2, 3).astype(np.float32) for name in used - {"one"}}
    weights |= {"one": np.ones(1, np.float32)} if "one" in used else {}
    weights["w"] = rng.standard_normal((3, 4) if transposed else (4, 3)).astype(np.float32)
    outcome = check(FoldConvScale(), with_weights(parse(text), **weights))
    assert outcome.ops == {"Gemm": 1}
    assert outcome.node("Gemm").attributes.get_int("transB", 0) == transposed


@pytest.mark.parametrize("gemm", ["Gemm <alpha = 0.5> (x, w)", "Gemm <beta = 2.0> (x, w, b)", "Gemm (x, w, rows)"])
def test_other_gemms_stay(gemm: str, parse: Parse, check: Check) -> None:
    used = "".join(f", float {name}" for name in ("b", "rows") if name in gemm)
    model = parse(f"g (float[2,4] x, float w, float s{used}) => (float[A,B] y) {{ a = {gemm}  y = Mul (a, s) }}")
    weights = {"w": np.ones((4, 3)), "s": np.full(3, 2.0), "b": np.ones(3), "rows": np.ones((2, 1))}
    present = {name: array.astype(np.float32) for name, array in weights.items() if name in "ws" or name in used}
    assert not check(FoldConvScale(), with_weights(model, **present)).result.modified
