"""Names are looked up, clashes set aside, targets loaded and checked, and the right plugin is blamed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar

import pytest

from optframe.errors import InputError, PluginError
from optframe.hookspec import hookimpl
from optframe.host import PluginHost
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.registry import ADAPTER_MEMBERS, Registry, default_registry
from optframe.types import (
    BackendSpec,
    CalibratorSpec,
    CommandSpec,
    KernelSpec,
    ModelSpec,
    OpParameter,
    OpSpec,
    PassSpec,
    PipelineSpec,
)

Install = Callable[..., None]
TARGETS = "registry_targets"


def op(name: str, kernel: KernelSpec | None = None, domain: str = "com.acme") -> OpSpec:
    return OpSpec(name, domain, (OpParameter("x"),), (OpParameter("y"),), "a:b", "a:c", kernel=kernel)


class Mine:
    """A plugin made of whatever is handed in, by hook."""

    def __init__(self, **contributions: list[Any]) -> None:
        self.contributions = contributions

    @hookimpl
    def optframe_models(self) -> list[ModelSpec]:
        return self.contributions.get("models", [])

    @hookimpl
    def optframe_passes(self) -> list[PassSpec]:
        return self.contributions.get("passes", [])

    @hookimpl
    def optframe_pipelines(self) -> list[PipelineSpec]:
        return self.contributions.get("pipelines", [])

    @hookimpl
    def optframe_ops(self) -> list[OpSpec]:
        return self.contributions.get("ops", [])

    @hookimpl
    def optframe_calibrators(self) -> list[CalibratorSpec]:
        return self.contributions.get("calibrators", [])

    @hookimpl
    def optframe_backends(self) -> list[BackendSpec]:
        return self.contributions.get("backends", [])

    @hookimpl
    def optframe_commands(self) -> list[CommandSpec]:
        return self.contributions.get("commands", [])


def registry_of(*plugins: Mine) -> Registry:
    host = PluginHost(discover=False)
    for number, plugin in enumerate(plugins):
        host.register(plugin, f"mine{number}")
    return Registry(host)


@dataclass(frozen=True)
class Clean(GraphPass):
    name: ClassVar[str] = "clean"

    def run(self, model: Any, context: PassContext) -> PassResult:
        return PassResult(False)


@dataclass(frozen=True)
class Demanding(Clean):
    name: ClassVar[str] = "demanding"
    _: Any
    size: int


class Undecorated(Clean):
    name: ClassVar[str] = "undecorated"
    size: int = 3


def clean_with(**members: object) -> type[Clean]:
    """A pass `clean` that has something else as well."""
    return type("Flawed", (Clean,), members)


@dataclass(frozen=True)
class Sigma:
    name: ClassVar[str] = "sigma"
    sigmas: float = 6.0

    def threshold(self, histogram: object) -> float:
        return self.sigmas


OF_SIGMA = {"name": "sigma", "threshold": Sigma.threshold}


class Backend:
    name = "mine"

    def missing(self) -> None:
        return None

    def versions(self) -> Mapping[str, str]:
        return {}

    def build(self, model: object, folder: object, options: object) -> None: ...

    def open(self, engine: object) -> None: ...


class Misnamed(Backend):
    name = "yours"


class Misshapen(Backend):
    def build(self, model: object) -> None: ...  # type: ignore[override]


class Free(Backend):
    """Its methods can be called as they are, though written otherwise."""

    def build(self, *arguments: object, **more: object) -> None: ...

    @staticmethod
    def open(what: object, *, extra: int = 0) -> None: ...  # type: ignore[override]


class Optionless(Backend):
    option_names = None


class Nameless(Backend):
    name = None  # type: ignore[assignment]


class Explosive(Backend):
    def __init__(self) -> None:
        raise OSError("no device node")


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that specs can name as `registry_targets`."""
    module = types.ModuleType(TARGETS)
    for target in (
        Clean,
        Demanding,
        Undecorated,
        Sigma,
        Backend,
        Misnamed,
        Misshapen,
        Free,
        Optionless,
        Nameless,
        Explosive,
    ):
        setattr(module, target.__name__, target)
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, TARGETS, module)
    return module


