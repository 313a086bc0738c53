"""Faults: what becomes of readings between the device and the broker, and what every message must lead to. Pure.

Without faults each reading is one message. Each fault has its own rate, and its own way to make the stream harder for
whoever stores it; what must be stored nevertheless is decided here, as the messages are made, and written into
their entries. It follows from three rules: a copy is drawn when its original is sent, so it comes after it; a device
has one constant clock error, so no two of its readings share a timestamp; what is not a reading never becomes one.
"""

import json
import random
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple, Self

from simulator.fleet import Fleet
from simulator.garbage import Letter, bad_element, garbage
from simulator.messages import (
    EPOCH,
    MINUTE_MS,
    READING_SLOT,
    Fate,
    Link,
    Message,
    Reading,
    SlotType,
    array,
    letter_entry,
    reading_entry,
)

HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
YEAR_MS = 366 * DAY_MS

COPY_DELAY_MS = (0, 10 * MINUTE_MS)
HOLD_MS = (MINUTE_MS, 30 * MINUTE_MS)
OUTAGE_MS = (2 * MINUTE_MS, 6 * HOUR_MS)
SILENCE_MS = (10 * MINUTE_MS, 6 * HOUR_MS)
CLOCK_BEHIND_MS = (-2 * HOUR_MS, -1)
CLOCK_AHEAD_MS = (1, 4 * MINUTE_MS)
"""A bridge takes no reading that is more than five minutes ahead; the rest is left to the clocks of real machines."""

PAST_MS = (2 * YEAR_MS, 20 * YEAR_MS)
FUTURE_MS = (10 * YEAR_MS, 500 * YEAR_MS)
FUTURE_ENDS_MS = (datetime(2900, 1, 1, tzinfo=UTC) - EPOCH) // timedelta(milliseconds=1)

MOST_READINGS = 60
"""As many readings a device sends in one array."""

NOBODY = 0xFFFF_FFFF
"""The device of a letter whose topic names none."""

STRANGER = "DEV-000000"
MOST_LEVEL = 10_000
"""1000 V, or 100 %."""
MOST_A_DAY = 1440


@dataclass(frozen=True, slots=True)
class FaultConfig:
    """How often what goes wrong; 0 for never, which is the default.

    Raises ValueError, with a sentence for people, on what is no rate.
    """

    duplicates: float = 0.0
    """Probability that a message is sent again, byte for byte, up to 10 minutes later."""
    reordering: float = 0.0
    """Probability that a reading is held back for 1 to 30 minutes."""
    conflicts: float = 0.0
    """Probability that a reading is followed, up to 10 minutes later, by one of the same time with other values."""
    outages: float = 0.0
    """How often a device loses its network, per day on the network; for 2 minutes to 6 hours, short ones more often."""
    spoiled: float = 0.0
    """Share of the arrays sent after an outage that have one more element, which is no reading."""
    skewed: float = 0.0
    """Share of the devices whose clock is wrong: up to 2 hours behind or 4 minutes ahead, for the whole run."""
    silences: float = 0.0
    """How often a device loses its readings, per day of readings; for 10 minutes to 6 hours, short ones more often."""
    malformed: float = 0.0
    """Probability that after a reading something is sent that is none."""
    mismatches: float = 0.0
    """Probability that a reading is sent once more in the name of another device."""
    far_past: float = 0.0
    """Probability that a reading is sent once more from 2 to 20 years before the start."""
    far_future: float = 0.0
    """Probability that a reading is sent once more from 10 to 500 years ahead."""

    def __post_init__(self) -> None:
        """Refuse what is no rate."""
        for field in fields(self):
            rate = getattr(self, field.name)
            if field.name in {"outages", "silences"}:
                if not 0 <= rate <= MOST_A_DAY:
                    raise ValueError(f"{field.name} per device and day are between 0 and {MOST_A_DAY}, not {rate}")
            elif not 0 <= rate <= 1:
                raise ValueError(f"{field.name} is a share between 0 (never) and 1 (always), not {rate}")

    @classmethod
    def everything(cls) -> Self:
        """Return all faults at moderate rates: in an hour of 100 devices each has happened."""
        return cls(
            duplicates=0.02,
            reordering=0.02,
            conflicts=0.01,
            outages=4.0,
            spoiled=0.25,
            skewed=0.1,
            silences=1.0,
            malformed=0.01,
            mismatches=0.005,
            far_past=0.005,
            far_future=0.005,
        )


def messages(fleet: Fleet, faults: FaultConfig) -> Iterator[Message | Link]:
    """Return what the devices of a fleet publish, in the order of `due`, and when they lose and regain their network.

    Endless like the fleet, which can be used once. The same fleet and faults give the same messages, byte for byte.
    """
    return _faultless(fleet) if faults == FaultConfig() else iter(_Stream(fleet, faults))


def _faultless(fleet: Fleet) -> Iterator[Message]:
    topics, payload = fleet.encoder.topics, fleet.encoder.payload
    pack, stored, slot = READING_SLOT.pack, int(Fate.STORED), int(SlotType.READING)
    new, cls = tuple.__new__, Message  # half the price of calling Message
    for number, reading in enumerate(fleet):
        due, device, ts, energy, level, temperature, meter = reading
        entry = pack(number, device, ts, energy, level, temperature, meter, stored, slot)
        yield new(cls, (due, number, device, topics[device], payload(reading), entry))


