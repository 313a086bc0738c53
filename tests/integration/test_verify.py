"""`wattbridge verify`: a database that is right is a match, and whatever is changed in it is named."""

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from bridge import verify as verification
from bridge.batch import Batch
from bridge.config import Database
from bridge.errors import Rejection, WattbridgeError
from bridge.messages import SECOND, Limits, decode_status, decode_telemetry
from bridge.store import Store
from bridge.topics import Channel, Topics
from bridge.verify import Options
from bridge.verify_letters import canonical
from bridge.verify_report import Verdict, print_json, print_table
from simulator.faults import FaultConfig, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.ledger import LedgerWriter, Outcome, acks_path
from simulator.messages import SLOT_BYTES, Encoder, Fate, Message, Reading, SlotType, reading_entry
from simulator.truth import Letter, Truth, read
from tests.integration.harness import Reply, ask, cloned, empty_database, wattbridge, wattbridge_here

START = datetime(2026, 1, 10, 23, 40, tzinfo=UTC)
ARRIVAL = round((START.timestamp() + 86_400) * SECOND)
MESSAGES = 6_000
FAULTS = replace(FaultConfig.everything(), outages=30, spoiled=1)
TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
Verify = Callable[..., Reply]


class Run(NamedTuple):
    """A ledger and the messages that it is about."""

    ledger: Path
    messages: list[Message]
    truth: Truth


def fleet_messages() -> list[Message]:
    fleet = Fleet(FleetConfig(start=START, meters=30, vehicles=40, seed=7, shared_share=0.2))
    stream = (message for message in messages(fleet, FAULTS) if isinstance(message, Message))
    return [next(stream) for _ in range(MESSAGES)]


def write(path: Path, sent: list[Message], unanswered: int = 0, silent: Collection[int] = ()) -> Run:
    """Writes a ledger in which the last messages, or those of some numbers, were never acknowledged."""
    config = Fleet(FleetConfig(start=START, meters=30, vehicles=40, seed=7, shared_share=0.2)).config
    header = {
        "meters": 30,
        "vehicles": 40,
        "meter_ids": config.meter_ids,
        "vehicle_ids": config.vehicle_ids,
        "topic_root": config.topic_root,
    }
    with LedgerWriter(path, header) as ledger:
        ledger.record(sent)
        for message in sent[: len(sent) - unanswered]:
            if message.number in silent:
                continue
            ledger.settle(message.number, Outcome.ACKNOWLEDGED)
    return Run(path, sent, read(path))


@pytest.fixture(scope="module")
def sent() -> list[Message]:
    return fleet_messages()


@pytest.fixture
def run(sent: list[Message], tmp_path: Path) -> Run:
    return write(tmp_path / "fleet.ledger", sent)


@pytest.fixture(scope="module")
def filled(postgres_dsn_admin: str, template: str, sent: list[Message]) -> Iterator[str]:
    """The name of a database in which is what the fleet has sent, to be cloned."""
    with cloned(postgres_dsn_admin, template) as dsn:
        asyncio.run(store(dsn, sent))
        yield str(conninfo_to_dict(dsn)["dbname"])


@pytest.fixture
def full(postgres_dsn_admin: str, filled: str, run: Run) -> Iterator[str]:
    """The DSN of a database for one test, in which is what the ledger of the run is about."""
    with cloned(postgres_dsn_admin, filled) as dsn:
        yield dsn


@pytest.fixture
def verify(request: pytest.FixtureRequest, tmp_path: Path) -> Verify:
    """Judges the database of the test; as a process of its own where that is the point."""
    database = request.getfixturevalue("full" if "full" in request.fixturenames else "database")

    def command(*arguments: str, dsn: str = database, wait: str = "0", process: bool = False) -> Reply:
        env = {"PATH": "/usr/bin:/bin", "WATTBRIDGE_DATABASE__DSN": dsn}
        ledger = str(tmp_path / "fleet.ledger")
        command = wattbridge if process else wattbridge_here
        return command("verify", ledger, "--wait", wait, *arguments, env=env, cwd=tmp_path)

    return command


async def store(dsn: str, sent: list[Message]) -> None:
    """The data path of the bridge without a broker, each message a delivery."""
    writer = Store(Database(dsn=dsn), "test-verify")  # type: ignore[arg-type]
    await writer.open()
    batch = Batch(TOPICS)
    for message in sent:
        try:
            kind, device, channel = TOPICS.parse(message.topic)
        except Rejection as rejection:
            batch.add_rejection(rejection, "", message.topic, message.payload, None, ARRIVAL)
            continue
        try:
            if channel is Channel.STATUS:
                batch.add_presence(decode_status(kind, device, message.payload, ARRIVAL))
                continue
            for item in decode_telemetry(kind, device, message.payload, None, ARRIVAL, Limits()):
                if isinstance(item, Rejection):
                    batch.add_rejection(item, device, message.topic, message.payload, None, ARRIVAL)
                else:
                    batch.add_reading(item)
        except Rejection as rejection:
            batch.add_rejection(rejection, device, message.topic, message.payload, None, ARRIVAL)
        if len(batch) >= 500:
            await writer.write(batch)
            batch = Batch(TOPICS)
    await writer.write(batch)
    await writer.close()


def checks(reply: Reply) -> dict[str, dict[str, Any]]:
    """The checks of a JSON verdict that do not match, by name."""
    return {check["check"]: check for check in json.loads(reply.out)["checks"] if not check["match"]}


def named(reply: Reply, kind: str, device: str, ts: str | None = None) -> dict[str, Any]:
    """The one difference of this kind about this device."""
    found = [
        difference
        for check in checks(reply).values()
        for difference in check["differences"]
        if difference["kind"] == kind and difference["device"] == device and ts in {None, difference["ts"]}
    ]
    assert found, reply.out
    return found[0]


def named_in(reply: Reply, check: str, device: str) -> dict[str, Any]:
    """The first altered thing of a device in one check."""
    return next(
        one for one in checks(reply)[check]["differences"] if (one["kind"], one["device"]) == ("altered", device)
    )


def rfc3339(moment: datetime) -> str:
    text = moment.astimezone(UTC).isoformat()
    return (text[:-6].rstrip("0").rstrip(".") if "." in text else text[:-6]) + "Z"


def middle(dsn: str, table: str, where: str = "true") -> tuple[Any, ...]:
    """Device and timestamp of some row of a table, not at its edges."""
    key = f"{table.partition('_')[0]}_id"
    query = f"SELECT {key}, ts FROM {table} WHERE {where} ORDER BY md5({key} || ts) LIMIT 1"
    return ask(dsn, query)[0]


