"""What the devices of a fleet measure, interval by interval; pure and without I/O.

Every interval each meter and each vehicle says one reading. A meter is the AC side of one charger. A handful
of chargers make a site; a vehicle belongs to a site, comes and goes by its habit, and plugs in at whichever
charger of its site is free. Who is plugged in changes only at the start of a UTC minute, and all readings of
a minute carry a timestamp inside it: DC over AC of the minutes in which one vehicle alone names a meter is
the efficiency of that charger, within the error of the meter.

The same configuration gives the same readings.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import NamedTuple

from simulator import physics
from simulator.messages import EPOCH, MINUTE_MS, Encoder, Reading
from simulator.physics import Charger, Device, Session, Vehicle, charge, unplug

MINUTE = timedelta(minutes=1)
DAY = physics.DAY_MINUTES

SITE_SIZE = 5
"""A site has at least so many chargers and so many vehicles, if the fleet has."""

LONGEST_ROOT = 1000
"""Characters of the topic root: with the longest device id behind it, it is still a topic that MQTT can carry."""

EMPTY_SOC = 5.0
"""Where a vehicle that finds no charger stops driving."""

FASTEST_DRAIN = 0.6
"""Percent a minute that driving takes at most."""

WORTH_PLUGGING_IN = 12.0
"""Who lacks less than this many percent does not look for a charger."""


class Habit(NamedTuple):
    """When vehicles of a kind stand at their chargers, in hours UTC; without hours, at any time of the day."""

    stays: tuple[tuple[float, float], ...]
    use: tuple[float, float]
    """Percent of the battery that a trip takes, at least and at most."""
    weight: float


HABITS = {
    "commuter": Habit(stays=((17.5, 31.0),), use=(25.0, 60.0), weight=35),
    "employee": Habit(stays=((8.0, 16.5),), use=(30.0, 60.0), weight=25),
    "van": Habit(stays=((12.5, 14.5), (19.5, 29.5)), use=(30.0, 65.0), weight=20),
    "taxi": Habit(stays=(), use=(30.0, 65.0), weight=20),
}
"""Home for the night, at work for the day, back at the depot between shifts, on duty round the clock."""


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What makes a fleet. `start` is the beginning of a minute, with a time zone.

    The interval divides a minute evenly, so that the readings of a meter and of the vehicle that charges
    there always meet in the same minute. `shared_share` of the meters count two outlets, at which two vehicles
    may charge at the same time. Raises ValueError, with a sentence for people, on anything else.
    """

    start: datetime
    meters: int = 100
    vehicles: int = 100
    seed: int = 1
    interval: timedelta = MINUTE
    topic_root: str = "energy/v1"
    faulty_share: float = 0.02
    shared_share: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        if self.meters < 0 or self.vehicles < 0 or self.meters + self.vehicles == 0:
            raise ValueError("a fleet needs at least one meter or vehicle, and no negative numbers of them")
        if self.start.tzinfo is None:
            raise ValueError(f"the start {self.start.isoformat()} needs a time zone, for example a Z at the end")
        try:
            start = self.start.astimezone(UTC)
        except OverflowError as error:
            raise ValueError(f"the start {self.start.isoformat()} is beyond all calendars") from error
        if start.second or start.microsecond:
            raise ValueError(f"the start {self.start.isoformat()} is not the beginning of a minute")
        object.__setattr__(self, "start", start)
        if self.interval < timedelta(seconds=1) or MINUTE % self.interval:
            raise ValueError(
                f"an interval of {self.interval.total_seconds():g} s does not divide a minute (60, 30, 20 …)"
            )
        root = self.topic_root
        if not root.strip("/") or not root.isprintable() or set(root) & set("+#") or len(root) > LONGEST_ROOT:
            raise ValueError(
                f"the topic root {root[:80]!r} must be a topic without wildcards, printable, of at most {LONGEST_ROOT} "
                "characters"
            )
        if not 0 <= self.faulty_share <= 1:
            raise ValueError(f"the share of faulty chargers {self.faulty_share} is not between 0 and 1")
        if not 0 <= self.shared_share <= 1:
            raise ValueError(f"the share of shared meters {self.shared_share} is not between 0 and 1")

    @property
    def meter_ids(self) -> list[str]:
        """Ids of the meters, in order of their numbers."""
        return [f"MTR-{number:06d}" for number in range(1, self.meters + 1)]

    @property
    def vehicle_ids(self) -> list[str]:
        """Ids of the vehicles, in order of their numbers."""
        return [f"VEH-{number:06d}" for number in range(1, self.vehicles + 1)]


class Guest(Vehicle):
    """A vehicle that comes to a site and leaves it by its habit."""

    __slots__ = ("arrives", "drain", "habit", "last", "leaves", "shift", "site", "there")

    def __init__(self, number: int, device_id: str, rng: random.Random, site: "Site") -> None:
        """Draw the habit of vehicle `number`, from 0, which charges at `site`."""
        super().__init__(number, device_id, rng)
        self.site = site
        self.habit = rng.choices(_HABITS, _HABIT_WEIGHTS)[0]
        self.shift = max(-120, min(120, round(rng.gauss(0, 50))))  # minutes by which it is later than others
        self.last: Charger | None = None  # where it charged last
        self.there = False
        self.arrives = self.leaves = 0  # UTC minutes since 1970
        self.drain = 0.0  # percent a minute, on a trip


