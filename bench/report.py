"""What the benchmarks have in common at their rim: options, progress, tables in Markdown, the conditions of a run.

A bench is named by the file it is in. Its tables go to stdout, and with `--write FILE` also between the lines
`<!-- bench:NAME -->` and `<!-- /bench:NAME -->` of that file.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

from bridge.services import find_mosquitto

T = TypeVar("T")
CHECKOUT = Path(__file__).parents[1]
NONE = "–"  # noqa: RUF001 - where there is no figure


class MarkersMissingError(Exception):
    """The file has no place for the tables of this bench."""


class Table(NamedTuple):
    """The first column names the row; the others hold figures and stand to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


class Spread(NamedTuple):
    """What several rounds came to."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.format("{:.2f}")

    def format(self, pattern: str) -> str:
        """The median, and in brackets the range if it has any."""
        middle, low, high = (pattern.format(value) for value in self)
        return middle if low == high else f"{middle} ({low}–{high})"  # noqa: RUF001 - a range


class Side(NamedTuple):
    """What one turn came to: so many messages (or rows) in so long, and CPU seconds of each process by name."""

    messages: int
    seconds: float
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        return self.messages / self.seconds

    def us(self, process: str) -> float:
        """CPU microseconds a message."""
        return self.cpu[process] / self.messages * 1e6


class Conditions(NamedTuple):
    """Under which a bench ran. Made when it starts, since the load average is that of the time before it."""

    began: datetime
    load: float
    command: str

    @classmethod
    def now(cls) -> "Conditions":
        """The present ones, of the command line that started this process."""
        place = Path(sys.argv[0]).resolve()
        script = place.relative_to(CHECKOUT) if place.is_relative_to(CHECKOUT) else place.name
        command = shlex.join(["python", str(script), *sys.argv[1:]])
        return cls(datetime.now(UTC), os.getloadavg()[0], command)

    def describe(self, postgres: str | None = None, *, mosquitto: bool = False) -> str:
        """One line; `postgres` is the version of the server, `mosquitto` says whether the broker's is of interest."""
        models = [s.partition(":")[2] for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        parts = [
            f"{self.began:%Y-%m-%d %H:%M} UTC",
            models[0].strip() if models else platform.machine(),
            f"{os.cpu_count()} cores",
            f"{memory:.0f} GB",
            f"{platform.system()} {platform.release()}",
            f"Python {platform.python_version()}",
        ]
        if postgres:
            parts.append(f"PostgreSQL {postgres}")
        if mosquitto:
            parts.append(f"Mosquitto {mosquitto_version()}")
        return f"{', '.join(parts)}; load average at the start {self.load:.2f}; `{self.command}`"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest of at least one value."""
    found = list(values)
    return Spread(median(found), min(found), max(found))


def ratios(rounds: Iterable[T], over: Callable[[T], float], under: Callable[[T], float]) -> Spread:
    """The ratio within each round, and only then the median: what slows a whole round down does not count."""
    return spread(over(found) / under(found) for found in rounds)


def rate_row(name: str, sides: Sequence[Side]) -> tuple[str, str, str, str]:
    """What one side came to in all rounds: its messages, seconds, and messages a second."""
    seconds, rate = spread(side.seconds for side in sides), spread(side.rate for side in sides)
    return name, count(sides[0].messages), seconds.format("{:.2f}"), rate.format("{:,.0f}")


def cpu_row(name: str, sides: Sequence[Side], processes: Sequence[str]) -> tuple[str, ...]:
    """CPU microseconds a message of one side in all rounds, by process; a dash for those it does without."""
    return name, *(
        spread(side.us(process) for side in sides).format("{:.1f}") if process in sides[0].cpu else NONE
        for process in processes
    )


def rounds_in_turn(number: int) -> str:
    """What the figures of a table are, in words."""
    return f"median of {number} rounds in turn, in brackets the range" if number > 1 else "one round"


def count(number: float) -> str:
    """A whole number that is easy to read."""
    return f"{number:,.0f}"


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every bench; `rounds` is how many there are unless told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="everything small: does it run at all?")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"how often ({rounds})")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables into this file, at their place in it"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, name: str, arguments: Sequence[str] | None = None, **small: object
) -> argparse.Namespace:
    """The options; with `--small` those of `small` get these values where nothing else was given.

    A file without the place for bench `name` is refused here, rather than after an hour of measuring.
    """
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(**small)
        options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if options.write is not None:
        try:
            _split(options.write, name)
        except (OSError, MarkersMissingError) as error:
            parser.error(f"--write: {error}")
    return options


def publish(
    name: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    conditions: str,
    file: Path | None = None,
) -> None:
    """Prints the tables, the notes and the line of conditions; and writes them to their place in `file`."""
    text = "\n\n".join([*map(markdown, tables), *notes, conditions])
    print(text, flush=True)
    if file is not None:
        before, after = _split(file, name)
        file.write_text(f"{before}\n{text}\n{after}")


def markdown(table: Table) -> str:
    """The table, with its title as a line above it if it has one; columns are padded to be read as text, too."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table.header, rule, *table.rows)
    ]
    return "\n".join([f"{table.title}\n"] * bool(table.title) + lines)


def progress(what: str) -> None:
    """A line for who waits."""
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


def mosquitto_version() -> str:
    """Of the broker that the private services use."""
    said = subprocess.run([find_mosquitto(), "-h"], capture_output=True, text=True, check=False, timeout=10).stdout
    return said.split("\n", 1)[0].rpartition(" ")[2]


def _split(file: Path, name: str) -> tuple[str, str]:
    """What stands before and after the place of this bench, the markers included."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    text = file.read_text()
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise MarkersMissingError(f"{file} does not have the lines {begin} and {end}, one after the other")
    return before + begin, end + after
