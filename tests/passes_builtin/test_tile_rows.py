"""`tile-rows`: the same numbers, some rows of a product at a time, where what lies in between is large."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from optframe.flops import count_flops
from optframe.passes import ORIGIN_KEY, PASS_KEY, PassContext
from optframe_passes import tile_rows
from optframe_passes.tile_rows import TileRows

Check = Callable[..., Any]
Parse = Callable[..., ir.Model]

ATTENTION = """
    g (float[2,3,{rows},8] q, float[2,3,8,20] k, float[2,3,20,4] v) => (float[A,B,C,D] y)
    {{ [scores] s = MatMul (q, k) [weights] p = Softmax <axis = -1> (s) [sum] y = MatMul (p, v) }}
"""

ROWS_THEN_COLUMNS = """
    g (float[1,2,{rows},5] a, float[1,2,5,24] v, float[1,2,{rows},6] c) => (float[A,B,C,D,E] y)
    <int64[5] split = {{1, 2, {rows}, 6, 4}}, int64[1] axis = {{3}}>
    {{ t = MatMul (a, v) r = Reshape (t, split) u = Unsqueeze (c, axis) y = MatMul (u, r) }}
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that products of a test exceed."""
    monkeypatch.setattr(tile_rows, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(tile_rows, "_TILE_BYTES", 700)
    monkeypatch.setattr(tile_rows, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(tile_rows, "_SHRINKS", 2)


def body_of(scan: ir.Node) -> ir.Graph:
    return scan.attributes["body"].as_graph()


def shapes(values: Iterable[ir.Value]) -> list[list[int]]:
    return [[int(str(dim)) for dim in value.shape or ()] for value in values]


def test_attention_one_matrix_at_a_time(check: Check) -> None:
    outcome = check(TileRows(), ATTENTION.format(rows=12))
    assert outcome.ops == {"Reshape": 4, "Scan": 2, "MatMul": 2, "Softmax": 1}
    [matrices] = [node for node in outcome.model.graph if node.op_type == "Scan"]
    body = body_of(matrices)
    assert shapes(body.inputs) == [[2, 1, 1, 6, 8], [1, 1, 8, 20], [1, 1, 20, 4]], (
        "queries are cut, keys and values not"
    )
    assert shapes(matrices.inputs) == [[6, *shape] for shape in shapes(body.inputs)]
    assert shapes(matrices.outputs) == [[6, 2, 1, 1, 6, 4]]
    [tiles] = body
    assert list(tiles.inputs) == [body.inputs[0]]
    inner = body_of(tiles)
    assert [node.op_type for node in inner] == ["MatMul", "Softmax", "MatMul"]
    assert shapes(inner.inputs) == [[1, 1, 6, 8]], "12 rows of 20 numbers are 960 bytes"


def test_attention_all_matrices_at_once(check: Check) -> None:
    outcome = check(TileRows(matrices_apart=False), ATTENTION.format(rows=12))
    assert outcome.ops == {"Reshape": 2, "Scan": 1, "MatMul": 2, "Softmax": 1}
    body = body_of(outcome.node("Scan"))
    assert shapes(body.inputs) == [[2, 3, 6, 8]], "keys and values are read whole"


@pytest.mark.parametrize(
    "text",
    [
        ATTENTION.format(rows=12),
        # `a` is shared, so all matrices are cut at once; what follows the Reshape could be taken one at a time
        "g (float[1,6,12,8] a, float[4,6,8,20] b, float[4,6,20,20] c, float[4,6,20,2] d) => (float[A,B,C,D] y)"
        "<int64[4] split = {4, 6, 12, 20}>"
        "{ t = MatMul (a, b) r = Reshape (t, split) u = MatMul (r, c) y = MatMul (u, d) }",
    ],
)
def test_tiles_of_many_matrices_are_not_cut_again(text: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they make more than what counts as a large product; a pass changes nothing when it is run again."""
    monkeypatch.setattr(tile_rows, "_LARGE_BYTES", 500)
    outcome = check(TileRows(matrices_apart="split" in text), text)
    assert outcome.ops["Scan"] == 1
    again = ir.from_proto(ir.to_proto(outcome.model))
    assert not TileRows().run(again, PassContext(pass_name="tile-rows")).modified


