"""What a ledger says, against a naive reading of it; and the answers, against the same in plain Python."""

import base64
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from simulator.answers import MINUTE_US, Answers, answers, plain
from simulator.ledger import END_SLOT, HEADER_SLOT, MAGIC, LedgerError, LedgerWriter, acks_path
from simulator.messages import (
    SLOT_BYTES,
    Encoder,
    Fate,
    Message,
    Reading,
    SlotType,
    body_slots,
    letter_entry,
    reading_entry,
)
from simulator.truth import Letter, Rows, Truth, read

METERS = ["MTR-000001", "MTR-000002"]
VEHICLES = ["VEH-000001", "VEH-000002", "VEH-000003"]
IDS = [*METERS, *VEHICLES]
HEADER: dict[str, Any] = {
    "format": 1,
    "meters": len(METERS),
    "vehicles": len(VEHICLES),
    "meter_ids": METERS,
    "vehicle_ids": VEHICLES,
    "topic_root": "energy/v1",
}
ENCODER = Encoder(METERS, VEHICLES, "energy/v1")
NO_DEVICE = 0xFFFFFFFF
START_MS = 1_770_734_820_000


class Poison(NamedTuple):
    """Something that breaks the contract."""

    device: int
    topic: str
    reason: str
    payload: bytes
    part: bool

    def body(self) -> bytes:
        said = self._asdict() | {"payload": base64.b64encode(self.payload).decode()}
        return json.dumps(said).encode()


Said = Sequence[Reading | Poison]
Run = tuple[list[list[Reading | Poison]], list[int]]
"""What each message says, and what the broker answered to it."""


