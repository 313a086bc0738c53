"""The pipeline: receive → decode → batch → write → acknowledge.

One batch is written at a time, in order; the next ones are decoded while it commits. Nothing is acknowledged before the
transaction that decided about it has committed.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from bridge.backoff import Backoff
from bridge.batch import Batch
from bridge.config import BatchLimits
from bridge.errors import Rejection
from bridge.messages import Limits, decode_status, decode_telemetry
from bridge.store import RefusedError, RetryError, Totals
from bridge.topics import Channel, Topics

log = structlog.get_logger()


class Publication(Protocol):
    """A message as the broker delivered it; `packet_id` is None where it wants no acknowledgement (QoS 0)."""

    @property
    def topic(self) -> str: ...  # noqa: D102
    @property
    def payload(self) -> bytes: ...  # noqa: D102
    @property
    def content_type(self) -> str | None: ...  # noqa: D102
    @property
    def packet_id(self) -> int | None: ...  # noqa: D102


class Source(Protocol):
    """The connection that delivered a message: the only one on which it may be acknowledged."""

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """Acknowledges, in this order; nothing happens when the connection has ended."""

    def pause(self) -> None:
        """Stops delivering."""

    def resume(self) -> None:
        """Delivers on."""


class Sink(Protocol):
    """Where batches become durable."""

    async def open(self) -> Totals:
        """Connects; raises RetryError."""

    async def write(self, batch: Batch) -> Totals:
        """Commits the batch; raises RetryError or RefusedError."""


@dataclass(slots=True)
class Load:
    """A batch on its way, with whom to thank for it: packet ids by connection, in the order of delivery."""

    batch: Batch
    opened: float
    deliveries: int = 0
    size: int = 0
    owed: list[tuple[Source, list[int]]] = field(default_factory=list)

    def owe(self, source: Source, packet_id: int) -> None:
        """Notes an acknowledgement to give after the commit."""
        if not self.owed or self.owed[-1][0] is not source:
            self.owed.append((source, []))
        self.owed[-1][1].append(packet_id)


@dataclass(slots=True)
class Progress:
    """What the pipeline has done since it started; `totals` are the committed counters, over restarts."""

    deliveries: int = 0
    batches: int = 0
    totals: Totals = field(default_factory=Totals)
    last_commit_ms: float = 0.0
    slowest_commit_ms: float = 0.0


class Pipeline:
    """Takes publications from connections and sees to it that they are committed and acknowledged.

    `window` deliveries or `max_outstanding_bytes` of payload not yet committed are the most that is held: beyond them
    the connection is paused. QoS 1 never gets there, the broker's window is as large.
    """

    def __init__(
        self,
        sink: Sink,
        topics: Topics,
        limits: Limits,
        batch_limits: BatchLimits,
        window: int,
        max_outstanding_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink
        self._topics = topics
        self._limits = limits
        self._batch_limits = batch_limits
        self._window = window
        self._max_bytes = max_outstanding_bytes
        self._clock = clock
        self._last_arrival = 0
        self._loads: deque[Load] = deque()
        self._held = 0
        self._held_bytes = 0
        self._paused: Source | None = None
        self._wake = asyncio.Event()
        self._draining = False
        self.progress = Progress()

    @property
    def outstanding(self) -> int:
        """Deliveries that are received and not yet committed."""
        return self._held

    def receive(self, source: Source, publications: Sequence[Publication]) -> None:
        """Decodes what one network chunk brought and adds it to the batch that is open. Called by the connection."""
        now = time.monotonic()
        for publication in publications:
            load = self._open_load(now)
            self._decode(load.batch, publication)
            load.deliveries += 1
            load.size += len(publication.payload)
            self._held += 1
            self._held_bytes += len(publication.payload)
            if publication.packet_id is not None:
                load.owe(source, publication.packet_id)
        self.progress.deliveries += len(publications)
        if self._held > self._window or self._held_bytes > self._max_bytes:
            source.pause()
            self._paused = source
        if self._loads[0].opened == now or self._is_full(self._loads[0]):
            self._wake.set()

    async def run(self) -> None:
        """Writes batches until cancelled, or until `drain` was called and nothing is left."""
        self.progress.totals = await self._persistently(self._sink.open)
        while load := await self._next_load():
            began = time.monotonic()
            await self._commit(load.batch)
            self._acknowledge(load)
            self._note(load, (time.monotonic() - began) * 1_000)

    def drain(self) -> None:
        """Lets `run` end as soon as everything received is committed and acknowledged."""
        self._draining = True
        self._wake.set()

    def _open_load(self, now: float) -> Load:
        if not self._loads or self._is_full(self._loads[-1]):
            self._loads.append(Load(Batch(self._topics), now))
        return self._loads[-1]

    def _is_full(self, load: Load) -> bool:
        return load.batch.received + load.batch.statuses >= self._batch_limits.max_readings or (
            load.size >= self._batch_limits.max_bytes
        )

    def _decode(self, batch: Batch, publication: Publication) -> None:
        arrival = self._arrival()
        device_id, topic, payload = "", publication.topic, publication.payload
        try:
            kind, device_id, channel = self._topics.parse(topic)
            if channel is Channel.STATUS:
                batch.add_presence(decode_status(kind, device_id, payload, arrival))
                return
            for item in decode_telemetry(kind, device_id, payload, publication.content_type, arrival, self._limits):
                if isinstance(item, Rejection):
                    batch.add_rejection(item, device_id, topic, payload, publication.content_type, arrival)
                else:
                    batch.add_reading(item)
        except Rejection as rejection:
            batch.add_rejection(rejection, device_id, topic, payload, publication.content_type, arrival)

    def _arrival(self) -> int:
        """Now in microseconds since 1970, never the same twice: it may have to tell readings of a device apart."""
        self._last_arrival = max(self._last_arrival + 1, round(self._clock() * 1_000_000))
        return self._last_arrival

    async def _next_load(self) -> Load | None:
        """The oldest load, once it is full or old enough; None when drained."""
        while True:
            self._wake.clear()
            wait = None
            if self._loads:
                load = self._loads[0]
                wait = load.opened + self._batch_limits.max_age_ms / 1_000 - time.monotonic()
                if wait <= 0 or self._draining or self._is_full(load):
                    return self._loads.popleft()
            elif self._draining:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _commit(self, batch: Batch) -> None:
        """Commits the batch, however long it takes; finds and dead-letters what the database refuses."""
        try:
            self.progress.totals = await self._persistently(lambda: self._write(batch))
        except RefusedError as refusal:
            if len(batch) == len(batch.readings) == 1:
                log.warning("reading.refused", reading=batch.readings[0], reason=str(refusal))
                await self._commit(batch.refused(str(refusal)))
            else:
                for part in batch.split():
                    await self._commit(part)

    async def _write(self, batch: Batch) -> Totals:
        try:
            return await self._sink.write(batch)
        except RefusedError as refusal:
            if batch.readings:
                raise
            # Not even the dead letters are taken: there is nowhere left to put them, so they wait.
            raise RetryError(str(refusal), expected=False) from refusal

    async def _persistently(self, attempt: Callable[[], Awaitable[Totals]]) -> Totals:
        """Tries until the database takes it. What we wait for is said each time, an unknown error as an error."""
        backoff = Backoff()
        while True:
            try:
                return await attempt()
            except RetryError as error:
                delay = backoff.next()
                (log.warning if error.expected else log.error)(
                    "database.waiting",
                    reason=str(error),
                    attempt=backoff.attempts,
                    next_in_s=round(delay, 1),
                    outstanding=self._held,
                )
                await asyncio.sleep(delay)

    def _acknowledge(self, load: Load) -> None:
        for source, packet_ids in load.owed:
            source.acknowledge(packet_ids)

    def _note(self, load: Load, commit_ms: float) -> None:
        self._held -= load.deliveries
        self._held_bytes -= load.size
        if self._paused and self._held <= self._window and self._held_bytes <= self._max_bytes:
            self._paused.resume()
            self._paused = None
        progress = self.progress
        progress.batches += 1
        progress.last_commit_ms = commit_ms
        progress.slowest_commit_ms = max(progress.slowest_commit_ms, commit_ms)
