"""Faults: what the entries of a message promise is what the bridge makes of it, message by message."""

import json
import os
import random
import subprocess
import sys
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import cache, cached_property
from hashlib import sha256
from itertools import count, islice, pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.batch import Batch
from bridge.config import BatchLimits
from bridge.messages import Limits, MeterReading, decode_telemetry
from bridge.pipeline import Pipeline
from bridge.topics import Kind, Topics
from simulator.faults import DAY_MS, HOUR_MS, MOST_READINGS, NOBODY, FaultConfig, _Stream, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.messages import (
    BODY_BYTES,
    EPOCH,
    LETTER_SLOT,
    MINUTE_MS,
    READING_SLOT,
    SLOT_BYTES,
    Encoder,
    Fate,
    Link,
    Message,
    Reading,
    SlotType,
    reading_entry,
)

START = datetime(2026, 2, 10, tzinfo=UTC)
START_MS = (START - EPOCH).days * DAY_MS
ROOT = "energy/v1"
HARD = FaultConfig(
    duplicates=0.2,
    reordering=0.2,
    conflicts=0.2,
    outages=12,
    spoiled=0.5,
    skewed=0.5,
    silences=6,
    malformed=0.3,
    mismatches=0.1,
    far_past=0.05,
    far_future=0.05,
)


class StandIn:
    """A fleet without physics: every device says something once a minute, and no two say the same."""

    def __init__(self, meters: int = 10, vehicles: int = 15, seed: int = 1) -> None:
        self.config = SimpleNamespace(start=START, seed=seed)
        self.encoder = Encoder(
            [f"MTR-{number:06d}" for number in range(1, meters + 1)],
            [f"VEH-{number:06d}" for number in range(1, vehicles + 1)],
            ROOT,
        )

    def __iter__(self) -> Iterator[Reading]:
        rng = random.Random(self.config.seed)
        meters, devices = self.encoder.meters, len(self.encoder.ids)
        for place in count():
            minute, device = divmod(place, devices)
            due = minute * MINUTE_MS + device * MINUTE_MS // devices
            energy = rng.randrange(5_000)
            if device < meters:
                yield Reading(due, device, START_MS + due, energy, rng.randrange(2_200, 2_400), 0, 0)
            else:
                level, temperature = rng.randrange(10_001), rng.randrange(-100, 500)
                yield Reading(due, device, START_MS + due, energy, level, temperature, rng.randrange(meters + 1))


class Letter(NamedTuple):
    device: int
    fate: Fate
    topic: str
    reason: str
    payload: bytes
    part: bool


def entries_of(message: Message) -> tuple[list[tuple[Reading, Fate]], list[Letter]]:
    """What a message promises, read from the bytes as whoever reads the ledger does."""
    slots = [message.entries[at : at + SLOT_BYTES] for at in range(0, len(message.entries), SLOT_BYTES)]
    readings: list[tuple[Reading, Fate]] = []
    letters: list[Letter] = []
    while slots:
        slot = slots.pop(0)
        if slot[-1] == SlotType.READING:
            number, device, ts, energy, level, temperature, meter, fate, _ = READING_SLOT.unpack(slot)
            readings.append((Reading(message.due, device, ts, energy, level, temperature, meter), Fate(fate)))
        else:
            number, device, length, fate, kind = LETTER_SLOT.unpack(slot)
            assert kind == SlotType.LETTER
            body = b""
            while len(body) < length:
                assert slots[0][-1] == SlotType.BODY
                body += slots.pop(0)[:BODY_BYTES]
            said = json.loads(body[:length])
            payload = b64decode(said.pop("payload"), validate=True)
            letters.append(Letter(device, Fate(fate), payload=payload, **said))
        assert number == message.number
    return readings, letters