def change(dsn: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert connection.execute(statement, parameters).rowcount == 1, statement


# --- a match -----------------------------------------------------------------------------------------------


def test_what_the_bridge_stores_is_a_match(run: Run, full: str, verify: Verify) -> None:
    books = run.truth.books
    assert min(books.stored, books.duplicates, books.conflicts, books.rejected) > 0
    assert any(letter.part and letter.reason != "conflict" for letter in run.truth.letters)
    text, said = verify(process=True), verify("--json", process=True)
    assert (text.code, said.code) == (0, 0), text.out
    verdict = json.loads(said.out)
    assert verdict["match"]
    found = {check["check"]: check["found"] for check in verdict["checks"]}
    assert found["meter history"] + found["vehicle history"] == books.stored
    assert found["dead letters"] == books.conflicts + books.rejected
    assert found["charging sessions"] > 10
    assert verdict["books"]["redelivered"] == 0
    assert text.out.splitlines()[-1].startswith("MATCH")
    assert said.err == ""


@pytest.mark.parametrize("kind", ["meter", "vehicle"])
async def test_a_fleet_of_one_kind_is_a_match(
    sent: list[Message], kind: str, tmp_path: Path, database: str, verify: Verify
) -> None:
    some = [one for one in sent if one.topic.startswith(f"energy/v1/{kind}/")][:500]
    entries = [b"".join(renumbered(one.entries, number)) for number, one in enumerate(some)]
    stream = [one._replace(number=number, entries=entries[number]) for number, one in enumerate(some)]
    run = write(tmp_path / "fleet.ledger", stream)
    await store(database, run.messages)
    reply = verify()
    assert reply.code == 0, reply.out


def renumbered(entries: bytes, number: int) -> Iterator[bytes]:
    """The slots of a message as of the message with another number."""
    for at in range(0, len(entries), SLOT_BYTES):
        slot = entries[at : at + SLOT_BYTES]
        yield slot if slot[-1] == SlotType.BODY else number.to_bytes(4, "little") + slot[4:]


def test_the_writer_role_may_verify(full: str, verify: Verify) -> None:
    assert verify(dsn=f"{full} options='-c role=wattbridge_writer'").code == 0


# --- each corruption ---------------------------------------------------------------------------------------

ULP = "float8 '1.0000000000000002'"
ROWS = [
    ("delete", "meter_history", "DELETE FROM {table}", "missing"),
    ("delete", "vehicle_history", "DELETE FROM {table}", "missing"),
    ("ulp", "meter_history", f"UPDATE {{table}} SET voltage = voltage * {ULP}", "altered"),
    ("tick", "meter_history", "UPDATE {table} SET kwh_ac = kwh_ac + 0.0001", "altered"),
    ("tick", "vehicle_history", "UPDATE {table} SET kwh_dc = kwh_dc + 0.0001", "altered"),
    ("soc", "vehicle_history", "UPDATE {table} SET soc = soc / 2 + 0.01", "altered"),
    ("temperature", "vehicle_history", "UPDATE {table} SET battery_temp = battery_temp + 0.1", "altered"),
    ("meter", "vehicle_history", "UPDATE {table} SET meter_id = 'MTR-000099'", "altered"),
    ("no meter", "vehicle_history", "UPDATE {table} SET meter_id = NULL", "altered"),
    ("nan", "meter_history", "UPDATE {table} SET kwh_ac = 'NaN'", "altered"),
    ("infinity", "vehicle_history", "UPDATE {table} SET kwh_dc = 'Infinity'", "altered"),
    ("microsecond", "meter_history", "UPDATE {table} SET ts = ts + interval '1 microsecond'", "missing"),
    ("device", "vehicle_history", "UPDATE {table} SET vehicle_id = 'VEH-999999'", "missing"),
    ("turn back", "meter_live", "UPDATE {table} SET ts = ts - interval '1 minute'", "not the newest"),
    ("turn back", "vehicle_live", "UPDATE {table} SET ts = ts - interval '1 minute'", "not the newest"),
    ("ahead", "vehicle_live", "UPDATE {table} SET ts = ts + interval '1 minute'", "altered"),
    ("delete", "meter_live", "DELETE FROM {table}", "missing"),
    ("delete", "vehicle_live", "DELETE FROM {table}", "missing"),
    ("value", "meter_live", "UPDATE {table} SET voltage = voltage + 0.1", "altered"),
    ("value", "vehicle_live", "UPDATE {table} SET soc = soc / 2 + 0.01", "altered"),
]


@pytest.mark.parametrize(
    ("table", "statement", "kind"), [row[1:] for row in ROWS], ids=[f"{r[0]}-{r[1]}" for r in ROWS]
)
def test_a_row_that_is_not_as_it_must_be(full: str, verify: Verify, table: str, statement: str, kind: str) -> None:
    where = (
        "meter_id IS NOT NULL AND kwh_dc > 0"
        if table == "vehicle_history"
        else "voltage > 0"
        if "meter" in table
        else "true"
    )
    device, ts = middle(full, table, where)
    key = f"{table.partition('_')[0]}_id"
    change(full, f"{statement.format(table=table)} WHERE {key} = %s AND ts = %s", device, ts)
    text, said = verify(), verify("--json")
    assert (text.code, said.code) == (1, 1)
    check = checks(said)[table.replace("_", " ")]
    moved = kind == "missing" and statement.startswith("UPDATE")
    assert check["counts"] == {kind: 1} | ({"surplus": 1} if moved else {})
    named(said, kind, device, rfc3339(ts))
    assert f"{device}  {rfc3339(ts)}" in text.out
    assert text.out.splitlines()[-1].startswith("NO MATCH")


@pytest.mark.parametrize("device", ["MTR-000007", "MTR-999999", 'it\'s "me"\n'])
def test_a_row_too_many(full: str, verify: Verify, device: str) -> None:
    change(
        full,
        "INSERT INTO meter_history VALUES (%s, '2026-01-10 23:59:59.5Z', 'Infinity', 'NaN', now(), false)",
        device,
    )
    change(full, "UPDATE ingest_counter SET stored = stored + 1, received = received + 1")
    text, said = verify(), verify("--json")
    assert (text.code, said.code) == (1, 1)
    found = named(said, "surplus", device, "2026-01-10T23:59:59.5Z")["found"]
    assert (found["kwh_ac"], found["voltage"]) == ("inf", "nan")
    assert "2026-01-10T23:59:59.5Z" in text.out
    overlooked = verify("--allow-other-devices")
    assert overlooked.code == (0 if device != "MTR-000007" else 1), overlooked.out


@pytest.mark.parametrize("table", ["meter", "vehicle"])
def test_timestamps_without_end_are_surplus(full: str, verify: Verify, table: str) -> None:
    ask(full, f"CREATE TABLE forever PARTITION OF {table}_history FOR VALUES FROM ('2300-01-01') TO (MAXVALUE)")
    (device,) = ask(full, f"SELECT {table}_id FROM {table}_live ORDER BY 1 LIMIT 1")[0]
    values = "1, 230" if table == "meter" else "1, 50, 20, 'MTR-000001'"
    for ts in ("infinity", "290000-01-01"):
        change(full, f"INSERT INTO {table}_history VALUES (%s, %s, {values}, now(), false)", device, ts)
    said = verify("--json")
    assert said.code == 1
    named(said, "surplus", device, "infinity")
    named(said, "surplus", device, "290000-01-01T00:00:00Z")
    assert verify().code == 1


def test_live_rows_that_nobody_expects(full: str, verify: Verify) -> None:
    change(full, "INSERT INTO meter_live VALUES ('MTR-777777', now(), 1, 230, now())")
    said = verify("--json")
    assert said.code == 1
    named(said, "surplus", "MTR-777777")


def test_sums_that_overflow_are_a_difference(full: str, verify: Verify) -> None:
    ask(full, "UPDATE meter_history SET kwh_ac = 1.7e308")
    said = verify("--json")
    assert said.code == 1
    assert "out of range" in json.dumps(checks(said)["energy by meter"])


# --- dead letters ------------------------------------------------------------------------------------------


def some_letter(dsn: str, where: str) -> tuple[Any, ...]:
    query = f"SELECT digest, device_id, reason FROM dead_letter WHERE {where} ORDER BY digest LIMIT 1"
    return ask(dsn, query)[0]


LETTERS = {
    "whole": "reason = 'malformed' AND device_id <> ''",
    "conflict": "reason = 'conflict'",
}


@pytest.mark.parametrize("which", LETTERS)
@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM dead_letter", "missing"),
        ("UPDATE dead_letter SET reason = 'wrong_type'", "wrong reason"),
        ("UPDATE dead_letter SET payload = payload || '}'", "altered"),
        ("UPDATE dead_letter SET device_id = 'MTR-000000'", "altered"),
    ],
)
def test_a_dead_letter_that_is_not_as_it_must_be(
    full: str, verify: Verify, which: str, statement: str, kind: str
) -> None:
    digest, device, _ = some_letter(full, LETTERS[which])
    change(full, f"{statement} WHERE digest = %s", digest)
    text, said = verify(), verify("--json")
    assert (text.code, said.code) == (1, 1)
    check = checks(said)["dead letters"]
    assert check["counts"] == {kind: 1}
    assert check["differences"][0]["device"] == device
    assert device in text.out


