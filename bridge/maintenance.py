"""What the daemon does beside the data path, over a connection of its own: partitions ahead, rollups, retention."""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import psycopg
import structlog

from bridge import config, rollups
from bridge.backoff import Backoff
from bridge.messages import DAY, EPOCH, SECOND
from bridge.rollups import QUARTER_HOUR, Connection, Extent, State, written
from bridge.store import create_partitions, describe, passes

log = structlog.get_logger()

# Moving the watermark makes those wait who store readings, dropping partitions those who read: not for longer.
LOCK_TIMEOUT_S = 2.0
# Fewer marks than this are not worth a step of their own: they wait for the next round.
WORTH_A_STEP = 100
# The progress of the rollups is worth a line in the log when it took so long, or went so far.
LONG_S = 5.0
FAR = 2 * QUARTER_HOUR
LONGEST_DELAY_S = 60.0


class Stream(NamedTuple):
    """Where the stream of readings is.

    `position` is the median timestamp of the batch committed last, in microseconds since 1970, None before the first.
    `quiet_s` is for how long nothing has come, although we were connected and would have got it.
    """

    position: int | None
    quiet_s: float


def watermark(now: float, late_after: float, stream: Stream, patience_s: float) -> float | None:
    """Up to when everything that comes in time should be here by now, in microseconds; None: nobody knows.

    While messages flow that depends on the stream: behind a backlog it is hours behind the clock, and a watermark ahead
    of it would make every reading a late one. Once nothing has come for `patience_s` the clock alone decides. A wrong
    guess costs time: too early makes readings late, too late makes views read more of the history.
    """
    if stream.quiet_s >= patience_s:
        return now - late_after
    return None if stream.position is None else min(now, stream.position) - late_after


def first_day(there: float, here: float, history_days: int) -> int:
    """The first day, counted from 1970, whose history is kept, by the database's clock and by ours.

    What is dropped is gone: both have to say that it is time.
    """
    return int(min(there, here) // DAY) - history_days


class Maintenance:
    """Rounds of maintenance, and patience with a database that cannot be worked with. `stream` says where it is.

    `rounds` came to their end so far, `failures` did not; `extent` is how far the rollups were (None: not asked yet).
    """

    def __init__(self, database: config.Database, settings: config.Maintenance, stream: Callable[[], Stream]) -> None:
        self._database = database
        self._settings = settings
        self._stream = stream
        self._connection: Connection | None = None
        self.rounds = 0
        self.failures = 0
        self.extent: Extent | None = None

    async def run(self) -> None:
        """Goes round until cancelled. No error ends it, and none reaches the data path."""
        backoff = Backoff(first=1.0, longest=LONGEST_DELAY_S)
        while True:
            try:
                behind = await self._round()
                self.rounds += 1
                backoff.reset()
                # Behind means days of history, as after an update: then the next round is due at once.
                await asyncio.sleep(0 if behind else self._settings.every_s)
            except Exception as error:  # noqa: BLE001 - whatever it is, the daemon goes on
                self.failures += 1
                await self.close()
                delay = backoff.next()
                (log.warning if passes(error) else log.error)(
                    "maintenance.waiting", reason=describe(error), attempt=backoff.attempts, next_in_s=round(delay, 1)
                )
                await asyncio.sleep(delay)

    async def close(self) -> None:
        """Closes the connection at once, whatever the database is doing for us.

        To be called before `run` is cancelled: for a statement that is under way, psycopg would ask the database to
        cancel it and wait for the answer.
        """
        if self._connection:
            await self._connection.close()
        self._connection = None

    async def _round(self) -> bool:
        """Everything once; returns whether the rollups are still behind the watermark.

        The database's clock says how late it is: the watermark never goes back, and ours may be a day ahead.
        """
        connection = await self._connected()
        known = await rollups.state(connection)
        self.extent = known.extent
        today = int(known.now // DAY)
        for history in ("meter_history", "vehicle_history"):
            ahead = range(today, today + self._settings.partitions_ahead_days + 1)
            await create_partitions(connection, history, ahead)
        await self._advance(connection, known)
        behind = await self._refresh(connection, known.extent)
        if self._settings.history_days is not None:
            await self._retain(connection, first_day(known.now, time.time() * SECOND, self._settings.history_days))
        return behind

    async def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = await rollups.open_connection(
                self._database, "wattbridge-maintenance", lock_timeout_s=LOCK_TIMEOUT_S
            )
            log.debug("maintenance.connected")
        return self._connection

    async def _advance(self, connection: Connection, known: State) -> None:
        """Moves the watermark on; where that takes too long, it is for the next round."""
        target = watermark(known.now, known.late_after, self._stream(), patience_s=2 * self._settings.every_s)
        if target is None or target // QUARTER_HOUR * QUARTER_HOUR <= known.extent.late_before:
            return
        try:
            await rollups.advance(connection, target)
        except psycopg.errors.LockNotAvailable:
            log.info("rollups.postponed", reason="a batch is being written that takes long")

    async def _refresh(self, connection: Connection, before: Extent) -> bool:
        """Makes rollups until nothing is left, or the next round is due; returns whether they are still behind."""
        began = time.monotonic()
        extent, seconds, steps = before, 0.0, 0
        while seconds < self._settings.every_s:
            done = await rollups.step(connection)
            if done is None:
                return False  # another daemon is at it
            extent, seconds, steps = done, time.monotonic() - began, steps + 1
            self.extent = extent
            if extent.complete and extent.marks < WORTH_A_STEP:
                break
        far = extent.complete_until - before.complete_until > FAR
        (log.info if far or seconds > LONG_S else log.debug)(
            "rollups.refreshed",
            complete_until=written(extent.complete_until),
            late_before=written(extent.late_before),
            marks=extent.marks,
            steps=steps,
            seconds=round(seconds, 1),
        )
        return not extent.complete

    async def _retain(self, connection: Connection, day: int) -> None:
        """Drops the history before a day, counted from 1970; while somebody reads it, that is for the next round."""
        before = EPOCH.date() + timedelta(days=day)
        try:
            cursor = await connection.execute("SELECT drop_history_before(%s)", (before,))
            ((dropped,),) = await cursor.fetchall()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            log.info("history.postponed", reason=describe(error))
        else:
            if dropped:
                log.info("history.dropped", before=before.isoformat(), partitions=dropped)
