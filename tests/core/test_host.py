"""Plugins are found, loaded, blocked and listened to; what is wrong with one is blamed on it and harms nobody."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import optframe
from optframe.errors import InputError, PluginError
from optframe.hookspec import hookimpl
from optframe.host import Contribution, PluginHost, PluginProblem
from optframe.types import CommandSpec, ModelSpec, OpParameter, OpSpec, PassSpec

Install = Callable[..., None]

GOOD = """
    from optframe.hookspec import hookimpl
    from optframe.types import PassSpec

    @hookimpl
    def optframe_passes():
        return [PassSpec("acme-clean", "acme_good_passes:Clean")]
"""


def plugin(**members: Any) -> types.ModuleType:
    """Return a module with `members`, which are hook implementations unless their name ends in `_unmarked`."""
    module = types.ModuleType("in_process")
    vars(module).update(members)
    return module


def installed_problems(distribution: str) -> list[PluginProblem]:
    host = PluginHost()
    host.passes()
    return [problem for problem in host.problems if problem.distribution == distribution]


def registered(**members: Any) -> PluginHost:
    host = PluginHost(discover=False)
    host.register(plugin(**members), "mine")
    return host


def problems_of_passes(result: object) -> list[str]:
    """Return the problems of a plugin whose optframe_passes returns `result`."""

    @hookimpl
    def optframe_passes() -> object:
        return result

    host = registered(optframe_passes=optframe_passes)
    host.passes()
    return [str(problem) for problem in host.problems]


# --- discovery


def test_an_installed_plugin_is_found_with_its_distribution_and_version(install_plugin: Install) -> None:
    install_plugin("acme-good", "1.2.3", "acme = acme_good", acme_good=GOOD)
    host = PluginHost()
    expected = Contribution("acme", "acme-good", "1.2.3", PassSpec("acme-clean", "acme_good_passes:Clean"))
    assert expected in host.passes()
    assert ("acme", "loaded") in [(each.plugin, each.state) for each in host.plugins]
    assert not host.problems


def test_the_builtin_packages_are_plugins_like_any_other() -> None:
    assert {"core", "passes", "trt"} <= {each.plugin for each in PluginHost().plugins}


def test_an_import_error_is_blamed_and_the_next_plugin_still_counts(install_plugin: Install) -> None:
    install_plugin("acme-good", "1.0", "acme = acme_good", acme_good=GOOD)
    install_plugin("broken-import", "0.9", "broken = broken_import", broken_import="import no_such_library_of_mine")
    host = PluginHost()
    assert [claim.spec.name for claim in host.passes() if claim.plugin == "acme"] == ["acme-clean"]
    [problem] = host.problems
    assert (problem.plugin, problem.distribution, problem.version, problem.hook) == (
        *("broken", "broken-import", "0.9"),
        None,
    )
    assert "'broken_import': ModuleNotFoundError: No module named 'no_such_library_of_mine'" in problem.message
    assert "(broken_import.py:1)" in problem.message
    assert isinstance(problem.error, ModuleNotFoundError)


def test_a_plugin_that_exits_while_it_is_imported_takes_nobody_with_it(install_plugin: Install) -> None:
    install_plugin("quitter", "1.0", "quitter = quitter_plugin", quitter_plugin="raise SystemExit('I need Python 4')")
    [problem] = installed_problems("quitter")
    assert "SystemExit: I need Python 4" in problem.message


def test_an_entry_point_that_is_no_module_is_blamed(install_plugin: Install) -> None:
    install_plugin("acme-object", "2.0", "acme = acme_object:PLUGIN", acme_object="PLUGIN = 3")
    [problem] = installed_problems("acme-object")
    assert (problem.plugin, problem.version) == ("acme", "2.0")
    assert "'acme_object:PLUGIN' names an object of type int, not a module" in problem.message


def test_entry_points_that_cannot_be_read_are_blamed(install_plugin: Install) -> None:
    install_plugin("acme-torn", "3.1", "this line has no equals sign")
    install_plugin("acme-good", "1.0", "acme = acme_good", acme_good=GOOD)
    host = PluginHost()
    [problem] = host.problems
    assert (problem.plugin, problem.distribution, problem.version) == ("acme-torn", "acme-torn", "3.1")
    assert "entry points cannot be read" in problem.message
    assert "acme-clean" in [claim.spec.name for claim in host.passes()]


def test_two_plugins_of_one_name_are_told_apart_by_their_distributions(install_plugin: Install) -> None:
    other = GOOD.replace("acme-clean", "acme-other")
    install_plugin("acme-one", "1.0", "acme = acme_one", acme_one=GOOD)
    install_plugin("acme-two", "2.0", "acme = acme_two", acme_two=other)
    host = PluginHost()
    assert {"acme@acme-one", "acme@acme-two"} <= {each.plugin for each in host.plugins}
    assert {"acme-clean", "acme-other"} <= {claim.spec.name for claim in host.passes()}
    without = PluginHost(["acme@acme-two"])
    assert "acme-other" not in {claim.spec.name for claim in without.passes()}


def test_one_module_under_two_names_counts_once(install_plugin: Install) -> None:
    install_plugin("acme-good", "1.0", "one = acme_good\ntwo = acme_good", acme_good=GOOD)
    host = PluginHost()
    assert [claim.plugin for claim in host.passes() if claim.spec.name == "acme-clean"] == ["one"]
    [problem] = host.problems
    assert problem.plugin == "two"
    assert "cannot register it: " in problem.message
    assert "acme_good" in problem.message


def test_of_one_distribution_on_two_folders_the_first_counts(
    install_plugin: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("acme-good", "1.0", "acme = acme_good", acme_good=GOOD)
    (tmp_path / "site").rename(tmp_path / "later")
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    install_plugin("Acme.Good", "2.0", "acme = acme_good", acme_good=GOOD)
    assert [each.version for each in PluginHost().plugins if each.plugin == "acme"] == ["2.0"]


# --- blocking


def test_a_disabled_plugin_is_listed_but_never_imported(install_plugin: Install) -> None:
    install_plugin("acme-loud", "1.0", "loud = acme_loud", acme_loud="raise RuntimeError('imported')")
    host = PluginHost(["loud"])
    assert [each.state for each in host.plugins if each.plugin == "loud"] == ["disabled"]
    assert "acme_loud" not in sys.modules
    assert not host.problems


def test_disabling_what_is_not_installed_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="unknown plugin 'pases': did you mean 'passes'"):
        PluginHost(["pases"])


def test_disabling_a_name_that_two_distributions_have_tells_theirs(install_plugin: Install) -> None:
    for distribution in ("acme-one", "acme-two"):
        install_plugin(distribution, "1.0", "acme = acme_good_passes", acme_good_passes=GOOD)
    with pytest.raises(InputError, match=r"unknown plugin 'acme': .*acme@acme-one"):
        PluginHost(["acme"])


# --- implementations


def test_a_misspelt_hook_is_blamed_with_a_suggestion(install_plugin: Install) -> None:
    source = GOOD.replace("optframe_passes", "optframe_pases")
    install_plugin("acme-typo", "1.5", "typo = acme_typo", acme_typo=source)
    [problem] = installed_problems("acme-typo")
    assert (problem.plugin, problem.version, problem.hook) == ("typo", "1.5", "optframe_pases")
    assert problem.message == "there is no such hook; did you mean 'optframe_passes'?"


def test_a_misspelt_hook_without_decorator_is_blamed_too() -> None:
    [problem] = registered(optframe_modles=lambda: []).problems
    assert (problem.hook, problem.message) == (
        "optframe_modles",
        "there is no such hook; did you mean 'optframe_models'?",
    )


def test_a_hook_without_decorator_is_blamed() -> None:
    host = registered(optframe_models=lambda: [ModelSpec("m", "a:B")])
    assert host.models() == []
    [problem] = host.problems
    assert problem.hook == "optframe_models"
    assert "@hookimpl" in problem.message


def test_a_module_that_is_named_like_a_hook_is_no_mistake() -> None:
    import optframe_passes

    assert not registered(optframe_passes=optframe_passes).problems


def test_an_argument_that_the_hook_does_not_have_is_blamed(install_plugin: Install) -> None:
    source = GOOD.replace("optframe_passes()", "optframe_passes(registry)")
    install_plugin("acme-arguments", "0.2", "arguments = acme_arguments", acme_arguments=source)
    host = PluginHost()
    assert "acme-clean" not in [claim.spec.name for claim in host.passes()]
    [problem] = host.problems
    assert (problem.plugin, problem.distribution, problem.version) == ("arguments", "acme-arguments", "0.2")
    assert "optframe_passes" in problem.message
    assert "'registry'" in problem.message
    assert "\n" not in str(problem)


def test_a_hook_wrapper_is_refused() -> None:
    @hookimpl(wrapper=True)
    def optframe_passes() -> Any:
        result = yield
        return [*result, PassSpec("sneaked-in", "a:B")]

    host = registered(optframe_passes=optframe_passes)
    assert host.passes() == []
    assert [problem.hook for problem in host.problems] == ["optframe_passes"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned None, not an iterable of PassSpec"),
        (PassSpec("p", "a:B"), "returned an object of type PassSpec, not an iterable of PassSpec"),
        ("clean", "returned an object of type str, not an iterable"),
        ({"clean": 1}, "returned an object of type dict, not an iterable"),
        (["clean"], "item 0 is an object of type str, not PassSpec"),
        ([PassSpec("p", "a:B"), ModelSpec("m", "a:B")], "item 1 is an object of type ModelSpec, not PassSpec"),
        ([PassSpec("two words", "a:B")], "item 0 has the name 'two words'"),
        ([PassSpec("", "a:B")], "item 0 has the name ''"),
        ([PassSpec(3, "a:B")], "item 0 has the name 3"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_return_value_is_blamed(result: object, said: str) -> None:
    [problem] = problems_of_passes(result)
    assert problem.startswith("plugin 'mine' (registered in process): optframe_passes: ")
    assert said in problem


def test_a_wrong_return_type_of_an_installed_plugin_names_its_distribution(install_plugin: Install) -> None:
    source = GOOD.replace('[PassSpec("acme-clean", "acme_good_passes:Clean")]', '["acme-clean"]')
    install_plugin("acme-types", "4.5.6", "types = acme_types", acme_types=source)
    [problem] = installed_problems("acme-types")
    assert str(problem) == (
        "plugin 'types' (acme-types 4.5.6): optframe_passes: item 0 is an object of type str, not PassSpec"
    )


def test_an_op_in_the_domain_of_onnx_is_blamed() -> None:
    @hookimpl
    def optframe_ops() -> Iterable[OpSpec]:
        return [OpSpec("Swish", "", (OpParameter("x"),), (OpParameter("y"),), "a:b", "a:c")]

    host = registered(optframe_ops=optframe_ops)
    assert host.ops() == []
    assert "a domain of your own" in host.problems[0].message


def test_a_generator_that_raises_midway_keeps_what_it_gave(install_plugin: Install) -> None:
    source = """
        from optframe.hookspec import hookimpl
        from optframe.types import PassSpec

        @hookimpl
        def optframe_passes():
            yield PassSpec("first", "a:B")
            raise ZeroDivisionError("half-way")
    """
    install_plugin("acme-generator", "7.0", "generator = acme_generator", acme_generator=source)
    host = PluginHost()
    assert "first" in [claim.spec.name for claim in host.passes()]
    [problem] = host.problems
    assert (problem.plugin, problem.distribution, problem.version, problem.hook) == (
        *("generator", "acme-generator", "7.0"),
        "optframe_passes",
    )
    assert problem.message == "raised ZeroDivisionError: half-way (acme_generator.py:8)"


def test_a_problem_is_listed_once_however_often_the_hook_is_called() -> None:
    @hookimpl
    def optframe_passes() -> Iterable[PassSpec]:
        raise ValueError("always")

    host = registered(optframe_passes=optframe_passes)
    host.passes()
    host.passes()
    assert len(host.problems) == 1


def test_contributions_do_not_depend_on_the_order_of_registration() -> None:
    def named(name: str) -> types.ModuleType:
        @hookimpl
        def optframe_commands() -> Iterable[CommandSpec]:
            return [CommandSpec(name, "a:B")]

        return plugin(optframe_commands=optframe_commands)

    forwards, backwards = PluginHost(discover=False), PluginHost(discover=False)
    for name in "abc":
        forwards.register(named(name), name)
    for name in "cba":
        backwards.register(named(name), name)
    assert forwards.commands() == backwards.commands()
    assert [claim.spec.name for claim in forwards.commands()] == ["a", "b", "c"]


def test_an_object_can_be_a_plugin_and_two_hosts_share_nothing() -> None:
    class Mine:
        @hookimpl
        def optframe_models(self) -> Iterable[ModelSpec]:
            return [ModelSpec("mine", "a:B")]

    host = PluginHost(discover=False)
    host.register(Mine(), "mine")
    assert [claim.spec.name for claim in host.models()] == ["mine"]
    assert PluginHost(discover=False).models() == []


def test_a_property_of_a_plugin_object_is_not_evaluated() -> None:
    class Mine:
        @property
        def optframe_device(self) -> None:
            raise RuntimeError("no device")

    host = PluginHost(discover=False)
    host.register(Mine(), "mine")
    assert not host.problems


def test_a_name_can_be_registered_once() -> None:
    host = registered()
    with pytest.raises(PluginError, match="plugin 'mine' \\(registered in process\\) has that name"):
        host.register(plugin(), "mine")


# --- observers


class Listener:
    """Observes everything, and fails on request."""

    def __init__(self, fail: bool = False) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.fail = fail

    @hookimpl
    def optframe_stage_started(self, stage: str, options: Mapping[str, Any]) -> None:
        self._hear("started", stage, dict(options))

    @hookimpl
    def optframe_stage_finished(self, cached: bool, stage: str) -> None:  # takes what it wants, in any order
        self._hear("finished", stage, cached)

    @hookimpl
    def optframe_pass_finished(self, record: Any) -> None:
        self._hear("pass", record)

    def _hear(self, *what: Any) -> None:
        if self.fail:
            raise RuntimeError("deaf")
        self.heard.append(what)


def test_observers_hear_of_stages_and_passes() -> None:
    host, listener, record = PluginHost(discover=False), Listener(), object()
    host.register(listener, "listener")
    host.stage_started("optimize", {"opset": 18})
    host.pass_finished(record)  # type: ignore[arg-type]
    host.stage_finished("optimize", 1.5, True)
    assert listener.heard == [("started", "optimize", {"opset": 18}), ("pass", record), ("finished", "optimize", True)]


def test_an_observer_that_raises_is_blamed_and_the_others_still_hear() -> None:
    host, listener = PluginHost(discover=False), Listener()
    host.register(Listener(fail=True), "deaf")
    host.register(listener, "listener")
    host.stage_started("export", {})
    host.stage_finished("export", 0.1, False)
    assert len(listener.heard) == 2
    assert [(each.plugin, each.hook) for each in host.problems] == [
        ("deaf", "optframe_stage_started"),
        ("deaf", "optframe_stage_finished"),
    ]
    assert "raised RuntimeError: deaf (test_host.py:" in host.problems[0].message


# --- files


def test_the_root_of_a_plugin_is_the_outermost_package_of_its_module(install_plugin: Install, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for folder in ("acme_root/inner", "acme_space/portion"):
        (site / folder).mkdir(parents=True)
    (site / "acme_root/__init__.py").touch()
    (site / "acme_root/inner/plugin.py").touch()  # acme_root.inner: a namespace package inside a package
    (site / "acme_space/portion/__init__.py").touch()  # acme_space: a namespace package, which others share
    points = "root = acme_root.inner.plugin\nspace = acme_space.portion\nfile = acme_file"
    install_plugin("acme-roots", "1.0", points, acme_file="")
    host = PluginHost()
    assert host.plugin_root("core") == Path(optframe.__file__).parent
    assert host.plugin_root("root") == site / "acme_root"
    assert host.plugin_root("space") == site / "acme_space/portion"
    assert host.plugin_root("file") == site / "acme_file.py"


def test_the_root_of_an_object_is_that_of_its_class(tmp_path: Path) -> None:
    host = PluginHost(discover=False)
    host.register(Listener(), "listener")
    assert host.plugin_root("listener") == Path(__file__)


def test_there_is_no_root_without_files(install_plugin: Install) -> None:
    host = registered()
    with pytest.raises(PluginError, match="plugin 'mine' \\(registered in process\\) is loaded and has no files"):
        host.plugin_root("mine")
    with pytest.raises(InputError, match="unknown plugin 'your'"):
        host.plugin_root("your")
    with pytest.raises(PluginError, match="is disabled and has no files"):
        PluginHost(["core"]).plugin_root("core")


# --- errors at run time


def raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_culprit_is_the_plugin_of_the_innermost_frame(install_plugin: Install) -> None:
    install_plugin("acme-outer", "1.0", "outer = acme_outer", acme_outer="def call(inner): inner()")
    install_plugin("acme-inner", "2.0", "inner = acme_inner", acme_inner="import json\ndef parse(): json.loads('{')")
    host = PluginHost()
    import acme_inner  # type: ignore[import-not-found]
    import acme_outer  # type: ignore[import-not-found]

    def culprit(call: Callable[[], object]) -> str:
        found = host.culprit(raised(call))
        return found.blame if found else "nobody"

    assert culprit(acme_inner.parse) == "plugin 'inner' (acme-inner 2.0)"
    assert culprit(lambda: acme_outer.call(acme_inner.parse)) == "plugin 'inner' (acme-inner 2.0)"
    assert culprit(lambda: acme_outer.call(None)) == "plugin 'outer' (acme-outer 1.0)"
    assert culprit(lambda: host.plugin_root("no-such")) == "nobody"
    host.register(host, "ours")  # in process, and of optframe's own code
    assert culprit(lambda: host.plugin_root("no-such")) == "nobody"
