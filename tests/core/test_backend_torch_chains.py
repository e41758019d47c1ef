"""Chains of the torch backend: grouping keeps what a program computes, on random programs; fused products on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from optframe.backends.torch import chains
from optframe.backends.torch.dtypes import info
from optframe.backends.torch.fused_calls import Linear, ParallelLinear
from optframe.backends.torch.program import Program, Step

CALLS = {"Add": torch.add, "Mul": torch.mul, "MatMul": torch.matmul, "Sigmoid": torch.sigmoid, "Transpose": Tensor.t}
BINARY = ("Add", "Mul", "MatMul")


def random_program(seed: int, size: int = 40) -> tuple[Program, Tensor]:
    """Return a program of elementwise steps with products of matrices among them, and an input for it."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((4, 4)))
    program = Program([0], [], [], {}, {0: info(x)}, True, 1)
    program.add_constant(torch.from_numpy(rng.standard_normal((4, 4))))
    for _ in range(size):
        op = str(rng.choice(list(CALLS)))
        inputs = tuple(int(i) for i in rng.integers(0, program.slots, 2 if op in BINARY else 1))
        program.steps.append(Step(op, CALLS[op], inputs, (program.new_slot(info(x)),)))
        if op in BINARY:  # keeps values small
            program.steps.append(Step("Sigmoid", torch.sigmoid, (program.slots - 1,), (program.new_slot(info(x)),)))
    program.outputs = [program.slots - 1, *(int(i) for i in rng.integers(2, program.slots, 12))]
    program.remove_dead()
    return program, x


@pytest.mark.parametrize("seed", range(30))
def test_grouping_keeps_what_a_program_computes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "compile_chain", lambda call, tensors: call)
    program, x = random_program(seed)
    expected, before = program.finish()([x]), len(program.steps)
    chains.fuse_chains(program)
    for tensor, wanted in zip(program.finish()([x]), expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)  # the same calls in another order
    assert len(program.steps) < before
    assert {step.op for step in program.steps} <= {"Chain", *CALLS}


def test_a_chain_that_does_not_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: object, tensors: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(chains, "compile_chain", fail)
    program, x = random_program(0)
    expected = program.finish()([x])
    chains.fuse_chains(program)
    for tensor, wanted in zip(program.finish()([x]), expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("x", [torch.ones(3, 1).expand(3, 4), torch.rand(4, 3).t(), torch.rand(3, 8)[:, ::2]])
def test_inputs_of_any_layout_are_compiled_for(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    compiled = chains.compile_chain(lambda tensor: (made.append(tensor), torch.exp(tensor))[1], [x])
    assert made[0].stride() == x.stride()
    torch.testing.assert_close(compiled(x), x.exp())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("addends", [(), ("bias",), ("other",), ("bias", "other")])
def test_a_linear_layer_adds_what_it_is_given(relu: bool, addends: tuple[str, ...]) -> None:
    x, w = torch.randn(2, 5, 3), torch.randn(3, 4)
    given = {"bias": torch.randn(4), "other": torch.randn(2, 5, 4)}
    expected = x.double() @ w.double() + sum(given[name].double() for name in addends)
    actual = Linear(relu)(x, w, *(given[name] if name in addends else None for name in ("bias", "other")))
    torch.testing.assert_close(actual.double(), expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)


def test_parallel_layers_are_the_layers_one_by_one() -> None:
    x, w, bias = torch.randn(2, 5, 3), torch.randn(2, 3, 4), torch.randn(2, 4)
    for y, matrix, vector in zip(ParallelLinear()(x, w, bias), w, bias, strict=True):
        torch.testing.assert_close(y, x @ matrix + vector)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("rows", "depth", "columns"), [(3350, 256, 256), (67, 100, 91), (1, 16, 4)])
def test_every_triton_form_computes_the_product(rows: int, depth: int, columns: int) -> None:
    from optframe.backends.torch.triton_linear import CONFIGS, linear

    x, w = (torch.randn(shape, device="cuda").half() for shape in ((rows, depth), (2, depth, columns)))
    bias, other = (torch.randn(shape, device="cuda").half() for shape in ((2, columns), (2, rows, columns)))
    exact = (x.double() @ w.double() + bias.double()[:, None] + other.double()).relu()
    for config in CONFIGS:
        actual = linear(config, x, w, bias, other, True)
        # FP16 rounds results to 2^-11; sums are float32
        assert ((actual.double() - exact).norm() / exact.norm()).item() < 1e-3, config
