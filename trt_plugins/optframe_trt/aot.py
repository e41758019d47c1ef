"""Ahead-of-time plugins of ops for full TensorRT (`tensorrt.plugin`, 10.9 on): engines without Python or our library.

TensorRT asks once, at build time, for the kernel's PTX, its grid and its int32 arguments as expressions of dimensions,
and launches it by itself afterwards. Everything else that a kernel depends on is baked into its source by defines.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optframe.errors import EnvironmentLacks, PluginError
from optframe.types import KernelLaunch, OpSpec, TensorInfo
from optframe_trt import calls, dims, fields, kernels
from optframe_trt.fields import Value
from optframe_trt.flavours import Flavour
from optframe_trt.meaning import check_shapes, output_dtypes
from optframe_trt.plugin_v3 import our_dtype, trt_type
from optframe_trt.registration import Registration, keep_errors

_ANNOTATIONS: Mapping[str, Any] = {
    "float": npt.NDArray[np.float32],
    "int": npt.NDArray[np.int32],
    "string": str,
    "ints": npt.NDArray[np.int32],
    "floats": npt.NDArray[np.float32],
}
"""Numbers are declared as arrays, which have the types that the parser makes of ONNX attributes; `float` is 64 bits."""

_AUTOTUNE_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
"""Names of dtypes in `AutoTuneCombination`; those of the others are their own in capitals."""


def register(flavour: Flavour, specs: Sequence[OpSpec], targets: Sequence[str | int], model: ir.Model) -> Registration:
    """Declare the plugins of all calls of the ops in `model`, one for each choice of present inputs.

    Afterwards `calls.prepare(model, specs, aot=True)` makes the calls theirs. Kernels are compiled for the compute
    capabilities `targets` when the build asks for them. A plugin declared before is used again.

    Raises:
        EnvironmentLacks: the flavour has no ahead-of-time plugins, or cannot read attributes of several elements.
        InputError: an op has no kernel, or a target is none.
        PluginError: TensorRT refuses a declaration.
    """
    if not flavour.can.aot_plugins:
        raise EnvironmentLacks(f"{flavour.name} {flavour.version} has no ahead-of-time plugins: use backend tensorrt")
    api = importlib.import_module(f"{flavour.module.__name__}.plugin")
    registration = Registration(tuple(sorted(map(kernels.capability, targets))))
    for node, spec in calls.calls(model, specs):
        kernels.kernel_of(spec)
        if any(attribute.type not in ("float", "int") for attribute in spec.attributes.values()):
            fields.check_readable(flavour.module)
        _declare(flavour, api, spec, calls.present_inputs(spec, node)).registration = registration
    return registration


_declared: dict[tuple[str, str], AotPlugin] = {}
"""By (flavour, plugin): `tensorrt.plugin` keeps declarations for the life of the process, and takes none twice."""


def _declare(flavour: Flavour, api: Any, spec: OpSpec, present: tuple[str, ...]) -> AotPlugin:
    identifier = f"{calls.aot_namespace(spec)}::{calls.aot_name(spec, present)}"
    known = _declared.get((flavour.name, identifier))
    if known is None:
        known = AotPlugin(flavour.module, api, spec, present, identifier)
        try:
            known.declare()
        except (TypeError, ValueError) as error:
            raise PluginError(f"TensorRT refuses the plugin {identifier}: {error}") from error
        _declared[flavour.name, identifier] = known
    if known.spec != spec:
        raise PluginError(f"{spec.identifier} was declared differently before: start a new process")
    return known


class AotPlugin:
    """An op with a fixed choice of inputs, as `tensorrt.plugin` wants it declared."""

    def __init__(self, trt: Any, api: Any, spec: OpSpec, present: tuple[str, ...], identifier: str) -> None:
        self.trt = trt
        self.api = api
        self.spec = spec
        self.present = present
        self.node = identifier  # errors name the plugin: TensorRT does not tell it the node
        self.registration = Registration(())

    def declare(self) -> None:
        """Hand the three functions to TensorRT, with the signatures that it reads."""
        desc = self.api.TensorDesc
        outputs = GenericAlias(tuple, (desc,) * len(self.spec.outputs))
        result = GenericAlias(tuple, (str, str, self.api.KernelLaunchParams, self.api.SymIntExprs))
        combinations = GenericAlias(list, (self.api.AutoTuneCombination,))
        arguments = dict.fromkeys(self.present, desc)
        arguments |= {name: _ANNOTATIONS[attribute.type] for name, attribute in self.spec.attributes.items()}
        for decorate, method, extra, returned in (
            (self.api.register, self.describe, {}, outputs),
            (self.api.autotune, self.autotune, {"outputs": outputs}, combinations),
            (self.api.aot_impl, self.implement, {"outputs": outputs, "tactic": int}, result),
        ):
            decorate(self.node)(_Signed(method, {**arguments, **extra}, returned))

    @keep_errors
    def describe(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the outputs' types and shapes as expressions; shapes are dummies while TensorRT asks for types."""
        tensors, attributes = self._split(arguments)
        dtypes = {n: our_dtype(tensor.dtype) for n, tensor in zip(self.present, tensors, strict=True)}
        kinds = [trt_type(self.trt, dtype) for dtype in output_dtypes(self.spec, dtypes, attributes)]
        if any(size.is_fake for tensor in tensors for size in tensor.shape_expr):
            return tuple(self.api.TensorDesc(self.api.ShapeExprs(0), kind) for kind in kinds)
        shapes = [[s.constant_value() if s.is_constant else None for s in tensor.shape_expr] for tensor in tensors]
        outputs = dims.trace(lambda known: self.spec.infer(self._spread(known, dtypes), attributes), shapes)
        algebra = _Expressions(self.api, [tensor.shape_expr for tensor in tensors])
        expressions = [tuple(dims.express(dim, algebra) for dim in info.shape) for info in outputs]
        return tuple(self.api.from_shape_expr(shape, kind) for shape, kind in zip(expressions, kinds, strict=True))

    @keep_errors
    def autotune(self, *arguments: Any) -> list[Any]:
        """Return the one combination of types: the network's, row-major."""
        *given, outputs = arguments
        tensors, _ = self._split(given)
        dtypes = [our_dtype(tensor.dtype) for tensor in (*tensors, *outputs)]
        names = [_AUTOTUNE_TYPES.get(dtype, dtype.upper()) for dtype in dtypes]
        return [self.api.AutoTuneCombination(", ".join(names), "LINEAR")]

    @keep_errors
    def implement(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """Return (kernel, PTX, launch, int32 arguments) for a profile, once the rules are known to hold for all of it.

        Grid and arguments are traced through the launch rule at the optimal shapes; they must be true of the others.
        TensorRT keeps one kernel for a node's types, whatever the profile: where the fixed sizes of several profiles
        ask for different ones, the plugin that runs in Python is the one to use.
        """
        *given, outputs, _ = arguments
        tensors, attributes = self._split(given)
        dtypes = {n: our_dtype(tensor.dtype) for n, tensor in zip(self.present, tensors, strict=True)}
        points = [[_shape(tensor.shape, point) for tensor in tensors] for point in ("min", "opt", "max")]
        expected = [
            [TensorInfo(_shape(output.shape, point), our_dtype(output.dtype)) for output in outputs]
            for point in ("min", "opt", "max")
        ]
        spread = [self._spread(shapes, dtypes) for shapes in points]
        for shapes, results in zip(points, expected, strict=True):
            known = {n: TensorInfo(shape, dtypes[n]) for n, shape in zip(self.present, shapes, strict=True)}
            check_shapes(self.spec, known, results, attributes)
        chosen = kernels.choose_for_profile(self.spec, list(zip(spread, expected, strict=True)), attributes)
        kernel = kernels.compile_kernel(self.spec, chosen, self.registration.targets)
        traced = self._trace(tensors, dtypes, attributes, points[1], kernel)
        self._check(traced, points, spread, attributes, kernel)
        self.registration.note(self.node, [kernel])
        return (kernel.entry, kernel.ptx.text, *self._expressed(traced, tensors))

    def _trace(
        self,
        tensors: Sequence[Any],
        dtypes: Mapping[str, str],
        attributes: Mapping[str, Value],
        optimal: Any,
        kernel: kernels.Kernel,
    ) -> KernelLaunch:
        """Return the launch of the kernel with dimensions that know where they come from."""
        shapes = [[None if size == -1 else size for size in tensor.shape] for tensor in tensors]
        return dims.trace(lambda known: self._launch(self._spread(known, dtypes), attributes, kernel), shapes, optimal)

    def _launch(
        self, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Value], kernel: kernels.Kernel
    ) -> KernelLaunch:
        call = inputs, self.spec.infer(inputs, attributes)
        return kernels.reuse_launch(self.spec, call, attributes, kernel)

    def _check(
        self,
        traced: KernelLaunch,
        points: Sequence[Sequence[tuple[int, ...]]],
        spread: Sequence[Sequence[TensorInfo | None]],
        attributes: Mapping[str, Value],
        kernel: kernels.Kernel,
    ) -> None:
        """Check that the traced launch is the rule's at every point.

        Raises:
            PluginError: it is not, so that the launch cannot be written as expressions of dimensions.
        """
        for shapes, inputs in zip(points, spread, strict=True):
            launch = self._launch(inputs, attributes, kernel)
            wanted = (*launch.grid, *launch.block, launch.shared_bytes, *launch.extras)
            found = (*traced.grid, *traced.block, traced.shared_bytes, *traced.extras)
            if tuple(dims.evaluate(dim, shapes) for dim in found) != wanted:
                raise PluginError(
                    f"its launch is no expression of dimensions in + - * //, as {kernels.texts(inputs)} shows: "
                    "give the dynamic dimensions one size, or use the plugin that runs in Python"
                )

    def _expressed(self, launch: KernelLaunch, tensors: Sequence[Any]) -> tuple[Any, Any]:
        algebra = _Expressions(self.api, [tensor.shape_expr for tensor in tensors])
        names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        parameters = self.api.KernelLaunchParams()
        for name, dim in zip(names, (*launch.grid, *launch.block, launch.shared_bytes), strict=True):
            setattr(parameters, name, dims.express(dim, algebra))
        extras = self.api.SymIntExprs(len(launch.extras))
        for index, dim in enumerate(launch.extras):
            extras[index] = self.api.SymInt32(dims.express(dim, algebra))
        return parameters, extras

    def _split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Value]]:
        """Return the tensors, and the attributes as our rules take them."""
        count = len(self.present)
        values = zip(self.spec.attributes.items(), arguments[count:], strict=True)
        return arguments[:count], {name: _plain(attribute.type, value) for (name, attribute), value in values}

    def _spread(self, shapes: Sequence[tuple[int, ...]], dtypes: Mapping[str, str]) -> list[TensorInfo | None]:
        known = dict(zip(self.present, shapes, strict=True))
        return [TensorInfo(known[p.name], dtypes[p.name]) if p.name in known else None for p in self.spec.inputs]


