"""What the devices of a fleet measure, minute by minute; pure and without I/O.

Every reading interval each meter and each vehicle publishes one reading. A meter is the AC side of one
charger; vehicle number i always charges at meter number i modulo the number of meters, one vehicle after
the other. Whoever is plugged in changes only at the start of a minute, and all readings of a minute carry
a timestamp inside it, so DC / AC over matched minutes is the efficiency of the charger.

The same configuration gives the same messages, byte for byte.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import inf
from typing import NamedTuple

MINUTE = timedelta(minutes=1)

CHARGER_KW = (7.4, 11.0, 22.0, 50.0)
"""Rated AC power of a charger: one phase 32 A, three phases 16 A and 32 A, and a small fast charger."""

BATTERY_KWH = (40.0, 52.0, 58.0, 64.0, 77.0, 82.0, 100.0)

HEALTHY_EFFICIENCY = (0.87, 0.93)
FAULTY_EFFICIENCY = (0.75, 0.83)

TAPER_FROM_SOC = 80.0
TAPER_FLOOR = 0.15
"""Share of the rated power that is left at 100 % state of charge."""

EMPTY_SOC = 3.0
"""Where a vehicle that finds no charger stops driving."""

TICKS_PER_KWH = 10_000
"""Energy is published in steps of 0.1 Wh, four decimals of a kWh, as differences of a running register."""


class Message(NamedTuple):
    """One message; `due` is when it is published, in simulated seconds since the start of the fleet."""

    due: float
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What makes a fleet. `start` is the beginning of a minute, with a time zone.

    The interval divides a minute evenly, so that the readings of a meter and of the vehicle that charges
    there always meet in the same minute. Raises ValueError, with a sentence for people, on anything else.
    """

    start: datetime
    meters: int = 100
    vehicles: int = 100
    seed: int = 1
    interval: timedelta = MINUTE
    topic_root: str = "energy/v1"
    faulty_share: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        if self.meters < 0 or self.vehicles < 0 or self.meters + self.vehicles == 0:
            raise ValueError("a fleet needs at least one meter or vehicle, and no negative numbers of them")
        if self.start.tzinfo is None:
            raise ValueError(f"the start {self.start.isoformat()} needs a time zone, for example a Z at the end")
        if self.start.second or self.start.microsecond:
            raise ValueError(f"the start {self.start.isoformat()} is not the beginning of a minute")
        if self.interval < timedelta(seconds=1) or MINUTE % self.interval:
            raise ValueError(
                f"an interval of {self.interval.total_seconds():g} s does not divide a minute (60, 30, 20 …)"
            )
        if not self.topic_root.strip("/") or set(self.topic_root) & set("+#\0"):
            raise ValueError(f"the topic root {self.topic_root!r} must be a topic without wildcards")
        if not 0 <= self.faulty_share <= 1:
            raise ValueError(f"the share of faulty chargers {self.faulty_share} is not between 0 and 1")


class Charger:
    """A charger and the meter before it; changes once an interval."""

    __slots__ = (
        "ac",
        "ac_register",
        "efficiency",
        "faulty",
        "id",
        "nominal_voltage",
        "rated_kw",
        "vehicle",
        "voltage",
    )

    def __init__(self, number: int, rng: random.Random, *, faulty: bool) -> None:
        """Draw the properties of charger `number` (from 1)."""
        self.id = f"MTR-{number:06d}"
        self.faulty = faulty
        self.rated_kw = rng.choice(CHARGER_KW)
        self.efficiency = rng.uniform(*(FAULTY_EFFICIENCY if faulty else HEALTHY_EFFICIENCY))
        self.nominal_voltage = self.voltage = rng.uniform(228.0, 236.0)
        self.vehicle: Vehicle | None = None
        self.ac_register = 0.0  # ticks, exact
        self.ac = 0  # ticks published in this interval


