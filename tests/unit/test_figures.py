"""How figures are rounded for people: what they show beside the exact value."""

import math
from html import unescape

import pytest
from markupsafe import Markup

from bridge.web import figures

UNKNOWN = "—unknown"


def shown(figure: Markup) -> str:
    """The text; a minus sign is one, not a hyphen, and is written as one here."""
    text = unescape(figure.striptags()).replace("\N{NO-BREAK SPACE}", " ")
    assert "-" not in text
    return text.replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1_234.5, "1,234"),
        (12.34, "12.3"),
        (9.996, "10.0"),
        (0.12345, "0.123"),
        (-0.12345, "-0.123"),
        (-1_234_567.0, "-1,234,567"),
        (0.0006, "0.001"),
        (1e-9, "< 0.001"),
        (-1e-9, "> -0.001"),
        (None, UNKNOWN),
        (math.nan, UNKNOWN),
        (math.inf, UNKNOWN),
    ],
)
def test_a_number_has_three_digits_that_count(value: float | None, text: str) -> None:
    assert shown(figures.number(value)) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1, "°C", "0.1 °C"),
        (5.14, "°C", "5.1 °C"),
        (-12.0, "°C", "-12.0 °C"),
        (-0.04, "°C", "0.0 °C"),
        (100, "%", "100.0 %"),
        (229.96, "V", "230.0 V"),
        (229.96, "kW", "230 kW"),
        (None, "V", UNKNOWN),
    ],
)
def test_values_that_are_compared_have_one_decimal(value: float | None, unit: str, text: str) -> None:
    assert shown(figures.number(value, unit)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (-0.0001, "0 ms"),
        (0.25, "250 ms"),
        (-0.25, "-250 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (-0.9996, "-1 s"),
        (59.7, "1 min"),
        (90, "1 min 30 s"),
        (-90, "-1 min 30 s"),
        (250, "4 min 10 s"),
        (7 * 86_400 + 3_600, "7 d 1 h"),
        (None, UNKNOWN),
        (math.nan, UNKNOWN),
        (-math.inf, UNKNOWN),
    ],
)
def test_a_duration_has_the_largest_two_units(seconds: float | None, text: str) -> None:
    assert shown(figures.duration(seconds)) == text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (figures.money(1_234.567, "EUR"), "1,234.57 EUR"),
        (figures.money(-12.3), "-12.30"),
        (figures.money(-0.001, "EUR"), "0.00 EUR"),
        (figures.money(math.nan), UNKNOWN),
        (figures.percent(0.90096), "90.1 %"),
        (figures.percent(-0.0001), "0.0 %"),
        (figures.percent(-0.5), "-50.0 %"),
        (figures.percent(math.inf), UNKNOWN),
        (figures.count(2**53 + 1), "9,007,199,254,740,993"),
        (figures.count(-1_234), "-1,234"),
        (figures.count(None), UNKNOWN),
    ],
)
def test_amounts_ratios_and_counts(figure: Markup, text: str) -> None:
    assert shown(figure) == text


def test_the_exact_value_stands_beside_what_is_shown() -> None:
    assert figures.number(-1 / 3, "kWh") == (
        '<data value="-0.3333333333333333">\N{MINUS SIGN}0.333\N{NO-BREAK SPACE}kWh</data>'
    )
    assert figures.number(1e-9) == '<data value="1e-09">&lt; 0.001</data>'
