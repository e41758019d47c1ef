"""Loading of checkpoints: the published layout, and one clear line for everything else."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optframe.errors import InputError
from optframe_anchordetr.checkpoint import load_checkpoint
from optframe_anchordetr.model import AnchorDETR, build

State = dict[str, Tensor]
NAME = "transformer.pattern.weight"


@pytest.fixture
def state(small_model: AnchorDETR) -> State:
    """A state dict whose every entry repeats one value of its own, so that its file is small."""
    shapes = {name: tensor.shape for name, tensor in small_model.state_dict().items()}
    return {name: torch.rand(1).expand(shape) for name, shape in shapes.items()}


@pytest.fixture
def model(small_model: AnchorDETR) -> AnchorDETR:
    return build(small_model.config)


def save(content: Any, folder: Path, **options: Any) -> Path:
    torch.save(content, folder / "checkpoint.pth", **options)
    return folder / "checkpoint.pth"


def refusal(model: AnchorDETR, path: Path) -> str:
    """Return the message for the checkpoint at `path`, which must be one line and leave the model alone."""
    before = model.transformer.pattern.weight.clone()
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert torch.equal(model.transformer.pattern.weight, before)
    return str(caught.value)


class TestGood:
    @pytest.mark.parametrize("archive", [True, False])
    def test_published_layout(self, model: AnchorDETR, state: State, tmp_path: Path, archive: bool) -> None:
        tracked = {"backbone.body.bn1.num_batches_tracked": torch.tensor(3)}
        content = {"model": state | tracked, "args": argparse.Namespace(lr=1e-4), "epoch": 50, "optimizer": {}}
        load_checkpoint(model, save(content, tmp_path, _use_new_zipfile_serialization=archive))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name

    def test_plain_state_dict(self, model: AnchorDETR, small_model: AnchorDETR, tmp_path: Path) -> None:
        load_checkpoint(model, save(small_model.state_dict(), tmp_path))
        assert torch.equal(model.transformer.pattern.weight, small_model.transformer.pattern.weight)


class TestUnreadable:
    def test_missing(self, model: AnchorDETR, tmp_path: Path) -> None:
        assert "no checkpoint file at" in refusal(model, tmp_path / "none.pth")
        assert "no checkpoint file at" in refusal(model, tmp_path)

    @pytest.mark.parametrize("archive", [True, False])
    @pytest.mark.parametrize("keep", [10, 5000, 60000, -100])
    def test_truncated(self, model: AnchorDETR, tmp_path: Path, keep: int, archive: bool) -> None:
        state = {str(i): torch.rand(100, 10) for i in range(30)}
        path = save(state, tmp_path, _use_new_zipfile_serialization=archive)
        path.write_bytes(path.read_bytes()[:keep])
        assert "damaged" in refusal(model, path)

    @pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"version https://git-lfs"])
    def test_not_a_checkpoint(self, model: AnchorDETR, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "page.pth"
        path.write_bytes(content)
        assert "is not a PyTorch checkpoint" in refusal(model, path)

    @pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
    def test_code_never_runs(
        self, model: AnchorDETR, state: State, tmp_path: Path, write: Callable[[Any, Path], object]
    ) -> None:
        class Code:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        path = tmp_path / "checkpoint.pth"
        write({"model": state, "extra": Code()}, path)
        assert "refused" in refusal(model, path) or "damaged" in refusal(model, path)
        assert not (tmp_path / "ran").exists()

    def test_whole_module(self, model: AnchorDETR, tmp_path: Path) -> None:
        message = refusal(model, save(torch.nn.Linear(1, 1), tmp_path))
        assert "could run code when loaded: refused; save its weights alone" in message

    @pytest.mark.parametrize("content", [[1, 2], {}, {"model": 3}, {"model": {"a": 1}}])
    def test_no_state_dict(self, model: AnchorDETR, tmp_path: Path, content: object) -> None:
        assert 'neither an entry "model"' in refusal(model, save(content, tmp_path))


class TestUnfit:
    @pytest.mark.parametrize(
        ("variant", "prior", "looks"),
        [
            ("r101-c5", "learned", "looks like r101-c5 or r101-dc5 with learned"),
            ("r50-dc5-mha", "learned", "looks like r50-c5-mha or r50-dc5-mha with learned"),
            ("r50-c5", "grid", "looks like r50-c5 or r50-dc5 with grid"),
        ],
    )
    def test_another_variant(self, model: AnchorDETR, tmp_path: Path, variant: str, prior: Any, looks: str) -> None:
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in build(variant, spatial_prior=prior).state_dict().items()}
        other = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
        message = refusal(model, save({"model": other}, tmp_path))
        assert looks in message
        assert "the model is r50-dc5 with learned anchors" in message

    def test_another_model(self, model: AnchorDETR, tmp_path: Path) -> None:
        assert "is of another model" in refusal(model, save({"fc.weight": torch.ones(2, 2)}, tmp_path))

    def test_missing_and_unexpected_entries(self, model: AnchorDETR, state: State, tmp_path: Path) -> None:
        del state[NAME]
        content = state | {f"extra.{i}": torch.ones(1) for i in range(5)}
        message = refusal(model, save(content, tmp_path))
        assert f"lacks {NAME} and has unexpected extra.0, extra.1, extra.2 and 2 more" in message

    def test_shape(self, model: AnchorDETR, state: State, tmp_path: Path) -> None:
        state["transformer.class_embed.0.weight"] = torch.ones(20, 256)
        message = refusal(model, save(state, tmp_path))
        assert "transformer.class_embed.0.weight is (20, 256), the model needs (91, 256)" in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, model: AnchorDETR, state: State, tmp_path: Path, value: float) -> None:
        state[NAME] = state[NAME].contiguous()
        state[NAME][1, 2:4] = value
        assert f"{NAME} has 2 of 768 values NaN or infinite" in refusal(model, save(state, tmp_path))

    def test_integers(self, model: AnchorDETR, state: State, tmp_path: Path) -> None:
        state[NAME] = state[NAME].to(torch.int8)
        assert "is torch.int8, not floating-point" in refusal(model, save(state, tmp_path))