def test_every_kind_is_looked_up_by_name_and_listed_sorted() -> None:
    models = [ModelSpec("zebra", "a:B"), ModelSpec("ant", "a:B")]
    steps = Mine(passes=[PassSpec("p2", "a:B"), PassSpec("p1", "a:B")], pipelines=[PipelineSpec("all", "p1,p2")])
    kinds = Mine(
        models=models,
        ops=[op("Swish"), op("Gate", KernelSpec("a:b.cu", "a:rule"))],
        calibrators=[CalibratorSpec("entropy", "a:B")],
        backends=[BackendSpec("fpga", "a:B")],
        commands=[CommandSpec("inspect", "a:b")],
    )
    registry = registry_of(steps, kinds)
    assert registry.model("zebra") is models[0]
    assert [spec.name for spec in registry.models()] == ["ant", "zebra"]
    assert [spec.name for spec in registry.passes()] == ["p1", "p2"]
    assert [spec.name for spec in registry.pipelines()] == ["all"]
    assert registry.pipeline("all").text == "p1,p2"
    assert registry.step("all") == PipelineSpec("all", "p1,p2")
    assert registry.step("p1") == PassSpec("p1", "a:B")
    assert list(registry.ops()) == ["com.acme::Gate", "com.acme::Swish"]
    assert registry.op("com.acme::Swish") == op("Swish")
    assert registry.kernel_ops() == {"com.acme::Gate"}
    assert registry.calibrator("entropy") in registry.calibrators()
    assert registry.backend("fpga") in registry.backends()
    assert registry.command("inspect") in registry.commands()
    assert len(registry.contributions()) == 10
    assert registry.contribution("pass", "p2").plugin == "mine0"
    assert not registry.problems


@pytest.mark.parametrize(
    ("look_up", "said"),
    [
        (lambda registry: registry.model("anchor-detr"), "unknown model 'anchor-detr': did you mean 'anchordetr'?"),
        (lambda registry: registry.load_pass("claen"), "unknown pass or pipeline 'claen': did you mean 'clean'?"),
        (lambda registry: registry.step("xyz"), "unknown pass or pipeline 'xyz': known: clean, portable"),
        (lambda registry: registry.op("com.acme::Swissh"), "did you mean 'com.acme::Swish'?"),
        (lambda registry: registry.load_backend("tensor"), "unknown backend 'tensor': known: none"),
        (lambda registry: registry.load_pass("portable"), "'portable' is a pipeline, not a pass"),
        (lambda registry: registry.pipeline("clean"), "'clean' is a pass, not a pipeline"),
    ],
)
def test_an_unknown_name_is_an_input_error_with_a_suggestion(look_up: Callable[[Registry], Any], said: str) -> None:
    registry = registry_of(
        Mine(
            models=[ModelSpec("anchordetr", "a:B")],
            passes=[PassSpec("clean", "a:B")],
            pipelines=[PipelineSpec("portable", "clean")],
            ops=[op("Swish")],
        )
    )
    with pytest.raises(InputError) as caught:
        look_up(registry)
    assert said in str(caught.value)
    assert not isinstance(caught.value, PluginError)


def test_a_name_claimed_twice_is_set_aside_with_both_distributions(install_plugin: Install) -> None:
    source = """
        from optframe.hookspec import hookimpl
        from optframe.types import PassSpec

        @hookimpl
        def optframe_passes():
            return [PassSpec("acme-clean", "a:B"), PassSpec("{own}", "a:B")]
    """
    install_plugin("acme-one", "1.0", "one = acme_one", acme_one=source.format(own="acme-own1"))
    install_plugin("acme-two", "2.5", "two = acme_two", acme_two=source.format(own="acme-own2"))
    registry = default_registry()
    names = [spec.name for spec in registry.passes()]
    assert "acme-clean" not in names
    assert {"acme-own1", "acme-own2"} <= set(names)
    said = "pass or pipeline 'acme-clean' is claimed by plugin 'one' (acme-one 1.0) and by plugin 'two' (acme-two 2.5)"
    [problem] = [problem for problem in registry.problems if problem.distribution.startswith("acme")]
    assert said in problem.message
    with pytest.raises(PluginError) as caught:
        registry.load_pass("acme-clean")
    assert said in str(caught.value)
    assert default_registry(["one"]).step("acme-clean") == PassSpec("acme-clean", "a:B")


