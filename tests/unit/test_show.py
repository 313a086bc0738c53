"""`truth`: what a ledger says must be true, against what the fleet itself has counted."""

import json
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from simulator.faults import FaultConfig, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.ledger import LedgerWriter, Outcome
from simulator.messages import TICKS_PER_KWH, Message
from simulator.show import truth

app = typer.Typer()
app.command()(truth)

METERS, VEHICLES, MINUTES = 20, 30, 240


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "fleet.ledger"


def run(ledger: Path, faults: FaultConfig, answered: int = METERS + VEHICLES) -> Fleet:
    """Let whole minutes of a fleet's life pass; in the last one only so many messages are acknowledged."""
    fleet = Fleet(FleetConfig(start=datetime(2026, 2, 10, tzinfo=UTC), meters=METERS, vehicles=VEHICLES))
    ids = {"meter_ids": fleet.config.meter_ids, "vehicle_ids": fleet.config.vehicle_ids, "topic_root": "energy/v1"}
    stream = (message for message in messages(fleet, faults) if isinstance(message, Message))
    sent = list(islice(stream, MINUTES * (METERS + VEHICLES)))
    with LedgerWriter(ledger, {**ids, "faulty": fleet.faulty}) as writer:
        writer.record(sent)
        for message in sent[: len(sent) - (METERS + VEHICLES) + answered]:
            writer.settle(message.number, Outcome.ACKNOWLEDGED)
    return fleet


def said(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def test_the_answers_are_what_the_fleet_has_counted(ledger: Path) -> None:
    fleet = run(ledger, FaultConfig())
    found = json.loads(said(ledger, "--json"))
    assert found["books"]["stored"] == found["books"]["messages"] == MINUTES * (METERS + VEHICLES)
    assert found["complete"]
    assert found["dead_letters"] == {}
    assert {one["meter"]: one["ac_kwh"] for one in found["meters"]} == {
        charger.id: charger.total_ac / TICKS_PER_KWH for charger in fleet.chargers
    }
    for vehicle, one in zip(fleet.vehicles, found["vehicles"], strict=True):
        assert one["vehicle"] == vehicle.id
        assert one["dc_kwh"] == one["matched_dc_kwh"] == vehicle.total_dc / TICKS_PER_KWH
        assert one["matched_ac_kwh"] == vehicle.total_ac / TICKS_PER_KWH
        if vehicle.total_ac:
            assert one["efficiency"] == pytest.approx(vehicle.total_dc / vehicle.total_ac, rel=1e-12)
    charged = {vehicle.id for vehicle in fleet.vehicles if vehicle.total_dc}
    assert charged <= {one["vehicle"] for one in found["sessions"]}


def test_people_get_the_books_the_reasons_and_the_faulty_chargers(ledger: Path) -> None:
    fleet = run(ledger, FaultConfig.everything())
    text = said(ledger)
    assert "messages 12,000" in text
    assert " malformed" in text
    assert "timestamp_too_old" in text
    assert f"faulty chargers   {fleet.faulty[0]}" in text
    assert "not every message was acknowledged" not in text


def test_a_ledger_after_a_kill_says_so(ledger: Path) -> None:
    run(ledger, FaultConfig(), answered=10)
    text = said(ledger)
    assert "in doubt 40" in text
    assert "not every message was acknowledged" in text


def test_what_is_no_ledger_is_one_line(tmp_path: Path) -> None:
    assert said(tmp_path / "nothing", code=1) == f"truth: there is no ledger {tmp_path / 'nothing'}\n"