class Site:
    """Some chargers, and who waits for one, in order of arrival."""

    __slots__ = ("chargers", "waiting")

    def __init__(self, chargers: list[Charger]) -> None:
        self.chargers = chargers
        self.waiting: dict[int, Guest] = {}

    def charger_for(self, vehicle: Guest) -> Charger | None:
        """Return a charger with room for a vehicle; who is full makes room.

        It is the one that has waited longest, but not the same as last time: every charger, a faulty one too,
        soon meets several vehicles. Two outlets are filled first: who asks for shared meters wants to see
        them shared.
        """
        free = [charger for charger in self.chargers if len(charger.users) < charger.outlets]
        if free:
            charger = max(free, key=lambda charger: (charger.outlets, charger is not vehicle.last))
        else:
            full = (user for charger in self.chargers for user in charger.users if user.session is None)
            other = next(full, None)
            if other is None or other.charger is None:
                return None
            charger = other.charger
            unplug(other)
        self.chargers.remove(charger)
        self.chargers.append(charger)
        vehicle.last = charger
        return charger


class Fleet:
    """Chargers and vehicles, and their readings in order of time; iterating again goes on where it stopped.

    The running totals of chargers and vehicles (`drawn`, `total_ac`, `total_dc`) include the whole interval
    of the reading that came last.
    """

    def __init__(self, config: FleetConfig) -> None:
        """Build the fleet; takes about 10 µs a device."""
        self.config = config
        self._rng = rng = random.Random(config.seed)  # noqa: S311 - repeatable on purpose, nothing secret
        self.encoder = Encoder(config.meter_ids, config.vehicle_ids, config.topic_root)
        self._start_ms = (config.start - EPOCH) // timedelta(milliseconds=1)
        order = rng.sample(range(config.meters), config.meters)
        faulty = set(order[: _count_of(config.meters, config.faulty_share)])
        shared = set(order[config.meters - _count_of(config.meters, config.shared_share) :])
        self.chargers = [
            Charger(number, device_id, rng, faulty=number in faulty, shared=number in shared)
            for number, device_id in enumerate(config.meter_ids)
        ]
        sites = max(1, min(config.meters, config.vehicles) // SITE_SIZE)
        self._sites = [Site(self.chargers[number::sites]) for number in range(sites)]
        self.vehicles = [
            Guest(number, device_id, rng, self._sites[number % sites])
            for number, device_id in enumerate(config.vehicle_ids)
        ]
        self.faulty = [charger.id for charger in self.chargers if charger.faulty]
        self._sessions: list[Session] = []
        self._full: list[Guest] = []  # whose session ended in the current interval
        self._touched: dict[Site, None] = {}  # where somebody who waits may find a charger now
        self._calendar: defaultdict[int, list[Guest]] = defaultdict(list)
        self._ambient = 0.0
        self._open(self._start_ms // MINUTE_MS)
        self._timetable = self._plan()
        self._stream = self._readings()

    def __iter__(self) -> Iterator[Reading]:
        """Return the one endless stream of readings, in order of `due`."""
        return self._stream

    def _plan(self) -> list[tuple[int, int, Device]]:
        """Spread all devices evenly over the interval, in a drawn order: (phase in ms, number, device)."""
        devices: list[tuple[int, Device]] = list(enumerate([*self.chargers, *self.vehicles]))
        self._rng.shuffle(devices)
        interval_ms = self.config.interval // timedelta(milliseconds=1)
        return [(place * interval_ms // len(devices), *device) for place, device in enumerate(devices)]

    def _open(self, minute: int) -> None:
        """Put everyone where their habit has them at `minute`, and at each site somebody who charges."""
        rng = self._rng
        ambient = physics.ambient_celsius(minute)
        occupied = set()
        for vehicle in self.vehicles:
            vehicle.celsius = ambient + vehicle.climate
            vehicle.arrives, vehicle.leaves = next_stay(vehicle, minute, rng, begun=True)
            if vehicle.arrives <= minute:
                occupied.add(vehicle.site)
        for site, vehicle in zip(self._sites, self.vehicles, strict=False):  # the first vehicle of each site
            if site not in occupied:
                vehicle.arrives, vehicle.leaves = minute, minute + rng.randint(120, 300)
        for vehicle in self.vehicles:
            if vehicle.arrives <= minute:
                vehicle.soc = rng.uniform(15.0, 65.0)
                self._arrive(vehicle)
            else:
                vehicle.soc = rng.uniform(40.0, 95.0)
                self._drive(vehicle, minute)

    def _readings(self) -> Iterator[Reading]:
        """Let time pass and yield what everyone says."""
        new, cls = tuple.__new__, Reading  # half the price of calling Reading
        interval_ms = self.config.interval // timedelta(milliseconds=1)
        hours = self.config.interval / timedelta(hours=1)
        for due in count(0, interval_ms):
            ts = self._start_ms + due
            if ts % MINUTE_MS == 0:
                self._begin_minute(ts // MINUTE_MS)
            self._charge(hours)
            for phase, number, device in self._timetable:
                yield new(
                    cls,
                    (due + phase, number, ts + phase, device.energy, device.level, device.temperature, device.meter),
                )

    def _begin_minute(self, minute: int) -> None:
        """Let vehicles leave, arrive, plug in, drive and cool down."""
        for vehicle in self._calendar.pop(minute, ()):
            if vehicle.there:
                self._leave(vehicle, minute)
            else:
                self._arrive(vehicle)
        for site in self._touched:
            self._fill(site)
        self._touched.clear()
        self._sessions = [session for session in self._sessions if session.vehicle.session is session]
        self._ambient = ambient = physics.ambient_celsius(minute)
        cooling = physics.COOLING / 60
        for vehicle in self.vehicles:
            if vehicle.session is None:
                soc = vehicle.soc = vehicle.soc - vehicle.drain
                celsius = vehicle.celsius
                celsius = vehicle.celsius = celsius + (ambient + vehicle.climate - celsius) * cooling
                vehicle.level = int(soc * 100)
                vehicle.temperature = int(celsius * 10)

    def _arrive(self, vehicle: Guest) -> None:
        """Let a vehicle stand at its site until it leaves, and wait for a charger if it needs one."""
        vehicle.there = True
        vehicle.drain = 0.0
        vehicle.until = self._rng.uniform(80.0, 98.0)
        self._calendar[vehicle.leaves].append(vehicle)
        if vehicle.soc <= vehicle.until - WORTH_PLUGGING_IN:
            vehicle.site.waiting[vehicle.number] = vehicle
            self._touched[vehicle.site] = None

    def _leave(self, vehicle: Guest, minute: int) -> None:
        """Let a vehicle go, full or not, until its next stay."""
        if vehicle.charger is not None:
            unplug(vehicle)
            self._touched[vehicle.site] = None
        vehicle.site.waiting.pop(vehicle.number, None)
        vehicle.arrives, vehicle.leaves = next_stay(vehicle, minute, self._rng)
        self._drive(vehicle, minute)

    def _drive(self, vehicle: Guest, minute: int) -> None:
        """Spread what a trip takes over the minutes until the vehicle arrives."""
        vehicle.there = False
        used = min(self._rng.uniform(*vehicle.habit.use), max(0.0, vehicle.soc - EMPTY_SOC))
        vehicle.drain = min(used / (vehicle.arrives - minute), FASTEST_DRAIN)
        self._calendar[vehicle.arrives].append(vehicle)

    def _fill(self, site: Site) -> None:
        """Plug in who waits, while there is room."""
        while site.waiting:
            vehicle = next(iter(site.waiting.values()))
            charger = site.charger_for(vehicle)
            if charger is None:
                return
            del site.waiting[vehicle.number]
            self._sessions.append(Session(vehicle, charger))

    def _charge(self, hours: float) -> None:
        """Let `hours` pass for all meters and for who charges."""
        noise = self._rng.random
        if self._full:
            for vehicle in self._full:
                vehicle.energy = 0
            self._sessions = [session for session in self._sessions if session.vehicle.session is session]
        for charger in self.chargers:
            charger.energy = 0
            charger.level = int(charger.nominal + 10 * noise())
        full = charge(self._sessions, hours, self._ambient, noise)
        self._full = [self.vehicles[vehicle.number] for vehicle in full]
        for vehicle in self._full:
            self._touched[vehicle.site] = None


def next_stay(vehicle: Guest, minute: int, rng: random.Random, *, begun: bool = False) -> tuple[int, int]:
    """Draw when a vehicle arrives next and when it leaves again, in UTC minutes since 1970.

    It arrives 20 minutes after `minute` or later; with `begun` it may be there already, but stays on.
    """
    stays, shift = vehicle.habit.stays, vehicle.shift
    if not stays:
        trip, length = rng.randint(120, 360), rng.randint(45, 180)
        arrives = minute + (trip - rng.randrange(trip + length) if begun else trip)
        return arrives, arrives + length
    late, longer = round(rng.gauss(shift, 20)), round(rng.gauss(0, 20))
    today = minute - minute % DAY
    return min(
        (arrives, leaves)
        for day in (today - DAY, today, today + DAY, today + 2 * DAY)
        for arrives, leaves in (
            (day + late + round(60 * since), day + late + max(longer + round(60 * until), round(60 * since) + 30))
            for since, until in stays
        )
        if (leaves > minute if begun else arrives >= minute + 20)
    )


def _count_of(meters: int, share: float) -> int:
    """Return how many meters a share is: at least one from ten meters on, unless the share is 0."""
    wanted = round(meters * share)
    return max(wanted, 1) if share and meters >= 10 else wanted  # noqa: PLR2004


_HABITS = tuple(HABITS.values())
_HABIT_WEIGHTS = [habit.weight for habit in _HABITS]
