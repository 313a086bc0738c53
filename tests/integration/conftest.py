"""Real services: given by the environment, or in containers, or private ones of our own; and a bridge between them."""

import os
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, PrivateMosquitto
from tests.integration.harness import Daemon, Proxy, Publisher, ask, cloned, wait_until

POSTGRES_IMAGE = os.environ.get("WATTBRIDGE_TEST_POSTGRES_IMAGE", "postgres:18")
MOSQUITTO_IMAGE = os.environ.get("WATTBRIDGE_TEST_MOSQUITTO_IMAGE", "eclipse-mosquitto:2.0")
MOSQUITTO_CONFIG = "listener 1883\nallow_anonymous true\nmax_inflight_messages 0\nmax_queued_messages 0\n"


class Broker(NamedTuple):
    """Where to reach a broker that takes anyone."""

    host: str
    port: int


@pytest.fixture(scope="session")
def postgres_dsn_admin() -> Iterator[str]:
    """The DSN of a role that may create roles and databases."""
    if given := os.environ.get("WATTBRIDGE_TEST_DATABASE_DSN"):
        yield given
    elif in_containers():
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - only where there is Docker
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415

        # The image starts once for its own set-up, so only the second time counts.
        ready = LogMessageWaitStrategy("database system is ready to accept connections", times=2)
        container = DockerContainer(POSTGRES_IMAGE).with_envs(
            POSTGRES_PASSWORD="test", POSTGRES_INITDB_ARGS="--encoding=UTF8"
        )
        with container.with_exposed_ports(5432).waiting_for(ready) as running:
            host, port = running.get_container_host_ip(), running.get_exposed_port(5432)
            yield f"postgresql://postgres:test@{host}:{port}/postgres"
    else:
        with EmbeddedPostgres() as server:
            # Of its machine it survives everything but a power failure, and copies of the template are made faster.
            ask(server.dsn, "ALTER SYSTEM SET fsync = off")
            ask(server.dsn, "SELECT pg_reload_conf()")
            yield server.dsn


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """A Mosquitto that all tests share, each under its own `topic_root`."""
    if given := os.environ.get("WATTBRIDGE_TEST_MQTT_URL"):
        url = urllib.parse.urlsplit(given)
        yield Broker(url.hostname or "127.0.0.1", url.port or 1883)
    elif in_containers():
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - only where there is Docker
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415

        container = DockerContainer(MOSQUITTO_IMAGE).with_exposed_ports(1883)
        container.with_copy_into_container(MOSQUITTO_CONFIG.encode(), "/mosquitto/config/mosquitto.conf")
        with container.waiting_for(LogMessageWaitStrategy("running")) as running:
            yield Broker(running.get_container_host_ip(), int(running.get_exposed_port(1883)))
    else:
        with PrivateMosquitto() as server:
            yield Broker(server.host, server.port)


@pytest.fixture(scope="session")
def template(postgres_dsn_admin: str) -> Iterator[str]:
    """The name of a migrated database, to be cloned."""
    name = f"wattbridge_template_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn_admin, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            migrate(make_conninfo(postgres_dsn_admin, dbname=name))
            yield name
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database(postgres_dsn_admin: str, template: str) -> Iterator[str]:
    """The DSN of a migrated, empty database for one test."""
    with cloned(postgres_dsn_admin, template) as dsn:
        yield dsn


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    """The way to the database of the test, to be cut."""
    with Proxy(database) as running:
        yield running


@pytest.fixture
def daemon(database: str, broker: Broker, topic_root: str, tmp_path: Path) -> Iterator[Daemon]:
    """A bridge that is connected to both sides."""
    with Daemon(database, broker, topic_root, tmp_path) as running:
        yield running


@pytest.fixture
def devices(daemon: Daemon, broker: Broker, topic_root: str) -> Iterator[Publisher]:
    """Devices whose bridge is running."""
    with Publisher(broker, topic_root) as publisher:
        yield publisher


@pytest.fixture
def logins(database: str, postgres_dsn_admin: str) -> Iterator[dict[str, str]]:
    """DSNs of a login of each role, and of a stranger without any."""
    names = {role: f"test_{role}_{uuid.uuid4().hex[:8]}" for role in ("writer", "retention", "reader", "stranger")}
    with psycopg.connect(postgres_dsn_admin, autocommit=True) as admin:
        for role, name in names.items():
            login = sql.Identifier(name)
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'test'").format(login))
            if role != "stranger":
                admin.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(f"wattbridge_{role}"), login))
        yield {role: make_conninfo(database, user=name, password="test") for role, name in names.items()}
        # A session that has just been closed may still have its temporary tables, and they an owner.
        query = "SELECT FROM pg_stat_activity WHERE usename = ANY (%s)"
        wait_until(lambda: not admin.execute(query, (list(names.values()),)).fetchall(), "their sessions have ended")
        for name in names.values():
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def in_containers() -> bool:
    return os.environ.get("WATTBRIDGE_TEST_SERVICES") == "docker"
