"""The arrival clock: it tells the messages of a burst apart, and follows the machine's clock all the same."""

from typing import Any, cast

import pytest

from bridge.config import BatchLimits
from bridge.messages import DAY, SECOND, Limits
from bridge.pipeline import Pipeline
from bridge.topics import Topics

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
START_S = 1_770_734_845.25


class Clock:
    """A clock that a test puts where it wants it, in seconds."""

    def __init__(self) -> None:
        self.seconds = START_S

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pipeline(clock: Clock) -> Pipeline:
    no_sink = cast("Any", None)
    return Pipeline(no_sink, TOPICS, Limits(), BatchLimits(), window=10, max_outstanding_bytes=1_000, clock=clock)


async def test_a_standing_clock_gives_each_message_of_a_burst_a_time_of_its_own(pipeline: Pipeline) -> None:
    start = round(START_S * SECOND)
    assert [pipeline._arrival() for _ in range(1_000)] == list(range(start, start + 1_000))


async def test_a_clock_that_is_put_back_a_little_within_a_burst_never_repeats_itself(
    pipeline: Pipeline, clock: Clock
) -> None:
    seen = []
    for back in (0.0, 0.0005, 0.1, 0.9, 0.0, 0.9):
        clock.seconds = START_S - back
        seen.append(pipeline._arrival())
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("days", [1, 3, 400])
async def test_a_clock_that_is_put_back_by_days_is_followed(pipeline: Pipeline, clock: Clock, days: int) -> None:
    wrong = pipeline._arrival()
    clock.seconds -= days * 86_400
    assert [pipeline._arrival() for _ in range(3)] == [wrong - days * DAY + n for n in range(3)]


async def test_it_catches_up_with_the_clock_after_a_burst(pipeline: Pipeline, clock: Clock) -> None:
    for _ in range(1_000):
        pipeline._arrival()
    clock.seconds += 0.5
    assert pipeline._arrival() == round(clock.seconds * SECOND)
