"""The analytics by their definitions, over raw rows of history: slow, exact, and simple enough to be believed.

Energies are fractions, so that no sum depends on the order of its terms; what is returned has the names and types of
the columns in SQL.
"""

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
from psycopg.rows import dict_row

MINUTE = timedelta(minutes=1)
QUARTER_HOUR = timedelta(minutes=15)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FOREVER = datetime.max.replace(tzinfo=UTC)
ALWAYS = datetime.min.replace(tzinfo=UTC)

Row = dict[str, Any]


class Meter(NamedTuple):
    meter_id: str
    ts: datetime
    kwh: Fraction
    received_at: datetime
    ts_from_arrival: bool


class Vehicle(NamedTuple):
    vehicle_id: str
    ts: datetime
    kwh: Fraction
    soc: Fraction
    battery_temp: Fraction
    meter_id: str | None
    """The plugged meter."""
    received_at: datetime
    ts_from_arrival: bool


class Minute(NamedTuple):
    """A matched minute."""

    meter_id: str
    vehicle_id: str
    first_ts: datetime
    ac: Fraction
    dc: Fraction


class Energy(NamedTuple):
    """Matched energy."""

    ac: Fraction = Fraction()
    dc: Fraction = Fraction()

    def __add__(self, other: Any) -> "Energy":
        return Energy(self.ac + other.ac, self.dc + other.dc)

    def efficiency(self, least: float) -> float | None:
        return None if self.ac < least or self.dc > self.ac else float(self.dc / self.ac)


Pairs = dict[tuple[str, str], Energy]
"""By meter and vehicle."""


def plugged_meter(
    vehicle_id: str, ts: datetime, named: str | None, assignments: Iterable[tuple[str, str, Any]], settings: Row
) -> str | None:
    """Where the vehicle charged: by the reading itself, else by assignment, else by the naming rule."""
    if named is not None:
        return named
    for vehicle, meter_id, valid in assignments:
        if vehicle == vehicle_id and ts in valid:
            return meter_id
    if settings["vehicle_prefix"] is not None and vehicle_id.startswith(settings["vehicle_prefix"]):
        return settings["meter_prefix"] + vehicle_id.removeprefix(settings["vehicle_prefix"])
    return None


