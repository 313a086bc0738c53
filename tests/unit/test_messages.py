"""Messages: the contract, case by case, and what no payload whatsoever may do."""

import ast
import json
import math
import struct
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bridge.errors import Reason, Rejection
from bridge.messages import (
    CBOR,
    DAY,
    EPOCH,
    SECOND,
    Limits,
    MeterReading,
    Presence,
    Reading,
    VehicleReading,
    decode_status,
    decode_telemetry,
    decode_usual,
    encode_reading,
    printable,
)
from bridge.topics import DEVICE_ID, Kind

METER_EXAMPLE = (
    b'{"meterId": "MTR-001", "kwhConsumedAc": 0.4796, "voltage": 232.0, "timestamp": "2026-02-10T14:47:24.841Z"}'
)
VEHICLE_EXAMPLE = (
    b'{"vehicleId": "VEH-001", "soc": 20.7, "kwhDeliveredDc": 0.4227, "batteryTemp": 30.1, '
    b'"timestamp": "2026-02-10T14:47:24.841Z", "meterId": "MTR-001"}'
)
EXAMPLE_TS = 1_770_734_844_841_000
ARRIVAL = EXAMPLE_TS + 159_000
LIMITS = Limits()
MEBIBYTE = 1024 * 1024
LONGEST_DETAIL = 510

METER: dict[str, Any] = {"kwhConsumedAc": 0.5, "voltage": 230.0}
VEHICLE: dict[str, Any] = {"kwhDeliveredDc": 0.5, "soc": 50.0, "batteryTemp": 30.0}
BODIES = {Kind.METER: METER, Kind.VEHICLE: VEHICLE}


def decode(
    payload: bytes,
    kind: Kind = Kind.METER,
    device_id: str = "D",
    content_type: str | None = None,
    limits: Limits = LIMITS,
) -> Sequence[Reading | Rejection]:
    return decode_telemetry(kind, device_id, payload, content_type, ARRIVAL, limits)


def dumped(value: Any, content_type: str | None) -> bytes:
    return cbor2.dumps(value) if content_type == CBOR else json.dumps(value).encode()


def reading_of(body: dict[str, Any], kind: Kind = Kind.METER, content_type: str | None = None) -> Any:
    (reading,) = decode(dumped(body, content_type), kind, content_type=content_type)
    assert not isinstance(reading, Rejection)
    return reading


def rejection_of(payload: bytes, kind: Kind = Kind.METER, **others: Any) -> Rejection:
    with pytest.raises(Rejection) as caught:
        decode(payload, kind, **others)
    return caught.value


def assert_tells_something(rejection: Rejection) -> None:
    assert rejection.reason in Reason
    assert 0 < len(rejection.detail) <= LONGEST_DETAIL
    assert rejection.detail.isprintable()


both_formats = pytest.mark.parametrize("content_type", [None, CBOR], ids=["json", "cbor"])
both_kinds = pytest.mark.parametrize("kind", Kind)


# What the contract shows


def test_the_meter_payload_of_the_contract_is_a_reading() -> None:
    assert decode(METER_EXAMPLE, Kind.METER, "MTR-001") == (
        MeterReading("MTR-001", EXAMPLE_TS, 0.4796, 232.0, ARRIVAL, ts_from_arrival=False),
    )


def test_the_vehicle_payload_of_the_contract_is_a_reading() -> None:
    assert decode(VEHICLE_EXAMPLE, Kind.VEHICLE, "VEH-001") == (
        VehicleReading("VEH-001", EXAMPLE_TS, 0.4227, 20.7, 30.1, "MTR-001", ARRIVAL, ts_from_arrival=False),
    )


def test_snake_case_names_mean_the_same() -> None:
    snake_meter = {"meter_id": "MTR-001", "kwh_consumed_ac": 0.4796, "voltage": 232.0, "timestamp": EXAMPLE_TS / 1e6}
    snake_vehicle = {
        "vehicle_id": "VEH-001",
        "soc": 20.7,
        "kwh_delivered_dc": 0.4227,
        "battery_temp": 30.1,
        "timestamp": EXAMPLE_TS / 1e6,
        "meter_id": "MTR-001",
    }
    for kind, device_id, camel, snake in (
        (Kind.METER, "MTR-001", METER_EXAMPLE, snake_meter),
        (Kind.VEHICLE, "VEH-001", VEHICLE_EXAMPLE, snake_vehicle),
    ):
        assert decode(json.dumps(snake).encode(), kind, device_id) == decode(camel, kind, device_id)


@both_formats
@both_kinds
def test_unknown_fields_are_ignored(kind: Kind, content_type: str | None) -> None:
    body = BODIES[kind]
    strange = body | {"firmware": "1.2", "nested": {"a": [1, None]}, "": True, "deviceId": "other"}
    assert reading_of(strange, kind, content_type) == reading_of(body, kind, content_type)


@both_formats
def test_whole_numbers_are_numbers(content_type: str | None) -> None:
    reading = reading_of({"kwhConsumedAc": 1, "voltage": 230}, Kind.METER, content_type)
    assert reading.values == (1.0, 230.0)
    assert all(isinstance(value, float) for value in reading.values)


@both_formats
def test_the_plugged_in_meter_is_optional(content_type: str | None) -> None:
    assert reading_of(VEHICLE, Kind.VEHICLE, content_type).meter_id is None
    assert reading_of(VEHICLE | {"meterId": None}, Kind.VEHICLE, content_type).meter_id is None
    assert reading_of(VEHICLE | {"meterId": "m" * 128}, Kind.VEHICLE, content_type).meter_id == "m" * 128


# Time


