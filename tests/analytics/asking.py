"""Asks the analytics in SQL and compares them with the naive answers, within one transaction."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.rows import dict_row
from psycopg.types.datetime import TimestamptzLoader

from tests.analytics.naive import ALWAYS, FOREVER, QUARTER_HOUR, Row, floor, read

TOLERANCE = 1e-9
DAY = timedelta(days=1)


class InfinityLoader(TimestamptzLoader):
    """Python has no infinite datetime; the first and the last stand for it."""

    def load(self, data: Buffer) -> datetime:
        infinite = {b"infinity": FOREVER, b"-infinity": ALWAYS}.get(bytes(data))
        return infinite or super().load(data)


@contextmanager
def connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection for questions: each transaction sees one moment, and timestamps may be infinite."""
    with psycopg.connect(dsn, options="-c TimeZone=UTC") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.adapters.register_loader("timestamptz", InfinityLoader)
        yield connection


def rows(connection: psycopg.Connection[Any], query: str, *parameters: object) -> list[Row]:
    values = [bound(value) if isinstance(value, datetime) else value for value in parameters]
    return connection.cursor(row_factory=dict_row).execute(query, values or None).fetchall()


def bound(moment: datetime) -> str:
    return {FOREVER: "infinity", ALWAYS: "-infinity"}.get(moment, moment.isoformat())


class Comparison:
    """All that one transaction can be asked, against the naive answers; collects what differs."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.naive = read(connection)
        ((self.now,),) = connection.execute("SELECT now()").fetchall()
        self.differences: list[str] = []

    def same(self, what: str, found: Sequence[Row], expected: Sequence[Row], *keys: str) -> None:
        """Notes where the rows differ; with keys they are in no promised order, and are sorted by them."""
        if keys:
            found = sorted(found, key=lambda row: [row[key] for key in keys])
            expected = sorted(expected, key=lambda row: [row[key] for key in keys])
        if len(found) != len(expected):
            self.differences.append(f"{what}: {len(found)} rows instead of {len(expected)}\n  {found}\n  {expected}")
            return
        for one, other in zip(found, expected, strict=True):
            wrong = [
                f"{name} = {one.get(name, 'missing')!r} instead of {other.get(name, 'nothing')!r}"
                for name in sorted(one.keys() | other.keys())
                if name not in one or name not in other or not close(one[name], other[name])
            ]
            if wrong:
                key = {name: value for name, value in other.items() if isinstance(value, str | datetime)}
                self.differences.append(f"{what}: {'; '.join(wrong)}, of {key}")

    def window(self, since: datetime, until: datetime, vehicles: Iterable[str], meters: Iterable[str]) -> None:
        part = self.naive.window(since, until)
        span = f"{bound(since)}, {bound(until)}"

        def ask(call: str, *parameters: object) -> list[Row]:
            return rows(self.connection, f"SELECT * FROM {call}", *parameters, since, until)

        found = ask("fleet_performance(%s, %s)")
        self.same(f"fleet_performance({span})", found, part.fleet_performance(), "vehicle_id")
        self.same(f"fleet_chargers({span})", ask("fleet_chargers(%s, %s)"), part.fleet_chargers(), "meter_id")
        for vehicle in vehicles:
            found = ask("vehicle_performance(%s, %s, %s)", vehicle)
            self.same(f"vehicle_performance({vehicle}, {span})", found, [part.vehicle_performance(vehicle)])
            found = ask("vehicle_efficiency_by_hour(%s, %s, %s)", vehicle)
            self.same(f"vehicle_efficiency_by_hour({vehicle}, {span})", found, part.efficiency_by_hour(vehicle))
        self.same(f"fleet_faults({span})", ask("fleet_faults(%s, %s)"), part.fleet_faults())
        for meter in meters:
            found = ask("charger_performance(%s, %s, %s)", meter)
            self.same(f"charger_performance({meter}, {span})", found, [part.charger_performance(meter)])
            found = ask("charger_vehicles(%s, %s, %s)", meter)
            self.same(f"charger_vehicles({meter}, {span})", found, part.charger_vehicles(meter))
        self._quarters(span, ask, "vehicle", part.vehicle_quarters(), vehicles)
        self._quarters(span, ask, "meter", part.meter_quarters(), meters)

        sessions = [row for row in self.sessions if since < until and row["started"] < until and row["ended"] >= since]
        self.same(f"charging_sessions(NULL, {span})", ask("charging_sessions(NULL, %s, %s)"), sessions)
        for vehicle in vehicles:
            own = [row for row in sessions if row["vehicle_id"] == vehicle]
            self.same(f"charging_sessions({vehicle}, {span})", ask("charging_sessions(%s, %s, %s)", vehicle), own)
        for meter in meters:
            own = [row for row in sessions if row["meter_id"] == meter]
            self.same(f"charger_sessions({meter}, {span})", ask("charger_sessions(%s, %s, %s)", meter), own)

    def _quarters(self, span: str, ask: Any, kind: str, expected: list[Row], devices: Iterable[str]) -> None:
        key = f"{kind}_id"
        for device in (None, *devices):
            own = [row for row in expected if device in (None, row[key])]
            found = ask(f"{kind}_quarters(%s, %s, %s)", device)
            self.same(f"{kind}_quarters({device}, {span})", found, own, key, "quarter_hour")

    def views(self) -> None:
        """Views without parameters: the last 24 hours, and all sessions."""
        since = self.now - DAY
        expected = [row | {"since": since} for row in self.naive.window(since, FOREVER).fleet_performance()]
        self._view("vehicle_performance_24h", expected, "vehicle_id")

        until = floor(self.now - self.naive.settings["late_after"], QUARTER_HOUR)
        closed = {"since": until - DAY, "until": until}
        part = self.naive.window(**closed)
        self._view("charger_performance_24h", [closed | row for row in part.fleet_chargers()], "meter_id")
        self._view("fleet_summary_24h", [closed | part.fleet_summary()])
        self._view("fleet_inefficient", [closed | row for row in part.fleet_inefficient()])
        self._view("charging_session", self.sessions, "vehicle_id", "started")

    def _view(self, name: str, expected: list[Row], *keys: str) -> None:
        self.same(name, rows(self.connection, f"SELECT * FROM {name}"), expected, *keys)

    @property
    def sessions(self) -> list[Row]:
        return self.naive.sessions()


def close(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(found) is type(expected) and found == expected
