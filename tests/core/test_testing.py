"""What third parties test with finds each breach of a contract, and passes what keeps it."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from optframe.errors import PluginError
from optframe.hookspec import hookimpl
from optframe.passes import Dialect, GraphPass, PassContext, PassResult
from optframe.testing import (
    assert_op_contract,
    assert_pass_contract,
    assert_plugin_contract,
    host_with,
    model_from_text,
)
from optframe.types import KernelLaunch, KernelSpec, OpAttribute, OpParameter, OpSpec, PassSpec, TensorInfo

Array = np.ndarray[Any, Any]
HERE = "testing_targets"


def twice_identity() -> ir.Model:
    return model_from_text(
        """agraph (float[2, 3] x) => (float[2, 3] y) {
            a = Identity (x)
            b = Relu (a)
            c = Identity (b)
            y = Neg (c)
        }"""
    )


def test_a_model_from_text_has_its_weights_as_initialisers() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    text = "g (float[1, 2] x, float w) => (float[1, 3] y) { a = MatMul (x, w)  [last] y = my.Thing (a) }"
    model = model_from_text(text, 17, domains=["my"], w=weight)
    assert model.opset_imports == {"": 17, "my": 1}
    assert [value.name for value in model.graph.inputs] == ["x"]
    (initializer,) = model.graph.initializers.values()
    assert initializer.const_value is not None
    np.testing.assert_array_equal(initializer.const_value.numpy(), weight)
    first, last = model.graph
    assert first.inputs[1] is initializer
    assert (first.name, last.name, last.domain) == ("MatMul0", "last", "my")


def feeds(rng: np.random.Generator) -> list[dict[str, Array]]:
    """Two feeds of both signs each: six numbers are all positive once in 64 draws, and Relu is then the same as Abs."""
    values = np.abs(rng.standard_normal((2, 2, 3))).astype(np.float32)
    values[:, 0] *= -1
    return [{"x": value} for value in values]


@dataclass(frozen=True)
class DropIdentity(GraphPass):
    """Removes Identity nodes; the subclasses below each break one rule."""

    name: ClassVar[str] = "drop-identity"
    limit: int = 100

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        identities = [node for node in model.graph if node.op_type == "Identity"]
        rewrites = sum(self.drop(model, node) for node in identities[: self.limit] if self.may(node, context))
        return PassResult(rewrites > 0, rewrites)

    def may(self, node: ir.Node, context: PassContext) -> bool:
        return context.allow(node)

    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
        return True


class Silent(DropIdentity):
    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        super().run(model, context)
        return PassResult(False)


class Boastful(DropIdentity):
    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        return PassResult(True, 1)


class Piecemeal(DropIdentity):
    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        return dataclasses.replace(DropIdentity(limit=1)).run(model, context)


class Unasked(DropIdentity):
    def may(self, node: ir.Node, context: PassContext) -> bool:
        return True


class Wrong(DropIdentity):
    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        for relu in [each for each in model.graph if each.op_type == "Relu"]:
            relu.op_type = "Abs"
        return super().drop(model, node)


class Renaming(DropIdentity):
    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        model.graph.outputs[0].name = "z"
        return super().drop(model, node)


class Foreign(DropIdentity):
    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        relu = next(each for each in model.graph if each.op_type == "Relu")
        relu.domain = "com.acme"
        return super().drop(model, node)


class Unwired(DropIdentity):
    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        model.graph.remove(node)
        return True


class Invalid(DropIdentity):
    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        relu = next(each for each in model.graph if each.op_type == "Relu")
        relu.attributes.add(ir.AttrInt64("no_such_attribute", 1))
        return super().drop(model, node)


class Random(DropIdentity):
    numbers: ClassVar[Any] = itertools.count()

    def drop(self, model: ir.Model, node: ir.Node) -> bool:
        model.metadata_props["random"] = str(next(self.numbers))
        return super().drop(model, node)


@dataclass(frozen=True)
class Forgetful(DropIdentity):
    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", self.limit + 1)


@dataclass(frozen=True)
class SurgeonDropIdentity(GraphPass):
    """The same in graphsurgeon's dialect."""

    name: ClassVar[str] = "surgeon-drop-identity"
    dialect: ClassVar[Dialect] = "graphsurgeon"
    honest: bool = True

    def run(self, model: gs.Graph, context: PassContext) -> PassResult:
        dropped = [node for node in model.nodes if node.op == "Identity" and context.allow(node)]
        for node in dropped:
            for reader in list(node.outputs[0].outputs):
                reader.inputs = [node.inputs[0] if each is node.outputs[0] else each for each in reader.inputs]
            node.outputs.clear()
        model.cleanup().toposort()
        return PassResult(bool(dropped) or not self.honest, len(dropped))


