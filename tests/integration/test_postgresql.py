"""PostgreSQL as others run it: with TLS, with a version of the distribution, and where we are an ordinary owner."""

import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, ServiceError, _Service
from tests.integration.harness import (
    Address,
    Daemon,
    Publisher,
    Reply,
    ask,
    check_books,
    empty_database,
    environment,
    meter,
    now,
    one,
    series,
    vehicle,
    wait_for_received,
    wait_until,
    wattbridge,
    wattbridge_here,
)

# Made up, and long enough to be found wherever it leaks.
PASSWORD = "cR4zy-S3cret-Word"
BRIEFLY = ("check", "--listen", "0", "--messages", "0")
OFTEN = {"maintenance__every_s": 0.2, "maintenance__history_days": 2, "limits__horizon_days": 1}


# --- a server with TLS -------------------------------------------------------------------------------------

# Debian and Homebrew keep the programs of the server out of PATH.
PROGRAMS = ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin")
HBA = """\
hostssl all wattbridge_cert 127.0.0.1/32 cert
hostssl all all             127.0.0.1/32 scram-sha-256
"""


class TlsPostgres(_Service):
    """The newest PostgreSQL of this system, private, that takes nobody without TLS; `files` holds its certificate."""

    NAME = "PostgreSQL"
    STOPS = EmbeddedPostgres.STOPS

    def __init__(self, programs: Path, files: Path) -> None:
        super().__init__()
        self._programs = programs
        self._files = files

    @property
    def dsn(self) -> str:
        """For the superuser."""
        return f"postgresql://postgres:{PASSWORD}@{self.host}:{self.port}/postgres?sslmode=require"

    def _prepare(self) -> None:
        options = ["--username=postgres", "--auth=scram-sha-256", "--no-sync", "--locale=C", "--encoding=UTF8"]
        secret = self._write("password", PASSWORD)
        data = self.directory / "data"
        self._held.run(
            [self._programs / "initdb", f"--pgdata={data}", f"--pwfile={secret}", *options],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            cwd=self.directory,
            user=self._user,
        )
        if code := self._held.wait(60):
            raise ServiceError(f"initdb ended with {code}:\n{self._tail()}")
        for name in ("ca.crt", "server.crt", "server.key"):
            self._write(f"data/{name}", (self._files / name).read_text())
        (data / "pg_hba.conf").write_text(HBA)

    def _command(self) -> list[str | Path]:
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",
            "fsync": "off",
            "ssl": "on",
            "ssl_ca_file": "ca.crt",
            "ssl_cert_file": "server.crt",
            "ssl_key_file": "server.key",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [self._programs / "postgres", "-D", self.directory / "data", *options]

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def server_programs() -> Path:
    """Where the system's newest PostgreSQL with TLS is; the embedded one has none."""
    found = [path for pattern in PROGRAMS for path in Path("/").glob(f"{pattern[1:]}/initdb")]
    if not found or not shutil.which("openssl"):
        pytest.skip("no PostgreSQL with TLS, or no openssl, on this system: apt-get install postgresql openssl")
    return max(found, key=lambda path: int("".join(filter(str.isdigit, path.parts[-3])) or 0)).parent


def certificate(folder: Path, name: str, subject: str, *options: str) -> None:
    """Makes name.crt and name.key: of a CA, or with `-CA` and `-CAkey` by one."""
    key, made = folder / f"{name}.key", folder / f"{name}.crt"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:P-256", "-subj", f"/CN={subject}", "-keyout", str(key), "-out", str(made), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    key.chmod(0o600)


