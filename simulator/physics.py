"""Chargers, vehicles, and the formulas they live by: who charges how fast, what gets lost, what gets warm. Pure.

Units throughout: kW on the AC side, kWh, ticks of 0.1 Wh, % of the battery, °C, V, hours.
"""

import random
from collections.abc import Callable
from math import cos, pi
from typing import NamedTuple

from simulator.messages import TICKS_PER_KWH

PHASE_VOLTS = 230.0
DAY_MINUTES = 24 * 60


class ChargerKind(NamedTuple):
    """A kind of charger; `kw` is the most that one of its outlets draws from the grid."""

    kw: float
    phases: int
    amps: float
    """What one phase carries at most."""
    dc: bool
    ohm: float
    """Impedance of one conductor back to the transformer; thicker where more current is expected."""
    weight: float


CHARGER_KINDS = (
    ChargerKind(2.3, 1, 10, dc=False, ohm=0.30, weight=8),
    ChargerKind(7.4, 1, 32, dc=False, ohm=0.10, weight=22),
    ChargerKind(11.0, 3, 16, dc=False, ohm=0.15, weight=32),
    ChargerKind(22.0, 3, 32, dc=False, ohm=0.08, weight=22),
    ChargerKind(50.0, 3, 73, dc=True, ohm=0.030, weight=8),
    ChargerKind(100.0, 3, 145, dc=True, ohm=0.020, weight=4),
    ChargerKind(150.0, 3, 218, dc=True, ohm=0.015, weight=4),
)
"""From the domestic socket over AC posts and wall boxes to rapid chargers; the weights are a plausible mix."""


class OnboardCharger(NamedTuple):
    """The rectifier inside a vehicle, which AC charging cannot exceed."""

    kw: float
    phases: int
    amps: float
    weight: float


ONBOARD_CHARGERS = (
    OnboardCharger(3.7, 1, 16, weight=10),
    OnboardCharger(7.4, 1, 32, weight=25),
    OnboardCharger(11.0, 3, 16, weight=50),
    OnboardCharger(22.0, 3, 32, weight=15),
)

BATTERY_KWH = (40.0, 52.0, 58.0, 64.0, 77.0, 82.0, 100.0)
DC_RATE = (1.0, 1.8)
"""Power that a battery takes at most, in battery capacities an hour."""

AC_KNEE = 80.0
DC_KNEE = (55.0, 60.0)
"""State of charge from which on the power tapers."""

AC_LEAST_SHARE = 0.25
AC_LEAST_KW = 1.84
"""Where tapering ends: 8 A on one phase, as an on-board charger switches off rather than crawl."""
DC_LEAST_SHARE = 0.2
DC_UNTIL = 90.0
"""Nobody waits at a rapid charger for the last percents."""

ONBOARD_LOSS = (0.066, 0.073)
WIRING_LOSS = (0.004, 0.009)
STATION_LOSS = (0.070, 0.082)
"""Losses in proportion to the power: in the vehicle, on the way to it, and in a DC station."""

FAULT_OUTPUT = (0.83, 0.88)
"""What still arrives behind a charger with a fault, as a share of what a healthy one delivers."""

COLD_BELOW = 20.0
COLD_LOSS = 0.0004
"""Share of the power that is lost for each kelvin that the battery is colder than that."""

WARMING = 18.0
"""Kelvin an hour at one capacity an hour: 3 % of the power in a pack of 6 kJ/K for each kWh."""
COOLING = 1 / 3
PUMPED_COOLING = 3.0
PUMP_FROM = 30.0
"""Share of the distance to ambient that is lost in an hour: standing, and with the coolant pump on."""

METER_GAIN = 0.008
METER_NOISE = 0.0015
"""Errors of a meter: a fixed one and one that changes with every interval, at most; together below 1 %, the
limit of percentage error that IEC 62053-21 sets for class 1 under normal load."""


def ac_limit(kind: ChargerKind, onboard: OnboardCharger) -> float:
    """Return the power in kW at which a vehicle charges at an AC charger: the phases and amperes both have."""
    shared = min(kind.phases, onboard.phases) * min(kind.amps, onboard.amps) * PHASE_VOLTS / 1000
    return min(kind.kw, onboard.kw, shared)


def standby(kw: float, *, dc: bool) -> float:
    """Return the constant loss in kW of power electronics for `kw`: control, pumps, fans, contactors."""
    return 0.15 + 0.003 * kw if dc else 0.03 + 0.0025 * kw


