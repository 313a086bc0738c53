"""Beside the data path: marks for what is late, rollups that are right whatever happens, partitions, retention."""

import asyncio
import contextlib
import random
import re
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from bridge.batch import Batch
from bridge.config import Database
from bridge.messages import SECOND, MeterReading, Reading, VehicleReading
from bridge.store import RefusedError, Store
from bridge.topics import Topics
from tests.integration.harness import (
    PROGRAM,
    Address,
    Daemon,
    Proxy,
    Publisher,
    ask,
    check_books,
    empty_database,
    environment,
    in_background,
    meter,
    now,
    one,
    stored,
    vehicle,
    wait_for_equal,
    wait_for_received,
    wait_until,
    wattbridge_here,
)

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
QUARTER = timedelta(minutes=15)
WATERMARK = datetime(2026, 2, 10, 15, tzinfo=UTC)
ROLLUPS = ("meter_quarter_hour", "vehicle_quarter_hour", "charging_quarter_hour", "charging_two_hours")
# Rounds so often that a test need not wait.
OFTEN = {"maintenance__every_s": 0.2}
MAINTAINERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'wattbridge-maintenance'"


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    made = Store(Database(dsn=database), "test-maintenance")
    yield made
    await made.close()


class Arrivals:
    """Batches of readings, each with a time of arrival that no other has."""

    def __init__(self) -> None:
        self._arrival = round(datetime(2026, 2, 11, tzinfo=UTC).timestamp()) * SECOND

    def batch(self, *readings: Reading) -> Batch:
        batch = Batch(TOPICS)
        for reading in readings:
            self._arrival += 1
            batch.add_reading(reading._replace(received_at=self._arrival))
        return batch


def microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * SECOND)


def metered(device: str, moment: datetime, kwh: float = 0.5) -> MeterReading:
    return MeterReading(device, microseconds(moment), kwh, 230.0, 0, ts_from_arrival=False)


def charged(device: str, moment: datetime, at: str | None = None, kwh: float = 0.4) -> VehicleReading:
    return VehicleReading(device, microseconds(moment), kwh, 50.0, 30.0, at, 0, ts_from_arrival=False)


def marks(dsn: str) -> list[tuple[str, str, datetime, datetime]]:
    return ask(
        dsn, "SELECT kind, device_id, lower(quarter_hours), upper(quarter_hours) FROM rollup_mark ORDER BY 1, 2, 3"
    )


def mark(kind: str, device: str, quarter_hour: datetime) -> tuple[str, str, datetime, datetime]:
    return kind, device, quarter_hour, quarter_hour + QUARTER


def duplicates(dsn: str) -> dict[tuple[str, str], int]:
    rows = ask(dsn, "SELECT kind, device_id, duplicates FROM device_duplicate")
    return {(kind, device): number for kind, device, number in rows}


def ever_marked(dsn: str) -> bool:
    """Whether there has been any mark since the database was made."""
    return one(dsn, "SELECT last_value IS NOT NULL FROM pg_sequences WHERE sequencename LIKE 'rollup_mark%'")


# --- rollups, to be compared -------------------------------------------------------------------------------

Rollups = dict[str, dict[tuple[Any, ...], tuple[Any, ...]]]


def rollups(dsn: str) -> Rollups:
    """The rows of each rollup by their keys."""
    found: Rollups = {}
    for table in ROLLUPS:
        rows = ask(dsn, f"SELECT * FROM {table}")
        size = {"charging_two_hours": 3, "charging_quarter_hour": 3}.get(table, 2)
        keys = [(row[0], row[2], row[1]) if table == "charging_two_hours" else row[:size] for row in rows]
        found[table] = dict(zip(keys, rows, strict=True))
        assert len(found[table]) == len(rows)
    return found


def assert_same(one_way: Rollups, other_way: Rollups) -> None:
    """The same rows, to 1e-9."""
    for table in ROLLUPS:
        assert one_way[table].keys() == other_way[table].keys(), table
        for key, row in one_way[table].items():
            assert alike(row, other_way[table][key]), (table, row, other_way[table][key])


