"""Whoever looks after the daemon learns that it stands still, and why: readiness, log and systemd's watchdog."""

import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Self

import pytest

from bridge.services import PrivateMosquitto, free_port
from tests.integration.harness import (
    Address,
    Daemon,
    Proxy,
    Publisher,
    ask,
    check_books,
    environment,
    expected_history,
    in_background,
    meter,
    meter_history,
    now,
    series,
    stored,
    wait_for_equal,
    wait_for_received,
    wait_until,
    wattbridge,
)

# More than a commit takes on a busy machine.
STALLED_AFTER_S = 2.0


class Service:
    """What systemd is to a service: it hears what is said, and when."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.name)
        self._socket.settimeout(0.1)
        self._heard: list[tuple[float, str]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join()
        self._socket.close()

    def heard(self, words: str, since: float = 0.0) -> int:
        """How many messages began with these words."""
        return sum(moment >= since and said.startswith(words) for moment, said in list(self._heard))

    @property
    def all(self) -> list[str]:
        return [said for _, said in list(self._heard)]

    def _listen(self) -> None:
        while not self._closed:
            try:
                said = self._socket.recv(4_096).decode()
            except TimeoutError:
                continue
            self._heard.append((time.monotonic(), said))


@pytest.fixture
def service() -> Iterator[Service]:
    # Not tmp_path: the path of a socket has to fit into 103 bytes.
    with TemporaryDirectory() as folder, Service(Path(folder)) as listening:
        yield listening


class Answer(NamedTuple):
    status: int
    text: str


def get(port: int, path: str, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, response.read().decode())
    finally:
        connection.close()


@pytest.fixture
def port() -> int:
    return free_port()


def watched(port: int, **settings: object) -> dict[str, object]:
    return {
        "health__listen": f"127.0.0.1:{port}",
        "health__stalled_after_s": STALLED_AFTER_S,
        "log__report_every_s": 0.2,
        **settings,
    }


def send_one(devices: Publisher, name: str) -> None:
    devices.send("meter", name, meter(name, now()))
    devices.flush()


# --- a standstill ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["hanging", "down"])
def test_a_standstill_is_said_everywhere_and_so_is_its_end(
    state: str,
    proxy: Proxy,
    database: str,
    broker: Address,
    topic_root: str,
    tmp_path: Path,
    port: int,
    service: Service,
) -> None:
    daemon = Daemon(proxy.dsn, broker, topic_root, tmp_path, **watched(port))
    daemon.env |= {"NOTIFY_SOCKET": service.name, "WATCHDOG_USEC": "500000"}
    with daemon, Publisher(broker, topic_root) as devices:
        send_one(devices, "MTR-1")
        wait_for_received(database, 1)
        wait_for_equal(lambda: get(port, "/readyz"), Answer(200, "ready\n"))
        wait_until(lambda: service.heard("WATCHDOG=1") >= 5, "systemd is fed")

        proxy.stall() if state == "hanging" else proxy.refuse()
        send_one(devices, "MTR-2")
        send_one(devices, "MTR-3")
        stalled = daemon.wait_for_event("pipeline.stalled", level="error")
        assert stalled["since_s"] >= STALLED_AFTER_S
        assert stalled["outstanding"] == 2
        assert "a batch of" in stalled["waits_for"]
        answer = get(port, "/readyz")
        assert answer.status == 503
        assert answer.text.startswith("no progress for ")
        assert " with 2 outstanding; waits for a batch of " in answer.text
        if state == "down":
            failure = daemon.events("database.waiting")[-1]["reason"]
            assert failure.split(":")[0] in stalled["waits_for"] + answer.text
        # What is asked for liveness alone is not told to kill us: that is up to who reads readiness, or to systemd.
        assert get(port, "/livez") == Answer(200, "alive\n")
        hungry = time.monotonic()
        time.sleep(1.5)
        assert service.heard("WATCHDOG=1", hungry) == 0
        assert service.heard("STATUS=no progress for ", hungry) > 0
        assert daemon.running

        proxy.heal()
        wait_for_received(database, 3)
        wait_for_equal(lambda: get(port, "/readyz"), Answer(200, "ready\n"))
        moving = daemon.wait_for_event("pipeline.moving", level="info")
        assert moving["stood_s"] >= stalled["since_s"]
        healed = time.monotonic()
        wait_until(lambda: service.heard("WATCHDOG=1", healed) >= 3, "systemd is fed again")
        assert len(daemon.events("pipeline.stalled")) == len(daemon.events("pipeline.moving")) == 1
        assert daemon.terminate() == 0
    assert service.all[0].startswith("READY=1\nSTATUS=")
    wait_until(lambda: service.heard("STOPPING=1") == 1, "it says that it stops")
    assert service.heard("STATUS=ready: 3 stored, ") > 0


def test_before_the_database_has_answered_it_is_not_ready_and_then_stands_still(
    proxy: Proxy, database: str, broker: Address, topic_root: str, tmp_path: Path, port: int
) -> None:
    proxy.refuse()
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, **watched(port), ready=False) as daemon:
        daemon.wait_for_event("mqtt.connected")
        failure = daemon.wait_for_event("database.waiting")["reason"]
        answer = get(port, "/readyz")
        assert answer.status == 503
        assert answer.text.startswith("waits for the database: ")
        assert failure.split(":")[0] in answer.text
        # Nothing is held, so nothing stands still, however long it takes.
        time.sleep(2 * STALLED_AFTER_S)
        assert daemon.events("pipeline.stalled") == []
        with Publisher(broker, topic_root) as devices:
            sent = time.monotonic()
            send_one(devices, "MTR-1")
        stalled = daemon.wait_for_event("pipeline.stalled")
        assert stalled["waits_for"].startswith("the database: ")
        assert stalled["outstanding"] == 1
        # Counted from when there was something to write, not from the start.
        assert stalled["since_s"] <= round(time.monotonic() - sent, 1)
        proxy.heal()
        wait_for_received(database, 1)
        daemon.wait_for_event("pipeline.moving")
        wait_for_equal(lambda: get(port, "/readyz"), Answer(200, "ready\n"))
        assert daemon.terminate() == 0


def test_without_a_broker_it_is_not_ready_and_yet_nothing_stands_still(
    database: str, topic_root: str, tmp_path: Path, port: int, service: Service
) -> None:
    with PrivateMosquitto() as own:
        daemon = Daemon(database, own, topic_root, tmp_path, **watched(port))
        daemon.env |= {"NOTIFY_SOCKET": service.name, "WATCHDOG_USEC": "500000"}
        with daemon:
            wait_for_equal(lambda: get(port, "/readyz"), Answer(200, "ready\n"))
            own.stop()
            daemon.wait_for_event("mqtt.waiting", attempt=2)
            answer = get(port, "/readyz")
            assert answer.status == 503
            assert answer.text.startswith(f"not connected to the broker {own.host}:{own.port}: ")
            assert "refused" in answer.text.lower()
            since = time.monotonic()
            time.sleep(2 * STALLED_AFTER_S)
            assert daemon.events("pipeline.stalled") == []
            assert service.heard("WATCHDOG=1", since) > 2
            own.start()
            wait_for_equal(lambda: get(port, "/readyz"), Answer(200, "ready\n"))
            assert daemon.terminate() == 0


def test_a_trickle_is_no_standstill(
    proxy: Proxy, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """Something is always held, and something is always committed."""
    settings = watched(free_port(), batch__max_age_ms=500)
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, **settings) as daemon:
        with Publisher(broker, topic_root) as devices:
            for number in range(45):
                send_one(devices, f"MTR-{number}")
                time.sleep(0.1)
        wait_for_received(database, 45)
        assert daemon.events("pipeline.stalled") == []
        assert daemon.terminate() == 0


def test_while_it_stops_it_is_not_ready(
    proxy: Proxy, database: str, broker: Address, topic_root: str, tmp_path: Path, port: int, service: Service
) -> None:
    daemon = Daemon(proxy.dsn, broker, topic_root, tmp_path, **watched(port))
    daemon.env |= {"NOTIFY_SOCKET": service.name}
    with daemon:
        proxy.refuse()
        with Publisher(broker, topic_root) as devices:
            send_one(devices, "MTR-1")
        daemon.wait_for_event("database.waiting", outstanding=1)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_event("daemon.stopping")
        wait_until(lambda: service.heard("STOPPING=1") == 1, "it says that it stops")
        answer = get(port, "/readyz")
        assert answer.status == 503
        assert answer.text.splitlines()[0] == "stopping"
        assert get(port, "/livez").status == 200
        proxy.heal()
        assert daemon.wait() == 0
    assert service.heard("WATCHDOG=1") == 0
    assert check_books(database).stored == 1


# --- the books of the process ------------------------------------------------------------------------------


def test_the_books_are_balanced_in_every_report_over_kills_and_restarts(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    readings = list(series(devices=60, readings=60))
    settings = {"batch__max_readings": 200, "batch__max_age_ms": 20, "log__report_every_s": 0.01}
    reports = 0
    with (
        Daemon(proxy.dsn, broker, topic_root, tmp_path, **settings) as daemon,
        Publisher(broker, topic_root) as devices,
    ):
        with in_background(lambda: devices.send_series([*readings, *readings[:200]])):
            for part in (1, 2, 3):
                wait_until(lambda least=part: stored(database) >= least * 800, "readings are coming in")
                proxy.cut_answer("COMMIT") if part == 2 else proxy.cut_before("COMMIT")
                devices.send("meter", "MTR-0000", b"%d" % part)
                assert proxy.cut.wait(30)
                daemon.wait_for_event("database.waiting")
                reports += unbalanced(daemon)
                daemon.kill()
                proxy.heal()
                daemon.start()
        wait_until(lambda: stored(database) == len(readings), "everything is stored")
        wait_until(lambda: daemon.events("daemon.progress")[-1]["outstanding"] == 0, "everything is done")
        assert daemon.terminate() == 0
        reports += unbalanced(daemon)
        (stopped,) = daemon.events("daemon.stopped")
        assert (stopped["outstanding"], stopped["unaccounted"]) == (0, 0)
    assert reports > 50
    books = check_books(database)
    assert books.dead_lettered == 3
    assert meter_history(database) == expected_history(readings)


def unbalanced(daemon: Daemon) -> int:
    """Fails where a report of this process does not add up; returns how many there were."""
    reports = daemon.events("daemon.progress")
    assert [event for event in reports if event["unaccounted"]] == []
    assert daemon.events("books.unbalanced") == []
    for event in reports:
        held = event["taken"] - event["given_back"] - event["outstanding"]
        assert 0 <= held <= event["received"] + event["presence"]
    return len(reports)


def test_a_reading_that_somebody_else_counted_is_noticed(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, broker, topic_root, tmp_path, log__report_every_s=0.2) as daemon:
        with Publisher(broker, topic_root) as devices:
            send_one(devices, "MTR-1")
            wait_for_received(database, 1)
            ask(database, "UPDATE ingest_counter SET received = received + 2, stored = stored + 2")
            send_one(devices, "MTR-2")
        unbalanced_books = daemon.wait_for_event("books.unbalanced", level="error", outstanding=0)
        assert (unbalanced_books["taken"], unbalanced_books["committed"], unbalanced_books["unaccounted"]) == (2, 4, -2)
        # It stays so; to be told once is enough.
        daemon.wait_for_events("daemon.progress", len(daemon.events("daemon.progress")) + 3)
        assert len(daemon.events("books.unbalanced")) == 1
        assert daemon.terminate() == 0


# --- the HTTP port -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200),
        ("HEAD", "/readyz", 200),
        ("GET", "/readyz?verbose", 200),
        ("GET", "/", 404),
        ("GET", "/metrics/../livez", 404),
        ("POST", "/readyz", 405),
    ],
)
def test_what_it_answers(
    database: str,
    broker: Address,
    topic_root: str,
    tmp_path: Path,
    port: int,
    method: str,
    path: str,
    status: int,
) -> None:
    with Daemon(database, broker, topic_root, tmp_path, **watched(port)):
        # Connected to both sides, it has yet to read its counters.
        wait_for_equal(lambda: get(port, "/readyz").status, 200)
        answer = get(port, path, method)
        assert answer.status == status
        assert (answer.text == "") == (method == "HEAD")


def test_a_port_that_is_taken_ends_it_with_a_line_that_says_what_to_do(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        reply = wattbridge(
            "run", env=environment(database, broker, topic_root, "test-taken", **watched(port)), cwd=tmp_path
        )
    assert reply.code == 1
    assert f"wattbridge: health.listen: cannot listen on 127.0.0.1 port {port}: Address already in use" in reply.err
    assert "choose another" in reply.err
    assert len(reply.err.splitlines()) == 1


def test_without_listen_there_is_no_port(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    with Daemon(database, broker, topic_root, tmp_path) as daemon:
        assert daemon.events("http.listening") == []
        assert daemon.terminate() == 0


def test_strangers_at_the_port_do_not_disturb_the_readings(
    database: str, broker: Address, topic_root: str, tmp_path: Path, port: int
) -> None:
    """Garbage, half requests, a flood of bytes and hundreds of connections that say nothing."""
    readings = list(series(devices=50, readings=60))
    garbage = [
        b"",
        b"\0" * 70_000,
        os.urandom(5_000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /readyz HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n" + b"x" * 200_000,
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000,
    ]
    with Daemon(database, broker, topic_root, tmp_path, **watched(port)) as daemon:
        with Publisher(broker, topic_root) as devices, in_background(lambda: devices.send_series(readings)):
            for said in garbage * 3:
                annoy(port, said)
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
            assert get(port, "/livez") == Answer(200, "alive\n")
            for connection in silent:
                connection.close()
        wait_until(lambda: stored(database) == len(readings), "everything is stored")
        assert get(port, "/readyz") == Answer(200, "ready\n")
        assert daemon.terminate() == 0
        assert "Traceback" not in daemon.log
        assert {event["event"] for event in daemon.events()} <= {
            "daemon.started", "daemon.stopping", "daemon.stopped", "daemon.progress", "http.listening",
            "database.connected", "mqtt.connected", "rollups.refreshed",
        }  # fmt: skip
        assert [line for line in daemon.log.splitlines() if not line.startswith("{")] == []
    assert check_books(database)[:4] == (len(readings), len(readings), 0, 0)


def annoy(port: int, said: bytes) -> None:
    """Says something, takes what is answered, and goes; the other side may end it at any time."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.3) as connection:
            connection.sendall(said)
            while connection.recv(65_536):
                pass
    except (TimeoutError, ConnectionError):
        return


def test_somebody_who_only_connects_is_sent_away(
    database: str, broker: Address, topic_root: str, tmp_path: Path, port: int
) -> None:
    with (
        Daemon(database, broker, topic_root, tmp_path, **watched(port)),
        socket.create_connection(("127.0.0.1", port), timeout=30) as silent,
    ):
        silent.sendall(b"GET /livez HTTP/1.1\r\n")
        assert silent.recv(1) == b""
        assert get(port, "/livez").status == 200


def test_an_open_connection_does_not_keep_it_from_stopping(
    database: str, broker: Address, topic_root: str, tmp_path: Path, port: int
) -> None:
    with (
        Daemon(database, broker, topic_root, tmp_path, **watched(port)) as daemon,
        socket.create_connection(("127.0.0.1", port)) as half,
    ):
        half.sendall(b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(8) == 0
