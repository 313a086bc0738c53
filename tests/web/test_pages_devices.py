"""Pages of vehicles and chargers against SQL asked directly, as HTML without a browser."""

import asyncio
import json
from collections import Counter
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.client import HTTPConnection
from itertools import pairwise
from typing import Any

import pytest

from bridge.web.pages import device
from bridge.web.pages.vehicle import efficiency_by_hour
from bridge.web.problems import ProblemError
from tests.analytics.asking import connected, rows
from tests.integration.harness import ask, one
from tests.web.browsing import Element, look, table, tiles
from tests.web.serving import Web

DAY = "since=2026-02-10T00:00:00Z&until=2026-02-11T00:00:00Z"
AT = datetime(2026, 2, 10, 14, tzinfo=UTC)


def chart(html: Element, name: str) -> dict[str, Any]:
    return json.loads(html.one("figure", id=name).one("script").text)


def asked(dsn: str, query: str, *parameters: object) -> list[dict[str, Any]]:
    with connected(dsn) as connection:
        return rows(connection, query, *parameters)


def test_the_worked_example_is_on_the_page_of_its_vehicle(web: Web, fleet: str) -> None:
    html = look(web, f"/vehicles/V1?{DAY}")
    (sql,) = asked(fleet, "SELECT * FROM vehicle_performance('V1', '2026-02-10Z', '2026-02-11Z')")
    assert tiles(html)["Efficiency, DC / AC"].values[0] == sql["efficiency"] == pytest.approx(0.900963164473201)
    assert tiles(html)["Efficiency, DC / AC"].text.startswith("90.1 %")
    assert tiles(html)["AC energy"].values == [sql["kwh_ac"]]
    assert tiles(html)["DC energy"].values == [sql["kwh_dc"]]
    assert tiles(html)["Lost"].values == [sql["loss_kwh"]]
    assert tiles(html)["Unattributed DC"].values == [0]
    assert tiles(html)["Sessions"].values == [1]
    (session,) = table(html, "Sessions")
    (sql,) = asked(fleet, "SELECT * FROM charging_sessions('V1', '2026-02-10Z', '2026-02-11Z')")
    names = ("kwh_ac", "kwh_dc", "efficiency", "mean_kw", "peak_kw", "soc_from", "soc_to")
    assert [value for cell in session for value in cell.values] == [sql[name] for name in names]
    assert session[2].all("a", href="/chargers/M1")
    assert chart(html, "soc")["series"][0]["values"][1:-1] == [20.7, 21.38, 22.16, 23.09, 24.08]
    assert chart(html, "power")["series"][0]["values"][1:-1] == pytest.approx(
        [60 * kwh for kwh in (0.4227, 0.4037, 0.4670, 0.5588, 0.5986)], abs=1e-4
    )


@pytest.mark.parametrize("vehicle", ["VEH-00", "VEH-03", "VEH-04"])
def test_a_vehicle_now_and_in_the_last_hours(web: Web, fleet: str, vehicle: str) -> None:
    html = look(web, f"/vehicles/{vehicle}")
    (now,) = asked(fleet, "SELECT * FROM vehicle_status WHERE vehicle_id = %s", vehicle)
    assert tiles(html)["State of charge"].values == [now["soc"]]
    assert tiles(html)["DC power"].values[0] == pytest.approx(now["kwh_dc"] * 60)
    assert tiles(html)["Battery temperature"].values == [now["battery_temp"]]
    (newest,) = [hint for hint in html.all("span", class_="hint") if hint.text.startswith("Newest reading")]
    assert newest.one("time").attributes["datetime"] == now["ts"].isoformat().replace("+00:00", "Z")
    (sql,) = asked(fleet, "SELECT * FROM vehicle_performance(%s)", vehicle)
    efficiency = tiles(html)["Efficiency, DC / AC"]
    if sql["efficiency"] is None:
        assert "more DC than AC" in efficiency.text
        assert tiles(html)["Lost"].text == "—unknown"
    else:
        assert efficiency.values[0] == sql["efficiency"]
        assert tiles(html)["Lost"].values == [sql["loss_kwh"]]
    assert tiles(html)["Unattributed DC"].values == [sql["unattributed_kwh_dc"]]
    # Newest first.
    sessions = asked(fleet, "SELECT * FROM charging_sessions(%s, now() - interval '24 hours')", vehicle)[::-1]
    assert len(sessions) == (2 if vehicle == "VEH-00" else 1)
    shown = [row[0].all("time")[0].attributes["datetime"] for row in table(html, "Sessions")]
    assert shown == [session["started"].isoformat().replace("+00:00", "Z") for session in sessions]
    if vehicle == "VEH-04":
        # More DC than AC in each hour: there is nothing to draw.
        assert not html.all("figure", id="efficiency")
        return
    bars = [value for value in chart(html, "efficiency")["series"][0]["values"] if value is not None]
    hours = asked(fleet, "SELECT * FROM vehicle_efficiency_by_hour(%s, now() - interval '24 hours')", vehicle)
    known = [hour["efficiency"] * 100 for hour in hours if hour["efficiency"] is not None]
    assert bars == pytest.approx(known, abs=1e-4)
    assert bars


