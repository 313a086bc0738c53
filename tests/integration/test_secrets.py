"""The roles that docker-compose.yml gives its database, made by the script that its image runs, on a real server."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bridge.config import Config
from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres
from tests.integration.harness import ask, one, wait_until
from tests.web.serving import Web

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "config" / "postgresql" / "roles.sql"
MARK = "tell-nobody"
PASSWORDS = {name: f"'{name}' \\ $ {MARK}" for name in ("owner", "bridge", "grafana", "web")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server of its own: roles are shared by all databases of one."""
    secrets = tmp_path_factory.mktemp("secrets")
    for name, password in PASSWORDS.items():
        (secrets / f"database_{name}").write_text(f"{password}\n")
    script = secrets / "roles.sql"
    script.write_text(SCRIPT.read_text().replace("/run/secrets", str(secrets)))
    with EmbeddedPostgres() as running:
        # The first attempt fails at a statement with a password in it.
        ask(running.dsn, "CREATE ROLE wattbridge_owner")
        assert 'role "wattbridge_owner" already exists' in set_up(running, script)
        ask(running.dsn, "DROP ROLE wattbridge_owner")
        assert set_up(running, script) == ""
        migrate(login(running, "owner"), warn=pytest.fail)
        yield running


def set_up(server: EmbeddedPostgres, script: Path) -> str:
    """Runs the script as the image does; what it complains of."""
    command = [*shlex.split(server.psql_command), "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-f", script]
    reply = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=30, env=dict(os.environ, LC_ALL="C")
    )
    assert (reply.returncode == 0) == (reply.stderr == "")
    return reply.stderr


def login(server: EmbeddedPostgres, role: str, database: str = "wattbridge") -> str:
    return make_conninfo(server.dsn, user=f"wattbridge_{role}", password=PASSWORDS[role], dbname=database)


def refused(dsn: str, query: str) -> str:
    with pytest.raises(psycopg.Error) as caught:
        ask(dsn, query)
    return type(caught.value).__name__


def test_the_owner_owns_the_schema_and_is_nothing_besides(server: EmbeddedPostgres) -> None:
    powers = "rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
    logins = one(server.dsn, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'wattbridge\\_%'")
    assert logins == 7
    assert one(server.dsn, f"SELECT count(*) FROM pg_roles WHERE rolname LIKE 'wattbridge\\_%' AND ({powers})") == 0
    owners = ask(server.dsn, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == [("wattbridge_owner",)]


def test_the_owner_can_migrate_again(server: EmbeddedPostgres) -> None:
    assert migrate(login(server, "owner"), warn=pytest.fail) == []


def test_the_bridge_writes_and_cannot_change_what_is_written(server: EmbeddedPostgres) -> None:
    bridge = login(server, "bridge")
    ask(bridge, "CREATE TEMPORARY TABLE batch (ts timestamptz)")
    ask(bridge, "SELECT ensure_history_partitions('meter_history', ARRAY[current_date])")
    ask(bridge, "BEGIN; SELECT 1 FROM ingest_counter; ROLLBACK")
    assert refused(bridge, "DELETE FROM meter_history") == "InsufficientPrivilege"
    assert refused(bridge, "DROP TABLE meter_live") == "InsufficientPrivilege"
    assert refused(bridge, "CREATE TABLE mine (n integer)") == "InsufficientPrivilege"
    assert refused(bridge, "SELECT drop_history_before('2020-01-01')") == "InsufficientPrivilege"
    assert refused(bridge, "SET ROLE wattbridge_owner") == "InsufficientPrivilege"


@pytest.mark.parametrize("role", ["grafana", "web"])
def test_those_who_look_ask_and_can_do_nothing_else(server: EmbeddedPostgres, role: str) -> None:
    reader = login(server, role)
    assert ask(reader, "SELECT count(*) FROM vehicle_status") == [(0,)]
    assert ask(reader, "SELECT count(*) FROM energy_by_hour(now() - interval '1 day', now())")
    assert ask(reader, "SHOW statement_timeout") == [("1min",)]
    assert ask(reader, "SHOW default_transaction_read_only") == [("on",)]
    assert refused(reader, "SELECT * FROM meter_history") == "InsufficientPrivilege"
    assert refused(reader, "SELECT payload FROM dead_letter") == "InsufficientPrivilege"
    # Also one who asks to write.
    writer = make_conninfo(reader, options="-c default_transaction_read_only=off")
    assert refused(writer, "CREATE TEMPORARY TABLE mine (n integer)") == "InsufficientPrivilege"
    assert refused(writer, "UPDATE ingest_status SET received = 0") == "InsufficientPrivilege"


def test_the_pages_have_all_they_need(server: EmbeddedPostgres, tmp_path: Path) -> None:
    with Web(login(server, "web"), tmp_path) as web:
        wait_until(lambda: web.ask("/readyz").status == 200, "ready", 20)
        assert web.ask("/v1/status/vehicle").status == 200
    limit = one(server.dsn, "SELECT rolconnlimit FROM pg_roles WHERE rolname = 'wattbridge_web'")
    # Those of before may still be there when it is started again.
    assert limit >= 2 * Config().web.connections


def test_an_older_installation_gets_the_same_login_by_the_documented_statements(server: EmbeddedPostgres) -> None:
    attributes = """
        SELECT rolcanlogin, rolinherit, rolconnlimit, rolconfig, array_agg(roleid::regrole::text)
        FROM pg_roles JOIN pg_auth_members ON member = pg_roles.oid WHERE rolname = 'wattbridge_web'
        GROUP BY rolcanlogin, rolinherit, rolconnlimit, rolconfig
    """
    made_first = ask(server.dsn, attributes)
    assert made_first
    document = (ROOT / "docs" / "compose.md").read_text()
    statements = re.findall(r"^(?:CREATE|ALTER) ROLE wattbridge_web.*;$", document, re.MULTILINE)
    with psycopg.connect(server.dsn) as connection:
        connection.execute("DROP ROLE wattbridge_web")
        for statement in statements:
            connection.execute(statement.replace("$(cat secrets/database_web)", "any"))
        assert connection.execute(attributes).fetchall() == made_first
        connection.rollback()


@pytest.mark.parametrize("role", PASSWORDS)
@pytest.mark.parametrize("database", ["postgres", "template1"])
def test_nobody_has_business_in_another_database(server: EmbeddedPostgres, role: str, database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(login(server, role, database))


@pytest.mark.parametrize("role", PASSWORDS)
def test_the_password_is_needed(server: EmbeddedPostgres, role: str) -> None:
    assert conninfo_to_dict(login(server, role))["password"] == PASSWORDS[role]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(make_conninfo(login(server, role), password=role))


def test_no_password_is_in_the_log_of_the_server(server: EmbeddedPostgres) -> None:
    log = "".join(file.read_text(errors="replace") for file in server.directory.glob("*log*") if file.is_file())
    assert 'role "wattbridge_owner" already exists' in log
    assert MARK not in log
