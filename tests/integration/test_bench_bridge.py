"""The benches of the whole bridge still run, and measure what they say: small loads, ratios with generous bounds.

A guard, not a measurement: on a busy machine everything here is slow, but both sides of a ratio are.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
# The benches are scripts that import one another by their bare names.
sys.path.insert(0, str(CHECKOUT / "bench"))

import drain  # noqa: E402
import end_to_end  # noqa: E402
import latency  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import workers  # noqa: E402
from rig import Fleet, Rig  # noqa: E402

MESSAGES = 20_000
FLEET = Fleet(500, 500)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as running:
        yield running


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="mosquitto_sub (mosquitto-clients) is not installed")
def test_end_to_end_is_not_far_behind_a_subscriber_that_throws_everything_away(rig: Rig) -> None:
    (found,) = end_to_end.measure(rig, MESSAGES, FLEET, rounds=1)
    assert found.bridge.messages == found.alone.messages == MESSAGES
    assert set(found.bridge.cpu) == {"daemon", "PostgreSQL", "Mosquitto", "simulator"}
    assert set(found.alone.cpu) == {"mosquitto_sub", "Mosquitto", "simulator"}
    assert all(seconds > 0 for side in found for seconds in side.cpu.values())
    assert end_to_end.ratio([found]).median > 0.2
    assert_shown(end_to_end.tables([found]))


def test_a_backlog_is_drained_not_far_slower_than_raw_copy(rig: Rig) -> None:
    (found,) = drain.measure(rig, 2 * MESSAGES, FLEET, rounds=1)
    assert found.drain.messages == found.copy.messages == 2 * MESSAGES
    assert all(seconds > 0 for seconds in (*found.drain.cpu.values(), *found.copy.cpu.values()))
    # It takes some time to get going, which is a lot of so small a backlog.
    assert drain.ratio([found]).median > 0.05
    assert_shown(drain.tables([found]))


def test_a_reading_is_visible_soon(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARM_UP_S", 0.5)
    runs = latency.measure(rig, seconds=1, fleet=FLEET, rounds=1, rates=(333, 3_000))
    for (run,) in runs.values():
        assert len(run.took) > 10
        assert 0 < run.percentile(0.5) <= run.percentile(0.99) <= max(run.took)
        assert run.percentile(0.5) < 2_000
    assert_shown([latency.table(runs)])


def test_memory_is_watched_through_an_outage(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "AROUND_S", 1.0)
    monkeypatch.setattr(memory, "EVERY_S", 0.2)
    runs = memory.measure(rig, MESSAGES, FLEET, rounds=1, outage_s=1, rate=3_000)
    ((flat_out,), (outage,)) = runs
    assert (flat_out.messages, outage.messages) == (MESSAGES, 9_000)
    for run in (flat_out, outage):
        assert 0 < min(run.resident) <= max(run.resident) <= run.peak < 1_000 * memory.MB
    # It does not grow with what is published meanwhile, which is the broker's to keep.
    assert outage.peak < 2 * flat_out.peak
    assert_shown(memory.tables(runs, outage_s=1))


def test_daemons_share_the_messages_without_deadlocks(rig: Rig) -> None:
    runs = workers.measure(rig, MESSAGES, FLEET, rounds=1, sizes=(1, 2))
    for size, (run,) in runs.items():
        assert len(run.received) == size
        assert sum(run.received) == MESSAGES
        assert run.deadlocks == 0
    assert runs[2][0].fairness > 0.1
    assert runs[2][0].rate > 0.1 * runs[1][0].rate
    assert_shown([workers.table(runs)])


def test_tables_go_to_their_place_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "performance.md"
    file.write_text("# Before\n<!-- bench:one -->\nold\n<!-- /bench:one -->\nafter <!-- bench:two -->\n")
    shown = report.Table(("side", "rate"), [("a", str(report.spread([3.0, 1.0, 2.0]))), ("b", report.count(12_345))])
    report.publish("one", [shown], ["A note."], "Conditions.", file)
    table = "| side |             rate |\n| ---- | ---------------: |\n| a    | 2.00 (1.00–3.00) |\n"  # noqa: RUF001
    text = table + "| b    |           12,345 |\n\nA note.\n\nConditions."
    expected = f"# Before\n<!-- bench:one -->\n{text}\n<!-- /bench:one -->\nafter <!-- bench:two -->\n"
    assert file.read_text() == expected
    assert capsys.readouterr().out == text + "\n"
    # Again, it replaces itself.
    report.publish("one", [shown], ["A note."], "Conditions.", file)
    assert file.read_text() == expected


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_file_without_the_place_is_refused_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "performance.md"
    file.write_text("<!-- bench:two -->\n")
    with pytest.raises(SystemExit):
        report.parse(report.arguments("", 5), name, ["--write", str(file)])
    assert f"does not have the lines <!-- bench:{name} --> and <!-- /bench:{name} -->" in capsys.readouterr().err


def assert_shown(tables: list[report.Table]) -> None:
    """Every row has a cell for each column, and every cell a figure, or a dash where there is none."""
    for table in tables:
        for row in table.rows:
            assert len(row) == len(table.header)
            assert all(cell == report.NONE or any(map(str.isdigit, cell)) for cell in row[1:]), row