def test_no_line_is_drawn_over_the_half_hour_in_which_a_vehicle_was_away(web: Web, fleet: str) -> None:
    soc = chart(look(web, "/vehicles/VEH-00"), "soc")
    history = asked(fleet, "SELECT ts, soc FROM vehicle_history WHERE vehicle_id = 'VEH-00' ORDER BY ts")
    points = [(x, y) for x, y in zip(soc["x"], soc["series"][0]["values"], strict=True)]
    assert [point for point in points if point[1] is not None] == [
        (row["ts"].timestamp(), row["soc"]) for row in history
    ]
    away = next(x for (x, y), (_, after) in pairwise(points[1:]) if y is None and after is not None)
    assert history[19]["ts"].timestamp() < away < history[20]["ts"].timestamp()


def test_a_week_is_drawn_as_means_of_quarter_hours(web: Web, fleet: str) -> None:
    html = look(web, "/vehicles/VEH-00?hours=168")
    soc, power = chart(html, "soc"), chart(html, "power")
    sql = asked(
        fleet,
        "SELECT extract(epoch FROM date_bin('15 minutes', ts, 'epoch'))::float AS x, avg(soc) AS soc, "
        "sum(kwh_dc) * 4 AS kw FROM vehicle_history WHERE vehicle_id = 'VEH-00' GROUP BY x ORDER BY x",
    )
    steps = {after - before for before, after in pairwise(soc["x"])}
    assert steps == {900}
    for shown, name in ((soc, "soc"), (power, "kw")):
        known = [(x, y) for x, y in zip(shown["x"], shown["series"][0]["values"], strict=True) if y is not None]
        assert known == [(row["x"], pytest.approx(row[name], abs=1e-4)) for row in sql]


def test_dead_letters_and_the_quality_of_readings(web: Web, fleet: str) -> None:
    html = look(web, "/vehicles/VEH-00")
    (sql,) = asked(fleet, "SELECT * FROM device_quality('VEH-00') WHERE kind = 'vehicle'")
    missing, late, _, duplicates, conflicts = table(html, "Data quality")
    assert missing[0].values == [sql["missing_share"]]
    assert missing[1].values[:2] == [sql["readings"], sql["expected_readings"]]
    assert late[0].values == [sql["late_share"]] == [1]
    assert (duplicates[0].values, conflicts[0].values) == ([sql["duplicates"]], [sql["conflicts"]])
    said = " ".join(item.text for item in html.all("li"))
    reasons = Counter(
        row["reason"] for row in asked(fleet, "SELECT reason FROM dead_letter WHERE device_id = 'VEH-00'")
    )
    assert sum(reasons.values()) == 3
    for reason, letters in reasons.items():
        assert f"{letters} {'is' if letters == 1 else 'are'} “{reason}”" in said


