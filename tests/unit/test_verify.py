"""The pure parts of `wattbridge verify`: pairing rows, comparing payloads, naming times, patience, the report."""

import json
import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import verify
from bridge.verify import Patience
from bridge.verify_analytics import TOLERANCE, differing_answers, where_efficient
from bridge.verify_letters import canonical
from bridge.verify_report import (
    ALTERED,
    MISSING,
    REASON,
    REJECTED,
    STALE,
    SURPLUS,
    Check,
    Difference,
    Verdict,
    print_json,
    print_table,
)
from bridge.verify_rows import moment, pair

KEYS = st.tuples(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3))


@given(st.sets(KEYS), st.lists(KEYS))
def test_pairs_are_what_multisets_say(expected: set[tuple[int, int]], found: list[tuple[int, int]]) -> None:
    must = sorted(expected)
    pairs = pair(*columns(must), *columns(found))
    assert [must[at] for at in pairs.expected] == [found[at] for at in pairs.found]
    assert {must[at] for at in pairs.expected} == expected & set(found)
    assert {must[at] for at in pairs.missing} == expected - set(found)
    assert Counter(found[at] for at in pairs.surplus) == Counter(found) - Counter(expected)


def columns(keys: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([key[0] for key in keys], np.int32), np.array([key[1] for key in keys], np.int64)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1.50, "b": [1, 2]}', b'{"b":[1,2.0],"a":1.5}'),
        (b'{"timestamp": "2026-01-01T00:00:00.000Z"}', b'{"timestamp":"2026-01-01T01:00:00+01:00"}'),
        (b"NaN", b"NaN"),
    ],
)
def test_the_same_json_in_other_words(one: bytes, other: bytes) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1}', b'{"a": true}'),
        (b'{"a": 1}', b'{"a": "1"}'),
        (b'{"a": null}', b"{}"),
        (b"[1, 2]", b"[2, 1]"),
        (b'{"timestamp": "2026-01-01T00:00:00Z"}', b'{"timestamp": "2026-01-01T00:00:00.000001Z"}'),
        (b'{"note": "2026-01-01T00:00:00Z"}', b'{"note": "2026-01-01T00:00:00.0Z"}'),
        (b"no json", b"no json "),
    ],
)
def test_other_json(one: bytes, other: bytes) -> None:
    assert canonical(one) != canonical(other)


@pytest.mark.parametrize(
    ("ts", "text"),
    [
        (0, "2000-01-01T00:00:00Z"),
        (1, "2000-01-01T00:00:00.000001Z"),
        (500_000, "2000-01-01T00:00:00.5Z"),
        (2**63 - 1, "infinity"),
        (-(2**63), "-infinity"),
    ],
)
def test_times_have_the_digits_they_need(ts: int, text: str) -> None:
    assert moment(ts) == text


def test_a_check_counts_all_and_keeps_the_first() -> None:
    check = Check("history", 3, 0, show=1)
    for device in "abc":
        check.add(Difference("missing", device))
    assert (check.missing, [difference.device for difference in check.differences]) == (3, ["a"])
    assert not check.match


def test_a_check_describes_only_what_it_keeps() -> None:
    described = []

    def describe(place: int) -> Difference:
        described.append(place)
        return Difference("missing", str(place))

    check = Check("history", 9, 0, show=3)
    check.add(Difference("missing", "one"))
    check.add_all("missing", [5, 6, 7], describe)
    check.add_all("surplus", [], describe)
    assert described == [5, 6]
    assert check.counts == {"missing": 4}
    assert [*check.counts] == ["missing"]


@pytest.mark.parametrize(
    ("must", "has", "differs"),
    [
        (10.0, 10.0 * (1 + TOLERANCE / 2), False),
        (10.0, 10.0 * (1 - TOLERANCE / 2), False),
        (10.0, 10.0 * (1 + TOLERANCE * 2), True),
        (10.0, 10.0 * (1 - TOLERANCE * 2), True),
        (10.0, -10.0, True),
        (0.0, 1e-300, True),
        (10.0, math.inf, True),
        (10.0, -math.inf, True),
        (10.0, math.nan, True),
        (math.nan, 10.0, True),
        (math.nan, math.nan, False),
    ],
)
def test_sums_differ_beyond_the_noise(must: float, has: float, differs: bool) -> None:  # noqa: FBT001
    assert differing_answers(np.array([must]), np.array([has]), "float8").tolist() == [differs]


def test_whole_numbers_differ_by_one() -> None:
    many = np.array([10**15])
    assert differing_answers(many, many + 1, "bigint").tolist() == [True]


@pytest.mark.parametrize(
    ("ac", "dc", "gives"),
    [
        (0.0999, 0.05, "no"),
        (0.1 * (1 - TOLERANCE / 2), 0.05, "maybe"),
        (0.1, 0.05, "maybe"),
        (0.1001, 0.05, "yes"),
        (0.0, 0.0, "no"),
        (5.0, 4.9999, "yes"),
        (5.0, 5.0, "maybe"),
        (5.0, 5.0001, "no"),
    ],
)
def test_at_the_edge_the_noise_decides_whether_there_is_an_efficiency(ac: float, dc: float, gives: str) -> None:
    sure, maybe = where_efficient(np.array([ac]), np.array([dc]), 0.1)
    assert (sure.tolist(), maybe.tolist()) == ([gives == "yes"], [gives == "maybe"])


# --- patience ----------------------------------------------------------------------------------------------