class Naive:
    """All rows of history of some time; vehicles with the meter they were plugged at."""

    def __init__(self, meters: Iterable[Meter], vehicles: Iterable[Vehicle], settings: Row) -> None:
        self.meters = sorted(meters)
        self.vehicles = sorted(vehicles, key=lambda row: (row.vehicle_id, row.ts))
        self.settings = settings

    def window(self, since: datetime, until: datetime) -> "Naive":
        """History as if there were only the readings in [since, until)."""
        return Naive(
            (row for row in self.meters if since <= row.ts < until),
            (row for row in self.vehicles if since <= row.ts < until),
            self.settings,
        )

    @cached_property
    def matched(self) -> list[Minute]:
        ac: dict[tuple[str, datetime], list[Meter]] = defaultdict(list)
        dc: dict[tuple[str, datetime], list[Vehicle]] = defaultdict(list)
        for meter in self.meters:
            ac[meter.meter_id, floor(meter.ts, MINUTE)].append(meter)
        for vehicle in self.vehicles:
            if vehicle.meter_id is not None:
                dc[vehicle.meter_id, floor(vehicle.ts, MINUTE)].append(vehicle)
        return [
            Minute(key[0], rows[0].vehicle_id, min(row.ts for row in rows), total(ac[key]), total(rows))
            for key, rows in dc.items()
            if len({row.vehicle_id for row in rows}) == 1 and key in ac
        ]

    def vehicle_performance(self, vehicle_id: str) -> Row:
        rows = [row for row in self.vehicles if row.vehicle_id == vehicle_id]
        minutes = [minute for minute in self.matched if minute.vehicle_id == vehicle_id]
        plugged = {row.meter_id for row in rows if row.meter_id is not None}
        temps = [row.battery_temp for row in rows]
        return {
            "vehicle_id": vehicle_id,
            "readings": len(rows),
            **self._efficiency(minutes, readings=bool(rows), known=bool(plugged)),
            "unattributed_kwh_dc": float(total(rows) - sum(minute.dc for minute in minutes)),
            "avg_soc": float(sum(row.soc for row in rows) / len(rows)) if rows else None,
            "last_soc": float(rows[-1].soc) if rows else None,
            "avg_battery_temp": float(sum(temps) / len(rows)) if rows else None,
            "max_battery_temp": float(max(temps)) if rows else None,
            "meters": sorted(plugged),
        }

    def fleet_performance(self) -> list[Row]:
        return [self.vehicle_performance(vehicle) for vehicle in sorted({row.vehicle_id for row in self.vehicles})]

    def fleet_chargers(self) -> list[Row]:
        named = {row.meter_id for row in self.vehicles if row.meter_id is not None}
        return [self._charger(meter) for meter in sorted(named | {row.meter_id for row in self.meters})]

    def _charger(self, meter_id: str) -> Row:
        rows = [row for row in self.meters if row.meter_id == meter_id]
        minutes = [minute for minute in self.matched if minute.meter_id == meter_id]
        vehicles = {row.vehicle_id for row in self.vehicles if row.meter_id == meter_id}
        figures = self._efficiency(minutes, readings=bool(rows), known=bool(vehicles))
        if figures["reason"] == "no meter known":
            figures["reason"] = "no vehicle known"
        return {
            "meter_id": meter_id,
            "readings": len(rows),
            **figures,
            "finding": self._finding(figures),
            "unattributed_kwh_ac": float(total(rows) - sum(minute.ac for minute in minutes)),
            "vehicles": sorted(vehicles),
        }

    def charger_performance(self, meter_id: str) -> Row:
        return self._charger(meter_id)

    def charger_vehicles(self, meter_id: str) -> list[Row]:
        """In order of vehicle."""
        there: dict[str, list[Vehicle]] = defaultdict(list)
        for row in self.vehicles:
            if row.meter_id == meter_id:
                there[row.vehicle_id].append(row)
        return [
            {"vehicle_id": vehicle_id}
            | self._efficiency(self._at(meter_id, vehicle_id), readings=True, known=True)
            | {"first_seen": rows[0].ts, "last_seen": rows[-1].ts}
            for vehicle_id, rows in sorted(there.items())
        ]

    def efficiency_by_hour(self, vehicle_id: str) -> list[Row]:
        """In order of time."""
        zone = ZoneInfo(self.settings["time_zone"])
        plugged = [row for row in self.vehicles if row.vehicle_id == vehicle_id and row.meter_id is not None]
        hours: dict[datetime, list[Minute]] = {start(floor(row.ts, QUARTER_HOUR), "hour", zone): [] for row in plugged}
        for minute in self.matched:
            if minute.vehicle_id == vehicle_id:
                hours[start(floor(minute.first_ts, QUARTER_HOUR), "hour", zone)].append(minute)
        names = ("kwh_ac", "kwh_dc", "efficiency", "reason")
        return [
            {"starts": starts} | {name: figures[name] for name in names}
            for starts, minutes in sorted(hours.items())
            for figures in [self._efficiency(minutes, readings=True, known=True)]
        ]

    def fleet_faults(self) -> list[Row]:
        """Most loss first."""
        pairs: dict[tuple[str, str], Energy] = defaultdict(Energy)
        for minute in self.matched:
            if minute.ac or minute.dc:
                pairs[minute.meter_id, minute.vehicle_id] += minute
        found = []
        for charger in self.fleet_chargers():
            if charger["finding"] != "inefficient":
                continue
            meter_id = charger["meter_id"]
            vehicles = sorted(vehicle for meter, vehicle in pairs if meter == meter_id)
            verdict = self._verdict(meter_id, vehicles, pairs)
            for vehicle in vehicles:
                here, elsewhere = pairs[meter_id, vehicle], self._elsewhere(meter_id, vehicle, pairs)
                least = self.settings["efficiency_least_kwh"]
                found.append(
                    {
                        "meter_id": meter_id,
                        "verdict": verdict,
                        "vehicle_id": vehicle,
                        "kwh_ac": float(here.ac),
                        "kwh_dc": float(here.dc),
                        "efficiency": here.efficiency(least),
                        "elsewhere_kwh_ac": float(elsewhere.ac),
                        "elsewhere_efficiency": elsewhere.efficiency(least),
                        "meter_kwh_ac": charger["kwh_ac"],
                        "meter_efficiency": charger["efficiency"],
                        "meter_loss_kwh": charger["loss_kwh"],
                    }
                )
        return sorted(found, key=lambda row: (-row["meter_loss_kwh"], row["meter_id"], row["vehicle_id"]))

    def _verdict(self, meter_id: str, vehicles: list[str], pairs: "Pairs") -> str:
        """Sorts the vehicles by what they say."""
        sets: dict[str, set[str]] = defaultdict(set)
        for vehicle in vehicles:
            here = self._says(pairs[meter_id, vehicle])
            others = [
                (self._says(energy), any(self._says(e) == "fine" for (m, _), e in pairs.items() if m == meter))
                for (meter, who), energy in pairs.items()
                if who == vehicle and meter != meter_id
            ]
            said = {says for says, _ in others} | {self._says(self._elsewhere(meter_id, vehicle, pairs))}
            elsewhere = "fine" if "fine" in said else "loses" if "loses" in said else "nothing"
            sets[here if here != "loses" else f"loses here, {elsewhere} elsewhere"].add(vehicle)
            if here == "loses" and elsewhere != "fine" and ("loses", True) in others:
                sets["faulty"].add(vehicle)
        fine, accusing = len(sets["fine"]), len(sets["loses here, fine elsewhere"])
        losing, only_here = len(sets["loses here, loses elsewhere"]), len(sets["loses here, nothing elsewhere"])
        if (not fine and (accusing or only_here >= 2)) or (accusing >= 2 and accusing > fine):
            return "charger"
        if not accusing and (
            (fine and losing) or (fine >= 2 and only_here) or (losing and not only_here and sets["faulty"])
        ):
            return "vehicle"
        return "cannot tell"

    def _says(self, energy: "Energy") -> str:
        least = max(self.settings["inefficient_least_kwh"], self.settings["efficiency_least_kwh"])
        if energy.ac < least or energy.dc > energy.ac:
            return "nothing"
        return "loses" if energy.dc < self.settings["inefficient_below"] * energy.ac else "fine"

    def _elsewhere(self, meter_id: str, vehicle_id: str, pairs: "Pairs") -> "Energy":
        own = [energy for (meter, vehicle), energy in pairs.items() if vehicle == vehicle_id and meter != meter_id]
        return Energy(sum((e.ac for e in own), Fraction()), sum((e.dc for e in own), Fraction()))

    def _at(self, meter_id: str, vehicle_id: str) -> list[Minute]:
        return [minute for minute in self.matched if (minute.meter_id, minute.vehicle_id) == (meter_id, vehicle_id)]

    def fleet_inefficient(self) -> list[Row]:
        """Worst first, and faults after them."""
        names = ("vehicle_id", "efficiency", "kwh_ac", "kwh_dc", "loss_kwh")
        charged = {(minute.vehicle_id, minute.meter_id) for minute in self.matched if minute.ac or minute.dc}
        found = [
            {name: row[name] for name in names}
            | {
                "finding": finding,
                "ratio": row["kwh_dc"] / row["kwh_ac"],
                "meters": sorted(meter for vehicle, meter in charged if vehicle == row["vehicle_id"]),
            }
            for row in self.fleet_performance()
            if (finding := self._finding(row))
        ]
        return sorted(found, key=lambda row: (row["ratio"] > 1, -abs(1 - row["ratio"]), row["vehicle_id"]))

    def fleet_summary(self) -> Row:
        ac, dc = total(self.meters), total(self.vehicles)
        reason = self._reason(ac, dc, readings=bool(self.meters or self.vehicles), known=True, matched=True)
        return {
            "meters_reporting": len({row.meter_id for row in self.meters}),
            "vehicles_reporting": len({row.vehicle_id for row in self.vehicles}),
            "kwh_ac": float(ac),
            "kwh_dc": float(dc),
            "loss_kwh": None if reason else float(ac - dc),
            "efficiency": None if reason else float(dc / ac),
            "reason": reason,
            "unattributed_kwh_ac": float(ac - sum(minute.ac for minute in self.matched)),
            "unattributed_kwh_dc": float(dc - sum(minute.dc for minute in self.matched)),
        }

    def sessions(self) -> list[Row]:
        """In order of vehicle and start."""
        runs: list[list[Vehicle]] = []
        for row in self.vehicles:
            if row.meter_id is None:
                continue
            before = runs[-1][-1] if runs else None
            if (
                before is not None
                and (before.vehicle_id, before.meter_id) == (row.vehicle_id, row.meter_id)
                and row.ts - before.ts <= self.settings["session_gap"]
            ):
                runs[-1].append(row)
            else:
                runs.append([row])
        return [self._session(run) for run in runs]

    def _session(self, rows: list[Vehicle]) -> Row:
        first, last = rows[0], rows[-1]
        starts = {row.ts for row in rows}
        minutes = [
            minute
            for minute in self.matched
            if (minute.vehicle_id, minute.meter_id) == (first.vehicle_id, first.meter_id) and minute.first_ts in starts
        ]
        figures = self._efficiency(minutes, readings=True, known=True)
        interval = self.settings["reading_interval"]
        # Like a matched minute, a minute at the meter belongs as a whole to the session of its first reading there.
        at_meter: dict[datetime, list[Vehicle]] = defaultdict(list)
        for row in self.vehicles:
            if (row.vehicle_id, row.meter_id) == (first.vehicle_id, first.meter_id):
                at_meter[floor(row.ts, MINUTE)].append(row)
        peak = max((total(rows) for rows in at_meter.values() if rows[0].ts in starts), default=Fraction())
        return {
            "vehicle_id": first.vehicle_id,
            "meter_id": first.meter_id,
            "started": first.ts,
            "ended": last.ts,
            "readings": len(rows),
            "matched_minutes": figures["matched_minutes"],
            "kwh_ac": figures["kwh_ac"],
            "kwh_dc": float(total(rows)),
            "efficiency": figures["efficiency"],
            "reason": figures["reason"],
            "mean_kw": float(total(rows) / hours(last.ts - first.ts + interval)),
            "peak_kw": float(peak * 60 / max(Fraction(1), hours(interval) * 60)),
            "soc_from": float(first.soc),
            "soc_to": float(last.soc),
        }

    def meter_quarters(self) -> list[Row]:
        """In order of meter and quarter hour."""
        return [
            {"meter_id": device, "quarter_hour": quarter, "readings": len(rows), "kwh_ac": float(total(rows))}
            | self._delays(rows)
            for (device, quarter), rows in by_quarter(self.meters, "meter_id")
        ]

    def vehicle_quarters(self) -> list[Row]:
        """In order of vehicle and quarter hour."""
        return [
            {
                "vehicle_id": device,
                "quarter_hour": quarter,
                "readings": len(rows),
                "kwh_dc": float(total(rows)),
                "soc_sum": float(sum(row.soc for row in rows)),
                "temp_sum": float(sum(row.battery_temp for row in rows)),
                "temp_max": float(max(row.battery_temp for row in rows)),
            }
            | self._delays(rows)
            for (device, quarter), rows in by_quarter(self.vehicles, "vehicle_id")
        ]

    def energy(self, unit: str, zone: ZoneInfo) -> list[Row]:
        """Of all devices by quarter_hour, hour or day of a time zone, in order of time; not where nobody spoke."""
        found: dict[datetime, tuple[list[Meter], list[Vehicle]]] = defaultdict(lambda: ([], []))
        for meter in self.meters:
            found[start(floor(meter.ts, QUARTER_HOUR), unit, zone)][0].append(meter)
        for vehicle in self.vehicles:
            found[start(floor(vehicle.ts, QUARTER_HOUR), unit, zone)][1].append(vehicle)
        return [
            ({"day": starts.astimezone(zone).date()} if unit == "day" else {})
            | {
                "starts": starts,
                "readings_ac": len(meters),
                "kwh_ac": float(total(meters)) if meters else None,
                "readings_dc": len(vehicles),
                "kwh_dc": float(total(vehicles)) if vehicles else None,
            }
            for starts, (meters, vehicles) in sorted(found.items())
        ]

    def of(self, meter: str | None, vehicle: str | None) -> "Naive":
        """History as if there were only these devices."""
        return Naive(
            (row for row in self.meters if row.meter_id == meter),
            (row for row in self.vehicles if row.vehicle_id == vehicle),
            self.settings,
        )

    def _delays(self, rows: list[Any]) -> Row:
        own = [row.received_at - row.ts for row in rows if not row.ts_from_arrival]
        late = [row for row in rows if row.received_at - row.ts > self.settings["late_after"]]
        return {"late": len(late), "least_delay": min(own, default=None)}

    def _efficiency(self, minutes: list[Minute], *, readings: bool, known: bool) -> Row:
        ac, dc = sum((m.ac for m in minutes), Fraction()), sum((m.dc for m in minutes), Fraction())
        reason = self._reason(ac, dc, readings=readings, known=known, matched=bool(minutes))
        return {
            "matched_minutes": len(minutes),
            "kwh_ac": float(ac),
            "kwh_dc": float(dc),
            "efficiency": None if reason else float(dc / ac),
            "loss_kwh": None if reason else float(ac - dc),
            "reason": reason,
        }

    def _reason(self, ac: Fraction, dc: Fraction, *, readings: bool, known: bool, matched: bool) -> str | None:
        if not readings:
            return "no readings"
        if not known:
            return "no meter known"
        if not matched:
            return "no matched minute"
        if ac < self.settings["efficiency_least_kwh"]:
            return "too little energy"
        return "more DC than AC" if dc > ac else None

    def _finding(self, figures: Row) -> str | None:
        if figures["kwh_ac"] < self.settings["inefficient_least_kwh"]:
            return None
        if figures["reason"] == "more DC than AC":
            return "mapping or metering fault"
        if figures["reason"] is None and figures["efficiency"] < self.settings["inefficient_below"]:
            return "inefficient"
        return None


