"""How fast the analytics answer, and what keeping their rollups current costs: a private PostgreSQL, a simulated fleet.

The readings are those of the simulator's fleet and end now; before each query is measured, history and rollups are
brought to now again, as if the daemon ran. Five databases of one server:

history   --days days of --devices meters and as many vehicles, --long-days days of --long meters and as many vehicles
day       the last 24 hours of the same fleet alone
fleet     25 hours of --fleet meters and as many vehicles
ingest    --ingest meters and as many vehicles, whose readings the daemon's own store writes, by a simulated clock
"""

import argparse
import asyncio
import gc
import math
import os
import platform
import random
import struct
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.types.string import TextLoader
from pydantic import SecretStr
from rig import SETTINGS, cpu_seconds

from bridge.batch import Batch
from bridge.config import Database, TopicTemplates
from bridge.messages import MeterReading, Reading, VehicleReading
from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres
from bridge.store import COPY_HEADER, COPY_TRAILER, POSTGRES_EPOCH, Store
from simulator.fleet import Fleet, FleetConfig
from simulator.messages import EPOCH, TICKS_PER_KWH
from simulator.messages import Reading as Said

METER_ROW = struct.Struct(">hi10siqididiqi?").pack
VEHICLE_ROW = struct.Struct(">hi10siqidididiiqi?").pack
PLUGGED_ROW = struct.Struct(">hi10siqidididi10siqi?").pack
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
QUARTER_HOUR = timedelta(minutes=15)
LATE_AFTER = timedelta(minutes=2)  # the default of analytics_setting.late_after
LATE_AGE = timedelta(hours=6)
LATE_SHARE = 0.01
BATCH = 400  # 2,000 readings a second, a batch every 200 ms
TRAVEL_US = 300_000  # from timestamp to arrival
LONGEST_MEASUREMENT = 60.0  # seconds; slow queries are repeated less often
INDEXES = """
SELECT indexrelid::regclass::text, replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON ')
FROM pg_index
WHERE indrelid IN ('meter_history'::regclass, 'vehicle_history'::regclass) AND NOT indisprimary
"""
LIVE = """
INSERT INTO meter_live AS live
SELECT DISTINCT ON (meter_id) meter_id, ts, kwh_ac, voltage, received_at
FROM meter_history WHERE ts >= %(since)s ORDER BY meter_id, ts DESC
ON CONFLICT (meter_id) DO UPDATE
SET ts = excluded.ts, kwh_ac = excluded.kwh_ac, voltage = excluded.voltage, received_at = excluded.received_at;

INSERT INTO vehicle_live AS live
SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at
FROM vehicle_history WHERE ts >= %(since)s ORDER BY vehicle_id, ts DESC
ON CONFLICT (vehicle_id) DO UPDATE
SET ts = excluded.ts, kwh_dc = excluded.kwh_dc, soc = excluded.soc, battery_temp = excluded.battery_temp,
    meter_id = excluded.meter_id, received_at = excluded.received_at;

INSERT INTO device_presence
SELECT meter_id, 'meter', true, received_at FROM meter_live
UNION ALL SELECT vehicle_id, 'vehicle', true, received_at FROM vehicle_live
ON CONFLICT DO NOTHING
"""


