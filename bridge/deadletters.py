"""Dead letters from the operator's side: look at what was rejected, and give it a second chance."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

import psycopg
import structlog
from psycopg import sql
from psycopg.rows import class_row

from bridge.batch import Batch, Key
from bridge.config import Config
from bridge.errors import Reason, Rejection, WattbridgeError
from bridge.messages import EPOCH, SECOND, decode_status, decode_telemetry
from bridge.store import RefusedError, RetryError, Store, conninfo
from bridge.topics import Channel

log = structlog.get_logger()

# Under this name the counters say what replays did.
INSTANCE = "dead-letters replay"
REPLAYED_AT_ONCE = 500
REPLAYED_BYTES_AT_ONCE = 8 * 1024 * 1024
SHORTEST_ID = 4


class Letter(NamedTuple):
    """A dead letter as the table has it."""

    device_id: str
    digest: bytes
    topic: str
    payload: bytes
    content_type: str | None
    reason: str
    detail: str
    received_at: datetime

    @property
    def id(self) -> str:
        """What a person types to name it: the start of the digest."""
        return self.digest.hex()[:12]


class Selection(NamedTuple):
    """Which dead letters: those that meet every condition that is given."""

    ids: Sequence[str] = ()
    reason: Reason | None = None
    device_id: str | None = None
    before: datetime | None = None
    since: datetime | None = None

    @property
    def everything(self) -> bool:
        """Whether no condition is given."""
        return self == Selection()

    def condition(self) -> sql.Composed:
        """As the condition of a WHERE clause."""
        parts: list[sql.Composable] = [sql.SQL("true")]
        if self.ids:
            starts = [sql.SQL("encode(digest, 'hex') LIKE {}").format(_id_pattern(start)) for start in self.ids]
            parts.append(sql.SQL("({})").format(sql.SQL(" OR ").join(starts)))
        if self.reason is not None:
            parts.append(sql.SQL("reason = {}").format(str(self.reason)))
        # Empty is not nothing: those whose topic names no device that is valid.
        if self.device_id is not None:
            parts.append(sql.SQL("device_id = {}").format(self.device_id))
        if self.before is not None:
            parts.append(sql.SQL("received_at < {}").format(self.before))
        if self.since is not None:
            parts.append(sql.SQL("received_at >= {}").format(self.since))
        return sql.SQL(" AND ").join(parts)


class Outcome(NamedTuple):
    """What a replay came to, in dead letters."""

    accepted: int
    still_rejected: int


def select(
    config: Config, selection: Selection, limit: int | None = None, *, oldest_first: bool = False
) -> Iterator[Letter]:
    """The selected dead letters, newest first unless told otherwise, as they were when the first one was asked for."""
    order = sql.SQL("ASC" if oldest_first else "DESC")
    with (
        psycopg.connect(conninfo(config.database)) as connection,
        connection.cursor("letters", row_factory=class_row(Letter)) as cursor,
    ):
        cursor.execute(
            sql.SQL(
                "SELECT device_id, digest, topic, payload, content_type, reason, detail, received_at FROM dead_letter "
                "WHERE {} ORDER BY received_at {}, digest LIMIT {}"
            ).format(selection.condition(), order, limit),
            # However the database would write a date.
            binary=True,
        )
        yield from cursor


def count_by_reason(config: Config, selection: Selection) -> dict[str, int]:
    """How many dead letters are selected, by reason, most first."""
    with psycopg.connect(conninfo(config.database)) as connection:
        query = sql.SQL(
            "SELECT reason, count(*) FROM dead_letter WHERE {} GROUP BY reason ORDER BY count(*) DESC, reason"
        )
        return dict(connection.execute(query.format(selection.condition())).fetchall())


def purge(config: Config, selection: Selection) -> int:
    """Deletes the selected dead letters for good; returns how many there were. The counters keep them."""
    with psycopg.connect(conninfo(config.database)) as connection:
        return connection.execute(sql.SQL("DELETE FROM dead_letter WHERE {}").format(selection.condition())).rowcount


async def replay(config: Config, selection: Selection) -> Outcome:
    """Decodes the selected dead letters again, oldest first, by the configuration of today and as of their arrival.

    Those that are accepted now become history and leave the dead letters, in one transaction; the others stay, though
    one that turns out to be a conflict stays as that. Safe to interrupt and to run again. Raises WattbridgeError where
    the database does not take them.
    """
    topics = config.topics.topics()
    store = Store(config.database, INSTANCE)
    seen = accepted = 0
    try:
        before = await store.open()
        for letters in _chunks(select(config, selection, oldest_first=True)):
            batch = Batch(topics)
            for letter in letters:
                _add(batch, letter, config)
            seen += len(letters)
            if batch.replayed:
                # The counters know how many dead letters it came to: what went less what came back.
                after = await store.write(batch)
                accepted += before.dead_lettered - after.dead_lettered
                before = after
    except (RetryError, RefusedError) as error:
        raise WattbridgeError(f"{accepted} dead letters were replayed, then the database said: {error}") from None
    finally:
        await store.close()
    return Outcome(accepted, seen - accepted)


def _add(batch: Batch, letter: Letter, config: Config) -> None:
    """Adds a dead letter to the batch if all of it is accepted now."""
    arrival = round((letter.received_at - EPOCH).total_seconds() * SECOND)
    try:
        kind, device_id, channel = batch.topics.parse(letter.topic)
        if channel is Channel.STATUS:
            batch.add_presence(decode_status(kind, device_id, letter.payload, arrival))
        else:
            items = decode_telemetry(kind, device_id, letter.payload, letter.content_type, arrival, config.limits)
            if any(isinstance(item, Rejection) for item in items):
                return
            for item in items:
                if not isinstance(item, Rejection):
                    batch.add_reading(item)
    except Rejection:
        return
    except Exception:
        # A mistake of ours: the others can still be replayed.
        log.exception("message.unexpected", topic=letter.topic, digest=letter.digest.hex())
        return
    batch.replayed.append(Key(letter.device_id, letter.digest))


def _id_pattern(start: str) -> str:
    if len(start) < SHORTEST_ID or set(start.lower()) - set("0123456789abcdef"):
        raise WattbridgeError(
            f"{start!r} is not the id of a dead letter: at least {SHORTEST_ID} digits of its first column"
        )
    return f"{start.lower()}%"


def _chunks(letters: Iterator[Letter]) -> Iterator[list[Letter]]:
    """Dead letters by what one transaction may hold, in number and in bytes."""
    chunk: list[Letter] = []
    size = 0
    for letter in letters:
        chunk.append(letter)
        size += len(letter.payload)
        if len(chunk) == REPLAYED_AT_ONCE or size > REPLAYED_BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
