"""The command line starts fast, because it loads what a command needs only when that command runs."""

import inspect
import subprocess
import sys

import pytest

from bridge import cli
from bridge.check_broker import Effort
from simulator.cli import parse_duration

# What the commands take most of their start for.
HEAVY = {"asyncio", "bridge.config", "mqtt5", "numpy", "psycopg", "pydantic", "rich", "structlog", "uvicorn", "uvloop"}


@pytest.mark.parametrize("module", ["bridge.cli", "simulator.cli"])
def test_a_command_line_alone_loads_nothing_that_takes_long(module: str) -> None:
    program = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    loaded = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not HEAVY & set(loaded)


def test_a_check_makes_the_usual_effort() -> None:
    options = inspect.signature(cli.check).parameters
    assert Effort(parse_duration(options["listen"].default), options["messages"].default) == Effort()
