"""The options of the simulator: where they come from, which of them win, and what is wrong with the others."""

import re
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from simulator import cli, output
from simulator.connection import Broker
from simulator.faults import FaultConfig
from simulator.fleet import FleetConfig
from simulator.output import Terminal
from simulator.run import Options, Summary

EXAMPLE = Path(__file__).parents[2] / "config" / "simulator.toml"
START = datetime(2026, 2, 10, tzinfo=UTC)

app = typer.Typer(rich_markup_mode="markdown")
app.command()(cli.simulate)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What would have been run."""
    options: list[Options] = []
    monkeypatch.setattr(cli, "_run", lambda given, _output: options.append(given))
    return options


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "simulator.toml"


def invoke(*arguments: object, code: int = 0, **env: str) -> str:
    """Return what the command says, as one line."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300", **env})
    assert done.exit_code == code, done.output
    return " ".join(re.sub("[│╭╮╰╯─]", " ", done.output).split())


def test_without_options_it_is_a_small_fleet_in_real_time(ran: list[Options]) -> None:
    invoke()
    (options,) = ran
    assert (options.fleet.meters, options.fleet.vehicles, options.broker.connections) == (100, 100, 2)
    assert options.faults == FaultConfig()
    assert (options.speedup, options.rate, options.duration, options.messages) == (1.0, None, None, None)
    assert options.ledger is None
    assert datetime.now(UTC) - options.fleet.start < timedelta(minutes=2)


def test_the_command_line_goes_before_a_variable_and_that_before_the_file(ran: list[Options], file: Path) -> None:
    file.write_text("[fleet]\nmeters = 1\nvehicles = 1\nseed = 1\n[end]\nfor = '1m'")
    variables = {"WATTBRIDGE_SIMULATOR_MATTERS": "x", "WATTBRIDGE_SIMULATOR_VEHICLES": "2"}
    variables |= {"WATTBRIDGE_SIMULATOR_SEED": "2", "WATTBRIDGE_SIMULATOR_FLAT_OUT": "true"}
    invoke("--config", file, "--seed", 3, **variables)
    (options,) = ran
    assert (options.fleet.meters, options.fleet.vehicles, options.fleet.seed) == (1, 2, 3)
    assert (options.duration, options.speedup) == (60.0, None)


def test_the_file_may_be_named_by_a_variable(ran: list[Options], file: Path) -> None:
    file.write_text("[fleet]\nmeters = 7")
    invoke(WATTBRIDGE_SIMULATOR_CONFIG=str(file))
    assert ran[0].fleet.meters == 7


def test_a_pace_on_the_command_line_displaces_that_of_the_file(ran: list[Options], file: Path) -> None:
    file.write_text("[pace]\nflat_out = true")
    invoke("--config", file)
    invoke("--config", file, "--rate", 5)
    invoke("--config", file, "--speedup", 2)
    assert [(options.speedup, options.rate) for options in ran] == [(None, None), (1.0, 5.0), (2.0, None)]


def test_a_pace_in_a_variable_displaces_that_of_the_file(ran: list[Options], file: Path) -> None:
    file.write_text("[pace]\nflat_out = true")
    invoke("--config", file, WATTBRIDGE_SIMULATOR_RATE="100")
    invoke("--config", file, "--speedup", 2, WATTBRIDGE_SIMULATOR_RATE="100")
    assert [(options.speedup, options.rate) for options in ran] == [(1.0, 100.0), (2.0, None)]


