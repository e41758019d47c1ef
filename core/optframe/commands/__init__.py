"""The commands of `optframe`, one a module; listed here, imported only when run or asked for their help."""

from __future__ import annotations

from optframe.types import CommandSpec

BUILTIN_COMMANDS = (
    CommandSpec("run", "optframe.commands.run:run", "Take a model to checked engines and a report."),
    CommandSpec("optimize", "optframe.commands.optimize:optimize", "Run a pipeline of passes on an ONNX file."),
    CommandSpec("compare", "optframe.commands.compare:compare", "Tell how far one model's outputs are from another's."),
    CommandSpec("profile", "optframe.commands.profile:profile", "Time an ONNX file on a backend."),
    CommandSpec("passes", "optframe.commands.passes:passes", "List passes and pipelines, or explain one."),
    CommandSpec("plugins", "optframe.commands.plugins:plugins", "List plugins, what they contribute, and problems."),
    CommandSpec("cache", "optframe.commands.cache:cache", "Show or empty the cache of stages."),
    CommandSpec("doctor", "optframe.commands.doctor:doctor", "Say what works on this machine, and mend what does not."),
)
"""In the order of `optframe --help`. A target is a function for typer to wrap, or a `typer.Typer` with sub-commands."""