def test_only_a_part_may_be_written_in_other_words(run: Run, full: str, verify: Verify) -> None:
    in_json = [one for one in run.truth.letters if one.reason not in {"malformed", "conflict"} and one.device_id]
    whole = next(one for one in in_json if not one.part)
    part = next(one for one in in_json if one.part)
    for letter in (whole, part):
        update = "UPDATE dead_letter SET payload = payload || ' ' WHERE topic = %s AND reason = %s AND payload = %s"
        payload = letter.payload if letter is whole else stored_payload(full, letter)
        change(full, update, letter.topic, letter.reason, payload)
    said = verify("--json")
    assert checks(said)["dead letters"]["counts"] == {"altered": 1}
    named(said, "altered", whole.device_id)


def stored_payload(dsn: str, letter: Letter) -> bytes:
    rows = ask(dsn, "SELECT payload FROM dead_letter WHERE topic = %s AND reason = %s", letter.topic, letter.reason)
    return next(payload for (payload,) in rows if canonical(payload) == canonical(letter.payload))


def test_dead_letters_of_other_fleets_may_be_overlooked(full: str, verify: Verify) -> None:
    insert = "INSERT INTO dead_letter VALUES (%s, 'x', %s, 'what?', NULL, 'malformed', '', now())"
    change(full, insert, "MTR-999999", "energy/v1/meter/MTR-999999/telemetry")
    change(full, "UPDATE ingest_counter SET dead_lettered = dead_lettered + 1, received = received + 1")
    assert checks(verify("--json"))["dead letters"]["counts"] == {"surplus": 1}
    assert verify("--allow-other-devices").code == 0


def test_a_dead_letter_too_many_and_one_that_is_a_reading(run: Run, full: str, verify: Verify) -> None:
    message = next(one for one in run.messages if one.payload.startswith(b'{"meterId"') and b"kwh" in one.payload)
    device = message.topic.split("/")[3]
    insert = "INSERT INTO dead_letter VALUES (%s, %s, %s, %s, NULL, 'out_of_range', '', now())"
    change(full, insert, device, b"1", message.topic, message.payload)
    change(full, insert, device, b"2", message.topic, b"what is this?")
    said, text = verify("--json"), verify()
    assert (said.code, text.code) == (1, 1)
    assert checks(said)["dead letters"]["counts"] == {"wrongly rejected": 1, "surplus": 1}
    rejected = named(said, "wrongly rejected", device)
    assert rejected["ts"] == rfc3339(datetime.fromisoformat(json.loads(message.payload)["timestamp"]))
    assert rejected["found"]["reason"] == "out_of_range"
    assert "what is this?" in text.out


# --- counters and analytics --------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "wrong"), [("received", 1), ("stored", 2), ("dead_lettered", 2)])
def test_counters_that_are_off_by_one(full: str, verify: Verify, counter: str, wrong: int) -> None:
    change(full, f"UPDATE ingest_counter SET {counter} = {counter} + 1")
    text, said = verify(), verify("--json")
    assert (text.code, said.code) == (1, 1)
    assert [*checks(said)] == ["counters"]
    assert checks(said)["counters"]["altered"] == wrong
    assert counter in text.out


def test_analytics_are_computed_by_the_database(full: str, verify: Verify) -> None:
    """A tick too much in one reading shows up in each figure that it is part of."""
    device, ts = middle(full, "vehicle_history", "meter_id IS NOT NULL AND kwh_dc > 0")
    change(full, "UPDATE vehicle_history SET kwh_dc = kwh_dc + 0.0001 WHERE vehicle_id = %s AND ts = %s", device, ts)
    said = verify("--json")
    assert {"energy by vehicle", "charging sessions"} <= set(checks(said))
    by_vehicle = checks(said)["energy by vehicle"]["differences"][0]
    assert by_vehicle["device"] == device
    assert by_vehicle["found"]["dc"] - by_vehicle["expected"]["dc"] == pytest.approx(0.0001)
    session = checks(said)["charging sessions"]["differences"][0]
    assert [*session["found"]] == [*session["expected"]] == ["dc"]
    assert set(by_vehicle["found"]) <= {"dc", "matched_dc", "efficiency"}


