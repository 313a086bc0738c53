"""The session with the broker: persistent, subscribed, kept alive over one connection after another."""

import asyncio
import ssl
from collections.abc import Sequence

import mqtt5
import structlog
from mqtt5 import RetainHandling

from bridge.backoff import Backoff
from bridge.config import Mqtt
from bridge.connection import Connection, ConnectionLostError, Deliver, HungUpError, Lost, words
from bridge.errors import BrokerRefusedError, ConfigError

log = structlog.get_logger()

SUBSCRIBE_ID = 1
STATUS_ID = 2
ONLINE = b"online"
OFFLINE = b"offline"
# The connection must have lasted this long before its loss counts as the first of a new row.
STABLE_S = 10.0
# So many connections in a row that did not last are no accident.
MOST_CUT_SHORT = 5
# What the broker says in TLS to a certificate that is expired, revoked, missing, or from a CA that it does not trust.
CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA")
# Answers that may be different next time. Every other refusal needs a person. (The codec's codes do not hash.)
PASSING = (
    mqtt5.ConnAckReasonCode.UNSPECIFIED_ERROR,
    mqtt5.ConnAckReasonCode.IMPLEMENTATION_SPECIFIC_ERROR,
    mqtt5.ConnAckReasonCode.SERVER_UNAVAILABLE,
    mqtt5.ConnAckReasonCode.SERVER_BUSY,
    mqtt5.ConnAckReasonCode.QUOTA_EXCEEDED,
    mqtt5.ConnAckReasonCode.CONNECTION_RATE_EXCEEDED,
)


