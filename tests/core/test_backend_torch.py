"""The torch backend: whole models, control flow, several sizes, fusions, and errors before anything runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser

from optframe.backend import BuildOptions, Engine, NamesOptions
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.backends.torch import fuse, measure
from optframe.backends.torch.backend import TorchBackend, TorchSettings, open_model
from optframe.backends.torch.runner import TorchRunner
from optframe.errors import EnvironmentLacks, InputError
from optframe.registry import default_registry

Array = np.ndarray[Any, Any]

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'


def model(text: str) -> onnx.ModelProto:
    return parser.parse_model(HEADER + text)


def opened(proto: onnx.ModelProto) -> TorchRunner:
    return open_model(ir.from_proto(proto), "cpu", TorchSettings(), "model")


def expected(proto: onnx.ModelProto, feeds: dict[str, Array], folder: Path) -> dict[str, Array]:
    path = folder / "reference.onnx"
    onnx.save(proto, path)
    with OnnxRuntimeBackend().open(Engine(path, "onnxruntime", "fp32", "cpu")) as runner:
        return dict(runner.run(feeds))


def assert_same(proto: onnx.ModelProto, feeds: dict[str, Array], folder: Path) -> TorchRunner:
    runner, wanted = opened(proto), expected(proto, feeds, folder)
    for _ in range(2):  # the run that makes the program, and the program
        actual = runner.run(feeds)
        for name, array in wanted.items():
            assert actual[name].dtype == array.dtype
            # float32 sums of a few dozen terms in another order
            np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-5)
    return runner


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SHAPES = """graph (float[batch, n] x) => (float[batch, m] y) {
    shape = Shape (x)
    one = Constant <value_ints: ints = [1]> ()
    zero = Constant <value_ints: ints = [0]> ()
    batch = Gather (shape, zero)
    rest = Constant <value_ints: ints = [-1]> ()
    wanted = Concat <axis: int = 0> (batch, one, rest)
    turned = Reshape (x, wanted)
    y3 = Relu (turned)
    y = Reshape (y3, shape)
}"""


def test_shape_arithmetic_is_done_once_for_each_size(tmp_path: Path) -> None:
    runner = assert_same(model(SHAPES), {"x": floats(2, 6)}, tmp_path)
    runner.run({"x": floats(3, 4)})
    programs = [executable.program for executable in runner.loaded._programs.values()]
    assert [[step.op for step in program.steps] for program in programs] == [["Reshape", "Relu", "Reshape"]] * 2
    assert all(program.fixed for program in programs)


def test_a_run_on_the_cpu_leaves_settings_of_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the process's: runs in two threads would restore each other's."""
    runner = opened(model(SHAPES))
    trace, seen = runner.loaded._trace, list[bool]()
    monkeypatch.setattr(runner.loaded, "_trace", lambda x: (seen.append(torch.backends.cudnn.benchmark), trace(x))[1])
    runner.run({"x": floats(2, 6)})
    assert seen == [torch.backends.cudnn.benchmark]


