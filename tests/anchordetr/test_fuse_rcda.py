"""`fuse-rcda` on exports of the attention and of the detector: one op a layer, numerically equal, masks included."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from optframe import graph
from optframe.passes import PassContext, PassResult
from optframe_anchordetr.config import ExportOptions
from optframe_anchordetr.export import export
from optframe_anchordetr.model import AnchorDETR
from optframe_anchordetr.model.attention import MultiHeadAttention, RowColumnAttention
from optframe_anchordetr.ops import DOMAIN, OPS
from optframe_anchordetr.passes.fuse_rcda import FuseRCDA
from optframe_anchordetr.passes.layouts import aligned, moved, multiplied, regroup, reshape_target
from optframe_passes.edit import add_initializer
from optframe_passes.lift_opset import LiftOpset
from optframe_passes.propagate import Propagation

Array = np.ndarray[Any, Any]
REGISTERED = {spec.identifier: spec for spec in OPS}
RCDA = f"{DOMAIN}::RCDA"
CHANNELS, HEADS = 24, 3

# Softmax weights sum to 1 and values stay under 5: float32 sums in another order differ by some 1e-7 of that.
TOLERANCE = 5e-6


class Attend(torch.nn.Module):
    """RCDA of plain tensors: what an exporter can take."""

    def __init__(self, sum_order: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = RowColumnAttention(CHANNELS, HEADS, sum_order)

    def forward(self, q_row: Any, q_col: Any, k_row: Any, k_col: Any, v: Any, mask: Any = None) -> Any:
        return self.attention((q_row, q_col), (k_row, k_col), v, mask)


def example(n: int, queries: int, h: int, w: int, masked: bool, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, queries, CHANNELS)] * 2 + [(n, h, w, CHANNELS)] * 3
    tensors = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    if not masked:
        return tensors
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    mask[-1, :, w - w // 3 :] = True
    mask[-1, h - h // 3 :] = True
    return (*tensors, mask)


NAMES = ["q_row", "q_col", "k_row", "k_col", "v", "mask"]


@lru_cache
def exported(
    sum_order: str, sizes: tuple[int, int, int, int], masked: bool, exporter: str, opset: int, dynamic: bool
) -> bytes:
    inputs = example(*sizes, masked)
    names = NAMES[: len(inputs)]
    module = Attend(sum_order).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            sizes_by_name = {name: torch.export.Dim(name, min=2) for name in ("n", "l", "h", "w")}
            n, queries, h, w = (sizes_by_name[name] for name in ("n", "l", "h", "w"))
            maps = ({0: n, 1: h, 2: w},) * 3 + (({0: n, 1: h, 2: w},) if masked else ())
            shapes = ({0: n, 1: queries}, {0: n, 1: queries}, *maps) if dynamic else None
            program = torch.onnx.export(
                module,
                inputs,
                opset_version=opset,
                input_names=names,
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
            return program.model_proto.SerializeToString()
        axes = {name: {0: "n", 1: "l"} if name[0] == "q" else {0: "n", 1: "h", 2: "w"} for name in names}
        buffer = io.BytesIO()
        torch.onnx.export(
            module,
            inputs,
            buffer,
            opset_version=opset,
            input_names=names,
            dynamo=False,
            dynamic_axes=axes if dynamic else None,
        )
        return buffer.getvalue()


def fuse(model: ir.Model, rows: bool = False, **options: Any) -> tuple[PassResult, list[str]]:
    LiftOpset().run(model, PassContext())
    context = PassContext(ops=REGISTERED, pass_name="fuse-rcda", **options)
    return FuseRCDA(rows).run(model, context), [miss.reason for miss in context.near_misses]


def run(model: ir.Model | onnx.ModelProto, *inputs: Any) -> list[Array]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feeds = {value.name: np.asarray(array) for value, array in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)


def assert_fused(content: bytes, *runs: tuple[torch.Tensor, ...], misses_allowed: bool = False) -> ir.Model:
    model = ir.from_proto(onnx.load_from_string(content))
    before = [run(model, *inputs)[0] for inputs in runs]
    result, misses = fuse(model)
    assert result == PassResult(True, 1), misses
    counts = graph.op_histogram(model, REGISTERED)
    assert counts[RCDA] == 1
    assert counts["Softmax"] == counts["Where"] == 0
    for inputs, expected in zip(runs, before, strict=True):
        np.testing.assert_allclose(run(model, *inputs)[0], expected, rtol=0, atol=TOLERANCE)
    assert fuse(model)[0] == PassResult(False)
    return model


SIZES = [(1, 7, 4, 6), (1, 7, 6, 4), (2, 5, 3, 3), (1, 1, 1, 5)]


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 20])
@pytest.mark.parametrize("sum_order", ["row-first", "column-first"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_torchscript_exports(sum_order: str, sizes: tuple[int, int, int, int], opset: int) -> None:
    assert_fused(exported(sum_order, sizes, False, "torchscript", opset, False), example(*sizes, False, seed=1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", SIZES[1:3], ids=str)
def test_rows(sizes: tuple[int, int, int, int], dynamic: bool) -> None:
    """Queries and value come as matrices where the result can get its shape back: not where N and L are free."""
    model = ir.from_proto(onnx.load_from_string(exported("row-first", sizes, False, "torchscript", 17, dynamic)))
    inputs = example(*sizes, False, seed=1)
    (expected,) = run(model, *inputs)
    assert fuse(model, rows=True)[0] == PassResult(True, 1)
    np.testing.assert_allclose(run(model, *inputs)[0], expected, rtol=0, atol=TOLERANCE)
    (call,) = (node for node in model.graph if node.op_type == "RCDA")
    known = Propagation.of(model)
    ranks = [len(known.dims(call.inputs[index]) or ()) for index in (0, 1, 2, 3, 4)]
    assert ranks == ([3, 3, 3, 3, 4] if dynamic else [2, 2, 3, 3, 2])


@pytest.mark.parametrize(("sum_order", "sizes"), [("row-first", SIZES[0]), ("column-first", SIZES[2])], ids=str)
def test_dynamo_exports(sum_order: str, sizes: tuple[int, int, int, int]) -> None:
    assert_fused(exported(sum_order, sizes, False, "dynamo", 18, False), example(*sizes, False, seed=1))


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 12), ("torchscript", 17), ("dynamo", 18)])
@pytest.mark.parametrize("sum_order", ["row-first", "column-first"])
def test_masks_of_fixed_size(sum_order: str, exporter: str, opset: int) -> None:
    sizes = (2, 5, 6, 4)
    model = assert_fused(exported(sum_order, sizes, True, exporter, opset, False), example(*sizes, True, seed=1))
    (call,) = (node for node in model.graph if node.op_type == "RCDA")
    assert [str(value.shape) for value in call.inputs[5:] if value is not None] in (
        ["[2,4]", "[2,6]"],
        ["None", "None"],
    )


@pytest.mark.parametrize(
    ("sum_order", "exporter", "opset", "masked"),
    [
        *((order, "torchscript", 17, masked) for order in ("row-first", "column-first") for masked in (False, True)),
        ("row-first", "dynamo", 18, True),
        *(
            pytest.param(order, "dynamo", 18, masked, marks=pytest.mark.slow)  # seconds for each export
            for order, masked in [("row-first", False), ("column-first", False), ("column-first", True)]
        ),
    ],
)
def test_free_sizes(sum_order: str, exporter: str, opset: int, masked: bool) -> None:
    content = exported(sum_order, (2, 5, 6, 4), masked, exporter, opset, True)
    others = [example(*sizes, masked, seed=2) for sizes in ((2, 5, 6, 4), (1, 9, 3, 8), (3, 2, 7, 7))]
    model = assert_fused(content, *others)
    assert not any(isinstance(dim, int) for value in model.graph.inputs for dim in (value.shape or [])[:2])


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
@pytest.mark.parametrize("sum_order", ["row-first", "column-first"])
@pytest.mark.parametrize("masked", [False, True])
def test_after_another_optimiser(sum_order: str, masked: bool, level: str, tmp_path: Path) -> None:
    sizes = (2, 5, 6, 4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    content = exported(sum_order, sizes, masked, "torchscript", 17, False)
    onnxruntime.InferenceSession(content, options)
    optimised = Path(options.optimized_model_filepath).read_bytes()
    assert_fused(optimised, example(*sizes, masked, seed=3))


def test_heads_and_names() -> None:
    model = assert_fused(exported("row-first", (1, 7, 4, 6), False, "torchscript", 17, False))
    (call,) = (node for node in model.graph if node.op_type == "RCDA")
    assert call.attributes["num_heads"].as_int() == HEADS
    assert call.metadata_props["optframe.pass"] == "fuse-rcda"
    assert "MatMul" in call.metadata_props["optframe.from"]


@pytest.mark.parametrize("shape", ["[6, 8]", "[1, 2, 3, 8]"])
def test_reshapes_stand_in_where_a_form_is_missing(shape: str) -> None:
    """Queries as a map (1, 2, 3, C) that is split into heads in one go, and a result that leaves in another shape."""
    model = written_out(queries="float[1, 2, 3, 8] qr, float[1, 2, 3, 8] qc", result=f"float{shape} y")
    inputs = drawn(model)
    before = run(model, *inputs)[0]
    result, misses = fuse(model)
    assert result == PassResult(True, 1), misses
    assert graph.op_histogram(model, REGISTERED) == {RCDA: 1, "Reshape": 3}
    np.testing.assert_allclose(run(model, *inputs)[0], before, rtol=0, atol=TOLERANCE)


def written_out(
    queries: str = "float[1, 6, 8] qr, float[1, 6, 8] qc",
    result: str = "float[1, 6, 8] y",
    change: tuple[str, str] = ("", ""),
    extra: str = "",
) -> ir.Model:
    """RCDA of 2 heads by hand: 6 queries, h = 4, w = 5; `change` replaces a piece of the text."""
    shape = result[len("float") : result.index("]") + 1]
    body = f"""
        sq = Constant <value_ints = [1, 6, 2, 4]> () sr = Constant <value_ints = [1, 5, 2, 4]> ()
        sc = Constant <value_ints = [1, 4, 2, 4]> () sv = Constant <value_ints = [1, 4, 5, 2, 4]> ()
        a1 = Reshape (qr, sq) a2 = Transpose <perm = [0, 2, 1, 3]> (a1)
        b1 = Reshape (kr, sr) b2 = Transpose <perm = [0, 2, 3, 1]> (b1)
        c1 = Reshape (qc, sq) c2 = Transpose <perm = [0, 2, 1, 3]> (c1)
        d1 = Reshape (kc, sc) d2 = Transpose <perm = [0, 2, 3, 1]> (d1)
        rs = MatMul (a2, b2) row = Softmax <axis = 3> (rs)
        cs = MatMul (c2, d2) col = Softmax <axis = -1> (cs)
        v1 = Reshape (v, sv) v2 = Transpose <perm = [0, 3, 2, 1, 4]> (v1)
        sf = Constant <value_ints = [1, 2, 5, 16]> () v3 = Reshape (v2, sf)
        p = MatMul (row, v3)
        sp = Constant <value_ints = [1, 2, 6, 4, 4]> () p5 = Reshape (p, sp)
        su = Constant <value_ints = [1, 2, 6, 1, 4]> () cu = Reshape (col, su)
        o = MatMul (cu, p5)
        so = Constant <value_ints = [1, 2, 6, 4]> () o4 = Reshape (o, so) ot = Transpose <perm = [0, 2, 1, 3]> (o4)
        sy = Constant <value_ints = {shape}> () y = Reshape (ot, sy) {extra}"""
    assert change[0] in body
    inputs = f"{queries}, float[1, 5, 8] kr, float[1, 4, 8] kc, float[1, 4, 5, 8] v"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({result}) {{ {body.replace(*change)} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def drawn(model: ir.Model) -> list[Array]:
    rng = np.random.default_rng(4)
    return [rng.standard_normal(tuple(value.shape or ())).astype(np.float32) for value in model.graph.inputs]


def test_by_hand() -> None:
    model = written_out()
    inputs = drawn(model)
    before = run(model, *inputs)[0]
    assert fuse(model)[0] == PassResult(True, 1)
    assert graph.op_histogram(model, REGISTERED) == {RCDA: 1}
    np.testing.assert_allclose(run(model, *inputs)[0], before, rtol=0, atol=TOLERANCE)


def masked_by(filler: str, condition: str) -> tuple[str, str]:
    """A change of the row attention: scores where `condition` give way to `filler`."""
    made = f"f = Constant <value_float = {filler}> () k = {condition} w = Where (k, f, rs)"
    return ("row = Softmax <axis = 3> (rs)", f"{made} row = Softmax <axis = 3> (w)")


def test_constant_queries_that_were_turned_when_they_were_folded() -> None:
    """As the first decoder layer's are, which depend on no image."""
    model = written_out()
    inputs = drawn(model)
    before = run(model, *inputs)[0]
    for name, data in (("a2", inputs[0]), ("c2", inputs[1])):
        old = next(value for node in model.graph for value in node.outputs if value.name == name)
        array = data.reshape(1, 6, 2, 4).transpose(0, 2, 1, 3)
        folded = add_initializer(model.graph, f"{name}_folded", array)
        old.replace_all_uses_with(folded)
    assert fuse(model)[0] == PassResult(True, 1)
    (call,) = (node for node in model.graph if node.op_type == "RCDA")
    assert [value.name for value in call.inputs if value is not None] == [
        "a2_folded_q_row",
        "c2_folded_q_col",
        "kr",
        "kc",
        "v",
    ]
    np.testing.assert_allclose(run(model, *inputs)[0], before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("row = Softmax <axis = 3>", "row = Softmax <axis = 2>"), "not over the last axis"),
        (masked_by("-1e9", "Greater (rs, f)"), "minus infinity"),
        (masked_by("-inf", "Greater (rs, rs)"), "does not have the shape (N, w)"),
        (
            (
                "v2 = Transpose <perm = [0, 3, 2, 1, 4]> (v1)",
                "sw = Constant <value_ints = [1, 2, 5, 4, 4]> () v2 = Reshape (v1, sw)",
            ),
            "what would be v",
        ),
        (
            (
                "b2 = Transpose <perm = [0, 2, 3, 1]> (b1)",
                "sb = Constant <value_ints = [1, 2, 4, 5]> () b2 = Reshape (b1, sb)",
            ),
            "what would be k_row",
        ),
        (("ot = Transpose <perm = [0, 2, 1, 3]> (o4)", "ot = Neg (o4)"), "not brought to the form (N, L, C)"),
        (
            ("p5 = Reshape (p, sp)", "pt = Transpose <perm = [0, 1, 3, 2]> (p) p5 = Reshape (pt, sp)"),
            "the two sums",
        ),
    ],
)
def test_what_is_no_rcda(change: tuple[str, str], reason: str) -> None:
    model = written_out(change=change)
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert reason in misses[0]


