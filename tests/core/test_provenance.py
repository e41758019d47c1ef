"""Where nodes come from: the torch module as each exporter tells it, and what is left of it after several passes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from optframe.passes import ORIGIN_KEY, PASS_KEY, SCOPE_KEY, TORCH_SCOPES_KEY, merge_provenance, module_path, provenance


@pytest.mark.parametrize(
    ("metadata", "name", "path"),
    [
        ({}, "Add_3", ""),
        ({}, "", ""),
        ({}, "/Add", ""),
        ({}, "/encoder/layers.0/norm/Add_1", "encoder/layers.0/norm"),
        ({TORCH_SCOPES_KEY: "['', 'encoder', 'encoder.norm', 'layer_norm']"}, "node_1", "encoder.norm"),
        ({TORCH_SCOPES_KEY: "['', 'add']"}, "/named/Add", ""),
        ({TORCH_SCOPES_KEY: "['add']"}, "", ""),
        ({TORCH_SCOPES_KEY: "[]"}, "", ""),
        ({TORCH_SCOPES_KEY: "no list ["}, "", ""),
        ({TORCH_SCOPES_KEY: "3"}, "", ""),
        ({TORCH_SCOPES_KEY: "['', 'head', 'op']", SCOPE_KEY: "neck,head"}, "/x/Add", "neck,head"),
    ],
)
def test_module_paths_are_read_as_exporters_write_them(metadata: Mapping[str, str], name: str, path: str) -> None:
    assert module_path(metadata, name) == path


def test_new_nodes_inherit_everything_once() -> None:
    first = provenance("fold", [{TORCH_SCOPES_KEY: "['', 'a.b', 'op']"}, {}], ["n1", "/c/d/Mul"])
    assert first[PASS_KEY] == "fold"
    assert first[ORIGIN_KEY] == "n1,/c/d/Mul"
    assert first[SCOPE_KEY] == "a.b,c/d"
    second = provenance("fuse", [first, {TORCH_SCOPES_KEY: "['', 'a.b', 'op']"}], ["made", "n2"])
    assert second[PASS_KEY] == "fold,fuse"
    assert second[ORIGIN_KEY] == "n1,/c/d/Mul,n2"
    assert second[SCOPE_KEY] == "a.b,c/d"


def test_nothing_is_made_up() -> None:
    assert merge_provenance([{}], [""]) == {}
