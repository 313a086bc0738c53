"""Runs a fleet against a broker: sets the pace, knows when to stop, counts.

Simulated time never runs ahead of the wall clock, because a bridge rejects readings from the future. A run
that is faster than real time therefore starts in the past, and goes on in real time once it has caught up
with now.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import Any

from simulator.connection import Broker
from simulator.devices import Devices, allow_files, identify
from simulator.faults import FaultConfig, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.ledger import LedgerWriter, acks_path
from simulator.messages import SLOT_BYTES, Link, Message, SlotType
from simulator.pool import Pool
from simulator.publisher import Publisher

TICK_S = 0.01
CHUNK = 500
"""Messages that are generated before the event loop has its turn."""

GRACE_S = 10.0
"""How long the end of a run waits for acknowledgements."""

HISTORY = timedelta(hours=23)
"""How far in the past a run that is faster than real time starts, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run.

    Pace: `rate` messages a second, else `speedup` simulated seconds a second, else (both None) as fast as the
    broker acknowledges. It ends after `duration` real seconds or `messages`, whichever is first. `ledger` is a
    file that does not exist yet.
    """

    fleet: FleetConfig
    broker: Broker
    faults: FaultConfig = field(default_factory=FaultConfig)
    speedup: float | None = 1.0
    rate: float | None = None
    duration: float | None = None
    messages: int | None = None
    ledger: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run so far, or as a whole: published = acknowledged + refused + those still in flight."""

    published: int
    acknowledged: int
    resent: int
    refused: int
    unheard: int
    """Of the acknowledged ones: the broker said that nobody is subscribed, so they are gone."""
    unsent: int
    """Generated, but never sent."""
    readings: int
    """In the messages that were generated, those that keep the contract; an array has several."""
    rate: float
    """Acknowledged messages a second: since the last report, or over the whole run at its end."""
    elapsed_s: float
    """Since the first message could be sent."""
    simulated_s: float
    simulated_until: datetime
    state: str
    """The broker, in words."""
    reached: bool
    """Whether every connection has been accepted, at some time."""
    ledger: Path | None

    @property
    def complete(self) -> bool:
        """Whether the broker has taken every message."""
        return self.acknowledged == self.published and not self.unsent and (self.published > 0 or self.reached)


class Pace:
    """Says how far simulated time may go, and how many messages may be sent, right now."""

    def __init__(self, options: Options) -> None:
        """Start the clocks."""
        self._speedup = None if options.rate is not None else options.speedup
        self._rate = options.rate
        self._hurries = self._speedup is None or self._speedup > 1
        self._start = options.fleet.start.timestamp()
        self._began = self._last = time.monotonic()
        self._allowance = 1.0

    def horizon(self) -> float:
        """Return the simulated milliseconds since the start that may be published by now."""
        clock = self._clock()
        return clock if self._speedup is None else min(clock, (time.monotonic() - self._began) * self._speedup * 1000)

    def caught_up(self, due: int) -> bool:
        """Return whether a run that is faster than real time has to wait for the clock with what is `due`."""
        return self._hurries and due > self._clock()

    def _clock(self) -> float:
        """Return the milliseconds since the start by the clock on the wall, which no reading may be ahead of."""
        return (time.time() - self._start) * 1000

    def budget(self) -> int:
        """Return how many messages the rate allows now; a stall saves up one second of them at most."""
        if self._rate is None:
            return CHUNK
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._last) * self._rate, max(self._rate, 1.0))
        self._last = now
        return min(int(self._allowance), CHUNK)

    def spend(self, messages: int) -> None:
        """Take `messages` off the budget."""
        if self._rate is not None:
            self._allowance -= messages


