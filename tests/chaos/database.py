"""Cases 5, 6, 12 and 16: PostgreSQL is away for long, does not answer, has no room, or changes under the daemon."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import psycopg

from bridge.migrate import migrate, scripts
from tests.chaos import cramped
from tests.chaos.arena import Case, FailedError, Outcome, Round
from tests.chaos.cramped import CrampedPostgres
from tests.chaos.refusals import BUSY_ROLLUPS, MOST_ATTEMPTS, Verdicts, refusals
from tests.integration.harness import Daemon, Proxy, ask, wait_until

MEGABYTE = 1_000_000
# What is promised, however long the database is away.
MOST_RSS = 150 * MEGABYTE
# So many readings may come in one read from the network (256 kB) before reading pauses: of the smallest there are.
CHUNK = 256_000 // 80
# Of a reading that waits, with its share of the batch: twice what was measured.
BYTES_A_READING = 1_000
# Once the window is full nothing more may come: this is for buffers and the odds and ends of the interpreter.
ODDS_AND_ENDS = 8 * MEGABYTE
# A backlog that is not worked off faster than it grows never ends.
LEAST_DRAIN_RATIO = 1.1
ANSWERS_LOST = 3
PANIC = "PANIC:  could not write to file"
# Functions, views, roles: what a migration makes anew.
REPEATABLE = sum(script.repeatable for script in scripts())
# Which of two readings of one time is the first is not told where two daemons share them.
WITHOUT_CONFLICTS = ("--all-faults", "--conflicts", "0")


def database_away(drill: Round) -> Outcome:
    """Away for long under load: memory stays flat, pings go on, and the backlog is worked off faster than it grows."""
    # A third of the usual load: the outage is long.
    outage, rate = drill.size.outage_s, drill.size.rate // 3
    # Full well before the outage is over: only then it shows that nothing grows any more.
    window = min(20_000, int(rate * outage / 4))
    daemon = drill.daemon(
        mqtt__keep_alive_s=5, mqtt__receive_maximum=window, batch__max_readings=5_000, batch__max_age_ms=200
    )
    process = psutil.Process(daemon.pid)
    with drill.load(rate=rate, seconds=outage * 1.25 + drill.size.seconds) as fleet:
        before = process.memory_info().rss
        drill.arena.postgres.stop()
        ends = time.monotonic() + outage
        wait_until(lambda: _outstanding(daemon) > window * 0.9, "the window is full", outage)
        full = process.memory_info().rss
        largest = full
        while time.monotonic() < ends:
            largest = max(largest, process.memory_info().rss)
            time.sleep(0.1)
        if not fleet.running:
            raise FailedError("the load was over before the outage")
        with drill.recovery():
            drill.arena.postgres.start()
        began, there = time.monotonic(), drill.received()
        wait_until(lambda: _outstanding(daemon) < window / 4, "the backlog is worked off", 4 * outage)
        drained = (drill.received() - there) / (time.monotonic() - began)
    outcome = drill.judge()
    if (connections := len(daemon.events("mqtt.connected"))) != 1:
        raise FailedError(f"the session was interrupted: {connections} connections")
    held = max(event["outstanding"] for event in daemon.events("daemon.progress"))
    if held > window + CHUNK:
        raise FailedError(f"{held} readings were held, with a window of {window}")
    waiting = window * BYTES_A_READING + ODDS_AND_ENDS
    if largest > MOST_RSS or largest - before > waiting or largest - full > ODDS_AND_ENDS:
        raise FailedError(f"memory is not bounded: {before} before, {full} with the window full, {largest} at most")
    if drained < rate * LEAST_DRAIN_RATIO:
        raise FailedError(f"{drained:.0f} readings/s are worked off, but {rate} messages/s come in")
    grown = (largest - before) / MEGABYTE
    drill.figures.update({"RSS MB": largest / MEGABYTE, "of them grown": grown, "drained/s": drained})
    return outcome


def answer_lost(drill: Round) -> Outcome:
    """The commit is done and the daemon never learns of it: the second attempt must change nothing."""
    with Proxy(drill.writer_dsn) as proxy:
        drill.daemon(proxy.dsn)
        with drill.fleet():
            drill.wait_for_load()
            for _ in range(ANSWERS_LOST):
                drill.pause(most=drill.size.seconds / 8)
                proxy.cut_answer("COMMIT")
                wait_until(proxy.cut.is_set, "a commit was not answered")
                with drill.recovery():
                    proxy.heal()
        return drill.judge()


def data_disk_full(drill: Round) -> Outcome:
    """No table can grow: the transaction fails, the server stays."""
    server = _cramped(drill)
    daemon = drill.daemon()
    with contextlib.ExitStack() as stack:
        stack.callback(server.disk.clear)
        with drill.load():
            times = drill.chance.randint(1, MOST_ATTEMPTS)
            # What an attempt that failed gives back is taken again.
            wait_until(lambda: server.disk.fill() or refusals(daemon, "53100") >= times, "the daemon waits for room")
            with drill.recovery():
                server.disk.clear()
        outcome = drill.judge()
    Verdicts(daemon).check(warned={"53100"})
    return outcome


def log_disk_full(drill: Round) -> Outcome:
    """No room for the write-ahead log: the server panics, and cannot even start before there is some."""
    server = _cramped(drill)
    log = server.directory / "server.log"
    known = log.stat().st_size
    # What is left of earlier rounds must not be in the way when the server recovers.
    ask(drill.dsn, "CHECKPOINT")
    daemon = drill.daemon()
    with contextlib.ExitStack() as stack:
        stack.callback(server.disk.clear)
        with drill.load():
            server.disk.fill()
            wait_until(lambda: _use_up_log(drill) or PANIC.encode() in log.read_bytes()[known:], "the server panics")
            daemon.wait_for_events("database.waiting", 1)
            with drill.recovery():
                server.disk.clear()
                wait_until(lambda: not server.running or _answers(drill), "the server has ended or recovered")
                if not server.running:
                    server.start()
        outcome = drill.judge()
    Verdicts(daemon).check()
    return outcome


def migrated(drill: Round) -> Outcome:
    """All functions, views and roles are made anew, twice at once, while one daemon writes and another starts."""
    group = {"mqtt__share_group": "drill", **BUSY_ROLLUPS}
    first = drill.daemon(**group)
    times = 0
    with drill.fleet(faults=WITHOUT_CONFLICTS) as fleet, ThreadPoolExecutor(3) as threads:
        drill.wait_for_load()
        drill.pause()
        joining = threads.submit(drill.daemon, **group)
        while fleet.running or not joining.done():
            ask(drill.dsn, "DELETE FROM schema_migration WHERE name ~ '^(functions|views)/' OR name = 'roles.sql'")
            applied = list(threads.map(migrate, [drill.dsn, drill.dsn]))
            if sorted(map(len, applied)) != [0, REPEATABLE]:
                raise FailedError(f"one of both was to apply everything, the other nothing: {applied}")
            times += 1
    outcome = drill.judge()
    for daemon in (first, joining.result()):
        Verdicts(daemon).check()
    drill.figures["migrations"] = times
    return outcome


def _outstanding(daemon: Daemon) -> int:
    """How many readings the daemon holds, as said last."""
    said = daemon.events("daemon.progress")
    return int(said[-1]["outstanding"]) if said else 0


def _cramped(drill: Round) -> CrampedPostgres:
    server = drill.arena.postgres
    if not isinstance(server, CrampedPostgres):
        raise TypeError("this case needs a server with a small disk")
    return server


def _use_up_log(drill: Round) -> None:
    """As somebody does who writes a lot: goes on to the next segment of the log."""
    with contextlib.suppress(psycopg.Error):
        ask(drill.dsn, "SELECT pg_switch_wal()")


def _answers(drill: Round) -> bool:
    try:
        ask(drill.dsn, "SELECT")
    except psycopg.Error:
        return False
    return True


def _full(number: str, name: str, part: str, run: Callable[[Round], Outcome], **settings: str) -> Case:
    server = partial(CrampedPostgres, part)
    return Case(number, name, run, postgres=settings, server=server, lacking=cramped.lacking)


CASES = [
    Case("5", "PostgreSQL: away for long under load", database_away),
    Case("6", "PostgreSQL: the answer to a commit is lost", answer_lost),
    _full("12a", "PostgreSQL: no room for data", "base", data_disk_full),
    # Without checkpoints no segment of the log is used again: the disk is needed, and full soon.
    _full(
        "12b",
        "PostgreSQL: no room for the log, PANIC",
        "pg_wal",
        log_disk_full,
        min_wal_size="32MB",
        checkpoint_timeout="1d",
    ),
    Case("16", "migrations under load, a second daemon joins", migrated),
]