def test_small_matrices_are_not_cut(check: Check) -> None:
    outcome = check(TileRows(), ATTENTION.format(rows=8))
    assert outcome.ops == {"Reshape": 4, "Scan": 1, "MatMul": 2, "Softmax": 1}
    assert shapes(body_of(outcome.node("Scan")).inputs) == [[1, 1, 8, 8], [1, 1, 8, 20], [1, 1, 20, 4]]


def test_sums_over_rows_then_columns(check: Check) -> None:
    outcome = check(TileRows(), ROWS_THEN_COLUMNS.format(rows=15))
    [matrices] = [node for node in outcome.model.graph if node.op_type == "Scan"]
    [tiles] = body_of(matrices)
    inner = body_of(tiles)
    assert [node.op_type for node in inner] == ["MatMul", "Reshape", "MatMul"]
    assert shapes(inner.inputs) == [[1, 1, 5, 5], [1, 1, 5, 1, 6]]
    assert list(tiles.attributes["scan_input_axes"].as_ints()) == [0, 0]
    assert shapes(matrices.outputs) == [[2, 3, 1, 1, 5, 1, 4]]


@pytest.mark.parametrize(
    ("text", "tile"),
    [
        (  # two images share their keys
            "g (float[2,3,12,8] q, float[1,3,8,20] k, float[2,3,20,4] v) => (float[A,B,C,D] y)"
            "{ s = MatMul (q, k) y = MatMul (s, v) }",
            [2, 3, 6, 8],
        ),
        (  # what is divided by is a sum over the matrices
            "g (float[3,12,8] q, float[3,8,20] k, float[20,4] v) => (float[A,B,C] y)"
            "{ s = MatMul (q, k) t = Softmax <axis = 0> (s) y = MatMul (t, v) }",
            [3, 6, 8],
        ),
    ],
)
def test_matrices_that_belong_together_stay_so(text: str, tile: list[int], check: Check) -> None:
    outcome = check(TileRows(), text)
    assert outcome.ops["Scan"] == 1
    scan = outcome.node("Scan")
    assert shapes(body_of(scan).inputs) == [tile]
    assert list(scan.attributes["scan_input_axes"].as_ints()) == [len(tile) - 2]


def test_operands_without_the_axis_of_matrices_are_read_from_outside(check: Check) -> None:
    text = """
        g (float[3,14,8] a, float[3,8,20] k, float[20,2] v, float[14,1] column, float[3,1,20] row) => (float[A,B,C] y)
        { t = MatMul (a, k) s = Add (t, column) r = Add (s, row) y = MatMul (r, v) }
    """
    outcome = check(TileRows(), text)
    [matrices] = [node for node in outcome.model.graph if node.op_type == "Scan"]
    assert shapes(matrices.inputs) == [[3, 2, 1, 7, 8], [3, 1, 8, 20], [3, 1, 1, 20]], "a, k and row"
    [tiles] = body_of(matrices)
    assert shapes(body_of(tiles).inputs) == [[1, 7, 8], [7, 1]], "a and column"
    assert not any(value is matrices.inputs[0] for value in tiles.inputs)


