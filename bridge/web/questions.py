"""The questions to the database: statements of sql/web over a pool of connections that can only read.

Where the database is away, a question ends with a problem, soon; and the pool heals by itself.
"""

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Self

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bridge.config import Config
from bridge.store import SETTINGS, conninfo, describe
from bridge.web.problems import ProblemError
from bridge.web.representation import Row

log = structlog.get_logger()

APPLICATION = "wattbridge-web"
# A question waits so long for a connection, and not so long once one has waited in vain.
PATIENCE_S = 2.0
IMPATIENCE_S = 0.3
# PostgreSQL ends a question itself; where it cannot be heard any more, we do, so much later.
GRACE_S = 1.0
# The same question at once is asked once, and a small answer is given again for so long: a page that a hundred people
# look at costs what one costs.
REMEMBERED_S = 1
# Of the whole fleet it costs most and moves least, and Cache-Control allows as much.
FLEET_REMEMBERED_S = 5
# And where it took long, for so many times as long, up to this: pages that are open never take more than a part of the
# database, however slow it is.
REMEMBERED_TIMES = 10
LONGEST_REMEMBERED_S = 30.0
# A page of a hundred, and the row that says that there are more.
MOST_ROWS = 101
MOST_REMEMBERED = 1_000
RETRY_AFTER = {"Retry-After": "5"}
LACKING = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.InvalidSchemaName,
)


