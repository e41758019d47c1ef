"""Plugin fields: the attributes that the ONNX parser hands over, and what an engine keeps of a plugin, PTX included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optframe.errors import EnvironmentLacks, InputError
from optframe.types import OpAttribute, OpSpec
from optframe_trt.kernels import CompiledKernel
from optframe_trt.nvrtc import Ptx

Value = float | int | str | tuple[int, ...] | tuple[float, ...]

HEADER = "optframe"
"""The field with everything but PTX, as JSON."""

INPUTS = "optframe_inputs"
"""The attribute of a node that names its inputs, where one that is absent comes before one that is present."""

_FORMAT = 1

FIELD_TYPES = {"float": "FLOAT32", "floats": "FLOAT32", "int": "INT32", "ints": "INT32", "string": "CHAR"}
"""TensorRT's type of an ONNX attribute; its parser makes int32 of int64."""


@dataclass(frozen=True)
class Kept:
    """What an engine keeps of a plugin: whose it is, what it was called with, and its kernels.

    `node` is the ONNX node's name, `inputs` are the names of the op's parameters that are present, `source` is the hash
    of the CUDA source.
    """

    op: str
    version: int
    node: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Value]
    source: str
    kernels: tuple[CompiledKernel, ...]


def declared(trt: Any, spec: OpSpec) -> tuple[Any, list[Any]]:
    """Return the collection of fields that the parser reads from a node of the op, and what keeps their names alive."""
    kinds = {name: FIELD_TYPES[attribute.type] for name, attribute in spec.attributes.items()} | {INPUTS: "CHAR"}
    nothing = np.array([])
    fields = [trt.PluginField(name, nothing, getattr(trt.PluginFieldType, kind)) for name, kind in kinds.items()]
    return trt.PluginFieldCollection(fields), [fields, nothing]


def check_readable(trt: Any) -> None:
    """Check that fields can be read: in the bindings of some versions NumPy 2 makes every element the first one.

    Raises:
        EnvironmentLacks: they cannot (seen with TensorRT 10.13.3.9 and NumPy 2.4; not with TensorRT 11.4).
    """
    array = np.arange(2, dtype=np.int32)
    field = trt.PluginField("check", array, trt.PluginFieldType.INT32)
    if not np.array_equal(field.data, array):
        reason = f"TensorRT {trt.__version__} cannot read plugin fields with NumPy {np.__version__}"
        raise EnvironmentLacks(f"{reason}: pip install 'numpy<2', or a later TensorRT")


def attributes(spec: OpSpec, fields: Iterable[Any]) -> dict[str, Value]:
    """Return the op's attributes from a node's fields; those left out have their defaults.

    Raises:
        InputError: one without a default is missing.
    """
    given = {field.name: field for field in fields}
    found = {
        name: _value(attribute.type, given[name]) if name in given else attribute.default
        for name, attribute in spec.attributes.items()
    }
    for name, value in found.items():
        if value is None:
            raise InputError(f"{spec.identifier} needs its attribute '{name}'")
    return found  # type: ignore[return-value]  # None is no longer there


def present_inputs(spec: OpSpec, fields: Iterable[Any]) -> tuple[str, ...] | None:
    """Return the names of the inputs that are present, as the node's attribute `INPUTS` has them, None without one."""
    for field in fields:
        if field.name == INPUTS:
            return tuple(filter(None, _text(field).split(",")))
    return None


def _value(kind: str, field: Any) -> Value:
    """Return a field's value; floats come back as the shortest decimals that stand for the same float32."""
    if kind == "string":
        return _text(field)
    array = np.asarray(field.data)
    values = tuple(float(str(v)) for v in array.astype(np.float32)) if "float" in kind else tuple(map(int, array))
    return values if kind in ("ints", "floats") else values[0]


def _text(field: Any) -> str:
    """Return a CHAR field's text, which the parser ends with a zero byte."""
    return bytes(np.asarray(field.data).tobytes()).rstrip(b"\0").decode()


def write(trt: Any, kept: Kept) -> tuple[Any, list[Any]]:
    """Return `kept` as a field collection: a JSON header, and each PTX as plain text. Equal input gives equal bytes.

    The fields point into the arrays that come second, which must outlive them: TensorRT reads them later, and keeps
    nothing alive.
    """
    header = {
        "format": _FORMAT,
        "op": kept.op,
        "version": kept.version,
        "node": kept.node,
        "inputs": kept.inputs,
        "attributes": kept.attributes,
        "source": kept.source,
        "kernels": [_kernel_header(kernel) for kernel in kept.kernels],
    }
    texts = {HEADER: json.dumps(header, sort_keys=True)}
    texts |= {f"ptx{number}": kernel.ptx.text for number, kernel in enumerate(kept.kernels)}
    arrays = {name: np.frombuffer(text.encode(), np.int8) for name, text in texts.items()}
    fields = [trt.PluginField(name, array, trt.PluginFieldType.CHAR) for name, array in arrays.items()]
    return trt.PluginFieldCollection(fields), [fields, *arrays.values()]


def _kernel_header(kernel: CompiledKernel) -> dict[str, object]:
    ptx = kernel.ptx
    return {
        "entry": kernel.entry,
        "defines": kernel.defines,
        "target": ptx.target,
        "isa": ptx.isa,
        "nvrtc": ptx.nvrtc,
        "sha256": kernel.sha256,
    }


def read(spec: OpSpec, fields: Iterable[Any]) -> Kept:
    """Return what `write` wrote for a plugin of the op.

    Raises:
        InputError: the fields are damaged, of another op or version of it, or of another format.
    """
    texts = {field.name: _text(field) for field in fields}
    try:
        header = json.loads(texts[HEADER])
        if header["format"] != _FORMAT:
            raise InputError(f"the engine's plugin {spec.identifier} was made by another optframe: build it again")
        kept = _kept(header, texts, spec.attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the engine's plugin {spec.identifier} is damaged ({error!r}): build it again") from error
    if (kept.op, kept.version) != (spec.identifier, spec.version):
        raise InputError(f"the engine holds {kept.op} {kept.version}, this is {spec.identifier} {spec.version}")
    for number, (kernel, wanted) in enumerate(zip(kept.kernels, header["kernels"], strict=True)):
        if kernel.sha256 != wanted["sha256"]:
            raise InputError(f"PTX {number} of the engine's plugin {spec.identifier} is damaged: build it again")
    return kept


def _kept(header: Mapping[str, Any], texts: Mapping[str, str], declared: Mapping[str, OpAttribute]) -> Kept:
    kernels = [_kernel(entry, texts[f"ptx{number}"]) for number, entry in enumerate(header["kernels"])]
    values = {
        name: tuple(value) if declared[name].type in ("ints", "floats") else value
        for name, value in header["attributes"].items()
    }
    texts_of = ("op", "version", "node")
    op, version, node = (header[name] for name in texts_of)
    return Kept(op, version, node, tuple(header["inputs"]), values, header["source"], tuple(kernels))


def _kernel(header: Mapping[str, Any], text: str) -> CompiledKernel:
    defines = tuple((str(name), str(value)) for name, value in header["defines"])
    isa, nvrtc = (_pair(header[name]) for name in ("isa", "nvrtc"))
    return CompiledKernel(header["entry"], defines, Ptx(text, int(header["target"]), isa, nvrtc))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    major, minor = values
    return int(major), int(minor)
