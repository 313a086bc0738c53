"""How figures are shown: rounded for people, with the exact value beside it (<data value>, <time datetime>).

What is unknown is a dash. Times are UTC.
"""

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from markupsafe import Markup

from bridge.web.representation import written

UNKNOWN = Markup('<span class="unknown">—<span class="unseen">unknown</span></span>')
DIGITS = 3


def plain(value: float, least: int = 0) -> str:
    """Three digits that count, and all of those before the point: 1,234 12.3 0.123; with at least so many decimals."""
    decimals = DIGITS - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:,.{max(least, min(decimals, DIGITS))}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def number(value: float | None, unit: str = "", least: int = 0) -> Markup:
    """A figure with its unit, not broken between them."""
    if value is None:
        return UNKNOWN
    shown = plain(value, least)
    return _data(value, f"{shown}\N{NO-BREAK SPACE}{unit}" if unit else shown)


def count(value: int | None) -> Markup:
    """A whole number."""
    return UNKNOWN if value is None else _data(value, f"{value:,}")


def percent(ratio: float | None) -> Markup:
    """A ratio in percent."""
    return UNKNOWN if ratio is None else _data(ratio, f"{ratio * 100:.1f}\N{NO-BREAK SPACE}%")


def money(value: float | None, currency: str = "") -> Markup:
    """An amount."""
    return UNKNOWN if value is None else _data(value, f"{value:,.2f}\N{NO-BREAK SPACE}{currency}".strip())


def moment(value: datetime | None, form: str = "%Y-%m-%d %H:%M:%S") -> Markup:
    """A time in UTC."""
    if value is None:
        return UNKNOWN
    return Markup('<time datetime="{}">{}</time>').format(written(value), value.strftime(form))


def clock(value: datetime | None) -> Markup:
    """A time of a day that is known."""
    return moment(value, "%H:%M")


def day_and_clock(value: datetime | None) -> Markup:
    """A time without seconds."""
    return moment(value, "%Y-%m-%d %H:%M")


def duration(seconds: float | None) -> Markup:
    """How long, in the largest two units: 4 min 10 s."""
    if seconds is None:
        return UNKNOWN
    if abs(seconds) < 1:
        return _data(seconds, f"{seconds * 1_000:.0f}\N{NO-BREAK SPACE}ms")
    left = round(seconds)
    parts = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        whole, left = divmod(left, length)
        if whole:
            parts.append(f"{whole:,}\N{NO-BREAK SPACE}{unit}")
    return _data(seconds, " ".join(parts[:2]) or "0\N{NO-BREAK SPACE}s")


def _data(value: float, shown: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "count": count,
    "percent": percent,
    "money": money,
    "moment": moment,
    "clock": clock,
    "day_and_clock": day_and_clock,
    "duration": duration,
}