def test_a_charger_its_vehicles_and_what_is_at_fault(web: Web, fleet: str) -> None:
    html = look(web, "/chargers/MTR-03")
    (now,) = asked(fleet, "SELECT * FROM meter_status WHERE meter_id = 'MTR-03'")
    assert tiles(html)["AC power"].values[0] == pytest.approx(now["kwh_ac"] * 60)
    assert tiles(html)["Voltage"].values == [now["voltage"]]
    (sql,) = asked(fleet, "SELECT * FROM charger_performance('MTR-03')")
    assert tiles(html)["Efficiency, DC / AC"].values == [sql["efficiency"], sql["matched_minutes"]]
    assert tiles(html)["AC energy"].values == [sql["kwh_ac"]]
    assert tiles(html)["Lost"].values == [sql["loss_kwh"]]
    assert tiles(html)["Unattributed AC"].values == [sql["unattributed_kwh_ac"]]
    assert "inefficient" in [badge.text for badge in html.all("span", class_="bad")]
    (there,) = table(html, "Vehicles")
    (sql,) = asked(fleet, "SELECT * FROM charger_vehicles('MTR-03')")
    assert there[0].text == sql["vehicle_id"]
    assert there[1].values == [sql["efficiency"]]
    # Only this one vehicle was ever here, and it nowhere else.
    assert (
        one(fleet, "SELECT verdict FROM fleet_faults(now() - interval '24 hours') WHERE meter_id = 'MTR-03'")
        == "cannot tell"
    )
    (pair,) = table(html, "At fault: cannot tell")
    assert pair[0].text == "VEH-03"
    assert pair[4].text == "— charged nowhere else"
    assert len(table(html, "Sessions")) == 1
    readings = asked(
        fleet, "SELECT kwh_ac * 60 AS kw, voltage FROM meter_history WHERE meter_id = 'MTR-03' ORDER BY ts"
    )
    assert chart(html, "power")["series"][0]["values"][1:-1] == pytest.approx([row["kw"] for row in readings], abs=1e-4)
    assert chart(html, "voltage")["series"][0]["values"][1:-1] == [row["voltage"] for row in readings]
    assert not look(web, "/chargers/MTR-00").all("h2", id="fault")


@pytest.mark.parametrize(
    ("charger", "verdict", "elsewhere"),
    [
        ("MTR-20", "the charger", {"VEH-20": 0.95, "VEH-21": 0.95, "VEH-22": 0.5}),
        ("MTR-21", "the vehicle", {"VEH-20": 0.84, "VEH-21": 0.83, "VEH-22": 0.82}),
    ],
)
def test_which_of_them_is_at_fault_where_vehicles_come_and_go(
    web: Web, fleet: str, charger: str, verdict: str, elsewhere: dict[str, float]
) -> None:
    pairs = table(look(web, f"/chargers/{charger}"), f"At fault: {verdict}")
    sql = asked(
        fleet,
        "SELECT fault.* FROM closed_24h, fleet_faults(since, until) AS fault WHERE meter_id = %s ORDER BY efficiency",
        charger,
    )
    assert [pair[0].text for pair in pairs] == [row["vehicle_id"] for row in sql]
    names = ("kwh_ac", "efficiency", "elsewhere_kwh_ac", "elsewhere_efficiency")
    assert [[value for cell in pair for value in cell.values] for pair in pairs] == [
        [row[name] for name in names] for row in sql
    ]
    assert {pair[0].text: pair[4].values[0] for pair in pairs} == pytest.approx(elsewhere)


def test_a_week_of_voltage_is_drawn_as_means(web: Web, fleet: str) -> None:
    values = chart(look(web, "/chargers/MTR-03?hours=168"), "voltage")["series"][0]["values"]
    sql = asked(
        fleet,
        "SELECT avg(voltage) AS v FROM meter_history WHERE meter_id = 'MTR-03' "
        "GROUP BY date_bin('15 minutes', ts, 'epoch') ORDER BY min(ts)",
    )
    assert [value for value in values if value is not None] == pytest.approx([row["v"] for row in sql], abs=1e-4)


def test_a_charger_that_is_named_but_never_reported(web: Web, fleet: str) -> None:
    look(web, "/chargers/MTR-GHOST", 404)
    past = look(web, f"/chargers/MTR-GHOST?{DAY}", 404).one("main").text
    assert past.count("no vehicle named it in the 30 days before 2026-02-11T00:00:00Z") == 1
    ask(fleet, "INSERT INTO charger_assignment VALUES ('-1', 'MTR-GHOST', tstzrange(now() - interval '1 day', NULL))")
    try:
        # What is known of no such charger is kept for a moment.
        html = look(web, "/chargers/MTR-GHOST?hours=23")
        said = "Vehicles name this charger, but its meter never sent a reading: nobody knows what it draws."
        assert said in [notice.text for notice in html.all("p")]
        assert [row[0].text for row in table(html, "Vehicles")] == ["-1"]
        assert not html.all("figure")
        # Not in the 30 days before another time, which is asked for the first time.
        look(web, f"/chargers/MTR-GHOST?{DAY.replace('11T00', '11T02')}", 404)
    finally:
        ask(fleet, "DELETE FROM charger_assignment WHERE meter_id = 'MTR-GHOST'")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/vehicles/V3", "there has been no reading of a vehicle V3"),
        ("/chargers/V1", "there has been no reading of a meter V1, and no vehicle named it in the last 30 days"),
    ],
)
def test_an_unknown_device_is_a_page_that_says_so(web: Web, path: str, said: str) -> None:
    assert said in look(web, path, 404).text


