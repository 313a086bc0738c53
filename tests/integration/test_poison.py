"""Whatever is published, good readings are stored, and each bad one is a dead letter with its bytes."""

import json
from datetime import timedelta
from pathlib import Path

import pytest

from tests.integration.harness import (
    Address,
    Daemon,
    Publisher,
    ask,
    check_books,
    letters,
    meter,
    meter_history,
    now,
    one,
    rfc3339,
    stored,
    vehicle,
    wait_for_received,
    wait_until,
)

TS = rfc3339(now())
GOOD = meter("MTR-1", now())


def text(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


# Payload by name, and the reason it gets. Where the reason is None the reading is taken.
PAYLOADS: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "malformed"),
    "blanks": (b" \n\t", "malformed"),
    "nul": (b"\0", "malformed"),
    "nul-inside": (b'{"voltage":\x00 230}', "malformed"),
    "nul-in-id": (text(meterId="MTR\0"), "id_mismatch"),
    "nul-in-timestamp": (text(timestamp="2026\x00"), "invalid_timestamp"),
    "nul-escaped-in-key": (text(**{"\0": "\0"}), None),
    "wrong-utf-8": (b'{"meterId": "\xff\xfe"}', "malformed"),
    "wrong-utf-8-start": (b"\xc3\x28", "malformed"),
    "lone-surrogate": (b'{"meterId": "\\ud800"}', "malformed"),
    "utf-16": (json.dumps(GOOD).encode("utf-16"), "malformed"),
    "bom": (b"\xef\xbb\xbf{}", "malformed"),
    "nan": (b'{"kwhConsumedAc": NaN, "voltage": 230}', "out_of_range"),
    "infinity": (b'{"kwhConsumedAc": Infinity, "voltage": 230}', "out_of_range"),
    "nan-in-array": (b'[{"kwhConsumedAc": NaN, "voltage": 230}]', "out_of_range"),
    "1e400": (b'{"kwhConsumedAc": 1e400, "voltage": 230}', "out_of_range"),
    "googol": (b'{"kwhConsumedAc": 1%s, "voltage": 230}' % (b"0" * 100), "out_of_range"),
    "5000-digits": (b'{"kwhConsumedAc": %s, "voltage": 230}' % (b"9" * 5_000), "malformed"),
    "huge-timestamp": (text(timestamp=10**30), "invalid_timestamp"),
    "huge-negative-timestamp": (text(timestamp=-(10**30)), "invalid_timestamp"),
    "year-0": (text(timestamp="0000-01-01T00:00:00Z"), "invalid_timestamp"),
    "year-9999": (text(timestamp="9999-12-31T23:59:59Z"), "timestamp_in_future"),
    "nan-timestamp": (b'{"kwhConsumedAc": 1, "voltage": 230, "timestamp": NaN}', "invalid_timestamp"),
    "no-zone": (text(timestamp="2026-02-10T14:47:24"), "invalid_timestamp"),
    "negative": (text(kwhConsumedAc=-0.001), "out_of_range"),
    "over-the-cap": (text(voltage=1_001), "out_of_range"),
    "text-for-number": (text(voltage="230"), "wrong_type"),
    "boolean-for-number": (text(voltage=True), "wrong_type"),
    "null-for-number": (text(voltage=None), "wrong_type"),
    "missing": (b'{"kwhConsumedAc": 1}', "missing_field"),
    "nothing": (b"{}", "missing_field"),
    "a-number": (b"42", "not_an_object"),
    "a-string": (b'"online"', "not_an_object"),
    "null": (b"null", "not_an_object"),
    "no-readings": (b"[]", "empty_array"),
    "an-array-in-an-array": (b"[[]]", "not_an_object"),
    "deep": (b"[" * 100_000, "malformed"),
    "deep-object": (b'{"a":' * 50_000, "malformed"),
    "deep-and-closed": (b"[" * 10_000 + b"]" * 10_000, "malformed"),
    "half": (json.dumps(GOOD).encode()[:-5], "malformed"),
    "two": (json.dumps(GOOD).encode() * 2, "malformed"),
    "another-id": (text(meterId="MTR-2"), "id_mismatch"),
    "number-for-id": (text(meterId=1), "wrong_type"),
    "megabyte-of-zeros": (bytes(1 << 20), "malformed"),
    "megabyte-of-text": (b"x" * (1 << 20), "malformed"),
    "megabyte-in-id": (text(meterId="y" * (1 << 20)), "id_mismatch"),
    "megabyte-of-timestamp": (text(timestamp="2" * (1 << 20)), "invalid_timestamp"),
    "megabyte-of-key": (b'{"%s": 1}' % (b"k" * (1 << 20)), "missing_field"),
}
ELEMENTS = {"nan-in-array": b'{"kwhConsumedAc":NaN,"voltage":230}', "an-array-in-an-array": b"[]"}


