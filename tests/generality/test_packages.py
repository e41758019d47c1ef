"""Real models that ship inside PyPI packages: recurrent, with If, graph networks, detectors, Paddle and TensorFlow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optframe import graph

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator, int], dict[str, Array]]


@dataclass(frozen=True)
class Case:
    """A model file in a package, and how its inputs are drawn; the second argument, 0 or 1, chooses the size."""

    package: str
    file: str
    draw: Draw
    honest: bool = True
    logits: bool = False
    """Compare what the last Sigmoid is given: its own output is 0 but for rounding where nothing is found."""

    def __str__(self) -> str:
        return f"{self.package}/{Path(self.file).stem}"

    @property
    def path(self) -> Path:
        spec = importlib.util.find_spec(self.package)  # finds the folder without importing the package
        folders = spec.submodule_search_locations if spec else None
        if not folders:
            pytest.skip(f"needs the package {self.package} (tests/generality/packages.txt)")
        return Path(folders[0]) / self.file

    def load(self) -> ir.Model:
        model = graph.load(self.path)
        if self.logits:
            (sigmoid,) = [node for node in model.graph if node.outputs[0].is_graph_output()]
            model.graph.outputs[:] = [sigmoid.inputs[0]]
            model.graph.remove(sigmoid)
            model.graph.outputs[0].shape, model.graph.outputs[0].dtype = ir.Shape([None] * 4), ir.DataType.FLOAT
        return model


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def page(rng: np.random.Generator, height: int, width: int) -> Array:
    """Dark bars on a bright page, normalised."""
    image = np.full((1, 3, height, width), 1.0, np.float32)
    for top in range(8, height - 12, 24):
        image[:, :, top : top + 10, 8 : width - 8] = -1.0
    return image + normal(rng, *image.shape, scale=0.05)


def vad(rng: np.random.Generator, turn: int) -> dict[str, Array]:
    batch = 1 + turn
    return {"input": normal(rng, batch, 576, scale=0.1), "state": normal(rng, 2, batch, 128)}


def vad_at(rng: np.random.Generator, turn: int, rate: int = 16000) -> dict[str, Array]:
    return {**vad(rng, turn), "sr": np.array(rate)}


def vad_ifless(rng: np.random.Generator, turn: int) -> dict[str, Array]:
    samples, rate = ((576, 16000), (288, 8000))[turn]
    return vad_at(rng, turn, rate) | {"input": normal(rng, 1 + turn, samples, scale=0.1)}


def molecule(rng: np.random.Generator, turn: int) -> dict[str, Array]:
    atoms, edges, residues = ((7, 20, 2), (12, 31, 3))[turn]

    def integers(high: int, *shape: int) -> Array:
        return rng.integers(0, high, shape)

    return {
        **{"element": integers(4, atoms), "amino_acid": integers(20, atoms), "atom_role": integers(4, atoms)},
        **{"bfactor": normal(rng, atoms), "edge_index": integers(atoms, 2, edges)},
        **{"edge_dist": abs(normal(rng, edges)), "seq_sep": integers(3, edges)},
        **{"same_residue": integers(2, edges).astype(np.float32), "target_indices": integers(atoms, residues, 6)},
        **{"target_mask": integers(2, residues, 6).astype(bool), "residue_types": integers(20, residues)},
        **{"residue_geometry": normal(rng, residues, 52), "target_environment": normal(rng, residues, 6, 15)},
        **{"temperature_feature": normal(rng, residues, 1), "target_atom_rsasa": normal(rng, residues, 6)},
        **{"pos": normal(rng, atoms, 3), "node_normal": normal(rng, atoms, 3)},
        **{"is_hbond": integers(2, edges).astype(np.float32), "hb_cos": normal(rng, edges)},
    }


def echo(hidden: int) -> Draw:
    def draw(rng: np.random.Generator, turn: int) -> dict[str, Array]:
        return {"input": normal(rng, 1, 3, (60, 90)[turn], 160), "h0": normal(rng, 4, 1, hidden)}

    return draw


CASES = (
    Case("silero_vad", "data/silero_vad.onnx", vad_at),
    Case("silero_vad", "data/silero_vad_16k_op15.onnx", vad_at),
    Case("silero_vad", "data/silero_vad_half.onnx", vad),
    Case("silero_vad", "data/silero_vad_op18_ifless.onnx", vad_ifless),
    Case(
        "silero_vad",
        "data/silero_vad_16k_sequence.onnx",
        lambda rng, turn: {
            **{"input": normal(rng, (3, 5)[turn], 576, scale=0.1)},
            **{name: normal(rng, 1, 1, 128) for name in "hc"},
        },
    ),
    Case(
        "swift_f0",
        "model.onnx",
        lambda rng, turn: {
            **{"audio": normal(rng, 1, (4096, 6000)[turn], scale=0.3)},
            **{"fmin": np.array(50, np.float32), "fmax": np.array(1500, np.float32)},
        },
    ),
    Case("caustic", "data/best_v2_carbons.onnx", molecule),
    Case(
        "magika",
        "models/standard_v3_3/model.onnx",
        lambda rng, turn: {"bytes": rng.integers(0, 256, (1 + 2 * turn, 2048)).astype(np.int32)},
    ),
    Case("nudenet", "320n.onnx", lambda rng, turn: {"images": normal(rng, 1, 3, (96, 64)[turn], (64, 128)[turn])}),
    Case(
        "rapidocr_onnxruntime",
        "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        lambda rng, turn: {"x": normal(rng, 1 + turn, 3, 48, (192, 96)[turn])},
    ),
    Case(
        "rapidocr_onnxruntime",
        "models/ch_PP-OCRv4_rec_infer.onnx",
        lambda rng, turn: {"x": normal(rng, 1 + turn, 3, 48, (64, 96)[turn])},
    ),
    Case(
        "rapidocr_onnxruntime",
        "models/ch_PP-OCRv4_det_infer.onnx",
        lambda rng, turn: {"x": page(rng, *((64, 96), (96, 64))[turn])},
        logits=True,
    ),
    Case(
        "speechmos",
        "plcmos_models/plcmos_v2.onnx",
        lambda rng, turn: {
            "degraded_audio": normal(rng, 1, 1, (60, 90)[turn], 257),
            "rater_embed": normal(rng, 1, 64),
        },
    ),
    Case("speechmos", "aecmos_models/Run_1668423760_Stage_0.onnx", echo(96)),
    Case("speechmos", "aecmos_models/Run_1663829550_Stage_0.onnx", echo(64)),
    Case(
        "basic_pitch",
        "saved_models/icassp_2022/nmp.onnx",
        lambda rng, turn: {"serving_default_input_2:0": normal(rng, 1 + turn, 43844, 1, scale=0.3)},
    ),
    Case(
        "speechmos",
        "dnsmos_models/sig.onnx",
        lambda rng, turn: {"input_1": normal(rng, 1 + turn, 901, 161)},
    ),
    Case("ddddocr", "common_old.onnx", lambda rng, turn: {"input1": normal(rng, 1, 1, 64, (80, 128)[turn])}),
    # Its output has three dimensions and is declared with two.
    Case("ddddocr", "common.onnx", lambda rng, turn: {"input1": normal(rng, 1, 1, 64, (80, 128)[turn])}, honest=False),
    Case("ddddocr", "common_det.onnx", lambda rng, _: {"images": normal(rng, 1, 3, 416, 416)}),
)


QUICK = (
    "silero_vad/silero_vad",
    "silero_vad/silero_vad_op18_ifless",
    "caustic/best_v2_carbons",
    "magika/model",
    "rapidocr_onnxruntime/ch_ppocr_mobile_v2.0_cls_infer",
    "speechmos/Run_1668423760_Stage_0",
)
"""What every run of the tests takes; the others are larger, or variants of these."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if str(case) in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_models_of_packages(case: Case, check_pipelines: Callable[..., None], rng: np.random.Generator) -> None:
    check_pipelines(case.load(), [case.draw(rng, turn) for turn in (0, 1)], case.honest)
