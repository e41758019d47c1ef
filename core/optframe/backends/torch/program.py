"""A straight list of torch calls over numbered slots: what a graph is for one set of input shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optframe.backends.torch.registry import Call
from optframe.errors import InputError
from optframe.types import TensorInfo

_FAILURES = (RuntimeError, IndexError, ValueError, TypeError)
"""What torch raises for inputs that a call does not take."""


def perform(call: Call, inputs: Iterable[Tensor | None], op: str, node: str) -> tuple[Tensor, ...]:
    """Return the outputs of a call, which is the op of an ONNX node.

    Raises:
        InputError: it fails on its inputs, such as on an index that is out of range.
    """
    try:
        result = call(*inputs)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"backend torch cannot run {op} (node '{node}') on these inputs: {reason}") from error
    return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Step:
    """One call: `inputs` and `outputs` are slots, None an input left out; `node` is the ONNX node it comes from.

    `attributes` and `op` say what it computes, for those who look for steps that one call can do together; `opset` says
    which defaults missing attributes have.
    """

    op: str
    call: Call
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    node: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0

    def with_inputs(self, *inputs: int | None) -> Step:
        """Return the step reading other slots."""
        return replace(self, inputs=inputs)


@dataclass
class Program:
    """Steps with the constants they read. `fixed`: nothing in it depends on values, so a CUDA graph can hold it.

    `infos` tells shape and dtype of every slot, as it was when the program was made.
    """

    inputs: list[int]
    outputs: list[int]
    steps: list[Step]
    constants: dict[int, Tensor]
    infos: dict[int, TensorInfo]
    fixed: bool
    slots: int
    uncertain: set[int] = field(default_factory=set)
    """Slots whose shape depends on values: `infos` tells what it was once."""

    def is_certain(self, step: Step) -> bool:
        """Return whether all that the step makes, and so all that it reads, has the same shapes in each run."""
        return self.uncertain.isdisjoint(step.outputs)

    def new_slot(self, info: TensorInfo) -> int:
        """Return a slot that nothing uses yet, for a tensor such as `info`."""
        self.infos[self.slots] = info
        self.slots += 1
        return self.slots - 1

    def add_constant(self, tensor: Tensor) -> int:
        """Return a slot that holds `tensor`."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        slot = self.new_slot(TensorInfo(tuple(tensor.shape), dtype))
        self.constants[slot] = tensor
        return slot

    def readers(self) -> dict[int, list[int]]:
        """Return slot -> the positions of the steps that read it; an output of the program is read at the end."""
        found: dict[int, list[int]] = {}
        for position, step in enumerate(self.steps):
            for slot in step.inputs:
                if slot is not None:
                    found.setdefault(slot, []).append(position)
        for slot in self.outputs:
            found.setdefault(slot, []).append(len(self.steps))
        return found

    def remove_dead(self) -> None:
        """Take out steps whose results nobody reads, and constants likewise."""
        wanted = set(self.outputs)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if wanted.intersection(step.outputs):
                kept.append(step)
                wanted.update(slot for slot in step.inputs if slot is not None)
        self.steps = kept[::-1]
        self.constants = {slot: tensor for slot, tensor in self.constants.items() if slot in wanted}

    def finish(self) -> Executable:
        """Return what runs the program, each result dropped after its last reader."""
        last: dict[int, int] = {slot: position for slot, positions in self.readers().items() for position in positions}
        frees: list[list[int]] = [[] for _ in self.steps]
        for position, step in enumerate(self.steps):
            for slot in step.outputs:
                end = last.get(slot, position)
                if end < len(self.steps):
                    frees[end].append(slot)
        return Executable(self, [tuple(slots) for slots in frees])


class Executable:
    """Runs a program's steps in order."""

    def __init__(self, program: Program, frees: Sequence[tuple[int, ...]]) -> None:
        self.program = program
        self._plan = list(zip(program.steps, frees, strict=True))
        self._start: list[Tensor | None] = [program.constants.get(slot) for slot in range(program.slots)]

    def __call__(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the outputs for inputs of the shapes that the program was made for.

        Raises:
            InputError: a call fails on its inputs.
        """
        values = self._start.copy()
        for slot, tensor in zip(self.program.inputs, tensors, strict=True):
            values[slot] = tensor
        for step, free in self._plan:
            inputs = [None if slot is None else values[slot] for slot in step.inputs]
            for slot, result in zip(step.outputs, perform(step.call, inputs, step.op, step.node), strict=False):
                values[slot] = result
            for slot in free:
                values[slot] = None
        return [output for slot in self.program.outputs if (output := values[slot]) is not None]
