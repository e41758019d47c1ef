"""Dataclasses out of JSON: what fits comes back, what does not is named."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from optframe import typed_json


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    count: int
    on: bool
    pair: tuple[int, str]
    parts: tuple[Part, ...]
    table: Mapping[str, Sequence[int]]
    anything: Any
    maybe: int | None = None


WHOLE = Whole("b", 3, True, (1, "x"), (Part("p", (1, 2)), Part("q", ())), {"t": (4, 5)}, {"k": [1.5]})


def test_what_was_written_comes_back() -> None:
    assert typed_json.read(Whole, json.loads(json.dumps({**asdict(WHOLE), "unknown": 1}))) == WHOLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, "kind is no"),
        ({"kind": ["a"]}, "kind is no"),
        ({"count": "3"}, "count is no int"),
        ({"count": True}, "count is no int"),
        ({"count": 3.0}, "count is no int"),
        ({"on": 1}, "on is no bool"),
        ({"pair": [1]}, "pair is no list of 2"),
        ({"pair": ["x", 1]}, r"pair\[0\] is no int"),
        ({"parts": {}}, "parts is no list"),
        ({"parts": [{"name": "p"}]}, r"parts\[0\]\.sizes is missing"),
        ({"parts": [{"name": "p", "sizes": [1, None]}]}, r"parts\[0\]\.sizes\[1\] is no int"),
        ({"table": []}, "table is no dict"),
        ({"table": {"t": 4}}, r"table\['t'\] is no list"),
        ({"maybe": "1"}, "maybe is no int or NoneType"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        typed_json.read(Whole, json.loads(json.dumps({**asdict(WHOLE), **change})))


def test_something_else_altogether() -> None:
    for data in (None, 1, "x", []):
        with pytest.raises(TypeError, match="it is no dict"):
            typed_json.read(Whole, data)
