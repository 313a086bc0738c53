"""What one batch becomes in the database, whatever the database is set to: the store by itself, without a daemon."""

import asyncio
import json
import math
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from random import Random
from typing import Any, cast

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bridge.batch import Batch, DeadLetter
from bridge.config import Database
from bridge.errors import Reason, Rejection
from bridge.messages import DAY, SECOND, MeterReading, Reading, VehicleReading
from bridge.migrate import migrate
from bridge.store import RefusedError, RetryError, Store, Totals, _sql
from bridge.topics import Kind, Topics
from tests.integration.harness import ask, check_books, counters, one

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
# A second before midnight in UTC, and the next day already in Kolkata.
MIDNIGHT = round(datetime(2026, 2, 11, tzinfo=UTC).timestamp()) * SECOND
TS = MIDNIGHT - SECOND
ARRIVALS = count(TS + SECOND)


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    made = Store(Database(dsn=database), "test-store")
    yield made
    await made.close()


def reading(kind: Kind, device: str, value: float, ts: int = TS) -> Reading:
    if kind is Kind.METER:
        return MeterReading(device, ts, value, 230.0, ts + 1, ts_from_arrival=False)
    return VehicleReading(device, ts, value, 50.0, 30.5, None, ts + 1, ts_from_arrival=False)


def batch_of(readings: Iterable[Reading]) -> Batch:
    """A batch of these readings, each of which arrives at a time of its own, as always."""
    batch = Batch(TOPICS)
    for item in readings:
        batch.add_reading(item._replace(received_at=next(ARRIVALS)))
    return batch


def change(before: Totals, after: Totals) -> Totals:
    return Totals(*(new - old for old, new in zip(before, after, strict=True)))


@contextmanager
def altered(dsn: str, settings: str) -> Iterator[None]:
    """The database with these settings for each session that says nothing else."""
    name = sql.Identifier(str(conninfo_to_dict(dsn)["dbname"]))
    for setting in settings.splitlines():
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(name))
    yield


# --- verdicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("values", "duplicates", "dead"),
    [
        ([1.0, 2.0], 1, 1),
        ([2.0, 1.0], 1, 1),
        ([1.0, 1.0], 1, 1),
        ([1.0, 3.0], 0, 2),
        ([2.0, 2.0], 2, 0),
        ([1.0, 3.0, 2.0, 1.0, 3.0], 3, 2),
    ],
    ids=str,
)
async def test_the_verdict_does_not_depend_on_the_batch(
    store: Store, database: str, kind: Kind, values: list[float], duplicates: int, dead: int
) -> None:
    """History has 2.0; what else is said about that (device, ts) may come in one batch or one by one."""
    before = await store.write(batch_of(reading(kind, device, 2.0) for device in ("TOGETHER", "APART")))
    between = await store.write(batch_of(reading(kind, "TOGETHER", value) for value in values))
    after = between
    for value in values:
        after = await store.write(batch_of([reading(kind, "APART", value)]))
    expected = Totals(received=len(values), duplicate=duplicates, dead_lettered=dead)
    assert change(before, between) == expected
    assert change(between, after) == expected
    energy = {Kind.METER: "kwh_ac", Kind.VEHICLE: "kwh_dc"}[kind]
    assert ask(database, f"SELECT DISTINCT {energy} FROM {kind}_history") == [(2.0,)]
    kept = {
        device: {next(v for k, v in json.loads(payload).items() if k.startswith("kwh")) for (payload,) in found}
        for device in ("TOGETHER", "APART")
        if (found := ask(database, "SELECT payload FROM dead_letter WHERE device_id = %s", device))
    }
    # And of each device, how many of its readings were known: dead letters that come again are none.
    again = dict(ask(database, "SELECT device_id, duplicates FROM device_duplicate WHERE kind = %s", str(kind)))
    assert again == ({"TOGETHER": values.count(2.0), "APART": values.count(2.0)} if 2.0 in values else {})
    rejected = set(values) - {2.0}
    assert kept == ({"TOGETHER": rejected, "APART": rejected} if rejected else {})
    check_books(database)


