"""Inputs for a model: read from a user's `.npz` file, or drawn at random from the types that the graph declares."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optframe.errors import InputError
from optframe.types import Feeds

Array = np.ndarray[Any, Any]

DYNAMIC_SIZES = (2, 3, 5, 4)
"""Sizes that free dimensions take in turn, seed by seed; small, and different from one another."""


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that a caller has to feed: graph inputs that have no initialiser as their default."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def read_feeds(path: Path, model: ir.Model) -> list[Feeds]:
    """Return the samples in the `.npz` file `path` for `model`, each input's array converted to the declared dtype.

    An array of an input's rank is one sample; one more leading axis makes it several, the same number for all inputs.

    Raises:
        InputError: no such file, no `.npz`, an input that is missing or unknown, or one that does not fit.
    """
    arrays = _read_npz(path)
    inputs = {str(value.name): value for value in model_inputs(model)}
    unknown, absent = sorted(arrays.keys() - inputs.keys()), sorted(inputs.keys() - arrays.keys())
    if unknown or absent:
        raise InputError(
            f"{path} does not fit the model: "
            + "; ".join(
                f"{what} {', '.join(names)}" for what, names in (("lacks", absent), ("has unknown", unknown)) if names
            )
            + f" (the model takes {', '.join(inputs)})"
        )
    samples = {name: _split_samples(path, inputs[name], array) for name, array in arrays.items()}
    counts = {len(array) for array in samples.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(f"{path}: every input needs the same number of samples, and at least one")
    return [{name: array[i] for name, array in samples.items()} for i in range(counts.pop())]


def _read_npz(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds one array; save the inputs by name with numpy.savez")
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no readable .npz file of plain arrays ({error})") from error


def _split_samples(path: Path, value: ir.Value, array: Array) -> list[Array]:
    array = _convert(path, value, array)
    if value.shape is None:
        return [array]
    if array.ndim == value.shape.rank():
        return [_check_shape(path, value, array)]
    if array.ndim == value.shape.rank() + 1:
        return [_check_shape(path, value, sample) for sample in array]
    raise InputError(f"{path}: '{value.name}' has shape {list(array.shape)}, the model takes {value.shape}")


def _convert(path: Path, value: ir.Value, array: Array) -> Array:
    if value.dtype is None:
        return array
    wanted = value.dtype.numpy()
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise InputError(f"{path}: '{value.name}' is {array.dtype}, the model takes {wanted}")
    return array.astype(wanted, copy=False)


def _check_shape(path: Path, value: ir.Value, array: Array) -> Array:
    assert value.shape is not None
    for size, dim in zip(array.shape, value.shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise InputError(f"{path}: '{value.name}' has shape {list(array.shape)}, the model takes {value.shape}")
    return array


def random_feeds(model: ir.Model, seed: int) -> Feeds:
    """Return one random input: floats N(0, 1), integers 0 or 1, booleans evenly; free dimensions vary with `seed`.

    Integers stay at 0 and 1 since they are often indices, and those are valid nearly everywhere.

    Raises:
        InputError: an input is no tensor, or its shape or dtype is unknown.
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    return {str(value.name): _random_array(value, rng, sizes, seed) for value in model_inputs(model)}


def _random_array(value: ir.Value, rng: np.random.Generator, sizes: dict[str, int], seed: int) -> Array:
    if value.shape is None or value.dtype is None:
        raise InputError(f"cannot draw input '{value.name}': the model does not say its shape and type; use --inputs")
    shape = tuple(_size(dim, sizes, seed) for dim in value.shape)
    dtype = value.dtype.numpy()
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 2, shape).astype(dtype)
    if value.dtype == ir.DataType.STRING:
        raise InputError(f"cannot draw the text input '{value.name}'; use --inputs")
    return rng.standard_normal(shape).astype(dtype)


def _size(dim: int | ir.SymbolicDim, sizes: dict[str, int], seed: int) -> int:
    """Dimensions of the same symbolic name get the same size."""
    if isinstance(dim, int):
        return dim
    name = dim.value or f"unnamed{len(sizes)}"
    return sizes.setdefault(name, DYNAMIC_SIZES[(seed + len(sizes)) % len(DYNAMIC_SIZES)])


def input_shapes(feeds: Feeds) -> dict[str, list[int]]:
    """Return input name -> shape, as a report shows it."""
    return {name: list(array.shape) for name, array in feeds.items()}


def save_samples(path: Path, samples: Sequence[Mapping[str, Array]]) -> None:
    """Write inputs or outputs of several inferences to one `.npz` file; `load_samples` reads them back."""
    arrays: dict[str, Any] = {
        f"{i}/{name}": array for i, sample in enumerate(samples) for name, array in sample.items()
    }
    np.savez(path, **arrays)


def load_samples(path: Path) -> list[dict[str, Array]]:
    """Return what `save_samples` wrote."""
    samples: dict[int, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            index, _, name = key.partition("/")
            samples.setdefault(int(index), {})[name] = file[key]
    return [samples[i] for i in sorted(samples)]
