"""The command line of the simulator: `simulate` is a command for a typer application."""

import asyncio
import json
import re
import signal
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.status import Status

from simulator.fleet import FleetConfig
from simulator.publisher import Broker, RefusedError
from simulator.run import Options, Summary, default_start
from simulator.run import simulate as run_fleet

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Return the seconds in `30s`, `5m`, `1.5h` or `30`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is not a duration such as 30s, 5m or 1h")
    return float(match[1]) * UNITS[match[2]]


def parse_start(text: str) -> datetime:
    """Return the minute in a timestamp such as `2026-02-10T00:00Z`."""
    try:
        start = datetime.fromisoformat(text)
    except ValueError:
        start = None
    if start is None or start.tzinfo is None:
        raise typer.BadParameter(f"{text!r} is not a timestamp with a time zone, such as 2026-02-10T00:00Z")
    if start > datetime.now(UTC):
        raise typer.BadParameter(f"{text} is in the future, and readings from the future are refused by a bridge")
    return start.replace(second=0, microsecond=0)


def simulate(  # noqa: PLR0913 - each parameter is an option of the command
    *,
    meters: Annotated[
        int, typer.Option(min=0, help="Number of meters, one per charger.", rich_help_panel="Fleet")
    ] = 100,
    vehicles: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of vehicles. Each one always charges at the same meter.",
            rich_help_panel="Fleet",
        ),
    ] = 100,
    seed: Annotated[
        int,
        typer.Option(help="The same seed, start and fleet give the same messages.", rich_help_panel="Fleet"),
    ] = 1,
    interval: Annotated[
        float,
        typer.Option(
            parser=parse_duration,
            metavar="DURATION",
            help="Time between two readings of a device; divides a minute.",
            rich_help_panel="Fleet",
        ),
    ] = "60s",  # type: ignore[assignment]  # typer hands a default through the parser, too
    start: Annotated[
        datetime | None,
        typer.Option(
            parser=parse_start,
            metavar="TIMESTAMP",
            help="First minute of simulated time. By default now, or 23 hours ago where the pace is "
            "faster than real time.",
            rich_help_panel="Fleet",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Host of the MQTT 5 broker.", rich_help_panel="Broker")] = "localhost",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port; by default 1883, with TLS 8883.", rich_help_panel="Broker"),
    ] = None,
    username: Annotated[str | None, typer.Option(help="MQTT user.", rich_help_panel="Broker")] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="File that holds the password of the MQTT user.",
            rich_help_panel="Broker",
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="Use TLS and trust the certificates in this PEM file.",
            rich_help_panel="Broker",
        ),
    ] = None,
    topic_root: Annotated[
        str,
        typer.Option(
            help="Topics are ROOT/meter/ID/telemetry and ROOT/vehicle/ID/telemetry.", rich_help_panel="Broker"
        ),
    ] = "energy/v1",
    connections: Annotated[
        int,
        typer.Option(min=1, max=1000, help="MQTT connections that share the fleet.", rich_help_panel="Broker"),
    ] = 2,
    speedup: Annotated[
        float | None,
        typer.Option(help="Simulated seconds per real second; default 1.", rich_help_panel="Pace"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Messages a second, whatever the size of the fleet.", rich_help_panel="Pace"),
    ] = None,
    flat_out: Annotated[
        bool,
        typer.Option("--flat-out", help="As fast as the broker acknowledges.", rich_help_panel="Pace"),
    ] = False,
    duration: Annotated[
        float | None,
        typer.Option(
            "--for",
            parser=parse_duration,
            metavar="DURATION",
            help="End after 30s, 5m, 1h …",
            rich_help_panel="End",
        ),
    ] = None,
    messages: Annotated[
        int | None, typer.Option(min=1, help="End after so many messages.", rich_help_panel="End")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help='One JSON object a second on stdout; the last one has "final": true.',
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Publish the readings of a fleet of meters and vehicles to an MQTT broker.

    Every device publishes one reading an interval, with QoS 1, and keeps it until the broker has acknowledged
    it: a broker that is down or restarts delays messages but loses none. Simulated time never runs ahead of
    the clock; a pace faster than real time starts in the past and goes on in real time once it has caught up.

    200 devices in real time, until Ctrl-C: simulate

    An hour of the fleet's life in a minute: simulate --speedup 60 --for 1m

    Load at a given rate: simulate --meters 10000 --vehicles 10000 --rate 2000

    How fast is this broker? simulate --flat-out --messages 100000

    Exit codes: 0 every message was acknowledged; 1 some were not, or the broker was not reached or refused
    us; 2 wrong usage.
    """
    if sum((speedup is not None, rate is not None, flat_out)) > 1:
        raise typer.BadParameter("--speedup, --rate and --flat-out exclude one another")
    for name, value in (("--speedup", speedup), ("--rate", rate)):
        if value is not None and value <= 0:
            raise typer.BadParameter(f"{name} must be above 0, not {value:g}")
    fast = flat_out or rate is not None or (speedup is not None and speedup > 1)
    try:
        fleet = FleetConfig(
            start=start or default_start(faster_than_real_time=fast),
            meters=meters,
            vehicles=vehicles,
            seed=seed,
            interval=timedelta(seconds=interval),
            topic_root=topic_root,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    broker = Broker(
        host=host,
        port=port or (8883 if tls_ca else 1883),
        username=username,
        password=password_file.read_text().rstrip("\r\n") if password_file else None,
        tls=_trust(tls_ca) if tls_ca else None,
        connections=connections,
    )
    options = Options(
        fleet=fleet,
        broker=broker,
        speedup=None if flat_out else speedup or 1.0,
        rate=rate,
        duration=duration,
        messages=messages,
    )
    output = _JsonLines() if as_json else _Terminal()
    try:
        with output:
            summary = uvloop.run(_until_signal(options, output))
    except RefusedError as error:
        _complain(str(error))
        raise typer.Exit(1) from error
    except asyncio.CancelledError:
        _complain("stopped at once; messages in flight may or may not have arrived")
        raise typer.Exit(1) from None
    output.finish(summary)
    if not summary.complete:
        missing = summary.published - summary.acknowledged - summary.refused
        _complain(
            f"incomplete: {missing} sent but not acknowledged, {summary.unsent} not sent, "
            f"{summary.refused} refused ({summary.state})"
        )
        raise typer.Exit(1)


def _trust(certificates: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=certificates)
    except ssl.SSLError as error:
        raise typer.BadParameter(f"{certificates} holds no certificate in PEM format") from error


class _JsonLines:
    """Progress for programs."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, summary: Summary, *, final: bool = False) -> None:
        line = {
            "published": summary.published,
            "acknowledged": summary.acknowledged,
            "resent": summary.resent,
            "refused": summary.refused,
            "unheard": summary.unheard,
            "unsent": summary.unsent,
            "rate": round(summary.rate, 1),
            "elapsed_s": round(summary.elapsed_s, 3),
            "simulated_s": round(summary.simulated_s, 3),
            "simulated_until": summary.simulated_until.isoformat(),
            "state": summary.state,
        }
        sys.stdout.write(json.dumps(line | {"final": True} if final else line) + "\n")
        sys.stdout.flush()

    def event(self, text: str) -> None:
        sys.stderr.write(text + "\n")

    def finish(self, summary: Summary) -> None:
        self.progress(summary, final=True)


class _Terminal:
    """Progress for people: a line that moves on a terminal, otherwise events and the summary only."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = Status("connecting", console=self._console)

    def __enter__(self) -> None:
        self._status.start()

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def progress(self, summary: Summary) -> None:
        self._status.update(
            f"{summary.acknowledged:,} acknowledged, {summary.rate:,.0f}/s, fleet time "
            f"{summary.simulated_until:%Y-%m-%d %H:%M:%S}Z"
        )

    def event(self, text: str) -> None:
        self._console.print(text, markup=False)

    def finish(self, summary: Summary) -> None:
        self._console.print(
            f"{summary.published:,} published, {summary.acknowledged:,} acknowledged, "
            f"{summary.resent:,} sent again in {summary.elapsed_s:.1f} s ({summary.rate:,.0f}/s); "
            f"{timedelta(seconds=round(summary.simulated_s))} of fleet time until "
            f"{summary.simulated_until:%Y-%m-%d %H:%M:%S}Z"
        )
        if summary.unheard:
            self._console.print(f"{summary.unheard:,} of them had no subscriber: the broker took them and forgot them")


async def _until_signal(options: Options, output: _JsonLines | _Terminal) -> Summary:
    """Run until the end or a signal; the second signal does not wait for acknowledgements."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(
        run_fleet(options, output.progress, on_event=output.event, stop=stop), name="simulate"
    )

    def on_signal() -> None:
        if stop.is_set():
            running.cancel()
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal)
    return await running


def _complain(text: str) -> None:
    sys.stderr.write(f"simulate: {text}\n")