@pytest.mark.parametrize("path", ["/vehicles/V1", "/chargers/M1"])
def test_a_known_device_without_readings_in_the_window(web: Web, path: str) -> None:
    html = look(web, path)
    notices = [notice.text for notice in html.all("p", class_="warn")]
    assert any("in the last 24 hours: the newest one is of 2026-02-10 14:5" in notice for notice in notices), notices
    assert not html.all("figure")


def test_one_reading_has_no_power(web: Web) -> None:
    html = look(web, "/vehicles/-1")
    assert tiles(html)["DC power"].text.startswith("— it takes two readings")
    assert "no meter known" in tiles(html)["Efficiency, DC / AC"].text


@pytest.mark.parametrize("path", ["/vehicles/", "/chargers/"])
@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a b", "x" * 129])
def test_what_is_no_id_is_shown_as_text(web: Web, path: str, name: str) -> None:
    answer = web.ask(path + name.replace("/", "%2F"), headers={"Accept": "text/html"}, safe="%/")
    assert answer.status in {404, 422}
    assert b"<script>alert" not in answer.body


@pytest.mark.parametrize("query", ["hours=0", "hours=24&since=2026-02-10T00:00:00Z", "since=yesterday", "unknown=1"])
def test_what_is_no_window_is_refused(web: Web, query: str) -> None:
    look(web, f"/vehicles/VEH-00?{query}", 422)
    look(web, f"/chargers/MTR-00?{query}", 422)


@pytest.mark.parametrize(
    ("path", "query", "condition"),
    [
        ("vehicles", "", "true"),
        ("vehicles", "charging=true&silent=&online=", "charging"),
        ("vehicles", "silent=true", "vehicle_id IN (SELECT device_id FROM device_silent WHERE kind = 'vehicle')"),
        (
            "vehicles",
            "online=false&silent=false",
            "online = false AND vehicle_id NOT IN (SELECT device_id FROM device_silent)",
        ),
        ("chargers", "finding=", "true"),
        ("chargers", "online=true", "online"),
        ("chargers", "finding=inefficient", "meter_id IN (SELECT meter_id FROM faulty WHERE finding = 'inefficient')"),
        (
            "chargers",
            "finding=any&silent=true",
            "meter_id IN (SELECT meter_id FROM faulty) AND meter_id IN (SELECT device_id FROM device_silent)",
        ),
    ],
)
def test_lists_go_on_until_all_were_shown(web: Web, fleet: str, path: str, query: str, condition: str) -> None:
    kind = "vehicle" if path == "vehicles" else "meter"
    expected = [
        row["id"]
        for row in asked(
            fleet,
            "WITH faulty AS (SELECT * FROM charger_performance_24h WHERE finding IS NOT NULL) "
            f"SELECT {kind}_id AS id FROM {kind}_status WHERE {condition} ORDER BY 1",
        )
    ]
    found: list[str] = []
    following: str | None = f"/{path}?limit=5&{query}"
    while following:
        html = look(web, following)
        ids = [row.all("td")[0].text for row in html.all("tr") if row.all("td")]
        assert len(ids) <= 5
        found += ids
        links = [link.attributes["href"] for link in html.all("a", rel="next")]
        following = links[0] if links else None
    assert found == expected
    assert expected or "online" in query


def test_the_form_shows_what_is_chosen(web: Web) -> None:
    html = look(web, "/chargers?finding=inefficient&charging=false&silent=&online=true")
    chosen = {
        select.attributes["name"]: [
            option.attributes["value"] for option in select.all("option") if "selected" in option.attributes
        ]
        for select in html.all("select")
    }
    assert chosen == {"charging": ["false"], "silent": [], "online": ["true"], "finding": ["inefficient"]}
    look(web, "/chargers?finding=none", 422)
    look(web, "/vehicles?charging=maybe", 422)


def test_nothing_on_a_page_changes_by_itself(web: Web) -> None:
    pages = {f"/chargers/M1?{DAY}": "Charger M1", "/vehicles/VEH-00": "Vehicle VEH-00", "/chargers": "Chargers"}
    with ExitStack() as stack:
        streams = []
        for path in pages:
            connection = stack.enter_context(closing(HTTPConnection("127.0.0.1", web.port, timeout=10)))
            connection.request("GET", path, headers={"Accept": "text/event-stream"})
            streams.append(stack.enter_context(connection.getresponse()))
        for response, heading in zip(streams, pages.values(), strict=True):
            said = ""
            # A minute or a quarter hour may just end, but not again so soon.
            while "event: unchanged" not in said and said.count("event: ") < 4:
                said += response.readline().decode()
            assert "event: unchanged" in said
            assert f"<h1>{heading}</h1>" in said
            assert "<html" not in said


