"""What devices say ends in history and live state, as the contract has it."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import psycopg

from bridge.services import PrivateMosquitto
from tests.integration.harness import (
    Address,
    Daemon,
    Listener,
    Publisher,
    ask,
    check_books,
    counters,
    letters,
    meter,
    now,
    one,
    rfc3339,
    stored,
    vehicle,
    wait_for_equal,
    wait_for_received,
    wait_until,
)

QUICK_S = 0.3


def test_readings_of_both_kinds_end_in_history_and_live(database: str, devices: Publisher) -> None:
    moment = now()
    devices.send("meter", "MTR-1", meter("MTR-1", moment, 0.4796, 232.0))
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", moment, 0.4227, 20.7, at="MTR-1"))
    devices.send("vehicle", "VEH-2", vehicle("VEH-2", moment, 0.0, 99.5))
    wait_for_received(database, 3)
    assert ask(database, "SELECT meter_id, ts, kwh_ac, voltage, ts_from_arrival FROM meter_history") == [
        ("MTR-1", moment, 0.4796, 232.0, False)
    ]
    query = "SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, ts_from_arrival FROM vehicle_history"
    assert ask(database, f"{query} ORDER BY vehicle_id") == [
        ("VEH-1", moment, 0.4227, 20.7, 30.5, "MTR-1", False),
        ("VEH-2", moment, 0.0, 99.5, 30.5, None, False),
    ]
    assert ask(database, "SELECT meter_id, ts, kwh_ac, voltage, charging FROM meter_status") == [
        ("MTR-1", moment, 0.4796, 232.0, True)
    ]
    query = "SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, charging FROM vehicle_status"
    assert ask(database, f"{query} ORDER BY vehicle_id") == [
        ("VEH-1", moment, 0.4227, 20.7, 30.5, "MTR-1", True),
        ("VEH-2", moment, 0.0, 99.5, 30.5, None, False),
    ]
    assert check_books(database)[:4] == (3, 3, 0, 0)


def test_a_reading_on_a_quiet_system_is_live_at_once(database: str, devices: Publisher) -> None:
    query = "SELECT 1 FROM meter_live WHERE meter_id = %s AND ts = %s"
    best = 60.0
    with psycopg.connect(database, autocommit=True) as connection:
        for attempt in range(12):
            moment = now()
            began = time.perf_counter()
            devices.send("meter", "MTR-1", meter("MTR-1", moment))
            wait_until(lambda ts=moment: connection.execute(query, ("MTR-1", ts)).fetchone(), "the reading is live")
            best = min(best, time.perf_counter() - began)
            # The first one makes a partition.
            if attempt and best < QUICK_S:
                break
    assert best < QUICK_S


def test_the_examples_of_the_contract(database: str, devices: Publisher) -> None:
    moment = now()
    seconds = moment.timestamp()
    offset = moment.astimezone(tz=datetime.now().astimezone().tzinfo)
    forms: dict[str, object] = {
        "rfc3339": rfc3339(moment),
        "offset": (moment + timedelta(hours=2)).replace(tzinfo=None).isoformat() + "+02:00",
        "local": offset.isoformat(),
        "seconds": seconds,
        "milliseconds": round(seconds * 1_000),
    }
    for name, form in forms.items():
        devices.send("meter", name, {"kwhConsumedAc": 1, "voltage": 230, "timestamp": form, "firmware": [{"v": "1.2"}]})
    devices.send(
        "vehicle",
        "snake",
        {
            "vehicle_id": "snake",
            "soc": 0,
            "kwh_delivered_dc": 0,
            "battery_temp": -20,
            "meter_id": "M:1",
            "timestamp": rfc3339(moment),
        },
    )
    devices.send("meter", "a.b_c:D-9", {"kwh_consumed_ac": 0, "voltage": 0, "timestamp": rfc3339(moment)})
    devices.send("meter", "x" * 128, {"meterId": None, "kwhConsumedAc": 0, "voltage": 1, "timestamp": rfc3339(moment)})
    wait_for_received(database, 8)
    assert letters(database) == []
    assert ask(database, "SELECT DISTINCT ts FROM meter_history UNION SELECT ts FROM vehicle_history") == [(moment,)]
    names = {name for (name,) in ask(database, "SELECT meter_id FROM meter_history")}
    assert names == {*forms, "a.b_c:D-9", "x" * 128}


def test_duplicates_change_nothing(database: str, devices: Publisher) -> None:
    moment = now()
    first = meter("MTR-1", moment)
    for _ in range(3):
        devices.send("meter", "MTR-1", first)
    devices.send("vehicle", "VEH-1", [vehicle("VEH-1", moment)] * 4)
    wait_for_received(database, 7)
    before = ask(database, "SELECT * FROM meter_live"), ask(database, "SELECT * FROM meter_history")
    assert check_books(database)[:4] == (7, 2, 5, 0)
    # In later batches, and spelled in another way.
    devices.send("meter", "MTR-1", first)
    wait_for_received(database, 8)
    devices.send(
        "meter", "MTR-1", {"voltage": 230, "kwh_consumed_ac": 5e-1, "timestamp": round(moment.timestamp() * 1000)}
    )
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", moment))
    wait_for_received(database, 10)
    assert check_books(database)[:4] == (10, 2, 8, 0)
    assert (
        ask(database, "SELECT * FROM meter_live"),
        ask(database, "SELECT * FROM meter_history"),
    ) == before


def test_of_conflicting_readings_the_first_stays(database: str, devices: Publisher) -> None:
    moment = now()
    # One message is one batch.
    devices.send("meter", "MTR-1", [meter("MTR-1", moment, kwh) for kwh in (1.0, 2.0, 1.0, 3.0)])
    wait_for_received(database, 4)
    assert check_books(database)[:4] == (4, 1, 1, 2)
    # And across batches: other energy, another voltage, another charger, no charger any more.
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", moment, at="MTR-1"))
    wait_for_received(database, 5)
    others = [
        vehicle("VEH-1", moment, kwh=0.9, at="MTR-1"),
        vehicle("VEH-1", moment, soc=51, at="MTR-1"),
        vehicle("VEH-1", moment, at="MTR-2"),
        vehicle("VEH-1", moment),
    ]
    for other in others:
        devices.send("vehicle", "VEH-1", other)
    devices.send("meter", "MTR-1", meter("MTR-1", moment, 1.0, voltage=231))
    wait_for_received(database, 10)
    # A conflict that is redelivered is a duplicate.
    devices.send("vehicle", "VEH-1", others[0])
    wait_for_received(database, 11)
    assert check_books(database)[:4] == (11, 2, 2, 7)
    assert ask(database, "SELECT kwh_ac, voltage FROM meter_history") == [(1.0, 230.0)]
    assert ask(database, "SELECT kwh_dc, soc, meter_id FROM vehicle_history") == [(0.4, 50.0, "MTR-1")]
    assert ask(database, "SELECT kwh_ac, voltage FROM meter_live") == [(1.0, 230.0)]
    assert ask(database, "SELECT kwh_dc, soc, meter_id FROM vehicle_live") == [(0.4, 50.0, "MTR-1")]
    assert {reason for _, reason, _ in letters(database)} == {"conflict"}
    kept = [json.loads(payload) for device, _, payload in letters(database) if device == "VEH-1"]
    assert sorted((r["kwhDeliveredDc"], r["soc"], str(r.get("meterId"))) for r in kept) == [
        (0.4, 50, "MTR-2"),
        (0.4, 50, "None"),
        (0.4, 51, "MTR-1"),
        (0.9, 50, "MTR-1"),
    ]


def test_the_newest_stays_live_whatever_the_order(database: str, devices: Publisher) -> None:
    newest = now()
    minutes = [3, 0, 5, 1, 4, 2]
    for done, age in enumerate(minutes, start=1):
        moment = newest - timedelta(minutes=age)
        devices.send("meter", "MTR-1", meter("MTR-1", moment, kwh=age))
        devices.send("vehicle", "VEH-1", vehicle("VEH-1", moment, kwh=age))
        # Each in a batch of its own.
        wait_for_received(database, 2 * done)
    devices.send("meter", "MTR-2", [meter("MTR-2", newest - timedelta(minutes=age), kwh=age) for age in minutes])
    wait_for_received(database, 18)
    assert ask(database, "SELECT meter_id, ts, kwh_ac FROM meter_live ORDER BY meter_id") == [
        ("MTR-1", newest, 0.0),
        ("MTR-2", newest, 0.0),
    ]
    assert ask(database, "SELECT ts, kwh_dc FROM vehicle_live") == [(newest, 0.0)]
    assert stored(database) == 18


def test_the_bad_elements_of_an_array_do_not_harm_the_good(database: str, devices: Publisher) -> None:
    first = now() - timedelta(minutes=10)
    good = [meter("MTR-1", first + timedelta(minutes=minute)) for minute in range(4)]
    bad: list[object] = [
        good[0] | {"voltage": "230"},
        good[0] | {"kwhConsumedAc": -1},
        good[0] | {"meterId": "MTR-2"},
        {"meterId": "MTR-1"},
        7,
        None,
        good[0] | {"timestamp": "yesterday"},
        {"kwhConsumedAc": 1, "voltage": 230},
    ]
    mixed = [item for pair in zip(bad, good + good, strict=True) for item in pair]
    devices.send("meter", "MTR-1", mixed)
    devices.send("meter", "MTR-1", [])
    wait_for_received(database, 17)
    assert check_books(database)[:4] == (17, 4, 4, 9)
    found = [(reason, json.loads(payload)) for _, reason, payload in letters(database)]
    reasons = [
        "wrong_type",
        "out_of_range",
        "id_mismatch",
        "missing_field",
        "not_an_object",
        "not_an_object",
        "invalid_timestamp",
        "missing_field",
        "empty_array",
    ]
    expected = list(zip(reasons, [*bad, []], strict=True))
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_backfill_finds_its_days(database: str, devices: Publisher) -> None:
    days = [1, 2, 30, 59, 180, 200, 364, 365]
    backfill = [meter("MTR-1", now() - timedelta(days=day)) for day in days]
    devices.send("meter", "MTR-1", backfill)
    devices.send("meter", "MTR-1", meter("MTR-1", now() - timedelta(days=367)))
    devices.send("meter", "MTR-1", meter("MTR-1", now() + timedelta(minutes=6)))
    # Both sides of midnight.
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=90)
    edges = [midnight - timedelta(milliseconds=1), midnight, midnight + timedelta(milliseconds=1)]
    devices.send("vehicle", "VEH-1", [vehicle("VEH-1", edge) for edge in edges])
    wait_for_received(database, 13)
    assert check_books(database)[:4] == (13, 11, 0, 2)
    assert [reason for _, reason, _ in letters(database)] == ["timestamp_in_future", "timestamp_too_old"]
    query = "SELECT DISTINCT tableoid::regclass::text, to_char(ts AT TIME ZONE 'UTC', 'YYYYMMDD') FROM {} ORDER BY 1"
    meters = ask(database, query.format("meter_history"))
    assert len(meters) == len(days)
    assert all(name == f"meter_history_{day}" for name, day in meters)
    assert [name for name, _ in ask(database, query.format("vehicle_history"))] == [
        f"vehicle_history_{day:%Y%m%d}" for day in (edges[0], midnight)
    ]


def test_without_a_timestamp_the_arrival_counts(database: str, devices: Publisher) -> None:
    before = now()
    for _ in range(3):
        devices.send("meter", "MTR-1", {"kwhConsumedAc": 1, "voltage": 230})
    devices.send("vehicle", "VEH-1", [{"soc": 1, "kwhDeliveredDc": 1, "batteryTemp": 1, "timestamp": None}])
    wait_for_received(database, 4)
    query = "SELECT ts, received_at, ts_from_arrival FROM "
    rows = ask(database, query + "meter_history") + ask(database, query + "vehicle_history")
    assert len(rows) == 4
    assert all(ts == received_at and from_arrival for ts, received_at, from_arrival in rows)
    assert all(before <= ts <= now() + timedelta(seconds=1) for ts, _, _ in rows)


def test_cbor_is_taken_by_its_content_type(database: str, devices: Publisher) -> None:
    moment = now()
    cbor = "application/cbor"
    devices.send("meter", "MTR-1", cbor2.dumps(meter("MTR-1", moment)), content_type=cbor)
    devices.send("vehicle", "VEH-1", cbor2.dumps([vehicle("VEH-1", moment), {"soc": 101}]), content_type=cbor)
    devices.send("meter", "MTR-2", cbor2.dumps(meter("MTR-2", moment)))
    devices.send("meter", "MTR-3", json.dumps(meter("MTR-3", moment)).encode(), content_type="application/json")
    devices.send("meter", "MTR-4", json.dumps(meter("MTR-4", moment)).encode(), content_type=cbor)
    devices.send("meter", "MTR-5", cbor2.dumps(meter("MTR-5", moment) | {"timestamp": moment}), content_type=cbor)
    wait_for_received(database, 7)
    assert {device for (device,) in ask(database, "SELECT meter_id FROM meter_history")} == {"MTR-1", "MTR-3", "MTR-5"}
    assert one(database, "SELECT count(DISTINCT ts) FROM meter_history") == 1
    assert one(database, "SELECT count(*) FROM vehicle_history") == 1
    kept = ask(database, "SELECT device_id, content_type, reason FROM dead_letter ORDER BY device_id")
    assert [row[:2] for row in kept] == [("MTR-2", None), ("MTR-4", cbor), ("VEH-1", cbor)]
    assert kept[0][2] == "malformed"
    check_books(database)


def test_qos_0_is_taken_as_well(database: str, devices: Publisher) -> None:
    first = now() - timedelta(hours=1)
    for number in range(50):
        devices.send("meter", "MTR-1", meter("MTR-1", first + timedelta(minutes=number)), qos=number % 2)
    wait_for_received(database, 50)
    assert check_books(database)[:4] == (50, 50, 0, 0)


def test_retained_telemetry_is_taken_once(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    moment = now()
    with Publisher(broker, topic_root) as devices:
        devices.send("meter", "MTR-1", meter("MTR-1", moment), retain=True)
        devices.flush()
        with Daemon(database, broker, topic_root, tmp_path) as daemon:
            wait_for_received(database, 1)
            daemon.kill()
            daemon.start()
            # A resumed session has seen it; what comes next shows that it is not sent again.
            devices.send("meter", "MTR-1", meter("MTR-1", moment + timedelta(seconds=1)))
            wait_for_received(database, 2)
    assert check_books(database)[:4] == (2, 2, 0, 0)


def test_status_says_who_is_online(database: str, devices: Publisher) -> None:
    moment = now()
    devices.send("vehicle", "VEH-1", vehicle("VEH-1", moment))
    devices.send("vehicle", "VEH-2", vehicle("VEH-2", moment))
    devices.send("meter", "MTR-1", meter("MTR-1", moment))
    devices.send("vehicle", "VEH-1", b"online", channel="status", retain=True)
    devices.send("meter", "MTR-1", b"offline", channel="status", retain=True)

    def online() -> list[tuple[object, ...]]:
        query = "SELECT vehicle_id, online FROM vehicle_status UNION SELECT meter_id, online FROM meter_status"
        return sorted(ask(database, query))

    wait_for_equal(online, [("MTR-1", False), ("VEH-1", True), ("VEH-2", None)])
    devices.send("vehicle", "VEH-1", b"offline", channel="status", retain=True)
    devices.send("meter", "MTR-1", b"online", channel="status", retain=True)
    wait_for_equal(online, [("MTR-1", True), ("VEH-1", False), ("VEH-2", None)])
    for state in (b"online", b"offline", b"online"):
        devices.send("vehicle", "VEH-1", state, channel="status")
    devices.send("vehicle", "VEH-2", b"asleep", channel="status")
    wait_for_equal(online, [("MTR-1", True), ("VEH-1", True), ("VEH-2", None)])
    wait_until(lambda: counters(database).dead_lettered, "the wrong status is a dead letter")
    assert letters(database) == [("VEH-2", "invalid_status", b"asleep")]
    # Status messages are counted apart.
    assert check_books(database) == (4, 3, 0, 1, 7)


def test_status_retained_before_the_first_start_is_known(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Publisher(broker, topic_root) as devices:
        devices.send("meter", "MTR-1", b"online", channel="status", retain=True)
        devices.send("vehicle", "VEH-1", b"offline", channel="status", retain=True)
        devices.flush()
    with Daemon(database, broker, topic_root, tmp_path):
        wait_for_equal(
            lambda: ask(database, "SELECT device_id, kind, online FROM device_presence ORDER BY kind"),
            [("MTR-1", "meter", True), ("VEH-1", "vehicle", False)],
        )


def test_the_bridge_says_how_it_is_itself(broker: Address, daemon: Daemon) -> None:
    with Listener(broker, daemon.status_topic) as listener:
        wait_until(lambda: listener.payloads() == [b"online"], "its status is retained")
        assert listener.messages[0].retain
        daemon.kill()
        wait_until(lambda: listener.payloads() == [b"online", b"offline"], "its last will is published")
        daemon.start()
        wait_until(lambda: listener.payloads()[2:] == [b"online"], "it is back")
        assert daemon.terminate() == 0
        wait_until(lambda: listener.payloads()[3:] == [b"offline"], "it says that it goes")
    with Listener(broker, daemon.status_topic) as late:
        wait_until(lambda: late.payloads() == [b"offline"], "that is retained as well")


def test_a_broker_that_forgot_the_session_is_complained_about(database: str, topic_root: str, tmp_path: Path) -> None:
    with (
        PrivateMosquitto("persistence false") as broker,
        Daemon(database, broker, topic_root, tmp_path) as daemon,
    ):
        # The first time there is nothing that could be lost.
        assert daemon.wait_for_event("mqtt.connected")["session_present"] is False
        assert daemon.events("mqtt.session_lost") == []
        broker.stop()
        broker.start()
        daemon.wait_for_events("mqtt.connected", 2)
        (lost,) = daemon.events("mqtt.session_lost")
        assert lost["level"] == "warning"
        assert "forgot" in lost["meaning"]
        # It has subscribed again.
        with Publisher(broker, topic_root) as devices:
            devices.send("meter", "MTR-1", meter("MTR-1", now()))
            wait_for_received(database, 1)
        assert daemon.terminate() == 0


def test_a_broker_that_kept_the_session_is_not(database: str, topic_root: str, tmp_path: Path) -> None:
    with PrivateMosquitto() as broker, Daemon(database, broker, topic_root, tmp_path) as daemon:
        broker.stop()
        broker.start()
        daemon.wait_for_events("mqtt.connected", 2)
        assert daemon.events("mqtt.session_lost") == []
        assert daemon.terminate() == 0
