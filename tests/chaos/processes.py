"""Cases 1 to 4 and 8: the processes of either side end, one way or another, and come back."""

import os
import signal

from tests.chaos.arena import Case, Outcome, Round
from tests.integration.harness import ask


def daemon_killed(drill: Round) -> Outcome:
    """SIGKILL: no chance to finish anything."""
    daemon = drill.daemon()
    with drill.load():
        daemon.kill()
        with drill.recovery():
            daemon.start()
    return drill.judge()


def daemon_terminated(drill: Round) -> Outcome:
    """SIGTERM under full load: it must end in order, with 0, and owe nobody anything."""
    daemon = drill.daemon(batch__max_readings=5_000, batch__max_age_ms=200)
    # The broker takes it several times as fast as it can be stored: there is a backlog at any moment of it.
    with drill.load(rate=0, messages=int(4 * drill.size.rate * drill.size.seconds), most=drill.size.seconds / 6):
        drill.close_books()
        with drill.recovery():
            daemon.start()
    return drill.judge()


def database_stopped_immediately(drill: Round) -> Outcome:
    """`immediate`: sessions are cut off, and the start after it has to recover from the log."""
    drill.daemon()
    with drill.load():
        drill.arena.postgres.stop("immediate")
        drill.pause(most=0.5)
        with drill.recovery():
            drill.arena.postgres.start()
    return drill.judge()


def postmaster_killed(drill: Round) -> Outcome:
    """SIGKILL of the postmaster: its backends outlive it by a moment, and may still commit."""
    drill.daemon()
    with drill.load():
        drill.arena.postgres.kill()
        drill.pause(most=0.5)
        with drill.recovery():
            drill.arena.postgres.start()
    return drill.judge()


def backend_killed(drill: Round) -> Outcome:
    """SIGKILL of the backend that writes: PostgreSQL ends all others as well, and recovers."""
    drill.daemon()
    with drill.load():
        (writer,) = ask(
            drill.dsn,
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'wattbridge' AND datname = current_database()",
        )
        with drill.recovery():
            os.kill(writer[0], signal.SIGKILL)
    return drill.judge()


def broker_restarted(drill: Round) -> Outcome:
    """SIGTERM: Mosquitto writes sessions and messages to disk, and reads them when it starts."""
    drill.daemon()
    with drill.load():
        drill.arena.broker.stop()
        drill.pause(most=0.5)
        with drill.recovery():
            drill.arena.broker.start()
    return drill.judge()


CASES = [
    Case("1", "daemon: SIGKILL, started again", daemon_killed),
    Case("2", "daemon: SIGTERM under full load", daemon_terminated),
    Case("3", "PostgreSQL: immediate stop, start", database_stopped_immediately),
    Case("4a", "PostgreSQL: SIGKILL of the writing backend", backend_killed),
    Case("4b", "PostgreSQL: SIGKILL of the postmaster", postmaster_killed),
    Case("8", "Mosquitto: clean restart with persistence", broker_restarted),
]
