"""`wattbridge verify`: does the database say exactly what the simulator's ledger says?

Everything is read in one snapshot, as columns of numbers. Needs numpy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
import psycopg

from bridge.errors import WattbridgeError
from bridge.verify_analytics import check_analytics, fetch_analytics, find_source
from bridge.verify_letters import FoundLetter, check_letters, fetch_letters, of_fleet
from bridge.verify_readings import check_history, check_live, choices_in_doubt
from bridge.verify_report import ALTERED, SURPLUS, Check, Difference, Row, Verdict, difference
from bridge.verify_rows import (
    KINDS,
    METER,
    VEHICLE,
    Devices,
    Found,
    Kind,
    Snapshot,
    fetch,
    name_unknown_meters,
    other_rows,
)
from simulator.answers import answers
from simulator.ledger import LedgerError
from simulator.truth import Rows, Truth, read

# While something is missing: how often to look, and after which part of the patience without change to give up.
POLL_S = 0.5
QUIET_SHARE = 1 / 3
# In its sorts and hashes PostgreSQL may use memory, but no plan that is only good for small tables.
SETTINGS = {
    "timezone": "UTC",
    "statement_timeout": "0",
    "work_mem": "256MB",
    "enable_nestloop": "off",
    "jit": "off",
}

Say = Callable[[str], None]
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Options(NamedTuple):
    """What the operator asked for: patience in seconds, differences of each kind to name, devices to overlook."""

    wait_s: float = 30.0
    show: int = 10
    allow_other_devices: bool = False


class Counters(NamedTuple):
    """The sums of ingest_counter, and the rows that they should have counted."""

    received: int
    stored: int
    duplicate: int
    dead_lettered: int
    history_rows: int
    letters: int


def verify(ledger: Path, conninfo: str, options: Options, say: Say, progress: Say) -> Verdict:
    """Compares; where something is missing waits for a bridge that is still at work.

    `say` is told what is waited for, `progress` which step is under way. Raises WattbridgeError where the ledger
    cannot be read or grows, psycopg.Error where the database cannot be read.
    """
    steps = Steps(progress)
    size = _size(ledger)
    try:
        truth = steps.run("ledger", read, ledger)
    except LedgerError as error:
        raise WattbridgeError(str(error)) from None
    with psycopg.connect(conninfo, autocommit=True, application_name="wattbridge-verify") as connection:
        connection.read_only = True
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        patience = Patience(connection, truth, options.wait_s, say)
        patience.wait_for_rows()
        while True:
            with connection.transaction():
                for name, value in SETTINGS.items():
                    connection.execute("SELECT set_config(%s, %s, true)", (name, value))
                verdict = Judge(connection, truth, options, steps).judge()
            # A message is in the ledger before it is sent: if the ledger is as it was, the database has nothing else.
            if _size(ledger) != size:
                raise WattbridgeError(
                    f"{ledger} has grown meanwhile: the simulator is still at work; verify when it has ended"
                )
            if not verdict.missing or not patience.wait_for_change():
                break
    verdict.ledger = str(ledger)
    verdict.steps = steps.seconds | {"waited": patience.waited_s}
    return verdict


def _size(ledger: Path) -> int:
    try:
        return ledger.stat().st_size
    except (OSError, ValueError):  # ValueError: a zero in the name
        return -1


class Steps:
    """Says which step is under way, and how long each took, the last time."""

    def __init__(self, progress: Say) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def run(
        self,
        name: str,
        work: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Says what it does, and does it."""
        self.progress(name)
        return self.time(name, work, *arguments, **options)

    def time(
        self,
        name: str,
        work: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Does it."""
        began = time.monotonic()
        try:
            return work(*arguments, **options)
        finally:
            self.seconds[name] = time.monotonic() - began


class Patience:
    """Waits for a bridge that is still writing what the broker has delivered. Judging takes nothing of it."""

    def __init__(self, connection: Snapshot, truth: Truth, wait_s: float, say: Say) -> None:
        self._connection = connection
        self._wait_s = wait_s
        self._say = say
        self._said = False
        self._expected = int(
            np.count_nonzero(truth.meter_rows.certain)
            + np.count_nonzero(truth.vehicle_rows.certain)
            + sum(letter.certain for letter in truth.letters)
        )
        self._counted = _exists(connection, "ingest_counter")
        self._seen: tuple[int, ...] = ()
        self._quiet_s = 0.0
        self.waited_s = 0.0

    def wait_for_rows(self) -> None:
        """Waits until there are as many rows as there must be, as long as there is hope."""
        self._seen = self._look()
        while sum(self._seen[:2]) < self._expected and self._wait():
            pass

    def wait_for_change(self) -> bool:
        """Waits until the bridge has written more than what was judged, and pauses; false where it does not."""
        judged = before = self._seen
        while self._wait():
            if self._seen != judged and self._seen == before:
                return True
            before = self._seen
        return self._seen != judged

    def _wait(self) -> bool:
        """Looks again a little later; false where there is no time left, or nothing has changed for too long."""
        left_s = self._wait_s - self.waited_s
        if left_s <= 0 or self._quiet_s >= self._wait_s * QUIET_SHARE:
            return False
        self._explain()
        began = time.monotonic()
        time.sleep(min(POLL_S, left_s))
        seen = self._look()
        waited_s = time.monotonic() - began
        self.waited_s += waited_s
        self._quiet_s = self._quiet_s + waited_s if seen == self._seen else 0.0
        self._seen = seen
        return True

    def _look(self) -> tuple[int, ...]:
        """Rows of history and dead letters, then whatever else moves while the bridge works."""
        query = (
            "SELECT coalesce(sum(stored), 0)::bigint, coalesce(sum(dead_lettered), 0)::bigint, "
            "coalesce(sum(received), 0)::bigint FROM ingest_counter"
            if self._counted
            else "SELECT (SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history), "
            "(SELECT count(*) FROM dead_letter)"
        )
        return self._connection.execute(query).fetchone() or ()

    def _explain(self) -> None:
        if not self._said:
            seen = sum(self._seen[:2])
            count = f" ({seen:,} readings and dead letters of {self._expected:,})" if seen < self._expected else ""
            self._say(
                f"not everything is there yet{count}: waiting while the database changes, at most {self._wait_s:g} s"
            )
        self._said = True


class Judge:
    """Compares one snapshot with the truth."""

    def __init__(self, connection: Snapshot, truth: Truth, options: Options, steps: Steps) -> None:
        self._connection = connection
        self._truth = truth
        self._show = options.show
        self._allow_others = options.allow_other_devices
        self._steps = steps
        self._devices = Devices(truth)
        self._strangers: list[tuple[Check, Kind, str, int]] = []

    def judge(self) -> Verdict:
        """All checks. While PostgreSQL computes the analytics, the rows are compared here."""
        run, connection, devices = self._steps.run, self._connection, self._devices
        counters = run("counters", fetch_counters, connection)
        source = find_source(connection)
        letters = run("dead letters", fetch_letters, connection)
        live = [run(f"{kind.name} live", fetch, connection, devices, kind, "live") for kind in KINDS]
        history = [run(f"{kind.name} history", fetch, connection, devices, kind, "history") for kind in KINDS]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._steps.time, "analytics", fetch_analytics, connection, devices, source)
            checks, rows = run("compare history", self._check_history, history)
            del history
            checks += run("compare live", self._check_live, rows, live)
            checks.append(run("compare dead letters", self._check_letters, rows, letters))
            expected = run("true analytics", answers, rows[METER], rows[VEHICLE])
            self._steps.progress("waiting for the database's analytics")
            found = asked.result()
        self._name_strangers(checks)
        computed = [*check_analytics(devices, expected, source, found, self._show)]
        hint = None if all(check.match for check in computed) else source.hint
        checks += computed
        if counters:
            checks.append(check_counters(counters, self._show))
        info = connection.info
        return Verdict(
            ledger="",
            database=f"{info.host}:{info.port}/{info.dbname}",
            complete=self._truth.complete,
            checks=checks,
            analytics=source.name,
            books=self._books(counters, checks),
            hints=self._hints(counters, checks) + ([hint] if hint else []),
        )

    def _check_history(self, found: Sequence[Found]) -> tuple[list[Check], dict[Kind, Rows]]:
        """Also says which rows must be there, now that the database has decided what was in doubt."""
        choices = choices_in_doubt(self._devices, self._truth)
        checks, rows = [], {METER: self._truth.meter_rows, VEHICLE: self._truth.vehicle_rows}
        for one in found:
            check, rows[one.kind] = check_history(self._devices, rows[one.kind], one, choices, self._show)
            checks.append(self._with_strangers(check, one))
        return checks, rows

    def _check_live(self, rows: Mapping[Kind, Rows], found: Sequence[Found]) -> list[Check]:
        return [self._with_strangers(check_live(self._devices, rows[one.kind], one, self._show), one) for one in found]

    def _check_letters(self, rows: Mapping[Kind, Rows], found: list[FoundLetter]) -> Check:
        if self._allow_others:
            found = of_fleet(self._devices, self._truth.letters, found)
        return check_letters(self._devices, self._truth.letters, found, rows, self._show)

    def _with_strangers(self, check: Check, found: Found) -> Check:
        """Counts the rows of devices that the ledger does not know, to be named later."""
        if found.others and not self._allow_others:
            check.found += found.others
            self._strangers.append((check, found.kind, found.table, found.others))
        return check

    def _name_strangers(self, checks: Sequence[Check]) -> None:
        """Asks for what the ledger does not know, now that the connection is free."""
        name_unknown_meters(self._connection, checks)
        for check, kind, table, others in self._strangers:
            shown = other_rows(self._connection, self._devices, kind, table, self._show)
            check.add_all(SURPLUS, range(others), partial(_stranger, shown))

    def _books(self, counters: Counters | None, checks: Sequence[Check]) -> dict[str, int]:
        books = self._truth.books._asdict()
        if counters:
            books["received_by_bridge"] = counters.received
            if self._truth.complete and all(check.match for check in checks):
                # Otherwise nobody can tell which duplicates those of the ledger are.
                books["redelivered"] = counters.duplicate - self._truth.books.duplicates
        return books

    def _hints(self, counters: Counters | None, checks: Sequence[Check]) -> list[str]:
        books, hints = self._truth.books, []
        if books.unheard:
            hints.append(f"{books.unheard:,} messages were published while nobody was subscribed: no bridge got them")
        if books.in_doubt:
            hints.append(f"{books.in_doubt:,} messages were never acknowledged: what they say may be there or not")
        if books.refused:
            hints.append(f"{books.refused:,} messages were refused by the broker: nothing of them may be there")
        rows = [check for check in checks if check.name.endswith("history")]
        if any(check.expected for check in rows) and not any(check.expected - check.missing for check in rows):
            hints.append("nothing of this ledger is in the database: is it the right one?")
        sent = books.stored + books.duplicates + books.conflicts + books.rejected
        if counters and counters.received < sent - books.in_doubt and any(check.missing for check in rows):
            hints.append(
                f"the counters of the bridge know {counters.received:,} of {sent:,} things that were sent: the rest "
                "did not reach it; Mosquitto drops what is beyond max_queued_messages (1,000 unless told otherwise)"
            )
        if any(check.surplus for check in rows):
            hints.append("there are readings that this ledger does not know, from an earlier run, or another fleet?")
        if self._strangers:
            hints.append("readings of other devices are surplus, unless --allow-other-devices is given")
        return hints


def fetch_counters(connection: Snapshot) -> Counters | None:
    """The counters of all instances; None where the database is another bridge's, without the table."""
    if not _exists(connection, "ingest_counter"):
        return None
    row = connection.execute(
        "SELECT coalesce(sum(received), 0)::bigint, coalesce(sum(stored), 0)::bigint, "
        "coalesce(sum(duplicate), 0)::bigint, coalesce(sum(dead_lettered), 0)::bigint, "
        "(SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history), "
        "(SELECT count(*) FROM dead_letter) FROM ingest_counter"
    ).fetchone()
    return Counters(*row) if row else None


def check_counters(counters: Counters, show: int) -> Check:
    """Compares the counters with one another and with the rows that they count."""
    check = Check("counters", 3, 3, show)
    decided = counters.stored + counters.duplicate + counters.dead_lettered
    for what, must, has in (
        ("received = stored + duplicate + dead_lettered", decided, counters.received),
        ("stored = rows of history", counters.history_rows, counters.stored),
        ("dead_lettered = rows of dead_letter", counters.letters, counters.dead_lettered),
    ):
        if must != has:
            name = what.partition(" ")[0]
            check.add(Difference(ALTERED, f"ingest_counter: {what}", None, {name: must}, {name: has}))
    return check


def _stranger(rows: Sequence[Row], at: int) -> Difference:
    return difference(SURPLUS, None, rows[at])


def _exists(connection: Snapshot, table: str) -> bool:
    return connection.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone() == (True,)