def test_a_pass_of_the_other_dialect_is_held_to_the_same(rng: np.random.Generator) -> None:
    result = assert_pass_contract(SurgeonDropIdentity(), twice_identity(), feeds(rng))
    assert result == PassResult(True, 2)
    with pytest.raises(AssertionError, match="finds more to do"):
        assert_pass_contract(SurgeonDropIdentity(honest=False), twice_identity(), feeds(rng))


def test_a_right_pass_keeps_its_contract(rng: np.random.Generator) -> None:
    model = twice_identity()
    assert assert_pass_contract(DropIdentity(), model, feeds(rng)) == PassResult(True, 2)
    assert [node.op_type for node in model.graph] == ["Identity", "Relu", "Identity", "Neg"], "the model stays as it is"
    assert assert_pass_contract(DropIdentity(limit=0), model, feeds(rng)) == PassResult(False, 0)


@pytest.mark.parametrize(
    ("pass_", "said"),
    [
        (Silent(), "says modified=False, which is not true"),
        (Boastful(), "says modified=True, which is not true"),
        (Piecemeal(), "finds more to do when it runs again"),
        (Unasked(), "makes 2 rewrites without asking"),
        (Wrong(), "output 'y' for input 0: its values differ"),
        (Renaming(), "the graph's outputs were y and are z"),
        (Foreign(), "a domain that it does not declare: com.acme"),
        (Unwired(), "which nothing before it makes"),
        (Invalid(), "no_such_attribute"),
        (Random(), "is not deterministic"),
        (Forgetful(), "does not read back"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, GraphPass) else "",
)
def test_a_pass_that_breaks_a_rule_is_caught(rng: np.random.Generator, pass_: GraphPass, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_pass_contract(pass_, twice_identity(), feeds(rng))


def test_a_pass_is_not_shown_right_without_inputs() -> None:
    with pytest.raises(AssertionError, match="no feeds"):
        assert_pass_contract(DropIdentity(), twice_identity(), [])


# --- ops

SCALE = OpSpec(
    name="Scale",
    domain="com.acme",
    inputs=(OpParameter("x", ("float32", "float16", "int32")), OpParameter("offset", ("float32",), optional=True)),
    outputs=(OpParameter("y"),),
    attributes={"factor": OpAttribute("float", 2.0)},
    function=f"{HERE}:function",
    shape_rule=f"{HERE}:shapes",
    kernel=KernelSpec("optframe:testing.py", f"{HERE}:launch", f"{HERE}:reuse"),
)


def scale_function(opset: int, dtypes: Mapping[str, str], op: str = "Mul", domain: str = "") -> ir.Function:
    offset = "offset" in dtypes
    text = f"""
    <domain: "com.acme", opset_import: ["" : {opset}, "org.other" : 1]>
    Scale <factor: float = 2.0> (x{", offset" if offset else ""}) => (y) {{
        constant = Constant <value_float: float = @factor> ()
        wide = Cast <to: int = 1> (x)
        scaled = {domain}{op} (wide, constant)
        {"moved = Add (scaled, offset)" if offset else "moved = Identity (scaled)"}
        y = CastLike (moved, x)
    }}
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def scale(x: Array, factor: float, offset: Array | None = None) -> Array:
    y = x * factor if offset is None else x * factor + offset
    return np.trunc(y) if x.dtype.kind == "i" else y


def draw(rng: np.random.Generator) -> dict[str, Array]:
    shape = rng.integers(1, 6, rng.integers(0, 4))
    x = {"x": rng.integers(-50, 50, shape) + rng.random(shape)}
    return x | ({"offset": rng.standard_normal(shape)} if rng.random() < 0.5 else {})


def launch(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Any) -> KernelLaunch:
    return KernelLaunch("host_with", (), (1, 1, 1), (1, 1, 1))


def reuse(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Any, defines: Any
) -> KernelLaunch:
    return dataclasses.replace(launch(inputs, outputs, attributes), defines=defines)


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that `SCALE` names, right in everything; a test breaks one thing of it."""
    module = types.ModuleType(HERE)
    vars(module).update(function=scale_function, shapes=lambda inputs, attributes: (inputs[0],), launch=launch)
    vars(module).update(reuse=reuse)
    monkeypatch.setitem(__import__("sys").modules, HERE, module)
    return module


def test_a_right_op_keeps_its_contract_in_every_dtype(targets: types.ModuleType, seed: int) -> None:
    shown = assert_op_contract(SCALE, draw, scale, seed=seed, attributes={"factor": -1.5}, trials=5)
    assert shown == [{"x": dtype, "offset": "float32"} for dtype in ("float32", "float16", "int32")]


def broken_shape(inputs: Sequence[TensorInfo], attributes: Any) -> tuple[TensorInfo, ...]:
    return (TensorInfo((*inputs[0].shape, 1), inputs[0].dtype),)


def foreign_function(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
    return scale_function(opset, dtypes, "Mul", "org.other.")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"shapes": broken_shape}, "shape rule: .*rank"),
        ({"function": lambda opset, dtypes: scale_function(opset, dtypes, "Div")}, "Not equal to tolerance"),
        ({"function": foreign_function}, "a meaning is in standard ops"),
        ({"launch": lambda *_: KernelLaunch("no_such_entry", (), (1, 1, 1), (1, 1, 1))}, "no entry 'no_such_entry'"),
        ({"reuse": lambda *_: KernelLaunch("host_with", (), (2, 1, 1), (1, 1, 1))}, "the reuse rule launches"),
    ],
)
def test_an_op_that_breaks_a_rule_is_caught(
    targets: types.ModuleType, seed: int, broken: dict[str, Callable[..., Any]], said: str
) -> None:
    vars(targets).update(broken)
    with pytest.raises(AssertionError, match=said):
        assert_op_contract(SCALE, draw, scale, seed=seed)


