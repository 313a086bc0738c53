"""The targets of `make fuzz`, always: its examples, what Hypothesis makes of them, and what wants to take long."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import Reason, Rejection
from bridge.messages import CBOR
from bridge.topics import Kind
from tests.fuzz.targets import DEVICE, FORMS, check_payload, check_topic, decode

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
PAYLOADS = {path.name: path.read_bytes() for path in sorted((CORPUS / "payload").iterdir())}
TOPICS = {path.name: path.read_bytes() for path in sorted((CORPUS / "topic").iterdir())}

# Pieces that mean something, and heads of CBOR items with lengths of their own.
PIECES = [
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"e9", b"-", b".", b"null", b"NaN", b"Infinity", b"true", b"Z"),
    *(b"\\u0000", b"\\ud800", b"\xff", b"\x00", b"\xc0", b"\xc1", b"\xc2", b"\xd8\x1c", b"\xd8\x1d\x00"),
    b"\xf9\x7e\x00",
    *(b"\x80", b"\x81", b"\x9f", b"\xa0", b"\xa1", b"\xbf", b"\x60", b"\x7f", b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff"),
    *(b"/", b"+", b"#", b"energy/v1/", b"meter", b"vehicle", b"telemetry", b"status", DEVICE.encode()),
]  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 12), st.sampled_from(PIECES) | st.binary(max_size=4)), max_size=4
)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, piece in changes:
        data = data[:place] + piece + data[place + length :]
    return data


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_payload_of_the_corpus_is_readings_or_rejections(name: str) -> None:
    check_payload(PAYLOADS[name])


@pytest.mark.parametrize("name", TOPICS)
def test_every_topic_of_the_corpus_is_of_a_device_or_rejected(name: str) -> None:
    check_topic(TOPICS[name])


@settings(max_examples=200)
@given(st.sampled_from(list(PAYLOADS.values())), edits)
def test_no_payload_does_more_than_say_readings_or_be_rejected(
    payload: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    check_payload(edited(payload, changes))


@settings(max_examples=150)
@given(st.sampled_from(sorted(FORMS)), st.binary(max_size=64))
def test_no_bytes_do_more_than_say_readings_or_be_rejected(form: bytes, payload: bytes) -> None:
    check_payload(form + payload)


@settings(max_examples=150)
@given(st.sampled_from(list(TOPICS.values())), edits)
def test_no_topic_is_taken_for_that_of_another_device(topic: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    check_topic(edited(topic, changes))


# Messages that want to take long: eight times the bytes may take eight times as long, not sixty-four times


def head(major: int, length: int) -> bytes:
    return bytes([major << 5 | 26]) + struct.pack(">I", length)


def bignum(number: int) -> bytes:
    return b"\xc2\x4c" + number.to_bytes(12, "big")


def colliding_keys(size: int) -> bytes:
    """Keys that Python hashes to the same: a map of them takes a time that is quadratic in its length."""
    keys = [bignum((2**61 - 1) * number + 5) + b"\0" for number in range(2**32, 2**32 + size // 15)]
    return head(5, len(keys)) + b"".join(keys)


ENERGY = b'{"kwhConsumedAc":%s,"voltage":1,"timestamp":1770734844,"x":%s}'
SLOW: dict[str, tuple[str | None, Callable[[int], bytes]]] = {
    "nested arrays": (None, lambda size: b"[" * size),
    "nested objects": (None, lambda size: b'{"a":' * (size // 5)),
    "nested in a field": (None, lambda size: ENERGY % (b"1", b"[" * (size // 2) + b"]" * (size // 2))),
    "many nested arrays": (None, lambda size: b"[" + (b"[" * 190 + b"]" * 190 + b",") * (size // 381) + b"0]"),
    "many empty arrays": (None, lambda size: b"[" + b"[]," * (size // 3) + b"0]"),
    "a long number": (None, lambda size: ENERGY % (b"9" * size, b"0")),
    "a long fraction": (None, lambda size: ENERGY % (b"0." + b"1" * size, b"0")),
    "a long exponent": (None, lambda size: ENERGY % (b"1e" + b"9" * size, b"0")),
    "many long numbers": (None, lambda size: ENERGY % (b"1", b"[" + (b"9" * 4_000 + b",") * (size // 4_001) + b"0]")),
    "a long text of escapes": (None, lambda size: ENERGY % (b"1", b'"' + rb"\u0041" * (size // 6) + b'"')),
    "many keys": (None, lambda size: b"{" + b",".join(b'"%d":1' % number for number in range(size // 9)) + b"}"),
    "one key again and again": (None, lambda size: b"{" + b'"voltage":1,' * (size // 12) + b'"kwhConsumedAc":1}'),
    "blanks": (None, lambda size: b" " * size),
    "nested arrays of CBOR": (CBOR, lambda size: b"\x81" * size),
    "nested tags": (CBOR, lambda size: b"\xc1" * size),
    "a huge length": (CBOR, lambda size: head(4, 0xFFFF_FFFF) + b"\x80" * size),
    "a large number": (CBOR, lambda size: b"\x81\xc2" + head(2, size) + b"\xff" * size),
    "a text of pieces": (CBOR, lambda size: b"\x7f" + b"\x61a" * (size // 2) + b"\xff"),
    "keys that collide": (CBOR, colliding_keys),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_time_grows_no_faster_than_the_message(name: str) -> None:
    content_type, make = SLOW[name]

    def seconds(size: int) -> float:
        payload = make(size)
        taken = []
        for _ in range(3):
            began = time.thread_time()
            decode(Kind.METER, payload, content_type)
            taken.append(time.thread_time() - began)
        return min(taken)

    # Far from both, as the garbage collector takes its part; and what is over at once is not worth a ratio.
    assert seconds(160_000) < 32 * max(seconds(20_000), 0.002)


@pytest.mark.parametrize("key", ["01", "f90000", "c24105", "8201fb3ff0000000000000", "a0", "c100", "f6", "f5"])
def test_keys_of_cbor_are_text(key: str) -> None:
    """What else may be a key hashes as an attacker likes."""
    payload = (
        cbor2.dumps({"kwhConsumedAc": 1, "voltage": 230, "other": {}})[:-1] + b"\xa1" + bytes.fromhex(key) + b"\x01"
    )
    (item,) = decode(Kind.METER, payload, CBOR)
    assert isinstance(item, Rejection)
    assert item.reason is Reason.MALFORMED
