"""What is left behind for a pass that broke a model: all that is needed to see it happen again."""

from __future__ import annotations

from pathlib import Path

from optframe import files, graph
from optframe.passes import GraphPass
from optframe.pipeline import show_step
from optframe.snapshot import Snapshot
from optframe.types import Feeds
from optframe.worker import save_arrays

README = """\
Pass '{name}' broke this model and was rolled back:

    {reason}

model.onnx is the model before the pass, pipeline.txt the pass with its options{inputs}.
To see it again, in this folder:

    optframe optimize model.onnx -o out.onnx --pipeline "$(cat pipeline.txt)"{option} --verify each
"""


def write(folder: Path, step: GraphPass, reason: str, before: Snapshot, feeds: Feeds | None) -> Path:
    """Write a reproducer into `folder`, which is made; return it.

    Raises:
        InputError: the folder cannot be written.
        EnvironmentLacks: the disk is full.
    """
    graph.save(before.model.clone(), folder / "model.onnx")
    files.write_text(folder / "pipeline.txt", show_step(step) + "\n")
    if feeds is not None:
        with files.writing(folder / "inputs.npz"):
            save_arrays(folder / "inputs.npz", feeds)
    text = README.format(
        name=step.name,
        reason=reason,
        inputs=", inputs.npz the inputs" if feeds is not None else "",
        option=" --inputs inputs.npz" if feeds is not None else "",
    )
    files.write_text(folder / "README.txt", text)
    return folder