@pytest.mark.parametrize(
    "between",
    [
        "t = MatMul (a, k) s = Add (t, mask) r = Mul (s, gate) y = MatMul (r, v)",
        "t = MatMul (a, k) s = Add (row, t) r = Relu (s) y = MatMul (r, v)",
        "t = MatMul (a, k) s = Sub (column, t) r = Tanh (s) y = MatMul (r, v)",
        "t = MatMul (a, k) r = Softmax <axis = 1> (t) y = MatMul (r, v)",
    ],
)
def test_what_may_stand_between(between: str, check: Check) -> None:
    text = f"""
        g (float[3,14,8] a, float[3,8,20] k, float[20,2] v, float[14,20] mask, float[3,1,20] row, float[14,1] column,
           float gate) => (float[A,B,C] y) {{ {between} }}
    """
    outcome = check(TileRows(), text)
    taken = "Softmax" not in between  # along the rows it needs all of them
    assert outcome.result.modified is taken
    if taken and "mask" in between:
        [matrices] = [node for node in outcome.model.graph if node.op_type == "Scan"]
        [tiles] = body_of(matrices)
        assert len(tiles.inputs) == 2, "a and mask have the rows"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{ t = MatMul (a, k) y = Relu (t) }", "nothing makes it smaller"),
        ("{ t = MatMul (a, k) y = MatMul (t, v) z = Relu (t) }", "another node reads the product"),
        ("{ z = MatMul (a, k) y = MatMul (z, v) }", "the product is an output"),
        ("{ t = MatMul (a, k) r = Transpose <perm = [0, 2, 1]> (t) y = MatMul (w, r) }", "rows change their place"),
        ("{ t = MatMul (a, k) y = MatMul (w, t) }", "rows are summed over"),
        ("{ t = MatMul (a, k) y = ReduceSum <keepdims = 1> (t, axes) }", "no op of those that keep rows apart"),
    ],
)
def test_other_chains_stay(text: str, why: str, check: Check) -> None:
    outputs = "float[A,B,C] y, float[D,E,F] z" if " z " in text else "float[A,B,C] y"
    graph = f"""
        g (float[3,14,8] a, float[3,8,20] k, float[20,2] v, float[2,14] w) => ({outputs})
        <int64[1] axes = {{2}}> {text.replace("(w, r)", "(v2, r)")}
    """.replace("float[2,14] w)", "float[2,14] w, float[2,20] v2)")
    assert not check(TileRows(), graph).result.modified, why


def test_rows_that_have_become_the_last_axis_may_not_be_summed_over(check: Check) -> None:
    text = """
        g (float[3,100,5] a, float[3,5,1] k, float[100,2] w) => (float[A,B] y) <int64[2] flat = {3, 100}>
        { t = MatMul (a, k) r = Reshape (t, flat) y = MatMul (r, w) }
    """
    assert not check(TileRows(), text).result.modified


@pytest.mark.parametrize("number", range(12))
def test_chains_at_random(number: int, check: Check, rng: np.random.Generator) -> None:
    """Any lead, operands with some of its axes, and chains of one to four nodes between the products."""
    lead = [int(rng.integers(1, 4)) for _ in range(rng.integers(0, 3))]
    rows = int(rng.choice([6, 8, 12, 15]))
    inputs = [f"float{[*lead, rows, 5]} a", f"float{[*some(rng, lead), 5, 24]} b"]
    nodes = ["v0 = MatMul (a, b)"]
    for step in range(rng.integers(1, 5)):
        kind = rng.choice(["Softmax", "Tanh", "Add", "Mul"])
        operand = [*some(rng, lead), rng.choice([1, rows]), rng.choice([1, 24])]
        operand = operand[rng.integers(0, len(operand)) :]
        if kind in ("Add", "Mul"):
            inputs.append(f"float{[int(dim) for dim in operand]} c{step}")
            nodes.append(f"v{step + 1} = {kind} (v{step}, c{step})")
        else:
            nodes.append(f"v{step + 1} = {kind} (v{step})")
    inputs.append(f"float{[*some(rng, lead), 24, 2]} d")
    nodes.append(f"y = MatMul (v{len(nodes) - 1}, d)")
    names = ",".join("ABCD"[: len(lead) + 2])
    outcome = check(TileRows(), f"g ({', '.join(inputs)}) => (float[{names}] y) {{ {' '.join(nodes)} }}")
    large = int(np.prod([*lead, rows, 24])) * 4 > 1000
    assert outcome.result.modified is large, f"{rows} rows of 24 columns, {lead}"


def some(rng: np.random.Generator, lead: list[int]) -> list[int]:
    """The axes of `lead`, or 1 in place of some, or of all, or without the first ones."""
    kept = [dim if rng.random() < 0.7 else 1 for dim in lead]
    return kept[rng.integers(0, len(kept) + 1) :] if rng.random() < 0.3 else kept