def test_poison_among_good_readings(database: str, daemon: Daemon, devices: Publisher) -> None:
    first = now() - timedelta(hours=2)
    for number, (name, (payload, _)) in enumerate(PAYLOADS.items()):
        devices.send("meter", "GOOD", meter("GOOD", first + timedelta(seconds=number)))
        devices.send("meter", name, payload.replace(b'"MTR-1"', json.dumps(name).encode()))
    wait_for_received(database, 2 * len(PAYLOADS))
    check_books(database)
    assert one(database, "SELECT count(*) FROM meter_history WHERE meter_id = 'GOOD'") == len(PAYLOADS)

    kept = {device: (reason, bytes(payload)) for device, reason, payload in letters(database)}
    found = {name: kept[name][0] if name in kept else None for name in PAYLOADS}
    expected = {name: reason for name, (_, reason) in PAYLOADS.items()}
    assert found == expected
    for name, (reason, payload) in kept.items():
        sent = PAYLOADS[name][0].replace(b'"MTR-1"', json.dumps(name).encode())
        # Of an array the element is kept, written anew.
        assert payload == ELEMENTS.get(name, sent), (name, reason)
    # No line per message: what it logs does not grow with what it gets.
    assert len(daemon.events()) < 10
    assert daemon.terminate() == 0


@pytest.mark.parametrize(
    "device",
    ["with space", "ÄÖÜ", "🔌", "a" * 129, "b" * 60_000, "MTR;DROP TABLE", "'", "$SYS", "", " ", "a%s", "\u202e"],
    ids=ascii,
)
def test_a_bad_device_id_in_the_topic(database: str, devices: Publisher, device: str, topic_root: str) -> None:
    devices.send("meter", device, GOOD)
    devices.send("vehicle", device, b"online", channel="status")
    devices.send("meter", "MTR-1", GOOD)
    wait_for_received(database, 3)
    assert stored(database) == 1
    assert sorted(ask(database, "SELECT device_id, topic, reason, payload FROM dead_letter")) == sorted(
        [
            ("", f"{topic_root}/meter/{device}/telemetry", "invalid_device_id", json.dumps(GOOD).encode()),
            ("", f"{topic_root}/vehicle/{device}/status", "invalid_device_id", b"online"),
        ]
    )
    assert check_books(database).dead_lettered == 2


def test_bad_chargers(database: str, devices: Publisher) -> None:
    chargers = ["", "with space", "a" * 129, "\0", "Ä"]
    for number, charger in enumerate(chargers):
        devices.send("vehicle", f"VEH-{number}", vehicle(f"VEH-{number}", now()) | {"meterId": charger})
    devices.send("vehicle", "VEH-9", vehicle("VEH-9", now(), at="MTR-9"))
    wait_for_received(database, len(chargers) + 1)
    assert [reason for _, reason, _ in letters(database)] == ["invalid_device_id"] * len(chargers)
    assert ask(database, "SELECT vehicle_id FROM vehicle_history") == [("VEH-9",)]


