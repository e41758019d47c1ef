"""Runs a graph once and writes down a program for the shapes it met: shape arithmetic is done, branches are chosen.

A value is static if it follows from constants and from the shapes of the inputs alone; it is computed once, on the
host, and never again for these shapes. What is left is a straight list of calls. Where a shape or a branch depends on
values, the value is read on the host each time, and shapes behind it are computed each time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from optframe.backends.torch import control
from optframe.backends.torch.dtypes import info, torch_dtype
from optframe.backends.torch.program import Executable, Program, Step, perform
from optframe.backends.torch.registry import Call
from optframe.backends.torch.source import Body, Prepared

HOST = torch.device("cpu")

Signature = tuple[tuple[tuple[int, ...], torch.dtype, str], ...]

MOST_PROGRAMS = 16
"""How many sets of shapes a graph keeps programs for; the one used longest ago goes."""

Optimizer = Callable[[Program], None]
"""Changes a program in place into a faster one that computes the same."""


def signature(tensors: Iterable[Tensor]) -> Signature:
    """Return what a program depends on: shapes, dtypes and devices."""
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in tensors)


class Weights:
    """Constants on the device, each copied once whatever the number of programs that read it."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, tensor: Tensor, channels_last: bool) -> Tensor:
        """Return `tensor` on `device`, with channels as its innermost axis if asked."""
        key = (id(tensor), device, channels_last)
        if key not in self._copies:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            self._copies[key] = (tensor, tensor.to(device).contiguous(memory_format=layout))
        return self._copies[key][1]


class Function:
    """A body that programs itself for each signature; called with the parameters' tensors."""

    def __init__(
        self,
        body: Body,
        parameters: Sequence[ir.Value],
        static: Mapping[ir.Value, Tensor],
        device: torch.device,
        weights: Weights,
        optimize: Optimizer | None = None,
    ) -> None:
        self.body, self.parameters, self.device = body, list(parameters), device
        self.weights, self.optimize = weights, optimize
        self.static = {**static, **body.constants}
        self._programs: OrderedDict[Signature, Executable] = OrderedDict()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        key = signature(tensors)
        if key not in self._programs:
            return self._trace(tensors)[1]
        self._programs.move_to_end(key)
        return self._programs[key](tensors)

    def program(self, tensors: Sequence[Tensor]) -> Executable:
        """Return the program for tensors such as these, made by running it if there is none yet."""
        key = signature(tensors)
        if key not in self._programs:
            return self._trace(tensors)[0]
        self._programs.move_to_end(key)
        return self._programs[key]

    def _trace(self, tensors: Sequence[Tensor]) -> tuple[Executable, list[Tensor]]:
        tracer = _Tracer(self)
        program, outputs = tracer.run(tensors)
        if self.optimize is not None:
            self.optimize(program)
        program.remove_dead()
        executable = self._programs[signature(tensors)] = program.finish()
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return executable, outputs


def fold(body: Body) -> None:
    """Compute, once for all shapes, what follows from the body's constants alone; they become constants too.

    Raises:
        InputError: an op fails on its constants.
    """
    kept = []
    for prepared in body.nodes:
        inputs = [None if value is None else body.constants.get(value) for value in prepared.node.inputs]
        known = all(v is None or v in body.constants for v in prepared.node.inputs)
        if not known or prepared.call is None or prepared.node.domain:
            kept.append(prepared)
            continue
        for value, tensor in zip(prepared.node.outputs, _call(prepared, prepared.call, inputs), strict=False):
            body.constants[value] = tensor
    body.nodes = kept
    read = {value for prepared in kept for value in _reads(prepared)} | set(body.outputs)
    body.constants = {value: tensor for value, tensor in body.constants.items() if value in read}


def _reads(prepared: Prepared) -> list[ir.Value]:
    captured = [value for body in prepared.bodies.values() for value in body.captures]
    return [value for value in prepared.node.inputs if value is not None] + captured


