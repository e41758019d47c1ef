"""Runs the TensorRT plugins of Anchor DETR's ops on a GPU as TensorRT would, and checks what they compute.

TensorRT-RTX is imported, not run: the plugins are made by creators that its registry hands out, configured, written to
fields, made again from those, told shapes, and enqueued on device addresses. Results are compared with float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optframe.errors import OptframeError
from optframe.types import OpSpec, TensorInfo
from optframe_anchordetr.ops import LAYER_NORM, RCDA, SKIP_LAYER_NORM
from optframe_trt import creators, driver, flavours, testing

Array = np.ndarray[Any, Any]

HEADS = 8
ROUNDINGS = 32  # as in `optframe.testing`: a dozen roundings of float32 and one of the result, with room
ENQUEUES = 200


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5) -> Array:
    deviation = x - x.mean(-1, keepdims=True)
    y = deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def skip_layer_norm(x: Array, skip: Array, epsilon: float = 1e-5, **parameters: Array) -> list[Array]:
    return [layer_norm(x + skip, epsilon=epsilon, **parameters), x + skip]


def attention(q: Array, k: Array, mask: Array | None, heads: int) -> Array:
    scores = np.einsum("nlhd,nkhd->nhlk", *(a.reshape(*a.shape[:2], heads, a.shape[2] // heads) for a in (q, k)))
    scores = scores if mask is None else np.where(mask[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rcda(q_row: Array, q_col: Array, k_row: Array, k_col: Array, v: Array, num_heads: int, **masks: Array) -> Array:
    row = attention(q_row, k_row, masks.get("row_mask"), num_heads)
    column = attention(q_col, k_col, masks.get("column_mask"), num_heads)
    values = v.reshape(*v.shape[:3], num_heads, -1)
    return np.einsum("nhly,nhlx,nyxhd->nlhd", column, row, values).reshape(q_row.shape)


def draw_norm(spec: OpSpec, rows: int, columns: int) -> testing.Draw:
    def draw(rng: np.random.Generator) -> Mapping[str, Array]:
        shapes = {"x": (2, rows, columns), "skip": (2, rows, columns), "scale": (columns,), "bias": (columns,)}
        return {p.name: rng.standard_normal(shapes[p.name]) for p in spec.inputs}

    return draw


def draw_rcda(queries: int, height: int, width: int, masks: bool) -> testing.Draw:
    def draw(rng: np.random.Generator) -> Mapping[str, Array]:
        n, c = 2, 32 * HEADS
        shapes = {"q_row": (queries,), "q_col": (queries,), "k_row": (width,), "k_col": (height,), "v": (height, width)}
        # Scores of 32 channels deviate by about 2: neither flat nor one key alone.
        inputs: dict[str, Array] = {name: rng.standard_normal((n, *s, c)) * 0.6 for name, s in shapes.items()}
        if masks:
            for name, keys in (("row_mask", width), ("column_mask", height)):
                inputs[name] = rng.random((n, keys)) < 0.3
                inputs[name][:, 0] = False
        return inputs

    return draw


@dataclass(frozen=True)
class Problem:
    spec: OpSpec
    draw: testing.Draw
    reference: testing.Reference
    attributes: Mapping[str, Any]


PROBLEMS = (
    *(
        Problem(spec, draw_norm(spec, rows, columns), reference, {"epsilon": 1e-5})
        for rows, columns in ((3350, 256), (7, 255), (33, 1), (5, 9001), (0, 256))
        for spec, reference in ((LAYER_NORM, layer_norm), (SKIP_LAYER_NORM, skip_layer_norm))
    ),
    *(
        Problem(RCDA, draw_rcda(*sizes), rcda, {"num_heads": HEADS})
        for sizes in ((900, 25, 34, False), (850, 25, 34, True), (37, 7, 5, True))
    ),
)


def to_device(array: Array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # NumPy's is a package's, which torch does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def to_host(tensor: torch.Tensor, info: TensorInfo) -> Array:
    if info.dtype == "bfloat16":
        return tensor.float().cpu().numpy()
    array: Array = tensor.cpu().numpy()
    return array


class Execution:
    """A plugin, as an execution context has it, on inputs and poisoned outputs in device memory."""

    def __init__(self, flavour: flavours.Flavour, plugin: Any, case: testing.Case) -> None:
        self.case = case
        self.plugin = plugin
        self.inputs = [to_device(array) for array in case.inputs.values()]
        self.outputs = [
            torch.full(info.shape, torch.nan, dtype=getattr(torch, info.dtype), device="cuda") for info in case.outputs
        ]
        present = [info for info in case.infos if info is not None]
        self.descs = [[testing.descriptor(flavour.module, i) for i in infos] for infos in (present, case.outputs)]
        plugin.on_shape_change(*self.descs)

    def enqueue(self, stream: torch.cuda.Stream) -> None:
        addresses = ([tensor.data_ptr() for tensor in tensors] for tensors in (self.inputs, self.outputs))
        self.plugin.enqueue(*self.descs, *addresses, 0, stream.cuda_stream)

    def poison(self) -> None:
        for output in self.outputs:
            output.fill_(torch.nan)

    def check(self, expected: list[Array]) -> None:
        torch.cuda.synchronize()
        actual = [to_host(o, info) for o, info in zip(self.outputs, self.case.outputs, strict=True)]
        testing.assert_outputs_close(self.case, actual, expected, ROUNDINGS)


def on_default_stream(execution: Execution) -> None:
    execution.enqueue(torch.cuda.default_stream())


def on_other_stream(execution: Execution) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    execution.enqueue(stream)


def in_graph(execution: Execution) -> None:
    """Capture, empty the outputs, and replay: what is there then came from the replay."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        execution.enqueue(torch.cuda.current_stream())
    execution.poison()
    graph.replay()


