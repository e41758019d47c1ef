"""Both exporters: the opset asked for, names, free sizes, a clean output, and a proof that can fail."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from optframe import graph
from optframe.errors import CheckFailed, InputError
from optframe_anchordetr.config import ExportOptions
from optframe_anchordetr.export import export
from optframe_anchordetr.model import AnchorDETR, AnchorDETRConfig, build
from optframe_anchordetr.opset import lower_18_to_17
from optframe_anchordetr.proof import prove
from optframe_anchordetr.weights import load_seeded_weights

SHAPE = (1, 3, 96, 131)


def proved(model: AnchorDETR, folder: Path, options: ExportOptions) -> ir.Model:
    """Export, check the file, prove it equal to the module, and return the graph."""
    path = export(model, folder / "model.onnx", options)
    onnx.checker.check_model(str(path), full_check=True)
    exported = graph.load(path)
    assert graph.opset(exported) == options.opset
    assert [value.name for value in exported.graph.inputs] == list(options.input_names)
    assert [value.name for value in exported.graph.outputs] == ["pred_logits", "pred_boxes"]
    agreements = prove(model, path, options)
    assert len({a.shape for a in agreements}) == (3 if options.dynamic else 1)
    for agreement in agreements:
        assert agreement.error_over_response < 2e-4  # float32 in two runtimes: 1e-5 to 5e-5 seen
        assert agreement.response > 0.01  # outputs follow the image
    return exported


def axes(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


class TestTorchscript:
    def test_fixed_size(self, small_model: AnchorDETR, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exported = proved(small_model, tmp_path, ExportOptions(SHAPE))
        assert capfd.readouterr() == ("", "")
        assert axes(exported.graph.inputs[0]) == list(SHAPE)
        histogram = graph.op_histogram(exported)
        assert histogram["LayerNormalization"] == 5
        assert histogram["ReduceMean"] == 4  # the row and column keys of two attentions
        names = {node.name for node in exported.graph}
        assert "/transformer/encoder_layers.0/norm1/LayerNormalization" in names

    def test_free_sizes_with_mask(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        exported = proved(small_model, tmp_path, ExportOptions(SHAPE, opset=12, mask=True, dynamic=True))
        images, mask = exported.graph.inputs
        assert axes(images) == ["batch", 3, "height", "width"]
        assert axes(mask) == ["batch", "height", "width"]
        assert axes(exported.graph.outputs[0])[0] == "batch"
        assert graph.op_histogram(exported)["ReduceMean"] == 4 + 2 * 5  # opset 12 has no LayerNormalization

    @pytest.mark.slow  # an export for each opset
    @pytest.mark.parametrize("opset", range(12, 21))
    @pytest.mark.parametrize("free", [False, True])
    def test_every_opset(self, small_model: AnchorDETR, tmp_path: Path, opset: int, free: bool) -> None:
        proved(small_model, tmp_path, ExportOptions(SHAPE, opset=opset, mask=free, dynamic=free))


class TestDynamo:
    def test_fixed_size_at_an_opset_that_torch_cannot_make(
        self, small_model: AnchorDETR, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exported = proved(small_model, tmp_path, ExportOptions(SHAPE, opset=17, exporter="dynamo", mask=True))
        assert capfd.readouterr() == ("", "")
        assert graph.op_histogram(exported)["LayerNormalization"] == 5

    @pytest.mark.slow  # half a minute of arithmetic on symbolic sizes
    def test_free_sizes_with_mask(
        self, small_model: AnchorDETR, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        options = ExportOptions(SHAPE, opset=17, exporter="dynamo", mask=True, dynamic=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exported = proved(small_model, tmp_path, options)
        assert capfd.readouterr() == ("", "")
        images, mask = exported.graph.inputs
        assert axes(images) == ["batch", 3, "height", "width"]
        assert axes(mask) == ["batch", "height", "width"]

    @pytest.mark.slow  # an export for each opset
    @pytest.mark.parametrize("opset", range(17, 21))
    def test_every_opset(self, small_model: AnchorDETR, tmp_path: Path, opset: int) -> None:
        proved(small_model, tmp_path, ExportOptions(SHAPE, opset=opset, exporter="dynamo"))


@pytest.mark.slow  # both exporters on every kind of model
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        AnchorDETRConfig(dilation=False),
        AnchorDETRConfig(attention="nn.MultiheadAttention", encoder_layers=1, decoder_layers=1),
        AnchorDETRConfig(spatial_prior="grid", encoder_layers=1, decoder_layers=1),
        AnchorDETRConfig(depth=101, dilation=False, attention="nn.MultiheadAttention", spatial_prior="grid"),
    ],
    ids=lambda config: f"{config.variant}-{config.spatial_prior}",
)
def test_every_kind_of_model(config: AnchorDETRConfig, free: bool, exporter: Any, tmp_path: Path) -> None:
    model = build(config)
    load_seeded_weights(model)
    proved(model, tmp_path, ExportOptions((1, 3, 131, 96), opset=18, exporter=exporter, mask=free, dynamic=free))


class TestRefusals:
    @pytest.mark.parametrize(
        ("exporter", "opset", "message"),
        [
            ("dynamo", 16, "dynamo exporter makes opset 17 to 20, not 16; .* or the torchscript exporter"),
            ("torchscript", 11, "torchscript exporter makes opset 12 to 20, not 11; choose one of these$"),
            ("dynamo", 21, "not 21; choose one of these$"),
            ("script", 17, "exporter is 'script'; choose one of 'torchscript', 'dynamo'"),
        ],
    )
    def test_combinations(self, exporter: Any, opset: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ExportOptions(opset=opset, exporter=exporter)

    def test_shape_below_the_stride(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="1x3x8x64 is too small"):
            export(small_model, tmp_path / "model.onnx", ExportOptions((1, 3, 8, 64)))

    def test_another_opset_than_asked_for(
        self, small_model: AnchorDETR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An exporter that changes the opset without a word, as torch's does below 18, is found out."""
        other = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
        monkeypatch.setattr("optframe_anchordetr.export._through_torchscript", lambda *_: other)
        with pytest.raises(CheckFailed, match="exported opset 18 where 17 was asked for"):
            export(small_model, tmp_path / "model.onnx", ExportOptions(SHAPE))
        assert not list(tmp_path.iterdir())


