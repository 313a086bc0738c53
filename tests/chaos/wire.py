"""A line to the broker that can be cut in the middle of a packet, go silent, or be slow."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any, Self

from bridge.services import free_port
from tests.integration.harness import PATIENCE_S, Address

PORTION_S = 0.1
"""A slow line carries as much at a time as it takes it so long to carry."""
PORTION = 65_536
NO_LINGER = struct.pack("ii", 1, 0)
"""A socket that is closed with this says RST, not FIN."""


class Way(Enum):
    """Where bytes go."""

    TO_DAEMON = "to the daemon"
    TO_BROKER = "to the broker"


@dataclass(frozen=True, slots=True)
class Slowness:
    """So many bytes a second in each direction, each portion later by up to `jitter_s`."""

    rate: float
    jitter_s: float


@dataclass(slots=True, eq=False)
class _Line:
    """One connection: the daemon's end and the broker's. `silent`: what is sent arrives nowhere, and never will."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    silent: bool = False


@dataclass(slots=True)
class _Fuse:
    """So many bytes more go that way before everything is cut."""

    way: Way
    left: int
    reset: bool


class Wire:
    """A TCP proxy in front of a broker. What it carries means nothing to it.

    It runs in a thread of its own; the methods may be called from any other.
    """

    def __init__(self, broker: Address, chance: Random) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self.was_cut = threading.Event()
        self._broker = broker
        # Of our own: the thread must not disturb the round's.
        self._chance = Random(chance.random())
        self._slowness: Slowness | None = None
        self._fuse: _Fuse | None = None
        self._closing = False
        self._lines: set[_Line] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ask(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._ask(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def cut_after(self, size: int, way: Way, *, reset: bool) -> None:
        """Lets so many bytes more go that way, in the middle of a packet most likely, and ends all connections then.

        With RST or with FIN. New ones are welcome. `was_cut` is set when it has happened.
        """
        self.was_cut.clear()
        self._do(lambda: setattr(self, "_fuse", _Fuse(way, size, reset)))

    def cut(self, *, reset: bool) -> None:
        """Ends all connections now."""
        self._do(lambda: self._cut(reset=reset))

    def go_silent(self) -> None:
        """From here on what is sent arrives nowhere, in both directions, and no connection is answered until `heal`.

        Neither end is told. The connections of now stay so for good, as when a firewall has forgotten them.
        """
        self._do(self._silence)

    def heal(self) -> None:
        """Lets new connections through again."""
        self._do(self._answering.set)

    def slow_down(self, slowness: Slowness | None) -> None:
        """Makes everything slow; None: as fast as it goes again."""
        self._do(lambda: setattr(self, "_slowness", slowness))

    def _do(self, work: Callable[[], object]) -> None:
        async def step() -> None:
            work()

        self._ask(step())

    def _ask(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def _silence(self) -> None:
        self._answering.clear()
        for line in self._lines:
            line.silent = True

    async def _open(self) -> None:
        self._answering = asyncio.Event()
        self._answering.set()
        self._server = await asyncio.start_server(self._serve, self.host, self.port)

    async def _close(self) -> None:
        self._server.close()
        self._closing = True
        self._answering.set()
        self._cut(reset=True)
        if serving := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(serving)

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        await self._answering.wait()
        if self._closing:
            near.transport.abort()
            return
        try:
            answers, far = await asyncio.open_connection(self._broker.host, self._broker.port)
        except OSError:
            near.transport.abort()
            return
        for end in (near, far):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(near, far)
        self._lines.add(line)
        if self._closing:
            _end(line, reset=True)
        ways = (self._carry(line, reader, far, Way.TO_BROKER), self._carry(line, answers, near, Way.TO_DAEMON))
        await asyncio.gather(*ways)
        # A silent line was not closed when an end of it went away. Now both have.
        _end(line, reset=True)
        self._lines.discard(line)

    async def _carry(self, line: _Line, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: Way) -> None:
        """One direction of a connection, until either end has ended it."""
        with contextlib.suppress(OSError):
            while chunk := await source.read(self._portion()):
                await self._linger(len(chunk))
                if line.silent:
                    continue
                fuse = self._fuse if self._fuse and self._fuse.way is way else None
                if fuse and len(chunk) >= fuse.left:
                    target.write(chunk[: fuse.left])
                    # At once: behind a gap nothing may follow.
                    self._cut(reset=fuse.reset)
                    return
                if fuse:
                    fuse.left -= len(chunk)
                target.write(chunk)
                await target.drain()
        if not line.silent:
            # Not at once: what was written is still to arrive.
            target.close()

    def _portion(self) -> int:
        return max(1, int(self._slowness.rate * PORTION_S)) if self._slowness else PORTION

    async def _linger(self, size: int) -> None:
        if slowness := self._slowness:
            await asyncio.sleep(size / slowness.rate + self._chance.uniform(0, slowness.jitter_s))

    def _cut(self, *, reset: bool) -> None:
        self._fuse = None
        for line in self._lines:
            _end(line, reset=reset)
        self.was_cut.set()


def _end(line: _Line, *, reset: bool) -> None:
    """Ends a connection at both ends; what was written and is not on its way yet is lost."""
    for end in (line.near, line.far):
        if not end.transport.is_closing():
            if reset:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            end.transport.abort()
