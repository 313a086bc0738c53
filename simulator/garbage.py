"""What broken devices send: messages that say no reading, and the reason code that the contract has for each. Pure.

A message here has one defect, and one that the contract settles: whatever two bridges could rightly judge differently
(a literal NaN, a field given twice, a number beyond all calendars as a timestamp) is left out. None is ever a reading:
what has no timestamp, or null for one, counts as of its arrival, so timestamps are broken but never absent.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

METER_NUMBERS = (b"kwhConsumedAc", b"voltage")
VEHICLE_NUMBERS = (b"soc", b"kwhDeliveredDc", b"batteryTemp")

OUT_OF_RANGE: Mapping[bytes, Sequence[bytes]] = {
    b"kwhConsumedAc": (b"-0.0001", b"-1", b"1000.0001", b"1e6"),
    b"kwhDeliveredDc": (b"-0.0001", b"-1", b"1000.0001", b"1e6"),
    b"voltage": (b"-0.1", b"-230.0", b"1000.1", b"400000"),
    b"soc": (b"-0.01", b"-1", b"100.01", b"101", b"1000"),
    b"batteryTemp": (b"-300", b"200", b"1e5"),
}
SLOPPY_NUMBERS = (b"230,5", b"+1.5", b"0x1F", b"007", b".5", b"1.", b"1e", b"--1", b"1_000", b"True", b"None", b"")
NO_JSON = (
    b"online",
    b"undefined",
    b"<reading voltage='230.0'/>",
    b"MTR;0.4796;232.0;2026-02-10T14:47:24Z",
    b"kwhConsumedAc=0.4796&voltage=232.0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00\x00\x00\x00",
)
NONSENSE_TIMES = (b"", b" ", b"now", b"yesterday", b"0", b"1770734844", b"2026", b"14:47:24Z", b"10.02.2026 14:47:24")
IMPOSSIBLE_TIMES = (
    (5, b"13-01"),
    (5, b"00-10"),
    (8, b"32"),
    (8, b"00"),
    (5, b"02-30"),
    (11, b"25"),
    (14, b"60"),
)
"""Where in a timestamp, and what to write there."""

NO_IDS = ("a b", " ", "x" * 129, "x" * 1000, "MTR-0000ü1", "\u8eca", "MTR-000001\u200b", "a,b", "50%", "{id}", "'--")
"""Device ids that MQTT takes as a level of a topic, and the contract does not."""

NO_STATUS = (
    b"",
    b" ",
    b"on",
    b"1",
    b"true",
    b"null",
    b"Online",
    b"OFFLINE",
    b"online\n",
    b" offline",
    b"online\0",
    b'"online"',
    b'{"status": "online"}',
    b"\xff\xfe",
)


class Letter(NamedTuple):
    """What must become a dead letter: a whole message, or (`part`) one element of its array."""

    reason: str
    payload: bytes
    part: bool = False


class Garbage(NamedTuple):
    """A message that says no reading."""

    topic: str
    payload: bytes
    letters: tuple[Letter, ...]
    nobody: bool = False
    """Whether its topic names no device."""


class Kind(NamedTuple):
    """One way to be broken. `make` takes the telemetry topic of a device and a reading of it as JSON."""

    name: str
    reason: str
    make: Callable[[random.Random, str, bytes], Garbage]


Spoil = Callable[[random.Random, bytes], bytes]


def garbage(rng: random.Random, topic: str, payload: bytes) -> Garbage:
    """Return a broken message, as the device of a telemetry topic might send it instead of this reading."""
    kinds = METER_KINDS if _is_meter(payload) else VEHICLE_KINDS
    return kinds[int(rng.random() * len(kinds))].make(rng, topic, payload)


def bad_element(rng: random.Random, payload: bytes) -> Letter:
    """Return a reading as an element of an array that is rejected alone.

    It is written without white space, so that it reads the same where it is parsed and written again.
    """
    reason, spoil = rng.choice(ELEMENTS)
    return Letter(reason, _compact(json.loads(spoil(rng, payload))), part=True)


def _is_meter(payload: bytes) -> bool:
    return payload.startswith(b'{"meterId"')


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _set(payload: bytes, field: bytes, literal: bytes) -> bytes:
    return re.sub(rb'(?<="%b": )("[^"]*"|[^,}]*)' % field, lambda _: literal, payload, count=1)


def _number(rng: random.Random, payload: bytes) -> bytes:
    """Return the name of a field of this reading that is a number."""
    return rng.choice(METER_NUMBERS if _is_meter(payload) else VEHICLE_NUMBERS)


# Not JSON


def _cut_short(rng: random.Random, payload: bytes) -> bytes:
    return payload[: rng.randrange(1, len(payload))]


def _random_bytes(rng: random.Random, _: bytes) -> bytes:
    """No JSON begins with a byte that is not ASCII."""
    return bytes([rng.randrange(0x80, 0x100)]) + rng.randbytes(rng.randrange(8, 200))


def _invalid_utf8(rng: random.Random, payload: bytes) -> bytes:
    wrong = rng.choice((b"\xff", b"\x80", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"))
    return payload.replace(b'Id": "', b'Id": "' + wrong, 1)


def _endless_nesting(rng: random.Random, _: bytes) -> bytes:
    return rng.choice((b"[", b'{"a":', b'[{"":')) * rng.randrange(200, 3_000)


def _trailing_garbage(rng: random.Random, payload: bytes) -> bytes:
    return payload + rng.choice((b"}", b"]", b",", b" x", b"\0", b"\xff", b";", payload, b"\n" + payload, b"null"))


def _sloppy_json(rng: random.Random, payload: bytes) -> bytes:
    return rng.choice(
        (
            payload.replace(b'"', b"'"),
            payload[:-1] + b",}",
            payload.replace(b":", b"", 1),
            payload.replace(b":", b"=", 1),
            payload.replace(b", ", b" ", 1),
            payload.replace(b'"', b"", 2),
            payload[:-1] + b" /* noon */}",
            payload[:-1] + b"]",
            payload[1:],
            b"[" + payload,
            b"[" + payload + b",]",
        )
    )


def _control_character(rng: random.Random, payload: bytes) -> bytes:
    return payload.replace(b'Id": "', b'Id": "%b' % rng.choice((b"\0", b"\n", b"\t", b"\x1b")), 1)


# JSON, but no reading


def _missing_field(rng: random.Random, payload: bytes) -> bytes:
    return re.sub(rb'"%b": [^,}]*, ' % _number(rng, payload), b"", payload, count=1)


def _misspelled_field(rng: random.Random, payload: bytes) -> bytes:
    field = _number(rng, payload)
    return payload.replace(field, rng.choice((field.upper(), field + b" ", b"_" + field)), 1)


def _wrong_type(*literals: bytes) -> Spoil:
    def spoil(rng: random.Random, payload: bytes) -> bytes:
        return _set(payload, _number(rng, payload), rng.choice(literals))

    return spoil


def _out_of_range(rng: random.Random, payload: bytes) -> bytes:
    field = _number(rng, payload)
    return _set(payload, field, rng.choice(OUT_OF_RANGE[field]))


def _wrong_id(rng: random.Random, payload: bytes) -> bytes:
    literal = rng.choice((b"7", b"true", b"[]", b'["MTR-000001"]', b"{}"))
    return _set(payload, b"meterId" if _is_meter(payload) else b"vehicleId", literal)


def _time(payload: bytes) -> bytes:
    """Return the timestamp of a reading."""
    found = re.search(rb'"timestamp": "([^"]*)"', payload)
    assert found  # noqa: S101 - the encoder writes it into every reading
    return found[1]


def _no_zone(rng: random.Random, payload: bytes) -> bytes:
    time = _time(payload)[:-1]
    return _set(payload, b"timestamp", b'"%b"' % rng.choice((time, time[:19], time[:16], time[:10])))


def _no_rfc3339(rng: random.Random, payload: bytes) -> bytes:
    """ISO 8601 without dashes and colons; the contract wants RFC 3339."""
    time = _time(payload)
    basic = time[:19].replace(b"-", b"").replace(b":", b"") + b"Z"
    return _set(payload, b"timestamp", b'"%b"' % rng.choice((basic, *NONSENSE_TIMES)))


def _impossible_time(rng: random.Random, payload: bytes) -> bytes:
    time = _time(payload)
    at, text = rng.choice(IMPOSSIBLE_TIMES)
    return _set(payload, b"timestamp", b'"%b%b%b"' % (time[:at], text, time[at + len(text) :]))


def _no_time(rng: random.Random, payload: bytes) -> bytes:
    time = _time(payload)
    literal = rng.choice((b"true", b"false", b"{}", b"[]", b'["%b"]' % time, b'{"utc": "%b"}' % time))
    return _set(payload, b"timestamp", literal)


def _plugged(payload: bytes, literal: bytes) -> bytes:
    """Return the reading of a vehicle that is plugged in at something."""
    unplugged = re.sub(rb', "meterId": "[^"]*"', b"", payload)
    return b'%b, "meterId": %b}' % (unplugged[:-1], literal)


def _wrong_plug(rng: random.Random, payload: bytes) -> bytes:
    return _plugged(payload, rng.choice((b"7", b"false", b"[]", b"{}")))


def _no_plug(rng: random.Random, payload: bytes) -> bytes:
    return _plugged(payload, b'"%b"' % rng.choice(("", "a/b", "#", *NO_IDS)).encode())


# What is not a spoilt reading on the topic of its device


def _no_objects(rng: random.Random, topic: str, _: bytes) -> Garbage:
    """Nothing that would be a message of its own elsewhere in this module: the letters must stay different."""
    choices = (
        lambda: -rng.randrange(1, 10**6),
        lambda: f"MTR-{rng.randrange(10**6):06d}",
        lambda: [rng.randrange(10**6), None],
    )
    elements = [_compact(rng.choice(choices)()) for _ in range(rng.randrange(1, 6))]
    letters = (Letter("not_an_object", element, part=True) for element in elements)
    return Garbage(topic, b"[%b]" % b", ".join(elements), tuple(letters))


def _no_status(rng: random.Random, topic: str, _: bytes) -> Garbage:
    payload = rng.choice((*NO_STATUS, b"\x80" + rng.randbytes(8)))
    return Garbage(topic.removesuffix("telemetry") + "status", payload, (Letter("invalid_status", payload),))


def _no_device(rng: random.Random, topic: str, payload: bytes) -> Garbage:
    branch = topic.rsplit("/", 2)[0]
    nowhere = f"{branch}/{rng.choice(('', *NO_IDS))}/telemetry"
    return Garbage(nowhere, payload, (Letter("invalid_device_id", payload),), nobody=True)


def _kind(name: str, reason: str, spoil: Spoil) -> Kind:
    def make(rng: random.Random, topic: str, payload: bytes) -> Garbage:
        spoilt = spoil(rng, payload)
        return Garbage(topic, spoilt, (Letter(reason, spoilt),))

    return Kind(name, reason, make)


def _one_of(*payloads: bytes) -> Spoil:
    return lambda rng, _: rng.choice(payloads)


_READINGS: tuple[tuple[str, str, Spoil], ...] = (
    ("missing field", "missing_field", _missing_field),
    ("misspelled field", "missing_field", _misspelled_field),
    ("number in a string", "wrong_type", _wrong_type(b'"1.5"', b'""', b'"230,0"')),
    ("boolean for a number", "wrong_type", _wrong_type(b"true", b"false")),
    ("null for a number", "wrong_type", _wrong_type(b"null")),
    ("object for a number", "wrong_type", _wrong_type(b"{}", b'{"value": 1.5}')),
    ("array for a number", "wrong_type", _wrong_type(b"[]", b"[1.5]")),
    ("id that is no string", "wrong_type", _wrong_id),
    ("number out of range", "out_of_range", _out_of_range),
    ("timestamp without a zone", "invalid_timestamp", _no_zone),
    ("nonsense for a timestamp", "invalid_timestamp", _no_rfc3339),
    ("impossible timestamp", "invalid_timestamp", _impossible_time),
    ("timestamp of another type", "invalid_timestamp", _no_time),
)
ELEMENTS = tuple((reason, spoil) for _, reason, spoil in _READINGS)

METER_KINDS = (
    _kind("cut short", "malformed", _cut_short),
    _kind("random bytes", "malformed", _random_bytes),
    _kind("invalid UTF-8", "malformed", _invalid_utf8),
    _kind("nothing", "malformed", _one_of(b"", b" ", b"\r\n")),
    _kind("byte order mark", "malformed", lambda _, payload: b"\xef\xbb\xbf" + payload),
    _kind("UTF-16", "malformed", lambda _, payload: payload.decode().encode("utf-16-le")),
    _kind("nesting without end", "malformed", _endless_nesting),
    _kind("trailing garbage", "malformed", _trailing_garbage),
    _kind("no JSON", "malformed", _one_of(*NO_JSON)),
    _kind("sloppy JSON", "malformed", _sloppy_json),
    _kind("sloppy number", "malformed", _wrong_type(*SLOPPY_NUMBERS)),
    _kind("control character in a string", "malformed", _control_character),
    _kind("number", "not_an_object", lambda rng, _: b"%d" % rng.randrange(10**9)),
    _kind("string", "not_an_object", _one_of(b'""', b'"online"', b'"230.0"', b' "[]"')),
    _kind("literal", "not_an_object", _one_of(b"null", b"true", b"false", b" null ")),
    _kind("reading in a string", "not_an_object", lambda _, payload: json.dumps(payload.decode()).encode()),
    Kind("array of no objects", "not_an_object", _no_objects),
    _kind("empty array", "empty_array", _one_of(b"[]", b"[ ]", b" [\n]\n")),
    _kind("empty object", "missing_field", _one_of(b"{}", b"{ }", b'{"firmware": "1.2"}')),
    *(_kind(*row) for row in _READINGS),
    _kind("number beyond all doubles", "out_of_range", _wrong_type(b"1e999", b"-1e999")),
    Kind("status that is none", "invalid_status", _no_status),
    Kind("topic of no device", "invalid_device_id", _no_device),
)
VEHICLE_KINDS = (
    *METER_KINDS,
    _kind("plug that is no string", "wrong_type", _wrong_plug),
    _kind("plug that is no device id", "invalid_device_id", _no_plug),
)
