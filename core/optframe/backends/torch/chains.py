"""Chains of elementwise ops, reductions and views as one call each, compiled by torch where that pays.

Compilation costs a second or so for each different chain, the first time on a machine: torch keeps what it compiled in
its cache on disk, and chains that are alike share it. A chain runs compiled only if that was measured to be faster.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optframe.backends.torch import measure
from optframe.backends.torch.program import Executable, Program, Step
from optframe.backends.torch.registry import Call

VIEWS = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"))

ELEMENTWISE = frozenset(
    """Abs Neg Exp Log Sqrt Reciprocal Floor Ceil Round Sign Sin Cos Erf Not IsNaN Sigmoid Tanh Relu Softplus HardSwish
    Add Sub Mul Div Pow And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual Where Min Max Cast CastLike Clip
    LeakyRelu Elu Selu HardSigmoid Gelu PRelu Mish QuantizeLinear DequantizeLinear""".split()  # noqa: SIM905
)

REDUCTIONS = frozenset(
    """ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceSumSquare Softmax InstanceNormalization
    GroupNormalization LayerNormalization RMSNormalization BatchNormalization MaxPool AveragePool
    GlobalAveragePool""".split()  # noqa: SIM905
)

WORTH_ALONE = frozenset(("MaxPool", "InstanceNormalization", "GroupNormalization"))
"""Ops that torch's own kernels do slowly for tensors with channels last."""


def fuse_chains(program: Program) -> None:
    """Make one step of each set of steps that a compiler can do in few kernels, in place."""
    groups = _groups(program)
    chosen = {index: group for group in groups if _worth(program, group) for index in group}
    units: list[list[int]] = []
    for index in range(len(program.steps)):
        group = chosen.get(index)
        if group is None:
            units.append([index])
        elif group[0] == index:
            units.append(group)
    steps = [_chain(program, unit) if unit[0] in chosen else program.steps[unit[0]] for unit in units]
    program.steps = _sorted(steps)


def _worth(program: Program, group: Sequence[int]) -> bool:
    ops = [program.steps[index].op for index in group]
    return sum(op not in VIEWS for op in ops) > 1 or any(op in WORTH_ALONE for op in ops)


def _groups(program: Program) -> list[list[int]]:
    """Return sets of steps, each joined by its data, that nothing outside leads from and back into.

    Compiled code holds the shapes it was made for, so steps whose shapes depend on values stay as they are.
    """
    makers = {slot: index for index, step in enumerate(program.steps) for slot in step.outputs}
    group_of: dict[int, int] = {}
    members: list[list[int]] = []
    behind: list[set[int]] = []
    """For each step, the groups that it needs results of, whether straight or through other steps."""
    outside: dict[int, set[int]] = {}
    """For each group, the groups that its members need."""
    for index, step in enumerate(program.steps):
        sources = [makers[slot] for slot in step.inputs if slot in makers]
        needed = set[int]().union(*(behind[source] for source in sources))
        direct = {group_of[source] for source in sources if source in group_of}
        mine: int | None = None
        if step.op in VIEWS | ELEMENTWISE | REDUCTIONS and program.is_certain(step):
            mine = _joinable(direct, sources, behind, group_of, outside)
            if mine is None:
                mine = len(members)
                members.append([])
                outside[mine] = set()
            members[mine].append(index)
            group_of[index] = mine
            outside[mine] |= needed - {mine}
        behind.append(needed | ({mine} if mine is not None else set()))
    return members


def _joinable(
    direct: set[int],
    sources: Sequence[int],
    behind: Sequence[set[int]],
    group_of: dict[int, int],
    outside: dict[int, set[int]],
) -> int | None:
    """Return the latest group that a step may join: no input from elsewhere needs it, nor a group that needs it."""
    for group in sorted(direct, reverse=True):
        elsewhere = set[int]().union(*(behind[s] for s in sources if group_of.get(s) != group))
        if group not in elsewhere and not any(group in outside.get(other, set()) for other in elsewhere):
            return group
    return None


def _sorted(steps: Sequence[Step]) -> list[Step]:
    """Return the steps so that each comes after what it needs, else in the order given."""
    makers = {slot: index for index, step in enumerate(steps) for slot in step.outputs}
    done: set[int] = set()
    ordered: list[Step] = []

    for root in range(len(steps)):
        stack = [root]
        while stack:
            index = stack[-1]
            waiting = [makers[s] for s in steps[index].inputs if s in makers and makers[s] not in done]
            if index in done or not waiting:
                stack.pop()
                if index not in done:
                    done.add(index)
                    ordered.append(steps[index])
            else:
                stack.extend(waiting)
    return ordered


def _chain(program: Program, group: Sequence[int]) -> Step:
    """Return the step that does the group's work; constants read on the host go inside."""
    steps = [program.steps[index] for index in group]
    made = {slot for step in steps for slot in step.outputs}
    read = list(dict.fromkeys(s for step in steps for s in step.inputs if s is not None and s not in made))
    inside = {s: program.constants[s] for s in read if s in program.constants and _is_host(program.constants[s])}
    inputs = [slot for slot in read if slot not in inside]
    elsewhere = {s for i, step in enumerate(program.steps) if i not in set(group) for s in step.inputs}
    outputs = [s for step in steps for s in step.outputs if s in elsewhere or s in program.outputs]
    part = Program(inputs, outputs, steps, inside, program.infos, True, program.slots)
    name = ", ".join(dict.fromkeys(step.op for step in steps if step.op not in VIEWS))
    return Step("Chain", CompiledChain(part.finish()), tuple(inputs), tuple(outputs), f"{name} ({steps[-1].node})")


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


@dataclass
class CompiledChain:
    """Steps as one call: the first call, on real tensors, compiles them and keeps the faster form.

    `seconds` is what compiling cost, `eager_us` and `compiled_us` what was measured.
    """

    eager: Executable
    seconds: float = 0.0
    eager_us: float | None = None
    compiled_us: float | None = None
    _call: Call | None = field(default=None, repr=False)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._call is None:
            self._call = self._choose(tensors)
        result: tuple[Tensor, ...] = tuple(self._call(*tensors))
        return result

    def _plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.eager(tensors))

    def _choose(self, tensors: Sequence[Tensor]) -> Call:
        start = time.perf_counter()
        try:
            compiled = compile_chain(self._plain, tensors)
            compiled(*tensors)
        except Exception:  # a compiler fails in its own ways, and the chain runs without
            return self._plain
        self.seconds = time.perf_counter() - start
        if tensors and tensors[0].device.type == "cuda":
            self.eager_us = measure.microseconds(lambda: self._plain(*tensors))
            self.compiled_us = measure.microseconds(lambda: compiled(*tensors))
            if self.compiled_us is None or (self.eager_us is not None and self.eager_us <= self.compiled_us):
                return self._plain
        return compiled


def compile_chain(call: Call, tensors: Sequence[Tensor]) -> Call:
    """Return `call` compiled for tensors such as these; what it reads on the host is fixed by running it once."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.inference_mode(False), torch.no_grad():
        plain = [_ordinary(tensor) for tensor in tensors]
        graph: Any = make_fx(call)(*plain)
        compiled: Call = torch.compile(graph, dynamic=False, fullgraph=True)
    return compiled


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor with the same layout that is none of inference mode's, which cannot be traced."""
    stored = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    copy = torch.empty_strided(stored, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.as_strided(stored, tensor.stride())).expand(tensor.shape)


def chains(steps: Iterable[Step]) -> list[CompiledChain]:
    """Return the chains among the steps, for a report of what they cost and gained."""
    return [step.call for step in steps if isinstance(step.call, CompiledChain)]