class Sample:
    """A stream up to some moment of fleet time."""

    def __init__(self, faults: FaultConfig, hours: float, fleet: Any = None) -> None:
        self.fleet = fleet or StandIn()
        end = hours * HOUR_MS
        self.events = list(takewhile(lambda event: event.due < end, messages(self.fleet, faults)))
        self.messages = [event for event in self.events if isinstance(event, Message)]
        self.links = [event for event in self.events if isinstance(event, Link)]
        self.readings: list[tuple[Reading, Fate]] = []
        self.letters: list[Letter] = []
        for message in self.messages:
            readings, letters = entries_of(message)
            self.readings += readings
            self.letters += letters

    def of_fate(self, fate: Fate) -> list[Reading]:
        return [reading for reading, its_fate in self.readings if its_fate is fate]

    @cached_property
    def stored(self) -> dict[tuple[int, int], Reading]:
        """Without `due`, which the ledger does not have."""
        return {(reading.device, reading.ts): reading._replace(due=0) for reading in self.of_fate(Fate.STORED)}


@cache
def plain(hours: float) -> Sample:
    return Sample(FaultConfig(), hours)


def values_of(encoder: Encoder, reading: Reading) -> tuple[object, ...]:
    if reading.device < encoder.meters:
        return reading.energy / 10_000, reading.level / 10
    plug = encoder.ids[reading.meter - 1] if reading.meter else None
    return reading.energy / 10_000, reading.level / 100, reading.temperature / 10, plug


class InMemory:
    """The bridge without network and database: its own decoder and batches, and tables that are dictionaries."""

    def __init__(self, root: str = ROOT) -> None:
        self.topics = Topics(f"{root}/{{kind}}/{{device_id}}/telemetry", f"{root}/{{kind}}/{{device_id}}/status")
        self.now = 0.0
        self.history: dict[tuple[Kind, str, int], tuple[object, ...]] = {}
        self.letters: set[tuple[str, bytes]] = set()
        self._pipeline = Pipeline(
            SimpleNamespace(), self.topics, Limits(), BatchLimits(), 1_000, 1 << 20, lambda: self.now
        )

    def decode(self, batch: Batch, message: Message) -> None:
        self.now = START.timestamp() + message.due / 1_000
        publication = SimpleNamespace(topic=message.topic, payload=message.payload, content_type=None, packet_id=1)
        self._pipeline._decode(batch, publication, message.payload, self._pipeline._arrival(1))

    def take(self, message: Message) -> tuple[list[tuple[str, int, tuple[object, ...], Fate]], list[Any]]:
        """What becomes of a message in a batch of its own."""
        batch = Batch(self.topics)
        self.decode(batch, message)
        assert not batch.presences
        assert not batch.rivals
        readings = []
        for reading in batch.readings:
            kind = Kind.METER if isinstance(reading, MeterReading) else Kind.VEHICLE
            assert not reading.ts_from_arrival
            key = (kind, reading.device_id, reading.ts)
            if key not in self.history:
                self.history[key], fate = reading.values, Fate.STORED
            else:
                fate = Fate.DUPLICATE if self.history[key] == reading.values else Fate.CONFLICT
            readings.append((reading.device_id, reading.ts, reading.values, fate))
        letters = []
        for letter in batch.dead_letters:
            fate = Fate.DUPLICATE if (letter.topic, letter.payload) in self.letters else Fate.REJECTED
            self.letters.add((letter.topic, letter.payload))
            letters.append((letter.device_id, fate, letter.topic, str(letter.reason), letter.payload))
        return readings, letters

    def commit(self, batch: Batch) -> None:
        """Write a batch as the store does: what is new to history, then what differs from it."""
        known = {}
        for kind, readings in ((Kind.METER, batch.meters), (Kind.VEHICLE, batch.vehicles)):
            for (device_id, ts), reading in readings.items():
                row = self.history.setdefault((kind, device_id, ts), reading.values)
                if row != reading.values:
                    known[kind, device_id, ts] = row
        conflicts, _ = batch.conflicts(known)
        self.letters.update((letter.topic, letter.payload) for letter in (*batch.dead_letters, *conflicts))


