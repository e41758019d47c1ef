"""Textual pipelines: `fold-constants,fuse-layernorm{epsilon=1e-5,axes=(1,2)},portable`, read, checked and printed.

An item is a pass with options, or the name of a pipeline, which stands for its own items. Values are bare words
(letters, digits and `_.+-:/*`), JSON strings in double quotes, or lists of these in parentheses. Blanks don't matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from optframe.errors import InputError, PluginError, unknown_name
from optframe.pass_options import BARE, Word, Words, Written, option_types, read_value, show_options
from optframe.passes import GraphPass
from optframe.types import PassSpec, PipelineSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
BLANKS = re.compile(r"\s*")

T = TypeVar("T")


class StepRegistry(Protocol):
    """What reading a pipeline needs of a registry; both raise InputError for an unknown name."""

    def step(self, name: str) -> PassSpec | PipelineSpec:
        """Return what `name` stands for."""
        ...

    def load_pass(self, name: str) -> type[GraphPass]:
        """Import and return the class of pass `name`."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run; a pass may appear more than once.

    `str()` gives the text that `parse` reads back to an equal pipeline.

    Raises:
        InputError: the order contradicts what a pass declares in `after` or `before`.
    """

    steps: tuple[GraphPass, ...] = ()

    def __post_init__(self) -> None:
        _check_order([step.name for step in self.steps], self.steps)

    @classmethod
    def parse(cls, text: str, registry: StepRegistry, where: str = "pipeline") -> Pipeline:
        """Return the pipeline that `text` describes, named pipelines expanded; errors say that it stands in `where`.

        Raises:
            InputError: `text` is malformed, names something unknown, gives a bad value, or orders passes wrongly.
            PluginError: a pass that it names does not load.
        """
        return cls(tuple(_expand(text, registry, (), where)))

    def __str__(self) -> str:
        return ",".join(show_step(step) for step in self.steps)


def show_step(step: GraphPass) -> str:
    """Return one pass as text, without the options that have their default."""
    options = show_options(step)
    return f"{step.name}{{{options}}}" if options else step.name


def read_one(text: str, kind: str, load: Callable[[str], type[T]]) -> T:
    """Return the contribution of `kind`, a word for errors, that `text` describes as a pipeline's does a pass.

    Raises:
        InputError: `text` is malformed, or gives a bad value; and whatever `load` raises.
    """
    scanner = _Scanner(text, kind, f"a {kind}")
    item = scanner.only_item()
    return _make(load(item.name.text), item, scanner)


def _check_order(names: Sequence[str], steps: Sequence[GraphPass]) -> None:
    first = {name: names.index(name) for name in names}
    for step in steps:
        pairs = [(name, step.name) for name in step.after] + [(step.name, name) for name in step.before]
        for earlier, later in pairs:
            if earlier in first and later in first and first[earlier] > first[later]:
                raise InputError(f"pass '{earlier}' must run before '{later}' ({step.name} says so); swap them")


@dataclass(frozen=True)
class _Item:
    """A name and its options as written, each with its column."""

    name: Word
    options: tuple[tuple[Word, Written], ...]


def _expand(text: str, registry: StepRegistry, chain: tuple[str, ...], where: str) -> Iterator[GraphPass]:
    """Yield the passes of `text`, which stands in `where`; `chain` are the named pipelines that led here."""
    scanner = _Scanner(text, where, "a pass or pipeline")
    for item in scanner.items():
        spec = scanner.located(item.name, partial(registry.step, item.name.text))
        if isinstance(spec, PassSpec):
            yield _make(registry.load_pass(spec.name), item, scanner)
        elif item.options:
            raise scanner.error(item.options[0][0].column, f"pipeline '{spec.name}' takes no options")
        elif spec.name in chain:
            raise InputError(f"pipelines contain one another: {' -> '.join((*chain, spec.name))}")
        else:
            yield from _expand(spec.text, registry, (*chain, spec.name), f"pipeline '{spec.name}'")


def _make(cls: type[T], item: _Item, scanner: _Scanner) -> T:
    """Return an instance of `cls`, a dataclass with a `name`, with the options of `item`."""
    kinds = option_types(cls)
    options: dict[str, Any] = {}
    for key, written in item.options:
        name = key.text.replace("-", "_")
        if name not in kinds:
            raise scanner.error(key.column, str(unknown_name(f"option of {item.name.text}", key.text, kinds)))
        if name in options:
            raise scanner.error(key.column, f"option '{name}' of {item.name.text} is given twice")
        try:
            options[name] = read_value(kinds[name], written)
        except ValueError as error:
            raise scanner.error(written.column, f"option '{name}' of {item.name.text} {error}") from None
    return scanner.located(item.name, partial(cls, **options))


class _Scanner:
    """Reads the items of one text, each called `item` in words, and places errors in it: `where` says what it is."""

    def __init__(self, text: str, where: str, item: str) -> None:
        self.text = text
        self.position = 0
        self.where = where
        self.item = item

    def items(self) -> Iterator[_Item]:
        """Yield all items; an empty text has none."""
        self._skip(BLANKS)
        if self.position == len(self.text):
            return
        while True:
            yield self._item()
            if self.position == len(self.text):
                return
            if not self._take(","):
                raise self.error(self.position + 1, "expected ',' between two passes")

    def only_item(self) -> _Item:
        """Return the one item there is."""
        self._skip(BLANKS)
        item = self._item()
        if self.position < len(self.text):
            raise self.error(self.position + 1, f"expected nothing behind {self.item}")
        return item

    def error(self, column: int, message: str) -> InputError:
        """Return the error at `column`, with the text found there."""
        rest = " ".join(self.text[column - 1 :].split())
        spot = f"at '{rest[:24]}{'...' if len(rest) > 24 else ''}'" if rest else "at the end"
        return InputError(f"{self.where}, column {column} ({spot}): {message}")

    def located(self, word: Word, make: Callable[[], T]) -> T:
        """Return what `make` makes; an error of the user's, or a value that a pass refuses, is placed at `word`."""
        try:
            return make()
        except PluginError:
            raise
        except (InputError, ValueError, TypeError) as error:
            raise self.error(word.column, str(error)) from error

    def _item(self) -> _Item:
        name = self._word(NAME, f"the name of {self.item}")
        options: list[tuple[Word, Written]] = []
        opening = self.position + 1
        if self._take("{"):
            while not self._take("}"):
                if options and not self._take(","):
                    raise self._unclosed(opening, "{", "}")
                options.append(self._option())
        return _Item(name, tuple(options))

    def _option(self) -> tuple[Word, Written]:
        key = self._word(NAME, "an option's name")
        if not self._take("="):
            raise self.error(self.position + 1, f"expected '=' and a value after option '{key.text}'")
        return key, self._value()

    def _value(self) -> Written:
        opening = self.position + 1
        if not self._take("("):
            return self._scalar()
        items: list[Word] = []
        while not self._take(")"):
            if items and not self._take(","):
                raise self._unclosed(opening, "(", ")")
            items.append(self._scalar())
        return Words(tuple(items), opening)

    def _scalar(self) -> Word:
        if not self.text.startswith('"', self.position):
            return self._word(BARE, "a value (text with other signs needs double quotes)")
        column = self.position + 1
        match = QUOTED.match(self.text, self.position)
        try:
            text = json.loads(match.group(), strict=False) if match else None
        except json.JSONDecodeError:
            text = None
        if match is None or text is None:
            raise self.error(column, "this quoted text is not closed, or has an escape that JSON does not know")
        self._skip(QUOTED)
        return Word(text, True, column)

    def _unclosed(self, opening: int, left: str, right: str) -> InputError:
        if self.position == len(self.text):
            return self.error(opening, f"'{left}' is not closed by '{right}'")
        return self.error(self.position + 1, f"expected ',' or '{right}'")

    def _word(self, pattern: re.Pattern[str], wanted: str) -> Word:
        match = pattern.match(self.text, self.position)
        if not match:
            raise self.error(self.position + 1, f"expected {wanted}")
        word = Word(match.group(), False, self.position + 1)
        self._skip(pattern)
        return word

    def _take(self, sign: str) -> bool:
        """Step over `sign` and the blanks after it, if it comes next."""
        found = self.text.startswith(sign, self.position)
        if found:
            self.position += len(sign)
            self._skip(BLANKS)
        return found

    def _skip(self, pattern: re.Pattern[str]) -> None:
        for each in (pattern, BLANKS):
            match = each.match(self.text, self.position)
            self.position = match.end() if match else self.position
