"""What tests of core share: the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from optframe import cli


@dataclass(frozen=True)
class Called:
    """What a call of the command line came to."""

    status: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """What it printed with --json."""
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """`call("explain", "clean", path)` runs the command line."""

    def run(*arguments: object) -> Called:
        status = cli.main([str(argument) for argument in arguments])
        return Called(status, *capsys.readouterr())

    return run