def assert_the_bridge_agrees(stream: Iterable[Message | Link], encoder: Encoder) -> Counter[str]:
    """Message by message; returns the fates and reasons that were seen."""
    bridge = InMemory()
    numbers = {topic: number for number, topic in enumerate(encoder.topics)}
    numbers |= {topic.removesuffix("telemetry") + "status": number for topic, number in numbers.items()}
    seen: Counter[str] = Counter()
    number = 0
    for message in stream:
        if isinstance(message, Link):
            continue
        assert message.number == number
        number += 1
        readings, letters = entries_of(message)
        stored, dead = bridge.take(message)
        assert stored == [
            (encoder.ids[reading.device], reading.ts * 1_000, values_of(encoder, reading), fate)
            for reading, fate in readings
        ]
        assert len(letters) == len(dead)
        for letter, (device_id, *verdict) in zip(letters, dead, strict=True):
            assert verdict == [letter.fate, letter.topic, letter.reason, letter.payload]
            assert letter.device == numbers.get(letter.topic, NOBODY)
            assert device_id == ("" if letter.device == NOBODY else encoder.ids[letter.device])
            assert letter.topic == message.topic
            assert (letter.payload == message.payload) != letter.part
            seen[letter.reason] += 1
        assert message.device == numbers.get(message.topic, message.device)
        seen.update(fate.name for _, fate in readings)
        seen.update(f"letter {letter.fate.name}" for letter in letters)
    return seen


# What the bridge makes of it


def test_the_bridge_makes_of_every_message_exactly_what_its_entries_say() -> None:
    fleet = StandIn()
    seen = assert_the_bridge_agrees(islice(messages(fleet, HARD), 40_000), fleet.encoder)
    assert set(seen) == {
        *("STORED", "DUPLICATE", "CONFLICT", "letter REJECTED", "letter DUPLICATE"),
        *("malformed", "not_an_object", "empty_array", "missing_field", "wrong_type", "out_of_range", "id_mismatch"),
        *("invalid_timestamp", "timestamp_in_future", "timestamp_too_old", "invalid_status", "invalid_device_id"),
    }
    assert min(seen.values()) >= 20


def test_everything_means_every_fault() -> None:
    fleet = StandIn(meters=50, vehicles=50)
    seen = assert_the_bridge_agrees(islice(messages(fleet, FaultConfig.everything()), 20_000), fleet.encoder)
    assert {"STORED", "DUPLICATE", "CONFLICT", "malformed", "id_mismatch", "timestamp_too_old"} < set(seen)
    assert seen["STORED"] > 0.8 * sum(seen[fate.name] for fate in Fate)
    assert all(asdict(FaultConfig.everything()).values())


@pytest.mark.parametrize("size", [100, 5_000])
def test_how_messages_fall_into_batches_changes_nothing(size: int) -> None:
    fleet = StandIn()
    stream = [event for event in islice(messages(fleet, HARD), 20_000) if isinstance(event, Message)]
    bridge = InMemory()
    for at in range(0, len(stream), size):
        batch = Batch(bridge.topics)
        for message in stream[at : at + size]:
            bridge.decode(batch, message)
        bridge.commit(batch)

    encoder = fleet.encoder
    history = {}
    letters: set[tuple[str, bytes]] = set()
    conflicts = set()
    for message in stream:
        readings, dead = entries_of(message)
        letters |= {(letter.topic, letter.payload) for letter in dead}
        for reading, fate in readings:
            kind = Kind.METER if reading.device < encoder.meters else Kind.VEHICLE
            key = (kind, encoder.ids[reading.device], reading.ts * 1_000)
            if fate is Fate.STORED:
                history[key] = values_of(encoder, reading)
            elif fate is Fate.CONFLICT:
                conflicts.add((*key, values_of(encoder, reading)))
    assert bridge.history == history
    assert letters <= bridge.letters
    found = set()
    for topic, payload in bridge.letters - letters:
        address = bridge.topics.parse(topic)
        arrival = (START_MS + DAY_MS) * 1_000
        (reading,) = decode_telemetry(address.kind, address.device_id, payload, None, arrival, Limits())
        assert not isinstance(reading, Exception)
        found.add((address.kind, reading.device_id, reading.ts, reading.values))
    assert found == conflicts
    assert len(conflicts) > 500


