"""What all pages have in common, and the pages Fleet and Find."""

import http.client
import json
import re
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from bridge.web import site as site_module
from bridge.web.questions import REMEMBERED_S
from tests.analytics.asking import connected, rows
from tests.integration.harness import wait_until
from tests.web.browsing import answer_of, look, table, tiles
from tests.web.serving import Web

EVENTS = {"Accept": "text/event-stream"}
# Something may just move: a quarter hour closes, or the newest readings get too old to tell how late they are.
# An open page is told of some only a minute later.
MOST_MOVES = 40
PAGES = ["/", "/vehicles", "/vehicles/VEH-00", "/chargers", "/chargers/MTR-00", "/ingest", "/find?id=VEH"]


@contextmanager
def listening(web: Web, path: str = "/") -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=30)
    connection.request("GET", path, headers=EVENTS | basic(b"any:fine-token"))
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(response: http.client.HTTPResponse) -> tuple[str, str]:
    name, data = "", []
    while line := response.readline().decode().rstrip("\n"):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return name, "\n".join(data)


def first_event(response: http.client.HTTPResponse) -> tuple[str, str]:
    assert next_event(response) == ("", "")  # how long to wait before coming back
    return next_event(response)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_names_nothing_that_is_elsewhere_and_may_run_nothing_but_our_files(web: Web, path: str) -> None:
    answer = answer_of(web, path)
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "private, no-cache"
    html = answer.body.decode()
    assert not re.search(r"https?:|//[a-z]| style=| on[a-z]+=", html)
    page = look(web, path)
    for name, attribute in (("link", "href"), ("script", "src"), ("img", "src")):
        for element in page.all(name):
            if element.attributes.get("type") != "application/json":
                address = element.attributes[attribute] or ""
                found = web.ask(address)
                assert (found.status, found.headers["cache-control"]) == (200, "private, max-age=31536000, immutable")
    assert len(page.all("h1")) == 1


def test_files_are_there_with_their_licences_and_nothing_else_is(web: Web) -> None:
    assert web.ask("/static/style.css").headers["cache-control"] == "private, no-cache"
    for path in ("/static/", "/static/vendor/uplot/LICENSE", "/static/../app.py", "/static/%2e%2e/app.py", "/static/x"):
        assert web.ask(path).status == 404
    vendor = Path(site_module.__file__).parent / "static" / "vendor"
    for library in vendor.iterdir():
        assert "Permission" in (library / "LICENSE").read_text(encoding="utf-8")


