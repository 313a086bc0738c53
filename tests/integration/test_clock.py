"""The daemon's clock is wrong: what is kept, said and rolled up is right, or can be put right."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.integration.clock import WrongClock
from tests.integration.harness import (
    Address,
    Daemon,
    Publisher,
    ask,
    check_books,
    environment,
    letters,
    meter,
    now,
    one,
    stored,
    wait_for_equal,
    wait_for_received,
    wait_until,
    wattbridge,
)

# As much as a test needs to see what becomes of history that is too old.
SETTINGS = {
    "maintenance__every_s": 0.1,
    "maintenance__history_days": 2,
    "limits__horizon_days": 1,
    "log__level": "debug",
}


@pytest.fixture
def clock(tmp_path: Path) -> WrongClock:
    return WrongClock(tmp_path)


@pytest.fixture
def daemon(database: str, broker: Address, topic_root: str, tmp_path: Path, clock: WrongClock) -> Iterator[Daemon]:
    daemon = Daemon(database, broker, topic_root, tmp_path, **SETTINGS)
    daemon.env |= clock.env
    with daemon:
        yield daemon


def arrivals_off_by(dsn: str) -> timedelta:
    """How far the time of arrival of the last reading is from ours, to the minute."""
    late: timedelta = one(
        dsn, "SELECT max(received_at) - clock_timestamp() FROM meter_history WHERE meter_id = 'MTR-1'"
    )
    return timedelta(minutes=round(late / timedelta(minutes=1)))


def test_a_clock_that_is_ahead_drops_no_history_and_makes_nothing_late(
    database: str, daemon: Daemon, devices: Publisher, clock: WrongClock
) -> None:
    clock.put(timedelta(days=10))
    # Not by its own time: that is rejected as too old.
    devices.send("meter", "MTR-1", {"kwhConsumedAc": 0.5, "voltage": 230.0})
    wait_until(lambda: stored(database) == 1, "it is stored")
    assert arrivals_off_by(database) == timedelta(days=10)
    clock.put(timedelta())
    devices.send("meter", "MTR-2", meter("MTR-2", now()))
    wait_until(lambda: stored(database) == 2, "it is stored")
    clock.put(timedelta(days=10))
    settled = (
        "SELECT late_before >= date_bin('15 minutes', now() - late_after, 'epoch') AND complete_until = late_before "
        "FROM rollup_progress, analytics_setting"
    )
    wait_until(lambda: one(database, settled), "the rollups have followed the clock")
    daemon.wait_for_events("rollups.refreshed", len(daemon.events("rollups.refreshed")) + 3)
    assert not daemon.events("history.dropped")
    assert stored(database) == 2
    assert one(database, "SELECT late_before <= now() FROM rollup_progress")
    assert daemon.terminate() == 0


def test_the_last_status_holds_also_where_the_clock_was_put_back(
    database: str, daemon: Daemon, devices: Publisher, clock: WrongClock
) -> None:
    query = "SELECT online FROM device_presence"
    for off_by, said in ((timedelta(hours=1), b"online"), (timedelta(), b"offline"), (-timedelta(hours=1), b"online")):
        clock.put(off_by)
        devices.send("meter", "MTR-1", said, channel="status")
        wait_for_equal(lambda: ask(database, query), [(said == b"online",)])


def test_a_status_among_the_dead_letters_is_older_than_what_was_said_since(
    database: str, broker: Address, topic_root: str, tmp_path: Path, daemon: Daemon, devices: Publisher
) -> None:
    devices.send("meter", "MTR-1", b"offline", channel="status")
    wait_until(lambda: ask(database, "SELECT 1 FROM device_presence"), "the status is known")
    # As it would have come under a wrong template, a minute before.
    ask(
        database,
        "INSERT INTO dead_letter (device_id, digest, topic, payload, reason, detail, received_at) "
        "VALUES ('', %s, %s, 'online', 'unknown_topic', '', now() - interval '1 minute')",
        b"x" * 32,
        f"{topic_root}/meter/MTR-1/status",
    )
    ask(database, "UPDATE ingest_counter SET received = received + 1, dead_lettered = dead_lettered + 1")
    env = environment(database, broker, topic_root, "test-clock")
    reply = wattbridge("dead-letters", "replay", "--all", env=env, cwd=tmp_path)
    assert reply.code == 0, reply.err
    assert letters(database) == []
    assert ask(database, "SELECT online FROM device_presence") == [(False,)]


def test_a_clock_that_was_behind_rejects_good_readings_and_a_replay_brings_them_back(
    database: str,
    broker: Address,
    topic_root: str,
    tmp_path: Path,
    daemon: Daemon,
    devices: Publisher,
    clock: WrongClock,
) -> None:
    moment = now()
    clock.put(-timedelta(hours=1))
    devices.send("meter", "MTR-1", meter("MTR-1", moment))
    devices.send("meter", "MTR-1", meter("MTR-1", moment + timedelta(days=3_650)))
    devices.send("meter", "MTR-1", meter("MTR-OTHER", moment))
    wait_for_received(database, 3)
    assert [reason for _, reason, _ in letters(database)].count("timestamp_in_future") == 2
    clock.put(timedelta())
    # By as much as the clock was behind.
    env = environment(database, broker, topic_root, "test-clock", limits__max_future_s=3_600 + 300)
    reply = wattbridge("dead-letters", "replay", "--reason", "timestamp_in_future", env=env, cwd=tmp_path)
    assert reply.code == 0, reply.err
    assert ask(database, "SELECT meter_id, ts FROM meter_history") == [("MTR-1", moment)]
    assert {reason for _, reason, _ in letters(database)} == {"timestamp_in_future", "id_mismatch"}
    assert check_books(database) == (3, 1, 0, 2, 0)
