"""The schema: migrations once each; functions, views, roles whenever they changed. One at a time, all or nothing."""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection

from bridge.errors import WattbridgeError

# Several migrations that start at once wait here for one another; the number only has to be ours.
LOCK = 0x57415454_42524447
LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migration (
    name       text        PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE schema_migration IS 'The SQL files that make up this schema, as they were when applied.';
COMMENT ON COLUMN schema_migration.name IS 'Path below sql/.';
COMMENT ON COLUMN schema_migration.checksum IS 'SHA-256 of the file.';
COMMENT ON COLUMN schema_migration.applied_at IS 'When it was applied last.';
"""


class SchemaError(WattbridgeError):
    """The database does not have the schema of this version."""


class Script(NamedTuple):
    """One SQL file."""

    name: str
    text: str
    repeatable: bool

    @property
    def checksum(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def scripts() -> list[Script]:
    """All SQL files in the order in which they are applied: migrations, functions, views, roles."""
    sql = files("bridge").joinpath("sql")
    return [
        *(_script(file, "migrations", repeatable=False) for file in _sorted(sql.joinpath("migrations"))),
        *(_script(file, "functions", repeatable=True) for file in _sorted(sql.joinpath("functions"))),
        *(_script(file, "views", repeatable=True) for file in _sorted(sql.joinpath("views"))),
        Script("roles.sql", sql.joinpath("roles.sql").read_text(encoding="utf-8"), repeatable=True),
    ]


def migrate(dsn: str, warn: Callable[[str], None] | None = None) -> list[str]:
    """Brings the database to the schema of this version; returns the names of the files that it applied.

    Safe to run from several places at once. Raises SchemaError where an applied migration has been altered since,
    psycopg.Error where the database refuses.
    """
    applied = []
    with psycopg.connect(dsn, application_name="wattbridge-migrate", connect_timeout=10) as connection:
        if warn:
            connection.add_notice_handler(lambda notice: warn(notice.message_primary or ""))
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        # Functions keep this path: the schema that the tables are in, and temporary objects last.
        connection.execute("SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)")
        connection.execute("SET LOCAL client_min_messages = warning")
        connection.execute(LEDGER)
        known: dict[str, str] = dict(connection.execute("SELECT name, checksum FROM schema_migration").fetchall())
        for script in scripts():
            if script.name in known and not script.repeatable and known[script.name] != script.checksum:
                raise SchemaError(
                    f"{script.name} was applied to this database and has been altered since; "
                    "restore the file and put the change into a new migration"
                )
            # Roles are made once more each time: they are the server's, and may have been created in between.
            if known.get(script.name) != script.checksum or script.name == "roles.sql":
                _apply(connection, script)
                if known.get(script.name) != script.checksum:
                    applied.append(script.name)
        # Tables of one row: autovacuum never looks at them, and the planner would take them for hundreds of rows, and
        # what is read by their settings for hundreds of times as much.
        connection.execute("ANALYZE analytics_setting, rollup_progress")
    return applied


async def check_schema(connection: AsyncConnection[tuple[Any, ...]]) -> None:
    """Raises psycopg.errors.UndefinedTable or .FeatureNotSupported, with what to do, where the schema is not ours."""
    try:
        cursor = await connection.execute("SELECT name FROM schema_migration")
        names = {name for (name,) in await cursor.fetchall()}
    except psycopg.errors.UndefinedTable:
        raise psycopg.errors.UndefinedTable('the schema is missing: run "wattbridge migrate"') from None
    except psycopg.errors.InsufficientPrivilege:
        raise psycopg.errors.InsufficientPrivilege(
            f"{connection.info.user} may not read the schema: GRANT wattbridge_writer TO {connection.info.user}"
        ) from None
    if connection.info.parameter_status("server_encoding") != "UTF8":
        raise psycopg.errors.FeatureNotSupported("the database is not in UTF8: make another with ENCODING 'UTF8'")
    ours = {script.name for script in scripts() if not script.repeatable}
    if missing := sorted(ours - names):
        raise psycopg.errors.FeatureNotSupported(
            f'the schema is older than this version ({", ".join(missing)} missing): run "wattbridge migrate"'
        )


def _apply(connection: Connection[Any], script: Script) -> None:
    connection.execute(script.text)
    connection.execute(
        "INSERT INTO schema_migration (name, checksum) VALUES (%s, %s) "
        "ON CONFLICT (name) DO UPDATE SET checksum = excluded.checksum, applied_at = now()",
        (script.name, script.checksum),
    )


def _sorted(directory: Traversable) -> list[Traversable]:
    return sorted((file for file in directory.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)


def _script(file: Traversable, folder: str, *, repeatable: bool) -> Script:
    return Script(f"{folder}/{file.name}", file.read_text(encoding="utf-8"), repeatable)