@pytest.mark.parametrize(
    "timestamp",
    [
        "2026-02-10T14:47:24.841Z",
        "2026-02-10t14:47:24.841z",
        "2026-02-10 14:47:24.841Z",
        "2026-02-10T14:47:24.841+00:00",
        "2026-02-10T14:47:24.841-00:00",
        "2026-02-10T15:47:24.841+01:00",
        "2026-02-10T09:17:24.841-05:30",
        "2026-02-11T14:46:24.841+23:59",
        "2026-02-10T14:47:24.841000Z",
        1_770_734_844.841,
        1_770_734_844_841,
        1_770_734_844_841.0,
    ],
)
@both_formats
def test_one_moment_can_be_told_in_many_ways(timestamp: str | float, content_type: str | None) -> None:
    reading = reading_of(METER | {"timestamp": timestamp}, Kind.METER, content_type)
    assert (reading.ts, reading.ts_from_arrival) == (EXAMPLE_TS, False)


@pytest.mark.parametrize(
    ("timestamp", "ts"),
    [
        ("2026-02-10T14:47:24Z", 1_770_734_844_000_000),
        ("2026-02-10T14:47:24.000001Z", 1_770_734_844_000_001),
        ("2026-02-10T14:47:24.8Z", 1_770_734_844_800_000),
        (1_770_734_844, 1_770_734_844_000_000),
        (1_770_734_844.000001, 1_770_734_844_000_001),
        (1_770_734_844_001, 1_770_734_844_001_000),
    ],
)
def test_time_is_kept_to_the_microsecond(timestamp: str | float, ts: int) -> None:
    assert reading_of(METER | {"timestamp": timestamp}).ts == ts


def test_a_cbor_date_is_a_timestamp() -> None:
    moment = EPOCH + timedelta(microseconds=EXAMPLE_TS)
    for tagged in (moment, cbor2.CBORTag(1, EXAMPLE_TS / 1e6), cbor2.CBORTag(0, "2026-02-10T15:47:24.841+01:00")):
        assert reading_of(METER | {"timestamp": tagged}, Kind.METER, CBOR).ts == EXAMPLE_TS


@both_formats
@both_kinds
def test_without_a_timestamp_the_time_of_arrival_counts_and_the_reading_says_so(
    kind: Kind, content_type: str | None
) -> None:
    for body in (BODIES[kind], BODIES[kind] | {"timestamp": None}):
        reading = reading_of(body, kind, content_type)
        assert (reading.ts, reading.ts_from_arrival, reading.received_at) == (ARRIVAL, True, ARRIVAL)


@pytest.mark.parametrize(
    "timestamp",
    [
        "",
        " ",
        "now",
        "2026-02-10",
        "2026-02-10T14:47:24",  # no zone
        "2026-02-10T14:47:24.841",
        "2026-02-10T23:59:60Z",  # a leap second has no place in PostgreSQL either
        "2026-02-30T14:47:24Z",
        "2026-02-10T25:00:00Z",
        "2026-02-10T14:47:24+24:00",
        "2026-W07-2T14:47:24Z",  # a week date is ISO 8601 but not RFC 3339
        "2026-041T14:47:24Z",
        "20260210T144724Z",
        "2026-02-10_14:47:24Z",
        "2026-02-10T14:47:24Z ",
        "\uff12\uff10\uff12\uff16-02-10T14:47:24Z",
        "2026-02-10T14:47:24Z\0",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "1770734844",
        "9" * 400,
        "x" * 100_000,
        True,
        False,
        [],
        {},
        [1_770_734_844],
        float("nan"),
        float("inf"),
        float("-inf"),
    ],
)
@both_formats
def test_what_is_neither_rfc_3339_nor_epoch_is_an_invalid_timestamp(timestamp: Any, content_type: str | None) -> None:
    rejection = rejection_of(dumped(METER | {"timestamp": timestamp}, content_type), content_type=content_type)
    assert rejection.reason is Reason.INVALID_TIMESTAMP
    assert rejection.detail.startswith("timestamp: ")
    assert_tells_something(rejection)


@pytest.mark.parametrize(
    ("timestamp", "reason"),
    [
        ("0001-01-01T00:00:00Z", Reason.TIMESTAMP_TOO_OLD),
        ("0001-01-01T00:00:00+14:00", Reason.TIMESTAMP_TOO_OLD),  # the year 0 in UTC
        (0, Reason.TIMESTAMP_TOO_OLD),
        (-1, Reason.TIMESTAMP_TOO_OLD),
        (1e-300, Reason.TIMESTAMP_TOO_OLD),
        ("9999-12-31T23:59:59Z", Reason.TIMESTAMP_IN_FUTURE),
        ("9999-12-31T23:59:59-14:00", Reason.TIMESTAMP_IN_FUTURE),  # the year 10000 in UTC
        (99_999_999_999, Reason.TIMESTAMP_IN_FUTURE),
    ],
)
@both_formats
def test_far_away_times_are_told_from_invalid_ones(
    timestamp: str | float, reason: Reason, content_type: str | None
) -> None:
    payload = dumped(METER | {"timestamp": timestamp}, content_type)
    assert rejection_of(payload, content_type=content_type).reason is reason


@pytest.mark.parametrize("timestamp", [2**63, 10**25, 10**400, -(10**400), 1e300, -1e300, 1e308, -1.7e308])
@both_formats
@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "in an array"])
def test_times_beyond_all_calendars_are_rejected(timestamp: float, content_type: str | None, *, wrap: bool) -> None:
    body = METER | {"timestamp": timestamp}
    payload = dumped([body] if wrap else body, content_type)
    if wrap:
        (rejection,) = decode(payload, content_type=content_type)
        assert isinstance(rejection, Rejection)
    else:
        rejection = rejection_of(payload, content_type=content_type)
    assert rejection.reason in {
        Reason.INVALID_TIMESTAMP,
        Reason.TIMESTAMP_IN_FUTURE if timestamp > 0 else Reason.TIMESTAMP_TOO_OLD,
    }
    assert_tells_something(rejection)


