"""The database side of the data path: one transaction for each batch, and a verdict on what PostgreSQL says.

The one module on the data path that runs psycopg.
"""

import math
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from functools import cache
from importlib.resources import files
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import structlog
from psycopg import AsyncConnection, AsyncCursor
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.sql import SQL, Identifier

from bridge.batch import Batch, DeadLetter
from bridge.config import Database
from bridge.errors import ConfigError
from bridge.messages import DAY, EPOCH, SECOND, MeterReading, Reading, microseconds, printable
from bridge.migrate import check_schema
from bridge.topics import Kind

log = structlog.get_logger()

# PostgreSQL's own epoch, 2000-01-01, in microseconds since 1970: what binary timestamps count from.
POSTGRES_EPOCH = 946_684_800_000_000
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
# A half-open connection to the database is noticed after about this long.
KEEPALIVES = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "connect_timeout": "5",
    "application_name": "wattbridge",
    "client_encoding": "UTF8",
}
# What the data is to blame for: trying again cannot help. P0001 is what a trigger raises that refuses a row.
# Everything else is tried again.
DATA_ERRORS = ("22", "23", "P0001")
# Not the data but our way of sending it: unknown, so it is tried again.
FORMAT_ERRORS = ("22P03", "22P04")
# What passes by itself: connection, transaction rollback, resources, operator intervention (shutdown, timeout), a lock,
# a session that the server ended because we were held up in a transaction.
PASSING_ERRORS = ("08", "40", "53", "57", "55P03", "25P03", "25P04")
# Set for each session, whatever database or role say: the calendar of the partitions, and a new snapshot for each
# statement (the one after a lock must see what the lock waited for).
SETTINGS = {"datestyle": "ISO", "timezone": "UTC", "jit": "off", "default_transaction_isolation": "read committed"}
# On the data path, plans that look readings up by key. (Staging tables have no statistics, and a plan made while a
# partition was small is kept when it is not: without this and jit = off a batch of duplicates may read the whole
# partition once for each of them. And without other joins than nested loops, what is joined with a staging table is
# looked at, and locked, in the order of the staging table.)
BY_KEY = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "enable_material": "off"}


# So many devices of a kind are remembered to have a live row: about 20 MB.
MOST_MET = 200_000


class Totals(NamedTuple):
    """The counters of this daemon since its first start, as committed."""

    received: int = 0
    stored: int = 0
    duplicate: int = 0
    dead_lettered: int = 0
    presence: int = 0


class RetryError(Exception):
    """The database could not take the batch now; the same batch again, later.

    `expected` is false for errors that are not known to pass by themselves: those deserve a complaint.
    """

    def __init__(self, reason: str, *, expected: bool) -> None:
        super().__init__(reason)
        self.expected = expected


class RefusedError(Exception):
    """The database refuses something in the batch; the rest of it is fine."""


