"""Several connections to a broker as one: who waits for what, and how they begin and end together."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from simulator.connection import Broker, Connection, Counters, Identity
from simulator.messages import Link, Message

AT_A_TIME = 64
"""Connections that are being made at any moment; brokers accept about a hundred waiting ones."""

MADE_IN_A_SECOND = 2000
"""How fast connections that were lost together may come back, and how fast they are expected to say goodbye."""

GOODBYE_S = 1.0
LIMIT = 20_000


class Pool(ABC):
    """Connections that share counters and a limit of messages; an async context manager.

    `on_event` is told in one line whenever the state of the broker changes; `settle` gets the number of each
    message and what became of it, once, see `Outcome` of the ledger.
    """

    def __init__(
        self,
        broker: Broker,
        identities: Sequence[Identity],
        *,
        on_event: Callable[[str], None] | None = None,
        settle: Callable[[int, int], None] | None = None,
        limit: int = LIMIT,
    ) -> None:
        """Prepare; entering the context starts to connect and returns at once."""
        self.counters = Counters()
        self.settle = settle or _ignore
        self.state = f"connecting to {broker}"
        self.gate = asyncio.Semaphore(AT_A_TIME)
        self.spread_s = len(identities) / MADE_IN_A_SECOND
        self.connected = 0
        """Connections that the broker has accepted."""
        self.refusal: asyncio.Future[None]
        """Done, with a RefusedError, when the broker does not want us."""
        self._broker = broker
        self._on_event = on_event
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._limit = limit
        self._connections = [Connection(broker, identity, self) for identity in identities]
        self._complete = False
        self._cut = 0
        """Connections without a network."""
        self._held = 0
        """Messages that they hold."""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def reached(self) -> bool:
        """Whether every connection has been accepted, at some time."""
        return self._ready.is_set()

    @property
    def waiting(self) -> int:
        """How many messages were offered and have never been sent."""
        return self.counters.offered - self.counters.published

    @property
    def outstanding(self) -> int:
        """How many messages were offered and have not been acknowledged."""
        return self.counters.offered - self.counters.acknowledged - self.counters.refused

    @abstractmethod
    def offer(self, messages: Sequence[Message]) -> None:
        """Take messages and send what the windows allow; await `room` before offering more."""

    @abstractmethod
    def link(self, link: Link) -> None:
        """Let a device lose or regain its network."""

    @abstractmethod
    async def ready(self) -> None:
        """Wait until it makes sense to offer messages."""

    async def room(self) -> None:
        """Wait until few enough messages are outstanding; those of devices without a network do not count."""
        await asyncio.sleep(0)
        while self.outstanding - self._held > self._limit:
            await self._change()

    async def settled(self) -> None:
        """Wait until every message is acknowledged."""
        while self.outstanding:
            await self._change()

    def entered(self) -> None:
        """Count a connection that the broker has accepted."""
        self.connected += 1
        if not self._complete and self.connected >= len(self._connections) - self._cut:
            self._complete = True
            self._ready.set()
            self._report(self._welcome())
        self.changed()

    def left(self) -> None:
        """Count a connection that has ended."""
        self.connected -= 1
        self.changed()

    def troubled(self, trouble: str) -> None:
        """Report that a connection was lost, or could not be made."""
        self._complete = False
        self._report(f"waiting for the broker at {self._broker}: {trouble}")

    def changed(self) -> None:
        """Wake whoever waits for room or for the end."""
        self._changed.set()

    async def __aenter__(self) -> Self:
        """Start to connect."""
        self.refusal = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(connection.keep_up()) for connection in self._connections]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S + len(self._connections) / MADE_IN_A_SECOND):
                while self.connected:
                    await self._change()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.refusal.done():
            self.refusal.cancel()

    def _welcome(self) -> str:
        return f"connected to {self._broker}"

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.refusal.done():
            self.refusal.set_exception(error)

    def _report(self, state: str) -> None:
        if state != self.state:
            self.state = state
            if self._on_event is not None:
                self._on_event(state)


def _ignore(_number: int, _outcome: int) -> None:
    """Nobody asked what became of a message."""
