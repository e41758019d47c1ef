"""When results count as equal."""

from __future__ import annotations

import math
import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from optframe.gate.comparison_nodes import compare_nodes, figures, guarded_nodes
from optframe.numerics import EQUAL, Verdict, compare, of_all_inputs, of_all_tensors, relative_difference, tolerance

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        ([1.0, 2.0], [1.0, 2.0001], "equal"),
        ([1.0, 2.0], [1.0, 2.01], "different"),
        ([0.0, 1000.0], [0.05, 1000.0], "equal"),  # small against the tensor's size
        ([0.0, 1000.0], [5.0, 1000.0], "different"),
        ([1e-12, 2e-12], [1e-12, 3e-12], "different"),  # there is no size that is nothing
        ([0.0, 0.0], [0.0, 0.0], "equal"),
        ([0.0, 0.0], [0.0, 1e-20], "different"),
        ([1.0, NAN], [1.0, NAN], "equal"),
        ([1.0, NAN], [2.0, NAN], "different"),
        ([1.0, NAN], [1.0, 5.0], "unverified"),
        ([NAN, NAN], [NAN, NAN], "unverified"),
        ([1.0, 2.0], [1.0, NAN], "different"),
        ([1.0, 2.0], [1.0, INF], "different"),
        ([1.0, INF], [1.0, INF], "equal"),
        ([1.0, INF], [1.0, -INF], "different"),
        ([1.0, INF], [1.0, 3.0], "different"),
        ([], [], "equal"),
    ],
)
def test_floats(before: list[float], after: list[float], status: str) -> None:
    assert compare(np.float32(before), np.float32(after), 1e-4).status == status


def test_a_nan_that_went_excuses_no_other_difference() -> None:
    assert compare(np.float32([1, NAN]), np.float32([2, 5]), 1e-4).status == "different"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"its shape was \[2, 3\] and is \[3, 2\]"),
        (np.float32([1]), np.float64([1]), "it was float32 and is float64"),
        (np.int64([2**62, 1]), np.int64([2**62 + 1, 1]), "1 of 2 elements differ"),
        (np.array([True, False]), np.array([True, True]), "1 of 2 elements differ"),
        (np.array(["ab", "c"]), np.array(["ab", "cd"]), "1 of 2 elements differ"),
        (np.complex64([1j]), np.complex64([2j]), "differ by"),
    ],
)
def test_other_differences(before: np.ndarray, after: np.ndarray, reason: str) -> None:  # type: ignore[type-arg]
    verdict = compare(before, after, 1e-4)
    assert verdict.status == "different"
    assert re.search(reason, verdict.reason)


def test_text_of_other_width_is_equal() -> None:
    assert compare(np.array(["a", "b"], "U1"), np.array(["a", "b"], "U9"), 0.0) == EQUAL


def test_the_coarsest_type_sets_the_tolerance() -> None:
    kinds = onnx.TensorProto
    assert tolerance([kinds.FLOAT, kinds.FLOAT16, kinds.INT64]) == tolerance([kinds.FLOAT16])
    assert tolerance([kinds.DOUBLE]) < tolerance([kinds.FLOAT]) < tolerance([kinds.FLOAT16])
    assert tolerance([kinds.INT64]) == 0


def test_what_verdicts_mean_together() -> None:
    equal, different, unknown = Verdict("equal"), Verdict("different", "d"), Verdict("unverified", "u")
    assert of_all_tensors([equal, unknown]) == unknown
    assert of_all_tensors([unknown, different, equal]) == different
    assert of_all_inputs([unknown, equal]) == Verdict("equal", "u")
    assert of_all_inputs([equal, different]) == different
    assert of_all_tensors([]) == EQUAL


# --- the same, inside a graph


def run_figures(before: np.ndarray, after: np.ndarray, opset: int, guarded: bool) -> np.ndarray:  # type: ignore[type-arg]
    element = onnx.helper.np_dtype_to_tensor_dtype(before.dtype)
    make = guarded_nodes if guarded else compare_nodes
    dims = [None] * before.ndim if guarded else before.shape
    inputs = [onnx.helper.make_tensor_value_info(name, element, dims) for name in "ab"]
    graph = onnx.helper.make_graph(make("a", "b", element, "out"), "g", inputs, [figures("out")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"a": before, "b": after})
    return np.asarray(result)


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_nodes_give_what_the_definition_says(opset: int, guarded: bool, dtype: str, rng: np.random.Generator) -> None:
    before = (rng.standard_normal((3, 5, 7)) * 10).astype(dtype)
    after = (before * (1 + 1e-2 * rng.standard_normal(before.shape))).astype(dtype)
    expected = relative_difference(before, after)
    # the nodes work in FP32 (in FP64 for FP64), and their result is FP32
    np.testing.assert_allclose(run_figures(before, after, opset, guarded), [expected.max(), expected.sum()], rtol=1e-5)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool", "uint64", "int32"])
def test_nodes_count_exact_differences(guarded: bool, dtype: str, rng: np.random.Generator) -> None:
    before = rng.integers(0, 2, (4, 4)).astype(dtype)
    after = before.copy()
    after[1, 2] = not after[1, 2]
    assert run_figures(before, after, 13, guarded).tolist() == [1, 1]
    assert run_figures(before, before, 13, guarded).tolist() == [0, 0]


@pytest.mark.parametrize("place", ["before", "after", "both"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nodes_never_hide_what_is_not_finite(place: str, value: float, rng: np.random.Generator) -> None:
    before = rng.standard_normal(1000).astype(np.float32)
    after = before.copy()
    for array, name in ((before, "before"), (after, "after")):
        if place in (name, "both"):
            array[417] = value
    assert not np.isfinite(run_figures(before, after, 13, False)[1])


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 3)), ((2, 3), (1, 3)), ((0, 3), (0, 3))])
def test_guarded_nodes_know_nothing_of_other_shapes_and_of_nothing(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert np.isnan(run_figures(np.zeros(a, np.float32), np.zeros(b, np.float32), 13, True)).all()


def test_nodes_take_scalars_and_zeros() -> None:
    assert run_figures(np.array(2, np.float32), np.array(2, np.float32), 13, False).tolist() == [0, 0]
    zeros = np.zeros(5, np.float32)
    assert run_figures(zeros, zeros, 13, False).tolist() == [0, 0]
    assert run_figures(zeros, zeros + np.float32(1e-20), 13, False)[0] > 1
