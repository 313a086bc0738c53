"""Acknowledged means committed: whatever is cut, killed or restarted, nothing is lost and nothing is counted twice."""

import json
import signal
from itertools import islice
from pathlib import Path

import pytest

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, PrivateMosquitto
from tests.integration.harness import (
    Address,
    Daemon,
    Listener,
    Proxy,
    Publisher,
    ask,
    check_books,
    counters,
    expected_history,
    in_background,
    letters,
    meter,
    meter_history,
    now,
    one,
    series,
    stored,
    wait_for_equal,
    wait_for_received,
    wait_until,
)

# Many small batches: a fault hits one of them wherever it comes.
SMALL_BATCHES = {"batch__max_readings": 200, "batch__max_age_ms": 20}


@pytest.mark.parametrize("moment", ["CopyDone", "COMMIT"])
def test_nothing_is_acknowledged_before_the_commit(
    moment: str, database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=10, readings=30))
    bad = b"not a reading"
    with Daemon(proxy.dsn, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        proxy.cut_before(moment)
        for device, reading in readings:
            devices.send("meter", device, reading)
        devices.send("meter", "MTR-0000", bad)
        devices.flush()
        assert proxy.cut.wait(30)
        daemon.wait_for_event("database.waiting")
        # From here on every message is with the daemon, and the database with nobody.
        wait_until(
            lambda: any(event["outstanding"] == 301 for event in daemon.events("database.waiting")), "all are delivered"
        )
        daemon.kill()
        assert stored(database) == 0
        assert counters(database).received == 0

        # Its session is in the broker, with every message: that is what not acknowledged means.
        with Listener(broker, client_id=daemon.client_id, acknowledge=False) as witness:
            wait_until(lambda: len(witness.messages) >= 301, "the broker delivers all of them again")
        sent = [json.dumps(reading).encode() for _, reading in readings]
        assert sorted(witness.payloads()) == sorted([*sent, bad])
        assert all(message.dup for message in witness.messages)

        proxy.heal()
        daemon.start()
        wait_for_received(database, 301)
        assert check_books(database)[:4] == (301, 300, 0, 1)
        assert meter_history(database) == expected_history(readings)
        assert daemon.terminate() == 0
    with Listener(broker, client_id=daemon.client_id, acknowledge=False) as witness:
        with Publisher(broker, topic_root) as devices:
            devices.send("meter", "LAST", meter("LAST", now()))
            devices.flush()
        wait_until(lambda: witness.messages, "the broker has the session")
        assert [message.topic for message in witness.messages] == [f"{topic_root}/meter/LAST/telemetry"]


@pytest.mark.parametrize("moment", ["BEGIN", "COPY", "CopyDone", "INSERT", "COMMIT"])
def test_a_batch_whose_connection_is_cut_is_written_once(
    moment: str, database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=5, readings=20))
    with Daemon(proxy.dsn, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        proxy.cut_before(moment)
        for device, reading in [*readings, readings[0], readings[1]]:
            devices.send("meter", device, reading)
        devices.send("meter", "MTR-0000", b"{")
        devices.flush()
        assert proxy.cut.wait(30)
        daemon.wait_for_event("database.waiting", attempt=2)
        assert stored(database) == counters(database).received == 0
        proxy.heal()
        wait_for_received(database, 103)
        assert daemon.terminate() == 0
    assert check_books(database)[:4] == (103, 100, 2, 1)
    assert meter_history(database) == expected_history(readings)


def test_a_commit_that_was_not_answered_is_not_counted_twice(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=5, readings=20))
    moment = now()
    with Daemon(proxy.dsn, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        proxy.cut_answer("COMMIT")
        # One message is one batch: it is clear what the commit was about.
        devices.send("meter", "MTR-0", [r for _, r in readings if r.pop("meterId")])
        assert proxy.cut.wait(30)
        wait_until(lambda: counters(database).received, "it is committed")
        before = check_books(database)
        proxy.heal()
        # The next one shows that the first was done with.
        devices.send("meter", "MTR-9", [meter("MTR-9", moment), meter("MTR-9", moment), meter("MTR-9", moment, 9)])
        wait_until(lambda: one(database, "SELECT count(*) FROM meter_live WHERE meter_id = 'MTR-9'"), "the next one")
        assert daemon.terminate() == 0
        assert daemon.events("database.waiting")
    after = check_books(database)
    assert after == (before.received + 3, before.stored + 1, before.duplicate + 1, before.dead_lettered + 1, 0)


@pytest.mark.parametrize("losses", [6])
def test_the_counters_are_exact_over_many_lost_answers(
    losses: int, database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=20, readings=40))
    published = 0
    with (
        Daemon(proxy.dsn, broker, topic_root, tmp_path, **SMALL_BATCHES) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        for part in range(losses):
            proxy.cut_answer("COMMIT") if part % 2 else proxy.cut_before("COMMIT")
            for device, reading in readings[part::losses]:
                devices.send("meter", device, reading)
                devices.send("meter", device, reading)
                published += 2
            devices.send("meter", "MTR-0", b"%d" % part)
            published += 1
            assert proxy.cut.wait(30)
            proxy.heal()
            wait_for_received(database, published)
        assert daemon.terminate() == 0
    books = check_books(database)
    # A number is JSON, and not an object.
    assert books[:4] == (published, len(readings), len(readings), losses)
    assert {reason for _, reason, _ in letters(database)} == {"not_an_object"}
    assert meter_history(database) == expected_history(readings)


def test_a_daemon_killed_under_load_loses_nothing(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=100, readings=80))
    with (
        Daemon(database, broker, topic_root, tmp_path, **SMALL_BATCHES) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        with in_background(lambda: devices.send_series(readings)):
            for part in (1, 2, 3):
                wait_until(lambda least=part: stored(database) >= least * 1_000, "readings are coming in")
                daemon.kill()
                daemon.start()
        wait_for_equal(lambda: stored(database), len(readings))
        assert daemon.terminate() == 0
    books = check_books(database)
    assert meter_history(database) == expected_history(readings)
    # What was committed and not yet acknowledged came again, as duplicates.
    assert books.dead_lettered == 0
    assert books.received >= len(readings)


def test_a_database_stopped_and_killed_under_load_loses_nothing(
    broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=100, readings=80))
    supply = iter(readings)
    with EmbeddedPostgres() as server:
        migrate(server.dsn)
        with (
            Daemon(server.dsn, broker, topic_root, tmp_path, **SMALL_BATCHES) as daemon,
            Publisher(broker, topic_root) as devices,
        ):

            def publish(number: int) -> None:
                for device, reading in islice(supply, number):
                    devices.send("meter", device, reading)

            def noticed(before: int) -> bool:
                # Sessions outlive a killed postmaster by a moment: only a write that fails is certain.
                publish(5)
                return len(daemon.events("database.waiting")) > before

            for end in (server.stop, lambda: server.stop("immediate"), server.kill):
                least = stored(server.dsn) + 300
                publish(1_500)
                wait_until(lambda least=least: stored(server.dsn) >= least, "readings are coming in")
                before = len(daemon.events("database.waiting"))
                end()
                wait_until(lambda before=before: noticed(before), "the daemon has noticed")
                publish(500)
                server.start()
            publish(len(readings))
            devices.flush()
            wait_for_received(server.dsn, len(readings))
            assert daemon.terminate() == 0
        assert check_books(server.dsn)[:4] == (len(readings), len(readings), 0, 0)
        assert meter_history(server.dsn) == expected_history(readings)


