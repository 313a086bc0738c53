"""Secrets stay secret: not in what a command says, not in a log, not over HTTP, not in the list of processes."""

import os
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.errors import ExitCode
from bridge.services import free_port
from tests.integration.harness import (
    Daemon,
    StrictMosquitto,
    environment,
    password_line,
    wattbridge,
    wattbridge_here,
)

# Two, so that neither can hide behind the other. No part of them may be seen.
DATABASE_SECRET = "dbS3cretQ7"
BROKER_SECRET = "mqS3cretZ9"
SECRETS = (DATABASE_SECRET, BROKER_SECRET)
GUARDED = "allow_anonymous false\npassword_file passwords"
CONNECTS_NOWHERE = {"PATH": os.environ["PATH"], "WATTBRIDGE_MQTT__HOST": "127.0.0.1", "WATTBRIDGE_MQTT__PORT": "1"}
CHECK = ("check", "--listen", "0", "--messages", "0")
# As they are, and with what goes wrong: each has the secret where somebody may have meant it to be.
BROKEN_DSNS = [
    "postgresql://u:{}@127.0.0.1:1/db",
    "postgresql://u:a@{}@127.0.0.1:1/db",
    "postgresql://u:{}@b@127.0.0.1:1/db",
    "postgresql://u:{}/b@127.0.0.1:1/db",
    "postgresql://u:1/{}@127.0.0.1:1/db",
    "postgresql://u:{}?b@127.0.0.1:1/db",
    "postgresql://u:%zz{}@127.0.0.1:1/db",
    "postgresql://u:[{}@127.0.0.1:1/db",
    " postgresql://u:{}@127.0.0.1:1/db",
    "mysql://u:{}@127.0.0.1/db",
    "postgres//u:{}@127.0.0.1/db",
    "host=127.0.0.1 port=1 password=a {}",
    "host=127.0.0.1 port=1 password='{}",
    "hots=127.0.0.1 password={}",
    "{}",
]
BROKEN_FILES = [
    'database.dsn = ["{}"]',
    "database.dsn = {}",
    'database.dsn = "{}',
    'database.passwrod = "{}"',
    'database.password = {{ a = "{}" }}',
    'database = "{}"',
    'database.dsn = "a"\ndatabase.dsn_file = "b"\ndatabase.password = "{}"',
    'database.dsn_file = "postgresql://u:{}@db/energy"',
    'database.password_file = "{}=="',
    'mqtt = "{}"',
    'mqtt.tls = "{}"',
    'mqtt.password_file = "a:{}"',
    'mqtt.pasword = "{}"\nmqtt.password = 5',
    'mqtt.tls.key_pasword = "{}"',
]
NAMES_OF_NOTHING = ("DATABASE", "MQTT", "MQTT__PASWORD", "MQTT__TLS", "DATABASE__DSN__PASSWORD")


@pytest.fixture
def dsn(database: str, postgres_dsn_admin: str) -> Iterator[str]:
    """The DSN of a role that writes, with a password that is recognised anywhere."""
    name = f"secretive_{uuid.uuid4().hex[:12]}"
    role = sql.Identifier(name)
    with psycopg.connect(postgres_dsn_admin, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, DATABASE_SECRET))
        try:
            admin.execute(sql.SQL("GRANT wattbridge_writer, wattbridge_reader TO {}").format(role))
            yield make_conninfo(database, user=name, password=DATABASE_SECRET)
        finally:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [name])
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.fixture(scope="module")
def guarded() -> Iterator[StrictMosquitto]:
    """A broker that wants a password."""
    with StrictMosquitto(GUARDED, {"passwords": password_line("bridge", BROKER_SECRET)}) as broker:
        yield broker


def assert_secret(*said: str) -> None:
    for text in said:
        assert not [line for line in text.splitlines() if any(secret in line for secret in SECRETS)]


@contextmanager
def watched() -> Iterator[None]:
    """Looks at the command lines of all processes that we start, as anyone on the machine can."""
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert any("wattbridge" in line for line in seen), "nothing was seen, so nothing was tested"
    assert_secret(*seen)


def settings(folder: Path, password: str = BROKER_SECRET) -> dict[str, object]:
    (folder / "password").write_text(password + "\n")
    return {"mqtt__username": "bridge", "mqtt__password_file": folder / "password", "mqtt__connect_timeout_s": 2}