def fault_configs() -> st.SearchStrategy[FaultConfig]:
    rates = {field.name: st.sampled_from((0.0, 0.1, 1.0)) for field in fields(FaultConfig)}
    often = st.sampled_from((0.0, 5.0, 200.0))
    return st.builds(FaultConfig, **rates | {"outages": often, "silences": often})


@settings(max_examples=30)
@given(faults=fault_configs(), seed=st.integers(0, 2**64), size=st.sampled_from([(1, 0), (0, 1), (0, 3), (3, 2)]))
def test_any_faults_of_any_fleet_come_true(faults: FaultConfig, seed: int, size: tuple[int, int]) -> None:
    fleet = StandIn(*size, seed=seed)
    # Where all are silent for hours the stream has no end of nothing; so much time, not so many messages.
    stream = list(takewhile(lambda event: event.due < 6 * HOUR_MS, messages(fleet, faults)))
    assert_the_bridge_agrees(stream, fleet.encoder)
    assert [event.due for event in stream] == sorted(event.due for event in stream)


def test_a_real_fleet_with_every_fault_comes_true() -> None:
    fleet = Fleet(FleetConfig(start=START, meters=20, vehicles=30, topic_root=ROOT))
    seen = assert_the_bridge_agrees(islice(messages(fleet, HARD), 20_000), fleet.encoder)
    assert seen["STORED"] > 5_000


# The same again


def fingerprint() -> str:
    digest = sha256()
    for event in islice(messages(StandIn(seed=7), HARD), 5_000):
        digest.update(repr(tuple(event)).encode())
    return digest.hexdigest()


def test_the_stream_is_the_same_in_every_process() -> None:
    here = Path(__file__)
    script = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; print(t.fingerprint())"
    prints = {fingerprint()}
    for seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        root = here.parents[2]
        reply = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=60, check=True)
        prints.add(reply.stdout.strip())
    assert len(prints) == 1


def test_another_seed_has_other_faults() -> None:
    lost = []
    for seed in (1, 2):
        sample = Sample(FaultConfig(silences=6), 6, StandIn(seed=seed))
        lost.append(set(plain(6).stored) - set(sample.stored))
    assert lost[0] != lost[1]


def test_without_faults_each_reading_of_the_fleet_is_one_message() -> None:
    fleet = StandIn()
    stream = list(islice(messages(fleet, FaultConfig()), 1_000))
    encoder = fleet.encoder
    assert stream == [
        Message(
            reading.due,
            number,
            reading.device,
            encoder.topics[reading.device],
            encoder.payload(reading),
            reading_entry(number, reading, Fate.STORED),
        )
        for number, reading in enumerate(islice(fleet, 1_000))
    ]


# Each fault alone


def test_a_duplicate_is_the_same_bytes_within_ten_minutes() -> None:
    sample = Sample(FaultConfig(duplicates=0.1), 6)
    assert sample.stored == plain(6).stored
    assert not sample.links
    assert not sample.letters
    assert not sample.of_fate(Fate.CONFLICT)
    first: dict[tuple[str, bytes], int] = {}
    delays = []
    for message in sample.messages:
        ((_, fate),) = entries_of(message)[0]
        key = (message.topic, message.payload)
        assert (fate is Fate.STORED) == (key not in first)
        if fate is Fate.DUPLICATE:
            delays.append(message.due - first[key])
        first.setdefault(key, message.due)
    assert 0 <= min(delays) < 1_000
    assert 5 * MINUTE_MS < max(delays) <= 10 * MINUTE_MS
    assert 0.08 < len(delays) / len(sample.stored) < 0.12
    assert max(Counter((reading.device, reading.ts) for reading, _ in sample.readings).values()) == 2