def test_a_broker_restarted_under_load_loses_nothing(database: str, topic_root: str, tmp_path: Path) -> None:
    readings = list(series(devices=100, readings=80))
    with (
        PrivateMosquitto() as broker,
        Daemon(database, broker, topic_root, tmp_path, **SMALL_BATCHES) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        with in_background(lambda: devices.send_series(readings)):
            for part in (1, 2):
                wait_until(lambda least=part: stored(database) >= least * 1_000, "readings are coming in")
                broker.stop()
                daemon.wait_for_events("mqtt.waiting", part)
                broker.start()
                daemon.wait_for_events("mqtt.connected", part + 1)
        wait_for_equal(lambda: stored(database), len(readings))
        assert daemon.terminate() == 0
        assert [event["session_present"] for event in daemon.events("mqtt.connected")] == [False, True, True]
    assert check_books(database).dead_lettered == 0
    assert meter_history(database) == expected_history(readings)


def test_what_comes_while_the_daemon_is_away_waits_in_the_broker(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=50, readings=40))
    with Daemon(database, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        assert daemon.terminate() == 0
        for device, reading in readings:
            devices.send("meter", device, reading)
        devices.send("meter", "MTR-0", b"online", channel="status")
        devices.flush()
        daemon.start()
        assert daemon.wait_for_event("mqtt.connected")["session_present"] is True
        wait_for_received(database, len(readings))
        wait_for_equal(lambda: ask(database, "SELECT device_id, online FROM device_presence"), [("MTR-0", True)])
    assert check_books(database)[:4] == (len(readings), len(readings), 0, 0)


def test_the_daemon_survives_a_paused_connection_that_dies(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """A database that hangs and is then cut off, while the daemon is told to stop: nothing is acknowledged."""
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, shutdown_deadline_s=30) as daemon:
        with Publisher(broker, topic_root) as devices:
            proxy.stall()
            devices.send("meter", "MTR-1", meter("MTR-1", now()))
            devices.flush()
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_event("daemon.stopping")
        proxy.refuse()
        daemon.wait_for_event("database.waiting")
        proxy.heal()
        assert daemon.wait() == 0
    assert check_books(database)[:4] == (1, 1, 0, 0)
