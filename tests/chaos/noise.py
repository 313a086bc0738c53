"""Random bytes and random JSON on random topics, and what must become of each."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import cbor2

# In every topic, so that what becomes of it can be found again.
MARK = "NOISE"
CBOR = "application/cbor"
STATUSES = (b"online", b"offline")
# What MQTT takes in a topic and a device id must not have.
ODD = " ,;%{}()'\"&=?!\u00fc\u00df\u8eca\u200b"
# Of the names that the contract knows there are never enough for a reading: no voltage, no soc.
NAMES = ("meterId", "vehicleId", "kwhConsumedAc", "kwhDeliveredDc", "batteryTemp", "battery_temp", "timestamp", "", "a")
TEXTS = ("", "MTR-000001", "2026-02-10T14:47:24Z", "230,0", "\u8eca\U0001f697", "\\", '"', "\n", "x" * 300)
DEEPEST = 3
# CBOR that begins so is an array.
CBOR_ARRAYS = range(0x80, 0xA0)


class Noise(NamedTuple):
    """A message that is no reading. `letters` are the payloads of its dead letters; none where nobody listens."""

    kind: str
    device: str
    channel: str
    payload: bytes
    content_type: str | None
    letters: tuple[bytes, ...]

    def topic(self, root: str) -> str:
        return f"{root}/{self.kind}/{self.device}/{self.channel}"


def noise(chance: Random, messages: int) -> Iterator[Noise]:
    """So many messages; some of them are the same."""
    for _ in range(messages):
        payload, content_type, letters = chance.choice((_bytes, _json, _json_array, _cbor, _cbor_array))(chance)
        kind, device, channel = chance.choice(("meter", "vehicle")), _device(chance), "telemetry"
        match chance.randrange(10):
            case 0:
                kind, letters = chance.choice(("gas", "meters", "Meter")), ()
            case 1:
                device, letters = f"{device}/{chance.randrange(9)}", ()
            case 2 | 3 if payload not in STATUSES:
                channel, letters = "status", (payload,)
            case _:
                # The whole message is rejected where its topic names no device.
                letters = letters if _is_id(device) else (payload,)
        yield Noise(kind, device, channel, payload, content_type, letters)


def _device(chance: Random) -> str:
    name = f"{MARK}-{chance.randrange(50)}"
    return chance.choice((name, name, name, name + chance.choice(ODD), name + "x" * 128))


def _is_id(device: str) -> bool:
    return len(device) <= 128 and not set(device) & set(ODD)


def _bytes(chance: Random) -> tuple[bytes, None, tuple[bytes, ...]]:
    data = chance.randbytes(chance.randrange(200))
    if data.lstrip().startswith(b"["):
        data = b"\xff" + data
    return data, None, (data,)


def _json(chance: Random) -> tuple[bytes, None, tuple[bytes, ...]]:
    value = _value(chance)
    data = json.dumps([] if isinstance(value, list) else value, ensure_ascii=chance.random() < 0.5).encode()
    return data, None, (data,)


def _json_array(chance: Random) -> tuple[bytes, None, tuple[bytes, ...]]:
    values = [_value(chance) for _ in range(chance.randrange(1, 8))]
    spaced = json.dumps(values, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1)))
    elements = [json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() for value in values]
    return spaced.encode(), None, tuple(elements)


def _cbor(chance: Random) -> tuple[bytes, str, tuple[bytes, ...]]:
    value = _value(chance)
    data = cbor2.dumps([] if isinstance(value, list) else value)
    if chance.random() < 0.5:
        data = chance.randbytes(chance.randrange(1, 200))
    if data[0] in CBOR_ARRAYS and data != cbor2.dumps([]):
        data = b"\xff" + data
    return data, CBOR, (data,)


def _cbor_array(chance: Random) -> tuple[bytes, str, tuple[bytes, ...]]:
    values = [_value(chance) for _ in range(chance.randrange(1, 8))]
    return cbor2.dumps(values), CBOR, tuple(cbor2.dumps(value) for value in values)


def _value(chance: Random, depth: int = 0) -> Any:
    """Something that JSON and CBOR can say, and that no reading is."""
    scalars = (None, True, False, chance.randrange(-(10**6), 10**6), 10**18, -(10**25), 0, -0.0, 1e300, 5e-324, 0.1)
    if depth == DEEPEST or chance.random() < 0.4:
        return chance.choice((*scalars, chance.random(), *TEXTS))
    if chance.random() < 0.3:
        return [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(NAMES): _value(chance, depth + 1) for _ in range(chance.randrange(5))}
