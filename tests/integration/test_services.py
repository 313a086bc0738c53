"""The private services leave nothing behind, whatever ends them, and keep their data when they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from bridge.services import EmbeddedPostgres, LeashedProcess, PrivateMosquitto, ServiceError, free_port

CHECKOUT = Path(__file__).resolve().parents[2]

# A parent like the demo: both services, and a child that has a child of its own.
PARENT = """
import json, sys, time
from bridge.services import EmbeddedPostgres, LeashedProcess, PrivateMosquitto
postgres, mosquitto = EmbeddedPostgres(), PrivateMosquitto()
postgres.start()
mosquitto.start()
child = LeashedProcess(["sh", "-c", "sleep 600 & exec sleep 600"])
state = {
    "pids": [postgres.pid, mosquitto.pid, child.pid],
    "ports": [postgres.port, mosquitto.port],
    "directories": [str(postgres.directory), str(mosquitto.directory)],
}
print(json.dumps(state), flush=True)
if sys.argv[1:] == ["raise"]:
    # Not before the other side has looked at who is there.
    sys.stdin.readline()
    raise SystemExit(3)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def mosquitto() -> Iterator[PrivateMosquitto]:
    with PrivateMosquitto() as server:
        yield server


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def listening(port: int) -> bool:
    return any(c.laddr.port == port for c in psutil.net_connections("tcp4") if c.status == psutil.CONN_LISTEN)


def look(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid


def test_directories_that_were_there_stay_as_they_were() -> None:
    wheel = Path(sys.prefix)
    theirs = {Path("/var/tmp"), Path("/tmp"), CHECKOUT, *CHECKOUT.parents, wheel, *wheel.parents}  # noqa: S108
    theirs |= {path for path in Path(wheel).rglob("*pgserver*") if path.is_dir()}
    before = {path: look(path) for path in theirs}
    users = Path("/etc/passwd").read_bytes()

    with EmbeddedPostgres() as postgres, PrivateMosquitto() as mosquitto:
        private = [postgres.directory, mosquitto.directory]
        assert [path.stat().st_mode & 0o777 for path in private] == [0o700, 0o700]
        assert {path: look(path) for path in theirs} == before

    assert {path: look(path) for path in theirs} == before
    assert Path("/etc/passwd").read_bytes() == users
    assert not any(path.exists() for path in private)


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM", "raise"])
def test_nothing_is_left_when_the_parent_ends(ending: str) -> None:
    arguments = ["raise"] if ending == "raise" else []
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        state = json.loads(parent.stdout.readline())
        family = [psutil.Process(pid) for pid in state["pids"]]
        family += [child for process in family for child in process.children(recursive=True)]
        leashes = {process.ppid() for process in family[:3]}
        if ending == "raise":
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert parent.wait(30) == 3
        else:
            assert all(listening(port) for port in state["ports"])
            parent.send_signal(signal.Signals[ending])

    assert eventually(lambda: not any(process.is_running() for process in family)), "processes run on"
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in leashes)), "leashes run on"
    assert not any(listening(port) for port in state["ports"])
    assert not any(Path(directory).exists() for directory in state["directories"])


def test_a_killed_postmaster_starts_again_with_its_data(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    port, first = postgres.port, postgres.pid

    postgres.kill(signal.SIGKILL)
    assert not postgres.running
    postgres.start()

    assert postgres.port == port
    assert postgres.pid != first
    with psycopg.connect(postgres.dsn) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgres_stops_and_starts(postgres: EmbeddedPostgres, mode: str) -> None:
    postgres.stop("fast" if mode == "fast" else "immediate")
    assert not postgres.running
    assert not listening(postgres.port)
    postgres.start()
    with psycopg.connect(postgres.dsn) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)


def test_psql_opens_with_the_printed_command_and_shows_no_password(postgres: EmbeddedPostgres) -> None:
    command = postgres.psql_command
    password = psycopg.conninfo.conninfo_to_dict(postgres.dsn)["password"]
    assert str(password) not in command
    reply = subprocess.run(  # noqa: S602 - a person pastes it into a shell
        f"{command} -XAtc 'SELECT current_database()' -c '\\l'",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert reply.stderr == ""
    assert reply.stdout.startswith("wattbridge\n")


def test_the_password_is_on_no_command_line(postgres: EmbeddedPostgres) -> None:
    password = str(psycopg.conninfo.conninfo_to_dict(postgres.dsn)["password"])
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if password in " ".join(line)]


def test_wrong_settings_are_an_error_with_the_log() -> None:
    with pytest.raises(ServiceError, match="no_such_setting"):
        EmbeddedPostgres({"no_such_setting": "1"}).start()


def test_mosquitto_starts_again_on_its_port(mosquitto: PrivateMosquitto) -> None:
    port = mosquitto.port
    mosquitto.kill(signal.SIGKILL)
    mosquitto.start()
    mosquitto.stop()
    assert not listening(port)
    mosquitto.start()
    assert mosquitto.port == port
    assert listening(port)


def test_wrong_broker_configuration_is_an_error_with_the_log() -> None:
    with pytest.raises(ServiceError, match="no_such_directive"):
        PrivateMosquitto("no_such_directive 1").start()


def test_a_missing_broker_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("bridge.services.MOSQUITTO_PLACES", ())
    with pytest.raises(ServiceError, match="apt-get install mosquitto"):
        PrivateMosquitto().start()


def test_a_leashed_process_reports_and_obeys() -> None:
    script = "trap 'echo bye; exit 7' TERM; echo $GREETING; while :; do sleep 0.05; done"
    environment = {"GREETING": "hello", "PATH": os.defpath}
    with LeashedProcess(["sh", "-c", script], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"hello\n"
        assert process.poll() is None
        assert process.stop() == 7
        assert process.stdout.read() == b"bye\n"
        assert process.poll() == process.stop() == 7


def test_a_stubborn_process_is_killed() -> None:
    with LeashedProcess(["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]) as process:
        time.sleep(0.2)
        assert process.stop(timeout=0.2) == -signal.SIGKILL


def test_a_paused_process_can_be_stopped() -> None:
    with LeashedProcess(["sleep", "600"]) as process:
        process.send_signal(signal.SIGSTOP)
        assert process.stop(timeout=5) == -signal.SIGTERM


def test_a_process_that_cannot_start_is_an_error() -> None:
    with pytest.raises(ServiceError, match="/nonexistent"):
        LeashedProcess(["/nonexistent"])


def test_a_free_port_is_none_that_the_kernel_lends_to_clients() -> None:
    assert 20_000 <= free_port() < 32_768