def test_a_silent_minute_moves_all_that_follows_from_it(full: str, verify: Verify) -> None:
    """Without one meter's reading that minute is nobody's; what a vehicle says it got stays as it is."""
    query = """SELECT meter_id, metered.ts, vehicle_id
               FROM meter_history AS metered JOIN vehicle_history USING (meter_id)
               WHERE kwh_ac > 0 AND date_trunc('minute', vehicle_history.ts) = date_trunc('minute', metered.ts)
               AND (SELECT count(*) FROM vehicle_history AS other WHERE other.meter_id = metered.meter_id
                    AND date_trunc('minute', other.ts) = date_trunc('minute', metered.ts)) = 1
               AND (SELECT count(*) FROM meter_history AS other WHERE other.meter_id = metered.meter_id
                    AND date_trunc('minute', other.ts) = date_trunc('minute', metered.ts)) = 1
               ORDER BY 1, 2 LIMIT 1"""
    meter, ts, vehicle = ask(full, query)[0]
    change(full, "DELETE FROM meter_history WHERE meter_id = %s AND ts = %s", meter, ts)
    said = verify("--json")
    assert {"readings", "minutes", "ac", "matched_ac"} == set(named_in(said, "energy by meter", meter)["found"])
    by_vehicle = named_in(said, "energy by vehicle", vehicle)
    assert (
        {"minutes", "matched_ac", "matched_dc", "efficiency"} >= set(by_vehicle["found"]) >= {"minutes", "matched_ac"}
    )
    assert by_vehicle["expected"]["minutes"] - by_vehicle["found"]["minutes"] == 1
    assert [*named_in(said, "charging sessions", vehicle)["found"]] == ["ac"]


@pytest.mark.parametrize("late_ms", [0, 1])
async def test_a_session_bears_a_quarter_of_an_hour_of_silence(
    late_ms: int, tmp_path: Path, database: str, verify: Verify
) -> None:
    config = Fleet(FleetConfig(start=START, meters=30, vehicles=40, seed=7)).config
    encoder = Encoder(config.meter_ids, config.vehicle_ids, config.topic_root)
    stream = []
    for number in range(3):
        ts = round(START.timestamp() * 1_000) + number * (15 * 60_000) + (late_ms if number == 2 else 0)
        reading = Reading(0, 30, ts, 1_000, 5_000 + number, 250, 1)
        entry = reading_entry(number, reading, Fate.STORED)
        stream.append(Message(0, number, 30, encoder.topics[30], encoder.payload(reading), entry))
    await store(database, write(tmp_path / "fleet.ledger", stream).messages)
    said = verify("--json")
    assert said.code == 0, said.out
    found = {check["check"]: check["found"] for check in json.loads(said.out)["checks"]}
    assert found["charging sessions"] == 1 + late_ms


def test_sums_without_end_are_no_match(full: str, verify: Verify) -> None:
    device, ts = middle(full, "meter_history")
    change(full, "UPDATE meter_history SET kwh_ac = 'Infinity' WHERE meter_id = %s AND ts = %s", device, ts)
    said = verify("--json")
    assert named_in(said, "energy by meter", device)["found"]["ac"] == "inf"
    assert said.err == ""


# --- the schema's own analytics, and its rollups -----------------------------------------------------------


def roll_up(dsn: str, until: str = "(SELECT max(ts) FROM meter_history) + interval '1 day'") -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"SELECT rollup_advance({until})")
        step = "SELECT complete_until < late_before OR marks_left > 0 FROM rollup_refresh('1 hour', 50)"
        while connection.execute(step).fetchone() != (False,):
            pass


def verdict_of(run: Run, dsn: str) -> Verdict:
    return verification.verify(run.ledger, dsn, Options(wait_s=0), say=print, progress=lambda _: None)


def columns_that_differ(verdict: Verdict, check: str) -> dict[str | None, set[str]]:
    """Of each device that is altered in a check, the columns."""
    (found,) = (one for one in verdict.checks if one.name == check)
    return {one.device: set(one.found or {}) for one in found.differences if one.kind == "altered"}


def test_the_schema_is_asked_for_its_own_analytics(run: Run, full: str, verify: Verify) -> None:
    ask(full, OTHER)
    asked = {
        "": "by the schema's own functions",
        " options='-c search_path=other'": "by plain SQL over history",
        # Functions of another schema have another history.
        " options='-c search_path=other,public'": "by plain SQL over history",
        " options='-c role=wattbridge_writer'": (
            "by plain SQL over history, as this role may not call the schema's own functions"
        ),
    }
    for options, how in asked.items():
        verdict = verdict_of(run, full + options)
        assert (verdict.match, verdict.analytics) == (True, how)
    assert "analytics: by the schema's own functions" in verify().out.splitlines()
    assert json.loads(verify("--json").out)["analytics"] == asked[""]


def test_a_function_that_is_wrong_is_a_difference(run: Run, full: str) -> None:
    """What is asked are the functions, not history: it is right, and they are not."""
    wrong = "SELECT replace(pg_get_functiondef(oid), 'SELECT CASE', 'SELECT CASE WHEN true THEN ''no'' ') FROM pg_proc"
    ((statement,),) = ask(full, f"{wrong} WHERE proname = 'efficiency_reason'")
    ask(full, statement)
    verdict = verdict_of(run, full)
    assert [check.name for check in verdict.checks if not check.match] == ["energy by vehicle"]
    assert {*map(frozenset, columns_that_differ(verdict, "energy by vehicle").values())} == {frozenset({"efficiency"})}
    assert verdict.hints == []


@pytest.mark.parametrize("least_kwh", ["0.001", "0.1", "3"])
def test_an_efficiency_is_there_exactly_where_the_schema_gives_one(run: Run, full: str, least_kwh: str) -> None:
    ask(full, f"UPDATE analytics_setting SET efficiency_least_kwh = {least_kwh}")
    given = ask(full, "SELECT efficiency IS NULL, count(*) FROM fleet_performance('-infinity') GROUP BY 1")
    assert {without for without, _ in given} == {True, False}
    assert verdict_of(run, full).match


async def test_rollups_change_no_answer(run: Run, database: str) -> None:
    """None, some, all, and such as late readings have made untrue since."""
    half = len(run.messages) // 2
    await store(database, run.messages[:half])
    roll_up(database, "(SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY ts) FROM meter_history)")
    roll_up(database)
    await store(database, run.messages[half:])
    (marked,) = ask(database, "SELECT count(*) FROM rollup_mark WHERE kind = 'meter'")[0]
    assert marked > 10
    assert verdict_of(run, database).match
    ask(database, "SELECT rollup_refresh('6 hours', 10)")
    (left,) = ask(database, "SELECT count(*) FROM rollup_mark")[0]
    assert left > 10
    assert verdict_of(run, database).match
    roll_up(database)
    assert verdict_of(run, database).match
    (behind,) = ask(
        database, "SELECT rollup_restart(percentile_disc(0.5) WITHIN GROUP (ORDER BY ts)) FROM meter_history"
    )[0]
    assert behind < ask(database, "SELECT max(ts) FROM meter_history")[0][0]
    assert verdict_of(run, database).match