class Session:
    """A persistent session: connects, subscribes, hands publications to `deliver`, and comes back when cut off.

    `telemetry` and `statuses` are topic filters; `own_status` is where our online and offline are retained. `lost` is
    told of a connection that ended: what it delivered and we did not acknowledge comes again. Raises ConfigError
    where the TLS files are of no use.

    `connections` were accepted and subscribed so far; at `sessions_lost` of them the broker had forgotten the session.
    """

    def __init__(
        self,
        config: Mqtt,
        telemetry: Sequence[str],
        statuses: Sequence[str],
        own_status: str,
        deliver: Deliver,
        lost: Lost,
    ) -> None:
        self._config = config
        # To say now what is wrong with it. Each connection makes its own: certificates are renewed.
        tls_context(config)
        shared = f"$share/{config.share_group}/" if config.share_group else ""
        # What is retained of the telemetry comes once, with a new subscription. The status comes with each connection:
        # the broker may have dropped a change of it while we were away. And it is not shared: its order matters.
        self._filters = [
            *(_topic_filter(shared + pattern, RetainHandling.SEND_IF_SUBSCRIPTION_NOT_EXISTS) for pattern in telemetry),
            *(_topic_filter(pattern, RetainHandling.SEND_ALWAYS) for pattern in statuses),
        ]
        self._own_status = own_status
        self._deliver = deliver
        self._lost = lost
        self._connection: Connection | None = None
        self._stopping = False
        self._reason = ""
        self._had_session = False
        self.connections = 0
        self.sessions_lost = 0

    @property
    def connected(self) -> bool:
        """Whether we are connected and subscribed."""
        return self._connection is not None and self._connection.granted and not self._connection.closed.done()

    @property
    def paused(self) -> bool:
        """Whether we do not read from the broker for now, because as much is held as is allowed."""
        return self._connection is not None and self._connection.paused and not self._connection.closed.done()

    @property
    def trouble(self) -> str:
        """What is wrong with the broker, in words; empty while we are connected and subscribed."""
        broker = f"the broker {self._config.host}:{self._config.port}"
        if self.connected:
            return ""
        if self.paused:
            return f"the answer of {broker} is not read yet: as much is held as is allowed"
        return f"not connected to {broker}" + (f": {self._reason}" if self._reason else "")

    @property
    def _patterns(self) -> list[str]:
        return [topic_filter.pattern for topic_filter in self._filters]

    async def run(self) -> None:
        """Keeps a connection until `stop_intake` or cancellation.

        Raises BrokerRefusedError for what trying again does not cure: wrong credentials, a refused subscription,
        the same client id elsewhere.
        """
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        began = 0.0
        cut_short = 0
        while not self._stopping:
            lasting = None
            try:
                lasting = await self.connect()
                began = loop.time()
                self._greet(lasting)
                reason = await lasting.closed
            except (OSError, ConnectionLostError, TimeoutError) as error:
                reason = error
            if isinstance(reason, BrokerRefusedError):
                raise reason
            if isinstance(reason, ssl.SSLError) and any(word in str(reason).upper() for word in CERTIFICATE_ALERTS):
                raise BrokerRefusedError(f"the broker does not accept our certificate, see mqtt.tls: {reason}")
            if self._stopping:
                return
            lasted = lasting is not None and loop.time() - began > STABLE_S
            if lasted:
                backoff.reset()
            # Mosquitto 2.0.11 does not say that another client took the session over, it just hangs up.
            cut_short = cut_short + 1 if isinstance(reason, HungUpError) and lasting and not lasted else 0
            if cut_short == MOST_CUT_SHORT:
                raise BrokerRefusedError(
                    f"the broker hung up {cut_short} times in a row, each time soon after it let us in: most likely "
                    "another client has the same client id; give each daemon its own mqtt.client_id"
                )
            delay = backoff.next()
            self._reason = str(reason) or type(reason).__name__
            log.warning(
                "mqtt.waiting",
                broker=f"{self._config.host}:{self._config.port}",
                reason=self._reason,
                attempt=backoff.attempts,
                next_in_s=round(delay, 1),
            )
            await asyncio.sleep(delay)

    async def connect(self) -> Connection:
        """One connection that is accepted and subscribed, or an exception that says why not."""
        config = self._config
        connection = self._connection = Connection(self._connect_packet(), self._deliver, self._lost)
        if self._stopping:
            connection.stop_intake()
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection, config.host, config.port, ssl=tls_context(config)
                )
                welcome = await connection.connected
            self._check_welcome(welcome)
            connection.start_heartbeat((welcome.server_keep_alive or config.keep_alive_s) / 2)
            connection.send(mqtt5.SubscribePacket(SUBSCRIBE_ID, self._filters))
            self._check_granted(await self._answer(connection))
            connection.granted = True
        except ConfigError as error:
            raise ConnectionLostError(str(error)) from None
        except UnicodeError:
            raise BrokerRefusedError(f"mqtt.host {config.host!r} is not the name of a host") from None
        except ssl.SSLCertVerificationError as error:
            raise BrokerRefusedError(f"the broker's certificate is not trusted: {error.verify_message}") from None
        except TimeoutError:
            raise ConnectionLostError(f"no answer within {config.connect_timeout_s:g} s") from None
        else:
            return connection
        finally:
            if not connection.granted:
                connection.close()

    async def _answer(self, connection: Connection) -> mqtt5.SubAckPacket:
        """The answer to SUBSCRIBE: a resumed session may have a whole window to deliver before it.

        That takes long on a slow line, or while we are paused. Only silence means that none comes.
        """
        patience_s = self._config.connect_timeout_s
        while (left_s := patience_s if connection.paused else patience_s - connection.silent_s) > 0:
            answered, _ = await asyncio.wait([connection.subscribed], timeout=left_s)
            if answered:
                return connection.subscribed.result()
        raise TimeoutError

    def stop_intake(self) -> None:
        """First step of stopping: nothing more is handed over, and no new connection is made."""
        self._stopping = True
        if self._connection:
            self._connection.stop_intake()

    async def disconnect(self) -> None:
        """Last step of stopping: says offline and goodbye. The broker keeps the session and what it has for us."""
        if connection := self._connection:
            connection.send(_retained(self._own_status, OFFLINE))
            await connection.disconnect(self._config.connect_timeout_s)

    def _greet(self, connection: Connection) -> None:
        connection.send(_retained(self._own_status, ONLINE))
        welcome = connection.connected.result()
        self.connections += 1
        if self._had_session and not welcome.session_present:
            self.sessions_lost += 1
            log.warning("mqtt.session_lost", meaning="the broker forgot our session, and what it kept for us meanwhile")
        self._had_session = True
        granted_s = welcome.session_expiry_interval
        if granted_s is not None and granted_s < self._config.session_expiry_s:
            log.warning("mqtt.session_shortened", asked_s=self._config.session_expiry_s, granted_s=granted_s)
        log.info(
            "mqtt.connected",
            broker=f"{self._config.host}:{self._config.port}",
            client_id=self._config.client_id,
            session_present=welcome.session_present,
            filters=self._patterns,
        )

    def _connect_packet(self) -> mqtt5.ConnectPacket:
        config = self._config
        password = config.password.get_secret_value()
        return mqtt5.ConnectPacket(
            config.client_id,
            username=config.username,
            password=password.encode() if password else None,
            clean_start=False,
            will=mqtt5.Will(self._own_status, payload=OFFLINE, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True),
            keep_alive=config.keep_alive_s,
            session_expiry_interval=config.session_expiry_s,
            receive_max=config.receive_maximum,
            max_packet_size=config.max_packet_size,
        )

    def _check_welcome(self, welcome: mqtt5.ConnAckPacket) -> None:
        code = welcome.reason_code
        if code != mqtt5.ConnAckReasonCode.SUCCESS:
            said = f"the broker refused the connection: {words(code, welcome.reason_str)}"
            if code in PASSING:
                raise ConnectionLostError(said)
            raise BrokerRefusedError(f"{said}; check mqtt.username, mqtt.password and the broker's rules")
        if welcome.max_qos == mqtt5.QoS.AT_MOST_ONCE:
            raise BrokerRefusedError("the broker has no QoS 1; without it nothing can be acknowledged after commit")

    def _check_granted(self, answer: mqtt5.SubAckPacket) -> None:
        for pattern, code in zip(self._patterns, answer.reason_codes, strict=True):
            if code != mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE:
                said = "only QoS 0" if int(code) == 0 else words(code, answer.reason_str)
                raise BrokerRefusedError(
                    f"the broker does not let {self._config.client_id} subscribe to {pattern}: {said}; "
                    "check its access rules"
                )


def tls_context(config: Mqtt) -> ssl.SSLContext | None:
    """The TLS context for the broker, or None for plain TCP.

    Raises ConfigError where a certificate or key cannot be read.
    """
    tls = config.tls
    if not tls.enabled:
        return None
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.cert_file:
            # An empty password instead of a prompt: nobody sits there.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except OSError as error:
        named = ", ".join(str(path) for path in (tls.ca_file, tls.cert_file, tls.key_file) if path)
        raise ConfigError(f"mqtt.tls: cannot use {named}: {error.strerror or error}") from None
    return context


def _topic_filter(pattern: str, retained: RetainHandling) -> mqtt5.TopicFilter:
    return mqtt5.TopicFilter(pattern, max_qos=mqtt5.QoS.AT_LEAST_ONCE, retain_handling=retained)


def _retained(topic: str, payload: bytes) -> mqtt5.PublishPacket:
    return mqtt5.PublishPacket(topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True, packet_id=STATUS_ID)
