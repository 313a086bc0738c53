"""Charger assignments: what a CSV may say, how what is wrong with it is named, and what an import comes to."""

import contextlib
import io
import re
from datetime import UTC, datetime, timedelta
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.assignments import (
    COLUMNS,
    MOST_PROBLEMS_NAMED,
    Assignment,
    Mode,
    difference,
    parse,
    parse_time,
    write_csv,
)
from bridge.errors import ExitCode, WattbridgeError

HEADER = "vehicle_id,meter_id,valid_from,valid_until"
JANUARY, FEBRUARY, MARCH = (datetime(2026, month, 1, tzinfo=UTC) for month in (1, 2, 3))


def read(*rows: str, header: str = HEADER) -> list[Assignment]:
    return list(parse("\n".join([header, *rows]).encode()).values())


def error_of(data: str | bytes) -> str:
    with pytest.raises(WattbridgeError) as caught:
        parse(data if isinstance(data, bytes) else data.encode())
    assert caught.value.exit_code is ExitCode.PROBLEM
    return str(caught.value)


def problems(*rows: str, header: str = HEADER) -> list[str]:
    """What is said of a file, but for the line that counts the problems."""
    first, *said = error_of("\n".join([header, *rows])).splitlines()
    assert re.fullmatch(r"(1 problem|\d+ problems), nothing was imported", first)
    return [line.removeprefix("  ") for line in said]


def the_problem(*rows: str, header: str = HEADER) -> str:
    (said,) = problems(*rows, header=header)
    return said


# Files that are right


def test_a_file() -> None:
    lines = parse(
        f"{HEADER}\n"
        "VEH-1,MTR-1,2026-01-01,2026-02-01T01:00:00+01:00\n"
        "\n"
        "VEH-1,MTR-2,2026-02-01T00:00:00.5Z,\n"
        ",,,\n"
        "VEH-2,MTR-1,,\n".encode()
    )
    assert lines == {
        2: Assignment("VEH-1", "MTR-1", JANUARY, FEBRUARY),
        4: Assignment("VEH-1", "MTR-2", FEBRUARY + timedelta(milliseconds=500), None),
        6: Assignment("VEH-2", "MTR-1", None, None),
    }


@pytest.mark.parametrize(
    "data",
    [
        HEADER.encode() + b"\nV,M,2026-01-01,\n",
        b"\xef\xbb\xbf" + HEADER.encode() + b"\r\nV,M,2026-01-01,\r\n",
        HEADER.encode() + b"\rV,M,2026-01-01,",
        HEADER.replace(",", ";").encode() + b"\nV;M;2026-01-01;\n",
        b"valid_until,meter_id,valid_from,vehicle_id\n,M,2026-01-01,V",
        b' "vehicle_id", "meter_id", valid_from , valid_until\n"V", "M","2026-01-01",""\n',
        HEADER.encode() + b"\n V ,\tM,  2026-01-01T01:00:00+01:00 , \n",
    ],
    ids=["plain", "bom-crlf", "cr", "semicolons", "other-order", "quotes", "blanks"],
)
def test_ways_to_write_the_same(data: bytes) -> None:
    assert list(parse(data).values()) == [Assignment("V", "M", JANUARY, None)]


def test_a_file_without_assignments() -> None:
    assert read() == []


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-01", JANUARY),
        ("2026-01-01T00:00:00Z", JANUARY),
        ("2026-01-01t00:00:00z", JANUARY),
        ("2026-01-01 05:30:00+05:30", JANUARY),
        ("2025-12-31T23:59:59.999999-00:00", JANUARY - timedelta(microseconds=1)),
        ("0001-01-01", datetime.min.replace(tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_times(text: str, moment: datetime) -> None:
    parsed = parse_time(text)
    assert parsed == moment
    assert parsed.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "0", "1767225600", "infinity", "2026", "2026-01", "20260101", "2026-W01-1", "01.01.2026"),
        *("2026-02-30", "2026-01-01T", "2026-01-01T00:00Z", "2026-01-01T25:00:00Z", "2026-01-01T00:00:00+0100"),
        *("2026-01-01T00:00:00+25:00", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "٢٠٢٦-01-01"),
    ],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no time; allowed is RFC 3339 with a zone"):
        parse_time(text)


