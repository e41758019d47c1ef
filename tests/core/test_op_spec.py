"""What an op declares, and what its author's functions give, is checked, and the message says whose it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe.errors import InputError, PluginError
from optframe.hookspec import hookimpl
from optframe.testing import host_with
from optframe.types import KernelLaunch, KernelSpec, OpAttribute, OpParameter, OpSpec, TensorInfo

MODULE = "acme_op"
OP = OpSpec(
    "Twice",
    "acme",
    (OpParameter("x"), OpParameter("bias", optional=True)),
    (OpParameter("y"),),
    f"{MODULE}:function",
    f"{MODULE}:shapes",
    {"scale": OpAttribute("float", 2)},
    KernelSpec(f"{MODULE}:twice.cu", f"{MODULE}:launch", f"{MODULE}:reuse"),
)
LAUNCH = KernelLaunch("twice", (("TYPE", "float"),), (1, 1, 1), (32, 1, 1), 0, (np.int64(3),))  # type: ignore[arg-type]


@pytest.fixture
def author(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`author(launch=function)` makes what `OP` refers to."""

    def put(**functions: Any) -> None:
        module = ModuleType(MODULE)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, MODULE, module)

    return put


class Mine:
    def __init__(self, op: OpSpec) -> None:
        self.op = op

    @hookimpl
    def optframe_ops(self) -> list[OpSpec]:
        return [self.op]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"inputs": OpParameter("x")}, "inputs are no tuple of OpParameter"),
        ({"outputs": ("y",)}, "outputs are no tuple of OpParameter"),
        ({"inputs": (OpParameter("x", "float32"),)}, "the dtypes of 'x' are no tuple of names"),  # type: ignore[arg-type]
        ({"outputs": (OpParameter("y", ("bf16",)),)}, "'y' has the dtype 'bf16', which is none of bfloat16, bool"),
        ({"attributes": {"a": 3}}, "the attribute 'a' is an object of type int, not an OpAttribute"),
        ({"attributes": {"a": OpAttribute("double")}}, "the attribute 'a' has the type 'double', which is none of"),  # type: ignore[arg-type]
        ({"attributes": {"a": OpAttribute("strings")}}, "the attribute 'a' has the type 'strings'"),  # type: ignore[arg-type]
        ({"attributes": {"a": OpAttribute("int", 0.5)}}, "the attribute 'a' has the default 0.5, which is no int"),
        ({"attributes": {"a": OpAttribute("ints", 3)}}, "the attribute 'a' has the default 3, which is no ints"),
        ({"kernel": "twice.cu"}, "its kernel is an object of type str, not a KernelSpec"),
    ],
)
def test_a_wrong_declaration_is_blamed_on_its_plugin(changed: dict[str, Any], said: str) -> None:
    host = host_with(Mine(replace(OP, **changed)))
    assert host.ops() == []
    [problem] = host.problems
    assert str(problem).startswith(
        "plugin 'Mine' (registered in process): optframe_ops: item 0 declares the op 'Twice'"
    )
    assert said in str(problem)


def test_a_right_declaration_is_taken() -> None:
    attributes = {"a": OpAttribute("ints", (1, 2)), "b": OpAttribute("floats", (1, 0.5)), "c": OpAttribute("string")}
    host = host_with(Mine(replace(OP, attributes=attributes)))
    assert len(host.ops()) == 1
    assert host.problems == []


def parsed(text: str) -> ir.Function:
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def body(domain: str = "acme", name: str = "Twice", inputs: str = "x", outputs: str = "y") -> ir.Function:
    return parsed(
        f'<domain: "{domain}", opset_import: ["" : 18]> {name} ({inputs}) => ({outputs}) {{ y = Add (x, x) }}'
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "the function of acme::Twice is None, not an onnx_ir.Function"),
        (body(name="Thrice"), "the function of acme::Twice is called acme::Thrice"),
        (body(domain="acne"), "the function of acme::Twice is called acne::Twice"),
        (body(inputs=""), "the function of acme::Twice has 0 inputs, not 1 to 2"),
        (body(inputs="x, bias, more"), "the function of acme::Twice has 3 inputs, not 1 to 2"),
        (body(outputs="y, x"), "the function of acme::Twice has 2 outputs, not 1"),
    ],
)
def test_a_function_that_is_not_of_the_op_is_refused(given: Any, said: str, author: Callable[..., None]) -> None:
    author(function=lambda opset, dtypes: given)
    with pytest.raises(PluginError) as caught:
        OP.build_function(18, {"x": "float32"})
    assert str(caught.value) == said


