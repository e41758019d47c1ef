"""Every hook is typed, and documented with an example that runs as it stands; the host has a method for each."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from optframe import hookspec, types
from optframe.hookspec import PROJECT, hookimpl
from optframe.host import PluginHost

HOOKS = {name: hook for name, hook in vars(hookspec).items() if hasattr(hook, f"{PROJECT}_spec")}
CONTRIBUTIONS = {name: hook for name, hook in HOOKS.items() if hook.__annotations__["return"] != "None"}
OBSERVERS = {name: hook for name, hook in HOOKS.items() if name not in CONTRIBUTIONS}

ARGUMENTS: dict[str, Any] = {
    "stage": "optimize",
    "options": {"opset": 18},
    "seconds": 1.25,
    "cached": True,
    "name": "fold-constants",
    "record": SimpleNamespace(name="fold-constants", nodes_before=10, nodes_after=7),
}
"""An argument of every name that observers take."""

HEARD = {
    "optframe_stage_started": "optimize ...\n",
    "optframe_stage_finished": "optimize: 1.2 s (cached)\n",
    "optframe_pass_started": "fold-constants ...\n",
    "optframe_pass_finished": "fold-constants 10 7\n",
}
"""What the examples of observers print."""


def documented(hook: Callable[..., Any]) -> tuple[str, str]:
    """Return description and example of a hook's docstring."""
    description, marker, example = inspect.cleandoc(hook.__doc__ or "").partition("Example:\n")
    assert marker, f"{hook.__name__} has no example"
    return description.strip(), textwrap.dedent(example)


def host_with_example(name: str) -> PluginHost:
    """Return a host with a plugin made of the documented example of hook `name`."""
    parameters = ", ".join(inspect.signature(HOOKS[name]).parameters)
    source = f"def {name}({parameters}):\n{textwrap.indent(documented(HOOKS[name])[1], '    ')}"
    namespace = {key: value for key, value in vars(types).items() if inspect.isclass(value)}
    exec(compile(source, f"<example of {name}>", "exec"), namespace)
    host = PluginHost(discover=False)
    host.register(SimpleNamespace(**{name: hookimpl(namespace[name])}), "example")
    return host


def test_there_are_hooks_of_both_kinds() -> None:
    assert len(CONTRIBUTIONS) == 7
    assert HEARD.keys() == OBSERVERS.keys()


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_typed_and_described(name: str) -> None:
    signature = inspect.signature(HOOKS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    description, _ = documented(HOOKS[name])
    assert description.endswith(".")
    for parameter in signature.parameters:
        assert f"`{parameter}`" in description


@pytest.mark.parametrize("name", HOOKS)
def test_the_host_has_a_typed_method_for_the_hook(name: str) -> None:
    method = inspect.signature(getattr(PluginHost, name.removeprefix(f"{PROJECT}_")))
    hook = inspect.signature(HOOKS[name])
    assert [p for key, p in method.parameters.items() if key != "self"] == list(hook.parameters.values())
    if name in CONTRIBUTIONS:
        [spec] = re.findall(r"Iterable\[(\w+)\]", hook.return_annotation)
        assert method.return_annotation == f"list[Contribution[{spec}]]"


@pytest.mark.parametrize("name", CONTRIBUTIONS)
def test_the_example_of_a_contribution_is_collected(name: str) -> None:
    host = host_with_example(name)
    [claim] = getattr(host, name.removeprefix(f"{PROJECT}_"))()
    assert f"Iterable[{type(claim.spec).__name__}]" == CONTRIBUTIONS[name].__annotations__["return"]
    assert not host.problems


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_example_of_an_observer_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    host = host_with_example(name)
    arguments = {key: ARGUMENTS[key] for key in inspect.signature(OBSERVERS[name]).parameters}
    getattr(host, name.removeprefix(f"{PROJECT}_"))(**arguments)
    assert not host.problems
    assert capsys.readouterr().out == HEARD[name]
