"""The page Ingest before a real daemon: its figures, its dead letters, and what hostile ones do to it: nothing."""

import math
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from bridge.services import free_port
from bridge.web import daemons
from bridge.web.pages import ingest
from tests.integration.conftest import Broker
from tests.integration.harness import Daemon, Publisher, ask, cloned, meter, now, one, wait_for_received, wait_until
from tests.web.browsing import Element, answer_of, look, parsed
from tests.web.serving import Web, login

HOSTILE = {
    "script": b"<script>alert(1)</script>",
    "nul": b"\0\x01\x1b[31m",
    "binary": b"\xff\xfe" + bytes(range(30)),
    "bidi": "{\u202e\u2066<img src=x onerror=alert(1)>".encode(),
    "newline": b"\n\n{",
    "empty": b"",
    "large": "ä".encode() * 500_000 + b"!",
    "broken": b'{"meterId" : "A",\t1.0e400',
}
PLAIN = 60


def rows(page: Element) -> list[list[str]]:
    """What the rows of all tables say."""
    return [[cell.text for cell in row.all("th") + row.all("td")] for row in page.all("tr")]


def links(page: Element) -> list[str]:
    return [link.attributes["href"] or "" for link in page.all("a")]


def letters(page: Element) -> list[str]:
    """The ids of the dead letters of a list."""
    return [path.rpartition("/")[2] for path in links(page) if path.startswith("/ingest/letters/")]


class Place(NamedTuple):
    """A database with dead letters, its daemon that is still there, and the web before both."""

    dsn: str
    daemon: Daemon
    health: str
    web: Web
    devices: Publisher

    def page(self, path: str) -> Element:
        return look(self.web, path)

    def letter(self, device: str) -> str:
        return one(self.dsn, "SELECT id FROM dead_letter_list WHERE device_id = %s", device)


