"""The schema: made once by whoever comes first, explained in the database itself, and no wider open than needed."""

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from bridge.migrate import scripts
from tests.integration.harness import (
    PROGRAM,
    Address,
    Daemon,
    Publisher,
    ask,
    check_books,
    empty_database,
    environment,
    meter,
    now,
    one,
    vehicle,
    wait_for_received,
    wait_until,
    wattbridge,
    wattbridge_here,
)


@pytest.fixture
def empty(postgres_dsn_admin: str) -> Iterator[str]:
    with empty_database(postgres_dsn_admin) as dsn:
        yield dsn


def env(dsn: str, broker: Address) -> dict[str, str]:
    return environment(dsn, broker, "test", "test-migrate")


def test_many_at_once_make_one_schema(empty: str, broker: Address, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [PROGRAM, "migrate"],
            env=env(empty, broker),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(8)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 8, said
    assert sum("applied migrations/0001_schema.sql" in text for text in said) == 1
    assert sum("there was nothing to do" in text for text in said) == 7
    assert {name for (name,) in ask(empty, "SELECT name FROM schema_migration")} == {s.name for s in scripts()}


def test_the_second_run_does_nothing(empty: str, broker: Address, tmp_path: Path) -> None:
    first = wattbridge("migrate", env=env(empty, broker), cwd=tmp_path)
    assert first.code == 0
    assert first.out.splitlines()[0] == "applied migrations/0001_schema.sql"
    catalog = "SELECT oid, xmin::text, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY oid"
    before = ask(empty, catalog)
    second = wattbridge("migrate", env=env(empty, broker), cwd=tmp_path)
    assert second == (0, "the schema is current, there was nothing to do\n", "")
    names = [(oid, name) for oid, _, name in before]
    assert [(oid, name) for oid, _, name in ask(empty, catalog)] == names


def test_an_altered_migration_is_an_error(empty: str, broker: Address, tmp_path: Path) -> None:
    wattbridge_here("migrate", env=env(empty, broker), cwd=tmp_path)
    ask(empty, "UPDATE schema_migration SET checksum = 'x' WHERE name = 'migrations/0001_schema.sql'")
    reply = wattbridge_here("migrate", env=env(empty, broker), cwd=tmp_path)
    assert reply.code == 1
    assert reply.out == ""
    assert reply.err.startswith("wattbridge: migrations/0001_schema.sql was applied")
    assert len(reply.err.splitlines()) == 1


def test_an_altered_view_is_made_anew(empty: str, broker: Address, tmp_path: Path) -> None:
    wattbridge_here("migrate", env=env(empty, broker), cwd=tmp_path)
    ask(empty, "UPDATE schema_migration SET checksum = 'x' WHERE name LIKE 'views/%%meter%%'".replace("%%", "%"))
    reply = wattbridge_here("migrate", env=env(empty, broker), cwd=tmp_path)
    assert reply.code == 0
    assert "applied views/10_meter_status.sql" in reply.out
    assert "vehicle" not in reply.out


def test_a_migration_that_fails_leaves_nothing(empty: str, broker: Address, tmp_path: Path) -> None:
    ask(empty, "CREATE VIEW vehicle_status AS SELECT 1 AS another_shape")
    reply = wattbridge_here("migrate", env=env(empty, broker), cwd=tmp_path)
    assert reply.code == 1
    assert reply.err.startswith("wattbridge: the database says:")
    assert ask(empty, "SELECT to_regclass('meter_history'), to_regclass('schema_migration')") == [(None, None)]


def test_the_planner_knows_the_tables_of_one_row(database: str) -> None:
    for table in ("analytics_setting", "rollup_progress"):
        assert one(database, "SELECT reltuples FROM pg_class WHERE oid = to_regclass(%s)", table) == 1


def test_every_key_starts_with_the_device(database: str) -> None:
    keys = dict(
        ask(
            database,
            """
            SELECT c.relname, a.attname
            FROM pg_class c
            LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
            LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            """,
        )
    )
    others = {name: key for name, key in keys.items() if key not in ("meter_id", "vehicle_id", "device_id")}
    one_row = {"analytics_setting": "only_row", "rollup_progress": "only_row"}
    assert others == {"ingest_counter": "instance", "schema_migration": "name"} | one_row


# --- roles -------------------------------------------------------------------------------------------------


def test_the_writer_is_enough_for_the_daemon(
    database: str, logins: dict[str, str], broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with (
        Daemon(logins["writer"], broker, topic_root, tmp_path) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        moments = [now() - timedelta(days=day) for day in (0, 3, 200)]
        devices.send("meter", "MTR-1", [meter("MTR-1", moment) for moment in moments])
        devices.send("vehicle", "VEH-1", [vehicle("VEH-1", moment) for moment in moments])
        devices.send("meter", "MTR-1", [meter("MTR-1", moments[0]), meter("MTR-1", moments[0], 9), {}])
        devices.send("vehicle", "VEH-1", b"online", channel="status")
        wait_for_received(database, 9)
        wait_until(lambda: ask(database, "SELECT 1 FROM device_presence"), "the status is stored")
        assert check_books(database)[:4] == (9, 6, 1, 2)
        assert daemon.events("database.waiting") == []
        assert daemon.terminate() == 0
    (partition,) = {name for (name,) in ask(database, "SELECT min(tableoid::regclass::text) FROM meter_history")}

    refused = [
        "UPDATE meter_history SET kwh_ac = 0",
        "DELETE FROM meter_history",
        "TRUNCATE vehicle_history",
        "DROP TABLE meter_history",
        f"DROP TABLE {partition}",
        f"DELETE FROM {partition}",
        f"ALTER TABLE meter_history DETACH PARTITION {partition}",
        "DELETE FROM meter_live",
        "DELETE FROM ingest_counter",
        "UPDATE dead_letter SET reason = 'x'",
        "UPDATE schema_migration SET checksum = 'x'",
        "CREATE TABLE mine (i int)",
        "ALTER FUNCTION ensure_history_partitions(regclass, date[]) SECURITY INVOKER",
    ]
    for statement in refused:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(logins["writer"], statement)
    with pytest.raises(psycopg.errors.RaiseException, match="not a history table"):
        ask(logins["writer"], "SELECT ensure_history_partitions('dead_letter'::regclass, ARRAY['2026-01-01'::date])")


def test_a_table_of_their_own_does_not_lead_the_function_astray(database: str, logins: dict[str, str]) -> None:
    with psycopg.connect(logins["writer"], autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE meter_history (ts timestamptz) PARTITION BY RANGE (ts)")
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT ensure_history_partitions('pg_temp.meter_history', ARRAY['2026-01-01'::date])")


def test_the_reader_sees_the_views_alone(database: str, logins: dict[str, str]) -> None:
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = ANY(%s)"
    for (view,) in ask(database, tables, ["v", "m"]):
        ask(logins["reader"], f"SELECT * FROM {view}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(logins["stranger"], f"SELECT * FROM {view}")
    for (table,) in ask(database, tables, ["r", "p"]):
        for login in ("reader", "stranger"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                ask(logins[login], f"SELECT * FROM {table}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ask(logins["reader"], "SELECT ensure_history_partitions('meter_history', ARRAY['2026-01-01'::date])")


def test_daemons_that_want_the_same_days_in_another_order_do_not_block_each_other(database: str) -> None:
    """Each makes its days in the order in which they came to it; both want the history as well, to attach them."""
    start = now().date() - timedelta(days=200)
    rounds, days_a_round = 10, 8
    together = threading.Barrier(2)

    def ensure(history: str, *, backwards: bool) -> int:
        made = 0
        with psycopg.connect(database, autocommit=True) as connection:
            for number in range(rounds):
                days = [start + timedelta(days=number * days_a_round + n) for n in range(days_a_round)]
                together.wait(30)
                query = "SELECT ensure_history_partitions(%s::regclass, %s::date[])"
                row = connection.execute(query, (history, days[::-1] if backwards else days)).fetchone()
                made += row[0] if row else 0
        return made

    for history in ("meter_history", "vehicle_history"):
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(ensure, history, backwards=backwards) for backwards in (False, True)]
            assert sum(done.result(60) for done in both) == rounds * days_a_round
        found = ask(
            database,
            "SELECT relname FROM pg_class JOIN pg_inherits ON pg_class.oid = inhrelid WHERE inhparent = %s::regclass",
            history,
        )
        wanted = (start + timedelta(days=n) for n in range(rounds * days_a_round))
        assert {name for (name,) in found} == {f"{history}_{day:%Y%m%d}" for day in wanted}
