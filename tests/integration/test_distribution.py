"""Every key and constraint holds the device, so that tables can be distributed by it; asked of the catalog."""

import re

import psycopg

from tests.integration.harness import ask

DEVICE = {"meter_id", "vehicle_id", "device_id"}
# Tables that need no distribution column, and why.
NOT_DISTRIBUTED = {
    "analytics_setting": "one row, which everybody reads",
    "ingest_counter": "one row for each daemon",
    "rollup_progress": "one row, which everybody reads",
    "schema_migration": "one row for each SQL file",
}

# Every table with its primary key, unique constraints and indexes and exclusion constraints, if it has any. Each part
# of such a key is a column or an expression.
KEYS = """
SELECT c.oid::regclass::text, i.indexrelid::regclass::text, coalesce(i.indisprimary, false),
    ARRAY(SELECT pg_get_indexdef(i.indexrelid, part, true) FROM generate_series(1, i.indnkeyatts) AS part)
FROM pg_class AS c
LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> ALL (%s)
"""
PRIMARY_KEYS_OF_PARTITIONS = """
SELECT inhparent::regclass::text,
    (SELECT array_agg(attname ORDER BY place) FROM unnest(conkey) WITH ORDINALITY AS part (number, place)
     JOIN pg_attribute ON attrelid = conrelid AND attnum = part.number)
FROM pg_inherits JOIN pg_constraint ON conrelid = inhrelid AND contype = 'p'
"""


def faults(connection: psycopg.Connection) -> list[str]:
    """What would be in the way of distributing each table by the first column of its primary key."""
    keys = connection.execute(KEYS, ([*NOT_DISTRIBUTED],)).fetchall()
    columns = {table: parts[0] for table, _, primary, parts in keys if primary}
    found = []
    for table, key, _, parts in keys:
        column = columns.get(table)
        if column not in DEVICE:
            found.append(f"the primary key of {table} does not start with the device")
        elif not any(re.search(rf"\b{column}\b", part) for part in parts):
            found.append(f"{key} of {table} does not hold {column}")
    return found


def test_every_key_and_constraint_holds_the_device(database: str) -> None:
    ask(database, "SELECT ensure_history_partitions('meter_history', ARRAY['2026-11-20'::date, '2024-02-29'])")
    ask(database, "SELECT ensure_history_partitions('vehicle_history', ARRAY['2026-11-20'::date])")
    ask(database, "SELECT ensure_rollup_partitions('2026-11-20', '2026-11-21')")
    with psycopg.connect(database) as connection:
        assert faults(connection) == []
    tables = {name for (name,) in ask(database, "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p')")}
    assert set(NOT_DISTRIBUTED) < tables

    partitions = ask(database, PRIMARY_KEYS_OF_PARTITIONS)
    assert len(partitions) == 7
    assert dict(partitions) == {
        "meter_history": ["meter_id", "ts"],
        "vehicle_history": ["vehicle_id", "ts"],
        "meter_quarter_hour": ["meter_id", "quarter_hour"],
        "vehicle_quarter_hour": ["vehicle_id", "quarter_hour"],
        "charging_quarter_hour": ["vehicle_id", "quarter_hour", "first_ts"],
        "charging_two_hours": ["vehicle_id", "two_hours", "meter_id"],
    }


def test_a_key_without_the_device_is_noticed(database: str) -> None:
    cases = {
        "CREATE TABLE alarm (meter_id text)": "the primary key of alarm does not start with the device",
        "CREATE TABLE alarm (id bigint PRIMARY KEY)": "the primary key of alarm does not start with the device",
        "CREATE TABLE a (meter_id text PRIMARY KEY, at text UNIQUE)": "a_at_key of a does not hold meter_id",
        "CREATE UNIQUE INDEX once ON vehicle_live (meter_id)": "once of vehicle_live does not hold vehicle_id",
        "CREATE UNIQUE INDEX i ON dead_letter (topic) INCLUDE (device_id)": "i of dead_letter does not hold device_id",
        "ALTER TABLE charger_assignment ADD CONSTRAINT one EXCLUDE USING gist (valid WITH &&)": (
            "one of charger_assignment does not hold vehicle_id"
        ),
        "CREATE TABLE meter_history_late PARTITION OF meter_history (UNIQUE (voltage)) DEFAULT": (
            "meter_history_late_voltage_key of meter_history_late does not hold meter_id"
        ),
    }
    with psycopg.connect(database) as connection:
        for statement, fault in cases.items():
            connection.execute(statement)
            assert faults(connection) == [fault]
            connection.rollback()