def floor(ts: datetime, width: timedelta) -> datetime:
    """The start of the minute or quarter hour (UTC)."""
    return ts - (ts - EPOCH) % width


def read(connection: psycopg.Connection[Any]) -> Naive:
    """All of history, as the transaction of the connection sees it."""
    settings = connection.cursor(row_factory=dict_row).execute("SELECT * FROM analytics_setting").fetchone()
    assert settings is not None
    assignments = connection.execute("SELECT vehicle_id, meter_id, valid FROM charger_assignment").fetchall()
    query = "SELECT meter_id, ts, kwh_ac, received_at, ts_from_arrival FROM meter_history"
    meters = [Meter(row[0], row[1], Fraction(row[2]), *row[3:]) for row in connection.execute(query)]
    query = (
        "SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival FROM vehicle_history"
    )
    vehicles = [
        Vehicle(*row[:2], *map(Fraction, row[2:5]), plugged_meter(*row[:2], row[5], assignments, settings), *row[6:])
        for row in connection.execute(query)
    ]
    return Naive(meters, vehicles, settings)


@cache
def start(quarter: datetime, unit: str, zone: ZoneInfo) -> datetime:
    """The first quarter hour that the clocks of the zone count to the same hour or day, without a break."""
    before = quarter - QUARTER_HOUR
    if unit == "quarter_hour" or label(before, unit, zone) != label(quarter, unit, zone):
        return quarter
    return start(before, unit, zone)


def label(ts: datetime, unit: str, zone: ZoneInfo) -> Any:
    local = ts.astimezone(zone)
    return local.date() if unit == "day" else (local.date(), local.hour, local.utcoffset())


def total(rows: Iterable[Any]) -> Fraction:
    return sum((row.kwh for row in rows), Fraction())


def hours(duration: timedelta) -> Fraction:
    return Fraction(duration // timedelta(microseconds=1), 3_600_000_000)


def by_quarter(rows: Iterable[Any], device: str) -> list[tuple[tuple[str, datetime], list[Any]]]:
    found: dict[tuple[str, datetime], list[Any]] = defaultdict(list)
    for row in rows:
        found[getattr(row, device), floor(row.ts, QUARTER_HOUR)].append(row)
    return sorted(found.items())