def at(ts: int) -> bytes:
    return json.dumps(METER | {"timestamp": (EPOCH + timedelta(microseconds=ts)).isoformat()}).encode()


def test_the_future_begins_a_microsecond_after_five_minutes() -> None:
    (reading,) = decode(at(ARRIVAL + 300 * SECOND))
    assert not isinstance(reading, Rejection)
    assert rejection_of(at(ARRIVAL + 300 * SECOND + 1)).reason is Reason.TIMESTAMP_IN_FUTURE


def test_the_past_ends_a_microsecond_before_the_horizon() -> None:
    (reading,) = decode(at(ARRIVAL - 366 * DAY))
    assert not isinstance(reading, Rejection)
    assert rejection_of(at(ARRIVAL - 366 * DAY - 1)).reason is Reason.TIMESTAMP_TOO_OLD


@pytest.mark.parametrize("ahead", [-367 * DAY, 0, 301 * SECOND], ids=["too old", "now", "in the future"])
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (Kind.METER, {"meterId": "MTR-OTHER"}, Reason.ID_MISMATCH),
        (Kind.METER, {"kwhConsumedAc": 1_001}, Reason.OUT_OF_RANGE),
        (Kind.METER, {"voltage": 1_001}, Reason.OUT_OF_RANGE),
        (Kind.VEHICLE, {"vehicleId": "VEH-OTHER"}, Reason.ID_MISMATCH),
        (Kind.VEHICLE, {"kwhDeliveredDc": 1_001}, Reason.OUT_OF_RANGE),
        (Kind.VEHICLE, {"batteryTemp": 200}, Reason.OUT_OF_RANGE),
        (Kind.VEHICLE, {"meterId": "a b"}, Reason.INVALID_DEVICE_ID),
    ],
)
def test_whatever_our_clock_says_the_fault_of_a_reading_is_the_same(
    kind: Kind, change: dict[str, Any], reason: Reason, ahead: int
) -> None:
    body = METER if kind is Kind.METER else VEHICLE
    timestamp = (EPOCH + timedelta(microseconds=ARRIVAL + ahead)).isoformat()
    assert rejection_of(json.dumps(body | {"timestamp": timestamp} | change).encode(), kind).reason is reason


def test_horizon_and_future_are_configurable() -> None:
    limits = Limits(horizon_days=1, max_future_s=0)
    assert decode(at(ARRIVAL), limits=limits)
    assert rejection_of(at(ARRIVAL + 1), limits=limits).reason is Reason.TIMESTAMP_IN_FUTURE
    assert rejection_of(at(ARRIVAL - DAY - 1), limits=limits).reason is Reason.TIMESTAMP_TOO_OLD


@pytest.mark.parametrize(
    "limits",
    [
        {"horizon_days": 10**9},
        {"max_future_s": math.inf},
        {"max_future_s": 1e300},
        {"min_battery_temp": math.nan},
        {"max_battery_temp": math.nan},
        {"max_voltage": math.inf},
        {"min_battery_temp": 50, "max_battery_temp": -50},
    ],
)
def test_limits_that_limit_nothing_or_everything_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Limits(**limits)  # type: ignore[arg-type]


@both_formats
def test_an_array_of_too_many_readings_is_rejected_whole(content_type: str | None) -> None:
    payload = dumped([METER] * 4, content_type)
    with pytest.raises(Rejection) as caught:
        decode_telemetry(Kind.METER, "D", payload, content_type, ARRIVAL, Limits(max_array=3))
    assert caught.value.reason is Reason.ARRAY_TOO_LONG


# Whose reading


@both_formats
@both_kinds
def test_a_device_must_not_speak_for_another(kind: Kind, content_type: str | None) -> None:
    field = f"{kind}Id"
    assert reading_of(BODIES[kind] | {field: "D"}, kind, content_type).device_id == "D"
    for other in ("E", "d", "", "D ", "D\n", "D\0", "D" * 100_000, "\\'\"" * 100):
        payload = dumped(BODIES[kind] | {field: other}, content_type)
        rejection = rejection_of(payload, kind, content_type=content_type)
        assert rejection.reason is Reason.ID_MISMATCH
        assert_tells_something(rejection)


@pytest.mark.parametrize("meter_id", ["", "a b", "m" * 129, "m\n", "m\0", "ä", "a/b", "#"])
@both_formats
def test_the_plugged_in_meter_must_have_a_device_id(meter_id: str, content_type: str | None) -> None:
    payload = dumped(VEHICLE | {"meterId": meter_id}, content_type)
    assert rejection_of(payload, Kind.VEHICLE, content_type=content_type).reason is Reason.INVALID_DEVICE_ID