class Target:
    """A database to fill; `since` is where its history begins."""

    def __init__(self, dsn: str, since: datetime) -> None:
        migrate(dsn)
        self.dsn, self.since = dsn, since
        # Two connections, as both histories are copied at once.
        self.meters, self.vehicles = (psycopg.connect(dsn, autocommit=True) for _ in range(2))

    def make_partitions(self, since: datetime, until: datetime) -> None:
        days = [since.date() + timedelta(days=day) for day in range((until.date() - since.date()).days + 1)]
        for table in ("meter_history", "vehicle_history"):
            self.meters.execute("SELECT ensure_history_partitions(%s::regclass, %s::date[])", (table, days))

    def open_copies(self, stack: ExitStack) -> list[psycopg.Copy]:
        """Where rows for meter_history and for vehicle_history go."""
        files = []
        for kind, connection in (("meter", self.meters), ("vehicle", self.vehicles)):
            cursor = stack.enter_context(connection.cursor())
            files.append(stack.enter_context(cursor.copy(f"COPY {kind}_history FROM STDIN (FORMAT BINARY)")))
            files[-1].write(COPY_HEADER)
        return files

    @contextmanager
    def without_indexes(self) -> Iterator[None]:
        """Makes the indexes of the histories, besides the keys, after filling: a third of the time."""
        indexes = self.meters.execute(INDEXES).fetchall()
        for name, _ in indexes:
            self.meters.execute(f"DROP INDEX {name}")
        yield
        for _, definition in indexes:
            self.meters.execute(definition)

    def roll_up(self, now: datetime) -> list[float]:
        """As the daemon's maintenance does; returns how long each step took, in seconds."""
        steps = []
        self.meters.execute("SELECT rollup_advance(%s)", (now - LATE_AFTER,))
        done = False
        while not done:
            began = time.monotonic()
            step = self.meters.execute("SELECT complete_until = late_before AND marks_left = 0 FROM rollup_refresh()")
            done = step.fetchone()[0]
            steps.append(time.monotonic() - began)
        return steps

    def update_live(self, since: datetime) -> None:
        with psycopg.ClientCursor(self.meters) as cursor:
            cursor.execute(LIVE, {"since": since})

    def count(self, table: str) -> int:
        return self.meters.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - names of ours


class Source:
    """A fleet whose readings are copied to one or more databases, further each time; one a minute and device.

    Other numbers in the ids, from `offset` on, tell the devices of one fleet from those of another.
    """

    def __init__(self, name: str, devices: int, start: datetime, targets: list[Target], offset: int = 0) -> None:
        config = FleetConfig(start=start, meters=devices, vehicles=devices, seed=1 + offset, shared_share=0.02)
        self.name, self.targets, self.filled, self._devices = name, targets, start, devices
        numbers = range(offset + 1, offset + devices + 1)
        self.meters, self.vehicles = ([f"{kind}-{number:06d}" for number in numbers] for kind in ("MTR", "VEH"))
        self._names = [name.encode() for name in (*self.meters, *self.vehicles)]
        self._stream = iter(Fleet(config))
        self._ahead: list[Said] = []

    def fill(self, now: datetime) -> int:
        """Copies all readings before `now` that were not copied before; returns how many."""
        for target in self.targets:
            target.make_partitions(max(self.filled, target.since), now + DAY)
        began = said = time.monotonic()
        copied = 0
        with ExitStack() as stack:
            files = [(_ms(target.since), *target.open_copies(stack)) for target in self.targets]
            for block in self._minutes(_ms(now)):
                meters, vehicles = self._rows(block)
                for since, meter_file, vehicle_file in files:
                    if block and block[0].ts >= since:
                        meter_file.write(meters)
                        vehicle_file.write(vehicles)
                copied += len(block)
                if time.monotonic() - said > 5:
                    said = time.monotonic()
                    progress(f"{self.name}: {copied:,} readings, {copied / (said - began):,.0f} a second")
            for _, *both in files:
                for file in both:
                    file.write(COPY_TRAILER)
        self.filled = now
        return copied

    def _rows(self, block: list[Said]) -> tuple[bytes, bytes]:
        """Rows of binary COPY, as `bridge.store.copy_rows` makes them; here of tens of millions, so without objects."""
        meters, vehicles = [], []
        for _, device, ts, energy, level, temperature, meter in block:
            at = ts * 1_000 - POSTGRES_EPOCH
            name, kwh, arrival = self._names[device], energy / TICKS_PER_KWH, at + TRAVEL_US
            if device < self._devices:
                meters.append(METER_ROW(6, 10, name, 8, at, 8, kwh, 8, level / 10, 8, arrival, 1, False))
            elif meter:
                soc, plug = level / 100, self._names[meter - 1]
                vehicles.append(
                    PLUGGED_ROW(8, 10, name, 8, at, 8, kwh, 8, soc, 8, temperature / 10, 10, plug, 8, arrival, 1, False)
                )
            else:
                soc = level / 100
                vehicles.append(
                    VEHICLE_ROW(8, 10, name, 8, at, 8, kwh, 8, soc, 8, temperature / 10, -1, 8, arrival, 1, False)
                )
        return b"".join(meters), b"".join(vehicles)

    def readings(self, until: datetime) -> Iterator[Said]:
        """What the fleet says before `until`, for another writer."""
        for block in self._minutes(_ms(until)):
            yield from block

    def reading(self, said: Said, ts: int | None = None, meter: str | None = None) -> Reading:
        """A reading as the bridge knows it; `ts` and `meter` replace its own."""
        _, device, own, energy, level, temperature, plugged = said
        ts = (own if ts is None else ts) * 1_000
        kwh, arrival = energy / TICKS_PER_KWH, own * 1_000 + TRAVEL_US
        if device < self._devices:
            return MeterReading(self.meters[device], ts, kwh, level / 10, arrival, ts_from_arrival=False)
        meter = meter or (self.meters[plugged - 1] if plugged else None)
        vehicle = self.vehicles[device - self._devices]
        return VehicleReading(vehicle, ts, kwh, level / 100, temperature / 10, meter, arrival, ts_from_arrival=False)

    def _minutes(self, until_ms: int) -> Iterator[list[Said]]:
        while True:
            block = self._ahead or list(islice(self._stream, 2 * self._devices))
            end = bisect_left(block, until_ms, key=attrgetter("ts"))
            self._ahead = block[end:]
            yield block[:end]
            if self._ahead:
                return