ROLLUPS = [
    ("vehicle_quarter_hour", "readings = readings {} 1", {"energy by vehicle": {"readings"}}),
    ("vehicle_quarter_hour", "kwh_dc = kwh_dc {} 0.0001", {"energy by vehicle": {"dc"}}),
    ("meter_quarter_hour", "readings = readings {} 1", {"energy by meter": {"readings"}}),
    ("meter_quarter_hour", "kwh_ac = kwh_ac {} 0.0001", {"energy by meter": {"ac"}}),
    ("charging_two_hours", "minutes = minutes {} 1",
     {"energy by vehicle": {"minutes"}, "energy by meter": {"minutes"}}),
    ("charging_two_hours", "matched_ac = matched_ac {} 0.0001",
     {"energy by vehicle": {"matched_ac", "efficiency"}, "energy by meter": {"matched_ac"}}),
    ("charging_two_hours", "matched_dc = matched_dc {} 0.0001", {"energy by vehicle": {"matched_dc", "efficiency"}}),
    ("charging_quarter_hour", "readings = readings {} 1", {"charging sessions": {"readings"}}),
    ("charging_quarter_hour", "kwh_dc = kwh_dc {} 0.0001", {"charging sessions": {"dc"}}),
    ("charging_quarter_hour", "matched_ac = matched_ac {} 0.0001", {"charging sessions": {"ac"}}),
]  # fmt: skip


def test_a_rollup_that_is_not_true_is_named(run: Run, full: str) -> None:
    roll_up(full)
    # Of a vehicle that has an efficiency, and of its meter.
    query = "SELECT vehicle_id, meters[1] FROM fleet_performance('-infinity') WHERE cardinality(meters) = 1 AND "
    vehicle, meter = ask(full, f"{query} efficiency < 0.95 AND kwh_ac > 1 ORDER BY 1 LIMIT 1")[0]
    for table, wrong, differs in ROLLUPS:
        key, device = ("meter_id", meter) if table.startswith("meter") else ("vehicle_id", vehicle)
        hour = "two_hours" if table == "charging_two_hours" else "quarter_hour"
        first = f"(SELECT min({hour}) FROM {table} WHERE {key} = '{device}')"
        update = f"UPDATE {table} SET {wrong} WHERE {key} = '{device}' AND {hour} = {first}"
        change(full, update.format("+"))
        verdict = verdict_of(run, full)
        change(full, update.format("-"))
        assert {one.name for one in verdict.checks if not one.match} == set(differs), (table, wrong)
        for check, columns in differs.items():
            named_device = meter if check == "energy by meter" else vehicle
            assert columns_that_differ(verdict, check) == {named_device: columns}, (table, wrong)
    assert verdict_of(run, full).match


@pytest.mark.parametrize("kind", ["meter", "vehicle"])
async def test_a_mark_that_is_lost_is_a_difference(run: Run, database: str, kind: str) -> None:
    half = len(run.messages) // 2
    await store(database, run.messages[:half])
    roll_up(database)
    await store(database, run.messages[half:])
    assert verdict_of(run, database).match
    (device,) = ask(database, "SELECT min(device_id) FROM rollup_mark WHERE kind = %s", kind)[0]
    ask(database, "DELETE FROM rollup_mark WHERE kind = %s AND device_id = %s", kind, device)
    verdict = verdict_of(run, database)
    assert "readings" in columns_that_differ(verdict, f"energy by {kind}")[device]


CIRCUMSTANCES = {
    "assigned": "INSERT INTO charger_assignment SELECT vehicle_id, 'MTR-000001', '(,)' FROM vehicle_live",
    "naming rule": "UPDATE analytics_setting SET vehicle_prefix = 'VEH-', meter_prefix = 'MTR-'",
    "session_gap": "UPDATE analytics_setting SET session_gap = '1 day'",
}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_what_the_ledger_cannot_know_is_a_note(run: Run, full: str, circumstance: str) -> None:
    ask(full, CIRCUMSTANCES[circumstance])
    verdict = verdict_of(run, full)
    rightly = [hint for hint in verdict.hints if "may rightly differ" in hint]
    assert not verdict.match
    assert len(rightly) == 1
    assert circumstance in rightly[0]
    assert verdict_of(run, f"{full} options='-c role=wattbridge_writer'").match


def test_where_nothing_differs_there_is_no_note(run: Run, full: str) -> None:
    ask(full, "INSERT INTO charger_assignment VALUES ('VEH-999999', 'MTR-999999', '[2026-01-01, 2027-01-01)')")
    verdict = verdict_of(run, full)
    assert (verdict.match, verdict.hints) == (True, [])


# --- what is in doubt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrived", [0, 1, 20, 200])
async def test_what_was_never_acknowledged_may_be_there_or_not(
    sent: list[Message], tmp_path: Path, database: str, verify: Verify, arrived: int
) -> None:
    run = write(tmp_path / "fleet.ledger", sent, unanswered=200)
    assert acks_path(run.ledger).exists()
    assert not run.truth.complete
    await store(database, run.messages[: len(sent) - 200 + arrived])
    reply = verify()
    assert reply.code == 0, reply.out
    assert "never acknowledged" in reply.out


async def test_what_is_in_doubt_must_be_right_if_it_is_there(
    sent: list[Message], tmp_path: Path, database: str, verify: Verify
) -> None:
    run = write(tmp_path / "fleet.ledger", sent, unanswered=200)
    await store(database, run.messages)
    rows = run.truth.meter_rows
    row = int((~rows.certain).argmax())
    device, ts = run.truth.ids[rows.device[row]], datetime.fromtimestamp(rows.ts[row] / 1e6, UTC)
    change(database, "UPDATE meter_history SET voltage = 1 WHERE meter_id = %s AND ts = %s", device, ts)
    said = verify("--json")
    assert said.code == 1
    named(said, "altered", device, rfc3339(ts))


async def test_doubt_about_some_rows_excuses_no_other(
    sent: list[Message], tmp_path: Path, database: str, verify: Verify
) -> None:
    """The live row goes on to be right where history has lost the reading, which it had for certain."""
    run = write(tmp_path / "fleet.ledger", sent, unanswered=200)
    await store(database, run.messages[: len(sent) - 200])
    device, ts = middle(database, "meter_live")
    change(database, "DELETE FROM meter_history WHERE meter_id = %s AND ts = %s", device, ts)
    said = verify("--json")
    named(said, "missing", device, rfc3339(ts))
    assert "meter live" not in checks(said)


CLASH = START + timedelta(minutes=5)
FIRST, SECOND_ONE, THIRD = (1_000, 2_300, 0, 0), (2_000, 2_310, 0, 0), (3_000, 2_320, 0, 0)
AT_FIRST, AT_SECOND = (1_000, 5_000, 250, 1), (1_000, 5_000, 250, 2)