class Questions:
    """Asks the database that the configuration names."""

    def __init__(self, config: Config) -> None:
        self._size = config.web.connections
        self._timeout_s = config.web.timeout_s
        self._patience_s = PATIENCE_S
        # As many as there are connections: a question that waits for another one to end does not think them lost.
        self._turns = asyncio.Semaphore(self._size)
        self._trouble = self._refusal = ""
        self._names: dict[str, list[str]] = {}
        self._asking: dict[tuple[object, ...], asyncio.Task[list[Row]]] = {}
        # It would repeat what we say ourselves, for each connection and attempt.
        logging.getLogger("psycopg").setLevel(logging.CRITICAL)
        self._pool: AsyncConnectionPool[AsyncConnection[tuple[Any, ...]]] = AsyncConnectionPool(
            conninfo(config.database),
            kwargs={"autocommit": True, "application_name": APPLICATION},
            min_size=self._size,
            max_size=self._size,
            open=False,
            connection_class=self._connection_class(),
            configure=self._set_up,
            # After this it gives up, and the next question makes it try again.
            reconnect_timeout=1.0,
        )

    async def open(self) -> None:
        """Begins to connect, and waits for nothing."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.close()

    async def ask(self, question: str, remembered_s: int = REMEMBERED_S, /, **parameters: object) -> Sequence[Row]:
        """The rows of a statement, with names as JSON has them; others may be given the same rows, for `remembered_s`.

        Raises ProblemError where the database is to blame.
        """
        key = (question, *parameters.values())
        asking = self._asking.get(key)
        if asking is None:
            # A task: it is for all who ask the same, and none of them waits for it longer than it may take.
            asking = self._asking[key] = asyncio.create_task(self._ask(_statement(question), parameters))
            began = time.monotonic()
            asking.add_done_callback(lambda asked: self._asked(key, asked, remembered_s, began))
        await asyncio.wait((asking,), timeout=self._timeout_s + GRACE_S)
        if not asking.done():
            self._asking.pop(key, None)
            # Where the database cannot be heard any more, this takes its time.
            asking.cancel()
            raise self._slow(question)
        try:
            return asking.result()
        except (asyncio.CancelledError, psycopg.errors.QueryCanceled):
            raise self._slow(question) from None
        except psycopg.Error as error:
            if (trouble := self._blamed(error)) is None:
                raise
            if trouble != self._trouble:
                why = self._refusal if isinstance(error, PoolTimeout) and self._refusal else describe(error)
                log.warning("database.away", reason=why, meaning=trouble)
            self._trouble = trouble
            raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, trouble, RETRY_AFTER) from None

    def _asked(self, key: tuple[object, ...], asked: asyncio.Task[list[Row]], remembered_s: int, began: float) -> None:
        """Remembers a small answer for a moment, and that the database answers."""
        # Also where nobody waits for it any more, and would ask whether it failed.
        fine = not asked.cancelled() and asked.exception() is None
        if fine:
            self._patience_s = PATIENCE_S
            self._refusal = ""
            if self._trouble:
                log.info("database.back")
                self._trouble = ""
        if fine and len(asked.result()) <= MOST_ROWS and len(self._asking) <= MOST_REMEMBERED:
            kept_s: float = remembered_s
            if remembered_s == FLEET_REMEMBERED_S:
                kept_s = max(kept_s, min(REMEMBERED_TIMES * (time.monotonic() - began), LONGEST_REMEMBERED_S))
            asyncio.get_running_loop().call_later(kept_s, self._forget, key, asked)
        else:
            self._forget(key, asked)

    def _forget(self, key: tuple[object, ...], asked: asyncio.Task[list[Row]]) -> None:
        if self._asking.get(key) is asked:
            del self._asking[key]

    def _slow(self, question: str) -> ProblemError:
        log.warning("web.slow", question=question, timeout_s=self._timeout_s)
        said = f"this takes longer than {self._timeout_s:g} s (web.timeout_s): ask for less"
        return ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, said, RETRY_AFTER)

    async def _ask(self, statement: str, parameters: dict[str, object]) -> list[Row]:
        async with self._turns:
            # Each connection may have been lost since it was used last.
            lost = 0
            while True:
                connection = await self._pool.getconn(self._patience_s)
                try:
                    return await self._rows(connection, statement, parameters)
                except psycopg.OperationalError:
                    lost += 1
                    if not connection.closed or lost > self._size:
                        raise
                finally:
                    # Not the context of the pool: there is no transaction to be ended.
                    await self._pool.putconn(connection)

    async def _rows(
        self, connection: AsyncConnection[tuple[Any, ...]], statement: str, parameters: dict[str, object]
    ) -> list[Row]:
        cursor = await connection.execute(statement, parameters, binary=True)
        rows = await cursor.fetchall()
        names = self._names.get(statement)
        if names is None:
            # Once: psycopg makes an object of each column for it.
            names = self._names[statement] = [_camel(column.name) for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _blamed(self, error: psycopg.Error) -> str | None:
        """What is said about an error that is not the question's; None where it is."""
        if isinstance(error, PoolTimeout):
            self._patience_s = IMPATIENCE_S
            if "FATAL:" in self._refusal:
                return "the database does not let us in: the log says why"
            return "no connection to the database: it is away, or busy"
        if isinstance(error, LACKING):
            return 'the database lacks the schema of this version: run "wattbridge migrate"'
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return "the database does not let us read: GRANT wattbridge_reader to the login of this process"
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return "the database is away"
        return None

    def _connection_class(self) -> type[AsyncConnection[tuple[Any, ...]]]:
        """One that lets us know why there is none: the pool keeps that for itself."""
        questions = self

        class Connection(AsyncConnection[tuple[Any, ...]]):
            @classmethod
            async def connect(cls, *args: Any, **options: Any) -> Self:  # noqa: ANN401 - as in the class above
                try:
                    return await super().connect(*args, **options)
                except psycopg.Error as error:
                    questions._refusal = describe(error)
                    raise

        return Connection

    async def _set_up(self, connection: AsyncConnection[Any]) -> None:
        settings = {
            **SETTINGS,
            "default_transaction_read_only": "on",
            "statement_timeout": str(max(1, int(self._timeout_s * 1_000))),
        }
        for name, value in settings.items():
            await connection.execute("SELECT set_config(%s, %s, false)", (name, value))


@cache
def _camel(name: str) -> str:
    """`total_ac_consumed_kwh` as JSON has it: totalAcConsumedKwh."""
    return re.sub(r"_([a-z0-9])", lambda match: match[1].upper(), name)


@cache
def _statement(question: str) -> str:
    return files("bridge").joinpath("sql", "web", f"{question}.sql").read_text(encoding="utf-8")