# Values


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Kind.METER, "kwhConsumedAc"),
        (Kind.METER, "voltage"),
        (Kind.VEHICLE, "kwhDeliveredDc"),
        (Kind.VEHICLE, "soc"),
        (Kind.VEHICLE, "batteryTemp"),
    ],
)
class TestEveryNumber:
    @both_formats
    @pytest.mark.parametrize("value", ["1", "", True, False, None, [], [1], {}, "NaN"])
    def test_is_nothing_but_a_number(self, kind: Kind, field: str, value: Any, content_type: str | None) -> None:
        rejection = rejection_of(dumped(BODIES[kind] | {field: value}, content_type), kind, content_type=content_type)
        assert rejection.reason is Reason.WRONG_TYPE
        assert field in rejection.detail

    @both_formats
    def test_must_be_there(self, kind: Kind, field: str, content_type: str | None) -> None:
        body = {name: value for name, value in BODIES[kind].items() if name != field}
        rejection = rejection_of(dumped(body, content_type), kind, content_type=content_type)
        assert rejection.reason is Reason.MISSING_FIELD
        assert field in rejection.detail

    @pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "-" + "9" * 400])
    def test_is_finite_in_json(self, kind: Kind, field: str, literal: str) -> None:
        payload = json.dumps(BODIES[kind] | {field: "?"}).replace('"?"', literal).encode()
        assert rejection_of(payload, kind).reason is Reason.OUT_OF_RANGE
        (rejection,) = decode(b"[" + payload + b"]", kind)
        assert isinstance(rejection, Rejection)
        # As an integer beyond all floats, pydantic no longer calls it a number.
        assert rejection.reason in {Reason.OUT_OF_RANGE, Reason.WRONG_TYPE}
        assert rejection.payload is not None

    @pytest.mark.parametrize(
        "value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), Decimal("NaN"), Decimal("1e999"), 2**80]
    )
    def test_is_finite_in_cbor(self, kind: Kind, field: str, value: Any) -> None:
        for wrapped in (BODIES[kind] | {field: value}, [BODIES[kind] | {field: value}]):
            try:
                (rejection,) = decode(cbor2.dumps(wrapped), kind, content_type=CBOR)
            except Rejection as raised:
                rejection = raised
            assert isinstance(rejection, Rejection)
            assert rejection.reason in {Reason.OUT_OF_RANGE, Reason.WRONG_TYPE, Reason.MALFORMED}
            assert_tells_something(rejection)

    @both_formats
    @pytest.mark.parametrize("value", [1e6, -1e6])
    def test_is_in_range(self, kind: Kind, field: str, value: float, content_type: str | None) -> None:
        rejection = rejection_of(dumped(BODIES[kind] | {field: value}, content_type), kind, content_type=content_type)
        assert rejection.reason is Reason.OUT_OF_RANGE
        assert field in rejection.detail


@pytest.mark.parametrize(
    ("kind", "field", "lowest", "highest"),
    [
        (Kind.METER, "kwhConsumedAc", 0, 2),
        (Kind.METER, "voltage", 0, 500),
        (Kind.VEHICLE, "kwhDeliveredDc", 0, 2),
        (Kind.VEHICLE, "soc", 0, 100),
        (Kind.VEHICLE, "batteryTemp", -10, 40),
    ],
)
def test_the_ends_of_a_range_are_within_it(kind: Kind, field: str, lowest: float, highest: float) -> None:
    limits = Limits(max_interval_kwh=2, max_voltage=500, min_battery_temp=-10, max_battery_temp=40)
    for value in (lowest, highest):
        (reading,) = decode(json.dumps(BODIES[kind] | {field: value}).encode(), kind, limits=limits)
        assert not isinstance(reading, Rejection)
    for value in (math.nextafter(lowest, -math.inf), math.nextafter(highest, math.inf)):
        payload = json.dumps(BODIES[kind] | {field: value}).encode()
        assert rejection_of(payload, kind, limits=limits).reason is Reason.OUT_OF_RANGE


# What is no message


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"\n\t ",
        b"\0",
        b"{",
        b'{"a"',
        b'{"a":1,}',
        b"{'a':1}",
        b"[",
        b"[1",
        b"[1,]",
        b"[1]]",
        b"{}{}",
        b"{} x",
        b"online",
        b"\xff",
        b"\xef\xbb\xbf" + METER_EXAMPLE,  # RFC 8259: no byte order mark
        METER_EXAMPLE.decode().encode("utf-16"),
        METER_EXAMPLE + b"\0",
        b'{"meterId":"\xff"}',
        b'["\xff"]',
        b'{"meterId":"\xed\xa0\x80"}',  # a surrogate in UTF-8
        b'{"meterId":"\xc0\x80"}',  # NUL in too many bytes
        b'{"meterId":"\\ud800"}',
        b'["\\udc00"]',
        b'{"meterId":"\0"}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"a":' * 1_000 + b"1" + b"}" * 1_000,
        b"[" * 1_000 + b"]" * 1_000,
        b"x" * MEBIBYTE,
        b" " * MEBIBYTE,
        b"[" + b"9" * 5_000 + b"]",
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_what_is_no_json_is_malformed(payload: bytes) -> None:
    rejection = rejection_of(payload)
    assert rejection.reason is Reason.MALFORMED
    assert_tells_something(rejection)


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "ff",  # a break with nothing to end
        "a1",
        "a100",
        "61ff",  # text that is not UTF-8
        "63eda080",
        "7f61ffff",
        "9b7fffffffffffffff",  # an array said to have 2**63 - 1 elements
        "bb7fffffffffffffff",
        "5b7fffffffffffffff",
        "7b7fffffffffffffff",
        "c06474657374",  # tags that say something else than what follows
        "c1a0",
        "c1f97c00",
        "c1fb7fefffffffffffff",
        "c2a0",
        "c4821b7fffffffffffffff01",  # 1e9223372036854775807
        "c5821b7fffffffffffffff01",
        "d81e820100",  # 1/0
        "d823612a",  # the regular expression *
        "d81d05",  # a reference to nothing
        "1c",  # reserved
        "81" * 5_000 + "00",
        "9f" * 5_000,
    ],
    ids=lambda payload: payload[:24],
)
def test_what_is_no_cbor_is_malformed(payload: str) -> None:
    rejection = rejection_of(bytes.fromhex(payload), content_type=CBOR)
    assert rejection.reason is Reason.MALFORMED
    assert_tells_something(rejection)


