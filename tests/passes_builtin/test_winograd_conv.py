"""`winograd-conv`: the same convolution, with fewer multiplications, where that is worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from optframe.flops import count_flops
from optframe.passes import ORIGIN_KEY, PassContext
from optframe_passes import winograd_conv
from optframe_passes.winograd_conv import WinogradConv

Array = np.ndarray[Any, Any]
Check = Callable[..., Any]
Parse = Callable[..., ir.Model]
Weigh = Callable[..., ir.Model]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions too, for which it would not pay."""
    monkeypatch.setattr(winograd_conv, "_WORTH_IT", np.inf)


def model_of(
    parse: Parse, weigh: Weigh, rng: np.random.Generator, x: str, outputs: int, options: str, bias: bool = True
) -> ir.Model:
    channels = int(x.split(",")[1])
    operands, inputs = ("x, w, b", ", float b") if bias else ("x, w", "")
    model = parse(
        f"g (float[{x}] x, float w{inputs}) => (float[A,B,C,D] y) {{ [conv] y = Conv <{options}> ({operands}) }}"
    )
    weights = {"w": rng.standard_normal((outputs, channels, 3, 3)) / (3 * np.sqrt(channels))}
    weights |= {"b": rng.standard_normal(outputs)} if bias else {}
    return weigh(model, **{name: array.astype(np.float32) for name, array in weights.items()})


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("x", "outputs", "dilations"),
    [
        ("1,4,7,9", 6, (1, 1)),
        ("2,3,8,4", 2, (1, 1)),
        ("N,3,5,5", 4, (1, 1)),
        ("1,2,1,1", 1, (1, 1)),
        ("1,4,13,10", 3, (2, 2)),
        ("N,3,9,11", 2, (2, 2)),
        ("1,2,8,17", 3, (1, 3)),
        ("2,2,11,6", 3, (3, 2)),
    ],
)
def test_convolutions_keep_their_meaning(
    x: str, outputs: int, dilations: tuple[int, int], parse: Parse, weigh: Weigh, check: Check, rng: Any
) -> None:
    down, across = dilations
    options = f"pads = [{down}, {across}, {down}, {across}], dilations = [{down}, {across}]"
    model = model_of(parse, weigh, rng, x, outputs, options, bias=outputs != 2)
    # Roundings grow fivefold on the way through the transformations, and each output is a sum of up to 36 products.
    outcome = check(WinogradConv(), model, allowed=5e-5)
    bias = {"Add": 1} if outputs != 2 else {}
    assert outcome.ops == {"Pad": 1, "Reshape": 4, "Conv": 1, "MatMul": 1, "ConvTranspose": 1, "Slice": 1, **bias}


@pytest.mark.usefixtures("always")
def test_double_precision_shows_that_the_method_is_exact(
    parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    """onnxruntime has no FP64 convolution, so the same is computed in numpy, from the constants of the pass."""
    weight, x = rng.standard_normal((3, 2, 3, 3)), rng.standard_normal((2, 6, 6))
    backward, between, forward = winograd_conv._transforms(weight, (1, 1))
    products = np.einsum("koc,kc->ko", between[:, 0], np.einsum("krs,crs->kc", forward[:, 0], x))
    found = np.einsum("krs,ko->ors", backward[:, 0], products)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    expected = np.einsum("crsij,ocij->ors", windows, weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)  # some hundred roundings of 1e-16


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("options", "x"),
    [
        ("pads = [0, 0, 0, 0]", "1,4,8,8"),
        ("pads = [1, 1, 1, 1], strides = [2, 2]", "1,4,8,8"),
        ("pads = [1, 1, 1, 1], dilations = [2, 2]", "1,4,8,8"),
        ("pads = [1, 1, 0, 0]", "1,4,8,8"),
        ('auto_pad = "SAME_UPPER"', "1,4,8,8"),
        ("pads = [1, 1, 1, 1]", "1,4,H,W"),
    ],
)
def test_other_convolutions_stay(
    options: str, x: str, parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator
) -> None:
    assert not check(WinogradConv(), model_of(parse, weigh, rng, x, 4, options)).result.modified


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,4,8,8] x) => (float[A,B,C,D] y) <float[4,2,3,3] w> { y = Conv <group = 2, pads=[1,1,1,1]> (x, w) }",
        "g (float[1,4,8,8] x) => (float[A,B,C,D] y) <float[4,4,1,1] w> { y = Conv (x, w) }",
        "g (float[1,4,8,8] x, float[4,4,3,3] w) => (float[A,B,C,D] y) { y = Conv <pads = [1,1,1,1]> (x, w) }",
        "g (float[1,4,8,8] x, float[4] b) => (float[A,B,C,D] y) <float[4,4,3,3] w>"
        "{ y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }",
    ],
)
def test_other_kinds_stay(text: str, check: Check, rng: np.random.Generator) -> None:
    sizes = {"4,2,3,3": 72, "4,4,1,1": 16, "4,4,3,3": 144}
    for shape, size in sizes.items():
        numbers = ", ".join(f"{number:.3f}" for number in rng.standard_normal(size))
        text = text.replace(f"<float[{shape}] w>", f"<float[{shape}] w = {{{numbers}}}>")
    assert not check(WinogradConv(), text).result.modified


@pytest.mark.usefixtures("always")
def test_half_precision_stays(parse: Parse, weigh: Weigh) -> None:
    model = parse("g (float16[1,2,8,8] x, float16 w) => (float16[A,B,C,D] y) { y = Conv <pads = [1,1,1,1]> (x, w) }")
    weigh(model, w=np.ones((2, 2, 3, 3), np.float16))
    assert not WinogradConv().run(model, PassContext()).modified


def test_what_is_worth_it(parse: Parse, weigh: Weigh, check: Check, rng: np.random.Generator) -> None:
    few = model_of(parse, weigh, rng, "1,32,20,20", 32, "pads = [1, 1, 1, 1]")
    outcome = check(WinogradConv(), few)
    assert not outcome.result.modified
    assert "% of its time" in outcome.reasons[0]
    many = model_of(parse, weigh, rng, "1,128,28,31", 128, "pads = [1, 1, 1, 1]")
    outcome = check(WinogradConv(), many, allowed=5e-5)
    assert outcome.result.modified
    assert {node.metadata_props[ORIGIN_KEY] for node in outcome.model.graph} == {"conv"}
    assert len({node.name for node in outcome.model.graph}) == len(outcome.model.graph)  # onnxruntime insists on it
    assert count_flops(outcome.model).total < 0.65 * count_flops(many).total
    weights = 36 * 128 * 128 * 4
    assert check(WinogradConv(max_bytes=weights), many, allowed=5e-5).result.modified
    assert not check(WinogradConv(max_bytes=weights - 1), many).result.modified


def test_errors_are_those_of_a_few_roundings(parse: Parse, weigh: Weigh, rng: np.random.Generator) -> None:
    model = model_of(parse, weigh, rng, "1,128,28,31", 128, "pads = [1, 1, 1, 1]", bias=False)
    x = np.maximum(rng.standard_normal((1, 128, 28, 31)), 0).astype(np.float32)
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    padded = np.pad(x[0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = np.einsum("crsij,ocij->ors", windows, weight.numpy().astype(np.float64), optimize=True)
    assert WinogradConv().run(model, PassContext()).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    error = np.asarray(session.run(None, {"x": x})[0])[0] - expected
    # 9e-7 was measured with 256 channels; the direct sum has 2e-7, and the usual points 1.9e-6.
    assert np.sqrt(np.mean(error**2)) < 1.3e-6 * np.sqrt(np.mean(expected**2))