def test_reordering_only_delays() -> None:
    sample = Sample(FaultConfig(reordering=0.1), 6)
    assert {fate for _, fate in sample.readings} == {Fate.STORED}
    assert not sample.links
    assert not sample.letters
    delays = [reading.due - (reading.ts - START_MS) for reading, _ in sample.readings]
    held = [delay for delay in delays if delay]
    assert MINUTE_MS <= min(held) < 2 * MINUTE_MS
    assert 20 * MINUTE_MS < max(held) <= 30 * MINUTE_MS
    assert 0.08 < len(held) / len(delays) < 0.12
    missing = set(plain(6).stored) - set(sample.stored)
    assert all(ts > START_MS + 6 * HOUR_MS - 30 * MINUTE_MS for _, ts in missing)
    assert sample.stored.items() <= plain(6).stored.items()
    overtaken = Counter(later.ts < earlier.ts for (earlier, _), (later, _) in pairwise(sample.readings))
    assert overtaken[True] > 100


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_conflict_is_one_more_reading_of_the_same_time_with_other_values(rate: float) -> None:
    sample = Sample(FaultConfig(conflicts=rate), 6)
    assert sample.stored == plain(6).stored
    assert not sample.links
    assert not sample.letters
    assert not sample.of_fate(Fate.DUPLICATE)
    encoder = sample.fleet.encoder
    conflicts = sample.of_fate(Fate.CONFLICT)
    keys = [(reading.device, reading.ts) for reading in conflicts]
    assert len(keys) == len(set(keys))
    assert 0.8 * rate < len(keys) / len(sample.stored) < 1.2 * rate
    differing: Counter[tuple[bool, str]] = Counter()
    for reading in conflicts:
        original = sample.stored[reading.device, reading.ts]
        assert values_of(encoder, reading) != values_of(encoder, original)
        assert 0 <= reading.due - (reading.ts - START_MS) <= 10 * MINUTE_MS
        is_meter = reading.device < encoder.meters
        differing.update(
            (is_meter, name)
            for name in ("energy", "level", "temperature", "meter")
            if getattr(reading, name) != getattr(original, name)
        )
    assert set(differing) == {
        *((True, name) for name in ("energy", "level")),
        *((False, name) for name in ("energy", "level", "temperature", "meter")),
    }


def test_an_outage_loses_nothing_and_ends_with_arrays_of_the_backlog() -> None:
    sample = Sample(FaultConfig(outages=8), 48)
    expected = plain(48).stored
    offline: dict[int, int] = {}
    lengths: list[int] = []
    sizes: list[int] = []
    recovering: dict[int, int] = {}
    newest: dict[int, int] = defaultdict(int)
    for event in sample.events:
        if isinstance(event, Link):
            assert event.up == (event.device in offline)
            if event.up:
                lengths.append(event.due - offline.pop(event.device))
                recovering[event.device] = event.due
            else:
                offline[event.device] = event.due
            continue
        assert event.device not in offline
        readings, letters = entries_of(event)
        assert not letters
        if event.payload.startswith(b"["):
            assert event.due == recovering[event.device]
            assert len(json.loads(event.payload)) == len(readings) <= MOST_READINGS
            sizes.append(len(readings))
        else:
            assert len(readings) == 1
            assert readings[0][0].ts - START_MS == event.due
        for reading, fate in readings:
            assert fate is Fate.STORED
            assert reading.ts > newest[event.device]  # nothing overtakes the backlog
            newest[event.device] = reading.ts
    for key in set(expected) - set(sample.stored):
        assert key[0] in offline
        assert key[1] >= START_MS + offline[key[0]]
    assert sample.stored.items() <= expected.items()
    assert 2 * MINUTE_MS <= min(lengths) < 10 * MINUTE_MS
    assert 3 * HOUR_MS < max(lengths) <= 6 * HOUR_MS + MINUTE_MS
    assert sum(length < 2 * HOUR_MS for length in lengths) > 0.55 * len(lengths)
    assert max(sizes) == MOST_READINGS
    assert 0.6 < (len(lengths) + len(offline)) / (8 * 2 * 25) < 1.1


