"""The fault drill: every case many times, at random moments, and a table of what came of it.

`make drill`, or `python -m tests.chaos.drill --help`.
"""

import argparse
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median

import psycopg
from rich.console import Console
from rich.table import Table

import bridge
from bridge.services import EmbeddedPostgres, find_mosquitto
from tests.chaos import database, network, processes, refusals, stream
from tests.chaos.arena import DRILL, TESTS, Arena, Case, Outcome, Round, Size

CASES: list[Case] = [*processes.CASES, *network.CASES, *database.CASES, *refusals.CASES, *stream.CASES]
TIMES = 20
BEGIN, END = "<!-- drill: begin -->", "<!-- drill: end -->"
COLUMNS = ("case", "fault", "times", "messages", "lost", "duplicated", "wrong", "recovered s", "besides")


@dataclass
class Result:
    """What a case came to so far; `failures` say what was not as it must be, `lacking` why it was not run."""

    case: Case
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lacking: str | None = None

    def row(self) -> list[str]:
        """The line of the table: sums over all rounds, and median and longest time to recover."""
        case, outcomes = self.case, self.outcomes
        if self.lacking:
            return [case.number, case.name, "0", "", "", "", "", "", f"not run: {self.lacking}"]
        times = [outcome.recovered_s for outcome in outcomes if outcome.recovered_s is not None]
        failed = [f"{len(self.failures)} FAILED"] if self.failures else []
        return [
            case.number,
            case.name,
            str(len(outcomes) + len(self.failures)),
            f"{sum(outcome.messages for outcome in outcomes):,}",
            f"{sum(outcome.lost for outcome in outcomes):,}",
            f"{sum(outcome.duplicated for outcome in outcomes):,}",
            f"{sum(outcome.wrong for outcome in outcomes):,}",
            f"{median(times):.1f} / {max(times):.1f}" if times else "",
            "; ".join([*_figures(outcomes), *failed]),
        ]


def _figures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What the rounds measured besides: median and largest."""
    for name in dict.fromkeys(name for outcome in outcomes for name in outcome.figures):
        values = [outcome.figures[name] for outcome in outcomes if name in outcome.figures]
        largest = f" / {max(values):,.4g}" if len(values) > 1 else ""
        yield f"{name} {median(values):,.4g}{largest}"


def run_case(
    case: Case, times: int, size: Size, seed: str, folder: Path, tell: "Telling", shared: Arena | None = None
) -> Result:
    """Runs a case so often, in services of its own unless told otherwise.

    What a failed round leaves behind stays in `folder`.
    """
    result = Result(case, lacking=case.lacking())
    if result.lacking:
        tell.done(result)
        return result
    with nullcontext(shared) if shared else Arena(case.postgres, case.broker, case.server) as arena:
        for number in range(case.times or times):
            if tell.stop.is_set():
                break
            place = folder / f"{case.number}-{number}"
            place.mkdir(parents=True)
            began = time.monotonic()
            try:
                arena.revive()
                with arena.database() as database:
                    chance = Random(f"{seed}/{case.number}/{number}")
                    with Round(arena, size, chance, database, place) as drill:
                        outcome = case.run(drill)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this round that failed
                failure = f"case {case.number}, round {number}, seed {seed}: {type(error).__name__}: {error} ({place})"
                result.failures.append(failure)
                tell.failed(failure)
            else:
                result.outcomes.append(outcome)
                shutil.rmtree(place)
            tell.round(case, number, time.monotonic() - began)
    tell.done(result)
    return result


class Telling:
    """Says what happens while it happens: a line for each round. `stop` is set when no more rounds are wanted."""

    def __init__(self, console: Console) -> None:
        self.stop = threading.Event()
        self._console = console
        self._lock = threading.Lock()

    def round(self, case: Case, number: int, seconds: float) -> None:
        """One round is over."""
        self._line(f"{case.number:>4} {case.name}: round {number + 1} took {seconds:.1f} s")

    def failed(self, failure: str) -> None:
        """One round has failed."""
        self._line(f"FAILED {failure}")

    def done(self, result: Result) -> None:
        """All rounds of a case are over."""
        self._line(" | ".join(result.row()))

    def _line(self, text: str) -> None:
        with self._lock:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def drill(
    cases: Sequence[Case],
    times: int,
    size: Size,
    seed: str,
    jobs: int,
    console: Console,
    note: Callable[[Result], None],
) -> list[Result]:
    """Runs the cases, `jobs` at once; those that measure for long come last, each alone. Tells `note` of each result.

    Ctrl-C ends it after the rounds that are under way, a second one at once.
    """
    folder = Path(tempfile.mkdtemp(prefix="wattbridge-drill-"))
    tell = Telling(console)
    results: dict[str, Result] = {}

    def work(case: Case) -> None:
        if not tell.stop.is_set():
            results[case.number] = run_case(case, times, size, seed, folder, tell)
            note(results[case.number])

    with ThreadPoolExecutor(jobs) as together, ThreadPoolExecutor(1) as alone:
        try:
            for pool, measures in ((together, False), (alone, True)):
                for running in [pool.submit(work, case) for case in cases if case.alone is measures]:
                    running.result()
        except KeyboardInterrupt:
            tell.stop.set()
            console.print("Ending after the rounds that are under way. Ctrl-C ends at once.")
    if not any(result.failures for result in results.values()):
        shutil.rmtree(folder)
    return [results[case.number] for case in cases if case.number in results]


def write(path: Path, said: str, results: Sequence[Result]) -> None:
    """Puts what is said and the lines of the table between two marks in a document; lines of other cases stay.

    Raises SystemExit where the marks are missing.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    known, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}")
    rows = {line.split("|")[1].strip(): line for line in known.splitlines() if re.match(r"\| \d", line)}
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    rows |= {result.case.number: f"| {' | '.join([*result.row(), today])} |" for result in results}
    table = [
        f"| {' | '.join([*COLUMNS, 'run'])} |",
        "|---|---|" + "--:|" * 6 + "---|---|",
        *(rows[case.number] for case in CASES if case.number in rows),
    ]
    path.write_text("\n".join([f"{before}{begin}", said, "", *table, f"{end}{after}"]), encoding="utf-8")