class History:
    """The naive bridge: one thing after the other into dictionaries."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], tuple[int, ...]] = {}
        self.letters: dict[tuple[str, str, bytes], tuple[str, bool, int]] = {}

    def take(self, number: int, said: Reading | Poison) -> Fate:
        if isinstance(said, Poison):
            name = IDS[said.device] if said.device != NO_DEVICE else ""
            known = self._bury((said.topic, said.reason, said.payload), (name, said.part, number))
            return Fate.DUPLICATE if known else Fate.REJECTED
        key, values = (said.device, said.ts), said[3:]
        if self.rows.setdefault(key, values) == values:
            return Fate.DUPLICATE
        self._bury((ENCODER.topics[said.device], "conflict", ENCODER.payload(said)), (IDS[said.device], True, number))
        return Fate.CONFLICT

    def fate(self, number: int, said: Reading | Poison) -> Fate:
        new = isinstance(said, Reading) and (said.device, said.ts) not in self.rows
        fate = self.take(number, said)
        return Fate.STORED if new else fate

    def _bury(self, key: tuple[str, str, bytes], letter: tuple[str, bool, int]) -> bool:
        return self.letters.setdefault(key, letter) is not letter


def entry(number: int, said: Reading | Poison, fate: Fate) -> bytes:
    if isinstance(said, Reading):
        return reading_entry(number, said, fate)
    return letter_entry(number, said.device, fate, said.body())


def write(path: Path, stream: Sequence[Said], outcomes: Sequence[int]) -> None:
    history = History()
    with LedgerWriter(path, HEADER) as writer:
        for number, said in enumerate(stream):
            entries = b"".join(entry(number, one, history.fate(number, one)) for one in said)
            writer.record([Message(0, number, 0, "", b"", entries)])
            writer.settle(number, outcomes[number])


def worlds(stream: Sequence[Said], outcomes: Sequence[int]) -> list[History]:
    """Everything that may be in the database: each message in doubt has arrived, or not."""
    found = []
    doubtful = [number for number, outcome in enumerate(outcomes) if outcome == 0]
    for arrived in product([True, False], repeat=len(doubtful)):
        lost = {number for number, here in zip(doubtful, arrived, strict=True) if not here}
        history = History()
        for number, said in enumerate(stream):
            if outcomes[number] != 2 and number not in lost:
                for one in said:
                    history.take(number, one)
        found.append(history)
    return found


def meter_reading(ts: int, energy: int, *, device: int = 0) -> Reading:
    return Reading(0, device, ts, energy, 2320, 0, 0)


def vehicle_reading(ts: int, energy: int, meter: int, *, device: int = len(METERS), level: int = 5000) -> Reading:
    return Reading(0, device, ts, energy, level, 301, meter)


TIMES = st.sampled_from([START_MS, START_MS + 1, START_MS + 60_000])
SAID = st.one_of(
    st.builds(meter_reading, TIMES, st.integers(0, 2), device=st.integers(0, 1)),
    st.builds(vehicle_reading, TIMES, st.integers(0, 1), st.integers(0, 2), device=st.integers(2, 4)),
    st.builds(
        Poison,
        st.sampled_from([0, 3, NO_DEVICE]),
        st.sampled_from(["energy/v1/meter/MTR-000001/telemetry", "é"]),
        st.sampled_from(["malformed", "wrong_type"]),
        st.sampled_from([b"", b"\0\xff", b"x" * 31, b"y" * 200]),
        st.booleans(),
    ),
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    stream = draw(st.lists(st.lists(SAID, min_size=1, max_size=3), max_size=12))
    outcomes = draw(st.lists(st.sampled_from([1, 1, 1, 0, 2, 3]), min_size=len(stream), max_size=len(stream)))
    doubts = [number for number, outcome in enumerate(outcomes) if outcome == 0]
    for number in doubts[6:]:
        outcomes[number] = 1
    return stream, outcomes


def read_written(stream: Sequence[Said], outcomes: Sequence[int]) -> Truth:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger"
        write(path, stream, outcomes)
        return read(path)


def row_dict(truth: Truth) -> dict[tuple[int, int], tuple[tuple[int, ...], bool]]:
    found = {}
    for rows in (truth.meter_rows, truth.vehicle_rows):
        for device, ts, *values, certain in zip(*(column.tolist() for column in rows), strict=True):
            found[device, ts] = tuple(values), certain
    return found


A, B = meter_reading(START_MS, 1), meter_reading(START_MS, 2)


@given(runs())
@example(([[A, B], [A]], [0, 1]))  # the first message cannot have come in part
@example(([[A], [B], [A]], [0, 0, 1]))
@example(([[A], [B], [B]], [1, 0, 1]))  # the conflict is in doubt first, then certain
def test_history_and_dead_letters_are_what_a_naive_reading_says(
    run: Run,
) -> None:
    stream, outcomes = run
    truth = read_written(stream, outcomes)
    possible = worlds(stream, outcomes)
    everything = possible[0]  # all that is in doubt has arrived

    rows = row_dict(truth)
    assert list(rows) == sorted(rows)
    assert rows == {
        (device, ts * 1000): (values, all(world.rows.get((device, ts)) == values for world in possible))
        for (device, ts), values in everything.rows.items()
    }
    assert all(device < len(METERS) for device in truth.meter_rows.device)
    assert all(device >= len(METERS) for device in truth.vehicle_rows.device)

    letters: dict[tuple[str, str, bytes], Letter] = {}
    for world in possible:
        for key, (name, part, number) in world.letters.items():
            if key not in letters or number < letters[key].number:
                certain = all(key in other.letters for other in possible)
                letters[key] = Letter(name, *key, part, certain, number)
    assert {letter[1:4]: letter for letter in truth.letters} == letters
    assert len(truth.letters) == len(letters)
    assert [letter.number for letter in truth.letters] == sorted(letter.number for letter in truth.letters)


@given(runs())
def test_the_books_balance(run: Run) -> None:
    stream, outcomes = run
    truth = read_written(stream, outcomes)
    books = truth.books
    said = [one for number, all_of_it in enumerate(stream) if outcomes[number] != 2 for one in all_of_it]
    assert books.stored + books.duplicates + books.conflicts + books.rejected == len(said)
    assert books.duplicates >= 0
    assert books.readings == sum(isinstance(one, Reading) for one in said)
    assert books.stored == len(truth.meter_rows.ts) + len(truth.vehicle_rows.ts)
    assert books.conflicts + books.rejected == len(truth.letters)
    assert books.messages == len(stream)
    assert [books.in_doubt, books.refused, books.unheard] == [outcomes.count(at) for at in (0, 2, 3)]
    assert truth.complete is (0 not in outcomes)


@given(runs(), st.data())
def test_a_ledger_that_was_cut_anywhere_says_what_is_left(run: Run, data: st.DataObject) -> None:
    stream, _ = run
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger"
        write(path, stream, [0] * len(stream))
        whole = path.read_bytes()
        header = len(whole) - len(b"".join(entry(0, one, Fate.STORED) for said in stream for one in said))
        if not stream:
            header -= SLOT_BYTES  # END
            acks_path(path).write_bytes(b"")
        size = data.draw(st.integers(header, len(whole)))
        path.write_bytes(whole[:size])
        acks_path(path).write_bytes(b"")
        truth = read(path)
    left: list[Reading | Poison] = []
    at = header
    for one in (one for said in stream for one in said):
        at += len(entry(0, one, Fate.STORED))
        if at <= size:
            left.append(one)
    history = History()
    for one in left:
        history.take(0, one)
    assert truth.books.readings == sum(isinstance(one, Reading) for one in left)
    assert {key: values for key, (values, _) in row_dict(truth).items()} == {
        (device, ts * 1000): values for (device, ts), values in history.rows.items()
    }
    assert {letter[1:4] for letter in truth.letters} >= set(history.letters)


def test_keys_that_do_not_fit_into_one_number_are_sorted_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    vehicles = [f"VEH-{number:06d}" for number in range(40_000)]
    times = [253_402_300_799_999, 0, 5]
    with LedgerWriter(path, HEADER | {"vehicles": len(vehicles), "vehicle_ids": vehicles}) as writer:
        said = [vehicle_reading(ts, 1, 0, device=device) for ts in times for device in (40_001, 2, 17)]
        writer.record([Message(0, at, 0, "", b"", reading_entry(at, one, Fate.STORED)) for at, one in enumerate(said)])
    rows = read(path).vehicle_rows
    assert list(zip(rows.device.tolist(), rows.ts.tolist(), strict=True)) == sorted(
        (one.device, one.ts * 1000) for one in said
    )


# Files that are no ledger, or not any more


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A complete ledger of two readings and a letter."""
    path = tmp_path / "ledger"
    poison = Poison(0, "t", "malformed", b"x" * 100, part=False)
    write(path, [[meter_reading(START_MS, 1)], [poison], [vehicle_reading(START_MS, 1, 1)]], [1, 1, 1])
    return path


