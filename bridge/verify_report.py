"""What `wattbridge verify` says: the verdict as a table for a person, or as JSON."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

MISSING = "missing"
SURPLUS = "surplus"
ALTERED = "altered"
STALE = "not the newest"
REJECTED = "wrongly rejected"
REASON = "wrong reason"
# What counts as surplus in the table; everything else that is neither this nor missing counts as altered.
EXTRA = {SURPLUS, REJECTED}

LONGEST_SHOWN = 300
UNITS = {
    "kwh_ac": "kWh", "kwh_dc": "kWh", "voltage": "V", "soc": "%", "battery_temp": "°C",
    "ac": "kWh", "dc": "kWh", "matched_ac": "kWh", "matched_dc": "kWh", "soc_from": "%", "soc_to": "%",
}  # fmt: skip

Values = dict[str, Any]


class Row(NamedTuple):
    """A row of a table for people: whose it is, when, and what it says."""

    device: str | None
    ts: str | None
    values: Values


class Difference(NamedTuple):
    """One thing that is not as it must be. Of rows that both sides have, `expected` and `found` say what differs."""

    kind: str
    device: str | None
    ts: str | None = None
    expected: Values | None = None
    found: Values | None = None


def difference(kind: str, must: Row | None, has: Row | None, names: Sequence[str] = ()) -> Difference:
    """A row that only one side has; or one of both, where the columns `names` differ."""
    if must and has:
        expected, found = (
            {name: row.ts if name == "ts" else row.values[name] for name in names} for row in (must, has)
        )
        return Difference(kind, must.device, must.ts, expected, found)
    row = must or has
    if row is None:
        raise ValueError("a difference is about at least one row")
    return Difference(kind, row.device, row.ts, must and must.values, has and has.values)


@dataclass
class Check:
    """One line of the table. Keeps the first `show` differences of each kind and counts all."""

    name: str
    expected: int
    found: int
    show: int
    counts: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    @property
    def match(self) -> bool:
        """Nothing differs."""
        return not self.counts.total()

    @property
    def missing(self) -> int:
        """What ought to be there and is not."""
        return self.counts[MISSING]

    @property
    def surplus(self) -> int:
        """What is there and ought not to be."""
        return sum(self.counts[kind] for kind in EXTRA)

    @property
    def altered(self) -> int:
        """What is there, but otherwise."""
        return self.counts.total() - self.missing - self.surplus

    def add(self, found: Difference) -> None:
        """Counts one difference, and keeps it while it is one of the first."""
        self.add_all(found.kind, [0], lambda _: found)

    def add_all(self, kind: str, places: Collection[int], describe: Callable[[int], Difference]) -> None:
        """Counts a difference for each place, and describes those that it keeps."""
        for place in islice(places, max(0, self.show - self.counts[kind])):
            self.differences.append(describe(place))
        if len(places):
            self.counts[kind] += len(places)


@dataclass
class Verdict:
    """The whole comparison."""

    ledger: str
    database: str
    complete: bool
    checks: list[Check]
    analytics: str
    """How the database's were computed."""
    books: dict[str, int]
    hints: list[str]
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def match(self) -> bool:
        """The database says exactly what the ledger says."""
        return all(check.match for check in self.checks)

    @property
    def missing(self) -> int:
        """What may still come if the bridge is still at work."""
        return sum(check.missing for check in self.checks) + sum(check.counts[STALE] for check in self.checks)

    @property
    def sentence(self) -> str:
        """The verdict on one line."""
        if self.match:
            rows = sum(check.expected for check in self.checks if check.name.endswith("history"))
            letters = sum(check.expected for check in self.checks if check.name == "dead letters")
            return f"MATCH: {rows:,} readings and {letters:,} dead letters, exactly as the ledger says"
        total = sum(check.counts.total() for check in self.checks)
        where = ", ".join(check.name for check in self.checks if not check.match)
        return f"NO MATCH: {total:,} {'difference' if total == 1 else 'differences'} in {where}"


def print_json(verdict: Verdict) -> None:
    """Prints one JSON object, in ASCII; numbers that JSON cannot say are strings."""
    said = {
        "match": verdict.match,
        "verdict": verdict.sentence,
        "ledger": verdict.ledger,
        "database": verdict.database,
        "complete": verdict.complete,
        "checks": [
            {
                "check": check.name,
                "match": check.match,
                "expected": check.expected,
                "found": check.found,
                "missing": check.missing,
                "surplus": check.surplus,
                "altered": check.altered,
                "counts": dict(check.counts),
                "differences": [one._asdict() for one in check.differences],
            }
            for check in verdict.checks
        ],
        "analytics": verdict.analytics,
        "books": verdict.books,
        "hints": verdict.hints,
        "seconds": {step: round(seconds, 3) for step, seconds in verdict.steps.items()},
    }
    print(json.dumps(_finite(said), allow_nan=False))  # noqa: T201 - this is the output


def print_table(verdict: Verdict) -> None:
    """Prints the table, the differences by name, the books and the verdict."""
    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fits 80 columns with millions of readings
    table.add_column("check", no_wrap=True)
    for column in ("expected", "found", "missing", "surplus", "altered"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for check in verdict.checks:
        numbers = (check.expected, check.found, check.missing, check.surplus, check.altered)
        mark = "[green]match[/]" if check.match else "[red]differs[/]"
        table.add_row(check.name, *(f"{number:,}" for number in numbers), mark)
    console.print(table)
    for line in _lines(verdict):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(verdict: Verdict) -> Iterator[str]:
    for hint in verdict.hints:
        yield f"note: {hint}"
    for check in verdict.checks:
        for kind, total in check.counts.items():
            shown = [one for one in check.differences if one.kind == kind]
            more = f", the first {len(shown)}" if len(shown) < total else ""
            yield f"{check.name}: {total:,} {kind}{more}{':' if shown else ''}"
            for one in shown:
                yield f"  {_line(one)}"
    yield f"analytics: {verdict.analytics}"
    books = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in verdict.books.items())
    yield f"books: {books}"
    yield verdict.sentence


def _line(one: Difference) -> str:
    parts = [_shown(one.device), one.ts or ""]
    if one.expected is not None:
        parts.append(f"expected {_text(one.expected)}")
    if one.found is not None:
        parts.append(f"found {_text(one.found)}")
    return "  ".join(part for part in parts if part)


def _text(values: Values) -> str:
    """Values with their names and units."""
    said = (f"{name} {_shown(value)} {UNITS.get(name, '')}".rstrip() for name, value in values.items())
    return "; ".join(said)


def _shown(value: object) -> str:
    """A value on one line that leaves the terminal alone, whatever a device or a database says."""
    if value is None:
        return "none"
    text = str(value)
    return shortened(text if text and text.isprintable() else repr(text))


def shortened(text: str) -> str:
    """A text that does not fill the screen, whatever it is."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