def test_a_spec_of_a_subclass_counts_as_its_kind() -> None:
    class RichSpec(PassSpec):
        """A plugin's own kind of PassSpec."""

    registry = registry_of(Mine(passes=[RichSpec("rich", "a:B")]))
    assert [spec.name for spec in registry.passes()] == ["rich"]


def test_passes_and_pipelines_share_one_name_space() -> None:
    registry = registry_of(Mine(passes=[PassSpec("x", "a:B")]), Mine(pipelines=[PipelineSpec("x", "")]))
    assert registry.passes() == []
    assert registry.pipelines() == []
    assert len(registry.problems) == 1


def test_a_plugin_that_claims_a_name_twice_itself_is_blamed() -> None:
    registry = registry_of(Mine(ops=[op("Swish"), op("Swish")]))
    assert registry.ops() == {}
    [problem] = registry.problems
    assert "op 'com.acme::Swish' is claimed twice by plugin 'mine0'" in problem.message


def test_ops_of_one_name_in_two_domains_do_not_clash() -> None:
    registry = registry_of(Mine(ops=[op("Swish"), op("Swish", domain="org.other")]))
    assert list(registry.ops()) == ["com.acme::Swish", "org.other::Swish"]


def test_the_name_of_an_own_command_is_not_free() -> None:
    registry = registry_of(Mine(commands=[CommandSpec("doctor", "a:b"), CommandSpec("nurse", "a:b")]))
    assert [spec.name for spec in registry.commands()] == ["nurse"]
    [problem] = registry.problems
    assert (problem.plugin, problem.hook) == ("mine0", "optframe_commands")
    assert "'doctor' is optframe's own" in problem.message


def test_a_pass_is_loaded(targets: types.ModuleType) -> None:
    assert registry_of(Mine(passes=[PassSpec("clean", f"{TARGETS}:Clean")])).load_pass("clean") is Clean


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("clean", "no_such_module_here:Clean", "cannot load 'no_such_module_here:Clean': ModuleNotFoundError"),
        ("clean", f"{TARGETS}:Claen", f"cannot load '{TARGETS}:Claen': AttributeError"),
        ("clean", "Clean", "'Clean' is no reference of the form 'package.module:attribute'"),
        ("clean", f"{TARGETS}:Backend", f"{TARGETS}:Backend is no subclass of GraphPass"),
        ("clean", f"{TARGETS}:number", "is no subclass of GraphPass"),
        ("tidy", f"{TARGETS}:Clean", "Clean has the name 'clean', not 'tidy'"),
        ("demanding", f"{TARGETS}:Demanding", "Demanding has options without a default: _, size"),
        ("undecorated", f"{TARGETS}:Undecorated", "Undecorated has options, but is no dataclass: decorate it with"),
    ],
)
def test_a_pass_that_is_none_is_blamed_on_its_plugin(
    targets: types.ModuleType, name: str, target: str, said: str
) -> None:
    with pytest.raises(PluginError) as caught:
        registry_of(Mine(passes=[PassSpec(name, target)])).load_pass(name)
    assert str(caught.value).startswith(f"pass '{name}' of plugin 'mine0' (registered in process): ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"after": "fold-constants"}, "Flawed has after = 'fold-constants', not a tuple of names"),
        ({"before": ["tidy"]}, "Flawed has before = ['tidy'], not a tuple of names"),
        ({"domains": "com.acme"}, "Flawed has domains = 'com.acme', not a tuple of names"),
        (
            {"run": lambda self, model: None},
            "Flawed has run(self, model), which is called as run(self, ",
        ),
        ({"dialect": "gs"}, "Flawed has the dialect 'gs', not 'onnx_ir' or 'graphsurgeon'"),
    ],
)
def test_what_a_pass_declares_is_checked(targets: types.ModuleType, members: dict[str, object], said: str) -> None:
    targets.Flawed = clean_with(**members)  # type: ignore[attr-defined]
    with pytest.raises(PluginError) as caught:
        registry_of(Mine(passes=[PassSpec("clean", f"{TARGETS}:Flawed")])).load_pass("clean")
    assert str(caught.value).startswith(f"pass 'clean' of plugin 'mine0' (registered in process): {said}")


