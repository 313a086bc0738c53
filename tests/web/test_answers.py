"""Every route against SQL asked directly."""

import csv
import io
import json
import math
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.analytics.asking import connected, rows
from tests.integration.harness import ask, one
from tests.web.serving import Web

DAY = {"since": "2026-02-10T00:00:00Z", "until": "2026-02-11T00:00:00Z"}
# What the columns of the views are called here.
NAMES = {
    "kwh_ac": "totalAcConsumedKwh",
    "kwh_dc": "totalDcDeliveredKwh",
    "efficiency": "chargingEfficiency",
    "avg_soc": "averageSoc",
    "avg_battery_temp": "averageBatteryTemp",
    "unattributed_kwh_ac": "unattributedAcKwh",
    "unattributed_kwh_dc": "unattributedDcKwh",
}
ENERGY = {"kwh_ac": "acConsumedKwh", "kwh_dc": "dcDeliveredKwh"}
READING = {"ts": "timestamp", "kwh_ac": "kwhConsumedAc", "kwh_dc": "kwhDeliveredDc"}


def answer_of(found: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A row of a view as the API has it."""

    def value(of: Any) -> Any:
        return of.isoformat().replace("+00:00", "Z") if isinstance(of, datetime) else of

    def name(column: str) -> str:
        first, *rest = column.split("_")
        return names.get(column) or first + "".join(map(str.capitalize, rest))

    return {name(column): value(of) for column, of in found.items()}


def expected(dsn: str, query: str, names: dict[str, str] = NAMES, *parameters: object) -> list[dict[str, Any]]:
    with connected(dsn) as connection:
        return [answer_of(row, names) for row in rows(connection, query, *parameters)]


def test_the_worked_example(web: Web) -> None:
    answer = web.get(f"/v1/analytics/performance/V1?{urlencode(DAY)}")
    near = {
        "totalAcConsumedKwh": 2.7202,
        "totalDcDeliveredKwh": 2.4508,
        "chargingEfficiency": 0.900963164473201,
        "lossKwh": 0.2694,
        "unattributedDcKwh": 0,
        "averageSoc": 22.282,
        "averageBatteryTemp": 30.3,
    }
    assert {name: answer[name] for name in near} == pytest.approx(near, abs=1e-9)
    rest = {name: value for name, value in answer.items() if name not in near}
    assert rest == DAY | {
        "vehicleId": "V1",
        "timeWindowHours": 24,
        "reason": None,
        "lastSoc": 24.08,
        "maxBatteryTemp": 30.5,
        "matchedMinutes": 5,
        "readings": 5,
        "meters": ["M1"],
    }
    missing = web.ask(f"/v1/analytics/performance/V3?{urlencode(DAY)}")
    assert missing.status == 404
    said = "No charging data found between 2026-02-10T00:00:00Z and 2026-02-11T00:00:00Z"
    assert missing.json()["message"] == said


@pytest.mark.parametrize("vehicle", ["VEH-00", "VEH-03", "VEH-04", "-1"])
def test_the_last_hours_of_a_vehicle(web: Web, fleet: str, vehicle: str) -> None:
    answer = web.get(f"/v1/analytics/performance/{vehicle}?hours=6.5")
    since = datetime.fromisoformat(answer["since"])
    assert (datetime.now(UTC) - since).total_seconds() == pytest.approx(6.5 * 3600, abs=10)
    (row,) = expected(fleet, "SELECT * FROM vehicle_performance(%s, %s)", NAMES, vehicle, since)
    assert answer == row | {"timeWindowHours": 6.5, "since": answer["since"], "until": None}
    assert web.get(f"/v1/analytics/performance/{vehicle}")["timeWindowHours"] == 24


def test_a_vehicle_without_readings_in_its_hours_is_not_found(web: Web) -> None:
    for query, said in {
        "": "in last 24 hours",
        "?hours=1": "in last 1 hours",
        "?hours=1.5": "in last 1.5 hours",
        "?since=2100-01-01T00:00:00%2B01:00": "since 2099-12-31T23:00:00Z",
    }.items():
        answer = web.ask(f"/v1/analytics/performance/V1{query}")
        assert answer.status == 404
        assert answer.json()["message"] == f"No charging data found {said}"


def test_the_fleet(web: Web, fleet: str) -> None:
    (row,) = expected(fleet, "SELECT * FROM fleet_summary_24h")
    assert web.get("/v1/analytics/fleet") == row | {"timeWindowHours": 24}
    assert row["vehiclesReporting"] == 16
    answer = web.get("/v1/analytics/fleet?hours=48")
    assert (answer["until"], answer["timeWindowHours"]) == (row["until"], 48)
    answer = web.get(f"/v1/analytics/fleet?{urlencode(DAY)}")
    assert (answer["metersReporting"], answer["vehiclesReporting"]) == (1, 2)
    assert answer["totalAcConsumedKwh"] == pytest.approx(5.5777)
    assert answer["chargingEfficiency"] == pytest.approx(5.0002 / 5.5777)


def test_inefficient_vehicles_worst_first(web: Web, fleet: str) -> None:
    rows = expected(fleet, "SELECT * FROM fleet_inefficient")
    assert web.get("/v1/analytics/fleet/inefficient") == {"items": rows, "next": None}
    assert [row["vehicleId"] for row in rows] == ["VEH-03", "VEH-22", "VEH-08", "VEH-01", "VEH-02", "VEH-04", "VEH-09"]


def test_chargers(web: Web, fleet: str) -> None:
    rows = expected(fleet, "SELECT * FROM charger_performance_24h ORDER BY meter_id")
    assert web.get("/v1/analytics/chargers")["items"] == rows
    assert len(rows) == 14
    for finding in ("inefficient", "mapping or metering fault"):
        found = web.get(f"/v1/analytics/chargers?{urlencode({'finding': finding})}")["items"]
        assert found == [row for row in rows if row["finding"] == finding] != []
    (charger,) = web.get(f"/v1/analytics/chargers?{urlencode(DAY)}")["items"]
    assert (charger["meterId"], charger["vehicles"]) == ("M1", ["V1", "V2"])


def test_sessions(web: Web, fleet: str) -> None:
    query = "SELECT * FROM charging_sessions(NULL, now() - interval '24 hours') ORDER BY vehicle_id, started"
    rows = expected(fleet, query, NAMES | ENERGY)
    assert web.get("/v1/analytics/sessions")["items"] == rows
    of_first = [row for row in rows if row["vehicleId"] == "VEH-00"]
    assert len(of_first) == 2
    assert web.get("/v1/analytics/sessions?vehicle=VEH-00")["items"] == of_first
    assert web.get("/v1/analytics/sessions?meter=MTR-00&hours=24")["items"] == of_first
    assert web.get("/v1/analytics/sessions?vehicle=VEH-00&meter=MTR-01")["items"] == []
    assert len(web.get(f"/v1/analytics/sessions?{urlencode(DAY)}")["items"]) == 2


@pytest.mark.parametrize("resolution", ["quarter_hour", "hour", "day"])
@pytest.mark.parametrize("device", [{}, {"meter": "M1"}, {"vehicle": "V1"}, {"meter": "M1", "vehicle": "V2"}])
def test_energy(web: Web, fleet: str, resolution: str, device: dict[str, str]) -> None:
    arguments = "".join(f", {kind} => '{name}'" for kind, name in device.items())
    query = f"SELECT * FROM energy_by_{resolution}('{DAY['since']}', '{DAY['until']}'{arguments})"
    rows = [{"day": None} | row for row in expected(fleet, query, NAMES | ENERGY)]
    for row in rows:
        row["day"] = row["day"] and str(row["day"])
    answer = web.get(f"/v1/analytics/energy?{urlencode(DAY | device | {'resolution': resolution})}")
    assert answer == {"items": rows, "next": None}
    assert rows


@pytest.mark.parametrize("kind", ["vehicle", "meter"])
def test_status(web: Web, fleet: str, kind: str) -> None:
    rows = expected(fleet, f"SELECT * FROM {kind}_status ORDER BY {kind}_id", READING)
    for row in rows:
        del row["age"]
    path = f"/v1/status/{kind}"
    assert web.get(path) == {"items": rows, "next": None}
    assert len(rows) > 12
    for row in rows:
        assert web.get(f"{path}/{row[f'{kind}Id']}") == row
    for name in ("online", "charging"):
        for wanted in (True, False):
            found = web.get(f"{path}?{name}={str(wanted).lower()}")["items"]
            assert found == [row for row in rows if row[name] is wanted]
    silent = {name for (name,) in ask(fleet, "SELECT device_id FROM device_silent WHERE kind = %s", kind)}
    assert silent
    for wanted in (True, False):
        found = web.get(f"{path}?silent={wanted}")["items"]
        assert found == [row for row in rows if (row[f"{kind}Id"] in silent) is wanted]
    answer = web.ask(f"{path}/nobody")
    assert answer.status == 404
    assert answer.json()["message"] == f"there has been no reading of a {kind} nobody"


def test_silent_devices(web: Web, fleet: str) -> None:
    rows = expected(fleet, "SELECT * FROM device_silent ORDER BY received_at, kind, device_id", READING)
    for row in rows:
        del row["silence"]
    assert [row["deviceId"] for row in rows if row["deviceId"] in {"VEH-03", "MTR-04"}] in (
        ["VEH-03", "MTR-04"],
        ["MTR-04", "VEH-03"],
    )
    assert web.get("/v1/status/silent")["items"] == rows
    meters = [row for row in rows if row["kind"] == "meter"]
    assert web.get("/v1/status/silent?kind=meter")["items"] == meters != []


def test_ingest_and_dead_letters(web: Web, fleet: str) -> None:
    assert web.get("/v1/ingest")["items"] == expected(fleet, "SELECT * FROM ingest_status")
    items = web.get("/v1/dead-letters")["items"]
    assert items == expected(fleet, "SELECT * FROM dead_letter_summary")
    assert sum(item["letters"] for item in items) == one(fleet, "SELECT count(*) FROM dead_letter") == 3


def csv_of(items: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What JSON says, as text in cells."""

    def cell(value: Any) -> str:
        match value:
            case None:
                return ""
            case list():
                return " ".join(value)
            case str():
                return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
            case float():
                return repr(value)
        return str(value).lower()

    return [{name: cell(value) for name, value in item.items()} for item in items]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/analytics/fleet/inefficient",
        "/v1/analytics/chargers",
        "/v1/analytics/sessions",
        "/v1/analytics/energy?resolution=day",
        "/v1/status/vehicle",
        "/v1/status/meter",
        "/v1/status/silent",
        "/v1/ingest",
        "/v1/dead-letters",
    ],
)
def test_csv_says_what_json_says(web: Web, path: str) -> None:
    answer = web.ask(path, headers={"Accept": "text/csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    text = answer.body.decode()
    assert text.endswith("\r\n")
    found = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert found == csv_of(web.get(path)["items"]) != []
    # And with a header where there is nothing else.
    if "status/" in path:
        empty = web.ask(f"{path}?after=~~~~" if "silent" not in path else f"{path}?after=2100-01-01T00:00:00Z~meter~M")
        assert empty.json() == {"items": [], "next": None}


def test_csv_of_nothing_has_its_header(web: Web) -> None:
    answer = web.ask("/v1/analytics/sessions?hours=1", headers={"Accept": "text/csv"})
    assert answer.body.startswith(b"vehicleId,meterId,started,ended,")
    assert answer.body.count(b"\r\n") == 1


def test_a_spreadsheet_finds_no_formula(web: Web) -> None:
    answer = web.ask("/v1/status/vehicle", headers={"Accept": "text/csv"})
    cells = {row[0] for row in csv.reader(io.StringIO(answer.body.decode(), newline=""))}
    assert "'-1" in cells
    assert "-1" not in cells
    assert web.get("/v1/status/vehicle/-1")["vehicleId"] == "-1"
    single = web.ask("/v1/status/vehicle/-1", headers={"Accept": "text/csv"})
    assert single.body.splitlines()[1].startswith(b"'-1,")


def test_numbers_are_those_of_the_database_to_the_last_digit(web: Web, fleet: str) -> None:
    text = web.ask(f"/v1/analytics/performance/V2?{urlencode(DAY)}").body.decode()
    query = "SELECT efficiency FROM vehicle_performance('V2', %s, %s)"
    assert f'"chargingEfficiency":{one(fleet, query, *DAY.values())!r},' in text
    assert all(math.isfinite(value) for value in json.loads(text).values() if isinstance(value, float))
