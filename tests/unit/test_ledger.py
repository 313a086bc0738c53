"""The ledger on disk: whole messages or none, whatever happens to the process, the disk, or the name of the file."""

import errno
import inspect
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simulator import ledger
from simulator.ledger import ACKS_STEP, MESSAGES_MAX, LedgerError, LedgerWriter, Outcome, acks_path
from simulator.messages import SLOT_BYTES, Fate, Message, Reading, SlotType, letter_entry, reading_entry
from simulator.truth import read

HEADER: dict[str, Any] = {
    "format": 1,
    "meters": 1,
    "vehicles": 1,
    "meter_ids": ["MTR-000001"],
    "vehicle_ids": ["VEH-000001"],
    "topic_root": "energy/v1",
    "seed": 1,
}


def message(number: int) -> Message:
    return Message(0, number, 0, "topic", b"", reading_entry(number, Reading(0, 0, number, 5, 2300, 0, 0), Fate.STORED))


def batch(start: int, count: int) -> list[Message]:
    """Messages of one slot and of several: the child of the kill test has a copy of this function."""
    found = []
    for number in range(start, start + count):
        entries = reading_entry(number, Reading(0, 1, number, number % 7, 500, 200, 1), Fate.STORED)
        if number % 5 == 0:
            body = b'{"topic": "t/%d", "reason": "malformed", "payload": "%b", "part": false}' % (number, b"AAAA" * 30)
            entries = letter_entry(number, 0, Fate.REJECTED, body)
        found.append(Message(0, number, 0, "topic", b"", entries))
    return found


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path, header in ((one, HEADER), (other, dict(reversed(HEADER.items())))):
        with LedgerWriter(path, header) as writer:
            writer.record(batch(0, 20))
            writer.record(batch(20, 1))
            writer.settle(3, Outcome.ACKNOWLEDGED)
    assert one.read_bytes() == other.read_bytes()
    assert acks_path(one).read_bytes() == acks_path(other).read_bytes()


def test_how_messages_come_in_batches_does_not_show(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    with LedgerWriter(one, HEADER) as writer:
        writer.record(batch(0, 20))
    with LedgerWriter(other, HEADER) as writer:
        for at in range(20):
            writer.record(batch(at, 1))
            writer.record([])
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("outcomes", "ended", "acks"),
    [
        ([], True, False),
        ([1, 1, 1], True, False),
        ([1, 3, 1], True, True),
        ([1, 2, 1], False, True),
        ([1, 0, 1], False, True),
    ],
)
def test_the_end_says_that_everything_was_acknowledged(
    tmp_path: Path, outcomes: list[int], *, ended: bool, acks: bool
) -> None:
    path = tmp_path / "ledger"
    with LedgerWriter(path, HEADER) as writer:
        writer.record(batch(0, len(outcomes)))
        for number, outcome in enumerate(outcomes):
            writer.settle(number, outcome)
    assert (path.read_bytes()[-1] == SlotType.END) is ended
    assert acks_path(path).exists() is acks
    books = read(path).books
    assert books.messages == len(outcomes)
    assert [books.in_doubt, books.refused, books.unheard] == [outcomes.count(at) for at in (0, 2, 3)]


def test_closing_again_and_after_an_error_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    writer = LedgerWriter(path, HEADER)
    writer.record(batch(0, 4))
    writer.settle(2, Outcome.ACKNOWLEDGED)
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    content = path.read_bytes(), acks_path(path).read_bytes()
    writer.close()
    assert (path.read_bytes(), acks_path(path).read_bytes()) == content
    assert read(path).books.in_doubt == 3


def test_a_ledger_that_was_deleted_meanwhile_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "fleet.ledger"
    writer = LedgerWriter(path, HEADER)
    writer.record(batch(0, 3))
    path.unlink()
    with pytest.raises(LedgerError, match="was deleted while it was written"):
        writer.close()
    writer.close()


def test_the_acknowledgements_grow_with_the_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ACKS_STEP", 4096)
    path = tmp_path / "ledger"
    with LedgerWriter(path, HEADER) as writer:
        for at in range(0, 20_000, 50):
            writer.record([message(number) for number in range(at, at + 50)])
            writer.settle(at, Outcome.REFUSED)
            writer.settle(at + 49, Outcome.ACKNOWLEDGED)
    books = read(path).books
    assert (books.messages, books.refused, books.in_doubt) == (20_000, 400, 20_000 - 800)


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"precious")
    with pytest.raises(LedgerError, match=r"ledger exists, .* move it away or name a new file"):
        LedgerWriter(path, HEADER)
    assert path.read_bytes() == b"precious"
    assert not acks_path(path).exists()


def test_acknowledgements_of_another_ledger_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    acks_path(path).write_bytes(b"\1")
    with pytest.raises(LedgerError, match=r"ledger\.acks exists"):
        LedgerWriter(path, HEADER)
    assert acks_path(path).read_bytes() == b"\1"
    assert not path.exists()


