"""The demo as a person meets it: one command, a page, any ending, books that balance, and nothing left behind."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from bridge.demo_figures import sql
from bridge.demo_view import efficiency

# Bytes: more than the head of the ledger of such a fleet, and some dozen readings.
SOME_READINGS = 10_000
CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-c", "from bridge.cli import main; main()", "demo", "--meters=200", "--vehicles=200"]


class Running:
    """A demo, what it has printed, and which processes and directories are its own."""

    def __init__(self, output: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._output = output
        with output.open("wb") as printed:
            self.process = subprocess.Popen(
                [*DEMO, *arguments],
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
                env={**os.environ, **(environment or {})},
            )
        self.family: list[psutil.Process] = []
        self.directories: set[Path] = set()

    @property
    def text(self) -> str:
        return self._output.read_text()

    def await_text(self, pattern: str, seconds: float = 60) -> None:
        assert eventually(lambda: bool(re.search(pattern, self.text)) or self.ended, seconds), self.text
        assert re.search(pattern, self.text), self.text
        if not self.ended:
            self.family = psutil.Process(self.process.pid).children(recursive=True)
            arguments = [argument for each in self.family for argument in command_line(each)]
            removed = "--remove="  # what the leashes are told to remove
            self.directories = {Path(each.removeprefix(removed)) for each in arguments if each.startswith(removed)}

    def await_fleet(self) -> None:
        """Waits until the fleet publishes: what it is about to send stands in its ledger."""
        self.await_text("✓ Fleet")
        assert eventually(lambda: any(self._published(path) for path in self.directories) or self.ended), self.text

    @staticmethod
    def _published(directory: Path) -> bool:
        ledger = directory / "demo" / "fleet.ledger"
        return ledger.exists() and ledger.stat().st_size > SOME_READINGS

    @contextmanager
    def ask_page(self, path: str, accept: str = "*/*") -> Iterator[http.client.HTTPResponse]:
        """The answer of the page at the address that was printed."""
        (address,) = re.findall(r"^Open (http://127\.0\.0\.1:\d+/) in a browser$", self.text, re.MULTILINE)
        with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)) as connection:
            connection.request("GET", path, headers={"Accept": accept})
            with connection.getresponse() as response:
                yield response

    def stored_by_page(self) -> int:
        with self.ask_page("/v1/ingest") as answer:
            return sum(daemon["stored"] for daemon in json.load(answer)["items"])

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def find(self, *words: str) -> psutil.Process:
        """The process of the family whose arguments end like this."""
        (found,) = (each for each in self.family if tuple(command_line(each)[-len(words) :]) == words)
        return found

    def find_server(self) -> psutil.Process:
        """The first process of PostgreSQL."""
        return next(
            each for each in self.family if "/data" in " ".join(command_line(each)) and each.name() == "postgres"
        )

    def assert_nothing_is_left(self) -> None:
        assert self.family
        assert len(self.directories) == 2
        assert eventually(lambda: not any(map(psutil.Process.is_running, self.family))), "processes run on"
        assert eventually(lambda: not any(path.exists() for path in self.directories)), "run directories are left"


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*arguments: str, **more: dict[str, str]) -> Running:
        started.append(Running(tmp_path / f"output-{len(started)}", *arguments, **more))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait(10)


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments; none of one that has ended, like the connections of a database do."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def balanced(text: str) -> int:
    """The number of messages published, which the books in the text account for."""
    book = r"published +([\d,]+) .*\n.*= stored +([\d,]+) +history: ([\d,]+) meter \+ ([\d,]+) vehicle.*\n"
    book += r".*duplicate +([\d,]+) .*\n.*dead-lettered +([\d,]+) +dead_letter: ([\d,]+) rows"
    found = re.search(book, text)
    assert found, text
    published, stored, meters, vehicles, duplicate, dead, letters = (int(n.replace(",", "")) for n in found.groups())
    assert published == stored + duplicate + dead
    assert meters + vehicles == stored
    assert letters == dead
    return published


def test_it_ends_by_itself_with_balanced_books_whatever_the_user_has_configured(
    demo: Callable[..., Running], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("[mqtt]\nhost = 'elsewhere.invalid'\n")
    mine = {
        "WATTBRIDGE_CONFIG": str(tmp_path / "mine.toml"),
        "WATTBRIDGE_MQTT__USERNAME": "me",
        "WATTBRIDGE_NONSENSE": "1",
        "PGSSLMODE": "require",
        "PGOPTIONS": "-c search_path=elsewhere",
    }
    running = demo("--for", "6s", environment=mine)
    running.await_text("✓ Fleet")
    page = running.find("web").environ()
    secrets = [dict(part.split("=") for part in page["WATTBRIDGE_DATABASE__DSN"].split())["password"], "postgresql://"]
    passwords = [
        each
        for process in running.family
        for each in command_line(process)
        if any(secret in each for secret in secrets)
    ]
    assert running.process.wait(60) == 0, running.text
    assert re.search(r"00:0\d of 00:06  \d+ msg/s  published \d+", running.text), running.text
    # However slow the machine is: a fleet ran, and not only its first minute.
    assert balanced(running.text) > 100
    assert re.search(
        r"MATCH: [0-9,]+ readings and 0 dead letters, exactly as the ledger says\nOK everything is accounted for",
        running.text,
    )
    assert passwords == []
    running.assert_nothing_is_left()


# Of what follows a part is waiting, so that demos may as well do it side by side.


def test_a_signal_ends_it_in_order(demo: Callable[..., Running]) -> None:
    demos = {number: demo() for number in (signal.SIGINT, signal.SIGTERM)}
    for number, running in demos.items():
        running.await_fleet()
        assert eventually(lambda running=running: running.stored_by_page() > 0)
        dsn = running.find("web").environ()["WATTBRIDGE_DATABASE__DSN"]
        with psycopg.connect(dsn, autocommit=True) as connection:
            assert connection.execute("SELECT count(*) > 0 FROM vehicle_status").fetchone() == (True,)
            for write in (
                "DELETE FROM dead_letter",
                "INSERT INTO device_presence DEFAULT VALUES",
                "CREATE TABLE mine ()",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(write)
        # A browser that looks on does not hold it up.
        with running.ask_page("/", "text/event-stream") as stream:
            assert (stream.status, stream.getheader("content-type", "")[:17]) == (200, "text/event-stream")
            running.process.send_signal(number)
            assert running.process.wait(60) == 0, running.text
        assert balanced(running.text) > 0
        assert re.search(
            r"MATCH: [0-9,]+ readings and 0 dead letters, exactly as the ledger says\nOK everything is accounted for",
            running.text,
        )
        running.assert_nothing_is_left()


def test_nothing_runs_on_after_a_second_signal_or_sigkill(demo: Callable[..., Running]) -> None:
    told, killed = demo(), demo()
    for running in (told, killed):
        running.await_fleet()
    killed.process.kill()
    # A bridge that does not move: the first signal waits for it.
    told.find("run").suspend()
    told.process.send_signal(signal.SIGINT)
    told.await_text("Stopping: Ctrl-C. Ctrl-C again ends at once")
    assert not eventually(lambda: told.ended, 2), told.text
    told.process.send_signal(signal.SIGINT)
    assert told.process.wait(5) == 130
    for running in (told, killed):
        running.assert_nothing_is_left()


def test_the_death_of_a_part_is_a_failure_that_is_named(demo: Callable[..., Running]) -> None:
    without_bridge, without_page, without_database = demos = [demo() for _ in range(3)]
    for running in demos:
        running.await_fleet()
    without_bridge.find("run").kill()
    without_page.find("web").kill()
    without_database.find_server().kill()
    for running in demos:
        assert running.process.wait(60) == 1, running.text
    assert "FAIL the bridge was ended by SIGKILL" in without_bridge.text
    assert "FAIL the page was ended by SIGKILL" in without_page.text
    assert "FAIL PostgreSQL has ended" in without_database.text
    for running in (without_bridge, without_page):
        assert "Reconciliation" in running.text
    for running in demos:
        running.assert_nothing_is_left()


@pytest.mark.parametrize("wrong", ["soon", "0s", "-5s"])
def test_a_wrong_duration_is_wrong_usage(wrong: str) -> None:
    reply = subprocess.run(
        [*DEMO, f"--for={wrong}"], capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=30
    )
    assert reply.returncode == 2
    assert "--for" in reply.stderr
    assert wrong in reply.stderr


def test_without_the_wheel_it_says_what_to_install(tmp_path: Path) -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if 'pgserver' in n else f(n); "
    command = [sys.executable, "-c", hide + DEMO[2], "demo"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=30)
    assert reply.returncode == 1
    assert reply.stderr == (
        "wattbridge: the embedded PostgreSQL is not installed: "
        "install wattbridge with its extra: pip install '.[demo]'\n"
    )


REFERENCE = """
SELECT ensure_history_partitions(history, '{2026-02-10}')
FROM unnest('{meter_history,vehicle_history}'::regclass[]) AS history;
INSERT INTO meter_history
SELECT 'M1', timestamptz '2026-02-10 14:46:41Z' + n * interval '1 minute', ac, 230, now(), false
FROM unnest(array[0.4796, 0.4457, 0.5210, 0.6093, 0.6646, 0.6258, 0.4910, 0.6636, 0.4867, 0.5904])
    WITH ORDINALITY AS reading (ac, n);