def test_the_ledger_of_the_tests_below_is_fine(ledger: Path) -> None:
    truth = read(ledger)
    assert truth.complete
    assert truth.books[:6] == (3, 2, 2, 0, 0, 1)
    assert truth.ids == IDS
    assert truth.meters == len(METERS)
    assert truth.header == HEADER


def headed(header: bytes) -> bytes:
    return HEADER_SLOT.pack(MAGIC, len(header), SlotType.HEADER) + body_slots(header)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello", "is no ledger"),
        (b"\x7fELF" + bytes(100), "is no ledger"),
        (MAGIC, "ends within its header"),
        (MAGIC.replace(b"1", b"2") + bytes(40), "ledger of another format than 1"),
        (HEADER_SLOT.pack(MAGIC, 100, SlotType.HEADER) + body_slots(b"x" * 60), "ends within its header"),
        (HEADER_SLOT.pack(MAGIC, 60, SlotType.HEADER) + body_slots(b"x" * 60), "header of .* is damaged"),
        (HEADER_SLOT.pack(MAGIC, 2, SlotType.HEADER) + body_slots(b"{}"), "does not say format 1"),
        (headed(b'{"format":1}'), "which devices there are"),
        (
            headed(b'{"format":1, "meter_ids":"MTR-%06d", "vehicle_ids":[], "topic_root":"a"}'),
            "which devices there are",
        ),
        (headed(b'{"format":1, "meter_ids":[1], "vehicle_ids":[], "topic_root":"a"}'), "a name that is none"),
        (headed(b'{"format":1, "meter_ids":["\\ud800"], "vehicle_ids":[], "topic_root":"a"}'), "a name that is none"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=says):
        read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        read(tmp_path / "nothing")
    with pytest.raises(LedgerError, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(LedgerError, match="no name of a file"):
        read(Path("a\0b"))


def replaced(at: int, change: bytes, content: bytes) -> bytes:
    """The content with other bytes at a place counted from the end if negative."""
    at %= len(content)
    return content[:at] + change + content[at + len(change) :]


END = END_SLOT.pack(3, SlotType.END)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: whole[:-SLOT_BYTES], r"has no end, and .*\.acks is missing"),
        (lambda whole: whole + whole[-2 * SLOT_BYTES :], "goes on after its end"),
        (lambda whole: whole + b"x", "goes on after its end"),
        (lambda whole: replaced(-SLOT_BYTES, b"\4", whole), "counts other messages"),
        (lambda whole: replaced(-SLOT_BYTES - 1, b"\7", whole), "no known type"),
        (lambda whole: replaced(-2 * SLOT_BYTES, b"\3", whole), "messages are missing"),
        (lambda whole: replaced(-2 * SLOT_BYTES, b"\0", whole), "messages are missing"),
        (lambda whole: whole[: -3 * SLOT_BYTES] + whole[-2 * SLOT_BYTES :], "longer or shorter"),
        (lambda whole: replaced(-2 * SLOT_BYTES + 4, b"\5", whole), "a device or a time that there is not"),
        (lambda whole: replaced(-2 * SLOT_BYTES + 24, b"\3", whole), "a device or a time that there is not"),
        (lambda whole: replaced(-2 * SLOT_BYTES + 8, b"\xff" * 8, whole), "a device or a time that there is not"),
        (lambda whole: replaced(-2 * SLOT_BYTES + 28, bytes([Fate.DUPLICATE]), whole), "contradicts itself"),
        (lambda whole: replaced(whole.index(b'{"device'), b"[", whole), "cannot be read"),
    ],
)
def test_a_damaged_ledger_is_refused(ledger: Path, change: Any, says: str) -> None:
    ledger.write_bytes(change(ledger.read_bytes()))
    with pytest.raises(LedgerError, match=says):
        read(ledger)


