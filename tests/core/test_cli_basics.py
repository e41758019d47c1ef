"""The command line itself: lazy commands, errors in one line with their exit status, plugins, passes, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from optframe import __version__, cli, commands, environment
from optframe.backends.onnxruntime import OnnxRuntimeBackend
from optframe.errors import CheckFailed, EnvironmentLacks, InputError

Install = Callable[..., None]
HEAVY = ("torch", "onnx", "onnx_ir", "numpy", "onnxruntime", "onnx_graphsurgeon")

COMMANDS = """
    import typer
    from optframe.errors import CheckFailed, EnvironmentLacks, InputError
    from optframe.hookspec import hookimpl
    from optframe.types import CommandSpec

    NAMES = ("greet", "tree", "unwrappable", "absent", "fail", "crash", "exit", "interrupt", "leave", "late")

    @hookimpl
    def optframe_commands():
        return [CommandSpec(name, f"acme_commands:{name}", f"Acme's {name}.") for name in NAMES]

    @hookimpl
    def optframe_stage_started(stage, options):
        raise RuntimeError("cannot hear")

    def greet(context: typer.Context, name: str, loud: bool = False):
        "Greet NAME."
        typer.echo(f"hello {name}{'!' if loud else ''} debug={context.obj.debug}")
        return 5  # a returned value is no exit status

    tree = typer.Typer(help="A command with sub-commands.")

    @tree.command()
    def leaf():
        typer.echo("green")

    @tree.command()
    def root():
        "Show the root."

    unwrappable = 3

    def fail(how: int):
        raise {1: CheckFailed, 2: InputError, 3: EnvironmentLacks}[how]("this is why")

    def crash():
        raise ZeroDivisionError("first line\\nsecond line")

    def exit():
        raise SystemExit(0)

    def interrupt():
        raise KeyboardInterrupt

    def leave():
        raise typer.Exit(7)

    def late(context: typer.Context):
        context.obj.registry.host.stage_started("export", {})
