"""Runs a fleet against a broker: sets the pace, knows when to stop, counts.

Simulated time never runs ahead of the wall clock, because a bridge rejects readings from the future. A run
that is faster than real time therefore starts in the past, and goes on in real time once it has caught up
with now.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from simulator.fleet import Fleet, FleetConfig, Message
from simulator.publisher import Broker, Publisher

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
    broker acknowledges. It ends after `duration` real seconds or `messages`, whichever is first.
    """

    fleet: FleetConfig
    broker: Broker
    speedup: float | None = 1.0
    rate: float | None = None
    duration: float | None = None
    messages: int | None = None


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
    rate: float
    """Acknowledged messages a second: since the last report, or over the whole run at its end."""
    elapsed_s: float
    simulated_s: float
    simulated_until: datetime
    state: str
    """The broker, in words."""

    @property
    def complete(self) -> bool:
        """Whether the broker has taken every message."""
        return self.acknowledged == self.published and not self.unsent


class Pace:
    """Says how far simulated time may go, and how many messages may be sent, right now."""

    def __init__(self, options: Options) -> None:
        """Start the clocks."""
        self._speedup = None if options.rate is not None else options.speedup
        self._rate = options.rate
        self._start = options.fleet.start.timestamp()
        self._began = self._last = time.monotonic()
        self._allowance = 1.0

    def horizon(self) -> float:
        """Return the simulated seconds since the start that may be published by now."""
        wall = time.time() - self._start
        return wall if self._speedup is None else min(wall, (time.monotonic() - self._began) * self._speedup)

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

    def __init__(self, options: Options, publisher: Publisher) -> None:
        """Prepare a run of `options` through `publisher`."""
        self._options = options
        self._publisher = publisher
        self._began = time.monotonic()
        self._simulated_s = 0.0

    async def produce(self) -> None:
        """Generate and publish at the pace until the limit, then wait until everything is acknowledged.

        Can be cancelled at any await: whatever was generated has been handed to the publisher.
        """
        publisher = self._publisher
        pace = Pace(self._options)
        stream = islice(Fleet(self._options.fleet), self._options.messages)
        message = next(stream, None)
        while message is not None:
            horizon, budget = pace.horizon(), pace.budget()
            batch: list[Message] = []
            while message is not None and message.due <= horizon and len(batch) < budget:
                batch.append(message)
                message = next(stream, None)
            if batch:
                publisher.offer(batch)
                pace.spend(len(batch))
                self._simulated_s = batch[-1].due
                await publisher.room()
            if len(batch) < CHUNK:
                await asyncio.sleep(TICK_S)
        await publisher.settled()

    async def report(self, on_progress: Callable[[Summary], None]) -> None:
        """Call `on_progress` once a second until cancelled."""
        before = self.summary()
        while True:
            await asyncio.sleep(1.0)
            now = self.summary()
            took = now.elapsed_s - before.elapsed_s
            on_progress(replace(now, rate=(now.acknowledged - before.acknowledged) / took))
            before = now

    def summary(self) -> Summary:
        """Return the counters as they are now."""
        counters = self._publisher.counters
        elapsed = time.monotonic() - self._began
        return Summary(
            published=counters.published,
            acknowledged=counters.acknowledged,
            resent=counters.resent,
            refused=counters.refused,
            unheard=counters.unheard,
            unsent=self._publisher.waiting,
            rate=counters.acknowledged / elapsed if elapsed else 0.0,
            elapsed_s=elapsed,
            simulated_s=self._simulated_s,
            simulated_until=self._options.fleet.start + timedelta(seconds=self._simulated_s),
            state=self._publisher.state,
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
    waits up to `GRACE_S` for acknowledgements. Raises RefusedError when the broker turns this client away for
    good.
    """
    async with Publisher(options.broker, on_event) as publisher:
        run = Run(options, publisher)
        producing = asyncio.create_task(run.produce(), name="produce")
        stopping = asyncio.create_task((stop or asyncio.Event()).wait(), name="stop")
        tasks: list[asyncio.Task[Any]] = [producing, stopping]
        if on_progress is not None:
            tasks.append(asyncio.create_task(run.report(on_progress), name="report"))
        try:
            endings: set[asyncio.Future[Any]] = {producing, stopping, publisher.refusal}
            await asyncio.wait(endings, timeout=options.duration, return_when=asyncio.FIRST_COMPLETED)
            if publisher.refusal.done():
                await publisher.refusal
            if producing.done():
                await producing
            else:
                producing.cancel()
                with suppress(TimeoutError):
                    await asyncio.wait_for(publisher.settled(), GRACE_S)
            return run.summary()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def default_start(*, faster_than_real_time: bool) -> datetime:
    """Return the minute at which a run starts when nobody says so: this one, or `HISTORY` ago."""
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    return now - HISTORY if faster_than_real_time else now
