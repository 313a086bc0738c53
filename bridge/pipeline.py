"""The pipeline: receive → decode → batch → write → acknowledge.

One batch is written at a time, in order; the next ones are decoded while it commits. Nothing is acknowledged before the
transaction that decided about it has committed.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from bridge.backoff import Backoff
from bridge.batch import Batch
from bridge.config import BatchLimits
from bridge.errors import Reason, Rejection
from bridge.health import Standing
from bridge.histogram import Histogram
from bridge.messages import SECOND, Limits, decode_status, decode_telemetry, decode_usual, printable
from bridge.store import RefusedError, RetryError, Totals
from bridge.topics import Channel, Topics

log = structlog.get_logger()

# Of a message that decode_usual may look at.
USUAL_TYPES = (None, "application/json")
# When told to stop, the database is asked this often: the deadline runs.
DRAINING_DELAY_S = 0.5
# The upper ends of what is counted in histograms.
BATCH_READINGS = (1, 10, 100, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
COMMIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Up to a day: backlog is old when it comes.
PUBLISH_TO_COMMIT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 21_600, 86_400)
# About so many readings of a batch are looked at for that.
SAMPLE = 500


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
    """A batch on its way, with whom to thank for it: packet ids by connection, in the order of delivery.

    `readings` are those not committed yet (status messages as well); `lapsed` deliveries can no longer be acknowledged.
    """

    batch: Batch
    opened: float
    deliveries: int = 0
    readings: int = 0
    size: int = 0
    lapsed: int = 0
    owed: list[tuple[Source, list[int]]] = field(default_factory=list)

    @property
    def comes_again(self) -> bool:
        """Whether the broker has to deliver all of it again, because the connections it came on have ended."""
        return self.lapsed == self.deliveries

    def lapse(self, source: Source) -> None:
        """Notes that this connection has ended."""
        self.lapsed += sum(len(packet_ids) for owner, packet_ids in self.owed if owner is source)

    def owed_to(self, source: Source) -> list[int]:
        """Where to note the acknowledgements to give on this connection after the commit."""
        if not self.owed or self.owed[-1][0] is not source:
            self.owed.append((source, []))
        return self.owed[-1][1]


@dataclass(slots=True)
class Progress:
    """What the pipeline has done since it started; `totals` are the committed counters, over restarts.

    `taken` are the readings and status messages that came in, `given_back` those of them that were dropped without an
    acknowledgement, `opened` the counters as the database had them at first (None: it has not answered yet).

    `newest` is the batch with readings that was committed last, at `committed_at` (seconds since 1970, None: none yet),
    and `moved` when that was, by time.monotonic: a lost connection, and the start, count as a move.

    `refused` readings the database did not take, `retries` are its answers that made us try again, by whether they were
    to be expected.
    """

    deliveries: int = 0
    batches: int = 0
    taken: int = 0
    given_back: int = 0
    opened: Totals | None = None
    totals: Totals = field(default_factory=Totals)
    refused: int = 0
    retries: Counter[bool] = field(default_factory=Counter)
    slowest_commit_ms: float = 0.0
    batch_readings: Histogram = field(default_factory=lambda: Histogram(*BATCH_READINGS))
    commit_s: Histogram = field(default_factory=lambda: Histogram(*COMMIT_S))
    publish_to_commit_s: Histogram = field(default_factory=lambda: Histogram(*PUBLISH_TO_COMMIT_S))
    newest: Batch | None = None
    committed_at: float | None = None
    moved: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> int | None:
        """Where in time the stream is, in microseconds since 1970. Computed when asked: not for each batch."""
        return self.newest.position if self.newest else None

    @property
    def committed(self) -> int:
        """How many readings and status messages the database has counted since it answered first."""
        before = self.opened or self.totals
        return self.totals.received + self.totals.presence - before.received - before.presence


class Pipeline:
    """Takes publications from connections and sees to it that they are committed and acknowledged.

    `window` readings or `max_outstanding_bytes` of payload not yet committed are about the most that is held: beyond
    them the connection is paused, after the network chunk that went beyond.
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
        self._parse = topics.parse
        self._limits = limits
        self._most_readings = batch_limits.max_readings
        self._most_bytes = batch_limits.max_bytes
        self._most_age_s = batch_limits.max_age_ms / 1_000
        self._window = window
        self._max_bytes = max_outstanding_bytes
        self._clock = clock
        self._next_arrival = 0
        self._loads: deque[Load] = deque()
        self._held = 0
        self._held_bytes = 0
        self._paused: Source | None = None
        self._wake = asyncio.Event()
        self._draining = False
        self._refusal = ""
        self._writing: Batch | None = None
        self._writing_since = 0.0
        self._failure = ""
        self._still_since = time.monotonic()
        self.progress = Progress()

    @property
    def outstanding(self) -> int:
        """Readings (and status messages) that are received and not yet committed."""
        return self._held

    @property
    def unaccounted(self) -> int:
        """What was taken and is neither given back, nor held, nor counted by the database: zero at every moment."""
        progress = self.progress
        return progress.taken - progress.given_back - self._held - progress.committed

    @property
    def waiting(self) -> bool:
        """Whether the database's last answer was a failure, or it has not answered yet."""
        return self.progress.opened is None or (self._writing is not None and self._failure != "")

    def standing(self) -> Standing:
        """Where it is now."""
        now = time.monotonic()
        return Standing(
            opened=self.progress.opened is not None,
            outstanding=self._held,
            still_s=now - self._still_since if self._held else 0.0,
            writing=self._writing.taken if self._writing else 0,
            writing_s=now - self._writing_since if self._writing else 0.0,
            failure=self._failure,
        )

    def receive(self, source: Source, publications: Sequence[Publication]) -> None:
        """Decodes what one network chunk brought and adds it to the batch that is open. Called by the connection."""
        now = time.monotonic()
        if not self._held:
            self._still_since = now
        taken = size = 0
        arrival = self._arrival(len(publications))
        load: Load | None = None
        for publication in publications:
            if load is None or self._is_full(load):
                load = self._open_load(now)
                owed = load.owed_to(source)
            payload, packet_id = publication.payload, publication.packet_id
            readings = self._decode(load.batch, publication, payload, arrival)
            arrival += 1
            load.deliveries += 1
            load.readings += readings
            load.size += len(payload)
            taken += readings
            size += len(payload)
            if packet_id is not None:
                owed.append(packet_id)
        self._held += taken
        self._held_bytes += size
        self.progress.taken += taken
        self.progress.deliveries += len(publications)
        if self._is_too_much():
            source.pause()
            self._paused = source
        if self._loads[0].opened == now or self._is_full(self._loads[0]):
            self._wake.set()

    async def run(self) -> None:
        """Writes batches until cancelled, or until `drain` was called and nothing is left."""
        self.progress.opened = self.progress.totals = await self._persistently(self._sink.open)
        while load := await self._next_load():
            began = time.monotonic()
            refused = await self._commit(load, load.batch)
            self._writing = None
            if refused:
                self.progress.refused += refused
                log.warning("readings.refused", readings=refused, reason=self._refusal)
            self._acknowledge(load)
            self._note(load, time.monotonic() - began)

    def drain(self) -> None:
        """Lets `run` end as soon as everything received is committed and acknowledged."""
        self._draining = True
        self._wake.set()

    def forget(self, source: Source) -> None:
        """Notes that a connection has ended: what it delivered is still written, as much as the window holds.

        Mostly the broker delivers it again, and then it is a duplicate. But one that was killed may have forgotten it:
        then ours is the only copy. What is beyond the window is dropped, newest first, or each new connection would add
        to what is held. QoS 0 is kept.
        """
        self.progress.moved = time.monotonic()
        kept: deque[Load] = deque()
        while self._loads:
            load = self._loads.pop()
            load.lapse(source)
            if load.comes_again and self._is_too_much():
                self.progress.given_back += load.readings
                self._release(load)
            else:
                kept.appendleft(load)
        self._loads = kept

    def _release(self, load: Load) -> None:
        """Takes a load off what is held; reads on where that was too much."""
        self._held -= load.readings
        self._held_bytes -= load.size
        if self._paused and not self._is_too_much():
            self._paused.resume()
            self._paused = None

    def _is_too_much(self) -> bool:
        return self._held > self._window or self._held_bytes > self._max_bytes

    def _open_load(self, now: float) -> Load:
        if not self._loads or self._is_full(self._loads[-1]):
            self._loads.append(Load(Batch(self._topics), now))
        return self._loads[-1]

    def _is_full(self, load: Load) -> bool:
        return load.readings >= self._most_readings or load.size >= self._most_bytes

    def _decode(self, batch: Batch, publication: Publication, payload: bytes, arrival: int) -> int:
        """Adds what a message says to the batch; returns how many readings or status messages it is."""
        device_id, topic, content_type = "", publication.topic, publication.content_type
        try:
            kind, device_id, channel = self._parse(topic)
            if channel is Channel.STATUS:
                batch.add_presence(decode_status(kind, device_id, payload, arrival))
                return 1
            if content_type in USUAL_TYPES and (
                reading := decode_usual(kind, device_id, payload, arrival, self._limits)
            ):
                batch.add_reading(reading)
                return 1
            items = decode_telemetry(kind, device_id, payload, content_type, arrival, self._limits)
        except Rejection as rejection:
            batch.add_rejection(rejection, device_id, topic, payload, content_type, arrival)
            return 1
        except Exception as error:
            # A mistake of ours. Without a verdict the broker would deliver it again and again, and nothing behind it.
            log.exception("message.unexpected", topic=printable(topic), payload_bytes=len(payload))
            verdict = Rejection(Reason.UNEXPECTED, f"a mistake of the bridge: {type(error).__name__}; see its log")
            batch.add_rejection(verdict, device_id, topic, payload, content_type, arrival)
            return 1
        for item in items:
            if isinstance(item, Rejection):
                batch.add_rejection(item, device_id, topic, payload, content_type, arrival)
            else:
                batch.add_reading(item)
        return len(items)

    def _arrival(self, messages: int) -> int:
        """When the first of so many messages arrived, in microseconds since 1970; each next one comes one later.

        Never the same twice: it may have to tell readings of a device apart.
        """
        now = round(self._clock() * SECOND)
        # A clock that was put back is followed, once it differs by more than a burst of messages can explain.
        first = self._next_arrival if 0 < self._next_arrival - now <= SECOND else now
        self._next_arrival = first + messages
        return first

    async def _next_load(self) -> Load | None:
        """The oldest load, once it is full or old enough; None when drained."""
        while True:
            self._wake.clear()
            wait = None
            if self._loads:
                load = self._loads[0]
                wait = load.opened + self._most_age_s - time.monotonic()
                if wait <= 0 or self._draining or self._is_full(load):
                    return self._loads.popleft()
            elif self._draining:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _commit(self, load: Load, batch: Batch) -> int:
        """Commits a batch of the load, however long it takes; returns how many readings the database refused as such.

        Those become dead letters, and their neighbours are stored.
        """
        self._writing, self._writing_since = batch, time.monotonic()
        try:
            totals = await self._persistently(lambda: self._write(batch))
        except RefusedError as refusal:
            if len(batch) == len(batch.readings) == 1:
                self._refusal = str(refusal)
                return 1 + await self._commit(load, batch.refused(self._refusal))
            rest, other = batch.split()
            return await self._commit(load, rest) + await self._commit(load, other)
        # In one step with the counters: whoever looks finds the books balanced, also between two halves of a load.
        self.progress.totals = totals
        load.readings -= batch.taken
        self._held -= batch.taken
        self._still_since = time.monotonic()
        return 0

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
        self._failure = ""
        while True:
            try:
                return await attempt()
            except RetryError as error:
                self._failure = str(error)
                self.progress.retries[error.expected] += 1
                delay = min(backoff.next(), DRAINING_DELAY_S) if self._draining else backoff.next()
                (log.warning if error.expected else log.error)(
                    "database.waiting",
                    reason=str(error),
                    attempt=backoff.attempts,
                    next_in_s=round(delay, 1),
                    outstanding=self._held,
                )
                await self._sleep(delay)

    async def _sleep(self, delay: float) -> None:
        """Sleeps, but not through the beginning of the end: then the deadline runs."""
        until = time.monotonic() + delay
        draining = self._draining
        while draining == self._draining and (left := until - time.monotonic()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    def _acknowledge(self, load: Load) -> None:
        for source, packet_ids in load.owed:
            source.acknowledge(packet_ids)

    def _note(self, load: Load, commit_s: float) -> None:
        self._release(load)
        progress, batch = self.progress, load.batch
        progress.batches += 1
        progress.slowest_commit_ms = max(progress.slowest_commit_ms, commit_s * 1_000)
        progress.commit_s.observe(commit_s)
        progress.batch_readings.observe(batch.taken)
        if batch.meters or batch.vehicles:
            progress.newest = batch
            progress.moved = time.monotonic()
            progress.committed_at = self._clock()
            # Of a large batch some stand for all: to look at each would be a twentieth of all the CPU time.
            every = 1 + (len(batch.meters) + len(batch.vehicles)) // SAMPLE
            now = round(progress.committed_at * SECOND)
            progress.publish_to_commit_s.observe_since(batch.times(every), now, SECOND, weight=every)
