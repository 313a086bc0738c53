"""Which of charger and vehicle is at fault: by constructed cases, and by what the simulator knows of its chargers."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from simulator.fleet import Fleet, FleetConfig
from simulator.messages import EPOCH, TICKS_PER_KWH
from tests.analytics.asking import connected, rows
from tests.integration.harness import ask, cloned

BEGIN = datetime(2026, 2, 10, tzinfo=UTC)
DAY = (BEGIN, BEGIN + timedelta(days=1))

# Of each vehicle at a meter its kWh AC and its efficiency. The verdict is that of the meter M.
CASES = {
    "one loses here and is fine elsewhere": ("charger", {("M", "A"): (10, 0.8), ("N", "A"): (10, 0.9)}),
    "several lose here and are fine elsewhere": (
        "charger",
        {("M", "A"): (10, 0.8), ("N", "A"): (10, 0.9), ("M", "B"): (10, 0.75), ("O", "B"): (3, 0.9)},
    ),
    "several lose here and charge nowhere else": ("charger", {("M", "A"): (10, 0.8), ("M", "B"): (10, 0.8)}),
    "one is fine at one other meter, though that of another charger spoils its sum": (
        "charger",
        {("M", "A"): (10, 0.8), ("N", "A"): (20, 0.7), ("O", "A"): (3, 0.9)},
    ),
    "one is fine at others together, each of them too little": (
        "charger",
        {("M", "A"): (10, 0.8), ("N", "A"): (1.5, 0.9), ("O", "A"): (1.5, 0.9)},
    ),
    "more are fine elsewhere and lose here than are fine here": (
        "charger",
        {
            ("M", "A"): (10, 0.8),
            ("N", "A"): (10, 0.9),
            ("M", "B"): (10, 0.8),
            ("N", "B"): (10, 0.9),
            ("M", "C"): (3, 0.86),
        },
    ),
    "somebody is fine here, and who loses here loses elsewhere": (
        "vehicle",
        {("M", "A"): (10, 0.7), ("N", "A"): (10, 0.7), ("M", "B"): (5, 0.9)},
    ),
    "two are fine here, and who loses here charges nowhere else": (
        "vehicle",
        {("M", "A"): (20, 0.6), ("M", "B"): (3, 0.9), ("M", "C"): (3, 0.9)},
    ),
    "alone here, and it loses where another is fine": (
        "vehicle",
        {("M", "A"): (10, 0.7), ("N", "A"): (10, 0.7), ("N", "B"): (50, 0.9)},
    ),
    "one vehicle, nowhere else": ("cannot tell", {("M", "A"): (10, 0.8)}),
    "one vehicle, and elsewhere too little": ("cannot tell", {("M", "A"): (10, 0.8), ("N", "A"): (1.9, 0.9)}),
    "one vehicle, and elsewhere more DC than AC": ("cannot tell", {("M", "A"): (10, 0.8), ("N", "A"): (10, 1.1)}),
    "one vehicle that loses everywhere, always alone": (
        "cannot tell",
        {("M", "A"): (10, 0.8), ("N", "A"): (10, 0.8)},
    ),
    "two vehicles and two meters, all lose": (
        "cannot tell",
        {("M", "A"): (10, 0.8), ("N", "A"): (10, 0.8), ("M", "B"): (10, 0.8), ("N", "B"): (10, 0.8)},
    ),
    "one loses here alone, another one is fine": ("cannot tell", {("M", "A"): (10, 0.7), ("M", "B"): (3, 0.9)}),
    "one that is fine elsewhere loses here, another one is fine here": (
        "cannot tell",
        {("M", "A"): (10, 0.7), ("N", "A"): (10, 0.9), ("M", "B"): (3, 0.9)},
    ),
    "each too little": ("cannot tell", {("M", "A"): (1.5, 0.8), ("M", "B"): (1.5, 0.8)}),
    "another has more DC than AC here": ("cannot tell", {("M", "A"): (10, 0.7), ("M", "B"): (2, 1.1)}),
}


def store(dsn: str, readings: list[tuple[str, str, int, float, float]]) -> None:
    """History of what is charged as (meter, vehicle, minute, kWh AC, kWh DC)."""
    for history in ("meter_history", "vehicle_history"):
        ask(dsn, f"SELECT ensure_history_partitions('{history}', ARRAY['{BEGIN.date()}'::date])")
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY meter_history FROM STDIN") as copy:
            for meter, _, minute, ac, _ in readings:
                ts = BEGIN + minute * timedelta(minutes=1)
                copy.write_row((meter, ts, ac, 230, ts, False))
        with cursor.copy("COPY vehicle_history FROM STDIN") as copy:
            for meter, vehicle, minute, _, dc in readings:
                ts = BEGIN + minute * timedelta(minutes=1)
                copy.write_row((vehicle, ts, dc, 50, 30, meter, ts, False))


@pytest.fixture(scope="module")
def told(postgres_dsn_admin: str, template: str) -> Iterator[str]:
    """The DSN of a database with all cases at once: ids begin with the number of the case."""
    with cloned(postgres_dsn_admin, template) as dsn:
        readings = []
        for case, (_, pairs) in enumerate(CASES.values()):
            for number, ((meter, vehicle), (kwh, efficiency)) in enumerate(pairs.items()):
                # Ten minutes each, one pair after the other: all of them are matched.
                readings += [
                    (f"{case:02}{meter}", f"{case:02}{vehicle}", 10 * number + minute, kwh / 10, kwh * efficiency / 10)
                    for minute in range(10)
                ]
        store(dsn, readings)
        yield dsn


@pytest.mark.parametrize("case", CASES)
def test_the_verdict(told: str, case: str) -> None:
    number, (verdict, pairs) = list(CASES).index(case), CASES[case]
    with connected(told) as connection:
        found = rows(
            connection,
            "SELECT * FROM fleet_faults(%s, %s) WHERE meter_id = %s",
            *DAY,
            f"{number:02}M",
        )
    here = {vehicle: energy for (meter, vehicle), energy in pairs.items() if meter == "M"}
    assert [row["vehicle_id"] for row in found] == [f"{number:02}{vehicle}" for vehicle in sorted(here)]
    assert {row["verdict"] for row in found} == {verdict}
    ac, dc = (sum(kwh * share for kwh, share in ((k, e if of_dc else 1) for k, e in here.values())) for of_dc in (0, 1))
    for row in found:
        vehicle = row["vehicle_id"][2:]
        kwh, efficiency = here[vehicle]
        others = [energy for (meter, who), energy in pairs.items() if meter != "M" and who == vehicle]
        away, away_dc = sum(k for k, _ in others), sum(k * e for k, e in others)
        assert row["kwh_ac"] == pytest.approx(kwh)
        assert row["kwh_dc"] == pytest.approx(kwh * efficiency)
        assert row["efficiency"] == (pytest.approx(efficiency) if efficiency <= 1 else None)
        assert row["elsewhere_kwh_ac"] == pytest.approx(away)
        meaningful = others and away_dc <= away
        assert row["elsewhere_efficiency"] == (pytest.approx(away_dc / away) if meaningful else None)
        assert row["meter_kwh_ac"] == pytest.approx(ac)
        assert row["meter_efficiency"] == pytest.approx(dc / ac)
        assert row["meter_loss_kwh"] == pytest.approx(ac - dc)


def test_most_loss_comes_first(told: str) -> None:
    with connected(told) as connection:
        found = rows(connection, "SELECT * FROM fleet_faults(%s, %s)", *DAY)
        chargers = rows(connection, "SELECT * FROM fleet_chargers(%s, %s) WHERE finding = 'inefficient'", *DAY)
    keys = [(-row["meter_loss_kwh"], row["meter_id"], row["vehicle_id"]) for row in found]
    assert keys == sorted(keys)
    assert {row["meter_id"] for row in found} == {row["meter_id"] for row in chargers}


def test_the_verdict_is_what_the_simulator_knows(postgres_dsn_admin: str, template: str) -> None:
    config = FleetConfig(start=BEGIN, meters=40, vehicles=40, seed=11, faulty_share=0.1)
    fleet = Fleet(config)
    names = [*config.meter_ids, *config.vehicle_ids]
    end = (DAY[1] - EPOCH) // timedelta(milliseconds=1)
    with cloned(postgres_dsn_admin, template) as dsn:
        for history in ("meter_history", "vehicle_history"):
            ask(dsn, f"SELECT ensure_history_partitions('{history}', ARRAY['{BEGIN.date()}'::date])")
        meters, vehicles = [], []
        for said in fleet:
            if said.ts >= end:
                break
            ts, kwh = EPOCH + timedelta(milliseconds=said.ts), said.energy / TICKS_PER_KWH
            if said.device < config.meters:
                meters.append((names[said.device], ts, kwh, 230, ts, False))
            elif said.meter:
                # Where it drives is of no concern here.
                vehicles.append((names[said.device], ts, kwh, 50, 30, names[said.meter - 1], ts, False))
        with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
            for table, lines in (("meter_history", meters), ("vehicle_history", vehicles)):
                with cursor.copy(f"COPY {table} FROM STDIN") as copy:
                    for line in lines:
                        copy.write_row(line)
        found = dict(ask(dsn, "SELECT DISTINCT meter_id, verdict FROM fleet_faults(%s, %s)", *DAY))
    # All vehicles of the simulator are healthy. Where only one has been, nobody can tell.
    assert {meter for meter, verdict in found.items() if verdict == "charger"} <= set(fleet.faulty)
    assert [meter for meter, verdict in found.items() if verdict == "vehicle"] == []
    assert len([verdict for verdict in found.values() if verdict == "charger"]) >= 2
