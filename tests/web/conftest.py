"""A fleet that a real daemon has taken over MQTT, and `wattbridge web` asked about it, as a login that only reads."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from tests.analytics.test_example import BEGIN, M1_AC, METER_AT, MINUTE, V1, V2, send_vehicle
from tests.integration.conftest import Broker, broker, database, postgres_dsn_admin, proxy, template
from tests.integration.harness import Daemon, Publisher, ask, check_books, cloned, meter, vehicle, wait_for_received
from tests.web.serving import Web, login, quarter_hour_ago

__all__ = ["broker", "database", "postgres_dsn_admin", "proxy", "template"]

# Of each pair of a vehicle and a meter, DC over AC.
RATIOS = [0.95, 0.8, 0.8, 0.6, 1.2, 0.9, 0.95, 0.95, 0.7, 1.1, 0.95, 0.95]
MINUTES = 40
# Where vehicles charge in turn, three times SLOT minutes: MTR-20 loses with whoever comes, at MTR-21 only one loses.
SLOT = 20
SHARED = {
    "VEH-20": [("MTR-20", 0.84), ("MTR-21", 0.95), None],
    "VEH-21": [None, ("MTR-20", 0.83), ("MTR-21", 0.95)],
    "VEH-22": [("MTR-21", 0.5), None, ("MTR-20", 0.82)],
}
SILENT = ["VEH-02", "VEH-03", "MTR-04", "MTR-05", "VEH-06"]


@pytest.fixture(scope="session")
def fleet(
    postgres_dsn_admin: str, template: str, broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The DSN, as owner, of a database with a fleet: the worked example, twelve pairs that charged three hours ago."""
    with (
        cloned(postgres_dsn_admin, template) as dsn,
        Daemon(dsn, broker, "test/web", tmp_path_factory.mktemp("web"), limits__horizon_days=36_600) as daemon,
        Publisher(broker, "test/web") as devices,
    ):
        send_vehicle(devices, "V1", V1, BEGIN)
        send_vehicle(devices, "V2", V2, BEGIN + 5 * MINUTE)
        for minute, ac in enumerate(M1_AC):
            devices.send("meter", "M1", meter("M1", BEGIN + minute * MINUTE + METER_AT, ac))
        begin = quarter_hour_ago(hours=3)
        for number, ratio in enumerate(RATIOS):
            at, driven = f"MTR-{number:02}", f"VEH-{number:02}"
            # The first one went away for half an hour in between.
            times = [begin + (minute + 30 * (number == 0 and minute >= 20)) * MINUTE for minute in range(MINUTES)]
            devices.send("meter", at, [meter(at, time, 0.1) for time in times])
            devices.send(
                "vehicle",
                driven,
                [
                    vehicle(driven, time, 0.1 * ratio, 20 + minute / 2, at=at if minute < 35 else None)
                    for minute, time in enumerate(times)
                ],
            )
            devices.send("vehicle", driven, b"online" if number % 2 else b"offline", channel="status")
        send_shared(devices, begin)
        devices.send("vehicle", "-1", vehicle("-1", begin))
        for payload in (b"=1+1", b"[]", {"vehicleId": "another"}):
            devices.send("vehicle", "VEH-00", payload)
        devices.flush()
        expected = 20 + 2 * MINUTES * len(RATIOS) + (2 + len(SHARED)) * 3 * SLOT + 1 + 3
        wait_for_received(dsn, expected)
        assert check_books(dsn).dead_lettered == 3
        assert daemon.terminate() == 0
        for kind in ("meter", "vehicle"):
            query = f"UPDATE {kind}_live SET received_at = received_at - %s WHERE {kind}_id = ANY(%s)"
            ask(dsn, query, timedelta(hours=1), SILENT)
        yield dsn


def send_shared(devices: Publisher, begin: datetime) -> None:
    """Two chargers at which the same three vehicles were, one after the other."""
    minutes = [begin + minute * MINUTE for minute in range(3 * SLOT)]
    for at in ("MTR-20", "MTR-21"):
        devices.send("meter", at, [meter(at, time, 0.125) for time in minutes])
    for driven, slots in SHARED.items():
        readings = []
        for minute, time in enumerate(minutes):
            at, ratio = slots[minute // SLOT] or (None, 0.0)
            # It goes away a little before the next one comes.
            if minute % SLOT >= SLOT - 2:
                at, ratio = None, 0.0
            readings.append(vehicle(driven, time, 0.125 * ratio, 20 + minute / 2, at=at))
        devices.send("vehicle", driven, readings)


@pytest.fixture(scope="session")
def reader(postgres_dsn_admin: str, fleet: str) -> Iterator[str]:
    """The DSN of a login that has wattbridge_reader and nothing else."""
    with login(postgres_dsn_admin, fleet, "wattbridge_reader") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def web(reader: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """`wattbridge web` before the fleet."""
    with Web(reader, tmp_path_factory.mktemp("web")) as running:
        yield running