def _conditions() -> str:
    mosquitto = subprocess.run([find_mosquitto(), "-h"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\S+)", mosquitto)
    with EmbeddedPostgres() as server, psycopg.connect(server.dsn) as connection:
        postgres = connection.info.parameter_status("server_version")
    return (
        f"wattbridge {bridge.__version__}, PostgreSQL {postgres}, Mosquitto {version[1] if version else '?'}, "
        f"Python {platform.python_version()}, {os.cpu_count()} shared cores"
    )


def show(results: Sequence[Result], console: Console) -> None:
    """The table for the terminal."""
    table = Table(*COLUMNS)
    for result in results:
        table.add_row(*result.row(), style="red" if result.failures else None)
    console.print(table)
    for result in results:
        for failure in result.failures:
            console.print(failure, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the drill; 0 if every round was clean."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.drill",
        description=__doc__.partition("\n")[0],
        epilog="Cases: " + "; ".join(f"{case.number} {case.name}" for case in CASES),
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="numbers of cases, such as 4b; default: all")
    parser.add_argument("--times", type=int, default=TIMES, help="rounds of each case (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time (default %(default)s)")
    parser.add_argument("--seed", default=secrets.token_hex(3), help="decides the moments; default: a random one")
    parser.add_argument("--small", action="store_true", help="as in `make test`: less load, shorter outages")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this document")
    options = parser.parse_args(arguments)
    known = {case.number: case for case in CASES}
    if unknown := [number for number in options.cases if number not in known]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [case for case in CASES if not options.cases or case.number in options.cases]

    console = Console()
    size = TESTS if options.small else DRILL
    said = f"`{' '.join(['python -m tests.chaos.drill', *sys.argv[1:]])}`, {_conditions()}:"

    def note(result: Result | None = None) -> None:
        if options.write:
            with writing:
                write(options.write, said, [result] if result else [])

    writing = threading.Lock()
    # Before anything else: that it cannot be written is to be known now, not after hours.
    note()
    results = drill(chosen, options.times, size, options.seed, options.jobs, console, note)
    show(results, console)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