def clash(kind: str, values: Sequence[tuple[int, int, int, int]]) -> list[Message]:
    """Messages of one device with one timestamp, the later ones in conflict with the first; then one of another."""
    config = Fleet(FleetConfig(start=START, meters=30, vehicles=40, seed=7)).config
    encoder = Encoder(config.meter_ids, config.vehicle_ids, config.topic_root)
    device = 0 if kind == "meter" else 30
    stream = []
    for number, value in enumerate([*values, (1, 2_300, 0, 0)]):
        last = number == len(values)
        at = 1 if last else device
        reading = Reading(0, at, round(CLASH.timestamp() * 1_000), *value)
        fate = Fate.CONFLICT if number and not last else Fate.STORED
        entry = reading_entry(number, reading, fate)
        stream.append(Message(0, number, at, encoder.topics[at], encoder.payload(reading), entry))
    return stream


@pytest.mark.parametrize(("kind", "values"), [("meter", (FIRST, SECOND_ONE)), ("vehicle", (AT_FIRST, AT_SECOND))])
@pytest.mark.parametrize("arrived", [(0, 1, 2), (0, 2), (1, 2), (2,), ()], ids=str)
async def test_of_two_readings_in_doubt_either_may_be_the_one(
    kind: str, values: Any, arrived: Any, tmp_path: Path, database: str, verify: Verify
) -> None:
    run = write(tmp_path / "fleet.ledger", clash(kind, values), unanswered=3)
    await store(database, [run.messages[at] for at in arrived])
    reply = verify()
    assert reply.code == 0, reply.out


@pytest.mark.parametrize(("kind", "values"), [("meter", (FIRST, SECOND_ONE)), ("vehicle", (AT_FIRST, AT_SECOND))])
async def test_what_is_in_doubt_may_not_be_a_third_thing(
    kind: str, values: Any, tmp_path: Path, database: str, verify: Verify
) -> None:
    run = write(tmp_path / "fleet.ledger", clash(kind, values), unanswered=3)
    await store(database, run.messages[1:])
    wrong = "kwh_ac = kwh_ac + 0.0001 WHERE meter_id = 'MTR-000001'" if kind == "meter" else "meter_id = 'MTR-000003'"
    change(database, f"UPDATE {kind}_history SET {wrong}")
    said = verify("--json")
    assert said.code == 1
    altered = checks(said)[f"{kind} history"]
    assert altered["counts"] == {"altered": 1}
    assert [*altered["differences"][0]["expected"]] != []


@pytest.mark.parametrize(
    ("silent", "arrived", "counts"),
    [
        ({1, 3}, (1, 0, 2, 3), {"altered": 1}),  # the first was acknowledged: it is the one
        ({0}, (2, 0, 1, 3), {"altered": 1}),  # the second was acknowledged, before the third was sent
        ({0}, (1, 2, 3), {}),
    ],
    ids=str,
)
async def test_what_came_for_certain_bounds_the_doubt(
    silent: set[int], arrived: Any, counts: dict[str, int], tmp_path: Path, database: str, verify: Verify
) -> None:
    run = write(tmp_path / "fleet.ledger", clash("meter", (FIRST, SECOND_ONE, THIRD)), silent=silent)
    await store(database, [run.messages[at] for at in arrived])
    said = verify("--json")
    assert checks(said).get("meter history", {"counts": {}})["counts"] == counts, said.out


async def test_what_is_certain_may_not_be_the_conflict(tmp_path: Path, database: str, verify: Verify) -> None:
    run = write(tmp_path / "fleet.ledger", clash("meter", (FIRST, SECOND_ONE)))
    await store(database, [run.messages[at] for at in (1, 0, 2)])
    said = verify("--json")
    assert said.code == 1
    assert checks(said)["meter history"]["counts"] == {"altered": 1}
    named(said, "altered", "MTR-000001", rfc3339(CLASH))


# --- the surroundings --------------------------------------------------------------------------------------


def test_an_empty_database_lacks_everything(run: Run, verify: Verify) -> None:
    said = verify("--json", "--show", "3")
    assert said.code == 1
    history = checks(said)["meter history"]
    assert history["missing"] == history["expected"] > 3
    assert len(history["differences"]) == 3
    assert "is it the right one?" in said.out


def test_what_cannot_be_read_is_one_line(run: Run, postgres_dsn_admin: str, verify: Verify, tmp_path: Path) -> None:
    with empty_database(postgres_dsn_admin) as empty:
        reply = verify(dsn=empty)
        assert (reply.code, reply.out) == (1, "")
        assert "Is it the right database?" in reply.err
    nowhere = verify("--dsn", "host=127.0.0.1 port=1")
    assert (nowhere.code, len(nowhere.err.splitlines())) == (1, 1)
    run.ledger.write_bytes(b"what is this?")
    reply = verify()
    assert (reply.code, reply.out, len(reply.err.splitlines())) == (1, "", 1)
    assert "no ledger" in reply.err
    run.ledger.unlink()
    assert verify().code == 1
    assert verify("--wait", "soon").code == 2
    assert verify("--dsn", "hunter2@localhost").code == 2
    for secret in ("password", "sslpassword"):
        shown = verify("--dsn", f"host=127.0.0.1 port=1 {secret}=hunter2")
        assert shown.code == 2
        assert "PGPASSFILE" in shown.err
        assert "hunter2" not in shown.err


def test_another_bridge_is_judged_through_views(full: str, verify: Verify) -> None:
    with psycopg.connect(full, autocommit=True) as connection:
        for statement in (
            "CREATE SCHEMA other",
            "CREATE VIEW other.meter_history AS SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_history",
            """CREATE VIEW other.vehicle_history AS SELECT vehicle_id, ts AT TIME ZONE 'UTC' AS ts, kwh_dc, soc,
               battery_temp, meter_id::varchar FROM public.vehicle_history""",
            "CREATE VIEW other.meter_live AS SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_live",
            "CREATE VIEW other.vehicle_live AS TABLE public.vehicle_live",
            "CREATE VIEW other.dead_letter AS SELECT device_id, topic, payload, reason FROM public.dead_letter",
        ):
            connection.execute(statement)
    again = (
        "CREATE OR REPLACE VIEW other.meter_history AS SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_history"
    )
    other = f"{full} options='-c search_path=other'"
    reply = verify(dsn=other)
    assert reply.code == 0, reply.out
    assert "counters" not in reply.out
    ask(full, f"{again} UNION ALL SELECT 'MTR-000001', NULL, NULL, NULL")
    assert verify("--json", dsn=other).code == 1
    one_again = "SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_history LIMIT 1"
    ask(full, f"{again} UNION ALL ({one_again})")
    twice = verify("--json", dsn=other)
    assert checks(twice)["meter history"]["counts"] == {"surplus": 1}


OTHER = """
CREATE SCHEMA other;
CREATE VIEW other.meter_history AS SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_history;
CREATE VIEW other.vehicle_history AS SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id
    FROM public.vehicle_history;
CREATE VIEW other.meter_live AS SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_live;
CREATE VIEW other.vehicle_live AS SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id FROM public.vehicle_live;
CREATE VIEW other.dead_letter AS SELECT device_id, topic, payload, reason FROM public.dead_letter;
"""


