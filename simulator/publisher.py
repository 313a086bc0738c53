"""Brings messages to an MQTT 5 broker with QoS 1 and keeps each one until the broker has acknowledged it.

A few connections carry the whole fleet; the messages of one device always take the same one, so their
order holds. What a lost connection leaves unacknowledged is sent again, marked as a duplicate and in its
old order, before anything new. Memory is bounded by the window of each connection and the habit of its
user to `offer` a few hundred messages and then wait for `room`.
"""

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast
from uuid import uuid4
from zlib import crc32

import mqtt5

from simulator.fleet import Message

CONNECT_TIMEOUT_S = 10.0
GOODBYE_S = 1.0
SESSION_EXPIRY_S = 3600
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
SETTLED_AFTER_S = 5.0
FAILURE = 0x80
"""MQTT 5 reason codes from here on are failures (the codec compares them for equality only, hence `int`)."""

FINAL_REFUSALS = (
    mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
    mqtt5.ConnAckReasonCode.CLIENT_ID_NOT_VALID,
    mqtt5.ConnAckReasonCode.BAD_USER_NAME_OR_PASSWORD,
    mqtt5.ConnAckReasonCode.NOT_AUTHORIZED,
    mqtt5.ConnAckReasonCode.BANNED,
    mqtt5.ConnAckReasonCode.BAD_AUTHENTICATION_METHOD,
)
"""Answers to CONNECT that no later attempt would change."""


class RefusedError(Exception):
    """The broker does not want this client; trying again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where to publish and how.

    `window` limits the unacknowledged messages per connection; the broker's own Receive Maximum (20 on a
    Mosquitto as installed) lowers it further.
    """

    host: str = "localhost"
    port: int = 1883
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    connections: int = 2
    window: int = 1000
    keep_alive_s: int = 30

    def __str__(self) -> str:
        """Return the address for messages to people."""
        return f"{self.host}:{self.port}"


@dataclass(slots=True)
class Counters:
    """What became of the messages so far; published = acknowledged + refused + still in flight."""

    published: int = 0
    acknowledged: int = 0
    resent: int = 0
    refused: int = 0
    unheard: int = 0
    """Of the acknowledged ones: the broker said that nobody is subscribed, so they are gone."""


