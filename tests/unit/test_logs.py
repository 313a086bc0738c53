"""Logs: for machines where nobody looks, for people on a terminal, and never with a secret."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from bridge import logs

SECRET = "correct-horse-battery"
SAY = """
import structlog
from bridge import logs
logs.configure("info", "auto")
structlog.get_logger().info("bridge.started", version="1")
"""


@pytest.fixture(autouse=True)
def fresh_structlog() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize("style", ["auto", "json"])
def test_without_a_terminal_an_event_is_one_line_of_json_on_standard_error(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", style)
    structlog.get_logger().info("batch.committed", rows=5, text="zwei\nZeilen")
    (line,) = lines_of(capsys)
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "batch.committed", "level": "info", "rows": 5, "text": "zwei\nZeilen"}


def test_the_console_style_is_for_people_even_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "console")
    structlog.get_logger().info("batch.committed", rows=5)
    (line,) = lines_of(capsys)
    assert "batch.committed" in line
    assert not line.startswith("{")


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_only_events_of_the_level_and_above_are_said(
    level: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "json")
    log = structlog.get_logger()
    for severity in ("debug", "info", "warning", "error"):
        getattr(log, severity)("event")
    assert [json.loads(line)["level"] for line in lines_of(capsys)] == said


def test_what_json_does_not_know_does_not_break_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    structlog.get_logger().info("event", payload=b"\xff", group={1}, error=ValueError("x"))
    (line,) = lines_of(capsys)
    assert json.loads(line)["event"] == "event"


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_in_the_log_does_not_show_the_values_of_variables(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(conninfo: str) -> None:
        raise OSError(f"cannot connect, {len(conninfo)} characters")

    logs.configure("info", style)
    try:
        connect(SECRET)
    except OSError:
        structlog.get_logger().exception("database.failed")
    said = "\n".join(lines_of(capsys))
    assert "cannot connect" in said
    assert SECRET not in said


def test_on_a_terminal_events_are_for_people_and_else_they_are_json() -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", SAY], stderr=theirs, check=True, timeout=30)
        on_terminal = os.read(ours, 4096).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    elsewhere = subprocess.run([sys.executable, "-c", SAY], capture_output=True, check=True, timeout=30, text=True)
    assert "bridge.started" in on_terminal
    assert not on_terminal.startswith("{")
    assert json.loads(elsewhere.stderr)["event"] == "bridge.started"
