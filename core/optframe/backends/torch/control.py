"""If, Loop and Scan whose course depends on values: Python decides, functions compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from optframe.backends.torch.registry import Call, OpNode

HOST_INPUTS = {"If": (0,), "Loop": (0, 1), "Scan": ()}
"""What decides the course is read on the host."""


class Runnable(Protocol):
    """A subgraph that runs on tensors: its own inputs first, then what it captures."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...


def check(node: OpNode) -> None:
    """Name the form of Scan that has no translation.

    Raises:
        InputError: it is that of opset 8.
    """
    if node.op_type == "Scan" and node.opset < 9:
        raise node.unsupported("a batch axis, as opset 8 has it")


def build(node: OpNode, functions: Mapping[str, Runnable], captures: int, nothing: Sequence[Tensor]) -> Call:
    """Return the call of a node; it takes the node's inputs and then `captures` captured tensors.

    `nothing` stands for the body's outputs, one each, where a Loop or Scan never ran it.
    """
    if node.op_type == "If":
        then, otherwise = functions["then_branch"], functions["else_branch"]
        return lambda condition, *captured: tuple((then if bool(condition) else otherwise)(captured))
    if node.op_type == "Loop":
        return _loop(node, functions["body"], captures, nothing)
    return _scan(node, functions["body"], captures, nothing)


def _divide(given: Sequence[Tensor], captures: int) -> tuple[list[Tensor], list[Tensor]]:
    cut = len(given) - captures
    return list(given[:cut]), list(given[cut:])


def _stack(collected: Sequence[Sequence[Tensor]], nothing: Sequence[Tensor]) -> list[Tensor]:
    """Return each series as one tensor, its elements along the first axis."""
    empties = nothing[len(nothing) - len(collected) :]
    return [torch.stack(list(s)) if s else empty for s, empty in zip(collected, empties, strict=True)]


def _loop(node: OpNode, body: Runnable, captures: int, nothing: Sequence[Tensor]) -> Call:
    def loop(count: Tensor | None, condition: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        carried, captured = _divide(rest, captures)
        collected: list[list[Tensor]] = [[] for _ in range(node.outputs - len(carried))]
        going, iteration = condition is None or bool(condition), 0
        while going and (count is None or iteration < int(count)):
            result = body([torch.tensor(iteration), torch.tensor(going), *carried, *captured])
            going, carried = bool(result[0]), result[1 : 1 + len(carried)]
            for series, tensor in zip(collected, result[1 + len(carried) :], strict=True):
                series.append(tensor)
            iteration += 1
        return (*carried, *_stack(collected, nothing))

    return loop


def _scan(node: OpNode, body: Runnable, captures: int, nothing: Sequence[Tensor]) -> Call:
    scanned = node.get("num_scan_inputs")

    def scan(*given: Tensor) -> tuple[Tensor, ...]:
        inputs, captured = _divide(given, captures)
        states, sequences = inputs[: len(inputs) - scanned], inputs[len(inputs) - scanned :]
        outputs = node.outputs - len(states)
        along = _settings(node, "scan_input_axes", scanned), _settings(node, "scan_output_axes", outputs)
        back = _settings(node, "scan_input_directions", scanned), _settings(node, "scan_output_directions", outputs)
        moved = [s.movedim(axis, 0) for s, axis in zip(sequences, along[0], strict=True)]
        moved = [s.flip(0) if turn else s for s, turn in zip(moved, back[0], strict=True)]
        collected: list[list[Tensor]] = [[] for _ in range(outputs)]
        for elements in zip(*moved, strict=True):
            result = body([*states, *elements, *captured])
            states = result[: len(states)]
            for series, tensor in zip(collected, result[len(states) :], strict=True):
                series.append(tensor)
        stacked = [s.flip(0) if turn else s for s, turn in zip(_stack(collected, nothing), back[1], strict=True)]
        return (*states, *[s.movedim(0, axis) for s, axis in zip(stacked, along[1], strict=True)])

    return scan


def _settings(node: OpNode, name: str, count: int) -> Sequence[int]:
    return node.get(name) or [0] * count
