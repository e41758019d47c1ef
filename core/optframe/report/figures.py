"""Numbers as a reader wants them: significant digits, thin spaces, proper signs, units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

THIN = "\u202f"
"""Narrow no-break space: between groups of digits, and between a number and its unit."""
MINUS = "\u2212"
NOTHING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits; scientific below 0.001 and from a million on."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    mantissa, _, exponent_text = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(exponent_text)
    if value == 0:
        text = "0"
    elif -3 <= exponent < 6:
        text = _grouped(value, max(0, digits - 1 - exponent))
    else:
        text = f"{mantissa}e{exponent}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def compact(value: float | None) -> str:
    """Return `value` with up to 3 significant digits and no trailing zeros, for limits and axis labels."""
    mantissa, letter, exponent = number(value, 3).partition("e")
    return f"{_stripped(mantissa)}{letter}{exponent}"


def count(value: int) -> str:
    """Return a whole number, in groups of three from ten thousand on."""
    return _grouped(value, 0).replace("-", MINUS)


def change(before: float, after: float) -> str:
    """Return the change from `before` to `after` in per cent, with its sign."""
    if not before:
        return NOTHING
    percent = 100 * (after - before) / before
    sign = MINUS if percent < 0 else "+" if percent > 0 else "±"
    return f"{sign}{abs(percent):.{0 if abs(percent) >= 10 else 1}f}{THIN}%"


def signed(value: int) -> str:
    """Return a whole number with its sign; zero has none."""
    return f"+{count(value)}" if value > 0 else count(value)


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent."""
    return NOTHING if fraction is None else f"{100 * fraction:.1f}{THIN}%"


def with_unit(value: float | None, unit: str, digits: int = 4) -> str:
    """Return `value` and its unit."""
    return number(value, digits) + (f"{THIN}{unit}" if value is not None else "")


def flops(value: float) -> str:
    """Return a number of floating-point operations with a fitting prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return with_unit(value / factor, f"{prefix}FLOP")
    return with_unit(value, "FLOP")


def megabytes(value: int) -> str:
    """Return a number of bytes in megabytes (1e6)."""
    return with_unit(value / 1e6, "MB", 3)


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as "1×3×800×1066"."""
    return "×".join(str(size) for size in sizes) or "scalar"


def day(timestamp: str) -> str:
    """Return an ISO 8601 timestamp as a reader likes it, or as it is where it is none."""
    try:
        return f"{datetime.fromisoformat(timestamp):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return timestamp


def times(ratio: float) -> str:
    """Return a factor as "1.4×"."""
    return f"{number(ratio, 2 if ratio < 9.95 else 3)}×"


def _grouped(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.replace(",", THIN if abs(value) >= 10_000 else "")


def _stripped(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
