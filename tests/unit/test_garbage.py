"""Garbage: the bridge rejects each kind for exactly the reason that is promised, and stores nothing of it."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from bridge.errors import Reason, Rejection
from bridge.messages import Limits, Reading, decode_status, decode_telemetry
from bridge.topics import Channel, Topics
from simulator.garbage import ELEMENTS, METER_KINDS, VEHICLE_KINDS, Garbage, Kind, bad_element, garbage

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
ARRIVAL = 1_770_735_000_000_000
METER = (
    "energy/v1/meter/MTR-000001/telemetry",
    b'{"meterId": "MTR-000001", "kwhConsumedAc": 0.4796, "voltage": 232.0, "timestamp": "2026-02-10T14:47:24.841Z"}',
)
UNPLUGGED = (
    "energy/v1/vehicle/VEH-000001/telemetry",
    b'{"vehicleId": "VEH-000001", "soc": 20.70, "kwhDeliveredDc": 0.4227, "batteryTemp": -3.1, %b}'
    % b'"timestamp": "2026-02-10T14:47:24.841Z"',
)
PLUGGED = (UNPLUGGED[0], UNPLUGGED[1][:-1] + b', "meterId": "MTR-000001"}')
SENDERS = [METER, UNPLUGGED, PLUGGED]
ROUNDS = 300

senders = pytest.mark.parametrize("sender", SENDERS, ids=["meter", "unplugged", "plugged"])


def decode(topic: str, payload: bytes) -> Sequence[Reading | Rejection]:
    kind, device_id, channel = TOPICS.parse(topic)
    assert channel is Channel.TELEMETRY
    return decode_telemetry(kind, device_id, payload, None, ARRIVAL, Limits())


def verdict(made: Garbage) -> list[tuple[str, bytes, bool]]:
    """What the bridge says: reason, rejected payload, and whether that is a part of the message."""
    try:
        kind, device_id, channel = TOPICS.parse(made.topic)
        if channel is Channel.STATUS:
            decode_status(kind, device_id, made.payload, ARRIVAL)
            return []
        items = decode(made.topic, made.payload)
    except Rejection as rejection:
        return [(str(rejection.reason), rejection.payload or made.payload, False)]
    rejections = [item for item in items if isinstance(item, Rejection)]
    assert len(rejections) == len(items)
    return [(str(item.reason), item.payload or b"", True) for item in rejections]


def letters(made: Garbage) -> list[tuple[str, bytes, bool]]:
    return [tuple(letter) for letter in made.letters]


@senders
def test_the_readings_that_are_spoilt_here_are_good(sender: tuple[str, bytes]) -> None:
    (reading,) = decode(*sender)
    assert not isinstance(reading, Rejection)


@pytest.mark.parametrize("kind", VEHICLE_KINDS, ids=lambda kind: kind.name)
def test_each_kind_is_rejected_for_its_reason(kind: Kind) -> None:
    rng = random.Random(kind.name)
    for topic, payload in SENDERS if kind in METER_KINDS else SENDERS[1:]:
        for _ in range(ROUNDS):
            made = kind.make(rng, topic, payload)
            assert verdict(made) == letters(made)
            assert {letter.reason for letter in made.letters} == {kind.reason}
            assert made.payload != payload or made.topic != topic


@senders
def test_each_bad_element_is_rejected_alone_and_written_as_it_came(sender: tuple[str, bytes]) -> None:
    topic, payload = sender
    rng = random.Random(1)
    seen = set()
    for _ in range(ROUNDS * 5):
        letter = bad_element(rng, payload)
        assert letter.part
        good, bad, after = decode(topic, b"[%b, %b, %b]" % (payload, letter.payload, payload))
        assert not isinstance(good, Rejection)
        assert good == after
        assert isinstance(bad, Rejection)
        assert (str(bad.reason), bad.payload) == (letter.reason, letter.payload)
        seen.add(letter.reason)
    assert seen == {reason for reason, _ in ELEMENTS}


@senders
def test_every_kind_comes_up(sender: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def watched(kind: Kind) -> Kind:
        def make(*args: Any) -> Garbage:
            made[kind.name] += 1
            return kind.make(*args)

        return kind._replace(make=make)

    monkeypatch.setattr("simulator.garbage.METER_KINDS", tuple(map(watched, METER_KINDS)))
    monkeypatch.setattr("simulator.garbage.VEHICLE_KINDS", tuple(map(watched, VEHICLE_KINDS)))
    rng = random.Random(1)
    for _ in range(100 * len(VEHICLE_KINDS)):
        garbage(rng, *sender)
    kinds = METER_KINDS if sender is METER else VEHICLE_KINDS
    assert set(made) == {kind.name for kind in kinds}
    assert len(made) == len(kinds)
    assert min(made.values()) > 50


def test_garbage_covers_every_reason_that_a_message_alone_can_have() -> None:
    elsewhere = {
        *(Reason.UNKNOWN_TOPIC, Reason.ARRAY_TOO_LONG, Reason.ID_MISMATCH, Reason.TIMESTAMP_IN_FUTURE),
        *(Reason.TIMESTAMP_TOO_OLD, Reason.CONFLICT, Reason.REFUSED_BY_DATABASE, Reason.UNEXPECTED),
    }
    assert {kind.reason for kind in VEHICLE_KINDS} == set(Reason) - elsewhere


@senders
def test_mqtt_takes_every_topic(sender: tuple[str, bytes]) -> None:
    rng = random.Random(1)
    topics = {garbage(rng, *sender).topic for _ in range(20_000)}
    assert len(topics) > 10
    for topic in topics:
        assert not set(topic) & set("+#")
        assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in topic)
        assert len(topic.encode()) < 65_536


@senders
def test_a_part_and_a_whole_message_are_never_the_same_letter(sender: tuple[str, bytes]) -> None:
    """Bridges may differ in whether that would be one letter or two."""
    rng = random.Random(1)
    told = [letter for _ in range(50_000) for letter in garbage(rng, *sender).letters]
    parts = {letter.payload for letter in told if letter.part}
    parts |= {bad_element(rng, sender[1]).payload for _ in range(5_000)}
    assert not parts & {letter.payload for letter in told if not letter.part}
    assert all(json.dumps(json.loads(part), separators=(",", ":")).encode() == part for part in parts)