# P0001 is what RAISE EXCEPTION says where it says nothing else.
@pytest.mark.parametrize("state", ["23514", "22003", "22P02", "23505", "P0001"])
def test_a_row_that_the_database_refuses_is_isolated(
    database: str, daemon: Daemon, devices: Publisher, state: str
) -> None:
    ask(
        database,
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF new.voltage = 666 THEN
                RAISE EXCEPTION 'the devil is in the detail' USING ERRCODE = '{state}';
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON meter_history FOR EACH ROW EXECUTE FUNCTION refuse();
        """,
    )
    first = now() - timedelta(hours=1)
    readings = [
        meter("MTR-1", first + timedelta(seconds=n), voltage=666 if n in (7, 8, 250) else 230) for n in range(300)
    ]
    devices.send("meter", "MTR-1", [*readings, readings[0], readings[1] | {"voltage": 231}, {}])
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", first))
    devices.send("vehicle", "VEH-1", b"online", channel="status")
    wait_for_received(database, 304)
    assert check_books(database)[:4] == (304, 298, 1, 5)
    refused = [
        (device, json.loads(payload))
        for device, reason, payload in letters(database)
        if reason == "refused_by_database"
    ]
    fields = ("kwhConsumedAc", "voltage")
    assert len(refused) == 3
    assert all(device == "MTR-1" and [r[f] for f in fields] == [0.5, 666] for device, r in refused)
    ((detail,),) = ask(database, "SELECT DISTINCT detail FROM dead_letter WHERE reason = 'refused_by_database'")
    assert state in detail
    assert "devil" in detail
    wait_until(lambda: one(database, "SELECT count(*) FROM device_presence"), "the status is there as well")
    # The messages after it get through, and the database was never said to be away.
    devices.send("meter", "MTR-2", meter("MTR-2", now()))
    wait_for_received(database, 305)
    assert check_books(database)[:4] == (305, 299, 1, 5)
    assert daemon.events("database.waiting") == []
    # One line for the whole batch, with the last reason.
    (event,) = daemon.events("readings.refused")
    assert (event["readings"], event["level"]) == (3, "warning")
    assert state in event["reason"]
    assert daemon.terminate() == 0


def test_a_check_constraint_that_came_later(database: str, daemon: Daemon, devices: Publisher) -> None:
    devices.send("meter", "MTR-1", meter("MTR-1", now(), voltage=666))
    wait_for_received(database, 1)
    ask(database, "ALTER TABLE meter_history ADD CONSTRAINT sane CHECK (voltage <> 666) NOT VALID")
    # On a day that has no partition yet as well.
    for moment in (now(), now() - timedelta(days=40)):
        devices.send("meter", "MTR-2", [meter("MTR-2", moment, voltage=v) for v in (666,)])
        devices.send("meter", "MTR-3", meter("MTR-3", moment))
    wait_for_received(database, 5)
    assert check_books(database)[:4] == (5, 3, 0, 2)
    assert [(device, reason) for device, reason, _ in letters(database)] == [("MTR-2", "refused_by_database")] * 2
    assert daemon.events("database.waiting") == []


def test_a_database_that_takes_not_even_dead_letters_is_waited_for(
    database: str, daemon: Daemon, devices: Publisher
) -> None:
    ask(database, "ALTER TABLE dead_letter ADD CONSTRAINT shut CHECK (reason <> 'malformed') NOT VALID")
    devices.send("meter", "MTR-1", b"x")
    devices.send("meter", "MTR-1", GOOD)
    waiting = daemon.wait_for_event("database.waiting", level="error")
    assert "23514" in waiting["reason"]
    ask(database, "ALTER TABLE dead_letter DROP CONSTRAINT shut")
    wait_for_received(database, 2)
    assert check_books(database)[:4] == (2, 1, 0, 1)
    assert daemon.terminate() == 0


def test_a_dropped_partition_heals(database: str, daemon: Daemon, devices: Publisher) -> None:
    moment = now()
    devices.send("meter", "MTR-1", meter("MTR-1", moment))
    wait_for_received(database, 1)
    name = one(database, "SELECT tableoid::regclass::text FROM meter_history")
    ask(database, f"DROP TABLE {name}")
    later = moment + timedelta(milliseconds=1)
    devices.send("meter", "MTR-1", [meter("MTR-1", later), meter("MTR-1", later, 9)])
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", later))
    wait_for_received(database, 4)
    assert meter_history(database) == {("MTR-1", later): 0.5}
    assert [(device, reason) for device, reason, _ in letters(database)] == [("MTR-1", "conflict")]
    assert one(database, "SELECT count(*) FROM vehicle_history") == 1
    assert daemon.terminate() == 0


def test_what_is_larger_than_the_largest_packet_harms_nobody(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    settings = {"mqtt__max_packet_size": 10_000}
    with Daemon(database, broker, topic_root, tmp_path, **settings) as daemon, Publisher(broker, topic_root) as devices:
        devices.send("meter", "MTR-1", b"x" * 20_000)
        devices.send("meter", "MTR-1", GOOD)
        wait_for_received(database, 1)
        assert check_books(database)[:4] == (1, 1, 0, 0)
        assert daemon.events("mqtt.waiting") == []