def constant_graph(path: Path, logits: np.ndarray, boxes: np.ndarray) -> None:
    """Write a graph with an input that it ignores, as the original project's first export did."""
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in outputs.items()]
    nodes = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(a)) for n, a in outputs.items()]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, SHAPE)
    made = helper.make_graph(nodes, "g", [images], values)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


class TestProof:
    def test_graph_that_ignores_its_input(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        with torch.inference_mode():
            logits, boxes = small_model(torch.zeros(SHAPE))
        constant_graph(tmp_path / "model.onnx", logits.numpy(), boxes.numpy())
        with pytest.raises(CheckFailed, match="the exported graph ignores its input: pred_logits is the same"):
            prove(small_model, tmp_path / "model.onnx", ExportOptions(SHAPE))

    def test_input_that_is_not_there(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        constant_graph(tmp_path / "model.onnx", np.zeros((1, 900, 91), np.float32), np.zeros((1, 900, 4), np.float32))
        with pytest.raises(CheckFailed, match="an input is not used"):
            prove(small_model, tmp_path / "model.onnx", ExportOptions(SHAPE, mask=True))

    def test_one_weight_that_differs(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        """A small error in one layer is well above what rounding gives."""
        path = export(small_model, tmp_path / "model.onnx", ExportOptions(SHAPE))
        twin = build(small_model.config)
        twin.load_state_dict(small_model.state_dict())
        twin.transformer.encoder_layers[0].norm1.weight.data *= 1.02
        prove(small_model, path, ExportOptions(SHAPE))
        message = r"does not equal the PyTorch model at 1x3x96x131: pred_logits differs by up to .* \(tolerance 0.001\)"
        with pytest.raises(CheckFailed, match=message):
            prove(twin, path, ExportOptions(SHAPE))

    def test_model_that_ignores_its_input(self, small_model: AnchorDETR, tmp_path: Path) -> None:
        blind = build(small_model.config)
        blind.load_state_dict({name: torch.zeros_like(t) for name, t in small_model.state_dict().items()})
        with torch.inference_mode():
            logits, boxes = blind(torch.zeros(SHAPE))
        constant_graph(tmp_path / "model.onnx", logits.numpy(), boxes.numpy())
        with pytest.raises(CheckFailed, match="the PyTorch model ignores its input"):
            prove(blind, tmp_path / "model.onnx", ExportOptions(SHAPE))


class TestLowering:
    def test_axes_become_an_attribute(self) -> None:
        model = ir.from_onnx_text("""
            <ir_version: 8, opset_import: ["" : 18]>
            g (float[2, 3] x) => (float[2] y) <int64[1] axes = {-1}> {
                y = ReduceMean <keepdims = 0, noop_with_empty_axes = 0> (x, axes)
            }""")
        lowered = lower_18_to_17(model)
        (node,) = lowered.graph
        assert len(node.inputs) == 1
        assert node.attributes.keys() == {"axes", "keepdims"}
        assert list(node.attributes["axes"].as_ints()) == [-1]
        assert not lowered.graph.initializers
        onnx.checker.check_model(ir.to_proto(lowered), full_check=True)

    @pytest.mark.parametrize("call", ["Split <num_outputs = 1> (x)", "ReduceMean (x, x)"])
    def test_an_op_without_an_older_form_is_refused(self, call: str) -> None:
        model = ir.from_onnx_text(f"""
            <ir_version: 8, opset_import: ["" : 18]>
            g (float[2] x) => (float[2] y) {{
                [halve] y = {call}
            }}""")
        with pytest.raises(CheckFailed, match=r"opset 17 has no \w+ as exported here \(halve\); ask for opset 18"):
            lower_18_to_17(model)
