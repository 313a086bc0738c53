"""Run the simulator on its own: `python -m simulator --help`."""

import typer

from simulator.cli import simulate

typer.run(simulate)
