"""Short visits to the broker that try what it does with a session, for `wattbridge check`.

They have client ids of their own, leave the daemon's session alone, and speak on one topic that is theirs. What they
need of the broker is gone when they are, or ten minutes later where this process was killed.
"""

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence, Sized
from contextlib import asynccontextmanager
from typing import NamedTuple

import mqtt5
from mqtt5 import QoS, RetainHandling

from bridge.config import Mqtt
from bridge.connection import FAILURE, Connection, ConnectionLostError, Deliver, words
from bridge.errors import BrokerRefusedError
from bridge.mqtt import OFFLINE, Session, tls_context

# How long the broker keeps what we try it with, where we were killed and cannot take it away.
SCRATCH_S = 600
# Longest wait for one message to come back at once, and for a broker to hang up after our goodbye.
PROMPT_S = 2.0
# Nothing came for so long: ask whether anything is still to come.
QUIET_S = 0.3
# Most messages on their way to the broker, where it takes more.
MOST_UNANSWERED = 1_000
# What can go wrong on a visit, and is a finding.
VISIT_ERRORS = (OSError, ConnectionLostError, BrokerRefusedError)

VERSION = "$SYS/broker/version"
UPTIME = "$SYS/broker/uptime"
DROPPED = "$SYS/broker/publish/messages/dropped"


class NotObservedError(ConnectionLostError):
    """Something cannot be seen from here. The message says why."""


class ForeignSessionError(Exception):
    """The broker has a session for us already, so it may be somebody else's: it was left as it is."""


class Welcome(NamedTuple):
    """What the broker says of itself when it lets us in."""

    shared_subscriptions: bool
    retains: bool


class Kept(NamedTuple):
    """What became of messages for a session that was away. `refusals`: how often the broker said which words."""

    published: int
    kept: int
    size: int
    refusals: dict[str, int]


class Resumed(NamedTuple):
    """How long the broker promises to keep a session, in seconds, and whether it knew it when we came again."""

    granted_s: int
    present: bool


class Traffic(NamedTuple):
    """What came, from everybody, in `seconds`."""

    messages: int
    size: int
    seconds: float


