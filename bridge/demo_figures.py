"""The figures of `wattbridge demo`: from the logs of its parts, and from the database."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import Any, LiteralString, NamedTuple, Self

import psycopg

# How far back the efficiency looks, in the fleet's time, and the AC energy from which a ratio means something.
WINDOW = timedelta(minutes=30)
ENOUGH_KWH = 0.5
# How often the daemon logs its counters: often, so that they can stand beside the simulator's.
REPORT_S = 0.1
# The efficiency query gets at most this share of one core.
QUERY_SHARE = 0.1
QUERY_PAUSE_S = 2.0
JOIN_S = 5.0


class Vehicle(NamedTuple):
    """A vehicle's energy over matched minutes, kWh."""

    vehicle_id: str
    meter_id: str
    ac: float
    dc: float


class Findings(NamedTuple):
    """What the database says about the last `WINDOW` of fleet time; energies in kWh."""

    ac: float
    dc: float
    minutes: int
    worst: list[Vehicle]
    dead_letters: dict[str, int]
    database_bytes: int
    took_s: float


class Counters(NamedTuple):
    """One report of the daemon: `delivered` by the broker, the others committed."""

    at: datetime
    delivered: int
    outstanding: int
    received: int
    stored: int
    duplicate: int
    dead_lettered: int
    slowest_commit_ms: float


class Figures:
    """What the parts have said so far. Read the simulator first, then the daemon: see `hear_simulator`."""

    def __init__(self) -> None:
        self.published = self.unheard = 0
        self.fleet_time: datetime | None = None
        self.bridge: Counters | None = None
        self.rates: deque[float] = deque(maxlen=60)
        self.findings: Findings | str | None = None
        self._last_second: deque[Counters] = deque(maxlen=round(1 / REPORT_S) + 1)

    @property
    def received(self) -> int:
        """Messages of which the bridge has committed what became of them, as last heard."""
        return self._last_second[-1].received if self._last_second else 0

    @property
    def rate(self) -> float:
        """Messages that reach the bridge a second, during the last one; commits come in batches and would flicker."""
        return self.rates[-1] if self.rates else 0.0

    @property
    def backlog(self) -> int:
        """Messages that the broker has and the bridge has not; too large by up to 0.2 s of traffic."""
        return self.published - self.bridge.delivered if self.bridge else self.published

    def hear_daemon(self, event: Mapping[str, Any]) -> None:
        """Takes in one event of the daemon's log."""
        if event.get("event") in ("daemon.progress", "daemon.stopped"):
            self._last_second.append(
                Counters(
                    datetime.fromisoformat(event["timestamp"]),
                    event["deliveries"],
                    event["outstanding"],
                    event["received"],
                    event["stored"],
                    event["duplicate"],
                    event["dead_lettered"],
                    event["slowest_commit_ms"],
                )
            )

    def hear_simulator(self, event: Mapping[str, Any]) -> None:
        """Takes in one line of the simulator, once a second, and the daemon's report before it to go with it.

        So the bridge never seems to have more than was published.
        """
        self.published, self.unheard = event["published"], event["unheard"]
        self.fleet_time = datetime.fromisoformat(event["simulated_until"])
        if self._last_second:
            first, last = self._last_second[0], self._last_second[-1]
            self.bridge = last._replace(slowest_commit_ms=max(each.slowest_commit_ms for each in self._last_second))
            took = (last.at - first.at).total_seconds()
            self.rates.append((last.delivered - first.delivered) / took if took else 0.0)


class Analyst(threading.Thread):
    """Asks the database about efficiency now and then, on a connection of its own, without getting in the way."""

    def __init__(self, dsn: str) -> None:
        super().__init__(name="analyst", daemon=True)
        self._dsn = dsn
        self._done = threading.Event()
        self.fleet_time: datetime | None = None
        self.findings: Findings | str | None = None

    def __enter__(self) -> Self:
        """Start asking."""
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop asking."""
        self.stop()

    def stop(self) -> None:
        """Ends after the query that runs, if one does."""
        self._done.set()
        self.join(JOIN_S)

    def run(self) -> None:
        """Asks until told to stop. An error ends it, and is the finding."""
        settings = "-c work_mem=64MB -c max_parallel_workers_per_gather=0"
        pause = QUERY_PAUSE_S
        try:
            with psycopg.connect(self._dsn, autocommit=True, options=settings) as connection:
                while not self._done.wait(pause):
                    if self.fleet_time:
                        self.findings = found = _ask(connection, self.fleet_time - WINDOW)
                        pause = max(QUERY_PAUSE_S, found.took_s / QUERY_SHARE)
        except psycopg.Error as error:
            self.findings = " ".join(str(error).split())


def _ask(connection: psycopg.Connection[Any], since: datetime) -> Findings:
    began = time.monotonic()
    since = since.replace(second=0, microsecond=0)
    rows = connection.execute(sql("efficiency"), {"since": since, "enough": ENOUGH_KWH}).fetchall()
    took = time.monotonic() - began
    letters = dict(connection.execute(sql("dead_letters")).fetchall())
    size = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    ac, dc, minutes = rows[0][4:] if rows else (0.0, 0.0, 0)
    worst = [Vehicle(*row[:4]) for row in rows if row[2] >= ENOUGH_KWH]
    return Findings(ac, dc, minutes, worst, letters, size[0] if size else 0, took)


@cache
def sql(name: str) -> LiteralString:
    """A query of the demo's own, from sql/demo."""
    return files("bridge").joinpath("sql", "demo", f"{name}.sql").read_text(encoding="utf-8")
