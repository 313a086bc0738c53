"""Start, stop and refusal: the daemon waits for what will come, obeys, and says why it cannot go on."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from psycopg.conninfo import conninfo_to_dict

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, PrivateMosquitto, free_port
from tests.integration.harness import (
    PROGRAM,
    Address,
    Daemon,
    Proxy,
    Publisher,
    StrictMosquitto,
    ask,
    check_books,
    empty_database,
    environment,
    expected_history,
    in_background,
    meter,
    meter_history,
    now,
    one,
    password_line,
    series,
    stored,
    wait_for_received,
    wait_until,
    wattbridge,
    wattbridge_here,
)

USER, PASSWORD = "bridge", "hunter2-is-not-a-good-one"
TELEMETRY_OF_METERS = "meter/+/telemetry"
PLUGINS = [
    plugin
    for place in ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib", "/usr/local/opt/mosquitto/lib")
    for pattern in ("mosquitto_dynamic_security.so", "*/mosquitto_dynamic_security.so")
    for plugin in Path(place).glob(pattern)
]


class SilentServer:
    """Takes connections, says `answer` to what comes first, and nothing more."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", free_port()))
        self.host, self.port = self._server.getsockname()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for held in (*self._connections, self._server):
            held.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._connections.append(connection)
                connection.recv(4096)
                connection.sendall(self._answer)


def publish_one(broker: Address, root: str, **login: str) -> None:
    with Publisher(broker, root, **login) as devices:
        devices.send("meter", "MTR-1", meter("MTR-1", now()))
        devices.flush()


# --- start -------------------------------------------------------------------------------------------------


def test_it_waits_for_a_database_that_is_down(broker: Address, topic_root: str, tmp_path: Path) -> None:
    with EmbeddedPostgres() as server:
        migrate(server.dsn)
        server.stop()
        with Daemon(server.dsn, broker, topic_root, tmp_path, ready=False) as daemon:
            daemon.wait_for_event("mqtt.connected")
            publish_one(broker, topic_root)
            waiting = daemon.wait_for_event("database.waiting", attempt=2, level="warning")
            assert "refused" in waiting["reason"]
            assert waiting["next_in_s"] > 0
            daemon.wait_for_event("database.waiting", outstanding=1)
            server.start()
            wait_for_received(server.dsn, 1)
            assert daemon.terminate() == 0


def test_it_waits_for_a_broker_that_is_down(database: str, topic_root: str, tmp_path: Path) -> None:
    with PrivateMosquitto() as broker:
        broker.stop()
        with Daemon(database, broker, topic_root, tmp_path, ready=False) as daemon:
            waiting = daemon.wait_for_event("mqtt.waiting", attempt=2, level="warning")
            assert waiting["broker"] == f"{broker.host}:{broker.port}"
            assert "refused" in waiting["reason"].lower()
            broker.start()
            daemon.wait_for_event("mqtt.connected")
            publish_one(broker, topic_root)
            wait_for_received(database, 1)
            assert daemon.terminate() == 0