@pytest.fixture(scope="module")
def place(
    postgres_dsn_admin: str, template: str, broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("ingest")
    health, nobody = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with (
        cloned(postgres_dsn_admin, template) as dsn,
        login(postgres_dsn_admin, dsn, "wattbridge_reader") as reader,
        Daemon(dsn, broker, "test/ingest", folder, health__listen=health) as daemon,
        Publisher(broker, "test/ingest") as devices,
        Web(reader, folder, web__daemons=f"{health}, {nobody}") as web,
    ):
        for name, payload in HOSTILE.items():
            devices.send("meter", name, payload, content_type="a/<b>" if name == "script" else None)
        devices.send("meter", "<b>", b"{}")
        for number in range(PLAIN):
            devices.send("vehicle", f"V{number % 3}", f"[{number}".encode())
        devices.send("meter", "M1", meter("M1", now()))
        devices.flush()
        wait_for_received(dsn, len(HOSTILE) + 1 + PLAIN + 1)
        yield Place(dsn, daemon, health, web, devices)


# What the page says


def test_the_counters_are_those_of_the_database(place: Place) -> None:
    page = place.page("/ingest")
    ((*counted, updated),) = ask(
        place.dsn, "SELECT received, stored, duplicate, dead_lettered, presence, updated_at FROM ingest_status"
    )
    (row,) = [row for row in rows(page) if row[:1] == [place.daemon.client_id]]
    assert row[2:7] == [f"{value:,}" for value in counted]
    assert row[7] == f"{updated.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    summary = ask(place.dsn, "SELECT reason, letters, devices FROM dead_letter_summary")
    assert len(summary) == 2
    for reason, number, devices in summary:
        assert [reason, f"{number:,}", f"{devices:,}"] in [row[:3] for row in rows(page)]


def test_each_daemon_says_how_it_is_and_one_that_is_away_disturbs_nothing(place: Place) -> None:
    page = wait_until(
        lambda: "it does not answer: Connection refused" in (page := place.page("/ingest")).text and page, "asked"
    )
    facts = {row[0]: row[1] for row in rows(page) if len(row) == 2}
    assert facts["Broker"] == "connected"
    assert facts["Database"] == "takes what it gets"
    assert re.fullmatch(r"\d+ received and not yet committed, about 20,000 may be", facts["Backlog in the bridge"])
    assert f"Daemon {place.daemon.client_id}" in page.text
    assert "Daemon 127.0.0.1:" in page.text


def test_without_daemons_it_says_how_latency_becomes_known(web: Web) -> None:
    page = look(web, "/ingest")
    assert "name these addresses in web.daemons" in page.text
    assert "web.replay.dsn" in page.text
    assert not [form for form in page.all("form") if "method" in form.attributes]


def test_while_the_database_is_of_no_use_the_daemons_are_shown(
    postgres_dsn_admin: str, place: Place, tmp_path: Path
) -> None:
    with Web(postgres_dsn_admin, tmp_path, web__daemons=place.health) as web:
        page = wait_until(lambda: "connected" in (page := look(web, "/ingest")).text and page, "asked")
        assert "is not known now: the database lacks the schema" in page.text
        assert web.ask("/ingest/replay?reason=malformed").status == 503


def test_the_list_has_every_letter_once_the_newest_first(place: Place) -> None:
    for query in ("", "?reason=malformed", "?device=V1", "?reason=malformed&device=V2"):
        seen: list[str] = []
        path = f"/ingest{query}"
        for _ in range(9):
            page = place.page(path)
            seen += letters(page)
            further = [link for link in links(page) if "after=" in link]
            if not further:
                break
            path = further[0].partition("#")[0]
        wanted = dict(part.split("=") for part in query[1:].split("&") if part)
        expected = ask(
            place.dsn,
            "SELECT encode(digest, 'hex') FROM dead_letter WHERE reason = coalesce(%s, reason) "
            "AND device_id = coalesce(%s, device_id) ORDER BY received_at DESC, digest",
            wanted.get("reason"),
            wanted.get("device"),
        )
        assert seen == [name for (name,) in expected]
        assert seen
    assert len(letters(place.page("/ingest"))) == 50


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/ingest?reason=because", 422, "a reason is one of unknown_topic"),
        ("/ingest?device=a%20b", 422, "an id is 1 to 128"),
        ("/ingest?after=1", 422, "take it from the address of"),
        ("/ingest?after=2026-02-10T00:00:00Z~xyz", 422, "take it from the address of"),
        ("/ingest?limit=1", 422, "there is no such parameter"),
        ("/ingest/letters/1234", 422, "String should match pattern"),
        (f"/ingest/letters/{'0' * 64}", 404, "there is no such dead letter"),
        (f"/ingest/letters/{'0' * 64}/payload", 404, "there is no such dead letter"),
        ("/ingest/replays/1234", 404, "there has been no such replay"),
        (f"/ingest/letters/{quote('<script>', safe='')}", 422, "String should match pattern"),
    ],
)
def test_what_there_is_not(web: Web, path: str, status: int, said: str) -> None:
    answer = web.ask(path)
    assert answer.status == status
    assert said in answer.json()["message"]
    assert b"<script>" not in web.ask(path, headers={"Accept": "text/html"}).body


# What devices sent


def test_a_payload_is_text_and_nothing_else(place: Place) -> None:
    elements: set[str] = set()
    for name, payload in HOSTILE.items():
        answer = answer_of(place.web, f"/ingest/letters/{place.letter(name)}")
        page = parsed(answer.body.decode())
        assert b"\0" not in answer.body
        assert "\u202e" not in page.text
        assert len(answer.body) < 30_000
        # None of its elements comes from a device.
        elements |= {element.name for element in page.all() if not {"src", "defer"} <= element.attributes.keys()}
        assert not [element for element in page.all() if "onerror" in element.attributes]
        assert f"{len(payload):,} bytes" in page.text
    assert "pre" in elements
    assert not elements & {"script", "b", "iframe", "object"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("script", "<script>alert(1)</script>"),
        ("nul", "⟨U+0000⟩⟨U+0001⟩⟨U+001B⟩[31m"),
        ("bidi", "{⟨U+202E⟩⟨U+2066⟩<img src=x onerror=alert(1)>"),
        ("newline", "\n\n{"),
        ("large", "ä" * 2_048),
        ("broken", '{"meterId" : "A",\t1.0e400'),
    ],
)
def test_a_payload_is_shown_as_it_came(place: Place, name: str, shown: str) -> None:
    page = place.page(f"/ingest/letters/{place.letter(name)}")
    # A parser of HTML takes the first line feed away.
    assert page.one("pre").raw.removeprefix("\n") == shown
    assert ("The first 4,096 of 1,000,001 bytes." in page.text) == (name == "large")


def test_bytes_that_are_no_text_are_dumped(place: Place) -> None:
    page = place.page(f"/ingest/letters/{place.letter('binary')}")
    assert page.one("pre").raw.removeprefix("\n").splitlines() == [
        "000000  ff fe 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d  ................",
        "000010  0e 0f 10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d  ................",
    ]


