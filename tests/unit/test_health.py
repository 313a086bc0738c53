"""What is a standstill, what is said of it, and what systemd is told."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import structlog

from bridge.health import Stall, Standing, Watchdog
from bridge.supervisor import Supervisor

QUIET = Standing(opened=True, outstanding=0, still_s=0.0, writing=0, writing_s=0.0, failure="")
HANGING = QUIET._replace(outstanding=700, still_s=61.0, writing=500, writing_s=60.8)
READY: list[str] = []


def reasons(standing: Standing, broker: str = "", *, stopping: bool = False) -> list[str]:
    return list(Watchdog(60).unready(standing, broker=broker, stopping=stopping))


# What is a standstill


@pytest.mark.parametrize(
    ("standing", "stalls"),
    [
        (QUIET, False),
        (QUIET._replace(still_s=10_000.0), False),
        (HANGING, True),
        (HANGING._replace(still_s=60.0), True),
        (HANGING._replace(still_s=59.9), False),
        (HANGING._replace(opened=False, writing=0), True),
        (HANGING._replace(outstanding=1), True),
    ],
)
def test_a_standstill_is_when_something_is_held_and_nothing_moves(standing: Standing, *, stalls: bool) -> None:
    assert Watchdog(60).stalls(standing) is stalls


def test_begin_and_end_are_told_once_and_how_long_it_was() -> None:
    watchdog = Watchdog(60)
    assert watchdog.look(QUIET, 1_000.0) is None
    assert watchdog.look(HANGING._replace(still_s=59.0), 1_059.0) is None
    assert watchdog.look(HANGING._replace(still_s=60.5), 1_060.5) == Stall(began=True, lasted_s=60.5)
    assert watchdog.look(HANGING._replace(still_s=61.5), 1_061.5) is None
    # Committed half a second ago, and the next batch is on its way.
    assert watchdog.look(HANGING._replace(still_s=0.5), 1_090.5) == Stall(began=False, lasted_s=90.0)
    assert watchdog.look(HANGING._replace(still_s=1.5), 1_091.5) is None
    assert watchdog.look(HANGING._replace(still_s=70.0), 1_160.0) == Stall(began=True, lasted_s=70.0)
    assert watchdog.look(QUIET, 1_161.0) == Stall(began=False, lasted_s=71.0)
    assert watchdog.look(QUIET, 1_162.0) is None


# What it waits for


def test_a_write_that_hangs_is_named_with_its_size_and_age() -> None:
    assert HANGING.waits_for == "a batch of 500 readings that is being written since 61 s"


def test_what_the_database_said_last_is_repeated() -> None:
    waits_for = HANGING._replace(failure="connection refused").waits_for
    assert waits_for == "a batch of 500 readings that is being written since 61 s; the last attempt: connection refused"


def test_before_the_database_has_answered_it_waits_for_that() -> None:
    closed = HANGING._replace(opened=False, writing=0)
    assert closed.waits_for == "the database: it has not answered yet"
    assert closed._replace(failure="connection refused").waits_for == "the database: connection refused"


# Ready or not


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (reasons(QUIET), READY),
        (reasons(HANGING._replace(still_s=3.0)), READY),
        (
            reasons(HANGING),
            [f"no progress for 61 s with 700 outstanding; waits for {HANGING.waits_for}"],
        ),
        (reasons(QUIET._replace(opened=False)), ["waits for the database: it has not answered yet"]),
        (
            reasons(HANGING._replace(opened=False, writing=0, failure="connection refused")),
            ["no progress for 61 s with 700 outstanding; waits for the database: connection refused"],
        ),
        (reasons(QUIET, broker="not connected to the broker"), ["not connected to the broker"]),
        (
            reasons(QUIET._replace(opened=False), broker="not connected to the broker", stopping=True),
            ["stopping", "not connected to the broker", "waits for the database: it has not answered yet"],
        ),
    ],
)
def test_each_reason_is_a_line(found: list[str], expected: list[str]) -> None:
    assert found == expected


# What systemd is told


class Service:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """Everything that was said since the last time."""
        messages: list[str] = []
        while True:
            try:
                messages.append(self._socket.recv(4_096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", pytest.param("abstract", marks=pytest.mark.skipif("sys.platform != 'linux'"))])
def service(request: pytest.FixtureRequest) -> Iterator[tuple[Service, str]]:
    # Not tmp_path: the path of a socket has to fit into 103 bytes.
    with TemporaryDirectory() as folder:
        name = str(Path(folder) / "notify") if request.param == "path" else f"@{folder}"
        listening = Service("\0" + name[1:] if name.startswith("@") else name)
        yield listening, name
        listening.close()


def test_it_is_told_in_its_own_words(service: tuple[Service, str]) -> None:
    listening, name = service
    supervisor = Supervisor({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())})
    assert supervisor.patience_s == 30
    supervisor.ready("waits for\nboth sides")
    supervisor.status("well")
    supervisor.feed()
    supervisor.stopping()
    assert listening.heard() == ["READY=1\nSTATUS=waits for both sides", "STATUS=well", "WATCHDOG=1", "STOPPING=1"]


@pytest.mark.parametrize(
    "watching",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}],
)
def test_a_watchdog_that_is_not_for_us_is_not_fed(service: tuple[Service, str], watching: dict[str, str]) -> None:
    listening, name = service
    supervisor = Supervisor({"NOTIFY_SOCKET": name, **watching})
    assert supervisor.patience_s is None
    supervisor.feed()
    assert listening.heard() == []


def test_without_a_supervisor_nothing_happens() -> None:
    supervisor = Supervisor({"WATCHDOG_USEC": "30000000"})
    with structlog.testing.capture_logs() as logs:
        supervisor.ready("well")
        supervisor.feed()
        supervisor.stopping()
    assert supervisor.patience_s is None
    assert logs == []


@pytest.mark.parametrize("name", ["/nowhere/notify", "vsock:2:1234", "/" + "x" * 200])
def test_one_that_cannot_be_reached_is_logged_once(name: str) -> None:
    supervisor = Supervisor({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000"})
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            supervisor.feed()
    assert [entry["event"] for entry in logs] == ["supervisor.unreachable"]
    assert logs[0]["socket"] == name


def test_a_full_socket_does_not_hold_us_up(service: tuple[Service, str]) -> None:
    listening, name = service
    supervisor = Supervisor({"NOTIFY_SOCKET": name})
    with structlog.testing.capture_logs() as logs:
        for _ in range(2_000):
            supervisor.status("x" * 1_000)
    assert [entry["event"] for entry in logs] == ["supervisor.unreachable"]
    assert 0 < len(listening.heard()) < 2_000
    # Once it is heard again, the next time it is not is news.
    supervisor.status("well")
    assert listening.heard() == ["STATUS=well"]
