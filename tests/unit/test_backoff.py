"""Backoff: bounded waits that grow, and that differ from daemon to daemon."""

import random

from hypothesis import given
from hypothesis import strategies as st

from bridge.backoff import Backoff

MANY_ATTEMPTS = 10_000


@given(st.floats(0.001, 10), st.floats(1, 100), st.integers())
def test_every_delay_lies_between_half_and_all_of_a_ceiling_that_doubles_up_to_the_longest(
    first: float, factor: float, seed: int
) -> None:
    longest = first * factor
    backoff = Backoff(first, longest, random.Random(seed))
    ceiling = first
    for _ in range(12):
        assert ceiling / 2 <= backoff.next() <= ceiling
        ceiling = min(longest, ceiling * 2)


def test_the_delay_before_the_cap_doubles() -> None:
    class Longest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return max(a, b)

    backoff = Backoff(0.2, 15.0, Longest())
    assert [backoff.next() for _ in range(9)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]


def test_days_of_attempts_do_not_overflow() -> None:
    backoff = Backoff(0.2, 15.0)
    delays = [backoff.next() for _ in range(MANY_ATTEMPTS)]
    assert max(delays) <= 15.0
    assert min(delays[10:]) >= 7.5
    assert backoff.attempts == MANY_ATTEMPTS


def test_after_a_success_the_next_delay_is_the_first_again() -> None:
    backoff = Backoff(0.2, 15.0)
    for _ in range(20):
        backoff.next()
    backoff.reset()
    assert backoff.attempts == 0
    assert 0.1 <= backoff.next() <= 0.2


def test_two_daemons_do_not_come_back_in_step() -> None:
    ours, theirs = Backoff(), Backoff()
    assert [ours.next() for _ in range(8)] != [theirs.next() for _ in range(8)]


def test_the_same_chance_gives_the_same_delays() -> None:
    ours, theirs = Backoff(chance=random.Random(1)), Backoff(chance=random.Random(1))
    assert [ours.next() for _ in range(8)] == [theirs.next() for _ in range(8)]