@pytest.fixture
def other(full: str) -> str:
    """The DSN of what another bridge says, so far the same as ours."""
    ask(full, OTHER)
    return f"{full} options='-c search_path=other'"


def replace_view(dsn: str, view: str, query: str) -> None:
    ask(dsn, f"DROP VIEW other.{view}; CREATE VIEW other.{view} AS {query}")


SAME = [
    ("meter_history", "SELECT meter_id, ts AT TIME ZONE 'UTC' AS ts, kwh_ac, voltage FROM public.meter_history"),
    ("meter_history", "SELECT meter_id, ts, kwh_ac::numeric, voltage::numeric(9, 1) FROM public.meter_history"),
    ("meter_history", "SELECT meter_id::char(20), ts, kwh_ac, voltage::real FROM public.meter_history"),
    ("vehicle_live", "SELECT vehicle_id, ts, kwh_dc::text, soc, battery_temp, meter_id FROM public.vehicle_live"),
    ("dead_letter", "SELECT device_id::varchar, topic::varchar, payload, reason::varchar FROM public.dead_letter"),
]


@pytest.mark.parametrize(("view", "query"), SAME)
def test_another_bridge_may_have_other_types(full: str, other: str, verify: Verify, view: str, query: str) -> None:
    replace_view(full, view, query)
    reply = verify("--json", dsn=other)
    wrong = checks(reply)
    if "real" in query:  # which has not the digits of every voltage
        assert {name: set(check["counts"]) for name, check in wrong.items()} == {"meter history": {"altered"}}
    else:
        assert reply.code == 0, reply.out


