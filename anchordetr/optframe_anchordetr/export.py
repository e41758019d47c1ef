"""Export to ONNX through either of torch's exporters, at exactly the opset asked for."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from optframe import graph
from optframe.errors import CheckFailed
from optframe_anchordetr.config import ExportOptions, check_shape
from optframe_anchordetr.model import AnchorDETR, build
from optframe_anchordetr.opset import lower_18_to_17

OUTPUT_NAMES = ("pred_logits", "pred_boxes")
FREE_AXES = {
    "images": {0: "batch", 2: "height", 3: "width"},
    "mask": {0: "batch", 1: "height", 2: "width"},
    "pred_logits": {0: "batch"},
    "pred_boxes": {0: "batch"},
}


def export(model: AnchorDETR, path: Path, options: ExportOptions | None = None) -> Path:
    """Write `model` as ONNX to `path`: inputs "images" (and "mask"), outputs "pred_logits" and "pred_boxes".

    Raises:
        InputError: the shape is too small for the model, or `path` cannot be written.
        CheckFailed: the exporter gave another opset than asked for.
    """
    options = options or ExportOptions()
    check_shape(options.shape, model.config.stride)
    source = _exportable(model, options)
    with _quiet(options), torch.no_grad():
        exported = (_through_dynamo if options.exporter == "dynamo" else _through_torchscript)(source, options)
    if graph.opset(exported) != options.opset:
        raise CheckFailed(
            f"torch {torch.__version__} exported opset {graph.opset(exported)} where {options.opset} was asked for; "
            "choose another opset or exporter"
        )
    return graph.save(exported, path)


def _exportable(model: AnchorDETR, options: ExportOptions) -> AnchorDETR:
    """Return the model on the CPU; where sizes are free, with an order of RCDA's sums that does not depend on them."""
    config = replace(model.config, sum_order="row-first") if options.dynamic else model.config
    twin = build(config)
    twin.load_state_dict(model.state_dict())
    return twin


def _example(model: AnchorDETR, options: ExportOptions) -> tuple[Tensor, ...]:
    """Return inputs to trace with; free sizes are traced small, two images at odd and different sides."""
    stride = model.config.stride
    shape = (2, 3, 5 * stride + 3, 7 * stride + 5) if options.dynamic else options.shape
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if not options.mask:
        return (images,)
    mask = torch.zeros((shape[0], *shape[2:]), dtype=torch.bool)
    mask[-1, :, shape[3] - shape[3] // 4 :] = True
    return images, mask


def _through_torchscript(model: AnchorDETR, options: ExportOptions) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.onnx"
        torch.onnx.export(
            model,
            _example(model, options),
            path,
            opset_version=options.opset,
            dynamo=False,
            input_names=list(options.input_names),
            output_names=list(OUTPUT_NAMES),
            dynamic_axes=_torchscript_axes(options),
        )
        return graph.load(path)


def _torchscript_axes(options: ExportOptions) -> dict[str, dict[int, str]] | None:
    if not options.dynamic:
        return None
    return {name: FREE_AXES[name] for name in (*options.input_names, *OUTPUT_NAMES)}


def _through_dynamo(model: AnchorDETR, options: ExportOptions) -> ir.Model:
    """Export with `torch.export`; its operator library begins at opset 18, older graphs are lowered by us."""
    program = torch.onnx.export(
        model,
        _example(model, options),
        opset_version=max(options.opset, 18),
        dynamo=True,
        input_names=list(options.input_names),
        output_names=list(OUTPUT_NAMES),
        dynamic_shapes=_dynamo_shapes(model, options),
        verbose=False,
    )
    assert program is not None  # None is what the TorchScript exporter returns
    return lower_18_to_17(program.model) if options.opset == 17 else program.model


def _dynamo_shapes(model: AnchorDETR, options: ExportOptions) -> tuple[dict[int, Any], ...] | None:
    if not options.dynamic:
        return None
    minimum = {"batch": 1, "height": model.config.stride, "width": model.config.stride}
    dims = {name: torch.export.Dim(name, min=least) for name, least in minimum.items()}
    return tuple({axis: dims[dim] for axis, dim in FREE_AXES[name].items()} for name in options.input_names)


@contextmanager
def _quiet(options: ExportOptions) -> Iterator[None]:
    """Silence what torch's exporters are known to say about every model; let everything else through."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # a warning for each op of torchvision, which is not needed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used, since it shares the same shape")
            warnings.filterwarnings("ignore", "The feature will be removed. Please remove usage of this function")
            # Python's decisions on sizes: torch's own checks of a norm's input, and for a fixed size our h < w.
            deciding = r"torch\.nn\.functional" if options.dynamic else ""
            warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", module=deciding)
            yield
    finally:
        registration.setLevel(level)