def test_a_topic_without_a_valid_id_is_shown(place: Place) -> None:
    (letter,) = ask(place.dsn, "SELECT id FROM dead_letter_list WHERE device_id = ''")[0]
    page = place.page(f"/ingest/letters/{letter}")
    assert "test/ingest/meter/<b>/telemetry" in page.text
    assert "its topic names none" in page.text
    assert letter in letters(place.page("/ingest?reason=invalid_device_id"))
    assert "a/<b>" in place.page(f"/ingest/letters/{place.letter('script')}").text


def test_a_download_is_every_byte_and_no_page(place: Place) -> None:
    for name in ("script", "binary", "large", "empty"):
        letter = place.letter(name)
        answer = place.web.ask(f"/ingest/letters/{letter}/payload", headers={"Accept": "text/html"})
        assert (answer.status, answer.body) == (200, HOSTILE[name])
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"] == f'attachment; filename="{letter[:12]}.bin"'
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none';")


@pytest.mark.parametrize("cut", [4_093, 4_094, 4_095])
def test_a_character_that_is_cut_is_no_reason_for_a_dump(cut: int) -> None:
    payload = b"a" * cut + "😀".encode() * 10
    assert ingest.shown(payload[:4_096], whole=False) == ("text", "a" * cut)
    # But where it is all of it, it is no text.
    assert ingest.shown(payload[:4_096], whole=True).form == "hex"


# Rates


def sample(at: float, **daemons: int) -> list[dict[str, Any]]:
    when = datetime.fromtimestamp(at, UTC)
    counted = {"stored": 0, "duplicate": 0, "deadLettered": 0, "askedAt": when}
    return [{"instance": name.replace("_", " "), "received": value, **counted} for name, value in daemons.items()]


def test_rates_are_differences_over_the_time_between_and_replays_do_not_count() -> None:
    books = ingest.Books()
    for second in range(0, 61, 2):
        last = books.note(sample(1_000 + second, one=100 * second, two=second, **{"dead-letters replay": -second}))
    assert last
    assert [kept.at for kept in books.samples][:3] == [1_000, 1_006, 1_012]
    before = books.before(last)
    assert before
    assert 10 <= last.at - before.at <= 16
    each = ingest.rates(before, last)
    assert {name: rate["received"] for name, rate in each.items()} == {"one": 100, "two": 1}
    drawn = ingest.chart(list(books.samples))
    assert drawn["series"][0]["values"] == [101] * (len(books.samples) - 1)
    assert drawn["x"] == [kept.at for kept in books.samples][1:]


def test_where_nobody_looked_is_a_gap_and_old_samples_go() -> None:
    books = ingest.Books()
    for second in (0, 5, 10, 100, 105):
        last = books.note(sample(second, one=10 * second))
    assert last
    assert ingest.chart(list(books.samples))["series"][0]["values"] == [10, 10, None, 10]
    assert books.before(last) is None
    books.note(sample(1_000, one=0))
    assert [kept.at for kept in books.samples] == [100, 105, 1_000]
    assert books.note([]) is None


def test_where_a_counter_fell_is_no_rate() -> None:
    """The database was restored: what it counts now is less than what it counted before."""
    books = ingest.Books()
    samples = []
    for second, one_, two in ((0, 1_000, 0), (5, 1_050, 10), (10, 900, 20), (15, 950, 30), (20, 1_000, 40)):
        last = books.note(sample(second, one=one_, two=two, **{"dead-letters replay": -second}))
        assert last
        samples.append(last)
    assert ingest.rates(samples[1], samples[2]) == ingest.rates(samples[0], samples[3]) == {}
    assert ingest.chart(samples)["series"][0]["values"] == [12, None, 12, 12]
    assert {name: rate["received"] for name, rate in ingest.rates(samples[2], samples[4]).items()} == {
        "one": 10,
        "two": 2,
    }


# Daemons