def test_a_daemon_in_trouble_says_no_secret_at_any_level(
    dsn: str, guarded: StrictMosquitto, topic_root: str, tmp_path: Path
) -> None:
    port = free_port()
    options = settings(tmp_path) | {"log__level": "debug", "health__listen": f"127.0.0.1:{port}"}
    with watched(), Daemon(dsn, guarded, topic_root, tmp_path, **options) as daemon:
        answers = [fetched(port, path) for path in ("livez", "readyz", "metrics", "nothing")]
        guarded.stop()
        daemon.wait_for_event("mqtt.waiting")
        answers.append(fetched(port, "readyz"))
        guarded.start()
        daemon.wait_for_events("mqtt.connected", 2)
        assert daemon.terminate() == 0
    assert_secret(daemon.log, *answers)


@pytest.mark.parametrize("what", ["database", "broker"])
def test_a_daemon_with_a_wrong_password_says_no_secret(
    what: str, dsn: str, guarded: StrictMosquitto, topic_root: str, tmp_path: Path
) -> None:
    if what == "broker":
        options = settings(tmp_path, password=f"not{BROKER_SECRET}")
        with watched(), Daemon(dsn, guarded, topic_root, tmp_path, ready=False, **options) as daemon:
            assert daemon.wait() == ExitCode.REFUSED
    else:
        wrong = make_conninfo(dsn, password=f"not{DATABASE_SECRET}")
        options = settings(tmp_path)
        with watched(), Daemon(wrong, guarded, topic_root, tmp_path, ready=False, **options) as daemon:
            daemon.wait_for_event("database.waiting")
    assert_secret(daemon.log)


def test_no_command_says_the_secrets_that_it_uses(
    dsn: str, guarded: StrictMosquitto, topic_root: str, tmp_path: Path
) -> None:
    env = environment(dsn, guarded, topic_root, f"test-{uuid.uuid4().hex}", **settings(tmp_path))
    fleet = ("--host", guarded.host, "--port", str(guarded.port), "--username", "bridge", "--topic-root", topic_root)
    with watched():
        for arguments in (
            CHECK,
            ("simulate", *fleet, "--password-file", str(tmp_path / "password"), "--messages", "5", "--rate", "100"),
        ):
            reply = wattbridge(*arguments, env=env, cwd=tmp_path)
            assert reply.code == 0, reply
            assert_secret(*reply[1:])
    for line in ("migrate", "dead-letters list", "dead-letters show 00", "assignments list", "rollups status"):
        assert_secret(*wattbridge_here(*line.split(), env=env, cwd=tmp_path)[1:])


@pytest.mark.parametrize("broken", BROKEN_DSNS)
def test_a_dsn_that_cannot_work_is_not_shown(broken: str, tmp_path: Path) -> None:
    env = CONNECTS_NOWHERE | {"WATTBRIDGE_DATABASE__DSN": broken.format(DATABASE_SECRET)}
    for arguments in (CHECK, ("migrate",), ("dead-letters", "list"), ("rollups", "status")):
        reply = wattbridge_here(*arguments, env=env, cwd=tmp_path)
        assert reply.code
        assert_secret(*reply[1:])


@pytest.mark.parametrize("broken", BROKEN_FILES)
def test_a_configuration_that_is_refused_is_refused_without_its_secrets(broken: str, tmp_path: Path) -> None:
    (tmp_path / "wattbridge.toml").write_text(broken.format(DATABASE_SECRET))
    reply = wattbridge_here("migrate", "--config", "wattbridge.toml", env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert reply.code == ExitCode.USAGE
    assert_secret(*reply[1:])


@pytest.mark.parametrize("name", NAMES_OF_NOTHING)
def test_a_variable_of_a_wrong_name_is_named_without_its_value(name: str, tmp_path: Path) -> None:
    env = CONNECTS_NOWHERE | {f"WATTBRIDGE_{name}": DATABASE_SECRET}
    reply = wattbridge_here("migrate", env=env, cwd=tmp_path)
    assert reply.code == ExitCode.USAGE
    assert name in reply.err
    assert_secret(*reply[1:])


def test_a_password_that_no_file_can_give_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(BROKER_SECRET.encode() + b"\xff")
    fleet = ("--host", "127.0.0.1", "--port", "1", "--username", "bridge", "--messages", "1")
    for arguments in (CHECK, ("simulate", *fleet, "--password-file", "password")):
        env = CONNECTS_NOWHERE | {"WATTBRIDGE_MQTT__PASSWORD_FILE": "password"}
        reply = wattbridge(*arguments, env=env, cwd=tmp_path)
        assert reply.code
        assert_secret(*reply[1:])


def fetched(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return str(answer.headers) + answer.read().decode()
    except urllib.error.HTTPError as error:
        return str(error.headers) + error.read().decode()