class World:
    """A clock that only sleeping moves, and a database that has rows by the time."""

    def __init__(self, rows: Callable[[float], int]) -> None:
        self.now = 0.0
        self.looks = 0
        self.said: list[str] = []
        self._rows = rows

    def execute(self, query: str, _: object = None) -> Any:
        if "to_regclass" in query:
            return SimpleNamespace(fetchone=lambda: (True,))
        self.looks += 1
        return SimpleNamespace(fetchone=lambda: (self._rows(self.now), 0, 0))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[World, Patience]]:
    """Patience for 100 certain readings, beside one that is in doubt."""

    def prepare(rows: Callable[[float], int], wait_s: float = 30.0) -> tuple[World, Patience]:
        world = World(rows)
        monkeypatch.setattr(verify, "time", world)
        meters = SimpleNamespace(certain=np.array([True] * 50 + [False]))
        vehicles = SimpleNamespace(certain=np.ones(49, np.bool_))
        letters = [SimpleNamespace(certain=True), SimpleNamespace(certain=False)]
        truth: Any = SimpleNamespace(meter_rows=meters, vehicle_rows=vehicles, letters=letters)
        connection: Any = world
        return world, Patience(connection, truth, wait_s, world.said.append)

    return prepare


def test_where_everything_is_there_nothing_is_waited_for(patience: Any) -> None:
    world, waiter = patience(lambda _: 100)
    waiter.wait_for_rows()
    assert (world.now, world.looks, world.said, waiter.waited_s) == (0, 1, [], 0)


def test_it_gives_up_after_a_third_without_change(patience: Any) -> None:
    world, waiter = patience(lambda _: 99)
    waiter.wait_for_rows()
    assert world.now == pytest.approx(10, abs=verify.POLL_S)
    assert not waiter.wait_for_change()
    assert world.now == waiter.waited_s == pytest.approx(10, abs=verify.POLL_S)
    assert len(world.said) == 1
    assert "99 readings and dead letters of 100" in world.said[0]


def test_it_outlasts_a_restart_of_the_bridge(patience: Any) -> None:
    world, waiter = patience(lambda now: 50 if now < 9 else 80 if now < 18 else 100)
    waiter.wait_for_rows()
    assert world.now == 18


def test_it_never_waits_longer_than_allowed(patience: Any) -> None:
    world, waiter = patience(int)
    waiter.wait_for_rows()
    assert world.now == 30
    assert not waiter.wait_for_change()
    assert world.now == 30


def test_without_patience_it_judges_at_once(patience: Any) -> None:
    world, waiter = patience(lambda _: 0, wait_s=0)
    waiter.wait_for_rows()
    assert not waiter.wait_for_change()
    assert (world.now, world.said) == (0, [])


def test_what_came_while_it_was_judging_is_judged_again(patience: Any) -> None:
    """The rows may be those of an earlier fleet: enough of them need not be all."""
    world, waiter = patience(lambda now: 500 if now < 60 else 501)
    waiter.wait_for_rows()
    world.now += 60  # so long it judges: that is not waiting
    assert waiter.wait_for_change()
    assert waiter.waited_s <= 3 * verify.POLL_S
    assert not waiter.wait_for_change()


def test_while_the_bridge_writes_it_does_not_judge(patience: Any) -> None:
    world, waiter = patience(lambda now: 500 + min(int(now * 2), 20))
    waiter.wait_for_rows()
    assert waiter.wait_for_change()
    assert 10 <= world.now <= 10 + 2 * verify.POLL_S


# --- the report --------------------------------------------------------------------------------------------

HOSTILE = ["\x1b[2J\x1b]0;title\x07", "a\nNO MATCH", "\x9b31m", "\u202eabc", "[red]x[/red]", "[/]", 'it\'s "me"']


def verdict_of(*differences: Difference) -> Verdict:
    check = Check("meter history", 1, 1, show=10)
    for one in differences:
        check.add(one)
    return Verdict(
        "fleet.ledger", "localhost:5432/energy", complete=True, checks=[check], analytics="", books={}, hints=[]
    )


@pytest.mark.parametrize("kind", [MISSING, STALE])
def test_what_may_still_come(kind: str) -> None:
    verdict = verdict_of(Difference(kind, "MTR-1"))
    assert verdict.missing == 1
    assert not verdict.match


@pytest.mark.parametrize("kind", [SURPLUS, REJECTED, ALTERED, REASON])
def test_what_no_patience_mends(kind: str) -> None:
    verdict = verdict_of(Difference(kind, "MTR-1"))
    assert verdict.missing == 0
    assert not verdict.match


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        (MISSING, (1, 0, 0)),
        (SURPLUS, (0, 1, 0)),
        (REJECTED, (0, 1, 0)),
        (STALE, (0, 0, 1)),
        (REASON, (0, 0, 1)),
    ],
)
def test_each_kind_has_its_column(kind: str, counted: tuple[int, int, int]) -> None:
    (check,) = verdict_of(Difference(kind, "MTR-1")).checks
    assert (check.missing, check.surplus, check.altered) == counted


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_device_says_leaves_the_terminal_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verdict_of(
        Difference("surplus", name, None, None, {"meter_id": name}), Difference("missing", "MTR-1", None, {})
    )
    print_table(verdict)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    shown = name if name.isprintable() else repr(name)
    assert f"  {shown}  found meter_id {shown}" in lines
    print_json(verdict)
    said = capsys.readouterr().out
    assert said.removesuffix("\n").isprintable()
    assert said.isascii()
    assert json.loads(said)["checks"][0]["differences"][0]["device"] == name


def test_what_is_long_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(verdict_of(Difference("surplus", "x" * 10_000, None, None, {"meter_id": "y" * 10_000})))
    assert len(capsys.readouterr().out) < 2_000


def test_a_row_without_a_device_is_named_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(verdict_of(Difference("surplus", None, "-infinity", None, {"kwh_ac": None})))
    assert "  none  -infinity  found kwh_ac none kWh" in capsys.readouterr().out.splitlines()