class Connection(asyncio.Protocol):
    """One MQTT connection that comes back whenever it is lost."""

    def __init__(self, broker: Broker, counters: Counters, on_change: Callable[[], None]) -> None:
        """Prepare; `keep_up` connects. `on_change` is called when messages were acknowledged."""
        self._broker = broker
        self._counters = counters
        self._on_change = on_change
        self._client_id = f"wattbridge-simulator-{uuid4().hex[:12]}"
        self._fresh: deque[Message] = deque()
        self._again: deque[tuple[int, Message]] = deque()
        self._in_flight: dict[int, Message] = {}
        self._last_id = 0
        self._window = 0
        self._transport: asyncio.Transport | None = None
        self._unread = b""
        self._heard = 0.0
        self._welcome: asyncio.Future[None]
        self._lost: asyncio.Future[str]
        self._farewell = ""
        self._closing = False

    @property
    def waiting(self) -> int:
        """How many messages have not been sent on this connection yet."""
        return len(self._fresh)

    @property
    def outstanding(self) -> int:
        """How many messages the broker has not acknowledged, sent or not."""
        return len(self._fresh) + len(self._again) + len(self._in_flight)

    def offer(self, message: Message) -> None:
        """Take a message; `flush` sends it."""
        self._fresh.append(message)

    def flush(self) -> None:
        """Send what the window allows in one write: first what must be sent again, then what is new."""
        room = self._window - len(self._in_flight)
        if room <= 0 or not (self._fresh or self._again) or self._transport is None:
            return
        packets = []
        again = min(room, len(self._again))
        for _ in range(again):
            packet_id, message = self._again.popleft()
            packets.append(self._pack(packet_id, message, duplicate=True))
        fresh = min(room - again, len(self._fresh))
        packets += [self._pack(self._next_id(), self._fresh.popleft(), duplicate=False) for _ in range(fresh)]
        self._counters.resent += again
        self._counters.published += fresh
        self._transport.write(b"".join(packets))

    def _pack(self, packet_id: int, message: Message, *, duplicate: bool) -> bytes:
        self._in_flight[packet_id] = message
        return mqtt5.PublishPacket(
            message.topic,
            message.payload,
            qos=mqtt5.QoS.AT_LEAST_ONCE,
            packet_id=packet_id,
            duplicate=duplicate,
        ).write()

    def _next_id(self) -> int:
        while True:
            self._last_id = self._last_id % 0xFFFF + 1
            if self._last_id not in self._in_flight:
                return self._last_id

    async def keep_up(self, report: Callable[[str], None]) -> None:
        """Connect, and connect again after every loss, until closed or cancelled.

        Raises RefusedError where the broker, or its certificate, makes further attempts pointless.
        """
        loop = asyncio.get_running_loop()
        attempts = 0
        while True:
            started = loop.time()
            try:
                await self._connect()
                report(f"connected to {self._broker}")
                trouble = await self._ping_until_lost()
            except ssl.SSLCertVerificationError as error:
                raise RefusedError(
                    f"the certificate of {self._broker} is not trusted: {error.verify_message}"
                ) from error
            except (OSError, TimeoutError) as error:
                trouble = _describe(error)
            finally:
                if self._transport is not None:
                    self._transport.abort()
            if self._closing:
                return
            attempts = 0 if loop.time() - started > SETTLED_AFTER_S else attempts + 1
            report(f"waiting for the broker at {self._broker}: {trouble}")
            longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempts)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret

    async def close(self) -> None:
        """Say goodbye for good; the broker forgets the session. Cancel `keep_up` afterwards."""
        self._closing = True
        if self._transport is not None:
            self._transport.write(mqtt5.DisconnectPacket(session_expiry_interval=0).write())
            self._transport.close()
            await asyncio.wait({self._lost}, timeout=GOODBYE_S)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._welcome, self._lost = loop.create_future(), loop.create_future()
        self._unread = b""
        self._farewell = ""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: self, self._broker.host, self._broker.port, ssl=self._broker.tls)
            await self._welcome

    async def _ping_until_lost(self) -> str:
        loop = asyncio.get_running_loop()
        while not self._lost.done():
            await asyncio.wait({self._lost}, timeout=self._broker.keep_alive_s / 2)
            if self._transport is None:
                continue
            if loop.time() - self._heard > 1.5 * self._broker.keep_alive_s:
                self._farewell = "it went silent"
                self._transport.abort()
                await self._lost
            else:
                self._transport.write(mqtt5.PingReqPacket().write())
        return self._lost.result()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce ourselves; one session for all connections to come, so packet ids keep their meaning."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit it
        self._heard = asyncio.get_running_loop().time()
        password = self._broker.password
        connect = mqtt5.ConnectPacket(
            self._client_id,
            username=self._broker.username,
            password=None if password is None else password.encode(),
            keep_alive=self._broker.keep_alive_s,
            session_expiry_interval=SESSION_EXPIRY_S,
        )
        transport.write(connect.write())

    def data_received(self, data: bytes) -> None:
        """Take the packets of one network chunk, then use the room that they made."""
        self._heard = asyncio.get_running_loop().time()
        view = memoryview(self._unread + data if self._unread else data)
        position = 0
        try:
            while position < len(view):
                packet, size = mqtt5.read(view[position:])
                position += size
                self._take(packet)
        except IndexError:
            pass  # the rest of this packet comes with the next chunk
        except ValueError as error:
            self._farewell = f"it does not speak MQTT 5 ({error})"
            if self._transport is not None:
                self._transport.abort()
            return
        self._unread = bytes(view[position:])
        self.flush()
        self._on_change()

    def _take(self, packet: mqtt5.Packet) -> None:
        match packet:
            case mqtt5.PubAckPacket():
                if self._in_flight.pop(packet.packet_id, None) is None:
                    return
                if int(packet.reason_code) >= FAILURE:
                    self._counters.refused += 1
                    return
                self._counters.acknowledged += 1
                if packet.reason_code == mqtt5.PubAckReasonCode.NO_MATCHING_SUBSCRIBERS:
                    self._counters.unheard += 1
            case mqtt5.ConnAckPacket():
                self._enter(packet)
            case mqtt5.DisconnectPacket():
                self._farewell = f"it ended the connection, {_words(packet.reason_code)}"
            case _:
                pass

    def _enter(self, answer: mqtt5.ConnAckPacket) -> None:
        if self._welcome.done():
            return
        reason = answer.reason_code
        if reason in FINAL_REFUSALS:
            self._welcome.set_exception(RefusedError(f"{self._broker} refused the connection: {_words(reason)}"))
        elif int(reason) >= FAILURE:
            self._welcome.set_exception(ConnectionError(f"it refused the connection: {_words(reason)}"))
        elif answer.max_qos == mqtt5.QoS.AT_MOST_ONCE:
            self._welcome.set_exception(RefusedError(f"{self._broker} does not take QoS 1"))
        else:
            self._window = min(answer.receive_max, self._broker.window)
            self._welcome.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Put what is in flight before everything else, in the order in which it was first sent."""
        self._transport = None
        self._window = 0
        self._again.extendleft(reversed(self._in_flight.items()))
        self._in_flight.clear()
        trouble = self._farewell or (_describe(exc) if exc else "it closed the connection")
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionError(trouble))
        if not self._lost.done():
            self._lost.set_result(trouble)


class Publisher:
    """Several connections as one; an async context manager.

    `on_event` is told in one line whenever the state of the broker changes.
    """

    def __init__(self, broker: Broker, on_event: Callable[[str], None] | None = None) -> None:
        """Prepare; entering the context starts to connect and returns at once."""
        self.counters = Counters()
        self.state = f"connecting to {broker}"
        self._on_event = on_event
        self._changed = asyncio.Event()
        self._window = broker.window
        self._connections = [Connection(broker, self.counters, self._changed.set) for _ in range(broker.connections)]
        self._tasks: list[asyncio.Task[None]] = []
        self.refusal: asyncio.Future[None]
        """Done, with a RefusedError, when the broker does not want us."""

    @property
    def waiting(self) -> int:
        """How many messages were offered and have never been sent."""
        return sum(connection.waiting for connection in self._connections)

    @property
    def outstanding(self) -> int:
        """How many messages were offered and have not been acknowledged."""
        return sum(connection.outstanding for connection in self._connections)

    def offer(self, messages: Iterable[Message]) -> None:
        """Take messages and send what the windows allow; await `room` before offering more."""
        connections = self._connections
        count = len(connections)
        for message in messages:
            connections[crc32(message.topic.encode()) % count].offer(message)
        for connection in connections:
            connection.flush()

    async def room(self) -> None:
        """Wait until no connection has more than a window of messages waiting."""
        await asyncio.sleep(0)
        while any(connection.waiting > self._window for connection in self._connections):
            await self._change()

    async def settled(self) -> None:
        """Wait until every message is acknowledged."""
        while self.outstanding:
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def __aenter__(self) -> Self:
        """Start to connect."""
        self.refusal = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(connection.keep_up(self._report), name=f"mqtt connection {number}")
            for number, connection in enumerate(self._connections, 1)
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        await asyncio.gather(*(connection.close() for connection in self._connections))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.refusal.done():
            self.refusal.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.refusal.done():
            self.refusal.set_exception(error)

    def _report(self, state: str) -> None:
        if state != self.state:
            self.state = state
            if self._on_event is not None:
                self._on_event(state)


def _words(reason: mqtt5.ConnAckReasonCode | mqtt5.DisconnectReasonCode) -> str:
    return reason.name.lower().replace("_", " ")


def _describe(error: BaseException) -> str:
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case TimeoutError():
            return f"no answer within {CONNECT_TIMEOUT_S:g} s"
        case OSError(strerror=str(text)):
            return text
        case _:
            return str(error) or type(error).__name__
