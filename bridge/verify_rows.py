"""Readings as columns for `wattbridge verify`: what the ledger expects and what the database has, and which are pairs.

Timestamps are PostgreSQL's (microseconds since 2000), devices are numbers of the ledger.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from psycopg import Connection, sql

from bridge.messages import microseconds
from bridge.store import COPY_HEADER, COPY_TRAILER, POSTGRES_EPOCH
from bridge.verify_report import MISSING, SURPLUS, Check, Row, Values, difference
from simulator.messages import TICKS_PER_KWH
from simulator.truth import Rows, Truth

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Column = npt.NDArray[Any]
Snapshot = Connection[tuple[Any, ...]]
Describe = Callable[[int], Row]

# Beside the numbers of the ledger, which begin with 1 here; 0 stands for no meter.
UNKNOWN_METER = -1
# NULL, which only the view of another bridge can have, as a value that is never right.
TS_BYTES = sql.SQL("timestamptz_send(coalesce(found.ts, '-infinity')::timestamptz)")


class Kind(NamedTuple):
    """What there is to know about the tables of meters, or of vehicles."""

    name: str
    columns: tuple[str, ...]
    spellings: tuple[str, ...]
    """The same in JSON."""
    scales: tuple[int, ...]
    """How many of the ledger's steps make one unit of the column."""

    @property
    def key(self) -> str:
        """The column that names the device."""
        return f"{self.name}_id"


METER = Kind("meter", ("kwh_ac", "voltage"), ("kwhConsumedAc", "voltage"), (TICKS_PER_KWH, 10))
VEHICLE = Kind(
    "vehicle", ("kwh_dc", "soc", "battery_temp"), ("kwhDeliveredDc", "soc", "batteryTemp"), (TICKS_PER_KWH, 100, 10)
)
KINDS = (METER, VEHICLE)


class Devices:
    """The devices of a ledger, by number and by name."""

    def __init__(self, truth: Truth) -> None:
        self.ids = truth.ids
        self.first = {METER: 0, VEHICLE: truth.meters}
        self.numbers = {name: number for number, name in enumerate(truth.ids)}
        self._names = {METER: truth.ids[: truth.meters], VEHICLE: truth.ids[truth.meters :]}

    def kind(self, number: int) -> Kind:
        """Whether it is a meter or a vehicle."""
        return METER if number < self.first[VEHICLE] else VEHICLE

    def name(self, kind: Kind, number: int) -> str:
        """The name of the device that a join calls by this number."""
        return self._names[kind][number - 1]

    def join(self, how: str, kind: Kind, alias: str, key: str) -> sql.Composed:
        """A join of `found` with the devices of a kind, which gives their `number`, from 1."""
        return sql.SQL(
            "{how} unnest({names}::text[]) WITH ORDINALITY AS {alias} (id, number) ON {alias}.id = found.{key}"
        ).format(
            how=sql.SQL(how),
            names=sql.Literal(self._names[kind]),
            alias=sql.Identifier(alias),
            key=sql.Identifier(key),
        )


class Found(NamedTuple):
    """Rows of a table, of the devices that the ledger knows, and how many others there are."""

    kind: Kind
    table: str
    device: npt.NDArray[np.int32]
    ts: Ints
    values: dict[str, Column]
    others: int


class Pairs(NamedTuple):
    """Places of rows that are the same in both, then of those that are only expected, and only found."""

    expected: Ints
    found: Ints
    missing: Ints
    surplus: Ints


class Reading(NamedTuple):
    """One reading, with values by column as in `Found`."""

    device: int
    ts: int
    values: dict[str, Any]


class UnknownMeter(NamedTuple):
    """Stands for the name of a meter that the ledger does not know, until the database is free to tell it."""

    table: str
    vehicle: str
    ts: int


