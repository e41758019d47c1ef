"""Fixtures of the Anchor DETR tests: seeded models, golden outputs, reference images."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from optframe_anchordetr.model import AnchorDETR

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def state_dict_shapes() -> Mapping[str, Mapping[str, list[int]]]:
    """Variant -> entry -> shape, of the published checkpoints."""
    return json.loads(gzip.decompress((DATA / "state_dict_shapes.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def seeded_model() -> AnchorDETR:
    """The R50-DC5 with seeded weights."""
    from optframe_anchordetr.model import build
    from optframe_anchordetr.weights import load_seeded_weights

    model = build("r50-dc5")
    load_seeded_weights(model)
    return model


@pytest.fixture(scope="session")
def small_model() -> AnchorDETR:
    """An R50-DC5 of one encoder and one decoder layer, with seeded weights: what export tests have time for."""
    from optframe_anchordetr.model import AnchorDETRConfig, build
    from optframe_anchordetr.weights import load_seeded_weights

    model = build(AnchorDETRConfig(encoder_layers=1, decoder_layers=1))
    load_seeded_weights(model)
    return model


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """A function from a golden file's name to its arrays, the original model's outputs with the seeded weights."""
    return lambda name: dict(np.load(DATA / f"golden_{name}.npz"))


@pytest.fixture(scope="session")
def reference_image() -> Callable[[int, int, int], np.ndarray]:
    """A function (height, width, seed) -> float32 (3, height, width), the images that the golden outputs are for."""

    def make(height: int, width: int, seed: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(seed))
        coarse = 4.0 * generator.standard_normal((3, -(-height // 64), -(-width // 64)))
        patches = coarse.repeat(64, axis=1).repeat(64, axis=2)[:, :height, :width]
        return (patches + 0.3 * generator.standard_normal((3, height, width))).astype(np.float32)

    return make