@pytest.mark.parametrize(
    ("view", "query", "message"),
    [
        ("meter_history", "SELECT 1 AS meter_id, ts, kwh_ac, voltage FROM public.meter_history", "text = integer"),
        ("meter_live", "SELECT meter_id, ts, kwh_ac FROM public.meter_live", "voltage does not exist"),
        ("meter_live", "SELECT meter_id, ts, 1e400 AS kwh_ac, voltage FROM public.meter_live", "out of range"),
        ("vehicle_live", "SELECT vehicle_id, 1 AS ts, kwh_dc, soc, battery_temp, meter_id FROM public.vehicle_live",
         "invalid input syntax"),
        ("dead_letter", "SELECT device_id, topic, '[]'::jsonb AS payload, reason FROM public.dead_letter",
         "must be bytea or text"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_clear_line(
    full: str, other: str, verify: Verify, view: str, query: str, message: str
) -> None:
    replace_view(full, view, query)
    reply = verify(dsn=other)
    assert (reply.code, reply.out, len(reply.err.splitlines())) == (1, "", 1)
    assert message in reply.err


def test_a_database_is_not_changed_by_looking(full: str, other: str, verify: Verify) -> None:
    """Not even where a view of another bridge would do it."""
    ask(full, "CREATE SEQUENCE other.looks")
    rows = "SELECT meter_id, ts, kwh_ac, voltage FROM public.meter_live"
    replace_view(full, "meter_live", f"{rows} WHERE nextval('other.looks') > 0")
    reply = verify(dsn=other)
    assert reply.code == 1
    assert "read-only" in reply.err


ROW = {
    "meter_history": {"meter_id": "'MTR-000001'", "ts": "now()", "kwh_ac": "1.0", "voltage": "230.0"},
    "vehicle_history": {
        "vehicle_id": "'VEH-000001'",
        "ts": "now()",
        "kwh_dc": "1.0",
        "soc": "50.0",
        "battery_temp": "20.0",
        "meter_id": "'MTR-000001'",
    },
}


NULLS = [
    (view.replace("history", which), column) for view in ROW for which in ("history", "live") for column in ROW[view]
]


def judge(run: Run, dsn: str) -> dict[str, dict[str, Any]]:
    """The checks that do not match; both outputs must cope with them."""
    verdict = verification.verify(run.ledger, dsn, Options(wait_s=0), say=print, progress=lambda _: None)
    print_table(verdict)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_json(verdict)
    return {check["check"]: check for check in json.loads(out.getvalue())["checks"] if not check["match"]}


def test_null_in_a_row_too_many(run: Run, full: str, other: str) -> None:
    for table, column in NULLS:
        row = ROW[table.replace("live", "history")] | {column: "NULL"}
        values = ", ".join(
            f"{value}::{'text' if name.endswith('_id') else 'timestamptz' if name == 'ts' else 'float8'}"
            for name, value in row.items()
        )
        same = f"SELECT {', '.join(row)} FROM public.{table}"
        replace_view(full, table, f"{same} UNION ALL SELECT {values}")
        assert judge(run, other)[table.replace("_", " ")]["counts"] == {"surplus": 1}, (table, column)
        replace_view(full, table, same)


def test_null_where_a_value_must_be(run: Run, full: str, other: str) -> None:
    for table, column in NULLS:
        row = ROW[table.replace("live", "history")]
        key = next(iter(row))
        device, ts = middle(full, table, "meter_id IS NOT NULL")
        there = f"CASE WHEN ({key}, ts) = ('{device}', '{ts.isoformat()}') THEN NULL ELSE {column} END AS {column}"
        columns = ", ".join(there if name == column else name for name in row)
        replace_view(full, table, f"SELECT {columns} FROM public.{table}")
        check = judge(run, other)[table.replace("_", " ")]
        if column == key or (column == "ts" and "history" in table):
            wrong = {"missing": 1, "surplus": 1}
        else:
            wrong = {"not the newest" if column == "ts" else "altered": 1}
        assert check["counts"] == wrong, (table, column)
        assert check["differences"][0]["device"] == device
        replace_view(full, table, f"SELECT {', '.join(row)} FROM public.{table}")


def test_null_in_dead_letters(run: Run, full: str, other: str) -> None:
    every = "SELECT device_id, topic, payload, reason FROM public.dead_letter"
    for column in ("device_id", "topic", "payload", "reason"):
        one = f"{every} WHERE reason = 'malformed' AND device_id <> '' LIMIT 1".replace(column, "NULL", 1)
        replace_view(full, "dead_letter", f"{every} UNION ALL ({one})")
        assert judge(run, other)["dead letters"]["surplus"] == 1


@pytest.mark.parametrize("table", ["meter_history", "vehicle_live"])
def test_a_view_without_a_key_may_have_rows_twice(full: str, other: str, verify: Verify, table: str) -> None:
    row = ", ".join(ROW[table.replace("live", "history")])
    device, ts = middle(full, table)
    where = f"{row.partition(',')[0]} = '{device}' AND ts = '{ts.isoformat()}'"
    replace_view(
        full, table, f"SELECT {row} FROM public.{table} UNION ALL SELECT {row} FROM public.{table} WHERE {where}"
    )
    reply = verify("--json", dsn=other)
    assert checks(reply)[table.replace("_", " ")]["counts"] == {"surplus": 1}
    named(reply, "surplus", device, rfc3339(ts))


HOSTILE = [
    "it's",
    'a "b"',
    "new\nline",
    "\x1b[2J\x1b]0;x\x07",
    "\x9b31m",
    "[red]x[/red]",
    "[/]",
    "\u202eabc",
    "",
    "x" * 5_000,
]


def test_names_that_would_disturb_a_terminal(full: str, verify: Verify) -> None:
    device, ts = middle(full, "vehicle_history", "meter_id IS NOT NULL")
    for name in HOSTILE:
        row = (name, "2026-01-10 23:59:59.5Z", 1, 50, 20, name)
        change(full, "INSERT INTO vehicle_history VALUES (%s, %s, %s, %s, %s, %s, now(), false)", *row)
        change(full, "INSERT INTO meter_live VALUES (%s, now(), 1, 230, now())", name)
        letter = (name, name.encode(), name, name.encode(), name)
        change(full, "INSERT INTO dead_letter VALUES (%s, %s, %s, %s, NULL, %s, '', now())", *letter)
    where = "WHERE vehicle_id = %s AND ts = %s"
    change(full, f"UPDATE vehicle_history SET meter_id = %s {where}", HOSTILE[3], device, ts)
    text, said = verify("--show", "50"), verify("--json", "--show", "50")
    assert (text.code, said.code) == (1, 1)
    assert all(line.isprintable() for line in text.out.splitlines())
    assert max(len(line) for line in text.out.splitlines()) < 3_000
    assert "[red]x[/red]" in text.out
    assert said.out.removesuffix("\n").isprintable()
    wrong = checks(said)
    assert {one["device"] for one in wrong["meter live"]["differences"]} == set(HOSTILE)
    surplus = [one for one in wrong["vehicle history"]["differences"] if one["kind"] == "surplus"]
    assert {one["device"] for one in surplus} == {one["found"]["meter_id"] for one in surplus} == set(HOSTILE)
    altered = named(said, "altered", device, rfc3339(ts))
    assert [*altered["found"].items()] == [("meter_id", HOSTILE[3])]
    assert wrong["dead letters"]["counts"] == {"surplus": len(HOSTILE)}


def test_dead_letters_that_are_almost_readings(run: Run, full: str, verify: Verify) -> None:
    payload = next(one for one in run.messages if one.payload.startswith(b'{"vehicleId"')).payload
    reading = json.loads(payload)
    almost = [
        *(reading | {"soc": soc} for soc in ([], {}, [reading["soc"]], None, str(reading["soc"]), 1e400, 10**400)),
        *(reading | {"meterId": meter} for meter in ("MTR-000099", "", 1, [], None)),
        *(reading | {"timestamp": ts} for ts in (1, [], "soon", "0001-01-01T00:00:00+23:59", "2026-01-10")),
        [[reading]],
    ]
    payloads = [
        *(json.dumps(one).encode() for one in almost),
        b"[" * 100_000,
        b"\xff",
        b'"\\ud800"',
        b"1e400",
        b"1" * 5_000,
    ]
    for number, garbage in enumerate(payloads):
        row = (reading["vehicleId"], str(number).encode(), "a/topic", garbage)
        change(full, "INSERT INTO dead_letter VALUES (%s, %s, %s, %s, NULL, 'wrong_type', '', now())", *row)
    said = verify("--json")
    assert checks(said)["dead letters"]["counts"] == {"surplus": len(payloads)}
    assert verify("--show", "50").code == 1


# --- while others are at work ------------------------------------------------------------------------------


def test_everything_is_read_in_one_snapshot(run: Run, full: str) -> None:

    def interfere(step: str) -> None:
        if step in {"meter live", "vehicle history", "compare history"}:
            ask(full, "DELETE FROM meter_history; DELETE FROM vehicle_history; DELETE FROM ingest_counter")

    verdict = verification.verify(run.ledger, full, Options(wait_s=0), say=print, progress=interfere)
    assert verdict.match
    after = verification.verify(run.ledger, full, Options(wait_s=0), say=print, progress=interfere)
    assert not after.match


async def test_a_ledger_that_grows_is_not_judged(run: Run, database: str, tmp_path: Path) -> None:
    half = len(run.messages) // 2
    path = tmp_path / "growing.ledger"
    growing = LedgerWriter(path, read(run.ledger).header)
    growing.record(run.messages[:half])
    await store(database, run.messages)

    def grow(step: str) -> None:
        if step == "counters":
            growing.record(run.messages[half:])

    with pytest.raises(WattbridgeError, match=r"growing\.ledger has grown .* still at work"):
        verification.verify(path, database, Options(), say=print, progress=grow)
    verdict = verification.verify(path, database, Options(), say=print, progress=lambda _: None)
    assert verdict.match  # nothing of it is acknowledged yet, but all of it is right
    assert any("never acknowledged" in hint for hint in verdict.hints)
    growing.close()


async def test_what_comes_while_it_judges_is_judged_again(run: Run, database: str) -> None:
    """With the rows of another fleet there are enough from the start."""
    half = len(run.messages) // 2
    await store(database, run.messages[:half])
    ask(database, "UPDATE ingest_counter SET stored = stored + 100000, received = received + 100000")
    rest = [run.messages[half:]]
    said: list[str] = []

    def arrive(step: str) -> None:
        if step == "counters" and rest:
            late = rest.pop()
            thread = threading.Thread(target=lambda: asyncio.run(store(database, late)))
            thread.start()
            thread.join()

    verdict = verification.verify(run.ledger, database, Options(), say=said.append, progress=arrive)
    assert [check.name for check in verdict.checks if not check.match] == ["counters"]
    assert len(said) == 1


async def test_it_waits_while_the_bridge_is_at_work(run: Run, database: str, verify: Verify) -> None:
    half = len(run.messages) // 2
    await store(database, run.messages[:half])
    assert verify().code == 1

    def later() -> None:
        time.sleep(1)
        asyncio.run(store(database, run.messages[half:]))

    thread = threading.Thread(target=later)
    thread.start()
    reply = verify(wait="60s")
    thread.join()
    assert reply.code == 0, reply.out
    assert "waiting" in reply.err
    assert len(reply.err.splitlines()) == 1


def test_without_numpy_it_says_what_to_install(run: Run, database: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')\n")
    env = {"PATH": "/usr/bin:/bin", "WATTBRIDGE_DATABASE__DSN": database, "PYTHONPATH": str(tmp_path)}
    reply = wattbridge("verify", str(run.ledger), env=env, cwd=tmp_path)
    assert reply.code == 1
    assert "pip install numpy" in reply.err
    assert wattbridge("--help", env=env, cwd=tmp_path).code == 0
