"""The formulas of the fleet: they have the shape that the sources tell, and stay in their bounds together."""

from itertools import pairwise

import pytest

from simulator import physics
from simulator.physics import CHARGER_KINDS, ONBOARD_CHARGERS

COLDEST = min(physics.ambient_celsius(minute) for minute in range(0, 366 * 1440, 60)) - 4.0
WARMEST = 20.0
METER = 1.0 + physics.METER_GAIN + physics.METER_NOISE


def lowest_and_highest() -> list[tuple[float, float]]:
    """The lowest and the highest efficiency of every pairing of a charger and a vehicle."""
    found = []
    for kind in CHARGER_KINDS:
        if kind.dc:
            standby = physics.standby(kind.kw, dc=True)
            battery = min(physics.BATTERY_KWH) * physics.DC_RATE[0]
            least = battery * physics.taper(physics.DC_UNTIL, physics.DC_KNEE[0], physics.DC_LEAST_SHARE)
            lowest = physics.efficiency(0.98 * least, physics.STATION_LOSS[1], standby, COLDEST)
            highest = physics.efficiency(kind.kw, physics.STATION_LOSS[0], standby, WARMEST)
            found.append((lowest, highest))
            continue
        for onboard in ONBOARD_CHARGERS:
            standby = physics.standby(onboard.kw, dc=False)
            kw = physics.ac_limit(kind, onboard)
            least = max(kw * physics.AC_LEAST_SHARE, physics.AC_LEAST_KW)
            losses = [wire + board for wire, board in zip(physics.WIRING_LOSS, physics.ONBOARD_LOSS, strict=True)]
            lowest = physics.efficiency(0.98 * least, losses[1], standby, COLDEST)
            found.append((lowest, physics.efficiency(kw, losses[0], standby, WARMEST)))
    return found


def test_no_healthy_charger_can_fall_below_85_percent_whatever_its_meter_says() -> None:
    for lowest, highest in lowest_and_highest():
        assert lowest / METER >= 0.85
        assert highest <= 0.93


def test_a_fault_is_always_clear() -> None:
    for lowest, highest in lowest_and_highest():
        assert highest * physics.FAULT_OUTPUT[1] * METER < 0.84
        assert lowest * physics.FAULT_OUTPUT[0] / METER > 0.70


def test_meters_stay_in_class_1() -> None:
    assert METER < 1.01


@pytest.mark.parametrize("celsius", [-10.0, 5.0, 25.0])
def test_efficiency_rises_with_power(celsius: float) -> None:
    steps = [physics.efficiency(kw, 0.075, 0.06, celsius) for kw in (1.84, 2.3, 3.7, 7.4, 11.0, 22.0)]
    assert all(later > earlier for earlier, later in pairwise(steps))
    assert steps[1] - steps[0] > steps[-1] - steps[-2]  # most of all at the low end


def test_efficiency_falls_in_cold_and_not_in_warmth() -> None:
    steps = [physics.efficiency(7.4, 0.075, 0.05, celsius) for celsius in (-20.0, -5.0, 5.0, 15.0, 20.0)]
    assert all(warmer > colder for colder, warmer in pairwise(steps))
    assert physics.efficiency(7.4, 0.075, 0.05, 35.0) == steps[-1]


@pytest.mark.parametrize(
    ("charger", "onboard", "kw"),
    [
        (2.3, 22.0, 2.3),  # a socket is a socket
        (7.4, 7.4, 7.36),  # 32 A on one phase
        (7.4, 11.0, 3.68),  # three phases of 16 A find one
        (11.0, 7.4, 3.68),  # one phase of 32 A finds 16 A
        (22.0, 11.0, 11.0),
        (22.0, 22.0, 22.0),
    ],
)
def test_ac_charging_is_limited_by_what_both_sides_have(charger: float, onboard: float, kw: float) -> None:
    kinds = {kind.kw: kind for kind in CHARGER_KINDS}
    boards = {board.kw: board for board in ONBOARD_CHARGERS}
    assert physics.ac_limit(kinds[charger], boards[onboard]) == pytest.approx(kw)


def test_power_is_constant_and_tapers_from_the_knee_on() -> None:
    shares = [physics.taper(soc, 80.0, 0.25) for soc in range(101)]
    assert set(shares[:81]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(shares[80:]))
    assert shares[81] > 0.9  # no step
    assert shares[100] == pytest.approx(0.25)


def test_a_battery_warms_with_the_square_of_its_load_and_cools_to_ambient() -> None:
    assert physics.warming(2.0, 15.0, 15.0) == pytest.approx(4 * physics.warming(1.0, 15.0, 15.0))
    assert physics.warming(0.0, 25.0, 15.0) < 0 < physics.warming(0.0, 5.0, 15.0)
    assert physics.warming(0.0, 15.0, 15.0) == 0
    assert physics.warming(0.0, 31.0, 15.0) < 3 * physics.warming(0.0, 29.0, 15.0)  # the pump runs


def test_a_single_phase_sags_most() -> None:
    assert physics.sag(0.1, 1) == pytest.approx(6 * physics.sag(0.1, 3))  # three times the current, there and back
    assert physics.sag(0.1, 1) * 7.36 == pytest.approx(2 * 32 * 0.1)


def test_days_and_seasons_have_their_temperatures() -> None:
    july, january = 56 * 365 * 1440 + 14 * 1440 + 195 * 1440, 56 * 365 * 1440 + 14 * 1440 + 14 * 1440
    for day in (july, january):
        hours = [physics.ambient_celsius(day + 60 * hour) for hour in range(24)]
        assert hours.index(max(hours)) == 15
        assert hours.index(min(hours)) == 3
    assert physics.ambient_celsius(july) > physics.ambient_celsius(january) + 15
