"""The fleet: repeatable, in order, and true to the little physics that it promises."""

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import pytest

from simulator.fleet import Fleet, FleetConfig, Message

START = datetime(2026, 2, 10, tzinfo=UTC)


def fleet_of(meters: int, vehicles: int, **others: Any) -> Fleet:
    return Fleet(FleetConfig(start=START, meters=meters, vehicles=vehicles, **others))


def messages_of(fleet: Fleet, minutes: int) -> list[Message]:
    config = fleet.config
    slots = minutes * (timedelta(minutes=1) // config.interval)
    return list(islice(fleet, slots * (config.meters + config.vehicles)))


def minute_of(reading: dict[str, Any]) -> str:
    return str(reading["timestamp"])[:16]


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert messages_of(fleet_of(20, 30), 180) == messages_of(fleet_of(20, 30), 180)


def test_another_seed_gives_another_fleet() -> None:
    assert messages_of(fleet_of(20, 30), 2) != messages_of(fleet_of(20, 30, seed=2), 2)


def test_a_start_in_another_zone_is_the_same_start() -> None:
    elsewhere = START.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    other = Fleet(FleetConfig(start=elsewhere, meters=3, vehicles=3))
    assert messages_of(other, 2) == messages_of(fleet_of(3, 3), 2)


@pytest.mark.parametrize("seconds", [60, 20, 1])
def test_every_device_says_one_thing_per_interval_in_time_order(seconds: int) -> None:
    interval = timedelta(seconds=seconds)
    messages = messages_of(fleet_of(7, 9, interval=interval), 2)
    assert [m.due for m in messages] == sorted(m.due for m in messages)
    seen = set()
    for message in messages:
        reading = json.loads(message.payload)
        stamp = datetime.fromisoformat(reading["timestamp"])
        assert stamp == START + timedelta(milliseconds=round(message.due * 1000))
        seen.add((message.topic, (stamp - START) // interval))
    assert len(seen) == len(messages) == 16 * 120 // seconds


def test_the_load_is_spread_over_the_interval() -> None:
    dues = [m.due for m in messages_of(fleet_of(50, 50), 2)]
    assert max(later - earlier for earlier, later in pairwise(dues)) < 1.0


def test_payloads_follow_the_contract() -> None:
    meter: set[str] = set()
    vehicle: set[str] = set()
    for message in messages_of(fleet_of(10, 10, topic_root="a/b"), 5):
        root, version, kind, device, what = message.topic.split("/")
        reading = json.loads(message.payload)
        assert (root, version, what) == ("a", "b", "telemetry")
        assert reading[f"{kind}Id"] == device
        (meter if kind == "meter" else vehicle).update(reading)
    assert meter == {"meterId", "kwhConsumedAc", "voltage", "timestamp"}
    assert vehicle == {"vehicleId", "soc", "kwhDeliveredDc", "batteryTemp", "timestamp", "meterId"}


@pytest.mark.parametrize(("meters", "vehicles"), [(40, 40), (10, 35), (30, 10)])
@pytest.mark.parametrize("seconds", [60, 30])
def test_matched_minutes_give_the_efficiency_of_the_charger(meters: int, vehicles: int, seconds: int) -> None:
    """Computed from what is published alone, as a database would do it."""
    fleet = fleet_of(meters, vehicles, interval=timedelta(seconds=seconds))
    ac_of: dict[tuple[str, str], float] = defaultdict(float)
    dc_of: dict[tuple[str, str], float] = defaultdict(float)
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    for message in messages_of(fleet, 12 * 60):
        reading = json.loads(message.payload)
        if "kwhConsumedAc" in reading:
            ac_of[reading["meterId"], minute_of(reading)] += reading["kwhConsumedAc"]
        elif "meterId" in reading:
            users[reading["meterId"], minute_of(reading)].add(reading["vehicleId"])
            dc_of[reading["vehicleId"], minute_of(reading)] += reading["kwhDeliveredDc"]
        else:
            assert reading["kwhDeliveredDc"] == 0

    assert all(len(who) == 1 for who in users.values())
    assert {place for place, ac in ac_of.items() if ac} == set(users)
    ac: dict[str, float] = defaultdict(float)
    dc: dict[str, float] = defaultdict(float)
    for (meter, minute), (user,) in users.items():
        ac[user] += ac_of[meter, minute]
        dc[user] += dc_of[user, minute]
    assert len(ac) >= min(meters, vehicles) / 2
    for vehicle in fleet.vehicles:
        assert vehicle.ac_kwh == pytest.approx(ac[vehicle.id])
        assert vehicle.dc_kwh == pytest.approx(dc[vehicle.id])
        if vehicle.ac_kwh:
            assert vehicle.charger is not None
            assert vehicle.dc_kwh / vehicle.ac_kwh == pytest.approx(vehicle.charger.efficiency, abs=0.01)


def test_values_stay_in_their_bounds_for_two_days() -> None:
    fleet = fleet_of(10, 25)
    for message in messages_of(fleet, 2 * 24 * 60):
        reading = json.loads(message.payload)
        if "soc" in reading:
            assert 0 <= reading["soc"] <= 100
            assert 0 <= reading["kwhDeliveredDc"] < 1
            assert 5 < reading["batteryTemp"] < 60
        else:
            assert 0 <= reading["kwhConsumedAc"] <= 0.8334
            assert 207 < reading["voltage"] < 253


def test_everyone_charges_leaves_and_comes_back() -> None:
    fleet = fleet_of(20, 20)
    plugged_in: dict[str, list[bool]] = defaultdict(list)
    for message in messages_of(fleet, 48 * 60):
        reading = json.loads(message.payload)
        if "soc" in reading:
            plugged_in[reading["vehicleId"]].append("meterId" in reading)
    for states in plugged_in.values():
        changes = sum(before != after for before, after in pairwise(states))
        assert changes >= 2


def test_power_tapers_above_80_percent() -> None:
    fleet = fleet_of(30, 30)
    most: dict[str, float] = defaultdict(float)
    soc: dict[str, float] = {}
    for message in messages_of(fleet, 24 * 60):
        reading = json.loads(message.payload)
        if "meterId" in reading and "soc" in reading:
            vehicle, dc, before = (
                reading["vehicleId"],
                reading["kwhDeliveredDc"],
                soc.get(reading["vehicleId"]),
            )
            most[vehicle] = max(most[vehicle], dc)
            if before is not None and before > 90:
                assert dc < 0.7 * most[vehicle]
        if "soc" in reading:
            soc[reading["vehicleId"]] = reading["soc"]


def test_voltage_sags_under_load() -> None:
    fleet = fleet_of(50, 50)
    idle: list[float] = []
    busy: list[float] = []
    for message in messages_of(fleet, 10):
        reading = json.loads(message.payload)
        if "voltage" in reading:
            (busy if reading["kwhConsumedAc"] else idle).append(reading["voltage"])
    assert 1 < sum(idle) / len(idle) - sum(busy) / len(busy) < 6


@pytest.mark.parametrize(("meters", "faulty"), [(1, 0), (9, 0), (10, 1), (100, 2), (1000, 20)])
def test_a_small_share_of_the_chargers_is_faulty(meters: int, faulty: int) -> None:
    chargers = fleet_of(meters, 0).chargers
    assert sum(charger.faulty for charger in chargers) == faulty
    for charger in chargers:
        assert (charger.efficiency < 0.85) == charger.faulty


def test_vehicles_without_any_charger_never_charge() -> None:
    assert all(b"meterId" not in message.payload for message in messages_of(fleet_of(0, 5), 60 * 24))


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
        ({"faulty_share": 1.5}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(wrong: dict[str, Any], hint: str) -> None:
    settings: dict[str, Any] = {"start": START, "meters": 1, "vehicles": 1} | wrong
    with pytest.raises(ValueError, match=hint):
        FleetConfig(**settings)
