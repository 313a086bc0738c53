"""Where the watermark may go: as far as the stream of readings has come, and no further."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.maintenance import Stream, first_day, watermark
from bridge.messages import DAY, SECOND
from bridge.rollups import Extent, written

NOW = 1_770_734_845_000_000
LATE_AFTER = 120.0 * SECOND
PATIENCE_S = 40.0


def target(stream: Stream) -> float | None:
    return watermark(NOW, LATE_AFTER, stream, PATIENCE_S)


def test_in_the_quiet_state_the_clock_decides() -> None:
    for position in (None, NOW - 86_400 * SECOND, NOW + 300 * SECOND):
        assert target(Stream(position, PATIENCE_S)) == NOW - LATE_AFTER


def test_behind_a_backlog_the_stream_decides() -> None:
    position = NOW - 6 * 3_600 * SECOND
    assert target(Stream(position, 0)) == target(Stream(position, PATIENCE_S - 0.1)) == position - LATE_AFTER


def test_a_stream_ahead_of_the_clock_does_not_take_the_watermark_along() -> None:
    assert target(Stream(NOW + 300 * SECOND, 0)) == NOW - LATE_AFTER


def test_before_anything_has_come_nobody_knows() -> None:
    assert target(Stream(None, PATIENCE_S - 0.1)) is None


@given(st.none() | st.integers(0, 2 * NOW), st.floats(0, 1e6), st.floats(1, 1e6))
def test_it_is_never_ahead_of_the_clock_nor_of_a_stream_that_flows(
    position: int | None, quiet_s: float, patience_s: float
) -> None:
    found = watermark(NOW, LATE_AFTER, Stream(position, quiet_s), patience_s)
    assert found is None or found <= NOW - LATE_AFTER
    if quiet_s < patience_s and position is not None:
        assert found is not None
        assert found <= position - LATE_AFTER


@pytest.mark.parametrize(("there", "here"), [(100, 100), (100, 500), (500, 100)], ids=["right", "ours", "theirs"])
def test_a_clock_that_is_ahead_lets_no_history_be_dropped(there: int, here: int) -> None:
    assert first_day(there * DAY + 1, (here + 1) * DAY - 1, 30) == 70


@pytest.mark.parametrize(
    ("extent", "percent"),
    [
        (Extent(0, 200, 0), 0),
        (Extent(50, 200, 0), 25),
        (Extent(200, 200, 7), 100),
        (Extent(-100, 200, 0), 0),
        (Extent(-math.inf, 200, 0), 0),
        (Extent(-math.inf, -math.inf, 0), 100),
    ],
)
def test_how_much_is_covered(extent: Extent, percent: float) -> None:
    assert extent.covered(0) == percent


def test_a_time_is_written_for_people() -> None:
    assert written(NOW) == "2026-02-10T14:47:25Z"
    assert (written(-math.inf), written(math.inf)) == ("-infinity", "infinity")
