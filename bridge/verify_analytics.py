"""Whether PostgreSQL computes the energies and sessions that follow from the ledger, for `wattbridge verify`.

Asked are the schema's own analytics; where it has none, as that of another bridge, plain SQL over its history.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from bridge.store import POSTGRES_EPOCH
from bridge.verify_report import ALTERED, Check, Difference, Row, Values
from bridge.verify_rows import (
    KINDS,
    METER,
    VEHICLE,
    Bools,
    Column,
    Devices,
    Snapshot,
    add_lone,
    add_unlike,
    any_differs,
    moment,
    pair,
)
from simulator.answers import SESSION_GAP_US, Answers
from simulator.messages import TICKS_PER_KWH

# Sums of doubles depend on the order of their terms.
TOLERANCE = 1e-9
TITLES = {
    "vehicle_energy": "energy by vehicle",
    "meter_energy": "energy by meter",
    "charging_session": "charging sessions",
}
ANALYTICS = {
    "vehicle_energy": {
        "vehicle_id": "bigint",
        "readings": "bigint",
        "dc": "float8",
        "minutes": "bigint",
        "matched_ac": "float8",
        "matched_dc": "float8",
        "efficiency": "float8",
    },
    "meter_energy": {
        "meter_id": "bigint",
        "readings": "bigint",
        "ac": "float8",
        "minutes": "bigint",
        "matched_ac": "float8",
    },
    "charging_session": {
        "vehicle_id": "bigint",
        "meter_id": "bigint",
        "started": "timestamptz",
        "ended": "timestamptz",
        "readings": "bigint",
        "dc": "float8",
        "ac": "float8",
        "soc_from": "float8",
        "soc_to": "float8",
    },
}
NOTHING = {"bigint": "0", "float8": "NaN", "timestamptz": "-infinity"}
OWN = "by the schema's own functions"
PLAIN = "by plain SQL over history"
# What the header of a binary array takes: dimensions, flags, element type, length, lower bound.
ARRAY_HEADER_BYTES = 20

Table = dict[str, Column]


class Settings(NamedTuple):
    """What the schema's own analytics depend on beside the readings."""

    least_kwh: float
    session_gap: timedelta
    naming_rule: bool
    assignments: bool


class Source(NamedTuple):
    """How the database's analytics are computed, in words; `settings` only where by the schema's own functions."""

    name: str
    settings: Settings | None

    @property
    def hint(self) -> str | None:
        """Why the answers may rightly differ from those of the ledger, which knows only what readings say."""
        if self.settings is None:
            return None
        gap = timedelta(microseconds=SESSION_GAP_US)
        reasons = {
            "vehicles are assigned to chargers (charger_assignment)": self.settings.assignments,
            "there is a naming rule (analytics_setting.vehicle_prefix)": self.settings.naming_rule,
            f"analytics_setting.session_gap is not {gap}": self.settings.session_gap != gap,
        }
        applying = [reason for reason, applies in reasons.items() if applies]
        return f"the analytics may rightly differ from the ledger's: {', '.join(applying)}" if applying else None


def find_source(connection: Snapshot) -> Source:
    """Looks whether the schema that history is in has analytics of its own."""
    ((functions, allowed),) = connection.execute(_text("own", "functions")).fetchall()
    if functions < len(ANALYTICS):
        return Source(PLAIN, None)
    if not allowed:
        return Source(f"{PLAIN}, as this role may not call the schema's own functions", None)
    (settings,) = connection.execute(_text("own", "settings")).fetchall()
    return Source(OWN, Settings(*settings))


def fetch_analytics(connection: Snapshot, devices: Devices, source: Source) -> dict[str, Table] | str:
    """The analytics by SQL, as columns; or why PostgreSQL cannot compute them."""
    try:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(_query(devices, source), binary=True)
            result = cursor.pgresult
            if result is None:
                raise psycopg.InterfaceError("the analytics have no result")
            raw = iter([result.get_value(0, place) for place in range(result.nfields)])
            return {
                table: {name: _array(next(raw), form) for name, form in columns.items()}
                for table, columns in ANALYTICS.items()
            }
    except psycopg.DataError as error:
        return error.diag.message_primary or " ".join(str(error).split())


def _query(devices: Devices, source: Source) -> sql.Composed:
    """One statement, so that plain SQL finds the matched minutes once: one row of arrays, a column each."""
    folder, parts = ["own"], []
    if source.settings is None:
        folder, parts = [], [sql.SQL("matched_minute AS MATERIALIZED ({})").format(_text("matched_minute"))]
    tables = []
    for table, columns in ANALYTICS.items():
        parts.append(sql.SQL("{} AS ({})").format(sql.Identifier(table), _text(*folder, table)))
        joins = [devices.join("JOIN", kind, kind.key, kind.key) for kind in KINDS if kind.key in columns]
        arrays = [
            sql.SQL("array_agg({}.number)").format(sql.Identifier(name))
            if name in {METER.key, VEHICLE.key}
            else sql.SQL("array_agg(coalesce(found.{}, {}::{}))").format(
                sql.Identifier(name), sql.Literal(NOTHING[form]), sql.SQL(form)
            )
            for name, form in columns.items()
        ]
        tables.append(
            sql.SQL("(SELECT {} FROM {table} AS found {}) AS {table}").format(
                sql.SQL(", ").join(arrays), sql.SQL(" ").join(joins), table=sql.Identifier(table)
            )
        )
    return sql.SQL("WITH {} SELECT * FROM {}").format(sql.SQL(", ").join(parts), sql.SQL(", ").join(tables))


