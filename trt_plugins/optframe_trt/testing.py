"""What authors of plugin ops test kernels and plugins with: contracts that every op with a kernel keeps.

`optframe.testing.assert_op_contract` has the part that needs neither CUDA nor TensorRT. The `assert_...` functions
raise AssertionError with what is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optframe import cuda
from optframe.errors import EnvironmentLacks, InputError, PluginError
from optframe.testing import ROUNDINGS, UNIT_ROUNDOFF
from optframe.types import KernelLaunch, OpSpec, TensorInfo
from optframe_trt import calls, creators, driver, emulator, fields, kernels, nvrtc
from optframe_trt.flavours import Flavour
from optframe_trt.meaning import calling_model, onnx_type
from optframe_trt.plugin_v3 import trt_type

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator], Mapping[str, Array]]
Reference = Callable[..., Array | Sequence[Array]]
Device = Literal["auto", "gpu", "emulator"]

MISALIGNMENT = 4
"""Bytes that arrays lie off their alignment in one of the runs: less than the 16 that vector accesses want."""

OTHER_SHAPES = 4
"""So many others are drawn for each call, whose kernels it is run from as well where a reuse rule allows it."""


@dataclass(frozen=True)
class Case:
    """One call of an op that its kernel takes: the inputs that are present by name, and what the rules say of it.

    `kernel_for` says which call the kernel is best for, if it is another one.
    """

    spec: OpSpec
    inputs: Mapping[str, Array]
    attributes: Mapping[str, Any]
    outputs: tuple[TensorInfo, ...]
    launch: KernelLaunch
    kernel_for: str = ""

    def __str__(self) -> str:
        inputs = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in self.inputs.items())
        reused = f" by the kernel for {self.kernel_for}" if self.kernel_for else ""
        return f"{self.spec.identifier}({inputs}){reused}"

    @property
    def infos(self) -> list[TensorInfo | None]:
        """What is known of each of the op's inputs; None for an absent one."""
        return _infos(self.spec, self.inputs)

    @property
    def present(self) -> list[Array]:
        """The inputs that are there, in the order of a kernel's arguments."""
        return [self.inputs[p.name] for p in self.spec.inputs if p.name in self.inputs]

    def changed(self, name: str, by: Array) -> Case:
        """Return the call with `by` added to the input `name`."""
        array = (self.inputs[name] + by).astype(self.inputs[name].dtype)
        return Case(self.spec, {**self.inputs, name: array}, self.attributes, self.outputs, self.launch)

    def expected(self, reference: Reference) -> list[Array]:
        """Return what `reference` computes of the inputs in float64."""
        wide = {n: a.astype(np.float64) if a.dtype.name in UNIT_ROUNDOFF else a for n, a in self.inputs.items()}
        with np.errstate(all="ignore"):
            results = reference(**wide, **self.attributes)
        return [np.asarray(r) for r in results] if isinstance(results, list | tuple) else [np.asarray(results)]


def _infos(spec: OpSpec, inputs: Mapping[str, Array]) -> list[TensorInfo | None]:
    return [
        TensorInfo(inputs[p.name].shape, inputs[p.name].dtype.name) if p.name in inputs else None for p in spec.inputs
    ]


def draw_cases(
    spec: OpSpec, draw: Draw, seed: int | np.random.Generator, attributes: Mapping[str, Any] | None, trials: int
) -> Iterator[Case]:
    """Yield calls for each dtype that inputs take, and for mixed ones, as far as the op's rules accept them."""
    rng = np.random.default_rng(seed)
    names = dict.fromkeys(dtype for parameter in spec.inputs for dtype in parameter.dtypes)
    given = {name: attribute.default for name, attribute in spec.attributes.items()} | dict(attributes or {})
    found = 0
    for wanted in [*names, *[None] * len(names)] * trials:
        drawn = draw(rng)
        dtypes = {p.name: wanted if wanted in p.dtypes else str(rng.choice(p.dtypes)) for p in spec.inputs}
        case = _case(spec, drawn, dtypes, given)
        if case is not None:
            found += 1
            yield case
    assert found, f"{spec.identifier}: its rules refuse every call that was drawn"


