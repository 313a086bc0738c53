"""Case 13: PostgreSQL refuses, in each way that it has, and the daemon must come to the right verdict about it."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import psycopg
from psycopg import sql

from tests.chaos.arena import WRITER, Case, FailedError, Fleet, Outcome, Round
from tests.integration.harness import Daemon, ask, one, wait_until

SQLSTATE = re.compile(r"\(SQLSTATE (\w{5})\)$")
OURS = "application_name LIKE 'wattbridge%' AND datname = current_database()"
# Rollups are made all the time: they must be as right afterwards as all else.
BUSY_ROLLUPS = {"maintenance__every_s": 0.2}
DEADLOCK_TRIES = 10
SESSIONS_ENDED = 3
# The fault outlasts a random number of attempts.
MOST_ATTEMPTS = 3
FAILURES_SEEN = 5
# Refuses some statements at once and some transactions only when they commit, as real serialization failures do.
FLAKY = """
CREATE FUNCTION flaky() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.2 THEN
        RAISE EXCEPTION 'could not serialize access' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER flaky AFTER INSERT ON meter_history FOR EACH STATEMENT EXECUTE FUNCTION flaky();
CREATE CONSTRAINT TRIGGER flaky AFTER INSERT OR UPDATE ON ingest_counter
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION flaky();
"""
# What was dropped is not known to be a duplicate, or the first of a conflict, when it comes again.
UNREPEATED = ("--all-faults", "--duplicates", "0", "--conflicts", "0")


class Verdicts:
    """What a daemon has said about the errors of its database since it started: SQLSTATEs, by how loud it was."""

    def __init__(self, daemon: Daemon) -> None:
        self.events = [*daemon.events("database.waiting"), *daemon.events("maintenance.waiting")]

    def states(self, level: str) -> set[str]:
        """SQLSTATEs at this level; a lost connection has none."""
        reasons = [event["reason"] for event in self.events if event["level"] == level]
        return {found[1] for found in map(SQLSTATE.search, reasons) if found}

    def check(self, warned: set[str] | None = None, complained: set[str] | None = None) -> None:
        """Raises FailedError unless it warned of at least these, and complained of exactly those."""
        loud = [event["reason"] for event in self.events if event["level"] == "error"]
        if self.states("error") != (complained or set()) or (loud and not complained):
            raise FailedError(f"complaints of {complained or 'nothing'} were due, but: {loud}")
        if missing := (warned or set()) - self.states("warning"):
            raise FailedError(f"no warning of {missing}, but of {self.states('warning')}")


def refusals(daemon: Daemon, state: str) -> int:
    """How often the daemon has said that it waits because of this SQLSTATE."""
    return sum(event["reason"].endswith(f"(SQLSTATE {state})") for event in daemon.events("database.waiting"))


def wait_for_refusal(daemon: Daemon, state: str, times: int = 1) -> None:
    """Waits until it has said so so often."""
    wait_until(lambda: refusals(daemon, state) >= times, f"{times} times SQLSTATE {state} in the log")


def deadlock(drill: Round) -> Outcome:
    """Another session takes the same rows in the opposite order: PostgreSQL lets the daemon give way."""
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.fleet(), psycopg.connect(drill.dsn) as other:
        drill.wait_for_load()
        drill.pause()
        # Whoever has waited for deadlock_timeout looks, and gives way: that shall be the daemon.
        other.execute("SET deadlock_timeout = '1min'")
        other.execute("SET lock_timeout = '1s'")
        other.commit()
        for _ in range(DEADLOCK_TRIES):
            if _crossed(drill, other):
                break
        with drill.recovery():
            other.rollback()
        wait_for_refusal(daemon, "40P01")
    outcome = drill.judge()
    Verdicts(daemon).check(warned={"40P01"})
    return outcome


def _crossed(drill: Round, other: psycopg.Connection) -> bool:
    """Whether the other session got all the rows, because the daemon gave way; it holds them until it rolls back."""
    other.execute("SELECT FROM vehicle_live FOR UPDATE")
    query = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'wattbridge' AND %s = ANY (pg_blocking_pids(pid))"
    )
    wait_until(lambda: ask(drill.dsn, query, other.info.backend_pid), "the daemon waits for the other session")
    try:
        other.execute("SELECT FROM meter_live FOR UPDATE")
    except psycopg.errors.LockNotAvailable:
        # The daemon looked before the circle was closed.
        other.rollback()
        return False
    return True


def serialization_failures(drill: Round) -> Outcome:
    """Statements and commits fail now and then, as they do where transactions are serializable."""
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.load():
        ask(drill.dsn, FLAKY)
        wait_for_refusal(daemon, "40001", FAILURES_SEEN)
        with drill.recovery():
            ask(drill.dsn, "DROP FUNCTION flaky CASCADE")
    outcome = drill.judge()
    Verdicts(daemon).check(warned={"40001"})
    return outcome


def statement_timeout(drill: Round) -> Outcome:
    """Another session locks a table for longer than a statement may take."""
    daemon = drill.daemon(database__statement_timeout_s=1, **BUSY_ROLLUPS)
    with drill.load(), _locked(drill):
        wait_for_refusal(daemon, "57014", drill.chance.randint(1, MOST_ATTEMPTS))
    outcome = drill.judge()
    Verdicts(daemon).check(warned={"57014"})
    return outcome


def lock_timeout(drill: Round) -> Outcome:
    """The same, but the server does not let the role wait for locks that long."""
    with drill.arena.admin() as admin:
        role, database = sql.Identifier(WRITER), sql.Identifier(drill.database)
        admin.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET lock_timeout = '100ms'").format(role, database))
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.load(), _locked(drill):
        wait_for_refusal(daemon, "55P03", drill.chance.randint(1, MOST_ATTEMPTS))
    outcome = drill.judge()
    Verdicts(daemon).check(warned={"55P03"})
    return outcome


@contextmanager
def _locked(drill: Round) -> Iterator[None]:
    """Nobody else gets at one of the tables in the block; then the daemon recovers."""
    table = drill.chance.choice(("meter_history", "vehicle_history", "meter_live", "vehicle_live", "ingest_counter"))
    with psycopg.connect(drill.dsn) as other:
        other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        with drill.recovery():
            other.rollback()


def read_only_standby(drill: Round) -> Outcome:
    """The server comes back as a standby, which only reads, until it is promoted."""
    daemon = drill.daemon(**BUSY_ROLLUPS)
    server = drill.arena.postgres
    with drill.load():
        server.stop()
        server._write("data/standby.signal", "")
        server.start()
        wait_for_refusal(daemon, "25006", drill.chance.randint(1, MOST_ATTEMPTS))
        with drill.recovery():
            ask(drill.dsn, "SELECT pg_promote()")
    outcome = drill.judge()
    Verdicts(daemon).check(complained={"25006"})
    return outcome


def revoked_privilege(drill: Round) -> Outcome:
    """The daemon may not write one of the tables: it complains, and waits for the operator."""
    table = drill.chance.choice(("meter_history", "vehicle_history", "vehicle_live", "dead_letter", "ingest_counter"))
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.load():
        ask(drill.dsn, f"REVOKE INSERT ON {table} FROM wattbridge_writer")
        wait_for_refusal(daemon, "42501", drill.chance.randint(1, MOST_ATTEMPTS))
        with drill.recovery():
            ask(drill.dsn, f"GRANT INSERT ON {table} TO wattbridge_writer")
    outcome = drill.judge()
    Verdicts(daemon).check(complained={"42501"})
    return outcome


def session_ended(drill: Round) -> Outcome:
    """The operator ends the daemon's sessions, that of maintenance as well, in whatever they do."""
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.fleet():
        drill.wait_for_load()
        for _ in range(SESSIONS_ENDED):
            drill.pause(most=drill.size.seconds / 8)
            with drill.recovery():
                ask(drill.dsn, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")
        # Whether it still reads why (57P01) or only finds the connection closed is up to the network.
        daemon.wait_for_events("database.waiting", 1)
    outcome = drill.judge()
    Verdicts(daemon).check()
    return outcome


def idle_in_transaction(drill: Round) -> Outcome:
    """The daemon is held up in the midst of a transaction, longer than the server lets it: it is not to hold locks."""
    with drill.arena.admin() as admin:
        role, database = sql.Identifier(WRITER), sql.Identifier(drill.database)
        limit = "idle_in_transaction_session_timeout = '100ms'"
        admin.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET " + limit).format(role, database))
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.fleet(), psycopg.connect(drill.dsn, autocommit=True) as other:
        drill.wait_for_load()
        drill.pause()
        wait_until(lambda: _held_up(daemon, other), "the daemon was held up in a transaction")
        with drill.recovery():
            daemon.signal(signal.SIGCONT)
        # Whether it still reads why (25P03) or only finds the connection closed is up to the network.
        daemon.wait_for_events("database.waiting", 1)
    outcome = drill.judge()
    Verdicts(daemon).check()
    return outcome


def _held_up(daemon: Daemon, other: psycopg.Connection) -> bool:
    """Stops the daemon wherever it is; where that is within a transaction, it stays so until its session has ended."""
    query = "SELECT state FROM pg_stat_activity WHERE application_name = 'wattbridge' AND datname = current_database()"
    daemon.signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(daemon.pid).status() == psutil.STATUS_STOPPED, "the daemon stands still")
    if other.execute(query).fetchone() == ("idle in transaction",):
        wait_until(lambda: not other.execute(query).fetchall(), "the session has ended")
        return True
    daemon.signal(signal.SIGCONT)
    return False


