"""Ranking of layers by what INT8 in them costs, the fewest to keep, and the curve between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph
from optframe.errors import InputError
from optframe.precision import analyse, calibrate, load_sensitivity, quantize
from optframe.precision.nodes import node_name
from optframe.types import Feeds
from optframe_trt.calibrators import MinMaxCalibrator

Array = np.ndarray[Any, Any]

LAYERS = 7
BAD = 3
"""The layer whose input has one channel so large that INT8 resolves no other."""


def chain(rng: np.random.Generator, bad: int = BAD, unnamed: bool = False) -> ir.Model:
    """Return `LAYERS` linear layers of 16 channels with tanh between, then a head; one reads an uneven tensor."""
    x = ir.val("x", ir.DataType.FLOAT, (4, 16))
    nodes, weights, value = [], [], x
    for index in range(LAYERS + 1):
        gains = np.ones(16, np.float32)
        if index == bad:
            gains[0] = 4000
            weights.append(constant(f"gain{index}", gains))
            nodes.append(ir.node("Mul", [value, weights[-1]], name=f"uneven{index}"))
            value = nodes[-1].outputs[0]
        matrix = (rng.standard_normal((16, 16)) / 3).astype(np.float32) / gains[:, None]
        matrix[0] *= 1.0 if index != bad else 0.01  # what the large channel brings counts little
        weights.append(constant(f"w{index}", matrix))
        nodes.append(ir.node("MatMul", [value, weights[-1]], name="" if unnamed else f"linear{index}"))
        value = nodes[-1].outputs[0]
        if index < LAYERS:
            nodes.append(ir.node("Tanh", [value], name=f"tanh{index}"))
            value = nodes[-1].outputs[0]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"v{index}"
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape((4, 16))
    made = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="chain")
    return ir.Model(made, ir_version=10)


def constant(name: str, array: Array) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array, name=name))


def samples(rng: np.random.Generator, count: int) -> list[Feeds]:
    return [{"x": rng.standard_normal((4, 16)).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("runs", [40, 7])
@pytest.mark.parametrize("unnamed", [False, True])
def test_the_worst_layer_is_found_alone_or_by_halving(runs: int, unnamed: bool, rng: np.random.Generator) -> None:
    model = chain(rng, unnamed=unnamed)
    ranges = calibrate(model, samples(rng, 6), MinMaxCalibrator(), scope="linear")
    before = graph.fingerprint(model)
    counted: list[int] = []
    found = analyse(model, ranges, samples(rng, 3), runs=runs, scope="linear", target=0.1, progress=counted.append)
    assert graph.fingerprint(model) == before
    assert len(found.layers) == LAYERS + 1
    worst = found.layers[0]
    node = next(node for node in model.graph if node_name(node) == worst.name)
    assert node.inputs[1] is not None
    assert node.inputs[1].name == f"w{BAD}"
    assert worst.alone
    assert worst.error > 3 * found.layers[1].error
    assert sum(layer.flops for layer in found.layers) == pytest.approx(1.0)
    assert counted == list(range(1, found.runs + 1))


@pytest.mark.parametrize("unnamed", [False, True])
def test_the_proposal_keeps_just_what_the_target_needs(unnamed: bool, rng: np.random.Generator) -> None:
    model = chain(rng, unnamed=unnamed)
    ranges = calibrate(model, samples(rng, 6), MinMaxCalibrator(), scope="linear")
    fresh = samples(rng, 3)
    found = analyse(model, ranges, fresh, scope="linear", target=0.1)
    assert found.curve[0].kept == 0
    assert found.curve[0].error > 0.1
    assert found.proposal is not None
    assert found.proposal.error <= 0.1
    assert found.keep[0] == found.layers[0].name
    assert found.proposal.kept == len(found.keep) < LAYERS
    assert all(point.error > 0.1 for point in found.curve if point.kept < found.proposal.kept)
    shares = [point.int8_flops for point in found.curve]
    assert shares == sorted(shares, reverse=True)
    # what the proposal says of its patterns is what they do
    kept = quantize(model, ranges, scope="linear", keep=found.keep)
    products = [node for node in kept.graph if node.op_type == "MatMul"]
    plain = {node_name(n) for n in products if n.inputs[1] is not None and n.inputs[1].producer() is None}
    assert plain == set(found.keep)


def test_an_easy_target_keeps_nothing_and_an_impossible_one_everything(rng: np.random.Generator) -> None:
    model = chain(rng)
    ranges = calibrate(model, samples(rng, 6), MinMaxCalibrator(), scope="linear")
    easy = analyse(model, ranges, samples(rng, 2), scope="linear", target=1e9)
    assert easy.keep == ()
    assert easy.proposal == easy.curve[0]
    hard = analyse(model, ranges, samples(rng, 2), scope="linear", target=1e-9)
    assert len(hard.keep) == len(hard.layers)
    assert hard.proposal is None


def test_a_single_sample_is_judged_against_the_output_itself(rng: np.random.Generator) -> None:
    model = chain(rng)
    ranges = calibrate(model, samples(rng, 2), MinMaxCalibrator(), scope="linear")
    found = analyse(model, ranges, samples(rng, 1), scope="linear")
    assert found.layers[0].error > 0


def test_figures_survive_a_file(rng: np.random.Generator, tmp_path: Path) -> None:
    model = chain(rng)
    ranges = calibrate(model, samples(rng, 2), MinMaxCalibrator(), scope="linear")
    found = analyse(model, ranges, samples(rng, 2), scope="linear", target=0.1)
    path = found.save(tmp_path / "s.json")
    assert load_sensitivity(path) == found
    assert json.loads(path.read_text())["keep"] == list(found.keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target": 0.0}, "above 0"), ({"runs": 0}, "above 0"), ({"target": float("nan")}, "above 0")],
)
def test_bad_figures_are_refused(options: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    model = chain(rng)
    ranges = calibrate(model, samples(rng, 2), MinMaxCalibrator(), scope="linear")
    with pytest.raises(InputError, match=message):
        analyse(model, ranges, samples(rng, 2), scope="linear", **options)


def test_no_samples_no_layers_and_another_model_are_refused(rng: np.random.Generator) -> None:
    model = chain(rng)
    ranges = calibrate(model, samples(rng, 2), MinMaxCalibrator(), scope="linear")
    with pytest.raises(InputError, match="at least one sample"):
        analyse(model, ranges, [], scope="linear")
    with pytest.raises(InputError, match="another model"):
        analyse(chain(rng), ranges, samples(rng, 2), scope="linear")
    few = ir.Model(
        ir.Graph(
            [x := ir.val("x", ir.DataType.FLOAT, (4, 16))],
            [(node := ir.node("Relu", [x], name="relu")).outputs[0]],
            nodes=[node],
            opset_imports={"": 18},
            name="few",
        ),
        ir_version=10,
    )
    node.outputs[0].name = "y"
    with pytest.raises(InputError, match="no layer"):
        analyse(few, calibrate(few, samples(rng, 2), MinMaxCalibrator()), samples(rng, 2))
