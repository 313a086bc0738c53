"""Charger assignments, as an operator meets them: CSV in and out, all or nothing, only the difference."""

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.services import free_port
from tests.integration.harness import PROGRAM, Reply, ask, empty_database, one, wait_until, wattbridge, wattbridge_here

HEADER = "vehicle_id,meter_id,valid_from,valid_until\n"
FLEET = (
    "VEH-1,MTR-1,,2026-02-01T00:00:00Z\n"
    "VEH-1,MTR-2,2026-02-01T00:00:00Z,\n"
    "VEH-2,MTR-2,2026-01-01T00:00:00Z,2026-01-01T00:00:00.000001Z\n"
    "VEH-3,MTR-3,,\n"
)
Run = Callable[..., Reply]


@pytest.fixture
def run(database: str, tmp_path: Path) -> Run:
    """Runs an `assignments` command, as a process of its own where that is the point."""

    def command(*arguments: str, answer: str = "", dsn: str = database, process: bool = False) -> Reply:
        command = wattbridge if process else wattbridge_here
        return command("assignments", *arguments, env=environment(dsn), cwd=tmp_path, answer=answer)

    return command


def environment(dsn: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return inherited | {"WATTBRIDGE_DATABASE__DSN": dsn}


@pytest.fixture
def fleet(run: Run) -> None:
    """Four assignments."""
    reply = run("import", "-", answer=HEADER + FLEET)
    assert (reply.code, reply.out, reply.err) == (0, "4 assignments added, 0 unchanged, 0 removed\n", "")


@pytest.fixture
def login(database: str) -> Iterator[str]:
    """The DSN of a role that may connect and nothing else."""
    role = sql.Identifier(f"wattbridge_login_{uuid.uuid4().hex[:12]}")
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'test'").format(role))
        try:
            yield make_conninfo(database, user=role.as_string().strip('"'), password="test")
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


def rows(database: str) -> list[tuple[str, str, str]]:
    query = "SELECT vehicle_id, meter_id, valid::text FROM charger_assignment ORDER BY vehicle_id, valid"
    with psycopg.connect(database) as connection:
        connection.execute("SET timezone = 'UTC'")
        return connection.execute(query).fetchall()


def places(database: str) -> set[tuple[str, ...]]:
    """Where each row is, and which transaction wrote it: a row that is written again is elsewhere."""
    return set(ask(database, "SELECT ctid::text, xmin::text, vehicle_id, meter_id FROM charger_assignment"))


def problems(reply: Reply) -> list[str]:
    """The problems that a refused import names."""
    assert (reply.code, reply.out) == (1, "")
    first, *named = reply.err.splitlines()
    assert first.startswith("wattbridge: ")
    assert first.endswith(", nothing was imported")
    return [line.strip() for line in named]


# Importing


def test_help(run: Run) -> None:
    for arguments in ([], ["import"], ["list"]):
        reply = run(*arguments, "--help")
        assert (reply.code, "Usage:" in reply.out) == (0, True)


def test_import(database: str, fleet: None) -> None:
    assert rows(database) == [
        ("VEH-1", "MTR-1", '(,"2026-02-01 00:00:00+00")'),
        ("VEH-1", "MTR-2", '["2026-02-01 00:00:00+00",)'),
        ("VEH-2", "MTR-2", '["2026-01-01 00:00:00+00","2026-01-01 00:00:00.000001+00")'),
        ("VEH-3", "MTR-3", "(,)"),
    ]


def test_importing_twice_changes_nothing(run: Run, database: str, fleet: None, tmp_path: Path) -> None:
    before = places(database)
    file = tmp_path / "chargers.csv"
    # In other words, with a row twice: the same.
    file.write_bytes(
        (HEADER + FLEET + "VEH-1,MTR-2,2026-02-01T01:00:00+01:00,\n").replace(",", ";").encode("utf-8-sig")
    )
    for options in ([], ["--update"], ["--replace"]):
        reply = run("import", str(file), *options)
        assert (reply.code, reply.out) == (0, "0 assignments added, 5 unchanged, 0 removed\n")
        assert places(database) == before


def test_a_file_with_a_mistake_writes_nothing(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    for options in ([], ["--update"], ["--replace"]):
        reply = run("import", "-", *options, answer=HEADER + "VEH-4,MTR-4,,\nVEH 5,MTR-5,2026,\n")
        assert [line.partition(" '")[0] for line in problems(reply)] == ["line 3: vehicle_id", "line 3: valid_from"]
        assert places(database) == before


def test_what_overlaps_the_table_is_named(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    reply = run("import", "-", answer=HEADER + "VEH-4,MTR-4,,\nVEH-1,MTR-4,2026-03-01,\nVEH-3,MTR-3,2026-03-01,\n")
    existing = "to open) overlaps an existing assignment"
    assert problems(reply) == [
        f"line 3: VEH-1 at MTR-4 (2026-03-01T00:00:00Z {existing}: VEH-1 at MTR-2 (2026-02-01T00:00:00Z to open)",
        f"line 4: VEH-3 at MTR-3 (2026-03-01T00:00:00Z {existing}: VEH-3 at MTR-3 (open to open)",
        "to change what is there, see --update and --replace",
    ]
    assert places(database) == before


def test_update_changes_the_vehicles_of_the_file(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    moved = "VEH-1,MTR-1,,2026-02-01\nVEH-1,MTR-2,2026-02-01,2026-03-01\nVEH-1,MTR-3,2026-03-01,\nVEH-9,MTR-9,,\n"
    reply = run("import", "-", "--update", answer=HEADER + moved)
    assert (reply.code, reply.out) == (0, "3 assignments added, 1 unchanged, 1 removed\n")
    assert [row[:2] for row in rows(database)] == [
        *(("VEH-1", f"MTR-{meter}") for meter in (1, 2, 3)),
        *(("VEH-2", "MTR-2"), ("VEH-3", "MTR-3"), ("VEH-9", "MTR-9")),
    ]
    assert len(before & places(database)) == 3
    # Without a row no vehicle is named.
    assert run("import", "-", "--update", answer=HEADER).out == "0 assignments added, 0 unchanged, 0 removed\n"


def test_replace_leaves_what_the_file_says(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    reply = run("import", "-", "--replace", answer=HEADER + "VEH-3,MTR-3,,\nVEH-1,MTR-1,,2026-02-02\n")
    assert (reply.code, reply.out) == (0, "1 assignments added, 1 unchanged, 3 removed\n")
    assert rows(database) == [("VEH-1", "MTR-1", '(,"2026-02-02 00:00:00+00")'), ("VEH-3", "MTR-3", "(,)")]
    assert len(before & places(database)) == 1


def test_replace_with_nothing_must_be_meant(run: Run, database: str, fleet: None) -> None:
    reply = run("import", "-", "--replace", answer=HEADER)
    assert (reply.code, reply.out) == (1, "")
    assert "add --allow-empty" in reply.err
    assert len(rows(database)) == 4
    reply = run("import", "-", "--replace", "--allow-empty", answer=HEADER)
    assert (reply.code, reply.out) == (0, "0 assignments added, 0 unchanged, 4 removed\n")
    assert rows(database) == []


def test_a_dry_run_says_what_would_happen(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    said = "; nothing was written (--dry-run)\n"
    answer = HEADER + "VEH-1,MTR-9,,\nVEH-3,MTR-3,,\n"
    for option, counted in (("--update", "1 added, 1 unchanged, 2 removed"), ("--replace", "3 removed")):
        reply = run("import", "-", "--dry-run", option, answer=answer)
        assert reply.code == 0
        assert reply.out.replace("assignments ", "").endswith(f"{counted}{said}")
    assert len(problems(run("import", "-", "--dry-run", answer=answer))) == 3
    assert places(database) == before


def test_one_statement_removes_and_one_adds(run: Run, database: str, fleet: None) -> None:
    """What marks rollups is called once for each."""
    ask(
        database,
        "CREATE TABLE said (operation text);"
        "CREATE FUNCTION say() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO said VALUES (TG_OP); RETURN NULL; END $$;"
        "CREATE TRIGGER say AFTER INSERT OR UPDATE OR DELETE ON charger_assignment "
        "FOR EACH STATEMENT EXECUTE FUNCTION say()",
    )
    assert run("import", "-", "--replace", answer=HEADER + FLEET).code == 0
    assert ask(database, "SELECT operation FROM said") == []
    many = "".join(f"VEH-{number},MTR-9,,\n" for number in range(1, 1_000))
    assert run("import", "-", "--replace", answer=HEADER + many).out.startswith("999 assignments added, 0 unchanged, 4")
    assert ask(database, "SELECT operation FROM said") == [("DELETE",), ("INSERT",)]


def test_two_imports_at_once(run: Run, database: str) -> None:
    """The second looks at the table when the first has committed."""
    replies: list[Reply] = []
    with psycopg.connect(database) as first:
        first.execute("LOCK TABLE charger_assignment IN SHARE ROW EXCLUSIVE MODE")
        waiting = threading.Thread(
            target=lambda: replies.append(run("import", "-", answer=HEADER + FLEET, process=True))
        )
        waiting.start()
        wait_until(
            lambda: one(
                database,
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'charger_assignment'::regclass",
            ),
            "the import waits",
        )
        # Readers do not.
        assert one(database, "SELECT count(*) FROM charger_assignment") == 0
        first.execute("INSERT INTO charger_assignment VALUES ('VEH-3', 'MTR-3', '(,)'), ('VEH-4', 'MTR-3', '(,)')")
    waiting.join()
    assert replies[0].out == "3 assignments added, 1 unchanged, 0 removed\n"


# What is there by hand, in another way


@pytest.mark.parametrize(
    ("valid", "row"),
    [
        ("[-infinity,infinity]", "V,M,,"),
        ("(-infinity,2026-01-01T00:00:00Z]", "V,M,,2026-01-01T00:00:00.000001Z"),
        ("(2026-01-01T00:00:00Z,infinity)", "V,M,2026-01-01T00:00:00.000001Z,"),
        ("[2026-01-01T00:00:00Z,2026-01-01T00:00:00Z]", "V,M,2026-01-01T00:00:00Z,2026-01-01T00:00:00.000001Z"),
    ],
)
def test_other_bounds_are_the_same_times(run: Run, database: str, valid: str, row: str) -> None:
    try:
        ask(database, "INSERT INTO charger_assignment VALUES ('V', 'M', %s)", valid)
    except psycopg.errors.CheckViolation:
        pytest.skip("the table does not take them")
    before = places(database)
    assert run("list", "--csv").out == f"{HEADER}{row}\n"
    assert run("import", "-", "--replace", answer=f"{HEADER}{row}\n").out.startswith("0 assignments added, 1 unchanged")
    assert places(database) == before
    assert run("import", "-", "--replace", answer=f"{HEADER}V,M,2025-01-01,\n").out.endswith("1 removed\n")
    assert len(rows(database)) == 1


def test_a_server_with_a_zone_and_dates_of_its_own(run: Run, database: str) -> None:
    """In the night when Berlin turns its clocks back, two moments have the same name."""
    name = one(database, "SELECT current_database()")
    ask(database, f"ALTER DATABASE {name} SET timezone = 'Europe/Berlin'")
    ask(database, f"ALTER DATABASE {name} SET datestyle = 'German, DMY'")
    answer = HEADER + "V,M1,2025-10-26T00:30:00Z,2025-10-26T01:30:00Z\nV,M2,2025-10-26T01:30:00Z,\n"
    assert run("import", "-", answer=answer).out == "2 assignments added, 0 unchanged, 0 removed\n"
    assert run("import", "-", "--replace", answer=answer).out == "0 assignments added, 2 unchanged, 0 removed\n"
    assert run("list", "--csv").out == answer
    assert run("list", "--csv", "--at", "2025-10-26T02:30:00+01:00").out == HEADER + "V,M2,2025-10-26T01:30:00Z,\n"


# Listing


def test_what_is_listed_can_be_imported_again(run: Run, database: str, fleet: None) -> None:
    before = places(database)
    listed = run("list", "--csv", process=True)
    assert (listed.code, listed.out, listed.err) == (0, HEADER + FLEET, "")
    assert run("import", "-", answer=listed.out, process=True).out == "0 assignments added, 4 unchanged, 0 removed\n"
    assert places(database) == before
    ask(database, "TRUNCATE charger_assignment")
    assert run("import", "-", answer=listed.out).out == "4 assignments added, 0 unchanged, 0 removed\n"
    assert run("list", "--csv").out == listed.out


def test_list(run: Run, fleet: None) -> None:
    reply = run("list")
    assert (reply.code, reply.err) == (0, "")
    head, *table, total = reply.out.splitlines()
    assert head.split() == ["vehicle_id", "meter_id", "valid_from", "valid_until"]
    assert [line.split() for line in table] == [
        ["VEH-1", "MTR-1", "open", "2026-02-01T00:00:00Z"],
        ["VEH-1", "MTR-2", "2026-02-01T00:00:00Z", "open"],
        ["VEH-2", "MTR-2", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000001Z"],
        ["VEH-3", "MTR-3", "open", "open"],
    ]
    assert total == "4 assignments"


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ("--vehicle VEH-1", "01"),
        ("--meter MTR-2", "12"),
        ("--vehicle VEH-1 --meter MTR-2", "1"),
        ("--vehicle VEH", ""),
        ("--at 2026-01-01", "023"),
        ("--at 2026-01-01T00:00:00.000001Z", "03"),
        ("--at 2026-02-01T00:59:59+01:00", "03"),
        ("--at 2026-02-01T01:00:00+01:00", "13"),
        ("--at now --meter MTR-3", "3"),
        ("--limit 3", "012"),
    ],
)
def test_filters(run: Run, fleet: None, options: str, lines: str) -> None:
    expected = [FLEET.splitlines()[int(line)] for line in lines]
    assert run("list", "--csv", *options.split()).out.splitlines()[1:] == expected
    *_, total = run("list", *options.split()).out.splitlines()
    assert total == f"{4 if '--limit' in options else len(lines)} assignments"


def test_now_is_now(run: Run, database: str) -> None:
    ask(database, "INSERT INTO charger_assignment SELECT v, 'M', valid FROM (VALUES ('V1', tstzrange(NULL, now())),"
        "('V2', tstzrange(now() - interval '1 hour', now() + interval '1 hour')),"
        "('V3', tstzrange(now() + interval '1 hour', NULL))) AS row (v, valid)")  # fmt: skip
    listed = run("list", "--csv", "--at", "now").out.splitlines()[1:]
    assert [line.partition(",")[0] for line in listed] == ["V2"]


def test_the_table_shows_some_and_the_csv_all(run: Run, database: str) -> None:
    ask(database, "INSERT INTO charger_assignment SELECT 'V' || n, 'M', '(,)' FROM generate_series(1, 60) AS n")
    assert len(run("list").out.splitlines()) == 1 + 50 + 1
    assert run("list").out.endswith("\n60 assignments\n")
    assert len(run("list", "--limit", "60").out.splitlines()) == 1 + 60 + 1
    assert len(run("list", "--csv").out.splitlines()) == 1 + 60


def test_ids_from_elsewhere_do_no_harm(run: Run, database: str) -> None:
    """The table takes ids that no device can have."""
    hostile = '\x1b[2J[red]"VEH\n1",'
    ask(database, "INSERT INTO charger_assignment VALUES (%s, 'M', '(,)')", hostile)
    table = run("list").out
    assert "\x1b" not in table
    assert "[red]" in table
    assert "is not CSV" in problems(run("import", "-", answer=run("list", "--csv").out))[0]
    assert run("import", "-", "--replace", answer=HEADER + "V,M,,\n").out.endswith("1 removed\n")


def test_a_pipe_that_closes(run: Run, database: str, tmp_path: Path) -> None:
    # More than a pipe holds.
    ask(
        database,
        "INSERT INTO charger_assignment SELECT rpad(n || 'V', 100, 'X'), 'M', '(,)' FROM generate_series(1, 2000) AS n",
    )
    done = subprocess.run(
        ["bash", "-c", f"'{PROGRAM}' assignments list --csv | head -n 1"],
        env=environment(database),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == (HEADER, "")


# What goes wrong


@pytest.mark.parametrize(
    "wrong",
    [
        ["import"],
        ["import", "-", "--update", "--replace"],
        ["list", "--at", "2026-01-01T00:00:00"],
        ["list", "--at", "tomorrow"],
        ["list", "--limit", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(run: Run, wrong: list[str]) -> None:
    assert run(*wrong, answer=HEADER).code == 2


def test_a_file_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    for file in ("missing.csv", str(tmp_path)):
        reply = run("import", file)
        assert (reply.code, reply.out, len(reply.err.splitlines())) == (1, "", 1)
        assert reply.err.startswith(f"wattbridge: cannot read {file}: ")


def test_without_a_database_or_schema(run: Run, postgres_dsn_admin: str) -> None:
    for command in (["list"], ["list", "--csv"], ["import", "-"]):
        reply = run(*command, answer=HEADER, dsn=f"postgresql://user:hunter2@127.0.0.1:{free_port()}/x")
        assert (reply.code, reply.out, "refused" in reply.err) == (1, "", True)
        assert "hunter2" not in reply.err
    with empty_database(postgres_dsn_admin) as empty:
        for command in (["list"], ["import", "-"]):
            reply = run(*command, answer=HEADER, dsn=empty)
            assert (reply.code, reply.err) == (1, 'wattbridge: the schema is missing: run "wattbridge migrate"\n')


def test_without_the_rights(run: Run, database: str, login: str) -> None:
    denied = "wattbridge: the database says: permission denied for table charger_assignment; ask for the rights"
    answer = HEADER + "V,M,,\n"
    for command in (["list"], ["list", "--csv"], ["import", "-"], ["import", "-", "--dry-run"]):
        reply = run(*command, answer=answer, dsn=login)
        assert (reply.code, reply.out, reply.err.startswith(denied)) == (1, "", True)
    role = psycopg.conninfo.conninfo_to_dict(login)["user"]
    ask(database, f'GRANT SELECT ON charger_assignment TO "{role}"')
    assert run("list", dsn=login).code == 0
    assert run("import", "-", "--dry-run", answer=answer, dsn=login).out.startswith("1 assignments added")
    assert run("import", "-", answer=answer, dsn=login).err.startswith(denied)
    assert rows(database) == []
    ask(database, f'GRANT INSERT, DELETE ON charger_assignment TO "{role}"')
    assert run("import", "-", answer=answer, dsn=login).out == "1 assignments added, 0 unchanged, 0 removed\n"
    assert run("import", "-", "--replace", "--allow-empty", answer=HEADER, dsn=login).out.endswith("1 removed\n")


# Many


def test_a_large_file(run: Run, database: str) -> None:
    months = [datetime(2026, month, 1, tzinfo=UTC).isoformat() for month in range(1, 6)]
    spans = list(pairwise(months))
    lines = "".join(f"VEH-{v},MTR-{v % 7},{since},{until}\n" for since, until in spans for v in range(1_000))
    assert run("import", "-", answer=HEADER + lines).out == "4000 assignments added, 0 unchanged, 0 removed\n"
    changed = lines.replace("VEH-999,MTR-5", "VEH-999,MTR-6")
    assert changed != lines
    reply = run("import", "-", "--replace", answer=HEADER + changed)
    assert reply.out == "4 assignments added, 3996 unchanged, 4 removed\n"
    assert one(database, "SELECT count(*) FROM charger_assignment") == 4_000
