"""Replay from the page: a real child with a login that may write, real dead letters; and all that can go wrong."""

import asyncio
import http.client
import os
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from bridge.config import Config
from bridge.web import replay
from bridge.web.problems import ProblemError
from bridge.web.replay import Replays, Wanted
from tests.integration.conftest import Broker
from tests.integration.harness import (
    Daemon,
    Publisher,
    ask,
    check_books,
    cloned,
    meter,
    now,
    one,
    wait_for_received,
    wait_until,
)
from tests.web.serving import PASSWORD, Answer, Web, login

TOKEN = "a-token-of-the-tests"
VOLTAGE = 250.0
OURS = {"Sec-Fetch-Site": "same-origin"}


class Place(NamedTuple):
    """A database whose dead letters today's configuration would accept, and the web that may replay them."""

    dsn: str
    writer: str
    web: Web

    def ask(self, path: str) -> Answer:
        return self.web.ask(path, headers={"Accept": "text/html", "Authorization": f"Bearer {TOKEN}"})

    def post(self, headers: dict[str, str] | None = None, body: bytes | None = None, **fields: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.web.port, timeout=30)
        try:
            sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-www-form-urlencoded"} | (
                OURS if headers is None else headers
            )
            connection.request("POST", "/ingest/replay", urlencode(fields).encode() if body is None else body, sent)
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def replayed(self, **fields: str) -> str:
        """The page that says how it ended."""
        answer = self.post(**fields)
        assert answer.status == 303, answer
        address = answer.headers["location"]
        page = wait_until(lambda: b"going on" not in (said := self.ask(address)).body and said, "it has ended")
        assert page.status == 200
        _, _, main = page.body.decode().partition("<main")
        return main

    def letters(self) -> list[tuple[str, str]]:
        return ask(self.dsn, "SELECT device_id, reason FROM dead_letter ORDER BY device_id")


@pytest.fixture(scope="module")
def place(
    postgres_dsn_admin: str, template: str, broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("replay")
    with (
        cloned(postgres_dsn_admin, template) as dsn,
        login(postgres_dsn_admin, dsn, "wattbridge_reader") as reader,
        login(postgres_dsn_admin, dsn, "wattbridge_writer") as writer,
        Web(
            reader,
            folder,
            web__token=TOKEN,
            web__replay__dsn=writer,
            topics__telemetry="test/replay/{kind}/{device_id}/telemetry",
            topics__status="test/replay/{kind}/{device_id}/status",
        ) as web,
    ):
        with (
            Daemon(dsn, broker, "test/replay", folder, limits__max_voltage=VOLTAGE - 1),
            Publisher(broker, "test/replay") as devices,
        ):
            # The last one is named like an option.
            for name in ("M1", "M2", "-all", "-all"):
                devices.send("meter", name, meter(name, now(), voltage=VOLTAGE))
            devices.send("meter", "M4", b"{")
            devices.send("meter", "-all", b"[")
            devices.flush()
            wait_for_received(dsn, 6)
        check_books(dsn)
        yield Place(dsn, writer, web)


def test_replayed_letters_become_history_and_the_books_balance(place: Place) -> None:
    letter = one(place.dsn, "SELECT id FROM dead_letter_list WHERE device_id = 'M1'")
    before = check_books(place.dsn)
    page = place.ask(f"/ingest/letters/{letter}").body.decode()
    assert f'name="letter" value="{letter}"' in page
    assert "1 dead letters replayed, 0 still rejected" in place.replayed(letter=letter)
    assert ask(place.dsn, "SELECT meter_id, voltage FROM meter_history") == [("M1", VOLTAGE)]
    after = check_books(place.dsn)
    assert (after.stored - before.stored, after.dead_lettered - before.dead_lettered) == (1, -1)
    # It is gone, and doing it again changes nothing.
    wait_until(lambda: place.ask(f"/ingest/letters/{letter}").status == 404, "what was just answered is forgotten", 5)
    assert "0 dead letters replayed, 0 still rejected" in place.replayed(letter=letter)
    assert check_books(place.dsn) == after

    # All of a device: what is still rejected stays.
    of_device = place.ask("/ingest/replay?device=-all").body.decode()
    total = one(place.dsn, "SELECT count(*) FROM dead_letter WHERE device_id = '-all'")
    assert f'<data value="{total}">' in of_device
    assert f"{total - 1} dead letters replayed, 1 still rejected" in place.replayed(device="-all")
    assert place.letters() == [("-all", "malformed"), ("M2", "out_of_range"), ("M4", "malformed")]
    check_books(place.dsn)
    began = place.web.events("replay.began")
    assert [event["device"] for event in began] == ["", "", "-all"]
    for secret in (PASSWORD, TOKEN):
        assert secret not in place.web.log


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, b"reason=malformed", 403),
        ({"Origin": "http://elsewhere.example"}, b"reason=malformed", 403),
        ({**OURS, "Authorization": "Bearer another"}, b"reason=malformed", 401),
        ({**OURS, "Content-Type": "application/json"}, b"{}", 415),
        (OURS, b"reason=" + b"x" * 5_000, 413),
        (OURS, b"", 422),
        (OURS, b"reason=&device=", 422),
        (OURS, b"reason=because", 422),
        (OURS, b"device=a%20b", 422),
        (OURS, b"letter=--all", 422),
        (OURS, b"letter=abcd", 422),
        (OURS, b"all=1", 422),
        (OURS, b"device=%00", 422),
        (OURS, b"\xff\xfe", 400),
        (OURS, b"reason", 400),
    ],
)
def test_what_is_no_order_of_ours_starts_nothing(
    place: Place, headers: dict[str, str], body: bytes, status: int
) -> None:
    before = len(place.web.events("replay.began"))
    answer = place.post(headers, body)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    assert len(place.web.events("replay.began")) == before


