"""One TCP connection to the broker, as an asyncio protocol over the MQTT 5 codec: from CONNECT to its end."""

import asyncio
import contextlib
import struct
from collections.abc import Callable, Sequence
from typing import cast

import mqtt5
import structlog

from bridge.errors import BrokerRefusedError

log = structlog.get_logger()

Deliver = Callable[["Connection", Sequence[mqtt5.PublishPacket]], None]
Lost = Callable[["Connection"], None]

# By the standard: 256 MiB less one byte, and the header.
LARGEST_PACKET = 268_435_460
# So much is taken from the network at once. While it is decoded the event loop does nothing else, and PostgreSQL may
# be waiting for the next statement.
READ_BYTES = 32 * 1024
# Reason codes from here on are failures.
FAILURE = 0x80
# Farewells of the broker that trying again does not cure. (By number: the codec's codes do not hash.)
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


class Connection(asyncio.BufferedProtocol):
    """One connection to the broker, from CONNECT to its end."""

    def __init__(self, connect: mqtt5.ConnectPacket, deliver: Deliver, lost: Lost) -> None:
        loop = asyncio.get_running_loop()
        self._connect = connect
        self._deliver = deliver
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._filled = 0
        self._longest = connect.max_packet_size or LARGEST_PACKET
        self._reading = True
        self._intake = True
        self._loop = loop
        self._heard_at = loop.time()
        self._pinged_at = 0.0
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

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - how much is taken is ours to say
        """Where the next network chunk goes: behind the beginning of a packet that is there already."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Takes the packets of one network chunk; hands its publications over in one call."""
        self._heard_at = self._loop.time()
        publications: list[mqtt5.PublishPacket] = []
        position, size = 0, self._filled + nbytes
        buffer = self._buffer[:size]
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
        self._keep(bytes(buffer[position:]))
        if publications and self._intake:
            self._deliver(self, publications)

    def _keep(self, rest: bytes) -> None:
        """Keeps the beginning of a packet, with room for more of it."""
        if len(rest) > self._longest:
            self.abort(ConnectionLostError("the broker sent a packet larger than mqtt.max_packet_size"))
            rest = b""
        room = READ_BYTES if len(rest) < READ_BYTES // 2 else 2 * len(rest)
        if room != len(self._buffer):
            self._buffer = memoryview(bytearray(room))
        self._buffer[: len(rest)] = rest
        self._filled = len(rest)

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
        self._lost(self)

    def send(self, packet: mqtt5.Packet) -> None:
        """Writes a packet; on a closed connection nothing happens."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(packet.write())

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """PUBACKs, in this order and in one write. On a closed connection nothing: the broker delivers again."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(pubacks(packet_ids))

    @property
    def paused(self) -> bool:
        """Whether we do not read, and so cannot see what the broker answers."""
        return not self._reading

    @property
    def silent_s(self) -> float:
        """How long we have heard nothing of the broker, or been paused."""
        return self._loop.time() - self._heard_at

    def pause(self) -> None:
        """Stops reading from the network: from here on the broker keeps what comes."""
        if self._transport and self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        if self._transport and not self._reading and not self._transport.is_closing():
            self._reading = True
            self._heard_at = self._loop.time()
            self._transport.resume_reading()

    def stop_intake(self) -> None:
        """Hands over nothing more. What still arrives is not acknowledged and stays with the broker."""
        self._intake = False

    def start_heartbeat(self, interval: float) -> None:
        """Pings every `interval` seconds; a ping after which nothing is heard for so long ends the connection."""
        self._heartbeat = self._loop.call_later(interval, self._beat, interval)

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
        if self._transport is None:
            return
        self.send(mqtt5.DisconnectPacket())
        self.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.closed)

    def _beat(self, interval: float) -> None:
        # While reading is paused the answer cannot be seen; that we still ping is what keeps the session. And on a slow
        # line it comes behind a whole window of readings: whatever comes is a sign of life.
        if self._reading and self._heard_at < self._pinged_at:
            self.abort(ConnectionLostError(f"the broker did not answer a ping within {interval:g} s"))
            return
        self._pinged_at = self._loop.time()
        self.send(mqtt5.PingReqPacket())
        self.start_heartbeat(interval)

    def _control(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.ConnAckPacket) and not self.connected.done():
            self.connected.set_result(packet)
        elif isinstance(packet, mqtt5.SubAckPacket) and not self.subscribed.done():
            self.subscribed.set_result(packet)
        elif isinstance(packet, mqtt5.PubAckPacket) and int(packet.reason_code) >= FAILURE:
            log.warning("mqtt.status_refused", reason=words(packet.reason_code, packet.reason_str))
        elif isinstance(packet, mqtt5.DisconnectPacket):
            said = f"the broker disconnected us: {words(packet.reason_code, packet.reason_str)}"
            final = FINAL_DISCONNECTS.get(int(packet.reason_code))
            self.abort(BrokerRefusedError(f"{said}: {final}") if final else ConnectionLostError(said))


def pubacks(packet_ids: Sequence[int]) -> bytes:
    """A PUBACK for each, as bytes: packet type and length, then the packet id (MQTT 5.0, section 3.4)."""
    ids = struct.pack(f">{len(packet_ids)}H", *packet_ids)
    packets = bytearray(b"\x40\x02\0\0" * len(packet_ids))
    packets[2::4], packets[3::4] = ids[::2], ids[1::2]
    return bytes(packets)


def words(code: object, said: str | None) -> str:
    """A reason code as words, with what the broker adds to it."""
    name = getattr(code, "name", str(code)).replace("_", " ").lower()
    return f"{name} ({said})" if said else name