def fetch(connection: Snapshot, devices: Devices, kind: Kind, which: str) -> Found:
    """History or live rows by binary COPY, whose rows all have one size: the simplest way out, and none was faster."""
    fields = [("device", ">i4"), ("ts", ">i8"), *((name, ">f8") for name in kind.columns)]
    if kind is VEHICLE:
        fields.append(("meter_id", ">i4"))
    record = np.dtype(
        [("fields", ">i2"), *(part for name, form in fields for part in ((f"{name} length", ">i4"), (name, form)))]
    )
    table = f"{kind.name}_{which}"
    raw = bytearray()
    with connection.cursor() as cursor, cursor.copy(_copy(devices, kind, table)) as copy:
        for data in copy:
            raw += data
    count = (len(raw) - len(COPY_HEADER) - len(COPY_TRAILER)) // record.itemsize
    rows = np.frombuffer(raw, record, count, len(COPY_HEADER))
    device = rows["device"].astype(np.int32)
    known = device >= 0
    others = len(rows) - int(np.count_nonzero(known))
    if others:
        rows, device = rows[known], device[known]
    values = {name: rows[name].astype(record[name].newbyteorder("=")) for name, _ in fields[2:]}
    return Found(kind, table, device, rows["ts"].astype(np.int64), values, others)


def _copy(devices: Devices, kind: Kind, table: str) -> sql.Composed:
    columns = [
        sql.SQL("coalesce({} + known.number - 1, -1)::int4").format(devices.first[kind]),
        sql.SQL("coalesce(found.ts, '-infinity')::timestamptz"),
        *(sql.SQL("coalesce(found.{}::float8, 'NaN')").format(sql.Identifier(name)) for name in kind.columns),
    ]
    joins = [devices.join("LEFT JOIN", kind, "known", kind.key)]
    if kind is VEHICLE:
        plugged = sql.SQL("CASE WHEN found.meter_id IS NULL THEN 0 ELSE coalesce(plug.number, {}) END::int4")
        columns.append(plugged.format(UNKNOWN_METER))
        joins.append(devices.join("LEFT JOIN", METER, "plug", METER.key))
    return sql.SQL("COPY (SELECT {} FROM {} AS found {}) TO STDOUT (FORMAT BINARY)").format(
        sql.SQL(", ").join(columns), sql.Identifier(table), sql.SQL(" ").join(joins)
    )


def pair(device: Column, ts: Ints, found_device: Column, found_ts: Ints) -> Pairs:
    """Pairs rows by (device, ts), of which the expected have one each; more than one found are surplus."""
    all_device, all_ts = np.concatenate((device, found_device)), np.concatenate((ts, found_ts))
    order = np.lexsort((all_ts, all_device))
    all_device, all_ts = all_device[order], all_ts[order]
    is_found = order >= len(ts)
    # The sort is stable: of equals the expected one comes first.
    meets = (all_device[1:] == all_device[:-1]) & (all_ts[1:] == all_ts[:-1]) & ~is_found[:-1] & is_found[1:]
    expected, found = order[:-1][meets], order[1:][meets] - len(ts)
    lacks, extra = np.ones(len(ts), np.bool_), np.ones(len(found_ts), np.bool_)
    lacks[expected], extra[found] = False, False
    places = np.flatnonzero(extra)
    surplus = places[np.lexsort((found_ts[places], found_device[places]))]
    return Pairs(expected, found, np.flatnonzero(lacks), surplus)


def any_differs(differs: Mapping[str, Bools]) -> Bools:
    """Which of the pairs differ in at least one column."""
    which: Bools = np.logical_or.reduce([*differs.values()])
    return which


def add_lone(check: Check, pairs: Pairs, must: Describe, has: Describe) -> None:
    """Counts what is only expected, and what is only found."""
    check.add_all(MISSING, pairs.missing, lambda at: difference(MISSING, must(at), None))
    check.add_all(SURPLUS, pairs.surplus, lambda at: difference(SURPLUS, None, has(at)))


def add_unlike(
    check: Check, kind: str, which: Bools, differs: Mapping[str, Bools], pairs: Pairs, must: Describe, has: Describe
) -> None:
    """Counts pairs as differences of a kind, each with the columns that differ."""
    check.add_all(
        kind,
        np.flatnonzero(which),
        lambda at: difference(
            kind,
            must(pairs.expected[at]),
            has(pairs.found[at]),
            [name for name, column in differs.items() if column[at]],
        ),
    )


def expected_values(kind: Kind, rows: Rows) -> dict[str, Column]:
    """The columns as the table has them: whole steps over a power of ten are exactly what their decimals parse to."""
    steps = (rows.energy, rows.level, rows.temperature)
    values: dict[str, Column] = {
        name: column / scale for name, column, scale in zip(kind.columns, steps, kind.scales, strict=False)
    }
    return values | ({"meter_id": rows.meter} if kind is VEHICLE else {})


