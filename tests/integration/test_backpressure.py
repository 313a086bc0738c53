"""When the database cannot keep up, the broker keeps the backlog; the daemon holds a window of it, connected."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.services import PrivateMosquitto
from tests.integration.harness import (
    BrokerProxy,
    Daemon,
    Proxy,
    Publisher,
    check_books,
    expected_history,
    meter,
    meter_history,
    now,
    series,
    stored,
    wait_for_received,
    wait_until,
)

WINDOW = 500
MAX_BYTES = 1024 * 1024
SETTINGS = {
    "mqtt__receive_maximum": WINDOW,
    "mqtt__max_outstanding_bytes": MAX_BYTES,
    "mqtt__keep_alive_s": 5,
    "log__report_every_s": 0.2,
}
# What one read from the network may bring beyond the limits: 256 KiB, in messages of at least 150 bytes.
ONE_READ = 256 * 1024


@pytest.fixture
def own_broker() -> Iterator[PrivateMosquitto]:
    """Not the shared one: it is filled with messages."""
    with PrivateMosquitto() as broker:
        yield broker


# Hanging for two keep-alives of the connection: after one and a half of one the broker would end it.
@pytest.mark.parametrize(("state", "seconds"), [("hanging", 10), ("down", 3)])
def test_outstanding_is_bounded_while_the_database_is_away(
    state: str, seconds: int, proxy: Proxy, database: str, own_broker: PrivateMosquitto, topic_root: str, tmp_path: Path
) -> None:
    queued = list(series(devices=50, readings=40))
    padding = "x" * 1_000
    start = now() - timedelta(hours=5)
    flood = [meter("FLOOD", start + timedelta(seconds=n)) | {"padding": padding} for n in range(5_000)]
    size = len(json.dumps(flood[0]))
    with (
        Daemon(proxy.dsn, own_broker, topic_root, tmp_path, **SETTINGS) as daemon,
        Publisher(own_broker, topic_root) as devices,
    ):
        proxy.stall() if state == "hanging" else proxy.refuse()
        for device, reading in queued:
            devices.send("meter", device, reading)
        devices.flush()
        daemon.wait_for_event("daemon.progress", outstanding=WINDOW)
        for reading in flood:
            devices.send("meter", "FLOOD", reading, qos=0)
        devices.flush()

        seen = len(daemon.events("daemon.progress"))
        daemon.wait_for_events("daemon.progress", seen + round(seconds / SETTINGS["log__report_every_s"]))
        progress = daemon.events("daemon.progress")
        outstanding = [event["outstanding"] for event in progress]
        assert outstanding[-1] >= WINDOW
        assert max(outstanding) <= WINDOW + MAX_BYTES // size + ONE_READ // 150
        assert all(event["connected"] for event in progress)
        assert daemon.events("mqtt.waiting") == []

        proxy.heal()
        wait_for_received(database, len(queued))
        expected = expected_history(queued)
        wait_until(lambda: expected.items() <= meter_history(database).items(), "everything at QoS 1 is stored")
        assert daemon.events("mqtt.waiting") == []
        assert len(daemon.events("mqtt.connected")) == 1
        # It reads on after all that.
        devices.send("meter", "LAST", meter("LAST", now()))
        wait_until(lambda: "LAST" in {device for device, _ in meter_history(database)}, "the last one is stored")
        assert daemon.terminate() == 0
    books = check_books(database)
    assert books.duplicate == books.dead_lettered == 0


def test_the_daemon_holds_no_more_memory_than_its_window(
    proxy: Proxy, database: str, own_broker: PrivateMosquitto, topic_root: str, tmp_path: Path
) -> None:
    """64 MB of QoS 1 wait in the broker; of them the daemon takes its window alone."""
    psutil = pytest.importorskip("psutil")
    start = now() - timedelta(hours=5)
    padding = "x" * 64_000
    # Batches that fit into the window, in bytes too, do not wait for more: that makes the draining short.
    settings = SETTINGS | {"mqtt__receive_maximum": 50, "batch__max_readings": 10}
    with (
        Daemon(proxy.dsn, own_broker, topic_root, tmp_path, **settings) as daemon,
        Publisher(own_broker, topic_root) as devices,
    ):
        proxy.refuse()
        before = psutil.Process(daemon.pid).memory_info().rss
        for second in range(1_000):
            devices.send("meter", "BIG", meter("BIG", start + timedelta(seconds=second)) | {"padding": padding})
        devices.flush()
        daemon.wait_for_event("database.waiting", attempt=3)
        grown = psutil.Process(daemon.pid).memory_info().rss - before
        proxy.heal()
        wait_for_received(database, 1_000)
        assert daemon.terminate() == 0
    assert grown < 32 * 1024 * 1024
    assert check_books(database)[:4] == (1_000, 1_000, 0, 0)


def test_a_broker_that_restarts_while_reading_is_paused(
    proxy: Proxy, database: str, own_broker: PrivateMosquitto, topic_root: str, tmp_path: Path
) -> None:
    queued = list(series(devices=20, readings=100))
    start = now() - timedelta(hours=5)
    with Daemon(proxy.dsn, own_broker, topic_root, tmp_path, **SETTINGS) as daemon:
        with Publisher(own_broker, topic_root) as devices:
            proxy.refuse()
            for device, reading in queued:
                devices.send("meter", device, reading)
            for second in range(3_000):
                devices.send("meter", "FLOOD", meter("FLOOD", start + timedelta(seconds=second)), qos=0)
            devices.flush()
            wait_until(
                lambda: any(event["outstanding"] > WINDOW for event in daemon.events("daemon.progress")),
                "it has paused",
            )
        own_broker.stop()
        own_broker.start()
        daemon.wait_for_event("mqtt.waiting")
        proxy.heal()
        # Not before: while it does not read, it cannot see that the broker let it in.
        daemon.wait_for_events("mqtt.connected", 2)
        expected = expected_history(queued)
        wait_until(lambda: expected.items() <= meter_history(database).items(), "everything at QoS 1 is stored")
        with Publisher(own_broker, topic_root) as devices:
            devices.send("meter", "LAST", meter("LAST", now()))
            wait_until(lambda: "LAST" in {device for device, _ in meter_history(database)}, "the last one is stored")
        assert daemon.terminate() == 0
    assert check_books(database).dead_lettered == 0


def test_what_is_held_does_not_grow_with_each_connection(
    proxy: Proxy, database: str, own_broker: PrivateMosquitto, topic_root: str, tmp_path: Path
) -> None:
    """The window of the first connection is kept; what the others bring beyond it is dropped, not held beside it."""
    window, batch, cuts = 300, 50, 3
    queued = list(series(devices=20, readings=100))
    settings = SETTINGS | {"mqtt__receive_maximum": window, "batch__max_readings": batch}
    with BrokerProxy(own_broker) as wire, Daemon(proxy.dsn, wire, topic_root, tmp_path, **settings) as daemon:
        proxy.stall()

        def last(name: str) -> int:
            return next((event[name] for event in reversed(daemon.events("daemon.progress"))), 0)

        with Publisher(own_broker, topic_root) as devices:
            for device, reading in queued:
                devices.send("meter", device, reading)
            devices.flush()
        wait_until(lambda: last("deliveries") >= window, "the first connection has brought its window")
        for cut in range(cuts):
            brought, given_back = last("deliveries"), last("given_back")
            waited = len(daemon.events("mqtt.waiting"))
            # Not hung up on five times in a row: that would be somebody with the same client id.
            wire.refuse() if cut == 1 else wire.drop()
            daemon.wait_for_events("mqtt.waiting", waited + (2 if cut == 1 else 1))
            wire.heal()
            wait_until(
                lambda brought=brought: last("deliveries") > brought, "the next connection has brought something"
            )
            if cut:
                assert last("given_back") > given_back
        progress = daemon.events("daemon.progress")
        assert window <= max(event["outstanding"] for event in progress) <= 2 * window + batch
        assert {event["unaccounted"] for event in progress} == {0}

        proxy.heal()
        wait_until(lambda: stored(database) == len(queued), "everything is stored")
        assert daemon.terminate() == 0
        (stopped,) = daemon.events("daemon.stopped")
        assert (stopped["outstanding"], stopped["unaccounted"]) == (0, 0)
        assert daemon.events("books.unbalanced") == []
    assert meter_history(database) == expected_history(queued)
    assert check_books(database).dead_lettered == 0


@pytest.mark.parametrize("number", [WINDOW // 2, WINDOW], ids=["half a window", "a full window"])
def test_what_a_killed_broker_has_forgotten_is_written(
    number: int, proxy: Proxy, database: str, own_broker: PrivateMosquitto, topic_root: str, tmp_path: Path
) -> None:
    """It had delivered them, and saved nothing: the daemon has the only copies, and the database does not answer."""
    readings = list(series(devices=10, readings=number // 10))
    settings = SETTINGS | {"batch__max_readings": 50}
    with Daemon(proxy.dsn, own_broker, topic_root, tmp_path, **settings) as daemon:
        proxy.stall()
        with Publisher(own_broker, topic_root) as devices:
            devices.send_series(readings)
            daemon.wait_for_event("daemon.progress", outstanding=number)
            own_broker.kill()
        own_broker.start()
        daemon.wait_for_event("mqtt.session_lost")
        daemon.wait_for_events("mqtt.connected", 2)
        assert stored(database) == 0
        proxy.heal()
        wait_until(lambda: stored(database) == number, "all of them are stored")
        # And it takes what comes next.
        with Publisher(own_broker, topic_root) as devices:
            devices.send("meter", "LAST", meter("LAST", now()))
        wait_until(lambda: stored(database) == number + 1, "the last one is stored")
        assert daemon.terminate() == 0
        (stopped,) = daemon.events("daemon.stopped")
        assert (stopped["taken"], stopped["given_back"], stopped["unaccounted"]) == (number + 1, 0, 0)
    assert check_books(database)[:4] == (number + 1, number + 1, 0, 0)
