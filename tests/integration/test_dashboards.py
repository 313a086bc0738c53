"""The dashboards ask what can be answered: their SQL as a reader of a real database, their PromQL of a real daemon."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.integration.harness import ask, cloned
from tests.integration.test_alerts import OF_PROMETHEUS, Exposed, exposed, metrics_of, promtool, with_promtool

__all__ = ["exposed"]

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "config" / "grafana"
FILES = {path.stem: path for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
BOARDS = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
SOURCES = yaml.safe_load((GRAFANA / "provisioning/datasources/wattbridge.yml").read_text(encoding="utf-8"))
UIDS = {source["uid"]: source["type"] for source in SOURCES["datasources"]}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))

# By the names that Grafana knows them by; another one is shown as it is written.
UNITS = {
    *("none", "short", "string", "percent", "percentunit", "cps", "s", "decbytes", "bool_on_off"),
    *("kwatt", "kwatth", "celsius", "dateTimeFromNow", "dateTimeAsLocal"),
}
# What the panels show as it is: no arrays, no intervals.
SHOWN = {"bool", "int4", "int8", "float8", "numeric", "text", "timestamptz"}
LONGEST_S = 5

# 26 hours of three chargers and vehicles: one pair is fine, one loses too much, one has been silent for an hour.
FILL = """
SELECT ensure_history_partitions(history, ARRAY(
    SELECT (now() AT TIME ZONE 'UTC')::date + day FROM generate_series(-2, 1) AS day
))
FROM unnest(ARRAY['meter_history', 'vehicle_history']::regclass[]) AS history;
CREATE TEMP TABLE told AS
SELECT ts, 'MTR-' || device AS meter, 'VEH-' || device AS vehicle, 0.08 + 0.01 * (device % 2) AS kwh
FROM generate_series(date_trunc('minute', now()) - interval '26 hours', now(), '1 minute') AS ts
CROSS JOIN generate_series(1, 3) AS device
WHERE (device < 3 OR ts < now() - interval '1 hour')
    -- A gap: two sessions.
    AND (ts < now() - interval '40 minutes' OR ts > now() - interval '10 minutes');
INSERT INTO meter_history SELECT meter, ts, 0.1, 230, ts, false FROM told;
INSERT INTO vehicle_history SELECT vehicle, ts, kwh, 50, 30, meter, ts, false FROM told;
INSERT INTO meter_live SELECT meter, max(ts), 0.1, 230, max(ts) FROM told GROUP BY meter;
INSERT INTO vehicle_live SELECT vehicle, max(ts), 0.09, 50, 30, meter, max(ts) FROM told GROUP BY vehicle, meter;
INSERT INTO device_presence VALUES ('VEH-3', 'vehicle', false, now());
INSERT INTO dead_letter VALUES ('VEH-1', 'x', 'energy/v1/vehicle/VEH-1/telemetry', '{', NULL, 'malformed', 'no', now());
INSERT INTO ingest_counter VALUES ('wattbridge', 4, 2, 1, 1, 0, gen_random_uuid(), now());
"""
VEHICLE = "VEH-1"


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels of a dashboard, also those in rows that are closed."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def targets(kind: str) -> list[Any]:
    """What the panels ask data sources of a kind, as parameters of a test."""
    return [
        pytest.param(panel, target, id=f"{name}: {panel['title']}")
        for name, board in BOARDS.items()
        for panel in panels(board)
        for target in panel.get("targets", [])
        if target["datasource"]["type"] == kind
    ]


# --- the files ---------------------------------------------------------------------------------------------


def test_there_are_two_dashboards_with_names_that_stay() -> None:
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        "fleet": "wattbridge-fleet",
        "operations": "wattbridge-operations",
    }


@pytest.mark.parametrize("name", FILES)
def test_a_dashboard_is_written_as_everybody_would_write_it(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert text == json.dumps(BOARDS[name], indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_what_it_needs(name: str) -> None:
    board = BOARDS[name]
    every = list(panels(board))
    assert len({panel["id"] for panel in every}) == len(every)
    assert board["schemaVersion"] >= 39
    known = {uid for other in BOARDS.values() for uid in [other["uid"]]}
    for panel in every:
        assert panel["title"], panel["id"]
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), panel["title"]
        properties = [each for override in panel["fieldConfig"]["overrides"] for each in override["properties"]]
        units = [each["value"] for each in properties if each["id"] == "unit"]
        assert {panel["fieldConfig"]["defaults"]["unit"], *units} <= UNITS, panel["title"]
        for target in [panel, *panel["targets"]]:
            assert UIDS[target["datasource"]["uid"]] == target["datasource"]["type"], panel["title"]
        links = [link["url"] for each in properties if each["id"] == "links" for link in each["value"]]
        assert {link.split("?")[0].removeprefix("/d/") for link in links} <= known
        assert {variable for link in links for variable in re.findall(r"var-(\w+)", link)} <= variables(board)


def variables(board: dict[str, Any]) -> set[str]:
    return {variable["name"] for variable in board["templating"]["list"]}


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_beside_one_another(name: str) -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        where = panel["gridPos"]
        assert 0 <= where["x"] < where["x"] + where["w"] <= 24, panel["title"]
        return {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}

    for one, other in combinations(panels(BOARDS[name]), 2):
        assert not cells(one) & cells(other), f"{one['title']} and {other['title']}"


def test_compose_mounts_what_grafana_is_told_to_read() -> None:
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    providers = yaml.safe_load((GRAFANA / "provisioning/dashboards/wattbridge.yml").read_text(encoding="utf-8"))
    assert [provider["options"]["path"] for provider in providers["providers"]] == [
        mounts["./config/grafana/dashboards"]
    ]
    for kind in ("datasources", "dashboards"):
        assert mounts[f"./config/grafana/provisioning/{kind}"] == f"/etc/grafana/provisioning/{kind}"
    secrets = re.findall(r"\$__file\{/run/secrets/(\w+)\}", json.dumps(SOURCES))
    assert secrets
    assert set(secrets) <= set(grafana["secrets"])


# --- SQL ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(postgres_dsn_admin: str, template: str) -> Iterator[str]:
    """The DSN of a database with a day of a small fleet, rolled up as far as it is closed."""
    with cloned(postgres_dsn_admin, template) as dsn:
        ask(dsn, FILL)
        ask(dsn, "SELECT rollup_advance(now() - interval '20 minutes')")
        ask(dsn, "SELECT rollup_refresh('30 days')")
        yield dsn


def as_grafana_sends_it(text: str, **values: str) -> str:
    """SQL with macros and variables replaced; https://grafana.com/docs/grafana/latest/datasources/postgres/query-editor/."""
    until = datetime.now(UTC)
    first, last = (f"'{moment.isoformat(timespec='milliseconds')}'" for moment in (until - timedelta(hours=24), until))
    macros: dict[str, Callable[[str], str]] = {
        "__timeFrom": lambda _: first,
        "__timeTo": lambda _: last,
        "__timeFilter": lambda column: f"{column} BETWEEN {first} AND {last}",
    }
    for name, value in values.items():
        text = text.replace(f"${{{name}:sqlstring}}", f"'{value}'").replace(f"${name}", value)
    sent = re.sub(r"\$(\w+)\(([^)]*)\)", lambda macro: macros[macro[1]](macro[2].strip()), text)
    assert "$" not in sent, sent
    return sent


