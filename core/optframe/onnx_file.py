"""ONNX files read and written without copies of their weights: protobuf's wire format, as far as that needs it.

Through protobuf's messages a weight is copied four times on its way to disk, and once more whenever it is looked at.
Here messages hold everything but the large initialisers of the main graph; those go straight between file and array.
What is written is byte for byte what protobuf would write.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, Any]
Buffer: TypeAlias = mmap.mmap | bytes

DIRECT_BYTES = 1 << 12
"""Initialisers up to this size go through protobuf, as everything else does."""

NUMERIC = frozenset(
    ir.DataType.from_numpy(np.dtype(code))
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
)
"""Types that numpy has: their raw data is an array's memory, on a machine that puts the low byte first."""

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; the two others, groups, are not in ONNX."""


class _Unusual(ValueError):
    """The bytes are no message, or one that is better left to protobuf itself."""


@dataclass(frozen=True)
class _Field:
    """A field of a message: where its tag begins, where its content begins and ends."""

    number: int
    wire_type: int
    start: int
    content: int
    end: int

    def holds(self, number: int) -> bool:
        """Whether it is field `number`, whose content is bytes."""
        if self.number == number and self.wire_type != _BYTES:
            raise _Unusual
        return self.number == number


def read(path: Path) -> ir.Model | None:
    """Return the model at `path`, large weights in arrays of their own; None if protobuf has to read the file.

    It has to where the file is damaged or unusual: then protobuf says what is wrong. Weights in other files stay there.

    Raises:
        OSError: the file cannot be read.
        google.protobuf.message.DecodeError: what is not weights is damaged.
    """
    if sys.byteorder != "little" or path.suffix != ".onnx" or not path.stat().st_size:
        return None
    with path.open("rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            skeleton, places = _without_weights(data)
            proto = onnx.ModelProto.FromString(skeleton)
            arrays = _read_arrays(file, proto.graph, places)
        except _Unusual:
            return None
    model = ir.serde.deserialize_model(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = _like(value.const_value, array)
    return model


def write(model: ir.Model, path: Path) -> None:
    """Write `model` to `path` as one file; large weights of its main graph that lie in other files come into it.

    Raises:
        OSError: the file cannot be written.
        google.protobuf.message.EncodeError: what protobuf has to write takes 2 GiB or more.
    """
    direct = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and _is_direct(value.const_value)
    }
    with _emptied(model.graph, direct):
        proto = ir.to_proto(model)
    names = [tensor.name for tensor in proto.graph.initializer]
    pieces = list(_with_weights(proto.graph.SerializeToString(), [direct.get(name) for name in names]))
    proto.ClearField("graph")
    head, tail = _split(proto.SerializeToString(), _GRAPH)
    with path.open("wb") as file:
        file.write(head + _prefix(_GRAPH, sum(map(len, pieces))))
        for piece in pieces:
            file.write(piece)
        file.write(tail)


def _is_direct(tensor: ir.TensorProtocol) -> bool:
    """Whether `tensor` has its content in memory, or in another file, just as it is to be written."""
    kinds = (ir.Tensor, ir.ExternalTensor) if sys.byteorder == "little" else ()
    return isinstance(tensor, kinds) and tensor.dtype in NUMERIC and tensor.nbytes > DIRECT_BYTES


def _like(old: ir.TensorProtocol | None, array: Array) -> ir.Tensor[Array]:
    assert old is not None, "an initialiser that was read has a tensor"
    return ir.Tensor(array, name=old.name, doc_string=old.doc_string, metadata_props=dict(old.metadata_props))


def _without_weights(data: Buffer) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """Return the model in `data` without the raw data of large initialisers: index -> where that begins and ends."""
    graphs = [field for field in _fields(data, 0, len(data)) if field.holds(_GRAPH)]
    if len(graphs) != 1:  # protobuf merges several into one
        raise _Unusual
    places: dict[int, tuple[int, int]] = {}
    pieces: list[bytes] = []
    copied, index = graphs[0].content, 0
    for field in _fields(data, graphs[0].content, graphs[0].end):
        if not field.holds(_INITIALIZER):
            continue
        raw = _raw_data(data, field) if field.end - field.start > DIRECT_BYTES else None
        if raw is not None:
            rest = data[field.content : raw.start] + data[raw.end : field.end]
            pieces += [data[copied : field.start], _prefix(_INITIALIZER, len(rest)), rest]
            places[index], copied = (raw.content, raw.end), field.end
        index += 1
    pieces.append(data[copied : graphs[0].end])
    graph = b"".join(pieces)
    return data[: graphs[0].start] + _prefix(_GRAPH, len(graph)) + graph + data[graphs[0].end :], places


def _raw_data(data: Buffer, tensor: _Field) -> _Field | None:
    """Return the raw data of an initialiser, None if there is none to speak of."""
    found = [field for field in _fields(data, tensor.content, tensor.end) if field.holds(_RAW_DATA)]
    return found[0] if len(found) == 1 and found[0].end - found[0].content > DIRECT_BYTES else None


def _read_arrays(file: FileIO, graph: onnx.GraphProto, places: Mapping[int, tuple[int, int]]) -> dict[str, Array]:
    """Return name -> content of the initialisers of `graph` at `places` in `file`."""
    names = {tensor.name for tensor in graph.initializer}
    if len(names) < len(graph.initializer) or "" in names:
        raise _Unusual
    arrays: dict[str, Array] = {}
    for index, (start, end) in places.items():
        tensor = graph.initializer[index]
        if tensor.data_type not in NUMERIC or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise _Unusual
        dtype = ir.DataType(tensor.data_type).numpy()
        if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) * dtype.itemsize != end - start:
            raise _Unusual
        arrays[tensor.name] = np.empty(tuple(tensor.dims), dtype)
        file.seek(start)
        if file.readinto(_bytes_of(arrays[tensor.name])) != end - start:
            raise _Unusual
    return arrays


@contextmanager
def _emptied(graph: ir.Graph, direct: Mapping[str, ir.TensorProtocol]) -> Iterator[None]:
    """Take the content of the `direct` initialisers away for a while; type, shape and what else they have stays."""
    try:
        for name, tensor in direct.items():
            graph.initializers[name].const_value = ir.LazyTensor(
                lambda: ir.Tensor(np.empty(0, np.uint8)),
                tensor.dtype,
                ir.Shape(tensor.shape.numpy()),
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
        yield
    finally:
        for name, tensor in direct.items():
            graph.initializers[name].const_value = tensor


def _with_weights(graph: bytes, tensors: Sequence[ir.TensorProtocol | None]) -> Iterator[bytes | memoryview]:
    """Yield the message `graph` in pieces, with the content of those initialisers for which there is a tensor."""
    copied = 0
    initializers = (field for field in _fields(graph, 0, len(graph)) if field.holds(_INITIALIZER))
    for field, tensor in zip(initializers, tensors, strict=True):
        if tensor is None:
            continue
        raw = next(inner for inner in _fields(graph, field.content, field.end) if inner.holds(_RAW_DATA))
        content = _bytes_of(tensor.numpy())
        before = graph[field.content : raw.start] + _prefix(_RAW_DATA, len(content))
        size = len(before) + len(content) + field.end - raw.end
        yield graph[copied : field.start] + _prefix(_INITIALIZER, size) + before
        yield content
        copied = raw.end
    yield graph[copied:]


def _bytes_of(array: Array) -> memoryview:
    """Return the memory of `array`, in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _split(message: bytes, number: int) -> tuple[bytes, bytes]:
    """Return the fields of `message` with numbers up to `number`, and those behind, as protobuf sorts them."""
    place = next((field.start for field in _fields(message, 0, len(message)) if field.number > number), len(message))
    return message[:place], message[place:]


def _fields(data: Buffer, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message in `data` between `start` and `end`."""
    position = start
    while position < end:
        tag, content = _varint(data, position, end)
        wire_type = tag & 7
        if wire_type == _VARINT:
            stop = _varint(data, content, end)[1]
        elif wire_type == _BYTES:
            length, content = _varint(data, content, end)
            stop = content + length
        elif wire_type in (_FIXED64, _FIXED32):
            stop = content + (8 if wire_type == _FIXED64 else 4)
        else:
            raise _Unusual
        if stop > end:
            raise _Unusual
        yield _Field(tag >> 3, wire_type, position, content, stop)
        position = stop


def _varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    """Return the number that begins at `position`, and where it ends."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise _Unusual


def _prefix(number: int, length: int) -> bytes:
    """Return what stands before the content, of `length` bytes, of field `number`."""
    return _encoded(number << 3 | _BYTES) + _encoded(length)


def _encoded(value: int) -> bytes:
    """Return `value` as a varint."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])