def test_it_waits_for_the_schema(postgres_dsn_admin: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    with empty_database(postgres_dsn_admin) as dsn, Daemon(dsn, broker, topic_root, tmp_path, ready=False) as daemon:
        waiting = daemon.wait_for_event("database.waiting")
        assert 'run "wattbridge migrate"' in waiting["reason"]
        daemon.wait_for_event("mqtt.connected")
        publish_one(broker, topic_root)
        migrate(dsn)
        wait_for_received(dsn, 1)
        assert daemon.terminate() == 0


def test_it_waits_for_a_schema_that_is_older(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    kept = ask(database, "DELETE FROM schema_migration WHERE name = 'migrations/0001_schema.sql' RETURNING *")
    with Daemon(database, broker, topic_root, tmp_path, ready=False) as daemon:
        waiting = daemon.wait_for_event("database.waiting")
        assert "0001_schema.sql" in waiting["reason"]
        assert 'run "wattbridge migrate"' in waiting["reason"]
        ask(database, "INSERT INTO schema_migration VALUES (%s, %s, %s)", *kept[0])
        publish_one(broker, topic_root)
        wait_for_received(database, 1)


@pytest.mark.parametrize("answer", [b"", b"\x20\x03\x00\x00\x00"], ids=["CONNECT", "SUBSCRIBE"])
def test_it_tries_again_when_the_broker_leaves_it_without_an_answer(
    database: str, topic_root: str, tmp_path: Path, answer: bytes
) -> None:
    """Something that hangs where the broker should be: no answer at all, or a CONNACK and nothing after it."""
    with SilentServer(answer) as server:
        settings = {"mqtt__connect_timeout_s": 0.3}
        with Daemon(database, server, topic_root, tmp_path, ready=False, **settings) as daemon:
            waiting = daemon.wait_for_event("mqtt.waiting", attempt=3)
            assert "no answer within 0.3 s" in waiting["reason"]
            assert daemon.terminate() == 0


# --- stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_under_load_it_finishes_and_the_next_one_goes_on(
    database: str, broker: Address, topic_root: str, tmp_path: Path, number: signal.Signals
) -> None:
    readings = list(series(devices=100, readings=60))
    with Daemon(database, broker, topic_root, tmp_path) as daemon, Publisher(broker, topic_root) as devices:
        with in_background(lambda: devices.send_series(readings)):
            wait_until(lambda: stored(database) >= 500, "readings are coming in")
            daemon.signal(number)
            assert daemon.wait() == 0
            first = check_books(database)
            assert first.stored < len(readings)
            (stopped,) = daemon.events("daemon.stopped")
            assert stopped["outstanding"] == 0
            assert stopped["stored"] == first.stored
            daemon.start()
        assert daemon.wait_for_event("mqtt.connected")["session_present"] is True
        wait_until(lambda: stored(database) == len(readings), "the rest is stored")
        assert daemon.terminate() == 0
    check_books(database)
    assert meter_history(database) == expected_history(readings)


def test_the_second_signal_ends_it_at_once(
    database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, shutdown_deadline_s=600) as daemon:
        proxy.refuse()
        publish_one(broker, topic_root)
        daemon.wait_for_event("database.waiting", outstanding=1)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_event("daemon.stopping")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(10) == 128 + signal.SIGTERM
        assert daemon.events("daemon.quit")
        proxy.heal()
        daemon.start()
        wait_for_received(database, 1)


@pytest.mark.parametrize("state", ["down", "hanging"])
def test_past_the_deadline_it_ends_with_4_and_loses_nothing(
    state: str, database: str, proxy: Proxy, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, shutdown_deadline_s=0.5, log__report_every_s=0.1) as daemon:
        proxy.refuse() if state == "down" else proxy.stall()
        publish_one(broker, topic_root)
        daemon.wait_for_event("daemon.progress", outstanding=1)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(8) == 4
        assert daemon.events("daemon.stopped")[0]["unfinished"] is True
        proxy.heal()
        daemon.start()
        wait_for_received(database, 1)
        assert daemon.terminate() == 0
    assert stored(database) == 1


def test_stopped_while_both_sides_are_down(database: str, proxy: Proxy, topic_root: str, tmp_path: Path) -> None:
    """Nothing was received, so there is nothing to wait for."""
    proxy.refuse()
    with PrivateMosquitto() as broker:
        broker.stop()
        with Daemon(proxy.dsn, broker, topic_root, tmp_path, shutdown_deadline_s=20, ready=False) as daemon:
            daemon.wait_for_event("mqtt.waiting")
            daemon.wait_for_event("database.waiting")
            daemon.signal(signal.SIGTERM)
            assert daemon.wait(15) == 0


def test_stopped_while_the_broker_is_down(database: str, topic_root: str, tmp_path: Path) -> None:
    with PrivateMosquitto() as broker:
        broker.stop()
        with Daemon(database, broker, topic_root, tmp_path, ready=False) as daemon:
            daemon.wait_for_event("database.connected")
            daemon.wait_for_event("mqtt.waiting", attempt=3)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait(15) == 0


# --- refusal -----------------------------------------------------------------------------------------------


@pytest.fixture
def guarded() -> Iterator[StrictMosquitto]:
    """A broker that wants a password."""
    with StrictMosquitto(
        "allow_anonymous false\npassword_file passwords", {"passwords": password_line(USER, PASSWORD)}
    ) as it:
        yield it


def test_a_wrong_password_ends_it_with_3(
    database: str, guarded: StrictMosquitto, topic_root: str, tmp_path: Path
) -> None:
    login = {"mqtt__username": USER, "mqtt__password": "wrong-guess"}
    with Daemon(database, guarded, topic_root, tmp_path, **login, ready=False) as daemon:
        assert daemon.wait() == 3
    assert "wattbridge: the broker refused the connection: not authorized" in daemon.log
    assert "mqtt.password" in daemon.log
    assert "Traceback" not in daemon.log
    assert "wrong-guess" not in daemon.log


def test_with_the_password_it_works_and_logs_no_secret(
    database: str, guarded: StrictMosquitto, topic_root: str, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text(PASSWORD + "\n")
    login = {"mqtt__username": USER, "mqtt__password_file": secret, "log__level": "debug", "log__report_every_s": 0.1}
    with Proxy(database) as proxy, Daemon(proxy.dsn, guarded, topic_root, tmp_path, **login) as daemon:
        publish_one(guarded, topic_root, username=USER, password=PASSWORD)
        wait_for_received(database, 1)
        # And with both sides failing, whose errors it logs.
        proxy.refuse()
        guarded.stop()
        daemon.wait_for_event("mqtt.waiting")
        guarded.start()
        daemon.wait_for_events("mqtt.connected", 2)
        publish_one(guarded, topic_root, username=USER, password=PASSWORD)
        daemon.wait_for_event("database.waiting", attempt=2)
        proxy.heal()
        wait_for_received(database, 2)
        assert daemon.terminate() == 0
    assert PASSWORD not in daemon.log
    assert str(conninfo_to_dict(database)["password"]) not in daemon.log


def test_a_wrong_database_password_is_said_without_it(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    dsn = database.replace(str(conninfo_to_dict(database)["password"]), "wrong-guess")
    with Daemon(dsn, broker, topic_root, tmp_path, ready=False) as daemon:
        waiting = daemon.wait_for_event("database.waiting")
    assert "password authentication failed" in waiting["reason"]
    assert "wrong-guess" not in daemon.log


@pytest.mark.skipif(not PLUGINS, reason="this Mosquitto has no plugin that refuses subscriptions")
@pytest.mark.parametrize("shared", [False, True])
def test_a_refused_subscription_ends_it_with_3(database: str, topic_root: str, tmp_path: Path, *, shared: bool) -> None:
    """The access file of Mosquitto does not refuse subscriptions, it only withholds messages; its plugin refuses."""
    allowed = [f"{topic_root}/{kind}/+/status" for kind in ("meter", "vehicle")]
    rules = {
        "defaultACLAccess": {
            "publishClientSend": True,
            "publishClientReceive": True,
            "subscribe": False,
            "unsubscribe": True,
        },
        "roles": [
            {
                "rolename": "device",
                "acls": [{"acltype": "subscribePattern", "topic": topic, "allow": True} for topic in allowed],
            }
        ],
        "groups": [{"groupname": "all", "roles": [{"rolename": "device"}]}],
        "anonymousGroup": "all",
    }
    config = f"plugin {PLUGINS[0]}\nplugin_opt_config_file rules.json"
    settings = {"mqtt__share_group": "crew"} if shared else {}
    with (
        StrictMosquitto(config, {"rules.json": json.dumps(rules)}) as broker,
        Daemon(database, broker, topic_root, tmp_path, **settings, ready=False) as daemon,
    ):
        assert daemon.wait() == 3
    pattern = f"$share/crew/{topic_root}/{TELEMETRY_OF_METERS}" if shared else f"{topic_root}/{TELEMETRY_OF_METERS}"
    assert f"does not let {daemon.client_id} subscribe to {pattern}: not authorized" in daemon.log
    assert "Traceback" not in daemon.log


def test_of_two_with_the_same_client_id_one_gives_way(
    database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """Which one is the broker's choice: Mosquitto 2.0.11 does not even say why it ends a connection."""
    with (
        Daemon(database, broker, topic_root, tmp_path) as first,
        Daemon(database, broker, topic_root, tmp_path, client_id=first.client_id) as second,
    ):
        both = {first, second}
        ended = wait_until(lambda: {daemon for daemon in both if not daemon.running}, "one of them has ended")
        (loser,) = ended
        (winner,) = both - ended
        assert loser.wait() == 3
        assert "mqtt.client_id" in loser.log
        assert "Traceback" not in loser.log
        before = len(winner.events("mqtt.connected"))
        publish_one(broker, topic_root)
        wait_for_received(database, 1)
        assert len(winner.events("mqtt.connected")) <= before + 1
        assert winner.terminate() == 0


@pytest.mark.parametrize("host", ["broker..example", "b" * 64 + ".example"])
def test_a_host_that_is_no_name_ends_it_with_3(
    database: str, broker: Address, topic_root: str, tmp_path: Path, host: str
) -> None:
    env = environment(database, broker, topic_root, "test-host", mqtt__host=host)
    reply = wattbridge("run", env=env, cwd=tmp_path)
    assert reply.code == 3
    (said,) = [line for line in reply.err.splitlines() if line.startswith("wattbridge: ")]
    assert said == f"wattbridge: mqtt.host {host!r} is not the name of a host"
    reply = wattbridge_here("check", "--listen", "0.1s", env=env, cwd=tmp_path)
    assert (reply.code, reply.err) == (1, "")
    assert reply.out.count("problem") == 1
    assert "is not the name of a host" in reply.out
    assert "PostgreSQL" in reply.out


# --- TLS ---------------------------------------------------------------------------------------------------


def openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, and from it broker.{crt,key} for 127.0.0.1 and client.{crt,key}; and other.crt, a CA of somebody else."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        openssl(
            folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", f"{name}.key", "-out", f"{name}.crt",
        )  # fmt: skip
    for name in ("broker", "client"):
        openssl(
            folder,
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
        )
        (folder / f"{name}.ext").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt",
        )  # fmt: skip
    return folder


@pytest.fixture
def sealed(certificates: Path) -> Iterator[StrictMosquitto]:
    """A broker that speaks TLS alone, and wants a certificate of its clients."""
    files = {name: (certificates / name).read_text() for name in ("ca.crt", "broker.crt", "broker.key")}
    config = "cafile ca.crt\ncertfile broker.crt\nkeyfile broker.key\nrequire_certificate true"
    with StrictMosquitto(config, files) as broker:
        yield broker


def tls(certificates: Path, ca: str = "ca", own: str | None = "client") -> dict[str, object]:
    settings: dict[str, object] = {"mqtt__tls__enabled": True, "mqtt__tls__ca_file": certificates / f"{ca}.crt"}
    if own:
        settings["mqtt__tls__cert_file"] = certificates / f"{own}.crt"
        settings["mqtt__tls__key_file"] = certificates / f"{own}.key"
    return settings


def test_tls_with_a_client_certificate(
    database: str, sealed: StrictMosquitto, certificates: Path, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, sealed, topic_root, tmp_path, **tls(certificates)) as daemon:
        with Publisher(sealed, topic_root, tls=certificates) as devices:
            for device, reading in series(devices=50, readings=40):
                devices.send("meter", device, reading)
            devices.flush()
        wait_for_received(database, 2_000)
        assert daemon.terminate() == 0
        assert daemon.events("mqtt.waiting") == []
    assert check_books(database).stored == 2_000


def test_an_untrusted_broker_ends_it_with_3(
    database: str, sealed: StrictMosquitto, certificates: Path, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, sealed, topic_root, tmp_path, **tls(certificates, ca="other"), ready=False) as daemon:
        assert daemon.wait() == 3
    assert "the broker's certificate is not trusted" in daemon.log


def test_a_certificate_that_cannot_be_read_ends_it_with_2(
    database: str, sealed: StrictMosquitto, certificates: Path, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, sealed, topic_root, tmp_path, **tls(certificates, own="nobody"), ready=False) as daemon:
        assert daemon.wait() == 2
    assert "mqtt.tls" in daemon.log
    assert "nobody" in daemon.log
    assert "Traceback" not in daemon.log


def test_without_a_client_certificate_it_says_what_the_broker_wants(
    database: str, sealed: StrictMosquitto, certificates: Path, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, sealed, topic_root, tmp_path, **tls(certificates, own=None), ready=False) as daemon:
        assert daemon.wait() == 3
    assert "does not accept our certificate" in daemon.log
    assert "Traceback" not in daemon.log
    assert one(database, "SELECT count(*) FROM ingest_counter") == 0


@pytest.mark.parametrize("what", ["missing", "no-certificate", "folder"])
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_ca_file_that_cannot_be_used_is_named(
    database: str, broker: Address, topic_root: str, tmp_path: Path, command: str, what: str
) -> None:
    file = tmp_path / f"{what}.crt"
    if what == "no-certificate":
        file.write_text("nothing to trust\n")
    elif what == "folder":
        file.mkdir()
    settings = {"mqtt__tls__enabled": True, "mqtt__tls__ca_file": file}
    env = environment(database, broker, topic_root, "test-tls", **settings)
    reply = (wattbridge if command == "run" else wattbridge_here)(command, env=env, cwd=tmp_path)
    assert reply.code == 2
    (said,) = [line for line in reply.err.splitlines() if line.startswith("wattbridge: ")]
    assert said.startswith(f"wattbridge: mqtt.tls: cannot use {file}")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(
    database: str, certificates: Path, broker: Address, topic_root: str, tmp_path: Path, command: str
) -> None:
    locked = tmp_path / "locked.key"
    openssl(certificates, "rsa", "-aes256", "-passout", "pass:open-sesame", "-in", "client.key", "-out", str(locked))
    settings = tls(certificates) | {"mqtt__tls__key_file": locked}
    env = environment(database, broker, topic_root, "test-tls", **settings)
    # In a session of its own: a prompt would find no terminal to ask on, and must not wait for one.
    done = subprocess.run(
        [PROGRAM, command],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        start_new_session=True,
    )
    assert done.returncode == 2
    assert f"wattbridge: mqtt.tls: cannot use {certificates / 'ca.crt'}" in done.stderr
    assert str(locked) in done.stderr
    for unwanted in ("Traceback", "pass phrase", "PEM pass", "open-sesame"):
        assert unwanted not in done.stdout + done.stderr
