"""How figures are shown: rounded for people, with the exact value beside it (<data value>, <time datetime>).

What is unknown is a dash. Times are UTC.
"""

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeGuard

from markupsafe import Markup

from bridge.web.representation import written

UNKNOWN = Markup('<span class="unknown">—<span class="unseen">unknown</span></span>')
DIGITS = 3
# Two such values stand side by side, and are compared: 0.1 °C beside 5.1 °C.
DECIMALS = {"°C": 1, "%": 1, "V": 1}
SECOND_MS = 1_000


def plain(value: float, decimals: int | None = None) -> str:
    """So many decimals; left out: three digits that count, and all of those before the point: 1,234 12.3 0.123."""
    if decimals is not None:
        return _written(value, decimals)
    # Of what it is once it is rounded: 9.996 has one digit, 10.0 has two.
    before_point = int(f"{value:.{DIGITS - 1}e}".partition("e")[2]) + 1
    shown = _written(value, max(0, min(DIGITS - before_point, DIGITS)) if value else 0)
    # What is not nothing does not look like it.
    if value and shown == _written(0, DIGITS):
        least = _written(math.copysign(10**-DIGITS, value), DIGITS)
        return f"< {least}" if value > 0 else f"> {least}"
    return shown


def number(value: float | None, unit: str = "") -> Markup:
    """A figure with its unit, not broken between them."""
    if not _known(value):
        return UNKNOWN
    shown = plain(value, DECIMALS.get(unit))
    return _data(value, f"{shown}\N{NO-BREAK SPACE}{unit}" if unit else shown)


def count(value: int | None) -> Markup:
    """A whole number."""
    return UNKNOWN if value is None else _data(value, f"{value:,}".replace("-", "\N{MINUS SIGN}"))


def percent(ratio: float | None) -> Markup:
    """A ratio in percent."""
    return _data(ratio, f"{_written(ratio * 100, 1)}\N{NO-BREAK SPACE}%") if _known(ratio) else UNKNOWN


def money(value: float | None, currency: str = "") -> Markup:
    """An amount."""
    return _data(value, f"{_written(value, 2)}\N{NO-BREAK SPACE}{currency}".strip()) if _known(value) else UNKNOWN


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
    if not _known(seconds):
        return UNKNOWN
    sign = "\N{MINUS SIGN}" if seconds < 0 else ""
    milliseconds = round(abs(seconds) * SECOND_MS)
    if milliseconds < SECOND_MS:
        return _data(seconds, f"{sign if milliseconds else ''}{milliseconds}\N{NO-BREAK SPACE}ms")
    left = round(abs(seconds))
    parts = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        whole, left = divmod(left, length)
        if whole:
            parts.append(f"{whole:,}\N{NO-BREAK SPACE}{unit}")
    return _data(seconds, sign + " ".join(parts[:2]))


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _written(value: float, decimals: int) -> str:
    """Rounded, and never a zero with a sign."""
    return f"{value:z,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


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