@pytest.mark.parametrize(("panel", "target"), targets("grafana-postgresql-datasource"))
def test_the_sql_of_a_panel_is_answered_for_a_reader(
    panel: dict[str, Any], target: dict[str, Any], filled: str
) -> None:
    with psycopg.connect(filled, options=f"-c statement_timeout={LONGEST_S}s") as connection:
        # All that the data source's login role is: a member of it.
        connection.execute("SET ROLE wattbridge_reader")
        cursor = connection.execute(as_grafana_sends_it(target["rawSql"], vehicle=VEHICLE).encode())
        rows = cursor.fetchall()
        types = {column.name: connection.adapters.types[column.type_code].name for column in cursor.description or ()}
    assert rows, "nothing to be seen"
    assert set(types.values()) <= SHOWN, types
    if target["format"] == "time_series":
        assert types.pop("time") == "timestamptz"
        assert set(types.values()) <= {"float8", "int8", "numeric"}
        times = [row[[column.name for column in cursor.description or ()].index("time")] for row in rows]
        assert times == sorted(times)
    named = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    assert named <= types.keys(), "an override for a column that is not there"


def test_the_fleet_dashboard_finds_what_is_wrong(filled: str) -> None:
    (findings,) = [panel for panel in panels(BOARDS["fleet"]) if panel["title"] == "Findings"]
    assert ask(filled, as_grafana_sends_it(findings["targets"][0]["rawSql"])) == [(1, 1, 2)]


def test_a_vehicle_is_found_by_its_first_letters(filled: str) -> None:
    (vehicle,) = BOARDS["fleet"]["templating"]["list"]
    found = ask(filled, as_grafana_sends_it(vehicle["query"], __searchFilter="VEH%").replace("%", "%%") + " -- %s", 0)
    assert found == [("VEH-1",), ("VEH-2",), ("VEH-3",)]


# --- PromQL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("panel", "target"), targets("prometheus"))
def test_the_metrics_of_a_panel_exist(panel: dict[str, Any], target: dict[str, Any], exposed: Exposed) -> None:
    asked = metrics_of(target["expr"])
    assert asked
    assert asked - exposed.series - OF_PROMETHEUS == set(), panel["title"]


def test_the_metrics_of_the_variables_exist(exposed: Exposed) -> None:
    asked = re.findall(r"label_values\((\w+), \w+\)", json.dumps(BOARDS["operations"]["templating"]))
    assert asked
    assert set(asked) <= exposed.series


@with_promtool
def test_prometheus_can_parse_what_the_panels_ask(tmp_path: Path) -> None:
    asked = [parameter.values[1]["expr"] for parameter in targets("prometheus")]
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m").replace("$instance", ".*")}
        for number, expression in enumerate(asked)
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", str(file))


def test_the_dashboards_show_every_metric_of_ours(exposed: Exposed) -> None:
    shown = {name for parameter in targets("prometheus") for name in metrics_of(parameter.values[1]["expr"])}
    shown |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    # What these say, others say better.
    apart = {
        "wattbridge_readings_received_total",
        "wattbridge_readings_taken_total",
        "wattbridge_last_commit_timestamp_seconds",
    }
    assert {name for name in exposed.families if name.startswith("wattbridge_")} - shown == apart