class Secured(NamedTuple):
    """A server with TLS and a migrated database; DSNs without what concerns TLS, and where the certificates are."""

    admin: str
    bridge: str
    files: Path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    programs, files = server_programs(), tmp_path_factory.mktemp("certificates")
    for name in ("ca", "strange-ca"):
        certificate(files, name, f"CA of {name}")
    by_ca = ("-CA", str(files / "ca.crt"), "-CAkey", str(files / "ca.key"))
    certificate(files, "server", "db.test", *by_ca, "-addext", "subjectAltName=DNS:db.test")
    certificate(files, "client", "wattbridge_cert", *by_ca)
    certificate(files, "stranger", "somebody_else", *by_ca)
    with TlsPostgres(programs, files) as server:
        for name in ("owner", "bridge"):
            ask(server.dsn, f"CREATE ROLE wattbridge_{name} LOGIN PASSWORD '{PASSWORD}'")
        ask(server.dsn, "CREATE ROLE wattbridge_cert LOGIN")
        ask(server.dsn, "CREATE ROLE wattbridge_writer")
        ask(server.dsn, "CREATE ROLE wattbridge_retention")
        ask(server.dsn, "CREATE ROLE wattbridge_reader")
        ask(server.dsn, "GRANT wattbridge_writer TO wattbridge_bridge, wattbridge_cert")
        ask(server.dsn, "CREATE DATABASE wattbridge OWNER wattbridge_owner")
        # By this name it knows the server, at this address it finds it.
        where = {"host": "db.test", "hostaddr": server.host, "port": server.port, "dbname": "wattbridge"}
        owner, bridge = (make_conninfo(**where, user=f"wattbridge_{name}") for name in ("owner", "bridge"))
        migrate(make_conninfo(owner, password=PASSWORD, sslmode="verify-full", sslrootcert=str(files / "ca.crt")))
        yield Secured(make_conninfo(server.dsn, dbname="wattbridge"), bridge, files)


def quiet(env: dict[str, str], **variables: str) -> dict[str, str]:
    """The environment of a process that finds no certificates or passwords but those it is told."""
    return env | {"HOME": "/nonexistent", "PGSYSCONFDIR": "/nonexistent"} | variables


def test_the_whole_way_with_tls(secured: Secured, broker: Address, topic_root: str, tmp_path: Path) -> None:
    trust = f"sslmode=verify-full sslrootcert={secured.files / 'ca.crt'}"
    readings = list(series(devices=5, readings=60))
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\n")
    daemon = Daemon(f"{secured.bridge} {trust}", broker, topic_root, tmp_path, database__password_file=secret)
    with daemon, Publisher(broker, topic_root) as devices:
        for device, reading in readings:
            moment = datetime.fromisoformat(reading["timestamp"])
            devices.send("meter", device, reading)
            devices.send("vehicle", f"VEH-{device}", vehicle(f"VEH-{device}", moment, at=device))
        devices.send("meter", "MTR-1", b"{}")
        wait_for_received(secured.admin, 2 * len(readings) + 1)
        sessions = (
            "SELECT DISTINCT application_name, ssl FROM pg_stat_activity NATURAL JOIN pg_stat_ssl WHERE usename = %s"
        )
        wait_until(
            lambda: (
                sorted(ask(secured.admin, sessions, "wattbridge_bridge"))
                == [("wattbridge", True), ("wattbridge-maintenance", True)]
            ),
            "both connections have TLS",
        )
        cmdline = Path(f"/proc/{daemon.pid}/cmdline")
        assert not cmdline.exists() or PASSWORD not in cmdline.read_text()
        assert PASSWORD not in "".join(daemon.env.values())
        assert daemon.terminate() == 0
        assert PASSWORD not in daemon.log
    assert check_books(secured.admin).stored == 2 * len(readings)
    assert one(secured.admin, "SELECT count(*) FROM meter_status") == 5
    assert one(secured.admin, "SELECT letters FROM dead_letter_summary") == 1
    energy = one(secured.admin, "SELECT sum(kwh_ac) FROM energy_by_quarter_hour('-infinity')")
    assert energy == pytest.approx(sum(reading["kwhConsumedAc"] for _, reading in readings))


Way = Callable[[Secured, Path], tuple[str, dict[str, str]]]