def test_free_sizes_and_small_products_stay(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not check(TileRows(), ATTENTION.format(rows="N")).result.modified
    monkeypatch.setattr(tile_rows, "_LARGE_BYTES", 2 * 3 * 12 * 20 * 4)
    assert not check(TileRows(), ATTENTION.format(rows=12)).result.modified


def test_a_number_of_rows_without_a_good_divisor_stays(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_rows, "_FEWEST_ROWS", 2)
    outcome = check(TileRows(), ATTENTION.format(rows=13))
    assert not outcome.result.modified
    assert outcome.reasons == ["no divisor of its 13 rows makes tiles of a good size"]


def test_an_operand_that_is_needed_whole_is_not_cut(check: Check) -> None:
    """The same matrix stands on the left of the first product and on the right of the second."""
    text = """
        g (float[20,20] a, float[20,40] k, float[40,20] l) => (float[A,B] y)
        { t = MatMul (a, k) u = MatMul (t, l) y = MatMul (u, a) }
    """
    outcome = check(TileRows(), text)
    assert [len(node.inputs) for node in outcome.model.graph if node.op_type == "Scan"] == [1]
    assert outcome.ops["MatMul"] == 3
    both = (
        "g (float[20,20] a, float[20,40] k) => (float[A,B] y) { t = MatMul (a, k) u = Mul (t, t2) y = MatMul (u, k2) }"
    )
    both = both.replace("float[20,40] k)", "float[20,40] k, float[20,40] t2, float[40,2] k2)")
    assert len(check(TileRows(), both).node("Scan").inputs) == 2


def test_results_are_no_further_from_the_truth(parse: Parse, rng: np.random.Generator) -> None:
    """A tile of one row is multiplied in another order; others are not, but that is the library's affair."""
    model = parse(ATTENTION.format(rows=12))
    q, k, v = (rng.standard_normal(s) for s in ((2, 3, 12, 8), (2, 3, 8, 20), (2, 3, 20, 4)))
    scores = np.exp(q @ k)
    truth = scores / scores.sum(-1, keepdims=True) @ v
    assert TileRows().run(model, PassContext(pass_name="tile-rows")).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {name: array.astype(np.float32) for name, array in (("q", q), ("k", k), ("v", v))}
    # Sums of 8 and 20 terms behind an exponential of numbers up to 10: some ten roundings of 6e-8.
    np.testing.assert_allclose(session.run(None, feeds)[0], truth, rtol=0, atol=1e-5)


def test_flops_and_origins_stay(parse: Parse) -> None:
    for text in (ATTENTION.format(rows=12), ROWS_THEN_COLUMNS.format(rows=15)):
        model = parse(text)
        before = count_flops(model).total
        assert TileRows().run(model, PassContext(pass_name="tile-rows")).modified
        shapes = {str(value.name): [int(str(d)) for d in value.shape or ()] for value in model.graph.inputs}
        assert count_flops(model, input_shapes=shapes).total == before
    model = parse(ATTENTION.format(rows=12))
    assert TileRows().run(model, PassContext(pass_name="tile-rows")).modified
    origins = {node.op_type: node.metadata_props[ORIGIN_KEY] for node in model.graph.all_nodes()}
    assert origins["Scan"] == "scores,weights,sum"
    assert origins["Softmax"] == "weights"
    assert all(node.metadata_props[PASS_KEY] == "tile-rows" for node in model.graph.all_nodes())


def test_within_a_subgraph(check: Check) -> None:
    text = """
        g (bool c, float[1,12,8] q, float[1,8,60] k, float[1,60,2] v) => (float[A,B,C] y) {
            y = If (c) <
                then_branch = t () => (float[A,B,C] m) { s = MatMul (q, k) p = Softmax (s) m = MatMul (p, v) },
                else_branch = e () => (float[A,B,C] n) { n = MatMul (q, k) }
            >
        }
    """
    feeds = [
        {"c": np.array(flag)} | {n: np.random.default_rng(0).standard_normal(s, np.float32) for n, s in SHAPES.items()}
        for flag in (True, False)
    ]
    assert check(TileRows(), text, feeds=feeds).ops["Scan"] == 1


SHAPES = {"q": (1, 12, 8), "k": (1, 8, 60), "v": (1, 60, 2)}
