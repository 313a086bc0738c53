"""The commands, as an operator meets them: they teach, they end with the promised code, and never with a traceback."""

import hashlib
import json
import re
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bridge.services import free_port
from tests.integration.harness import (
    SET_UP,
    Address,
    Daemon,
    Publisher,
    Reply,
    ask,
    check_books,
    counters,
    empty_database,
    environment,
    letters,
    meter,
    now,
    one,
    stored,
    vehicle,
    wait_for_received,
    wattbridge,
    wattbridge_here,
)

GROUPS = {
    "dead-letters": ["list", "show", "replay", "purge"],
    "assignments": ["import", "list"],
    "rollups": ["rebuild", "status"],
}
COMMANDS = ["run", "migrate", "check", "demo", "simulate", *GROUPS]
# No time to listen where nobody speaks.
BRIEFLY = ("--listen", "0.1s")
Run = Callable[..., Reply]


@pytest.fixture
def run(database: str, broker: Address, topic_root: str, tmp_path: Path) -> Run:
    """Runs a command, as a process of its own where that is the point; settings are changes to the environment."""

    def command(*arguments: str, answer: str = "", process: bool = False, **settings: object) -> Reply:
        env = environment(database, broker, topic_root, "test-cli", **settings)
        command = wattbridge if process or SET_UP & {*arguments} else wattbridge_here
        return command(*arguments, env=env, cwd=tmp_path, answer=answer)

    return command


def one_line(reply: Reply, code: int) -> str:
    """What a failed command said, which must be one line on standard error and nothing else."""
    assert (reply.code, reply.out) == (code, "")
    assert len(reply.err.splitlines()) == 1
    assert reply.err.startswith("wattbridge: ")
    return reply.err


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [[], *([name] for name in COMMANDS), *([group, name] for group, names in GROUPS.items() for name in names)],
    ids=" ".join,
)
def test_help(run: Run, path: list[str]) -> None:
    reply = run(*path, "--help")
    assert reply.code == 0
    assert "Usage:" in reply.out
    if not path:
        for name in COMMANDS:
            assert name in reply.out
        for code in range(5):
            assert re.search(rf"\b{code} \w+", reply.out)


def test_version(run: Run) -> None:
    assert run("--version", process=True).out.startswith("wattbridge 0.")


@pytest.mark.parametrize(
    "wrong", [["no-such-command"], ["run", "--no-such-option"], ["dead-letters", "list", "--reason", "x"]]
)
def test_wrong_usage_ends_with_2(run: Run, wrong: list[str]) -> None:
    assert run(*wrong, process=True).code == 2


# --- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["run"], ["migrate"], ["check"], ["dead-letters", "list"]], ids=" ".join)
def test_an_unknown_key_ends_with_2_and_one_line(run: Run, tmp_path: Path, command: list[str]) -> None:
    said = one_line(run(*command, process=True, mqtt__hots="localhost"), 2)
    assert "did you mean" in said
    assert "host" in said.lower().partition("did you mean")[2]
    file = tmp_path / "wattbridge.toml"
    file.write_text("[databaze]\ndsn = 'postgresql://user:hunter2@localhost/x'\n")
    said = one_line(run(*command, "--config", str(file)), 2)
    assert "did you mean database?" in said
    assert "hunter2" not in said


def test_a_wrong_value_names_the_key_and_what_is_allowed(run: Run) -> None:
    said = one_line(run("check", mqtt__port=70_000), 2)
    assert "mqtt.port" in said
    assert "70000" in said
    assert "65535" in said


def test_a_dsn_that_is_none_is_not_shown(run: Run) -> None:
    said = one_line(run("check", database__dsn="hunter2@localhost"), 2)
    assert "database.dsn" in said