def _case(
    spec: OpSpec, drawn: Mapping[str, Array], dtypes: Mapping[str, str], attributes: Mapping[str, Any]
) -> Case | None:
    """Return the call with what was drawn in `dtypes`; None where the op's rules refuse it."""
    inputs = {n: np.asarray(drawn[n]).astype(onnx_type(dtypes[n]).numpy()) for n in dtypes if n in drawn}
    infos = _infos(spec, inputs)
    try:
        outputs = tuple(spec.infer(infos, attributes))
        return Case(spec, inputs, attributes, outputs, kernels.choose_launch(spec, (infos, outputs), attributes))
    except PluginError:
        raise
    except InputError:
        return None  # a kernel may refuse mixtures and sizes that the function takes


def assert_kernel_contract(
    spec: OpSpec,
    draw: Draw,
    reference: Reference,
    *,
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    empty: Draw | None = None,
    offsets: Mapping[str, float] | None = None,
    trials: int = 3,
    roundings: float = ROUNDINGS,
    device: Device = "auto",
) -> int:
    """Check that the kernel computes what `reference` does, in every dtype and mixture; return the runs.

    That is: at the shapes drawn; on arrays off their alignment; with one NaN and one infinity in each float input,
    which must come out where the reference has them; with large offsets; without any row; from kernels for other
    shapes, where a reuse rule launches them; never writing outside outputs. Under the emulator also: never reading
    outside arrays, no races in shared memory, no use of what nobody wrote there, no barrier in divergent code (see
    `optframe_trt.emulator`).

    Args:
        draw: returns one call's inputs by parameter name, of random odd shapes, floats in any float dtype.
        reference: `(**inputs, **attributes) -> outputs` in NumPy; gets floats as float64. It is the same that
            `optframe.testing.assert_op_contract` compares the op's function with.
        seed: of everything random; print it, so that a failure can be repeated.
        attributes: of the node; those left out have their defaults.
        empty: returns inputs with a zero in their shapes.
        offsets: what to add to an input, by name, in a run of its own.
        trials: how many calls are drawn for each dtype.
        roundings: see `optframe.testing.ROUNDINGS`.
        device: "gpu"; "emulator", which needs none and suits small shapes; "auto" for the GPU where there is one.

    Raises:
        EnvironmentLacks: there is no NVRTC, or no GPU where one is asked for.
        PluginError: a rule returns what it must not, or the source does not compile.
        KernelFault: the kernel did what the emulator watches for.
        Unsupported: the kernel has an instruction that the emulator does not know.
    """
    rng = np.random.default_rng(seed)
    runs = 0
    run = _runner(device)
    cases = list(draw_cases(spec, draw, rng, attributes or {}, trials))
    for case in cases:
        variants = [*_with_non_finite(case, rng)]
        variants += [case.changed(name, np.asarray(by)) for name, by in (offsets or {}).items()]
        for variant in (case, *variants):
            _check_kernel(run, variant, reference, roundings)
        _check_kernel(run, case, reference, roundings, offset=MISALIGNMENT)
        runs += 2 + len(variants)
    others = draw_cases(spec, empty, rng, attributes or {}, 1) if empty else ()
    for case in (*others, *_by_kernels_of_others(cases, draw, rng)):
        _check_kernel(run, case, reference, roundings)
        runs += 1
    return runs


def _by_kernels_of_others(cases: Sequence[Case], draw: Draw, rng: np.random.Generator) -> Iterator[Case]:
    """Yield each call as launched from kernels that are best for calls of other shapes, if they do it too.

    An engine asks for no others: a node's dtypes, attributes and present inputs are the same at all shapes.
    """
    for case in cases if cases[0].spec.kernel and cases[0].spec.kernel.reuse else ():
        dtypes = {name: array.dtype.name for name, array in case.inputs.items()}
        for _ in range(OTHER_SHAPES):
            drawn = draw(rng)
            other = _case(case.spec, drawn, dtypes, case.attributes) if drawn.keys() == dtypes.keys() else None
            if other is None or kernels.is_same(other.launch, case.launch):
                continue
            launch = kernels.try_launch(case.spec, (case.infos, case.outputs), case.attributes, other.launch)
            if launch is not None:
                yield replace(case, launch=launch, kernel_for=str(other))


