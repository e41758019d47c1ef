"""Models and inputs as files for the worker: structures in small ONNX files, all their weights once, in one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from optframe.errors import describe
from optframe.gate.region import Program
from optframe.snapshot import subgraphs
from optframe.types import Feeds
from optframe.worker import Arrays, Worker, WorkerFailure, save_arrays

WEIGHT_FILE = "weights.bin"
ALIGNMENT = 4096
"""Weights start at page boundaries, so that onnxruntime can map them instead of reading them."""

Place: TypeAlias = "tuple[int, int]"
"""Offset and length in the weight file."""


class Exchange:
    """Writes programs and inputs into the worker's folder, and has the worker run them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._places: dict[int, tuple[ir.TensorProtocol, Place]] = {}
        self._end = 0

    def save_feeds(self, feeds: Feeds) -> Path:
        """Write `feeds` to a file that `run` takes."""
        return save_arrays(self.worker.new_file(".npz"), feeds)

    def run(self, program: Program, feeds: Sequence[Path]) -> list[Arrays | str]:
        """Return, for each of `feeds`, the outputs of `program` in onnxruntime, or what went wrong, in one line.

        Raises:
            WorkerFailure: native code crashed, or took too long, or the program cannot be written.
        """
        try:
            path = self._write(program)
        except Exception as error:  # a full disk, a structure beyond protobuf's 2 GiB, a weight that cannot be read
            raise WorkerFailure(f"the model cannot be handed to the worker: {describe(error)}") from error
        try:
            return self.worker.run(path, feeds)
        finally:
            path.unlink()

    def _write(self, program: Program) -> Path:
        model = onnx.ModelProto()
        model.CopyFrom(program.proto)
        for name, tensor in program.weights.items():
            model.graph.initializer.append(self._reference(name, tensor))
        _drop_repeated_names(model.graph.node, set())
        path = self.worker.new_file(".onnx")
        path.write_bytes(model.SerializeToString())
        return path

    def _reference(self, name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
        """Return an initialiser that refers to the weight file."""
        if id(tensor) not in self._places:
            self._places[id(tensor)] = (tensor, self._append(tensor))  # kept alive, so that its id stays its own
        offset, length = self._places[id(tensor)][1]
        proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
        proto.data_location = onnx.TensorProto.EXTERNAL
        entries: Mapping[str, object] = {"location": WEIGHT_FILE, "offset": offset, "length": length}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    def _append(self, tensor: ir.TensorProtocol) -> Place:
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        content = tensor.tobytes()
        path = self.worker.folder / WEIGHT_FILE
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(offset)
            file.write(content)
        self._end = offset + len(content)
        return offset, len(content)


def _drop_repeated_names(nodes: Iterable[onnx.NodeProto], seen: set[str]) -> None:
    """Leave nodes without a name where another has it: ONNX allows them, onnxruntime does not."""
    for node in nodes:
        if node.name in seen:
            node.name = ""
        seen.add(node.name)
        for graph in subgraphs(node):
            _drop_repeated_names(graph.node, set())