class Vehicle:
    """A vehicle, its battery, and the truth about what it charged since the fleet began."""

    __slots__ = (
        "ambient",
        "battery_kwh",
        "battery_temp",
        "charger",
        "dc",
        "dc_register",
        "id",
        "plug",
        "returns_at_soc",
        "soc",
        "soc_loss_per_hour",
        "total_ac",
        "total_dc",
        "unplugs_at_soc",
    )

    def __init__(self, number: int, rng: random.Random, charger: Charger | None) -> None:
        """Draw the properties of vehicle `number` (from 1), which charges at `charger`, if there is any."""
        self.id = f"VEH-{number:06d}"
        self.charger = charger
        self.battery_kwh = rng.choice(BATTERY_KWH)
        self.soc = rng.uniform(10.0, 95.0)
        self.soc_loss_per_hour = rng.uniform(2.0, 8.0)
        self.returns_at_soc = rng.uniform(20.0, 55.0)
        self.unplugs_at_soc = rng.uniform(80.0, 98.0)
        self.ambient = self.battery_temp = rng.uniform(12.0, 26.0)
        self.plug = b""  # what its payload says about where it is plugged in
        self.dc_register = 0.0  # ticks, exact
        self.dc = 0  # ticks published in this interval
        self.total_ac = 0
        self.total_dc = 0

    @property
    def plugged_in(self) -> bool:
        """Whether the vehicle charges in the current interval."""
        return bool(self.plug)

    @property
    def ac_kwh(self) -> float:
        """Energy that the meter counted while this vehicle charged, as published, current interval too."""
        return self.total_ac / TICKS_PER_KWH

    @property
    def dc_kwh(self) -> float:
        """Energy that reached the battery, as published, current interval too."""
        return self.total_dc / TICKS_PER_KWH