def _with_non_finite(case: Case, rng: np.random.Generator) -> Iterator[Case]:
    """Yield the case with a NaN, and with an infinity, at a random place of each float input."""
    for name, array in case.inputs.items():
        if array.dtype.name in UNIT_ROUNDOFF and array.size:
            for value in (np.nan, np.inf):
                by = np.zeros(array.shape)
                by.reshape(-1)[rng.integers(array.size)] = value
                yield case.changed(name, by)


def _runner(device: Device) -> Callable[[Case, int], list[list[Array]]]:
    """Return what runs a call's kernel on arrays so many bytes off their alignment, once or as for several GPUs."""
    if device == "emulator":
        return _emulate
    try:
        cuda.ensure_context()
    except EnvironmentLacks:
        if device == "gpu":
            raise
        return _emulate
    return _run_on_gpu


def _run_on_gpu(case: Case, offset: int) -> list[list[Array]]:
    kernel = kernels.compile_kernel(case.spec, case.launch, (driver.compute_capability(),))
    loaded = driver.Kernel(kernel.ptx.text, kernel.entry)
    return [driver.run_on_arrays(loaded, case.launch, case.present, case.outputs, offset=offset)]


def _emulate(case: Case, offset: int) -> list[list[Array]]:
    compiled = [kernels.compile_kernel(case.spec, case.launch, (target,)) for target in emulator.targets(case.launch)]
    return [
        emulator.run_on_arrays(kernel.ptx.text, case.launch, case.present, case.outputs, offset=offset)
        for kernel in compiled
    ]


def _check_kernel(
    run: Callable[[Case, int], list[list[Array]]], case: Case, reference: Reference, roundings: float, offset: int = 0
) -> None:
    expected = case.expected(reference)
    for actual in run(case, offset):
        assert_outputs_close(case, actual, expected, roundings)


def assert_outputs_close(case: Case, actual: Sequence[Array], expected: Sequence[Array], roundings: float) -> None:
    """Check outputs of a kernel against float64 ones, to `roundings` of the coarsest dtype; non-finite ones exactly."""
    coarsest = max((UNIT_ROUNDOFF.get(a.dtype.name, 0.0) for a in case.inputs.values()), default=0.0)
    for parameter, got, want in zip(case.spec.outputs, actual, expected, strict=True):
        finite = np.isfinite(want)
        unit = max(coarsest, UNIT_ROUNDOFF.get(got.dtype.name, 0.0))
        scale = max(1.0, float(np.abs(want[finite]).max(initial=0.0)))
        np.testing.assert_allclose(
            got.astype(np.float64), want, rtol=0, atol=roundings * unit * scale, err_msg=f"{case}: {parameter.name}"
        )


def descriptor(trt: Any, info: TensorInfo) -> Any:
    """Return TensorRT's description of a row-major tensor."""
    desc = trt.PluginTensorDesc()
    desc.dims = trt.Dims(info.shape)
    desc.type = trt_type(trt, info.dtype)
    desc.format = trt.TensorFormat.LINEAR
    return desc


def dynamic_descriptor(trt: Any, info: TensorInfo) -> Any:
    """Return TensorRT's description of a tensor in a profile that allows one shape."""
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = descriptor(trt, info)
    desc.min = desc.opt = desc.max = trt.Dims(info.shape)
    return desc