def test_errors_are_pages_for_people_and_problems_for_programs(web: Web) -> None:
    assert "there is no such path" in look(web, "/nothing", 404).one("main").text.lower()
    assert "an id is 1 to 128 of" in look(web, "/find?id=a%20b", 422).one("main").text
    for path, accept in (("/nothing", "*/*"), ("/v1/nothing", "text/html")):
        answer = web.ask(path, headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/problem+json"
    assert web.ask("/", method="POST").status == 405


@pytest.fixture(scope="module")
def guarded(reader: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """With a token and a tariff; keeps two pages live and no more, and may take long to end."""
    settings = {"web__token": "fine-token", "web__tariff": 0.25, "web__currency": "CHF", "web__timeout_s": 100}
    web = Web(reader, tmp_path_factory.mktemp("guarded"), **settings)
    web.env["PYTHONPATH"] = str(Path(__file__).parent / "few_streams")
    with web:
        yield web


def basic(text: bytes) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(text).decode()}"}


TOKEN = basic(b"any:fine-token")


def test_a_browser_sends_the_token_as_a_password(guarded: Web) -> None:
    answer = answer_of(guarded, "/", 401)
    assert "a token is needed" in answer.body.decode().lower()
    for wrong in (basic(b"any:fine-toke"), basic(b"fine-token"), basic(b":"), {"Authorization": "Basic -"}):
        assert answer_of(guarded, "/", 401, wrong)
    assert look(guarded, "/", headers=TOKEN).one("h1").text == "Fleet"
    assert guarded.ask("/v1/ingest", headers=TOKEN).status == 200
    assert guarded.ask("/static/style.css").status == 401


def test_another_name_of_this_machine_is_nobodys_way_in(web: Web, guarded: Web) -> None:
    """A site could make its own name lead here, and a browser would then let it read the answers."""
    for path in ("/", "/v1/ingest", "/openapi.json"):
        assert web.ask(path, headers={"Host": "evil.example"}).status == 421
        assert web.ask(path, headers={"Host": f"evil.example:{web.port}"}).status == 421
        assert guarded.ask(path, headers={"Host": "energy.example", **TOKEN}).status == 200
    for host in ("localhost", "LOCALHOST:9465", "127.0.0.1", "[::1]:80"):
        assert web.ask("/v1/ingest", headers={"Host": host}).status == 200
    assert web.ask("/livez", headers={"Host": "10.0.0.7"}).status == 200


def test_losses_are_money_where_a_tariff_is_set(guarded: Web) -> None:
    page = look(guarded, "/", headers=TOKEN)
    loss, cost = tiles(page)["Lost"].values
    assert cost == pytest.approx(loss * 0.25)
    assert "at 0.25 CHF a kWh" in tiles(page)["Lost"].text
    for row in table(page, "Worst vehicles"):
        assert row[4].values == [pytest.approx(value * 0.25) for value in row[3].values]


def test_too_many_open_pages_stand_still_and_those_that_went_make_room(guarded: Web) -> None:
    def listens() -> bool:
        with listening(guarded) as response:
            return next_event(response)[0] != "full"

    with listening(guarded) as one, listening(guarded) as other:
        assert first_event(one)[0] == first_event(other)[0] == "changed"
        with listening(guarded) as refused:
            assert next_event(refused) == ("full", "2 pages are kept live already")
            assert not refused.read()
        assert look(guarded, "/", headers=TOKEN).one("h1").text == "Fleet"
    wait_until(listens, "room for one more")


def test_open_pages_do_not_hold_up_the_end(guarded: Web) -> None:
    with listening(guarded) as response:
        assert first_event(response)[0] == "changed"
        assert guarded.terminate() == 0
        while response.readline():
            pass
    guarded.start()


def test_without_a_database_a_page_says_so_and_comes_back_by_itself(tmp_path: Path) -> None:
    with Web("postgresql://127.0.0.1:1/nowhere", tmp_path) as web:
        page = look(web, "/", 503)
        assert "database" in page.one("main").text
        assert [script for script in page.all("script") if "/retry." in (script.attributes["src"] or "")]
        with listening(web) as response:
            name, said = first_event(response)
            assert name == "trouble"
            assert "database" in said


def test_events_tell_what_has_changed_and_only_that(web: Web) -> None:
    with listening(web) as response:
        assert response.getheader("x-accel-buffering") == "no"
        name, data = first_event(response)
        assert name == "changed"
        told, same = "", False
        for _ in range(MOST_MOVES):
            clock, _, html = data.partition("\n")
            assert re.fullmatch(r"\d\d:\d\d:\d\d", clock)
            assert bool(html) == (name == "changed")
            told = html or told
            if same and name == "unchanged":
                break
            same = "".join(told.split()) == "".join(web_main(web).split())
            name, data = next_event(response)
        assert (same, name) == (True, "unchanged")
        assert "<h1>Fleet</h1>" in told


def web_main(web: Web) -> str:
    html = answer_of(web, "/").body.decode()
    return html.partition('<main id="main" tabindex="-1">')[2].partition("</main>")[0]


def views(dsn: str) -> dict[str, list[dict[str, Any]]]:
    """What the page of the fleet shows, by SQL."""
    questions = {
        "day": "SELECT * FROM fleet_summary_24h",
        "now": "SELECT * FROM fleet_now",
        "vehicles": "SELECT * FROM fleet_inefficient ORDER BY loss_kwh DESC NULLS LAST, vehicle_id",
        "chargers": "SELECT * FROM charger_performance_24h WHERE finding IS NOT NULL "
        "ORDER BY loss_kwh DESC NULLS LAST, meter_id",
        "faults": "SELECT fault.* FROM closed_24h, fleet_faults(since, until) AS fault "
        "ORDER BY verdict <> 'charger', verdict <> 'vehicle', meter_loss_kwh DESC, meter_id, efficiency, vehicle_id",
    }
    with connected(dsn) as connection:
        return {name: rows(connection, query) for name, query in questions.items()}


def test_the_fleet_is_what_the_views_say(web: Web, fleet: str) -> None:
    for _ in range(3):
        before = views(fleet)
        # The page may be told what was asked up to a second ago.
        time.sleep(REMEMBERED_S)
        page = look(web, "/")
        if views(fleet) == before:
            break
    (day,), (now,), vehicles, chargers, faults = before.values()
    shown = tiles(page)
    assert shown["AC power, by the meters"].values == [now["kw_ac"], now["meters_drawing"], now["meters"]]
    assert shown["DC power, by the vehicles"].values == [now["kw_dc"], now["vehicles_charging"], now["vehicles"]]
    assert shown["Silent devices"].values[0] == now["meters_silent"] + now["vehicles_silent"] >= 5
    assert shown["Efficiency, DC / AC"].values == [day["efficiency"]]
    assert shown["AC energy"].values == [day["kwh_ac"], day["meters_reporting"]]
    assert shown["DC energy"].values == [day["kwh_dc"], day["vehicles_reporting"]]
    assert shown["Lost"].values == [day["loss_kwh"]]
    assert "web.tariff" in shown["Lost"].text
    assert shown["Inefficient vehicles"].values == [len(vehicles)]
    assert shown["Inefficient chargers"].values == [len(chargers)]
    assert [row[0].text for row in table(page, "Worst vehicles")] == [row["vehicle_id"] for row in vehicles]
    assert [row[2].values for row in table(page, "Worst vehicles")] == [[row["ratio"]] for row in vehicles]
    assert [row[0].text for row in table(page, "Worst chargers")] == [row["meter_id"] for row in chargers]
    assert [row[4].values for row in table(page, "Worst chargers")] == [
        [] if row["loss_kwh"] is None else [row["loss_kwh"]] for row in chargers
    ]
    mapped = table(page, "Which charger is at fault?")
    assert [(cells[0].text, vehicle.text) for cells in mapped for vehicle in cells[4].all("a")] == [
        (row["meter_id"], row["vehicle_id"]) for row in faults
    ]
    assert [(cells[0].text, cells[1].text) for cells in mapped] == [
        ("MTR-20", "the charger"),
        ("MTR-21", "the vehicle"),
        *((meter, "cannot tell") for meter in ("MTR-03", "MTR-08", "MTR-01", "MTR-02")),
    ]


def test_the_chart_of_the_fleet_is_its_energy(web: Web) -> None:
    page = look(web, "/")
    data = json.loads(page.one("figure", id="power").one("script").text)
    day = urlencode({name: web.get("/v1/analytics/fleet")[name] for name in ("since", "until")})
    energy = web.get(f"/v1/analytics/energy?resolution=quarter_hour&{day}")["items"]
    starts = [datetime.fromisoformat(row["starts"]).timestamp() for row in energy]
    for series, name in zip(data["series"], ("acConsumedKwh", "dcDeliveredKwh"), strict=True):
        known = {x: value / 4 for x, value in zip(data["x"], series["values"], strict=True) if value is not None}
        # As long as it is known how late readings are, the newest quarter hours are still to come.
        assert [*known] == starts[: len(known)]
        assert [*known.values()] == pytest.approx([row[name] for row in energy[: len(known)]])
        assert 0 < len(known) < len(data["x"]) == 96


def test_ids_are_found_by_their_beginning(web: Web) -> None:
    def leads_to(wanted: str) -> str | None:
        answer = web.ask(f"/find?id={wanted}", headers={"Accept": "text/html"})
        return answer.headers.get("location") if answer.status == 303 else None

    assert leads_to("VEH-03") == "/vehicles/VEH-03"
    assert leads_to("MTR-03") == "/chargers/MTR-03"
    assert leads_to("VEH-0") is None
    # One is the beginning of nothing else, and one is an id itself.
    assert (leads_to("VEH-11"), leads_to("V1")) == ("/vehicles/VEH-11", "/vehicles/V1")
    assert [link.text for link in look(web, "/find?id=MTR-1").one("main").all("a")] == ["MTR-10", "MTR-11"]
    assert "No vehicle and no meter" in look(web, "/find?id=nothing").one("main").text
    assert "No vehicle and no meter" in look(web, "/find?id=VEH_0").one("main").text