def partition_dropped(drill: Round) -> Outcome:
    """A day of history that is being written is dropped, and made again; the operator puts back what was in it."""
    history = drill.chance.choice(("meter_history", "vehicle_history"))
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.fleet(faults=UNREPEATED), psycopg.connect(drill.dsn) as operator:
        drill.wait_for_load()
        drill.pause()
        partition = _in_use(drill, history)
        # The lock comes first: what is stored between the copy and the end of the partition would be in neither.
        operator.execute(f"LOCK TABLE {history} IN ACCESS EXCLUSIVE MODE")
        operator.execute(f"CREATE TEMP TABLE saved AS SELECT * FROM {partition}")
        operator.execute(f"DROP TABLE {partition}")
        with drill.recovery():
            operator.commit()
        wait_until(lambda: one(drill.dsn, "SELECT to_regclass(%s)", partition), "the partition is there again")
        drill.pause(most=0.5)
        operator.execute(f"INSERT INTO {history} SELECT * FROM saved ON CONFLICT DO NOTHING")
        operator.commit()
        drill.command("rollups", "rebuild")
    outcome = drill.judge()
    Verdicts(daemon).check()
    return outcome


def partition_detached(drill: Round) -> Outcome:
    """A day of history is detached while it is being written: its readings are kept as dead letters, and replayed."""
    history = drill.chance.choice(("meter_history", "vehicle_history"))
    daemon = drill.daemon(**BUSY_ROLLUPS)
    with drill.load(faults=UNREPEATED) as fleet:
        partition = _in_use(drill, history)
        bounds = one(
            drill.dsn, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = %s::regclass", partition
        )
        ask(drill.dsn, f"ALTER TABLE {history} DETACH PARTITION {partition}")
        daemon.wait_for_event("readings.refused")
        with drill.recovery():
            ask(drill.dsn, f"ALTER TABLE {history} ATTACH PARTITION {partition} {bounds}")
    wait_until(lambda: _has_all(daemon, fleet), "everything is accounted for")
    drill.command("dead-letters", "replay", "--reason", "refused_by_database")
    drill.command("rollups", "rebuild")
    outcome = drill.judge()
    Verdicts(daemon).check()
    return outcome