class Probe:
    """Visits a broker. Nothing may be left there: call `tidy` at the end, whatever happened.

    `topic` is one that nobody else publishes to.
    """

    def __init__(self, config: Mqtt, topic: str) -> None:
        self._mqtt = config.model_copy(
            update={
                "client_id": check_id(config),
                # As a member of the group it would be dealt messages that are the daemons'.
                "share_group": None,
            }
        )
        self._sender_id = f"{config.client_id[:120]}-probe"
        self._topic = topic
        self._scratch_s = min(SCRATCH_S, config.session_expiry_s)
        self._entered = False

    async def enter(self, telemetry: Sequence[str], statuses: Sequence[str]) -> Welcome:
        """Connects and subscribes as the daemon does.

        Raises OSError, ConnectionLostError or BrokerRefusedError with what the daemon would say, ForeignSessionError
        where the session that we would try things with may be somebody else's, ConfigError where the TLS files are of
        no use.
        """
        entrance = _Entrance(self._mqtt, telemetry, statuses, self._scratch_s)
        try:
            connection = await entrance.connect()
        finally:
            self._entered = entrance.entered
        welcome = connection.connected.result()
        await connection.disconnect(self._mqtt.connect_timeout_s)
        return Welcome(welcome.shared_subscription_available, welcome.retain_available)

    async def tidy(self) -> None:
        """Takes away the session that was tried. Where the broker cannot be reached, it goes by itself."""
        if self._entered:
            with contextlib.suppress(*VISIT_ERRORS):
                async with self._visit(self._mqtt.client_id):
                    pass

    async def resume(self) -> Resumed:
        """Asks for a session as long as the daemon's, goes, and comes again.

        Raises OSError, ConnectionLostError or BrokerRefusedError, as all the following do.
        """
        asked_s = self._mqtt.session_expiry_s
        async with self._visit(self._mqtt.client_id, expiry_s=asked_s, kept_s=self._scratch_s) as visit:
            granted_s = visit.connected.result().session_expiry_interval
        async with self._visit(self._mqtt.client_id, clean_start=False, expiry_s=self._scratch_s, kept_s=0) as visit:
            present = visit.connected.result().session_present
        return Resumed(asked_s if granted_s is None else granted_s, present)

    async def server(self) -> dict[str, str]:
        """What the broker tells about itself, by topic; nothing where a rule forbids it, or it is no Mosquitto."""
        said: dict[str, str] = {}

        def take(_: Connection, publications: Sequence[mqtt5.PublishPacket]) -> None:
            said.update((each.topic, each.payload.decode(errors="replace")) for each in publications)

        topics = [VERSION, UPTIME, DROPPED]
        async with self._visit(self._mqtt.client_id, deliver=take) as visit:
            await visit.subscribe([mqtt5.TopicFilter(topic, max_qos=QoS.AT_MOST_ONCE) for topic in topics])
            await visit.until(lambda: len(said) == len(topics), QUIET_S)
        return said

    async def listen(self, patterns: Sequence[str], seconds: float) -> Traffic:
        """Counts what comes by itself, at QoS 0: nothing has to be acknowledged, and nothing is kept for us."""
        messages = size = 0

        def take(_: Connection, publications: Sequence[mqtt5.PublishPacket]) -> None:
            nonlocal messages, size
            messages += len(publications)
            size += sum(len(each.payload) for each in publications)

        filters = [
            mqtt5.TopicFilter(pattern, max_qos=QoS.AT_MOST_ONCE, retain_handling=RetainHandling.SEND_NEVER)
            for pattern in patterns
        ]
        async with self._visit(self._mqtt.client_id, deliver=take) as visit:
            if refused := await visit.subscribe(filters):
                raise NotObservedError(f"the broker refuses a subscription at QoS 0: {refused}")
            loop = asyncio.get_running_loop()
            began = loop.time()
            await visit.until(lambda: False, seconds)
            return Traffic(messages, size, loop.time() - began)

    async def queue(self, messages: int, size: int) -> Kept:
        """Publishes so many messages of `size` bytes for a session that is away, comes back, and counts."""
        echo = _Echo(self._topic, size)
        own_id = self._mqtt.client_id
        async with self._visit(self._sender_id) as sender:
            async with self._visit(own_id, expiry_s=self._scratch_s, deliver=echo.take) as receiver:
                await self._try_topic(sender, receiver, echo)
            refusals = await sender.publish(echo, range(1, messages + 1))
            again = self._visit(own_id, clean_start=False, expiry_s=self._scratch_s, kept_s=0, deliver=echo.take)
            async with again as receiver:
                if not receiver.connected.result().session_present:
                    raise NotObservedError("the session was gone when we came back, although it is kept otherwise")
                await self._last(sender, receiver, echo, messages)
        return Kept(messages, len(echo.arrived & set(range(1, messages + 1))), size, dict(refusals))

    async def _try_topic(self, sender: "_Visit", receiver: "_Visit", echo: "_Echo") -> None:
        """One message there and back, while both are there: access rules may stand between."""
        topic = self._topic
        own = mqtt5.TopicFilter(topic, max_qos=QoS.AT_LEAST_ONCE, retain_handling=RetainHandling.SEND_NEVER)
        if refused := await receiver.subscribe([own]):
            raise NotObservedError(f"the broker does not let {self._mqtt.client_id} subscribe to {topic}: {refused}")
        if refusals := await sender.publish(echo, [0]):
            said = ", ".join(refusals)
            raise NotObservedError(f"the broker does not let {self._sender_id} publish to {topic}: {said}")
        if not await receiver.until(lambda: 0 in echo.arrived, PROMPT_S):
            raise NotObservedError(f"the broker does not deliver {topic} to us: its access rules withhold it")

    async def _last(self, sender: "_Visit", receiver: "_Visit", echo: "_Echo", messages: int) -> None:
        """Waits until all is there, or one more message came: it is delivered after everything that was kept."""
        last = messages + 1
        quiet_s = 0.0
        arrived = echo.arrived
        while last not in arrived and len(arrived) <= messages:
            if await receiver.until(_has(arrived, len(arrived) + 1), QUIET_S):
                quiet_s = 0.0
                continue
            quiet_s += QUIET_S
            if quiet_s > self._mqtt.connect_timeout_s:
                raise NotObservedError(f"{len(arrived) - 1} of {messages} messages came, and then nothing more")
            # While the queue is full it may be dropped as well: so once more with each silence.
            await sender.publish(echo, [last])

    @asynccontextmanager
    async def _visit(
        self,
        client_id: str,
        *,
        clean_start: bool = True,
        expiry_s: int = 0,
        kept_s: int | None = None,
        deliver: Deliver = lambda *_: None,
    ) -> AsyncIterator["_Visit"]:
        """A connection for a while. The broker keeps its session for `expiry_s`, or `kept_s` where given."""
        config = self._mqtt
        visit = _Visit(_hello(config, client_id, clean_start=clean_start, expiry_s=expiry_s), deliver)
        visit.patience_s = config.connect_timeout_s
        try:
            try:
                async with asyncio.timeout(config.connect_timeout_s):
                    await asyncio.get_running_loop().create_connection(
                        lambda: visit, config.host, config.port, ssl=tls_context(config)
                    )
                    welcome = await visit.connected
            except TimeoutError:
                raise ConnectionLostError(f"no answer within {config.connect_timeout_s:g} s") from None
            if welcome.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
                raise ConnectionLostError(
                    f"the broker refused {client_id}: {words(welcome.reason_code, welcome.reason_str)}"
                )
            visit.start_heartbeat((welcome.server_keep_alive or config.keep_alive_s) / 2)
            yield visit
        finally:
            await visit.leave(kept_s)