def test_a_time_without_a_zone() -> None:
    with pytest.raises(ValueError, match="'2026-01-01T00:00:00' has no zone; allowed is RFC 3339 with a zone"):
        parse_time("2026-01-01T00:00:00")


# Files that are not


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", ["missing column 'vehicle_id'", "missing column 'valid_until'"]),
        ("VEH-1,MTR-1,,", ["unknown column 'VEH-1'", "unknown column ''", "missing column 'meter_id'"]),
        ("vehicle_id,meter_id,valid_from", ["missing column 'valid_until'"]),
        (f"{HEADER},note", ["unknown column 'note'"]),
        (f"{HEADER},meter_id", ["column 'meter_id' stands there twice"]),
        ('"vehicle_id', ["is not CSV"]),
        ("\x1b[31mvehicle_id", ["unknown column '\ufffd[31mvehicle_id'"]),
    ],
)
def test_a_header_that_is_wrong(header: str, said: list[str]) -> None:
    problem = the_problem("VEH-1,MTR-1,,", header=header)
    assert problem.startswith("line 1: ")
    for text in said:
        assert text in problem
    assert "CSV" in problem or problem.endswith(f"; it must be the header: {HEADER}")


def test_an_empty_file() -> None:
    assert "line 1: missing column 'vehicle_id'" in error_of(b"")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (",M,,", "line 2: vehicle_id '' is no device id; allowed are 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ("V,M/1,,", "line 2: meter_id 'M/1' is no device id; allowed are 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ("V" * 129 + ",M,,", f"line 2: vehicle_id '{'V' * 64}…' is no device id; allowed are 1 to 128 of"),
        ("V,\x1b[2J\x00,,", "line 2: meter_id '\ufffd[2J\ufffd' is no device id"),
        ("V,M,yesterday,", "line 2: valid_from 'yesterday' is no time; allowed is RFC 3339 with a zone"),
        ("V,M,,2026-01-01T00:00:00", "line 2: valid_until '2026-01-01T00:00:00' has no zone; allowed is RFC 3339"),
        ("V,M,2026-02-01,2026-01-01", "line 2: valid_until '2026-01-01' must be after valid_from '2026-02-01'"),
        ("V,M,2026-01-01,2026-01-01T00:00:00Z", "line 2: valid_until '2026-01-01T00:00:00Z' must be after valid_from"),
        ("V,M", f"line 2: 2 values, but the header names 4: {HEADER}"),
        ("V,M,,,", f"line 2: 5 values, but the header names 4: {HEADER}"),
        ('V,"M,,', "line 2: is not CSV (unexpected end of data); quotes open and close around one value"),
        ('V,"M"x,,', "line 2: is not CSV"),
        ("V," + "M" * 200_000 + ",,", "line 2: is not CSV (field larger than field limit"),
    ],
)
def test_a_row_that_is_wrong(row: str, said: str) -> None:
    assert the_problem(row, "V2,M2,,").startswith(said)


def test_every_problem_is_named() -> None:
    said = problems("V 1,M 1,x,y", "V2,M2,,", '"V3,M3,,', "V4,M4,,", "V2,M5,,", "V6,M6,2026-01-01,x")
    assert [re.match(r"line \d+: (?:valid_\w+|\w+_id)?", line)[0] for line in said] == [
        "line 2: vehicle_id",
        "line 2: meter_id",
        "line 2: valid_from",
        "line 2: valid_until",
        "line 4: ",
        "line 6: ",
        "line 7: valid_until",
    ]


@pytest.mark.parametrize("more", [0, 1, 1_000])
def test_no_more_than_some_are_named(more: int) -> None:
    said = problems(*["V,M,x,"] * (MOST_PROBLEMS_NAMED + more))
    assert said[MOST_PROBLEMS_NAMED:] == ([f"and {more} more"] if more else [])
    assert error_of(f"{HEADER}\nV,M,x,").startswith("1 problem, ")