def efficiency(kw: float, loss: float, constant: float, celsius: float) -> float:
    """Return DC energy over AC energy of a healthy charger that draws `kw`.

    Constant losses weigh the more the lower the power is: Apostolaki-Iosifidou, Codani and Kempton,
    "Measurement of power loss during electric vehicle charging and discharging", Energy 127 (2017) 730-742;
    Sears, Roberts and Glitman, "A comparison of electric vehicle Level 1 and Level 2 charging efficiency",
    IEEE SusTech 2014. A cold battery costs efficiency: Trentadue et al., "Evaluation of Fast
    Charging Efficiency under Extreme Temperatures", Energies 11(8), 1937 (2018). The size of each term is
    chosen, not measured: together they stay between 0.86 and 0.93.

    Args:
        kw: power from the grid, in kW.
        loss: what is lost in proportion to the power, as a share of it.
        constant: what is lost at any power, in kW.
        celsius: temperature of the battery.
    """
    healthy = 1.0 - loss - constant / kw
    return healthy if celsius >= COLD_BELOW else healthy - COLD_LOSS * (COLD_BELOW - celsius)


def taper(soc: float, knee: float, least: float) -> float:
    """Return the share of its full power that a battery takes: all up to `knee` %, `least` when it is full."""
    return 1.0 if soc <= knee else 1.0 - (1.0 - least) * (soc - knee) / (100.0 - knee)


def warming(capacities: float, celsius: float, ambient: float) -> float:
    """Return by how many kelvin an hour a battery warms that charges at `capacities` an hour.

    The heat is that of its inner resistance, with the square of the current; Newton's law of cooling.
    """
    cooling = COOLING if celsius < PUMP_FROM else PUMPED_COOLING
    return WARMING * capacities * capacities - cooling * (celsius - ambient)


def sag(ohm: float, phases: int) -> float:
    """Return by how many volts a phase sags for each kW drawn over conductors of `ohm`.

    A single phase needs a second conductor for the way back; three balanced phases carry a third each and
    nothing back.
    """
    amps = 1000 / (PHASE_VOLTS * phases)
    return amps * ohm * (2 if phases == 1 else 1)


def ambient_celsius(minute: int) -> float:
    """Return the temperature outside at a UTC minute since 1970: warmest in mid-July and at 15 o'clock."""
    day = minute / DAY_MINUTES
    return 10.0 + 9.0 * cos(2 * pi * (day - 195) / 365.2425) + 5.0 * cos(2 * pi * (day - 15 / 24))


def ticks_per_percent(battery_kwh: float) -> float:
    """Return the energy of one percent of a battery, in ticks of 0.1 Wh."""
    return battery_kwh * TICKS_PER_KWH / 100


class Device:
    """What a device would say in the current interval; fields and units as in `Reading`."""

    __slots__ = ("energy", "id", "level", "meter", "temperature")

    def __init__(self, device_id: str) -> None:
        self.id = device_id
        self.energy = self.level = self.temperature = self.meter = 0


class Charger(Device):
    """A charger and the meter before it."""

    __slots__ = (
        "alone", "drawn", "faulty", "gain", "health", "kind", "loss", "nominal", "number", "ohm", "outlets",
        "rest", "total_ac", "users",
    )  # fmt: skip

    def __init__(self, number: int, device_id: str, rng: random.Random, *, faulty: bool, shared: bool) -> None:
        """Draw the properties of the charger at meter `number`, from 0."""
        super().__init__(device_id)
        kind = rng.choices(CHARGER_KINDS, _CHARGER_WEIGHTS)[0]
        self.number = number
        self.kind = kind
        self.faulty = faulty
        self.outlets = 2 if shared else 1
        self.loss = rng.uniform(*(STATION_LOSS if kind.dc else WIRING_LOSS))
        self.health = rng.uniform(*FAULT_OUTPUT) if faulty else 1.0
        self.gain = 1.0 + rng.uniform(-METER_GAIN, METER_GAIN)
        self.ohm = kind.ohm * rng.uniform(0.7, 1.3)
        self.nominal = rng.uniform(2280.0, 2360.0)  # 0.1 V
        self.users: list[Vehicle] = []
        self.alone = False  # exactly one vehicle is plugged in
        self.rest = 0.0  # the fraction of a tick that the register has counted and not shown
        self.drawn = 0.0  # what was really drawn since the fleet began, in ticks
        self.total_ac = 0  # what the register showed of it


class Vehicle(Device):
    """A vehicle, its battery, and the truth about what it charged since the fleet began, in ticks."""

    __slots__ = (
        "battery_kwh", "celsius", "charger", "climate", "dc_kw", "knee", "loss", "number", "onboard", "rest",
        "session", "soc", "total_ac", "total_dc", "until",
    )  # fmt: skip

    def __init__(self, number: int, device_id: str, rng: random.Random) -> None:
        """Draw the properties of vehicle `number`, from 0."""
        super().__init__(device_id)
        self.number = number
        self.onboard = rng.choices(ONBOARD_CHARGERS, _ONBOARD_WEIGHTS)[0]
        self.battery_kwh = rng.choice(BATTERY_KWH)
        self.dc_kw = self.battery_kwh * rng.uniform(*DC_RATE)
        self.knee = rng.uniform(*DC_KNEE)
        self.loss = rng.uniform(*ONBOARD_LOSS)
        self.climate = rng.uniform(-4.0, 4.0)  # kelvin warmer than elsewhere
        self.celsius = 0.0
        self.soc = 0.0
        self.until = 0.0  # state of charge at which it stops charging
        self.charger: Charger | None = None
        self.session: Session | None = None  # while power flows
        self.rest = 0.0
        self.total_dc = 0
        self.total_ac = 0  # of the minutes in which it alone was plugged in at the meter