class Fleet:
    """Chargers and vehicles, and their messages in time order (iterate once; it never ends)."""

    def __init__(self, config: FleetConfig) -> None:
        """Build the fleet; takes about 10 µs a device."""
        self.config = config
        self._rng = rng = random.Random(config.seed)  # noqa: S311 - repeatable on purpose, nothing secret
        faulty = set(rng.sample(range(config.meters), _faulty_count(config)))
        self.chargers = [Charger(i + 1, rng, faulty=i in faulty) for i in range(config.meters)]
        self.vehicles = [
            Vehicle(i + 1, rng, self.chargers[i % config.meters] if config.meters else None)
            for i in range(config.vehicles)
        ]
        self._candidates = [self.vehicles[i :: config.meters] for i in range(config.meters)]
        self._timetable = self._plan()

    def __iter__(self) -> Iterator[Message]:
        """Yield every message in the order of `due`."""
        interval = self.config.interval
        start = self.config.start.astimezone(UTC)
        slot = 0
        while True:
            begin = start + slot * interval
            if begin.second == 0:
                self._change_vehicles()
            self._charge(interval.total_seconds() / 3600)
            yield from self._messages(slot * interval.total_seconds(), begin)
            slot += 1

    def _plan(self) -> list[tuple[float, int, bytes, str, bytes, Charger | Vehicle]]:
        """Spread all devices evenly over the interval, in a drawn order.

        Returns rows of (phase in seconds, whole seconds of it, milliseconds as text, topic, start of the
        payload, device) in time order.
        """
        devices: list[Charger | Vehicle] = [*self.chargers, *self.vehicles]
        self._rng.shuffle(devices)
        interval_ms = self.config.interval // timedelta(milliseconds=1)
        root = self.config.topic_root.strip("/")
        rows = []
        for place, device in enumerate(devices):
            seconds, millis = divmod(place * interval_ms // len(devices), 1000)
            kind = "meter" if isinstance(device, Charger) else "vehicle"
            topic = f"{root}/{kind}/{device.id}/telemetry"
            opening = b'{"%bId": "%b", ' % (kind.encode(), device.id.encode())
            rows.append((seconds + millis / 1000, seconds, b"%03d" % millis, topic, opening, device))
        return rows

    def _change_vehicles(self) -> None:
        """Unplug who is full, then plug in the emptiest vehicle that wants to charge."""
        rng = self._rng
        for charger, candidates in zip(self.chargers, self._candidates, strict=True):
            vehicle = charger.vehicle
            if vehicle is not None and vehicle.soc >= vehicle.unplugs_at_soc:
                vehicle.plug = b""
                vehicle.returns_at_soc = rng.uniform(20.0, 55.0)
                vehicle.unplugs_at_soc = rng.uniform(80.0, 98.0)
                charger.vehicle = None
            if charger.vehicle is None:
                best, best_soc = None, inf
                for candidate in candidates:
                    if candidate.soc <= candidate.returns_at_soc and candidate.soc < best_soc:
                        best, best_soc = candidate, candidate.soc
                if best is not None:
                    charger.vehicle = best
                    best.plug = b', "meterId": "%b"' % charger.id.encode()

    def _charge(self, hours: float) -> None:
        """Let `hours` of simulated time pass for everyone."""
        noise = self._rng.random
        cooling = min(1.0, 2.0 * hours)
        for vehicle in self.vehicles:
            vehicle.dc = 0
            if not vehicle.plug:
                vehicle.soc = max(EMPTY_SOC, vehicle.soc - vehicle.soc_loss_per_hour * hours)
                vehicle.battery_temp += (vehicle.ambient - vehicle.battery_temp) * cooling
        for charger in self.chargers:
            charger.ac = 0
            busy = charger.vehicle
            if busy is None:
                charger.voltage = charger.nominal_voltage + noise() - 0.5
                continue
            load = _load(busy.soc) * (0.98 + 0.02 * noise())
            ac = charger.rated_kw * load * hours * TICKS_PER_KWH
            dc = ac * charger.efficiency * (0.996 + 0.008 * noise())
            charger.ac = _count(charger.ac_register, ac)
            charger.ac_register += ac
            charger.voltage = charger.nominal_voltage - 4.0 * load + noise() - 0.5
            busy.dc = _count(busy.dc_register, dc)
            busy.dc_register += dc
            busy.soc = min(100.0, busy.soc + 100.0 * dc / TICKS_PER_KWH / busy.battery_kwh)
            # Charging at one battery capacity an hour settles about 18 K above ambient.
            warm = busy.ambient + 18.0 * charger.rated_kw * load / busy.battery_kwh
            busy.battery_temp += (warm - busy.battery_temp) * cooling
            busy.total_ac += charger.ac
            busy.total_dc += busy.dc

    def _messages(self, elapsed: float, begin: datetime) -> Iterator[Message]:
        """Write the readings of the interval that begins at `begin`, `elapsed` seconds after the start."""
        minute = begin.strftime("%Y-%m-%dT%H:%M:").encode()
        offset = begin.second
        new, cls = tuple.__new__, Message  # half the price of calling Message
        for phase, seconds, millis, topic, opening, device in self._timetable:
            at = b"%b%02d.%bZ" % (minute, offset + seconds, millis)
            if isinstance(device, Charger):
                payload = b'%b"kwhConsumedAc": %.4f, "voltage": %.1f, "timestamp": "%b"}' % (
                    opening,
                    device.ac / TICKS_PER_KWH,
                    device.voltage,
                    at,
                )
            else:
                payload = b'%b"soc": %.2f, "kwhDeliveredDc": %.4f, "batteryTemp": %.1f, "timestamp": "%b"%b}' % (
                    opening,
                    device.soc,
                    device.dc / TICKS_PER_KWH,
                    device.battery_temp,
                    at,
                    device.plug,
                )
            yield new(cls, (elapsed + phase, topic, payload))


def _faulty_count(config: FleetConfig) -> int:
    """Return how many chargers are faulty: the share, and one at least from ten chargers on."""
    wanted = round(config.meters * config.faulty_share)
    return max(wanted, 1) if config.faulty_share and config.meters >= 10 else wanted  # noqa: PLR2004


def _load(soc: float) -> float:
    """Return the share of the rated power that a battery takes: all of it, then a line down from 80 % on."""
    if soc <= TAPER_FROM_SOC:
        return 1.0
    return 1.0 - (1.0 - TAPER_FLOOR) * (soc - TAPER_FROM_SOC) / (100.0 - TAPER_FROM_SOC)


def _count(register: float, energy: float) -> int:
    """Return the whole ticks by which a register moves when `energy` is added; no fraction gets lost."""
    return int(register + energy) - int(register)