@pytest.mark.parametrize("kind", Kind)
async def test_a_dropped_partition_is_made_again_for_a_single_reading(store: Store, database: str, kind: Kind) -> None:
    # Alone in its batch there is no neighbour whose fault it could be: it must not be taken for the data's.
    await store.write(batch_of([reading(kind, "D-1", 1.0)]))
    ask(database, f"DROP TABLE {kind}_history_20260210")
    totals = await store.write(batch_of([reading(kind, "D-2", 2.0)]))
    assert totals == Totals(received=2, stored=2)
    assert ask(database, f"SELECT {kind}_id FROM {kind}_history") == [("D-2",)]


async def test_a_detached_partition_is_not_waited_for(store: Store, database: str) -> None:
    await store.write(batch_of([reading(Kind.METER, "D-1", 1.0)]))
    ask(database, "ALTER TABLE meter_history DETACH PARTITION meter_history_20260210")
    with pytest.raises(RefusedError, match="23514"):
        await store.write(batch_of([reading(Kind.METER, "D-2", 2.0)]))


# --- plans -------------------------------------------------------------------------------------------------


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each node of a plan, from the top."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


def scanned(plan: dict[str, Any]) -> Iterator[str]:
    """The tables that a plan reads from one end to the other."""
    return (node["Relation Name"] for node in nodes(plan) if node["Node Type"] == "Seq Scan")