class Run:
    """One run, from the first message to the last acknowledgement."""

    def __init__(
        self,
        options: Options,
        fleet: Fleet,
        pool: Pool,
        ledger: LedgerWriter | None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a run of `options` through `pool`."""
        self._on_event = on_event
        self._options = options
        self._fleet = fleet
        self._pool = pool
        self._ledger = ledger
        self._began: float | None = None
        self._due = 0
        self._readings = 0

    async def produce(self) -> None:
        """Generate and publish at the pace until the limit, then wait until everything is acknowledged.

        Can be cancelled at any await: whatever is in the ledger has been handed to the pool.

        Raises:
            LedgerError: the ledger cannot be written; the messages in question have not been sent.
        """
        await self._pool.ready()
        self._began = time.monotonic()
        pace = Pace(self._options)
        stream = messages(self._fleet, self._options.faults)
        item = next(stream)
        left = self._options.messages
        while left is None or left:
            horizon, budget = pace.horizon(), pace.budget()
            if left is not None:
                budget = min(budget, left)
            batch: list[Message] = []
            taken = 0
            while taken < budget and item.due <= horizon:
                if isinstance(item, Link):
                    self._hand_over(batch)
                    batch = []
                    self._pool.link(item)
                else:
                    batch.append(item)
                    taken += 1
                item = next(stream)
            self._hand_over(batch)
            pace.spend(taken)
            if left is not None:
                left -= taken
            if self._on_event is not None and pace.caught_up(item.due):
                self._on_event("the fleet has caught up with the clock: real time from here on")
                self._on_event = None
            if taken:
                await self._pool.room()
            if taken < CHUNK:
                await asyncio.sleep(TICK_S)
        await self._pool.settled()

    def _hand_over(self, batch: list[Message]) -> None:
        """Write messages to the ledger and only then let them go."""
        if not batch:
            return
        if self._ledger is not None:
            self._ledger.record(batch)
        self._pool.offer(batch)
        slots = b"".join([message.entries for message in batch])
        self._readings += slots[SLOT_BYTES - 1 :: SLOT_BYTES].count(SlotType.READING)
        self._due = batch[-1].due

    async def time_out(self) -> None:
        """Return when the duration is over; it counts anew from when the first message could be sent."""
        duration = self._options.duration
        with suppress(TimeoutError):
            await asyncio.wait_for(self._pool.ready(), duration)
            await asyncio.sleep(inf if duration is None else duration)

    async def report(self, on_progress: Callable[[Summary], None]) -> None:
        """Call `on_progress` once a second until cancelled."""
        acknowledged, at = 0, time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now, summary = time.monotonic(), self.summary()
            on_progress(replace(summary, rate=(summary.acknowledged - acknowledged) / (now - at)))
            acknowledged, at = summary.acknowledged, now

    def summary(self) -> Summary:
        """Return the counters as they are now."""
        counters = self._pool.counters
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        return Summary(
            published=counters.published,
            acknowledged=counters.acknowledged,
            resent=counters.resent,
            refused=counters.refused,
            unheard=counters.unheard,
            unsent=self._pool.waiting,
            readings=self._readings,
            rate=counters.acknowledged / elapsed if elapsed else 0.0,
            elapsed_s=elapsed,
            simulated_s=self._due / 1000,
            simulated_until=self._options.fleet.start + timedelta(milliseconds=self._due),
            state=self._pool.state,
            reached=self._pool.reached,
            ledger=self._options.ledger,
        )


async def simulate(
    options: Options,
    on_progress: Callable[[Summary], None] | None = None,
    *,
    on_event: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> Summary:
    """Publish the fleet until the limits of `options` or until `stop` is set, and return what happened.

    `on_progress` gets the counters every second, `on_event` a line whenever the broker comes or goes. The end
    waits up to `GRACE_S` for acknowledgements. However it ends, the ledger is one that can be read; there is
    none where the broker turned us away, or was never reached, and nothing was sent.

    Raises:
        RefusedError: the broker turns this client, or a device, away for good.
        LedgerError: the ledger cannot be made or written.
        LimitError: the operating system does not allow so many connections.
        OSError: nobody reads the progress any more.
    """
    fleet = Fleet(options.fleet)
    if options.broker.connections is None:
        allow_files(len(fleet.encoder.ids))
    with ExitStack() as at_last, _open_ledger(options, fleet) as ledger:
        async with _pool(options, on_event, ledger) as pool:
            try:
                run = Run(options, fleet, pool, ledger, on_event)
                return await _run(run, pool, on_progress, stop or asyncio.Event())
            finally:
                if options.ledger is not None and not pool.counters.published and not pool.reached:
                    # The next attempt, with the right host or password, shall not find it in its way.
                    for file in (options.ledger, acks_path(options.ledger)):
                        at_last.callback(file.unlink, missing_ok=True)


async def _run(run: Run, pool: Pool, on_progress: Callable[[Summary], None] | None, stop: asyncio.Event) -> Summary:
    """Let a run take its course, until whatever ends it comes first."""
    producing = asyncio.create_task(run.produce(), name="produce")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    timing = asyncio.create_task(run.time_out(), name="time out")
    # It ends only by an error: nobody reads the output any more.
    reporting = asyncio.create_task(run.report(on_progress or (lambda _: None)), name="report")
    tasks: list[asyncio.Task[Any]] = [producing, stopping, timing, reporting]
    try:
        await asyncio.wait({*tasks, pool.refusal}, return_when=asyncio.FIRST_COMPLETED)
        await _finish(pool, producing)
        if reporting.done():
            reporting.result()
        return run.summary()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _finish(pool: Pool, producing: asyncio.Task[None]) -> None:
    """Wait for what is on the way, and raise what ended the run."""
    if pool.refusal.done():
        await pool.refusal
    failure = producing.exception() if producing.done() else None
    if producing.done() and failure is None:
        return
    producing.cancel()
    if pool.reached or pool.counters.published:
        with suppress(TimeoutError):
            await asyncio.wait_for(pool.settled(), GRACE_S)
    if failure is not None:
        raise failure


@contextmanager
def _open_ledger(options: Options, fleet: Fleet) -> Iterator[LedgerWriter | None]:
    """Hold the ledger of a run, if it shall have one."""
    path = options.ledger
    if path is None:
        yield None
        return
    config = options.fleet
    header = {
        "meter_ids": config.meter_ids,
        "vehicle_ids": config.vehicle_ids,
        "topic_root": config.topic_root,
        "start": config.start.isoformat(),
        "seed": config.seed,
        "interval_s": config.interval.total_seconds(),
        "faulty": fleet.faulty,
        "faults": asdict(options.faults),
        "faulty_share": config.faulty_share,
        "shared_share": config.shared_share,
    }
    with LedgerWriter(path, header) as ledger:
        yield ledger


def _pool(options: Options, on_event: Callable[[str], None] | None, ledger: LedgerWriter | None) -> Pool:
    settle = None if ledger is None else ledger.settle
    if options.broker.connections is not None:
        return Publisher(options.broker, on_event, settle)
    config = options.fleet
    identities = identify(options.broker, config.topic_root, config.meter_ids, config.vehicle_ids)
    return Devices(options.broker, identities, on_event, settle)


def default_start(*, faster_than_real_time: bool) -> datetime:
    """Return the minute at which a run starts when nobody says so: this one, or `HISTORY` ago."""
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    return now - HISTORY if faster_than_real_time else now
