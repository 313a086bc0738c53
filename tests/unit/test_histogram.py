"""Histograms count right, one by one and many at once."""

import math

from hypothesis import given
from hypothesis import strategies as st

from bridge.histogram import Histogram
from bridge.messages import SECOND

BOUNDS = (0.1, 1, 10, 3_600)
NOW = 1_770_734_845_250_000


def test_a_bucket_takes_what_is_no_larger_than_its_bound() -> None:
    histogram = Histogram(1, 10)
    for value in (0, 1, 1.001, 10, 11, math.inf):
        histogram.observe(value)
    assert histogram.cumulative == [2, 4, 6]


def test_the_total_is_what_was_observed() -> None:
    histogram = Histogram(1)
    for value in (0.25, 0.5, 8):
        histogram.observe(value)
    assert histogram.total == 8.75


@given(st.lists(st.integers(-5 * SECOND, 10_000 * SECOND)))
def test_many_at_once_are_counted_like_one_by_one(ages: list[int]) -> None:
    single, together = Histogram(*BOUNDS), Histogram(*BOUNDS)
    for age in ages:
        single.observe(max(age, 0) / SECOND)
    together.observe_since(sorted(NOW - age for age in ages), NOW, SECOND)
    assert together.cumulative == single.cumulative
    assert math.isclose(together.total, single.total, rel_tol=1e-9, abs_tol=1e-6)


def test_each_moment_may_stand_for_several() -> None:
    histogram = Histogram(*BOUNDS)
    histogram.observe_since([NOW - 5 * SECOND, NOW - SECOND, NOW + SECOND], NOW, SECOND, weight=10)
    assert histogram.cumulative == [10, 20, 30, 30, 30]
    assert histogram.total == 60


def test_a_moment_on_the_bound_is_within() -> None:
    histogram = Histogram(1)
    histogram.observe_since([NOW - SECOND - 1, NOW - SECOND], NOW, SECOND)
    assert histogram.cumulative == [1, 2]