BRANCHES = """graph (bool c, float[4] x) => (float[4] y) {
    y = If (c) <
        then_branch = yes () => (a) { a = Add (x, x) },
        else_branch = no () => (b) { two = Constant <value_float: float = 3.0> () b = Mul (x, two) }
    >
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_that_depends_on_values_is_chosen_in_each_run(condition: bool, tmp_path: Path) -> None:
    runner = assert_same(model(BRANCHES), {"c": np.array(condition), "x": floats(4)}, tmp_path)
    other = runner.run({"c": np.array(not condition), "x": floats(4)})["y"]
    np.testing.assert_allclose(other, floats(4) * (3.0 if condition else 2.0), rtol=1e-6)  # one rounding each
    assert not any(executable.program.fixed for executable in runner.loaded._programs.values())


LOOP = """graph (int64 n, float[2] x) => (float[2] last, float[k, 2] all) {
    going = Constant <value = bool {1}> ()
    last, all = Loop (n, going, x) <
        body = step (int64 i, bool c, float[2] s) => (d, t, u) {
            d = Identity (c)
            t = Add (s, x)
            u = Mul (t, t)
        }
    >
}"""


@pytest.mark.parametrize("count", [1, 4])
def test_a_loop_runs_as_often_as_asked(count: int, tmp_path: Path) -> None:
    assert_same(model(LOOP), {"n": np.array(count), "x": floats(2)}, tmp_path)


@pytest.mark.parametrize("kind", ["float", "int64"])
def test_a_loop_that_never_runs_collects_nothing_of_the_declared_type(kind: str, tmp_path: Path) -> None:
    feeds = {"n": np.array(0), "x": np.ones(2, "float32" if kind == "float" else kind)}
    typed = LOOP.replace("=> (d, t, u)", "=> (bool d, float[2] t, float[2] u)").replace("float", kind)
    runner = assert_same(model(typed), feeds, tmp_path)
    assert runner.run(feeds)["all"].shape == (0, 2)


SCAN = """graph (float[2] start, float[t, 2] x) => (float[2] last, float[2, t] y) {
    last, y = Scan <num_scan_inputs = 1, scan_output_axes = [1], scan_output_directions = [1],
        body = step (float[2] s, float[2] e) => (float[2] sum, float[2] product) {
            sum = Add (s, e)
            product = Mul (sum, e)
        }
    > (start, x)
}"""


def test_a_scan_collects_along_the_axis_asked_for(tmp_path: Path) -> None:
    runner = assert_same(model(SCAN), {"start": floats(2), "x": floats(3, 2)}, tmp_path)
    nothing = runner.run({"start": floats(2), "x": floats(0, 2)})  # onnxruntime refuses to run over nothing
    assert nothing["y"].shape == (2, 0)
    np.testing.assert_array_equal(nothing["last"], floats(2))


def test_a_scan_of_opset_8_is_named() -> None:
    with pytest.raises(InputError, match="no Scan with a batch axis"):
        opened(parser.parse_model(HEADER.replace("18", "8") + SCAN))


def test_an_input_with_a_default_is_that_default(tmp_path: Path) -> None:
    """Models of IR version 3 list every weight as an input."""
    proto = model("graph (float[2] x, float[2] w = {3, 4}) => (float[2] y) { y = Mul (x, w) }")
    assert_same(proto, {"x": floats(2)}, tmp_path)


def test_a_negative_size_that_an_input_declares_is_free(tmp_path: Path) -> None:
    proto = model("graph (float[n, 2] x) => (float[n, 2] y) { y = Neg (x) }")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert_same(proto, {"x": floats(3, 2)}, tmp_path)


DATA_SHAPED = """graph (float[6] x) => (int64[k] places, int64[1] count) {
    found = NonZero (x)
    count_all = Shape (found)
    one = Constant <value_ints: ints = [1]> ()
    count = Gather (count_all, one)
    flat = Constant <value_ints: ints = [-1]> ()
    places = Reshape (found, flat)
}"""


def test_a_shape_that_depends_on_values_is_read_in_each_run(tmp_path: Path) -> None:
    runner = assert_same(model(DATA_SHAPED), {"x": np.array([1, 0, 2, 0, 0, 3], np.float32)}, tmp_path)
    again = runner.run({"x": np.array([0, 0, 2, 0, 0, 0], np.float32)})
    assert again["count"].tolist() == [1]
    assert again["places"].tolist() == [2]


ATTENTION = """graph (float[1, 5, 8] x) => (float[1, 5, 8] y) <
    float[8, 8] w, float[8] b, float[8, 8] v, float[1] factor, int64[4] split = {1, 5, 2, 4}, int64[3] merge = {1, 5, 8}
> {
    q_flat = MatMul (x, w)
    q_biased = Add (b, q_flat)
    q_scaled = Mul (q_biased, factor)
    k_flat = MatMul (x, v)
    q_heads = Reshape (q_scaled, split)
    k_heads = Reshape (k_flat, split)
    q = Transpose <perm: ints = [0, 2, 1, 3]> (q_heads)
    k = Transpose <perm: ints = [0, 2, 3, 1]> (k_heads)
    values = Transpose <perm: ints = [0, 2, 1, 3]> (k_heads)
    scores = MatMul (q, k)
    weights = Softmax <axis: int = -1> (scores)
    mixed = MatMul (weights, values)
    turned = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
    merged = Reshape (turned, merge)
    y = Relu (merged)
}"""

RESIDUAL = """graph (float[1, 4, 6, 5] x) => (float[1, 4, 6, 5] y) <
    float[4, 4, 3, 3] w, float[4] b, float[4, 4, 1, 1] v, float[4] c