def check_id(config: Mqtt) -> str:
    """The client id of the check, beside the daemon's."""
    return f"{config.client_id[:120]}-check"


class _Entrance(Session):
    """The daemon's way in, with a session that is kept for `scratch_s` only.

    It has no will: where the broker refuses what comes next, a will would be left behind, retained.
    """

    def __init__(self, config: Mqtt, telemetry: Sequence[str], statuses: Sequence[str], scratch_s: int) -> None:
        super().__init__(config, telemetry, statuses, "", lambda *_: None, lambda *_: None)
        self._scratch_s = scratch_s
        self.entered = False

    def _connect_packet(self) -> mqtt5.ConnectPacket:
        # One status or reading may come along; more is not wanted.
        own_id = self._config.client_id
        return _hello(self._config, own_id, clean_start=False, expiry_s=self._scratch_s, receive_max=1)

    def _check_welcome(self, welcome: mqtt5.ConnAckPacket) -> None:
        super()._check_welcome(welcome)
        if welcome.session_present and self._connection:
            # Mosquitto can be told to name clients by user or certificate: then this is the daemon's.
            # It goes on living as long as the daemon has asked for.
            expiry_s = self._config.session_expiry_s
            self._connection.send(mqtt5.DisconnectPacket(session_expiry_interval=expiry_s if self._scratch_s else None))
            raise ForeignSessionError
        self.entered = True