def _ms(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(milliseconds=1)


class Query(NamedTuple):
    """`{vehicle}` and the like stand for a device chosen anew each time; `target` is of the p95, in milliseconds."""

    name: str
    database: str
    statement: str
    target: float | None = None


PERFORMANCE = "SELECT * FROM vehicle_performance({vehicle})"
QUERIES = [
    Query("status of one meter", "history", "SELECT * FROM meter_status WHERE meter_id = {meter}", 1),
    Query("status of one vehicle", "history", "SELECT * FROM vehicle_status WHERE vehicle_id = {vehicle}", 1),
    Query("fleet_inefficient", "fleet", "SELECT * FROM fleet_inefficient", 100),
    Query(
        "charging_sessions of one vehicle, since 30 days",
        "history",
        "SELECT * FROM charging_sessions({long_vehicle}, now() - interval '30 days')",
        20,
    ),
    Query(
        "charging_session of one vehicle, all there are",
        "history",
        "SELECT * FROM charging_session WHERE vehicle_id = {long_vehicle}",
        20,
    ),
    Query("vehicle_performance_24h, all vehicles", "fleet", "SELECT * FROM vehicle_performance_24h"),
    Query("charger_performance_24h, all meters", "fleet", "SELECT * FROM charger_performance_24h"),
    Query("fleet_summary_24h", "fleet", "SELECT * FROM fleet_summary_24h"),
    Query(
        "energy_by_day of one meter, 7 days",
        "history",
        "SELECT * FROM energy_by_day(now() - interval '7 days', meter => {meter})",
    ),
    Query("device_silent", "fleet", "SELECT * FROM device_silent"),
    Query("data_quality of one device", "history", "SELECT * FROM data_quality WHERE device_id = {vehicle}"),
    Query("data_quality, all devices", "fleet", "SELECT * FROM data_quality"),
]


class Asker:
    """Asks one query over a connection of its own, about random devices, the same in each run."""

    def __init__(self, query: Query, world: "World") -> None:
        self._choices = world.choices[query.database]
        # The statement is planned each time, as it is for somebody in psql or Grafana.
        self._connection = psycopg.connect(world.targets[query.database].dsn, autocommit=True, prepare_threshold=None)
        self._connection.adapters.register_loader("timestamptz", TextLoader)  # 'infinity' is no datetime
        self._cursor = psycopg.RawCursor(self._connection)
        self._statement, self._named = query.statement, []
        for name in self._choices:
            if f"{{{name}}}" in query.statement:
                self._named.append(name)
                self._statement = self._statement.replace(f"{{{name}}}", f"${len(self._named)}::text")
        self._random = random.Random(1)  # noqa: S311 - the same devices in each run
        self.rows = 0
        self.start()

    def start(self) -> None:
        """Forgets what was asked before."""
        self.took: list[float] = []
        self._cpu = cpu_seconds(self._connection.info.backend_pid)

    @property
    def cpu(self) -> float:
        """Milliseconds of CPU that the server's process has used for a query, on average: other load does not count."""
        return (cpu_seconds(self._connection.info.backend_pid) - self._cpu) * 1_000 / len(self.took)

    def ask(self) -> None:
        devices = [self._random.choice(self._choices[name]) for name in self._named]
        began = time.perf_counter()
        rows = self._cursor.execute(self._statement, devices).fetchall()
        self.took.append((time.perf_counter() - began) * 1_000)
        self.rows = max(self.rows, len(rows))

    def close(self) -> None:
        self._connection.close()


class World:
    """The databases, what fills them, and which devices there are to ask about."""

    def __init__(self, options: argparse.Namespace, databases: dict[str, str]) -> None:
        began = now()
        minute = began.replace(second=0, microsecond=0)
        self.targets = {
            "history": Target(databases["history"], EPOCH),
            "day": Target(databases["day"], began - DAY),
            "fleet": Target(databases["fleet"], EPOCH),
        }
        history, day, fleet = self.targets.values()
        self.sources = [
            Source("long", options.long, minute - options.long_days * DAY, [history], offset=900_000),
            Source("history", options.devices, minute - options.days * DAY, [history, day]),
            Source("fleet", options.fleet, minute - 25 * HOUR, [fleet]),
        ]
        long, plain, big = self.sources
        self.choices = {
            "history": {"meter": plain.meters, "vehicle": plain.vehicles, "long_vehicle": long.vehicles},
            "day": {"vehicle": plain.vehicles},
            "fleet": {"meter": big.meters, "vehicle": big.vehicles},
        }

    def fill(self) -> None:
        with ExitStack() as stack:
            for target in self.targets.values():
                stack.enter_context(target.without_indexes())
            for source in self.sources:
                began = time.monotonic()
                readings = source.fill(now())
                print(f"filled {source.name}: {readings:,} readings in {time.monotonic() - began:,.0f} s", flush=True)
            progress("indexes")
        for name, target in self.targets.items():
            readings = target.count("meter_history") + target.count("vehicle_history")
            progress(f"{name}: rollups")
            began = time.monotonic()
            steps = target.roll_up(now())
            took = time.monotonic() - began
            print(
                f"rolled up {name}: {readings:,} readings in {took:,.1f} s, {readings / took:,.0f} a second, "
                f"longest step {max(steps):.2f} s"
            )
            progress(f"{name}: VACUUM ANALYZE")
            target.meters.execute("VACUUM ANALYZE")
        for name, target in self.targets.items():
            sizes = target.meters.execute(
                "SELECT pg_size_pretty(pg_database_size(current_database())), "
                "pg_size_pretty(sum(pg_total_relation_size(relid))) "
                "FROM unnest(ARRAY['meter_quarter_hour', 'vehicle_quarter_hour', 'charging_quarter_hour', "
                "'charging_two_hours']::regclass[]) AS rollup, pg_partition_tree(rollup)"
            ).fetchone()
            print(f"size of {name}: {sizes[0]}, of which rollups {sizes[1]}")

    def bring_to_now(self) -> None:
        """As the daemon would have: history, live tables, rollups."""
        moment = now()
        for source in self.sources:
            source.fill(moment)
        for target in self.targets.values():
            target.update_live(moment - 3 * MINUTE)
            target.roll_up(moment)

    def tail(self) -> str:
        """How old the newest reading is, and how much history no rollup holds yet, over all databases."""
        ages = [
            target.meters.execute(
                "SELECT extract(epoch FROM now() - (SELECT max(ts) FROM vehicle_live)), "
                "extract(epoch FROM now() - complete_until) FROM rollup_progress"
            ).fetchone()
            for target in self.targets.values()
        ]
        return f"newest reading {max(age for age, _ in ages):.1f} s old, rollups {max(t for _, t in ages):.0f} s behind"


def compare_histories(world: World, repeats: int) -> None:
    """vehicle_performance with all days of history and with one, by turns: the same vehicles, the same readings."""
    day, history = (Asker(Query("", name, PERFORMANCE, 5), world) for name in ("day", "history"))
    fixed = "SELECT kwh_ac, kwh_dc, readings FROM vehicle_performance(%s, %s, %s)"
    since, until = now() - 20 * HOUR, now() - MINUTE
    for vehicle in world.choices["day"]["vehicle"][:20]:
        one, other = (
            world.targets[name].meters.execute(fixed, (vehicle, since, until)).fetchone() for name in ("day", "history")
        )
        assert one[2] > 0
        assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(one, other, strict=True)), vehicle
    warm_up([day, history])
    for _ in range(repeats):
        day.ask()
        history.ask()
    line("vehicle_performance of one vehicle, 24 h", "day", day, 5)
    line("vehicle_performance of one vehicle, 24 h", "history", history, 5)
    for name, quantile in (("p50", 0.5), ("p95", 0.95)):
        ratio = percentile(history.took, quantile) / percentile(day.took, quantile)
        verdict = f"  target ≤ 1.20  {'met' if ratio <= 1.2 else 'MISSED'}" if name == "p50" else ""
        print(f"  history : day, by turns, {name} {ratio:.2f}{verdict}")