@pytest.mark.parametrize("trailing", [b"\0", b"\xff", cbor2.dumps(METER), METER_EXAMPLE])
def test_bytes_after_a_cbor_reading_are_malformed_as_they_are_after_json(trailing: bytes) -> None:
    assert rejection_of(cbor2.dumps(METER) + trailing, content_type=CBOR).reason is Reason.MALFORMED
    assert rejection_of(json.dumps(METER).encode() + trailing).reason is Reason.MALFORMED


@pytest.mark.parametrize("payload", [b"null", b"1", b'"online"', b"true", b"1e999", b" 0 "])
def test_json_that_is_no_object_is_not_a_reading(payload: bytes) -> None:
    rejection = rejection_of(payload)
    assert rejection.reason is Reason.NOT_AN_OBJECT
    assert_tells_something(rejection)


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "online",
        b"bytes",
        2**80,
        math.nan,
        cbor2.undefined,
        cbor2.CBORSimpleValue(99),
        cbor2.CBORTag(9999, METER),
    ],
    ids=repr,
)
def test_cbor_that_is_no_map_is_not_a_reading(value: Any) -> None:
    rejection = rejection_of(cbor2.dumps(value), content_type=CBOR)
    assert rejection.reason is Reason.NOT_AN_OBJECT
    assert_tells_something(rejection)


@pytest.mark.parametrize("payload", [b"{}", b' {"a": 1} ', b'{"kwhconsumedac": 1, "Voltage": 2}'])
def test_an_object_of_something_else_misses_fields(payload: bytes) -> None:
    assert rejection_of(payload).reason is Reason.MISSING_FIELD


def test_a_rejection_names_no_class_of_ours() -> None:
    details = [
        rejection_of(b"\xf6", content_type=CBOR).detail,
        rejection_of(b"null").detail,
        *(item.detail for item in decode(b"[1]") if isinstance(item, Rejection)),
    ]
    assert len(details) == 3
    assert not any("MeterPayload" in detail for detail in details)


@both_formats
def test_control_characters_of_a_payload_do_not_reach_the_detail(content_type: str | None) -> None:
    for body in (METER | {"meterId": "\0\x1b[31m\n\x9b\u202e"}, METER | {"timestamp": "\0\x1b[31m\n\x9b\u202e"}):
        assert_tells_something(rejection_of(dumped(body, content_type), content_type=content_type))


@both_formats
def test_a_mebibyte_in_a_field_makes_no_long_detail(content_type: str | None) -> None:
    for field in ("meterId", "timestamp", "voltage"):
        payload = dumped(METER | {field: "x" * MEBIBYTE}, content_type)
        assert_tells_something(rejection_of(payload, content_type=content_type))
    assert reading_of(METER | {"unknown": "x" * MEBIBYTE}, Kind.METER, content_type).values == (0.5, 230.0)


def test_a_field_that_is_said_twice_counts_as_the_last_time() -> None:
    (reading,) = decode(b'{"voltage": 1, "kwhConsumedAc": 1, "voltage": 2}')
    assert isinstance(reading, MeterReading)
    assert reading.voltage == 2


def test_white_space_around_a_message_means_nothing() -> None:
    assert decode(b" \r\n\t" + METER_EXAMPLE + b"\n", device_id="MTR-001") == decode(METER_EXAMPLE, device_id="MTR-001")
    assert list(decode(b" \r\n\t[" + METER_EXAMPLE + b"]\n", device_id="MTR-001")) == list(
        decode(METER_EXAMPLE, device_id="MTR-001")
    )


@pytest.mark.parametrize("content_type", [None, "", "application/json", "text/plain", "application/octet-stream"])
def test_every_other_content_type_is_json(content_type: str | None) -> None:
    assert len(decode(METER_EXAMPLE, device_id="MTR-001", content_type=content_type)) == 1
    assert rejection_of(cbor2.dumps(METER), content_type=content_type).reason is Reason.MALFORMED


@pytest.mark.parametrize("content_type", ["application/cbor", "Application/CBOR"])
def test_the_content_type_of_cbor_is_known_in_any_case(content_type: str) -> None:
    assert len(decode(cbor2.dumps(METER), content_type=content_type)) == 1


# Arrays