def test_an_op_that_nothing_can_run_is_not_shown_right(targets: types.ModuleType, seed: int) -> None:
    def relu(opset: int, dtypes: Mapping[str, str]) -> ir.Function:
        header = f'<domain: "com.acme", opset_import: ["" : {opset}]>'
        text = f"{header} Scale <factor: float = 2.0> (x) => (y) {{ y = Relu (x) }}"
        return ir.serde.deserialize_function(onnx.parser.parse_function(text))

    vars(targets).update(function=relu)
    spec = dataclasses.replace(SCALE, inputs=(OpParameter("x", ("bfloat16",)),))
    with pytest.raises(AssertionError, match="nothing was shown"):
        assert_op_contract(spec, lambda rng: {"x": rng.random(3)}, scale, seed=seed)


# --- plugins


class Plugin:
    @hookimpl
    def optframe_passes(self) -> list[PassSpec]:
        return [PassSpec("drop-identity", f"{HERE}:DropIdentity")]


def test_a_plugin_whose_targets_load_keeps_its_contract(targets: types.ModuleType) -> None:
    targets.DropIdentity = DropIdentity  # type: ignore[attr-defined]
    assert [spec.name for spec in assert_plugin_contract(Plugin()).passes()] == ["drop-identity"]


def test_a_target_that_does_not_load_is_caught(targets: types.ModuleType) -> None:
    with pytest.raises(Exception, match="cannot load 'testing_targets:DropIdentity'"):
        assert_plugin_contract(Plugin())


class WithOp:
    def __init__(self, **references: str) -> None:
        kernel = KernelSpec(
            references.get("source", "optframe:__init__.py"), references.get("launch", HERE_ANY), HERE_ANY
        )
        function, shapes = references.get("function", HERE_ANY), references.get("shapes", HERE_ANY)
        self.spec = OpSpec("Op", "acme", (OpParameter("x"),), (OpParameter("y"),), function, shapes, kernel=kernel)

    @hookimpl
    def optframe_ops(self) -> list[OpSpec]:
        return [self.spec]


HERE_ANY = "optframe.errors:describe"
"""A reference to something."""


def test_what_an_op_refers_to_is_loaded_too() -> None:
    assert list(assert_plugin_contract(WithOp()).ops()) == ["acme::Op"]
    for name, reference, said in (
        ("function", "optframe.errors:nothing", "cannot load 'optframe.errors:nothing'"),
        ("shapes", "optframe.errors:nothing", "cannot load 'optframe.errors:nothing'"),
        ("launch", "optframe.errors:nothing", "cannot load 'optframe.errors:nothing'"),
        ("source", "optframe:nothing.cu", "cannot read the CUDA source 'optframe:nothing.cu'"),
    ):
        with pytest.raises(PluginError, match=rf"^op 'acme::Op': {said}"):
            assert_plugin_contract(WithOp(**{name: reference}))


def test_problems_of_a_plugin_are_caught() -> None:
    module = types.ModuleType("acme_module")
    module.optframe_modles = lambda: []  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="did you mean 'optframe_models'"):
        assert_plugin_contract(module)


def test_a_host_has_only_what_it_is_given() -> None:
    assert [each.plugin for each in host_with(Plugin(), types.ModuleType("acme")).plugins] == ["Plugin", "acme"]