def _text(*path: str) -> sql.SQL:
    """A query of sql/verify."""
    file = files("bridge").joinpath("sql", "verify", *path[:-1], f"{path[-1]}.sql")
    return sql.SQL(file.read_text(encoding="utf-8"))


def _array(raw: bytes | None, form: str) -> Column:
    """A binary array of 8-byte values without NULLs; nothing where there were no rows.

    Format: array_send in PostgreSQL's src/backend/utils/adt/arrayfuncs.c.
    """
    value = "f8" if form == "float8" else "i8"
    element = np.dtype([("length", ">i4"), ("value", f">{value}")])
    return np.frombuffer(raw or bytes(ARRAY_HEADER_BYTES), element, offset=ARRAY_HEADER_BYTES)["value"].astype(value)


def check_analytics(
    devices: Devices, truth: Answers, source: Source, found: Mapping[str, Table] | str, show: int
) -> Iterator[Check]:
    """Compares table by table; all of it differs where there is only PostgreSQL's reason."""
    for table, expected in _expected(devices, truth).items():
        if isinstance(found, str):
            check = Check(TITLES[table], len(expected["readings"]), 0, show)
            check.add(Difference(ALTERED, "all", None, None, {"PostgreSQL says": found}))
        else:
            check = _check(devices, table, expected, found[table], source, show)
        yield check


def _expected(devices: Devices, truth: Answers) -> dict[str, Table]:
    vehicles, meters, sessions = truth.vehicles, truth.meters, truth.sessions
    first = devices.first[VEHICLE]
    return {
        "vehicle_energy": {
            "vehicle_id": vehicles["device"] - first + 1,
            "readings": vehicles["readings"],
            "dc": vehicles["dc"] / TICKS_PER_KWH,
            "minutes": vehicles["minutes"],
            "matched_ac": vehicles["matched_ac"] / TICKS_PER_KWH,
            "matched_dc": vehicles["matched_dc"] / TICKS_PER_KWH,
            "efficiency": vehicles["efficiency"],
        },
        "meter_energy": {
            "meter_id": meters["device"] + 1,
            "readings": meters["readings"],
            "ac": meters["ac"] / TICKS_PER_KWH,
            "minutes": meters["minutes"],
            "matched_ac": meters["matched_ac"] / TICKS_PER_KWH,
        },
        "charging_session": {
            "vehicle_id": sessions["vehicle"] - first + 1,
            "meter_id": sessions["meter"] + 1,
            "started": sessions["start"] - POSTGRES_EPOCH,
            "ended": sessions["end"] - POSTGRES_EPOCH,
            "readings": sessions["readings"],
            "dc": sessions["dc"] / TICKS_PER_KWH,
            "ac": sessions["ac"] / TICKS_PER_KWH,
            "soc_from": sessions["soc_from"] / 100,
            "soc_to": sessions["soc_to"] / 100,
        },
    }


def _check(devices: Devices, table: str, expected: Table, found: Table, source: Source, show: int) -> Check:
    check = Check(TITLES[table], len(expected["readings"]), len(found["readings"]), show)
    pairs = pair(*_keys(expected), *_keys(found))
    if source.settings and "efficiency" in expected:
        gives, may_give = where_efficient(expected["matched_ac"], expected["matched_dc"], source.settings.least_kwh)
        given = np.zeros_like(gives)
        given[pairs.expected] = ~np.isnan(found["efficiency"][pairs.found])
        none = ~gives & ~(may_give & given)
        expected |= {"efficiency": np.where(none, np.nan, expected["efficiency"])}
    differs = {
        name: differing_answers(column[pairs.expected], found[name][pairs.found], ANALYTICS[table][name])
        for name, column in expected.items()
    }
    must, has = partial(_row, devices, table, expected), partial(_row, devices, table, found)
    add_lone(check, pairs, must, has)
    add_unlike(check, ALTERED, any_differs(differs), differs, pairs, must, has)
    return check


def where_efficient(ac: Column, dc: Column, least_kwh: float) -> tuple[Bools, Bools]:
    """Where the schema gives an efficiency, and where the noise of its sums decides whether it does."""
    slack = 1 + TOLERANCE
    gives = (ac >= least_kwh * slack) & (dc * slack <= ac)
    may_give = (ac * slack >= least_kwh) & (dc <= ac * slack) & ~gives
    return gives, may_give


def _keys(table: Table) -> tuple[Column, Column]:
    """A device, and a time where there is one: a vehicle begins one session at a time, whatever the meter."""
    device = table[VEHICLE.key] if VEHICLE.key in table else table[METER.key]
    return device, table.get("started", np.zeros_like(device))


def differing_answers(must: Column, has: Column, form: str) -> Bools:
    """Which values differ, of doubles by more than the order of a sum makes; what is nothing must be nothing."""
    differs: Bools = must != has
    if form == "float8":
        # Written so that infinity is close to nothing.
        differs = ~(np.abs(has - must) <= TOLERANCE * np.abs(must)) & ~(np.isnan(must) & np.isnan(has))
    return differs


def _row(devices: Devices, table: str, columns: Table, at: int) -> Row:
    """An answer, with names: of its keys the first is its device, and the time when it started its timestamp."""
    said: Values = {}
    for name, column in columns.items():
        value = column[at].item()
        if name in {METER.key, VEHICLE.key}:
            said[name] = devices.name(METER if name == METER.key else VEHICLE, value)
        elif ANALYTICS[table][name] == "timestamptz":
            said[name] = moment(value)
        else:
            said[name] = None if np.isnan(value) else value
    device = said.pop(VEHICLE.key if VEHICLE.key in said else METER.key)
    return Row(device, said.pop("started", None), said)