def measure(world: World, query: Query, repeats: int) -> None:
    world.bring_to_now()
    asker = Asker(query, world)
    warm_up([asker])
    began = time.monotonic()
    while len(asker.took) < repeats and time.monotonic() - began < LONGEST_MEASUREMENT:
        asker.ask()
    line(query.name, query.database, asker, query.target)
    asker.close()


@contextmanager
def skipping_what_is_missing(name: str) -> Iterator[None]:
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction) as error:
        print(f"{name:48} not measured: {str(error).splitlines()[0]}")
    sys.stdout.flush()


def warm_up(askers: list[Asker]) -> None:
    """After five executions PostgreSQL decides whether it keeps the plans inside functions."""
    for asker in askers:
        for _ in range(8):
            asker.ask()
        asker.start()


HEADER = "{:48} {:8} {:>6} {:>5} {:>8} {:>8} {:>8} {:>8} {:>8}  {}".format(
    "query", "database", "rows", "times", "CPU", "p50", "p95", "p99", "max", "target of p95"
)


def line(name: str, database: str, asker: Asker, target: float | None) -> None:
    p50, p95, p99 = (percentile(asker.took, quantile) for quantile in (0.5, 0.95, 0.99))
    verdict = "" if target is None else f"≤ {target:g} ms  {'met' if p95 <= target else 'MISSED'}"
    print(
        f"{name:48} {database:8} {asker.rows:6,} {len(asker.took):5} {asker.cpu:8.2f} "
        f"{p50:8.2f} {p95:8.2f} {p99:8.2f} {max(asker.took):8.2f}  {verdict}".rstrip()
    )


