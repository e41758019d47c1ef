"""Runners of backend `torch`: NumPy arrays in and out, on the CPU or on CUDA."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optframe.backends.inputs import ModelInput, check_feeds
from optframe.backends.runner import ClosableRunner
from optframe.backends.torch.dtypes import to_numpy, to_torch
from optframe.backends.torch.program import Executable
from optframe.backends.torch.trace import Function, Signature, signature
from optframe.errors import EnvironmentLacks
from optframe.types import Feeds, Outputs

Array = np.ndarray[Any, Any]

WARM_UP_RUNS = 2
"""Runs before a capture, in which libraries choose algorithms and allocate what no graph may."""


@contextmanager
def cuda_arithmetic(tf32: bool) -> Iterator[None]:
    """Let CUDA round factors of FP32 products to TF32 or not, and cuDNN measure its algorithms, for the time being.

    No gradients are kept.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before


class TorchRunner(ClosableRunner[Function]):
    """Runs a model's function on the CPU. Follows `optframe.backend.Runner`."""

    def __init__(self, function: Function, inputs: Sequence[ModelInput], outputs: Sequence[str], label: str) -> None:
        super().__init__(function)
        self._inputs, self._outputs, self._label = list(inputs), list(outputs), label

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference and return all outputs by name.

        Raises:
            InputError: names, dtypes or shapes of `feeds` are not those of the model, or an op fails on them.
            EnvironmentLacks: memory does not suffice.
        """
        function, arrays = self.loaded, check_feeds(feeds, self._inputs, self._label)
        with self._memory():
            outputs = self._execute(function, [to_torch(array) for array in arrays.values()])
        return dict(zip(self._outputs, outputs, strict=True))

    def _execute(self, function: Function, tensors: Sequence[Tensor]) -> list[Array]:
        with torch.inference_mode():
            return [to_numpy(tensor) for tensor in function(tensors)]

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(f"{self._label}: not enough memory on the GPU: use a smaller batch") from error


class CudaGraph:
    """A program in a CUDA graph of its own: inputs and outputs are fixed buffers."""

    def __init__(self, executable: Executable, tensors: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                executable(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = executable(self.inputs)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Copy `tensors` into the input buffers."""
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def replay(self) -> list[Tensor]:
        """Run on what the input buffers hold and return the output buffers, which the next run overwrites."""
        self._graph.replay()
        return self.outputs


class CudaRunner(TorchRunner):
    """Runs on CUDA, shapes with fixed programs in CUDA graphs. Follows `optframe.latency.DeviceRunner`.

    The last `graphs` sets of shapes keep theirs; 0 captures none.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[ModelInput],
        outputs: Sequence[str],
        label: str,
        *,
        tf32: bool = False,
        graphs: int = 4,
    ) -> None:
        super().__init__(function, inputs, outputs, label)
        self._tf32, self._most = tf32, graphs
        self._graphs: OrderedDict[Signature, CudaGraph] = OrderedDict()

    def _execute(self, function: Function, tensors: Sequence[Tensor]) -> list[Array]:
        with cuda_arithmetic(self._tf32):
            return [to_numpy(tensor) for tensor in self._step(function, tensors)()]

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy `feeds` to the GPU and return a function that runs on them and waits for the GPU.

        Raises:
            InputError: names, dtypes or shapes of `feeds` are not those of the model.
        """
        arrays = check_feeds(feeds, self._inputs, self._label)
        with cuda_arithmetic(self._tf32), self._memory():
            step = self._step(self.loaded, [to_torch(array) for array in arrays.values()])
            torch.cuda.synchronize()

        def run() -> None:
            with cuda_arithmetic(self._tf32):
                step()
            torch.cuda.synchronize()

        return run

    def _step(self, function: Function, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Return what runs on `tensors`, which are on the GPU or in a graph's buffers by then."""
        on_device = [tensor.to(function.device) for tensor in tensors]
        executable = function.program(on_device)
        if not self._most or not executable.program.fixed:
            return lambda: executable(on_device)
        graph = self._graph(executable, on_device)
        graph.load(on_device)
        return graph.replay

    def _graph(self, executable: Executable, tensors: Sequence[Tensor]) -> CudaGraph:
        key = signature(tensors)
        if key not in self._graphs:
            while len(self._graphs) >= self._most:
                self._graphs.popitem(last=False)
            self._graphs[key] = CudaGraph(executable, tensors)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._graphs.clear()
        torch.cuda.empty_cache()
