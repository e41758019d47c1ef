"""What every op with a kernel must keep as a TensorRT plugin and as a kernel, a stranger's too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optframe.errors import EnvironmentLacks
from optframe.host import PluginHost
from optframe.registry import Registry
from optframe.types import OpSpec
from optframe_trt import flavours, nvrtc, testing

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
THIRD_PARTY = Path(__file__).parents[1] / "third_party"
HEADS = 4


def odd(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high)) * 2 + 1


def normalized(x: Array, scale: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5) -> Array:
    deviation = x - x.mean(-1, keepdims=True)
    y = deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def skip_normalized(x: Array, skip: Array, epsilon: float, **parameters: Array) -> list[Array]:
    return [normalized(x + skip, epsilon=epsilon, **parameters), x + skip]


def weights(q: Array, k: Array, mask: Array | None) -> Array:
    scores = np.einsum("nlhd,nkhd->nhlk", *(a.reshape(*a.shape[:2], HEADS, a.shape[2] // HEADS) for a in (q, k)))
    scores = scores if mask is None else np.where(mask[:, None, None], -np.inf, scores)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rcda(q_row: Array, q_col: Array, k_row: Array, k_col: Array, v: Array, num_heads: int, **masks: Array) -> Array:
    row, column = weights(q_row, k_row, masks.get("row_mask")), weights(q_col, k_col, masks.get("column_mask"))
    values = v.reshape(*v.shape[:3], num_heads, -1)
    return np.einsum("nhly,nhlx,nyxhd->nlhd", column, row, values).reshape(q_row.shape)


def swish(x: Array, beta: float) -> Array:
    return x / (1 + np.exp(-beta * x))


def draw_norm(rng: np.random.Generator, names: tuple[str, ...], rows: int | None = None) -> Inputs:
    shape = (2, odd(rng, 0, 20) if rows is None else rows, odd(rng, 3, 400))
    inputs = {name: rng.standard_normal(shape) for name in names}
    return inputs | {name: rng.uniform(-1, 1, shape[-1]) for name in ("scale", "bias") if rng.random() < 0.7}


def draw_rcda(rng: np.random.Generator, queries: int | None = None) -> Inputs:
    n, c = 2, HEADS * (32 if rng.random() < 0.5 else odd(rng, 3, 16))  # heads of 32 channels have kernels of their own
    length = odd(rng, 5, 40) if queries is None else queries
    h, w = odd(rng, 1, 10), odd(rng, 1, 10)
    shapes = {"q_row": (length,), "q_col": (length,), "k_row": (w,), "k_col": (h,), "v": (h, w)}
    spread = 1.4 * (c / HEADS) ** -0.25  # scores deviate by about 2: neither flat nor one key alone
    inputs: dict[str, Array] = {name: rng.standard_normal((n, *s, c)) * spread for name, s in shapes.items()}
    for name, keys in (("row_mask", w), ("column_mask", h)):
        if rng.random() < 0.6:
            inputs[name] = rng.random((n, keys)) < 0.3
            inputs[name][:, 0] = False
    return inputs


@dataclass(frozen=True)
class Contract:
    """What the contracts need to know of an op; `offsets` go to inputs whose mean the op takes off or passes on."""

    draw: testing.Draw
    reference: testing.Reference
    empty: testing.Draw
    attributes: Mapping[str, Any] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)


CONTRACTS = {
    "optframe.anchordetr::LayerNorm": Contract(
        lambda rng: draw_norm(rng, ("x",)),
        normalized,
        lambda rng: draw_norm(rng, ("x",), rows=0),
        {"epsilon": 1e-6},
        {"x": 1e3},
    ),
    "optframe.anchordetr::SkipLayerNorm": Contract(
        lambda rng: draw_norm(rng, ("x", "skip")),
        skip_normalized,
        lambda rng: draw_norm(rng, ("x", "skip"), rows=0),
    ),
    "optframe.anchordetr::RCDA": Contract(
        draw_rcda, rcda, lambda rng: draw_rcda(rng, queries=0), {"num_heads": HEADS}, {"v": 1e3}
    ),
    "example.thirdparty::Swish": Contract(
        lambda rng: {"x": 3 * rng.standard_normal((odd(rng, 0, 9), odd(rng, 1, 300)))},
        swish,
        lambda rng: {"x": np.zeros((3, 0))},
        {"beta": -0.5},
        {"x": 1e3},
    ),
}


@pytest.fixture(scope="module")
def specs() -> Iterator[Mapping[str, OpSpec]]:
    """Every op with a kernel of Anchor DETR, and of the third party's package."""
    sys.path.insert(0, str(THIRD_PARTY))
    try:
        host = PluginHost(discover=False)
        for module in ("optframe_anchordetr.plugin", "optframe_thirdparty_example.plugin"):
            host.register(importlib.import_module(module), module)
        yield {name: spec for name, spec in Registry(host).ops().items() if spec.kernel is not None}
    finally:
        sys.path.remove(str(THIRD_PARTY))


@pytest.fixture(scope="module")
def flavour() -> flavours.Flavour:
    try:
        nvrtc.compile_ptx("")
        return flavours.load("tensorrt-rtx")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))


def by_op(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("identifier", CONTRACTS)(function)


def test_no_op_is_left_out(specs: Mapping[str, OpSpec]) -> None:
    assert set(specs) == set(CONTRACTS)
    assert Registry(PluginHost()).kernel_ops() <= set(CONTRACTS)


@by_op
def test_as_a_plugin(identifier: str, specs: Mapping[str, OpSpec], flavour: flavours.Flavour, seed: int) -> None:
    contract = CONTRACTS[identifier]
    cases = testing.assert_build_contract(
        flavour, specs[identifier], contract.draw, seed=seed, attributes=contract.attributes
    )
    first = specs[identifier].inputs[0].name
    assert {case.inputs[first].dtype.name for case in cases} == set(specs[identifier].inputs[0].dtypes)


@by_op
def test_its_ptx_is_the_same_everywhere(identifier: str, specs: Mapping[str, OpSpec], seed: int) -> None:
    contract = CONTRACTS[identifier]
    try:
        kernels = testing.assert_ptx_contract(
            specs[identifier], contract.draw, seed=seed, attributes=contract.attributes, trials=2
        )
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))
    assert kernels >= len(specs[identifier].inputs[0].dtypes)


@pytest.mark.parametrize(
    ("device", "trials"), [("emulator", 1), pytest.param("gpu", 3, marks=pytest.mark.gpu)], ids=["emulator", "gpu"]
)
@pytest.mark.usefixtures("needs_nvrtc")
@by_op
def test_as_a_kernel(
    identifier: str, specs: Mapping[str, OpSpec], seed: int, device: testing.Device, trials: int
) -> None:
    contract = CONTRACTS[identifier]
    runs = testing.assert_kernel_contract(
        specs[identifier],
        contract.draw,
        contract.reference,
        seed=seed,
        attributes=contract.attributes,
        empty=contract.empty,
        offsets=contract.offsets,
        trials=trials,
        device=device,
    )
    assert runs > 10