def test_a_spoiled_array_has_one_more_element_that_is_rejected_alone() -> None:
    spoiled = Sample(FaultConfig(outages=12, spoiled=0.5), 24)
    arrays = [message for message in spoiled.messages if message.payload.startswith(b"[")]
    affected = 0
    for message in arrays:
        readings, letters = entries_of(message)
        elements = json.loads(message.payload)
        assert len(elements) == len(readings) + len(letters)
        assert len(letters) <= 1
        affected += len(letters)
        for letter in letters:
            assert letter.part
            assert letter.payload in message.payload
            assert json.loads(letter.payload) in elements
    assert 0.35 < affected / len(arrays) < 0.65
    assert len({letter.reason for letter in spoiled.letters}) == 4
    assert len(spoiled.letters) == affected  # only arrays are spoiled
    missing = set(plain(24).stored) - set(spoiled.stored)
    down = {link.device: link for link in spoiled.links}
    assert all(not down[device].up and ts >= START_MS + down[device].due for device, ts in missing)


def test_a_wrong_clock_is_wrong_by_the_same_for_the_whole_run() -> None:
    fleet = StandIn(meters=100, vehicles=100)
    sample = Sample(FaultConfig(skewed=0.25), 1, fleet)
    errors: dict[int, set[int]] = defaultdict(set)
    for reading, fate in sample.readings:
        assert fate is Fate.STORED
        errors[reading.device].add(reading.ts - START_MS - reading.due)
    assert len(sample.messages) == 200 * 60
    assert not sample.links
    assert all(len(of_one) == 1 for of_one in errors.values())
    wrong = [error for of_one in errors.values() for error in of_one if error]
    assert len(wrong) == 50
    assert -2 * HOUR_MS <= min(wrong) < -HOUR_MS
    assert 2 * MINUTE_MS < max(wrong) <= 4 * MINUTE_MS


def test_one_device_at_least_has_a_wrong_clock() -> None:
    sample = Sample(FaultConfig(skewed=0.01), 0.1, StandIn(1, 1))
    assert len({reading.device for reading, _ in sample.readings if reading.ts - START_MS != reading.due}) == 1


def test_what_is_measured_in_a_silence_is_lost_for_ever() -> None:
    sample = Sample(FaultConfig(silences=4), 48)
    expected = plain(48).stored
    assert sample.stored.items() < expected.items()
    assert not sample.links
    assert not sample.letters
    assert {fate for _, fate in sample.readings} == {Fate.STORED}
    assert all(reading.due == reading.ts - START_MS for reading, _ in sample.readings)
    gaps = []
    for device in range(len(sample.fleet.encoder.ids)):
        spoken = sorted(ts for whose, ts in sample.stored if whose == device)
        gaps += [later - earlier for earlier, later in pairwise(spoken) if later - earlier > MINUTE_MS]
    assert min(gaps) >= 10 * MINUTE_MS
    assert max(gaps) > 2 * HOUR_MS
    assert sum(gap > 6 * HOUR_MS + MINUTE_MS for gap in gaps) < 0.1 * len(gaps)  # two in a row
    assert 0.6 < len(gaps) / (4 * 2 * 25) < 1.1


REJECTED_COPIES: list[tuple[str, str, Callable[[int], bool]]] = [
    ("mismatches", "id_mismatch", lambda age: age == 0),
    ("far_past", "timestamp_too_old", lambda age: 2 * 365 * DAY_MS < age < 21 * 366 * DAY_MS),
    ("far_future", "timestamp_in_future", lambda age: 10 * 365 * DAY_MS < -age < 502 * 366 * DAY_MS),
]


@pytest.mark.parametrize(("fault", "reason", "is_right"), REJECTED_COPIES)
def test_a_rejected_copy_is_one_more_message(fault: str, reason: str, is_right: Callable[[int], bool]) -> None:
    sample = Sample(FaultConfig(**{fault: 0.1}), 6)
    assert sample.stored == plain(6).stored
    assert not sample.links
    assert {letter.reason for letter in sample.letters} == {reason}
    assert 0.08 < len(sample.letters) / len(sample.stored) < 0.12
    ids = sample.fleet.encoder.ids
    named = set()
    for message in sample.messages:
        readings, letters = entries_of(message)
        assert len(readings) + len(letters) == 1
        for letter in letters:
            assert letter.payload == message.payload
            assert not letter.part
            said = json.loads(message.payload)
            at = datetime.fromisoformat(said["timestamp"])
            assert at.year < 2900
            assert is_right((message.due + START_MS) - round(at.timestamp() * 1_000))
            name = said["meterId" if message.device < sample.fleet.encoder.meters else "vehicleId"]
            assert (name == ids[message.device]) == (fault != "mismatches")
            named.add(name)
    assert set(ids) <= named


