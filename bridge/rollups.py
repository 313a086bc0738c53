"""The rollups, as far as they are told from outside: how far they are, a step of them, all of them anew.

What they are and how they are made is in sql/functions. Times are microseconds since 1970, and may be infinite.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection

from bridge.config import Database
from bridge.messages import EPOCH, SECOND
from bridge.store import connect

# A step takes seconds; one that takes longer than this is given up, and tried again.
STEP_TIMEOUT_S = 600.0
# While somebody else makes the rollups, this is how often we look how far he is.
LOOK_AGAIN_S = 0.5
QUARTER_HOUR = 900 * SECOND

Connection = AsyncConnection[tuple[Any, ...]]


class Extent(NamedTuple):
    """How far the rollups are, and how many marks they have to see to."""

    complete_until: float
    late_before: float
    marks: int

    @property
    def complete(self) -> bool:
        """Whether they reach up to the watermark; marks aside."""
        return self.complete_until >= self.late_before

    def covered(self, start: float) -> float:
        """How much of the time from start to the watermark they cover, in percent."""
        if self.complete:
            return 100.0
        if not math.isfinite(self.complete_until):
            return 0.0
        return 100 * max(0.0, (self.complete_until - start) / (self.late_before - start))


class State(NamedTuple):
    """All there is to say about the rollups. `now` is the time by the database's clock, the one that all share."""

    now: float
    extent: Extent
    history_since: float
    late_after: float


def written(moment: float) -> str:
    """A time for people: to the second in UTC."""
    if not math.isfinite(moment):
        return str(moment).replace("inf", "infinity")
    return (EPOCH + timedelta(microseconds=moment)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def open_connection(config: Database, application_name: str, lock_timeout_s: float = 0) -> Connection:
    """A connection for work on the rollups; `lock_timeout_s` 0 waits for locks as long as a step may take.

    Raises psycopg.Error.
    """
    settings = {"lock_timeout": str(int(lock_timeout_s * 1_000))}
    connection = await connect(config, settings, STEP_TIMEOUT_S, application_name=application_name)
    try:
        # A step whose client was killed ends soon, and with it the lock that keeps others from it.
        await connection.execute("SET client_connection_check_interval = '1s'")
    except psycopg.errors.InvalidParameterValue:
        pass  # the server's system cannot tell: the step runs to its end
    except BaseException:
        await connection.close()
        raise
    return connection


async def read_state(config: Database) -> State:
    """How things stand, over a connection of its own."""
    connection = await open_connection(config, "wattbridge-rollups")
    try:
        return await state(connection)
    finally:
        await connection.close()


async def state(connection: Connection) -> State:
    """How things stand."""
    cursor = await connection.execute(
        "SELECT extract(epoch FROM clock_timestamp())::float8, "
        "extract(epoch FROM complete_until)::float8, extract(epoch FROM late_before)::float8, "
        "(SELECT count(*) FROM rollup_mark), "
        "extract(epoch FROM history_since)::float8, extract(epoch FROM late_after)::float8 "
        "FROM rollup_progress, analytics_setting"
    )
    ((now, complete_until, late_before, marks, history_since, late_after),) = await cursor.fetchall()
    extent = Extent(complete_until * SECOND, late_before * SECOND, marks)
    return State(now * SECOND, extent, history_since * SECOND, late_after * SECOND)


async def advance(connection: Connection, target: float) -> float:
    """Moves the watermark up to the quarter hour of the target, never back; returns where it is."""
    cursor = await connection.execute(
        "SELECT extract(epoch FROM rollup_advance(to_timestamp(%s)))::float8", (target / SECOND,)
    )
    ((late_before,),) = await cursor.fetchall()
    return float(late_before * SECOND)


async def step(connection: Connection) -> Extent | None:
    """One step on; None while somebody else makes the rollups."""
    cursor = await connection.execute(
        "SELECT extract(epoch FROM complete_until)::float8, extract(epoch FROM late_before)::float8, marks_left "
        "FROM rollup_refresh()"
    )
    row = await cursor.fetchone()
    return Extent(row[0] * SECOND, row[1] * SECOND, row[2]) if row else None


async def rebuild(connection: Connection, since: datetime | None) -> AsyncIterator[Extent]:
    """Makes the rollups since then (None: all of them) again from history; yields how far they are, first from where.

    Ends when they reach up to the watermark and nothing is marked. Whoever else makes rollups helps. Interrupted, the
    rest is made by the daemon, or the next time. Meanwhile views read history, and are as right as before.
    """
    when = "-infinity" if since is None else since.isoformat()
    await connection.execute("SELECT rollup_restart(%s::timestamptz)", (when,))
    extent = (await state(connection)).extent
    yield extent
    while not extent.complete or extent.marks:
        done = await step(connection)
        if done is None:
            await asyncio.sleep(LOOK_AGAIN_S)
            done = (await state(connection)).extent
        extent = done
        yield extent