> {
    left = Conv <pads: ints = [1, 1, 1, 1]> (x, w, b)
    right = Conv (x, v, c)
    both = Add (left, right)
    y = Relu (both)
}"""


def with_weights(text: str, dtype: type[np.floating[Any]] = np.float32) -> onnx.ModelProto:
    """Return the model with random values for the initialisers that the text leaves open, all floats of `dtype`."""
    proto = parser.parse_model(HEADER + (text if dtype == np.float32 else text.replace("float[", "float16[")))
    for i, value in enumerate(proto.graph.value_info):
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = floats(*shape, seed=i + 1).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del proto.graph.value_info[:]
    return proto


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each call's fallback, since there is no GPU to measure on."""
    monkeypatch.setattr(measure, "fastest", lambda candidates, fallback: fallback)
    monkeypatch.setattr(measure, "random_like", lambda *arguments, **options: None)
    monkeypatch.setattr(fuse, "fuse_chains", lambda program: None)


def fused(proto: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[Array, Array, Counter[str]]:
    """Return the output without and with the rewrites for a GPU, and the ops that are left then."""
    plain, runner = opened(proto).run(feeds)["y"], opened(proto)
    runner.loaded.optimize = fuse.optimize
    runner.run(feeds)
    result = runner.run(feeds)["y"]
    steps = next(iter(runner.loaded._programs.values())).program.steps
    return plain, result, Counter(step.op for step in steps)


@pytest.mark.usefixtures("unmeasured")
def test_residual_convolutions_become_one_call_with_both_biases() -> None:
    plain, result, ops = fused(with_weights(RESIDUAL), {"x": floats(1, 4, 6, 5)})
    np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-5)  # the biases are added in another order
    assert ops == {"FusedConv": 2}


@pytest.mark.usefixtures("unmeasured")
def test_attention_in_fp16_takes_its_scale_along() -> None:
    plain, result, ops = fused(with_weights(ATTENTION, np.float16), {"x": floats(1, 5, 8).astype(np.float16)})
    # scores of 8 terms of size 10 in FP16 (2^-11) move softmax weights by some parts in a thousand
    np.testing.assert_allclose(result.astype(float), plain.astype(float), rtol=2e-2, atol=2e-2)
    assert ops["Attention"] == 1
    assert ops["Softmax"] == ops["Mul"] == ops["MatMul"] == 0


@pytest.mark.usefixtures("unmeasured")
def test_a_softmax_over_several_axes_is_no_attention() -> None:
    """Before opset 13 one without an axis takes all from the second on."""
    proto = with_weights(ATTENTION.replace(" <axis: int = -1>", ""), np.float16)
    proto.opset_import[0].version = 12
    plain, result, ops = fused(proto, {"x": floats(1, 5, 8).astype(np.float16)})
    np.testing.assert_allclose(result.astype(float), plain.astype(float), rtol=1e-2, atol=1e-3)  # FP16 in other orders
    assert ops["Attention"] == 0


PRODUCTS = """graph (
    float[2, 4, 5] x, float[1, 2, 4, 5] k, float[1, 2, 5, 4] v, float[5, 4] w
) => (float[1, 2, 5, 4] y) <float[1, 1, 1, 1] number> {
    scaled = Mul (x, number)
    q = Transpose <perm: ints = [0, 1, 3, 2]> (scaled)
    scores = MatMul (q, k)
    weights = Softmax <axis: int = -1> (scores)
    y = MatMul (weights, v)
}"""


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("values", "fused_too"), [("v", 1), ("w", 0)])
def test_attention_keeps_axes_that_broadcasting_makes(values: str, fused_too: int) -> None:
    proto = with_weights(PRODUCTS.replace("(weights, v)", f"(weights, {values})"), np.float16)
    shapes = {"x": (2, 4, 5), "k": (1, 2, 4, 5), "v": (1, 2, 5, 4), "w": (5, 4)}
    feeds = {name: floats(*shape).astype(np.float16) for name, shape in shapes.items()}
    plain, result, ops = fused(proto, feeds)
    assert result.shape == plain.shape
    np.testing.assert_allclose(result.astype(float), plain.astype(float), rtol=1e-2, atol=1e-2)  # FP16 in other orders
    assert ops["Attention"] == fused_too