def by_uri(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    parts = conninfo_to_dict(secured.bridge)
    return f"postgresql://wattbridge_bridge:{PASSWORD}@127.0.0.1:{parts['port']}/wattbridge?sslmode=require", {}


def by_pairs(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    root = secured.files / "ca.crt"
    return f"{secured.bridge} password={PASSWORD} sslmode=verify-full sslrootcert={root}", {}


def by_file(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    (folder / "dsn").write_text(by_pairs(secured, folder)[0] + "\n")
    return "", {"WATTBRIDGE_DATABASE__DSN_FILE": str(folder / "dsn")}


def by_variables(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    parts = conninfo_to_dict(secured.bridge)
    places = {"PGHOST": "host", "PGHOSTADDR": "hostaddr", "PGPORT": "port", "PGDATABASE": "dbname", "PGUSER": "user"}
    variables = {name: str(parts[part]) for name, part in places.items()}
    tls = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(secured.files / "ca.crt")}
    return "", variables | tls | {"PGPASSWORD": PASSWORD}


def by_password_file(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    _, variables = by_variables(secured, folder)
    del variables["PGPASSWORD"]
    file = folder / "pgpass"
    file.touch(mode=0o600)
    file.write_text(f"db.test:*:wattbridge:wattbridge_bridge:{PASSWORD}\n")
    return "", variables | {"PGPASSFILE": str(file)}


def by_service(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    pairs = by_pairs(secured, folder)[0].split()
    (folder / "services").write_text("[energy]\n" + "\n".join(pairs) + "\n")
    return "", {"PGSERVICEFILE": str(folder / "services"), "PGSERVICE": "energy"}


def by_certificate(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    key = f"sslcert={secured.files / 'client.crt'} sslkey={secured.files / 'client.key'}"
    return f"{secured.bridge} user=wattbridge_cert sslmode=require {key}", {}


def by_certificate_in_variables(secured: Secured, folder: Path) -> tuple[str, dict[str, str]]:
    _, variables = by_variables(secured, folder)
    del variables["PGPASSWORD"]
    files = {"PGSSLCERT": str(secured.files / "client.crt"), "PGSSLKEY": str(secured.files / "client.key")}
    return "", variables | files | {"PGUSER": "wattbridge_cert"}


def check_over(way: tuple[str, dict[str, str]], broker: Address, folder: Path) -> Reply:
    dsn, variables = way
    env = environment(dsn, broker, "test", "test-tls")
    if not dsn:
        del env["WATTBRIDGE_DATABASE__DSN"]
    return wattbridge_here(*BRIEFLY, env=quiet(env, **variables), cwd=folder)


@pytest.mark.parametrize(
    "way",
    [
        by_uri,
        by_pairs,
        by_file,
        by_variables,
        by_password_file,
        by_service,
        by_certificate,
        by_certificate_in_variables,
    ],
)
def test_every_way_to_say_where_the_database_is(way: Way, secured: Secured, broker: Address, tmp_path: Path) -> None:
    reply = check_over(way(secured, tmp_path), broker, tmp_path)
    user = "wattbridge_cert" if "certificate" in way.__name__ else "wattbridge_bridge"
    assert re.search(rf"ok +│ PostgreSQL +│ {user} at ", reply.out), reply.out + reply.err
    assert "problem" not in reply.out
    assert PASSWORD not in reply.out + reply.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sslrootcert": "strange-ca.crt"}, "certificate verify failed"),
        ({"host": "other.test"}, 'server certificate for "db.test" does not match host name "other.test"'),
        ({"sslmode": "disable", "sslrootcert": None}, "no encryption"),
        ({"user": "wattbridge_cert"}, "connection requires a valid client certificate"),
        (
            {"user": "wattbridge_cert", "sslcert": "stranger.crt", "sslkey": "stranger.key"},
            'certificate authentication failed for user "wattbridge_cert"',
        ),
        ({"password": f"{PASSWORD}-of-old"}, 'password authentication failed for user "wattbridge_bridge"'),
    ],
    ids=["CA", "name", "plain", "no certificate", "another's certificate", "password"],
)
def test_what_is_refused_says_why(
    changed: dict[str, str | None], said: str, secured: Secured, broker: Address, tmp_path: Path
) -> None:
    files = {"sslrootcert", "sslcert", "sslkey"}
    changes = {key: str(secured.files / value) if value and key in files else value for key, value in changed.items()}
    dsn = make_conninfo(by_pairs(secured, tmp_path)[0], **changes)
    reply = check_over((dsn, {}), broker, tmp_path)
    assert reply.code == 1
    assert said in " ".join(reply.out.replace("│", " ").split())
    assert PASSWORD not in reply.out + reply.err
    migrated = wattbridge_here("migrate", env=quiet(environment(dsn, broker, "test", "test-tls")), cwd=tmp_path)
    assert (migrated.code, len(migrated.err.splitlines())) == (1, 1)
    assert said in migrated.err
    assert PASSWORD not in migrated.err


def test_the_daemon_waits_for_a_certificate_that_it_can_trust(
    secured: Secured, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.crt"
    shutil.copy(secured.files / "strange-ca.crt", trusted)
    dsn = f"{secured.bridge} password={PASSWORD} sslmode=verify-full sslrootcert={trusted}"
    with Daemon(dsn, broker, topic_root, tmp_path, ready=False) as daemon:
        assert "certificate verify failed" in daemon.wait_for_event("database.waiting")["reason"]
        daemon.wait_for_event("mqtt.connected")
        shutil.copy(secured.files / "ca.crt", trusted)
        daemon.wait_for_event("database.connected")
        assert daemon.terminate() == 0
        assert PASSWORD not in daemon.log


# --- an ordinary owner, as on a managed service ------------------------------------------------------------


def everything(owner: str, login: str, broker: Address, root: str, folder: Path) -> None:
    """All that Wattbridge does with a database, which `owner` has migrated, and `login` serves."""
    env = environment(login, broker, root, "test-managed")

    def command(*arguments: str) -> str:
        reply = wattbridge_here(*arguments, env=env, cwd=folder)
        assert reply.code == 0, reply.out + reply.err
        return reply.out

    assert "problem" not in command(*BRIEFLY)
    old = now().date() - timedelta(days=9)
    for history in ("meter_history", "vehicle_history"):
        ask(login, f"SELECT ensure_history_partitions('{history}', ARRAY[%s::date])", old)
    start = now() - timedelta(hours=2)
    minutes = [start + timedelta(minutes=minute) for minute in range(90)]
    (folder / "assignments.csv").write_text("vehicle_id,meter_id,valid_from,valid_until\nVEH-1,MTR-1,,\n")
    command("assignments", "import", str(folder / "assignments.csv"))
    assert "MTR-1" in command("assignments", "list")
    with Daemon(login, broker, root, folder, **OFTEN) as daemon, Publisher(broker, root) as devices:
        for minute in minutes:
            devices.send("meter", "MTR-1", meter("MTR-1", minute, kwh=0.5))
            devices.send("vehicle", "VEH-1", vehicle("VEH-1", minute, kwh=0.45))
        devices.send("meter", "MTR-1", meter("MTR-1", minutes[0], kwh=0.5))
        devices.send("vehicle", "VEH-2", vehicle("VEH-2", now(), kwh=2_000))
        devices.send("vehicle", "VEH-1", b"online", channel="status")
        wait_for_received(owner, 182)
        # Late, for what is rolled up already.
        wait_until(lambda: one(owner, "SELECT count(*) FROM charging_quarter_hour"), "there are rollups")
        devices.send("meter", "MTR-1", meter("MTR-1", start - timedelta(minutes=1), kwh=0.25))
        wait_for_received(owner, 183)
        assert daemon.wait_for_event("history.dropped")["partitions"] == 2
        assert daemon.events("maintenance.waiting") == daemon.events("database.waiting") == []
        assert daemon.terminate() == 0
    assert check_books(owner)[:4] == (183, 181, 1, 1)
    env["WATTBRIDGE_LIMITS__MAX_INTERVAL_KWH"] = "5000"
    replayed = wattbridge("dead-letters", "replay", "--all", env=env, cwd=folder)
    assert replayed.code == 0, replayed.err
    assert check_books(owner)[:4] == (183, 182, 1, 0)
    command("rollups", "rebuild")
    assert "complete until" in command("rollups", "status")
    assert one(owner, "SELECT round(efficiency::numeric, 6) FROM vehicle_performance('VEH-1')") == Decimal("0.9")
    assert ask(owner, "SELECT extname FROM pg_extension") == [("plpgsql",)]
    assert (
        one(
            owner,
            "SELECT count(*) FROM pg_proc WHERE prolang <> ALL (ARRAY(SELECT oid FROM pg_language WHERE lanpltrusted)) "
            "AND pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)",
        )
        == 0
    )


@contextmanager
def owned(admin: str, *, powers: str = "") -> Iterator[str]:
    """The DSN of a role that owns its database and no more; both are gone afterwards."""
    name = f"plain_{uuid.uuid4().hex[:8]}"
    ask(
        admin, f"CREATE ROLE {name} LOGIN PASSWORD 'test' NOSUPERUSER NOCREATEDB NOBYPASSRLS {powers or 'NOCREATEROLE'}"
    )
    ask(admin, f"CREATE DATABASE {name} OWNER {name}")
    try:
        yield make_conninfo(admin, user=name, password="test", dbname=name)
    finally:
        ask(admin, f"DROP DATABASE {name} WITH (FORCE)")
        # With those that it has made.
        groups = ("wattbridge_writer", "wattbridge_retention", "wattbridge_reader")
        for role in ("test_daemon", "test_person", *groups, name):
            ask(admin, f"DROP ROLE IF EXISTS {role}")


@pytest.fixture(scope="module")
def untouched() -> Iterator[str]:
    """A server on which nobody has made the group roles: these are the server's, not the database's."""
    with EmbeddedPostgres({"fsync": "off"}) as server:
        yield server.dsn


def test_an_ordinary_owner_without_the_group_roles_does_everything_itself(
    untouched: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with owned(untouched) as owner:
        env = environment(owner, broker, topic_root, "test-managed")
        said = wattbridge_here("migrate", env=env, cwd=tmp_path)
        assert said.code == 0
        for role in ("wattbridge_writer", "wattbridge_retention", "wattbridge_reader"):
            assert f"warning: role {role} does not exist and " in said.err
        assert said.err.count('create it and run "wattbridge migrate" again') == 3
        everything(owner, owner, broker, topic_root, tmp_path)
        # Somebody makes them after all.
        ask(untouched, "CREATE ROLE wattbridge_writer")
        ask(untouched, "CREATE ROLE wattbridge_retention")
        ask(untouched, "CREATE ROLE wattbridge_reader")
        again = wattbridge_here("migrate", env=env, cwd=tmp_path)
        assert (again.code, again.err) == (0, "")
        granted = "has_table_privilege('wattbridge_writer', 'meter_history', 'INSERT')"
        assert ask(owner, f"SELECT {granted}, has_table_privilege('wattbridge_reader', 'meter_status', 'SELECT')") == [
            (True, True)
        ]


def test_an_owner_that_may_create_roles_makes_the_groups_and_hands_them_out(
    untouched: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """As on RDS, Cloud SQL or Azure, and with the rules of PostgreSQL 16: who creates a role may grant it."""
    with owned(untouched, powers="CREATEROLE") as owner:
        env = environment(owner, broker, topic_root, "test-managed")
        said = wattbridge_here("migrate", env=env, cwd=tmp_path)
        assert (said.code, said.err) == (0, "")
        ask(owner, "CREATE ROLE test_daemon LOGIN PASSWORD 'test' IN ROLE wattbridge_writer, wattbridge_retention")
        ask(owner, "CREATE ROLE test_person LOGIN PASSWORD 'test'")
        ask(owner, "GRANT wattbridge_reader TO test_person")
        login, person = (make_conninfo(owner, user=f"test_{who}", password="test") for who in ("daemon", "person"))
        checked = wattbridge_here(*BRIEFLY, env=environment(login, broker, topic_root, "test-managed"), cwd=tmp_path)
        assert checked.code == 0, checked.out
        assert one(person, "SELECT count(*) FROM vehicle_status") == 0


def test_an_owner_of_a_schema_alone_beside_others(
    postgres_dsn_admin: str, template: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """The group roles are there, made by somebody else; the schema is not `public`, which is closed to all of us."""
    names = [f"{what}_{uuid.uuid4().hex[:8]}" for what in ("owner", "daemon")]
    with empty_database(postgres_dsn_admin) as admin:
        database = conninfo_to_dict(admin)["dbname"]
        ask(admin, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
        for name in names:
            ask(admin, f"CREATE ROLE {name} LOGIN PASSWORD 'test'")
            ask(admin, f"ALTER ROLE {name} IN DATABASE {database} SET search_path = energy")
        ask(admin, f"CREATE SCHEMA energy AUTHORIZATION {names[0]}")
        ask(admin, f"GRANT wattbridge_writer, wattbridge_retention TO {names[1]}")
        owner, login = (make_conninfo(admin, user=name, password="test") for name in names)
        try:
            said = wattbridge_here("migrate", env=environment(owner, broker, topic_root, "test-managed"), cwd=tmp_path)
            assert (said.code, said.err) == (0, "")
            everything(owner, login, broker, topic_root, tmp_path)
            places = (
                "SELECT DISTINCT relnamespace::regnamespace::text FROM pg_class "
                "WHERE relowner = %s::regrole AND relnamespace::regnamespace::text <> 'pg_toast'"
            )
            assert ask(admin, places, names[0]) == [("energy",)]
        finally:
            wait_until(
                lambda: not ask(admin, "SELECT FROM pg_stat_activity WHERE usename = ANY (%s)", names), "sessions ended"
            )
            ask(admin, "DROP SCHEMA energy CASCADE")
            for name in names:
                ask(admin, f"DROP OWNED BY {name}")
                ask(admin, f"DROP ROLE {name}")


def test_check_says_that_a_server_is_read_only(database: str, broker: Address, tmp_path: Path) -> None:
    dsn = make_conninfo(database, options="-c default_transaction_read_only=on")
    reply = check_over((dsn, {}), broker, tmp_path)
    assert reply.code == 1
    assert re.search(r"problem +│ PostgreSQL +│ read-only", reply.out), reply.out
