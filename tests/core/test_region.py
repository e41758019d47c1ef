"""Changed regions: what counts as changed, what is equal without being computed, and what the comparison says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optframe import feeds as feeds_module
from optframe.gate.exchange import Exchange
from optframe.gate.region import MergedModel, MergeError, find_change
from optframe.gate.verify import Step, Verifier
from optframe.snapshot import Snapshot
from optframe.types import Feeds
from optframe.worker import Worker

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[2, 3] x) => (float[2, 3] y)
<float two = {2.0}, float again = {2.0}>
{
    a = Mul (x, two)
    b = Identity (a)
    c = Relu (b)
    d = Mul (x, again)
    e = Add (c, d)
    y = Neg (e)
}
"""


def snapshot(text: str) -> Snapshot:
    return Snapshot.take(ir.from_onnx_text(text))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker")) as made:
        yield made


@pytest.fixture
def verdicts(worker: Worker) -> Callable[..., list[str]]:
    """A function that verifies a sequence of models, each against the one before, and returns the verdicts."""

    def verify(*texts: str, feeds: tuple[Feeds, ...] = ()) -> list[str]:
        snapshots = [snapshot(text) for text in texts]
        return statuses(worker, snapshots, *feeds)

    return verify


def statuses(worker: Worker, snapshots: list[Snapshot], *feeds: Feeds) -> list[str]:
    def draw(seed: int) -> Feeds:
        return feeds_module.random_feeds(snapshots[0].model, seed)

    verifier = Verifier(Exchange(worker), snapshots[0], feeds, draw)
    steps = [Step(i, a, b) for i, (a, b) in enumerate(pairwise(snapshots))]
    return [verdict.status for verdict in verifier.verify_steps(steps)]


# --- what counts as changed


def test_the_boundary_is_what_unchanged_nodes_read_of_changed_ones() -> None:
    after = CHAIN.replace("c = Relu (b)", "n = Neg (b)\n m = Abs (n)\n c = Elu (m)").replace(
        "b = Identity (a)", "b = Abs (a)"
    )
    change = find_change(snapshot(CHAIN), snapshot(after))
    assert (change.nodes, change.initializers, change.boundary) == ((1, 2, 3, 4), frozenset(), ("c",))


def test_names_docs_and_metadata_of_nodes_are_no_change() -> None:
    before = snapshot(CHAIN)
    other = before.model.clone()
    other.graph[0].name, other.graph[0].doc_string = "renamed", "words"
    other.graph[0].metadata_props["key"] = "value"
    after = Snapshot.take(other)
    assert find_change(before, after).nodes == ()
    assert not before.same(after)


def test_a_removed_branch_has_no_boundary() -> None:
    before = CHAIN.replace("y = Neg (e)", "unused = Exp (e)\n y = Neg (e)")
    assert find_change(snapshot(before), snapshot(CHAIN)).boundary == ()


def test_a_changed_weight_changes_what_reads_it() -> None:
    after = CHAIN.replace("float two = {2.0}", "float two = {3.0}")
    change = find_change(snapshot(CHAIN), snapshot(after))
    assert (change.nodes, change.initializers, change.boundary) == ((0,), {"two"}, ("a",))


def test_large_weights_are_compared_by_content() -> None:
    model = ir.from_onnx_text(CHAIN)
    weight = np.arange(2000, dtype=np.float32)
    for name, tensor in (("big", ir.tensor(weight, name="big")), ("same", ir.tensor(weight.copy(), name="same"))):
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
    before = Snapshot.take(model)
    assert before.weights.keys() == {"big", "same"}
    assert len(before.proto.SerializeToString()) < 2000
    model.graph.initializers["big"].const_value = ir.tensor(weight.copy(), name="big")
    assert Snapshot.take(model).same(before)
    model.graph.initializers["big"].const_value = ir.tensor(np.append(weight[:-1], 7).astype(np.float32), name="big")
    assert find_change(before, Snapshot.take(model)).initializers == {"big"}