def moments(count: int) -> list[dict[str, Any]]:
    return [METER | {"timestamp": EXAMPLE_TS // SECOND - 60 * n} for n in range(count)]


@both_formats
def test_an_array_is_its_readings_in_its_order(content_type: str | None) -> None:
    readings = decode(dumped(moments(100), content_type), content_type=content_type)
    assert [reading.ts for reading in readings if not isinstance(reading, Rejection)] == [
        (EXAMPLE_TS // SECOND - 60 * n) * SECOND for n in range(100)
    ]


@both_formats
def test_a_rejected_element_of_an_array_stands_in_its_place_with_its_own_payload(content_type: str | None) -> None:
    good = moments(4)
    bad: list[Any] = [{"voltage": 1}, METER | {"timestamp": "never"}, METER | {"meterId": "other", "timestamp": 0}]
    elements = [good[0], bad[0], good[1], bad[1], bad[2], good[2], good[3]]
    decoded = decode(dumped(elements, content_type), content_type=content_type)
    assert [isinstance(item, Rejection) for item in decoded] == [element in bad for element in elements]
    load = cbor2.loads if content_type == CBOR else json.loads
    said = [load(item.payload or b"") for item in decoded if isinstance(item, Rejection)]
    assert said == bad


@both_formats
@pytest.mark.parametrize("element", [None, 1, "x", True, [], [METER], {}])
def test_an_element_that_is_no_reading_does_no_harm_to_its_neighbours(element: Any, content_type: str | None) -> None:
    first, second = moments(2)
    before, rejection, after = decode(dumped([first, element, second], content_type), content_type=content_type)
    assert isinstance(before, MeterReading)
    assert isinstance(after, MeterReading)
    assert isinstance(rejection, Rejection)
    assert rejection.reason is (Reason.MISSING_FIELD if element == {} else Reason.NOT_AN_OBJECT)


@both_formats
def test_an_array_of_several_needs_timestamps(content_type: str | None) -> None:
    decoded = decode(
        dumped([METER, moments(1)[0], METER | {"timestamp": None}], content_type), content_type=content_type
    )
    assert [item.reason if isinstance(item, Rejection) else None for item in decoded] == [
        Reason.MISSING_FIELD,
        None,
        Reason.MISSING_FIELD,
    ]


@both_formats
def test_an_array_of_one_needs_no_timestamp(content_type: str | None) -> None:
    (reading,) = decode(dumped([METER], content_type), content_type=content_type)
    assert isinstance(reading, MeterReading)
    assert (reading.ts, reading.ts_from_arrival) == (ARRIVAL, True)


@both_formats
def test_an_empty_array_is_rejected(content_type: str | None) -> None:
    assert rejection_of(dumped([], content_type), content_type=content_type).reason is Reason.EMPTY_ARRAY


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_non_finite_element_can_be_decoded_again_with_the_same_verdict(literal: str) -> None:
    (rejection,) = decode(f'[{{"kwhConsumedAc": 1, "voltage": {literal}}}]'.encode())
    assert isinstance(rejection, Rejection)
    assert rejection.reason is Reason.OUT_OF_RANGE
    assert rejection_of(rejection.payload or b"").reason is Reason.OUT_OF_RANGE


def test_an_element_with_text_beyond_ascii_stays_the_same_text() -> None:
    (rejection,) = decode('[{"name": "Zähler \\ud83d\\ude00 \\u0000"}]'.encode())
    assert isinstance(rejection, Rejection)
    assert json.loads(rejection.payload or b"") == {"name": "Zähler 😀 \0"}


# CBOR that wants to do harm


def test_indefinite_lengths_are_taken() -> None:
    text, number = b"\x7f\x63vol\x64tage\xff", struct.pack(">Bd", 0xFB, 230.0)
    payload = b"\x9f\xbf" + text + number + cbor2.dumps("kwhConsumedAc") + b"\x01\xff\xff"
    (reading,) = decode(payload, content_type=CBOR)
    assert isinstance(reading, MeterReading)
    assert reading.values == (1.0, 230.0)


HOSTILE = {
    "an array that is its own element": "81d81c81d81d00",
    "a message that is its own element": "d81c81d81d00",
    "a message that is its own element, and another": "d81c82d81d00a0",
    "a map that is its own value": "81d81ca16161d81d00",
    "two elements that are one cycle": "82d81ca1f6d81d00a0",
    "a shared element": "82d81ca16161d81c80d81d00",
    "a date": "81c074323032362d30322d31305431343a34373a32345a",
    "a date of long ago": "81a16161c07819303030312d30312d30315430303a30303a30302b31343a3030",
    "a regular expression": "81a16161d8236161",
    "an e-mail": "81a16161d82466613a20620a0a",
    "a set": "81d9010281a0",
    "a decimal": "81a16161c4820118ff",
    "a fraction": "81a16161d81e820103",
    "a UUID": "81d825500102030405060708090a0b0c0d0e0f10",
    "an address": "81d9010444c0a80101",
    "a network": "81d90105a144c0a801011818",
    "a bignum": "81a16161c249ffffffffffffffffff",
    "bytes": "81a1616143ff00ff",
    "an undefined value": "81a16161f7",
    "a map as a key": "81a1a000",
    "an array as a key": "81a18000",
    "not a number as a key": "81a1f97e0000",
    "a string that refers to another": "d9010081a2646161616100d8190000",
    "the same key twice": "81a201020103",
    "an unknown tag": "81da7fffffffa0",
    "an unknown simple value": "81f8ff",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_rejected_cbor_element_never_raises_anything_else(payload: str) -> None:
    try:
        decoded = decode(bytes.fromhex(payload), content_type=CBOR)
    except Rejection as rejection:
        assert_tells_something(rejection)
    else:
        assert decoded
        for item in decoded:
            assert isinstance(item, Rejection)
            assert_tells_something(item)


def shared(depth: int) -> list[bytes]:
    """Arrays of which each has the one before twice: `depth` of them, in place of 2 ** depth values."""
    first = b"\xd8\x1c\x80"
    return [first, *(b"\xd8\x1c\x82" + 2 * (b"\xd8\x1d" + cbor2.dumps(n)) for n in range(depth - 1))]


def test_references_do_not_make_a_small_message_a_large_dead_letter() -> None:
    """A billion laughs: with twice the depth, the payload would be a gigabyte."""
    parts = shared(16)
    payload = cbor2.dumps(list(range(16)))[:1] + b"".join(parts)
    try:
        decoded = decode(payload, content_type=CBOR)
    except Rejection as rejection:
        decoded = [rejection]
    size = sum(len(item.payload or b"") for item in decoded if isinstance(item, Rejection))
    assert size < 100 * len(payload)


def least_seconds(payload: bytes) -> float:
    """The best of three: what else the machine does is not the message's fault."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        decode_or_reject(payload, Kind.METER, CBOR)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_references_do_not_make_a_small_message_take_long() -> None:
    """The same as the key of a map, whose hash is computed value by value: with twice the depth, for days."""
    parts = shared(23)
    assert least_seconds(b"\xa1" + cbor2.dumps([0] * 23)[:1] + b"".join(parts) + b"\0") < 0.02


def test_repeated_strings_do_not_make_a_small_message_a_large_dead_letter() -> None:
    text = cbor2.dumps("x" * 10_000)
    payload = b"\xd9\x01\x00\x81\x82" + text + b"\x99\x03\xe8" + b"\xd8\x19\x00" * 1_000
    rejections = decode_or_reject(payload, Kind.METER, CBOR)
    assert sum(len(item.payload or b"") for item in rejections if isinstance(item, Rejection)) < 100 * len(payload)


def test_a_fraction_of_huge_numbers_does_not_take_long() -> None:
    """A fraction is reduced to lowest terms, in a time that is quadratic in its length."""
    payload = b"\xa1\x61x\xd8\x1e\x82" + cbor2.dumps(3**200_000) + cbor2.dumps(2**320_000 - 1)
    assert least_seconds(payload) < 0.02


# Status


def test_a_status_is_online_or_offline() -> None:
    assert decode_status(Kind.METER, "D", b"online", ARRIVAL) == Presence(
        "D", Kind.METER, online=True, received_at=ARRIVAL
    )
    assert decode_status(Kind.VEHICLE, "D", b"offline", ARRIVAL) == Presence(
        "D", Kind.VEHICLE, online=False, received_at=ARRIVAL
    )


@pytest.mark.parametrize(
    "payload", [b"", b"Online", b"online\n", b'"online"', b"1", b"\xff", b"online\0", METER_EXAMPLE]
)
def test_any_other_status_is_rejected(payload: bytes) -> None:
    with pytest.raises(Rejection) as caught:
        decode_status(Kind.METER, "D", payload, ARRIVAL)
    assert caught.value.reason is Reason.INVALID_STATUS
    assert_tells_something(caught.value)


# What holds for every payload

kinds = st.sampled_from(Kind)
device_ids = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
content_types = st.sampled_from([None, CBOR, "application/json"])
ODD_BYTES = [
    b'"',
    b"\\",
    b",",
    b":",
    b"{}",
    b"[",
    b"]",
    b"e",
    b"-",
    b".",
    b"0",
    b"null",
    b"NaN",
    b"\xff",
    b"\x00",
    b" ",
    b"Z",
    b"+",
]
names = st.sampled_from(
    [
        *("meterId", "meter_id", "vehicleId", "vehicle_id", "kwhConsumedAc", "kwhDeliveredDc", "kwh_delivered_dc"),
        *("voltage", "soc", "batteryTemp", "battery_temp", "timestamp", "other"),
    ]
)
plausible_times = (
    st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
    | st.floats(EXAMPLE_TS / SECOND - 1e8, EXAMPLE_TS / SECOND + 1e3)
    | st.integers(EXAMPLE_TS // 1_000 - 10**11, EXAMPLE_TS // 1_000 + 10**6)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**400)
    | st.floats()
    | st.floats(0, 100)
    | st.text()
    | st.just("D")
    | plausible_times
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=4), inner, max_size=8),
    max_leaves=12,
)
meter_bodies = st.fixed_dictionaries(
    {"kwhConsumedAc": st.floats(0, 1000) | scalars, "voltage": st.floats(0, 1000) | scalars},
    optional={"timestamp": plausible_times | scalars, "meterId": st.just("D") | scalars, "other": documents},
)
vehicle_bodies = st.fixed_dictionaries(
    {
        "kwhDeliveredDc": st.floats(0, 1000) | scalars,
        "soc": st.floats(0, 100) | scalars,
        "batteryTemp": st.floats(-60, 150) | scalars,
    },
    optional={
        "timestamp": plausible_times | scalars,
        "vehicleId": st.just("D") | scalars,
        "meterId": device_ids | scalars,
    },
)
bodies = meter_bodies | vehicle_bodies | documents
# Arrays and maps of everything CBOR has, and the tags that Python gives a meaning.
TAGS = [0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799]
cbor_items = st.recursive(
    st.binary(max_size=24).map(cbor2.dumps) | scalars.map(cbor2.dumps) | st.binary(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: bytes([0x80 + len(items)]) + b"".join(items))
        | st.lists(st.tuples(inner, inner), max_size=4).map(
            lambda items: bytes([0xA0 + len(items)]) + b"".join(key + value for key, value in items)
        )
        | st.tuples(
            st.sampled_from(TAGS),
            inner,
        ).map(lambda tagged: cbor2.dumps(cbor2.CBORTag(tagged[0], 0))[:-1] + tagged[1])
    ),
    max_leaves=10,
)


def decode_or_reject(payload: bytes, kind: Kind, content_type: str | None) -> Sequence[Reading | Rejection]:
    try:
        return decode(payload, kind, content_type=content_type)
    except Rejection as rejection:
        return [rejection]


def assert_keeps_the_contract(items: Sequence[Reading | Rejection]) -> None:
    assert items
    for item in items:
        if isinstance(item, Rejection):
            assert_tells_something(item)
            assert item.payload is None or isinstance(item.payload, bytes)
            continue
        assert item.device_id == "D"
        assert ARRIVAL - 366 * DAY <= item.ts <= ARRIVAL + 300 * SECOND
        assert item.received_at == ARRIVAL
        assert item.ts == ARRIVAL or not item.ts_from_arrival
        if isinstance(item, MeterReading):
            assert 0 <= item.kwh_ac <= 1000
            assert 0 <= item.voltage <= 1000
        else:
            assert 0 <= item.kwh_dc <= 1000
            assert 0 <= item.soc <= 100
            assert -60 <= item.battery_temp <= 150
            assert item.meter_id is None or DEVICE_ID.fullmatch(item.meter_id)
        assert all(isinstance(value, float | str | None) for value in item.values)


@given(st.binary(max_size=200) | st.text().map(str.encode), kinds, content_types)
@example(b"", Kind.METER, None)
@example(bytes.fromhex(HOSTILE["a message that is its own element"]), Kind.METER, CBOR)
def test_no_bytes_do_more_harm_than_a_rejection(payload: bytes, kind: Kind, content_type: str | None) -> None:
    assert_keeps_the_contract(decode_or_reject(payload, kind, content_type))


@given(bodies | st.lists(bodies, max_size=4), kinds, st.sampled_from([None, CBOR]))
@example(METER | {"timestamp": 10**400}, Kind.METER, None)
@example([METER | {"timestamp": 1e308}], Kind.METER, CBOR)
def test_no_document_does_more_harm_than_a_rejection_and_every_reading_keeps_the_limits(
    document: Any, kind: Kind, content_type: str | None
) -> None:
    assert_keeps_the_contract(decode_or_reject(dumped(document, content_type), kind, content_type))


@given(st.lists(bodies, min_size=2, max_size=5), kinds)
def test_json_and_cbor_give_the_same_readings(documents: list[Any], kind: Kind) -> None:
    as_json = decode_or_reject(dumped(documents, None), kind, None)
    as_cbor = decode_or_reject(dumped(documents, CBOR), kind, CBOR)
    accepted = [[item for item in items if not isinstance(item, Rejection)] for items in (as_json, as_cbor)]
    # Text that one of the two formats cannot hold makes all of that message malformed.
    if len(as_json) == len(as_cbor):
        assert accepted[0] == accepted[1]


@given(cbor_items, kinds)
def test_no_cbor_item_does_more_harm_than_a_rejection(payload: bytes, kind: Kind) -> None:
    assert_keeps_the_contract(decode_or_reject(payload, kind, CBOR))
    assert_keeps_the_contract(decode_or_reject(b"\x81" + payload, kind, CBOR))


@given(
    bodies.map(lambda body: json.dumps(body).encode()) | st.sampled_from([METER_EXAMPLE, VEHICLE_EXAMPLE]),
    kinds,
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 3), st.sampled_from(ODD_BYTES) | st.binary(max_size=2)),
        max_size=2,
    ),
)
@settings(max_examples=1_000)
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "voltage": 3}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "meter_id": "E"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "meterId": "D", "meter_id": "E"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "kwh_consumed_ac": 3}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "other": "\xff"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "other": "\\ud800"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "other": ' + b"[" * 190 + b"]" * 190 + b"}", Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "other": ' + b"[" * 600 + b"]" * 600 + b"}", Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "timestamp": "2026-02-10T14:47:24.9999999Z"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "timestamp": "2026-W07-2T14:47:24.841Z"}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "timestamp": 1770734844841}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "timestamp": true}', Kind.METER, [])
@example(b'{"kwhConsumedAc": 1, "voltage": 2, "timestamp": {}}', Kind.METER, [])
def test_the_quick_way_to_decode_says_what_the_long_way_says(
    payload: bytes, kind: Kind, damage: list[tuple[int, int, bytes]]
) -> None:
    for place, length, instead in damage:
        payload = payload[:place] + instead + payload[place + length :]
    quick = decode_usual(kind, "D", payload, ARRIVAL, LIMITS)
    assert quick is None or (quick,) == tuple(decode_or_reject(payload, kind, None))


def test_the_usual_messages_take_the_quick_way() -> None:
    for kind, device_id, payload in (
        (Kind.METER, "MTR-001", METER_EXAMPLE),
        (Kind.VEHICLE, "VEH-001", VEHICLE_EXAMPLE),
    ):
        assert (decode_usual(kind, device_id, payload, ARRIVAL, LIMITS),) == decode(payload, kind, device_id)


energies = st.floats(0, LIMITS.max_interval_kwh)
times = st.integers(ARRIVAL - LIMITS.horizon_days * DAY, ARRIVAL + round(LIMITS.max_future_s) * SECOND)
readings = st.builds(
    MeterReading, device_ids, times, energies, st.floats(0, LIMITS.max_voltage), st.just(ARRIVAL), st.just(value=False)
) | st.builds(
    VehicleReading,
    device_ids,
    times,
    energies,
    st.floats(0, 100),
    st.floats(LIMITS.min_battery_temp, LIMITS.max_battery_temp),
    st.none() | device_ids,
    st.just(ARRIVAL),
    st.just(value=False),
)


@given(readings)
def test_an_encoded_reading_decodes_to_itself(reading: Reading) -> None:
    kind = Kind.METER if isinstance(reading, MeterReading) else Kind.VEHICLE
    assert decode(encode_reading(reading), kind, reading.device_id) == (reading,)


def test_a_reading_is_encoded_in_the_names_of_the_contract() -> None:
    for kind, device_id, payload in (
        (Kind.METER, "MTR-001", METER_EXAMPLE),
        (Kind.VEHICLE, "VEH-001", VEHICLE_EXAMPLE),
    ):
        (reading,) = decode(payload, kind, device_id)
        assert not isinstance(reading, Rejection)
        said = json.loads(encode_reading(reading))
        assert said | {"timestamp": ""} == json.loads(payload) | {"timestamp": ""}
        assert said["timestamp"] == "2026-02-10T14:47:24.841000Z"


@given(st.text(st.characters()), st.integers(1, 600))
def test_printable_text_is_printable_and_not_endless(text: str, longest: int) -> None:
    cleaned = printable(text, longest)
    assert cleaned.isprintable()
    assert len(cleaned) <= longest + 1
    cleaned.encode()
    assert cleaned == text or not text.isprintable() or len(text) > longest


def test_every_reason_is_produced_by_a_test() -> None:
    """The reasons of the database are tested where the database is, and all others here or with the topics."""
    found = set()
    for name in ("test_messages.py", "test_topics.py"):
        for node in ast.walk(ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason":
                found.add(node.attr)
    elsewhere = {"CONFLICT", "REFUSED_BY_DATABASE", "UNEXPECTED"}
    assert {reason.name for reason in Reason} - elsewhere - found == set()
