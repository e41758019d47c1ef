"""Inputs from files and from the dice."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optframe.errors import InputError
from optframe.feeds import input_shapes, load_samples, random_feeds, read_feeds, save_samples


def model(shape: tuple[int | str, ...] = (1, 3), dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    x = ir.val("x", dtype, shape)
    flag = ir.val("flag", ir.DataType.BOOL, (shape[0],))
    weight = ir.val("w", ir.DataType.FLOAT, (2,))
    weight.const_value = ir.tensor(np.ones(2, np.float32), name="w")
    node = ir.node("Identity", [x], num_outputs=1)
    graph = ir.Graph([x, flag, weight], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_one_sample_is_read_and_converted_within_its_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "in.npz", x=np.array([[1.0, 2.0, 3.0]]), flag=np.array([True]))
    [sample] = read_feeds(path, model())
    assert sample["x"].dtype == np.float32
    np.testing.assert_array_equal(sample["x"], [[1, 2, 3]])


def test_one_more_axis_makes_several_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "in.npz", x=np.arange(12.0).reshape(4, 1, 3), flag=np.zeros((4, 1), bool))
    samples = read_feeds(path, model())
    assert [float(sample["x"][0, 0]) for sample in samples] == [0, 3, 6, 9]
    assert all(sample["flag"].shape == (1,) for sample in samples)


GOOD = np.zeros((1, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD}, "lacks flag"),
        ({"x": GOOD, "flag": np.zeros(1, bool), "image": GOOD}, "has unknown image"),
        ({"x": GOOD.astype(complex), "flag": np.zeros(1, bool)}, "complex128, the model takes float32"),
        ({"x": np.zeros((1, 4), np.float32), "flag": np.zeros(1, bool)}, r"shape \[1, 4\]"),
        ({"x": np.zeros(3, np.float32), "flag": np.zeros(1, bool)}, r"shape \[3\]"),
        ({"x": np.zeros((2, 1, 3), np.float32), "flag": np.zeros(1, bool)}, "same number of samples"),
        ({"x": np.array([[object()] * 3]), "flag": np.zeros(1, bool)}, "no readable .npz"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_feeds(write(tmp_path / "in.npz", **arrays), model())
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_feeds(tmp_path / "absent.npz", model())
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"no readable \.npz"):
        read_feeds(tmp_path / "text.npz", model())
    whole = write(tmp_path / "whole.npz", x=np.zeros((1, 3)), flag=np.zeros(1, bool)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"no readable \.npz"):
        read_feeds(tmp_path / "cut.npz", model())
    np.save(tmp_path / "one.npy", GOOD)
    with pytest.raises(InputError, match="by name"):
        read_feeds(tmp_path / "one.npy", model())


def test_random_inputs_follow_the_declared_types_and_leave_initialisers_alone() -> None:
    drawn = random_feeds(model(("batch", 3), ir.DataType.INT64), seed=0)
    assert drawn.keys() == {"x", "flag"}
    assert drawn["x"].dtype == np.int64
    assert set(np.unique(drawn["x"])) <= {0, 1}
    assert drawn["flag"].dtype == np.bool_
    assert drawn["x"].shape[0] == drawn["flag"].shape[0]  # the same symbol, the same size


def test_another_seed_gives_other_values_and_other_free_sizes() -> None:
    first, second = (random_feeds(model(("batch", 3)), seed) for seed in (0, 1))
    assert first["x"].shape != second["x"].shape
    fixed = [random_feeds(model(), seed)["x"] for seed in (0, 1, 0)]
    assert not np.array_equal(fixed[0], fixed[1])
    np.testing.assert_array_equal(fixed[0], fixed[2])


def test_an_input_that_cannot_be_drawn_is_said() -> None:
    with pytest.raises(InputError, match="--inputs"):
        random_feeds(model(dtype=ir.DataType.STRING), 0)


def test_samples_come_back_from_a_file(tmp_path: Path) -> None:
    samples = [{"a/b": np.arange(3) + i, "c": np.array(i)} for i in range(11)]
    save_samples(tmp_path / "s.npz", samples)
    back = load_samples(tmp_path / "s.npz")
    assert len(back) == 11
    for there, here in zip(samples, back, strict=True):
        assert there.keys() == here.keys()
        np.testing.assert_array_equal(there["a/b"], here["a/b"])
    assert input_shapes(back[0]) == {"a/b": [3], "c": []}