def _call(prepared: Prepared, call: Call, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return perform(call, tensors, prepared.op.op_type, prepared.op.name)


def _nothing(value: ir.Value, device: torch.device) -> Tensor:
    """Return no elements of the shape and dtype that a body declares for its output; free dimensions are 0."""
    shape = [dim if isinstance(dim, int) else 0 for dim in value.shape or ()]
    dtype = torch.float32 if value.dtype is None else torch_dtype(value.dtype, f"'{value.name}'")
    return torch.empty((0, *shape), dtype=dtype, device=device)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.cpu()


class _Tracer:
    """What is known during one run: static values, tensors of the others with their slots, and the steps so far."""

    def __init__(self, function: Function) -> None:
        self._function, self._device = function, function.device
        self._static = dict(function.static)
        self._live: dict[ir.Value, Tensor] = {}
        self._slots: dict[ir.Value, int] = {}
        self._uncertain: set[ir.Value] = set()
        """Values whose shape depends on values."""
        self._constant_slots: dict[tuple[int, torch.device, bool], int] = {}
        self._program = Program([], [], [], {}, {}, True, 0)
        self._uses = _count_uses(function.body)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Program, list[Tensor]]:
        for value, tensor in zip(self._function.parameters, tensors, strict=True):
            self._define(value, tensor)
            self._program.inputs.append(self._slots[value])
        self._nodes(self._function.body.nodes)
        outputs = []
        for value in self._function.body.outputs:
            self._program.outputs.append(self._slot(value, self._device))
            outputs.append(self._live[value] if value in self._live else self._static[value].to(self._device))
        return self._program, outputs

    def _nodes(self, nodes: Sequence[Prepared]) -> None:
        for prepared in nodes:
            self._one(prepared)
            for value in _reads(prepared):
                self._uses[value] -= 1
                if self._uses[value] == 0:
                    self._live.pop(value, None)

    def _one(self, prepared: Prepared) -> None:
        inputs = prepared.node.inputs
        if prepared.is_shape and inputs[0] is not None and inputs[0] not in self._uncertain:
            assert prepared.call is not None
            self._static[prepared.node.outputs[0]] = prepared.call(self._tensor(inputs[0]))
        elif prepared.op.op_type == "If" and inputs[0] in self._static and prepared.call is None:
            self._inline(prepared, bool(self._static[inputs[0]]))
        elif prepared.bodies:
            self._control(prepared)
        elif all(value is None or value in self._static for value in inputs) and not prepared.node.domain:
            self._fold(prepared)
        else:
            self._record(prepared)

    def _tensor(self, value: ir.Value) -> Tensor:
        return self._static[value] if value in self._static else self._live[value]

    def _fold(self, prepared: Prepared) -> None:
        assert prepared.call is not None
        inputs = [None if value is None else self._static[value] for value in prepared.node.inputs]
        for value, tensor in zip(prepared.node.outputs, _call(prepared, prepared.call, inputs), strict=False):
            self._static[value] = tensor

    def _inline(self, prepared: Prepared, condition: bool) -> None:
        """Run the branch in place; the node's outputs are other names of the branch's."""
        body = prepared.bodies["then_branch" if condition else "else_branch"]
        self._static.update(body.constants)
        self._uses.update(_count_uses(body))
        self._nodes(body.nodes)
        for outer, inner in zip(prepared.node.outputs, body.outputs, strict=True):
            if inner in self._static:
                self._static[outer] = self._static[inner]
                continue
            self._live[outer], self._slots[outer] = self._live[inner], self._slots[inner]
            if inner in self._uncertain:
                self._uncertain.add(outer)

    def _control(self, prepared: Prepared) -> None:
        """Record a Loop, Scan or If that depends on values: its bodies become functions of what they capture."""
        captured = list(dict.fromkeys(v for body in prepared.bodies.values() for v in body.captures))
        running = [value for value in captured if value not in self._static]
        functions = {
            name: Function(body, [*body.inputs, *running], self._static, self._device, self._function.weights)
            for name, body in prepared.bodies.items()
        }
        nothing = [_nothing(value, self._device) for body in prepared.bodies.values() for value in body.outputs]
        call = control.build(prepared.op, functions, len(running), nothing)
        self._uncertain.update(prepared.node.outputs)
        self._append(prepared, call, [*prepared.node.inputs, *running], host=control.HOST_INPUTS[prepared.op.op_type])

    def _record(self, prepared: Prepared) -> None:
        assert prepared.call is not None
        inputs = prepared.node.inputs
        if prepared.data_shaped or any(value in self._uncertain for value in inputs):
            self._uncertain.update(prepared.node.outputs)
        self._append(prepared, prepared.call, inputs, prepared.host)

    def _append(self, prepared: Prepared, call: Call, inputs: Sequence[ir.Value | None], host: tuple[int, ...]) -> None:
        """Run a call and write it down as a step."""
        place = self._place(inputs, host)
        channels_last = prepared.op.op_type == "Conv" and place.type == "cuda"
        slots: list[int | None] = []
        tensors: list[Tensor | None] = []
        for index, value in enumerate(inputs):
            if value is None:
                slots.append(None)
                tensors.append(None)
                continue
            wanted = HOST if index in host else place
            if value in self._live and index in host:
                self._uncertain.update(prepared.node.outputs)
                self._program.fixed = False
            slot = self._slot(value, wanted, channels_last and index == 1)
            slots.append(slot)
            tensors.append(
                self._program.constants[slot] if slot in self._program.constants else self._live[value].to(wanted)
            )
        if prepared.data_shaped or prepared.bodies:
            self._program.fixed = False
        results = _call(prepared, call, tensors)
        for value, tensor in zip(prepared.node.outputs, results, strict=False):
            self._define(value, tensor)
        op = prepared.op
        outputs = tuple(self._slots[value] for value, _ in zip(prepared.node.outputs, results, strict=False))
        self._program.steps.append(Step(op.op_type, call, tuple(slots), outputs, op.name, op.attributes, op.opset))

    def _place(self, inputs: Sequence[ir.Value | None], host: tuple[int, ...]) -> torch.device:
        """Return the host if all that is computed, not constant, lies there, such as shapes that depend on values."""
        computed = [
            self._live[value] for i, value in enumerate(inputs) if value in self._live and i not in host and value
        ]
        on_host = bool(computed) and all(tensor.device.type == "cpu" for tensor in computed)
        return HOST if on_host else self._device

    def _define(self, value: ir.Value, tensor: Tensor) -> None:
        self._live[value] = tensor
        slot = self._slots[value] = self._program.new_slot(info(tensor))
        if value in self._uncertain:
            self._program.uncertain.add(slot)

    def _slot(self, value: ir.Value, wanted: torch.device, channels_last: bool = False) -> int:
        """Return the slot that holds the value on the device, after a step that moves it where need be."""
        if value not in self._static:
            return self._moved(value, wanted)
        tensor = self._static[value]
        channels_last = channels_last and tensor.ndim == 4
        key = (id(tensor), wanted, channels_last)
        if key not in self._constant_slots:
            held = self._function.weights.on(wanted, tensor, channels_last) if wanted != HOST else tensor
            self._constant_slots[key] = self._program.add_constant(held)
        return self._constant_slots[key]

    def _moved(self, value: ir.Value, wanted: torch.device) -> int:
        slot, tensor = self._slots[value], self._live[value]
        if tensor.device.type == wanted.type:
            return slot
        self._program.fixed = False
        moved = self._program.new_slot(self._program.infos[slot])
        device = wanted
        call = _to_host if wanted == HOST else lambda x: x.to(device)
        self._program.steps.append(Step("Move", call, (slot,), (moved,)))
        return moved


def _count_uses(body: Body) -> Counter[ir.Value]:
    """Return how often nodes read each value; what the body returns counts as read once more, after all else."""
    uses: Counter[ir.Value] = Counter(body.outputs)
    for prepared in body.nodes:
        uses.update(_reads(prepared))
    return uses
