"""Run by test_aot.py in a process of its own, whose `tensorrt` is the real bindings over libraries without contents.

What comes from those libraries at run time is replaced here: the registry, and expressions of dimensions, which can be
evaluated instead. Signatures, types, and all that `tensorrt.plugin` does in Python is the real thing.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import tensorrt as trt

SIZES = {"N": (1, 2, 5), "L": (3, 7, 100)}
"""Dynamic dimensions, and their sizes in a profile."""


class Expression:
    """An integer that depends on sizes by name."""

    def __init__(self, value: Callable[[Mapping[str, int]], int], constant: bool = False) -> None:
        self.value = value
        self.constant = constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value({})


class Builder:
    def constant(self, value: int) -> Expression:
        return Expression(lambda _: value, constant=True)

    def operation(self, kind: Any, first: Expression, second: Expression) -> Expression:
        apply = {
            trt.DimensionOperation.SUM: operator.add,
            trt.DimensionOperation.SUB: operator.sub,
            trt.DimensionOperation.PROD: operator.mul,
            trt.DimensionOperation.FLOOR_DIV: operator.floordiv,
            trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
        }[kind]
        return Expression(lambda at: apply(first.value(at), second.value(at)), first.constant and second.constant)


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))

    @property
    def all_creators(self) -> list[Any]:
        return list(self.creators.values())

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True


class SymbolicArgument:
    """Stands for ISymExpr."""


class Arguments(dict[int, Any]):
    """Stands for ISymExprs."""

    nbSymExprs = 0


class Launch:
    """Stands for IKernelLaunchParams."""

    grid_x: Any
    grid_y: Any
    grid_z: Any
    block_x: Any
    block_y: Any
    block_z: Any
    shared_mem: Any


registry = Registry()
trt.get_plugin_registry = lambda: registry
trt.IDimensionExpr = Expression
trt.DimsExprs = lambda length: [None] * length
trt.ISymExpr = SymbolicArgument

import onnx_ir as ir  # noqa: E402
import tensorrt.plugin  # noqa: E402  # only now, since its classes derive from what was replaced

from optframe import ops  # noqa: E402
from optframe.errors import EnvironmentLacks, OptframeError  # noqa: E402
from optframe.types import KernelLaunch, OpSpec, TensorInfo  # noqa: E402
from optframe_anchordetr.ops import LAYER_NORM, RCDA, SKIP_LAYER_NORM  # noqa: E402
from optframe_trt import aot, calls, creators, flavours, kernels, testing  # noqa: E402
from optframe_trt.meaning import onnx_type  # noqa: E402
from optframe_trt.plugin_v3 import trt_type  # noqa: E402

Shape = tuple[int | str, ...]
Inputs = Mapping[str, tuple[Shape, str]]


def at(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in shape)


def infos(spec: OpSpec, inputs: Inputs, sizes: Mapping[str, int]) -> list[TensorInfo | None]:
    return [
        TensorInfo(at(inputs[p.name][0], sizes), inputs[p.name][1]) if p.name in inputs else None for p in spec.inputs
    ]


def model_of(spec: OpSpec, inputs: Inputs, attributes: Mapping[str, Any]) -> ir.Model:
    values = {n: ir.val(n, onnx_type(dtype), shape) for n, (shape, dtype) in inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=8)
    graph.append(ops.call(model, spec, [values.get(p.name) for p in spec.inputs], attributes))
    return model


def described(shape: Sequence[Shape], dtype: str) -> Any:
    """A tensor with its minimal, optimal and maximal shapes; -1 where they differ."""
    desc = trt.DynamicPluginTensorDesc()
    low, usual, high = shape
    desc.min, desc.opt, desc.max = (trt.Dims(s) for s in (low, usual, high))
    inner = trt.PluginTensorDesc()
    inner.dims = trt.Dims([a if a == b else -1 for a, b in zip(low, high, strict=True)])
    inner.type, inner.format = trt_type(trt, dtype), trt.TensorFormat.LINEAR
    desc.desc = inner
    return desc


class Network:
    """A plugin in a network, from its creator to its kernel: the calls that TensorRT makes, in their order."""

    def __init__(self, flavour: flavours.Flavour, spec: OpSpec, inputs: Inputs, attributes: Mapping[str, Any]) -> None:
        self.spec, self.inputs = spec, inputs
        self.points = [{name: sizes[i] for name, sizes in SIZES.items()} for i in range(3)]
        self.builder = Builder()
        self.shapes = [[self._expression(size) for size in shape] for shape, _ in inputs.values()]
        model = model_of(spec, inputs, attributes)
        self.registration = aot.register(flavour, [spec], ["sm89"], model)
        assert calls.prepare(model, [spec], aot=True) == 1
        self.node = model.graph[0]
        self.attributes = {name: self.node.attributes[name].value for name in spec.attributes}
        self.plugin = self._create()

    def _expression(self, size: int | str) -> Expression:
        return Expression(lambda at: at[size]) if isinstance(size, str) else self.builder.constant(size)

    def _create(self) -> Any:
        namespace, name = self.node.attributes["plugin_namespace"].as_string(), self.node.op_type
        arrays = {
            name: np.asarray([value], np.float32 if isinstance(value, float) else np.int32)
            for name, value in self.attributes.items()
        }
        kinds = {name: getattr(trt.PluginFieldType, array.dtype.name.upper()) for name, array in arrays.items()}
        fields = [trt.PluginField(name, array, kinds[name]) for name, array in arrays.items()]
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        creator = registry.get_creator(name, "1", namespace)
        collection = trt.PluginFieldCollection(fields)
        return creator.create_plugin(name, namespace, collection, trt.TensorRTPhase.BUILD, request)

    def outputs(self, point: Mapping[str, int]) -> Sequence[TensorInfo]:
        return self.spec.infer(infos(self.spec, self.inputs, point), self.attributes)

    def infer(self) -> None:
        """Types and shapes of the outputs are those of the op's shape rule."""
        types = [trt_type(trt, dtype) for _, dtype in self.inputs.values()]
        out_types = self.plugin.get_output_data_types(types, [len(shape) for shape, _ in self.inputs.values()])
        out_shapes = self.plugin.get_output_shapes(self.shapes, [], self.builder)
        for point in self.points:
            found = [tuple(size.value(point) for size in shape) for shape in out_shapes]
            assert found == [info.shape for info in self.outputs(point)]
        assert out_types == [trt_type(trt, info.dtype) for info in self.outputs(self.points[0])]

    def described(self) -> list[Any]:
        """The inputs and outputs in the profile."""
        found = [described([at(shape, p) for p in self.points], dtype) for shape, dtype in self.inputs.values()]
        for number, info in enumerate(self.outputs(self.points[0])):
            found.append(described([self.outputs(p)[number].shape for p in self.points], info.dtype))
        return found

    def configure(self) -> tuple[Launch, Arguments]:
        """Choose types and tactic, and ask for the launch."""
        tensors, count = self.described(), len(self.inputs)
        combinations = self.plugin.get_supported_format_combinations(tensors, count)
        assert [c.type for c in combinations] == [tensor.desc.type for tensor in tensors]
        assert {c.format for c in combinations} == {trt.TensorFormat.LINEAR}
        self.plugin.configure_plugin(tensors[:count], tensors[count:])
        assert self.plugin.get_valid_tactics() == []
        self.plugin.set_tactic(0)
        launch, arguments = Launch(), Arguments()
        self.plugin.get_launch_params(self.shapes, tensors, count, launch, arguments, self.builder)
        entry, ptx = self.plugin.get_kernel([t.desc for t in tensors[:count]], [t.desc for t in tensors[count:]])
        assert f".entry {entry}(" in ptx.decode()
        return launch, arguments


