"""What is made of what was seen of the broker."""

import pytest

from bridge.check_broker import (
    Unseen,
    introduction,
    judge_dropped,
    judge_outage,
    judge_queue,
    judge_session,
    span,
)
from bridge.probe import DROPPED, UPTIME, VERSION, Kept, Resumed, Traffic

DAY = 86_400


def test_a_queue_that_was_filled_lasts_as_long_as_the_rate_says() -> None:
    said = judge_outage(Traffic(1_002, 1_002 * 120, 3.0), Kept(1_500, 1_000, 120, {})).said
    assert said == (
        "334 messages/s of 120 bytes came for 3 s: 1,000 queued messages last 3 s; "
        "an hour away needs 1,200,000 of them, 144 MB of payload"
    )


def test_of_a_queue_that_kept_all_only_the_least_is_known() -> None:
    said = judge_outage(Traffic(30, 3_000, 3.0), Kept(1_500, 1_500, 100, {})).said
    assert "1,500 queued messages last 2.5 min, and how many more are kept was not tried;" in said


def test_without_the_queue_the_rate_still_says_what_an_hour_needs() -> None:
    said = judge_outage(Traffic(30, 3_000, 3.0), Unseen("a rule")).said
    assert said == "10 messages/s of 100 bytes came for 3 s; an hour away needs 36,000 of them, 3.6 MB of payload"


def test_a_shared_rate_is_that_of_all_daemons() -> None:
    said = judge_outage(Traffic(30, 3_000, 3.0), Kept(1_500, 10, 100, {}), shared=True).said
    assert "came for 3 s, for all daemons of the group together: 10 queued messages last 1 s" in said


def test_without_a_rate_nothing_is_computed() -> None:
    assert "nothing to compute with" in judge_outage(Traffic(0, 0, 3.0), Kept(1_500, 1_000, 120, {})).said
    assert judge_outage(Unseen("gone"), Kept(1_500, 1_000, 120, {})).said == "the rate could not be observed: gone"


@pytest.mark.parametrize(
    ("kept", "fine"),
    [(Kept(1_500, 1_500, 128, {}), True), (Kept(1_500, 1_499, 128, {}), False), (Kept(1_500, 0, 128, {}), False)],
)
def test_one_message_less_is_a_problem(kept: Kept, *, fine: bool) -> None:
    assert judge_queue(kept).fine is fine


def test_what_the_broker_says_of_a_full_queue_is_passed_on() -> None:
    said = judge_queue(Kept(1_500, 1_000, 128, {"quota exceeded (\x1b[2Jfull)": 500})).said
    assert "kept 1,000 of 1,500" in said
    assert "it refused 500: quota exceeded (\ufffd[2Jfull)" in said


@pytest.mark.parametrize(
    ("asked_s", "resumed", "fine"),
    [
        (7 * DAY, Resumed(7 * DAY, present=True), True),
        (DAY, Resumed(7 * DAY, present=True), True),
        (7 * DAY, Resumed(7 * DAY - 1, present=True), False),
        (7 * DAY, Resumed(7 * DAY, present=False), False),
        (7 * DAY, Unseen("no answer"), None),
    ],
)
def test_a_session_is_fine_where_it_is_kept_as_long_as_asked(
    asked_s: int, resumed: Resumed | Unseen, *, fine: bool | None
) -> None:
    assert judge_session(asked_s, resumed).fine is fine


@pytest.mark.parametrize(
    ("server", "fine", "said"),
    [
        ({DROPPED: "0", UPTIME: "7200 seconds"}, True, "no message since its start 2 h ago"),
        ({DROPPED: "12345", UPTIME: "7200 seconds"}, None, "12,345 messages since its start 2 h ago, of which"),
        ({DROPPED: "7"}, None, "7 messages since its start, of"),
        ({UPTIME: "7200 seconds"}, None, "could not be observed"),
        ({DROPPED: "many"}, None, "could not be observed"),
        ({VERSION: "mosquitto version 2.0.11", UPTIME: "90 seconds"}, None, "tells of none within the last minute"),
        (Unseen("not authorized"), None, f"does not tell us {DROPPED} (not authorized)"),
    ],
)  # fmt: skip
def test_dropped_messages_are_worth_knowing(server: dict[str, str] | Unseen, said: str, *, fine: bool | None) -> None:
    finding = judge_dropped(server)
    assert finding.fine is fine
    assert said in finding.said


def test_the_broker_introduces_itself_or_does_not() -> None:
    assert introduction({VERSION: "mosquitto version 2.0.11", UPTIME: "90 seconds"}) == (
        ", mosquitto version 2.0.11, up for 90 s"
    )
    assert introduction({}) == introduction(Unseen("a rule")) == ""
    assert introduction({VERSION: "\x1b]0;owned\x07" + "x" * 500}).isprintable()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (0.1, "0.1 s"), (2.99, "3 s"), (119, "119 s"), (120, "2 min"), (150, "2.5 min"), (3_600, "60 min"),
        (7_200, "2 h"), (DAY, "24 h"), (7 * DAY, "7 days"), (366 * DAY, "366 days"), (0xFFFF_FFFF, "ever"),
    ],
)  # fmt: skip
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said
