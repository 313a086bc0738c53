"""The answers to the analytics, computed from rows of history: energies of vehicles, meters and charging sessions.

A matched minute is a (meter, UTC minute) in which exactly one vehicle has readings that name the meter, and the
meter has a reading as well. Only matched minutes enter an efficiency, DC over AC; the rest is unattributed.
Energies are whole ticks of 0.1 Wh, so that sums are exact.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.messages import EPOCH, TICKS_PER_KWH
from simulator.truth import Int64s, Rows

MINUTE_US = 60_000_000

SESSION_GAP_US = 15 * MINUTE_US
"""A longer silence of the vehicle ends its session."""

_MINUTES = 2**32
"""More minutes than from 1970 to the year 10000."""

_MATCHED_FIELDS = [("minutes", "i8"), ("matched_ac", "i8"), ("matched_dc", "i8"), ("unattributed", "i8")]

VEHICLE = np.dtype([("device", "i8"), ("readings", "i8"), ("dc", "i8"), *_MATCHED_FIELDS, ("efficiency", "f8")])
"""A vehicle with readings: matched minutes, and DC outside of them; efficiency: matched DC over matched AC, NaN where
there is no matched AC."""

METER = np.dtype([("device", "i8"), ("readings", "i8"), ("ac", "i8"), *_MATCHED_FIELDS])
"""A meter with readings: matched minutes, and AC outside of them."""

SESSION = np.dtype(
    [
        ("vehicle", "i8"),
        ("meter", "i8"),
        ("start", "i8"),
        ("end", "i8"),
        ("readings", "i8"),
        ("dc", "i8"),
        ("ac", "i8"),
        ("soc_from", "i8"),
        ("soc_to", "i8"),
    ]
)
"""Start and end are the first and the last reading, in microseconds since 1970; AC is that of the session's matched
minutes, where a minute belongs to the session of its first reading; SoC in 0.01 %."""

Table = npt.NDArray[np.void]


class Answers(NamedTuple):
    """Structured arrays of dtype VEHICLE, METER and SESSION; devices by number, vehicles after meters."""

    vehicles: Table
    """In order of device."""
    meters: Table
    """In order of device."""
    sessions: Table
    """In order of (vehicle, start)."""


class _Minutes(NamedTuple):
    """The matched minutes."""

    meter: Int64s
    vehicle: Int64s
    ac: Int64s
    dc: Int64s
    first: Int64s
    """The place of the vehicle's first reading in it, among those that name a meter."""


def answers(meter_rows: Rows, vehicle_rows: Rows) -> Answers:
    """Return the answers that follow from history, certain or not."""
    at_meter = vehicle_rows.part(vehicle_rows.meter > 0)
    matched = _match(meter_rows, at_meter)

    vehicles = _devices(VEHICLE, vehicle_rows, "dc", matched.vehicle, matched)
    meters = _devices(METER, meter_rows, "ac", matched.meter, matched)
    measured = vehicles["matched_ac"] > 0
    vehicles["efficiency"] = np.nan
    vehicles["efficiency"][measured] = vehicles["matched_dc"][measured] / vehicles["matched_ac"][measured]
    return Answers(vehicles, meters, _sessions(at_meter, matched))


