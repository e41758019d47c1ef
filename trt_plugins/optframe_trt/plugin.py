"""Registers the calibrators."""

from __future__ import annotations

from collections.abc import Iterable

from optframe.hookspec import hookimpl
from optframe.types import CalibratorSpec


@hookimpl
def optframe_calibrators() -> Iterable[CalibratorSpec]:
    """Register the ways to choose INT8 ranges."""
    return []
