"""What says whether a model is still right: equal outputs, or a script of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir

from optframe import feeds as feeds_module
from optframe import graph
from optframe.errors import InputError, describe
from optframe.gate.exchange import Exchange
from optframe.gate.structure import wiring_problem
from optframe.gate.verify import Verifier
from optframe.snapshot import Snapshot
from optframe.types import Feeds
from optframe.worker import Worker

Check: TypeAlias = Callable[[ir.Model], bool]
"""Says whether a model is right; it gets a copy that it may change."""


@contextmanager
def open_verifier(
    original: Snapshot,
    *,
    inputs: Sequence[Feeds] = (),
    random_inputs: Callable[[int], Feeds] | None = None,
    max_abs: float | None = None,
    worker_command: Sequence[str] | None = None,
) -> Iterator[Verifier]:
    """Yield a verifier with a worker process of its own, and a folder for what they exchange."""
    draw = random_inputs or partial(feeds_module.random_feeds, original.model)
    with (
        tempfile.TemporaryDirectory(prefix="optframe-") as folder,
        Worker(Path(folder), command=worker_command) as worker,
    ):
        yield Verifier(Exchange(worker), original, inputs, draw, max_abs)


@contextmanager
def equal_outputs(model: ir.Model, *, inputs: Sequence[Feeds] = (), max_abs: float | None = None) -> Iterator[Check]:
    """Yield a check that a model computes what `model` does, on `inputs` and on random ones, in a worker process.

    Without `max_abs` outputs may differ as `optframe.numerics.TOLERANCES` says, relative to their size.

    Raises:
        InputError: `model` is wired wrongly, or runs on none of the inputs.
    """
    problem = wiring_problem(model)
    if problem:
        raise InputError(f"the model is invalid: {problem}")
    original = Snapshot.take(model)
    with open_verifier(original, inputs=inputs, max_abs=max_abs) as verifier:
        verdict = verifier.verify_whole(original)
        if verdict.status == "unverified":
            raise InputError(f"nothing can be compared: {verdict.reason}; give --inputs or --check")
        yield partial(_is_equal, verifier)


def _is_equal(verifier: Verifier, model: ir.Model) -> bool:
    try:
        if wiring_problem(model):
            return False
        snapshot = Snapshot.take(model)
    except Exception:  # a broken graph fails anywhere on its way to a file, and that it is broken is the answer
        return False
    return verifier.verify_whole(snapshot).status != "different"


def script_check(script: str | os.PathLike[str], timeout: float | None = None) -> Check:
    """Return a check that runs `script MODEL.onnx`: exit status 0 says that the model is right.

    A `.py` file runs in this Python, anything else by itself. What it prints is swallowed. `timeout` in seconds.

    Raises:
        InputError: there is no such file; when called, that it cannot be run.
    """
    path = Path(script).absolute()
    if not path.is_file():
        raise InputError(f"no such file: {script}")
    command = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]

    def check(model: ir.Model) -> bool:
        with tempfile.TemporaryDirectory(prefix="optframe-") as folder:
            target = Path(folder) / "model.onnx"
            try:
                graph.save(model, target)
            except Exception:  # what cannot be written cannot be right
                return False
            try:
                done = subprocess.run(
                    [*command, str(target)], capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout
                )
            except subprocess.TimeoutExpired:
                return False
            except OSError as error:
                raise InputError(f"{script} cannot be run ({describe(error)}); make it executable, or a .py") from error
        return done.returncode == 0

    return check
