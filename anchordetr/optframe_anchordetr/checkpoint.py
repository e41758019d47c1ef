"""Loads checkpoints of the published layout, and says in one line what is wrong with one that does not fit."""

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optframe.errors import InputError
from optframe_anchordetr.config import AnchorDETRConfig
from optframe_anchordetr.model import VARIANTS, AnchorDETR

ENCODER_PROJECTION = "transformer.encoder_layers.0.self_attn.in_proj_weight"
MAGIC = (b"PK", b"\x80")  # of torch.save's archive and of its older pickle
NAMED_TRAITS = ("depth", "attention")  # what a variant's name tells of
LISTED = 3  # names shown of a long list


def load_checkpoint(model: AnchorDETR, path: Path) -> None:
    """Load the checkpoint at `path` into `model`, in place: its entry "model", or a plain state dict.

    Nothing in the file is ever executed. Entries `num_batches_tracked` are ignored; all others must fit exactly, be
    finite and floating-point. Raises `InputError` otherwise, and leaves the model as it was.
    """
    state = _state_dict(_read(path), path)
    _check_variant(state, model.config, path)
    _check_entries(state, model.state_dict(), path)
    model.load_state_dict(state)


def _read(path: Path) -> object:
    _check_magic(path)
    try:
        # Training scripts store their command line beside the weights; a Namespace holds data and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols that torch.save does not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(_unpickling_message(path, error)) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        # What a damaged archive raises depends on where it is damaged.
        raise InputError(
            f"checkpoint {path} is truncated or damaged ({type(error).__name__}); download or copy it again"
        ) from None


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"no checkpoint file at {path}; give the path of a .pth file")
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    if not start.startswith(MAGIC):
        raise InputError(f"{path} is not a PyTorch checkpoint; give a .pth file written by torch.save")


def _unpickling_message(path: Path, error: pickle.UnpicklingError) -> str:
    if "GLOBAL" in str(error).upper():
        return (
            f"checkpoint {path} holds Python objects beside tensors, which could run code when loaded: refused; "
            'save its weights alone with torch.save({"model": state_dict}, path)'
        )
    return f"checkpoint {path} is damaged or not written by torch.save; download or copy it again"


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return the file's state dict without its `num_batches_tracked` entries."""
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f'checkpoint {path} has neither an entry "model" with a state dict nor is it one; '
            "save the weights with torch.save(model.state_dict(), path)"
        )
    return {str(name): tensor for name, tensor in state.items() if not str(name).endswith("num_batches_tracked")}


def _check_variant(state: Mapping[str, Tensor], config: AnchorDETRConfig, path: Path) -> None:
    """Raise `InputError` if the checkpoint is recognisably one of another variant."""
    found = _traits(state)
    wanted = {"depth": config.depth, "attention": config.attention, "spatial_prior": config.spatial_prior}
    if found is None or found == wanted:
        return
    named = {name for name, other in VARIANTS.items() if all(getattr(other, k) == found[k] for k in NAMED_TRAITS)}
    raise InputError(
        f"checkpoint {path} is of another variant: it looks like {' or '.join(sorted(named))} with "
        f"{found['spatial_prior']} anchors, and the model is {config.variant} with {config.spatial_prior} anchors; "
        "choose the checkpoint's variant"
    )


def _traits(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return what a state dict tells of its variant (C5 and DC5 look the same), None if it is no Anchor DETR's."""
    projection = state.get(ENCODER_PROJECTION)
    if projection is None or projection.ndim != 2 or "backbone.body.layer3.0.conv1.weight" not in state:
        return None
    return {
        "depth": 101 if "backbone.body.layer3.22.conv1.weight" in state else 50,
        "attention": "RCDA" if projection.shape[0] == 5 * projection.shape[1] else "nn.MultiheadAttention",
        "spatial_prior": "learned" if "transformer.position.weight" in state else "grid",
    }


def _check_entries(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    if len(state.keys() & expected.keys()) == 0:
        raise InputError(
            f"checkpoint {path} is of another model: it has no entry of Anchor DETR's, such as {next(iter(expected))}"
        )
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        parts = [_listing("lacks", missing), _listing("has unexpected", unexpected)]
        raise InputError(
            f"checkpoint {path} does not fit: it {' and '.join(filter(None, parts))}; choose another file or variant"
        )
    for name, tensor in state.items():
        _check_tensor(name, tensor, expected[name], path)


def _listing(verb: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{verb} {', '.join(names[:LISTED])}{more}"


def _check_tensor(name: str, tensor: Tensor, expected: Tensor, path: Path) -> None:
    if tensor.shape != expected.shape:
        raise InputError(
            f"checkpoint {path} does not fit: {name} is {tuple(tensor.shape)}, the model needs "
            f"{tuple(expected.shape)}; choose a checkpoint of the model's variant, with 91 classes"
        )
    if not tensor.is_floating_point():
        raise InputError(f"checkpoint {path}: {name} is {tensor.dtype}, not floating-point; save unquantised weights")
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise InputError(
            f"checkpoint {path}: {name} has {bad} of {tensor.numel()} values NaN or infinite; it cannot be used"
        )