INSERT INTO vehicle_history
SELECT 'V' || 1 + n / 6, timestamptz '2026-02-10 14:46:11Z' + n * interval '1 minute', dc, 50, 30, 'M1', now(), false
FROM unnest(array[0.4227, 0.4037, 0.4670, 0.5588, 0.5986, 0.5568, 0.4347, 0.5990, 0.4371, 0.5218])
    WITH ORDINALITY AS reading (dc, n);
"""
# One more matched minute, without energy. Others are none: nobody's, one that two share, and a silent meter.
MORE_MINUTES = """
INSERT INTO meter_history VALUES
    ('M1', '2026-02-10 14:57:10Z', 0.5, 230, now(), false), ('M1', '2026-02-10 14:58:10Z', 0, 230, now(), false),
    ('M1', '2026-02-10 14:59:10Z', 0.9, 230, now(), false);
INSERT INTO vehicle_history VALUES
    ('V1', '2026-02-10 14:58:10Z', 0, 50, 30, 'M1', now(), false),
    ('V1', '2026-02-10 14:59:10Z', 0.4, 50, 30, 'M1', now(), false),
    ('V2', '2026-02-10 14:59:40Z', 0, 50, 30, 'M1', now(), false),
    ('V3', '2026-02-10 14:50:10Z', 0.4, 50, 30, 'M9', now(), false),
    ('V3', '2026-02-10 14:51:10Z', 0.4, 50, 30, NULL, now(), false);
"""


def test_efficiency_is_that_of_matched_minutes(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(REFERENCE)
        connection.execute(MORE_MINUTES)
        rows = connection.execute(sql("efficiency"), {"since": "2026-02-10 14:40Z", "enough": 0.5}).fetchall()
    assert [(row[0], row[1], round(row[3] / row[2], 12)) for row in rows] == [
        ("V2", "M1", 0.89217847769),
        ("V1", "M1", 0.900963164473),
    ]
    assert rows[0][4:] == pytest.approx((2.7202 + 2.8575, 2.4508 + 2.5494, 11))


def test_a_ratio_that_means_nothing_is_no_number() -> None:
    assert efficiency(10, 9) == "90.0%"
    assert efficiency(10, 10.1) == "— (more DC than AC)"
    assert efficiency(0.4, 0.3) == efficiency(0, 0) == "— (too little energy yet)"
