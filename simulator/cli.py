"""The command line of the simulator: `simulate` is a command for a typer application.

What it needs is imported when it runs: others have this command among theirs and shall not wait for it.
"""

import re
import sys
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from simulator.settings import PREFIX, settings

if TYPE_CHECKING:
    import ssl

    from simulator.output import Output
    from simulator.run import Options, Summary

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
OLDEST = timedelta(days=365)
MOST_CONNECTIONS = 1000
PER_DEVICE = "per-device"


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
    now = datetime.now(UTC)
    if start > now:
        raise typer.BadParameter(f"{text} is in the future, and readings from the future are rejected by a bridge")
    if start < now - OLDEST:
        raise typer.BadParameter(f"{text} is more than a year ago, and readings that old are rejected by a bridge")
    return start.astimezone(UTC).replace(second=0, microsecond=0)


def parse_connections(text: str) -> int:
    """Return how many connections share the fleet; 0 stands for one per device."""
    if text == PER_DEVICE:
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= MOST_CONNECTIONS:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 to {MOST_CONNECTIONS} nor {PER_DEVICE}")
    return int(text)


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Let the file and the environment say what the command line does not."""
    context.default_map = settings(context, file)
    return file


def _option(panel: str, text: str, *names: str, **others: Any) -> OptionInfo:  # noqa: ANN401 - typer's business
    option: OptionInfo = typer.Option(*names, help=text, rich_help_panel=panel, **others)
    return option


def _fault(text: str, unit: str = "0…1") -> OptionInfo:
    return _option("Faults", text, metavar=unit)


def _file(panel: str, text: str) -> OptionInfo:
    return _option(panel, text, exists=True, dir_okay=False, readable=True, metavar="FILE")


def simulate(  # noqa: PLR0913 - each parameter is an option of the command
    context: typer.Context,
    *,
    config: Annotated[  # noqa: ARG001 - its callback has made use of it
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            is_eager=True,
            callback=_configure,
            envvar=f"{PREFIX}CONFIG",
            show_envvar=False,
            metavar="FILE",
            help="Read options from a TOML file, see config/simulator.toml. A variable such as "
            f"{PREFIX}HOST goes before it, and the command line before both.",
        ),
    ] = None,
    meters: Annotated[int, _option("Fleet", "Number of meters, one per charger.", min=0, metavar="N")] = 100,
    vehicles: Annotated[int, _option("Fleet", "Number of vehicles.", min=0, metavar="N")] = 100,
    seed: Annotated[
        int, _option("Fleet", "The same seed, start, fleet and faults give the same messages.", min=0, metavar="N")
    ] = 1,
    interval: Annotated[
        float,
        _option(
            "Fleet",
            "Time between two readings of a device; divides a minute.",
            parser=parse_duration,
            metavar="DURATION",
        ),
    ] = "60s",  # type: ignore[assignment]  # typer hands a default through the parser, too
    start: Annotated[
        datetime | None,
        _option(
            "Fleet",
            "First minute of simulated time. By default now, or 23 hours ago where the pace is faster than real time.",
            parser=parse_start,
            metavar="TIMESTAMP",
        ),
    ] = None,
    faulty_share: Annotated[
        float,
        _option("Fleet", "Share of the chargers whose efficiency is below 0.85.", metavar="0…1"),
    ] = 0.02,
    shared_share: Annotated[
        float,
        _option("Fleet", "Share of the meters that two vehicles use at the same time.", metavar="0…1"),
    ] = 0.0,
    all_faults: Annotated[
        bool,
        _option(
            "Faults",
            "All of these at moderate rates; what is given besides has its own. Without it each is 0, that is off.",
            "--all-faults",
        ),
    ] = False,
    duplicates: Annotated[
        float | None, _fault("Probability that a message is sent again up to 10 minutes later.")
    ] = None,
    reordering: Annotated[float | None, _fault("Probability that a reading is held back for 1 to 30 minutes.")] = None,
    conflicts: Annotated[
        float | None, _fault("Probability that a reading is followed by one of the same time with other values.")
    ] = None,
    outages: Annotated[
        float | None,
        _fault("Losses of the network per device, for minutes to hours; then arrays of backlog.", "PER DAY"),
    ] = None,
    spoiled: Annotated[
        float | None, _fault("Share of the arrays of backlog with one more element that is no reading.")
    ] = None,
    skewed: Annotated[float | None, _fault("Share of the devices whose clock is wrong.")] = None,
    silences: Annotated[float | None, _fault("Losses of readings per device, for minutes to hours.", "PER DAY")] = None,
    malformed: Annotated[
        float | None, _fault("Probability that after a reading something is sent that is none.")
    ] = None,
    mismatches: Annotated[
        float | None, _fault("Probability that a reading is sent once more in the name of another device.")
    ] = None,
    far_past: Annotated[
        float | None, _fault("Probability that a reading is sent once more from 2 to 20 years ago.")
    ] = None,
    far_future: Annotated[
        float | None, _fault("Probability that a reading is sent once more from 10 to 500 years ahead.")
    ] = None,
    host: Annotated[str, _option("Broker", "Host of the MQTT 5 broker.", metavar="HOST")] = "localhost",
    port: Annotated[
        int | None, _option("Broker", "Port; by default 1883, with TLS 8883.", min=1, max=65535, metavar="PORT")
    ] = None,
    tls_ca: Annotated[Path | None, _file("Broker", "Use TLS and trust the certificates in this PEM file.")] = None,
    topic_root: Annotated[
        str,
        _option("Broker", "Topics are ROOT/meter/ID/telemetry and ROOT/vehicle/ID/telemetry.", metavar="ROOT"),
    ] = "energy/v1",
    connections: Annotated[
        int,
        _option(
            "Broker",
            "MQTT connections that share the fleet; or per-device: each its own, with client id, last will and "
            "status (retained, ROOT/KIND/ID/status).",
            parser=parse_connections,
            metavar="N|per-device",
        ),
    ] = "2",  # type: ignore[assignment]  # as for interval
    client_id: Annotated[
        str | None,
        _option(
            "Broker",
            "MQTT client id; numbered where several connections share the fleet. Per device a template, "
            "by default {device_id}.",
            metavar="TEXT",
        ),
    ] = None,
    username: Annotated[
        str | None,
        _option("Broker", "MQTT user. Per device a template with {device_id} and {kind}.", metavar="TEXT"),
    ] = None,
    password_file: Annotated[
        Path | None,
        _file("Broker", "File that holds the password of the MQTT user. Per device a template, too."),
    ] = None,
    window: Annotated[
        int,
        _option(
            "Broker",
            "Most unacknowledged messages of a connection; the broker may allow fewer.",
            min=1,
            max=65535,
            metavar="N",
        ),
    ] = 1000,
    speedup: Annotated[
        float | None, _option("Pace", "Simulated seconds per real second; default 1.", metavar="FACTOR")
    ] = None,
    rate: Annotated[
        float | None, _option("Pace", "Messages a second, whatever the size of the fleet.", metavar="N")
    ] = None,
    flat_out: Annotated[bool, _option("Pace", "As fast as the broker acknowledges.", "--flat-out")] = False,
    duration: Annotated[
        float | None,
        _option("End", "End after 30s, 5m, 1h …", "--for", parser=parse_duration, metavar="DURATION"),
    ] = None,
    messages: Annotated[int | None, _option("End", "End after so many messages.", min=1, metavar="N")] = None,
    ledger: Annotated[
        Path | None,
        _option(
            "Output",
            "Write what must become of every message to this new file, for wattbridge verify.",
            metavar="FILE",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        _option("Output", 'One JSON object a second on stdout; the last one has "final": true.', "--json"),
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

    Does a bridge get everything right? simulate --all-faults --flat-out --messages 100000 --ledger run.ledger

    Exit codes: 0 every message was acknowledged; 1 some were not, or the broker was not reached or refused
    us, or the ledger could not be written; 2 wrong usage.
    """
    from dataclasses import replace

    from simulator.connection import Broker
    from simulator.faults import FaultConfig
    from simulator.fleet import FleetConfig
    from simulator.output import JsonLines, Terminal
    from simulator.run import Options, default_start

    speedup, rate, flat_out = _pace(context, speedup, rate, flat_out=flat_out)
    fast = flat_out or rate is not None or (speedup is not None and speedup > 1)
    given = {
        "duplicates": duplicates,
        "reordering": reordering,
        "conflicts": conflicts,
        "outages": outages,
        "spoiled": spoiled,
        "skewed": skewed,
        "silences": silences,
        "malformed": malformed,
        "mismatches": mismatches,
        "far_past": far_past,
        "far_future": far_future,
    }
    try:
        faults = FaultConfig.everything() if all_faults else FaultConfig()
        faults = replace(faults, **{name: value for name, value in given.items() if value is not None})
        fleet = FleetConfig(
            start=start or default_start(faster_than_real_time=fast),
            meters=meters,
            vehicles=vehicles,
            seed=seed,
            interval=timedelta(seconds=interval),
            topic_root=topic_root,
            faulty_share=faulty_share,
            shared_share=shared_share,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _check_templates(client_id, username, per_device=not connections)
    broker = Broker(
        host=host,
        port=port or (8883 if tls_ca else 1883),
        client_id=client_id,
        username=username,
        password=_password(password_file) if password_file else None,
        tls=_trust(tls_ca) if tls_ca else None,
        connections=connections or None,
        window=window,
    )
    options = Options(
        fleet=fleet,
        broker=broker,
        faults=faults,
        speedup=None if flat_out else speedup or 1.0,
        rate=rate,
        duration=duration,
        messages=messages,
        ledger=ledger,
    )
    _run(options, JsonLines() if as_json else Terminal(options))


def _pace(
    context: typer.Context, speedup: float | None, rate: float | None, *, flat_out: bool
) -> tuple[float | None, float | None, bool]:
    """Return the one pace that was chosen: one of the command line displaces one of the file."""
    chosen = {"speedup": speedup, "rate": rate, "flat_out": flat_out or None}
    typed = {name for name in chosen if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    if typed:
        chosen = {name: value if name in typed else None for name, value in chosen.items()}
    if sum(value is not None for value in chosen.values()) > 1:
        raise typer.BadParameter("--speedup, --rate and --flat-out exclude one another")
    for name in ("speedup", "rate"):
        value = chosen[name]
        if value is not None and not 0 < value < inf:
            raise typer.BadParameter(f"--{name} must be a number above 0, not {value:g}")
    return chosen["speedup"], chosen["rate"], bool(chosen["flat_out"])


def _check_templates(client_id: str | None, username: str | None, *, per_device: bool) -> None:
    """Refuse a template that would not say what was meant."""
    for option, template in (("--client-id", client_id), ("--username", username)):
        places = set(re.findall(r"\{(\w*)\}", template or ""))
        if places and not per_device:
            raise typer.BadParameter(f"{option} {template!r} is a template, which needs --connections {PER_DEVICE}")
        if places - {"device_id", "kind"}:
            raise typer.BadParameter(f"{option} {template!r} knows only {{device_id}} and {{kind}}")
    if per_device and client_id is not None and "{device_id}" not in client_id:
        raise typer.BadParameter(f"--client-id {client_id!r} needs {{device_id}}: every device has its own")


def _password(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read as text in UTF-8: {error}") from error


def _trust(certificates: Path) -> "ssl.SSLContext":
    import ssl

    try:
        return ssl.create_default_context(cafile=certificates)
    except ssl.SSLError as error:
        raise typer.BadParameter(f"{certificates} holds no certificate in PEM format") from error


def _run(options: "Options", output: "Output") -> None:
    """Run to the end and tell how it was; exits with 1 unless the broker took every message."""
    import asyncio

    import uvloop

    from simulator.connection import RefusedError
    from simulator.devices import LimitError
    from simulator.ledger import LedgerError

    try:
        with output:
            summary = uvloop.run(_until_signal(options, output))
    except (RefusedError, LedgerError, LimitError) as error:
        _complain(str(error))
        raise typer.Exit(1) from error
    except asyncio.CancelledError:
        _complain("stopped at once; messages in flight may or may not have arrived")
        raise typer.Exit(1) from None
    except OSError as error:
        _complain(f"stopped, because the output cannot be written: {error.strerror}")
        raise typer.Exit(1) from error
    output.finish(summary)
    if not summary.complete:
        missing = summary.published - summary.acknowledged - summary.refused
        _complain(
            f"incomplete: {missing} sent but not acknowledged, {summary.unsent} not sent, "
            f"{summary.refused} refused ({summary.state})"
        )
        raise typer.Exit(1)


async def _until_signal(options: "Options", output: "Output") -> "Summary":
    """Run until the end or a signal; the second signal does not wait for acknowledgements."""
    import asyncio
    import signal

    from simulator.run import simulate as run_fleet

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
