"""The whole of it: a fleet with every fault, the real bridge, and a verdict about every single reading."""

import json
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bridge.services import LeashedProcess
from simulator.truth import read
from tests.integration.harness import (
    PROGRAM,
    Address,
    Daemon,
    Reply,
    ask,
    check_books,
    counters,
    in_background,
    wait_until,
    wattbridge,
    wattbridge_here,
)

FLEET = ["--meters", "40", "--vehicles", "60", "--shared-share", "0.2", "--all-faults"]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "fleet.ledger"


def simulation(broker: Address, topic_root: str, ledger: Path, *pace: str) -> list[str]:
    where = ["--host", broker.host, "--port", str(broker.port), "--topic-root", topic_root, "--ledger", str(ledger)]
    return ["simulate", *FLEET, *where, *pace]


def simulate(daemon: Daemon, command: list[str], folder: Path) -> None:
    sent = wattbridge(*command, env=daemon.env, cwd=folder)
    assert sent.code == 0, sent.err


def verify(daemon: Daemon, dsn: str, ledger: Path, command: Callable[..., Reply] = wattbridge) -> dict[str, Any]:
    """The verdict as a program reads it; the exit code must say the same."""
    reply = command(
        "verify", str(ledger), "--json", env=daemon.env | {"WATTBRIDGE_DATABASE__DSN": dsn}, cwd=ledger.parent
    )
    assert reply.out, reply.err
    verdict: dict[str, Any] = json.loads(reply.out)
    assert (reply.code == 0) == verdict["match"], reply.err
    return verdict


# Somewhere in what is there, sometimes before the newest hour; each step rolls up little of it.
ADVANCE = """
SELECT rollup_advance(max(ts) - %s * interval '1 minute') FROM meter_live HAVING max(ts) IS NOT NULL
"""
STEP = "SELECT complete_until < late_before OR marks_left > 0 FROM rollup_refresh('1 hour', 40)"


@contextmanager
def rolling_up(dsn: str) -> Iterator[None]:
    """Beside the block: the watermark moves, far too early, and rollups are made and made again, at random moments."""
    stop = threading.Event()
    random_of = random.Random(4)

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.wait(random_of.uniform(0, 0.2)):
                connection.execute(ADVANCE, (random_of.randrange(90),))
                for _ in range(random_of.randrange(4)):
                    connection.execute(STEP)

    with in_background(work):
        try:
            yield
        finally:
            stop.set()


def roll_up_everything(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT rollup_advance(max(ts) + interval '15 minutes') FROM meter_history")
        # No row: somebody else is at it.
        while connection.execute(STEP).fetchone() != (False,):
            pass


def outcome(verdict: dict[str, Any]) -> list[tuple[str, bool, int]]:
    """What was compared, without what depends on when."""
    return [(check["check"], check["match"], check["found"]) for check in verdict["checks"]]


def test_every_fault_at_once_and_a_clean_verdict(broker: Any, database: str, topic_root: str, ledger: Path) -> None:
    # Small batches: what comes late shall not be in one with what is newer.
    with Daemon(database, broker, topic_root, ledger.parent, batch__max_readings=50) as daemon:
        simulate(daemon, simulation(broker, topic_root, ledger, "--flat-out", "--messages", "15000"), ledger.parent)
        verdict = verify(daemon, database, ledger)
        assert daemon.terminate() == 0
    assert verdict["match"], verdict

    books = read(ledger).books
    assert books.messages == 15_000
    assert min(books.stored, books.duplicates, books.conflicts, books.rejected) > 0
    counted = check_books(database)
    assert (counted.stored, counted.dead_lettered) == (books.stored, books.conflicts + books.rejected)
    reasons = {reason for (reason,) in ask(database, "SELECT DISTINCT reason FROM dead_letter")}
    assert {"malformed", "conflict", "id_mismatch", "timestamp_in_future", "timestamp_too_old"} <= reasons


def test_a_bridge_killed_again_and_again_still_has_a_clean_verdict(
    broker: Any, database: str, topic_root: str, ledger: Path
) -> None:
    command = simulation(broker, topic_root, ledger, "--rate", "3000", "--messages", "10000")
    # Small batches: it commits all the time, so that a kill meets a commit.
    with Daemon(database, broker, topic_root, ledger.parent, batch__max_readings=20) as daemon:
        with in_background(lambda: simulate(daemon, command, ledger.parent)):
            for received in (1_500, 4_000, 6_500):
                wait_until(lambda at=received: counters(database).received >= at, "it is in the middle of its work")
                daemon.kill()
                daemon.start()
        verdict = verify(daemon, database, ledger)
    assert verdict["match"], verdict
    check_books(database)


def test_rollups_at_random_moments_change_no_answer(broker: Any, database: str, topic_root: str, ledger: Path) -> None:
    """Beside our own steps the daemon's maintenance makes some; backlogs and held back readings come late."""
    command = simulation(broker, topic_root, ledger, "--rate", "3000", "--messages", "20000")
    often = {"batch__max_readings": 50, "maintenance__every_s": 0.3}
    with Daemon(database, broker, topic_root, ledger.parent, **often) as daemon:
        with rolling_up(database):
            simulate(daemon, command, ledger.parent)
        verdict = verify(daemon, database, ledger)
        assert daemon.terminate() == 0
    assert verdict["match"], verdict
    assert verdict["analytics"] == "by the schema's own functions"
    # Late readings have marked what was rolled up before them: otherwise this has tried nothing.
    (made,) = ask(database, "SELECT last_value FROM pg_sequences WHERE sequencename = 'rollup_mark_id_seq'")[0]
    assert made > 1_000

    roll_up_everything(database)
    (unrolled,) = ask(database, "SELECT count(*) FROM meter_history, rollup_progress WHERE ts >= complete_until")[0]
    assert unrolled == 0
    assert outcome(verify(daemon, database, ledger, wattbridge_here)) == outcome(verdict)
    ask(database, "SELECT rollup_restart() IS NULL")
    assert outcome(verify(daemon, database, ledger, wattbridge_here)) == outcome(verdict)


def test_a_killed_simulator_leaves_a_ledger_that_still_decides(
    broker: Any, database: str, topic_root: str, ledger: Path
) -> None:
    """What was sent and not acknowledged may have arrived or not; everything else must be as the ledger says."""
    command = simulation(broker, topic_root, ledger, "--flat-out")
    with Daemon(database, broker, topic_root, ledger.parent) as daemon:
        fleet = LeashedProcess([str(PROGRAM), *command], env=daemon.env, cwd=ledger.parent)
        wait_until(lambda: ledger.exists() and ledger.stat().st_size > 500_000, "a part of the fleet's life")
        fleet.send_signal(signal.SIGKILL)
        fleet.stop()
        verdict = verify(daemon, database, ledger)
    assert verdict["match"], verdict
    assert not read(ledger).complete
    assert read(ledger).books.stored > 0
