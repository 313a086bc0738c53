"""`wattbridge demo`: broker, database, bridge, its page and a fleet, all private, live in the terminal.

Its life: start, watch, stop, reconcile. Every ending takes the same way: the duration, a signal, the death of a part.
"""

import io
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import sql as syntax
from psycopg.conninfo import make_conninfo
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from bridge import demo_view
from bridge.demo_figures import REPORT_S, Analyst, Figures, sql
from bridge.errors import ExitCode, WattbridgeError
from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres, LeashedProcess, PrivateMosquitto, ServiceError, free_port

# One of our own commands, from a checkout as well as from an installed wheel.
WATTBRIDGE = [sys.executable, "-c", "from bridge.cli import main; main()"]
TICK_S = 0.05
PLAIN_LINE_S = 5.0
STARTED_WITHIN_S = 60.0
DRAIN_PATIENCE_S = 20.0
STOP_WITHIN_S = 30.0
STOP_AFTER_DEATH_S = 5.0
PAGE_STOPS_WITHIN_S = 3.0
LOG_TAIL = 12
# How the lines begin or what is in them that come all the time, and say nothing about why something ended.
REPORTS = ('"daemon.progress"', '{"published"')
PAGE_LOGIN = "wattbridge_web"
PAGE_HOST = "127.0.0.1"
# Its usual port, where that is free: a browser's tab of yesterday then works today.
PAGE_PORT = 9465
# What a kWh costs, so that losses are shown as money, too.
TARIFF = 0.30
EXAMPLE = "SELECT vehicle_id, age, soc, kwh_dc FROM vehicle_status WHERE charging LIMIT 5;"


class Options(NamedTuple):
    """What to show; `duration` in seconds, None for until Ctrl-C."""

    duration: float | None
    meters: int
    vehicles: int
    speedup: float
    seed: int


def run(options: Options) -> ExitCode:
    """Runs the demo; OK if the books balance and nothing died, also after Ctrl-C.

    Raises WattbridgeError where a part cannot be started.
    """
    # Neither the user's own bridge nor their PostgreSQL settings have a say in this, here or in our children.
    for name in [name for name in os.environ if name.startswith(("WATTBRIDGE_", "PG"))]:
        del os.environ[name]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with Signals() as signals:
            return Demo(options, signals).run()
    except ServiceError as error:
        raise WattbridgeError(str(error)) from error


