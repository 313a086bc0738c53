"""How a run looks from outside: lines of JSON for programs, a moving line or a bar for people."""

import json
import sys
import time
from datetime import timedelta
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from simulator.run import Options, Summary

PLAIN_LINE_S = 10.0
BAR_WIDTH = 16


class Output(Protocol):
    """Where a run is shown; a context manager."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """End whatever moves."""

    def progress(self, summary: Summary) -> None:
        """Show how far the run is; once a second."""

    def event(self, text: str) -> None:
        """Show a line when something happens."""

    def finish(self, summary: Summary) -> None:
        """Show what became of the run."""


class JsonLines:
    """Progress for programs: one object a second on stdout; events go to stderr."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing to be done."""

    def progress(self, summary: Summary, *, final: bool = False) -> None:
        """Write the counters."""
        line = {
            "published": summary.published,
            "acknowledged": summary.acknowledged,
            "resent": summary.resent,
            "refused": summary.refused,
            "unheard": summary.unheard,
            "unsent": summary.unsent,
            "readings": summary.readings,
            "rate": round(summary.rate, 1),
            "elapsed_s": round(summary.elapsed_s, 3),
            "simulated_s": round(summary.simulated_s, 3),
            "simulated_until": summary.simulated_until.isoformat(),
            "state": summary.state,
            "ledger": None if summary.ledger is None else str(summary.ledger),
        }
        sys.stdout.write(json.dumps(line | {"final": True} if final else line) + "\n")
        sys.stdout.flush()

    def event(self, text: str) -> None:
        """Write a line to stderr."""
        sys.stderr.write(text + "\n")

    def finish(self, summary: Summary) -> None:
        """Write the counters for the last time."""
        self.progress(summary, final=True)


class Terminal:
    """Progress for people, on stderr.

    On a terminal it is a bar where the end of the run is known, and otherwise a line that moves; in a file or
    a pipe it is a line now and then.
    """

    def __init__(self, options: Options) -> None:
        """Prepare; nothing is shown before the context is entered."""
        self._options = options
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._moves = self._console.is_terminal and not self._console.is_dumb_terminal
        self._ends = options.duration is not None or options.messages is not None
        columns = (
            (BarColumn(BAR_WIDTH), TaskProgressColumn(), TimeRemainingColumn(compact=True))
            if self._ends
            else (SpinnerColumn(),)
        )
        text = TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, text, console=self._console, disable=not self._moves)
        self._task = self._bar.add_task("connecting", total=1.0)
        self._next_line = time.monotonic() + PLAIN_LINE_S

    def __enter__(self) -> Self:
        """Begin to move."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what moves."""
        self._bar.stop()

    def progress(self, summary: Summary) -> None:
        """Move the bar or the line; write a line where nothing can move, and enough time has passed."""
        text = (
            f"{summary.acknowledged:,} acknowledged, {summary.rate:,.0f}/s, "
            f"fleet {summary.simulated_until:%m-%d %H:%M:%S}Z"
        )
        if self._moves:
            self._bar.update(self._task, description=text, completed=self._done(summary))
        elif time.monotonic() >= self._next_line:
            self._next_line += PLAIN_LINE_S
            done = f"{self._done(summary):.0%}: " if self._ends else ""
            self._console.print(done + text, markup=False)

    def event(self, text: str) -> None:
        """Print a line; what moves stays below it."""
        self._console.print(text, markup=False)

    def finish(self, summary: Summary) -> None:
        """Print what became of the run, and what to do with its ledger."""
        readings = "" if summary.unsent else f" ({summary.readings:,} readings)"
        self.event(
            f"{summary.published:,} messages published{readings}, "
            f"{summary.acknowledged:,} acknowledged, {summary.resent:,} sent again "
            f"in {summary.elapsed_s:.1f} s ({summary.rate:,.0f}/s); "
            f"{timedelta(seconds=round(summary.simulated_s))} of fleet time until "
            f"{summary.simulated_until:%Y-%m-%d %H:%M:%S}Z"
        )
        if summary.unheard:
            self.event(f"{summary.unheard:,} of them had no subscriber: the broker took them and forgot them")
        if summary.ledger is not None and not summary.reached and not summary.published:
            self.event("no ledger: nothing was sent")
        elif summary.ledger is not None:
            self.event(f"what the database must say now is in {summary.ledger}: wattbridge verify {summary.ledger}")

    def _done(self, summary: Summary) -> float:
        """Return the part of the run that is over, by whichever limit comes first."""
        parts = [0.0]
        if self._options.duration is not None:
            parts.append(summary.elapsed_s / self._options.duration)
        if self._options.messages is not None:
            parts.append(summary.acknowledged / self._options.messages)
        return min(max(parts), 1.0)