def test_a_start_is_a_minute_wherever_it_is_written(ran: list[Options]) -> None:
    day = (datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%d")
    invoke("--start", f"{day}T01:00:59+01:00")
    invoke("--start", f"{day}T00:00:00+00:00:30")
    first, second = (options.fleet.start for options in ran)
    assert first.isoformat() == f"{day}T00:00:00+00:00"
    assert second == first - timedelta(minutes=1)


def test_a_file_can_say_everything(ran: list[Options], file: Path, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret of {device_id}\n")
    file.write_text(
        f"""
        [fleet]
        interval = "30s"
        start = {datetime.now(UTC) - timedelta(days=3):%Y-%m-%dT%H:%MZ}
        faulty_share = 0.5
        shared_share = 1
        [faults]
        all_faults = true
        duplicates = 0
        outages = 24
        [broker]
        host = "broker.example"
        port = 1884
        connections = "per-device"
        client_id = "x-{{device_id}}"
        username = "{{kind}}"
        password_file = "{tmp_path}/password"
        window = 5
        [pace]
        rate = 10
        [end]
        messages = 9
        [output]
        ledger = "run.ledger"
        json = true
        """.replace(f"{datetime.now(UTC) - timedelta(days=3):%H:%MZ}", "00:00:00Z")
    )
    invoke("--config", file)
    (options,) = ran
    assert (options.fleet.interval, options.fleet.faulty_share) == (timedelta(seconds=30), 0.5)
    assert (options.fleet.start.hour, options.fleet.shared_share) == (0, 1.0)
    assert (options.faults.duplicates, options.faults.outages) == (0.0, 24.0)
    assert options.faults.malformed == FaultConfig.everything().malformed > 0
    broker = options.broker
    assert (str(broker), broker.connections, broker.window) == ("broker.example:1884", None, 5)
    assert (broker.client_id, broker.username, broker.password) == ("x-{device_id}", "{kind}", "secret of {device_id}")
    assert (options.rate, options.messages, options.ledger) == (10.0, 9, Path("run.ledger"))


def test_single_faults_override_all_faults_and_stand_alone(ran: list[Options]) -> None:
    invoke("--all-faults", "--far-past", "0")
    invoke("--far-past", "0.5", "--outages", "24")
    assert ran[0].faults.far_past == 0
    assert ran[0].faults.far_future == FaultConfig.everything().far_future
    assert ran[1].faults == FaultConfig(far_past=0.5, outages=24.0)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("[fleet]\nmetres = 5", ["'metres' in [fleet]", "meters, vehicles, seed"]),
        ("[flet]\nmeters = 5", ["section [flet]", "[fleet], [faults], [broker], [pace], [end], [output]"]),
        ("meters = 5", ["'meters'", "outside of a section", "[fleet]"]),
        ("fleet = 5", ["'fleet'", "outside of a section"]),
        ("[fleet]\nmeters = 'many'", ["[fleet] meters", "'many'", "integer"]),
        ("[fleet]\nmeters = 1.5", ["[fleet] meters", "1.5", "integer"]),
        ("[fleet]\nmeters = -1", ["[fleet] meters", "-1", "0"]),
        ("[fleet]\nmeters = true", ["[fleet] meters", "True", "number or a text"]),
        ("[fleet]\nmeters = [1]", ["[fleet] meters", "[1]", "number or a text"]),
        ("[fleet]\ninterval = 'soon'", ["[fleet] interval", "'soon'", "30s"]),
        ("[faults]\nduplicates = 2", ["duplicates", "between 0", "2"]),
        ("[faults]\nall_faults = 1", ["[faults] all_faults", "= 1", "true or false"]),
        ("[broker]\nconnections = 'each'", ["[broker] connections", "'each'", "per-device"]),
        ("[broker]\npassword_file = '/nowhere'", ["[broker] password_file", "/nowhere", "does not exist"]),
        ("[pace]\nrate = 0", ["--rate", "above 0"]),
        ("[pace]\nrate = 1\nflat_out = true", ["exclude one another"]),
        ("[fleet", ["is not TOML", "end of"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(ran: list[Options], file: Path, text: str, hints: list[str]) -> None:
    file.write_text(text)
    said = invoke("--config", file, code=2)
    assert not ran
    for hint in hints:
        assert hint in said


def test_a_wrong_variable_is_named(ran: list[Options]) -> None:
    said = invoke(code=2, WATTBRIDGE_SIMULATOR_METERS="many")
    assert "WATTBRIDGE_SIMULATOR_METERS" in said
    assert not ran


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--speedup", "2", "--rate", "5"], "exclude"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
        (["--speedup", "inf"], "above 0"),
        (["--seed", "-1"], "--seed"),
        (["--topic-root", "a\nb"], "topic root"),
        (["--topic-root", "x" * 2000], "topic root"),
        (["--start", "0001-01-01T00:00+14:00"], "more than a year ago"),
        (["--password-file", "/bin/true"], "UTF-8"),
        (["--interval", "7s"], "divide a minute"),
        (["--for", "soon"], "30s"),
        (["--start", "2026-02-10"], "time zone"),
        (["--start", "2999-01-01T00:00Z"], "in the future"),
        (["--start", f"{datetime.now(UTC) - timedelta(days=366):%Y-%m-%dT%H:%MZ}"], "more than a year ago"),
        (["--meters", "0", "--vehicles", "0"], "at least one"),
        (["--tls-ca", __file__], "no certificate"),
        (["--duplicates", "2"], "duplicates"),
        (["--faulty-share", "2"], "faulty"),
        (["--connections", "0"], "per-device"),
        (["--connections", "1001"], "1000"),
        (["--connections", "per-device", "--client-id", "mine"], "{device_id}"),
        (["--connections", "per-device", "--username", "x-{device}"], "knows only"),
        (["--username", "{device_id}"], "needs --connections per-device"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_wrong_usage_exits_with_2(ran: list[Options], arguments: list[str], hint: str) -> None:
    assert hint in invoke(*arguments, code=2)
    assert not ran


def test_help_names_every_option_and_the_exit_codes() -> None:
    said = invoke("--help")
    for words in ("--ledger", "--all-faults", "--outages", "--shared-share", "per-device", "--config", "Exit codes"):
        assert words in said
    assert "wattbridge verify" in said


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(columns: int) -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= columns
    assert "…" not in re.sub("0…1|1h …", "", done.output)


def test_the_example_has_every_option_with_its_default(ran: list[Options], file: Path) -> None:
    keys = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", EXAMPLE.read_text())
    example = tomllib.loads(keys)
    options = {
        (option.rich_help_panel.lower(), option.opts[-1].removeprefix("--").replace("-", "_")): option.default
        for option in typer.main.get_command(app).params
        if getattr(option, "rich_help_panel", None)
    }
    assert {(section, key) for section, values in example.items() for key in values} == set(options)
    for (section, key), default in options.items():
        if default is not None:
            assert str(example[section][key]) == str(default), key
    assert {key: example["faults"][key] for key in FaultConfig.__slots__} == dict.fromkeys(FaultConfig.__slots__, 0.0)
    file.write_text(EXAMPLE.read_text())
    invoke("--config", file)
    assert len(ran) == 1


def summary(**others: Any) -> Summary:
    values: dict[str, Any] = {
        "published": 12, "acknowledged": 10, "resent": 0, "refused": 0, "unheard": 0, "unsent": 0, "readings": 34,
        "rate": 5.0, "elapsed_s": 2.0, "simulated_s": 60.0, "simulated_until": START, "state": "connected",
        "ledger": None, "reached": True,
    }  # fmt: skip
    return Summary(**values | others)


def options(**others: Any) -> Options:
    return Options(fleet=FleetConfig(start=START), broker=Broker(), **others)


def test_a_long_run_without_a_terminal_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal(options(messages=40)) as shown:
        shown.progress(summary())
        assert not capsys.readouterr().err
        monkeypatch.setattr(output.time, "monotonic", lambda: 1e12)
        shown.progress(summary())
    assert capsys.readouterr().err == "25%: 10 acknowledged, 5/s, fleet 02-10 00:00:00Z\n"


def test_on_a_terminal_a_bar_moves_where_the_end_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for given, bar in (({"duration": 4.0, "messages": 1000}, True), ({}, False)):
        with Terminal(options(**given)) as shown:
            shown.progress(summary())
        said = capsys.readouterr().err
        assert ("50%" in said) == bar
        assert "10 acknowledged, 5/s, fleet 02-10 00:00:00Z" in re.sub(r"\x1b\[[0-9;]*m", "", said)


def test_the_end_tells_of_readings_and_of_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(options()) as shown:
        shown.finish(summary(ledger=Path("run.ledger")))
    said = capsys.readouterr().err
    assert "12 messages published (34 readings)" in said
    assert "wattbridge verify run.ledger" in said
