"""What operators ask of devices: series of energy for charts, who is silent, how good the data is, what was refused."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import dict_row

from tests.integration.harness import Publisher, check_books, meter, now, vehicle, wait_for_received

QUARTER_HOUR = timedelta(minutes=15)
SECOND = timedelta(seconds=1)
DELAY = timedelta(seconds=0.25)
Row = dict[str, Any]


@pytest.fixture
def session(database: str) -> Iterator[Connection[Row]]:
    """A connection in one transaction: now() stands still, and the window of 24 hours with it."""
    with psycopg.connect(database, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture(params=["history", "rollups", "half"])
def rolled(request: pytest.FixtureRequest) -> Callable[[Connection[Row], datetime, datetime], None]:
    """Brings the rollups to where they are not made, cover history between two times, or end in the middle."""

    def roll(session: Connection[Row], since: datetime, until: datetime) -> None:
        target = {"history": None, "rollups": until, "half": since + (until - since) / 2}[request.param]
        if target is None:
            return
        session.execute("SELECT rollup_advance(%s)", (target,))
        while True:
            step = session.execute("SELECT * FROM rollup_refresh('1 day')").fetchone()
            assert step is not None
            if step["complete_until"] == step["late_before"]:
                break
        assert step["complete_until"] > since

    return roll


def read(session: Connection[Row], query: str, *parameters: object) -> list[Row]:
    return session.execute(query, parameters or None).fetchall()


def window(session: Connection[Row]) -> tuple[datetime, datetime]:
    """The closed quarter hours that the views of 24 hours look at."""
    (row,) = read(session, "SELECT since, until FROM closed_24h")
    assert row["until"] - row["since"] == timedelta(hours=24)
    return row["since"], row["until"]


def store(
    session: Connection[Row], kind: str, device: str, readings: list[tuple[datetime, datetime]], kwh: float = 1.0
) -> None:
    """History and live state of readings as (ts, received_at)."""
    days = sorted({ts.astimezone(UTC).date() for ts, _ in readings})
    session.execute("SELECT ensure_history_partitions(%s::regclass, %s)", (f"{kind}_history", days))
    values = {"meter": (230,), "vehicle": (50, 30, None)}[kind]
    with session.cursor().copy(f"COPY {kind}_history FROM STDIN") as copy:
        for ts, received_at in readings:
            copy.write_row((device, ts, kwh, *values, received_at, False))
    ts, received_at = max(readings)
    row = [device, ts, kwh, *values, received_at]
    session.execute(f"INSERT INTO {kind}_live VALUES ({', '.join(['%s'] * len(row))})".encode(), row)


def every(step: timedelta, since: datetime, until: datetime) -> list[datetime]:
    return [since + step * number for number in range(-((since - until) // step))]


def in_time(moments: list[datetime]) -> list[tuple[datetime, datetime]]:
    return [(ts, ts + DELAY) for ts in moments]


# --- energy ------------------------------------------------------------------------------------------------


def energy(session: Connection[Row], bucket: str, **arguments: object) -> list[Row]:
    named = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(n), sql.Literal(v)) for n, v in arguments.items()
    )
    return session.execute(
        sql.SQL("SELECT * FROM {}({})").format(sql.Identifier(f"energy_by_{bucket}"), named)
    ).fetchall()


def test_energy_of_a_device_of_both_and_of_the_fleet(session: Connection[Row], rolled: Callable[..., None]) -> None:
    begin = datetime(2026, 5, 4, 10, tzinfo=UTC)
    half, last = begin + timedelta(minutes=30), begin + timedelta(minutes=50)
    first = begin + timedelta(minutes=5)
    for device, kwh in (("MTR-1", 0.25), ("MTR-2", 0.5)):
        store(session, "meter", device, in_time([first, first + SECOND, last]), kwh)
    for device, kwh in (("VEH-1", 2.0), ("VEH-2", 4.0)):
        store(session, "vehicle", device, in_time([first, half]), kwh)
    rolled(session, begin, begin + timedelta(hours=1))

    def quarters(**arguments: object) -> list[tuple[object, ...]]:
        return [tuple(row.values()) for row in energy(session, "quarter_hour", **arguments)]

    third = begin + timedelta(minutes=45)
    assert quarters(since=begin, meter="MTR-1") == [(begin, 2, 0.5, None, None), (third, 1, 0.25, None, None)]
    assert quarters(since=begin, vehicle="VEH-2") == [(begin, None, None, 1, 4.0), (half, None, None, 1, 4.0)]
    assert quarters(since=begin, meter="MTR-2", vehicle="VEH-1") == [
        (begin, 2, 1.0, 1, 2.0),
        (half, 0, None, 1, 2.0),
        (third, 1, 0.5, 0, None),
    ]
    fleet = [(begin, 4, 1.5, 2, 6.0), (half, 0, None, 2, 6.0), (third, 2, 0.75, 0, None)]
    assert quarters(since=begin) == fleet
    assert quarters(since=datetime.min.replace(year=2000, tzinfo=UTC)) == fleet
    # Both edges cut: from the second reading on, up to the last but not with it.
    assert quarters(since=first + SECOND, until=last) == [(begin, 2, 0.75, 0, None), (half, 0, None, 2, 6.0)]
    assert quarters(since=begin, meter="NONE") == []
    assert quarters(since=last + SECOND) == []

    (hour,) = energy(session, "hour", since=begin, meter="MTR-2", vehicle="VEH-1")
    whole = {"starts": begin, "readings_ac": 3, "kwh_ac": 1.5, "readings_dc": 2, "kwh_dc": 4.0}
    assert hour == whole
    (day,) = energy(session, "day", since=begin, meter="MTR-2", vehicle="VEH-1")
    assert day == whole | {"day": date(2026, 5, 4), "starts": datetime(2026, 5, 4, tzinfo=UTC)}
    (day,) = energy(session, "day", since=begin, vehicle="VEH-1")
    assert (day["readings_ac"], day["kwh_ac"], day["readings_dc"], day["kwh_dc"]) == (None, None, 2, 4.0)


@pytest.mark.parametrize(
    ("zone", "days", "hours"),
    [
        ("UTC", ["2026-03-28T00:00Z", "2026-03-29T00:00Z", "2026-03-30T00:00Z"], [24, 24]),
        ("Europe/Berlin", ["2026-03-27T23:00Z", "2026-03-28T23:00Z", "2026-03-29T22:00Z"], [24, 23]),
        ("Europe/Berlin", ["2026-10-24T22:00Z", "2026-10-25T23:00Z", "2026-10-26T23:00Z"], [25, 24]),
        ("Asia/Kathmandu", ["2026-03-27T18:15Z", "2026-03-28T18:15Z", "2026-03-29T18:15Z"], [24, 24]),
        ("Australia/Adelaide", ["2026-04-03T13:30Z", "2026-04-04T13:30Z", "2026-04-05T14:30Z"], [24, 25]),
        # Clocks change at midnight: once there is no midnight, once there are two.
        ("America/Havana", ["2026-03-07T05:00Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"], [24, 23]),
        ("America/Havana", ["2026-10-31T04:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"], [24, 25]),
    ],
    ids=str,
)  # fmt: skip
def test_days_and_hours_are_those_of_the_time_zone(
    session: Connection[Row], rolled: Callable[..., None], zone: str, days: list[str], hours: list[int]
) -> None:
    begins = [datetime.fromisoformat(day) for day in days]
    session.execute("UPDATE analytics_setting SET time_zone = %s", (zone,))
    moments = every(QUARTER_HOUR, begins[0], begins[-1])
    # The last microsecond of each quarter hour, and so of each day.
    store(session, "meter", "MTR-1", in_time([ts + QUARTER_HOUR - timedelta(microseconds=1) for ts in moments]))
    store(session, "vehicle", "VEH-1", in_time(moments), 0.5)
    rolled(session, begins[0], begins[-1])

    found = energy(session, "day", since=begins[0])
    dates = [begin.astimezone(ZoneInfo(zone)).date() for begin in begins[:-1]]
    assert [row["day"] for row in found] == dates
    assert [row["starts"] for row in found] == begins[:-1]
    assert [begins[n + 1] - begins[n] for n in range(len(hours))] == [timedelta(hours=length) for length in hours]
    assert [row["readings_ac"] for row in found] == [4 * length for length in hours]
    assert [row["kwh_ac"] for row in found] == [4.0 * length for length in hours]
    assert [row["kwh_dc"] for row in found] == [2.0 * length for length in hours]

    found = energy(session, "hour", since=begins[0], meter="MTR-1")
    assert [row["starts"] for row in found] == every(timedelta(hours=1), begins[0], begins[-1])
    assert {(row["readings_ac"], row["kwh_ac"]) for row in found} == {(4, 4.0)}
    assert {row["starts"].astimezone(ZoneInfo(zone)).minute for row in found} == {0}


def test_a_bucket_that_the_window_cuts_counts_with_what_is_inside(
    session: Connection[Row], rolled: Callable[..., None]
) -> None:
    session.execute("UPDATE analytics_setting SET time_zone = 'Europe/Berlin'")
    begin, end = datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC)
    moments = every(timedelta(minutes=7), begin, end)
    for device in ("MTR-1", "MTR-2"):
        store(session, "meter", device, in_time(moments))
    rolled(session, begin, end)
    since, until = begin + timedelta(hours=5, minutes=3), end - timedelta(hours=9, minutes=9)
    zone = ZoneInfo("Europe/Berlin")
    expected: dict[date, int] = defaultdict(int)
    for ts in moments:
        if since <= ts < until:
            expected[ts.astimezone(zone).date()] += 2
    found = energy(session, "day", since=since, until=until)
    assert {row["day"]: row["readings_ac"] for row in found} == expected
    assert found[0]["starts"] == datetime(2026, 3, 27, 23, tzinfo=UTC)


# --- silence -----------------------------------------------------------------------------------------------


def live(session: Connection[Row], kind: str, device: str, silence: timedelta, behind: timedelta = DELAY) -> None:
    """A device whose newest reading arrived so long ago, with a clock that is so far behind."""
    values = {"meter": "0.5, 230", "vehicle": "0.5, 50, 30, NULL"}[kind]
    session.execute(
        f"INSERT INTO {kind}_live VALUES (%s, now() - %s - %s, {values}, now() - %s)",
        (device, silence, behind, silence),
    )


def test_a_device_is_silent_once_its_readings_are_missing(session: Connection[Row]) -> None:
    edge, tick = timedelta(minutes=5), timedelta(microseconds=1)
    live(session, "meter", "AT-THE-EDGE", edge)
    live(session, "meter", "JUST-BEFORE", edge - tick)
    live(session, "vehicle", "AT-THE-EDGE", edge + tick)
    live(session, "vehicle", "JUST-BEFORE", edge - tick)
    # It is the arrival that counts.
    live(session, "meter", "TWO-HOURS-BEHIND", timedelta(seconds=30), behind=timedelta(hours=2))
    live(session, "meter", "AHEAD", timedelta(minutes=6, seconds=59), behind=timedelta(minutes=-4))
    live(session, "vehicle", "LONG-GONE", timedelta(days=2))
    session.execute("INSERT INTO device_presence VALUES ('LONG-GONE', 'vehicle', false, now())")
    session.execute("INSERT INTO device_presence VALUES ('AHEAD', 'meter', true, now())")
    # The same id, but not the same device.
    session.execute("INSERT INTO device_presence VALUES ('AT-THE-EDGE', 'meter', true, now())")

    found = read(session, "SELECT *, now() - received_at AS since_arrival FROM device_silent")
    assert [
        (row["kind"], row["device_id"], row["silence"], row["missed_readings"], row["online"]) for row in found
    ] == [
        ("vehicle", "LONG-GONE", timedelta(days=2), 2_880, False),
        ("meter", "AHEAD", timedelta(minutes=6, seconds=59), 6, True),
        ("vehicle", "AT-THE-EDGE", edge + tick, 5, None),
        ("meter", "AT-THE-EDGE", edge, 5, True),
    ]
    assert all(row["silence"] == row["since_arrival"] for row in found)
    assert found[1]["ts"] - found[1]["received_at"] == timedelta(minutes=4)

    session.execute("UPDATE analytics_setting SET reading_interval = '10 seconds', silent_after = 3")
    (behind,) = read(session, "SELECT * FROM device_silent WHERE device_id = 'TWO-HOURS-BEHIND'")
    assert (behind["silence"], behind["missed_readings"]) == (timedelta(seconds=30), 3)
    session.execute("UPDATE analytics_setting SET silent_after = 4")
    assert read(session, "SELECT * FROM device_silent WHERE device_id = 'TWO-HOURS-BEHIND'") == []


# --- quality -----------------------------------------------------------------------------------------------


def quality(session: Connection[Row]) -> dict[tuple[str, str], Row]:
    """The view by device; what it says must be what is said about each device alone."""
    found = read(session, "SELECT * FROM data_quality")
    for row in found:
        assert row in read(session, "SELECT * FROM device_quality(%s)", row["device_id"])
    return {(row["kind"], row["device_id"]): row for row in found}


MINUTE = timedelta(minutes=1)


def test_gaps_and_missing_and_late_readings(session: Connection[Row], rolled: Callable[..., None]) -> None:
    since, until = window(session)
    minutes = every(MINUTE, since - timedelta(hours=2), until)
    store(session, "meter", "GOOD", in_time(minutes))
    # Two quarter hours are missing, another but for one reading. What is missing before the window is not a gap.
    gone = {*every(MINUTE, since + timedelta(hours=3), since + timedelta(hours=3, minutes=30))}
    gone |= {*every(MINUTE, since + timedelta(hours=5), since + timedelta(hours=5, minutes=14))}
    gone |= {*every(MINUTE, since - timedelta(minutes=45), since)}
    store(session, "vehicle", "GAPS", in_time([ts for ts in minutes if ts not in gone]))
    # Late is what takes longer than two minutes.
    late = [
        (ts, ts + timedelta(minutes=2, microseconds=1 if number % 4 == 0 else 0)) for number, ts in enumerate(minutes)
    ]
    store(session, "meter", "LATE", late)
    store(session, "meter", "GOOD-AND-GONE", in_time([since - timedelta(days=1)]))
    store(session, "meter", "JUST-CAME", in_time([until]))
    rolled(session, since - timedelta(hours=2), until)

    found = quality(session)
    assert len(found) == 5
    assert {(row["since"], row["until"]) for row in found.values()} == {(since, until)}

    def figures(kind: str, device: str) -> tuple[object, ...]:
        row = found[kind, device]
        names = ("readings", "expected_readings", "gaps", "missing_share", "late_share")
        return tuple(row[name] for name in names)

    assert figures("meter", "GOOD") == (1_440, 1_440, 0, 0, 0)
    assert figures("vehicle", "GAPS") == (1_396, 1_440, 2, pytest.approx(44 / 1_440, abs=1e-12), 0)
    assert figures("meter", "LATE") == (1_440, 1_440, 0, 0, 0.25)
    assert figures("meter", "GOOD-AND-GONE") == (0, 1_440, 96, 1, None)
    assert figures("meter", "JUST-CAME") == (0, 0, 0, None, None)

    session.execute("UPDATE analytics_setting SET reading_interval = '30 seconds'")
    row = quality(session)["meter", "GOOD"]
    assert (row["expected_readings"], row["missing_share"]) == (2_880, 0.5)


def test_nothing_is_expected_before_the_first_reading(session: Connection[Row], rolled: Callable[..., None]) -> None:
    since, until = window(session)
    first = until - timedelta(minutes=37, seconds=30)
    moments = every(MINUTE, first, until)
    store(session, "meter", "NEW", in_time(moments))
    # A quarter hour without readings between the first and the second.
    store(session, "vehicle", "NEW", in_time([first, *every(MINUTE, until - QUARTER_HOUR, until)]))
    # Within the first quarter hour of the window.
    store(session, "meter", "NEW-AT-THE-START", in_time(every(MINUTE, since + 7 * MINUTE, until)))
    store(session, "meter", "KNOWN-BEFORE", in_time([since - timedelta(microseconds=1), *moments]))
    rolled(session, since - timedelta(minutes=30), until)

    found = {
        device: (row["readings"], row["expected_readings"], row["gaps"]) for device, row in quality(session).items()
    }
    assert found == {
        ("meter", "NEW"): (38, 38, 0),
        ("vehicle", "NEW"): (16, 38, 1),
        ("meter", "NEW-AT-THE-START"): (1_433, 1_433, 0),
        ("meter", "KNOWN-BEFORE"): (38, 1_440, 93),
    }


def test_a_late_reading_from_before_the_window_makes_a_device_an_old_one(session: Connection[Row]) -> None:
    """The rollups of that time are made already, and marked."""
    since, until = window(session)
    store(session, "meter", "MTR-1", in_time(every(MINUTE, until - timedelta(hours=1), until)))
    session.execute("SELECT rollup_advance(%s)", (until,))
    session.execute("SELECT * FROM rollup_refresh('3 days')")
    assert quality(session)["meter", "MTR-1"]["gaps"] == 0
    late = since - timedelta(days=3)
    session.execute("SELECT ensure_history_partitions('meter_history', ARRAY[%s::date])", (late.date(),))
    session.execute("INSERT INTO meter_history VALUES ('MTR-1', %s, 1, 230, now(), false)", (late,))
    session.execute(
        "INSERT INTO rollup_mark (device_id, kind, quarter_hours) "
        "SELECT 'MTR-1', 'meter', tstzrange(bin, bin + '15 minutes') FROM date_bin('15 minutes', %s, 'epoch') AS bin",
        (late,),
    )
    assert quality(session)["meter", "MTR-1"]["gaps"] == 92
    session.execute("SELECT * FROM rollup_refresh()")
    assert quality(session)["meter", "MTR-1"]["gaps"] == 92


def test_clock_skew_is_told_from_readings_that_are_merely_late(
    session: Connection[Row], rolled: Callable[..., None]
) -> None:
    since, until = window(session)
    minutes = every(MINUTE, since - timedelta(minutes=30), until)

    def delays(skew: timedelta) -> list[tuple[datetime, datetime]]:
        """Transit takes 0.25 s at least, mostly more; a fifth of a day is sent hours later."""
        jitter = [DELAY + SECOND * (number % 5) for number in range(len(minutes))]
        backlog = since + timedelta(hours=5)
        return [
            (ts, (max(ts, backlog) if since <= ts < backlog else ts) + skew + more)
            for ts, more in zip(minutes, jitter, strict=True)
        ]

    behind, ahead = timedelta(hours=2), timedelta(minutes=-4)
    store(session, "meter", "RIGHT", delays(timedelta()))
    store(session, "meter", "BEHIND", [(ts, at) for ts, at in delays(behind) if at < until])
    store(session, "vehicle", "AHEAD", delays(ahead))
    # Without a timestamp of its own a device has no clock to judge.
    store(session, "vehicle", "NO-CLOCK", in_time(minutes))
    session.execute("UPDATE vehicle_history SET ts_from_arrival = true WHERE vehicle_id = 'NO-CLOCK'")
    rolled(session, since - timedelta(minutes=30), until)

    found = quality(session)
    assert {device: row["clock_skew"] for (_, device), row in found.items()} == {
        "RIGHT": DELAY,
        "BEHIND": behind + DELAY,
        "AHEAD": ahead + DELAY,
        "NO-CLOCK": None,
    }
    # By its clock the last two hours have not come yet. Of the rest, all of it is late.
    assert found["meter", "BEHIND"]["late_share"] == 1
    assert found["meter", "BEHIND"]["gaps"] == 8
    assert found["vehicle", "AHEAD"]["gaps"] == 0


def test_duplicates_and_conflicts_are_those_of_the_device(database: str, devices: Publisher) -> None:
    moment = now() - timedelta(hours=3)
    for kind, reading in (("meter", meter), ("vehicle", vehicle)):
        devices.send(kind, "SAME-ID", reading("SAME-ID", moment, 0.5))
        devices.send(kind, "OTHER", reading("OTHER", moment, 0.5))
    devices.flush()
    wait_for_received(database, 4)
    # The meter says three other things and one twice more; the vehicle one other thing, and one thing three times more.
    devices.send("meter", "SAME-ID", [meter("SAME-ID", moment, kwh) for kwh in (0.6, 0.7, 0.8, 0.5, 0.5)])
    devices.send("vehicle", "SAME-ID", [vehicle("SAME-ID", moment, kwh) for kwh in (0.6, 0.5, 0.5, 0.5)])
    # Dead letters that are no conflicts.
    devices.send("meter", "SAME-ID", {"kwhConsumedAc": -1})
    devices.send("vehicle", "SAME-ID", b"?")
    devices.flush()
    wait_for_received(database, 15)
    check_books(database)

    select = "SELECT kind, device_id, duplicates, conflicts FROM data_quality ORDER BY kind, device_id"
    in_window = [
        ("meter", "OTHER", 0, 0),
        ("meter", "SAME-ID", 2, 3),
        ("vehicle", "OTHER", 0, 0),
        ("vehicle", "SAME-ID", 3, 1),
    ]
    outside = [(*row[:3], 0) for row in in_window]
    # One transaction each: the window must not move between the two statements.
    for received_at, expected in (
        ("until", outside),
        ("until - interval '1 microsecond'", in_window),
        ("since", in_window),
        ("since - interval '1 microsecond'", outside),
    ):
        with psycopg.connect(database) as connection:
            connection.execute(f"UPDATE dead_letter SET received_at = {received_at} FROM closed_24h")
            assert connection.execute(select.encode()).fetchall() == expected, received_at


# --- dead letters ------------------------------------------------------------------------------------------


def test_dead_letters_by_reason(session: Connection[Row]) -> None:
    assert read(session, "SELECT * FROM dead_letter_summary") == []
    begin = datetime(2026, 5, 4, tzinfo=UTC)

    def letter(number: int, device: str, reason: str) -> None:
        session.execute(
            "INSERT INTO dead_letter VALUES (%s, %s, %s, '', NULL, %s, %s, %s)",
            (device, bytes([number]), f"topic/{number}", reason, f"detail {number}", begin + MINUTE * number),
        )

    # The newest one is neither the first nor the last of its device.
    for number, device in enumerate(["B", "A", "", "A", "A"]):
        letter(number, device, "malformed")
    letter(10, "B", "conflict")
    letter(8, "C", "conflict")
    letter(20, "", "unknown_topic")
    letter(19, "", "unknown_topic")
    names = ("reason", "letters", "devices", "first_received", "last_received", "example_topic", "example_detail")
    found = [tuple(row[name] for name in names) for row in read(session, "SELECT * FROM dead_letter_summary")]
    assert found == [
        ("malformed", 5, 2, begin, begin + MINUTE * 4, "topic/4", "detail 4"),
        ("conflict", 2, 2, begin + MINUTE * 8, begin + MINUTE * 10, "topic/10", "detail 10"),
        ("unknown_topic", 2, 0, begin + MINUTE * 19, begin + MINUTE * 20, "topic/20", "detail 20"),
    ]


def test_two_newest_dead_letters_make_one_row(session: Connection[Row]) -> None:
    session.execute(
        "INSERT INTO dead_letter SELECT 'A', digest::bytea, 't', '', NULL, 'malformed', digest, now() "
        "FROM unnest(ARRAY['2', '1', '3']) AS digest"
    )
    (found,) = read(session, "SELECT letters, example_detail FROM dead_letter_summary")
    assert found == {"letters": 3, "example_detail": "1"}


def test_dead_letters_one_by_one_the_newest_first(session: Connection[Row]) -> None:
    begin = datetime(2026, 5, 4, tzinfo=UTC)
    letters = [
        ("A", b"\x01" * 32, b"<script>", 1),
        ("", b"\xff" * 32, b"\x00\xfe" * 5_000, 3),
        ("B", b"\x02" * 32, b"", 2),
    ]
    for device, digest, payload, minute in letters:
        session.execute(
            "INSERT INTO dead_letter VALUES (%s, %s, 'a/topic', %s, 'text/html', 'malformed', 'not JSON', %s)",
            (device, digest, payload, begin + MINUTE * minute),
        )
    assert read(session, "SELECT * FROM dead_letter_list LIMIT 2") == [
        {
            "id": digest.hex(),
            "device_id": device,
            "topic": "a/topic",
            "content_type": "text/html",
            "payload": payload,
            "payload_bytes": len(payload),
            "reason": "malformed",
            "detail": "not JSON",
            "received_at": begin + MINUTE * minute,
        }
        for device, digest, payload, minute in (letters[1], letters[2])
    ]


def test_dead_letters_are_found_without_reading_all(session: Connection[Row]) -> None:
    session.execute(
        "INSERT INTO dead_letter SELECT 'A', number::text::bytea, 't', '', NULL, 'malformed', 'd', "
        "now() - number * interval '1 second' FROM generate_series(1, 5000) AS number"
    )
    session.execute("ANALYZE dead_letter")
    for question, index in (("LIMIT 50", "Backward using dead_letter_received"), ("WHERE id = '31'", "dead_letter_id")):
        plan = read(session, f"EXPLAIN SELECT * FROM dead_letter_list {question}")
        assert index in " ".join(line["QUERY PLAN"] for line in plan)


# --- the fleet now -----------------------------------------------------------------------------------------


def send_now(session: Connection[Row], kind: str, device: str, kwh: float, ago: float, delay: float = 1) -> None:
    """The newest reading of a device arrived so many seconds ago, so many after its timestamp."""
    values = {"meter": "230", "vehicle": "50, 30, NULL"}[kind]
    session.execute(
        f"INSERT INTO {kind}_live VALUES (%s, now() - make_interval(secs => %s), %s, {values}, "
        "now() - make_interval(secs => %s))",
        (device, ago + delay, kwh, ago),
    )


def test_the_fleet_now(session: Connection[Row]) -> None:
    empty = dict.fromkeys(
        ("meters", "vehicles", "meters_silent", "vehicles_silent", "meters_drawing", "vehicles_charging"), 0
    )
    nothing = dict.fromkeys(("newest_received_at", "median_delay_s", "p95_delay_s"))
    assert read(session, "SELECT * FROM fleet_now") == [empty | {"kw_ac": 0.0, "kw_dc": 0.0} | nothing]

    # Silent after five intervals of 30 seconds.
    session.execute("UPDATE analytics_setting SET reading_interval = '30 seconds'")
    send_now(session, "meter", "MTR-1", 0.25, ago=10, delay=1)
    send_now(session, "meter", "MTR-2", 0.5, ago=149, delay=1_000)
    send_now(session, "meter", "MTR-3", 0, ago=20, delay=3)
    send_now(session, "meter", "MTR-4", 8, ago=150, delay=2_000)
    send_now(session, "vehicle", "VEH-1", 0.125, ago=10.5, delay=5)
    send_now(session, "vehicle", "VEH-2", 0, ago=119, delay=-2)
    send_now(session, "vehicle", "VEH-3", 4, ago=900, delay=1)
    # Without a timestamp of its own: no delay.
    send_now(session, "vehicle", "VEH-4", 0.5, ago=30, delay=0)
    (found,) = read(session, "SELECT *, now() - newest_received_at AS ago FROM fleet_now")
    silent = read(session, "SELECT kind, device_id FROM device_silent ORDER BY kind, device_id")
    assert [row["device_id"] for row in silent] == ["MTR-4", "VEH-3"]
    assert found == {
        "meters": 4,
        "vehicles": 4,
        "meters_silent": 1,
        "vehicles_silent": 1,
        "meters_drawing": 2,
        "vehicles_charging": 2,
        "kw_ac": 0.75 * 120,
        "kw_dc": 0.625 * 120,
        "newest_received_at": found["newest_received_at"],
        "ago": timedelta(seconds=10),
        # Of -2, 1, 3 and 5 seconds.
        "median_delay_s": pytest.approx(2),
        "p95_delay_s": pytest.approx(3 + 0.85 * 2),
    }


# --- what everything is called, and who may see it ---------------------------------------------------------

# The functions that come with a range type, or an extension, need no comment of ours.
UNEXPLAINED = """
    WITH object AS (
        SELECT 'pg_class'::regclass AS catalog, oid, 0 AS column_number, relname::text AS name
        FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT relispartition
        UNION ALL
        SELECT 'pg_class'::regclass, class.oid, attnum, class.relname || '.' || attname
        FROM pg_attribute
        JOIN pg_class AS class ON class.oid = attrelid
        WHERE class.relnamespace = 'public'::regnamespace AND class.relkind IN ('r', 'p', 'v', 'm', 'f')
            AND NOT class.relispartition AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT 'pg_proc'::regclass, oid, 0, oid::regprocedure::text
        FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'pg_type'::regclass, oid, 0, typname::text
        FROM pg_type
        WHERE typnamespace = 'public'::regnamespace AND typtype IN ('d', 'e', 'r')
    )
    SELECT name
    FROM object
    LEFT JOIN pg_description AS said ON said.classoid = catalog AND said.objoid = oid AND said.objsubid = column_number
    WHERE coalesce(btrim(said.description), '') = '' AND NOT EXISTS (
        SELECT FROM pg_depend AS part
        WHERE catalog = 'pg_proc'::regclass AND part.classid = catalog AND part.objid = oid
            AND part.deptype IN ('i', 'e')
    )
    ORDER BY name