def test_an_option_without_text_form_is_blamed_on_its_plugin(targets: types.ModuleType) -> None:
    flawed = make_dataclass("Flawed", [("table", dict, field(default_factory=dict))], bases=(Clean,), frozen=True)
    targets.Flawed = flawed  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"plugin 'mine0' \(.*\): clean: option 'table' is of a type with no"):
        registry_of(Mine(passes=[PassSpec("clean", f"{TARGETS}:Flawed")])).load_pass("clean")


def test_a_calibrator_is_loaded(targets: types.ModuleType) -> None:
    assert (
        registry_of(Mine(calibrators=[CalibratorSpec("sigma", f"{TARGETS}:Sigma")])).load_calibrator("sigma") is Sigma
    )


def test_a_calibrator_is_made_with_the_options_of_its_text(targets: types.ModuleType) -> None:
    registry = registry_of(Mine(calibrators=[CalibratorSpec("sigma", f"{TARGETS}:Sigma")]))
    assert registry.make_calibrator("sigma") == Sigma()
    assert (
        registry.make_calibrator("sigma{sigmas=3}")
        == registry.make_calibrator(" sigma { sigmas = 3.0 } ")
        == Sigma(3.0)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigm{sigmas=3}", "unknown calibrator 'sigm': did you mean 'sigma'?"),
        (
            "sigma{sigma=3}",
            "calibrator, column 7 (at 'sigma=3}'): unknown option of sigma 'sigma': did you mean 'sigmas'?",
        ),
        ("sigma{sigmas=x}", "calibrator, column 14 (at 'x}'): option 'sigmas' of sigma wants a number, not 'x'"),
        ("sigma,sigma", "calibrator, column 6 (at ',sigma'): expected nothing behind a calibrator"),
        ("", "calibrator, column 1 (at the end): expected the name of a calibrator"),
    ],
)
def test_a_calibrator_that_is_written_wrongly_is_an_input_error(
    targets: types.ModuleType, text: str, said: str
) -> None:
    registry = registry_of(Mine(calibrators=[CalibratorSpec("sigma", f"{TARGETS}:Sigma")]))
    with pytest.raises(InputError) as caught:
        registry.make_calibrator(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("name", "flawed", "said"),
    [
        ("sigma", type("Flawed", (), {"name": "sigma"}), "Flawed lacks threshold"),
        ("sigma", type("Flawed", (), OF_SIGMA), "Flawed is no dataclass"),
        ("rms", type("Flawed", (Sigma,), {}), "Flawed has the name 'sigma', not 'rms'"),
        ("sigma", make_dataclass("Flawed", [("a", int)], namespace=OF_SIGMA), "has options without a default: a"),
    ],
)
def test_a_calibrator_that_is_none_is_blamed(
    targets: types.ModuleType, name: str, flawed: type[Any], said: str
) -> None:
    targets.Flawed = flawed  # type: ignore[attr-defined]
    with pytest.raises(PluginError) as caught:
        registry_of(Mine(calibrators=[CalibratorSpec(name, f"{TARGETS}:Flawed")])).load_calibrator(name)
    assert str(caught.value).startswith(f"calibrator '{name}' of plugin 'mine0' (registered in process): ")
    assert str(caught.value).endswith(said)