# --- what is equal without being computed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c = Relu (b)", "c = Relu (a)"),
        ("d = Mul (x, again)", "d = Mul (x, two)"),
        ("e = Add (c, d)", "e = Add (c, a)"),
        ("b = Identity (a)", "b = Mul (x, again)"),
        ("a = Mul (x, two)", "w = Constant <value_float = 5.0> ()\n a = Mul (x, two)"),
        ("a = Mul (x, two)", "two_ = Constant <value = float {2.0}> ()\n a = Mul (x, two_)"),
    ],
    ids=["identity dropped", "constants merged", "equal nodes merged", "node repeated", "dead node", "constant node"],
)
def test_equal_by_construction(old: str, new: str) -> None:
    merged = MergedModel(snapshot(CHAIN))
    merged.add(0, snapshot(CHAIN.replace(old, new)))
    assert merged.pairs == []


def test_random_nodes_are_never_taken_for_one_another() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) { a = RandomNormalLike (x)
      b = RandomNormalLike (x)
      y = Sub (a, b) }
    """
    merged = MergedModel(snapshot(text))
    merged.add(0, snapshot(text.replace("Sub (a, b)", "Sub (a, a)")))
    assert [pair.name for pair in merged.pairs] == ["y"]


def test_only_what_a_comparison_needs_is_in_the_program() -> None:
    merged = MergedModel(snapshot(CHAIN))
    merged.add(0, snapshot(CHAIN.replace("c = Relu (b)", "c = Max (b)")))
    (pair,) = merged.pairs
    outputs = [onnx.ValueInfoProto(name=name) for name in (pair.before, pair.after)]
    program = merged.program(outputs, [], {"x": (2, 3)})
    assert [node.op_type for node in program.proto.graph.node] == ["Mul", "Relu", "Max"]


def test_another_opset_cannot_be_merged() -> None:
    merged = MergedModel(snapshot(CHAIN))
    with pytest.raises(MergeError, match="opset"):
        merged.add(0, snapshot(CHAIN.replace('"" : 17', '"" : 18')))


# --- what the comparison says


def test_each_step_is_judged_on_its_own(verdicts: Callable[..., list[str]]) -> None:
    right = CHAIN.replace("c = Relu (b)", "zero = Sub (b, b)\n c = Max (b, zero)")
    also_right = right.replace("e = Add (c, d)", "n = Neg (d)\n e = Sub (c, n)")
    wrong = also_right.replace("e = Sub (c, n)", "e = Sub (c, d)")
    assert verdicts(CHAIN, right, also_right) == ["equal", "equal"]
    assert verdicts(CHAIN, right, wrong, also_right) == ["equal", "different"]


def test_a_name_may_come_back_with_another_meaning(verdicts: Callable[..., list[str]]) -> None:
    without = CHAIN.replace("b = Identity (a)\n", "").replace("Relu (b)", "Relu (a)")
    reused = without.replace("d = Mul (x, again)", "b = Add (x, x)\n d = Max (b)")
    assert verdicts(CHAIN, without, reused) == ["equal", "equal"]
    assert verdicts(CHAIN, without, reused.replace("Add (x, x)", "Exp (x)")) == ["equal", "different"]


def test_steps_after_a_rescaled_tensor_are_judged_by_what_it_is_now(verdicts: Callable[..., list[str]]) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[4] y) <float w = {3.0}, float s = {5.0}, float one = {1.0}>
    { a = Mul (x, w)
      b = Neg (a)
      y = Mul (b, s) }
    """
    rescaled = text.replace("w = {3.0}", "w = {6.0}").replace("s = {5.0}", "s = {2.5}")
    later = rescaled.replace("b = Neg (a)", "n = Abs (a)\n c = Sub (n, a)\n b = Sub (c, n)")
    clipped = rescaled.replace("b = Neg (a)", "ten = Constant <value_float = 10.0> ()\n m = Min (a, ten)\n b = Neg (m)")
    feeds = ({"x": np.full(4, 2, np.float32)},)
    assert verdicts(text, rescaled, later, feeds=feeds) == ["equal", "equal"]
    # 2 * 3 stays below ten, 2 * 6 does not
    assert verdicts(text, rescaled, clipped, feeds=feeds) == ["equal", "different"]


LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[3] x) => (float[3] y)
<int64 count = {3}, bool go = {1}, float two = {2.0}>
{
    outer = Neg (x)
    y = Loop (count, go, x) <body = body (int64 i, bool keep, float[3] state) => (bool more, float[3] next) {
        more = Identity (keep)
        scaled = Mul (outer, two)
        next = Add (state, scaled)
    }>
}
"""


def test_subgraphs_read_outer_values(verdicts: Callable[..., list[str]]) -> None:
    right = LOOP.replace("outer = Neg (x)", "zero = Sub (x, x)\n outer = Sub (zero, x)")
    inside = right.replace("scaled = Mul (outer, two)", "scaled = Add (outer, outer)")
    assert verdicts(LOOP, right, inside) == ["equal", "equal"]
    assert verdicts(LOOP, right, inside.replace("Add (outer, outer)", "Add (outer, state)")) == ["equal", "different"]
    assert verdicts(LOOP, LOOP.replace("Neg (x)", "Abs (x)")) == ["different"]


NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[3] x, bool p, bool q) => (float[3] y)
{
    y = If (p) <
        then_branch = t () => (float[3] a) {
            a = If (q) <
                then_branch = tt () => (float[3] b) { b = Exp (x) },
                else_branch = te () => (float[3] c) { c = Neg (x) }
            >
        },
        else_branch = e () => (float[3] d) { d = Abs (x) }
    >
}
"""


@pytest.mark.parametrize("op", ["Exp", "Neg", "Abs"])
@pytest.mark.parametrize("taken", [(True, True), (True, False), (False, False)])
def test_every_branch_counts_whichever_is_taken(
    op: str, taken: tuple[bool, bool], verdicts: Callable[..., list[str]]
) -> None:
    feeds = {"x": np.float32([1, 2, 3]), "p": np.array(taken[0]), "q": np.array(taken[1])}
    other = NESTED.replace(f"{op} (x)", "Sqrt (x)")
    assert verdicts(NESTED, other, feeds=(feeds,)) == ["different"]
    same = NESTED.replace("Neg (x) }", "zero = Sub (x, x)\n c = Sub (zero, x) }").replace("{ c = zero", "{ zero")
    assert verdicts(NESTED, same, feeds=(feeds,)) == ["equal"]


def test_functions_of_the_same_name_keep_apart(verdicts: Callable[..., list[str]]) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[3] x) => (float[3] y) { a = local.outer (x)
      b = local.inner (x)
      y = Mul (a, b) }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    outer (x) => (y) { z = local.inner (x)
      y = Neg (z) }
    <domain: "local", opset_import: ["" : 17]>
    inner (x) => (y) { y = Add (x, x) }
    """
    same = text.replace("y = Add (x, x)", "z = Neg (x)\n y = Sub (x, z)")
    other = text.replace("y = Add (x, x)", "z = Abs (x)\n y = Add (x, z)")
    assert verdicts(text, same, text) == ["equal", "equal"]
    assert verdicts(text, same, other) == ["equal", "different"]


@pytest.mark.parametrize(
    ("element", "factor", "expected"),
    [
        ("float", 1 + 2e-5, "equal"),
        ("float", 1 + 2e-3, "different"),
        ("float16", 1 + 2e-3, "equal"),
        ("float16", 1.1, "different"),
        ("double", 1 + 2e-5, "different"),
        ("double", 1 + 1e-13, "equal"),
    ],
)
def test_tolerance_follows_the_type(
    element: str, factor: float, expected: str, verdicts: Callable[..., list[str]]
) -> None:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g ({element}[64] x) => ({element}[64] y) {{ a = Abs (x)
      y = Neg (a) }}
    """
    scaled = text.replace(
        "a = Abs (x)",
        f"f = Constant <value = double {{{factor!r}}}> ()\n c = CastLike (f, x)\n z = Abs (x)\n a = Mul (z, c)",
    )
    assert verdicts(text, scaled) == [expected]


