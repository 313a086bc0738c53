"""The pages in a real browser, headless: Debian's Chromium. Without one these tests are skipped, and say so."""

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from tests.integration.conftest import Broker
from tests.integration.harness import Daemon, Publisher, ask, meter, one, vehicle, wait_for_received, wait_until
from tests.web.serving import Web, login

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
# As root, and in most containers, it cannot make its sandbox. It sees nothing but our own pages.
ARGUMENTS = ["--no-sandbox"]
LIVE = ["/", "/vehicles", "/vehicles/VEH-03", "/chargers", "/chargers/MTR-03", "/ingest"]
STILL = ["/find?id=VEH", "/nothing"]
# What Chromium itself says of an answer that is an error, or of a line that was cut.
NOT_LOADED = r"error: Failed to load resource: the server responded with a status of {} \([A-Za-z ]+\) at {}"
CUT = r"error: Failed to load resource: net::ERR_[A-Z_]+ at {}"
# Why a page stands still is not worth 30 s of a test: time goes on as told.
SECOND_MS = 1_000
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
PATIENCE_MS = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of this module alone: as long as it runs, no other test could run a loop of its own."""
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: nobody has looked at the pages in a browser; install it (Debian: chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@contextmanager
def opened(browser: Browser, web: Web, path: str = "/", forgiven: str = "", **options: Any) -> Iterator[Page]:
    """A page that is open; at the end it must not have complained, nor asked for anything elsewhere.

    `forgiven`: the whole of what the browser may say, and where, as that is the test's doing; a regular expression.
    """
    context = browser.new_context(base_url=f"http://127.0.0.1:{web.port}", **{"viewport": DESKTOP, **options})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console",
        lambda said: complaints.append(f"{said.type}: {said.text} at {urlsplit(said.location['url']).path}"),
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not_ours(request.url, web) else None)
    try:
        page.goto(path)
        yield page
    finally:
        context.close()
    assert [complaint for complaint in complaints if not re.fullmatch(forgiven, complaint)] == []


def not_ours(url: str, web: Web) -> bool:
    return urlsplit(url).netloc != f"127.0.0.1:{web.port}"


def live(page: Page) -> None:
    expect(page.locator("#connection")).to_contain_text("Live", timeout=PATIENCE_MS)


def values(page: Page, selector: str) -> list[float]:
    return [float(data.get_attribute("value") or "") for data in page.locator(f"{selector} data").all()]


@pytest.mark.parametrize("path", LIVE + STILL)
def test_anybody_can_read_it_on_any_screen(browser: Browser, web: Web, path: str) -> None:
    forgiven = NOT_LOADED.format(404, path) if path == "/nothing" else ""
    with opened(browser, web, path, forgiven, color_scheme="light") as page:
        if path in LIVE:
            live(page)
            # By which an update knows them again.
            assert page.locator("main :is(tr, li):has(a):not([id])").count() == 0
            ids = [found.get_attribute("id") for found in page.locator("[id]").all()]
            assert sorted(set(ids)) == sorted(ids)
        readable(page)


def readable(page: Page) -> None:
    """Fails unless axe finds nothing to say, in both themes, on a desk and on a phone."""
    for scheme, size in (("light", DESKTOP), ("dark", PHONE)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(size)
        found = Axe().run(page)
        assert not found.violations_count, found.generate_report()
        # The page itself never scrolls to the side.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for table in page.locator("table").all():
            box = table.locator("xpath=ancestor::*[@tabindex='0']")
            assert box.count() == 1 or table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")


def test_a_page_without_a_database_asks_again_until_there_is_one(browser: Browser, reader: str, tmp_path: Path) -> None:
    away = Web("postgresql://nobody@127.0.0.1:1/nowhere", tmp_path)
    with away, opened(browser, away, forgiven=f"{NOT_LOADED.format(503, '/')}|{CUT.format('/')}") as page:
        page.clock.install()
        page.reload()
        readable(page)
        expect(page.locator("#again")).to_contain_text("asks again by itself")
        expect(page.locator("#connection")).to_have_count(0)
        for pause in (5, 10):
            with page.expect_response(lambda answer: answer.status == 503):
                page.clock.run_for(pause * SECOND_MS)
            page.wait_for_timeout(200)
        away.kill()
        away.env["WATTBRIDGE_DATABASE__DSN"] = reader
        away.start()
        page.clock.run_for(20 * SECOND_MS)
        expect(page.locator("h1")).to_have_text("Fleet")


def test_the_fleet_shows_what_sql_says(browser: Browser, web: Web, fleet: str) -> None:
    ((ac, dc, efficiency, loss),) = ask(fleet, "SELECT kwh_ac, kwh_dc, efficiency, loss_kwh FROM fleet_summary_24h")
    with opened(browser, web) as page:
        tile = ".tile:has(dt:text-is('{}')) dd"
        assert values(page, tile.format("AC energy"))[0] == ac
        assert values(page, tile.format("DC energy"))[0] == dc
        assert values(page, tile.format("Lost"))[0] == loss
        assert values(page, tile.format("Efficiency, DC / AC")) == [efficiency]
        expect(page.locator(tile.format("Efficiency, DC / AC"))).to_have_text(f"{efficiency:.1%}".replace("%", " %"))
        # Drawn, with both lines; and following a link leads to a page of the worst one.
        expect(page.locator("#power .u-series")).to_have_count(3)
        assert page.locator("#power canvas").bounding_box()["width"] > 500
        worst = one(fleet, "SELECT vehicle_id FROM fleet_inefficient ORDER BY loss_kwh DESC NULLS LAST LIMIT 1")
        page.locator("section:has(h2:text-is('Worst vehicles')) tbody a").first.click()
        expect(page.locator("h1")).to_contain_text(worst)


def test_a_reading_that_comes_is_on_the_open_page_a_moment_later(
    browser: Browser, postgres_dsn_admin: str, database: str, broker: Broker, tmp_path: Path
) -> None:
    begin = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    with (
        Daemon(database, broker, "test/live", tmp_path),
        Publisher(broker, "test/live") as devices,
        login(postgres_dsn_admin, database, "wattbridge_reader") as reader,
        Web(reader, tmp_path) as web,
    ):
        devices.send("meter", "MTR-1", meter("MTR-1", begin, 0.1))
        devices.send("vehicle", "VEH-1", vehicle("VEH-1", begin, 0.09, 40, at="MTR-1"))
        for payload in (b"[]", b"[]", {"vehicleId": "another"}):
            devices.send("vehicle", "VEH-1", payload)
        devices.flush()
        wait_for_received(database, 5)
        with (
            opened(browser, web, forgiven=CUT.format("/")) as fleet,
            opened(browser, web, "/vehicles/VEH-1", CUT.format("/vehicles/VEH-1")) as page,
            opened(browser, web, "/ingest", CUT.format("/ingest")) as ingest,
        ):
            live(fleet)
            live(page)
            live(ingest)
            power = ".tile:has(dt:text-is('AC power, by the meters')) dd"
            assert values(fleet, power)[0] == pytest.approx(6)
            # What somebody has reached or opened stays as it is.
            page.locator("#find").fill("VEH-")
            page.locator("#find").focus()
            page.evaluate("window.before = document.querySelector('h1')")
            devices.send("meter", "MTR-1", meter("MTR-1", begin + timedelta(minutes=1), 0.2))
            devices.send("vehicle", "VEH-1", vehicle("VEH-1", begin + timedelta(minutes=1), 0.18, 41.25, at="MTR-1"))
            devices.flush()
            expect(page.locator("main data[value='41.25']").first).to_be_visible()
            expect(fleet.locator(f"{power} data").first).to_have_attribute("value", "12.0")
            assert page.evaluate("window.before === document.querySelector('h1')")
            assert page.evaluate("document.activeElement.id") == "find"
            expect(page.locator("#find")).to_have_value("VEH-")
            # What has the focus stays the same where rows change places, whatever the browser knows of moving them.
            reasons = ingest.locator("section:has(h2:text-is('Dead letters by reason')) tbody a")
            frequent = reasons.first.text_content() or ""
            reasons.first.focus()
            ingest.evaluate("delete Element.prototype.moveBefore")
            for number in range(3):
                devices.send("vehicle", "VEH-1", {"vehicleId": f"another-{number}"})
            devices.flush()
            expect(reasons.nth(1)).to_have_text(frequent)
            expect(reasons.nth(1)).to_be_focused()
            # Where the line is cut it says so, and comes back by itself.
            web.kill()
            expect(page.locator("#connection")).to_have_attribute("data-state", "trouble")
            web.start()
            live(page)
            page.evaluate("dispatchEvent(new Event('pagehide'))")


def test_the_keyboard_is_enough(browser: Browser, web: Web) -> None:
    with opened(browser, web) as page:
        live(page)
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        expect(page.locator(".skip")).to_be_in_viewport()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        page.keyboard.press("Tab")
        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
        page.locator("#find").focus()
        page.keyboard.type("VEH-03")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_contain_text("VEH-03")
        # Wide tables are scrolled by the keyboard.
        page.set_viewport_size(PHONE)
        page.goto("/")
        box = page.locator(".scroll").first
        box.focus()
        page.keyboard.press("ArrowRight")
        wait_until(lambda: page.evaluate("document.querySelector('.scroll').scrollLeft > 0"), "scrolled")


def test_the_token_is_asked_for(browser: Browser, reader: str, tmp_path: Path) -> None:
    known = {"username": "anybody", "password": "fine-token"}
    with Web(reader, tmp_path, web__token="fine-token") as web:
        # There is nobody to be asked.
        with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"), opened(browser, web):
            pass
        # As a person who is asked: the browser sends it only after it was asked for it.
        with opened(browser, web, "/ingest", http_credentials=known) as page:
            live(page)


def test_without_javascript_it_is_all_there_but_not_live(browser: Browser, web: Web) -> None:
    with opened(browser, web, java_script_enabled=False) as page:
        expect(page.locator("#connection")).to_contain_text("stands still")
        assert len(values(page, ".tile")) > 10


def test_a_page_that_nobody_sees_asks_for_nothing(browser: Browser, web: Web) -> None:
    with opened(browser, web) as page:
        live(page)
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        before = page.locator("#connection").text_content()
        page.wait_for_timeout(2_500)
        assert page.locator("#connection").text_content() == before
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: false});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        expect(page.locator("#connection")).not_to_have_text(before)
        live(page)


def test_the_theme_of_the_charts_follows_the_system(browser: Browser, web: Web) -> None:
    drawn = "document.querySelector('#power canvas').toDataURL()"
    with opened(browser, web, color_scheme="light") as page:
        page.wait_for_selector("#power canvas")
        light = page.evaluate(drawn)
        page.emulate_media(color_scheme="dark")
        wait_until(lambda: page.evaluate(drawn) != light, "drawn again")


def test_a_server_that_falls_silent_is_noticed_and_heard_once(browser: Browser, web: Web) -> None:
    with opened(browser, web) as page:
        page.clock.install()
        page.reload()
        live(page)
        expect(page.locator("[role=status]")).to_have_text("This page is live.")
        web.signal(signal.SIGSTOP)
        try:
            page.wait_for_timeout(300)
            page.clock.run_for(20 * SECOND_MS)
            still = re.compile(r"Standing still since \d\d:\d\d:\d\d: nothing comes any more, trying again")
            expect(page.locator("#connection")).to_have_text(still)
            expect(page.locator("[role=status]")).to_have_text(still)
        finally:
            web.signal(signal.SIGCONT)
        live(page)
        expect(page.locator("[role=status]")).to_have_text("This page is live.")


def test_one_page_too_many_says_so_and_waits_for_a_place(browser: Browser, reader: str, tmp_path: Path) -> None:
    few = Web(reader, tmp_path)
    few.env["PYTHONPATH"] = str(Path(__file__).parent / "few_streams")
    with few, opened(browser, few) as first:
        live(first)
        first.evaluate("window.other = new EventSource('/vehicles')")
        wait_until(lambda: first.evaluate("other.readyState === EventSource.OPEN"), "two are open")
        with opened(browser, few, "/find?id=VEH") as page:
            page.clock.install()
            page.goto("/chargers")
            expect(page.locator("#connection")).to_have_text("Standing still: 2 pages are kept live already")
            first.evaluate("other.close()")
            page.wait_for_timeout(500)
            page.clock.run_for(30 * SECOND_MS)
            live(page)


def test_what_somebody_zoomed_in_on_stays_when_new_values_come(browser: Browser, web: Web) -> None:
    renewed = """() => {
        const figures = document.querySelector('#power script');
        const data = JSON.parse(figures.textContent);
        data.series[0].values[1] = (data.series[0].values[1] ?? 0) + 1;
        figures.textContent = JSON.stringify(data);
        window.said = [];
        Charts.draw(document);
    }"""
    with opened(browser, web) as page:
        page.add_init_script(
            "window.said = []; const write = CanvasRenderingContext2D.prototype.fillText;"
            "CanvasRenderingContext2D.prototype.fillText ="
            " function (text, ...rest) { said.push(text); return write.call(this, text, ...rest); }"
        )
        page.reload()

        def ticks() -> list[str]:
            said = page.evaluate("() => said.splice(0)")
            return [text for text in said if re.fullmatch(r"\d\d:\d\d(:\d\d)?|\d\d-\d\d", text)]

        box = page.locator("#power .u-over").bounding_box()
        assert box
        # It may be drawn twice at first, as it is fitted into its place.
        whole = list(dict.fromkeys(ticks()))
        for _ in range(2):
            ticks()
            page.mouse.move(box["x"] + 300, box["y"] + 50)
            page.mouse.down()
            page.mouse.move(box["x"] + 350, box["y"] + 50, steps=3)
            page.mouse.up()
            zoomed = ticks()
        # Told apart although they are of few minutes.
        assert zoomed[0].count(":") == 2
        assert len(set(zoomed)) == len(zoomed) > 3
        page.evaluate(renewed)
        assert ticks() == zoomed
        page.mouse.dblclick(box["x"] + 300, box["y"] + 50)
        assert ticks() == whole
        page.evaluate(renewed)
        assert ticks() == whole
