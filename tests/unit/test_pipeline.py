"""The pipeline without its rim: the arrival clock, the books, and what is kept of a connection that has ended."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from uuid import UUID

import pytest

from bridge import pipeline as pipeline_module
from bridge.batch import Batch
from bridge.config import BatchLimits
from bridge.messages import DAY, SECOND, Limits
from bridge.pipeline import Pipeline
from bridge.store import RefusedError, RetryError, Totals
from bridge.topics import Kind, Topics

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
START_S = 1_770_734_845.25
TELEMETRY = "energy/v1/meter/{}/telemetry"
STATUS = "energy/v1/meter/{}/status"


class Clock:
    """A clock that a test puts where it wants it, in seconds."""

    def __init__(self) -> None:
        self.seconds = START_S

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pipeline(clock: Clock) -> Pipeline:
    no_sink = cast("Any", None)
    return Pipeline(no_sink, TOPICS, Limits(), BatchLimits(), window=10, max_outstanding_bytes=1_000, clock=clock)


# The arrival clock: it tells the messages of a burst apart, and follows the machine's clock all the same.


async def test_a_standing_clock_gives_each_message_of_a_burst_a_time_of_its_own(pipeline: Pipeline) -> None:
    start = round(START_S * SECOND)
    assert [pipeline._arrival(1) for _ in range(1_000)] == list(range(start, start + 1_000))


async def test_the_messages_of_one_chunk_have_times_of_their_own_too(pipeline: Pipeline) -> None:
    first = pipeline._arrival(500)
    assert pipeline._arrival(1) == first + 500


async def test_a_clock_that_is_put_back_a_little_within_a_burst_never_repeats_itself(
    pipeline: Pipeline, clock: Clock
) -> None:
    seen = []
    for back in (0.0, 0.0005, 0.1, 0.9, 0.0, 0.9):
        clock.seconds = START_S - back
        seen.append(pipeline._arrival(1))
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("days", [1, 3, 400])
async def test_a_clock_that_is_put_back_by_days_is_followed(pipeline: Pipeline, clock: Clock, days: int) -> None:
    wrong = pipeline._arrival(1)
    clock.seconds -= days * 86_400
    assert [pipeline._arrival(1) for _ in range(3)] == [wrong - days * DAY + n for n in range(3)]


async def test_it_catches_up_with_the_clock_after_a_burst(pipeline: Pipeline, clock: Clock) -> None:
    for _ in range(1_000):
        pipeline._arrival(1)
    clock.seconds += 0.5
    assert pipeline._arrival(1) == round(clock.seconds * SECOND)


# The books: whatever came in is given back, held or counted by the database, whenever one looks.


class Message(NamedTuple):
    topic: str
    payload: bytes
    content_type: str | None = None
    packet_id: int | None = None


@dataclass(eq=False)
class Wire:
    """A connection that notes what it is told."""

    acknowledged: list[int] = field(default_factory=list)
    paused: bool = False

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        self.acknowledged += packet_ids

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Ledger:
    """A database that counts as the real one does: a batch once, however often it comes."""

    def __init__(self, before: Totals) -> None:
        self.totals = before
        self.batches: list[Batch] = []
        self.looks: list[int] = []
        self.look: Callable[[], int] = lambda: 0
        self.counts_once = True
        self.asked = asyncio.Event()
        self.open_to_all = asyncio.Event()
        self.open_to_all.set()
        self.answers: list[Exception | None] = []
        self._last: UUID | None = None

    async def open(self) -> Totals:
        return self.totals

    async def write(self, batch: Batch) -> Totals:
        self.asked.set()
        self.looks.append(self.look())
        await self.open_to_all.wait()
        self.looks.append(self.look())
        if any(device.startswith("BAD") for device, _ in batch.meters):
            raise RefusedError("no such meter")
        if batch.id != self._last or not self.counts_once:
            self.batches.append(batch)
            self.totals = self.totals._replace(
                received=self.totals.received + batch.received, presence=self.totals.presence + batch.statuses
            )
        self._last = batch.id
        if self.answers and (answer := self.answers.pop(0)):
            raise answer
        return self.totals

    @property
    def stored(self) -> list[str]:
        """The devices whose readings were stored, in this order."""
        return [device for batch in self.batches for device, _ in batch.meters]


def reading(device: str, packet_id: int | None = None) -> Message:
    return Message(TELEMETRY.format(device), json.dumps({"kwhConsumedAc": 1, "voltage": 230}).encode(), None, packet_id)


def readings(first: int, last: int) -> Iterator[Message]:
    """Readings of meters M<first> … M<last>, with their numbers as packet ids."""
    for number in range(first, last + 1):
        yield reading(f"M{number}", number)


@asynccontextmanager
async def running(
    ledger: Ledger, *, window: int = 100, max_readings: int = 10, max_bytes: int = 1_000_000
) -> AsyncIterator[Pipeline]:
    """A pipeline before a ledger; at the end all of it is written, and the books were balanced at every look."""
    limits = BatchLimits(max_readings=max_readings, max_age_ms=10)
    pipeline = Pipeline(ledger, TOPICS, Limits(), limits, window, max_bytes)
    ledger.look = lambda: pipeline.unaccounted
    writer = asyncio.create_task(pipeline.run())
    yield pipeline
    ledger.open_to_all.set()
    pipeline.drain()
    await asyncio.wait_for(writer, 10)
    ledger.looks.append(pipeline.unaccounted)
    assert set(ledger.looks) == {0}
    assert pipeline.outstanding == 0


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Totals(received=1_000, stored=900, duplicate=100, presence=50))


async def test_readings_arrays_statuses_and_garbage_are_all_in_the_books(ledger: Ledger) -> None:
    array = json.dumps([{"kwhConsumedAc": 1, "voltage": 230, "timestamp": 1_770_734_000 + n} for n in range(7)])
    wire = Wire()
    async with running(ledger) as pipeline:
        pipeline.receive(
            wire,
            [
                reading("M1", 1),
                Message(TELEMETRY.format("M2"), array.encode(), None, 2),
                Message(STATUS.format("M1"), b"online", None, 3),
                Message(TELEMETRY.format("M3"), b"garbage"),
                Message("nobody/knows", b"", None, 4),
            ],
        )
        assert (pipeline.progress.taken, pipeline.outstanding, pipeline.unaccounted) == (11, 11, 0)
    assert (ledger.totals.received, ledger.totals.presence) == (1_010, 51)
    assert (pipeline.progress.committed, pipeline.progress.given_back) == (11, 0)
    assert wire.acknowledged == [1, 2, 3, 4]


@pytest.mark.parametrize("mistake", [TypeError("a mistake"), RecursionError(), KeyError("\ud800\0")])
async def test_a_mistake_of_ours_over_a_message_makes_it_a_dead_letter_and_nothing_stands_still(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, mistake: Exception
) -> None:
    decode = pipeline_module.decode_telemetry

    def stumble(kind: Kind, device_id: str, *rest: Any) -> Any:
        if device_id == "M2":
            raise mistake
        return decode(kind, device_id, *rest)

    monkeypatch.setattr(pipeline_module, "decode_usual", lambda *_: None)
    monkeypatch.setattr(pipeline_module, "decode_telemetry", stumble)
    wire = Wire()
    async with running(ledger) as pipeline:
        pipeline.receive(wire, list(readings(1, 3)))
    (letter,) = [letter for batch in ledger.batches for letter in batch.dead_letters]
    assert (letter.device_id, letter.reason, letter.payload) == ("M2", "unexpected", reading("M2").payload)
    assert type(mistake).__name__ in letter.detail
    assert letter.detail.isprintable()
    assert ledger.stored == ["M1", "M3"]
    assert wire.acknowledged == [1, 2, 3]


async def test_what_was_counted_before_the_start_is_not_ours(ledger: Ledger) -> None:
    async with running(ledger) as pipeline:
        assert pipeline.progress.committed == 0
    assert pipeline.progress.committed == 0


async def test_an_answer_that_was_lost_leaves_the_books_balanced(ledger: Ledger) -> None:
    ledger.answers = [RetryError("the server closed the connection", expected=True), None]
    async with running(ledger) as pipeline:
        pipeline.receive(Wire(), list(readings(1, 10)))
    assert len(ledger.batches) == 1
    assert pipeline.progress.committed == 10


async def test_while_readings_are_refused_the_books_are_balanced_at_every_look(ledger: Ledger) -> None:
    wire = Wire()
    async with running(ledger, max_readings=20) as pipeline:
        messages = list(readings(1, 20))
        for bad in (3, 4, 11):
            messages[bad] = reading(f"BAD{bad}", bad + 1)
        messages.append(Message(STATUS.format("M1"), b"offline", None, 21))
        pipeline.receive(wire, messages)
    assert len(ledger.looks) > 20
    assert sum(len(batch.dead_letters) for batch in ledger.batches) == 3
    assert sorted(ledger.stored) == sorted(f"M{n}" for n in range(1, 21) if n - 1 not in (3, 4, 11))
    assert wire.acknowledged == list(range(1, 22))


async def written(ledger: Ledger, messages: Sequence[Message]) -> Pipeline:
    """A pipeline that has written these messages."""
    pipeline = Pipeline(ledger, TOPICS, Limits(), BatchLimits(max_age_ms=10), 100, 1_000_000)
    pipeline.receive(Wire(), messages)
    pipeline.drain()
    await asyncio.wait_for(pipeline.run(), 10)
    return pipeline


async def test_a_database_that_counts_twice_is_noticed(ledger: Ledger) -> None:
    ledger.counts_once = False
    ledger.answers = [RetryError("the server closed the connection", expected=True), None]
    assert (await written(ledger, list(readings(1, 10)))).unaccounted == -10


async def test_a_reading_that_is_lost_on_the_way_is_noticed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    halve = Batch.split

    def lose_one(batch: Batch) -> tuple[Batch, Batch]:
        rest, other = halve(batch)
        if len(other) == 5:
            other.meters.popitem()
            other.received -= 1
        return rest, other

    monkeypatch.setattr(Batch, "split", lose_one)
    pipeline = await written(ledger, [*readings(1, 9), reading("BAD", 10)])
    assert (pipeline.unaccounted, pipeline.outstanding) == (1, 0)


# What is kept of a connection that has ended


async def test_what_an_ended_connection_delivered_is_written(ledger: Ledger) -> None:
    """A broker that was killed has forgotten it: nobody will deliver it again."""
    ledger.open_to_all.clear()
    first, second = Wire(), Wire()
    async with running(ledger, window=100) as pipeline:
        pipeline.receive(first, list(readings(1, 100)))
        await ledger.asked.wait()
        pipeline.forget(first)
        assert (pipeline.outstanding, pipeline.progress.given_back) == (100, 0)
        pipeline.receive(second, [reading("NEW", 1)])
    assert ledger.stored == [*(f"M{n}" for n in range(1, 101)), "NEW"]
    assert second.acknowledged == [1]


async def test_what_is_beyond_the_window_is_given_back_the_newest_first(ledger: Ledger) -> None:
    ledger.open_to_all.clear()
    first = Wire()
    async with running(ledger, window=100, max_readings=10) as pipeline:
        pipeline.receive(first, list(readings(1, 90)))
        await ledger.asked.wait()
        pipeline.receive(first, list(readings(91, 125)))
        assert first.paused
        pipeline.forget(first)
        assert (pipeline.outstanding, pipeline.progress.given_back) == (100, 25)
        assert pipeline.unaccounted == 0
    assert ledger.stored == [f"M{n}" for n in range(1, 101)]


async def test_bytes_beyond_the_limit_are_given_back(ledger: Ledger) -> None:
    ledger.open_to_all.clear()
    wire = Wire()
    size = len(reading("M1").payload)
    async with running(ledger, window=1_000, max_readings=10, max_bytes=size * 50) as pipeline:
        pipeline.receive(wire, list(readings(1, 80)))
        await ledger.asked.wait()
        assert wire.paused
        pipeline.forget(wire)
        assert (pipeline.outstanding, pipeline.progress.given_back) == (50, 30)


async def test_over_many_connections_no_more_is_held_than_the_window_one_batch_and_one_chunk(ledger: Ledger) -> None:
    window, batch, chunk = 100, 10, 7
    ledger.open_to_all.clear()
    most = 0
    async with running(ledger, window=window, max_readings=batch) as pipeline:
        for connection in range(200):
            wire = Wire()
            for _ in range(connection % 30):
                if not wire.paused:
                    pipeline.receive(wire, list(readings(1, chunk)))
            most = max(most, pipeline.outstanding)
            await asyncio.sleep(0)
            pipeline.forget(wire)
            assert pipeline.unaccounted == 0
            assert pipeline.outstanding <= window + batch
        assert window < most <= window + batch + chunk
        assert pipeline.progress.given_back > 0


async def test_what_the_broker_does_not_deliver_again_is_kept_however_full_it_is(ledger: Ledger) -> None:
    """QoS 0, alone or in one batch with QoS 1."""
    ledger.open_to_all.clear()
    wire = Wire()
    async with running(ledger, window=10, max_readings=10) as pipeline:
        pipeline.receive(wire, [reading(f"A{n}") for n in range(15)])
        pipeline.receive(wire, list(readings(1, 25)))
        await ledger.asked.wait()
        pipeline.forget(wire)
        assert (pipeline.outstanding, pipeline.progress.given_back) == (20, 20)
    assert ledger.stored == [*(f"A{n}" for n in range(15)), *(f"M{n}" for n in range(1, 6))]


async def test_two_connections_that_ended_make_one_batch_that_may_be_dropped(ledger: Ledger) -> None:
    ledger.open_to_all.clear()
    first, second = Wire(), Wire()
    async with running(ledger, window=10, max_readings=10) as pipeline:
        pipeline.receive(first, list(readings(1, 10)))
        await ledger.asked.wait()
        pipeline.receive(first, list(readings(11, 13)))
        pipeline.receive(second, list(readings(21, 23)))
        # Half of that batch may still be acknowledged, so it is kept.
        pipeline.forget(first)
        assert pipeline.outstanding == 16
        pipeline.forget(second)
        assert (pipeline.outstanding, pipeline.progress.given_back) == (10, 6)
