"""One MQTT 5 connection that comes back whenever it is lost, and sends again what was not acknowledged."""

import asyncio
import random
import ssl
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import mqtt5

from simulator.messages import Message

CONNECT_TIMEOUT_S = 10.0
SESSION_EXPIRY_S = 3600
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
SETTLED_AFTER_S = 5.0
SILENT_BEATS = 3
"""A beat is half a keep-alive; after so many of them without a word the connection is given up."""

FAILURE = 0x80
"""MQTT 5 reason codes from here on are failures (the codec compares them for equality only, hence `int`)."""

ACKNOWLEDGED, REFUSED, UNHEARD = 1, 2, 3
"""What becomes of a message, as plain numbers: they are passed on for each PUBACK."""

ONLINE, OFFLINE = b"online", b"offline"

FINAL_REFUSALS = (
    mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
    mqtt5.ConnAckReasonCode.CLIENT_ID_NOT_VALID,
    mqtt5.ConnAckReasonCode.BAD_USER_NAME_OR_PASSWORD,
    mqtt5.ConnAckReasonCode.NOT_AUTHORIZED,
    mqtt5.ConnAckReasonCode.BANNED,
    mqtt5.ConnAckReasonCode.BAD_AUTHENTICATION_METHOD,
    mqtt5.ConnAckReasonCode.RETAIN_NOT_SUPPORTED,
)
"""Answers to CONNECT that no later attempt would change."""


class RefusedError(Exception):
    """The broker does not want this client; trying again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where to publish, as whom and over how many connections.

    `connections` None gives every device one of its own; then `client_id`, `username` and `password` are
    templates in which `{device_id}` and `{kind}` stand for the device. `window` limits the unacknowledged
    messages per connection; the broker's own Receive Maximum (20 on a Mosquitto as installed) lowers it
    further.
    """

    host: str = "localhost"
    port: int = 1883
    client_id: str | None = None
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    connections: int | None = 2
    window: int = 1000
    keep_alive_s: int = 30

    def __str__(self) -> str:
        """Return the address for messages to people."""
        return f"{self.host}:{self.port}"


class Identity(NamedTuple):
    """Who a connection is to the broker."""

    client_id: str
    username: str | None = None
    password: str | None = None
    status: str | None = None
    """The topic, if any, that says `online` or `offline`: retained, `offline` is the last will, too."""
    device_id: str | None = None
    """The device to which the connection belongs, if it is one device's."""


@dataclass(slots=True)
class Counters:
    """What became of the messages so far; published = acknowledged + refused + still in flight."""

    offered: int = 0
    published: int = 0
    acknowledged: int = 0
    resent: int = 0
    refused: int = 0
    unheard: int = 0
    """Of the acknowledged ones: the broker said that nobody is subscribed, so they are gone."""


class Owner(Protocol):
    """Who holds a connection, and what it is told."""

    counters: Counters
    gate: asyncio.Semaphore
    """Passed while connecting: so many at a time."""
    spread_s: float
    """Over what time all connections of the owner come back after they were lost together."""

    def settle(self, number: int, outcome: int, /) -> None:
        """Message `number` got its PUBACK, for the first time."""

    def entered(self) -> None:
        """The broker has accepted a connection."""

    def left(self) -> None:
        """A connection that was accepted has ended."""

    def troubled(self, trouble: str, /) -> None:
        """A connection was lost or not made, and it is going to be tried again."""

    def changed(self) -> None:
        """Messages may have been acknowledged."""


