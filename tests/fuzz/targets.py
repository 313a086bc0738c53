"""What must hold for every topic and every payload. Hypothesis and libFuzzer look for one where it does not."""

from collections.abc import Sequence

from bridge.errors import Reason, Rejection
from bridge.messages import (
    CBOR,
    Limits,
    MeterReading,
    Presence,
    Reading,
    decode_status,
    decode_telemetry,
    decode_usual,
    encode_reading,
)
from bridge.topics import DEVICE_ID, Channel, Kind, Topics

DEVICE = "MTR-001"
# 2026-02-10, the day of the examples in the corpus.
ARRIVAL = 1_770_734_845_000_000
LIMITS = Limits()
LONGEST_DETAIL = 510
# A short number may be a long one when it is written again (1e15), a date of CBOR a text of 27 characters.
GROWTH = 20
# The first byte of an input says what the others are.
FORMS: dict[bytes, tuple[Kind, str | None]] = {
    b"m": (Kind.METER, None),
    b"M": (Kind.METER, CBOR),
    b"v": (Kind.VEHICLE, None),
    b"V": (Kind.VEHICLE, CBOR),
}
TEMPLATES = {
    Channel.TELEMETRY: ("energy/v1/{kind}/{device_id}/telemetry", "{device_id}/{kind}", "a/{kind}/b/{device_id}/c"),
    Channel.STATUS: ("energy/v1/{kind}/{device_id}/status", "{device_id}/{kind}/s", "a/{kind}/b/{device_id}"),
}
TOPICS = [Topics(telemetry, status) for telemetry, status in zip(*TEMPLATES.values(), strict=True)]


def check_topic(data: bytes) -> None:
    """A topic is one device's, the one that it was made for, or it is rejected."""
    topic = data.decode(errors="replace")
    for number, topics in enumerate(TOPICS):
        try:
            kind, device_id, channel = topics.parse(topic)
        except Rejection as rejection:
            check_rejection(rejection, {Reason.UNKNOWN_TOPIC, Reason.INVALID_DEVICE_ID})
            continue
        assert DEVICE_ID.fullmatch(device_id)
        template = TEMPLATES[channel][number]
        assert template.replace("{kind}", kind).replace("{device_id}", device_id) == topic


def check_payload(data: bytes) -> None:
    """A payload is readings within the limits, or it is rejected, and what is kept of it is no larger than it was."""
    kind, content_type = FORMS.get(data[:1], (Kind.METER, None))
    payload = data[1:]
    items = decode(kind, payload, content_type)
    assert items
    kept = 0
    for item in items:
        if isinstance(item, Rejection):
            check_rejection(item, set(Reason))
            kept += len(item.payload or b"")
        else:
            check_reading(item, kind)
    assert kept <= GROWTH * len(payload)
    if content_type is None:
        quick = decode_usual(kind, DEVICE, payload, ARRIVAL, LIMITS)
        assert quick is None or [quick] == list(items)
    check_status(kind, payload)


def check_reading(reading: Reading, kind: Kind) -> None:
    """A reading keeps the limits, and stays what it is when it is written down and read again."""
    assert reading.device_id == DEVICE
    assert reading.received_at == ARRIVAL
    assert -LIMITS.bounds.past <= reading.ts - ARRIVAL <= LIMITS.bounds.future
    if isinstance(reading, MeterReading):
        assert kind is Kind.METER
        assert 0 <= reading.kwh_ac <= LIMITS.max_interval_kwh
        assert 0 <= reading.voltage <= LIMITS.max_voltage
    else:
        assert kind is Kind.VEHICLE
        assert 0 <= reading.kwh_dc <= LIMITS.max_interval_kwh
        assert 0 <= reading.soc <= 100
        assert LIMITS.min_battery_temp <= reading.battery_temp <= LIMITS.max_battery_temp
        assert reading.meter_id is None or DEVICE_ID.fullmatch(reading.meter_id)
    assert decode(kind, encode_reading(reading), None) == [reading._replace(ts_from_arrival=False)]


def check_rejection(rejection: Rejection, reasons: set[Reason]) -> None:
    """A rejection can be shown and stored: printable, not endless."""
    assert rejection.reason in reasons
    assert 0 < len(rejection.detail) <= LONGEST_DETAIL
    assert rejection.detail.isprintable()
    assert rejection.payload is None or isinstance(rejection.payload, bytes)


def check_status(kind: Kind, payload: bytes) -> None:
    """A status is one of two words."""
    try:
        presence = decode_status(kind, DEVICE, payload, ARRIVAL)
    except Rejection as rejection:
        check_rejection(rejection, {Reason.INVALID_STATUS})
    else:
        assert presence == Presence(DEVICE, kind, payload == b"online", ARRIVAL)
        assert payload in {b"online", b"offline"}


def decode(kind: Kind, payload: bytes, content_type: str | None) -> Sequence[Reading | Rejection]:
    """What became of each part of a payload."""
    try:
        return list(decode_telemetry(kind, DEVICE, payload, content_type, ARRIVAL, LIMITS))
    except Rejection as rejection:
        return [rejection]
