"""The command `simulate` as a whole: its output, its endings and its ledger, against a real Mosquitto."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridge.services import PrivateMosquitto
from simulator.ledger import END_SLOT, HEADER_SLOT, acks_path
from simulator.messages import LETTER_SLOT, READING_SLOT, SLOT_BYTES, Encoder, Reading, SlotType
from tests.integration.witness import PATIENCE_S, Witness

DEVICES = 20


def command(broker: Any, root: str, *arguments: object) -> list[str]:
    given = ["--host", broker.host, "--port", broker.port, "--topic-root", root, *arguments]
    given += ["--meters", DEVICES // 2, "--vehicles", DEVICES // 2]
    return [sys.executable, "-m", "simulator", *map(str, given)]


def run(broker: Any, root: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(broker, root, *arguments), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def a_month_ago() -> str:
    return f"{datetime.now(UTC) - timedelta(days=30):%Y-%m-%dT%H:%MZ}"


class Ledger(NamedTuple):
    """A ledger, read without the help of those who write or judge it."""

    header: dict[str, Any]
    payloads: dict[int, bytes]
    messages: set[int]
    ended: int | None
    torn: int

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        data = path.read_bytes()
        slots = [data[at : at + SLOT_BYTES] for at in range(0, len(data) - SLOT_BYTES + 1, SLOT_BYTES)]
        _, length, kind = HEADER_SLOT.unpack(slots[0])
        assert kind == SlotType.HEADER
        bodies = itertools.takewhile(lambda slot: slot[-1] == SlotType.BODY, slots[1:])
        header = json.loads(b"".join(slot[:-1] for slot in bodies)[:length])
        ids = [[f"{kind}-{i:06d}" for i in range(1, DEVICES // 2 + 1)] for kind in ("MTR", "VEH")]
        encoder = Encoder(*ids, header["topic_root"])
        payloads, messages, ended = {}, set(), None
        for slot in slots[1:]:
            if slot[-1] == SlotType.READING:
                number, *reading, _fate, _ = READING_SLOT.unpack(slot)
                payloads[number] = encoder.payload(Reading(0, *reading))
                messages.add(number)
            elif slot[-1] == SlotType.LETTER:
                messages.add(LETTER_SLOT.unpack(slot)[0])
            elif slot[-1] == SlotType.END:
                ended = END_SLOT.unpack(slot)[0]
        return cls(header, payloads, messages, ended, len(data) % SLOT_BYTES)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "run.ledger"


def test_a_broker_that_never_comes_leaves_no_ledger(unused_tcp_port: int, ledger: Path) -> None:
    nobody = [sys.executable, "-m", "simulator", "--port", str(unused_tcp_port), "--for", "1s", "--ledger", str(ledger)]
    for connections in ("1", "per-device"):
        command = [*nobody, "--connections", connections]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1, done.stderr
        assert "connection refused" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(ledger.parent.iterdir()) == []


def test_a_fleet_that_catches_up_with_the_clock_says_so(broker: Any, topic_root: str) -> None:
    start = f"{datetime.now(UTC) - timedelta(minutes=5):%Y-%m-%dT%H:%MZ}"
    done = run(broker, topic_root, "--flat-out", "--start", start, "--for", "2s")
    assert done.stderr.count("caught up with the clock") == 1


def test_it_ends_when_nobody_reads_its_output(broker: Any, topic_root: str) -> None:
    with subprocess.Popen(
        command(broker, topic_root, "--rate", 50, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert "the output cannot be written" in said
    assert "Traceback" not in said


@pytest.fixture
def heard(broker: Any, topic_root: str) -> Iterator[Witness]:
    """Somebody who is subscribed."""
    with Witness(broker.host, broker.port, topic_root) as witness:
        yield witness


def test_it_reports_json_and_ends_on_a_signal(broker: Any, topic_root: str) -> None:
    with subprocess.Popen(
        command(broker, topic_root, "--speedup", 60, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        last = json.loads(process.stdout.readlines()[-1])
    assert process.returncode == 0
    assert "final" not in first
    assert last["final"] is True
    assert last["published"] == last["acknowledged"] == last["readings"] >= first["acknowledged"] > 0
    assert last["ledger"] is None


def test_a_broker_that_never_comes_exits_with_1(unused_tcp_port: int) -> None:
    nobody = [sys.executable, "-m", "simulator", "--port", str(unused_tcp_port), "--for", "1s", "--flat-out"]
    with subprocess.Popen([*nobody, "--messages", "5"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "connection refused" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in rest


def test_the_same_seed_gives_the_same_ledger_byte_for_byte(
    broker: Any, topic_root: str, tmp_path: Path, heard: Witness
) -> None:
    same = ("--all-faults", "--start", a_month_ago(), "--messages", 5_000, "--json")
    ways = [("--flat-out",), ("--flat-out", "--window", 3, "--connections", 1), ("--rate", 4_000)]
    ways += [("--flat-out", "--connections", "per-device")]
    files = []
    for number, way in enumerate(ways):
        files.append(tmp_path / f"{number}.ledger")
        done = run(broker, topic_root, *same, *way, "--ledger", files[-1])
        last = json.loads(done.stdout.splitlines()[-1])
        assert (last["published"], last["acknowledged"], last["ledger"]) == (5_000, 5_000, str(files[-1]))
        assert last["readings"] == sum(slot == SlotType.READING for slot in files[-1].read_bytes()[31::32])
        assert not acks_path(files[-1]).exists()
    assert len({file.read_bytes() for file in files}) == 1
    found = Ledger.read(files[0])
    assert (found.ended, found.messages) == (5_000, set(range(5_000)))
    assert found.header["faults"]["outages"] > 0
    assert (found.header["topic_root"], found.header["seed"], found.header["interval_s"]) == (topic_root, 1, 60.0)


def test_a_killed_run_has_everything_in_its_ledger_that_was_sent(
    broker: Any, topic_root: str, ledger: Path, heard: Witness
) -> None:
    arguments = ("--flat-out", "--start", a_month_ago(), "--ledger", ledger)
    with subprocess.Popen(command(broker, topic_root, *arguments), stderr=subprocess.DEVNULL) as process:
        assert heard.wait_until(lambda: len(heard.received) > 3_000)
        process.kill()
    found = Ledger.read(ledger)
    assert found.ended is None
    acks = acks_path(ledger).read_bytes()
    acknowledged = {number for number in found.payloads if acks[number] == 1}
    assert len(acknowledged) > 1_000
    assert not any(acks[len(found.payloads) :])
    # The broker has what it acknowledged; to the witness it may still be on its way.
    sent = {found.payloads[number] for number in acknowledged}
    deadline = time.monotonic() + PATIENCE_S
    while not sent <= (received := {payload for _, payload in heard.received}) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sent <= received <= set(found.payloads.values())


def test_ctrl_c_ends_the_ledger(broker: Any, topic_root: str, ledger: Path, heard: Witness) -> None:
    arguments = ("--rate", 500, "--ledger", ledger)
    with subprocess.Popen(command(broker, topic_root, *arguments), stderr=subprocess.PIPE, text=True) as process:
        heard.wait_for(100)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0
    assert f"wattbridge verify {ledger}" in said
    found = Ledger.read(ledger)
    assert found.ended == len(found.payloads) == len({payload for _, payload in heard.received})


def test_a_second_ctrl_c_leaves_the_ledger_as_after_a_kill(topic_root: str, ledger: Path) -> None:
    with PrivateMosquitto() as broker, Witness(broker.host, broker.port, topic_root) as witness:
        arguments = ("--rate", 500, "--ledger", ledger)
        with subprocess.Popen(command(broker, topic_root, *arguments), stderr=subprocess.PIPE, text=True) as process:
            witness.wait_for(100)
            broker.kill(signal.SIGSTOP)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            said = process.stderr.read()
        broker.kill(signal.SIGCONT)
    assert process.returncode == 1
    assert "stopped at once" in said
    assert "Traceback" not in said
    found = Ledger.read(ledger)
    acks = acks_path(ledger).read_bytes()[: len(found.payloads)]
    assert found.ended is None
    assert 0 in acks
    assert acks.count(1) >= 90


def test_a_ledger_that_exists_is_not_touched_and_nothing_is_sent(
    broker: Any, topic_root: str, ledger: Path, heard: Witness
) -> None:
    ledger.write_text("precious")
    done = run(broker, topic_root, "--flat-out", "--messages", 10, "--ledger", ledger, code=1)
    assert "precious" not in done.stderr
    assert str(ledger) in done.stderr
    assert ledger.read_text() == "precious"
    assert not heard.received


def test_a_full_disk_ends_the_run_with_what_was_sent_acknowledged(
    broker: Any, topic_root: str, ledger: Path, heard: Witness
) -> None:
    whole = command(broker, topic_root, "--flat-out", "--start", a_month_ago(), "--ledger", ledger)
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *whole]  # blocks of 512 bytes: 1 MiB
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert str(ledger) in done.stderr
    assert "Traceback" not in done.stderr
    found = Ledger.read(ledger)
    assert len(found.payloads) > 10_000
    assert found.torn == 0
    heard.wait_for(len(found.payloads))
    assert {payload for _, payload in heard.received} == set(found.payloads.values())
    if found.ended is None:
        assert set(acks_path(ledger).read_bytes()[: len(found.payloads)]) == {1}


def test_who_is_turned_away_can_try_again_with_the_same_ledger(topic_root: str, ledger: Path) -> None:
    with PrivateMosquitto("allow_anonymous false") as broker:
        for _ in range(2):
            done = run(broker, topic_root, "--flat-out", "--messages", 10, "--ledger", ledger, code=1)
            assert "not authorized" in done.stderr
    assert not list(ledger.parent.iterdir())


def test_unheard_messages_are_noted(broker: Any, topic_root: str, ledger: Path) -> None:
    done = run(broker, topic_root, "--flat-out", "--messages", 100, "--ledger", ledger)
    assert "100 of them had no subscriber" in done.stderr
    assert set(acks_path(ledger).read_bytes()[:100]) == {3}
