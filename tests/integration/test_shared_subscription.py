"""Two daemons share the work: together they have everything, once."""

from datetime import timedelta
from pathlib import Path

from tests.integration.harness import (
    Address,
    Daemon,
    Publisher,
    ask,
    check_books,
    expected_history,
    in_background,
    meter_history,
    now,
    series,
    vehicle,
    wait_for_equal,
    wait_for_received,
    wait_until,
)

GROUP = {"mqtt__share_group": "crew", "batch__max_readings": 300, "batch__max_age_ms": 20, "log__report_every_s": 0.2}


def test_two_daemons_share_everything(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    # The same devices over and over, on days that have no partition yet: both write the same rows and tables at once.
    readings = list(series(devices=40, readings=100, since=now() - timedelta(days=100, minutes=100)))
    readings += series(devices=40, readings=100)
    with (
        Daemon(database, broker, topic_root, tmp_path, **GROUP) as first,
        Daemon(database, broker, topic_root, tmp_path, **GROUP) as second,
        Publisher(broker, topic_root) as devices,
    ):
        for number in range(20):
            devices.send("vehicle", f"VEH-{number}", b"online", channel="status", retain=True)
        for device, reading in readings:
            devices.send("meter", device, reading)
            devices.send("meter", device, reading)
        for number in range(20):
            devices.send("vehicle", f"VEH-{number}", vehicle(f"VEH-{number}", now()))
            if number % 2:
                devices.send("vehicle", f"VEH-{number}", b"offline", channel="status", retain=True)
        devices.flush()
        wait_for_received(database, 2 * len(readings) + 20)
        wait_for_equal(
            lambda: dict(ask(database, "SELECT vehicle_id, online FROM vehicle_status")),
            {f"VEH-{number}": not number % 2 for number in range(20)},
        )
        assert first.terminate() == second.terminate() == 0
        for daemon in (first, second):
            assert daemon.events("database.waiting") == []
            assert daemon.events("daemon.stopped")[0]["received"] > 0
    assert check_books(database)[:4] == (2 * len(readings) + 20, len(readings) + 20, len(readings), 0)
    assert meter_history(database) == expected_history(readings)


def test_when_one_is_killed_the_other_has_the_rest(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=50, readings=100))
    with (
        Daemon(database, broker, topic_root, tmp_path, **GROUP) as first,
        Daemon(database, broker, topic_root, tmp_path, **GROUP) as second,
        Publisher(broker, topic_root) as devices,
    ):
        with in_background(lambda: devices.send_series(readings)):
            wait_until(lambda: len(meter_history(database)) >= 500, "readings are coming in")
            first.kill()
        # What the broker had dealt to the first one waits in its session.
        first.start()
        wait_until(lambda: len(meter_history(database)) == len(readings), "everything is stored")
        assert first.terminate() == second.terminate() == 0
    assert check_books(database).dead_lettered == 0
    assert meter_history(database) == expected_history(readings)
