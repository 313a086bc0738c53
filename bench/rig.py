"""What the benchmarks of the whole bridge are made of: private services, the daemon, the load, meters on all of them.

Each turn has a database and a broker of its own, so nothing of the turn before is left: no session that still collects
messages, no rows, no heap full of holes. The PostgreSQL server is the same for a whole bench.
"""

import json
import os
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, LeashedProcess, PrivateMosquitto

PROGRAM = Path(sysconfig.get_path("scripts")) / "wattbridge"
# For a machine of 8 GB and more. fsync and synchronous_commit are what they are by default: on.
SETTINGS = {
    "shared_buffers": "2GB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "maintenance_work_mem": "256MB",
}
WRITER = "bench_writer"
# The simulator's default, and the daemon's.
TELEMETRY = "energy/v1/+/+/telemetry"
# The window of the daemon (mqtt.receive_maximum); mosquitto_sub has 20 unless told otherwise.
WINDOW = 20_000
# That somebody has subscribed is logged, nothing for a single message.
LOGGING = "\n".join(f"log_type {kind}" for kind in ("error", "warning", "notice", "subscribe"))
# What `--small` makes of the load.
SMALL = {"messages": 20_000, "meters": 500, "vehicles": 500}
LOOK_S = 0.05
PATIENCE_S = 60.0
CPU_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
COUNTS = """
SELECT (SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history),
    (SELECT count(*) FROM (SELECT meter_id, max(ts) FROM meter_history GROUP BY meter_id
                           EXCEPT SELECT meter_id, ts FROM meter_live))
    + (SELECT count(*) FROM (SELECT vehicle_id, max(ts) FROM vehicle_history GROUP BY vehicle_id
                             EXCEPT SELECT vehicle_id, ts FROM vehicle_live)),
    (SELECT count(*) FROM dead_letter),
    received, stored, duplicate, dead_lettered
FROM (
    SELECT sum(received)::bigint AS received, sum(stored)::bigint AS stored, sum(duplicate)::bigint AS duplicate,
        sum(dead_lettered)::bigint AS dead_lettered
    FROM ingest_counter
)
"""


class FailedError(Exception):
    """A turn did not come to what it must, so that there is nothing to measure."""


class Fleet(NamedTuple):
    """Who sends, one reading a minute each."""

    meters: int = 10_000
    vehicles: int = 10_000

    def __str__(self) -> str:
        return f"{sum(self):,} devices ({self.meters:,} meters, {self.vehicles:,} vehicles)"


class Sample(NamedTuple):
    """How many readings were committed at a time (time.monotonic)."""

    at: float
    received: int


class Books:
    """The counters of all daemons in a database, over a connection of its own."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def look(self) -> Sample:
        query = "SELECT coalesce(sum(received), 0)::bigint FROM ingest_counter"
        received = self._connection.execute(query, prepare=True).fetchone()[0]
        return Sample(time.monotonic(), received)

    def wait_for(self, readings: int, beside: Callable[[], object] = lambda: None) -> list[Sample]:
        """Looks every 50 ms until so many readings are committed, and calls `beside` each time.

        Raises FailedError where nothing was committed for a minute.
        """
        samples = [self.look()]
        moved = samples[0]
        while samples[-1].received < readings:
            time.sleep(LOOK_S)
            beside()
            samples.append(self.look())
            if samples[-1].received > moved.received:
                moved = samples[-1]
            if samples[-1].at - moved.at > PATIENCE_S:
                raise FailedError(f"{moved.received:,} of {readings:,} readings committed, and no more since a minute")
        return samples

    def check(self, readings: int) -> None:
        """Raises FailedError unless so many readings are in history, each once, and live has the newest ones."""
        found = self._connection.execute(COUNTS).fetchone()
        right = (readings, 0, 0, readings, readings, 0, 0)
        if found != right:
            raise FailedError(
                "rows of history, devices whose live row is not the newest, dead letters, and the counters received, "
                f"stored, duplicate and dead-lettered should be {right} and are {found}"
            )


class Process:
    """A process that is watched; what it has used last is known also after its end."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        env: Mapping[str, str],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
    ) -> None:
        self._process = LeashedProcess(arguments, env=env, cwd=folder, stdout=stdout, stderr=stderr)
        self._cpu = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu(self) -> float:
        """User and system time so far, seconds."""
        with suppress(FileNotFoundError, ProcessLookupError):
            self._cpu = cpu_seconds(self.pid)
        return self._cpu

    def running(self) -> bool:
        return self._process.poll() is None