def check_aot(flavour: flavours.Flavour, spec: OpSpec, inputs: Inputs, attributes: Mapping[str, Any]) -> str:
    """Compare the launch that TensorRT would make with the op's rule, at shapes in the profile; return the plugin."""
    network = Network(flavour, spec, inputs, attributes)
    network.infer()
    launch, arguments = network.configure()
    assert spec.kernel is not None
    [[kernel]] = network.registration.kernels.values()
    for point in [*network.points, {"N": 3, "L": 41}]:
        wanted = kernels.reuse_launch(spec, (infos(spec, inputs, point), network.outputs(point)), attributes, kernel)
        names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        found = [getattr(launch, name).expr.value(point) for name in names]
        assert found == [*wanted.grid, *wanted.block, wanted.shared_bytes]
        assert [arguments[i].expr.value(point) for i in range(arguments.nbSymExprs)] == [*wanted.extras]
    assert not network.registration.errors
    return f"{network.node.attributes['plugin_namespace'].as_string()}::{network.node.op_type}"


def capped_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]
) -> KernelLaunch:
    """LayerNorm's launch, but never of more than 64 blocks, which is no expression in + - * //."""
    assert LAYER_NORM.kernel is not None
    launch = LAYER_NORM.kernel.launch_rule()(inputs, outputs, attributes)
    return replace(launch, grid=(min(launch.grid[0], 64), 1, 1))


