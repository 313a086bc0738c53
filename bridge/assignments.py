"""Charger assignments from the operator's side: which vehicle charges at which meter, and when; from CSV and back."""

import codecs
import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from typing import NamedTuple, TextIO

import psycopg
from psycopg import Connection, sql

from bridge.config import Config
from bridge.errors import WattbridgeError
from bridge.messages import RFC3339, microseconds, printable
from bridge.store import conninfo
from bridge.topics import is_device_id

MOST_PROBLEMS_NAMED = 20
LONGEST_VALUE_NAMED = 64
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
TIMES_ALLOWED = "RFC 3339 with a zone (2026-01-31T06:00:00Z) or a date (its midnight in UTC)"
# A row that somebody wrote by hand may have other bounds: these are the same times as half open, open where infinite.
BOUNDS = sql.SQL(
    "nullif(lower(valid) + (NOT lower_inc(valid))::integer * interval '1 microsecond', '-infinity'), "
    "nullif(upper(valid) + upper_inc(valid)::integer * interval '1 microsecond', 'infinity')"
)
# In a zone that turns its clocks back, moments of that hour would not compare with those of a file.
UTC_ONLY = sql.SQL("SET LOCAL TIME ZONE 'UTC'")


class Assignment(NamedTuple):
    """A vehicle charges at a meter from one moment until before another; None: always has, always will."""

    vehicle_id: str
    meter_id: str
    valid_from: datetime | None
    valid_until: datetime | None

    @property
    def since(self) -> float:
        """The start in microseconds since 1970, or minus infinity."""
        return -math.inf if self.valid_from is None else microseconds(self.valid_from)

    @property
    def until(self) -> float:
        """The end in microseconds since 1970, or infinity."""
        return math.inf if self.valid_until is None else microseconds(self.valid_until)

    def __str__(self) -> str:
        """As a message names it."""
        vehicle, meter = (printable(device_id, LONGEST_VALUE_NAMED) for device_id in self[:2])
        since, until = (time_text(moment) if moment else "open" for moment in self[2:])
        return f"{vehicle} at {meter} ({since} to {until})"


COLUMNS = Assignment._fields


class Mode(Enum):
    """What a file says about assignments that it does not have."""

    ADD = auto()
    """Nothing: they stay."""
    UPDATE = auto()
    """Those of vehicles that it names are gone, those of others stay."""
    REPLACE = auto()
    """They are gone."""


class Change(NamedTuple):
    """What an import comes to."""

    added: Sequence[Assignment]
    removed: Sequence[Assignment]
    unchanged: int


class Selection(NamedTuple):
    """Which assignments: those that meet every condition that is given."""

    vehicle_id: str | None = None
    meter_id: str | None = None
    at: datetime | None = None

    def condition(self) -> sql.Composed:
        """As the condition of a WHERE clause."""
        parts: list[sql.Composable] = [sql.SQL("true")]
        if self.vehicle_id is not None:
            parts.append(sql.SQL("vehicle_id = {}").format(self.vehicle_id))
        if self.meter_id is not None:
            parts.append(sql.SQL("meter_id = {}").format(self.meter_id))
        if self.at is not None:
            parts.append(sql.SQL("valid @> {}").format(self.at))
        return sql.SQL(" AND ").join(parts)


# --- CSV ---------------------------------------------------------------------------------------------------


def parse(data: bytes) -> dict[int, Assignment]:
    """The assignments of a CSV file by line number.

    Raises WattbridgeError, which names all that is wrong with the file.
    """
    lines = data.removeprefix(codecs.BOM_UTF8).splitlines() or [b""]
    try:
        header = lines[0].decode()
        # Where the comma stands in numbers, spreadsheets write semicolons; no column has either in its name.
        separator = ";" if ";" in header and "," not in header else ","
        columns = _columns(_values(header, separator))
    except _Problems as wrong:
        raise _error([(1, text) for text in wrong.texts]) from None
    except UnicodeDecodeError:
        raise _error([(1, "is not UTF-8: save the file as CSV in UTF-8")]) from None
    found: dict[int, Assignment] = {}
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            values = _values(line.decode(), separator)
            if any(values):
                found[number] = _assignment(values, columns)
        except _Problems as wrong:
            problems.extend((number, text) for text in wrong.texts)
        except UnicodeDecodeError:
            problems.append((number, "is not UTF-8: save the file as CSV in UTF-8"))
    first = _first_lines(found)
    for one, other in _overlaps(first):
        number, before = max(first[one], first[other]), min(first[one], first[other])
        problems.append((number, f"{found[number]} overlaps line {before}: {found[before]}; one meter at a time"))
    if problems:
        raise _error(problems)
    return found