class Daemon(Process):
    """`wattbridge run`. What `settings` (named like `mqtt__keep_alive_s`) do not say is as by default."""

    def __init__(self, turn: "Turn", client_id: str, **settings: object) -> None:
        values = {
            "database__dsn": turn.writer_dsn,
            "mqtt__host": turn.broker.host,
            "mqtt__port": turn.broker.port,
            "mqtt__client_id": client_id,
            **settings,
        }
        env = environment() | {f"WATTBRIDGE_{name.upper()}": str(value) for name, value in values.items()}
        self._log = turn.folder / f"{client_id}.log"
        self._start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            # Not in the checkout, where it would find a configuration.
            super().__init__([PROGRAM, "run"], turn.folder, env, stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        """Waits until it is connected to both sides."""
        wait_until(
            lambda: self.events("mqtt.connected") and self.events("database.connected"), "the daemon is ready", self
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has logged under this name since its start."""
        with self._log.open(encoding="utf-8") as log:
            log.seek(self._start)
            lines = [line for line in log if line.startswith("{") and line.endswith("\n")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def rss(self) -> int:
        """Resident memory, bytes."""
        return memory(self.pid, "VmRSS")

    def peak_rss(self) -> int:
        """The most that was ever resident, bytes."""
        return memory(self.pid, "VmHWM")

    def stop(self) -> None:
        """Lets it end in order. Raises FailedError unless it did, and owes nobody anything."""
        code = self._process.stop(PATIENCE_S)
        stopped = self.events("daemon.stopped")
        if code != 0 or not stopped or stopped[0]["outstanding"] or stopped[0]["unaccounted"]:
            raise FailedError(f"the daemon ended with {code}: {stopped or self._log.read_text()[-2_000:]}")

    def end(self) -> None:
        """Ends it, however."""
        self._process.stop(0.0)


class Load(Process):
    """The simulator, publishing `messages` readings at QoS 1, flat out or `rate` a second, without any of its faults.

    Made, it is connected and has just begun, at `began` (time.monotonic).
    """

    def __init__(self, turn: "Turn", messages: int, fleet: Fleet, rate: int | None = None) -> None:
        self.messages = messages
        self._said = turn.folder / f"load-{secrets.token_hex(4)}.json"
        pace = ["--flat-out"] if rate is None else ["--rate", rate]
        size = ["--messages", messages, "--meters", fleet.meters, "--vehicles", fleet.vehicles]
        where = ["--host", turn.broker.host, "--port", turn.broker.port]
        command = [PROGRAM, "simulate", "--json", *map(str, [*pace, *size, *where])]
        with self._said.open("wb") as said:
            super().__init__(command, turn.folder, environment(), stdout=said, stderr=subprocess.PIPE)
        # Said when all its connections are accepted; the first message leaves next.
        first = self._process.stderr.readline().decode()
        self.began = time.monotonic()
        if not first.startswith("connected to"):
            raise FailedError(f"the simulator: {first}{self._process.stderr.read1().decode()}")

    def finish(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Waits for its end; returns its summary. Raises FailedError unless the broker took every message, once."""
        code = self._process.wait(patience_s)
        lines = self._said.read_text().splitlines()
        summary: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        whole = {"acknowledged": self.messages, "readings": self.messages, "resent": 0, "unheard": 0}
        if code != 0 or {name: summary.get(name) for name in whole} != whole:
            raise FailedError(f"the simulator ended with {code}: {summary}")
        return summary

    def end(self) -> None:
        """Ends it, however."""
        self._process.stop(0.0)
        self._process.stderr.close()


class Subscriber(Process):
    """`mosquitto_sub -q 1` with a persistent session and our window: ends after `messages`. Made, it is subscribed."""

    ID = "mosquitto-sub"

    def __init__(self, turn: "Turn", messages: int) -> None:
        broker = turn.broker
        command = [
            *[
                find_mosquitto_sub(),
                "-V",
                "mqttv5",
                "-h",
                broker.host,
                "-p",
                str(broker.port),
                "-q",
                "1",
                "-t",
                TELEMETRY,
            ],
            *["-i", self.ID, "-c", "-x", "3600", "-D", "connect", "receive-maximum", str(WINDOW), "-C", str(messages)],
        ]
        self._log = turn.folder / "mosquitto_sub.log"
        with self._log.open("wb") as log:
            super().__init__(command, turn.folder, environment(), stdout=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: self._subscribed(broker), "mosquitto_sub is subscribed", self)

    def wait(self, beside: Callable[[], object], patience_s: float) -> float:
        """Waits until it has everything, calls `beside` now and then; returns when that was (time.monotonic)."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                code = self._process.wait(LOOK_S)
            except TimeoutError:
                beside()
                if time.monotonic() > deadline:
                    raise FailedError("mosquitto_sub still waits for messages") from None
            else:
                ended = time.monotonic()
                if code != 0:
                    raise FailedError(f"mosquitto_sub ended with {code}: {self._log.read_text()}")
                return ended

    def end(self) -> None:
        """Ends it, however."""
        self._process.stop(0.0)

    def _subscribed(self, broker: PrivateMosquitto) -> bool:
        return f"{self.ID} 1 {TELEMETRY}" in (broker.directory / "server.log").read_text(errors="replace")


class Turn:
    """One side of one round: an empty database with our schema, a fresh broker, and what runs between them."""

    def __init__(self, rig: "Rig", database: str, broker: PrivateMosquitto, folder: Path, stack: ExitStack) -> None:
        self.postgres = rig.postgres
        self.broker = broker
        self.folder = folder
        self.dsn = make_conninfo(rig.postgres.dsn, dbname=database)
        # The daemon owns nothing, as in life.
        self.writer_dsn = make_conninfo(self.dsn, user=WRITER, password=rig.writer_password)
        self._stack = stack

    def daemon(self, client_id: str = "wattbridge", *, ready: bool = True, **settings: object) -> Daemon:
        daemon = Daemon(self, client_id, **settings)
        self._stack.callback(daemon.end)
        if ready:
            daemon.wait_until_ready()
        return daemon

    def load(self, messages: int, fleet: Fleet, rate: int | None = None) -> Load:
        load = Load(self, messages, fleet, rate)
        self._stack.callback(load.end)
        return load

    def subscriber(self, messages: int) -> Subscriber:
        subscriber = Subscriber(self, messages)
        self._stack.callback(subscriber.end)
        return subscriber

    def books(self) -> Books:
        return self._stack.enter_context(Books(self.dsn))

    def broker_cpu(self) -> float:
        """Of Mosquitto so far, seconds."""
        return cpu_seconds(self.broker.pid)

    def postgres_cpu(self) -> float:
        """Of the whole server so far, seconds: those of its processes that have ended are counted by the postmaster."""
        postmaster = self.postgres.pid
        while True:
            children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
            try:
                return cpu_seconds(postmaster, ended=True) + sum(map(cpu_seconds, map(int, children)))
            except (FileNotFoundError, ProcessLookupError):
                continue  # one of them has just ended; it is in the other sum next time


class Rig:
    """A PostgreSQL for all turns of a bench, and a folder for what they leave."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self.settings = {**SETTINGS, **(settings or {})}
        self.postgres = EmbeddedPostgres(self.settings)
        self.writer_password = secrets.token_urlsafe(16)
        self._folder = Path()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wattbridge-bench-")))
            stack.enter_context(self.postgres)
            migrate(self.postgres.dsn)
            with self._admin() as admin:
                role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE wattbridge_writer")
                admin.execute(role.format(sql.Identifier(WRITER), sql.Literal(self.writer_password)))
                self.version = admin.info.parameter_status("server_version")
                kept = [admin.execute(f"SHOW {name}").fetchone() for name in ("fsync", "synchronous_commit")]
                if kept != [("on",), ("on",)]:
                    raise FailedError("fsync and synchronous_commit must be on")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """One turn; at its end everything that runs is ended, and its database is gone."""
        database = f"turn_{secrets.token_hex(4)}"
        name = sql.Identifier(database)
        folder = self._folder / database
        folder.mkdir()
        with self._admin() as admin:
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE wattbridge").format(name))
            # What the turn before has left to write shall not be written during this one.
            admin.execute("CHECKPOINT")
        try:
            with ExitStack() as stack:
                broker = stack.enter_context(PrivateMosquitto(LOGGING))
                yield Turn(self, database, broker, folder, stack)
        except Exception as error:
            for log in folder.glob("*.log"):
                error.add_note(f"{log.name} ends so:\n{log.read_text(errors='replace')[-2_000:]}")
            raise
        finally:
            if self.postgres.running:
                with self._admin() as admin:
                    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    def _admin(self) -> psycopg.Connection:
        return psycopg.connect(make_conninfo(self.postgres.dsn, dbname="postgres"), autocommit=True)


def add_load(parser: ArgumentParser, messages: int) -> None:
    """The options of who sends how much; `messages` unless told otherwise."""
    parser.add_argument("--messages", type=int, default=messages, metavar="N", help=f"in each turn ({messages:,})")
    add_fleet(parser)


def add_fleet(parser: ArgumentParser) -> None:
    """The options of who sends."""
    for kind, number in Fleet()._asdict().items():
        parser.add_argument(f"--{kind}", type=int, default=number, metavar="N", help=f"that send ({number:,})")


def usage(meters: dict[str, Callable[[], float]]) -> Callable[[], dict[str, float]]:
    """What is called to know how much each has used since now."""
    before = {name: read() for name, read in meters.items()}
    return lambda: {name: read() - before[name] for name, read in meters.items()}


def wait_until(look: Callable[[], object], what: str, process: Process | None = None) -> None:
    """Looks until it is true. Raises FailedError after a minute, or when the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        if process and not process.running():
            raise FailedError(f"not {what}: its process has ended")
        if time.monotonic() > deadline:
            raise FailedError(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.02)


def cpu_seconds(pid: int, *, ended: bool = False) -> float:
    """User and system time of a process; with `ended` also of its children that have ended and were waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if ended else 13])) * CPU_TICK_S


def memory(pid: int, field: str) -> int:
    """A size in bytes from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise FailedError(f"/proc/{pid}/status has no {field}")


def environment() -> dict[str, str]:
    """Ours, without what would configure the programs."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def find_mosquitto_sub() -> str:
    found = shutil.which("mosquitto_sub")
    if found is None:
        raise FailedError("mosquitto_sub is not installed: `apt-get install mosquitto-clients` (Debian, Ubuntu)")
    return found
