"""Pipelines as text: read, printed, expanded, ordered, and errors that point at the spot."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optframe.errors import InputError, PluginError, unknown_name
from optframe.passes import GraphPass, PassContext, PassResult
from optframe.pipeline import Pipeline
from optframe.types import PassSpec, PipelineSpec


@dataclass(frozen=True)
class Idle(GraphPass):
    """Does nothing."""

    name: ClassVar[str] = "idle"

    def run(self, model: Any, context: PassContext) -> PassResult:
        return PassResult(False)


@dataclass(frozen=True)
class Fold(Idle):
    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 1024
    shapes_only: bool = False


@dataclass(frozen=True)
class Fuse(Idle):
    name: ClassVar[str] = "fuse"
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)
    epsilon: float = 1e-6
    target: Literal["native", "plugin", 3, "two words"] = "native"
    label: str = "x"
    domain: str | None = None
    axes: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    limit: int | str | None = None

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ValueError("epsilon is negative")


@dataclass(frozen=True)
class Early(Idle):
    name: ClassVar[str] = "early"
    before: ClassVar[tuple[str, ...]] = ("fuse",)


class FakeRegistry:
    def __init__(self, passes: tuple[type[GraphPass], ...], pipelines: dict[str, str]) -> None:
        self.passes = {each.name: each for each in passes}
        self.texts = pipelines

    def step(self, name: str) -> PassSpec | PipelineSpec:
        if name in self.passes:
            return PassSpec(name, f"somewhere:{name}")
        if name in self.texts:
            return PipelineSpec(name, self.texts[name])
        raise unknown_name("pass or pipeline", name, [*self.passes, *self.texts])

    def load_pass(self, name: str) -> type[GraphPass]:
        return self.passes[name]


REGISTRY = FakeRegistry(
    (Fold, Fuse, Early, Idle),
    {"clean": "fold-constants,idle", "all": "clean, fuse{epsilon=1e-3}", "a": "b", "b": "idle,a", "wrong": "idle{x=1}"},
)


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, REGISTRY)


def test_options_are_typed_by_their_annotations() -> None:
    fuse = 'fuse{epsilon=1e-5, target=3,label="a b",axes=(1, -2),names=()}'
    assert parse(f"fold-constants{{max_bytes=-5,shapes-only=true}}, {fuse}").steps == (
        Fold(max_bytes=-5, shapes_only=True),
        Fuse(epsilon=1e-5, target=3, label="a b", axes=(1, -2), names=()),
    )


def test_named_pipelines_expand_and_passes_may_repeat() -> None:
    assert parse("all,idle").steps == (Fold(), Idle(), Fuse(epsilon=1e-3), Idle())


def test_empty_text_is_the_empty_pipeline() -> None:
    assert parse("  ").steps == ()
    assert str(Pipeline()) == ""


def test_defaults_are_not_printed() -> None:
    assert str(Pipeline((Fold(max_bytes=1024), Fuse(epsilon=0.5)))) == "fold-constants,fuse{epsilon=0.5}"


def test_text_that_reads_as_something_else_is_quoted() -> None:
    shown = str(Pipeline((Fuse(domain="none", limit="12", names=("none", "a,b")),)))
    assert shown == 'fuse{domain="none",names=(none,"a,b"),limit="12"}'
    assert parse(shown).steps == (Fuse(domain="none", limit="12", names=("none", "a,b")),)


texts = st.text(max_size=8) | st.sampled_from(["none", "true", "1", "1e3", "a,b", "}", '"', "\\", "nan", "é\n"])
fuses = st.builds(
    Fuse,
    epsilon=st.floats(min_value=0, allow_nan=False),
    target=st.sampled_from(["native", "plugin", 3, "two words"]),
    label=texts,
    domain=st.none() | texts,
    axes=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.none() | st.lists(texts, max_size=3).map(tuple),
    limit=st.none() | st.integers() | texts,
)
folds = st.builds(Fold, max_bytes=st.integers(), shapes_only=st.booleans())


@given(st.lists(folds, min_size=1, max_size=3), st.lists(fuses | folds, max_size=4))
def test_printed_pipelines_read_back_equal(first: list[GraphPass], rest: list[GraphPass]) -> None:
    pipeline = Pipeline((*first, *rest))
    assert parse(str(pipeline)) == pipeline


@given(st.text(alphabet='ab-,{}()="\\ \n1fuse', max_size=20))
def test_any_text_reads_or_is_an_input_error_of_one_line(text: str) -> None:
    with suppress(InputError):
        pipeline = parse(text)
        assert parse(str(pipeline)) == pipeline
        return
    with pytest.raises(InputError, match=r"\A[^\n]*\Z"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("idle,fuze", 6, "did you mean 'fuse'"),
        ("fuse{epsilom=1}", 6, "unknown option of fuse 'epsilom': did you mean 'epsilon'"),
        ("fold-constants{max_bytes=big}", 26, "wants an integer, not 'big'"),
        ("fold-constants{max_bytes=1.5}", 26, "wants an integer"),
        ("fold-constants{shapes_only=yes}", 28, "wants true or false"),
        ("fuse{epsilon=nan}", 14, "wants a number"),
        ('fuse{epsilon="1"}', 14, "wants a number"),
        ("fuse{target=trt}", 13, "wants one of native, plugin, 3, two words, not 'trt'"),
        ("fuse{axes=1}", 11, "wants a list like (an integer, ...)"),
        ("fuse{axes=(1,x)}", 11, "not ('1','x')"),
        ("fuse{label=(a)}", 12, "wants text"),
        ("fuse{limit=(1)}", 12, "wants an integer or text or none"),
        ("idle,fuse{epsilon=1", 10, "'{' is not closed"),
        ("fuse{axes=(1,2}", 15, "expected ',' or ')'"),
        ("fuse{axes=(1", 11, "'(' is not closed"),
        ("idle}", 5, "expected ',' between two passes"),
        ("idle,", 6, "expected the name of a pass"),
        ("fuse{epsilon}", 13, "expected '='"),
        ("fuse{epsilon=}", 14, "expected a value"),
        ('fuse{label="abc}', 12, "is not closed"),
        ('fuse{label="\\q"}', 12, "JSON"),
        ("fuse{epsilon=1,epsilon=2}", 16, "given twice"),
        ("fuse{epsilon=-1}", 1, "epsilon is negative"),
        ("clean{x=1}", 7, "takes no options"),
    ],
)
def test_errors_point_at_the_spot(text: str, column: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert f"column {column} " in str(caught.value)
    assert message in str(caught.value)


def test_an_error_inside_a_named_pipeline_names_it() -> None:
    with pytest.raises(InputError, match="pipeline 'wrong', column 6"):
        parse("fold-constants,wrong")


def test_pipelines_that_contain_one_another_are_refused() -> None:
    with pytest.raises(InputError, match="a -> b -> a"):
        parse("a")


@pytest.mark.parametrize("text", ["fuse,fold-constants", "fuse,early", "idle,fuse,clean"])
def test_order_constraints_name_both_passes(text: str) -> None:
    with pytest.raises(InputError, match=r"must run before 'fuse'"):
        parse(text)


def test_order_constraints_hold_for_first_occurrences_and_present_passes_only() -> None:
    assert len(parse("fold-constants,fuse,fold-constants,fuse").steps) == 4
    assert len(parse("fuse").steps) == 1
    assert len(parse("early,fuse").steps) == 2


def test_an_option_without_text_form_blames_the_pass() -> None:
    @dataclass(frozen=True)
    class Odd(Idle):
        name: ClassVar[str] = "odd"
        table: dict[str, int] | None = None

    with pytest.raises(PluginError, match="odd: option 'table'"):
        Pipeline.parse("odd", FakeRegistry((Odd,), {}))