def test_latency_and_deliveries_are_differences_of_what_the_daemon_counts(place: Place) -> None:
    daemon = daemons.Daemon(place.health)
    assert daemon.report().trouble == "it has not been asked yet"
    daemon.note(daemons.scrape(place.health))
    first = daemon.report()
    assert (first.trouble, first.reasons, first.deliveries_s, first.commit) == ("", (), None, [])
    received = one(place.dsn, "SELECT sum(received) FROM ingest_status")
    for number in range(40):
        place.devices.send("meter", f"L{number}", meter(f"L{number}", now()))
    place.devices.flush()
    wait_for_received(place.dsn, received + 40)
    wait_until(lambda: "wattbridge_readings_outstanding 0.0" in _metrics(place.health), "all committed")
    daemon.note(daemons.scrape(place.health))
    report = daemon.report()
    assert report.client_id == place.daemon.client_id
    assert report.deliveries_s is not None
    assert report.compared_s is not None
    assert report.deliveries_s * report.compared_s == pytest.approx(40)
    assert (report.outstanding, report.window) == (0, 20_000)
    for found in (report.commit, report.publish_to_commit):
        assert len(found) == 3
        assert not any(estimate.beyond for estimate in found)
        assert 0 < found[0].seconds <= found[1].seconds <= found[2].seconds < 10
    assert (report.broker_connected, report.database_waiting, report.intake_paused) == (True, False, False)
    daemon.note("gone")
    gone = daemon.report()
    assert (gone.trouble, gone.outstanding, gone.commit) == ("gone", None, ())
    assert gone.answered


def _metrics(health: str) -> str:
    host, _, port = health.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as connection, connection.makefile("rb") as file:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return file.read().decode()


@pytest.mark.parametrize(
    ("buckets", "median", "most"),
    [
        ([(1.0, 0), (2.0, 10), (math.inf, 10)], (1.5, False), (1.99, False)),
        ([(1.0, 50), (2.0, 50), (4.0, 100), (math.inf, 100)], (1.0, False), (3.96, False)),
        ([(1.0, 1), (2.0, 1), (math.inf, 100)], (2.0, True), (2.0, True)),
        ([(1.0, 0), (math.inf, 0)], None, None),
        ([], None, None),
    ],
)
def test_quantiles_as_prometheus_estimates_them(buckets: Any, median: Any, most: Any) -> None:
    for share, expected in ((0.5, median), (0.99, most)):
        estimate = daemons.quantile(share, buckets)
        assert estimate == (expected and (pytest.approx(expected[0]), expected[1]))


def scraped(at: float, deliveries: float) -> daemons.Scrape:
    return daemons.Scrape(at, (), "one", "1", {"deliveries_total": deliveries}, {})


def test_a_daemon_that_counts_anew_is_compared_with_nothing_before() -> None:
    daemon = daemons.Daemon("127.0.0.1:1")
    for at, deliveries in ((0, 100), (5, 200), (10, 5)):
        daemon.note(scraped(at, deliveries))
    assert daemon.report().deliveries_s is None
    daemon.note(scraped(15, 55))
    assert daemon.report().deliveries_s == 10
    for at in range(20, 200, 5):
        daemon.note(scraped(at, at * 2 + 100))
    assert daemon.report().compared_s == 60
    assert daemon.report().deliveries_s == 2


def test_whatever_is_no_daemon_is_said(monkeypatch: pytest.MonkeyPatch, web: Web, broker: Broker) -> None:
    monkeypatch.setattr(daemons, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        said = daemons.scrape(f"127.0.0.1:{silent.getsockname()[1]}")
        assert said == "it does not answer within 0.2 s"
        assert time.monotonic() - began < 1
    assert daemons.scrape(f"127.0.0.1:{web.port}") == "/metrics answers 404"
    for address in (f"127.0.0.1:{broker.port}", "127.0.0.1:99999", "no.such.host.invalid:1"):
        said = daemons.scrape(address)
        assert isinstance(said, str)
        assert said.startswith("it does not answer")
    assert daemons.parse("<html>", (), 0) == "what it says are no metrics"
    assert daemons.parse("node_load1 1\n", (), 0) == "what it says are not the metrics of a daemon of ours"


# Whose form it is


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://here:1", "host": "here:1"}, False),
        ({"host": "here:1"}, True),
        ({"origin": "http://here:1", "host": "here:1"}, True),
        ({"origin": "https://here", "host": "here"}, True),
        ({"origin": "http://here:2", "host": "here:1"}, False),
        ({"origin": "null", "host": "here:1"}, False),
        ({"origin": "http://here:1"}, False),
    ],
)
def test_only_our_own_pages_may_send_forms(headers: dict[str, str], *, ours: bool) -> None:
    assert ingest.same_origin(headers) == ours