class _Draft(NamedTuple):
    """A message that has no number yet. `fate` is that of its readings; a copy has another one than STORED."""

    device: int
    topic: str
    payload: bytes
    readings: tuple[Reading, ...] = ()
    fate: Fate = Fate.STORED
    letters: tuple[Letter, ...] = ()
    nobody: bool = False


class _Outage(NamedTuple):
    """A device without a network: until when, what it has measured, and what else it would have sent."""

    end: int
    backlog: list[Reading]
    waiting: list[_Draft]


class _Stream:
    """The messages of a fleet with faults. Keeps what is still to be sent, and a digest of each dead letter."""

    def __init__(self, fleet: Fleet, faults: FaultConfig) -> None:
        self._fleet = fleet
        self._faults = faults
        self._encoder = fleet.encoder
        self._names = [*fleet.encoder.ids, STRANGER]
        self._start = (fleet.config.start - EPOCH) // timedelta(milliseconds=1)
        self._rng = random.Random(f"faults of {fleet.config.seed}")  # noqa: S311 - repeatable, nothing secret
        self._number = 0
        self._serial = 0
        self._letters: set[bytes] = set()
        devices = len(fleet.encoder.ids)
        self._skews = self._draw_skews(devices)
        self._silences: list[tuple[float, float]] = [(inf, inf)] * devices
        if faults.silences:
            self._silences = [self._next_silence(0) for _ in range(devices)]
        self._offline: dict[int, _Outage] = {}
        # By due and serial number: a message, or the device whose outage begins.
        self._pending: list[tuple[int, int, _Draft | int]] = []
        if faults.outages:
            self._pending = [(self._gap(faults.outages), device - devices, device) for device in range(devices)]
            heapify(self._pending)
        strays = (
            (faults.malformed, self._garbage),
            (faults.mismatches, self._mismatch),
            (faults.far_past, self._from_the_past),
            (faults.far_future, self._from_the_future),
        )
        self._strays: list[tuple[float, Callable[[Reading], _Draft]]] = [stray for stray in strays if stray[0]]

    def __iter__(self) -> Iterator[Message | Link]:
        pending, silences, offline, skews = self._pending, self._silences, self._offline, self._skews
        random_, reordering, strays = self._rng.random, self._faults.reordering, self._strays
        topics, encode = self._encoder.topics, self._encoder.payload
        for reading in self._fleet:
            due, device = reading[0], reading[1]
            if pending and pending[0][0] <= due:
                yield from self._catch_up(due)
            if due >= silences[device][0] and self._is_silent(device, due):
                continue
            measured = reading._replace(ts=reading.ts + skews[device]) if device in skews else reading
            if device in offline:
                if due < offline[device].end:
                    offline[device].backlog.append(measured)
                    continue
                yield Link(due, device, up=True)
                for draft in self._end_outage(device, due):
                    yield self._publish(due, draft)
            draft = _Draft(device, topics[device], encode(measured), (measured,))
            if random_() < reordering:
                self._later(due + self._short(HOLD_MS), draft)
            else:
                yield self._publish(due, draft)
            for rate, stray in strays:
                if random_() < rate:
                    yield self._publish(due, stray(measured))

    # What is sent

    def _publish(self, due: int, draft: _Draft) -> Message:
        """Give a message its number, and draw the copies that follow an original."""
        number = self._number
        self._number += 1
        device, topic, payload, readings, fate, letters, nobody = draft
        entries = b"".join([reading_entry(number, reading, fate) for reading in readings])
        if letters:
            owner = NOBODY if nobody else device
            entries += b"".join([self._letter(number, owner, topic, letter) for letter in letters])
        if fate is Fate.STORED:
            self._draw_copies(due, draft)
        return Message(due, number, device, topic, payload, entries)

    def _letter(self, number: int, owner: int, topic: str, letter: Letter) -> bytes:
        """Return the entry of a dead letter: what is said twice on one topic is only the first time one."""
        digest = blake2b(b"%b\0%b" % (topic.encode(), letter.payload), digest_size=16).digest()
        fate = Fate.DUPLICATE if digest in self._letters else Fate.REJECTED
        self._letters.add(digest)
        payload = b64encode(letter.payload).decode()
        body = {"topic": topic, "reason": letter.reason, "payload": payload, "part": letter.part}
        return letter_entry(number, owner, fate, json.dumps(body).encode())

    def _draw_copies(self, due: int, draft: _Draft) -> None:
        if self._rng.random() < self._faults.duplicates:
            self._later(due + self._short(COPY_DELAY_MS), draft._replace(fate=Fate.DUPLICATE))
        for reading in draft.readings:
            if self._rng.random() < self._faults.conflicts:
                other = self._contradiction(reading)
                payload = self._encoder.payload(other)
                conflict = _Draft(draft.device, draft.topic, payload, (other,), Fate.CONFLICT)
                self._later(due + self._short(COPY_DELAY_MS), conflict)

    def _contradiction(self, reading: Reading) -> Reading:
        """Return a reading of the same time that differs in one value, and is as good as the other."""
        rng, meters = self._rng, self._encoder.meters
        choices = 2 if reading.device < meters else 4 if meters else 3
        match int(rng.random() * choices):
            case 0:
                return reading._replace(energy=reading.energy + rng.randrange(1, 1000))
            case 1:
                return reading._replace(level=(reading.level + rng.randrange(1, MOST_LEVEL)) % (MOST_LEVEL + 1))
            case 2:
                return reading._replace(temperature=reading.temperature + rng.choice((-1, 1)) * rng.randrange(1, 100))
            case _:
                return reading._replace(meter=(reading.meter + rng.randrange(1, meters + 1)) % (meters + 1))

    def _garbage(self, reading: Reading) -> _Draft:
        device = reading.device
        topic, payload, letters, nobody = garbage(
            self._rng, self._encoder.topics[device], self._encoder.payload(reading)
        )
        return _Draft(device, topic, payload, letters=letters, nobody=nobody)

    def _mismatch(self, reading: Reading) -> _Draft:
        device, names = reading.device, self._names
        other = names[(device + self._rng.randrange(1, len(names))) % len(names)]
        payload = self._encoder.payload(reading)
        return self._rejected(device, "id_mismatch", payload.replace(names[device].encode(), other.encode(), 1))

    def _from_the_past(self, reading: Reading) -> _Draft:
        payload = self._encoder.payload(reading._replace(ts=self._start - self._rng.randint(*PAST_MS)))
        return self._rejected(reading.device, "timestamp_too_old", payload)

    def _from_the_future(self, reading: Reading) -> _Draft:
        ts = min(reading.ts + self._rng.randint(*FUTURE_MS), FUTURE_ENDS_MS - 1)
        return self._rejected(reading.device, "timestamp_in_future", self._encoder.payload(reading._replace(ts=ts)))

    def _rejected(self, device: int, reason: str, payload: bytes) -> _Draft:
        return _Draft(device, self._encoder.topics[device], payload, letters=(Letter(reason, payload),))

    # When it is sent

    def _later(self, due: int, draft: _Draft) -> None:
        self._serial += 1
        heappush(self._pending, (due, self._serial, draft))

    def _catch_up(self, now: int) -> Iterator[Message | Link]:
        """Let happen what is due by now; a message of a device that is offline has to wait for its network."""
        while self._pending and self._pending[0][0] <= now:
            due, _, event = heappop(self._pending)
            if isinstance(event, int):
                self._offline[event] = _Outage(due + self._short(OUTAGE_MS), [], [])
                yield Link(due, event, up=False)
            elif event.device in self._offline:
                self._offline[event.device].waiting.append(event)
            else:
                yield self._publish(due, event)

    def _end_outage(self, device: int, due: int) -> Iterator[_Draft]:
        """Yield what has gathered while the device was offline, the oldest reading first."""
        _, backlog, waiting = self._offline.pop(device)
        self._serial += 1
        heappush(self._pending, (due + self._gap(self._faults.outages), self._serial, device))
        for at in range(0, len(backlog), MOST_READINGS):
            yield self._array(device, tuple(backlog[at : at + MOST_READINGS]))
        yield from waiting

    def _array(self, device: int, readings: tuple[Reading, ...]) -> _Draft:
        elements = [self._encoder.payload(reading) for reading in readings]
        letters: tuple[Letter, ...] = ()
        if self._rng.random() < self._faults.spoiled:
            letters = (bad_element(self._rng, self._rng.choice(elements)),)
            elements.insert(self._rng.randrange(len(elements) + 1), letters[0].payload)
        return _Draft(device, self._encoder.topics[device], array(elements), readings, letters=letters)

    def _is_silent(self, device: int, due: int) -> bool:
        while due >= self._silences[device][1]:
            self._silences[device] = self._next_silence(self._silences[device][1])
        return due >= self._silences[device][0]

    def _next_silence(self, after: float) -> tuple[float, float]:
        begin = after + self._gap(self._faults.silences)
        return begin, begin + self._short(SILENCE_MS)

    def _draw_skews(self, devices: int) -> dict[int, int]:
        """Draw the clock errors in milliseconds of those devices that have one: one device at least."""
        rng, share = self._rng, self._faults.skewed
        wrong = rng.sample(range(devices), max(1, round(share * devices))) if share else []
        return {device: rng.randint(*rng.choice((CLOCK_BEHIND_MS, CLOCK_AHEAD_MS))) for device in wrong}

    def _gap(self, per_day: float) -> int:
        """Draw how long it takes, in milliseconds, until what happens so often a day happens next."""
        return int(self._rng.expovariate(per_day / DAY_MS))

    def _short(self, bounds: tuple[int, int]) -> int:
        """Draw a duration in milliseconds, a short one with more likelihood: half are in the first eighth."""
        shortest, longest = bounds
        part = self._rng.random()
        return shortest + int((longest - shortest) * part * part * part)