def test_a_function_of_the_op_is_handed_on(author: Callable[..., None]) -> None:
    for inputs in ("x", "x, bias"):
        given = body(inputs=inputs)
        author(function=lambda opset, dtypes, given=given: given)
        assert OP.build_function(18, {"x": "float32"}) is given


def call(role: str) -> object:
    info = TensorInfo((2, 3), "float32")
    assert OP.kernel is not None
    if role == "function":
        return OP.build_function(18, {"x": "float32"})
    if role == "shapes":
        return OP.infer([info], {})
    if role == "launch":
        return OP.kernel.launch_rule()([info], [info], {})
    reuse = OP.kernel.reuse_rule()
    assert reuse is not None
    return reuse([info], [info], {}, ())


@pytest.mark.parametrize(
    ("role", "words"),
    [("function", "function"), ("shapes", "shape rule"), ("launch", "launch rule"), ("reuse", "reuse rule")],
)
def test_what_an_authors_function_raises_names_it(role: str, words: str, author: Callable[..., None]) -> None:
    def fails(*arguments: object) -> object:
        return {}["float16"]

    def refuses(*arguments: object) -> object:
        raise InputError("too large")

    author(**{role: fails})
    with pytest.raises(
        PluginError, match=rf"^{words} acme_op:{role} raised KeyError: 'float16' \(test_op_spec.py:"
    ) as caught:
        call(role)
    assert isinstance(caught.value.__cause__, KeyError)
    author(**{role: lambda *arguments: sys.exit(0)})
    with pytest.raises(PluginError, match=f"{words} acme_op:{role} raised SystemExit: 0"):
        call(role)
    author(**{role: refuses})
    with pytest.raises(InputError, match=r"^too large$") as refused:
        call(role)
    assert not isinstance(refused.value, PluginError)


@pytest.mark.parametrize("role", ["launch", "reuse"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("twice", ()), "gives ('twice', ()), not a KernelLaunch"),
        (replace(LAUNCH, grid=(1, 1)), "gives a launch whose grid is (1, 1), not a tuple of three integers"),  # type: ignore[arg-type]
        (replace(LAUNCH, block=(32, 1, 1.0)), "whose block is (32, 1, 1.0), not a tuple of three integers"),  # type: ignore[arg-type]
        (replace(LAUNCH, extras=[3]), "whose extras are [3], not a tuple of integers"),  # type: ignore[arg-type]
        (replace(LAUNCH, extras=(3.0,)), "whose extras are (3.0,), not a tuple of integers"),  # type: ignore[arg-type]
        (replace(LAUNCH, shared_bytes=2.5), "whose shared_bytes are 2.5, not an integer"),  # type: ignore[arg-type]
        (replace(LAUNCH, defines={"A": "1"}), "whose defines are {'A': '1'}, not a tuple of pairs of text"),  # type: ignore[arg-type]
        (replace(LAUNCH, defines=(("A", 1),)), "whose defines are (('A', 1),), not a tuple of pairs of text"),  # type: ignore[arg-type]
        (replace(LAUNCH, entry=None), "whose entry is None, not text"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_launch_names_the_rule(role: str, given: Any, said: str, author: Callable[..., None]) -> None:
    author(**{role: lambda *arguments: given})
    with pytest.raises(PluginError) as caught:
        call(role)
    assert str(caught.value).startswith(f"{role} rule acme_op:{role} gives ")
    assert said in str(caught.value)


def test_a_launch_is_handed_on(author: Callable[..., None]) -> None:
    author(launch=lambda *arguments: LAUNCH, reuse=lambda *arguments: LAUNCH)
    assert call("launch") is call("reuse") is LAUNCH
