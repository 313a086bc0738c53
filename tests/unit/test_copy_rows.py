"""Binary COPY: read back by a reader that knows PostgreSQL's documentation and nothing of the writer."""

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.messages import MeterReading, Reading, VehicleReading
from bridge.store import copy_rows

Field = bytes | None
UNIX = datetime(1970, 1, 1, tzinfo=UTC)
POSTGRES = datetime(2000, 1, 1, tzinfo=UTC)
# What datetime can say, in microseconds since 1970: the years 1 to 9999.
EARLIEST = (datetime.min.replace(tzinfo=UTC) - UNIX) // timedelta(microseconds=1)
LATEST = (datetime.max.replace(tzinfo=UTC) - UNIX) // timedelta(microseconds=1)

device_ids = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
times = st.integers(EARLIEST, LATEST)
numbers = st.floats(allow_nan=False, allow_infinity=False)
meters = st.builds(MeterReading, device_ids, times, numbers, numbers, times, st.booleans())
vehicles = st.builds(
    VehicleReading, device_ids, times, numbers, numbers, numbers, st.none() | device_ids, times, st.booleans()
)


def read_copy(stream: bytes) -> Iterator[list[Field]]:
    """The tuples of a binary COPY stream; None is NULL. Source: "Binary Format" of the documentation of COPY."""
    assert stream[:11] == b"PGCOPY\n\xff\r\n\0"
    flags, extension = struct.unpack_from("!II", stream, 11)
    assert flags == 0
    at = 19 + extension
    while (columns := int.from_bytes(stream[at : at + 2], "big", signed=True)) != -1:
        at += 2
        row: list[Field] = []
        for _ in range(columns):
            length = int.from_bytes(stream[at : at + 4], "big", signed=True)
            at += 4
            assert length >= -1
            row.append(None if length == -1 else stream[at : at + length])
            assert length == -1 or len(row[-1] or b"") == length
            at += max(length, 0)
        yield row
    assert stream[at:] == b"\xff\xff"


def text(field: Field) -> str | None:
    return None if field is None else field.decode("utf-8")


def real(field: Field) -> float:
    assert field is not None
    (value,) = struct.unpack("!d", field)
    return float(value)


def time(field: Field) -> int:
    """timestamptz: microseconds since 2000, told as microseconds since 1970."""
    assert field is not None
    assert len(field) == 8
    moment = POSTGRES + timedelta(microseconds=int.from_bytes(field, "big", signed=True))
    return (moment - UNIX) // timedelta(microseconds=1)


def truth(field: Field) -> bool:
    assert field in {b"\0", b"\1"}
    return field == b"\1"


METER = (text, time, real, real, time, truth)
VEHICLE = (text, time, real, real, real, text, time, truth)


def readings_in(stream: bytes) -> list[Reading]:
    shapes = {6: (MeterReading, METER), 8: (VehicleReading, VEHICLE)}
    found: list[Reading] = []
    for row in read_copy(stream):
        make, columns = shapes[len(row)]
        found.append(make(*(column(field) for column, field in zip(columns, row, strict=True))))
    return found


@given(st.lists(meters) | st.lists(vehicles))
@example([MeterReading("M", EARLIEST, 0.0, -0.0, LATEST, ts_from_arrival=True)])
@example([VehicleReading("V", -1, 5e-324, 1.7976931348623157e308, -60.0, None, 0, ts_from_arrival=False)])
def test_every_reading_is_read_back_as_it_was(readings: list[Reading]) -> None:
    assert readings_in(copy_rows(readings)) == readings


@pytest.mark.parametrize("length", range(1, 129))
def test_ids_of_every_length_keep_the_columns_in_place(length: int) -> None:
    readings = [
        VehicleReading("v" * length, 1, 2.0, 3.0, 4.0, "m" * (129 - length), 5, ts_from_arrival=True),
        VehicleReading("v" * length, 2, 2.0, 3.0, 4.0, None, 5, ts_from_arrival=False),
    ]
    assert readings_in(copy_rows(readings)) == readings
    meter = MeterReading("m" * length, 1, 2.0, 3.0, 4, ts_from_arrival=False)
    assert readings_in(copy_rows([meter])) == [meter]


def test_no_meter_is_null_and_not_an_empty_text() -> None:
    reading = VehicleReading("V", 1, 2.0, 3.0, 4.0, None, 5, ts_from_arrival=True)
    (row,) = read_copy(copy_rows([reading]))
    assert row[5] is None


def test_times_before_2000_are_negative() -> None:
    before = (datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC) - UNIX) // timedelta(microseconds=1)
    (row,) = read_copy(copy_rows([MeterReading("M", before, 1.0, 2.0, before + 1, ts_from_arrival=False)]))
    assert row[1] == b"\xff" * 8
    assert row[4] == b"\0" * 8


def test_no_readings_are_a_stream_of_no_rows() -> None:
    assert list(read_copy(copy_rows([]))) == []