def built_plugin(flavour: Flavour, case: Case, node: str = "node") -> Any:
    """Return the plugin of a call as a build has it, configured; the op is registered with the flavour's registry."""
    trt = flavour.module
    creator = _creator(flavour, case.spec)
    collection, buffers = _node_fields(trt, case)
    plugin = creator.create_plugin(node, collection, trt.TensorRTPhase.BUILD)
    del buffers  # TensorRT's fields point into them
    present = [info for info in case.infos if info is not None]
    types = plugin.get_output_data_types([trt_type(trt, info.dtype) for info in present])
    assert types == [trt_type(trt, info.dtype) for info in case.outputs], f"{case}: the function's types are {types}"
    plugin.configure_plugin(*([dynamic_descriptor(trt, i) for i in infos] for infos in (present, case.outputs)))
    return plugin


def loaded_plugin(flavour: Flavour, plugin: Any) -> Any:
    """Return the plugin as an engine has it: made by the registry's creator from what `plugin` serialises."""
    creator = _creator(flavour, plugin.spec)
    collection = plugin.get_fields_to_serialize()
    return creator.create_plugin("", collection, flavour.module.TensorRTPhase.RUNTIME).attach_to_context(None)


def _creator(flavour: Flavour, spec: OpSpec) -> Any:
    registry = flavour.module.get_plugin_registry()
    creator = registry.get_creator(calls.plugin_name(spec), str(spec.version), spec.domain)
    assert creator is not None, f"{spec.identifier} is not registered"
    return creator


def _node_fields(trt: Any, case: Case) -> tuple[Any, list[Any]]:
    """Return a node's fields as the parser hands them over, and what keeps their memory alive."""
    arrays = {name: _field_data(case, name) for name in case.spec.attributes}
    kinds = {name: fields.FIELD_TYPES[attribute.type] for name, attribute in case.spec.attributes.items()}
    arrays[fields.INPUTS] = np.frombuffer(",".join(case.inputs).encode() + b"\0", np.int8)
    kinds[fields.INPUTS] = "CHAR"
    found = [trt.PluginField(name, array, getattr(trt.PluginFieldType, kinds[name])) for name, array in arrays.items()]
    return trt.PluginFieldCollection(found), [found, arrays]


def _field_data(case: Case, name: str) -> Array:
    value = case.attributes[name]
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8)
    dtype = np.float32 if "float" in case.spec.attributes[name].type else np.int32
    return np.atleast_1d(np.asarray(value, dtype))


def calling_onnx(case: Case) -> ir.Model:
    """Return a model of one call of the plugin, as TensorRT's parser takes it."""
    inputs = {
        name: ir.Value(name=name, shape=ir.Shape(a.shape), type=ir.TensorType(onnx_type(a.dtype.name)))
        for name, a in case.inputs.items()
    }
    model = calling_model(case.spec, inputs, case.attributes)
    for value, info in zip(model.graph.outputs, case.outputs, strict=True):
        value.type, value.shape = ir.TensorType(onnx_type(info.dtype)), ir.Shape(info.shape)
    model.graph[0].name = "call"
    calls.prepare(model, [case.spec])
    return model


@cache
def quiet_logger(trt: Any) -> Any:
    """Return a logger of internal errors alone, for all builds of the process.

    TensorRT writes to the first logger until the process ends, from threads of its own too: it must stay, and one
    written in Python can wait for ever for the interpreter lock that `Builder()` holds.
    """
    return trt.Logger(trt.Logger.INTERNAL_ERROR)


def build_engine(flavour: Flavour, case: Case, target: str = "sm89") -> tuple[bytes, creators.Registration]:
    """Build an engine of one call of the plugin for the compute capability `target`, without a GPU where that works.

    Raises:
        PluginError, InputError: the plugin failed.
        AssertionError: TensorRT refused the model or made no engine.
    """
    trt = flavour.module
    registration = creators.register(flavour, [case.spec], [target])
    logger = quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(ir.to_proto(calling_onnx(case)).SerializeToString())
    registration.raise_errors()
    assert parsed, f"{case}: {'; '.join(parser.get_error(i).desc() for i in range(parser.num_errors))}"
    config = builder.create_builder_config()
    if flavour.can.targets:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    engine = builder.build_serialized_network(network, config)
    registration.raise_errors()
    assert engine is not None, f"{case}: TensorRT made no engine"
    return bytes(engine), registration


