"""What one pass found out is kept for the next, as long as nothing changes the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from optframe.gate.workpiece import Workpiece
from optframe.passes import Facts, GraphPass, PassContext, PassResult


def model() -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    )


def count_nodes(given: ir.Model) -> list[int]:
    return [len(given.graph)]


@dataclass(frozen=True)
class Asks(GraphPass):
    """Asks how many nodes there are; adds one to the answer, which the next that gets the same answer sees."""

    name: ClassVar[str] = "asks"
    modifies: bool = False

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        answer = context.facts.of(model, count_nodes)
        context.near_miss(model.graph[0], str(answer))
        answer.append(0)
        return PassResult(self.modifies)


def answers(*steps: Asks) -> list[str]:
    workpiece = Workpiece(model())
    return [workpiece.run(step, {}).near_misses[0].reason for step in steps]


def test_facts_last_until_a_pass_modifies_the_model() -> None:
    quiet, loud = Asks(), Asks(modifies=True)
    assert answers(quiet, loud, quiet, quiet) == ["[1]", "[1, 0]", "[1]", "[1, 0]"]


def test_facts_are_of_one_model() -> None:
    facts, first, second = Facts(), model(), model()
    known = facts.of(first, count_nodes)
    assert facts.of(first, count_nodes) is known
    assert facts.of(second, count_nodes) is not known
