"""No question reads all of history: what PostgreSQL plans for it, and what it really touches."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.analytics.asking import connected
from tests.integration.harness import ask, cloned

DAYS = 10
PARTITION = re.compile(r"(?:meter|vehicle)_history_(\d{8})")
VEHICLE, METER = "VEH-3", "MTR-3"

# A reading a minute of five devices a side: vehicles charge 8 hours of 12, and name no meter otherwise.
FILL = f"""
SELECT ensure_history_partitions(history, ARRAY(
    SELECT (now() AT TIME ZONE 'UTC')::date + day FROM generate_series(-{DAYS}, 1) AS day
))
FROM unnest(ARRAY['meter_history', 'vehicle_history']::regclass[]) AS history;
CREATE TEMP TABLE told AS
SELECT ts, device, extract(hour FROM ts AT TIME ZONE 'UTC')::integer % 12 < 8 AS charging
FROM generate_series(date_trunc('minute', now()) - interval '{DAYS} days', now(), '1 minute') AS ts
CROSS JOIN generate_series(0, 4) AS device;
INSERT INTO meter_history SELECT 'MTR-' || device, ts, 0.1, 230, ts, false FROM told;
INSERT INTO vehicle_history
SELECT 'VEH-' || device, ts, 0.08, 50, 30, CASE WHEN charging THEN 'MTR-' || device END, ts, false FROM told;
INSERT INTO meter_live SELECT 'MTR-' || device, max(ts), 0.1, 230, max(ts) FROM told GROUP BY device;
INSERT INTO vehicle_live SELECT 'VEH-' || device, max(ts), 0.08, 50, 30, NULL, max(ts) FROM told GROUP BY device;
"""
# What is late: a vehicle and a meter of the window, and one long ago.
MARKS = """
INSERT INTO rollup_mark (device_id, kind, quarter_hours)
SELECT id, kind, tstzrange(quarter_hour, quarter_hour + interval '15 minutes')
FROM (
    VALUES ('VEH-3', 'vehicle', 5), ('MTR-3', 'meter', 9), ('MTR-4', 'meter', 9), ('VEH-3', 'vehicle', 200)
) AS late (id, kind, hours)
CROSS JOIN LATERAL date_bin('15 minutes', now() - make_interval(hours => hours), 'epoch') AS quarter_hour
"""


@pytest.fixture(scope="module")
def filled(postgres_dsn_admin: str, template: str) -> Iterator[str]:
    """The DSN of a database with days of history, all closed quarter hours rolled up, and some marks."""
    with cloned(postgres_dsn_admin, template) as dsn:
        ask(dsn, FILL)
        ask(dsn, "SELECT rollup_advance(now() - interval '20 minutes')")
        ask(dsn, "SELECT rollup_refresh('30 days')")
        ask(dsn, MARKS)
        ask(dsn, "VACUUM ANALYZE")
        yield dsn


# --- what is asked -----------------------------------------------------------------------------------------

DAY = timedelta(days=1)
NONE = (timedelta(), timedelta())
# The question, and from how long to how long ago it may read: sessions are whole, so they begin before the window.
QUESTIONS = {
    "vehicle_performance": (f"SELECT * FROM vehicle_performance('{VEHICLE}')", (DAY, -DAY)),
    "vehicle_performance, long ago": (
        f"SELECT * FROM vehicle_performance('{VEHICLE}', now() - interval '80 hours', now() - interval '79 hours')",
        (timedelta(hours=80), timedelta(hours=79)),
    ),
    "vehicle_status": (f"SELECT * FROM vehicle_status WHERE vehicle_id = '{VEHICLE}'", NONE),
    "meter_status": (f"SELECT * FROM meter_status WHERE meter_id = '{METER}'", NONE),
    "fleet_inefficient": ("SELECT * FROM fleet_inefficient", (DAY + timedelta(minutes=17), timedelta())),
    "charging_sessions": (f"SELECT * FROM charging_sessions('{VEHICLE}', now() - interval '3 days')", (4 * DAY, -DAY)),
    # Whenever the window begins, the look back ends where the vehicle was silent: steps of fixed length went by it.
    **{
        f"charging_sessions, {hours} h earlier": (
            f"SELECT * FROM charging_sessions('{VEHICLE}', now() - interval '{72 + hours} hours')",
            (timedelta(hours=72 + hours) + DAY, -DAY),
        )
        for hours in range(1, 6)
    },
    "charger_performance": (f"SELECT * FROM charger_performance('{METER}')", (DAY, -DAY)),
    "charger_vehicles": (f"SELECT * FROM charger_vehicles('{METER}')", (DAY, -DAY)),
    "charger_vehicles, long ago": (
        f"SELECT * FROM charger_vehicles('{METER}', now() - interval '82 hours', now() - interval '70 hours')",
        (timedelta(hours=82), timedelta(hours=70)),
    ),
    "charger_sessions": (f"SELECT * FROM charger_sessions('{METER}', now() - interval '3 days')", (4 * DAY, -DAY)),
    "vehicle_efficiency_by_hour": (
        f"SELECT * FROM vehicle_efficiency_by_hour('{VEHICLE}', now() - interval '1 day')",
        (DAY, -DAY),
    ),
    "fleet_faults": ("SELECT * FROM fleet_faults(now() - interval '1 day')", (DAY, -DAY)),
    "fleet_now": ("SELECT * FROM fleet_now", NONE),
    "charging_session": (f"SELECT * FROM charging_session WHERE vehicle_id = '{VEHICLE}'", (DAYS * DAY, -DAY)),
}


def allowed(connection: psycopg.Connection[Any], span: tuple[timedelta, timedelta]) -> set[date]:
    """The days (UTC) from so long to so long ago."""
    if span == NONE:
        return set()
    ((now,),) = connection.execute("SELECT now()").fetchall()
    first, last = ((now - ago).astimezone(UTC).date() for ago in span)
    return {first + number * DAY for number in range((last - first).days + 1)}


def day_of(partition: str) -> date | None:
    found = PARTITION.fullmatch(partition)
    return datetime.strptime(found[1], "%Y%m%d").date() if found else None  # noqa: DTZ007 - a day of UTC


# --- what is touched ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_touches_its_window_alone(filled: str, question: str) -> None:
    query, span = QUESTIONS[question]
    with connected(filled) as connection:
        # A new connection in its first transaction: nothing is counted yet. Only the answer is looked at twice.
        assert connection.execute(query).fetchall()
        touched = connection.execute(
            "SELECT relname, seq_scan, coalesce(idx_scan, 0) FROM pg_stat_xact_user_tables "
            "WHERE seq_scan > 0 OR idx_scan > 0"
        ).fetchall()
        days = allowed(connection, span)
    history = {name: day for name, _, _ in touched if (day := day_of(name))}
    assert {name for name, seq, _ in touched if seq and name in history} == set(), "read from one end to the other"
    assert {name for name, day in history.items() if day not in days} == set(), "outside the window"
    # Or nothing would be counted at all.
    assert touched


# --- what is planned ---------------------------------------------------------------------------------------

SINCE, UNTIL = "now() - interval '24 hours 7 minutes 3 seconds'", "now() + interval '5 minutes'"
PIECE = f"ARRAY['{VEHICLE}'], ARRAY[{SINCE}], ARRAY[{UNTIL}]"
# The functions behind the questions: those that others call here stand for themselves.
CALLS = {
    "vehicle_performance": f"'{VEHICLE}', {SINCE}, {UNTIL}",
    "vehicle_quarters": f"'{VEHICLE}', {SINCE}, {UNTIL}",
    "vehicle_runs": f"'{VEHICLE}', {SINCE}, {UNTIL}",
    "fleet_charging": f"{SINCE}, {UNTIL}",
    "charging_sessions": f"'{VEHICLE}', {SINCE}, {UNTIL}",
    "meter_vehicles": f"'{METER}', {SINCE}, {UNTIL}",
    "vehicle_quarters_of": PIECE,
    "charging_of": PIECE,
    "charging_between": f"{SINCE}, {UNTIL}",
}
# These read history themselves, whatever is rolled up.
READ_HISTORY = {"meter_vehicles", "vehicle_quarters_of", "charging_of", "charging_between"}


def explaining(definition: str) -> str:
    """A function that returns the plans of the statements whose rows the given one returns, run as it runs them."""
    altered = definition.replace("CREATE OR REPLACE FUNCTION public.", "CREATE FUNCTION explaining.")
    altered = re.sub(r"\n RETURNS (TABLE\(.*\)|SETOF \w+)\n", "\n RETURNS SETOF json\n", altered, count=1)
    # PostgreSQL explains in volatile functions only; planning is the same.
    altered = altered.replace(" STABLE ", " ", 1)
    # It keeps its name, which its statements use for its parameters.
    altered, number = re.subn(r"\bRETURN QUERY\b", "RETURN QUERY EXPLAIN (ANALYZE, FORMAT JSON)", altered)
    assert number
    return altered


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


@pytest.mark.parametrize("name", CALLS)
def test_no_plan_reads_a_whole_partition_or_another_day(filled: str, name: str) -> None:
    with psycopg.connect(filled) as connection:
        ((definition,),) = connection.execute("SELECT pg_get_functiondef(%s::regproc)", (name,)).fetchall()
        connection.execute("CREATE SCHEMA explaining")
        connection.execute(explaining(definition))
        plans = [plan for (plan,) in connection.execute(f"SELECT * FROM explaining.{name}({CALLS[name]})")]
        days = allowed(connection, (DAY + timedelta(minutes=8), -timedelta(minutes=5)))
        connection.rollback()
    scans = [node for (plan,) in plans for node in nodes(plan["Plan"]) if day_of(node.get("Relation Name", ""))]
    shown = json.dumps(plans, indent=1)
    assert [node for node in scans if node["Node Type"] == "Seq Scan"] == [], shown
    assert {node["Relation Name"] for node in scans if day_of(node["Relation Name"]) not in days} == set(), shown
    assert scans or name not in READ_HISTORY, shown
