"""Run the simulator on its own: `python -m simulator --help`."""

import typer

from simulator.cli import simulate

app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
app.command()(simulate)
app(prog_name="simulate")