def alike(row: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(
        abs(a - b) <= 1e-9 * max(1, abs(a)) if isinstance(a, float) else a == b for a, b in zip(row, other, strict=True)
    )


def progress(dsn: str) -> tuple[datetime, datetime]:
    """(complete_until, late_before)."""
    ((complete, late),) = ask(
        dsn,
        "SELECT greatest(complete_until, 'epoch'), greatest(late_before, 'epoch') FROM rollup_progress",
    )
    return complete, late


def settled(dsn: str) -> bool:
    """Whether the rollups hold all that can be closed by now, and nothing is marked."""
    complete, late = progress(dsn)
    (due,) = ask(dsn, "SELECT date_bin('15 minutes', now() - late_after, 'epoch') FROM analytics_setting")[0]
    return complete == late >= due and not marks(dsn)


def rebuild(dsn: str, *, watermark: datetime | None = None) -> Rollups:
    """The rollups made again, from the first to the last."""
    if watermark:
        ask(dsn, "SELECT rollup_advance(%s)", watermark)
    ask(dsn, "SELECT rollup_restart()::text")
    refresh(dsn)
    return rollups(dsn)


def refresh(dsn: str) -> None:
    """Makes rollups until there is nothing left to be done."""
    unfinished = "SELECT complete_until < late_before OR marks_left > 0 FROM rollup_refresh()"
    while one(dsn, unfinished):
        pass


def assert_right(dsn: str) -> None:
    """The rollups hold each reading before their end once, and are what a rebuild makes of history."""
    for kind, energy in (("meter", "kwh_ac"), ("vehicle", "kwh_dc")):
        of_history = (
            f"SELECT count(*), coalesce(sum({energy}), 0) FROM {kind}_history, rollup_progress "
            "WHERE ts < complete_until"
        )
        of_rollups = f"SELECT coalesce(sum(readings), 0), coalesce(sum({energy}), 0) FROM {kind}_quarter_hour"
        assert ask(dsn, of_rollups)[0] == pytest.approx(ask(dsn, of_history)[0])
    incremental = rollups(dsn)
    assert_same(incremental, rebuild(dsn))


def fleet(since: datetime, minutes: int, devices: int = 4) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Readings of meters and the vehicles at them, in order of time; (kind, device, reading)."""
    for minute in range(minutes):
        moment = since + timedelta(minutes=minute)
        for number in range(devices):
            name = f"MTR-{number}"
            yield "meter", name, meter(name, moment, kwh=(1 + minute + number) / 1_000)
            # Every now and then another meter, or none.
            at = [name, name, f"MTR-{(number + 1) % devices}", None][(minute // 20 + number) % 4]
            yield "vehicle", f"VEH-{number}", vehicle(f"VEH-{number}", moment, kwh=(1 + minute) / 1_100, at=at)


def publish(devices: Publisher, readings: list[tuple[str, str, dict[str, Any]]]) -> None:
    for kind, device, reading in readings:
        devices.send(kind, device, reading)
    devices.flush()


# --- marks -------------------------------------------------------------------------------------------------


async def test_late_readings_leave_marks_and_others_none(store: Store, database: str) -> None:
    arrivals = Arrivals()
    minute = timedelta(minutes=1)
    early = WATERMARK - timedelta(hours=2)
    ask(database, "SELECT rollup_advance(%s)", WATERMARK)
    ask(
        database,
        "INSERT INTO charger_assignment VALUES ('V-ASSIGNED', 'M-ASSIGNED', tstzrange(%s, %s))",
        early,
        early + minute,
    )
    ask(database, "UPDATE analytics_setting SET vehicle_prefix = 'VEH-', meter_prefix = 'MTR-'")
    ask(database, "DELETE FROM rollup_mark")

    in_time = [metered("M", WATERMARK), charged("V", WATERMARK + minute, "M"), charged("VEH-1", WATERMARK)]
    await store.write(arrivals.batch(*in_time))
    assert marks(database) == []

    late = [
        metered("M", WATERMARK - timedelta(microseconds=1)),
        metered("M", WATERMARK - minute),
        metered("M", WATERMARK - QUARTER - minute),
        charged("V", WATERMARK - minute, "M"),
        charged("V", WATERMARK - 2 * minute, "M2"),
        charged("V-NOWHERE", early),
        charged("V-ASSIGNED", early),
        charged("V-ASSIGNED", early + minute),
        charged("VEH-7", early),
    ]
    expected = [
        mark("meter", "M", WATERMARK - 2 * QUARTER),
        mark("meter", "M", WATERMARK - QUARTER),
        mark("meter", "M-ASSIGNED", early),
        mark("meter", "M2", WATERMARK - QUARTER),
        mark("meter", "MTR-7", early),
        mark("vehicle", "V", WATERMARK - QUARTER),
        mark("vehicle", "V-ASSIGNED", early),
        mark("vehicle", "V-NOWHERE", early),
        mark("vehicle", "VEH-7", early),
    ]
    await store.write(arrivals.batch(*late, metered("M", WATERMARK + minute)))
    assert marks(database) == expected

    # Known already, or in conflict with what is known: nothing becomes untrue. One that is new marks for itself alone.
    await store.write(arrivals.batch(*late))
    conflict = metered("M", WATERMARK - minute, kwh=0.75)
    await store.write(arrivals.batch(conflict, *late, metered("M", WATERMARK + 2 * minute)))
    assert marks(database) == expected
    await store.write(arrivals.batch(*late, metered("M3", WATERMARK - minute)))
    assert marks(database) == sorted([*expected, mark("meter", "M3", WATERMARK - QUARTER)])
    check_books(database)


async def test_without_a_watermark_nothing_is_late(store: Store, database: str) -> None:
    await store.write(Arrivals().batch(metered("M", WATERMARK - timedelta(days=300)), charged("V", WATERMARK, "M")))
    assert marks(database) == []


@contextmanager
def transaction(dsn: str, statement: str, *parameters: object) -> Iterator[psycopg.Connection]:
    """Has said one statement and not yet committed; leaving the block commits."""
    with psycopg.connect(dsn) as connection:
        connection.execute(statement, parameters)
        yield connection


def waiting(dsn: str, what: str) -> bool:
    """Whether somebody waits for a lock with such a statement."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
    return bool(one(dsn, query, f"%{what}%"))


async def test_the_watermark_waits_for_those_who_store_readings(store: Store, database: str) -> None:
    """They took their reading to be in time, so it must be there before its quarter hour is rolled up."""
    await store.open()
    reading = metered("M", WATERMARK - QUARTER)
    with transaction(database, "LOCK TABLE ingest_counter"):
        # The reading is in history by now, but not committed.
        writing = asyncio.create_task(store.write(Arrivals().batch(reading)))
        await asyncio.to_thread(wait_until, lambda: waiting(database, "ingest_counter"), "the batch waits")
        advancing = asyncio.create_task(asyncio.to_thread(ask, database, "SELECT rollup_advance(%s)", WATERMARK))
        await asyncio.to_thread(wait_until, lambda: waiting(database, "rollup_advance"), "the watermark waits")
        assert ask(database, "SELECT count(*) FROM meter_history") == [(0,)]
        assert not advancing.done()
    await writing
    assert await advancing == [(WATERMARK,)]
    assert marks(database) == []
    refresh(database)
    assert list(rollups(database)["meter_quarter_hour"]) == [("M", WATERMARK - QUARTER)]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
async def test_who_stores_readings_sees_the_watermark_that_he_waited_for(database: str, isolation: str) -> None:
    name = one(database, "SELECT current_database()")
    ask(database, f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    store = Store(Database(dsn=database), "test-maintenance")
    try:
        await store.open()
        with transaction(database, "SELECT rollup_advance(%s)", WATERMARK):
            writing = asyncio.create_task(store.write(Arrivals().batch(metered("M", WATERMARK - QUARTER))))
            await asyncio.to_thread(wait_until, lambda: waiting(database, "pg_advisory_xact_lock_shared"), "it waits")
        await writing
    finally:
        await store.close()
    assert marks(database) == [mark("meter", "M", WATERMARK - QUARTER)]


# --- duplicates by device ----------------------------------------------------------------------------------


def test_a_commit_that_was_not_answered_counts_the_duplicates_of_a_device_once(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    moment = now()
    minute = timedelta(minutes=1)
    with Daemon(proxy.dsn, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        devices.send("meter", "M", [meter("M", moment), meter("M", moment - minute)])
        devices.send("vehicle", "M", [vehicle("M", moment)])
        wait_for_received(database, 3)
        assert duplicates(database) == {}
        proxy.cut_answer("COMMIT")
        # Two that history knows; one of these again, and a new one twice; then a conflict twice.
        known = [meter("M", moment), meter("M", moment - minute), meter("M", moment)]
        new = [meter("M", moment - 2 * minute), meter("M", moment - 2 * minute)]
        devices.send("meter", "M", [*known, *new, meter("M", moment - minute, 9), meter("M", moment - minute, 9)])
        assert proxy.cut.wait(30)
        wait_for_received(database, 10)
        assert duplicates(database) == {("meter", "M"): 4}
        proxy.heal()
        # The next one shows that the first was done with.
        devices.send("vehicle", "M", [vehicle("M", moment), vehicle("M", moment - minute)])
        wait_for_received(database, 12)
        assert daemon.events("database.waiting")
        assert daemon.terminate() == 0
    assert duplicates(database) == {("meter", "M"): 4, ("vehicle", "M"): 1}
    # One of the dead letters was a duplicate, but it is none of the device's readings.
    assert check_books(database)[:4] == (12, 5, 6, 1)


async def test_writers_with_the_same_devices_do_not_block_each_other(database: str) -> None:
    """All late, all duplicates, each in an order of its own."""
    ask(database, "SELECT rollup_advance(%s)", WATERMARK)
    readings: list[Reading] = [
        made
        for number in range(300)
        for made in (
            metered(f"M{number}", WATERMARK - QUARTER),
            charged(f"V{number}", WATERMARK - QUARTER, f"M{number}"),
        )
    ]
    writers = [Store(Database(dsn=database), f"test-{number}") for number in range(3)]
    shuffled = random.Random(1)
    arrivals = Arrivals()

    async def write(store: Store) -> None:
        for _ in range(8):
            await store.write(arrivals.batch(*shuffled.sample(readings, len(readings))))

    try:
        await asyncio.gather(*(write(store) for store in writers))
    finally:
        for store in writers:
            await store.close()
    assert check_books(database)[:3] == (24 * 600, 600, 23 * 600)
    assert set(duplicates(database).values()) == {23}
    assert len(marks(database)) == 600


# --- the daemon --------------------------------------------------------------------------------------------


def test_the_daemon_makes_partitions_and_rollups_by_itself(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    settings = OFTEN | {"maintenance__partitions_ahead_days": 3, "log__level": "debug"}
    readings = list(fleet(now() - timedelta(hours=5), minutes=300))
    with Daemon(database, broker, topic_root, tmp_path, **settings) as daemon, Publisher(broker, topic_root) as devices:
        publish(devices, readings)
        wait_for_received(database, len(readings))
        wait_until(lambda: settled(database), "all is rolled up")
        # Late by now.
        late = list(fleet(now() - timedelta(days=1, hours=1), minutes=20))
        publish(devices, [*late, *readings[:3]])
        wait_for_received(database, len(readings) + len(late) + 3)
        wait_until(lambda: settled(database), "what was late as well")
        days = [f"{datetime.now(UTC) + timedelta(days=day):%Y%m%d}" for day in range(4)]
        names = [f"{kind}_history_{day}" for kind in ("meter", "vehicle") for day in days]
        assert ask(database, "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NULL", names) == []
        assert daemon.events("maintenance.waiting") == []
        assert daemon.events("rollups.refreshed")
        assert daemon.terminate() == 0
    assert check_books(database).stored == len(readings) + len(late)
    assert rollups(database)["charging_two_hours"]
    assert_right(database)


def test_a_backlog_is_not_late(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    """What the broker kept for us during an outage is hours old, and still comes in order."""
    readings = list(fleet(now() - timedelta(hours=6), minutes=355))
    settings = {"maintenance__every_s": 1, "batch__max_readings": 100, "mqtt__receive_maximum": 200}
    with Daemon(database, broker, topic_root, tmp_path, **settings) as daemon, Publisher(broker, topic_root) as devices:
        assert daemon.terminate() == 0
        publish(devices, readings)
        daemon.start()
        wait_for_received(database, len(readings))
        assert not ever_marked(database)
        # Now that nothing comes any more, the clock decides.
        wait_until(lambda: settled(database), "all is rolled up")
        assert daemon.terminate() == 0
    assert not ever_marked(database)
    assert_right(database)


def test_killed_at_any_moment_it_leaves_nothing_wrong(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    chance = random.Random(4)
    readings = list(fleet(now() - timedelta(hours=30), minutes=600, devices=2))
    # In an order that makes many of them late.
    parts = [readings[part::5] for part in (3, 0, 4, 1, 2)]
    with (
        Daemon(database, broker, topic_root, tmp_path, maintenance__every_s=0.02, batch__max_readings=50) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        for part in parts:
            with in_background(lambda part=part: publish(devices, part)):
                time.sleep(chance.uniform(0, 0.6))
                daemon.kill()
                daemon.start()
        wait_until(lambda: stored(database) == len(readings), "all is stored")
        wait_until(lambda: settled(database), "all is rolled up")
        assert ever_marked(database)
        assert daemon.events("maintenance.waiting") == []
        assert daemon.terminate() == 0
    assert_right(database)


def test_of_two_daemons_one_makes_rollups_at_a_time(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    settings = {"maintenance__every_s": 0.05, "mqtt__share_group": "crew"}
    readings = list(fleet(now() - timedelta(hours=30), minutes=300))
    chance = random.Random(2)
    with (
        Daemon(database, broker, topic_root, tmp_path, **settings) as first,
        Daemon(database, broker, topic_root, tmp_path, **settings) as second,
        Publisher(broker, topic_root) as devices,
    ):
        with transaction(database, "SELECT pg_advisory_xact_lock(hashtext('wattbridge rollup'), 1)"):
            # Somebody is at it: nobody else is, and nobody complains.
            publish(devices, chance.sample(readings, len(readings)))
            wait_for_received(database, len(readings))
            time.sleep(0.5)
            assert not any(rollups(database).values())
        wait_until(lambda: settled(database), "all is rolled up")
        more = list(fleet(now() - timedelta(hours=20), minutes=60))
        publish(devices, chance.sample(more, len(more)))
        wait_for_received(database, len(readings) + len(more))
        wait_until(lambda: settled(database), "what was late as well")
        assert ever_marked(database)
        for daemon in (first, second):
            assert daemon.events("maintenance.waiting") == daemon.events("database.waiting") == []
            assert daemon.terminate() == 0
    check_books(database)
    assert_right(database)


def test_a_database_that_is_away_is_waited_for(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(fleet(now() - timedelta(hours=2), minutes=100))
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, **OFTEN) as daemon, Publisher(broker, topic_root) as devices:
        wait_until(lambda: ask(database, MAINTAINERS), "it is connected")
        proxy.refuse()
        waiting = daemon.wait_for_event("maintenance.waiting", attempt=2, level="warning")
        assert waiting["next_in_s"] > 0
        assert waiting["reason"]
        publish(devices, readings)
        assert daemon.running
        proxy.heal()
        wait_until(lambda: settled(database), "all is rolled up")
        wait_for_received(database, len(readings))
        assert daemon.terminate() == 0
    assert_right(database)


def test_what_is_wrong_with_the_rollups_does_not_touch_the_data_path(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    ask(database, "ALTER FUNCTION rollup_refresh RENAME TO mislaid")
    with Daemon(database, broker, topic_root, tmp_path, **OFTEN) as daemon, Publisher(broker, topic_root) as devices:
        waiting = daemon.wait_for_event("maintenance.waiting", level="error")
        assert "rollup_refresh" in waiting["reason"]
        devices.send("meter", "M", meter("M", now() - timedelta(hours=1)))
        wait_for_received(database, 1)
        ask(database, "ALTER FUNCTION mislaid RENAME TO rollup_refresh")
        wait_until(lambda: settled(database), "all is rolled up")
        assert daemon.events("database.waiting") == []
        assert daemon.terminate() == 0


def test_the_writer_is_enough_for_maintenance(
    database: str, postgres_dsn_admin: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    login = f"test_maintainer_{uuid.uuid4().hex[:8]}"
    old = now() - timedelta(days=9)
    ask(database, "SELECT ensure_history_partitions('vehicle_history', ARRAY[%s::date])", old)
    ask(postgres_dsn_admin, f"CREATE ROLE {login} LOGIN PASSWORD 'test'")
    ask(postgres_dsn_admin, f"GRANT wattbridge_writer, wattbridge_retention TO {login}")
    try:
        dsn = make_conninfo(database, user=login, password="test")
        settings = OFTEN | {"maintenance__history_days": 2, "limits__horizon_days": 1}
        with Daemon(dsn, broker, topic_root, tmp_path, **settings) as daemon, Publisher(broker, topic_root) as devices:
            wait_until(lambda: settled(database), "the watermark is there")
            publish(devices, list(fleet(now() - timedelta(hours=2), minutes=100)))
            wait_for_received(database, 800)
            wait_until(lambda: settled(database), "all is rolled up")
            assert ever_marked(database)
            assert daemon.wait_for_event("history.dropped")["partitions"] == 1
            assert daemon.events("maintenance.waiting") == daemon.events("database.waiting") == []
            assert daemon.terminate() == 0
        assert command(dsn, broker, tmp_path)("rebuild").code == 0
        assert "complete until" in command(dsn, broker, tmp_path)("status").out
    finally:
        ask(postgres_dsn_admin, f"DROP ROLE {login}")
    assert_right(database)


# --- stop --------------------------------------------------------------------------------------------------


def dawdle(dsn: str, condition: str = "true") -> None:
    """Lets steps of the rollups take a minute, where the progress meets the condition."""
    ask(
        dsn,
        f"""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep(60) FROM rollup_progress WHERE {condition};
            RETURN NULL;
        END
        $$
        """,
    )
    ask(dsn, "CREATE TRIGGER dawdle AFTER INSERT ON meter_quarter_hour EXECUTE FUNCTION dawdle()")


@pytest.fixture
def dawdling(database: str) -> str:
    """A database in which each step of the rollups takes a minute."""
    dawdle(database)
    return database


SLEEPING = f"{MAINTAINERS} AND wait_event = 'PgSleep'"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_under_way_delays_neither_the_end_nor_the_next_daemon(
    dawdling: str, broker: Address, topic_root: str, tmp_path: Path, number: signal.Signals
) -> None:
    with Daemon(dawdling, broker, topic_root, tmp_path, **OFTEN) as daemon, Publisher(broker, topic_root) as devices:
        devices.send("meter", "M", meter("M", now() - timedelta(hours=1)))
        wait_until(lambda: ask(dawdling, SLEEPING), "a step is under way")
        began = time.monotonic()
        daemon.signal(number)
        assert daemon.wait() == (0 if number == signal.SIGTERM else -number)
        assert time.monotonic() - began < 4
        wait_until(lambda: not ask(dawdling, MAINTAINERS), "the server has noticed", seconds=10)
        ask(dawdling, "DROP TRIGGER dawdle ON meter_quarter_hour")
        daemon.start()
        wait_until(lambda: settled(dawdling), "all is rolled up")
        assert daemon.terminate() == 0
    assert_right(dawdling)


def test_a_database_that_hangs_does_not_delay_the_end(
    dawdling: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Proxy(dawdling) as proxy, Daemon(proxy.dsn, broker, topic_root, tmp_path, **OFTEN) as daemon:
        with Publisher(broker, topic_root) as devices:
            devices.send("meter", "M", meter("M", now() - timedelta(hours=1)))
            wait_until(lambda: ask(dawdling, SLEEPING), "a step is under way")
            wait_until(lambda: one(dawdling, "SELECT count(*) FROM meter_live"), "nothing is outstanding")
        proxy.stall()
        began = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - began < 4
        assert daemon.events("daemon.stopped")[0]["unfinished"] is False


# --- retention ---------------------------------------------------------------------------------------------


def days_of_history(dsn: str) -> set[datetime]:
    query = "SELECT date_trunc('day', ts AT TIME ZONE 'UTC') FROM {0}_history UNION "
    return {day for (day,) in ask(dsn, (query.format("meter") + query.format("vehicle")).removesuffix(" UNION "))}


async def test_retention_drops_whole_days_and_keeps_their_rollups(
    store: Store, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    today = now().replace(hour=0, minute=0, second=0, microsecond=0)
    days = [today - timedelta(days=number) for number in (1, 2, 3, 4, 40)]
    arrivals = Arrivals()
    minutes = [day + timedelta(minutes=minute) for day in days for minute in (0, 1, 700, 1439)]
    await store.write(
        arrivals.batch(
            *(metered("M", moment) for moment in minutes), *(charged("V", moment, "M") for moment in minutes)
        )
    )
    settings = OFTEN | {"maintenance__history_days": 2, "limits__horizon_days": 1}
    # First without retention: rollups of everything, to compare with.
    with Daemon(database, broker, topic_root, tmp_path, **OFTEN) as daemon:
        wait_until(lambda: settled(database), "all is rolled up")
        assert daemon.terminate() == 0
    before = rollups(database)
    assert len(before["meter_quarter_hour"]) == len(before["vehicle_quarter_hour"]) == 3 * len(days)
    assert days_of_history(database) == {day.replace(tzinfo=None) for day in days}

    kept = {day.replace(tzinfo=None) for day in days[:2]}
    with Daemon(database, broker, topic_root, tmp_path, **settings) as daemon:
        dropped = daemon.wait_for_event("history.dropped")
        assert dropped["before"] == f"{today - timedelta(days=2):%Y-%m-%d}"
        assert dropped["partitions"] == 6
        assert days_of_history(database) == kept
        assert one(database, "SELECT history_since FROM rollup_progress") == today - timedelta(days=2)
        assert to_regclass(database, f"meter_history_{days[3]:%Y%m%d}") is None

        # A reading for a day that is gone is taken (by a replay, say). The rollups stay as they were, and it goes.
        await write_persistently(store, arrivals.batch(metered("M", days[3] + timedelta(minutes=5), kwh=7.0)))
        daemon.wait_for_events("history.dropped", 2)
        wait_for_equal(lambda: days_of_history(database), kept)
        wait_until(lambda: settled(database), "the mark is gone")
        assert daemon.events("maintenance.waiting") == []
        assert daemon.terminate() == 0
    assert_same(rollups(database), before)
    rebuild(database)
    assert_same(rollups(database), before)


def to_regclass(dsn: str, name: str) -> object:
    return one(dsn, "SELECT to_regclass(%s)", name)


async def write_persistently(store: Store, batch: Batch) -> None:
    """As the pipeline does: the partition may have been dropped since the store made it."""
    for _ in range(50):
        with contextlib.suppress(RefusedError):
            await store.write(batch)
            return
    raise AssertionError("the store does not take the batch")


def test_retention_waits_for_no_one_who_reads_on_and_on(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """The lock that dropping takes would make everybody wait behind it: it is given up, and tried again."""
    old = now() - timedelta(days=5)
    ask(database, "SELECT ensure_history_partitions('meter_history', ARRAY[%s::date])", old)
    settings = {"maintenance__every_s": 0.5, "maintenance__history_days": 2, "limits__horizon_days": 1}
    with (
        transaction(database, "SELECT count(*) FROM meter_history") as reading,
        Daemon(database, broker, topic_root, tmp_path, **settings) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        daemon.wait_for_event("history.postponed")
        devices.send("meter", "M", meter("M", now()))
        wait_for_received(database, 1)
        reading.rollback()
        daemon.wait_for_event("history.dropped")
        assert daemon.events("maintenance.waiting") == []
        assert daemon.terminate() == 0


# --- commands ----------------------------------------------------------------------------------------------

Command = Callable[..., Any]


@pytest.fixture
async def rolled_up(store: Store, database: str) -> Rollups:
    """Some hours of history and their rollups."""
    arrivals = Arrivals()
    first = WATERMARK - timedelta(hours=30)
    moments = [first + timedelta(minutes=minute) for minute in range(0, 1_800, 7)]
    await store.write(
        arrivals.batch(
            *(metered("M", moment) for moment in moments), *(charged("V", moment, "M") for moment in moments)
        )
    )
    return rebuild(database, watermark=WATERMARK)


def command(dsn: str, broker: Address, folder: Path) -> Command:
    env = environment(dsn, broker, "test", "test-rollups")
    return lambda *arguments: wattbridge_here("rollups", *arguments, env=env, cwd=folder)


def spoil(dsn: str) -> None:
    """As somebody does who works on the tables by hand."""
    ask(dsn, "UPDATE meter_quarter_hour SET kwh_ac = kwh_ac + 1")
    ask(dsn, "DELETE FROM vehicle_quarter_hour")
    ask(dsn, "UPDATE charging_two_hours SET minutes = 0")


def test_rebuild_makes_them_again(rolled_up: Rollups, database: str, broker: Address, tmp_path: Path) -> None:
    run = command(database, broker, tmp_path)
    spoil(database)
    reply = run("rebuild")
    assert (reply.code, reply.err) == (0, "")
    lines = reply.out.splitlines()
    assert lines[-1] == "the rollups are complete until 2026-02-10T15:00:00Z"
    assert lines[-2] == "100 %  rollups until 2026-02-10T15:00:00Z"
    percents = [int(line.split()[0]) for line in lines[:-1]]
    assert len(percents) > 2
    assert percents == sorted(set(percents))
    assert_same(rollups(database), rolled_up)


def test_rebuild_since_leaves_what_is_earlier(
    rolled_up: Rollups, database: str, broker: Address, tmp_path: Path
) -> None:
    run = command(database, broker, tmp_path)
    ask(database, "UPDATE meter_quarter_hour SET kwh_ac = -1")
    since = WATERMARK - timedelta(hours=4)
    assert run("rebuild", "--since", f"{since:%Y-%m-%dT%H:%M:%S}").code == 0
    for (_, quarter_hour), row in rollups(database)["meter_quarter_hour"].items():
        expected = -1 if quarter_hour < since else rolled_up["meter_quarter_hour"]["M", quarter_hour][3]
        assert row[3] == pytest.approx(expected)


def test_rebuild_beside_a_daemon(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    readings = list(fleet(now() - timedelta(hours=30), minutes=600))
    daemon = Daemon(database, broker, topic_root, tmp_path, maintenance__every_s=0.02)
    with daemon, Publisher(broker, topic_root) as devices:
        publish(devices, readings[::2])
        wait_for_received(database, len(readings) // 2)
        with in_background(lambda: publish(devices, readings[1::2])):
            for _ in range(3):
                spoil(database)
                reply = command(database, broker, tmp_path)("rebuild")
                assert (reply.code, reply.err) == (0, "")
        wait_for_received(database, len(readings))
        wait_until(lambda: settled(database), "all is rolled up")
        assert daemon.events("maintenance.waiting") == daemon.events("database.waiting") == []
        assert daemon.terminate() == 0
    assert_right(database)


def test_rebuild_interrupted_and_run_again(rolled_up: Rollups, database: str, broker: Address, tmp_path: Path) -> None:
    spoil(database)
    dawdle(database, "complete_until > '2026-02-09 20:00Z'")
    env = environment(database, broker, "test", "test-rollups")
    process = subprocess.Popen(
        [PROGRAM, "rollups", "rebuild"],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'wattbridge-rollups' AND wait_event = 'PgSleep'"
    wait_until(lambda: ask(database, sleeping), "it is under way")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "Traceback" not in err
    complete, late = progress(database)
    assert complete < late == WATERMARK
    ask(database, "DROP TRIGGER dawdle ON meter_quarter_hour")
    assert command(database, broker, tmp_path)("rebuild").code == 0
    assert_same(rollups(database), rolled_up)


def test_status(rolled_up: Rollups, database: str, broker: Address, tmp_path: Path) -> None:
    ask(database, "SELECT rollup_restart(%s)", WATERMARK - timedelta(hours=1))
    ask(
        database,
        "INSERT INTO rollup_mark (device_id, kind, quarter_hours) VALUES ('M', 'meter', '[2026-02-01,2026-02-02)')",
    )
    reply = command(database, broker, tmp_path)("status")
    assert (reply.code, reply.err) == (0, "")
    said = [" ".join(re.split(r" {2,}", line)[:2]) for line in reply.out.splitlines()]
    assert said == [
        "complete until 2026-02-10T14:00:00Z",
        "late before 2026-02-10T15:00:00Z",
        "marks 1",
        "history since -infinity",
    ]


def test_before_any_daemon_has_run_there_is_nothing_to_rebuild(database: str, broker: Address, tmp_path: Path) -> None:
    reply = command(database, broker, tmp_path)("rebuild")
    assert (reply.code, reply.err) == (0, "")
    assert "nothing to do" in reply.out
    assert "complete until  -infinity" in command(database, broker, tmp_path)("status").out


@pytest.mark.parametrize("name", ["rebuild", "status"])
def test_without_schema_they_say_what_to_do(
    postgres_dsn_admin: str, broker: Address, tmp_path: Path, name: str
) -> None:
    with empty_database(postgres_dsn_admin) as dsn:
        reply = command(dsn, broker, tmp_path)(name)
    assert (reply.code, reply.out) == (1, "")
    assert reply.err == 'wattbridge: the schema is missing: run "wattbridge migrate"\n'