def plain(found: Answers, ids: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the answers for JSON: names, kWh, percent, and times in ISO 8601."""
    return {
        "vehicles": [
            {
                "vehicle": ids[row["device"]],
                "readings": row["readings"],
                "dc_kwh": row["dc"] / TICKS_PER_KWH,
                "matched_minutes": row["minutes"],
                "matched_ac_kwh": row["matched_ac"] / TICKS_PER_KWH,
                "matched_dc_kwh": row["matched_dc"] / TICKS_PER_KWH,
                "efficiency": row["efficiency"] if row["matched_ac"] > 0 else None,
                "unattributed_dc_kwh": row["unattributed"] / TICKS_PER_KWH,
            }
            for row in _dicts(found.vehicles)
        ],
        "meters": [
            {
                "meter": ids[row["device"]],
                "readings": row["readings"],
                "ac_kwh": row["ac"] / TICKS_PER_KWH,
                "matched_minutes": row["minutes"],
                "matched_ac_kwh": row["matched_ac"] / TICKS_PER_KWH,
                "unattributed_ac_kwh": row["unattributed"] / TICKS_PER_KWH,
            }
            for row in _dicts(found.meters)
        ],
        "sessions": [
            {
                "vehicle": ids[row["vehicle"]],
                "meter": ids[row["meter"]],
                "start": _iso(row["start"]),
                "end": _iso(row["end"]),
                "readings": row["readings"],
                "dc_kwh": row["dc"] / TICKS_PER_KWH,
                "matched_ac_kwh": row["ac"] / TICKS_PER_KWH,
                "soc_from": row["soc_from"] / 100,
                "soc_to": row["soc_to"] / 100,
            }
            for row in _dicts(found.sessions)
        ],
    }


def _match(meter_rows: Rows, at_meter: Rows) -> _Minutes:
    """Return the matched minutes; `at_meter` are the rows of vehicles that name a meter."""
    metered = _keys(meter_rows.device, meter_rows.ts)
    begins = _starts(metered)
    metered, ac = metered[begins], _sums(meter_rows.energy, begins)

    named = _keys(at_meter.meter - 1, at_meter.ts)
    order = np.argsort(named, kind="stable")
    named, vehicle = named[order], at_meter.device[order]
    begins = _starts(named)
    dc = _sums(at_meter.energy[order], begins)
    # Rows are in order of device, and the sort has kept that: first and last are the same where all are.
    ends = _ends(begins, len(named))
    alone = vehicle[begins] == vehicle[ends]

    keys = named[begins]
    at = np.searchsorted(metered, keys)
    has_ac = np.zeros(len(keys), np.bool_)
    inside = at < len(metered)
    has_ac[inside] = metered[at[inside]] == keys[inside]
    matched = np.flatnonzero(alone & has_ac)
    first = begins[matched]
    return _Minutes(
        meter=keys[matched] // _MINUTES,
        vehicle=vehicle[first].astype(np.int64),
        ac=ac[at[matched]],
        dc=dc[matched],
        first=order[first],
    )


def _devices(kind: np.dtype[np.void], rows: Rows, energy: str, devices: Int64s, matched: _Minutes) -> Table:
    """Return a table of VEHICLE or METER; `energy` names its own energy, `devices` its side of the matched minutes."""
    begins = _starts(rows.device)
    table = np.zeros(len(begins), kind)
    table["device"] = rows.device[begins]
    table["readings"] = np.diff(begins, append=len(rows.device))
    table[energy] = _sums(rows.energy, begins)
    places = np.searchsorted(table["device"], devices)
    np.add.at(table["minutes"], places, 1)
    np.add.at(table["matched_ac"], places, matched.ac)
    np.add.at(table["matched_dc"], places, matched.dc)
    table["unattributed"] = table[energy] - table[f"matched_{energy}"]
    return table


def _sessions(at_meter: Rows, matched: _Minutes) -> Table:
    """Return the sessions, of rows that name a meter."""
    begins = _starts(at_meter.device, at_meter.meter, gaps=at_meter.ts)
    ends = _ends(begins, len(at_meter.ts))
    table = np.zeros(len(begins), SESSION)
    table["vehicle"] = at_meter.device[begins]
    table["meter"] = at_meter.meter[begins] - 1
    table["start"], table["end"] = at_meter.ts[begins], at_meter.ts[ends]
    table["readings"] = ends - begins + 1
    table["dc"] = _sums(at_meter.energy, begins)
    table["soc_from"], table["soc_to"] = at_meter.level[begins], at_meter.level[ends]
    np.add.at(table["ac"], np.searchsorted(begins, matched.first, side="right") - 1, matched.ac)
    return table


def _keys(meter: npt.NDArray[np.integer[Any]], ts: Int64s) -> Int64s:
    """Return (meter, minute) as one number."""
    return meter.astype(np.int64) * _MINUTES + ts // MINUTE_US


def _starts(*columns: npt.NDArray[np.integer[Any]], gaps: Int64s | None = None) -> Int64s:
    """Return where a run of equal values begins, or after what is a gap between sessions."""
    begins = np.zeros(len(columns[0]), np.bool_)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    if gaps is not None:
        begins[1:] |= np.diff(gaps) > SESSION_GAP_US
    return np.flatnonzero(begins)


def _ends(begins: Int64s, count: int) -> Int64s:
    """Return the last place of each run, of `count` values in all."""
    return np.append(begins, count)[1:] - 1


def _sums(values: Int64s, begins: Int64s) -> Int64s:
    return np.add.reduceat(values, begins) if len(begins) else values[:0]


def _dicts(table: Table) -> Iterator[dict[str, Any]]:
    """Yield the rows with plain Python values."""
    names = table.dtype.names or ()
    for row in table.tolist():
        yield dict(zip(names, row, strict=True))


def _iso(ts: int) -> str:
    """Return microseconds since 1970 as RFC 3339."""
    return (EPOCH + timedelta(microseconds=ts)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