"""

BROKEN = "import no_such_library_of_mine"


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@pytest.fixture
def optframe(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """A function that runs the command line in this process."""

    def run(*arguments: str) -> Ran:
        status = cli.main(arguments)
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def acme(install_plugin: Install) -> None:
    install_plugin("acme-commands", "1.1", "acme = acme_commands", acme_commands=COMMANDS)


@pytest.fixture
def broken(install_plugin: Install) -> None:
    install_plugin("acme-broken", "0.1", "broken = acme_broken", acme_broken=BROKEN)


def imported_by(*arguments: str) -> set[str]:
    """Return which heavy modules a process has imported after running the command line."""
    code = "import sys; from optframe import cli; cli.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(HEAVY) & set(done.stderr.split())


# --- start


@pytest.mark.parametrize("arguments", [("--help",), ("plugins",), ("plugins", "--json"), ("plugins", "--help")])
def test_help_and_plugins_import_nothing_heavy(arguments: Sequence[str]) -> None:
    assert imported_by(*arguments) == set()


def test_the_check_for_heavy_modules_can_fail() -> None:
    assert "onnx_ir" in imported_by("doctor")


def test_python_m_optframe_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "optframe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"optframe {__version__}\n"


def test_every_own_command_has_a_summary_and_working_help(optframe: Callable[..., Ran]) -> None:
    listing = optframe("--help")
    assert listing.status == 0
    for spec in commands.BUILTIN_COMMANDS:
        assert spec.name in listing.out
        assert spec.summary.endswith(".")
        page = optframe(spec.name, "--help")
        assert page.status == 0
        assert f"optframe {spec.name}" in page.out


def test_without_a_command_the_help_is_shown_and_the_status_is_usage(optframe: Callable[..., Ran]) -> None:
    ran = optframe()
    assert ran.status == 2
    assert "plugins" in ran.out


# --- errors


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["doctro"], 2, "error: unknown command 'doctro': did you mean 'doctor'?\n"),
        (["--disable-plugin", "pases", "plugins"], 2, "error: unknown plugin 'pases': did you mean 'passes'?\n"),
        (["--disable-plugin", "pases", "--help"], 2, "error: unknown plugin 'pases': did you mean 'passes'?\n"),
        (["passes", "no-such-pass-at-all"], 2, "error: unknown pass or pipeline 'no-such-pass-at-all': "),
        (["fail", "1"], CheckFailed.exit_status, "error: this is why\n"),
        (["fail", "2"], InputError.exit_status, "error: this is why\n"),
        (["fail", "3"], EnvironmentLacks.exit_status, "error: this is why\n"),
        (
            ["crash"],
            2,
            "error: plugin 'acme' (acme-commands 1.1) raised ZeroDivisionError: first line (acme_commands.py:",
        ),
        (["exit"], 2, "error: plugin 'acme' (acme-commands 1.1) raised SystemExit: 0 (acme_commands.py:"),
        (["interrupt"], 130, "interrupted\n"),
        (["leave"], 7, ""),
        (["absent"], 2, "error: command 'absent' of plugin 'acme' (acme-commands 1.1): cannot load"),
        (["unwrappable"], 2, "error: command 'unwrappable' of plugin 'acme' (acme-commands 1.1): "),
    ],
)
def test_an_error_is_one_line_with_its_status(
    acme: None, optframe: Callable[..., Ran], arguments: list[str], status: int, said: str
) -> None:
    ran = optframe(*arguments)
    assert ran.status == status
    assert ran.err.startswith(said)
    assert ran.err.count("\n") <= 1
    assert ran.out == ""


@pytest.mark.parametrize(
    "arguments", [["--frobnicate"], ["plugins", "--frobnicate"], ["plugins", "extra"], ["greet"], ["fail", "one"]]
)
def test_a_usage_error_takes_two_lines_and_status_2(
    acme: None, optframe: Callable[..., Ran], arguments: list[str]
) -> None:
    ran = optframe(*arguments)
    assert ran.status == 2
    command = " ".join(["optframe", *arguments[:1]]) if arguments[0][0] != "-" else "optframe"
    first, second = ran.err.splitlines()
    assert first.startswith("error: ")
    assert second == f"see {command} --help"


@pytest.mark.parametrize("arguments", [["--debug", "crash"], ["--debug", "--disable-plugin", "trt", "crash"]])
def test_debug_shows_the_traceback(acme: None, optframe: Callable[..., Ran], arguments: list[str]) -> None:
    ran = optframe(*arguments)
    assert ran.status == 2
    assert "Traceback (most recent call last)" in ran.err
    assert 'raise ZeroDivisionError("first line' in ran.err
    assert "Traceback" not in optframe("crash").err
    assert "optframe --debug" in optframe("crash").err


def test_an_error_of_optframe_itself_is_laid_to_nobody(
    acme: None, optframe: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(environment, "describe", crash)
    ran = optframe("doctor")
    assert ran.status == 1
    assert ran.err.startswith("error: ZeroDivisionError: ours (test_cli_basics.py:")


# --- commands of plugins


def test_a_plugin_adds_commands(acme: None, optframe: Callable[..., Ran]) -> None:
    assert "Acme's greet." in optframe("--help").out
    assert optframe("greet", "Ada") == Ran(0, "hello Ada debug=False\n", "")
    assert optframe("--debug", "greet", "Ada", "--loud").out == "hello Ada! debug=True\n"
    assert "Greet NAME." in optframe("greet", "--help").out
    assert optframe("tree", "leaf") == Ran(0, "green\n", "")
    assert "Show the root." in optframe("tree", "--help").out


def test_the_commands_of_a_disabled_plugin_are_gone(acme: None, optframe: Callable[..., Ran]) -> None:
    assert "greet" not in optframe("--disable-plugin", "acme", "--help").out
    ran = optframe("--disable-plugin", "acme", "greet", "Ada")
    assert ran.err.startswith("error: unknown command 'greet'")


def test_the_target_of_a_command_is_not_imported_for_the_help(
    install_plugin: Install, optframe: Callable[..., Ran]
) -> None:
    source = COMMANDS.replace('f"acme_commands:{name}"', '"acme_lazy:greet"')
    install_plugin(
        *("acme-lazy", "1.0", "lazy = acme_hooks"), acme_hooks=source, acme_lazy="raise RuntimeError('imported')"
    )
    assert optframe("--help").status == 0
    assert "acme_lazy" not in sys.modules
    assert "RuntimeError: imported" in optframe("greet").err


# --- problems of plugins


def test_problems_are_warnings_of_other_commands_and_cost_nothing(broken: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("passes", "--json")
    assert ran.status == 0
    [line] = ran.err.splitlines()
    assert line.startswith(
        "warning: plugin 'broken' (acme-broken 0.1): cannot import 'acme_broken': ModuleNotFoundError"
    )
    assert isinstance(json.loads(ran.out), list)
    assert optframe("--disable-plugin", "broken", "passes", "--json").err == ""


def test_debug_shows_what_a_plugin_raised(broken: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("--debug", "passes", "--json")
    assert ran.status == 0
    assert "import no_such_library_of_mine" in ran.err


def test_a_problem_that_comes_up_while_a_command_runs_is_told_too(acme: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("late")
    assert ran.status == 0
    assert ran.err.startswith("warning: plugin 'acme' (acme-commands 1.1): optframe_stage_started: raised RuntimeError")


# --- plugins


def test_plugins_lists_plugins_contributions_and_problems(broken: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("plugins")
    assert (ran.status, ran.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")] for line in ran.out.splitlines()]
    assert ["", "core", "optframe", __version__, "backend: onnxruntime, torch", ""] in rows
    assert ["", "broken", "acme-broken", "0.1", "(failed)", ""] in rows
    assert "no_such_library_of_mine" in ran.out


def test_plugins_as_json(broken: None, acme: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("--disable-plugin", "trt", "plugins", "--json")
    listed = json.loads(ran.out)
    by_name = {plugin["plugin"]: plugin for plugin in listed["plugins"]}
    assert by_name["broken"]["state"] == "failed"
    assert by_name["trt"] == {
        **{"plugin": "trt", "distribution": "optframe", "version": __version__},
        **{"state": "disabled", "contributions": {}},
    }
    assert set(by_name["acme"]["contributions"]["command"]) >= {"greet", "tree"}
    [problem] = listed["problems"]
    assert (problem["plugin"], problem["distribution"], problem["version"], problem["hook"]) == (
        *("broken", "acme-broken", "0.1"),
        None,
    )


# --- passes

PASSES = """
    from dataclasses import dataclass
    from typing import ClassVar, Literal
    from optframe.hookspec import hookimpl
    from optframe.passes import GraphPass, PassResult
    from optframe.types import PassSpec, PipelineSpec

    @hookimpl
    def optframe_passes():
        return [PassSpec("acme-tidy", "acme_passes:Tidy", "tidies [up]")]

    @hookimpl
    def optframe_pipelines():
        return [
            PipelineSpec("acme-inner", "acme-tidy{level=2}", "inside"),
            PipelineSpec("acme-all", "acme-inner, acme-tidy{mode=hard}", "everything"),
        ]

    @dataclass(frozen=True)
    class Tidy(GraphPass):
        '''Tidies the graph [bold]thoroughly[/bold].

        At `level` 2 twice.
        '''

        name: ClassVar[str] = "acme-tidy"
        before: ClassVar[tuple[str, ...]] = ("fold-constants",)
        domains: ClassVar[tuple[str, ...]] = ("com.acme",)
        level: int = 1
        mode: Literal["soft", "hard"] = "soft"

        def run(self, model, context):
            return PassResult(False)
