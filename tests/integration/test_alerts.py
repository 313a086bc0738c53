"""Prometheus gets a configuration it understands, alerts that fire when they should, and a runbook that is true."""

import http.client
import re
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from bridge.cli import app
from bridge.config import Config, _keys
from bridge.errors import Reason
from bridge.services import free_port
from tests.integration.conftest import Broker
from tests.integration.harness import Daemon, Publisher, cloned, meter, now, wait_until

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "config" / "prometheus"
RUNBOOK = "docs/operations.md"
DOCUMENT = (ROOT / RUNBOOK).read_text(encoding="utf-8")
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
TRIED = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))

PROMTOOL = shutil.which("promtool")
with_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="ALERTS ARE NOT TRIED: there is no promtool here (Debian: apt-get install prometheus)"
)

# What Prometheus itself adds to what a target says.
OF_PROMETHEUS = {"up", "ALERTS"}
SUFFIXES = {"crt", "db", "env", "key", "service", "toml", "yml"}
OPERATORS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


class Exposed(NamedTuple):
    """What /metrics has: families with their types, named as in queries, and all names of series."""

    families: dict[str, str]
    series: set[str]


@pytest.fixture(scope="module")
def exposed(
    postgres_dsn_admin: str, template: str, broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Exposed:
    """The metrics of a daemon that has committed a reading and made rollups: nothing is left out any more."""
    port, root = free_port(), f"test/{uuid.uuid4().hex}"
    settings = {"health__listen": f"127.0.0.1:{port}", "maintenance__every_s": 0.2}
    with (
        cloned(postgres_dsn_admin, template) as dsn,
        Daemon(dsn, broker, root, tmp_path_factory.mktemp("metrics"), **settings),
        Publisher(broker, root) as devices,
    ):
        devices.send("meter", "MTR-1", meter("MTR-1", now()))
        devices.flush()
        wait_until(lambda: b"wattbridge_rollups_complete_until" in page(port), "the daemon knows of its rollups")
        text = page(port).decode()
    families = list(text_string_to_metric_families(text))
    return Exposed(
        {f"{family.name}{'_total' if family.type == 'counter' else ''}": family.type for family in families},
        {sample.name for family in families for sample in family.samples},
    )


def page(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()
    finally:
        connection.close()


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in a PromQL expression: what is neither a label, a function, an operator nor a time."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\b\s*(\([^)]*\))?", "", bare)
    names = re.findall(r"(?<![\w.])([A-Za-z_:][\w:]*)\b(?!\s*\()", bare)
    return {name for name in names if name.lower() not in OPERATORS}


def test_metrics_are_found_in_expressions() -> None:
    expression = (
        'sum by (job, le) (rate(a_bucket{job="no", x=~"$no"}[10m])) / ignoring (no) b:c > 1e3 unless on (no) d == 0'
    )
    assert metrics_of(expression) == {"a_bucket", "b:c", "d"}
    assert metrics_of("x * on (no, no) group_left y offset 5m or time() - 2.5 * z") == {"x", "y", "z"}


def promtool(*arguments: str) -> None:
    assert PROMTOOL
    done = subprocess.run([PROMTOOL, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the alerts --------------------------------------------------------------------------------------------


@with_promtool
def test_prometheus_understands_its_configuration() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", "alerts.yml")


@with_promtool
def test_the_alerts_fire_when_they_should_and_not_else() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tried() -> None:
    said = {
        alert
        for case in TRIED["tests"]
        for look in case.get("promql_expr_test", [])
        for sample in look["exp_samples"]
        for alert in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    said |= {look["alertname"] for case in TRIED["tests"] for look in case.get("alert_rule_test", [])}
    assert said == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_is_wrong_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"{RUNBOOK}#{alert.lower()}"
    assert re.search(rf"^#+ {alert}$", DOCUMENT, re.MULTILINE)


def test_the_runbook_has_no_chapter_without_an_alert() -> None:
    assert set(re.findall(r"^#+ (Wattbridge[A-Z]\w+)$", DOCUMENT, re.MULTILINE)) == set(ALERTS)


def test_alerts_ask_for_metrics_that_exist(exposed: Exposed) -> None:
    asked = {name for rule in ALERTS.values() for name in metrics_of(rule["expr"])}
    assert asked - exposed.series - OF_PROMETHEUS == set()
    assert len(asked) > 20


def test_the_cases_are_of_metrics_that_exist(exposed: Exposed) -> None:
    told = {re.split(r"[{]", series["series"])[0] for case in TRIED["tests"] for series in case["input_series"]}
    assert told - exposed.series - OF_PROMETHEUS == set()


# --- the document ------------------------------------------------------------------------------------------


def test_the_table_of_metrics_is_that_of_the_daemon(exposed: Exposed) -> None:
    rows = re.findall(r"^\| `([a-z_]+)(?:\{[a-z_, ]+\})?` \| (\w+) \|", DOCUMENT, re.MULTILINE)
    assert dict(rows) == exposed.families
    assert len(rows) == len(exposed.families), "one is there twice"


def test_the_commands_of_the_document_exist() -> None:
    said = {
        command.strip() for command in re.findall(r"(?<!-[ui] )\bwattbridge((?: [a-z][a-z-]+){1,2})", "\n".join(code()))
    }
    assert said
    assert {command for command in said if not is_command(command.split())} == set()


def is_command(words: list[str]) -> bool:
    found: Any = get_command(app)
    for word in words:
        commands = getattr(found, "commands", None)
        if commands is None:
            return True  # an argument of the command
        if word not in commands:
            return False
        found = commands[word]
    return True


def test_what_the_document_names_with_a_dot_is_a_key_or_an_event() -> None:
    said = {
        span for span in code() if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span) and span.split(".")[-1] not in SUFFIXES
    }
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bridge").glob("*.py"))
    events = set(re.findall(r'"([a-z]+\.[a-z_]+)"', source))
    assert said - events - set(_keys(Config)) == set()
    assert said & events


def test_the_reasons_of_dead_letters_that_the_document_names_exist() -> None:
    said = re.findall(r"--reason ([a-z_]+)", DOCUMENT)
    assert set(said) <= {reason.value for reason in Reason}
    assert said


def code() -> list[str]:
    """What stands as code in the document: spans, and the lines of blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", DOCUMENT, flags=re.MULTILINE | re.DOTALL))
    return [*spans, *(line for block in blocks for line in block.splitlines())]