def assert_build_contract(
    flavour: Flavour,
    spec: OpSpec,
    draw: Draw,
    *,
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    target: str = "sm89",
    trials: int = 1,
) -> list[Case]:
    """Check that the op's plugin gets into engines, in every dtype and mixture; return the calls that were built.

    That is: what a plugin serialises comes back equal from its creator; the parser finds the plugin, also where an
    optional input is absent; the engine holds its name and its PTX whole; and a second build gives the same bytes.

    Args:
        draw: returns one call's inputs by parameter name, as for `assert_kernel_contract`; shapes alone matter.
        seed: of everything random; print it, so that a failure can be repeated.
        attributes: of the node; those left out have their defaults.
        target: the compute capability to build for.
        trials: how many calls are drawn for each dtype.
    """
    cases = list(draw_cases(spec, draw, seed, attributes, trials))
    for case in cases:
        engine, registration = build_engine(flavour, case, target)
        (compiled,) = registration.kernels.values()
        name = calls.plugin_name(spec)
        assert name.encode() in engine, f"{case}: the engine lacks the plugin's name {name}"
        for kernel in compiled:
            assert kernel.ptx.text.encode() in engine, f"{case}: the engine lacks the kernel's PTX"
        again, _ = build_engine(flavour, case, target)
        assert again == engine, f"{case}: a second build gives other bytes"
        plugin = built_plugin(flavour, case)
        assert loaded_plugin(flavour, plugin).call == plugin.call, f"{case}: its fields come back changed"
    return cases


COMPILE = """
import json, sys
from optframe_trt import nvrtc
for source, name, defines, targets in json.load(sys.stdin):
    print(json.dumps(nvrtc.compile_ptx(source, name=name, defines=defines, targets=targets).text))
"""
"""Compiles without optframe's cache."""


def assert_ptx_contract(
    spec: OpSpec,
    draw: Draw,
    *,
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    target: str = "sm89",
    trials: int = 1,
    times: int = 3,
) -> int:
    """Check that the op's kernels compile to the same PTX in every process; return how many kernels.

    Then engines that are built in several places are the same. NVRTC is not always so kind: it may order sums that it
    hoists out of a loop by hashes of addresses, which change with each process. Give such a sum's terms one name that
    the compiler cannot take apart (`asm("" : "+l"(offset))`).

    Args:
        draw: returns one call's inputs by parameter name, as for `assert_kernel_contract`; shapes alone matter.
        seed: of everything random; print it, so that a failure can be repeated.
        attributes: of the node; those left out have their defaults.
        target: the compute capability to compile for.
        trials: how many calls are drawn for each dtype.
        times: how often each of two processes compiles a kernel.

    Raises:
        EnvironmentLacks: no NVRTC is installed.
        PluginError: the source does not compile.
    """
    kernel, capability = kernels.kernel_of(spec), kernels.capability(target)
    defines = dict.fromkeys(case.launch.defines for case in draw_cases(spec, draw, seed, attributes, trials))
    jobs = [(kernel.read_source(), kernel.source, chosen, (capability,)) for chosen in defines]
    for source, name, chosen, targets in jobs:
        nvrtc.compile_ptx(source, name=name, defines=chosen, targets=targets)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", COMPILE]
    done = [
        subprocess.run(
            command, input=json.dumps(jobs * times), text=True, check=True, capture_output=True, env=environment
        )
        for _ in range(2)
    ]
    texts = [process.stdout.splitlines() for process in done]
    for number, (_, _, chosen, _) in enumerate(jobs):
        found = {text for of in texts for text in of[number :: len(jobs)]}
        assert len(found) == 1, f"{spec.identifier}: NVRTC gives {len(found)} different PTX for {dict(chosen)}"
    return len(jobs)