def parse_time(text: str) -> datetime:
    """A moment from RFC 3339 with a zone, or from a date, which stands for its midnight in UTC.

    Raises ValueError, which says what is wrong with the text and what is allowed.
    """
    fault = "is no time"
    try:
        if DATE.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        if RFC3339.fullmatch(text):
            moment = datetime.fromisoformat(text.upper())
            if moment.tzinfo:
                return moment.astimezone(UTC)
            fault = "has no zone"
    except (ValueError, OverflowError):
        pass  # the 30th of February, or before the year 1 in UTC
    raise ValueError(f"{_shown(text)} {fault}; allowed is {TIMES_ALLOWED}")


def time_text(moment: datetime) -> str:
    """A moment in UTC as RFC 3339, so that it can be read again."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def write_csv(assignments: Iterable[Assignment], file: TextIO) -> None:
    """Writes what `parse` reads."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for assignment in assignments:
        writer.writerow([*assignment[:2], *(time_text(moment) if moment else "" for moment in assignment[2:])])


class _Problems(Exception):  # noqa: N818 - the verdict on a line, which parse collects
    """What is wrong with a line."""

    def __init__(self, *texts: str) -> None:
        super().__init__(*texts)
        self.texts = texts


def _values(line: str, separator: str) -> list[str]:
    """The values of a line. Line by line, so that a quote that is not closed spoils no others."""
    try:
        rows = list(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise _Problems(f"is not CSV ({error}); quotes open and close around one value, on one line") from None
    return [value.strip() for row in rows for value in row]


def _columns(header: Sequence[str]) -> Sequence[str]:
    """The columns of the header, in the order of the file, if they are exactly those there must be."""
    problems = [f"unknown column {_shown(name)}" for name in header if name not in COLUMNS]
    problems += [f"missing column {name!r}" for name in COLUMNS if name not in header]
    problems += [f"column {name!r} stands there twice" for name in COLUMNS if header.count(name) > 1]
    if problems:
        raise _Problems(f"{', '.join(problems[:8])}; it must be the header: {','.join(COLUMNS)}")
    return header


def _assignment(values: Sequence[str], columns: Sequence[str]) -> Assignment:
    if len(values) != len(columns):
        raise _Problems(f"{len(values)} values, but the header names {len(columns)}: {','.join(columns)}")
    row = dict(zip(columns, values, strict=True))
    problems = [
        f"{column} {_shown(row[column])} is no device id; allowed are 1 to 128 of A-Z a-z 0-9 . _ : -"
        for column in COLUMNS[:2]
        if not is_device_id(row[column])
    ]
    times: list[datetime | None] = []
    for column in COLUMNS[2:]:
        try:
            times.append(parse_time(row[column]) if row[column] else None)
        except ValueError as error:
            problems.append(f"{column} {error}, or nothing (open)")
    if problems:
        raise _Problems(*problems)
    assignment = Assignment(row["vehicle_id"], row["meter_id"], *times)
    if not assignment.since < assignment.until:
        since, until = row["valid_from"], row["valid_until"]
        raise _Problems(f"valid_until {_shown(until)} must be after valid_from {_shown(since)}")
    return assignment


def _first_lines(lines: Mapping[int, Assignment]) -> dict[Assignment, int]:
    """Each assignment with the line where it stands first."""
    first: dict[Assignment, int] = {}
    for number, assignment in lines.items():
        first.setdefault(assignment, number)
    return first


def _overlaps(assignments: Iterable[Assignment]) -> Iterator[tuple[Assignment, Assignment]]:
    """Each assignment that begins during another of its vehicle, after that other: the one that lasts longest."""
    last: Assignment | None = None
    for assignment in sorted(assignments, key=lambda one: (one.vehicle_id, one.since, one.until)):
        if last is None or last.vehicle_id != assignment.vehicle_id:
            last = assignment
            continue
        if assignment.since < last.until:
            yield last, assignment
        if assignment.until > last.until:
            last = assignment


def _shown(value: str) -> str:
    return repr(printable(value, LONGEST_VALUE_NAMED))


def _error(problems: Iterable[tuple[int, str]], advice: str = "") -> WattbridgeError:
    """All problems as one error, in the order of the file."""
    lines = [f"line {number}: {text}" for number, text in sorted(problems, key=lambda problem: problem[0])]
    named = lines[:MOST_PROBLEMS_NAMED]
    if more := len(lines) - len(named):
        named.append(f"and {more} more")
    if advice:
        named.append(advice)
    counted = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return WattbridgeError("\n  ".join([f"{counted}, nothing was imported", *named]))


# --- the database ------------------------------------------------------------------------------------------


def import_lines(config: Config, lines: Mapping[int, Assignment], mode: Mode, *, dry_run: bool = False) -> Change:
    """Brings the table to what the lines of a file say, all or nothing; only the difference is written.

    Raises WattbridgeError for a line that overlaps an assignment of the table, or one of itself.
    """
    with psycopg.connect(conninfo(config.database)) as connection:
        if not dry_run:
            # Between looking and writing nobody else writes; whoever reads is not disturbed.
            connection.execute("LOCK TABLE charger_assignment IN SHARE ROW EXCLUSIVE MODE")
        vehicles = None if mode is Mode.REPLACE else sorted({assignment.vehicle_id for assignment in lines.values()})
        known = _known(connection, vehicles)
        change = difference(lines, known, mode)
        if not dry_run:
            _write(connection, change, known)
    return change


def difference(lines: Mapping[int, Assignment], known: Iterable[Assignment], mode: Mode) -> Change:
    """What has to happen so that the table says what the file says. A row that stands twice in the file is one.

    Known are the assignments of the table: all of them to replace, else those of the vehicles in the file.

    Raises WattbridgeError for a line that overlaps what stays.
    """
    first, known = _first_lines(lines), set(known)
    added = [assignment for assignment in first if assignment not in known]
    removed = [] if mode is Mode.ADD else [assignment for assignment in known if assignment not in first]
    problems = []
    for pair in _overlaps([*added, *known.difference(removed)]):
        new, old = pair if pair[0] not in known else reversed(pair)
        problems.append((first[new], f"{new} overlaps an existing assignment: {old}"))
    if problems:
        raise _error(problems, "to change what is there, see --update and --replace")
    return Change(added, removed, len(lines) - len(added))


def select(config: Config, selection: Selection, limit: int | None = None) -> list[Assignment]:
    """The selected assignments by vehicle and time. All at once: half a list must not be taken for a whole one."""
    with psycopg.connect(conninfo(config.database)) as connection:
        connection.execute(UTC_ONLY)
        rows = connection.execute(
            sql.SQL(
                "SELECT vehicle_id, meter_id, {} FROM charger_assignment WHERE {} "
                'ORDER BY vehicle_id COLLATE "C", valid LIMIT {}'
            ).format(BOUNDS, selection.condition(), limit),
            # However the database would write a date.
            binary=True,
        )
        return [Assignment(*row) for row in rows]


def count(config: Config, selection: Selection) -> int:
    """How many assignments are selected."""
    with psycopg.connect(conninfo(config.database)) as connection:
        query = sql.SQL("SELECT count(*) FROM charger_assignment WHERE {}").format(selection.condition())
        return sum(number for (number,) in connection.execute(query))


def _known(connection: Connection, vehicles: Sequence[str] | None) -> dict[Assignment, str]:
    """The assignments of these vehicles, None: of all; with where in the table each of them is."""
    connection.execute(UTC_ONLY)
    condition = sql.SQL("true") if vehicles is None else sql.SQL("vehicle_id = ANY({})").format(vehicles)
    query = sql.SQL("SELECT ctid::text, vehicle_id, meter_id, {} FROM charger_assignment WHERE {}")
    rows = connection.execute(query.format(BOUNDS, condition), binary=True)
    return {Assignment(*row): place for place, *row in rows}


def _write(connection: Connection, change: Change, known: Mapping[Assignment, str]) -> None:
    """One statement each, because the rollups are marked once a statement."""
    if change.removed:
        places = [known[assignment] for assignment in change.removed]
        # The lock keeps rows where they were seen.
        connection.execute("DELETE FROM charger_assignment WHERE ctid = ANY(%s::tid[])", (places,))
    if change.added:
        # Not COPY: while the database indexes rows it does not read more of them, and to TCP seems dead after a while.
        connection.execute(
            "INSERT INTO charger_assignment (vehicle_id, meter_id, valid) "
            "SELECT vehicle_id, meter_id, tstzrange(since, until) "
            "FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[]) "
            "AS row (vehicle_id, meter_id, since, until) "
            "ORDER BY vehicle_id, since",  # indexes grow faster in order
            [list(column) for column in zip(*change.added, strict=True)],
        )