def test_infinities_stay_where_they_are(verdicts: Callable[..., list[str]]) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[4] y) <float big = {3e38}, float ten = {10.0}>
    { a = Mul (x, big)
      b = Mul (a, ten)
      y = Relu (b) }
    """
    same = text.replace("b = Mul (a, ten)", "n = Neg (a)\n m = Mul (n, ten)\n b = Neg (m)")
    finite = text.replace("b = Mul (a, ten)", "b = Mul (a, big)").replace("y = Relu (b)", "y = Clip (b)")
    assert verdicts(text, same) == ["equal"]
    assert verdicts(text, finite.replace("b = Mul (a, big)", "b = Div (a, ten)")) == ["different"]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[str], list[str], bool]:
    """Return the nodes of a random model, the same with some written otherwise, and whether one is written wrong."""
    before, after, wrong = [], [], False
    names = ["x"]
    for i in range(draw(st.integers(2, 8))):
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        node, otherwise = draw(
            st.sampled_from(
                [
                    (f"Add ({a}, {b})", f"n{i} = Neg ({b})\n r{i} = Sub ({a}, n{i})"),
                    (f"Sub ({a}, {b})", f"n{i} = Neg ({b})\n r{i} = Add ({a}, n{i})"),
                    (f"Tanh ({a})", f"n{i} = Neg ({a})\n t{i} = Tanh (n{i})\n r{i} = Neg (t{i})"),
                ]
            )
        )
        how = draw(st.sampled_from(["same", "same", "right", "wrong"]))
        last = {"same": f"v{i} = {node}", "right": f"v{i} = Identity (r{i})", "wrong": f"v{i} = Add (r{i}, one)"}[how]
        before.append(f"v{i} = {node}")
        after.append(last if how == "same" else f"{otherwise}\n {last}")
        wrong |= how == "wrong"
        names.append(f"v{i}")
    return before, after, wrong


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
def test_verdicts_agree_with_the_truth(worker: Worker, program: tuple[list[str], list[str], bool]) -> None:
    before, after, wrong = program
    every = "\n".join(f"o{i} = Identity (v{i})" for i in range(len(before)))
    outputs = ", ".join(f"float[3] o{i}" for i in range(len(before)))

    def text(nodes: list[str]) -> str:
        body = "\n".join([*nodes, every])
        return (
            f'<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => ({outputs}) <float one = {{1.0}}> {{ {body} }}'
        )

    found = statuses(worker, [snapshot(text(before)), snapshot(text(after))])
    assert found == (["different"] if wrong else ["equal"])


def test_a_moved_tensor_may_come_back_further_on(verdicts: Callable[..., list[str]]) -> None:
    """As when a scale is folded over a transpose: what is between keeps its names and changes its values."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float s = {3.0}, float one = {1.0}>
    { m = MatMul (x, w)
      t = Transpose (m)
      z = Mul (t, s)
      e = Exp (z)
      y = Neg (e) }
    """
    folded = text.replace("<float[2, 2] w = {1.0, 2.0, 3.0, 4.0}", "<float[2, 2] w3 = {3.0, 6.0, 9.0, 12.0}")
    folded = (
        folded.replace("MatMul (x, w)", "MatMul (x, w3)").replace("z = Mul (t, s)\n", "").replace("Exp (z)", "Exp (t)")
    )
    later = folded.replace("y = Neg (e)", "zero = Sub (e, e)\n y = Sub (zero, e)")
    assert verdicts(text, folded, later) == ["equal", "equal"]
    assert verdicts(text, folded.replace("12.0", "12.1"), later) == ["different"]
    assert verdicts(text, folded, later.replace("t = Transpose (m)", "t = Identity (m)")) == ["equal", "different"]


def test_a_region_grows_without_a_run_of_the_whole_model(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was compared")

    monkeypatch.setattr(Verifier, "_verify_outputs", never)
    rescaled = CHAIN.replace("a = Mul (x, two)", "h = Mul (x, two)\n a = Mul (h, two)")
    rescaled = rescaled.replace("e = Add (c, d)", "f = Div (c, two)\n e = Add (f, d)")
    assert statuses(worker, [snapshot(CHAIN), snapshot(rescaled)]) == ["equal"]
