"""Where faults are injected: private services, a database for each round, the daemon, a fleet with its ledger."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, LeashedProcess, PrivateMosquitto
from tests.integration.harness import PROGRAM, Address, Daemon, ask, environment, wait_until, wattbridge

WRITER = "drill_writer"
# What arrives late, twice, in the wrong order, in arrays of backlog, in conflict, or is garbage.
FAULTS = ("--all-faults",)
# Many small batches: a fault hits one of them wherever it comes.
SMALL_BATCHES = {"batch__max_readings": 200, "batch__max_age_ms": 20}
# What `verify` compares row by row, and the bridge's own counters; all else that it compares is computed from rows.
ROWS = ("meter history", "vehicle history", "dead letters")
COUNTERS = "counters"
VERDICT = "verdict.json"
PATIENCE_S = 120.0
VERDICT_S = 60.0
# A commit after the fault shows that the daemon is back; where all was committed before there is none to wait for.
# A daemon on a busy machine takes seconds to start.
LAST_COMMIT_S = 10.0


class Size(NamedTuple):
    """How much of everything: for the tests, or for the drill."""

    rate: int
    """Messages a second."""
    seconds: float
    """Of load in a round."""
    outage_s: float
    """The long outage of the database."""
    storm: int
    """Messages of the poison storm."""
    soak_rate: int
    soak_s: float


TESTS = Size(rate=3_000, seconds=2, outage_s=4, storm=20_000, soak_rate=2_000, soak_s=15)
DRILL = Size(rate=4_000, seconds=3, outage_s=60, storm=200_000, soak_rate=5_000, soak_s=1_200)


class Outcome(NamedTuple):
    """What one round came to. Lost: what must be there and is not; duplicated: what is there once too often, or was
    counted so; wrong: what is there with other values, analytics included."""

    messages: int
    lost: int
    duplicated: int
    wrong: int
    recovered_s: float | None
    figures: dict[str, float]
    """What the case measured besides, by name."""


@dataclass(frozen=True)
class Case:
    """One fault. `run` injects it into a round and returns what `Round.judge` came to.

    `postgres` and `broker` are settings of the services, `server` makes another kind of PostgreSQL, `alone` is for what
    measures for long: nothing else runs meanwhile.
    `times` is how often it is repeated where that is not up to the drill. `lacking` says why it cannot be run here.
    """

    number: str
    name: str
    run: Callable[["Round"], "Outcome"]
    postgres: dict[str, str] = field(default_factory=dict)
    broker: str = ""
    server: Callable[[dict[str, str]], EmbeddedPostgres] = EmbeddedPostgres
    alone: bool = False
    times: int | None = None
    lacking: Callable[[], str | None] = lambda: None


class FailedError(Exception):
    """The round did not come to what it must; the message says what differs and where the traces are."""


class Arena:
    """A PostgreSQL and a Mosquitto for the rounds of one case. `postgres` and `broker` are settings of theirs."""

    def __init__(
        self,
        postgres: dict[str, str] | None = None,
        broker: str = "",
        server: Callable[[dict[str, str]], EmbeddedPostgres] = EmbeddedPostgres,
    ) -> None:
        self.postgres = server(postgres or {})
        self.broker = PrivateMosquitto(broker)
        self._stack = ExitStack()
        self.writer_password = secrets.token_urlsafe(16)

    def __enter__(self) -> Self:
        """Starts both, and makes the schema that each round gets a copy of."""
        with ExitStack() as stack:
            stack.enter_context(self.postgres)
            stack.enter_context(self.broker)
            migrate(self.postgres.dsn)
            with self.admin() as admin:
                admin.execute(
                    sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE wattbridge_writer").format(
                        sql.Identifier(WRITER), sql.Literal(self.writer_password)
                    )
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops both."""
        self._stack.close()

    def revive(self) -> None:
        """Starts what a failed round has left stopped. Raises ServiceError."""
        for service in (self.postgres, self.broker):
            if not service.running:
                service.start()

    def admin(self) -> psycopg.Connection:
        """A connection to no database of a round."""
        return psycopg.connect(make_conninfo(self.postgres.dsn, dbname="postgres"), autocommit=True)

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of an empty database with our schema, for one round."""
        name = f"round_{secrets.token_hex(4)}"
        with self.admin() as admin:
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE wattbridge").format(sql.Identifier(name)))
        try:
            yield name
        finally:
            # The case may have left the server in any state; the next round has its own database anyway.
            with contextlib.suppress(psycopg.Error), self.admin() as admin:
                admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class Fleet:
    """A simulated fleet under way as a process. Leaving the `with` block waits for its end, and that all went well."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path) -> None:
        self._log = folder / "fleet.log"
        with self._log.open("ab") as log:
            self._process = LeashedProcess([PROGRAM, *command], env=env, cwd=folder, stdout=log, stderr=log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self._process.stop()

    @property
    def running(self) -> bool:
        """Whether it still publishes."""
        return self._process.poll() is None

    @property
    def published(self) -> int:
        """How many messages the broker has acknowledged, as said last."""
        lines = [line for line in self._log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return int(json.loads(lines[-1])["acknowledged"]) if lines else 0

    def wait(self, seconds: float = PATIENCE_S) -> None:
        """Waits until every message is acknowledged by the broker."""
        if (code := self._process.wait(seconds)) != 0:
            raise FailedError(f"the fleet ended with {code}:\n{self._log.read_text()[-2_000:]}")


@dataclass
class Round:
    """One run of a case: what it may use, and what it came to. `chance` decides its moments."""

    arena: Arena
    size: Size
    chance: Random
    database: str
    folder: Path
    recovered_s: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    _daemons: list[Daemon] = field(default_factory=list)
    _fleets: list[Fleet] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills what still runs."""
        self._stack.close()

    @property
    def dsn(self) -> str:
        """The database of this round, for its owner."""
        return make_conninfo(self.arena.postgres.dsn, dbname=self.database)

    @property
    def writer_dsn(self) -> str:
        """The same for the daemon, which owns nothing."""
        return make_conninfo(self.dsn, user=WRITER, password=self.arena.writer_password)

    @property
    def root(self) -> str:
        """The topics of this round begin so."""
        return f"drill/{self.database}"

    @property
    def ledger(self) -> Path:
        """What is true about the fleet."""
        return self.folder / "fleet.ledger"

    def daemon(
        self,
        dsn: str | None = None,
        broker: Address | None = None,
        *,
        ready: bool = True,
        env: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Daemon:
        """A bridge that is connected to both sides, ended with the round; small batches unless told otherwise.

        `env` is what its environment has besides.
        """
        client_id = str(settings.pop("client_id", f"{self.database}-{len(self._daemons)}"))
        common = {**SMALL_BATCHES, "log__report_every_s": 0.2, "client_id": client_id}
        daemon = Daemon(
            dsn or self.writer_dsn,
            broker or self.arena.broker,
            self.root,
            self.folder,
            ready=ready,
            **{**common, **settings},
        )
        daemon.env |= env or {}
        self._daemons.append(self._stack.enter_context(daemon))
        return daemon

    def fleet(
        self,
        *options: str,
        rate: int | None = None,
        seconds: float | None = None,
        messages: int | None = None,
        faults: tuple[str, ...] = FAULTS,
        broker: Address | None = None,
    ) -> Fleet:
        """A fleet that publishes at its rate, every fault on; `rate=0` is as fast as the broker takes it."""
        rate = self.size.rate if rate is None else rate
        messages = messages or int((rate or self.size.rate) * (seconds or self.size.seconds))
        where = broker or self.arena.broker
        command = ["simulate", "--json", "--host", where.host, "--port", str(where.port), "--topic-root", self.root]
        command += ["--ledger", str(self.ledger), "--seed", str(self.chance.randrange(1_000_000))]
        command += ["--meters", "150", "--vehicles", "200", "--shared-share", "0.2", *faults]
        command += ["--rate", str(rate)] if rate else ["--flat-out"]
        fleet = Fleet([*command, "--messages", str(messages), *options], _env(), self.folder)
        self._fleets.append(fleet)
        return fleet

    @contextmanager
    def load(self, *, most: float | None = None, **fleet: Any) -> Iterator[Fleet]:
        """A fleet under way, from a random moment of its load on; after the block it has ended, as in `fleet`."""
        with self.fleet(**fleet) as running:
            self.wait_for_load()
            self.pause(most=most)
            yield running

    def command(self, *arguments: str) -> str:
        """What a `wattbridge` command says that the owner of the schema runs. Raises FailedError where it fails."""
        env = environment(self.dsn, self.arena.broker, self.root, f"{self.database}-command")
        reply = wattbridge(*arguments, env=env, cwd=self.folder)
        if reply.code != 0:
            raise FailedError(f"{' '.join(arguments)} ended with {reply.code}: {reply.out}{reply.err}")
        return reply.out

    def pause(self, least: float = 0.05, most: float | None = None) -> None:
        """Waits for a random moment of the load, early enough that much of it is still to come."""
        time.sleep(self.chance.uniform(least, most or self.size.seconds * 0.6))

    def wait_for_load(self) -> None:
        """Waits until readings come in."""
        wait_until(lambda: self.received() > 0, "readings are coming in")

    def received(self) -> int:
        """How many readings are accounted for in the database."""
        ((number,),) = ask(self.dsn, "SELECT coalesce(sum(received), 0)::bigint FROM ingest_counter")
        return int(number)

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Lifts the fault in the block, and takes the time from there to the first commit."""
        began = time.time()
        yield
        self.recovered_s = self._first_commit(began)

    def judge(self, *options: str, patience_s: float = VERDICT_S) -> Outcome:
        """The verdict of `wattbridge verify` on what is there, and the books of every daemon that still runs.

        Raises FailedError where it is not clean.
        """
        outcome = self.verdict(*options, patience_s=patience_s)
        if outcome.lost or outcome.duplicated or outcome.wrong:
            raise FailedError(f"no clean verdict: {outcome}; see {self.folder / VERDICT}")
        self.close_books()
        return outcome

    def verdict(self, *options: str, wait: str = "45s", patience_s: float = VERDICT_S) -> Outcome:
        """What `wattbridge verify` says, once nothing comes any more; a third of `wait` is how long that shows."""
        arguments = ["verify", str(self.ledger), "--json", "--wait", wait, *options]
        env = _env() | {"WATTBRIDGE_DATABASE__DSN": self.dsn}
        reply = wattbridge(*arguments, env=env, cwd=self.folder, patience_s=patience_s)
        if not reply.out:
            raise FailedError(f"verify came to nothing: {reply.err}")
        (self.folder / VERDICT).write_text(reply.out)
        said = json.loads(reply.out)
        rows = [check for check in said["checks"] if check["check"] in ROWS]
        others = [check for check in said["checks"] if check["check"] not in (*ROWS, COUNTERS)]
        counters = [check for check in said["checks"] if check["check"] == COUNTERS]
        return Outcome(
            messages=said["books"]["messages"],
            lost=sum(check["missing"] for check in rows),
            duplicated=sum(check["surplus"] for check in rows) + _differences(counters),
            wrong=sum(check["altered"] for check in rows) + _differences(others),
            recovered_s=self.recovered_s,
            figures=self.figures,
        )

    def close_books(self) -> None:
        """Ends every daemon that runs, in order, and sees that everything it took is accounted for."""
        for daemon in self._daemons:
            if not daemon.running:
                continue
            if (code := daemon.terminate()) != 0:
                raise FailedError(f"a daemon ended with {code}:\n{daemon.log[-2_000:]}")
            (stopped,) = daemon.events("daemon.stopped")
            if stopped["outstanding"] or stopped["unaccounted"]:
                raise FailedError(f"the books of a daemon do not balance: {stopped}")

    def _first_commit(self, since: float) -> float | None:
        """Seconds from `since` to the first commit after it; None where nothing was left to commit."""
        query = "SELECT extract(epoch FROM min(updated_at)) FROM ingest_counter WHERE updated_at >= to_timestamp(%s)"
        quiet: float | None = None
        while time.time() - since < PATIENCE_S:
            with contextlib.suppress(psycopg.Error):
                ((moment,),) = ask(self.dsn, query, since)
                if moment is not None:
                    return float(moment) - since
            time.sleep(0.02)
            if not any(fleet.running for fleet in self._fleets):
                quiet = quiet or time.time()
                if time.time() - quiet > LAST_COMMIT_S:
                    return None
        raise FailedError(f"no commit within {PATIENCE_S:g} s")


def _differences(checks: list[dict[str, Any]]) -> int:
    return sum(sum(check["counts"].values()) for check in checks)


def _env() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
