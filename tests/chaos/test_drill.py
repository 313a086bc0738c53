"""Every case of the fault drill, in small; and that the drill itself can fail."""

import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bridge.services import EmbeddedPostgres
from simulator.truth import read
from tests.chaos import drill
from tests.chaos.arena import TESTS, Arena, Case, FailedError, Outcome, Round, Size
from tests.chaos.drill import BEGIN, CASES, END, Result, Telling, main, run_case, write
from tests.integration.harness import ask, wait_until

DOCUMENT = f"""# Drill

{BEGIN}
`yesterday`:

| case | fault |
| 1 | of yesterday |
| 77 | of yesterday |
{END}

afterwards
"""
TINY = Size(rate=1_000, seconds=0.5, outage_s=1, storm=500, soak_rate=500, soak_s=1)


@pytest.fixture(scope="session")
def ordinary() -> Iterator[Arena]:
    """The services of all cases that ask for nothing special: to make them anew for each takes longer than a round."""
    # No case is a power failure, and databases of rounds are made and dropped faster.
    with Arena({"fsync": "off"}) as arena:
        yield arena


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.number)
def test_no_fault_loses_duplicates_or_alters_anything(case: Case, ordinary: Arena, tmp_path: Path) -> None:
    special = case.postgres or case.broker or case.server is not EmbeddedPostgres
    arena = None if special else ordinary
    # Once: to hit many random moments is what the drill is for.
    result = run_case(case, 1, TESTS, secrets.token_hex(3), tmp_path, Telling(Console()), arena)
    if result.lacking:
        pytest.skip(result.lacking)
    assert not result.failures, "\n".join(result.failures)
    assert len(result.outcomes) == 1


def test_the_numbers_of_the_cases_are_different() -> None:
    numbers = [case.number for case in CASES]
    assert len(set(numbers)) == len(numbers)


# --- the drill can fail ------------------------------------------------------------------------------------


def tampering(tamper: Callable[[Round], object]) -> Callable[[Round], Outcome]:
    """A round without a fault, but for what is done behind the daemon's back once everything is stored."""

    def run(round_: Round) -> Outcome:
        round_.daemon()
        with round_.fleet():
            pass
        books = read(round_.ledger).books
        entries = books.stored + books.duplicates + books.conflicts + books.rejected
        wait_until(lambda: round_.received() >= entries, "everything is stored")
        tamper(round_)
        # Nothing more will come.
        return round_.judge("--wait", "0")

    return run


def in_the_database(statement: str) -> Callable[[Round], object]:
    return lambda round_: ask(round_.dsn, statement)


def stop_the_database_and_fail(round_: Round) -> Outcome:
    round_.arena.postgres.stop()
    raise FailedError("on purpose")


TAMPERINGS = {
    "Outcome(.* lost=1,": in_the_database(
        "DELETE FROM meter_history WHERE (meter_id, ts) = (SELECT meter_id, ts FROM meter_history LIMIT 1)"
    ),
    "Outcome(.* lost=0, duplicated=[1-9]": in_the_database(
        "UPDATE ingest_counter SET received = received + 1, stored = stored + 1"
    ),
    "Outcome(.* lost=0, duplicated=0, wrong=[1-9]": in_the_database("UPDATE meter_live SET voltage = voltage + 1"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The drill with tiny rounds, whose traces are in `tmp_path`."""
    monkeypatch.setattr(drill, "TESTS", TINY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # As much room as the table needs.
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.usefixtures("small")
def test_what_is_lost_duplicated_or_wrong_fails_the_drill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = iter([*(tampering(tamper) for tamper in TAMPERINGS.values()), stop_the_database_and_fail])
    failures = [*TAMPERINGS, "on purpose"]

    def run(round_: Round) -> Outcome:
        return next(rounds)(round_)

    case = Case("77", "tampered with", run, times=len(failures))
    monkeypatch.setattr(drill, "CASES", [*CASES, case])
    document = tmp_path / "reliability.md"
    document.write_text(DOCUMENT)

    code = main(["--small", "--jobs", "1", "--seed", "s33d", "--write", str(document), "77"])

    said = capsys.readouterr().out
    assert code == 1
    for number, expected in enumerate(failures):
        pattern = expected.replace("(", r"\(", 1)
        assert re.search(rf"^case 77, round {number}, seed s33d: FailedError: .*{pattern}", said, re.MULTILINE), said
    # What it takes to look into it is still there.
    (kept,) = tmp_path.glob("wattbridge-drill-*")
    assert [place.name for place in sorted(kept.iterdir())] == [f"77-{number}" for number in range(len(failures))]
    assert {"fleet.ledger", "fleet.log", "verdict.json"} <= {file.name for file in (kept / "77-0").iterdir()}
    # And it says so in the document, beside the cases that were not run.
    lines = document.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| 77 |"))
    assert line.startswith(f"| 77 | tampered with | {len(failures)} | 0 | 0 | 0 | 0 |  | {len(failures)} FAILED |")
    assert "| 1 | of yesterday |" in lines
    assert "`yesterday`:" not in lines
    assert (lines[:3], lines[-3:]) == (["# Drill", "", BEGIN], [END, "", "afterwards"])


@pytest.mark.usefixtures("small")
def test_where_nothing_failed_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = Case("y", "nothing happens", tampering(lambda _: None), times=1)
    lacking = Case("z", "cannot be", tampering(lambda _: None), lacking=lambda: "no such thing here")
    monkeypatch.setattr(drill, "CASES", [clean, lacking])

    assert main(["--small", "--jobs", "2"]) == 0

    said = capsys.readouterr().out
    assert "y nothing happens: round 1 took" in said
    assert "z | cannot be | 0 |  |  |  |  |  | not run: no such thing here" in said
    assert not list(tmp_path.glob("wattbridge-drill-*"))


def test_the_row_of_a_case_sums_up_its_rounds() -> None:
    outcomes = [
        Outcome(1_000, 0, 0, 0, recovered_s=0.25, figures={"rate": 10}),
        Outcome(2_000, 1, 0, 2, recovered_s=None, figures={"rate": 30, "MB": 1.5}),
        Outcome(3_000, 0, 4, 0, recovered_s=1.75, figures={"rate": 20}),
    ]
    result = Result(Case("1", "a fault", lambda _: outcomes[0]), outcomes)
    row = ["1", "a fault", "3", "6,000", "1", "4", "2", "1.0 / 1.8", "rate 20 / 30; MB 1.5"]
    assert result.row() == row


def test_a_document_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "other.md"
    document.write_text("nothing of the kind")
    with pytest.raises(SystemExit, match=f"lacks the lines {BEGIN} and {END}"):
        write(document, "make drill", [])
    assert document.read_text() == "nothing of the kind"


def test_an_unknown_case_is_named_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["1", "one-too-many"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no such case: one-too-many; there are " + ", ".join(case.number for case in CASES) in said