@pytest.mark.parametrize("value", ["rs", "row", "p", "o"])
def test_what_others_use_stays(value: str) -> None:
    model = written_out(extra=f"z = Neg ({value})", result="float[1, 6, 8] y, float[a, b, c, d] z")
    if value in ("o",):
        model.graph.outputs[1].shape = ir.Shape([None] * 5)
    result, misses = fuse(model)
    assert result == PassResult(False, 0)
    assert "is used elsewhere too" in misses[0] or "not brought" in misses[0]


def test_moved_values_that_others_use_stay_and_the_rest_goes() -> None:
    model = written_out(extra="z = Neg (a2)", result="float[1, 6, 8] y, float[1, 2, 6, 4] z")
    inputs = drawn(model)
    before = run(model, *inputs)
    assert fuse(model)[0] == PassResult(True, 1)
    assert graph.op_histogram(model, REGISTERED) == {RCDA: 1, "Reshape": 1, "Transpose": 1, "Neg": 1}
    for got, expected in zip(run(model, *inputs), before, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_older_models_must_be_lifted_first() -> None:
    model = ir.from_proto(onnx.load_from_string(exported("row-first", SIZES[0], False, "torchscript", 13, False)))
    context = PassContext(ops=REGISTERED)
    assert FuseRCDA().run(model, context) == PassResult(False, 0)
    assert [miss.reason for miss in context.near_misses] == ["the plugin op needs opset 15: run lift-opset first"]


def test_multi_head_attention_is_left_alone() -> None:
    buffer = io.BytesIO()
    x = torch.randn(1, 7, CHANNELS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(MultiHeadAttention(CHANNELS, HEADS).eval(), (x, x, x), buffer, opset_version=17, dynamo=False)
    assert fuse(ir.from_proto(onnx.load_from_string(buffer.getvalue()))) == (PassResult(False), [])


def test_refused_rewrites_change_nothing() -> None:
    model = written_out()
    assert fuse(model, allow_rewrite=lambda _: False)[0] == PassResult(False, 0)
    assert not model.functions
    assert DOMAIN not in model.opset_imports


@pytest.mark.parametrize(
    ("exporter", "opset", "dynamic"),
    [
        ("torchscript", 12, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # exporting takes seconds each
            for case in [("torchscript", 17, True), ("dynamo", 18, False), ("dynamo", 18, True)]
        ),
    ],
)
def test_detector(small_model: AnchorDETR, exporter: Any, opset: int, dynamic: bool, tmp_path: Path) -> None:
    """One encoder and one decoder layer; with padding masks where sizes are free."""
    shape = (1, 3, 96, 131)
    options = ExportOptions(shape, opset=opset, exporter=exporter, mask=dynamic, dynamic=dynamic)
    model = graph.load(export(small_model, tmp_path / "model.onnx", options))
    images = np.random.default_rng(5).standard_normal((2 if dynamic else 1, *shape[1:])).astype(np.float32)
    mask = np.zeros((2, *shape[2:]), bool)
    mask[1, 70:], mask[1, :, 100:] = True, True
    inputs = [images, mask] if dynamic else [images]
    before = run(model, *inputs)
    result, misses = fuse(model)
    assert result == PassResult(True, 2), misses
    counts: Counter[str] = graph.op_histogram(model, REGISTERED)
    assert (counts[RCDA], counts["Softmax"]) == (2, 1)  # the decoder's self-attention keeps its softmax
    for got, expected in zip(run(model, *inputs), before, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)  # logits of about 10 behind four attentions


def test_layout_algebra() -> None:
    sizes = {"n": 1, "l": 6, "heads": 2, "d": 4}
    assert regroup(("n", "l", "heads", "d"), sizes, (1, 6, 8)) == ((), ("l",), ("heads", "d"))
    assert regroup(("n", "l", "heads", "d"), sizes, (6, 1, 2, 4)) == (("l",), (), ("heads",), ("d",))
    assert regroup(("n", "l", "heads", "d"), sizes, (3, 16)) is None
    assert regroup(("l",), sizes, (6, 2)) is None
    assert multiplied((("l",), ("d",)), (("d",), ("heads",))) == (("l",), ("heads",))
    assert multiplied((("l",), ("d",)), (("heads",), ("d",))) is None
    assert aligned((("n",), ()), (("l",),)) == (("n",), ("l",))
    assert aligned((("n",),), (("l",),)) is None
    assert moved([], None, sizes, None) is None  # type: ignore[arg-type]


def test_reshape_targets() -> None:
    assert reshape_target([((1, 6, 8), (6, 8))]) == [6, 8]
    assert reshape_target([((2, 1, 5), (2, 5)), ((3, 1, 7), (3, 7))]) == [0, -1]
    assert reshape_target([((2, 5, 8), (10, 8)), ((3, 7, 8), (21, 8))]) == [-1, 8]
    assert reshape_target([((10, 8), (2, 5, 8)), ((21, 8), (3, 7, 8))]) is None