def test_other_methods_and_other_paths_are_refused_as_ever(place: Place) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", **OURS}
    for method, path in (("PUT", "/ingest/replay"), ("POST", "/ingest"), ("POST", "/ingest/replays/1")):
        assert place.web.ask(path, method=method, headers=headers).status == HTTPStatus.METHOD_NOT_ALLOWED


def test_where_it_is_not_enabled_there_is_no_button_and_nothing_is_taken(web: Web) -> None:
    answer = web.ask("/ingest/replay", method="POST", headers=OURS)
    assert (answer.status, answer.headers["allow"]) == (HTTPStatus.METHOD_NOT_ALLOWED, "GET, HEAD")
    page = web.ask("/ingest/replay?reason=malformed", headers={"Accept": "text/html"}).body
    assert b"Replay is not enabled here" in page
    assert b'method="post"' not in page


# In this process, as nothing of it depends on the web


def ended(command: list[str], *, monkeypatch: pytest.MonkeyPatch, dsn: str = "") -> replay.Replay:
    """A replay by this command, when it has ended."""
    monkeypatch.setattr(replay, "COMMAND", command)

    async def run() -> replay.Replay:
        replays = Replays(enabled(dsn))
        going = replays.start(Wanted(reason="malformed"))
        assert replays._running
        await replays._running
        # Another one can begin.
        assert replays.start(Wanted(reason="conflict")) is not going
        await replays.stop()
        return going

    return asyncio.run(run())


def enabled(dsn: str = "") -> Config:
    return Config(web={"token": TOKEN, "replay": {"dsn": dsn or "host=127.0.0.1 port=1", "password": PASSWORD}})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/bin/sh", "-c", "echo begun; kill -9 $$"], "begun\nit was ended by signal 9"),
        (["/bin/sh", "-c", "exit 3"], "it said nothing, and ended with 3"),
        (["/bin/sh", "-c", "exec sleep 60"], "it was ended after 0.5 s"),
        (["/no/such/program"], "it could not be started"),
    ],
)
def test_however_the_child_ends_it_is_said(monkeypatch: pytest.MonkeyPatch, command: list[str], said: str) -> None:
    monkeypatch.setattr(replay, "LONGEST_S", 0.5)
    result = ended(command, monkeypatch=monkeypatch)
    assert not result.fine
    assert said in result.said


def test_while_the_database_is_away_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # What readers have in their file does not stand against it.
    (tmp_path / "own.toml").write_text('[database]\ndsn_file = "no"\npassword_file = "no"\n')
    monkeypatch.setenv("WATTBRIDGE_CONFIG", str(tmp_path / "own.toml"))
    result = ended(replay.COMMAND, monkeypatch=monkeypatch)
    assert not result.fine
    assert "Connection refused" in result.said
    assert PASSWORD not in result.said


def test_one_at_a_time_and_none_outlives_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    monkeypatch.setattr(
        replay,
        "COMMAND",
        [sys.executable, "-c", f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"],
    )

    async def run() -> None:
        replays = Replays(enabled())
        going = replays.start(Wanted(device="M1"))
        # Two clicks are one replay; something else has to wait.
        assert replays.start(Wanted(device="M1")) is going
        with pytest.raises(ProblemError, match=f"another replay is still going, at /ingest/replays/{going.name}"):
            replays.start(Wanted(device="M2"))
        await asyncio.to_thread(wait_until, lambda: note.exists() and note.read_text(), "the child runs")
        await replays.stop()
        assert "ended with this process" in going.said
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)

    asyncio.run(run())


def test_the_login_is_told_by_the_environment_and_nowhere_else() -> None:
    told = replay.environment(enabled().web.replay)
    assert told["WATTBRIDGE_DATABASE__DSN"] == "host=127.0.0.1 port=1"
    assert told["WATTBRIDGE_DATABASE__PASSWORD"] == PASSWORD
    assert PASSWORD not in str([*replay.COMMAND, *Wanted("a" * 64).arguments(), *Wanted(device="-x").arguments()])
    assert Wanted(device="-x", reason="malformed").arguments() == ["--reason=malformed", "--device=-x"]
    # An empty device would mean all of them.
    assert Wanted().arguments() == []