def readings(*minutes: float) -> list[dict[str, Any]]:
    return [{"timestamp": AT + timedelta(minutes=minute), "kwh": 0.1, "soc": minute} for minute in minutes]


def test_a_silence_of_more_than_three_intervals_is_a_gap() -> None:
    drawn = device.one_by_one(readings(0, 1, 2, 5, 6, 9.1, 10))
    at = AT.timestamp()
    known = [((point["x"] - at) / 60, point.get("soc")) for point in drawn.points]
    assert known == [
        (0, 0),
        (1, 1),
        (2, 2),
        (5, 5),
        (6, 6),
        (pytest.approx(8.1), None),
        (pytest.approx(9.1), 9.1),
        (10, 10),
    ]
    # Energy is of the time since the reading before; after a silence of the usual time.
    assert [point.get("kw") for point in drawn.points] == [
        None if kw is None else pytest.approx(kw) for kw in (6, 6, 6, 2, 6, None, 6, 6 / 0.9)
    ]


def test_a_single_reading_has_no_power_and_none_are_no_chart() -> None:
    (point,) = device.one_by_one(readings(0)).points
    assert point["kw"] is None
    assert not device.one_by_one([]).chart("kw", "Power", "kW")["known"]


def test_what_a_chart_says_in_words() -> None:
    assert device.in_words([None, 2.5, 11, None], "kW") == "from 2.5 to 11 kW, at last 11 kW"
    assert device.in_words([None], "kW") == "nothing is known"


@pytest.mark.parametrize(("hours", "step"), [(25, 900), (168, 900), (720, 3_600), (8_784, 21_600), (500_000, 604_800)])
def test_there_are_never_too_many_buckets(hours: float, step: int) -> None:
    assert device.step_for(hours) == step
    assert hours > 8_784 or hours * 3_600 / step <= device.MOST_BUCKETS


def test_hours_of_a_time_zone_that_begin_at_half_past() -> None:
    starts = AT + timedelta(minutes=30)
    drawn = efficiency_by_hour([{"starts": starts, "efficiency": 0.9}], (AT, AT + timedelta(hours=3)))
    known = [(point["x"], point["percent"]) for point in drawn.points if point["percent"] is not None]
    assert known == [((starts + timedelta(minutes=30)).timestamp(), 90)]


def test_what_is_kept_is_asked_once_and_again_after_a_failure() -> None:
    class Questions:
        asked = 0

        async def ask(self, question: str, **parameters: object) -> list[dict[str, object]]:
            self.asked += 1
            if self.asked == 1:
                raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, "the database is away")
            return [{"question": question, **parameters}]

    async def asking() -> None:
        questions = Questions()
        kept = device.Kept(questions)
        with pytest.raises(ProblemError):
            await kept.ask("findings", since=1)
        both = await asyncio.gather(kept.ask("findings", since=1), kept.ask("findings", since=1))
        assert [*both, await kept.ask("findings", since=1)] == [[{"question": "findings", "since": 1}]] * 3
        assert questions.asked == 2
        await kept.ask("findings", since=2)
        assert questions.asked == 3
        # Not without end.
        for since in range(1_000):
            await kept.ask("all_faults", since=since)
        assert len(kept._answers) == device.MOST_KEPT

    asyncio.run(asking())


def test_months_are_drawn_without_voltage_and_a_year_without_hours(web: Web) -> None:
    cards = look(web, "/chargers/MTR-03?hours=800").all("section", class_="card")
    assert "Voltage— choose 31 days or less" in [card.text for card in cards]
    html = look(web, "/vehicles/V1?since=2025-06-01T00:00:00Z&until=2026-11-01T00:00:00Z")
    assert not html.all("figure", id="efficiency")
    power = chart(html, "power")
    (x,) = (x for x, kw in zip(power["x"], power["series"][0]["values"], strict=True) if kw is not None)
    assert x == datetime(2026, 2, 10, tzinfo=UTC).timestamp()
    assert [kw for kw in power["series"][0]["values"] if kw is not None] == pytest.approx([2.4508 / 24], abs=1e-4)
