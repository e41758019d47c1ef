"""Files that are read and written without copies of weights hold what protobuf would read and write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from optframe import graph, onnx_file
from optframe.errors import InputError

LARGE = onnx_file.DIRECT_BYTES // 4 + 3


def model_of(*weights: TensorProto) -> onnx.ModelProto:
    """Return a model that reads every one of `weights`, and has a field of every kind around them."""
    nodes = [helper.make_node("Shape", [weight.name], [f"s{index}"]) for index, weight in enumerate(weights)]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
            [helper.make_tensor_value_info(f"s{index}", TensorProto.INT64, None) for index in range(len(weights))],
            list(weights),
            doc_string="behind the weights",
            value_info=[helper.make_tensor_value_info("other", TensorProto.FLOAT, [3])],
        ),
        producer_name="test",
        opset_imports=[helper.make_opsetid("", 17)],
        doc_string="before the graph",
    )
    proto.metadata_props.add(key="key", value="behind the graph")
    return proto


def weight(name: str, dtype: str = "f4", count: int = LARGE, seed: int = 0) -> TensorProto:
    """Return a tensor of random bits."""
    raw = np.random.default_rng(seed).integers(0, 2, count) if dtype == "?" else None
    array = np.frombuffer(np.random.default_rng(seed).bytes(count * np.dtype(dtype).itemsize), dtype)
    return numpy_helper.from_array(array if raw is None else raw.astype(bool), name)


class Unreadable(ir.Tensor):
    """A tensor whose content cannot be had."""

    def tobytes(self) -> bytes:
        """Fail."""
        raise OSError("unreadable")


def save(proto: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    """Write `proto` as protobuf does."""
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


def mixed() -> onnx.ModelProto:
    """Return a model with small and large weights of many types, with text of their own."""
    weights = [
        weight(f"{code}{count}", code, count, seed)
        for seed, (code, count) in enumerate(
            (code, count)
            for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
            for count in (0, 1, 5000)
        )
    ]
    weights[4].doc_string = "of a weight"
    weights[5].metadata_props.add(key="of", value="another")
    weights.append(numpy_helper.from_array(np.array(["a", "b"] * 3000, object), "text"))
    weights.append(helper.make_tensor("bfloat", TensorProto.BFLOAT16, [5000], np.arange(5000.0)))
    weights.append(helper.make_tensor("listed", TensorProto.FLOAT, [5000], np.arange(5000.0)))
    return model_of(*weights)


def test_a_model_that_is_read_is_the_one_that_was_written(tmp_path: Path) -> None:
    proto = mixed()
    read = onnx_file.read(save(proto, tmp_path))
    assert read is not None
    again, expected = ir.to_proto(read), ir.to_proto(ir.from_proto(proto))
    assert list(again.graph.initializer) == list(proto.graph.initializer)
    for each in (again, expected):  # onnx_ir doubles the metadata of tensors that stay in their message
        del each.graph.initializer[:]
    assert again == expected
    kinds = {name: type(value.const_value).__name__ for name, value in read.graph.initializers.items()}
    assert kinds["f45000"] == kinds["?5000"] == "Tensor", "it has an array of its own"
    assert kinds["f41"] == kinds["bfloat"] == kinds["listed"] == "TensorProtoTensor"


def test_what_is_written_is_what_protobuf_writes(tmp_path: Path) -> None:
    for model in (ir.from_proto(mixed()), onnx_file.read(save(mixed(), tmp_path))):
        assert model is not None
        onnx_file.write(model, tmp_path / "ours.onnx")
        ir.save(model, tmp_path / "theirs.onnx")
        assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
        assert onnx.load(tmp_path / "ours.onnx") == ir.to_proto(model)


def test_writing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 17}, name="g"), ir_version=10)
    array = np.random.default_rng(0).random((70, 80), np.float32)
    for name, content in (("plain", array), ("turned", array.T), ("steps", array[::2])):
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(content, name=name)))
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    onnx_file.write(model, tmp_path / "m.onnx")
    assert all(value.const_value is before[name] for name, value in model.graph.initializers.items())
    loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert np.array_equal(loaded["turned"], array.T)
    assert np.array_equal(loaded["steps"], array[::2])


def test_an_error_while_writing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = ir.from_proto(model_of(weight("w")))
    value = model.graph.initializers["w"]
    value.const_value = before = ir.tensor(np.zeros(LARGE, np.float32), name="w")
    model.graph.register_initializer(ir.val("unreadable", const_value=Unreadable(np.zeros(1), name="unreadable")))
    with pytest.raises(ir.serde.SerdeError):
        onnx_file.write(model, tmp_path / "m.onnx")
    assert value.const_value is before


def test_weights_of_another_file_come_into_the_one(tmp_path: Path) -> None:
    onnx.save(
        model_of(weight("w"), weight("v", seed=1)),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    model = graph.load(tmp_path / "m.onnx")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    graph.save(model, tmp_path / "one.onnx")
    (tmp_path / "m.data").unlink()
    assert onnx.load(tmp_path / "one.onnx").graph.initializer[0].raw_data == weight("w").raw_data


def broken(kind: str) -> bytes:
    """Return a file that is damaged or odd in one way."""
    proto = model_of(weight("w"), weight("v", seed=1))
    if kind == "short weight":
        proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    elif kind == "one name twice":
        proto.graph.initializer[1].name = "w"
    elif kind == "external with data":
        proto.graph.initializer[1].data_location = TensorProto.EXTERNAL
    elif kind == "no name":
        proto.graph.initializer[1].name = ""
    elif kind == "negative size":
        proto.graph.initializer[0].dims[:] = [-1, -LARGE]
    data = proto.SerializeToString()
    if kind == "cut off":
        return data[: len(data) // 2]
    if kind == "two graphs":
        return data + onnx.ModelProto(graph=onnx.GraphProto(doc_string="merged into the first")).SerializeToString()
    if kind == "number for a weight":
        graph_field = onnx.GraphProto(initializer=[weight("w")]).SerializeToString()
        content = b"\x28\x07" + graph_field  # field 5 as a number, then as the initialiser that it is
        length = len(content)
        return b"\x3a" + bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14]) + content
    if kind == "group":
        return data + b"\x0b\x0c"
    if kind == "endless number":
        return b"\xff" * 20 + data
    return data


@pytest.mark.parametrize(
    "kind",
    [
        "short weight",
        "one name twice",
        "external with data",
        "negative size",
        "no name",
        "number for a weight",
        "cut off",
        "two graphs",
        "group",
        "endless number",
    ],
)
def test_what_is_odd_is_left_to_protobuf(tmp_path: Path, kind: str) -> None:
    (tmp_path / "m.onnx").write_bytes(broken(kind))
    assert onnx_file.read(tmp_path / "m.onnx") is None


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for kind in ("short weight", "cut off", "endless number"):
        (tmp_path / "m.onnx").write_bytes(broken(kind))
        with pytest.raises(InputError, match=r"m\.onnx is no (usable )?ONNX model"):
            graph.load(tmp_path / "m.onnx")


def test_other_formats_and_empty_files_are_left_to_protobuf(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "m.pb").write_bytes(broken(""))
    assert onnx_file.read(tmp_path / "empty.onnx") is None
    assert onnx_file.read(tmp_path / "m.pb") is None