class _Visit(Connection):
    """A connection that can wait for what comes, and publish."""

    def __init__(self, connect: mqtt5.ConnectPacket, deliver: Deliver) -> None:
        self._news = asyncio.Event()
        self._answers: list[mqtt5.PubAckPacket] = []
        self.patience_s = 0.0
        super().__init__(connect, deliver, lambda _: None)

    def buffer_updated(self, nbytes: int) -> None:
        """Takes a network chunk."""
        super().buffer_updated(nbytes)
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells everyone who waits on this connection."""
        super().connection_lost(exc)
        self._news.set()

    async def until(self, seen: Callable[[], bool], seconds: float) -> bool:
        """Waits until something is there to see; false when the time is up. Raises what ended the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not seen():
                    if self.closed.done():
                        raise self.closed.result()
                    self._news.clear()
                    await self._news.wait()
        return seen()

    async def subscribe(self, filters: list[mqtt5.TopicFilter]) -> str:
        """Subscribes; returns why the broker refused one of them, or nothing."""
        self.send(mqtt5.SubscribePacket(1, filters))
        if not await self.until(self.subscribed.done, self.patience_s):
            raise ConnectionLostError(f"no answer within {self.patience_s:g} s")
        answer = self.subscribed.result()
        refused = (words(code, answer.reason_str) for code in answer.reason_codes if int(code) >= FAILURE)
        return next(refused, "")

    async def publish(self, echo: "_Echo", numbers: Sequence[int]) -> Counter[str]:
        """Publishes messages, as many at a time as the broker takes; counts the words in which it refused some."""
        refusals: Counter[str] = Counter()
        window = min(self.connected.result().receive_max, MOST_UNANSWERED)
        for start in range(0, len(numbers), window):
            self._answers.clear()
            some = numbers[start : start + window]
            for packet_id, number in enumerate(some, start=1):
                self.send(echo.packet(number, packet_id))
            if not await self.until(_has(self._answers, len(some)), self.patience_s):
                raise ConnectionLostError(f"no answer within {self.patience_s:g} s")
            refusals.update(
                words(answer.reason_code, answer.reason_str)
                for answer in self._answers
                if int(answer.reason_code) >= FAILURE
            )
        return refusals

    async def leave(self, kept_s: int | None) -> None:
        """Says goodbye, and waits until the broker hangs up: from then on we are away."""
        if self._transport is None:
            return
        self.send(mqtt5.DisconnectPacket(session_expiry_interval=kept_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROMPT_S):
                await asyncio.shield(self.closed)
        self.close()

    def _control(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.PubAckPacket):
            self._answers.append(packet)
        else:
            super()._control(packet)


class _Echo:
    """Messages that we publish and wait for, told apart by a number; nobody else's are taken for them.

    Whoever listens to the status of bridges reads `offline`, with spaces behind it.
    """

    def __init__(self, topic: str, size: int) -> None:
        self._topic = topic
        self._payload = OFFLINE.ljust(size)
        self._mark = f"{uuid.uuid4().hex} "
        self.arrived: set[int] = set()

    def packet(self, number: int, packet_id: int) -> mqtt5.PublishPacket:
        """The message with this number, at QoS 1."""
        mark = f"{self._mark}{number}".encode()
        return mqtt5.PublishPacket(
            self._topic, self._payload, qos=QoS.AT_LEAST_ONCE, packet_id=packet_id, correlation_data=mark
        )

    def take(self, connection: Connection, publications: Sequence[mqtt5.PublishPacket]) -> None:
        """Notes and acknowledges what came."""
        marks = ((each.correlation_data or b"").decode(errors="replace") for each in publications)
        self.arrived.update(int(mark.removeprefix(self._mark)) for mark in marks if mark.startswith(self._mark))
        connection.acknowledge([each.packet_id for each in publications if each.packet_id is not None])


def _has(things: Sized, number: int) -> Callable[[], bool]:
    return lambda: len(things) >= number


def _hello(
    config: Mqtt, client_id: str, *, clean_start: bool, expiry_s: int, receive_max: int = 65_535
) -> mqtt5.ConnectPacket:
    password = config.password.get_secret_value()
    return mqtt5.ConnectPacket(
        client_id,
        username=config.username,
        password=password.encode() if password else None,
        clean_start=clean_start,
        keep_alive=config.keep_alive_s,
        session_expiry_interval=expiry_s,
        receive_max=receive_max,
        max_packet_size=config.max_packet_size,
    )