def capped_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    function = LAYER_NORM.build_function(opset, dtypes)
    function.name = "Capped"
    return function


def exact_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    function = RCDA.build_function(opset, dtypes)
    function.name = "Exact"
    return function


def check_refusal(flavour: flavours.Flavour, spec: OpSpec, inputs: Inputs, attributes: Mapping[str, Any]) -> str:
    """Return why a plugin cannot be compiled ahead of time; the error is kept as well."""
    network = Network(flavour, spec, inputs, attributes)
    network.infer()
    try:
        network.configure()
    except OptframeError as error:
        [kept] = network.registration.errors
        return f"{kept.node}: {error}" if kept.error is error else "another error was kept"
    return "nothing was refused"


def check_creator(flavour: flavours.Flavour) -> str:
    """The plugin that runs in Python: made, configured, serialised, and made again; return whether that works here."""
    try:
        creators.register(flavour, [LAYER_NORM], ["sm89"])
    except EnvironmentLacks as reason:
        return str(reason)
    inputs: Inputs = {"x": ((2, 3, 8), "float16"), "bias": ((8,), "float32")}
    attributes = {"epsilon": 1e-5}
    given = infos(LAYER_NORM, inputs, {})
    outputs = LAYER_NORM.infer(given, attributes)
    assert LAYER_NORM.kernel is not None
    launch = LAYER_NORM.kernel.launch_rule()(given, outputs, attributes)
    arrays = {name: np.zeros(at(shape, {}), onnx_type(dtype).numpy()) for name, (shape, dtype) in inputs.items()}
    plugin = testing.built_plugin(flavour, testing.Case(LAYER_NORM, arrays, attributes, outputs, launch))
    assert testing.loaded_plugin(flavour, plugin).call == plugin.call
    assert plugin.call.attributes == attributes
    return "works"


def main() -> int:
    flavour = flavours.load("tensorrt")
    in_python = check_creator(flavour)
    x, vector = ("N", "L", 256), (256,)
    epsilon = {"epsilon": 1e-5}
    half = "float16"
    checked = [
        check_aot(flavour, LAYER_NORM, {"x": (x, half), "scale": (vector, "float32"), "bias": (vector, half)}, epsilon),
        check_aot(flavour, LAYER_NORM, {"x": (x, "bfloat16"), "bias": (vector, "bfloat16")}, epsilon),
        check_aot(flavour, SKIP_LAYER_NORM, {"x": (x, "float32"), "skip": (x, "float32")}, epsilon),
        check_aot(
            flavour,
            RCDA,
            {
                **dict.fromkeys(("q_row", "q_col"), (("N", "L", 64), half)),
                **{"k_row": (("N", 7, 64), half), "k_col": (("N", 6, 64), half), "v": (("N", 6, 7, 64), half)},
                "row_mask": (("N", 7), "bool"),
            },
            {"num_heads": 2},
        ),
    ]
    sys.modules["capped"] = ModuleType("capped")
    vars(sys.modules["capped"])["launch"] = capped_launch
    assert LAYER_NORM.kernel is not None
    capped = replace(LAYER_NORM, name="Capped", kernel=replace(LAYER_NORM.kernel, launch="capped:launch", reuse=""))
    capped = replace(capped, function="capped:function")
    vars(sys.modules["capped"])["function"] = capped_function
    vars(sys.modules["capped"])["exact_function"] = exact_function
    print(check_refusal(flavour, capped, {"x": (x, half)}, epsilon))
    keys = {"k_row": (("N", "L", 64), half), "k_col": (("N", 6, 64), half), "v": (("N", 6, "L", 64), half)}
    queries = dict.fromkeys(("q_row", "q_col"), (("N", 9, 64), half))
    assert RCDA.kernel is not None
    exact = replace(RCDA, name="Exact", kernel=replace(RCDA.kernel, reuse=""), function="capped:exact_function")
    print(check_refusal(flavour, exact, {**queries, **keys}, {"num_heads": 2}))
    checked.append(check_aot(flavour, RCDA, {**queries, **keys}, {"num_heads": 2}))
    print(trt.__version__, np.__version__, in_python, *checked, sep=";")
    return 0


if __name__ == "__main__":
    sys.exit(main())