class _Signed:
    """A function with a signature of its own, as its `inspect.signature` shows; takes arguments by position or name."""

    def __init__(self, function: Any, annotations: Mapping[str, Any], returned: Any) -> None:
        self._function = function
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=value) for name, value in annotations.items()]
        self.__signature__ = inspect.Signature(parameters, return_annotation=returned)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*self.__signature__.bind(*arguments, **named).args)


@dataclass(frozen=True)
class _Expressions:
    """Dimensions as `tensorrt.plugin`'s expressions; `inputs` are the shapes of the plugin's inputs."""

    api: Any
    inputs: Sequence[Any]

    def leaf(self, leaf: dims.Leaf) -> Any:
        index, axis = leaf
        return self.inputs[index][axis]

    def constant(self, value: int) -> Any:
        return self.api.ShapeExpr(value)

    def operation(self, name: str, first: Any, second: Any) -> Any:
        if name == "CEIL_DIV":
            return self.api.cdiv(first, second)
        return {"SUM": first.__add__, "SUB": first.__sub__, "PROD": first.__mul__, "FLOOR_DIV": first.__floordiv__}[
            name
        ](second)


def _shape(shape: Any, point: str) -> tuple[int, ...]:
    return tuple(getattr(shape, point)) if shape.is_dynamic else tuple(shape)


def _plain(kind: str, value: Any) -> Value:
    """Return an attribute's value; floats come back as the shortest decimals that stand for the same float32."""
    if kind == "string":
        return str(value).rstrip("\0")
    values = [float(str(np.float32(v))) if "float" in kind else int(v) for v in np.atleast_1d(value)]
    return tuple(values) if kind in ("ints", "floats") else values[0]