@pytest.mark.parametrize(
    "secret",
    [
        "postgresql://user:hunter2@127.0.0.1:5432/x",
        "host=127.0.0.1 user=user password=hunter2",
        "postgresql://user:hunter2@127.0.0.1:5432/" + "x" * 300,
    ],
    ids=["url", "pairs", "too-long-for-a-name"],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_dsn_in_the_place_of_its_file_is_not_shown(run: Run, command: str, secret: str) -> None:
    said = one_line(run(command, database__dsn="", database__dsn_file=secret), 2)
    assert "dsn_file" in said
    assert "hunter2" not in said


def test_a_file_is_read_and_the_environment_goes_before_it(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "wattbridge.toml"
    file.write_text("[mqtt]\nport = 1\nkeep_alive_s = 60\n")
    assert run("check", *BRIEFLY, "--config", str(file)).code == 0
    assert "cannot read" in one_line(run("check", "--config", str(tmp_path / "missing.toml")), 2)
    file.write_text("[mqtt\n")
    assert "TOML" in one_line(run("check", "--config", str(file)), 2)


# --- check -------------------------------------------------------------------------------------------------


def test_check_reports_what_is_fine(run: Run, topic_root: str, database: str) -> None:
    reply = run("check", process=True)
    assert (reply.code, reply.err) == (0, "")
    for found in (
        "PostgreSQL",
        "schema",
        "privileges",
        "broker",
        "subscriptions",
        "session",
        f"{topic_root}/meter/+/telemetry",
    ):
        assert found in reply.out
    assert "problem" not in reply.out
    assert one(database, "SELECT count(*) FROM ingest_counter") == 0


def test_check_names_every_side_that_is_down(run: Run, broker: Address) -> None:
    nowhere = free_port()
    reply = run("check", database__dsn=f"postgresql://user:hunter2@127.0.0.1:{nowhere}/x", mqtt__port=nowhere)
    assert reply.code == 1
    assert reply.out.count("problem") == 2
    assert "refused" in reply.out
    assert "hunter2" not in reply.out + reply.err


def test_check_with_the_broker_down(run: Run) -> None:
    reply = run("check", mqtt__port=free_port())
    assert reply.code == 1
    assert reply.out.count("problem") == 1
    assert "broker" in reply.out


def test_check_with_the_schema_missing(run: Run, postgres_dsn_admin: str) -> None:
    with empty_database(postgres_dsn_admin) as dsn:
        reply = run("check", *BRIEFLY, database__dsn=dsn)
    assert reply.code == 1
    assert 'run "wattbridge migrate"' in reply.out


def test_check_reports_what_the_bridge_may_not_do(run: Run, database: str) -> None:
    """The admin may do everything, so this needs a login of its own."""
    role, name = sql.Identifier(f"wattbridge_login_{uuid.uuid4().hex[:12]}"), conninfo_to_dict(database)["dbname"]
    place = sql.Identifier(str(name))
    with psycopg.connect(database, autocommit=True) as admin:

        def say(statement: str) -> None:
            admin.execute(sql.SQL(statement).format(role=role, database=place))

        say("CREATE ROLE {role} LOGIN PASSWORD 'test'")
        try:
            say("GRANT wattbridge_writer TO {role}")
            login = make_conninfo(database, user=role.as_string().strip('"'), password="test")
            reply = run("check", *BRIEFLY, database__dsn=login)
            assert (reply.code, reply.out.count("problem")) == (0, 0)

            say("REVOKE TEMP ON DATABASE {database} FROM PUBLIC")
            reply = run("check", *BRIEFLY, database__dsn=login)
            assert (reply.code, reply.out.count("problem")) == (1, 1)
            assert "lacking TEMP on the database: GRANT" in reply.out
            say("GRANT TEMP ON DATABASE {database} TO {role}")
            assert run("check", *BRIEFLY, database__dsn=login).code == 0

            say("REVOKE EXECUTE ON FUNCTION ensure_history_partitions FROM wattbridge_writer")
            reply = run("check", *BRIEFLY, database__dsn=login)
            assert (reply.code, reply.out.count("problem")) == (1, 1)
            assert "lacking EXECUTE on ensure_history_partitions: GRANT" in reply.out
        finally:
            say("DROP OWNED BY {role}")
            say("DROP ROLE {role}")


def test_check_leaves_a_running_daemon_alone(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    with Daemon(database, broker, topic_root, tmp_path, mqtt__share_group="crew") as daemon:
        with Publisher(broker, topic_root) as devices:
            for number in range(50):
                devices.send("meter", f"MTR-{number}", meter(f"MTR-{number}", now()))
                if number == 10:
                    assert wattbridge("check", *BRIEFLY, env=daemon.env, cwd=tmp_path).code == 0
            wait_for_received(database, 50)
        assert daemon.events("mqtt.waiting") == []
        assert daemon.terminate() == 0
    assert stored(database) == 50


# --- dead letters ------------------------------------------------------------------------------------------


@pytest.fixture
def rejected(database: str, broker: Address, topic_root: str, tmp_path: Path) -> dict[str, bytes]:
    """Payloads by device that became dead letters: two over the voltage limit, one with bad elements, one not JSON."""
    first = now() - timedelta(minutes=5)
    payloads = {
        "MTR-1": json.dumps(meter("MTR-1", first, voltage=1_500)).encode(),
        "MTR-2": json.dumps(meter("MTR-2", first, voltage=1_600)).encode(),
        "MTR-3": b"\xff\x00not json",
        "VEH-1": json.dumps(
            [vehicle("VEH-1", first, kwh=2_000), vehicle("VEH-1", first + timedelta(seconds=1))]
        ).encode(),
    }
    with Daemon(database, broker, topic_root, tmp_path), Publisher(broker, topic_root) as devices:
        for device, payload in payloads.items():
            devices.send("vehicle" if device[0] == "V" else "meter", device, payload)
        wait_for_received(database, 5)
    assert check_books(database)[:4] == (5, 1, 0, 4)
    return payloads


def ids(database: str) -> dict[str, str]:
    return dict(ask(database, "SELECT device_id, left(encode(digest, 'hex'), 12) FROM dead_letter"))


def test_they_are_read_however_the_database_writes_dates(run: Run, database: str, rejected: dict[str, bytes]) -> None:
    name = one(database, "SELECT current_database()")
    ask(database, f"ALTER DATABASE {name} SET datestyle = 'German, DMY'")
    assert run("dead-letters", "list").code == 0
    assert "still rejected" in run("dead-letters", "replay", "--all").out


def test_list_and_show(run: Run, database: str, rejected: dict[str, bytes], topic_root: str) -> None:
    reply = run("dead-letters", "list")
    assert (reply.code, reply.err) == (0, "")
    assert "4 dead letters; 3 out_of_range; 1 malformed" in reply.out
    for device, letter in ids(database).items():
        assert letter in reply.out
        assert device in reply.out
    reply = run("dead-letters", "list", "--reason", "malformed")
    assert "1 dead letters; 1 malformed" in reply.out
    assert "MTR-1" not in reply.out
    assert "0 dead letters" in run("dead-letters", "list", "--device", "NOBODY").out
    assert "0 dead letters" in run("dead-letters", "list", "--before", "2020-01-01").out
    assert "4 dead letters" in run("dead-letters", "list", "--since", "2020-01-01", "--limit", "1").out

    reply = run("dead-letters", "show", ids(database)["MTR-1"][:6])
    assert reply.code == 0
    assert rejected["MTR-1"].decode() in reply.out
    assert f"{topic_root}/meter/MTR-1/telemetry" in reply.out
    assert "out_of_range: voltage" in reply.out
    # What is no text is shown in hexadecimal: a terminal must not obey it.
    assert rejected["MTR-3"].hex(" ") in run("dead-letters", "show", ids(database)["MTR-3"]).out


def test_replay_after_a_limit_was_widened(run: Run, database: str, rejected: dict[str, bytes]) -> None:
    reply = run("dead-letters", "replay", "--all")
    assert (reply.code, reply.out) == (0, "0 dead letters replayed, 4 still rejected\n")
    before = check_books(database)
    assert before[:4] == (5, 1, 0, 4)

    wide = {"limits__max_voltage": 2_000}
    reply = run("dead-letters", "replay", ids(database)["MTR-2"], **wide)
    assert reply.out == "1 dead letters replayed, 0 still rejected\n"
    assert check_books(database)[:4] == (5, 2, 0, 3)
    reply = run("dead-letters", "replay", "--all", limits__max_interval_kwh=5_000, **wide)
    assert (reply.code, reply.out) == (0, "2 dead letters replayed, 1 still rejected\n")
    assert check_books(database)[:4] == (5, 4, 0, 1)
    assert [(device, reason) for device, reason, _ in letters(database)] == [("MTR-3", "malformed")]
    assert sorted(ask(database, "SELECT meter_id, voltage FROM meter_live")) == [("MTR-1", 1_500.0), ("MTR-2", 1_600.0)]
    # Live state has the newest, whatever was replayed.
    assert ask(database, "SELECT kwh_dc FROM vehicle_live") == [(0.4,)]
    assert run("dead-letters", "replay", "--all", **wide).out == "0 dead letters replayed, 1 still rejected\n"
    assert check_books(database)[:4] == (5, 4, 0, 1)


def test_replay_of_a_conflict_that_is_still_one(
    run: Run, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    moment = now()
    with Daemon(database, broker, topic_root, tmp_path), Publisher(broker, topic_root) as devices:
        devices.send("meter", "MTR-1", [meter("MTR-1", moment, kwh) for kwh in (1, 2)])
        wait_for_received(database, 2)
    before = letters(database)
    for _ in range(2):
        reply = run("dead-letters", "replay", "--all")
        assert (reply.code, reply.out) == (0, "0 dead letters replayed, 1 still rejected\n")
        assert check_books(database)[:4] == (2, 1, 0, 1)
        assert [reason for _, reason, _ in letters(database)] == ["conflict"]
        assert [json.loads(payload)["kwhConsumedAc"] for _, _, payload in letters(database)] == [2]
    assert [device for device, _, _ in letters(database)] == [device for device, _, _ in before]


def test_of_two_replayed_letters_the_one_that_came_first_becomes_history(
    run: Run, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    """Both were over the limit, for the same device and timestamp; as if there had been no limit."""
    moment = now()
    with Daemon(database, broker, topic_root, tmp_path), Publisher(broker, topic_root) as devices:
        for device in ("MTR-1", "MTR-2"):
            for number, voltage in enumerate((1_500, 1_600, 1_700), start=1):
                devices.send("meter", device, meter(device, moment, number, voltage))
        wait_for_received(database, 6)
    assert check_books(database)[:4] == (6, 0, 0, 6)
    # Whatever the clock said: MTR-1 in the order of its voltages, MTR-2 the other way round.
    for device, direction in (("MTR-1", 1), ("MTR-2", -1)):
        for voltage in (1_500, 1_600, 1_700):
            ask(
                database,
                "UPDATE dead_letter SET received_at = received_at + %s "
                "WHERE device_id = %s AND convert_from(payload, 'UTF8')::json ->> 'voltage' = %s",
                timedelta(seconds=direction * voltage / 100),
                device,
                str(voltage),
            )
    reply = run("dead-letters", "replay", "--all", limits__max_voltage=2_000)
    assert (reply.code, reply.out) == (0, "2 dead letters replayed, 4 still rejected\n")
    assert check_books(database)[:4] == (6, 2, 0, 4)
    assert ask(database, "SELECT meter_id, voltage FROM meter_history ORDER BY meter_id") == [
        ("MTR-1", 1_500.0),
        ("MTR-2", 1_700.0),
    ]
    assert [(device, reason) for device, reason, _ in letters(database)] == [
        (device, "conflict") for device in ("MTR-1", "MTR-1", "MTR-2", "MTR-2")
    ]


def test_replay_of_what_history_has_by_now_is_a_duplicate(
    run: Run, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    reading = meter("MTR-1", now(), voltage=1_500)
    with Publisher(broker, topic_root) as devices:
        for settings in ({}, {"limits__max_voltage": 2_000}):
            with Daemon(database, broker, topic_root, tmp_path, **settings):
                devices.send("meter", "MTR-1", reading)
                wait_for_received(database, counters(database).received + 1)
    assert check_books(database)[:4] == (2, 1, 0, 1)
    assert run("dead-letters", "replay", "--all", limits__max_voltage=2_000).code == 0
    assert check_books(database)[:4] == (2, 1, 1, 0)


def test_purge_wants_to_be_sure(run: Run, database: str, rejected: dict[str, bytes]) -> None:
    assert run("dead-letters", "purge", "--all", answer="n\n", process=True).code == 1
    assert run("dead-letters", "purge", "--all").code == 1
    assert run("dead-letters", "purge").code == 2
    assert run("dead-letters", "replay").code == 2
    # Not all of them: those whose topic names no device.
    assert run("dead-letters", "purge", "--device", "", "--yes").out == "0 dead letters deleted\n"
    assert len(letters(database)) == 4
    reply = run("dead-letters", "purge", "--device", "MTR-3", answer="y\n")
    assert reply.code == 0
    assert "1 dead letters deleted" in reply.out
    reply = run("dead-letters", "purge", ids(database)["MTR-1"], "--yes")
    assert (reply.code, reply.out) == (0, "1 dead letters deleted\n")
    assert run("dead-letters", "purge", "--all", "--yes").out == "2 dead letters deleted\n"
    assert run("dead-letters", "purge", "--all", "--yes").out == "0 dead letters deleted\n"
    # The counters keep them.
    assert counters(database)[:4] == (5, 1, 0, 4)


def test_an_unknown_id(run: Run, rejected: dict[str, bytes]) -> None:
    nobody = hashlib.sha256(b"nobody").hexdigest()
    assert "no such dead letter" in one_line(run("dead-letters", "show", nobody), 1)
    for wrong in ("xyz", "12", "%%%%", "____"):
        assert "is not the id of a dead letter" in one_line(run("dead-letters", "show", wrong), 1)
    assert run("dead-letters", "replay", nobody).out == "0 dead letters replayed, 0 still rejected\n"
    assert run("dead-letters", "purge", nobody).out == "0 dead letters deleted\n"


def test_dead_letters_without_a_database_or_schema(run: Run, postgres_dsn_admin: str) -> None:
    dsn = f"postgresql://user:hunter2@127.0.0.1:{free_port()}/x"
    for command in (["list"], ["show", "abcdef"], ["replay", "--all"], ["purge", "--all", "--yes"]):
        said = one_line(run("dead-letters", *command, process=True, database__dsn=dsn), 1)
        assert "refused" in said
        assert "hunter2" not in said
    with empty_database(postgres_dsn_admin) as empty:
        assert "wattbridge migrate" in one_line(run("dead-letters", "list", database__dsn=empty), 1)


def test_migrate_without_a_database(run: Run) -> None:
    one_line(run("migrate", process=True, database__dsn=f"postgresql://user:hunter2@127.0.0.1:{free_port()}/x"), 1)


def test_run_with_an_unknown_key_ends_at_once(run: Run) -> None:
    one_line(run("run", nonsense=1), 2)
