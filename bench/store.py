"""How fast the store is: its whole exactly-once transaction against raw binary COPY into the same partitioned tables.

Both write the readings of a fleet in the order of time, each device once a minute, in batches, one transaction each,
over a connection with the same settings, into copies of one database (some history, all live rows). The store looks for
duplicates, keeps the live tables and counts. Raw is BEGIN; COPY meter_history; COPY vehicle_history; COMMIT, of bytes
that are ready. They take turns and write as many rows; what is timed is the writing alone.

Repeated readings are exact repetitions of stored ones, of the minutes before. Raw COPY cannot take those: it copies as
many rows, all new. Late readings are new, and one to six hours old; there both write the very same rows.
"""

import argparse
import gc
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import psycopg
import report
import uvloop
from analytics import TRAVEL_US, Target
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from rig import SETTINGS, cpu_seconds

from bridge import logs
from bridge.batch import Batch
from bridge.config import Database, TopicTemplates
from bridge.messages import EPOCH, MeterReading, Reading, VehicleReading, microseconds
from bridge.services import EmbeddedPostgres
from bridge.store import BY_KEY, COPY_HEADER, COPY_TRAILER, POSTGRES_EPOCH, Store, Totals, connect
from bridge.topics import Kind

START = datetime(2026, 7, 1, 7, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = 60_000_000  # in microseconds, as all times here that are numbers
REPEATED_MINUTES = 5  # how far back the repeated readings are
LATE_MINUTES = (60, 360)
LATE_AFTER = timedelta(minutes=2)  # the default of analytics_setting.late_after
PLUGGED = 0.6  # of the vehicles name their meter, as in the simulator's fleet
VALUES = 99_991  # different values; prime, so that no device says the same all the time
MOST_WAITING = 200_000  # readings that are made ready at once
TOPICS = TopicTemplates().topics()


def _layout(**fields: str | None) -> np.dtype[Any]:
    """A row of binary COPY of fixed width: each field after its length, a NULL is a length alone."""
    columns = [("fields", ">i2")]
    for name, kind in fields.items():
        columns += [(f"length of {name}", ">i4")] + ([(name, kind)] if kind else [])
    return np.dtype(columns, metadata={name: np.dtype(kind).itemsize if kind else -1 for name, kind in fields.items()})


_ENDS: Mapping[str, str] = {"received_at": ">i8", "ts_from_arrival": "?"}
METER_ROW = _layout(id="S10", ts=">i8", kwh=">f8", voltage=">f8", **_ENDS)
VEHICLE_ROW = _layout(id="S10", ts=">i8", kwh=">f8", soc=">f8", temperature=">f8", meter=None, **_ENDS)
PLUGGED_ROW = _layout(id="S10", ts=">i8", kwh=">f8", soc=">f8", temperature=">f8", meter="S10", **_ENDS)


class Rows(NamedTuple):
    """Readings by column; which columns count depends on what the device is."""

    is_meter: np.ndarray
    is_plugged: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.is_meter)

    def readings(self) -> Iterator[Reading]:
        """As the bridge knows them."""
        names = ("id", "ts", "kwh", "voltage", "soc", "temperature", "meter", "received_at")
        columns = (self.columns[name] for name in names)
        lists = [(column.astype("U") if column.dtype.kind == "S" else column).tolist() for column in columns]
        kinds = zip(self.is_meter.tolist(), self.is_plugged.tolist(), strict=True)
        for (is_meter, is_plugged), row in zip(kinds, zip(*lists, strict=True), strict=True):
            device, ts, kwh, voltage, soc, temperature, meter, received_at = row
            if is_meter:
                yield MeterReading(device, ts, kwh, voltage, received_at, ts_from_arrival=False)
            else:
                plug = meter if is_plugged else None
                yield VehicleReading(device, ts, kwh, soc, temperature, plug, received_at, ts_from_arrival=False)

    def copies(self) -> tuple[bytes, bytes]:
        """The same for binary COPY into meter_history and into vehicle_history, without header and trailer."""
        unplugged, plugged = ~self.is_meter & ~self.is_plugged, ~self.is_meter & self.is_plugged
        return (
            self._packed(METER_ROW, self.is_meter),
            self._packed(VEHICLE_ROW, unplugged) + self._packed(PLUGGED_ROW, plugged),
        )

    def _packed(self, layout: np.dtype[Any], which: np.ndarray) -> bytes:
        lengths = layout.metadata or {}
        rows = np.zeros(int(which.sum()), layout)
        rows["fields"] = len(lengths)
        for name, length in lengths.items():
            rows[f"length of {name}"] = length
            if name in self.columns and length > 0:
                column = self.columns[name][which]
                rows[name] = column - POSTGRES_EPOCH if name in {"ts", "received_at"} else column
        return rows.tobytes()


