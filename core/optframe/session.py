"""What the commands of one call of `optframe` share: global options, plugins, and where to print."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from optframe.host import Plugin, PluginProblem
    from optframe.registry import Registry


@dataclass(frozen=True)
class Session:
    """One call of the command line; a command finds it in `typer.Context.obj`. Everything in it is made when used."""

    disabled: tuple[str, ...] = ()
    debug: bool = False
    _shown: list[PluginProblem] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def has_registry(self) -> bool:
        """Whether plugins have been asked for yet."""
        return "quiet_registry" in vars(self)

    @property
    def registry(self) -> Registry:
        """What the installed plugins offer; their problems go to stderr as warnings, each once."""
        self.warn_of_problems()
        return self.quiet_registry

    @cached_property
    def quiet_registry(self) -> Registry:
        """What the installed plugins offer; the caller shows their problems in its own way."""
        from optframe.registry import default_registry

        return default_registry(self.disabled)

    @cached_property
    def console(self) -> Console:
        """Where results go: rich's console on stdout."""
        from rich.console import Console

        return Console(highlight=False, emoji=False)

    @cached_property
    def progress_console(self) -> Console:
        """Where progress goes: rich's console on stderr, which leaves stdout to results."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, emoji=False)

    def warn(self, message: str) -> None:
        """Print a warning of one line to stderr."""
        typer.secho("warning: ", fg=typer.colors.YELLOW, err=True, nl=False)
        typer.echo(message, err=True)

    def take_problems(self) -> list[PluginProblem]:
        """Return the plugins' problems that have not been taken before, to show them."""
        new = [problem for problem in self.quiet_registry.problems if problem not in self._shown]
        self._shown.extend(new)
        return new

    def warn_of_problems(self) -> None:
        """Print the plugins' problems that nobody has shown yet as warnings; with --debug, what they raised too."""
        for problem in self.take_problems():
            self.show_traceback(problem.error)
            self.warn(str(problem))

    def culprit(self, error: BaseException) -> Plugin | None:
        """Return the plugin in whose code `error` was raised, None if in nobody's or none was loaded."""
        return self.quiet_registry.host.culprit(error) if self.has_registry else None

    def show_traceback(self, error: BaseException | None) -> None:
        """With --debug, print the traceback of `error`, if there is one, to stderr."""
        if self.debug and error is not None:
            import traceback

            typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)

    def print_json(self, value: Any) -> None:
        """Print `value` as JSON to stdout; what JSON does not know goes by its `str`."""
        typer.echo(json.dumps(value, indent=2, default=str))