@pytest.mark.parametrize("line", [1, 2, 3])
def test_another_encoding(line: int) -> None:
    lines = [HEADER.encode(), b"V,M,,", b"V2,M,,"]
    lines[line - 1] = "Zürich,M,,".encode("latin-1")
    assert f"\n  line {line}: is not UTF-8" in error_of(b"\n".join(lines))
    assert "line 1: is not UTF-8" in error_of(f"{HEADER}\nV,M,,\n".encode("utf-16"))


# Overlaps within a file


def test_overlaps_name_both_lines() -> None:
    said = the_problem("V,M2,2026-02-01,", "W,M1,,", "V,M1,2026-01-01,2026-02-01T00:00:00.000001Z")
    assert said == (
        "line 4: V at M1 (2026-01-01T00:00:00Z to 2026-02-01T00:00:00.000001Z) overlaps line 2: "
        "V at M2 (2026-02-01T00:00:00Z to open); one meter at a time"
    )


def test_an_assignment_may_begin_when_another_ends() -> None:
    assert len(read("V,M1,,2026-01-01", "V,M2,2026-01-01,2026-02-01", "V,M1,2026-02-01,")) == 3


def test_several_vehicles_may_share_a_meter() -> None:
    assert len(read("V1,M,,", "V2,M,,", "V3,M,,")) == 3


def test_an_overlap_at_the_same_meter_is_one() -> None:
    assert "overlaps line 2" in the_problem("V,M,2026-01-01,2026-03-01", "V,M,2026-02-01,")


def test_a_row_that_stands_there_twice_is_none() -> None:
    assert len(read("V,M,2026-01-01,", "V,M,2026-01-01,", "V,M,2026-01-01T01:00:00+01:00,")) == 3
    assert the_problem("V,M,,", "V,M,,", "V,M2,,").startswith("line 4: V at M2 (open to open) overlaps line 2: ")


def test_all_that_overlap_a_long_one_are_named() -> None:
    short = ["V,M2,2026-01-02,2026-01-03", "V,M2,2026-01-04,2026-01-05"]
    said = problems("V,M1,2026-01-01,", *short)
    assert [line.partition(":")[0] for line in said] == ["line 3", "line 4"]
    assert all("overlaps line 2: V at M1" in line for line in said)
    with pytest.raises(WattbridgeError, match=r"^2 problems"):
        difference(lines_of(read(*short)), [Assignment("V", "M1", JANUARY, None)], Mode.ADD)


MOMENTS = st.one_of(st.none(), st.integers(0, 12).map(lambda hours: JANUARY + timedelta(hours=hours)))
ASSIGNMENTS = st.builds(
    Assignment, st.sampled_from(["V1", "V2"]), st.sampled_from(["M1", "M2"]), MOMENTS, MOMENTS
).filter(lambda one: one.since < one.until)


def overlap(one: Assignment, other: Assignment) -> bool:
    """The plain definition."""
    return one != other and one.vehicle_id == other.vehicle_id and one.since < other.until and other.since < one.until


def without_overlaps(assignments: list[Assignment]) -> list[Assignment]:
    kept: list[Assignment] = []
    for assignment in assignments:
        if not any(overlap(assignment, other) for other in kept):
            kept.append(assignment)
    return kept


def csv_of(assignments: list[Assignment]) -> bytes:
    file = io.StringIO()
    write_csv(assignments, file)
    return file.getvalue().encode()


@given(st.lists(ASSIGNMENTS, max_size=12))
def test_a_file_is_refused_for_overlaps_and_only_for_them(assignments: list[Assignment]) -> None:
    data = csv_of(assignments)
    if not any(overlap(*pair) for pair in combinations(assignments, 2)):
        # Whatever is written can be read again.
        assert list(parse(data).values()) == assignments
        return
    for line in error_of(data).splitlines()[1:]:
        number, other = (int(found) for found in re.findall(r"line (\d+)", line))
        assert other < number
        assert overlap(assignments[number - 2], assignments[other - 2])


# What an import comes to


V, W = Assignment("V", "M1", JANUARY, None), Assignment("W", "M1", None, None)
MOVED = [Assignment("V", "M1", JANUARY, FEBRUARY), Assignment("V", "M2", FEBRUARY, None)]


