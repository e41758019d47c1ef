"""The IPluginV3 plugin of an op, for TensorRT and TensorRT-RTX alike.

When a network is built the launch rule chooses a kernel for the shapes of each profile, NVRTC compiles it, and the PTX
goes into the serialised fields. In an engine the kernel comes from there, and the same rule says how to launch it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from optframe.cuda import PreparedLaunch
from optframe.errors import InputError, PluginError
from optframe.types import OpSpec, TensorInfo
from optframe_trt import dims, fields, kernels
from optframe_trt.calls import plugin_name
from optframe_trt.meaning import check_shapes, output_dtypes
from optframe_trt.registration import Registration, keep_errors

_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}
"""Our name of a dtype -> TensorRT's."""

_OUR_DTYPES = {theirs: ours for ours, theirs in _DTYPES.items()}


def trt_type(trt: Any, dtype: str) -> Any:
    """Return TensorRT's type for a dtype as specs spell it."""
    return getattr(trt.DataType, _DTYPES[dtype])


def our_dtype(kind: Any) -> str:
    """Return a TensorRT type as specs spell it."""
    name: str = kind.name
    return _OUR_DTYPES.get(name, name)


@cache
def plugin_class(trt: Any) -> Callable[..., Any]:
    """Return the class of plugins over a flavour's interfaces."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    return derived("Plugin", trt, PluginV3, bases)


def derived(name: str, trt: Any, ours: type, bases: Sequence[Any]) -> Callable[..., Any]:
    """Return a class with the methods of `ours` over the interfaces `bases`, each initialised as TensorRT asks."""

    def init(self: Any, *arguments: Any) -> None:
        for base in bases:
            base.__init__(self)
        ours.__init__(self, trt, *arguments)  # type: ignore[misc]

    return types.new_class(name, (ours, *bases), exec_body=lambda body: body.update({"__init__": init}))


class PluginV3:
    """One call of an op in a network, an engine, or an execution context: each has a clone.

    `call` is what the engine keeps of it, its inputs empty until they are counted; `dtypes` are those of the inputs,
    which a network under construction tells once, before shapes.
    """

    def __init__(
        self, trt: Any, spec: OpSpec, registration: Registration, call: fields.Kept, dtypes: tuple[str, ...] = ()
    ) -> None:
        self.trt = trt
        self.spec = spec
        self.registration = registration
        self.call = call
        self.dtypes = dtypes
        self.launch: PreparedLaunch | None = None
        self.plugin_name = plugin_name(spec)
        self.plugin_namespace = spec.domain
        self.plugin_version = str(spec.version)
        self.num_outputs = len(spec.outputs)
        self.metadata_string = spec.identifier
        self.timing_cache_id = ""

    @property
    def node(self) -> str:
        return self.call.node

    def get_capability_interface(self, kind: Any) -> Any:
        """Return the object that has the capability `kind`: all are this one's."""
        return self

    def clone(self) -> Any:
        """Return an equal plugin that shares nothing which changes."""
        return plugin_class(self.trt)(self.spec, self.registration, self.call, self.dtypes)

    def attach_to_context(self, context: Any) -> Any:
        """Return the plugin of an execution context."""
        return self.clone()

    @keep_errors
    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types, as the op's function has them; shapes are not known yet."""
        self.call = replace(self.call, inputs=self._present(len(types)))
        self.dtypes = tuple(map(our_dtype, types))
        dtypes = dict(zip(self.call.inputs, self.dtypes, strict=True))
        return [trt_type(self.trt, dtype) for dtype in output_dtypes(self.spec, dtypes, self.call.attributes)]

    def _present(self, count: int) -> tuple[str, ...]:
        """Return the names of the `count` inputs."""
        names = self.call.inputs or tuple(parameter.name for parameter in self.spec.inputs[:count])
        required = [p.name for p in self.spec.inputs if not p.optional and p.name not in names]
        if len(names) != count or required:
            wanted = ", ".join(f"[{p.name}]" if p.optional else p.name for p in self.spec.inputs)
            raise InputError(f"it has {count} inputs, the op takes {wanted}")
        return names

    @keep_errors
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """Return the outputs' shapes as expressions of the inputs', traced through the op's shape rule."""
        shapes = [[dim.get_constant_value() if dim.is_constant() else None for dim in shape] for shape in inputs]

        def rule(known: list[tuple[int, ...]]) -> tuple[TensorInfo, ...]:
            infos = [TensorInfo(shape, dtype) for shape, dtype in zip(known, self.dtypes, strict=True)]
            return self.spec.infer(self._spread(infos), self.call.attributes)

        algebra = _Expressions(self.trt, builder, inputs)
        outputs = dims.trace(rule, shapes)
        return [self.trt.DimsExprs([dims.express(dim, algebra) for dim in info.shape]) for info in outputs]

    @keep_errors
    def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
        """Say yes to row-major tensors of the types that the op takes; a network decides all types."""
        present = [parameter for parameter in self.spec.inputs if parameter.name in self.call.inputs]
        desc, parameter = tensors[position].desc, [*present, *self.spec.outputs][position]
        row_major: bool = desc.format == self.trt.TensorFormat.LINEAR
        return row_major and our_dtype(desc.type) in parameter.dtypes

    @keep_errors
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Compile the kernels for a profile's shapes, once rules and network are known to agree on them.

        They are the best for the optimal shapes, and one that does all; seldom are these two.
        """
        points: list[kernels.Call] = []
        for point in ("min", "opt", "max"):
            given, expected = ([self._info(d.desc, getattr(d, point)) for d in ds] for ds in (inputs, outputs))
            points.append((self._spread(given), expected))
        for infos, results in points:
            known = {p.name: info for p, info in zip(self.spec.inputs, infos, strict=True) if info is not None}
            check_shapes(self.spec, known, results, self.call.attributes)
        _, optimal, _ = points
        best = kernels.choose_launch(self.spec, optimal, self.call.attributes)
        for launch in (best, kernels.choose_for_profile(self.spec, points, self.call.attributes)):
            kernel = kernels.compile_kernel(self.spec, launch, self.registration.targets)
            if kernel not in self.call.kernels:
                self.call = replace(self.call, kernels=(*self.call.kernels, kernel))
        self.registration.note(self.node, self.call.kernels)

    @keep_errors
    def get_fields_to_serialize(self) -> Any:
        """Return what the engine keeps, PTX included."""
        if not self.call.kernels:
            raise PluginError("it is written to the engine before it was configured")
        collection, buffers = fields.write(self.trt, self.call)
        self.registration.buffers.append(buffers)
        return collection

    @keep_errors
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Evaluate the launch rule for the shapes, load the kernel, and lay out its arguments.

        The builder calls this too, on the GPU that it times tactics on.
        """
        self.launch = None  # whatever fails below, the launch for other shapes must not run
        given, expected = ([self._info(desc, desc.dims) for desc in descs] for descs in (inputs, outputs))
        call = self._spread(given), expected
        best = kernels.choose_launch(self.spec, call, self.call.attributes)
        for kernel in sorted(self.call.kernels, key=lambda each: not kernels.is_same(each, best)):
            launch = kernels.try_launch(self.spec, call, self.call.attributes, kernel)
            if launch is not None:
                self.launch = kernels.prepare(kernel, launch, len(given), len(expected))
                return
        found = kernels.differences([best, *self.call.kernels])
        raise InputError(
            f"the engine has no kernel for {kernels.texts(given)}: it was built for other shapes ({found})"
        )

    @keep_errors
    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on TensorRT's stream, as `on_shape_change` prepared it."""
        if self.launch is None:
            raise PluginError("it is run before it was told the shapes")
        self.launch(inputs, outputs, stream)

    def set_tactic(self, tactic: int) -> None:
        """Do nothing: there is one tactic."""

    def get_valid_tactics(self) -> list[int]:
        """Return no tactics beside the default one."""
        return []

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Return 0: kernels need no memory beside inputs and outputs."""
        return 0

    def _spread(self, present: Sequence[TensorInfo]) -> list[TensorInfo | None]:
        """Return what is known of the present inputs in the order of the op's parameters, None for the absent."""
        known = dict(zip(self.call.inputs, present, strict=True))
        return [known.get(parameter.name) for parameter in self.spec.inputs]

    def _info(self, desc: Any, shape: Sequence[int]) -> TensorInfo:
        return TensorInfo(tuple(shape), our_dtype(desc.type))


@dataclass(frozen=True)
class _Expressions:
    """Dimensions as expressions of a network under construction; `inputs` are the shapes of the plugin's inputs."""

    trt: Any
    builder: Any
    inputs: Sequence[Any]

    def leaf(self, leaf: dims.Leaf) -> Any:
        index, axis = leaf
        return self.inputs[index][axis]

    def constant(self, value: int) -> Any:
        return self.builder.constant(value)

    def operation(self, name: str, first: Any, second: Any) -> Any:
        return self.builder.operation(getattr(self.trt.DimensionOperation, name), first, second)
