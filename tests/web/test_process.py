"""`wattbridge web` as a process: its rights, its patience, its end; and the troubles of the database."""

import contextlib
import http.client
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from bridge.services import free_port
from tests.integration.conftest import Broker
from tests.integration.harness import Daemon, Proxy, Publisher, ask, now, one, wait_until, wattbridge
from tests.integration.harness import vehicle as reading
from tests.web.serving import PASSWORD, Web, login

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def own(postgres_dsn_admin: str, database: str) -> Iterator[str]:
    """The DSN of a reader of a database of its own."""
    with login(postgres_dsn_admin, database, "wattbridge_reader") as dsn:
        yield dsn


def replace_ingest_status(database: str, source: str) -> None:
    """Makes /v1/ingest ask something else."""
    columns = "instance, received, stored, duplicate, dead_lettered, presence, updated_at"
    ask(database, f"CREATE OR REPLACE VIEW ingest_status AS SELECT {columns} FROM ingest_counter {source}")
    ask(
        database,
        f"INSERT INTO ingest_counter ({columns}, last_batch) VALUES ('one', 0, 0, 0, 0, 0, now(), %s)",
        uuid4(),
    )


def test_a_token_is_needed_where_there_is_one(reader: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    port = free_port()
    with Web(reader, tmp_path, web__token_file=tmp_path / "token", web__listen=f"0.0.0.0:{port}") as web:
        web.port = port
        for headers in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Basic x"},
        ):
            for path in ("/v1/status/vehicle", "/openapi.json", "/nowhere", "/v1/status/vehicle?limit=0"):
                answer = web.ask(path, headers=headers)
                assert answer.status == 401
                assert answer.headers["www-authenticate"].startswith(("Bearer", "Basic realm="))
                assert "a token is needed: Authorization: Bearer …" in answer.json()["message"]
                assert answer.headers["content-type"] == "application/problem+json"
        for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
            assert web.ask("/v1/status/vehicle", headers={"Authorization": given}).status == 200
        assert web.ask("/livez").body == b"alive\n"
        assert web.ask("/readyz").body == b"ready\n"
        document = web.ask("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
        assert document["security"] == [{"token": []}]
        assert TOKEN not in web.log
        assert not web.events("web.open")


def test_without_a_token_it_warns_where_others_can_reach_it(reader: str, tmp_path: Path) -> None:
    port = free_port()
    with Web(reader, tmp_path, web__listen=f"0.0.0.0:{port}") as web:
        assert "set web.token" in web.wait_for_event("web.open")["meaning"]


def test_nothing_is_written_even_by_a_login_that_could(database: str, tmp_path: Path) -> None:
    ask(
        database,
        "CREATE FUNCTION written() RETURNS bigint LANGUAGE sql AS "
        "$$ UPDATE ingest_counter SET received = 1; SELECT 1::bigint $$",
    )
    replace_ingest_status(database, "CROSS JOIN (SELECT written()) AS writing")
    with Web(database, tmp_path) as web:
        answer = web.ask("/v1/ingest")
        assert answer.status == 500
        assert answer.json()["message"] == "something failed in here; the log says what"
        assert b"written" not in answer.body
        assert "read-only transaction" in web.log
        assert web.ask("/v1/dead-letters").status == 200
    assert one(database, "SELECT received FROM ingest_counter") == 0
    # And it would have been written otherwise.
    ask(database, "SELECT * FROM ingest_status")
    assert one(database, "SELECT received FROM ingest_counter") == 1


def test_a_login_without_rights_is_told_what_to_ask_for(postgres_dsn_admin: str, database: str, tmp_path: Path) -> None:
    with login(postgres_dsn_admin, database) as dsn, Web(dsn, tmp_path) as web:
        for path in ("/v1/ingest", "/readyz"):
            answer = web.ask(path)
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert "GRANT wattbridge_reader" in answer.json()["message"]
        assert web.ask("/livez").status == 200
        assert len(web.events("database.away")) == 1


def test_a_database_without_the_schema(postgres_dsn_admin: str, tmp_path: Path) -> None:
    with Web(postgres_dsn_admin, tmp_path) as web:
        answer = web.ask("/readyz")
        assert (answer.status, answer.json()["message"]) == (
            503,
            'the database lacks the schema of this version: run "wattbridge migrate"',
        )


def test_while_the_database_is_away_it_says_so_and_it_heals(proxy: Proxy, own: str, tmp_path: Path) -> None:
    proxy.refuse()
    port = proxy.dsn.rpartition("port=")[2].split()[0]
    with Web(f"{own} host=127.0.0.1 hostaddr=127.0.0.1 port={port} sslmode=disable", tmp_path) as web:
        assert web.ask("/livez").status == 200
        began = time.monotonic()
        answer = web.ask("/readyz")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["message"] == "no connection to the database: it is away, or busy"
        first = time.monotonic() - began
        # From then on sooner.
        began = time.monotonic()
        assert web.ask("/v1/ingest").status == 503
        assert time.monotonic() - began < first
        proxy.heal()
        wait_until(lambda: web.ask("/readyz").status == 200, "it heals", 10)
        # Lost while nobody asks: not even one request fails.
        ask(own, "SELECT 1")
        for limit in (1, 2):
            wait_until(lambda: connections(own) == 4, "all connections are back", 10)
            proxy._drop_all()
            assert web.ask(f"/v1/status/vehicle?limit={limit}").status == 200
        assert len(web.events("database.away")) == 1
        assert len(web.events("database.back")) == 1
        assert PASSWORD not in web.log


def connections(dsn: str) -> int:
    mine = "application_name = 'wattbridge-web' AND datname = current_database()"
    return one(dsn, f"SELECT count(*) FROM pg_stat_activity WHERE {mine}")


def test_a_slow_question_ends_and_the_others_go_on(database: str, own: str, tmp_path: Path) -> None:
    replace_ingest_status(database, ", pg_sleep(20)")
    with Web(own, tmp_path, web__timeout_s=3) as web, ThreadPoolExecutor() as threads:
        slow = threads.submit(web.ask, "/v1/ingest")
        assert web.ask("/v1/dead-letters").status == 200
        assert not slow.done()
        answer = slow.result()
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["message"] == "this takes longer than 3 s (web.timeout_s): ask for less"
        assert web.events("web.slow")[0]["question"] == "ingest"


def test_a_database_that_falls_silent_does_not_hold_a_question_for_long(proxy: Proxy, own: str, tmp_path: Path) -> None:
    port = proxy.dsn.rpartition("port=")[2].split()[0]
    with Web(
        f"{own} host=127.0.0.1 hostaddr=127.0.0.1 port={port} sslmode=disable", tmp_path, web__timeout_s=0.3
    ) as web:
        assert web.ask("/readyz").status == 200
        proxy.stall()
        # Else it would wait until its connection is given up, which takes longer than a test may.
        assert web.ask("/v1/ingest").status == 503
        proxy.heal()
        wait_until(lambda: web.ask("/v1/ingest").status == 200, "it heals", 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order(database: str, own: str, tmp_path: Path, number: int) -> None:
    replace_ingest_status(database, ", pg_sleep(0.5)")
    with Web(own, tmp_path) as web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready")
        connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
        connection.request("GET", "/v1/ingest")
        asking = "application_name = 'wattbridge-web' AND datname = current_database() AND state = 'active'"
        wait_until(lambda: one(database, f"SELECT count(*) FROM pg_stat_activity WHERE {asking}"), "it asks")
        web.signal(number)
        # What was asked is answered.
        assert connection.getresponse().status == 200
        connection.close()
        assert web.wait() == 0
        assert web.events()[-1]["event"] == "web.stopped"
        assert connections(database) == 0


def test_a_port_that_is_taken_is_named(own: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        web = Web(own, tmp_path, web__listen=f"127.0.0.1:{port}")
        said = wattbridge("web", env=web.env, cwd=tmp_path)
    assert said.code == 1
    assert f"web.listen: cannot listen on 127.0.0.1 port {port}: Address already in use" in said.err


def test_pages_hold_while_devices_are_added(database: str, own: str, broker: Broker, tmp_path: Path) -> None:
    there = [f"VEH-{number:02}" for number in range(0, 20, 2)]
    with (
        Daemon(database, broker, "test/pages", tmp_path) as daemon,
        Publisher(broker, "test/pages") as devices,
        Web(own, tmp_path) as web,
    ):

        def add(*names: str) -> None:
            for name in names:
                devices.send("vehicle", name, reading(name, now()))
            devices.flush()
            wait_until(
                lambda: set(names) <= {name for (name,) in ask(database, "SELECT vehicle_id FROM vehicle_live")},
                "taken",
            )

        add(*there)
        seen = []
        for number, part in enumerate(web.pages("/v1/status/vehicle?limit=3")):
            seen += [item["vehicleId"] for item in part]
            # One before and one behind where the pages are, and a newer reading of a known one.
            add(f"VEH-{number:02}a", f"VEH-{19 - number:02}z", there[0])
        assert len(seen) == len(set(seen))
        assert seen == sorted(seen)
        assert set(there) <= set(seen)
        assert daemon.terminate() == 0


def test_many_at_once_wait_for_one_another(web: Web) -> None:
    with ThreadPoolExecutor(16) as threads:
        paths = [f"/v1/status/vehicle?limit={number}" for number in range(1, 101)]
        assert {answer.status for answer in threads.map(web.ask, paths)} == {200}


def test_not_even_a_login_that_may_write_can_write(database: str, tmp_path: Path) -> None:
    insert = "INSERT INTO device_duplicate VALUES ('written', 'meter', 1) RETURNING duplicates"
    ask(database, f"CREATE FUNCTION writes() RETURNS bigint LANGUAGE sql AS $$ {insert} $$")
    replace_ingest_status(database, ", writes()")
    with Web(database, tmp_path) as web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready")
        assert web.ask("/v1/ingest").status == 500
        assert "read-only transaction" in web.log
    assert one(database, "SELECT count(*) FROM device_duplicate") == 0


def test_the_same_question_at_once_is_asked_once(database: str, own: str, tmp_path: Path) -> None:
    replace_ingest_status(database, ", pg_sleep(1)")
    with Web(own, tmp_path, web__connections=1) as web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready")
        began = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            assert {answer.status for answer in threads.map(web.ask, ["/v1/ingest"] * 8)} == {200}
        # One after the other they would take eight.
        assert time.monotonic() - began < 5
        # And it is forgotten soon.
        ask(database, "UPDATE ingest_counter SET received = 7")
        wait_until(lambda: web.get("/v1/ingest")["items"][0]["received"] == 7, "the new answer", 5)


def test_what_is_asked_of_the_fleet_is_remembered_longer(database: str, own: str, tmp_path: Path) -> None:
    window = "since=2026-02-10T00:00:00Z&until=2026-02-11T00:00:00Z"
    ask(database, "SELECT ensure_history_partitions('meter_history', ARRAY['2026-02-10'::date])")
    fleet = [f"/v1/analytics/{path}?{window}" for path in ("chargers", "energy")]
    meter = f"/v1/analytics/energy?{window}&meter=MTR-1"
    with Web(own, tmp_path) as web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready")
        began = time.monotonic()
        assert [web.get(path)["items"] for path in (*fleet, meter)] == [[], [], []]
        ask(database, "INSERT INTO meter_history VALUES ('MTR-1', '2026-02-10 12:00Z', 1, 230, now(), false)")
        wait_until(lambda: web.get(meter)["items"], "the new answer of the meter", 10)
        told = [bool(web.get(path)["items"]) for path in fleet]
        assert not any(told) or time.monotonic() - began > 5
        wait_until(lambda: all(web.get(path)["items"] for path in fleet), "the new answers of the fleet", 10)


def test_a_request_without_an_end_is_not_read_on(web: Web) -> None:
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as line:
        line.sendall(b"GET /livez HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            line.sendall((b"X-Endless: " + b"x" * 1_000 + b"\r\n") * 100_000)
    assert web.ask("/livez").status == 200


def test_who_neither_asks_on_nor_reads_on_is_not_waited_for(reader: str, tmp_path: Path) -> None:
    web = Web(reader, tmp_path)
    web.env["PYTHONPATH"] = str(Path(__file__).parent / "impatient")
    with web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready")
        with socket.create_connection(("127.0.0.1", web.port), timeout=20) as line:
            # A body that was announced and never comes, after its answer.
            line.sendall(b"POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 405")
            line.sendall(b"x")
            with contextlib.suppress(ConnectionError):
                while line.recv(65_536):
                    pass
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            line.settimeout(20)
            line.connect(("127.0.0.1", web.port))
            asked = 400
            # Some 20 MB of answers that nobody reads.
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * asked)
            time.sleep(3)
            read = b""
            with contextlib.suppress(ConnectionError):
                while part := line.recv(1_000_000):
                    read += part
            assert read.count(b"HTTP/1.1 200") < asked / 2
        assert web.ask("/livez").status == 200