class Connection(asyncio.Protocol):
    """One MQTT connection and the messages that go through it, in the order in which they were offered."""

    def __init__(self, broker: Broker, identity: Identity, owner: Owner) -> None:
        """Prepare; `keep_up` connects."""
        self._broker = broker
        self._identity = identity
        self._owner = owner
        self._counters = owner.counters
        self._settle = owner.settle
        self._fresh: deque[Message] = deque()
        self._again: deque[tuple[int, Message]] = deque()
        # Under None: what the connection says of itself, which no later connection repeats.
        self._in_flight: dict[int, Message | None] = {}
        self._last_id = 0
        self._goodbye_id = 0
        self._window = 0
        self._transport: asyncio.Transport | None = None
        self._unread = b""
        self._beat_s = 0.0
        self._beats: asyncio.TimerHandle | None = None
        self._silent_beats = 0
        self._sent = False
        self._welcome: asyncio.Future[None]
        self._lost: asyncio.Future[str]
        self._farewell = ""
        self._network = asyncio.Event()
        self._network.set()
        self._was_cut = False
        self._closing = False

    @property
    def outstanding(self) -> int:
        """How many messages the broker has not acknowledged, sent or not; counts them one by one."""
        in_flight = sum(message is not None for message in self._in_flight.values())
        return len(self._fresh) + len(self._again) + in_flight

    @property
    def accepted(self) -> bool:
        """Whether the broker has accepted the connection, and it has not ended."""
        return self._window > 0

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
        self._sent = True
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

    async def keep_up(self) -> None:
        """Connect, and connect again after every loss, until closed or cancelled.

        Raises:
            RefusedError: the broker, or its certificate, makes further attempts pointless.
        """
        loop = asyncio.get_running_loop()
        attempts = 0
        while not self._closing:
            while not self._network.is_set():  # it may be gone again by the time that we are woken
                await self._network.wait()
            self._was_cut = False
            started = loop.time()
            try:
                async with self._owner.gate:
                    await self._connect()
                self._owner.entered()
                if self._closing:
                    self.close()
                try:
                    trouble = await self._lost
                finally:
                    self._owner.left()
            except ssl.SSLCertVerificationError as error:
                raise RefusedError(
                    f"the certificate of {self._broker} is not trusted: {error.verify_message}"
                ) from error
            except UnicodeError as error:
                raise RefusedError(f"{self._broker.host!r} cannot be the name of a host") from error
            except (OSError, TimeoutError) as error:
                trouble = _describe(error)
            finally:
                if self._transport is not None:
                    self._transport.abort()
            if self._closing or self._was_cut:
                continue
            attempts = 0 if loop.time() - started > SETTLED_AFTER_S else attempts + 1
            self._owner.troubled(trouble)
            longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempts)
            # Jitter, so that they do not all come at once; nothing secret.
            delay = longest * random.uniform(0.5, 1.0) + self._owner.spread_s * random.random()  # noqa: S311
            await asyncio.sleep(delay)

    def cut(self) -> None:
        """Lose the network: no goodbye, so the broker publishes the last will. Nothing is sent until `restore`."""
        self._network.clear()
        self._was_cut = True
        self._window = 0
        if self._transport is not None:
            self._transport.abort()

    def restore(self) -> None:
        """Have the network again; `keep_up` connects, and what was kept goes out."""
        self._network.set()

    def close(self) -> None:
        """Say goodbye for good; the broker forgets the session. The owner is told when the connection has left."""
        self._closing = True
        if self._transport is None or not self._window:
            return
        if self._identity.status is None:
            self._disconnect(mqtt5.DisconnectReasonCode.NORMAL_DISCONNECTION)
        elif len(self._in_flight) < self._window:
            self._goodbye_id = self._say(OFFLINE)
        else:
            self._disconnect(mqtt5.DisconnectReasonCode.DISCONNECT_WITH_WILL_MESSAGE)

    def _disconnect(self, reason: mqtt5.DisconnectReasonCode) -> None:
        if self._transport is not None:
            self._transport.write(mqtt5.DisconnectPacket(reason_code=reason, session_expiry_interval=0).write())
            self._transport.close()

    def _say(self, status: bytes) -> int:
        """Publish our status, retained, and return the packet id under which it will be acknowledged."""
        packet_id = self._next_id()
        self._in_flight[packet_id] = None
        if self._identity.status is not None and self._transport is not None:
            packet = mqtt5.PublishPacket(
                self._identity.status, status, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True, packet_id=packet_id
            )
            self._transport.write(packet.write())
        return packet_id

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._welcome, self._lost = loop.create_future(), loop.create_future()
        self._unread = b""
        self._farewell = ""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: self, self._broker.host, self._broker.port, ssl=self._broker.tls)
            await self._welcome

    def _beat(self) -> None:
        """Ping where nothing was sent since the last beat; end where nothing was heard for several."""
        if self._transport is None:
            return
        self._silent_beats += 1
        if self._silent_beats > SILENT_BEATS:
            self._farewell = "it went silent"
            self._transport.abort()
            return
        if not self._sent:
            self._transport.write(mqtt5.PingReqPacket().write())
        self._sent = False
        self._beats = asyncio.get_running_loop().call_later(self._beat_s, self._beat)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce ourselves; one session for all connections to come, so packet ids keep their meaning."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit it
        if self._was_cut:
            transport.abort()
            return
        _, username, password, status, _ = self._identity
        will = None
        if status is not None:
            will = mqtt5.Will(status, payload=OFFLINE, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True)
        connect = mqtt5.ConnectPacket(
            self._identity.client_id,
            username=username,
            password=None if password is None else password.encode(),
            will=will,
            keep_alive=self._broker.keep_alive_s,
            session_expiry_interval=SESSION_EXPIRY_S,
        )
        transport.write(connect.write())

    def data_received(self, data: bytes) -> None:
        """Take the packets of one network chunk, then use the room that they made."""
        if not self._network.is_set():
            return  # what was on the way when the network went does not arrive
        self._silent_beats = 0
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
        self._owner.changed()

    def _take(self, packet: mqtt5.Packet) -> None:
        match packet:
            case mqtt5.PubAckPacket():
                self._note(packet.packet_id, packet.reason_code)
            case mqtt5.ConnAckPacket():
                self._enter(packet)
            case mqtt5.DisconnectPacket():
                self._farewell = f"it ended the connection, {_words(packet.reason_code)}"
            case _:
                pass

    def _note(self, packet_id: int, reason: mqtt5.PubAckReasonCode) -> None:
        message = self._in_flight.pop(packet_id, None)
        if message is None:
            if packet_id == self._goodbye_id:
                self._disconnect(mqtt5.DisconnectReasonCode.NORMAL_DISCONNECTION)
        elif int(reason) >= FAILURE:
            self._counters.refused += 1
            self._settle(message.number, REFUSED)
        else:
            self._counters.acknowledged += 1
            if reason == mqtt5.PubAckReasonCode.NO_MATCHING_SUBSCRIBERS:
                self._counters.unheard += 1
                self._settle(message.number, UNHEARD)
            else:
                self._settle(message.number, ACKNOWLEDGED)

    def _enter(self, answer: mqtt5.ConnAckPacket) -> None:
        if self._welcome.done():
            return
        reason = answer.reason_code
        if reason in FINAL_REFUSALS:
            whose = f" of {self._identity.device_id}" if self._identity.device_id else ""
            self._welcome.set_exception(RefusedError(f"{self._broker} refused the connection{whose}: {_words(reason)}"))
        elif int(reason) >= FAILURE:
            self._welcome.set_exception(ConnectionError(f"it refused the connection: {_words(reason)}"))
        elif answer.max_qos == mqtt5.QoS.AT_MOST_ONCE:
            self._welcome.set_exception(RefusedError(f"{self._broker} does not take QoS 1"))
        else:
            self._window = min(answer.receive_max, self._broker.window)
            self._beat_s = (answer.server_keep_alive or self._broker.keep_alive_s) / 2
            self._silent_beats, self._sent = 0, True
            self._beats = asyncio.get_running_loop().call_later(self._beat_s * random.random(), self._beat)  # noqa: S311
            if self._identity.status is not None:
                self._say(ONLINE)
            self._welcome.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Put what is in flight before everything else, in the order in which it was first sent."""
        self._transport = None
        self._window = 0
        if self._beats is not None:
            self._beats.cancel()
        unfinished = [(packet_id, message) for packet_id, message in self._in_flight.items() if message is not None]
        self._again.extendleft(reversed(unfinished))
        self._in_flight.clear()
        trouble = self._farewell or (_describe(exc) if exc else "it closed the connection")
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionError(trouble))
            self._welcome.exception()  # retrieved: whoever waited may have been told to stop meanwhile
        if not self._lost.done():
            self._lost.set_result(trouble)


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