FOUND = """graph (float[n] x) => (float[k, 1] y, float[n] z) <int64[1] zero = {0}, int64[1] one = {1}> {
    places = NonZero (x)
    sizes = Shape (places)
    count = Gather (sizes, one)
    shape = Concat <axis: int = 0> (count, one)
    rows = Squeeze (places, zero)
    found = Gather (x, rows)
    grown = Exp (found)
    product = Mul (grown, found)
    column = Reshape (product, shape)
    y = Tanh (column)
    negative = Neg (x)
    z = Exp (negative)
}"""


def test_shapes_that_depend_on_values_are_not_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)  # the traced graph holds the shapes as well
    plain, runner = opened(model(FOUND)), opened(model(FOUND))
    runner.loaded.optimize = fuse.optimize
    for values in ([1, 0, 2], [1, 0, 2], [0, 5, 0], [1, 3, 2]):
        feeds = {"x": np.array(values, np.float32)}
        wanted = plain.run(feeds)
        for name, array in runner.run(feeds).items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-6)  # the same calls
    (executable,) = runner.loaded._programs.values()
    assert [step.node for step in executable.program.steps if step.op == "Chain"] == ["Neg, Exp ()"]


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    runner = opened(model(SHAPES))
    for feeds, words in (
        ({"x": floats(2, 6).astype(np.float64)}, "'x' is float64, the model takes float32"),
        ({"x": floats(6)}, r"shape \[6\], the model takes \[batch, n\]"),
        ({"z": floats(2, 6)}, "unknown input 'z'"),
        ({}, "needs input 'x'"),
    ):
        with pytest.raises(InputError, match=words):
            runner.run(feeds)


def test_unknown_ops_are_all_named_before_anything_runs() -> None:
    text = "graph (float[2] x) => (float[2] y) { a = Bernoulli (x) y = RandomNormalLike (a) }"
    with pytest.raises(InputError, match=r"Bernoulli .*RandomNormalLike"):
        opened(model(text))


def test_options_and_devices_are_checked(tmp_path: Path) -> None:
    for value, message in (("x", "graphs wants an integer, not 'x'"), ("-1", r"graphs is a number .* \(0: none\)")):
        with pytest.raises(InputError, match=f"backend torch: {message}"):
            TorchBackend().check(BuildOptions(options={"graphs": value}))
    with pytest.raises(InputError, match="did you mean 'kernels'"):
        TorchBackend().check(BuildOptions(options={"kernel": "true"}))
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentLacks, match="no CUDA GPU"):
            TorchBackend().check(BuildOptions(device="cuda"))


def test_build_and_open(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(SHAPES), path)
    engine = TorchBackend().build(path, tmp_path / "engine", BuildOptions(device="cpu", options={"fuse": "false"}))
    with TorchBackend().open(engine) as runner:
        assert runner.run({"x": -floats(2, 6)})["y"].shape == (2, 6)
    with pytest.raises(RuntimeError, match="closed"):
        runner.run({"x": floats(2, 6)})
    engine.path.with_name("model.onnx.json").write_text('{"graphs": "4", "kernels": true, "fuse": true, "tf32": false}')
    with pytest.raises(InputError, match="is damaged; build the engine again"):
        TorchBackend().open(engine)


def test_options_of_other_backends_do_not_disturb_it() -> None:
    """Where several backends run, each is given its own options, which takes that all tell theirs."""
    for name in ("torch", "onnxruntime"):
        backend = default_registry().load_backend(name)
        assert isinstance(backend, NamesOptions)
        assert "tf32" in backend.option_names
