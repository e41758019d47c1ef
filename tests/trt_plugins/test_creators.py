"""Plugin creators in the real registry of TensorRT-RTX: fields, builds without a GPU, and errors that are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from optframe import ops
from optframe.errors import EnvironmentLacks, InputError, OptframeError, PluginError
from optframe.types import KernelLaunch, KernelSpec, OpAttribute, OpParameter, OpSpec, TensorInfo
from optframe_anchordetr.ops import LAYER_NORM, RCDA, SKIP_LAYER_NORM
from optframe_trt import calls, creators, fields, flavours, kernels, nvrtc, testing
from optframe_trt.meaning import onnx_type
from optframe_trt.nvrtc import Ptx

Shapes = Mapping[str, tuple[Sequence[int | str], str]]
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
MODULE = "made_up_op"


@dataclass(frozen=True)
class InlineKernel(KernelSpec):
    """A kernel whose source is not in a file."""

    text: str = ""

    def read_source(self) -> str:
        return self.text


SCALE_SOURCE = """
extern "C" __global__ void scale(const float* x, int count, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = x[i] * (SCALE_FACTOR);
}
"""


def scale_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    import onnx.parser

    text = f"""<domain: "made.up", opset_import: ["" : {opset}]>
    Scale <factors: floats, times: ints, label: string> (x) => (y) {{ y = Identity (x) }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def scale_shapes(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    (x,) = inputs
    assert x is not None
    return (x,)


def scale_launch(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]
) -> KernelLaunch:
    (x,) = inputs
    assert x is not None
    count = int(np.prod(x.shape))
    factor = f"{attributes['factors'][1]!r}f"
    return KernelLaunch("scale", (("SCALE_FACTOR", factor),), (-(-count // 64), 1, 1), (64, 1, 1), 0, (count,))


SCALE = OpSpec(
    name="Scale",
    domain="made.up",
    inputs=(OpParameter("x", ("float32",)),),
    outputs=(OpParameter("y", ("float32",)),),
    attributes={"factors": OpAttribute("floats"), "times": OpAttribute("ints"), "label": OpAttribute("string", "none")},
    function=f"{MODULE}:scale_function",
    shape_rule=f"{MODULE}:scale_shapes",
    kernel=InlineKernel("made_up:scale.cu", f"{MODULE}:scale_launch", text=SCALE_SOURCE),
)
SCALE_X: Shapes = {"x": (("N", 5), "float32")}
SCALE_PROFILES: Sequence[Profile] = ({"x": ((1, 5), (20, 5), (40, 5))},)
SCALE_ATTRIBUTES = {"factors": (0.5, 0.1), "times": (3, -4), "label": "größer"}


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that `SCALE` names its functions in; tests replace them there."""
    module = ModuleType(MODULE)
    vars(module).update(scale_function=scale_function, scale_shapes=scale_shapes, scale_launch=scale_launch)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


@pytest.fixture(scope="module")
def flavour() -> flavours.Flavour:
    try:
        nvrtc.compile_ptx("")
        return flavours.load("tensorrt-rtx")
    except EnvironmentLacks as reason:
        pytest.skip(str(reason))


def calling(spec: OpSpec, inputs: Shapes, attributes: Mapping[str, Any], outputs: int | None = None) -> ir.Model:
    """A model of one call, named "the call", with the op's function."""
    values = {name: ir.val(name, onnx_type(dtype), shape) for name, (shape, dtype) in inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=8)
    node = ops.call(model, spec, [values.get(p.name) for p in spec.inputs], attributes, outputs)
    node.name = "the call"
    graph.append(node)
    for number, value in enumerate(node.outputs):
        value.name, value.type = f"out{number}", ir.TensorType(onnx_type(next(iter(inputs.values()))[1]))
        graph.outputs.append(value)
    return model


def build(
    flavour: flavours.Flavour, model: ir.Model, registration: creators.Registration, profiles: Sequence[Profile] = ()
) -> bytes | None:
    """Return the engine for sm89, or None where TensorRT gives up; it says why to nobody."""
    trt = flavour.module
    logger = testing.quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return None if engine is None else bytes(engine)


def build_call(
    flavour: flavours.Flavour,
    spec: OpSpec,
    inputs: Shapes,
    attributes: Mapping[str, Any],
    profiles: Sequence[Profile] = (),
    targets: Sequence[str] = ("sm89",),
) -> tuple[bytes | None, creators.Registration]:
    registration = creators.register(flavour, [spec], targets)
    model = calling(spec, inputs, attributes)
    calls.prepare(model, [spec])
    return build(flavour, model, registration, profiles), registration


NORM: Shapes = {"x": (("N", "L", 256), "float16"), "scale": ((256,), "float32"), "bias": ((256,), "float16")}
NORM_PROFILES: list[Profile] = [
    {"x": ((1, 1, 256), (2, 30, 256), (4, 900, 256))},
    {"x": ((8, 5, 256), (8, 5, 256), (8, 5, 256))},
]

assert RCDA.kernel is not None
EXACT = replace(RCDA, name="Exact", kernel=replace(RCDA.kernel, reuse=""), function=f"{MODULE}:exact_function")
"""RCDA, whose kernels do no other shapes than those that they are made for."""


class TestBuilding:
    def test_dynamic_rows_in_two_profiles_share_a_kernel(self, flavour: flavours.Flavour) -> None:
        engine, registration = build_call(flavour, LAYER_NORM, NORM, {}, NORM_PROFILES)
        registration.raise_errors()
        ((kernel,),) = registration.kernels.values()
        assert list(registration.kernels) == ["the call"]
        assert engine is not None
        assert kernel.ptx.text.encode() in engine
        assert kernel.ptx.target == 89
        assert f".target sm_{kernel.ptx.target}" in kernel.ptx.text
        assert ".version {}.{}".format(*kernel.ptx.isa) in kernel.ptx.text

    def test_several_targets_get_one_ptx_for_the_lowest(self, flavour: flavours.Flavour) -> None:
        _, registration = build_call(flavour, LAYER_NORM, NORM, {}, NORM_PROFILES[1:], ["sm120", "sm86", "sm89"])
        registration.raise_errors()
        assert [[kernel.ptx.target for kernel in found] for found in registration.kernels.values()] == [[86]]

    def test_rcda_has_a_kernel_for_each_fixed_size(self, flavour: flavours.Flavour) -> None:
        def sizes(h: int, w: int) -> Profile:
            lengths = {"q_row": (9,), "q_col": (9,), "k_row": (w,), "k_col": (h,), "v": (h, w)}
            return {name: ((1, *length, 64),) * 3 for name, length in lengths.items()}

        free = {"q_row": ("L",), "q_col": ("L",), "k_row": ("w",), "k_col": ("h",), "v": ("h", "w")}
        inputs = {name: (("N", *shape, 64), "float16") for name, shape in free.items()}
        profiles = [sizes(6, 7), sizes(6, 30)]
        engine, registration = build_call(flavour, RCDA, inputs, {"num_heads": 2}, profiles)
        registration.raise_errors()
        [found] = registration.kernels.values()
        assert engine is not None
        assert [dict(kernel.defines)["RCDA_WIDTH_GROUPS"] for kernel in found] == ["1", "4"]
        assert all(kernel.ptx.text.encode() in engine for kernel in found)

        reaching = {
            name: (low, low, high)
            for (name, (low, *_)), (*_, high) in zip(sizes(6, 7).items(), sizes(6, 30).values(), strict=True)
        }
        engine, registration = build_call(flavour, RCDA, inputs, {"num_heads": 2}, [reaching])
        registration.raise_errors()
        [found] = registration.kernels.values()
        assert engine is not None
        assert [dict(kernel.defines)["RCDA_WIDTH_GROUPS"] for kernel in found] == ["1", "4"], "the best, one for all"

        vars(sys.modules[MODULE])["exact_function"] = lambda opset, dtypes: renamed(
            RCDA.build_function(opset, dtypes), "Exact"
        )
        engine, registration = build_call(flavour, EXACT, inputs, {"num_heads": 2}, [reaching])
        assert engine is None
        with pytest.raises(
            InputError, match=r"'the call' .*depends on the shape \(RCDA_WIDTH_GROUPS: 1, 4\).*one size"
        ):
            registration.raise_errors()

    def test_absent_inputs_and_unused_outputs(self, flavour: flavours.Flavour) -> None:
        inputs: Shapes = {"x": ((3, 8), "float32"), "skip": ((3, 8), "float32"), "bias": ((8,), "float16")}
        registration = creators.register(flavour, [SKIP_LAYER_NORM], ["sm89"])
        model = calling(SKIP_LAYER_NORM, inputs, {}, outputs=1)
        calls.prepare(model, [SKIP_LAYER_NORM])
        assert build(flavour, model, registration)
        registration.raise_errors()
        [[kernel]] = registration.kernels.values()
        assert {"LN_SCALE": "0", "LN_BIAS": "1", "LN_BIAS_TYPE": "__half"}.items() <= dict(kernel.defines).items()

    def test_without_its_function_a_plain_call_is_found_too(self, flavour: flavours.Flavour) -> None:
        registration = creators.register(flavour, [LAYER_NORM], ["sm89"])
        model = calling(
            LAYER_NORM, {name: ([2, *shape[2:]], kind) for name, (shape, kind) in NORM.items() if name == "x"}, {}
        )
        ops.strip_functions(model, {LAYER_NORM.identifier})
        assert build(flavour, model, registration)
        assert len(registration.kernels) == 1

    def test_an_op_named_as_one_of_onnx(self, flavour: flavours.Flavour) -> None:
        """The parser takes a node for ONNX's op by name alone: without a name of its own this would be a sum."""
        spec = replace(SCALE, name="Sum", function=f"{MODULE}:sum_function")
        vars(sys.modules[MODULE])["sum_function"] = lambda opset, dtypes: renamed(scale_function(opset, dtypes), "Sum")
        engine, registration = build_call(flavour, spec, {"x": ((3, 5), "float32")}, SCALE_ATTRIBUTES)
        registration.raise_errors()
        assert engine is not None
        assert b"SumPlugin" in engine
        assert registration.kernels


def renamed(function: ir.Function, name: str) -> ir.Function:
    function.name = name
    return function


def drop_last(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    (x,) = inputs
    assert x is not None
    return (TensorInfo((max(*x.shape, 10), *x.shape[1:]), x.dtype),)


class TestErrors:
    """TensorRT drops what Python callbacks raise: it must reach the caller with the node's name."""

    registered: ClassVar[list[object]] = []

    def failure(self, flavour: flavours.Flavour, spec: OpSpec = SCALE) -> OptframeError:
        _, registration = build_call(flavour, spec, SCALE_X, SCALE_ATTRIBUTES, SCALE_PROFILES)
        with pytest.raises(OptframeError, match=r"^node 'the call' \(made\.up::Scale\): ") as raised:
            registration.raise_errors()
        registration.raise_errors()  # once is enough
        return raised.value

    def test_a_shape_rule_that_is_wrong_for_other_sizes(self, flavour: flavours.Flavour, made_up: ModuleType) -> None:
        vars(made_up)["scale_shapes"] = drop_last
        error = self.failure(flavour)
        assert isinstance(error, PluginError)
        assert "shape rule says float32[10, 5] of float32[1, 5], not float32[" in str(error)

    def test_a_shape_rule_that_fails(self, flavour: flavours.Flavour, made_up: ModuleType) -> None:
        vars(made_up)["scale_shapes"] = lambda inputs, attributes: inputs[1]
        error = self.failure(flavour)
        assert isinstance(error, PluginError)
        assert "IndexError" in str(error)
        assert "test_creators.py" in str(error)
        assert error.__cause__ is not None
        assert isinstance(error.__cause__.__cause__, IndexError)

    def test_a_kernel_that_does_not_compile(self, flavour: flavours.Flavour) -> None:
        broken = InlineKernel("made_up:scale.cu", f"{MODULE}:scale_launch", text="this is no C++")
        assert "scale.cu" in str(self.failure(flavour, replace(SCALE, kernel=broken)))

    def test_a_kernel_without_its_entry(self, flavour: flavours.Flavour) -> None:
        mangled = SCALE_SOURCE.replace('extern "C" ', "")
        kernel = InlineKernel("made_up:scale.cu", f"{MODULE}:scale_launch", text=mangled)
        assert "has no kernel 'scale'" in str(self.failure(flavour, replace(SCALE, kernel=kernel)))

    def test_no_target(self, flavour: flavours.Flavour) -> None:
        _, registration = build_call(flavour, SCALE, SCALE_X, SCALE_ATTRIBUTES, SCALE_PROFILES, targets=())
        with pytest.raises(InputError, match="no compute capability"):
            registration.raise_errors()

    def test_a_failure_while_the_engine_is_written(
        self, flavour: flavours.Flavour, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TensorRT writes an engine without the kernel then."""

        def fail(*_: object) -> object:
            raise RuntimeError("disk of clay")

        monkeypatch.setattr(fields, "write", fail)
        assert "disk of clay" in str(self.failure(flavour))

    @pytest.mark.parametrize("target", ["sm", "volta", "7", "sm_8x"])
    def test_bad_target(self, flavour: flavours.Flavour, target: str) -> None:
        with pytest.raises(InputError, match="no compute capability"):
            creators.register(flavour, [SCALE], [target])

    def test_an_op_without_a_kernel(self, flavour: flavours.Flavour) -> None:
        with pytest.raises(InputError, match="has no CUDA kernel"):
            creators.register(flavour, [replace(SCALE, kernel=None)], ["sm89"])

    def test_a_name_that_is_taken(self, flavour: flavours.Flavour) -> None:
        trt = flavour.module

        class Stranger(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IPluginCreatorV3One.__init__(self)
                self.name, self.plugin_version, self.plugin_namespace = "Taken", "1", "made.up"
                self.field_names = trt.PluginFieldCollection([])

        self.registered.append(Stranger())  # TensorRT refers to it until the process ends
        trt.get_plugin_registry().register_creator(self.registered[0], "made.up")
        with pytest.raises(PluginError, match=r"another TensorRT plugin is called made\.up::Taken 1"):
            creators.register(flavour, [replace(SCALE, name="Taken")], ["sm89"])


def scale_case(rows: int = 3) -> testing.Case:
    x = np.zeros((rows, 5), np.float32)
    info = TensorInfo(x.shape, "float32")
    return testing.Case(SCALE, {"x": x}, SCALE_ATTRIBUTES, (info,), scale_launch([info], [info], SCALE_ATTRIBUTES))


class TestFields:
    def test_attributes_of_all_types_come_back(self, flavour: flavours.Flavour) -> None:
        creators.register(flavour, [SCALE], ["sm89"])
        plugin = testing.built_plugin(flavour, scale_case())
        loaded = testing.loaded_plugin(flavour, plugin)
        assert loaded.call == plugin.call
        assert loaded.call.attributes == SCALE_ATTRIBUTES
        assert loaded.call.node == "node"
        [kernel] = loaded.call.kernels
        assert kernel.defines == (("SCALE_FACTOR", "0.1f"),)

    def test_through_the_parser(self, flavour: flavours.Flavour) -> None:
        seen = []

        def watch(spec: OpSpec, collection: Any) -> dict[str, fields.Value]:
            seen.append(attributes(spec, collection))
            return seen[-1]

        attributes = fields.attributes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fields, "attributes", watch)
            _, registration = build_call(flavour, SCALE, {"x": ((3, 5), "float32")}, SCALE_ATTRIBUTES)
        registration.raise_errors()
        assert seen == [SCALE_ATTRIBUTES]

    def test_a_missing_attribute(self) -> None:
        with pytest.raises(InputError, match="needs its attribute 'factors'"):
            fields.attributes(SCALE, [])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda kept: replace(kept, op="made.up::Other"), "holds made.up::Other 1"),
            (lambda kept: replace(kept, version=2), "Scale 2, this is"),
            (lambda kept: replace(kept, source="another"), "another version of the kernel"),
        ],
    )
    def test_of_another_plugin(
        self, flavour: flavours.Flavour, change: Callable[[fields.Kept], fields.Kept], message: str
    ) -> None:
        registration = creators.register(flavour, [SCALE], ["sm89"])
        plugin = testing.built_plugin(flavour, scale_case())
        plugin.call = change(plugin.call)
        with pytest.raises(InputError, match=message):
            testing.loaded_plugin(flavour, plugin)
        with pytest.raises(InputError, match=message):
            registration.raise_errors()

    @pytest.mark.parametrize("damage", ["header", "ptx", "missing", "format"])
    def test_damaged(self, damage: str) -> None:
        @dataclass
        class Field:
            name: str
            data: Any

        class Module:
            PluginFieldCollection = staticmethod(list)

            class PluginFieldType:
                CHAR = 6

            @staticmethod
            def PluginField(name: str, data: Any, kind: int) -> Field:
                return Field(name, data)

        ptx = Ptx("// PTX", 80, (8, 4), (12, 4))
        kept = fields.Kept(
            "made.up::Scale", 1, "n", ("x",), SCALE_ATTRIBUTES, "s", (kernels.CompiledKernel("e", (), ptx),)
        )
        found, _ = fields.write(Module, kept)
        assert fields.read(SCALE, found) == kept
        header, text = found
        if damage == "header":
            header.data = header.data[:-9]
        elif damage == "ptx":
            text.data = text.data[:-1]
        elif damage == "format":
            header.data = np.frombuffer(header.data.tobytes().replace(b'"format": 1', b'"format": 0'), np.int8)
        else:
            found.remove(text)
        with pytest.raises(InputError, match="build it again"):
            fields.read(SCALE, found)


class TestRunning:
    """What happens at run time, up to the driver."""

    def test_launches_what_was_prepared(self, flavour: flavours.Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared, launched = [], []

        def prepare(kernel: kernels.CompiledKernel, launch: KernelLaunch, inputs: int, outputs: int) -> Any:
            prepared.append((kernel.entry, launch.grid, launch.extras, inputs, outputs))
            return lambda *arguments: launched.append(arguments)

        monkeypatch.setattr(kernels, "prepare", prepare)
        creators.register(flavour, [SCALE], ["sm89"])
        plugin = testing.loaded_plugin(flavour, testing.built_plugin(flavour, scale_case()))
        for rows in (100, 3):
            desc = testing.descriptor(flavour.module, TensorInfo((rows, 5), "float32"))
            plugin.on_shape_change([desc], [desc])
            plugin.enqueue([desc], [desc], [4096], [8192], 0, 77)
        assert prepared == [("scale", (8, 1, 1), (500,), 1, 1), ("scale", (1, 1, 1), (15,), 1, 1)]
        assert launched == [([4096], [8192], 77)] * 2

    def test_a_clone_is_told_shapes_of_its_own(
        self, flavour: flavours.Flavour, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "prepare", lambda *_: lambda *_: None)
        registration = creators.register(flavour, [SCALE], ["sm89"])
        plugin = testing.loaded_plugin(flavour, testing.built_plugin(flavour, scale_case()))
        desc = testing.descriptor(flavour.module, TensorInfo((3, 5), "float32"))
        plugin.on_shape_change([desc], [desc])
        with pytest.raises(PluginError, match="before it was told the shapes"):
            plugin.attach_to_context(None).enqueue([desc], [desc], [0], [0], 0, 0)
        with pytest.raises(PluginError, match=r"node 'node' .*before it was told the shapes"):
            registration.raise_errors()

    def test_a_shape_without_a_kernel(self, flavour: flavours.Flavour) -> None:
        registration = creators.register(flavour, [LAYER_NORM], ["sm89"])
        rng = np.random.default_rng(0)
        draw = {"x": rng.standard_normal((3, 256))}
        case = next(testing.draw_cases(LAYER_NORM, lambda _: draw, rng, {}, 1))
        plugin = testing.loaded_plugin(flavour, testing.built_plugin(flavour, case))
        plugin.launch = object()
        desc = testing.descriptor(flavour.module, TensorInfo((3, 128), "float32"))
        with pytest.raises(InputError, match=r"no kernel for float32\[3, 128\].*LN_COLUMNS: 128, 256"):
            plugin.on_shape_change([desc], [desc])
        assert plugin.launch is None
        assert [str(kept).split(":")[0] for kept in registration.errors] == ["node 'node' (optframe.anchordetr"]


def test_registering_again_uses_the_same_creator(flavour: flavours.Flavour) -> None:
    registry = flavour.module.get_plugin_registry()
    creators.register(flavour, [SCALE], ["sm89"])
    first = registry.get_creator("Scale", "1", "made.up")
    second = creators.register(flavour, [SCALE], ["sm86"])
    assert registry.get_creator("Scale", "1", "made.up") is first
    assert first.registration is second
    other = replace(SCALE, attributes={"factors": OpAttribute("float", 2.0)})
    creators.register(flavour, [other], ["sm86"])
    again = registry.get_creator("Scale", "1", "made.up")
    assert (again.spec, [field.name for field in again.field_names]) == (other, ["factors", fields.INPUTS])
