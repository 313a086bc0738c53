"""Whatever is stored in whatever order, and however far the rollups are: every answer is the naive one."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.batch import Batch
from bridge.config import Database
from bridge.messages import MeterReading, Reading, VehicleReading, microseconds
from bridge.store import Store
from bridge.topics import Topics
from tests.analytics.asking import Comparison, close, connected
from tests.analytics.naive import ALWAYS, FOREVER, floor

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
# The naming rules below reach some of them; an underscore is no wildcard.
VEHICLES = ["VEH-1", "VEH-2", "VEH_3", "CAR-4", "CAR-5"]
METERS = ["MTR-1", "MTR-2", "MTR-3", "BOX-4"]
UNKNOWN_VEHICLE, SILENT_METER = "VEH-9", "MTR-9"
ROLLUPS = ("meter_quarter_hour", "vehicle_quarter_hour", "charging_quarter_hour", "charging_two_hours")


# --- what may happen ---------------------------------------------------------------------------------------


class Stay(NamedTuple):
    """Readings of a vehicle, a meter, or a vehicle at a meter; times in seconds, since the beginning or as they last.

    Energies are multiples of 1/256 kWh, so that no sum of doubles is rounded and every comparison is exact.
    """

    vehicle: str | None
    meter: str | None
    names: bool
    """Whether the vehicle names the meter."""
    reports: bool
    """Whether the meter has readings as well."""
    starts: float
    readings: int
    every: float
    ahead: float
    """How much earlier than the vehicle the meter speaks."""
    ac: int
    dc: int
    step: int
    delay: float
    """From timestamp to arrival."""
    from_arrival: bool

    def made(self, begin: datetime) -> Iterator[Reading]:
        delay = timedelta(seconds=0 if self.from_arrival else self.delay)
        for number in range(self.readings):
            moment = begin + timedelta(seconds=self.starts) + number * timedelta(seconds=self.every)
            if self.vehicle:
                ts, received_at = microseconds(moment), microseconds(moment + delay)
                kwh, soc, temp = (self.dc + number * self.step) % 97 / 256, number * 4.25, 25 + number * 7 % 16 / 4
                named = self.meter if self.names else None
                yield VehicleReading(self.vehicle, ts, kwh, soc, temp, named, received_at, self.from_arrival)
            if self.meter and self.reports:
                earlier = moment - timedelta(seconds=self.ahead)
                ts, received_at = microseconds(earlier), microseconds(earlier + delay)
                kwh = (self.ac + number * self.step) % 97 / 256
                yield MeterReading(self.meter, ts, kwh, 230.0, received_at, self.from_arrival)


class Write(NamedTuple):
    """One batch."""

    stays: list[Stay]


class Advance(NamedTuple):
    """Moves the watermark."""

    to: float


class Refresh(NamedTuple):
    """Steps of the rollups; where it crashes, one that is rolled back."""

    longest: float
    most_marks: int
    times: int
    crashes: bool


class Restart(NamedTuple):
    since: float | None


class Alter(NamedTuple):
    """A statement that changes settings or assignments; its parameters are moments."""

    statement: str
    moments: tuple[float, ...] = ()


class Ask(NamedTuple):
    windows: list[tuple[float, float]]


Step = Write | Advance | Refresh | Restart | Alter | Ask

MINUTE, HOUR = 60, 3_600
SPAN = 27 * HOUR
ALWAYS_AGO, FOREVER_ON = -1e9, 1e9
"""Edges of windows that stand for -infinity and infinity."""

# Few places in time, so that devices meet: hours apart, and at the end, where some of it is ahead of now.
places = st.builds(
    lambda place, minute, second: place * MINUTE + minute * MINUTE + second,
    st.sampled_from([0, 0, 50, 50, 9 * 60, 26 * 60 + 50]),
    st.integers(0, 14),
    st.sampled_from([0, 0, 0, 30, 59.999999, 20, 7]),
)
stays = st.builds(
    Stay,
    vehicle=st.sampled_from([None, *VEHICLES, *VEHICLES, "VEH-1"]),
    meter=st.sampled_from([None, *METERS, *METERS, "MTR-1", "MTR-2", SILENT_METER]),
    names=st.sampled_from([True, True, False]),
    reports=st.sampled_from([True, True, False]),
    starts=places,
    readings=st.integers(1, 20),
    every=st.sampled_from([60, 20, 7, 61, 30, 300, 900, 900.000001, 3_600]),
    ahead=st.sampled_from([0, 0, 0, 3, 60]),
    ac=st.sampled_from([96, 96, 80, 0, 5]),
    dc=st.sampled_from([80, 80, 96, 40, 0]),
    step=st.sampled_from([0, 0, 1, 13]),
    delay=st.sampled_from([1, 0, -3, 120, 120.000001, 7_200, 90_000]),
    from_arrival=st.sampled_from([False, False, False, True]),
)


def some(strategy: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    """About three quarters of so many, and less where that shows the same failure."""
    mostly = st.one_of(st.none(), strategy, strategy, strategy)
    return st.lists(mostly, min_size=most, max_size=most).map(lambda drawn: [item for item in drawn if item])


def assign(vehicle: str, meter: str, since: float, length: float) -> Alter:
    statement = f"""
        INSERT INTO charger_assignment (vehicle_id, meter_id, valid)
        SELECT '{vehicle}', '{meter}', asked.valid
        FROM (SELECT tstzrange(%s, %s) AS valid) AS asked
        WHERE NOT EXISTS (
            SELECT FROM charger_assignment AS known WHERE known.vehicle_id = '{vehicle}' AND known.valid && asked.valid
        )"""
    return Alter(" ".join(statement.split()), (since, since + length))


# The first ones have all rollups made again.
changes = (
    "vehicle_prefix = 'VEH-', meter_prefix = 'MTR-'",
    "vehicle_prefix = 'VEH_', meter_prefix = 'MTR-'",
    "vehicle_prefix = 'CAR-', meter_prefix = 'BOX-'",
    "vehicle_prefix = NULL, meter_prefix = NULL",
    "late_after = '1 second'",
    "late_after = '3 hours'",
    "session_gap = '1 hour', reading_interval = '5 minutes'",
    "session_gap = '15 minutes', reading_interval = '20 seconds'",
    "efficiency_least_kwh = 0.375, inefficient_least_kwh = 0.25",
    "efficiency_least_kwh = 3, inefficient_least_kwh = 5",
    "inefficient_below = 0.5, inefficient_least_kwh = 0.75",
)
alters = st.sampled_from([Alter(f"UPDATE analytics_setting SET {change}") for change in changes])
assignments = st.one_of(
    st.builds(
        assign,
        st.sampled_from(VEHICLES),
        st.sampled_from(METERS),
        places,
        st.sampled_from([7 * MINUTE, 90, HOUR, 10 * HOUR, FOREVER_ON]),
    ),
    st.builds(
        lambda vehicle, change: Alter(f"{change} WHERE vehicle_id = '{vehicle}'"),
        st.sampled_from(VEHICLES),
        st.sampled_from(
            [
                "DELETE FROM charger_assignment",
                "UPDATE charger_assignment SET meter_id = 'MTR-2'",
                "UPDATE charger_assignment SET valid = tstzrange(lower(valid), lower(valid) + '61 seconds', '[]')",
            ]
        ),
    ),
)
refreshes = st.builds(
    Refresh,
    longest=st.sampled_from([50 * HOUR, 12 * HOUR, HOUR]),
    most_marks=st.sampled_from([1_000, 1, 3]),
    times=st.integers(1, 3),
    crashes=st.sampled_from([False, False, False, True]),
)
advances = st.builds(Advance, st.one_of(st.just(SPAN), places))
restarts = st.builds(Restart, st.none() | places)
moments = st.one_of(places, places, places.map(lambda place: place - place % (15 * MINUTE)))
windows = st.one_of(
    st.tuples(moments, moments).map(sorted).map(tuple),
    st.tuples(moments, st.sampled_from([20, 60, HOUR, 26 * HOUR, 0])).map(lambda window: (window[0], sum(window))),
    moments.map(lambda moment: (ALWAYS_AGO, moment)),
    moments.map(lambda moment: (moment, FOREVER_ON)),
    st.just((ALWAYS_AGO, FOREVER_ON)),
)
asks = st.builds(Ask, st.lists(windows, min_size=1, max_size=2))
batches = st.builds(Write, some(stays, 6))
# What follows happens to rollups that hold something.
rolled_up = st.tuples(advances, st.just(Refresh(longest=50 * HOUR, most_marks=1_000, times=1, crashes=False)))
later = st.one_of(batches, assignments, batches, assignments, asks, asks, asks, refreshes, advances, restarts, alters)
stories = st.tuples(
    some(stays, 20).map(Write),
    some(alters, 2),
    some(assignments, 2),
    rolled_up,
    some(later, 16),
).map(lambda parts: [parts[0], *chain(*parts[1:])])


# --- what happens ------------------------------------------------------------------------------------------


class World:
    """A database in which a story happens; the simulated time ends now."""

    def __init__(self, dsn: str, runner: asyncio.Runner, connection: psycopg.Connection[Any]) -> None:
        self._store = Store(Database(dsn=dsn), "test")
        self._runner = runner
        self._connection = connection
        # A few minutes of it are ahead of now, as clocks may be.
        self._begin = floor(datetime.now(UTC), timedelta(hours=1)) - timedelta(seconds=SPAN - HOUR)

    def close(self) -> None:
        self._runner.run(self._store.close())

    def moment(self, place: float) -> datetime:
        if abs(place) >= FOREVER_ON:
            return FOREVER if place > 0 else ALWAYS
        return self._begin + timedelta(seconds=place)

    def happen(self, step: Step) -> None:
        match step:
            case Write(stays):
                batch = Batch(TOPICS)
                for stay in stays:
                    for reading in stay.made(self._begin):
                        batch.add_reading(reading)
                self._runner.run(self._store.write(batch))
            case Advance(to):
                self._execute("SELECT rollup_advance(%s)", self.moment(to))
            case Refresh():
                self._refresh(step)
            case Restart(since):
                self._execute("SELECT rollup_restart(%s)", self.moment(ALWAYS_AGO if since is None else since))
            case Alter(statement, moments):
                self._execute(statement, *(self.moment(place) for place in moments))
            case Ask(windows):
                self.check(windows)

    def check(self, windows: list[tuple[float, float]]) -> None:
        with self._connection.transaction():
            comparison = Comparison(self._connection)
            for number, (since, until) in enumerate(windows):
                # Each device by itself takes most of the time: some of them.
                vehicles = [VEHICLES[number], VEHICLES[-number - 1], UNKNOWN_VEHICLE]
                meters = [METERS[number], METERS[-number - 1], SILENT_METER]
                comparison.window(self.moment(since), self.moment(until), vehicles, meters)
            comparison.views()
        assert not comparison.differences, "\n".join(comparison.differences)

    def rollups(self) -> dict[str, list[tuple[Any, ...]]]:
        with self._connection.transaction():
            return {table: self._connection.execute(f"TABLE {table} ORDER BY 1, 2, 3").fetchall() for table in ROLLUPS}

    def finish(self) -> None:
        """Refreshes to the end."""
        for _ in range(500):
            ((complete_until, late_before, marks_left),) = self._execute("SELECT * FROM rollup_refresh('1 day')")
            if complete_until == late_before and marks_left == 0:
                return
        raise AssertionError("rollup_refresh comes to no end")

    def _refresh(self, step: Refresh) -> None:
        before = self.rollups() if step.crashes else None
        with self._connection.transaction(force_rollback=step.crashes):
            self._connection.execute(
                "SELECT * FROM rollup_refresh(%s, %s)", (timedelta(seconds=step.longest), step.most_marks)
            )
        if before:
            assert self.rollups() == before
            return
        for _ in range(step.times - 1):
            self._execute("SELECT * FROM rollup_refresh(%s, %s)", timedelta(seconds=step.longest), step.most_marks)

    def _execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        values = [{ALWAYS: "-infinity", FOREVER: "infinity"}.get(value, value) for value in parameters]
        with self._connection.transaction():
            # Not as tests ask: it has to see what is committed while it waits.
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor = self._connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def world(admin: str, template: str) -> Iterator[World]:
    name = f"wattbridge_story_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(admin, autocommit=True) as connection:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        dsn = make_conninfo(admin, dbname=name)
        try:
            with asyncio.Runner() as runner, connected(dsn) as asking:
                made = World(dsn, runner, asking)
                try:
                    yield made
                finally:
                    made.close()
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def at(vehicle: str | None, meter: str | None, starts: float = 0, **changes: Any) -> Stay:
    """Four readings, one a minute, that are matched where nobody else is there."""
    usual = Stay(vehicle, meter, names=True, reports=True, starts=starts, readings=4, every=60, ahead=0, ac=96, dc=80,
                 step=0, delay=1, from_arrival=False)  # fmt: skip
    return usual._replace(**changes)


ROLLED_UP = [Advance(SPAN), Refresh(longest=50 * HOUR, most_marks=1_000, times=1, crashes=False)]
EVERYTHING = Ask([(ALWAYS_AGO, FOREVER_ON), (0, 2 * HOUR)])
NAMING_RULE = Alter("UPDATE analytics_setting SET vehicle_prefix = 'VEH-', meter_prefix = 'MTR-'")

# What chance finds too seldom. Each begins with what is rolled up already.
TOLD = {
    "a late vehicle makes the minutes of another shared": [
        *(Write([at("VEH-1", "MTR-1")]), *ROLLED_UP),
        Write([at("VEH-2", "MTR-1", reports=False)]),
    ],
    "the rollups end within an hour": [
        Write([at("VEH-1", "MTR-1", readings=110), at("VEH-2", "MTR-2", readings=110, reports=False)]),
        *(Advance(75 * MINUTE), ROLLED_UP[1]),
        EVERYTHING,
        Write([at(None, "MTR-2", starts=20, readings=110), at("CAR-4", "MTR-1", starts=10 * MINUTE)]),
    ],
    "whom an assignment puts at a meter shares its minutes": [
        Write([at("VEH-1", "MTR-1"), at("CAR-4", None)]),
        *(assign("CAR-4", "MTR-1", 0, HOUR), *ROLLED_UP),
        Write([at("VEH-1", "MTR-1", starts=20)]),
    ],
    "whom the naming rule puts at a meter shares its minutes": [
        *(NAMING_RULE, Write([at("CAR-4", "MTR-1"), at("VEH-1", None)]), *ROLLED_UP),
        Write([at("CAR-4", "MTR-1", starts=20)]),
    ],
    "a late meter makes minutes matched": [
        *(Write([at("VEH-1", "MTR-1", reports=False)]), *ROLLED_UP),
        Write([at(None, "MTR-1", starts=20)]),
    ],
    "whoever is assigned a meter leaves that of the naming rule": [
        *(NAMING_RULE, Write([at("VEH-1", "MTR-1", names=False), at("CAR-4", "MTR-1", reports=False)]), *ROLLED_UP),
        *(assign("VEH-1", "BOX-4", 0, HOUR), EVERYTHING, *ROLLED_UP),
        Alter("UPDATE charger_assignment SET valid = tstzrange(lower(valid), lower(valid) + '61 seconds', '[]')"),
        *(EVERYTHING, *ROLLED_UP),
        Alter("DELETE FROM charger_assignment"),
    ],
    "the meter of an assignment changes, and then it is gone": [
        Write([at("VEH-1", None), at("CAR-4", "MTR-1"), at("CAR-5", "MTR-2")]),
        *(assign("VEH-1", "MTR-1", 0, HOUR), *ROLLED_UP),
        *(Alter("UPDATE charger_assignment SET meter_id = 'MTR-2'"), EVERYTHING, *ROLLED_UP),
        Alter("TRUNCATE charger_assignment"),
    ],
    "an underscore in a naming rule is no wildcard": [
        Alter("UPDATE analytics_setting SET vehicle_prefix = 'VEH_', meter_prefix = 'MTR-'"),
        Write([at("VEH-1", "MTR-1", names=False), at("VEH_3", "MTR-3", names=False)]),
        *ROLLED_UP,
    ],
    "there and back within a minute": [
        Write([at("VEH-1", "MTR-1", every=20), at("VEH-1", "MTR-2", starts=7, every=20)]),
        *ROLLED_UP,
    ],
    "a session is whole where the window begins within its first minute": [
        *(Write([at("VEH-1", "MTR-1", starts=40, ahead=30)]), *ROLLED_UP),
        Ask([(30, 150), (100, HOUR)]),
    ],
    "a gap that does and one that does not end a session": [
        Write([at("VEH-1", "MTR-1", every=900), at("VEH-2", "MTR-2", every=900.000001)]),
        *ROLLED_UP,
    ],
    "a late vehicle was at a meter whose mark is done with already": [
        *(Write([at("VEH-1", "MTR-1"), at(None, "MTR-1", starts=2 * HOUR)]), *ROLLED_UP),
        Write([at("VEH-2", "MTR-1", starts=2 * HOUR, reports=False)]),
        # As by a step of one mark: at the meter nothing has changed but who was there.
        *(Alter("DELETE FROM rollup_mark WHERE kind = 'meter'"), Ask([(ALWAYS_AGO, FOREVER_ON), (HOUR, 3 * HOUR)])),
    ],
    "a session reaches over a window without readings": [
        Alter("UPDATE analytics_setting SET session_gap = '1 hour'"),
        *(Write([at("VEH-1", "MTR-1", every=3_600)]), *ROLLED_UP, Ask([(10 * MINUTE, 20 * MINUTE)])),
    ],
    "an hour of the zone begins at a quarter past": [
        Alter("UPDATE analytics_setting SET time_zone = 'Asia/Kathmandu'"),
        *(Write([at("VEH-1", "MTR-1", readings=20, every=300)]), *ROLLED_UP),
    ],
    "late by nothing, and by a little": [
        Write([at("VEH-1", "MTR-1", delay=120), at("VEH-2", "MTR-2", delay=120.000001)]),
        *(*ROLLED_UP, EVERYTHING, Alter("UPDATE analytics_setting SET late_after = '1 second'"), *ROLLED_UP),
    ],
    "thresholds are met": [
        Alter("UPDATE analytics_setting SET efficiency_least_kwh = 1.5, inefficient_least_kwh = 1.5"),
        Write([at("VEH-1", "MTR-1", starts=26 * HOUR), at("VEH-2", "MTR-2", starts=26 * HOUR, dc=96)]),
        Alter("UPDATE analytics_setting SET inefficient_below = 1"),
        Write([at("VEH_3", "MTR-3", starts=26 * HOUR, ac=95), at("CAR-4", "BOX-4", starts=26 * HOUR, ac=80, dc=81)]),
        *(*ROLLED_UP, EVERYTHING, Alter("UPDATE analytics_setting SET inefficient_least_kwh = 1")),
    ],
}


@pytest.mark.parametrize("what", TOLD)
def test_what_chance_finds_too_seldom(postgres_dsn_admin: str, template: str, what: str) -> None:
    with world(postgres_dsn_admin, template) as happening:
        for step in [*TOLD[what], EVERYTHING]:
            happening.happen(step)
        check_rollups(happening, EVERYTHING)


# A failure takes up to five minutes longer: Hypothesis looks for a shorter story.
@pytest.mark.timeout(600)
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=10,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(stories, asks)
def test_every_answer_is_the_naive_one(postgres_dsn_admin: str, template: str, story: list[Step], last: Ask) -> None:
    with world(postgres_dsn_admin, template) as happening:
        for step in story:
            happening.happen(step)
        happening.happen(last)

        check_rollups(happening, last)


def check_rollups(happening: World, last: Ask) -> None:
    """However they came about, they are those that are made of history at once."""
    happening.happen(Advance(SPAN))
    happening.finish()
    happening.happen(last)
    incremental = happening.rollups()
    happening.finish()
    assert happening.rollups() == incremental, "refreshing again changed something"

    happening.happen(Restart(None))
    happening.happen(last)
    happening.finish()
    assert alike(happening.rollups(), incremental), "rebuilt is not the same as incremental"


def alike(some: dict[str, list[Any]], others: dict[str, list[Any]]) -> bool:
    return all(
        len(some[table]) == len(others[table])
        and all(
            close(a, b)
            for one, other in zip(some[table], others[table], strict=True)
            for a, b in zip(one, other, strict=True)
        )
        for table in ROLLUPS
    )
