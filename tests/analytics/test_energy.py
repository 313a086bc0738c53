"""Energy by quarter hour, hour and day, where days have 23, 25 or other numbers of hours."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

import pytest

from bridge.batch import Batch
from bridge.config import Database
from bridge.messages import MeterReading, VehicleReading, microseconds
from bridge.store import Store
from bridge.topics import Topics
from tests.analytics.asking import Comparison, bound, connected, rows
from tests.integration.harness import ask

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
# A day on which clocks change, or would somewhere else.
CHANGES = [
    ("Europe/Berlin", "2026-03-29"),
    ("Europe/Berlin", "2025-10-26"),
    ("America/St_Johns", "2025-11-02"),
    ("Australia/Lord_Howe", "2026-04-05"),  # by half an hour
    ("Asia/Kathmandu", "2026-03-29"),  # a quarter hour off
    ("America/Santiago", "2025-09-07"),  # there is no midnight
    ("America/Santiago", "2026-04-05"),  # the last hour comes twice
    ("America/Havana", "2025-11-02"),  # midnight comes twice
]


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    made = Store(Database(dsn=database), "test")
    yield made
    await made.close()


async def test_energy_by_the_clocks_of_a_time_zone(store: Store, database: str) -> None:
    for day in sorted({day for _, day in CHANGES}):
        await store.write(readings_around(noon_of(day)))
    ask(database, "SELECT rollup_advance(%s)", noon_of("2026-04-05"))
    ask(database, "SELECT rollup_refresh('1 year')")

    for zone, day in CHANGES:
        ask(database, "UPDATE analytics_setting SET time_zone = %s", zone)
        with connected(database) as connection:
            comparison = Comparison(connection)
            check(comparison, ZoneInfo(zone), noon_of(day))
        assert not comparison.differences, f"{zone}, {day}:\n" + "\n".join(comparison.differences)


def noon_of(day: str) -> datetime:
    return datetime.fromisoformat(f"{day}T12:00+00:00")


def readings_around(noon: datetime) -> Batch:
    """40 hours before and after; each side is silent at times."""
    batch = Batch(TOPICS)
    for number in range(80 * 6):
        ts = microseconds(noon - timedelta(hours=40) + number * timedelta(minutes=10))
        if number % 20 < 14:
            batch.add_reading(MeterReading(f"MTR-{number % 2}", ts, number / 256, 230.0, ts, ts_from_arrival=False))
        if number % 17 < 12:
            kwh = number / 512
            batch.add_reading(VehicleReading("VEH-1", ts + 1, kwh, 50.0, 30.0, None, ts + 1, ts_from_arrival=False))
    return batch


def check(comparison: Comparison, zone: ZoneInfo, noon: datetime) -> None:
    windows = [
        (noon - timedelta(days=2), noon + timedelta(days=2)),
        (noon - timedelta(hours=13, minutes=3), noon + timedelta(hours=15, minutes=52)),
    ]
    devices = [(None, None), ("MTR-1", None), (None, "VEH-1"), ("MTR-0", "VEH-1")]
    for (since, until), unit in product(windows, ("quarter_hour", "hour", "day")):
        part = comparison.naive.window(since, until)
        for meter, vehicle in devices:
            query = f"SELECT * FROM energy_by_{unit}(%s, %s, meter => %s, vehicle => %s)"
            found = rows(comparison.connection, query, since, until, meter, vehicle)
            asked = part.of(meter, vehicle) if meter or vehicle else part
            # A side that was not asked for is NULL.
            gone = ["readings_ac", "kwh_ac"] if vehicle and not meter else []
            gone += ["readings_dc", "kwh_dc"] if meter and not vehicle else []
            expected = [row | dict.fromkeys(gone) for row in asked.energy(unit, zone)]
            comparison.same(f"energy_by_{unit}({bound(since)}, {bound(until)}, {meter}, {vehicle})", found, expected)