def test_options_of_a_model_are_a_dataclass(targets: types.ModuleType) -> None:
    targets.Adapter = type("Adapter", (), dict.fromkeys(ADAPTER_MEMBERS, int))  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"model 'net' of plugin 'mine0' \(.*\): Adapter.Options is no dataclass"):
        registry_of(Mine(models=[ModelSpec("net", f"{TARGETS}:Adapter")])).load_model("net")


def test_a_model_is_constructed_from_its_options_alone(targets: types.ModuleType) -> None:
    class Adapter(Sigma):
        def __init__(self, options: object, more: int) -> None: ...

    for member in ADAPTER_MEMBERS:
        setattr(Adapter, member, Sigma)
    targets.Adapter = Adapter  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"model 'net' of plugin 'mine0' .*from its options alone: .* 'more'"):
        registry_of(Mine(models=[ModelSpec("net", f"{TARGETS}:Adapter")])).load_model("net")


def test_an_abstract_pass_is_blamed(targets: types.ModuleType) -> None:
    targets.Abstract = type("Abstract", (GraphPass,), {"name": "abstract"})  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="Abstract has no method run"):
        registry_of(Mine(passes=[PassSpec("abstract", f"{TARGETS}:Abstract")])).load_pass("abstract")


def test_the_blame_names_distribution_and_version_of_an_installed_plugin(install_plugin: Install) -> None:
    source = """
        from optframe.hookspec import hookimpl
        from optframe.types import ModelSpec

        @hookimpl
        def optframe_models():
            return [ModelSpec("acme-net", "acme_absent:Adapter"), ModelSpec("acme-half", "acme_models:Half")]

        class Half:
            Options = int
            def feeds(self): ...
    """
    install_plugin("acme-models", "3.2.1", "models = acme_models", acme_models=source)
    registry = default_registry()
    with pytest.raises(PluginError) as absent:
        registry.load_model("acme-net")
    assert str(absent.value).startswith("model 'acme-net' of plugin 'models' (acme-models 3.2.1): cannot load")
    with pytest.raises(PluginError, match=r"acme_models:Half lacks .*export.*random_feeds"):
        registry.load_model("acme-half")


def test_a_backend_is_loaded_as_an_instance(targets: types.ModuleType) -> None:
    registry = registry_of(Mine(backends=[BackendSpec("mine", f"{TARGETS}:Backend")]))
    assert isinstance(registry.load_backend("mine"), Backend)
    registry = registry_of(Mine(backends=[BackendSpec("mine", f"{TARGETS}:Free")]))
    assert isinstance(registry.load_backend("mine"), Free)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("Misnamed", "Misnamed has the name 'yours', not 'mine'"),
        ("Nameless", "Nameless has the name None, not 'mine'"),
        ("Misshapen", "Misshapen has build(self, model), which is called as build(self, model, folder, options)"),
        ("Optionless", "Optionless has option_names = None, not a collection of names"),
        ("Explosive", "Explosive() raised OSError: no device node (test_registry.py:"),
        ("Clean", "lacks missing, versions, build, open"),
    ],
)
def test_a_backend_that_is_none_is_blamed(targets: types.ModuleType, target: str, said: str) -> None:
    registry = registry_of(Mine(backends=[BackendSpec("mine", f"{TARGETS}:{target}")]))
    with pytest.raises(PluginError) as caught:
        registry.load_backend("mine")
    assert str(caught.value).startswith("backend 'mine' of plugin 'mine0' (registered in process): ")
    assert said in str(caught.value)


def test_the_installed_packages_register_without_problems_and_all_targets_load() -> None:
    registry = default_registry()
    assert registry.problems == []
    loads: Mapping[str, Callable[[str], Any]] = {
        "model": registry.load_model,
        "pass": registry.load_pass,
        "calibrator": registry.load_calibrator,
        "backend": registry.load_backend,
    }
    loaded = [
        loads[kind](spec.name)
        for kind, specs in (
            ("model", registry.models()),
            ("pass", registry.passes()),
            ("calibrator", registry.calibrators()),
            ("backend", registry.backends()),
        )
        for spec in specs
    ]
    assert len(loaded) >= 2
