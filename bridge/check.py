"""`wattbridge check`: what an operator wants to know before the first start, and when something is wrong."""

import asyncio
import time
from collections.abc import Iterator

import psycopg
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bridge.check_broker import Effort, Finding, findings
from bridge.config import Config
from bridge.migrate import scripts
from bridge.store import conninfo

FUNCTIONS_NEEDED = (
    "ensure_history_partitions(regclass, date[])",
    "rollup_advance(timestamptz)",
    "rollup_refresh(interval, integer)",
)
ALSO_NEEDED = {"TEMP on the database": "SELECT has_database_privilege(current_database(), 'TEMP')"} | {
    f"EXECUTE on {function.partition('(')[0]}": f"SELECT has_function_privilege('{function}', 'EXECUTE')"
    for function in FUNCTIONS_NEEDED
}
WRITER_NEEDS = {
    "meter_history": "SELECT, INSERT",
    "vehicle_history": "SELECT, INSERT",
    "meter_live": "SELECT, INSERT, UPDATE",
    "vehicle_live": "SELECT, INSERT, UPDATE",
    "device_presence": "SELECT, INSERT, UPDATE",
    "device_duplicate": "SELECT, INSERT, UPDATE",
    "rollup_mark": "SELECT, INSERT",
    "rollup_progress": "SELECT",
    "analytics_setting": "SELECT",
    "vehicle_reading": "SELECT",
    "dead_letter": "SELECT, INSERT, DELETE",
    "ingest_counter": "SELECT, INSERT, UPDATE",
}
MOST_CLOCK_SKEW_S = 5.0


def report(config: Config, effort: Effort) -> bool:
    """Prints what was found about both sides as a table; false where something has to be mended."""
    table = Table("", "what", "found", title="wattbridge check", title_justify="left")
    with Console(stderr=True).status("connecting to the database …") as status:
        found = [
            *_database(config),
            *asyncio.run(findings(config, effort, say=lambda step: status.update(f"{step} …"))),
        ]
    for finding in found:
        mark = {True: "[green]ok[/]", False: "[red]problem[/]", None: "[dim]note[/]"}[finding.fine]
        table.add_row(mark, finding.what, escape(finding.said))
    Console().print(table)
    return all(finding.fine is not False for finding in found)


def _database(config: Config) -> Iterator[Finding]:
    try:
        with psycopg.connect(conninfo(config.database), autocommit=True) as connection:
            info = connection.info
            place = f"{info.user} at {info.host}:{info.port}/{info.dbname}, server {_version(info.server_version)}"
            yield Finding("PostgreSQL", True, place)
            if connection.execute("SHOW transaction_read_only").fetchone() == ("on",):
                said = "read-only, as a standby is: name all servers and target_session_attrs=read-write in the DSN"
                yield Finding("PostgreSQL", False, said)
            encoding = info.parameter_status("server_encoding")
            if encoding != "UTF8":
                yield Finding("encoding", False, f"{encoding}: make another database with ENCODING 'UTF8'")
            yield from _clock(connection)
            yield from _schema(connection)
            if config.maintenance.history_days is not None:
                yield from _retention(connection)
    except psycopg.errors.InsufficientPrivilege:
        yield Finding(
            "privileges", False, f"{info.user} may not read the schema: GRANT wattbridge_writer TO {info.user}"
        )
    except psycopg.Error as error:
        yield Finding("PostgreSQL", False, " ".join(str(error).split()))


def _clock(connection: psycopg.Connection) -> Iterator[Finding]:
    began = time.time()
    (there,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone() or (0.0,)
    skew = there - (began + time.time()) / 2
    yield Finding("clocks", abs(skew) < MOST_CLOCK_SKEW_S, f"the database's is {skew:+.3f} s against this machine's")


def _schema(connection: psycopg.Connection) -> Iterator[Finding]:
    (exists,) = connection.execute("SELECT to_regclass('schema_migration') IS NOT NULL").fetchone() or (False,)
    if not exists:
        yield Finding("schema", False, 'missing: run "wattbridge migrate"')
        return
    known: dict[str, str] = dict(connection.execute("SELECT name, checksum FROM schema_migration").fetchall())
    behind = [script.name for script in scripts() if known.get(script.name) != script.checksum]
    said = f'not as in this version ({", ".join(behind)}): run "wattbridge migrate"' if behind else "current"
    yield Finding("schema", not behind, said)
    lacking = [
        f"{privilege} on {table}"
        for table, privileges in WRITER_NEEDS.items()
        for privilege in privileges.split(", ")
        if connection.execute("SELECT has_table_privilege(%s, %s)", (table, privilege)).fetchone() != (True,)
    ]
    lacking += [what for what, query in ALSO_NEEDED.items() if connection.execute(query).fetchone() != (True,)]
    said = (
        f"lacking {', '.join(lacking)}: GRANT wattbridge_writer TO {connection.info.user}" if lacking else "as needed"
    )
    yield Finding("privileges", not lacking, said)


def _retention(connection: psycopg.Connection) -> Iterator[Finding]:
    may = connection.execute("SELECT has_function_privilege('drop_history_before(date)', 'EXECUTE')").fetchone()
    said = (
        "the role may drop old history"
        if may == (True,)
        else f"the role may not drop history: GRANT wattbridge_retention TO {connection.info.user}"
    )
    yield Finding("retention", may == (True,), said)


def _version(number: int) -> str:
    return f"{number // 10_000}.{number % 10_000}"