def percentile(values: list[float], quantile: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1]


class Cost(NamedTuple):
    """What a period of ingest has cost: CPU seconds of the backends, elapsed seconds of each batch and step."""

    readings: int
    marks: int
    ingest_cpu: float
    rollup_cpu: float
    batches: list[float]
    steps: list[float]


class Ingest:
    """Ingest at 2,000 readings a second by a simulated clock, and rollups after each quarter hour of it.

    For late readings to have rollups to spoil, the first tenth of the fleet has a history of six hours.
    """

    def __init__(self, dsn: str, devices: int, periods: int) -> None:
        last = now().replace(second=0, microsecond=0, minute=now().minute // 15 * 15)
        self._start = last - (2 * periods + 1) * QUARTER_HOUR
        self._target = Target(dsn, EPOCH)
        self._known = max(1, devices // 10)
        past = Source("ingest", self._known, self._start - LATE_AGE - QUARTER_HOUR, [self._target])
        with self._target.without_indexes():
            past.fill(self._start)
        self._target.roll_up(self._start + LATE_AFTER)
        self._target.meters.execute("VACUUM ANALYZE")
        self._target.make_partitions(self._start, self._start + DAY)
        self._source = Source("ingest", devices, self._start, [])
        self._devices = devices
        self._random = random.Random(1)  # noqa: S311 - the same readings in each run
        self._store = Store(Database(dsn=SecretStr(dsn)), "bench")
        self._topics = TopicTemplates().topics()
        self._clock = self._start

    async def open(self) -> None:
        await self._store.open()
        await self._period(LATE_AFTER, 0.0)  # ingest is ahead of the rollups by so much, from here on

    async def run(self, periods: int, late_share: float) -> Cost:
        """Quarter hours of ingest, each with a refresh at its end."""
        found = self._target.meters.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'wattbridge' AND datname = current_database()"
        ).fetchone()
        ingest, rollup = found[0], self._target.meters.info.backend_pid
        readings, marks, cpu, batches, steps = 0, 0, [0.0, 0.0], [], []
        for number in range(periods):
            began = cpu_seconds(ingest)
            written = await self._period(QUARTER_HOUR, late_share)
            cpu[0] += cpu_seconds(ingest) - began
            readings += sum(size for size, _ in written)
            batches += [took for _, took in written]
            marks += self._target.count("rollup_mark")
            progress(f"ingest: quarter hour {number + 1} of {periods}, {readings:,} readings; rollups")
            began = cpu_seconds(rollup)
            steps += self._target.roll_up(self._clock)
            cpu[1] += cpu_seconds(rollup) - began
        return Cost(readings, marks, *cpu, batches, steps)

    async def close(self) -> None:
        await self._store.close()

    async def _period(self, length: timedelta, late_share: float) -> list[tuple[int, float]]:
        """Writes what the fleet says in that time; returns the size of each batch and how long it took."""
        self._clock += length
        readings = self._with_late(late_share) if late_share else self._on_time()
        written = []
        for number in count():
            batch = Batch(self._topics)
            for reading in islice(readings, BATCH):
                batch.add_reading(reading)
            if not len(batch):
                return written
            began = time.perf_counter()
            await self._store.write(batch)
            written.append((len(batch), time.perf_counter() - began))
            if number % 1_000 == 0:
                progress(f"ingest: batch {number:,} of {length}")
        raise AssertionError

    def _on_time(self) -> Iterator[Reading]:
        return map(self._source.reading, self._source.readings(self._clock))

    def _with_late(self, share: float) -> Iterator[Reading]:
        """Besides its own one, some readings of a device that has a history come with one of an earlier time."""
        odds = share / (1 - share) * self._devices / self._known
        for said in self._source.readings(self._clock):
            yield self._source.reading(said)
            if said.device % self._devices < self._known and self._random.random() < odds:
                age = self._random.randrange(1, LATE_AGE // timedelta(milliseconds=1))
                meter = self._source.meters[(said.meter - 1) % self._known] if said.meter else None
                yield self._source.reading(said, said.ts - age, meter)


async def measure_ingest(dsn: str, devices: int, periods: int) -> None:
    print(
        f"\nRollups against ingest at 2,000 readings a second: {devices:,} meters and {devices:,} vehicles, batches of "
        f"{BATCH}, a refresh each quarter hour,\n{periods} of them (simulated clock); CPU time of the two backends"
    )
    ingest = Ingest(dsn, devices, periods)
    await ingest.open()
    for name, share in (("all on time", 0.0), (f"{LATE_SHARE:.0%} late by up to 6 h", LATE_SHARE)):
        cost = await ingest.run(periods, share)
        a, b = (seconds / cost.readings * 1e6 for seconds in (cost.ingest_cpu, cost.rollup_cpu))
        print(f"{name}: {cost.readings:,} readings, {cost.marks:,} marks")
        print(
            f"  ingest {cost.ingest_cpu:8.2f} s CPU, {a:6.2f} µs a reading; a batch takes "
            f"{percentile(cost.batches, 0.5) * 1e3:.1f} ms (p50), {percentile(cost.batches, 0.95) * 1e3:.1f} ms (p95)"
        )
        print(
            f"  rollup {cost.rollup_cpu:8.2f} s CPU, {b:6.2f} µs a reading; {len(cost.steps)} steps take "
            f"{sum(cost.steps):.2f} s, the longest {max(cost.steps):.2f} s"
        )
        print(f"  ratio  {b / a:8.1%}  target < 10 %  {'met' if b < a / 10 else 'MISSED'}")
    await ingest.close()


def measure_queries(options: argparse.Namespace, databases: dict[str, str]) -> None:
    world = World(options, databases)
    world.fill()
    world.bring_to_now()
    print("\nMilliseconds at the client, planning included, over a warm connection; CPU: mean of the server's process")
    print(f"at the start: {world.tail()}, load {os.getloadavg()[0]:.1f}")
    print(HEADER)
    with skipping_what_is_missing("vehicle_performance"):
        compare_histories(world, options.repeats)
    for query in QUERIES:
        with skipping_what_is_missing(query.name):
            measure(world, query, options.repeats)
    print(f"at the end: {world.tail()}, load {os.getloadavg()[0]:.1f}", flush=True)


def machine(server: str) -> str:
    cpus = [s.partition(":")[2].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{now():%Y-%m-%d %H:%M} UTC, {cpus[0]}, {len(cpus)} cores, {memory:.0f} GB, load {os.getloadavg()[0]:.1f}, "
        f"PostgreSQL {server}, Python {platform.python_version()}"
    )


def progress(what: str) -> None:
    print(f"{now():%H:%M:%S} {what}", file=sys.stderr, flush=True)


def now() -> datetime:
    return datetime.now(UTC)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--days", type=int, default=7, help="days of history, 2 or more")
    add("--devices", type=int, default=2_000, help="meters, and vehicles, with that history")
    add("--long", type=int, default=20, help="meters, and vehicles, with a longer history")
    add("--long-days", type=int, default=30, help="days of it")
    add("--fleet", type=int, default=10_000, help="meters, and vehicles, of the fleet of 25 hours")
    add("--ingest", type=int, default=60_000, help="meters, and vehicles, that send")
    add("--quarter-hours", type=int, default=2, help="of ingest, with and again without late readings")
    add("--repeats", type=int, default=200, help="how often each query is asked")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    add("--quick", action="store_true", help="everything small: does it run at all?")
    add("--part", choices=("queries", "ingest"), help="only this")
    add("--keep", action="store_true", help="at the end, keep the databases for a look with psql until Ctrl-C")
    options = parser.parse_args()
    if options.quick:
        options.days, options.devices, options.long, options.fleet = 2, 50, 2, 100
        options.ingest, options.quarter_hours, options.repeats = 200, 1, 20
    return options


def main() -> None:
    options = arguments()
    gc.disable()  # a collection over all devices of the fleets would be seen in the slowest percent
    settings = SETTINGS | dict(setting.split("=", 1) for setting in options.set)
    with EmbeddedPostgres(settings) as server:
        databases = {name: make_conninfo(server.dsn, dbname=name) for name in ("history", "day", "fleet", "ingest")}
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            for name in databases:
                connection.execute(f'CREATE DATABASE "{name}"')
            print(machine(connection.info.parameter_status("server_version")))
        print("settings: " + ", ".join(f"{name} = {value}" for name, value in settings.items()), flush=True)
        if options.part != "ingest":
            measure_queries(options, databases)
        if options.part != "queries":
            asyncio.run(measure_ingest(databases["ingest"], options.ingest, options.quarter_hours))
        if options.keep:
            print(server.psql_command, flush=True)
            while True:
                time.sleep(60)


if __name__ == "__main__":
    main()