def differing(expected: Rows, found: Found, pairs: Pairs) -> dict[str, Bools]:
    """Of each column, which of the pairs have another value; NaN is never right."""
    return {
        name: column[pairs.expected] != found.values[name][pairs.found]
        for name, column in expected_values(found.kind, expected).items()
    }


def expected_row(devices: Devices, kind: Kind, rows: Rows, at: int) -> Row:
    """A row of the ledger, with names."""
    values: Values = {}
    for name, column in expected_values(kind, rows.part(slice(at, at + 1))).items():
        value = column[0].item()
        values[name] = value if name != "meter_id" else devices.name(METER, value) if value else None
    return Row(devices.ids[rows.device[at]], moment(int(rows.ts[at]) - POSTGRES_EPOCH), values)


def found_row(devices: Devices, found: Found, at: int) -> Row:
    """A row of the database, with names."""
    device, ts = devices.ids[found.device[at]], int(found.ts[at])
    values: Values = {name: column[at].item() for name, column in found.values.items()}
    if number := values.get("meter_id"):
        unknown = number == UNKNOWN_METER
        values["meter_id"] = UnknownMeter(found.table, device, ts) if unknown else devices.name(METER, number)
    elif "meter_id" in values:
        values["meter_id"] = None
    return Row(device, moment(ts), values)


def name_unknown_meters(connection: Snapshot, checks: Sequence[Check]) -> None:
    """Puts the names of meters that the ledger does not know where they are shown."""
    for found in (one.found for check in checks for one in check.differences if one.found):
        unknown = found.get("meter_id")
        if isinstance(unknown, UnknownMeter):
            query = sql.SQL("SELECT meter_id::text FROM {} AS found WHERE vehicle_id = %s AND {} = %s")
            row = connection.execute(
                query.format(sql.Identifier(unknown.table), TS_BYTES),
                (unknown.vehicle, unknown.ts.to_bytes(8, "big", signed=True)),
            ).fetchone()
            found["meter_id"] = row[0] if row else None


def other_rows(connection: Snapshot, devices: Devices, kind: Kind, table: str, limit: int) -> list[Row]:
    """The first rows of devices that the ledger does not know."""
    names = (*kind.columns, "meter_id") if kind is VEHICLE else kind.columns
    columns = [sql.SQL("found.{}::{}").format(sql.Identifier(name), sql.SQL("text" if name == "meter_id" else "float8"))
               for name in names]  # fmt: skip
    query = sql.SQL(
        "SELECT found.{key}::text, {ts}, {columns} FROM {table} AS found {known} WHERE known.id IS NULL "
        "ORDER BY found.{key}, found.ts LIMIT {limit}"
    ).format(
        key=sql.Identifier(kind.key),
        ts=TS_BYTES,
        columns=sql.SQL(", ").join(columns),
        table=sql.Identifier(table),
        known=devices.join("LEFT JOIN", kind, "known", kind.key),
        limit=limit,
    )
    return [
        Row(device, moment(int.from_bytes(ts, "big", signed=True)), dict(zip(names, values, strict=True)))
        for device, ts, *values in connection.execute(query)
    ]


def moment(ts: int) -> str:
    """A timestamp of PostgreSQL as RFC 3339 with as many digits as it needs."""
    if ts in {-(2**63), 2**63 - 1}:
        return "infinity" if ts > 0 else "-infinity"
    text = str(np.datetime64(ts + POSTGRES_EPOCH, "us"))
    return text.rstrip("0").rstrip(".") + "Z" if "." in text else f"{text}Z"


def parse_moment(value: object) -> int | None:
    """The timestamp of PostgreSQL that an RFC 3339 text names; None where it is none."""
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    if parsed is None:
        return None
    return microseconds(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - POSTGRES_EPOCH


def parse_reading(devices: Devices, device: int, said: object) -> Reading | None:
    """A device's reading from JSON that anyone may have written; None where it is none."""
    if not isinstance(said, dict) or (ts := parse_moment(said.get("timestamp"))) is None:
        return None
    kind = devices.kind(device)
    numbers = [said.get(spelling) for spelling in kind.spellings]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    values = dict(zip(kind.columns, numbers, strict=True))
    if kind is VEHICLE:
        meter = said.get("meterId")
        number = devices.numbers.get(meter, UNKNOWN_METER - 1) if isinstance(meter, str) else -1
        values["meter_id"] = number + 1
    return Reading(device, ts, values)