def test_of_two_writers_at_once_one_wins(tmp_path: Path) -> None:
    for attempt in range(20):
        path = tmp_path / f"ledger-{attempt}"
        results: list[object] = []
        gate = threading.Barrier(4)

        def write(path: Path = path, results: list[object] = results, gate: threading.Barrier = gate) -> None:
            gate.wait()
            try:
                writer = LedgerWriter(path, HEADER)
            except LedgerError as error:
                results.append(error)
            else:
                writer.record(batch(0, 3))
                results.append(writer)

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [result for result in results if isinstance(result, LedgerWriter)]
        assert len(results) == 4
        assert len(winners) == 1
        winners[0].close()
        assert read(path).books.messages == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("-", "is a file, which '-' is not"),
        ("", "is a file, which '.' is not"),
        ("/", "is a file, which '/' is not"),
        ("/no/such/directory/ledger", "no directory to be in: make /no/such/directory first"),
        ("/dev/null/ledger", "no directory"),
        ("a\0b", "no name of a file"),
        ("x" * 300, "cannot be made"),
    ],
)
def test_a_name_that_cannot_be_a_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LedgerError, match=says):
        LedgerWriter(Path(name), HEADER)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root, who runs tests in containers, may write anywhere
    with pytest.raises(LedgerError, match=r"cannot be made \(Permission denied\)"):
        LedgerWriter(tmp_path / "ledger", HEADER)


def test_a_full_disk_leaves_whole_batches_and_the_run_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with LedgerWriter(path, HEADER) as writer:
        writer.record([message(number) for number in range(10)])
        before = path.read_bytes()
        rest = [message(number) for number in range(10, 2 * ACKS_STEP // SLOT_BYTES)]
        with (
            file_size_limit(ACKS_STEP + 100),
            pytest.raises(LedgerError, match=r"too large\): make room, .* the 10 messages in it are whole"),
        ):
            writer.record(rest)
        assert path.read_bytes() == before
        writer.record(rest)
        for number in range(2 * ACKS_STEP // SLOT_BYTES):
            writer.settle(number, Outcome.ACKNOWLEDGED)
    assert read(path).books.stored == 2 * ACKS_STEP // SLOT_BYTES


def test_a_disk_too_full_for_the_beginning_is_left_as_it_was(tmp_path: Path) -> None:
    with file_size_limit(ACKS_STEP - 1), pytest.raises(LedgerError, match="make room"):
        LedgerWriter(tmp_path / "ledger", HEADER)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_for_more_acknowledgements_keeps_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with LedgerWriter(path, HEADER) as writer:
        writer.record(batch(0, 10))
        before = path.read_bytes()
        with file_size_limit(ACKS_STEP + 100), pytest.raises(LedgerError, match="make room"):
            writer.record([message(ACKS_STEP)])
        assert path.read_bytes() == before
        assert acks_path(path).stat().st_size == ACKS_STEP
        writer.settle(4, Outcome.ACKNOWLEDGED)
    assert read(path).books.in_doubt == 9


def test_a_disk_too_full_for_the_end_keeps_the_acknowledgements(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    writer = LedgerWriter(path, HEADER)
    fits = ACKS_STEP // SLOT_BYTES - path.stat().st_size // SLOT_BYTES
    writer.record([message(number) for number in range(fits)])
    for number in range(fits):
        writer.settle(number, Outcome.ACKNOWLEDGED)
    with file_size_limit(ACKS_STEP):
        writer.close()
    assert path.read_bytes()[-1] == SlotType.READING
    truth = read(path)
    assert truth.complete
    assert truth.books.messages == fits


def test_a_write_that_the_system_takes_in_pieces_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    with LedgerWriter(whole, HEADER) as writer:
        writer.record(batch(0, 100))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: pwrite(file, content[: 1 + len(content) // 3], at))
    with LedgerWriter(pieces, HEADER) as writer:
        writer.record(batch(0, 100))
    assert pieces.read_bytes() == whole.read_bytes()


def test_a_ledger_is_full_before_its_numbers_are(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with LedgerWriter(path, HEADER) as writer:
        before = path.read_bytes()
        with pytest.raises(LedgerError, match="is full with 0 messages: begin another run"):
            writer.record([message(MESSAGES_MAX)])
        assert path.read_bytes() == before


WRITER = """
import os, sys
from pathlib import Path
from simulator.ledger import LedgerWriter
from simulator.messages import Fate, Message, Reading, letter_entry, reading_entry

{batch}

with LedgerWriter(Path(sys.argv[1]), {header}) as writer:
    number = 0
    while True:
        size = 1 + number * 7 % 300
        writer.record(batch(number, size))
        for at in range(number, number + size):
            if at % 11:
                writer.settle(at, 1)
        number += size
        os.write(1, b"%d\\n" % number)
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_leaves_whole_messages_and_every_acknowledgement(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "ledger"
    script = WRITER.format(batch=inspect.getsource(batch), header=HEADER)
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        lines: list[bytes] = [first]
        reader = threading.Thread(target=lambda: lines.extend(iter(child.stdout.readline, b"")))  # type: ignore[union-attr]
        reader.start()
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        child.kill()
        reader.join()
    settled = int(lines[-1])

    truth = read(path)
    assert truth.books.messages >= settled > 0
    expected = b"".join(said.entries for said in batch(0, truth.books.messages + 1))
    entries = path.read_bytes()[_header_bytes() :]
    assert expected.startswith(entries)
    assert not truth.complete
    acks = acks_path(path).read_bytes()
    assert all(acks[number] == (1 if number % 11 else 0) for number in range(settled))
    assert len(acks) >= truth.books.messages
    assert truth.books.stored + truth.books.rejected == truth.books.messages


def _header_bytes() -> int:
    text = json.dumps(HEADER, sort_keys=True)
    return SLOT_BYTES * (1 + -(-len(text) // (SLOT_BYTES - 1)))
