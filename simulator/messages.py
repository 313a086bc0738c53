"""What devices say: a reading as the payload on the wire and as its entry in the ledger. Pure.

Everything is a whole number here, in the steps in which it is published, so that nothing depends on how a
machine writes or rounds a fraction: energy in 0.1 Wh, voltage in 0.1 V, state of charge in 0.01 %, temperature
in 0.1 °C, time in milliseconds.
"""

import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

TICKS_PER_KWH = 10_000
"""Energy is published in steps of 0.1 Wh: four decimals of a kWh."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE_MS = 60_000

SLOT_BYTES = 32
"""The ledger is a sequence of slots of this size; what a slot is, its last byte says."""

BODY_BYTES = SLOT_BYTES - 1


class SlotType(IntEnum):
    """The last byte of a slot."""

    READING = 1
    LETTER = 2
    BODY = 3
    HEADER = 4
    END = 5


class Fate(IntEnum):
    """What must become of a reading, or of a message that says none."""

    STORED = 1
    """A history row."""
    DUPLICATE = 2
    """Known already with the same values; changes nothing."""
    CONFLICT = 3
    """Known already with other values; the first one stays, this one becomes a dead letter."""
    REJECTED = 4
    """Breaks the contract; becomes a dead letter."""


READING_SLOT = struct.Struct("<IIqiHhIBxxB")
"""message, device, ts, energy, level, temperature, meter, fate, slot type: the fields of `Reading`, see there."""

LETTER_SLOT = struct.Struct("<III16xBxxB")
"""message, device, bytes of the body in the slots that follow, fate, slot type."""


class Reading(NamedTuple):
    """One interval of one device."""

    due: int
    """When the device would publish it, in milliseconds of fleet time since the start."""
    device: int
    """Number of the device: first the meters from 0, then the vehicles."""
    ts: int
    """Timestamp by the clock of the device, in milliseconds since 1970."""
    energy: int
    """Interval energy in ticks of 0.1 Wh: AC of a meter, DC of a vehicle."""
    level: int
    """Voltage of a meter in 0.1 V, state of charge of a vehicle in 0.01 %."""
    temperature: int
    """Battery temperature in 0.1 °C; 0 for a meter."""
    meter: int
    """Where a vehicle is plugged in: the number of the meter plus 1; 0 for nowhere, and for a meter."""


class Message(NamedTuple):
    """One message, ready to be published with QoS 1."""

    due: int
    """When it is published, in milliseconds of fleet time since the start."""
    number: int
    """Its place in the stream, from 0; the ledger's name for it."""
    device: int
    """Who publishes it."""
    topic: str
    payload: bytes
    entries: bytes
    """What must become of it: whole slots of the ledger."""


class Link(NamedTuple):
    """A device loses (`up` is false) or regains its network: no message, but its connection must follow."""

    due: int
    device: int
    up: bool


class Encoder:
    """The handwriting of a fleet: topics and payloads of its devices. Numbers and steps as in `Reading`."""

    def __init__(self, meter_ids: Sequence[str], vehicle_ids: Sequence[str], topic_root: str) -> None:
        """Prepare what is the same in every message of a device."""
        root = topic_root.strip("/")
        self.ids = [*meter_ids, *vehicle_ids]
        self.meters = len(meter_ids)
        self.topics = [f"{root}/meter/{name}/telemetry" for name in meter_ids]
        self.topics += [f"{root}/vehicle/{name}/telemetry" for name in vehicle_ids]
        self._openings = [b'{"meterId": "%b", "kwhConsumedAc": ' % name.encode() for name in meter_ids]
        self._openings += [b'{"vehicleId": "%b", "soc": ' % name.encode() for name in vehicle_ids]
        self._plugs = [b"", *(b', "meterId": "%b"' % name.encode() for name in meter_ids)]

    def payload(self, reading: Reading) -> bytes:
        """Return the reading as the JSON object of the contract."""
        _, device, ts, energy, level, temperature, meter = reading
        minute, millis = divmod(ts, MINUTE_MS)
        if device < self.meters:
            return b'%b%.4f, "voltage": %.1f, "timestamp": "%b%06.3fZ"}' % (
                self._openings[device],
                energy / TICKS_PER_KWH,
                level / 10,
                _minute(minute),
                millis / 1000,
            )
        return b'%b%.2f, "kwhDeliveredDc": %.4f, "batteryTemp": %.1f, "timestamp": "%b%06.3fZ"%b}' % (
            self._openings[device],
            level / 100,
            energy / TICKS_PER_KWH,
            temperature / 10,
            _minute(minute),
            millis / 1000,
            self._plugs[meter],
        )


def array(payloads: Iterable[bytes]) -> bytes:
    """Return several readings as one payload."""
    return b"[%b]" % b", ".join(payloads)


def reading_entry(number: int, reading: Reading, fate: Fate) -> bytes:
    """Return the ledger's slot for a reading in message `number`."""
    _, device, ts, energy, level, temperature, meter = reading
    return READING_SLOT.pack(number, device, ts, energy, level, temperature, meter, fate, SlotType.READING)


def letter_entry(number: int, device: int, fate: Fate, body: bytes) -> bytes:
    """Return the ledger's slots for what message `number` says and no history row can hold."""
    head = LETTER_SLOT.pack(number, device, len(body), fate, SlotType.LETTER)
    return head + body_slots(body)


def body_slots(body: bytes) -> bytes:
    """Return bytes of any length as whole slots."""
    mark = bytes([SlotType.BODY])
    return b"".join(
        body[at : at + BODY_BYTES].ljust(BODY_BYTES, b"\0") + mark for at in range(0, len(body), BODY_BYTES)
    )


@lru_cache(maxsize=4096)
def _minute(minute: int) -> bytes:
    """Return a minute since 1970 as the start of an RFC 3339 timestamp, up to and with the last colon."""
    return (EPOCH + timedelta(minutes=minute)).strftime("%Y-%m-%dT%H:%M:").encode()