@given(st.data())
def test_damage_anywhere_is_an_error_for_people_or_does_not_matter(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger"
        poison = Poison(0, "t", "malformed", b"x" * 100, part=False)
        write(path, [[meter_reading(START_MS, 1)], [poison], [vehicle_reading(START_MS, 1, 1)], [poison]], [1, 1, 1, 1])
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(replaced(at, data.draw(st.binary(min_size=1, max_size=5)), whole))
        try:
            truth = read(path)
        except LedgerError:
            return
        assert truth.books.messages == 4


@pytest.mark.parametrize(
    ("acks", "says"),
    [
        (b"\1\1\0", "contradicts itself"),
        (b"\1\1\2", "contradicts itself"),
        (b"\1\1", "contradicts itself"),
        (b"\1\1\1\1", "does not belong"),
        (b"\1\1\4", "does not belong"),
    ],
)
def test_acknowledgements_that_do_not_fit_are_refused(ledger: Path, acks: bytes, says: str) -> None:
    acks_path(ledger).write_bytes(acks)
    with pytest.raises(LedgerError, match=says):
        read(ledger)


def test_messages_beyond_the_acknowledgements_are_in_doubt(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[:-SLOT_BYTES])
    acks_path(ledger).write_bytes(b"\1\1")
    truth = read(ledger)
    assert truth.books.in_doubt == 1
    assert truth.vehicle_rows.certain.tolist() == [False]
    assert truth.meter_rows.certain.tolist() == [True]


@pytest.mark.parametrize(
    ("fates", "fine"),
    [
        ([Fate.STORED, Fate.CONFLICT, Fate.CONFLICT], True),
        ([Fate.STORED, Fate.CONFLICT, Fate.DUPLICATE], True),
        ([Fate.STORED, Fate.DUPLICATE, Fate.CONFLICT], False),
        ([Fate.STORED, Fate.STORED, Fate.CONFLICT], False),
        ([Fate.CONFLICT, Fate.CONFLICT, Fate.CONFLICT], False),
        ([Fate.STORED, Fate.CONFLICT, Fate.REJECTED], False),
    ],
)
def test_fates_that_do_not_follow_are_a_bug_of_the_simulator(tmp_path: Path, fates: list[Fate], *, fine: bool) -> None:
    path = tmp_path / "ledger"
    readings = [meter_reading(START_MS, energy) for energy in (1, 2, 2)]
    with LedgerWriter(path, HEADER) as writer:
        for number, (reading, fate) in enumerate(zip(readings, fates, strict=True)):
            writer.record([Message(0, number, 0, "", b"", reading_entry(number, reading, fate))])
    if fine:
        assert read(path).books[2:5] == (1, 1, 1)
    else:
        with pytest.raises(LedgerError, match="contradicts itself, which is a bug of the simulator"):
            read(path)


# The answers


def rows_of(readings: Sequence[Reading]) -> tuple[Rows, Rows]:
    """Rows of meters and of vehicles."""

    def columns(chosen: list[Reading]) -> Rows:
        table = np.array(sorted((one.device, one.ts * 1000, *one[3:]) for one in chosen), np.int64).reshape(-1, 6)
        device, *others = table.T
        return Rows(device.astype(np.int32), *others, certain=np.ones(len(table), np.bool_))  # type: ignore[arg-type,misc]

    return (
        columns([one for one in readings if one.device < len(METERS)]),
        columns([one for one in readings if one.device >= len(METERS)]),
    )


def naive_matches(readings: Sequence[Reading]) -> dict[tuple[int, int], tuple[int, list[Reading], int]]:
    """By (meter, minute): AC, the readings of the one vehicle there, in order, and its number."""
    ac: dict[tuple[int, int], int] = defaultdict(int)
    guests: dict[tuple[int, int], list[Reading]] = defaultdict(list)
    for one in sorted(readings, key=lambda one: one.ts):
        if one.device < len(METERS):
            ac[one.device, one.ts // 60_000] += one.energy
        elif one.meter:
            guests[one.meter - 1, one.ts // 60_000].append(one)
    return {
        key: (ac[key], there, there[0].device)
        for key, there in guests.items()
        if key in ac and len({one.device for one in there}) == 1
    }


def naive_devices(readings: Sequence[Reading]) -> list[tuple[int, ...]]:
    """Device, readings, energy, matched minutes, matched AC, matched DC, of each device."""
    matches = naive_matches(readings)
    found = []
    for device in sorted({one.device for one in readings}):
        own = [one for one in readings if one.device == device]
        mine = [match for (meter, _), match in matches.items() if device in {meter, match[2]}]
        dc = sum(one.energy for _, there, _ in mine for one in there)
        found.append((device, len(own), sum(one.energy for one in own), len(mine), sum(match[0] for match in mine), dc))
    return found


def naive_sessions(readings: Sequence[Reading]) -> list[tuple[int, ...]]:
    matches = naive_matches(readings)
    runs: list[list[Reading]] = []
    plugged = sorted((one for one in readings if one.meter), key=lambda one: (one.device, one.ts))
    for _, guests in groupby(plugged, lambda one: one.device):
        own = list(guests)
        runs.append(own[:1])
        for before, one in pairwise(own):
            if one.meter != before.meter or one.ts - before.ts > 15 * 60_000:
                runs.append([])
            runs[-1].append(one)
    found = []
    for run in runs:
        first, last = run[0], run[-1]
        ac = sum(match[0] for match in matches.values() if match[1][0] in run)
        dc = sum(one.energy for one in run)
        stretch = first.ts * 1000, last.ts * 1000
        found.append((first.device, first.meter - 1, *stretch, len(run), dc, ac, first.level, last.level))
    return found


MOMENTS = st.builds(
    lambda minute, offset: START_MS + minute * 60_000 + offset,
    st.sampled_from([0, 1, 2, 16, 17]),
    st.sampled_from([0, 1, 20_000, 59_999]),
)
TELLING = st.lists(
    st.one_of(
        st.builds(
            lambda ts, energy, device: meter_reading(ts, energy, device=device),
            MOMENTS,
            st.integers(0, 6000),
            st.integers(0, 1),
        ),
        st.builds(
            lambda ts, energy, meter, device, level: vehicle_reading(ts, energy, meter, device=device, level=level),
            MOMENTS,
            st.integers(0, 6000),
            st.integers(0, 2),
            st.integers(2, 4),
            st.integers(0, 10_000),
        ),
    ),
    max_size=40,
    unique_by=lambda one: (one.device, one.ts),
)


@given(TELLING)
def test_the_answers_are_what_plain_python_says(readings: list[Reading]) -> None:
    found = answers(*rows_of(readings))
    devices = [*found.meters.tolist(), *(row[:-1] for row in found.vehicles.tolist())]
    assert [row[:6] for row in devices] == naive_devices(readings)
    assert [row[6] for row in found.meters.tolist()] == [row[2] - row[4] for row in found.meters.tolist()]
    assert [row[6] for row in found.vehicles.tolist()] == [row[2] - row[5] for row in found.vehicles.tolist()]
    for row in found.vehicles:
        if row["matched_ac"]:
            assert row["efficiency"] == row["matched_dc"] / row["matched_ac"]
        else:
            assert np.isnan(row["efficiency"])
    assert found.sessions.tolist() == naive_sessions(readings)


@given(TELLING)
def test_the_answers_can_be_written_as_json(readings: list[Reading]) -> None:
    found = answers(*rows_of(readings))
    said = json.loads(json.dumps(plain(found, IDS), allow_nan=False))
    assert [row["vehicle"] for row in said["vehicles"]] == [IDS[device] for device in found.vehicles["device"]]
    assert sum(round(row["dc_kwh"] * 10_000) for row in said["vehicles"]) == found.vehicles["dc"].sum()
    assert len(said["sessions"]) == len(found.sessions)


def test_a_session_ends_after_more_than_fifteen_minutes() -> None:
    quarter = 15 * 60_000
    for gap, sessions in ((quarter, 1), (quarter + 1, 2)):
        readings = [vehicle_reading(START_MS, 1, 1), vehicle_reading(START_MS + gap, 1, 1)]
        assert len(answers(*rows_of(readings)).sessions) == sessions


V1_DC = [4227, 4037, 4670, 5588, 5986]
V2_DC = [5568, 4347, 5990, 4371, 5218]
V1_SOC = [2070, 2138, 2216, 2309, 2408]
V2_SOC = [4593, 4665, 4765, 4838, 4925]
M1_AC = [4796, 4457, 5210, 6093, 6646, 6258, 4910, 6636, 4867, 5904]


@pytest.fixture
def worked() -> Answers:
    """The published worked example: V1, then V2 at meter 1; V3 drives."""
    start = 1_770_734_820_000  # 2026-02-10 14:47 UTC
    minutes = [start + at * 60_000 for at in range(10)]
    readings = [meter_reading(ts, energy) for ts, energy in zip(minutes, M1_AC, strict=True)]
    for device, times, energies, levels in ((2, minutes[:5], V1_DC, V1_SOC), (3, minutes[5:], V2_DC, V2_SOC)):
        readings += [
            vehicle_reading(ts, energy, 1, device=device, level=level)
            for ts, energy, level in zip(times, energies, levels, strict=True)
        ]
    readings += [vehicle_reading(ts, 0, 0, device=4) for ts in minutes]
    return answers(*rows_of(readings))


def test_the_worked_example(worked: Answers) -> None:
    first, second, third = worked.vehicles
    assert (first["matched_ac"], first["matched_dc"], first["minutes"]) == (27202, 24508, 5)
    assert (second["matched_ac"], second["matched_dc"], second["minutes"]) == (28575, 25494, 5)
    assert first["efficiency"] == pytest.approx(0.900963164473201, abs=1e-15)
    assert second["efficiency"] == pytest.approx(0.892178477690289, abs=1e-15)
    assert np.isnan(third["efficiency"])
    assert worked.meters["ac"].tolist() == [27202 + 28575]
    assert worked.meters["unattributed"].tolist() == [0]
    assert worked.sessions["end"].tolist() == [row["start"] + 4 * MINUTE_US for row in worked.sessions]


def test_the_worked_example_for_people(worked: Answers) -> None:
    said = plain(worked, IDS)
    assert said["vehicles"][0] == {
        "vehicle": "VEH-000001",
        "readings": 5,
        "dc_kwh": 2.4508,
        "matched_minutes": 5,
        "matched_ac_kwh": 2.7202,
        "matched_dc_kwh": 2.4508,
        "efficiency": pytest.approx(0.900963164473201, abs=1e-15),
        "unattributed_dc_kwh": 0.0,
    }
    assert said["vehicles"][2]["efficiency"] is None
    assert said["sessions"][1] == {
        "vehicle": "VEH-000002",
        "meter": "MTR-000001",
        "start": "2026-02-10T14:52:00.000Z",
        "end": "2026-02-10T14:56:00.000Z",
        "readings": 5,
        "dc_kwh": 2.5494,
        "matched_ac_kwh": 2.8575,
        "soc_from": 45.93,
        "soc_to": 49.25,
    }
    assert len(said["sessions"]) == 2