"""


def test_everything_has_a_comment(session: Connection[Row]) -> None:
    assert [row["name"] for row in read(session, UNEXPLAINED)] == []


def test_the_search_for_missing_comments_finds_them(session: Connection[Row]) -> None:
    session.execute("CREATE VIEW silent_view AS SELECT 1 AS silent_column")
    session.execute("CREATE TABLE silent_table (id integer) PARTITION BY RANGE (id)")
    session.execute("CREATE TABLE silent_partition PARTITION OF silent_table DEFAULT")
    session.execute("CREATE FUNCTION silent_function() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    session.execute("COMMENT ON COLUMN device_silent.kind IS ' '")
    session.execute("COMMENT ON VIEW device_silent IS NULL")
    assert [row["name"] for row in read(session, UNEXPLAINED)] == sorted(
        [
            "device_silent",
            "device_silent.kind",
            "silent_function()",
            "silent_table",
            "silent_table.id",
            "silent_view",
            "silent_view.silent_column",
        ]
    )


def test_comments_give_the_unit(session: Connection[Row]) -> None:
    """Of energy and power, of state of charge, voltage, temperature and delay; a share or ratio says of what."""
    numbers = read(
        session,
        """
        SELECT relname || '.' || attname AS name, col_description(attrelid, attnum) AS said
        FROM pg_attribute
        JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v') AND NOT relispartition
            AND atttypid IN ('real'::regtype, 'double precision'::regtype, 'numeric'::regtype) AND attnum > 0
        """,
    )
    assert len(numbers) > 40
    units = ("kWh", "kW", " V.", "percent", "Celsius", "seconds", " / ", "DC over AC", "from 0 to 1", "kwh_ac - kwh_dc")
    assert [row for row in numbers if not any(unit in row["said"] for unit in units)] == []


def by_role(session: Connection[Row], role: str, statement: str) -> None:
    """Runs a statement as a role, and takes it back."""
    with session.transaction(force_rollback=True):
        session.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        session.execute(statement.encode())


CALLS = [
    "energy_by_quarter_hour(now() - interval '1 day')",
    "energy_by_hour(now() - interval '1 day', meter => 'MTR-1')",
    "energy_by_day(now() - interval '1 day', vehicle => 'VEH-1')",
    "device_quality('MTR-1')",
    "charger_performance('MTR-1')",
    "charger_sessions('MTR-1')",
    "charger_vehicles('MTR-1')",
    "fleet_faults(now() - interval '1 day')",
    "vehicle_efficiency_by_hour('VEH-1', now() - interval '1 day')",
]


def test_the_reader_may_read_all_views_and_no_table(session: Connection[Row]) -> None:
    store(session, "meter", "MTR-1", in_time([now() - timedelta(hours=2)]))
    relations = read(
        session,
        "SELECT relname, relkind::text FROM pg_class "
        "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')",
    )
    views = {row["relname"] for row in relations if row["relkind"] in "vm"}
    assert {"meter_status", "device_silent", "data_quality", "dead_letter_summary"} <= views
    for view in views:
        by_role(session, "wattbridge_reader", f"SELECT * FROM {view}")
    for call in CALLS:
        by_role(session, "wattbridge_reader", f"SELECT * FROM {call}")
    tables = {row["relname"] for row in relations} - views
    assert {"meter_history", "dead_letter", "analytics_setting", "meter_quarter_hour"} <= tables
    for table in tables:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            by_role(session, "wattbridge_reader", f"SELECT * FROM {table}")


def test_nobody_else_may_call_what_runs_as_the_owner(session: Connection[Row]) -> None:
    open_to_all = read(
        session,
        "SELECT oid::regprocedure::text AS name FROM pg_proc "
        "WHERE pronamespace = 'public'::regnamespace AND prosecdef AND prorettype <> 'trigger'::regtype "
        "AND has_function_privilege('public', oid, 'EXECUTE') ORDER BY 1",
    )
    assert open_to_all == []
    assert one_value(session, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'energy_by_%' AND prosecdef") == 3


def one_value(session: Connection[Row], query: str) -> object:
    (row,) = read(session, query)
    (value,) = row.values()
    return value