class Session:
    """A vehicle that charges at a charger, and what their meeting settles."""

    __slots__ = ("charger", "knee", "kw", "least", "loss", "peak", "per_percent", "sag", "standby", "vehicle")

    def __init__(self, vehicle: Vehicle, charger: Charger) -> None:
        """Plug the vehicle in."""
        kind, onboard = charger.kind, vehicle.onboard
        self.vehicle, self.charger = vehicle, charger
        self.per_percent = ticks_per_percent(vehicle.battery_kwh)
        if kind.dc:
            self.kw = min(kind.kw, vehicle.dc_kw)
            self.peak, self.knee, self.least = vehicle.dc_kw, vehicle.knee, DC_LEAST_SHARE
            self.loss, self.standby = charger.loss, standby(kind.kw, dc=True)
            self.sag = 10 * sag(charger.ohm, kind.phases)  # 0.1 V for each kW
            vehicle.until = min(vehicle.until, DC_UNTIL)
        else:
            self.kw = self.peak = ac_limit(kind, onboard)
            self.knee = AC_KNEE
            self.least = max(AC_LEAST_SHARE, AC_LEAST_KW / self.kw)
            self.loss, self.standby = charger.loss + vehicle.loss, standby(onboard.kw, dc=False)
            self.sag = 10 * sag(charger.ohm, min(kind.phases, onboard.phases))
        vehicle.charger, vehicle.session, vehicle.meter = charger, self, charger.number + 1
        charger.users.append(vehicle)
        charger.alone = len(charger.users) == 1


def unplug(vehicle: Vehicle) -> None:
    """Take a vehicle off its charger, if it is at one."""
    charger = vehicle.charger
    if charger is not None:
        charger.users.remove(vehicle)
        charger.alone = len(charger.users) == 1
        vehicle.charger = vehicle.session = None
        vehicle.meter = vehicle.energy = 0


def charge(sessions: list[Session], hours: float, ambient: float, noise: Callable[[], float]) -> list[Vehicle]:
    """Let `hours` pass for who charges, and return the vehicles whose session ended meanwhile.

    Args:
        sessions: who charges.
        hours: how long, up to a minute; so short that the power may be taken as constant.
        ambient: temperature outside, in °C.
        noise: draws from 0 to 1.
    """
    full = []
    ticks_per_kw = hours * TICKS_PER_KWH
    for session in sessions:
        vehicle, charger = session.vehicle, session.charger
        soc, celsius = vehicle.soc, vehicle.celsius
        kw = session.kw
        if soc > session.knee:
            kw = min(kw, session.peak * taper(soc, session.knee, session.least))
        kw *= 0.98 + 0.02 * noise()
        ac = kw * ticks_per_kw
        dc = ac * efficiency(kw, session.loss, session.standby, celsius) * charger.health
        gained = dc / session.per_percent
        if soc + gained < vehicle.until:
            vehicle.soc = soc + gained
        else:
            ac *= (vehicle.until - soc) / gained
            dc = (vehicle.until - soc) * session.per_percent
            vehicle.soc = vehicle.until
            vehicle.session = None
            full.append(vehicle)
        capacities = dc / ticks_per_kw / vehicle.battery_kwh
        vehicle.celsius = celsius = celsius + hours * warming(capacities, celsius, ambient + vehicle.climate)
        vehicle.level = int(vehicle.soc * 100)
        vehicle.temperature = int(celsius * 10)

        counted = vehicle.rest + dc
        vehicle.energy = ticks = int(counted)
        vehicle.rest = counted - ticks
        vehicle.total_dc += ticks
        counted = charger.rest + ac * charger.gain * (1.0 - METER_NOISE + 2 * METER_NOISE * noise())
        ticks = int(counted)
        charger.rest = counted - ticks
        charger.energy += ticks
        charger.drawn += ac
        charger.total_ac += ticks
        charger.level -= int(session.sag * kw)
        if charger.alone:
            vehicle.total_ac += ticks
    return full


_CHARGER_WEIGHTS = [kind.weight for kind in CHARGER_KINDS]
_ONBOARD_WEIGHTS = [onboard.weight for onboard in ONBOARD_CHARGERS]