class Demo:
    """Everything that runs, and what became of it."""

    def __init__(self, options: Options, signals: "Signals") -> None:
        self._options = options
        self._signals = signals
        terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=not terminal)
        self._live = terminal and not self._console.is_dumb_terminal
        self._postgres = EmbeddedPostgres()
        self._mosquitto = PrivateMosquitto()
        self._daemon: Child | None = None
        self._page: Child | None = None
        self._simulator: Child | None = None
        self._analyst: Analyst | None = None
        self._figures = Figures()
        self._elapsed = 0.0
        self._problem: str | None = None
        self._log = ""
        self._health = ""
        self._address = ""

    def run(self) -> ExitCode:
        """Start, watch, stop, reconcile."""
        with ExitStack() as held:
            self._start(held)
            self._watch()
            self._stop()
            return ExitCode.OK if self._reconcile() else ExitCode.PROBLEM

    def _start(self, held: ExitStack) -> None:
        with self._step("PostgreSQL") as done:
            held.enter_context(self._postgres)
            done(f"on port {self._postgres.port}")
        with self._step("Mosquitto") as done:
            held.enter_context(self._mosquitto)
            done(f"on port {self._mosquitto.port}")
        with self._step("Schema") as done:
            done(f"{len(migrate(self._postgres.dsn))} files applied")
        # Goes with the directory around it, even if we are killed.
        directory = self._ledger.parent
        directory.mkdir(mode=0o700)
        with self._step("Bridge") as done:
            self._health = f"127.0.0.1:{free_port()}"
            environment = {
                "WATTBRIDGE_DATABASE__DSN": self._postgres.dsn,
                "WATTBRIDGE_MQTT__HOST": self._mosquitto.host,
                "WATTBRIDGE_MQTT__PORT": str(self._mosquitto.port),
                "WATTBRIDGE_LOG__FORMAT": "json",
                "WATTBRIDGE_LOG__REPORT_EVERY_S": str(REPORT_S),
                "WATTBRIDGE_HEALTH__LISTEN": self._health,
            }
            self._daemon = held.enter_context(Child("bridge", ["run"], directory, environment))
            self._await_subscription(self._daemon)
            done("subscribed")
        with self._step("Page") as done:
            self._start_page(held, directory)
            done(self._address)
        self._analyst = held.enter_context(Analyst(self._postgres.dsn))
        with self._step("Fleet") as done:
            options = self._options
            arguments = ["simulate", "--json", f"--host={self._mosquitto.host}", f"--port={self._mosquitto.port}"]
            arguments += [f"--{name}={getattr(options, name)}" for name in ("meters", "vehicles", "speedup", "seed")]
            arguments.append(f"--ledger={self._ledger}")
            self._simulator = held.enter_context(Child("simulator", arguments, directory))
            done(f"{options.meters:,} meters, {options.vehicles:,} vehicles, {options.speedup:g} times their pace")
        self._explain()

    @property
    def _ledger(self) -> Path:
        return self._postgres.directory / "demo" / "fleet.ledger"

    @contextmanager
    def _step(self, what: str) -> Iterator[Callable[[str], None]]:
        """Shows what is being started, and then how it went."""
        if self._signals.first:
            raise WattbridgeError(f"{self._signals.first} before anything was published")
        with self._console.status(f"starting: {what}") if self._live else nullcontext():
            yield lambda result: self._console.print(f"[green]✓[/] {what:<11} {result}")

    def _await_subscription(self, daemon: "Child") -> None:
        """The first connection makes the session: what is published before it has no subscriber and is gone."""
        self._await(daemon, "the bridge had subscribed", lambda: daemon.has_said("mqtt.connected"))

    def _start_page(self, held: ExitStack, directory: Path) -> None:
        """Another login than the bridge's, which may only read; its password is neither in a file nor in a command."""
        password = secrets.token_urlsafe(24)
        role = syntax.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE wattbridge_reader")
        with psycopg.connect(self._postgres.dsn, autocommit=True) as connection:
            connection.execute(role.format(syntax.Identifier(PAGE_LOGIN), syntax.Literal(password)))
        environment = {
            "WATTBRIDGE_DATABASE__DSN": make_conninfo(self._postgres.dsn, user=PAGE_LOGIN, password=password),
            "WATTBRIDGE_LOG__FORMAT": "json",
            "WATTBRIDGE_WEB__DAEMONS": self._health,
            "WATTBRIDGE_WEB__TARIFF": str(TARIFF),
            # A quarter hour of the fleet is read from history for most of what a page asks, all at once: it takes
            # longer than usual, which is better than to hear that the database is busy.
            "WATTBRIDGE_WEB__CONNECTIONS": "8",
            "WATTBRIDGE_WEB__TIMEOUT_S": "30",
        }
        # Where another has taken the port since we looked, perhaps another demo, it ends.
        for port in (*filter(is_free, [PAGE_PORT]), free_port()):
            listen = {"WATTBRIDGE_WEB__LISTEN": f"{PAGE_HOST}:{port}"}
            page = held.enter_context(Child("page", ["web"], directory, environment | listen))
            if self._listens(page):
                break
        self._page = page
        self._await(page, "the page answered", lambda: answers(port))
        self._address = f"http://{PAGE_HOST}:{port}/"

    def _listens(self, page: "Child") -> bool:
        """Waits until it does, or has ended."""
        self._await(page, "the page listened", lambda: page.has_said("web.listening") or page.ended)
        return not page.ended

    def _await(self, child: "Child", what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not reached():
            if not self._goes_on():
                why = self._problem or self._signals.first
                raise ServiceError(f"{why} before {what}: nothing published\n{self._log}".rstrip())
            if time.monotonic() > deadline:
                raise ServiceError(f"{STARTED_WITHIN_S:g} s were over before {what}\n{child.tail()}")
            time.sleep(TICK_S)

    def _explain(self) -> None:
        self._console.print(f"\n{demo_view.invitation(self._address)}", style="bold green")
        self._console.print(
            f"The fleet's clock began 23 hours ago and runs {self._options.speedup:g} times as fast until it is now: "
            "so far behind the readings seem to be."
        )
        self._console.print("\nLook inside from another terminal, while this runs:", style="bold")
        # Each on one line, however long, so that it can be copied.
        commands = [self._postgres.psql_command, f'{self._postgres.psql_command} -c "{EXAMPLE}"']
        if shutil.which("mosquitto_sub"):
            where = f"-h {self._mosquitto.host} -p {self._mosquitto.port}"
            commands.append(f"mosquitto_sub {where} -v -t 'energy/v1/meter/MTR-000001/#'")
        commands.append(f"curl http://{self._health}/metrics")
        for command in commands:
            self._console.print(command, style="cyan", markup=False, soft_wrap=True)
        self._console.print()

    def _watch(self) -> None:
        """Shows what happens until the time is up, a signal comes or a part dies."""
        began = shown = time.monotonic()
        duration = self._options.duration
        with Live(console=self._console, auto_refresh=False) if self._live else nullcontext() as live:
            while self._goes_on() and (duration is None or self._elapsed < duration):
                time.sleep(TICK_S)
                news = self._read()
                now = time.monotonic()
                self._elapsed = now - began
                clock = demo_view.duration(self._elapsed) + (f" of {demo_view.duration(duration)}" if duration else "")
                if live and (news or now - shown > 1):
                    live.update(
                        demo_view.screen(self._figures, clock, self._address, self._console.width), refresh=True
                    )
                    shown = now
                elif live is None and now - shown > PLAIN_LINE_S:
                    self._console.print(demo_view.line(self._figures, clock))
                    shown = now

    def _goes_on(self) -> bool:
        """Whether no signal came and every part lives; notes the first that does not."""
        for child in (self._daemon, self._page, self._simulator):
            if child and (code := child.process.poll()) is not None:
                self._note(f"the {child.name} {ending(code)}", child.tail())
        for service in (self._postgres, self._mosquitto):
            if not service.running:
                self._note(f"{service.NAME} has ended", tail(service.directory / "server.log"))
        return self._signals.first is None and self._problem is None

    def _note(self, problem: str, log: str) -> None:
        """Keeps the first problem: others follow from it."""
        if self._problem is None:
            self._problem, self._log = problem, log

    def _read(self) -> bool:
        """Takes in what is new; whether the simulator has said something."""
        news = False
        if self._simulator:
            for event in self._simulator.events():
                self._figures.hear_simulator(event)
                news = True
        if self._daemon:
            for event in self._daemon.events():
                self._figures.hear_daemon(event)
        if self._analyst:
            self._analyst.fleet_time = self._figures.fleet_time
            self._figures.findings = self._analyst.findings
        return news

    def _stop(self) -> None:
        """Publisher first, bridge after it, so that it gets everything. Every ending comes through here."""
        reason = self._problem or self._signals.first or "the time is up"
        self._console.print(f"Stopping: {reason}. Ctrl-C {'again ' * bool(self._signals.first)}ends at once.")
        # It says goodbye to its browsers meanwhile, and is waited for at the end.
        page, self._page = self._page, None
        if page:
            page.process.send_signal(signal.SIGTERM)
        if self._analyst:
            self._analyst.stop()
        if simulator := self._simulator:
            code = simulator.process.stop(self._patience)
            self._read()
            self._simulator = None
            # Told to stop before it could listen or connect, it has published nothing and is not to blame.
            if code and not (code in {-signal.SIGTERM, 1} and self._figures.published == 0):
                self._note(f"the simulator {ending(code)}", simulator.tail())
        self._drain()
        if daemon := self._daemon:
            code = daemon.process.stop(self._patience)
            if code:
                self._note(f"the bridge {ending(code)}", daemon.tail())
        # It has nothing to lose. Told twice to end, or held by a browser for too long, it is ended by a signal.
        if page and (code := page.process.stop(PAGE_STOPS_WITHIN_S)) > 0:
            self._note(f"the page {ending(code)}", page.tail())

    @property
    def _patience(self) -> float:
        return STOP_AFTER_DEATH_S if self._problem else STOP_WITHIN_S

    def _drain(self) -> None:
        """Waits until the bridge has committed everything published, as long as it gets on with it."""
        figures = self._figures
        committed, moved = figures.received, time.monotonic()
        with self._console.status("") if self._live else nullcontext() as status:
            while figures.received < figures.published and self._problem is None:
                if status:
                    status.update(f"{figures.published - figures.received:,} messages for the bridge to commit")
                time.sleep(TICK_S)
                self._read()
                self._goes_on()
                if figures.received > committed:
                    committed, moved = figures.received, time.monotonic()
                if time.monotonic() - moved > DRAIN_PATIENCE_S and self._daemon:
                    self._note(f"the bridge has committed nothing for {DRAIN_PATIENCE_S:g} s", self._daemon.tail())

    def _reconcile(self) -> bool:
        """Balances the books from the database; whether they balance and nothing went wrong."""
        say, published = self._console.print, self._figures.published
        try:
            with psycopg.connect(self._postgres.dsn, connect_timeout=5) as connection:
                row = connection.execute(sql("books")).fetchone()
        except psycopg.Error as error:
            self._note("the database cannot be asked", str(error))
            row = None
        if row:
            stored, duplicate, dead_lettered, meter_rows, vehicle_rows, letters = row
            table = Table("Reconciliation", "", "", box=box.SIMPLE_HEAD, pad_edge=False)
            table.columns[1].justify = "right"
            table.add_row("published", f"{published:,}", "by the simulator")
            table.add_row("= stored", f"{stored:,}", f"history: {meter_rows:,} meter + {vehicle_rows:,} vehicle rows")
            table.add_row("+ duplicate", f"{duplicate:,}", "known already, changed nothing")
            table.add_row("+ dead-lettered", f"{dead_lettered:,}", f"dead_letter: {letters:,} rows")
            if missing := published - (stored + duplicate + dead_lettered):
                whose = "" if missing > 0 else "someone else has published, too"
                table.add_row("not accounted for", f"{missing:,}", whose, style="red")
                self._note("the books do not balance", "")
            say(table)
            if (meter_rows + vehicle_rows, letters) != (stored, dead_lettered):
                self._note("the counters do not agree with the rows", "")
        if self._figures.unheard:
            say(f"{self._figures.unheard:,} messages were published while nobody was subscribed")
        if published and self._problem is None:
            self._verify()
        if self._problem:
            say(f"{escape(self._log)}\n[bold red]FAIL[/] {escape(self._problem)}".lstrip())
            return False
        rate = published / self._elapsed if self._elapsed else 0.0
        say(f"[bold green]OK[/] everything is accounted for: {rate:,.0f} messages/s over {self._elapsed:.1f} s")
        return True

    def _verify(self) -> None:
        """Compares every reading with the simulator's ledger."""
        from bridge import verify, verify_report  # noqa: PLC0415 - needs numpy, which the other commands do without

        at_once = verify.Options(wait_s=0)
        with self._console.status("") if self._live else nullcontext() as status:

            def progress(step: str) -> None:
                if status:
                    status.update(f"comparing with the simulator's ledger: {step}")

            verdict = verify.verify(self._ledger, self._postgres.dsn, at_once, say=progress, progress=progress)
        if verdict.match:
            self._console.print(verdict.sentence)
        else:
            verify_report.print_table(verdict)
            self._note("the database is not what the simulator's ledger says", "")


class Signals:
    """SIGINT and SIGTERM: the first is noted, the second ends this process, and our children's leashes do the rest."""

    def __init__(self) -> None:
        self.first: str | None = None

    def __enter__(self) -> Self:
        """Listen."""
        self._before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exception: object) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, _frame: FrameType | None) -> None:
        if self.first:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the cursor, which a live view hides
            os._exit(128 + number)
        self.first = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"