def test_garbage_comes_in_addition() -> None:
    sample = Sample(FaultConfig(malformed=0.2), 6)
    assert sample.stored == plain(6).stored
    assert not sample.links
    assert all(fate is Fate.STORED for _, fate in sample.readings)
    fates = Counter(letter.fate for letter in sample.letters)
    assert set(fates) == {Fate.REJECTED, Fate.DUPLICATE}  # an empty payload is the same letter each time
    assert fates[Fate.REJECTED] > fates[Fate.DUPLICATE]
    told = [(letter.topic, letter.payload) for letter in sample.letters if letter.fate is Fate.REJECTED]
    assert len(told) == len(set(told))
    broken = sum(bool(entries_of(message)[1]) for message in sample.messages)
    assert 0.17 < broken / len(sample.stored) < 0.23


# All of them together


def test_a_device_without_a_network_sends_nothing_and_its_copies_wait() -> None:
    sample = Sample(HARD, 24)
    offline: set[int] = set()
    after_backlog = 0
    for event in sample.events:
        if isinstance(event, Link):
            (offline.remove if event.up else offline.add)(event.device)
        else:
            assert event.device not in offline
            after_backlog += event.payload.startswith(b"[{")
    assert after_backlog > 100
    ups = {(link.device, link.due) for link in sample.links if link.up}
    late = [reading for reading in sample.of_fate(Fate.CONFLICT) if (reading.device, reading.due) in ups]
    assert late


def test_what_was_under_way_when_the_network_went_is_not_lost() -> None:
    sample = Sample(FaultConfig(outages=6, reordering=1.0, duplicates=1.0, conflicts=1.0), 24)
    newest = {link.device: link for link in sample.links}
    online = {device for device, link in newest.items() if link.up and link.due < 23 * HOUR_MS}
    assert len(online) > 3
    settled = {key for key in plain(24).stored if key[0] in online and key[1] < START_MS + 23 * HOUR_MS}
    for fate in (Fate.STORED, Fate.DUPLICATE, Fate.CONFLICT):
        assert settled <= {(reading.device, reading.ts) for reading in sample.of_fate(fate)}


def test_nothing_is_kept_that_was_sent() -> None:
    faults = FaultConfig(**{name: rate for name, rate in asdict(HARD).items() if name != "malformed"})
    stream = _Stream(StandIn(), faults)
    held = []
    events = iter(stream)
    for _ in range(4):
        for _ in islice(events, 15_000):
            pass
        held.append(len(stream._pending) + sum(len(gone.backlog) for gone in stream._offline.values()))
    assert max(held) < 1_500
    assert max(held[2:]) < 2 * max(held[:2])
    rejected = sum(letter.fate is Fate.REJECTED for letter in Sample(faults, 2).letters)
    fresh = _Stream(StandIn(), faults)
    for _ in takewhile(lambda event: event.due < 2 * HOUR_MS, fresh):
        pass
    assert rejected <= len(fresh._letters) <= rejected + 1


# What makes no sense


@pytest.mark.parametrize("name", [field.name for field in fields(FaultConfig)])
@pytest.mark.parametrize("rate", [-0.001, 1_441, float("nan"), float("inf")])
def test_what_is_no_rate_is_refused_by_name(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} .* between 0 .*, not {rate}$"):
        FaultConfig(**{name: rate})


def test_a_share_is_one_at_most_and_a_number_a_day_may_be_more() -> None:
    with pytest.raises(ValueError, match="duplicates is a share"):
        FaultConfig(duplicates=1.01)
    assert FaultConfig(duplicates=1, outages=24, silences=24).outages == 24
