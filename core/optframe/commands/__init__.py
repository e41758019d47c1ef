"""The commands of `optframe`, one a module; listed here, imported only when run or asked for their help."""

from __future__ import annotations

from optframe.types import CommandSpec

BUILTIN_COMMANDS = (
    CommandSpec("run", "optframe.commands.run:run", "Take a model to checked engines and a report."),
    CommandSpec("optimize", "optframe.commands.optimize:optimize", "Run a pipeline of passes on an ONNX file."),
    CommandSpec("compare", "optframe.commands.compare:compare", "Tell how far one model's outputs are from another's."),
    CommandSpec("diff", "optframe.commands.diff:diff", "Tell how one ONNX file differs from another, and why."),
    CommandSpec("explain", "optframe.commands.explain:explain", "Tell what a pass would do to a model, and what not."),
    CommandSpec("bisect", "optframe.commands.bisect:bisect", "Find the pass and the rewrite that break a model."),
    CommandSpec("build", "optframe.commands.build:build", "Build an engine from an ONNX file on a backend."),
    CommandSpec(
        "calibrate", "optframe.commands.calibrate:calibrate", "Measure INT8 ranges, and which layers they hurt."
    ),
    CommandSpec("profile", "optframe.commands.profile:profile", "Time an ONNX file on a backend."),
    CommandSpec("passes", "optframe.commands.passes:passes", "List passes and pipelines, or explain one."),
    CommandSpec("plugins", "optframe.commands.plugins:plugins", "List plugins, what they contribute, and problems."),
    CommandSpec("cache", "optframe.commands.cache:cache", "Show or empty the cache of stages."),
    CommandSpec("doctor", "optframe.commands.doctor:doctor", "Say what works on this machine, and mend what does not."),
)
"""In the order of `optframe --help`. A target is a function for typer to wrap, or a `typer.Typer` with sub-commands."""