def lines_of(assignments: list[Assignment]) -> dict[int, Assignment]:
    return dict(enumerate(assignments, start=2))


def test_adding() -> None:
    assert difference(lines_of([V, W, V]), [W], Mode.ADD) == ([V], [], 2)
    assert difference({}, [], Mode.ADD) == ([], [], 0)


def test_what_overlaps_the_table_is_named_with_what_it_overlaps() -> None:
    with pytest.raises(WattbridgeError) as caught:
        difference(lines_of([W, *MOVED]), [V, W], Mode.ADD)
    existing = "overlaps an existing assignment: V at M1 (2026-01-01T00:00:00Z to open)"
    assert str(caught.value).splitlines() == [
        "2 problems, nothing was imported",
        f"  line 3: V at M1 (2026-01-01T00:00:00Z to 2026-02-01T00:00:00Z) {existing}",
        f"  line 4: V at M2 (2026-02-01T00:00:00Z to open) {existing}",
        "  to change what is there, see --update and --replace",
    ]


@pytest.mark.parametrize("mode", [Mode.UPDATE, Mode.REPLACE])
def test_changing_writes_only_the_difference(mode: Mode) -> None:
    assert difference(lines_of([*MOVED, W]), [V, W], mode) == (MOVED, [V], 1)
    assert difference(lines_of([V, W]), [V, W], mode) == ([], [], 2)


@given(st.lists(ASSIGNMENTS, max_size=8), st.lists(ASSIGNMENTS, max_size=8), st.sampled_from(Mode))
def test_the_table_says_what_the_file_says(file: list[Assignment], table: list[Assignment], mode: Mode) -> None:
    file, table = without_overlaps(file), sorted(set(without_overlaps(table)), key=str)
    vehicles = {assignment.vehicle_id for assignment in file}
    stays = {
        Mode.ADD: set(table),
        Mode.UPDATE: {assignment for assignment in table if assignment.vehicle_id not in vehicles},
        Mode.REPLACE: set(),
    }[mode]
    known = [assignment for assignment in table if mode is Mode.REPLACE or assignment.vehicle_id in vehicles]
    blamed = {number for number, one in lines_of(file).items() if any(overlap(one, other) for other in stays)}
    try:
        change = difference(lines_of(file), known, mode)
    except WattbridgeError as error:
        named = [int(number) for number in re.findall(r"^  line (\d+)", str(error), re.MULTILINE)]
        # A row that stands there twice is blamed where it stands first.
        assert {file[number - 2] for number in named} == {file[number - 2] for number in blamed}
        assert named
        return
    assert not blamed
    assert set(table).difference(change.removed).union(change.added) == stays.union(file)
    assert not set(change.added) & set(table)
    assert set(change.removed) <= set(table) - set(file)
    assert len(change.added) + change.unchanged == len(file)


# Whatever a file may be


BROKEN = st.lists(
    st.lists(
        st.one_of(
            st.text(max_size=8), st.sampled_from(["V", "M", "2026-01-01", "2026-02-01T00:00:00Z", "", '"', "\n"])
        ),
        max_size=6,
    ).map(",".join),
    max_size=6,
).map("\n".join)


@given(st.one_of(st.binary(max_size=200), BROKEN.map(lambda text: f"{HEADER}\n{text}".encode(errors="replace"))))
@example(b"\xff\xfe")
@example(b"\n\n")
@example(HEADER.encode() + b"\nV,M,0001-01-01T00:00:00+23:59,9999-12-31T23:59:59-23:59")
@example(HEADER.encode() + b"\n" + b'"' * 101)
def test_it_is_right_or_named(data: bytes) -> None:
    try:
        lines = parse(data)
    except WattbridgeError as error:
        said = str(error)
        assert re.search(r"^  line \d+: ", said, re.MULTILINE)
        assert all(character.isprintable() for line in said.split("\n") for character in line)
        assert max(map(len, said.split("\n"))) < 1_000
    else:
        for one in lines.values():
            assert one.since < one.until


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_an_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_time(text).tzinfo is UTC


def test_the_columns_are_those_of_the_header() -> None:
    assert ",".join(COLUMNS) == HEADER