def _in_use(drill: Round, history: str) -> str:
    """The partition of the reading that came last."""
    query = f"SELECT tableoid::regclass::text FROM {history} ORDER BY received_at DESC LIMIT 1"
    return str(one(drill.dsn, query))


def _has_all(daemon: Daemon, fleet: Fleet) -> bool:
    """Whether the daemon has decided about everything that the fleet has published."""
    said = daemon.events("daemon.progress")[-1]
    return bool(said["deliveries"] >= fleet.published and said["outstanding"] == 0)


CASES = [
    Case("13a", "PostgreSQL: deadlock with another session", deadlock, postgres={"deadlock_timeout": "300ms"}),
    Case("13b", "PostgreSQL: serialization failures, also at COMMIT", serialization_failures),
    Case("13c", "PostgreSQL: table locked, statement timeout", statement_timeout),
    Case("13d", "PostgreSQL: table locked, lock timeout", lock_timeout),
    Case("13e", "PostgreSQL: comes back as a read-only standby", read_only_standby),
    Case("13f", "PostgreSQL: privilege revoked", revoked_privilege),
    Case("13g", "PostgreSQL: sessions ended by the operator", session_ended),
    Case("13h", "PostgreSQL: daemon held up in a transaction, session ended", idle_in_transaction),
    Case("13i", "PostgreSQL: partition in use dropped", partition_dropped),
    Case("13j", "PostgreSQL: partition in use detached", partition_detached),
]