@pytest.mark.parametrize("kind", Kind)
async def test_a_batch_of_duplicates_never_reads_a_whole_partition(store: Store, database: str, kind: Kind) -> None:
    """The plan was made and kept when the partition was small."""
    known = [reading(kind, f"D-{number:03}", 0.5) for number in range(100)]
    await store.write(batch_of(known))
    ask(database, f"ANALYZE {kind}_history")
    for _ in range(8):
        before = Totals(*counters(database))
        totals = await store.write(batch_of(known))
        assert change(before, totals) == Totals(received=100, duplicate=100)

    values = {Kind.METER: "0.5, 230", Kind.VEHICLE: "0.5, 50, 30.5, NULL"}[kind]
    query = (
        f"INSERT INTO {kind}_history SELECT 'X-' || n, to_timestamp(%s), {values}, now(), false "
        "FROM generate_series(1, 50000) AS n"
    )
    ask(database, query, TS // SECOND)

    connection = store._connection
    assert connection is not None
    cursor = await connection.execute(
        "SELECT name, cardinality(parameter_types) FROM pg_prepared_statements WHERE statement LIKE %s",
        (f"%CROSS JOIN LATERAL%{kind}_history%",),
    )
    # What differs, and whose duplicates they are.
    statements = await cursor.fetchall()
    assert len(statements) == 2
    for name, parameters in statements:
        given = f"({', '.join(['true', *['NULL'] * (parameters - 1)])})" if parameters else ""
        cursor = await connection.execute(f"EXPLAIN (FORMAT JSON) EXECUTE {name}{given}".encode())
        row = await cursor.fetchone()
        assert row is not None
        whole = set(scanned(row[0][0]["Plan"]))
        assert {table for table in whole if "history" in table} == set(), row[0]

    # And it is still right: known ones, a new one and one with another value.
    more = [*known[1:], reading(kind, "NEW", 0.5), reading(kind, "D-000", 0.75)]
    assert change(totals, await store.write(batch_of(more))) == Totals(101, 1, 99, 1, 0)


# --- what needs no look at history -------------------------------------------------------------------------


def times_of(dsn: str, kind: Kind) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """History and live rows: device, and time in seconds after TS."""
    seconds = f"(extract(epoch FROM ts) - {TS // SECOND})::int"
    query = f"SELECT {kind}_id, {seconds} FROM {kind}_{{}} ORDER BY 1, 2"
    return ask(dsn, query.format("history")), ask(dsn, query.format("live"))


@pytest.mark.parametrize("kind", Kind)
async def test_the_live_row_is_the_newest_whichever_way_readings_come(store: Store, database: str, kind: Kind) -> None:
    def at(device: str, *seconds: int) -> list[Reading]:
        return [reading(kind, device, 1.0 + second, TS + second * SECOND) for second in seconds]

    await store.write(batch_of(at("KNOWN", 10) + at("AHEAD", 50) + at("AROUND", 20)))
    # One that is newer, several that are, one between and one that is known, a new one, several of a new one.
    said = (
        at("KNOWN", 12, 13, 11) + at("AHEAD", 40, 50) + at("AROUND", 30, 10, 20) + at("NEW", 5) + at("OTHER", 8, 7, 9)
    )
    totals = await store.write(batch_of(said))
    assert totals == Totals(received=15, stored=13, duplicate=2)
    history, live = times_of(database, kind)
    assert history == sorted({(item.device_id, (item.ts - TS) // SECOND) for item in said} | {("KNOWN", 10)})
    assert live == [("AHEAD", 50), ("AROUND", 30), ("KNOWN", 13), ("NEW", 5), ("OTHER", 9)]


@pytest.mark.parametrize("kind", Kind)
async def test_a_live_row_that_was_put_back_costs_time_and_nothing_else(
    store: Store, database: str, kind: Kind
) -> None:
    def batch() -> Batch:
        return batch_of(reading(kind, "D", float(second), TS + second * SECOND) for second in range(1, 4))

    await store.write(batch())
    ask(database, f"UPDATE {kind}_live SET ts = ts - interval '1 hour'")
    more = batch_of([*batch().readings, reading(kind, "E", 1.0)])
    assert await store.write(more) == Totals(received=7, stored=4, duplicate=3)
    history, live = times_of(database, kind)
    assert history == [("D", 1), ("D", 2), ("D", 3), ("E", 0)]
    assert live == [("D", 3), ("E", 0)]


@pytest.mark.parametrize("kind", Kind)
async def test_live_rows_that_are_gone_come_again(store: Store, database: str, kind: Kind) -> None:
    await store.write(batch_of([reading(kind, "D", 1.0), reading(kind, "D", 2.0, TS + SECOND)]))
    ask(database, f"TRUNCATE {kind}_live")
    again = batch_of([reading(kind, "D", 1.0), reading(kind, "D", 3.0, TS + 2 * SECOND)])
    assert await store.write(again) == Totals(received=4, stored=3, duplicate=1)
    assert times_of(database, kind) == ([("D", 0), ("D", 1), ("D", 2)], [("D", 2)])


@pytest.mark.parametrize("kind", Kind)
async def test_a_late_reading_is_marked_also_where_it_is_the_newest_of_its_device(
    store: Store, database: str, kind: Kind
) -> None:
    await store.write(batch_of([reading(kind, "D", 1.0), reading(kind, "ON TIME", 1.0)]))
    ask(database, "SELECT rollup_advance(to_timestamp(%s))", TS // SECOND + 3600)
    ask(database, "DELETE FROM rollup_mark")
    in_time = reading(kind, "ON TIME", 1.0, TS + 7200 * SECOND)
    late = [reading(kind, "D", 2.0, TS + minute * 60 * SECOND) for minute in (20, 40)]
    assert change(Totals(2, 2), await store.write(batch_of([in_time, *late]))) == Totals(received=3, stored=3)
    quarters = f"((extract(epoch FROM lower(quarter_hours)) - {TS // SECOND + 1}) / 900)::int"
    assert ask(database, f"SELECT device_id, kind, {quarters} FROM rollup_mark ORDER BY 3") == [
        ("D", kind, 1),
        ("D", kind, 2),
    ]


@pytest.mark.parametrize("kind", Kind)
async def test_a_batch_that_was_committed_without_an_answer_is_no_reason_for_distrust(
    store: Store, database: str, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = batch_of(reading(kind, f"D-{number}", 1.0) for number in range(3))
    assert await store.write(batch) == await store.write(batch) == Totals(received=3, stored=3)
    assert "store.live_distrusted" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", Kind)
async def test_a_column_of_a_newer_schema_is_left_alone(store: Store, database: str, kind: Kind) -> None:
    await store.write(batch_of([reading(kind, "D", 1.0)]))
    ask(database, f"ALTER TABLE {kind}_history ADD COLUMN note text DEFAULT 'none'")
    more = batch_of([reading(kind, "D", 2.0, TS + SECOND), reading(kind, "E", 1.0)])
    assert await store.write(more) == Totals(received=3, stored=3)
    assert ask(database, f"SELECT DISTINCT note FROM {kind}_history") == [("none",)]


@pytest.mark.parametrize("kind", Kind)
async def test_what_a_trigger_skips_is_not_counted_as_stored(store: Store, database: str, kind: Kind) -> None:
    await store.write(batch_of([reading(kind, device, 1.0) for device in ("D", "SKIPPED")]))
    ask(
        database,
        f"CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF NEW.{kind}_id = ''SKIPPED'' "
        f"THEN RETURN NULL; END IF; RETURN NEW; END'; CREATE TRIGGER skipping BEFORE INSERT ON {kind}_history "
        "FOR EACH ROW EXECUTE FUNCTION skip()",
    )
    totals = await store.write(batch_of([reading(kind, device, 2.0, TS + SECOND) for device in ("D", "SKIPPED")]))
    assert totals.stored == one(database, f"SELECT count(*) FROM {kind}_history") == 3


@pytest.mark.parametrize("kind", Kind)
async def test_a_device_of_a_batch_that_was_rolled_back_is_new_again(store: Store, database: str, kind: Kind) -> None:
    await store.write(batch_of([reading(kind, "D", 1.0)]))
    ask(database, f"ALTER TABLE {kind}_history ADD CONSTRAINT no_x CHECK ({kind}_id <> 'X')")
    with pytest.raises(RefusedError):
        await store.write(batch_of([reading(kind, device, 1.0) for device in ("NEW", "X")]))
    assert store._met[kind] == set()
    assert await store.write(batch_of([reading(kind, "NEW", 1.0)])) == Totals(received=2, stored=2)


@pytest.mark.parametrize("kind", Kind)
async def test_writers_of_the_same_devices_wait_and_never_deadlock(database: str, kind: Kind) -> None:
    """All at once: known devices and new ones, duplicates of each other, several of a device, in any order."""
    devices = [f"D-{number:02}" for number in range(60)]
    chance = Random(5)
    stores = [Store(Database(dsn=database), f"store-{number}") for number in range(3)]

    async def write(store: Store) -> None:
        for minute in range(12):
            said = [
                reading(kind, device, 1.0, TS + (minute - back) * 60 * SECOND)
                for device in chance.sample(devices, 20 + 3 * minute)
                for back in chance.sample(range(4), 1 + minute % 2)
            ]
            await store.write(batch_of(said))

    await asyncio.gather(*map(write, stores))
    for one_of_them in stores:
        await one_of_them.close()
    assert ask(database, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
    assert check_books(database).dead_lettered == 0
    newest = ask(database, f"SELECT {kind}_id, max(ts) FROM {kind}_history GROUP BY 1 ORDER BY 1")
    assert ask(database, f"SELECT {kind}_id, ts FROM {kind}_live ORDER BY 1") == newest


@pytest.mark.parametrize("kind", Kind)
async def test_live_rows_are_claimed_by_key_and_in_the_order_of_the_batch(
    store: Store, database: str, kind: Kind
) -> None:
    """Whatever the statistics say: from another join the locks would come in another order."""
    for size in (5, 3_000):
        await store.write(batch_of(reading(kind, f"D-{number:05}", 1.0, TS + size) for number in range(size)))
        ask(database, f"ANALYZE {kind}_live")
        connection = store._connection
        assert connection is not None
        async with connection.transaction():
            await connection.execute(f"INSERT INTO claimed_{kind} SELECT * FROM {kind}_history LIMIT 1000".encode())
            cursor = await connection.execute(b"EXPLAIN (FORMAT JSON) " + _sql(f"claim_{kind}_live").encode())
            ((document,),) = await cursor.fetchall()
        join = next(node for node in nodes(document[0]["Plan"]) if "Join Type" in node)
        outer, inner = join["Plans"]
        assert join["Node Type"] == "Nested Loop"
        assert (outer["Node Type"], outer["Relation Name"]) == ("Seq Scan", f"claimed_{kind}")
        assert (inner["Node Type"], inner["Index Name"]) == ("Index Scan", f"{kind}_live_pkey")
        assert f"claimed.{kind}_id" in inner["Index Cond"]


# --- settings of the database ------------------------------------------------------------------------------

# 0.30000000000000004 and 0.3 are one number to whom 15 digits are enough.
EXACT = 0.1 + 0.2


async def test_what_the_database_is_set_to_changes_nothing(database: str) -> None:
    others = "datestyle = 'German, DMY'\ntimezone = 'Asia/Kolkata'\nextra_float_digits = 0\nclient_encoding = 'LATIN1'"
    with altered(database, others):
        store = Store(Database(dsn=database), "test-store")
        odd = [TS + 123_457, MIDNIGHT, MIDNIGHT - 1]
        readings = [reading(kind, "D", EXACT, ts) for kind in Kind for ts in odd]
        try:
            arrived = batch_of(readings)
            first = await store.write(arrived)
            again = await store.write(batch_of(readings))
            # The first rival differs in the last bit; after it comes what history has.
            rivals = [reading(kind, "D", value, odd[0]) for kind in Kind for value in (0.3, EXACT)]
            strange = batch_of(rivals)
            strange.add_rejection(
                Rejection(Reason.UNKNOWN_TOPIC, "Größe 🔌"), "", "Ä/🔌", b"0.3", None, rivals[0].received_at
            )
            last = await store.write(strange)
            assert store._connection is not None
            assert store._connection.info.parameter_status("TimeZone") == "UTC"
            assert (store._connection.info.parameter_status("DateStyle") or "").startswith("ISO")
        finally:
            await store.close()
    assert first == Totals(received=6, stored=6)
    assert change(first, again) == Totals(received=6, duplicate=6)
    assert change(again, last) == Totals(received=5, duplicate=2, dead_lettered=3)

    plain = make_conninfo(
        database, options="-c datestyle=ISO -c timezone=UTC -c extra_float_digits=1 -c client_encoding=UTF8"
    )
    check_books(plain)
    for kind, energy in ((Kind.METER, "kwh_ac"), (Kind.VEHICLE, "kwh_dc")):
        rows = ask(plain, f"SELECT ts, received_at, {energy}, tableoid::regclass::text FROM {kind}_history")
        expected = set()
        for item in (arrived.meters if kind is Kind.METER else arrived.vehicles).values():
            moment, arrival = (
                datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us) for us in (item.ts, item.received_at)
            )
            expected.add((moment, arrival, EXACT, f"{kind}_history_{moment:%Y%m%d}"))
        assert set(rows) == expected
        bounds = ask(
            plain,
            "SELECT relname, pg_get_expr(relpartbound, pg_class.oid) FROM pg_class "
            "JOIN pg_inherits ON pg_class.oid = inhrelid WHERE inhparent = %s::regclass",
            f"{kind}_history",
        )
        assert dict(bounds) == {
            f"{kind}_history_20260210": "FOR VALUES FROM ('2026-02-10 00:00:00+00') TO ('2026-02-11 00:00:00+00')",
            f"{kind}_history_20260211": "FOR VALUES FROM ('2026-02-11 00:00:00+00') TO ('2026-02-12 00:00:00+00')",
        }
    times = {row for (row,) in ask(plain, "SELECT received_at FROM dead_letter")}
    rejected = (strange.dead_letters[0], *list(strange.meters.values()), *strange.vehicles.values())
    assert times == {datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=one.received_at) for one in rejected}
    assert ask(plain, "SELECT topic, detail FROM dead_letter WHERE device_id = ''") == [("Ä/🔌", "Größe 🔌")]
    letters = ask(plain, "SELECT payload FROM dead_letter WHERE device_id <> ''")
    assert all(0.3 in json.loads(payload).values() for (payload,) in letters)
    assert not math.isclose(EXACT, 0.3, rel_tol=1e-17)


async def test_a_database_in_another_encoding_is_waited_for_with_a_hint(postgres_dsn_admin: str) -> None:
    name = f"wattbridge_latin_{uuid.uuid4().hex[:12]}"
    create = (
        "CREATE DATABASE {} ENCODING 'LATIN1' LOCALE_PROVIDER 'libc' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    with psycopg.connect(postgres_dsn_admin, autocommit=True) as admin:
        admin.execute(sql.SQL(create).format(sql.Identifier(name)))
        try:
            dsn = make_conninfo(postgres_dsn_admin, dbname=name)
            migrate(dsn)
            store = Store(Database(dsn=dsn), "test-store")
            with pytest.raises(RetryError, match="UTF8") as raised:
                await store.open()
            assert raised.value.expected is False
            with pytest.raises(RetryError, match="UTF8"):
                await store.write(batch_of([reading(Kind.METER, "M", 0.5)]))
            assert one(dsn, "SELECT count(*) FROM meter_history") == 0
            await store.close()
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# --- what nobody expected ----------------------------------------------------------------------------------


async def test_an_unexpected_error_is_said_and_tried_again(
    store: Store, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> bytes:
        raise RuntimeError("nobody expects this\n in two lines")

    batch = batch_of([reading(Kind.METER, "M", 0.5), reading(Kind.VEHICLE, "V", 0.5)])
    with monkeypatch.context() as patched:
        patched.setattr("bridge.store.copy_rows", broken)
        with pytest.raises(RetryError, match="nobody expects this in two lines") as raised:
            await store.write(batch)
    assert raised.value.expected is False
    assert check_books(database).received == 0
    assert await store.write(batch) == Totals(received=2, stored=2)
    check_books(database)


async def test_an_error_without_words_still_has_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> bytes:
        raise KeyError

    with monkeypatch.context() as patched:
        patched.setattr("bridge.store.copy_rows", broken)
        with pytest.raises(RetryError, match="KeyError"):
            await store.write(batch_of([reading(Kind.METER, "M", 0.5)]))


async def test_what_the_driver_cannot_say_is_tried_again(store: Store, database: str) -> None:
    batch = batch_of([reading(Kind.METER, "M", 0.5)])
    payload = cast("bytes", object())
    topic = TOPICS.telemetry(Kind.METER, "M")
    letter = DeadLetter("M", topic, b"", None, Reason.MALFORMED, "", TS)
    batch.received += 1
    # Its digest is that of the good one: only the driver stumbles.
    batch.dead_letters.append(type("Odd", (DeadLetter,), {"digest": letter.digest})(*letter._replace(payload=payload)))
    with pytest.raises(RetryError) as raised:
        await store.write(batch)
    assert raised.value.expected is False
    batch.dead_letters[:] = [letter]
    assert (await store.write(batch))[:4] == (2, 1, 0, 1)
    check_books(database)


# --- the calendar ------------------------------------------------------------------------------------------


async def test_partitions_of_days_far_apart(store: Store, database: str) -> None:
    days = [TS - n * DAY for n in (0, 1, 59, 365)]
    totals = await store.write(batch_of(reading(Kind.METER, "M", 0.5, ts) for ts in days))
    assert totals == Totals(received=4, stored=4)
    assert one(database, "SELECT count(DISTINCT tableoid) FROM meter_history") == 4