def many_times(execution: Execution) -> None:
    """No memory of the device is taken, nor of torch's, whose allocator is the only other user."""
    torch.cuda.synchronize()
    before = driver.free_bytes(), torch.cuda.memory_allocated()
    for _ in range(ENQUEUES):
        execution.enqueue(torch.cuda.current_stream())
    torch.cuda.synchronize()
    after = driver.free_bytes(), torch.cuda.memory_allocated()
    assert before == after, f"{execution.case}: {ENQUEUES} launches took memory: {before} {after}"


WAYS: tuple[Callable[[Execution], None], ...] = (on_default_stream, on_other_stream, in_graph, many_times)


def check_problem(flavour: flavours.Flavour, problem: Problem, rng: np.random.Generator) -> Iterator[testing.Case]:
    """Check every dtype and mixture of a problem in every way of running; yield what was checked."""
    registration = creators.register(flavour, [problem.spec], [driver.compute_capability()])
    for case in testing.draw_cases(problem.spec, problem.draw, rng, problem.attributes, 1):
        plugin = testing.loaded_plugin(flavour, testing.built_plugin(flavour, case))
        expected = case.expected(problem.reference)
        execution = Execution(flavour, plugin, case)
        for way in WAYS:
            execution.poison()
            way(execution)
            execution.check(expected)
        registration.raise_errors()
        yield case


def check_shape_changes(flavour: flavours.Flavour, rng: np.random.Generator) -> None:
    """One plugin runs other numbers of rows, also none; a shape that its kernel was not built for is an error."""
    registration = creators.register(flavour, [LAYER_NORM], [driver.compute_capability()])
    drawn = [next(testing.draw_cases(LAYER_NORM, draw_norm(LAYER_NORM, r, 256), rng, {}, 1)) for r in (64, 3, 0, 65)]
    plugin = testing.loaded_plugin(flavour, testing.built_plugin(flavour, drawn[0]))
    for case in drawn:
        execution = Execution(flavour, plugin, case)
        on_default_stream(execution)
        execution.check(case.expected(layer_norm))
    other = next(testing.draw_cases(LAYER_NORM, draw_norm(LAYER_NORM, 64, 128), rng, {}, 1))
    refusal = ""
    try:
        Execution(flavour, plugin, other)
    except OptframeError as error:
        refusal = str(error)
    assert "no kernel for" in refusal, f"a shape without a kernel was accepted: {refusal!r}"
    assert [kept.node for kept in registration.errors] == ["node"], "the error was not kept with its node"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU is available to torch: nothing was checked")
        return 0
    torch.zeros(1, device="cuda")  # makes the context that everything runs in
    flavour = flavours.load("tensorrt-rtx")
    rng = np.random.default_rng(arguments.seed)
    checked = 0
    for problem in PROBLEMS:
        for case in check_problem(flavour, problem, rng):
            checked += 1
            print(case, flush=True)
    check_shape_changes(flavour, rng)
    device = torch.cuda.get_device_name()
    ways = ", ".join(way.__name__ for way in WAYS)
    print(f"{checked} calls checked against float64, each {ways}; {flavour.name} {flavour.version}, {device}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