class Store:
    """Writes batches over one connection, made when needed. `instance` names the counters of this daemon."""

    def __init__(self, config: Database, instance: str) -> None:
        self._config = config
        self._instance = instance
        self._connection: AsyncConnection[tuple[Any, ...]] | None = None
        self._attempted: UUID | None = None
        self._met: dict[Kind, set[str]] = {kind: set() for kind in Kind}
        self._partitions: dict[str, set[int]] = {"meter_history": set(), "vehicle_history": set()}

    async def open(self) -> Totals:
        """Connects where there is no connection, checks that the schema is ours, and reads the counters.

        Raises RetryError.
        """
        try:
            return await self._totals(await self._connected())
        except Exception as error:
            raise await self._verdict(error) from error

    async def close(self) -> None:
        """Closes the connection; the next call makes a new one."""
        if self._connection:
            await self._connection.close()
        self._connection = None

    async def write(self, batch: Batch) -> Totals:
        """Commits what becomes of each part of the batch: history, duplicate, dead letter; once, however often called.

        Raises RetryError or RefusedError; then nothing of the batch is committed, or the answer was lost.
        """
        try:
            try:
                return await self._commit(batch)
            except psycopg.errors.CheckViolation as error:
                if error.diag.constraint_name:
                    raise
                # No constraint, so there is no partition: it was dropped since we looked, and is made again.
                self._forget()
                return await self._commit(batch)
            except psycopg.errors.UniqueViolation as error:
                # Perhaps somebody put a live row back: it does not tell any more what is new.
                log.info("store.live_distrusted", reason=describe(error))
                self._forget()
                return await self._commit(batch, trusting=False)
        except Exception as error:
            raise await self._verdict(error) from error

    async def _commit(self, batch: Batch, *, trusting: bool = True) -> Totals:
        """`trusting`: whether live rows are taken for the newest readings of history, so that it need not be asked."""
        connection = await self._connected()
        # What is tried again may have been committed, and is what the live rows say itself.
        trusting = trusting and batch.id != self._attempted
        self._attempted = batch.id
        await self._ensure_partitions(connection, "meter_history", batch.meters.values())
        await self._ensure_partitions(connection, "vehicle_history", batch.vehicles.values())
        async with connection.transaction(), connection.cursor() as cursor:
            return await self._write(cursor, batch, trusting=trusting)

    async def _write(self, cursor: AsyncCursor[tuple[Any, ...]], batch: Batch, *, trusting: bool) -> Totals:
        late_before = await _begin(cursor)
        meters, vehicles = [
            await _store_readings(cursor, kind, readings.values(), late_before, self._met[kind], trusting=trusting)
            for kind, readings in ((Kind.METER, batch.meters), (Kind.VEHICLE, batch.vehicles))
        ]
        stored = meters.stored + vehicles.stored
        differing = meters.differing | vehicles.differing
        known = len(batch.meters) + len(batch.vehicles) - stored - len(differing)
        if stored and batch.oldest < late_before:
            await cursor.execute(_sql("mark_late"))

        replayed = await _delete_replayed(cursor, batch)
        conflicts, rivals_known = batch.conflicts(differing)
        letters = [*batch.dead_letters, *conflicts]
        dead = await _insert_dead_letters(cursor, letters)
        await _upsert_presence(cursor, batch)

        await cursor.execute(
            _sql("count_batch"),
            {
                "instance": self._instance,
                "received": batch.received - replayed,
                "stored": stored,
                "duplicate": batch.duplicates + known + rivals_known + len(letters) - dead,
                "dead_lettered": dead - replayed,
                "presence": batch.statuses,
                "batch": batch.id,
            },
        )
        counted = await cursor.fetchone()
        duplicates = batch.duplicates_of(differing)
        if counted and (known or duplicates):
            await _count_duplicates(cursor, duplicates, known=known > 0)
        return Totals(*counted) if counted else await self._totals(cursor)

    async def _totals(self, on: AsyncConnection[tuple[Any, ...]] | AsyncCursor[tuple[Any, ...]]) -> Totals:
        cursor = await on.execute(_sql("read_counters"), {"instance": self._instance})
        row = await cursor.fetchone()
        return Totals(*row) if row else Totals()

    async def _connected(self) -> AsyncConnection[tuple[Any, ...]]:
        if self._connection is None or self._connection.broken or self._connection.closed:
            self._connection = None
            connection = await connect(self._config, BY_KEY, self._config.statement_timeout_s)
            try:
                await connection.execute(_sql("stage"))
            except BaseException:
                await connection.close()
                raise
            # Another server may answer now: ask again.
            self._forget()
            self._connection = connection
            log.info("database.connected", host=connection.info.host, database=connection.info.dbname)
        return self._connection

    async def _ensure_partitions(
        self, connection: AsyncConnection[tuple[Any, ...]], history: str, readings: Iterable[Reading]
    ) -> None:
        times = [reading.ts for reading in readings]
        if not times:
            return
        first, last = min(times) // DAY, max(times) // DAY
        missing = ({first} if first == last else {ts // DAY for ts in times}) - self._partitions[history]
        if missing:
            await create_partitions(connection, history, missing)
            self._partitions[history] |= missing

    def _forget(self) -> None:
        """Takes nothing for granted any more: what a transaction made that was rolled back is not there."""
        for days in self._partitions.values():
            days.clear()
        for met in self._met.values():
            met.clear()

    async def _verdict(self, error: Exception) -> RetryError | RefusedError:
        """What to do about an error, by its SQLSTATE; the connection is given up unless the data is to blame."""
        self._forget()
        if _state(error).startswith(DATA_ERRORS) and _state(error) not in FORMAT_ERRORS:
            return RefusedError(describe(error))
        await self.close()
        return RetryError(describe(error), expected=passes(error))


async def connect(
    config: Database, settings: Mapping[str, str], statement_timeout_s: float, **parameters: str
) -> AsyncConnection[tuple[Any, ...]]:
    """A connection in autocommit mode, set up for us and to a database with our schema; `parameters` are libpq's.

    Raises psycopg.Error.
    """
    dsn = make_conninfo(conninfo(config), **parameters)
    connection = await AsyncConnection.connect(dsn, autocommit=True)
    try:
        timeout = max(1, int(statement_timeout_s * 1_000))
        for name, value in {**SETTINGS, **settings, "statement_timeout": str(timeout)}.items():
            await connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        await check_schema(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


async def create_partitions(connection: AsyncConnection[tuple[Any, ...]], history: str, days: Iterable[int]) -> None:
    """Makes the partitions that a history table lacks for these days, counted from 1970-01-01."""
    dates = [EPOCH.date() + timedelta(days=day) for day in sorted(days)]
    await connection.execute("SELECT ensure_history_partitions(%s::regclass, %s::date[])", (history, dates))


def describe(error: Exception) -> str:
    """What an error says, in one line, with its SQLSTATE where it has one."""
    reason = printable(" ".join(str(error).split())) or type(error).__name__
    return f"{reason} (SQLSTATE {state})" if (state := _state(error)) else reason


def passes(error: Exception) -> bool:
    """Whether the error is known to pass by itself."""
    state = _state(error)
    return state.startswith(PASSING_ERRORS) or (not state and isinstance(error, psycopg.OperationalError))


def _state(error: Exception) -> str:
    return (isinstance(error, psycopg.Error) and error.sqlstate) or ""


async def _begin(cursor: AsyncCursor[tuple[Any, ...]]) -> float:
    """Holds the watermark until the commit, and returns it: readings with an earlier timestamp are late."""
    # Not prepared: only so can it be two statements.
    await cursor.execute(_sql("begin_batch"), prepare=False)
    cursor.nextset()
    row = await cursor.fetchone()
    return row[0] * SECOND if row else -math.inf


async def _count_duplicates(
    cursor: AsyncCursor[tuple[Any, ...]], duplicates: Mapping[tuple[Kind, str], int], *, known: bool
) -> None:
    await cursor.execute(
        _sql("count_duplicates"),
        {
            "known": known,
            "device_ids": [device_id for _, device_id in duplicates],
            "kinds": [str(kind) for kind, _ in duplicates],
            "duplicates": list(duplicates.values()),
        },
    )


class _Stored(NamedTuple):
    """How many readings are new, and the values in history of those that history knows with others."""

    stored: int
    differing: dict[tuple[Kind, str, int], tuple[object, ...]]


async def _store_readings(
    cursor: AsyncCursor[tuple[Any, ...]],
    kind: Kind,
    readings: Collection[Reading],
    late_before: float,
    met: set[str],
    *,
    trusting: bool,
) -> _Stored:
    """History and live state of one kind; what is left over is known already, with the same values or with others.

    What is newer than the live row of its device is copied straight into history, all else by way of the staging table.
    """
    if not readings:
        return _Stored(0, {})
    in_order = sorted(readings, key=attrgetter("device_id"))
    oldest = newest = {reading.device_id: reading for reading in in_order}
    if len(newest) < len(in_order):
        in_order.sort()  # by device, then by time
        newest = {reading.device_id: reading for reading in in_order}
        first = {reading.device_id: reading for reading in reversed(in_order)}
        oldest = {device_id: first[device_id] for device_id in newest}
    rows = copy_rows(oldest.values())
    doubtful_devices = await _claim(cursor, kind, oldest.keys(), rows, met)
    if not trusting:
        doubtful_devices = oldest.keys()
    certain, doubtful, copied = in_order, [], 0
    if doubtful_devices:
        certain = [reading for reading in in_order if reading.device_id not in doubtful_devices]
        doubtful = [reading for reading in in_order if reading.device_id in doubtful_devices]
    if certain:
        same = certain is in_order and newest is oldest
        copied = await _copy(cursor, kind, f"{kind}_history", rows if same else copy_rows(certain))

    stored, differing = await _store_doubtful(cursor, kind, doubtful) if doubtful else _Stored(0, {})
    # The staging table is also where the live rows get the newest readings from, and the marks the late ones.
    besides = [r for r in certain if r.ts < late_before or oldest[r.device_id] is not r is newest[r.device_id]]
    if besides:
        await _copy(cursor, kind, f"staged_{kind}", copy_rows(besides))
    if doubtful or besides:
        await cursor.execute(_sql(f"upsert_{kind}_live"))
    return _Stored(copied + stored, differing)


async def _store_doubtful(cursor: AsyncCursor[tuple[Any, ...]], kind: Kind, readings: list[Reading]) -> _Stored:
    """Readings that history may know."""
    await _copy(cursor, kind, f"staged_{kind}", copy_rows(readings))
    await cursor.execute(_sql(f"insert_{kind}_history"))
    stored = cursor.rowcount
    return _Stored(stored, await _find_conflicts(cursor, kind) if stored < len(readings) else {})


async def _claim(
    cursor: AsyncCursor[tuple[Any, ...]], kind: Kind, device_ids: Collection[str], rows: bytes, met: set[str]
) -> Collection[str]:
    """Makes the oldest reading of each device its live row, where it is newer; returns the devices where it is not.

    `rows` are these readings for COPY, in the order of the key; `met` are devices that had a live row before.
    From here on the live rows are ours until the commit: another writer of these devices waits here and nowhere else.
    """
    await _copy(cursor, kind, f"claimed_{kind}", rows)
    if not met.issuperset(device_ids):
        await cursor.execute(_sql(f"claim_new_{kind}s"))
        if len(met) > MOST_MET:
            met.clear()
        met.update(device_ids)
    await cursor.execute(_sql(f"claim_{kind}_live"))
    ((touched, as_new),) = await cursor.fetchall()
    # There are fewer where somebody deleted live rows of devices that we have met: then we do not know which.
    return set(as_new or ()) if touched == len(device_ids) else device_ids


async def _copy(cursor: AsyncCursor[tuple[Any, ...]], kind: Kind, table: str, rows: bytes) -> int:
    """Copies rows into a table; returns how many it took: a trigger may skip some."""
    async with cursor.copy(_COPY[kind].format(Identifier(table))) as copy:
        await copy.write(rows)
    return cursor.rowcount


async def _find_conflicts(
    cursor: AsyncCursor[tuple[Any, ...]], kind: Kind
) -> dict[tuple[Kind, str, int], tuple[object, ...]]:
    """The values in history of those staged readings that it knows with others."""
    # Binary: exact, however the database would write a number or a date.
    await cursor.execute(_sql(f"find_{kind}_conflicts"), binary=True)
    return {(kind, device_id, microseconds(ts)): tuple(v) for device_id, ts, *v in await cursor.fetchall()}


async def _insert_dead_letters(cursor: AsyncCursor[tuple[Any, ...]], letters: list[DeadLetter]) -> int:
    if not letters:
        return 0
    await cursor.execute(
        _sql("insert_dead_letters"),
        {
            "device_ids": [letter.device_id for letter in letters],
            "digests": [letter.digest for letter in letters],
            "topics": [letter.topic for letter in letters],
            "payloads": [letter.payload for letter in letters],
            "content_types": [letter.content_type for letter in letters],
            "reasons": [str(letter.reason) for letter in letters],
            "details": [letter.detail for letter in letters],
            "received_ats": [EPOCH + timedelta(microseconds=letter.received_at) for letter in letters],
        },
        binary=True,
    )
    return cursor.rowcount


async def _delete_replayed(cursor: AsyncCursor[tuple[Any, ...]], batch: Batch) -> int:
    if not batch.replayed:
        return 0
    await cursor.execute(
        _sql("delete_replayed"),
        {
            "device_ids": [key.device_id for key in batch.replayed],
            "digests": [key.digest for key in batch.replayed],
        },
    )
    return cursor.rowcount


async def _upsert_presence(cursor: AsyncCursor[tuple[Any, ...]], batch: Batch) -> None:
    if batch.presences:
        said = batch.presences.values()
        await cursor.execute(
            _sql("upsert_presence"),
            {
                "device_ids": [presence.device_id for presence in said],
                "kinds": [str(presence.kind) for presence in said],
                "onlines": [presence.online for presence in said],
                "received_ats": [EPOCH + timedelta(microseconds=presence.received_at) for presence in said],
                "replayed": bool(batch.replayed),
            },
        )


def conninfo(config: Database) -> str:
    """The libpq connection string, with our defaults where the DSN says nothing.

    Raises ConfigError where the DSN is not one.
    """
    dsn = config.dsn.get_secret_value()
    try:
        given = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    except psycopg.ProgrammingError:
        # What libpq says about it quotes the DSN, and so perhaps the password.
        raise ConfigError(
            "database.dsn (masked) is neither postgresql://user:password@host:port/database nor key=value pairs"
        ) from None
    # libpq takes the rest of such a password for host, port or database, and says it when it cannot be found.
    host, port = given.get("host", ""), given.get("port", "")
    named = given.get("dbname", "") + ("" if host.startswith(("/", "@")) else host)
    if dsn.startswith(("postgresql://", "postgres://")) and ("@" in named or not set(port) <= set("0123456789,")):
        raise ConfigError("database.dsn (masked): write @ as %40 and / as %2F within the password")
    password = config.password.get_secret_value()
    return make_conninfo(**KEEPALIVES | ({"password": password} if password else {}) | given)


def copy_rows(readings: Iterable[Reading]) -> bytes:
    """Readings as one binary COPY stream for the staging tables, in their column order.

    Format: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
    """
    rows = [COPY_HEADER]
    for reading in readings:
        if isinstance(reading, MeterReading):
            name, ts, kwh_ac, voltage, received_at, from_arrival = reading
            device = name.encode()
            rows.append(
                _meter_packer(len(device))(
                    6, len(device), device, 8, ts - POSTGRES_EPOCH, 8, kwh_ac, 8, voltage,
                    8, received_at - POSTGRES_EPOCH, 1, from_arrival,
                )
            )  # fmt: skip
        else:
            name, ts, kwh_dc, soc, battery_temp, meter_id, received_at, from_arrival = reading
            device, meter = name.encode(), (meter_id or "").encode()
            rows.append(
                _vehicle_packer(len(device), len(meter))(
                    8, len(device), device, 8, ts - POSTGRES_EPOCH, 8, kwh_dc, 8, soc, 8, battery_temp,
                    len(meter) or -1, meter, 8, received_at - POSTGRES_EPOCH, 1, from_arrival,
                )
            )  # fmt: skip
    rows.append(COPY_TRAILER)
    return b"".join(rows)


@cache
def _meter_packer(device: int) -> Callable[..., bytes]:
    return struct.Struct(f">hi{device}siqididiqi?").pack


@cache
def _vehicle_packer(device: int, meter: int) -> Callable[..., bytes]:
    return struct.Struct(f">hi{device}siqidididi{meter}siqi?").pack


@cache
def _sql(name: str) -> str:
    """A statement of the hot path, from sql/ingest."""
    return files("bridge").joinpath("sql", "ingest", f"{name}.sql").read_text(encoding="utf-8")


# The columns of copy_rows, by name: a later schema may have more.
_COPY = {
    Kind.METER: SQL("COPY {} (meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival) FROM STDIN (FORMAT BINARY)"),
    Kind.VEHICLE: SQL(
        "COPY {} (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival) "
        "FROM STDIN (FORMAT BINARY)"
    ),
}
