"""The session with the broker: MQTT 5 over an asyncio.Protocol, persistent, acknowledged only when told.

The one module that speaks the codec. A `Connection` is one TCP connection; the `Session` keeps one alive.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import cast

import mqtt5
import structlog

from bridge.backoff import Backoff
from bridge.config import Mqtt
from bridge.errors import BrokerRefusedError

log = structlog.get_logger()

Deliver = Callable[["Connection", Sequence[mqtt5.PublishPacket]], None]

# By the standard: 256 MiB less one byte, and the header.
LARGEST_PACKET = 268_435_460
SUBSCRIBE_ID = 1
STATUS_ID = 2
ONLINE = b"online"
OFFLINE = b"offline"
# The connection must have lasted this long before its loss counts as the first of a new row.
STABLE_S = 10.0
# So many connections in a row that did not last are no accident.
MOST_CUT_SHORT = 5
# Answers that may be different next time. Every other refusal needs a person. (The codec's codes do not hash.)
PASSING = (
    mqtt5.ConnAckReasonCode.UNSPECIFIED_ERROR,
    mqtt5.ConnAckReasonCode.IMPLEMENTATION_SPECIFIC_ERROR,
    mqtt5.ConnAckReasonCode.SERVER_UNAVAILABLE,
    mqtt5.ConnAckReasonCode.SERVER_BUSY,
    mqtt5.ConnAckReasonCode.QUOTA_EXCEEDED,
    mqtt5.ConnAckReasonCode.CONNECTION_RATE_EXCEEDED,
)
FINAL_DISCONNECTS = {
    int(mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER): "another client connected with the same client id; "
    "give each daemon its own mqtt.client_id",
    int(mqtt5.DisconnectReasonCode.NOT_AUTHORIZED): "the broker withdrew our authorization",
    int(mqtt5.DisconnectReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED): "the broker has no shared subscriptions; "
    "leave mqtt.share_group out",
}


class ConnectionLostError(Exception):
    """The connection ended or could not be made; the session makes a new one."""


class HungUpError(ConnectionLostError):
    """The broker closed the connection without a reason."""


class Connection(asyncio.Protocol):
    """One connection to the broker, from CONNECT to its end."""

    def __init__(self, connect: mqtt5.ConnectPacket, deliver: Deliver) -> None:
        loop = asyncio.get_running_loop()
        self._connect = connect
        self._deliver = deliver
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._longest = connect.max_packet_size or LARGEST_PACKET
        self._reading = True
        self._intake = True
        self._answered = True
        self.granted = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self.connected: asyncio.Future[mqtt5.ConnAckPacket] = loop.create_future()
        self.subscribed: asyncio.Future[mqtt5.SubAckPacket] = loop.create_future()
        self.closed: asyncio.Future[Exception] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says hello."""
        # uvloop's transports are Transports in all but the class.
        self._transport = cast("asyncio.Transport", transport)
        self.send(self._connect)

    def data_received(self, data: bytes) -> None:
        """Takes the packets of one network chunk; hands its publications over in one call."""
        buffer = memoryview(self._rest + data if self._rest else data)
        publications: list[mqtt5.PublishPacket] = []
        position, size = 0, len(buffer)
        try:
            while position < size:
                packet, length = mqtt5.read(buffer[position:])
                position += length
                if isinstance(packet, mqtt5.PublishPacket):
                    publications.append(packet)
                else:
                    self._control(packet)
        except IndexError:
            pass  # the rest of the packet is still on its way
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the codec panics (no Exception) on some hostile packets
            self.abort(ConnectionLostError(f"the broker sent a malformed packet: {error}"))
        self._rest = bytes(buffer[position:])
        if len(self._rest) > self._longest:
            self.abort(ConnectionLostError("the broker sent a packet larger than mqtt.max_packet_size"))
        if publications and self._intake:
            self._deliver(self, publications)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells everyone who waits on this connection."""
        if self._heartbeat:
            self._heartbeat.cancel()
        if not self.closed.done():
            self.closed.set_result(exc or HungUpError("the broker closed the connection"))
        for future in (self.connected, self.subscribed):
            if not future.done():
                future.set_exception(self.closed.result())
                future.exception()  # retrieved: nobody may be waiting for it

    def send(self, packet: mqtt5.Packet) -> None:
        """Writes a packet; on a closed connection nothing happens."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(packet.write())

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """PUBACKs, in this order and in one write. On a closed connection nothing: the broker delivers again."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(b"".join([mqtt5.PubAckPacket(packet_id).write() for packet_id in packet_ids]))

    def pause(self) -> None:
        """Stops reading from the network: from here on the broker keeps what comes. Not before we are subscribed."""
        if self._transport and self.granted and self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        if self._transport and not self._reading and not self._transport.is_closing():
            self._reading = True
            self._answered = True
            self._transport.resume_reading()

    def stop_intake(self) -> None:
        """Hands over nothing more. What still arrives is not acknowledged and stays with the broker."""
        self._intake = False

    def start_heartbeat(self, interval: float) -> None:
        """Pings every `interval` seconds; a ping without an answer within that time ends the connection."""
        self._heartbeat = asyncio.get_running_loop().call_later(interval, self._beat, interval)

    def abort(self, reason: Exception) -> None:
        """Ends the connection at once, for this reason."""
        if not self.closed.done():
            self.closed.set_result(reason)
        if self._transport:
            self._transport.abort()

    def close(self) -> None:
        """Ends the connection after what was written is on its way."""
        if self._transport:
            self._transport.close()

    async def disconnect(self, timeout_s: float) -> None:
        """Says goodbye, and waits until all that was written is on its way."""
        self.send(mqtt5.DisconnectPacket())
        self.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.closed)

    def _beat(self, interval: float) -> None:
        # While reading is paused the answer cannot be seen; that we still ping is what keeps the session.
        if self._reading and not self._answered:
            self.abort(ConnectionLostError(f"the broker did not answer a ping within {interval:g} s"))
            return
        self._answered = False
        self.send(mqtt5.PingReqPacket())
        self.start_heartbeat(interval)

    def _control(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.PingRespPacket):
            self._answered = True
        elif isinstance(packet, mqtt5.ConnAckPacket) and not self.connected.done():
            self.connected.set_result(packet)
        elif isinstance(packet, mqtt5.SubAckPacket) and not self.subscribed.done():
            self.subscribed.set_result(packet)
        elif isinstance(packet, mqtt5.DisconnectPacket):
            said = f"the broker disconnected us: {_words(packet.reason_code, packet.reason_str)}"
            final = FINAL_DISCONNECTS.get(int(packet.reason_code))
            self.abort(BrokerRefusedError(f"{said}: {final}") if final else ConnectionLostError(said))


class Session:
    """A persistent session: connects, subscribes, hands publications to `deliver`, and comes back when cut off.

    `filters` are (topic filter, may be shared) pairs; `status_topic` is where our own online/offline is retained.
    """

    def __init__(self, config: Mqtt, filters: Sequence[tuple[str, bool]], status_topic: str, deliver: Deliver) -> None:
        self._config = config
        self._filters = [
            f"$share/{config.share_group}/{pattern}" if shared and config.share_group else pattern
            for pattern, shared in filters
        ]
        self._status_topic = status_topic
        self._deliver = deliver
        self._connection: Connection | None = None
        self._stopping = False

    @property
    def connected(self) -> bool:
        """Whether we are connected and subscribed."""
        return self._connection is not None and not self._connection.closed.done()

    async def run(self) -> None:
        """Keeps a connection until `stop_intake` or cancellation.

        Raises BrokerRefusedError for what trying again does not cure: wrong credentials, a refused subscription,
        the same client id elsewhere.
        """
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        cut_short = 0
        while not self._stopping:
            began = loop.time()
            self._connection = None
            try:
                self._connection = await self.connect()
                self._greet(self._connection)
                reason = await self._connection.closed
            except (OSError, ConnectionLostError, TimeoutError) as error:
                reason = error
            if isinstance(reason, BrokerRefusedError):
                raise reason
            if self._stopping:
                return
            lasted = loop.time() - began > STABLE_S
            if lasted:
                backoff.reset()
            # Mosquitto 2.0.11 does not say that another client took the session over, it just hangs up.
            cut_short = cut_short + 1 if isinstance(reason, HungUpError) and self._connection and not lasted else 0
            if cut_short == MOST_CUT_SHORT:
                raise BrokerRefusedError(
                    f"the broker hung up {cut_short} times in a row, each time soon after it let us in: most likely "
                    "another client has the same client id; give each daemon its own mqtt.client_id"
                )
            delay = backoff.next()
            log.warning(
                "mqtt.waiting",
                broker=f"{self._config.host}:{self._config.port}",
                reason=str(reason) or type(reason).__name__,
                attempt=backoff.attempts,
                next_in_s=round(delay, 1),
            )
            await asyncio.sleep(delay)

    async def connect(self) -> Connection:
        """One connection that is accepted and subscribed, or an exception that says why not."""
        config = self._config
        connection = Connection(self._connect_packet(), self._deliver)
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection, config.host, config.port, ssl=tls_context(config)
                )
                welcome = await connection.connected
                self._check_welcome(welcome)
                connection.start_heartbeat((welcome.server_keep_alive or config.keep_alive_s) / 2)
                connection.send(mqtt5.SubscribePacket(SUBSCRIBE_ID, [_topic_filter(f) for f in self._filters]))
                self._check_granted(await connection.subscribed)
                connection.granted = True
        except ssl.SSLCertVerificationError as error:
            raise BrokerRefusedError(f"the broker's certificate is not trusted: {error.verify_message}") from None
        except TimeoutError:
            raise ConnectionLostError(f"no answer within {config.connect_timeout_s:g} s") from None
        else:
            return connection
        finally:
            if not connection.granted:
                connection.close()

    def stop_intake(self) -> None:
        """First step of stopping: nothing more is handed over, and no new connection is made."""
        self._stopping = True
        if self._connection:
            self._connection.stop_intake()

    async def disconnect(self) -> None:
        """Last step of stopping: says offline and goodbye. The broker keeps the session and what it has for us."""
        if connection := self._connection:
            connection.send(_retained(self._status_topic, OFFLINE))
            await connection.disconnect(self._config.connect_timeout_s)

    def _greet(self, connection: Connection) -> None:
        if self._stopping:
            connection.stop_intake()
        connection.send(_retained(self._status_topic, ONLINE))
        log.info(
            "mqtt.connected",
            broker=f"{self._config.host}:{self._config.port}",
            client_id=self._config.client_id,
            session_present=connection.connected.result().session_present,
            filters=self._filters,
        )

    def _connect_packet(self) -> mqtt5.ConnectPacket:
        config = self._config
        password = config.password.get_secret_value()
        return mqtt5.ConnectPacket(
            config.client_id,
            username=config.username,
            password=password.encode() if password else None,
            clean_start=False,
            will=mqtt5.Will(self._status_topic, payload=OFFLINE, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True),
            keep_alive=config.keep_alive_s,
            session_expiry_interval=config.session_expiry_s,
            receive_max=config.receive_maximum,
            max_packet_size=config.max_packet_size,
        )

    def _check_welcome(self, welcome: mqtt5.ConnAckPacket) -> None:
        code = welcome.reason_code
        if code != mqtt5.ConnAckReasonCode.SUCCESS:
            said = f"the broker refused the connection: {_words(code, welcome.reason_str)}"
            if code in PASSING:
                raise ConnectionLostError(said)
            raise BrokerRefusedError(f"{said}; check mqtt.username, mqtt.password and the broker's rules")
        if welcome.max_qos == mqtt5.QoS.AT_MOST_ONCE:
            raise BrokerRefusedError("the broker has no QoS 1; without it nothing can be acknowledged after commit")

    def _check_granted(self, answer: mqtt5.SubAckPacket) -> None:
        for pattern, code in zip(self._filters, answer.reason_codes, strict=True):
            if code != mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE:
                said = "only QoS 0" if int(code) == 0 else _words(code, answer.reason_str)
                raise BrokerRefusedError(
                    f"the broker does not let {self._config.client_id} subscribe to {pattern}: {said}; "
                    "check its access rules"
                )


def tls_context(config: Mqtt) -> ssl.SSLContext | None:
    """The TLS context for the broker, or None for plain TCP.

    Raises BrokerRefusedError where a certificate or key cannot be read.
    """
    tls = config.tls
    if not tls.enabled:
        return None
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except OSError as error:
        raise BrokerRefusedError(f"cannot use the TLS files of mqtt.tls: {error}") from None
    return context


def _topic_filter(pattern: str) -> mqtt5.TopicFilter:
    # Retained status comes once, with a new subscription; a resumed session has seen it.
    return mqtt5.TopicFilter(
        pattern,
        max_qos=mqtt5.QoS.AT_LEAST_ONCE,
        retain_handling=mqtt5.RetainHandling.SEND_IF_SUBSCRIPTION_NOT_EXISTS,
    )


def _retained(topic: str, payload: bytes) -> mqtt5.PublishPacket:
    return mqtt5.PublishPacket(topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True, packet_id=STATUS_ID)


def _words(code: object, said: str | None) -> str:
    """A reason code as words, with what the broker adds to it."""
    name = getattr(code, "name", str(code)).replace("_", " ").lower()
    return f"{name} ({said})" if said else name
