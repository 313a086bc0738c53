"""A batch: what one transaction writes. Decides what is new, a duplicate or a conflict within itself. Pure."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from statistics import median_low
from typing import NamedTuple
from uuid import UUID, uuid4

from bridge.errors import Reason, Rejection
from bridge.messages import MeterReading, Presence, Reading, VehicleReading, encode_reading
from bridge.topics import Kind, Topics


class DeadLetter(NamedTuple):
    """A message, or one reading of it, that cannot become history, and why."""

    device_id: str
    topic: str
    payload: bytes
    content_type: str | None
    reason: Reason
    detail: str
    received_at: int

    @property
    def digest(self) -> bytes:
        """The identity of the dead letter: the same content on the same topic is the same one."""
        content_type = (self.content_type or "").encode()
        return hashlib.sha256(b"\0".join((self.topic.encode(), content_type, self.payload))).digest()


class Key(NamedTuple):
    """Which dead letter: its primary key in the database."""

    device_id: str
    digest: bytes


@dataclass(slots=True)
class Batch:
    """Readings by (device, ts), newest status by device, and dead letters, with what was decided about them.

    `id` makes a second attempt at the same batch recognisable after a commit that was not answered. `repeated` says how
    often each reading came again within the batch.
    """

    topics: Topics
    id: UUID = field(default_factory=uuid4)
    meters: dict[tuple[str, int], MeterReading] = field(default_factory=dict)
    vehicles: dict[tuple[str, int], VehicleReading] = field(default_factory=dict)
    presences: dict[tuple[str, Kind], Presence] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    rivals: list[Reading] = field(default_factory=list)
    replayed: list[Key] = field(default_factory=list)
    repeated: Counter[tuple[Kind, str, int]] = field(default_factory=Counter)
    received: int = 0
    statuses: int = 0

    def __len__(self) -> int:
        """How many things the database has to decide about."""
        return len(self.readings) + len(self.presences) + len(self.dead_letters)

    @property
    def taken(self) -> int:
        """How many readings and status messages it was given."""
        return self.received + self.statuses

    @property
    def duplicates(self) -> int:
        """How many readings are duplicates within the batch."""
        return self.repeated.total()

    @property
    def oldest(self) -> float:
        """The earliest timestamp of its readings; infinity where it has none."""
        return min(map(itemgetter(1), chain(self.meters, self.vehicles)), default=math.inf)

    @property
    def position(self) -> int | None:
        """Where in time it is: the median of the devices' own timestamps, else of all; None without readings."""
        times = self.times() or [ts for _, ts in chain(self.meters, self.vehicles)]
        return median_low(times) if times else None

    def times(self, every: int = 1) -> list[int]:
        """The timestamps that the devices gave their readings, ascending; of each so many readings one."""
        readings: list[Reading] = [*self.meters.values(), *self.vehicles.values()]
        return sorted(reading.ts for reading in readings[::every] if not reading.ts_from_arrival)

    def add_reading(self, reading: Reading) -> None:
        """Takes a reading; the first one of a (device, ts) stays, another one with other values is its rival."""
        self.received += 1
        known = self.keep(reading)
        if known is reading:
            return
        if known.values == reading.values:
            self.repeated[_key(reading)] += 1
        else:
            self.rivals.append(reading)

    def add_presence(self, presence: Presence) -> None:
        """Takes a status; the last one of a device stays."""
        self.statuses += 1
        self.presences[presence.device_id, presence.kind] = presence

    def add_rejection(
        self, rejection: Rejection, device_id: str, topic: str, payload: bytes, content_type: str | None, arrival: int
    ) -> None:
        """Takes a message, or the part of it that was rejected, as a dead letter."""
        self.received += 1
        kept = payload if rejection.payload is None else rejection.payload
        # PostgreSQL has no NUL in text; MQTT forbids it in a topic, but who knows what is on the wire.
        topic = topic.replace("\0", "\ufffd")
        content_type = content_type and content_type.replace("\0", "\ufffd")
        self.dead_letters.append(
            DeadLetter(device_id, topic, kept, content_type, rejection.reason, rejection.detail, arrival)
        )

    def conflicts(self, known: Mapping[tuple[Kind, str, int], tuple[object, ...]]) -> tuple[list[DeadLetter], int]:
        """The dead letters of what differs from history, and how many rivals turn out to be duplicates of it.

        `known` has the values in history of those readings whose own are others. Together with the first
        reading of a (device, ts) that is all there is to compare a rival with.
        """
        letters = [
            self.conflict((self.meters if kind is Kind.METER else self.vehicles)[device_id, ts])
            for kind, device_id, ts in known
        ]
        other = [rival for rival in self.rivals if known.get(_key(rival)) != rival.values]
        return letters + [self.conflict(rival) for rival in other], len(self.rivals) - len(other)

    def duplicates_of(self, known: Mapping[tuple[Kind, str, int], tuple[object, ...]]) -> Counter[tuple[Kind, str]]:
        """By device, the duplicates that show without a look at history but for `known` (as in `conflicts`).

        What repeats a reading that differs from history is none: alone, it would be the same dead letter again.
        """
        duplicates: Counter[tuple[Kind, str]] = Counter()
        for (kind, device_id, ts), times in self.repeated.items():
            if (kind, device_id, ts) not in known:
                duplicates[kind, device_id] += times
        for rival in self.rivals:
            if known.get(_key(rival)) == rival.values:
                duplicates[_kind(rival), rival.device_id] += 1
        return duplicates

    def conflict(self, reading: Reading) -> DeadLetter:
        """The dead letter of a reading whose (device, ts) is known with other values."""
        detail = "history has this device and timestamp with other values; the first one stays"
        return self._dead(reading, Reason.CONFLICT, detail)

    @property
    def readings(self) -> list[Reading]:
        """The readings that are not decided within the batch; rivals come after those they differ from."""
        return [*self.meters.values(), *self.vehicles.values(), *self.rivals]

    def split(self) -> tuple["Batch", "Batch"]:
        """Two batches, each with its own id, that together say the same: to find what the database refuses.

        What is not a reading goes apart first, then the readings are halved.
        """
        readings = self.readings
        middle = 0 if self.dead_letters or self.presences else len(readings) // 2
        rest = replace(
            self, id=uuid4(), meters={}, vehicles={}, rivals=[], received=self.received - len(readings[middle:])
        )
        other = Batch(self.topics, received=len(readings[middle:]))
        for half, part in ((rest, readings[:middle]), (other, readings[middle:])):
            for reading in part:
                if half.keep(reading) is not reading:
                    half.rivals.append(reading)
        return rest, other

    def refused(self, why: str) -> "Batch":
        """This batch with its readings as dead letters: the database does not take them."""
        letters = [self._dead(reading, Reason.REFUSED_BY_DATABASE, why) for reading in self.readings]
        return replace(self, id=uuid4(), meters={}, vehicles={}, rivals=[], dead_letters=[*self.dead_letters, *letters])

    def keep(self, reading: Reading) -> Reading:
        """Takes a reading unless its (device, ts) is taken; returns the one that stays: the first."""
        key = reading[:2]  # (device_id, ts)
        if isinstance(reading, MeterReading):
            return self.meters.setdefault(key, reading)
        return self.vehicles.setdefault(key, reading)

    def _dead(self, reading: Reading, reason: Reason, detail: str) -> DeadLetter:
        topic = self.topics.telemetry(_kind(reading), reading.device_id)
        return DeadLetter(reading.device_id, topic, encode_reading(reading), None, reason, detail, reading.received_at)


def _kind(reading: Reading) -> Kind:
    return Kind.METER if isinstance(reading, MeterReading) else Kind.VEHICLE


def _key(reading: Reading) -> tuple[Kind, str, int]:
    return _kind(reading), reading.device_id, reading.ts
