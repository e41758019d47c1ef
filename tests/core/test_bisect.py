"""Bisecting to a pass and to one of its rewrites, and explaining what a pass would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from optframe.errors import CheckFailed, InputError
from optframe.gate.bisect import BisectResult, bisect, explain
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.pipeline import Pipeline

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] v31) {'
TEXT += "\n".join(f"v{i} = Neg ({f'v{i - 1}' if i else 'x'})" for i in range(32)) + "}"


@dataclass(frozen=True)
class Rename(GraphPass):
    """Makes every Neg an op of another type, and those whose index is in `wrong` an Exp."""

    name: ClassVar[str] = "rename"
    old: str = "Neg"
    new: str = "Abs"
    wrong: tuple[int, ...] = ()
    ask: bool = True

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        made = 0
        for index, node in enumerate(model.graph):
            if node.op_type != self.old:
                context.near_miss(node, f"it is no {self.old}")
            elif not self.ask or context.allow(node):
                node.op_type = "Exp" if index in self.wrong else self.new
                made += 1
        return PassResult(made > 0, made)


@dataclass(frozen=True)
class Raise(GraphPass):
    name: ClassVar[str] = "raise"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        raise ValueError("nothing doing")


def model() -> ir.Model:
    made = ir.from_onnx_text(TEXT)
    for index, node in enumerate(made.graph):
        node.name = f"node{index}"
    return made


class NoExp:
    """A check that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, model: ir.Model) -> bool:
        self.asked += 1
        return all(node.op_type != "Exp" for node in model.graph)


@pytest.mark.parametrize("culprit", [0, 1, 5, 9])
@pytest.mark.parametrize("rewrite", [0, 13, 31])
def test_finds_the_pass_and_the_rewrite(culprit: int, rewrite: int) -> None:
    ops = ["Neg", *(f"Op{i}" for i in range(10))]
    steps = [Rename(old=ops[i], new=ops[i + 1], wrong=(rewrite, 31) if i == culprit else ()) for i in range(10)]
    check = NoExp()
    made = model()
    result = bisect(made, Pipeline(tuple(steps)), check)
    assert result == BisectResult(culprit, "rename", f"rename at node{rewrite}", rewrite + 1)
    assert check.asked <= 2 + 4 + 2 + 5
    assert {node.op_type for node in made.graph} == {"Neg"}


def test_a_pass_that_does_not_ask_is_found_as_a_whole() -> None:
    result = bisect(model(), Pipeline((Rename(), Rename(old="Abs", wrong=(3,), ask=False))), NoExp())
    assert result == BisectResult(1, "rename")


def test_a_pass_that_raises_is_found() -> None:
    found = bisect(model(), Pipeline((Rename(), Raise(), Rename())), NoExp())
    assert found is not None
    assert (found.index, found.pass_name, found.rewrite) == (1, "raise", None)
    assert str(found).startswith("pass 2, 'raise', raises ValueError: nothing doing (test_bisect.py:")


def test_nothing_to_find() -> None:
    assert bisect(model(), Pipeline((Rename(),)), NoExp()) is None
    with pytest.raises(InputError, match="before any pass"):
        bisect(model(), Pipeline((Rename(),)), lambda model: False)


@dataclass(frozen=True)
class Cut(GraphPass):
    name: ClassVar[str] = "cut"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        model.graph[3].replace_input_with(0, ir.Value(name="ghost"))
        return PassResult(True, 1)


def test_explain_tells_of_a_pass_that_leaves_no_graph() -> None:
    with pytest.raises(
        CheckFailed, match=r"pass 'cut' would break the model, and be rolled back: node 'node3' .*'ghost'"
    ):
        explain(model(), Cut())


def test_explain_changes_nothing() -> None:
    made = model()
    made.graph[0].op_type = "Exp"
    found = explain(made, Rename())
    assert found.rewrites == tuple(f"rename at node{i}" for i in range(1, 32))
    assert [(miss.node, miss.reason) for miss in found.near_misses] == [("node0", "it is no Neg")]
    assert found.modified
    assert [node.op_type for node in made.graph].count("Neg") == 31