class Child:
    """One of our own commands on a leash, with its output in a file."""

    def __init__(
        self, name: str, arguments: list[str], directory: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._output = directory / f"{name}.log"
        self._position = 0
        with self._output.open("ab") as output:
            # From that directory, so that no config/wattbridge.toml of the user is found.
            self.process = LeashedProcess(
                [*WATTBRIDGE, *arguments],
                env={**os.environ, **(environment or {})},
                cwd=directory,
                stdout=output,
                stderr=output,
                grace=STOP_AFTER_DEATH_S,
            )

    def __enter__(self) -> Self:
        """Return the running command."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop it, if it still runs."""
        self.process.stop()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last call, as JSON objects; the rest of what it says is for people."""
        with self._output.open("rb") as output:
            output.seek(self._position)
            said = output.read()
        whole = said[: said.rfind(b"\n") + 1]
        self._position += len(whole)
        return (json.loads(row) for row in whole.splitlines() if row.startswith(b"{"))

    def has_said(self, name: str) -> bool:
        """Whether there is such an event in what it has said since the last call."""
        return any(event.get("event") == name for event in self.events())

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None

    def tail(self) -> str:
        """The end of its output."""
        return tail(self._output)


def is_free(port: int) -> bool:
    """Whether the page could listen there."""
    try:
        socket.create_server((PAGE_HOST, port)).close()
    except OSError:
        return False
    return True


def answers(port: int) -> bool:
    """Whether the page on this port answers, and the database answers it."""
    with closing(HTTPConnection(PAGE_HOST, port, timeout=5)) as connection:
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def tail(log: Path) -> str:
    """The last lines of a log, without the regular reports."""
    rows = log.read_bytes().decode(errors="replace").splitlines()
    return "\n".join([row for row in rows if not any(report in row for report in REPORTS)][-LOG_TAIL:])
