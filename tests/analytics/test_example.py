"""The worked example of the design, as devices would tell it: over MQTT and through the daemon."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.analytics.asking import connected, rows
from tests.integration.conftest import Broker
from tests.integration.harness import Daemon, Publisher, ask, check_books, meter, rfc3339, wait_for_received

M1_AC = [0.4796, 0.4457, 0.5210, 0.6093, 0.6646, 0.6258, 0.4910, 0.6636, 0.4867, 0.5904]
V1 = {
    "dc": [0.4227, 0.4037, 0.4670, 0.5588, 0.5986],
    "soc": [20.70, 21.38, 22.16, 23.09, 24.08],
    "temp": [30.1, 30.2, 30.3, 30.4, 30.5],
}
V2 = {
    "dc": [0.5568, 0.4347, 0.5990, 0.4371, 0.5218],
    "soc": [45.93, 46.65, 47.65, 48.38, 49.25],
    "temp": [30.6, 30.7, 30.8, 30.9, 31.0],
}
BEGIN = datetime(2026, 2, 10, 14, 47, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
# Within each minute at moments of their own, as the clocks of devices have it.
METER_AT, VEHICLE_AT = timedelta(seconds=24.841), timedelta(seconds=51.3)
DAY = (datetime(2026, 2, 10, tzinfo=UTC), datetime(2026, 2, 11, tzinfo=UTC))


@pytest.fixture
def daemon(database: str, broker: Broker, topic_root: str, tmp_path: Path) -> Iterator[Daemon]:
    """As that of the other tests, but it takes readings of 2026 for longer than a year."""
    with Daemon(database, broker, topic_root, tmp_path, limits__horizon_days=36_600) as running:
        yield running


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def send_vehicle(devices: Publisher, name: str, told: dict[str, list[float]], first: datetime) -> None:
    for minute, (dc, soc, temp) in enumerate(zip(told["dc"], told["soc"], told["temp"], strict=True)):
        reading = {
            "vehicleId": name,
            "soc": soc,
            "kwhDeliveredDc": dc,
            "batteryTemp": temp,
            "timestamp": rfc3339(first + minute * MINUTE + VEHICLE_AT),
            "meterId": "M1",
        }
        devices.send("vehicle", name, reading)


def test_the_worked_example(database: str, devices: Publisher) -> None:
    send_vehicle(devices, "V1", V1, BEGIN)
    send_vehicle(devices, "V2", V2, BEGIN + 5 * MINUTE)
    for minute, ac in enumerate(M1_AC):
        devices.send("meter", "M1", meter("M1", BEGIN + minute * MINUTE + METER_AT, ac))
    wait_for_received(database, 20)
    assert check_books(database).stored == 20
    check(database)

    # And the same once all of it is rolled up.
    ask(database, "SELECT rollup_advance(now())")
    ask(database, "SELECT rollup_refresh('1000 days')")
    assert ask(database, "SELECT sum(readings) FROM meter_quarter_hour") == [(10,)]
    check(database)


def check(database: str) -> None:
    vehicles = [
        {
            "vehicle_id": "V1",
            "readings": 5,
            "matched_minutes": 5,
            "kwh_ac": near(2.7202),
            "kwh_dc": near(2.4508),
            "efficiency": near(0.900963164473201),
            "loss_kwh": near(0.2694),
            "reason": None,
            "unattributed_kwh_dc": near(0),
            "avg_soc": near(22.282),
            "last_soc": near(24.08),
            "avg_battery_temp": near(30.3),
            "max_battery_temp": near(30.5),
            "meters": ["M1"],
        },
        {
            "vehicle_id": "V2",
            "readings": 5,
            "matched_minutes": 5,
            "kwh_ac": near(2.8575),
            "kwh_dc": near(2.5494),
            "efficiency": near(0.892178477690289),
            "loss_kwh": near(0.3081),
            "reason": None,
            "unattributed_kwh_dc": near(0),
            "avg_soc": near(47.572),
            "last_soc": near(49.25),
            "avg_battery_temp": near(30.8),
            "max_battery_temp": near(31.0),
            "meters": ["M1"],
        },
    ]
    nothing = {
        "vehicle_id": "V3",
        "readings": 0,
        "matched_minutes": 0,
        "kwh_ac": 0,
        "kwh_dc": 0,
        "efficiency": None,
        "loss_kwh": None,
        "reason": "no readings",
        "unattributed_kwh_dc": 0,
        "avg_soc": None,
        "last_soc": None,
        "avg_battery_temp": None,
        "max_battery_temp": None,
        "meters": [],
    }
    with connected(database) as connection:
        query = "SELECT * FROM vehicle_performance(%s, %s, %s)"
        for expected in (*vehicles, nothing):
            assert rows(connection, query, expected["vehicle_id"], *DAY) == [expected]
        found = rows(connection, "SELECT * FROM fleet_performance(%s, %s) ORDER BY vehicle_id", *DAY)
        assert found == vehicles
        assert rows(connection, "SELECT * FROM fleet_chargers(%s, %s)", *DAY) == [
            {
                "meter_id": "M1",
                "readings": 10,
                "matched_minutes": 10,
                "kwh_ac": near(5.5777),
                "kwh_dc": near(5.0002),
                "efficiency": near(5.0002 / 5.5777),
                "loss_kwh": near(0.5775),
                "reason": None,
                "finding": None,
                "unattributed_kwh_ac": near(0),
                "vehicles": ["V1", "V2"],
            }
        ]
        names = "vehicle_id, started, ended, matched_minutes, kwh_ac, kwh_dc, mean_kw, peak_kw, soc_from, soc_to"
        first = BEGIN + VEHICLE_AT
        assert rows(connection, f"SELECT {names} FROM charging_session ORDER BY started") == [
            {
                "vehicle_id": "V1",
                "started": first,
                "ended": first + 4 * MINUTE,
                "matched_minutes": 5,
                "kwh_ac": near(2.7202),
                "kwh_dc": near(2.4508),
                "mean_kw": near(2.4508 * 12),
                "peak_kw": near(0.5986 * 60),
                "soc_from": 20.70,
                "soc_to": 24.08,
            },
            {
                "vehicle_id": "V2",
                "started": first + 5 * MINUTE,
                "ended": first + 9 * MINUTE,
                "matched_minutes": 5,
                "kwh_ac": near(2.8575),
                "kwh_dc": near(2.5494),
                "mean_kw": near(2.5494 * 12),
                "peak_kw": near(0.5990 * 60),
                "soc_from": 45.93,
                "soc_to": 49.25,
            },
        ]
