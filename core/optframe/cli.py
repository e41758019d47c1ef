"""The command line: global options, commands that load when called, and errors as one line with an exit status.

A command is added by one line: for optframe's own a `CommandSpec(name, "module:function", summary)` in
`optframe.commands.BUILTIN_COMMANDS`, for a plugin the same from its `optframe_commands` hook. The function is one that
typer can wrap; a parameter `context: typer.Context` gives it the `Session` as `context.obj`. Its docstring is its help,
and it ends with another status than 0 by raising an error of `optframe.errors`, or `typer.Exit`. For sub-commands the
target is a `typer.Typer`. The module is imported only when the command runs or shows its help, so it may import what
it needs at its top; `optframe --help` shows the summary.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeGuard

import typer
from typer.core import TyperCommand, TyperGroup

from optframe import __version__, interrupts
from optframe.commands import BUILTIN_COMMANDS
from optframe.errors import (
    PLUGIN_ERRORS,
    EnvironmentLacks,
    InputError,
    OptframeError,
    PluginError,
    describe,
    unknown_name,
)
from optframe.session import Session
from optframe.types import CommandSpec, load_target

INTERRUPTED = 130
"""What typer returns for a KeyboardInterrupt; `optframe.interrupts` knows the status that it means."""

DEBUG_HINT = "rerun with `optframe --debug ...` for the traceback"

_OWN = {spec.name: spec for spec in BUILTIN_COMMANDS}


class LazyGroup(TyperGroup):
    """Lists commands by their summaries alone, and imports the one that is called.

    Contexts are typed Any: older versions of typer take click's, newer ones their own.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return optframe's own commands, then those of plugins by name."""
        return [*_OWN, *(spec.name for spec in _session(ctx).quiet_registry.commands())]

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand:
        """Return a stand-in that has a name and a summary, which is all that a list of commands needs."""
        return TyperCommand(cmd_name, help=self._spec(ctx, cmd_name).summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that `args` call; return its name, itself, and its arguments."""
        name = args[0]
        if name in _OWN:
            return name, _wrap(name, load_target(_OWN[name].target)), args[1:]
        self._spec(ctx, name)  # raises for an unknown name
        registry = _session(ctx).registry
        target = registry.load_command(name)
        try:
            return name, _wrap(name, target), args[1:]
        except Exception as error:  # typer raises several types for what it cannot map
            blame = registry.contribution("command", name).blame
            raise PluginError(f"command '{name}' of {blame}: typer cannot wrap it: {describe(error)}") from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; an error in the list of commands comes before the first half of the page."""
        self.list_commands(ctx)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> None:
        """Run the command, then tell what plugins got wrong meanwhile; a crash names the plugin at fault."""
        session = _session(ctx)
        try:
            super().invoke(ctx)
        except PLUGIN_ERRORS as error:  # an exit amid the work would look like its end
            culprit = session.culprit(error) if _is_unforeseen(error) else None
            if culprit is None:
                raise
            raise PluginError(f"{culprit.blame} raised {describe(error)}; {DEBUG_HINT}") from error
        finally:
            if session.has_registry:
                session.warn_of_problems()

    def _spec(self, ctx: Any, name: str) -> CommandSpec:
        if name in _OWN:
            return _OWN[name]
        try:
            return _session(ctx).registry.command(name)
        except PluginError:
            raise
        except InputError:
            raise unknown_name("command", name, self.list_commands(ctx)) from None


app = typer.Typer(cls=LazyGroup, invoke_without_command=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"optframe {__version__}")
        raise typer.Exit


@app.callback()
def _optframe(
    context: typer.Context,
    disable_plugin: Annotated[
        list[str] | None, typer.Option(metavar="NAME", is_eager=True, help="Don't load this plugin; repeatable.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", is_eager=True, help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """From a PyTorch or ONNX model to a fast engine, proven equal on the way."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(InputError.exit_status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (default: the process's own) and return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # What numpy multiplies here is small: on shared cores its threads wait for each other longer than they work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with interrupts.raised() as heard:
        try:
            status = typer.main.get_command(app).main(given, prog_name="optframe", standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            status = INTERRUPTED
        except Exception as error:
            status = INTERRUPTED if heard.hung_up else _show(error, debug="--debug" in given)
    if status == INTERRUPTED:
        status = heard.status
        with contextlib.suppress(OSError):  # of a terminal that is gone
            typer.echo(heard.message, err=True)
    return int(status)


def _show(error: Exception, debug: bool) -> int:
    """Print `error` as a user should see it, and return the exit status it means."""
    Session(debug=debug).show_traceback(error)
    if _is_full_disk(error):
        error = EnvironmentLacks(f"cannot write: {error.strerror}; free space")
    if isinstance(error, OptframeError):
        message, status = str(error), error.exit_status
    elif _is_usage(error):
        message, status = _usage_error(error), InputError.exit_status
    else:
        message, status = f"{describe(error)}; {DEBUG_HINT}", OptframeError.exit_status
    typer.secho("error: ", fg=typer.colors.RED, err=True, nl=False)
    typer.echo(message, err=True)
    return status


def _is_full_disk(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_usage(error: BaseException) -> bool:
    return hasattr(error, "format_message")  # typer's and click's have it, in all versions


def _is_unforeseen(error: BaseException) -> bool:
    """Whether `error` has nothing to say to a user, and does not end a command as typer does."""
    ends = isinstance(error, typer.Exit | typer.Abort)
    return not (ends or isinstance(error, OptframeError) or _is_usage(error) or _is_full_disk(error))


def _usage_error(error: Any) -> str:
    """Return the message in one line, and a second that points to the help of the command in question."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "optframe"
    text = " ".join(message.split()) or "a command is missing"  # typer has printed the help of the group then
    return f"{text}\nsee {command} --help"


def _session(context: Any) -> Session:
    """Return the call's session; `--help` and completion ask before the group is invoked."""
    if context.obj is None:
        names = context.params.get("disable_plugin") or ()
        context.obj = Session(tuple(names), bool(context.params.get("debug")))
    session: Session = context.obj
    return session


def _wrap(name: str, target: Any) -> Any:
    """Make a command of a function or a `typer.Typer`."""
    outer = typer.Typer(add_completion=False)
    if isinstance(target, typer.Typer):
        outer.add_typer(target, name=name)
    else:
        outer.command(name)(target)
    return typer.main.get_group(outer).commands[name]