class Stream:
    """The readings of a fleet, half meters half vehicles, numbered in the order of time: any of them at any time.

    Each device sends once a minute, at a moment of its own.
    """

    def __init__(self, devices: int, start: datetime) -> None:
        assert devices < 2_000_000, "ids have six digits"
        self.devices, self._start = devices, microseconds(start)
        random = np.random.default_rng(1)
        self._order = random.permutation(devices)
        self._is_meter = np.arange(devices) % 2 == 0
        self._ids = np.array([f"{('MTR', 'VEH')[n % 2]}-{n // 2 + 1:06d}" for n in range(devices)], "S10")
        self._meters = self._ids[random.integers(0, (devices + 1) // 2, devices) * 2]
        self._kwh = random.integers(0, 3_000, VALUES) / 10_000
        self._voltages = random.integers(2_200, 2_401, VALUES) / 10
        self._socs = random.integers(500, 10_001, VALUES) / 100
        self._temperatures = random.integers(-50, 401, VALUES) / 10
        self._is_plugged = random.random(devices) < PLUGGED

    def times(self, numbers: np.ndarray) -> np.ndarray:
        """When these readings are due, in microseconds since 1970."""
        minutes, places = np.divmod(numbers, self.devices)
        return self._start + minutes * MINUTE + places * MINUTE // self.devices

    def moment(self, number: int) -> datetime:
        """When this reading is due."""
        return EPOCH + timedelta(microseconds=int(self.times(np.array(number))))

    def rows(self, numbers: np.ndarray, ages: np.ndarray | int = 0, arrivals: np.ndarray | None = None) -> Rows:
        """These readings, with timestamps `ages` before they are due, arriving soon after that or at `arrivals`."""
        devices, values = self._order[numbers % self.devices], numbers % VALUES
        due = self.times(numbers)
        columns = {
            "id": self._ids[devices],
            "ts": due - ages,
            "kwh": self._kwh[values],
            "voltage": self._voltages[values],
            "soc": self._socs[values],
            "temperature": self._temperatures[values],
            "meter": self._meters[devices],
            "received_at": (due if arrivals is None else arrivals) + TRAVEL_US,
        }
        return Rows(self._is_meter[devices], self._is_plugged[devices], columns)

    def lateness(self, numbers: np.ndarray) -> np.ndarray:
        """How late each of them is when it is late: one age for each device, and at no time when it sends."""
        first, last = LATE_MINUTES
        return (first + self._order[numbers % self.devices] % (last - first)) * MINUTE + MINUTE // 2


class Variant(NamedTuple):
    """What is in a batch: of `size` readings these shares are repeated and late; the others are new and in time.

    Of the new ones the timestamps are `age` before the time they are due, in microseconds.
    """

    name: str
    size: int = 5_000
    repeated: float = 0.0
    late: float = 0.0
    age: int = 0
    aim: float | None = None


VARIANTS = {
    "new": Variant("all new", aim=0.6),
    "duplicates": Variant("10 % duplicates", repeated=0.10, aim=0.3),
    "few-duplicates": Variant("1 % duplicates", repeated=0.01),
    "late": Variant("2 % late", late=0.02),
    "small-batches": Variant("all new, batches of 500", size=500),
}


class Batches:
    """One batch after the other of a variant, from the reading with number `position` on; keeps count of them."""

    def __init__(self, stream: Stream, variant: Variant, position: int) -> None:
        self._stream, self._variant, self.position = stream, variant, position
        self.size = variant.size
        self._random = np.random.default_rng(2)
        self.received = self.repeated = self.late = 0

    def next(self) -> Rows:
        """In the order of arrival: what is repeated or late comes at any place."""
        size, stream = self.size, self._stream
        repeats, late = (round(size * share) for share in (self._variant.repeated, self._variant.late))
        new = np.arange(self.position, self.position + size - repeats - late)
        back = REPEATED_MINUTES * stream.devices
        repeated = self.position - 1 - self._random.choice(back, repeats, replace=False)
        # Of readings of this batch, with another timestamp: so none is late twice.
        delayed = self._random.choice(new, late, replace=False)
        numbers = np.concatenate([new, repeated, delayed])
        ages = np.full(size, self._variant.age)
        ages[size - late :] = stream.lateness(delayed)
        arrivals = stream.times(np.concatenate([new, self._random.choice(new, repeats + late)]))
        order = np.argsort(arrivals, kind="stable")
        self.position += len(new)
        self.received += size
        self.repeated += repeats
        self.late += late
        return stream.rows(numbers[order], ages[order], arrivals[order])


class Cost(NamedTuple):
    """What it took to write so many rows: elapsed seconds, CPU seconds of backend and ourselves, bytes of WAL."""

    rows: int = 0
    seconds: float = 0.0
    backend: float = 0.0
    own: float = 0.0
    wal: int = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


class Round(NamedTuple):
    """Both sides of one round."""

    store: Cost
    raw: Cost


def fill(rows: Rows) -> Batch:
    """A batch with these readings, as the pipeline makes one. The only place here that knows how."""
    batch = Batch(TOPICS)
    for reading in rows.readings():
        batch.add_reading(reading)
    return batch


class Side:
    """Somebody who writes batches into a database of his own; a batch is made ready before time runs."""

    def __init__(self, dsn: str, batches: Batches) -> None:
        self.batches, self._config = batches, Database(dsn=SecretStr(dsn))
        self.observer = psycopg.connect(dsn, autocommit=True)

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    def ready(self, rows: Rows) -> Any:  # noqa: ANN401 - what `write` takes
        raise NotImplementedError

    async def write(self, ready: Any) -> None:  # noqa: ANN401 - what `ready` made
        raise NotImplementedError

    async def run(self, batches: int) -> Cost:
        """Writes so many of its batches."""
        cost = Cost()
        for first in range(0, batches, portion := max(1, MOST_WAITING // self.batches.size)):
            cost = cost.plus(await self._run(min(portion, batches - first)))
        return cost

    async def _run(self, batches: int) -> Cost:
        received = self.batches.received
        waiting = [self.ready(self.batches.next()) for _ in range(batches)]
        # A collection would look at all the batches that wait; the daemon has one or two.
        gc.collect()
        gc.freeze()
        wal, backend, own, began = self._wal(), self._backend_seconds(), time.process_time(), time.perf_counter()
        for ready in waiting:
            await self.write(ready)
        seconds, own = time.perf_counter() - began, time.process_time() - own
        backend, wal = self._backend_seconds() - backend, self._wal() - wal
        gc.unfreeze()
        return Cost(self.batches.received - received, seconds, backend, own, wal)

    def history(self) -> int:
        """How many rows both histories have."""
        return self.ask("SELECT (SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history)")

    def advance(self, now: datetime) -> None:
        """Moves the watermark, as the daemon's maintenance does."""
        self.ask("SELECT rollup_advance(%s)", now - LATE_AFTER)

    def ask(self, statement: str, *values: object) -> Any:  # noqa: ANN401 - whatever it is
        row = self.observer.execute(statement, values).fetchone()
        assert row is not None
        return row[0]

    def _wal(self) -> int:
        return int(self.ask("SELECT pg_current_wal_insert_lsn() - '0/0'"))

    def _backend_seconds(self) -> float:
        """CPU time of all connections with which it writes."""
        pids = self.observer.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'wattbridge' AND datname = current_database()"
        ).fetchall()
        assert pids
        return sum(cpu_seconds(pid) for (pid,) in pids)


class StoreSide(Side):
    """The daemon's own way, as the daemon `instance`."""

    def __init__(self, dsn: str, batches: Batches, instance: str = "bench") -> None:
        super().__init__(dsn, batches)
        self._instance = instance

    async def open(self) -> None:
        self._store = Store(self._config, self._instance)
        self.totals = await self._store.open()

    async def close(self) -> None:
        await self._store.close()
        self.observer.close()

    def ready(self, rows: Rows) -> Batch:
        return fill(rows)

    async def write(self, ready: Batch) -> None:
        self.totals = await self._store.write(ready)

    def check(self) -> None:
        """Nothing was lost or counted twice."""
        received, repeated = self.batches.received, self.batches.repeated
        expected = Totals(received=received, stored=received - repeated, duplicate=repeated)
        assert self.totals == expected, (self.totals, expected)

    def check_database(self, history: int, stream: Stream) -> None:
        """History has grown by the new rows, and every device's live row is its newest reading."""
        new = self.batches.received - self.batches.repeated
        assert self.history() == history + new
        last = stream.moment(self.batches.position - stream.devices)
        live = [self.ask(f"SELECT count(*) FROM {kind}_live WHERE ts >= %s", last) for kind in Kind]  # noqa: S608 - ours
        assert sum(live) == stream.devices
        assert self.ask("SELECT coalesce(sum(duplicates), 0) FROM device_duplicate") == self.batches.repeated
        assert (self.ask("SELECT count(*) FROM rollup_mark") > 0) == (self.batches.late > 0)


class RawSide(Side):
    """Rows straight into history."""

    async def open(self) -> None:
        self._connection = await connect(self._config, BY_KEY, self._config.statement_timeout_s)

    async def close(self) -> None:
        await self._connection.close()
        self.observer.close()

    def ready(self, rows: Rows) -> list[bytes]:
        return [COPY_HEADER + copied + COPY_TRAILER for copied in rows.copies()]

    async def write(self, ready: list[bytes]) -> None:
        async with self._connection.transaction(), self._connection.cursor() as cursor:
            for history, rows in zip(("meter_history", "vehicle_history"), ready, strict=True):
                async with cursor.copy(f"COPY {history} FROM STDIN (FORMAT BINARY)") as copy:
                    await copy.write(rows)

    def check_database(self, history: int) -> None:
        """All rows are there."""
        assert self.history() == history + self.batches.received


def create_database(admin: psycopg.Connection[Any], name: str, template: str = "template1") -> str:
    """Makes a database; returns its DSN."""
    admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
    return make_conninfo(admin.info.dsn, password=admin.info.password, dbname=name)


def populate(dsn: str, stream: Stream, first: int, minutes: int) -> int:
    """The schema, history as if the fleet had been there for so many minutes, and its live rows; returns the rows."""
    target, rows, began = Target(dsn, EPOCH), minutes * stream.devices, time.monotonic()
    said = began
    since, until = stream.moment(first), stream.moment(first + rows)
    target.make_partitions(since - DAY, until + 2 * DAY)
    # With all indexes: made afterwards, they would be packed as they never are in life.
    with ExitStack() as stack:
        files = target.open_copies(stack)
        for done in range(0, rows, stream.devices):
            minute = stream.rows(np.arange(first + done, first + done + stream.devices))
            for file, copied in zip(files, minute.copies(), strict=True):
                file.write(copied)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                left = (said - began) * (rows / (done + stream.devices) - 1)
                report.progress(f"history: {done:,} of {rows:,} readings, {left / 60:.0f} minutes left")
        for file in files:
            file.write(COPY_TRAILER)
    target.update_live(until - timedelta(minutes=1))
    # So that nothing of this is left to do in the background.
    target.meters.execute("VACUUM ANALYZE")
    target.meters.execute("CHECKPOINT")
    for connection in (target.meters, target.vehicles):
        connection.close()
    return rows


class Server:
    """A private server with a database that has some history, to be copied."""

    def __init__(self, server: EmbeddedPostgres, stream: Stream, minutes: int) -> None:
        assert minutes >= REPEATED_MINUTES
        self.stream = stream
        self.admin = psycopg.connect(server.dsn, autocommit=True)
        self.history = populate(create_database(self.admin, "warm"), stream, 0, minutes)

    @asynccontextmanager
    async def sides(self, variant: Variant, warm_up: int) -> AsyncIterator[tuple[StoreSide, RawSide]]:
        """Both, each with a copy of the database, and past what happens only once."""
        without = variant._replace(repeated=0.0)
        store = StoreSide(create_database(self.admin, "store", "warm"), Batches(self.stream, variant, self.history))
        raw = RawSide(create_database(self.admin, "raw", "warm"), Batches(self.stream, without, self.history))
        for side in (store, raw):
            await side.open()
            side.advance(self.stream.moment(self.history))
            await side.run(warm_up)
        yield store, raw
        store.check()
        store.check_database(self.history, self.stream)
        raw.check_database(self.history)
        for side, name in ((store, "store"), (raw, "raw")):
            await side.close()
            self.admin.execute(f'DROP DATABASE "{name}"')


async def measure(server: Server, variant: Variant, options: argparse.Namespace) -> list[Round]:
    """Rounds of about so many rows, both sides in turn."""
    batches, rounds = max(1, options.rows // variant.size), options.rounds
    # The watermark stands still during a round: what is called late must be before it at the end, too.
    assert not variant.late or options.rows / server.stream.devices < LATE_MINUTES[0] - 20
    found = []
    async with server.sides(variant, options.warm_up) as (store, raw):
        for number in range(1, rounds + 1):
            for side in (store, raw):
                side.advance(server.stream.moment(side.batches.position))
            found.append(Round(await store.run(batches), await raw.run(batches)))
            rates = " and ".join(report.count(cost.rate) for cost in found[-1])
            report.progress(f"{variant.name}: round {number} of {rounds}, {rates} rows a second")
    return found


def ratio(rounds: Iterable[Round]) -> report.Spread:
    """Of the rates: how much of raw COPY the store reaches."""
    return report.ratios(rounds, lambda found: found.store.rate, lambda found: found.raw.rate)


HEADER = (
    "batches of 5,000 readings", "store, rows/s", "raw COPY, rows/s", "ratio", "aim",
    "backend µs/row", "raw", "our µs/row", "raw", "WAL bytes/row", "raw",
)  # fmt: skip


def line(variant: Variant, rounds: list[Round]) -> list[str]:
    def middle(side: str, value: str, unit: float = 1.0) -> float:
        costs = [getattr(found, side) for found in rounds]
        return report.spread(getattr(cost, value) * unit / cost.rows for cost in costs).median

    figures = [f"{middle(side, value, 1e6):.2f}" for value in ("backend", "own") for side in Round._fields]
    return [
        variant.name,
        *(report.count(1 / middle(side, "seconds")) for side in Round._fields),
        str(ratio(rounds)),
        "" if variant.aim is None else f"≥ {variant.aim:g}",
        *figures,
        *(report.count(middle(side, "wal")) for side in Round._fields),
    ]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.arguments(__doc__, rounds=7)
    add = parser.add_argument
    known = ", ".join(VARIANTS)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=f"only these: {known}")
    add("--devices", type=int, default=20_000, help="half meters, half vehicles")
    add("--rows", type=int, default=200_000, help="about how many each side writes in a round")
    add(
        "--history",
        type=int,
        default=60,
        metavar="MINUTES",
        help=f"of the fleet, that are there before; {REPEATED_MINUTES} or more",
    )
    add_warm_up(parser)
    return report.parse(parser, "store", given, rows=20_000, history=REPEATED_MINUTES, warm_up=2)


def add_warm_up(parser: argparse.ArgumentParser) -> None:
    """By default so many that psycopg has prepared what is repeated, and PostgreSQL has settled on its plans."""
    parser.add_argument("--warm-up", type=int, default=12, metavar="BATCHES", help="before the first round")


def run(options: argparse.Namespace) -> tuple[dict[str, list[Round]], str]:
    """The rounds of each variant, and the version of the server."""
    with EmbeddedPostgres(SETTINGS) as running:
        report.progress(f"{options.history} minutes of history of {options.devices:,} devices")
        server = Server(running, Stream(options.devices, START), options.history)
        found = {}
        for name in options.variants:
            found[name] = uvloop.run(measure(server, VARIANTS[name], options))
        version = server.admin.info.parameter_status("server_version") or ""
        server.admin.close()
    return found, version


def main() -> None:
    options = arguments()
    logs.configure("warning", "console")
    conditions = report.Conditions.now()
    found, version = run(options)
    table = report.Table(HEADER, [line(VARIANTS[name], rounds) for name, rounds in found.items()])
    note = (
        f"Medians of {options.rounds} rounds of about {options.rows:,} rows a side, by turns; {options.devices:,} "
        "devices. The ratio is the median of those within each round (and their range). CPU time: the backend's, and "
        "that of our process while it writes. Where readings are repeated, raw COPY takes as many rows, all new."
    )
    report.publish("store", [table], [note], conditions.describe(version), options.write)


if __name__ == "__main__":
    main()
