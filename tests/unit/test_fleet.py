"""The fleet: repeatable, in order, and true to the physics that it promises."""

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice, pairwise
from statistics import mean
from typing import Any

import pytest

from simulator.fleet import Fleet, FleetConfig, Guest
from simulator.messages import MINUTE_MS, TICKS_PER_KWH, Reading
from simulator.physics import CHARGER_KINDS, Charger

START = datetime(2026, 2, 10, tzinfo=UTC)
JULY = datetime(2026, 7, 14, tzinfo=UTC)
DAY = 24 * 60


def fleet_of(meters: int, vehicles: int, **others: Any) -> Fleet:
    settings: dict[str, Any] = {"start": START, "meters": meters, "vehicles": vehicles} | others
    return Fleet(FleetConfig(**settings))


def readings_of(fleet: Fleet, minutes: int) -> list[Reading]:
    config = fleet.config
    slots = minutes * (timedelta(minutes=1) // config.interval)
    return list(islice(fleet, slots * (config.meters + config.vehicles)))


@dataclass
class Session:
    """A run of a vehicle's readings that name one meter, with the AC of the minutes where it alone names it."""

    charger: Charger
    vehicle: Guest
    readings: list[Reading]
    ac: int = 0
    dc: int = 0


def sessions_of(fleet: Fleet, readings: Iterable[Reading]) -> list[Session]:
    """Computed from what is published alone, as a database would do it."""
    meters = len(fleet.chargers)
    ac: dict[tuple[int, int], int] = defaultdict(int)
    users: dict[tuple[int, int], set[int]] = defaultdict(set)
    open_at: dict[int, Session] = {}
    sessions: list[Session] = []
    for reading in readings:
        if reading.device < meters:
            ac[reading.device, reading.ts // MINUTE_MS] += reading.energy
            continue
        session = open_at.get(reading.device)
        if not reading.meter:
            open_at.pop(reading.device, None)
            assert reading.energy == 0
            continue
        meter = reading.meter - 1
        if session is None or session.charger.number != meter:
            session = Session(fleet.chargers[meter], fleet.vehicles[reading.device - meters], [])
            open_at[reading.device] = session
            sessions.append(session)
        session.readings.append(reading)
        users[meter, reading.ts // MINUTE_MS].add(reading.device)
    for session in sessions:
        meter = session.charger.number
        for minute in {reading.ts // MINUTE_MS for reading in session.readings}:
            if len(users[meter, minute]) == 1:
                session.ac += ac[meter, minute]
        session.dc = sum(r.energy for r in session.readings if len(users[meter, r.ts // MINUTE_MS]) == 1)
    assert {place for place, energy in ac.items() if energy} <= set(users)
    return sessions


@cache
def two_days(start: datetime = START) -> tuple[Fleet, list[Reading], list[Session]]:
    fleet = fleet_of(80, 80, faulty_share=0.1, start=start)
    readings = readings_of(fleet, 2 * DAY)
    return fleet, readings, sessions_of(fleet, readings)


def test_the_same_seed_gives_the_same_readings() -> None:
    assert readings_of(fleet_of(20, 30), 180) == readings_of(fleet_of(20, 30), 180)


def test_another_seed_gives_another_fleet() -> None:
    assert readings_of(fleet_of(20, 30), 2) != readings_of(fleet_of(20, 30, seed=2), 2)


def test_a_start_in_another_zone_is_the_same_start() -> None:
    elsewhere = START.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert readings_of(fleet_of(3, 3, start=elsewhere), 2) == readings_of(fleet_of(3, 3), 2)


def test_readings_do_not_depend_on_how_they_are_taken() -> None:
    whole = readings_of(fleet_of(7, 9, shared_share=0.5), 300)

    def in_pieces() -> Iterator[Reading]:
        fleet = fleet_of(7, 9, shared_share=0.5)
        size = 1
        while True:
            yield from islice(fleet, size)
            size = size * 3 % 101

    assert list(islice(in_pieces(), len(whole))) == whole


def test_readings_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from datetime import datetime, UTC; from itertools import islice; from hashlib import sha256\n"
        "from simulator.fleet import Fleet, FleetConfig\n"
        "fleet = Fleet(FleetConfig(datetime(2026, 2, 10, tzinfo=UTC), 20, 30, shared_share=0.3))\n"
        "print(sha256(repr([tuple(r) for r in islice(fleet, 50 * 1500)]).encode()).hexdigest())\n"
    )
    expected = [tuple(reading) for reading in readings_of(fleet_of(20, 30, shared_share=0.3), 1500)]
    digest = hashlib.sha256(repr(expected).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == digest


@pytest.mark.parametrize("seconds", [60, 20, 1])
def test_every_device_says_one_thing_per_interval_in_time_order(seconds: int) -> None:
    readings = readings_of(fleet_of(7, 9, interval=timedelta(seconds=seconds)), 2)
    assert [r.due for r in readings] == sorted(r.due for r in readings)
    start_ms = round(START.timestamp() * 1000)
    assert all(r.ts == start_ms + r.due for r in readings)
    seen = {(r.device, r.due // (1000 * seconds)) for r in readings}
    assert len(seen) == len(readings) == 16 * 120 // seconds
    assert {device for device, _ in seen} == set(range(16))


def test_the_load_is_spread_over_the_interval() -> None:
    dues = [r.due for r in readings_of(fleet_of(50, 50), 2)]
    assert max(later - earlier for earlier, later in pairwise(dues)) < 1000
    kinds = [r.device < 50 for r in readings_of(fleet_of(50, 50), 1)]
    assert 10 < sum(kinds[:50]) < 40  # meters and vehicles mixed


def test_payloads_follow_the_contract() -> None:
    meter: set[str] = set()
    vehicle: set[str] = set()
    fleet = fleet_of(10, 10, topic_root="a/b")
    for reading in readings_of(fleet, 5):
        root, version, kind, device, what = fleet.encoder.topics[reading.device].split("/")
        payload = json.loads(fleet.encoder.payload(reading))
        assert (root, version, what) == ("a", "b", "telemetry")
        assert payload[f"{kind}Id"] == device
        assert datetime.fromisoformat(payload["timestamp"]) == START + timedelta(milliseconds=reading.due)
        (meter if kind == "meter" else vehicle).update(payload)
    assert meter == {"meterId", "kwhConsumedAc", "voltage", "timestamp"}
    assert vehicle == {"vehicleId", "soc", "kwhDeliveredDc", "batteryTemp", "timestamp", "meterId"}


@pytest.mark.parametrize("start", [START, JULY])
def test_values_stay_in_their_bounds_for_two_days(start: datetime) -> None:
    fleet, readings, _ = two_days(start)
    for reading in readings:
        assert all(type(value) is int for value in reading)
        if reading.device < len(fleet.chargers):
            assert 0 <= reading.energy <= 150 / 60 * 1.01 * TICKS_PER_KWH
            assert 2070 < reading.level < 2530
            assert reading.temperature == reading.meter == 0
        else:
            assert 0 <= reading.energy <= 150 / 60 * TICKS_PER_KWH
            assert 490 <= reading.level <= 10_000
            assert -150 < reading.temperature < 650
            assert 0 <= reading.meter <= len(fleet.chargers)


def test_state_of_charge_makes_no_leaps() -> None:
    fleet, readings, _ = two_days()
    levels: dict[int, int] = {}
    for reading in readings:
        if reading.device >= len(fleet.chargers):
            change = reading.level - levels.get(reading.device, reading.level)
            battery = fleet.vehicles[reading.device - len(fleet.chargers)].battery_kwh
            assert -62 <= change <= reading.energy / battery + 2
            levels[reading.device] = reading.level


@pytest.mark.parametrize(("meters", "vehicles"), [(40, 40), (10, 35), (30, 10)])
@pytest.mark.parametrize("seconds", [60, 30])
@pytest.mark.parametrize("shared_share", [0.0, 0.5])
def test_matched_minutes_give_what_the_fleet_knows(
    meters: int, vehicles: int, seconds: int, shared_share: float
) -> None:
    fleet = fleet_of(meters, vehicles, interval=timedelta(seconds=seconds), shared_share=shared_share)
    sessions = sessions_of(fleet, readings_of(fleet, 12 * 60))
    ac: dict[int, int] = defaultdict(int)
    for session in sessions:
        ac[session.vehicle.number] += session.ac
    assert len(ac) >= min(meters, vehicles) / 2
    for vehicle in fleet.vehicles:
        assert vehicle.total_ac == ac[vehicle.number]


@pytest.mark.parametrize("seconds", [60, 1])
def test_running_totals_are_the_sums_of_the_readings(seconds: int) -> None:
    fleet = fleet_of(10, 20, interval=timedelta(seconds=seconds), shared_share=0.3)
    sums: dict[int, int] = defaultdict(int)
    for reading in readings_of(fleet, 24 * seconds):
        sums[reading.device] += reading.energy
    assert [charger.total_ac for charger in fleet.chargers] == [sums[n] for n in range(10)]
    assert [vehicle.total_dc for vehicle in fleet.vehicles] == [sums[n] for n in range(10, 30)]
    assert sum(vehicle.total_dc for vehicle in fleet.vehicles) > 0


@pytest.mark.parametrize("start", [START, JULY])
def test_healthy_chargers_reach_85_percent_and_faulty_ones_do_not(start: datetime) -> None:
    fleet, _, sessions = two_days(start)
    assert len(fleet.faulty) == 8
    by_charger: dict[str, list[Session]] = defaultdict(list)
    for session in sessions:
        by_charger[session.charger.id].append(session)
        if session.ac >= TICKS_PER_KWH:
            efficiency = session.dc / session.ac
            if session.charger.id in fleet.faulty:
                assert 0.70 <= efficiency < 0.84
            else:
                assert 0.85 <= efficiency <= 0.94
    assert len(by_charger) == 80
    for name, its in by_charger.items():
        efficiency = sum(s.dc for s in its) / sum(s.ac for s in its)
        assert (efficiency < 0.85) == (name in fleet.faulty)
        assert len({s.vehicle.number for s in its}) > 1 or name not in fleet.faulty


def test_published_efficiency_rises_with_power() -> None:
    fleet, _, sessions = two_days()
    by_power: dict[bool, list[float]] = defaultdict(list)
    for session in sessions:
        if session.ac >= TICKS_PER_KWH and not session.charger.kind.dc and session.charger.id not in fleet.faulty:
            hours = sum(r.energy > 0 for r in session.readings) / 60
            by_power[session.ac / TICKS_PER_KWH / hours > 3.0].append(session.dc / session.ac)
    assert mean(by_power[True]) > mean(by_power[False]) + 0.005


def test_published_efficiency_falls_in_cold() -> None:
    efficiencies = []
    for start in (JULY, datetime(2026, 1, 14, tzinfo=UTC)):
        fleet, _, sessions = two_days(start)
        its = [s.dc / s.ac for s in sessions if s.ac >= TICKS_PER_KWH and s.charger.id not in fleet.faulty]
        efficiencies.append(mean(its))
    assert efficiencies[0] > efficiencies[1] + 0.003


def test_meters_are_right_within_one_percent_and_not_exact() -> None:
    fleet, _, _ = two_days()
    errors = [charger.total_ac / charger.drawn - 1 for charger in fleet.chargers]
    assert all(abs(error) < 0.01 for error in errors)
    assert min(errors) < -0.003 < 0.003 < max(errors)


def test_registers_of_meters_lose_no_fraction_in_short_intervals() -> None:
    fleet = fleet_of(20, 20, interval=timedelta(seconds=1))
    readings_of(fleet, 30)
    busy = [charger for charger in fleet.chargers if charger.drawn > TICKS_PER_KWH / 2]
    assert len(busy) > 5
    for charger in busy:
        assert charger.total_ac == pytest.approx(charger.drawn, rel=0.0096, abs=1)


@pytest.mark.parametrize("seconds", [60, 1])
def test_state_of_charge_follows_the_energy_and_no_fraction_is_lost(seconds: int) -> None:
    fleet = fleet_of(10, 10, interval=timedelta(seconds=seconds))
    minutes = DAY if seconds == 60 else 60
    compared = 0
    for session in sessions_of(fleet, readings_of(fleet, minutes)):
        gained = session.readings[-1].level - session.readings[0].level
        energy = sum(reading.energy for reading in session.readings[1:])
        # A level is cut to whole steps, and so is a register; that does not grow with the length of a session.
        assert energy == pytest.approx(gained * session.vehicle.battery_kwh, abs=session.vehicle.battery_kwh + 1)
        compared += gained > 500
    assert compared >= 5


def test_every_kind_of_charger_appears_and_none_exceeds_its_power() -> None:
    fleet = fleet_of(300, 300)
    most: dict[float, int] = defaultdict(int)
    for reading in readings_of(fleet, 6 * 60):
        if reading.device < 300:
            kind = fleet.chargers[reading.device].kind
            assert reading.energy <= kind.kw / 60 * TICKS_PER_KWH * 1.01 + 1
            most[kind.kw] = max(most[kind.kw], reading.energy)
    assert set(most) == {2.3, 7.4, 11.0, 22.0, 50.0, 100.0, 150.0} == {kind.kw for kind in CHARGER_KINDS}
    for kw, energy in most.items():
        assert energy > 0.8 * kw / 60 * TICKS_PER_KWH


def test_vehicles_limit_the_power() -> None:
    _, _, sessions = two_days()
    limited = 0
    for session in sessions:
        vehicle, kind = session.vehicle, session.charger.kind
        limit = vehicle.dc_kw if kind.dc else vehicle.onboard.kw
        limited += limit < kind.kw
        assert max(r.energy for r in session.readings) <= limit / 60 * TICKS_PER_KWH + 1
    assert limited > 10


def test_ac_power_is_constant_and_tapers_above_80_percent() -> None:
    _, _, sessions = two_days()
    flat = tapered = 0
    for session in sessions:
        if session.charger.kind.dc or session.readings[0].level > 7000:
            continue
        full = max(reading.energy for reading in session.readings)
        for reading in session.readings[:-1]:
            if reading.level < 8000:
                assert reading.energy > 0.96 * full - 2
                flat += 1
            elif reading.level > 9400 and reading.energy and full > 500:  # the last one ends within the minute
                assert reading.energy < 0.75 * full
                tapered += 1
    assert flat > 1000
    assert tapered > 100


def test_dc_power_tapers_from_60_percent_on() -> None:
    _, _, sessions = two_days()
    flat = tapered = 0
    for session in sessions:
        if not session.charger.kind.dc:
            continue
        per_kw = TICKS_PER_KWH / 60 * session.charger.health
        for reading in session.readings:
            if reading.level < 5500 and reading.energy:
                assert reading.energy > 0.84 * min(session.charger.kind.kw, session.vehicle.dc_kw) * per_kw
                flat += 1
            elif reading.level > 8000:
                assert reading.energy < 0.66 * session.vehicle.dc_kw * per_kw
                tapered += 1
            assert reading.level <= 9000
    assert flat > 100
    assert tapered > 100


def test_voltage_sags_under_load() -> None:
    fleet, readings, _ = two_days()
    idle: dict[int, list[int]] = defaultdict(list)
    busy: dict[int, list[int]] = defaultdict(list)
    for reading in readings:
        if reading.device < len(fleet.chargers):
            (busy if reading.energy else idle)[reading.device].append(reading.level)
    for meter, levels in busy.items():
        assert 3 < mean(idle[meter]) - mean(levels) < 150


def test_batteries_warm_under_load_and_cool_afterwards() -> None:
    fleet, readings, sessions = two_days()
    later = {(r.device, r.ts // MINUTE_MS): r for r in readings if r.device >= len(fleet.chargers)}
    warmer = cooler = 0
    for session in sessions:
        charging = [r for r in session.readings if r.energy]
        first, last = charging[0], charging[-1]
        capacity = session.vehicle.battery_kwh * TICKS_PER_KWH
        if session.dc > 0.3 * capacity and session.dc / len(charging) > 0.6 / 60 * capacity:
            assert last.temperature > first.temperature + 20
            warmer += 1
            parked = later.get((last.device, last.ts // MINUTE_MS + 180))
            if parked is not None and not parked.energy:
                assert parked.temperature < last.temperature
                cooler += 1
    assert warmer > 10
    assert cooler > 10


def test_arrivals_depend_on_the_hour() -> None:
    arrivals = [0] * 24
    for start in (START, JULY):
        for session in two_days(start)[2]:
            first = session.readings[0]
            if first.due >= 4 * 60 * MINUTE_MS:  # not those of the beginning
                arrivals[first.due // MINUTE_MS // 60 % 24] += 1
    night, morning, evening = sum(arrivals[0:4]), sum(arrivals[7:11]), sum(arrivals[17:21])
    assert night > 0  # taxis
    assert morning > 2 * night
    assert evening > 4 * night


@pytest.mark.parametrize("hour", range(24))
def test_something_charges_at_every_site_in_the_first_minutes_at_any_hour(hour: int) -> None:
    fleet = fleet_of(30, 30, start=START + timedelta(hours=hour, minutes=37))
    charging = {reading.device % 6 for reading in readings_of(fleet, 5) if reading.device < 30 and reading.energy}
    assert charging == set(range(6))
    single = fleet_of(1, 1, start=START + timedelta(hours=hour))
    assert any(reading.energy for reading in readings_of(single, 5))


def test_vehicles_follow_one_another_and_come_back() -> None:
    fleet = fleet_of(10, 35)
    readings = readings_of(fleet, 2 * DAY)
    visitors: dict[int, set[int]] = defaultdict(set)
    visits: dict[int, int] = defaultdict(int)
    places: dict[int, set[int]] = defaultdict(set)
    for session in sessions_of(fleet, readings):
        visitors[session.charger.number].add(session.vehicle.number)
        visits[session.vehicle.number] += 1
        places[session.vehicle.number].add(session.charger.number)
    assert all(len(visitors[meter]) >= 3 for meter in range(10))
    assert sum(count >= 2 for count in visits.values()) > 20
    assert sum(len(meters) >= 2 for meters in places.values()) > 10


def test_who_is_full_makes_room_for_who_waits() -> None:
    fleet = fleet_of(5, 25)
    waited = 0
    for _ in range(DAY):
        readings_of(fleet, 1)
        for site in fleet._sites:
            if site.waiting:
                waited += 1
                assert all(vehicle.energy for charger in site.chargers for vehicle in charger.users)
    assert waited > 100


def test_who_is_plugged_in_changes_only_at_the_start_of_a_minute() -> None:
    fleet = fleet_of(5, 12, interval=timedelta(seconds=5))
    named: dict[tuple[int, int], set[int]] = defaultdict(set)
    for reading in readings_of(fleet, 300):
        if reading.device >= 5:
            named[reading.device, reading.ts // MINUTE_MS].add(reading.meter)
    assert all(len(meters) == 1 for meters in named.values())
    assert len({(device, *meters) for (device, _), meters in named.items()}) > 15


def minutes_of(readings: Iterable[Reading], meters: int) -> dict[tuple[int, int], set[int]]:
    users: dict[tuple[int, int], set[int]] = defaultdict(set)
    for reading in readings:
        if reading.device >= meters and reading.meter:
            users[reading.meter - 1, reading.ts // MINUTE_MS].add(reading.device)
    return users


def test_by_default_no_two_vehicles_share_a_meter() -> None:
    users = minutes_of(readings_of(fleet_of(10, 40), DAY), 10)
    assert {len(devices) for devices in users.values()} == {1}


def test_shared_meters_serve_two_vehicles_at_once_and_only_they_do() -> None:
    fleet = fleet_of(20, 40, shared_share=0.2)
    readings = readings_of(fleet, DAY)
    shared = {charger.number for charger in fleet.chargers if charger.outlets == 2}
    assert len(shared) == 4
    together = {place: devices for place, devices in minutes_of(readings, 20).items() if len(devices) > 1}
    assert {len(devices) for devices in together.values()} == {2}
    assert {meter for meter, _ in together} == shared
    energy: dict[tuple[int, int], int] = defaultdict(int)
    for reading in readings:
        if reading.energy:
            energy[reading.device, reading.ts // MINUTE_MS] += reading.energy
    both = 0
    for (meter, minute), devices in together.items():
        dc = [energy[device, minute] for device in devices]
        if all(dc):  # the meter counts the sum
            assert 0.69 * energy[meter, minute] < sum(dc) < 0.95 * energy[meter, minute] + 2
            both += 1
    assert both > 100


@pytest.mark.parametrize(("meters", "faulty"), [(1, 0), (9, 0), (10, 1), (100, 2), (1000, 20)])
def test_a_small_share_of_the_chargers_is_faulty(meters: int, faulty: int) -> None:
    fleet = fleet_of(meters, 0)
    assert len(fleet.faulty) == faulty
    assert fleet.faulty == [charger.id for charger in fleet.chargers if charger.health < 1]
    assert set(fleet.faulty) <= set(fleet.config.meter_ids)


def test_no_charger_is_faulty_where_none_is_asked_for() -> None:
    assert not fleet_of(100, 0, faulty_share=0.0).faulty
    assert len(fleet_of(100, 0, faulty_share=1.0).faulty) == 100


def test_faulty_chargers_are_attributable_while_others_are_shared() -> None:
    chargers = fleet_of(100, 0, faulty_share=0.3, shared_share=0.6).chargers
    assert sum(charger.outlets == 2 for charger in chargers) == 60
    assert not any(charger.faulty and charger.outlets == 2 for charger in chargers)


def test_vehicles_without_any_charger_never_charge() -> None:
    readings = readings_of(fleet_of(0, 5), 2 * DAY)
    assert not any(reading.meter or reading.energy for reading in readings)
    assert all(490 <= reading.level <= 10_000 for reading in readings)


def test_devices_have_names() -> None:
    config = FleetConfig(START, meters=2, vehicles=1)
    assert config.meter_ids == ["MTR-000001", "MTR-000002"]
    assert config.vehicle_ids == ["VEH-000001"]
    assert Fleet(config).encoder.ids == [*config.meter_ids, *config.vehicle_ids]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"meters": 0, "vehicles": 0}, "at least one"),
        ({"meters": -1}, "negative"),
        ({"start": datetime(2026, 2, 10)}, "time zone"),  # noqa: DTZ001 - that is the point
        ({"start": START + timedelta(seconds=1)}, "beginning of a minute"),
        ({"interval": timedelta(seconds=7)}, "divide a minute"),
        ({"interval": timedelta(minutes=5)}, "divide a minute"),
        ({"interval": timedelta(milliseconds=500)}, "divide a minute"),
        ({"topic_root": "energy/#"}, "wildcards"),
        ({"topic_root": "/"}, "topic root"),
        ({"faulty_share": 1.5}, "faulty chargers 1.5 is not between 0 and 1"),
        ({"shared_share": -0.1}, "shared meters -0.1 is not between 0 and 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(wrong: dict[str, Any], hint: str) -> None:
    settings: dict[str, Any] = {"start": START, "meters": 1, "vehicles": 1} | wrong
    with pytest.raises(ValueError, match=hint):
        FleetConfig(**settings)
