"""Layers of engines mapped to ONNX nodes and torch modules."""

import onnx_ir as ir

from optframe.passes import ORIGIN_KEY, PASS_KEY, SCOPE_KEY
from optframe_trt.builder import LayerFacts
from optframe_trt.layers import Origin, describe_times, engine_layers, layer_nodes, nodes_of, origins


def test_metadata_names_one_node_or_many() -> None:
    assert nodes_of("[ONNX Layer: /backbone/conv1/Conv]") == ("/backbone/conv1/Conv",)
    fused = "[ONNX Layer: a/Conv]\x1e[ONNX Layer: a/Relu]\x1e[ONNX Layer: a/Conv]"
    assert nodes_of(fused) == ("a/Conv", "a/Relu")
    assert nodes_of("[ONNX Layer: a] + [ONNX Layer: b[0]]") == ("a", "b[0]")
    assert nodes_of("") == ()


def test_layers_that_compute_nothing_have_no_entry() -> None:
    layers = [LayerFacts("conv", "CONVOLUTION", "[ONNX Layer: c]"), LayerFacts("weight", "CONSTANT", "")]
    assert layer_nodes(layers) == {"conv": ("c",)}


def test_origins_come_from_provenance() -> None:
    x = ir.val("x", ir.DataType.FLOAT, (1,))
    made = ir.node("Relu", [x], name="fused")
    made.metadata_props.update({PASS_KEY: "clean,fuse", ORIGIN_KEY: "a,b", SCOPE_KEY: "encoder.norm"})
    plain = ir.node("Relu", made.outputs, name="/encoder/layers.0/Relu")
    model = ir.Model(ir.Graph([x], plain.outputs, nodes=[made, plain], opset_imports={"": 18}), ir_version=10)
    assert origins(model) == {
        "fused": Origin("Relu", "encoder.norm", ("a", "b"), ("clean", "fuse")),
        "/encoder/layers.0/Relu": Origin("Relu", "encoder/layers.0"),
    }


def test_times_are_described_slowest_first() -> None:
    information = {
        "Layers": [
            {"Name": "myelin_1", "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]"},
            "a name alone, in an engine without details",
        ]
    }
    known = {"conv": Origin("Conv", "backbone"), "relu": Origin("Relu", "backbone"), "add": Origin("Add", "neck")}
    times = {"conv + add": 0.5, "myelin_1": 2.0, "Reformat": 0.1}
    slowest, second, last = describe_times(times, engine_layers(information), known)
    assert (slowest.name, slowest.milliseconds, slowest.nodes) == ("myelin_1", 2.0, ("conv", "relu"))
    assert slowest.modules == ("backbone",)
    assert (second.nodes, second.modules) == (("conv", "add"), ("backbone", "neck"))
    assert (last.nodes, last.modules) == ((), ())