"""


@pytest.fixture
def acme_passes(install_plugin: Install) -> None:
    install_plugin("acme-passes", "2.0", "tidy = acme_passes", acme_passes=PASSES)


def test_passes_lists_passes_and_pipelines(acme_passes: None, optframe: Callable[..., Ran]) -> None:
    rows = {row["name"]: row for row in json.loads(optframe("passes", "--json").out)}
    assert rows["acme-tidy"] == {
        **{"name": "acme-tidy", "kind": "pass", "summary": "tidies [up]"},
        **{"plugin": "tidy", "distribution": "acme-passes", "version": "2.0"},
    }
    assert rows["acme-all"]["kind"] == "pipeline"
    shown = optframe("passes").out
    assert "tidies [up]" in shown
    assert "everything" in shown


def test_passes_explains_a_pass(acme_passes: None, optframe: Callable[..., Ran]) -> None:
    facts = json.loads(optframe("passes", "acme-tidy", "--json").out)
    assert facts["options"] == [
        {"name": "level", "type": "an integer", "default": "1"},
        {"name": "mode", "type": "one of soft, hard", "default": "soft"},
    ]
    assert (facts["before"], facts["after"], facts["domains"]) == (["fold-constants"], [], ["com.acme"])
    assert facts["doc"].splitlines()[-1] == "At `level` 2 twice."
    page = optframe("passes", "acme-tidy").out
    assert "[bold]thoroughly[/bold]" in page
    assert "mode: one of soft, hard; default soft" in page
    assert "before: fold-constants" in page
    assert "plugin 'tidy' (acme-passes 2.0)" in page


def test_passes_explains_and_expands_a_pipeline(acme_passes: None, optframe: Callable[..., Ran]) -> None:
    facts = json.loads(optframe("passes", "acme-all", "--json").out)
    assert facts["text"] == "acme-inner, acme-tidy{mode=hard}"
    assert facts["expanded"] == "acme-tidy{level=2},acme-tidy{mode=hard}"
    assert "acme-tidy{level=2},acme-tidy{mode=hard}" in optframe("passes", "acme-all").out


# --- doctor


def test_doctor_tells_what_works(broken: None, optframe: Callable[..., Ran]) -> None:
    ran = optframe("doctor", "--json")
    facts = json.loads(ran.out)
    assert ran.status == 0
    backend = next(backend for backend in facts["backends"] if backend["name"] == "onnxruntime")
    assert (backend["works"], backend["missing"], backend["cannot_run"]) == (True, None, None)
    assert "onnxruntime" in backend["versions"]
    assert backend["options"] == ["cuda_graph", "nhwc", "optimization", "tf32", "threads"]
    assert facts["packages"]["optframe"] == __version__
    assert [problem["plugin"] for problem in facts["problems"]] == ["broken"]
    page = optframe("doctor")
    assert (page.status, page.err) == (0, "")
    assert all(word in page.out for word in ("onnxruntime", "Python", "memory", "acme-broken", "cuda_graph"))


def test_doctor_tells_the_gpu(monkeypatch: pytest.MonkeyPatch, optframe: Callable[..., Ran]) -> None:
    gpu = {"name": "NVIDIA H100", "driver_version": "570.1", "memory.total": "81559 MiB", "compute_cap": "9.0"}
    monkeypatch.setattr(environment, "gpus", lambda: (gpu,))
    shown = " ".join(optframe("doctor").out.split())
    assert "NVIDIA H100, 81559 MiB, compute capability 9.0" in shown


def test_doctor_fails_where_the_needed_backend_does(
    monkeypatch: pytest.MonkeyPatch, optframe: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(OnnxRuntimeBackend, "missing", lambda self: "gone: pip install it")
    ran = optframe("doctor")
    assert ran.status == EnvironmentLacks.exit_status
    assert "gone: pip install it" in ran.out
    assert "cuda_graph" in ran.out, "its options are known all the same, for a build elsewhere"
    assert ran.err.startswith("error: backend onnxruntime")


def test_doctor_survives_backends_that_do_not(install_plugin: Install, optframe: Callable[..., Ran]) -> None:
    source = """
        from optframe.hookspec import hookimpl
        from optframe.types import BackendSpec

        @hookimpl
        def optframe_backends():
            return [BackendSpec("fpga", "acme_backends:Fpga"), BackendSpec("void", "acme_backends:Void")]

        class Fpga:
            name = "fpga"
            def missing(self): return 1 / 0
            def versions(self): ...
            def build(self, model, folder, options): ...
            def open(self, engine): ...
    """
    install_plugin("acme-backends", "0.4", "acme = acme_backends", acme_backends=source)
    backends: dict[str, Any] = {row["name"]: row for row in json.loads(optframe("doctor", "--json").out)["backends"]}
    assert not backends["fpga"]["works"]
    assert "ZeroDivisionError" in backends["fpga"]["missing"]
    assert "plugin 'acme' (acme-backends 0.4)" in backends["fpga"]["missing"]
    assert "cannot load 'acme_backends:Void'" in backends["void"]["missing"]


def test_a_group_without_a_command_says_what_is_missing(optframe: Callable[..., Ran]) -> None:
    ran = optframe("cache")
    assert ran.status == 2
    assert ran.err.startswith("error: a command is missing\nsee optframe cache --help")
