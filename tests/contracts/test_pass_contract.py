"""Every registered pass: documented with an example, and its new nodes say where they come from."""

from __future__ import annotations

import re

import onnx.parser
import onnx_ir as ir
import pytest

from optframe import gate
from optframe.commands.passes import step_facts
from optframe.pipeline import Pipeline
from optframe.registry import default_registry
from optframe.testing import assert_provenance

REGISTRY = default_registry()


@pytest.mark.parametrize("name", [spec.name for spec in REGISTRY.passes()])
def test_passes_show_an_example(name: str) -> None:
    facts = step_facts(REGISTRY, name)
    assert facts["doc"]
    assert re.search(r"^before:.*\S", facts["example"], re.M), f"{name} has no example in its docstring"
    assert re.search(r"^after:.*\S", facts["example"], re.M), f"{name} does not say what its example becomes"


@pytest.mark.parametrize("name", [spec.name for spec in REGISTRY.pipelines()])
def test_pipelines_show_their_text(name: str) -> None:
    facts = step_facts(REGISTRY, name)
    assert facts["text"]
    assert facts["expanded"].count(",") >= facts["text"].count(",")


NORMS = """<ir_version: 8, opset_import: ["" : 18]>
g (float[2, 3, 8] x, float[2, 8, 4, 4] image) => (float[2, 3, 8] y, float[2, 8, 4, 4] z)
<float[8] gain = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float two = {2.0}, float eps = {0.001}, int64[1] last = {-1},
 int64[3] groups = {0, 4, -1}, float[4] ones = {1.0, 1.0, 1.0, 1.0}, float[4] zeros = {0.0, 0.0, 0.0, 0.0}> {
    sum = Add (x, x)
    m = ReduceMean <keepdims = 1> (sum, last)
    d = Sub (sum, m)
    s = Pow (d, two)
    v = ReduceMean <keepdims = 1> (s, last)
    e = Add (v, eps)
    r = Sqrt (e)
    q = Div (d, r)
    y = Mul (q, gain)
    split = Reshape (image, groups)
    normed = InstanceNormalization <epsilon = 0.001> (split, ones, zeros)
    shape = Shape (image)
    z = Reshape (normed, shape)
}"""


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("fuse-layernorm", "clean"),
        ("fuse-layernorm-plugin", "clean,fuse-layernorm"),
        ("fuse-skip-layernorm-plugin", "clean,fuse-layernorm,fuse-layernorm-plugin"),
    ],
)
def test_fused_norms_say_where_they_come_from(name: str, before: str) -> None:
    """The passes whose own tests do not go through `assert_pass_contract`, which looks at this for all others."""
    model = ir.from_proto(onnx.parser.parse_model(NORMS))
    ready = gate.optimize(model, Pipeline.parse(before, REGISTRY), ops=REGISTRY.ops(), verify="off").model
    assert assert_provenance(REGISTRY.load_pass(name)(), ready, ops=REGISTRY.ops().values()) == 1
