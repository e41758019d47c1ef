"""The model `swishnet`: small enough to have a reference in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime

from optframe import graph
from optframe.errors import CheckFailed, InputError
from optframe.types import Feeds, Illustration, Outputs, Part

Array = np.ndarray[Any, Any]
CHANNELS, CLASSES, KERNEL = 8, 5, 3


@dataclass(frozen=True)
class SwishNetOptions:
    """`size` is height and width of the image; `seed` is that of the weights."""

    size: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < KERNEL:
            raise InputError(f"size is {self.size}; the kernel needs at least {KERNEL}")


class SwishNetAdapter:
    """Follows `optframe.types.ModelAdapter`; the reference is NumPy in FP64, rounded to FP32."""

    Options: ClassVar[type[SwishNetOptions]] = SwishNetOptions
    pipeline = "fuse-swish"
    source = "NumPy in float64"

    def __init__(self, options: SwishNetOptions) -> None:
        self.options = options

    def dependencies(self, of: Part) -> Mapping[str, object]:
        """Return the options: everything depends on both."""
        return {"size": self.options.size, "seed": self.options.seed}

    def notes(self, of: Part) -> Sequence[str]:
        """Say that nothing was trained."""
        return ["The weights are random."] if of == "export" else []

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Weights by name, FP32."""
        rng = np.random.default_rng(self.options.seed)
        shapes = {"filters": (CHANNELS, 3, KERNEL, KERNEL), "linear": (CHANNELS, CLASSES), "bias": (CLASSES,)}
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def export(self, path: Path) -> None:
        """Write the model as ONNX, with the swish as exporters write it, and compare it on both inputs."""
        graph.save(self._model(), path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for feeds in self.feeds():
            difference = np.abs(session.run(None, dict(feeds))[0] - self.reference(feeds)["scores"]).max()
            if not difference < 1e-4:  # scores are of order 1 to 10, sums of 27 and 8 products
                raise CheckFailed(f"the export differs from its reference by {difference:.2g}")

    def _model(self) -> ir.Model:
        size = self.options.size
        image = ir.val("image", ir.DataType.FLOAT, (1, 3, size, size))
        values = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in self.weights.items()}
        convolution = ir.node("Conv", [image, values["filters"]], name="conv")
        sigmoid = ir.node("Sigmoid", convolution.outputs, name="sigmoid")
        swish = ir.node("Mul", [convolution.outputs[0], sigmoid.outputs[0]], name="swish")
        pool = ir.node("GlobalAveragePool", swish.outputs, name="pool")
        flat = ir.node("Flatten", pool.outputs, name="flat")
        scores = ir.node("Gemm", [flat.outputs[0], values["linear"], values["bias"]], name="scores")
        inner = size - KERNEL + 1
        for node in (convolution, sigmoid, swish):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].shape = ir.Shape((1, CHANNELS, inner, inner))
        scores.outputs[0].name, scores.outputs[0].shape = "scores", ir.Shape((1, CLASSES))
        scores.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes = [convolution, sigmoid, swish, pool, flat, scores]
        main = ir.Graph(
            [image], scores.outputs, nodes=nodes, initializers=list(values.values()), opset_imports={"": 18}
        )
        main.name = "swishnet"
        return ir.Model(main, ir_version=10)

    def feeds(self) -> Sequence[Feeds]:
        """Return two images: a slope and a chequered one."""
        rows, columns = np.mgrid[0 : self.options.size, 0 : self.options.size]
        planes = [columns / self.options.size, ((rows // 4 + columns // 4) % 2).astype(float)]
        return [{"image": np.repeat(plane[None, None], 3, axis=1).astype(np.float32)} for plane in planes]

    def random_feeds(self, seed: int) -> Feeds:
        """Return noise."""
        shape = (1, 3, self.options.size, self.options.size)
        return {"image": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}

    def calibration_feeds(self) -> Iterable[Feeds]:
        """Yield noisy images."""
        for seed, feeds in enumerate(4 * list(self.feeds())):
            yield {"image": feeds["image"] + np.float32(0.1) * self.random_feeds(seed)["image"]}

    def reference(self, feeds: Feeds) -> Outputs:
        """Return scores (1, 5)."""
        weights = {name: array.astype(np.float64) for name, array in self.weights.items()}
        windows = np.lib.stride_tricks.sliding_window_view(feeds["image"].astype(np.float64), (KERNEL, KERNEL), (2, 3))
        convolved = np.einsum("ncyxij,kcij->nkyx", windows, weights["filters"])
        pooled = (convolved / (1 + np.exp(-convolved))).mean((2, 3))
        return {"scores": (pooled @ weights["linear"] + weights["bias"]).astype(np.float32)}

    def illustrate(self, outputs: Mapping[str, Outputs]) -> Sequence[Illustration]:
        """Show nothing."""
        return []
