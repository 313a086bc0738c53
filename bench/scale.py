"""What more devices cost, and more history: the daemon's CPU time and the database's.

devices   the same number of messages from ever more devices. The daemon's side is measured as in decode.py, each time
          in a process of its own, since its memory counts as well. The database's side is the whole transaction of the
          store, each fleet in a database of its own, which knows every device and has about as much history.
history   the whole transaction of the store with a minute of history and with a long one, two databases of one server:
          readings of the minutes that follow, as in life, and new ones of the day before, whose partition is full.
          (These are not late here, the watermark stands before all history. What late ones cost, store.py says.)
"""

import argparse
import gc
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import psycopg
import report
import uvloop
from decode import FORMS, Spent, recent, spend
from rig import SETTINGS, memory
from store import DAY, MINUTE, Batches, Cost, StoreSide, Stream, Variant, add_warm_up, create_database, populate

from bridge import logs
from bridge.services import EmbeddedPostgres

PARTS = ("devices", "history")
SIZES = (1_000, 100_000, 1_000_000)
SMALL_SIZES = (10, 1_000, 10_000)
START = datetime(2026, 7, 1, tzinfo=UTC)
KNOWN_ROWS = 500_000  # so much history has each fleet, but a minute at the least
BYTES_A_ROW = 400  # of disk for a reading: row, indexes, and what is kept of the WAL
NEXT, BEFORE = "the minutes that follow", "the day before"
READINGS = {NEXT: Variant(NEXT), BEFORE: Variant(BEFORE, age=DAY // timedelta(microseconds=1) + MINUTE // 2)}


class Daemon(NamedTuple):
    """One round of the daemon's side; `growth` of its memory in bytes."""

    spent: Spent
    growth: int


def serve(devices: int, messages: int) -> Daemon:
    """Takes so many messages of so many devices through the daemon, in this process."""
    uvloop.run(spend(recent(100, 10_000), FORMS["mixed"], 10_000))  # what any fleet needs
    stream = recent(devices, messages)
    gc.collect()
    before = memory(os.getpid(), "VmRSS")
    spent = uvloop.run(spend(stream, FORMS["mixed"], messages))
    return Daemon(spent, memory(os.getpid(), "VmRSS") - before)


def measure_daemon(sizes: Sequence[int], messages: int, rounds: int) -> dict[int, list[Daemon]]:
    """Rounds by number of devices, each in a new process."""
    found: dict[int, list[Daemon]] = {devices: [] for devices in sizes}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for number in range(1, rounds + 1):
            for devices in sizes:
                found[devices].append(processes.submit(serve, devices, messages).result())
                spent = found[devices][-1].spent.microseconds()
                report.progress(f"daemon, {devices:,} devices: round {number} of {rounds}, {spent:.2f} µs a message")
    return found


async def measure_database(admin: psycopg.Connection, options: argparse.Namespace) -> dict[int, list[Cost]]:
    """Rounds by number of devices; in each of them every device is written at least once."""
    rows, rounds = options.rows, options.rounds
    found: dict[int, list[Cost]] = {devices: [] for devices in options.sizes}
    streams = {devices: Stream(devices, START) for devices in options.sizes}
    known, sides = {}, {}
    for devices, stream in streams.items():
        report.progress(f"history of {devices:,} devices")
        dsn = create_database(admin, f"devices_{devices}")
        known[devices] = populate(dsn, stream, 0, max(1, min(rows, KNOWN_ROWS) // devices))
        side = StoreSide(dsn, Batches(stream, Variant("devices"), known[devices]))
        sides[devices] = await opened(side, options.warm_up)
    for number in range(1, rounds + 1):
        for devices, side in sides.items():
            cost = await side.run(-(-max(rows, devices) // side.batches.size))
            found[devices].append(cost)
            report.progress(f"store, {devices:,} devices: round {number} of {rounds}, {cost.rate:,.0f} rows a second")
    for devices, side in sides.items():
        side.check()
        side.check_database(known[devices], streams[devices])
        await side.close()
    return found


async def opened(side: StoreSide, warm_up: int) -> StoreSide:
    """Connected, and past what happens only once."""
    await side.open()
    await side.run(warm_up)
    return side


class Pair(NamedTuple):
    """One round of readings of one kind: with hardly any history, and with a long one."""

    short: Cost
    long: Cost


async def measure_history(
    admin: psycopg.Connection, minutes: int, options: argparse.Namespace
) -> dict[str, list[Pair]]:
    """Rounds by where the readings belong."""
    devices, rounds, batches = options.devices, options.rounds, max(1, options.rows // Variant("").size)
    stream, known = Stream(devices, START), minutes * devices
    lengths = {"short": 1, "long": minutes}
    sides: dict[tuple[str, str], StoreSide] = {}
    for length, many in lengths.items():
        began = time.monotonic()
        dsn = create_database(admin, f"{length}_history")
        filled = populate(dsn, stream, (minutes - many) * devices, many)
        report.progress(f"{length} history: {filled:,} readings, in {time.monotonic() - began:,.0f} s")
        for name, variant in READINGS.items():
            side = StoreSide(dsn, Batches(stream, variant, known), instance=name)
            sides[name, length] = await opened(side, options.warm_up)
    found: dict[str, list[Pair]] = {name: [] for name in READINGS}
    for number in range(1, rounds + 1):
        for name, pairs in found.items():
            pairs.append(Pair(*[await sides[name, length].run(batches) for length in lengths]))
            rates = " and ".join(report.count(cost.rate) for cost in pairs[-1])
            report.progress(f"{name}: round {number} of {rounds}, {rates} rows a second")
    for side in sides.values():
        side.check()
    for length, many in lengths.items():
        following = sides[NEXT, length]
        following.check_database(many * devices + sides[BEFORE, length].batches.received, stream)
    for side in sides.values():
        await side.close()
    return found


def spread(rounds: Iterable, figure: Callable[..., float], pattern: str = "{:.2f}") -> str:  # type: ignore[type-arg]
    return report.spread(map(figure, rounds)).format(pattern)


def cpu(cost: Cost) -> float:
    """Of the backend, in microseconds a row."""
    return cost.backend / cost.rows * 1e6


def devices_table(daemons: dict[int, list[Daemon]], stores: dict[int, list[Cost]]) -> report.Table:
    first_of = "by the first"
    daemon, backend = ("daemon, µs/message", first_of, "memory, MB"), ("backend, µs/row", first_of, "store, rows/s")
    header = ("devices", *daemon, *backend)
    rows = []
    first = next(iter(daemons))
    for devices, rounds in daemons.items():
        against = list(zip(rounds, daemons[first], strict=True))
        written = list(zip(stores[devices], stores[first], strict=True))
        rows.append(
            [
                report.count(devices),
                spread(rounds, lambda one: one.spent.microseconds()),
                spread(against, lambda pair: pair[0].spent.microseconds() / pair[1].spent.microseconds()),
                spread(rounds, lambda one: one.growth / 2**20, "{:+.1f}"),
                spread(stores[devices], cpu),
                spread(written, lambda pair: cpu(pair[0]) / cpu(pair[1])),
                spread(stores[devices], lambda cost: cost.rate, "{:,.0f}"),
            ]
        )
    return report.Table(header, rows)


def history_table(found: dict[str, list[Pair]], known: int) -> report.Table:
    lengths = (f"with {known:,}", "with a minute")
    rates, costs = ([f"{figure} {length}" for length in lengths] for figure in ("rows/s", "backend µs/row"))
    header = ("readings of", *rates, "ratio", *costs)
    rows = [
        [
            name,
            spread(pairs, lambda pair: pair.long.rate, "{:,.0f}"),
            spread(pairs, lambda pair: pair.short.rate, "{:,.0f}"),
            str(report.ratios(pairs, lambda pair: pair.long.rate, lambda pair: pair.short.rate)),
            spread(pairs, lambda pair: cpu(pair.long)),
            spread(pairs, lambda pair: cpu(pair.short)),
        ]
        for name, pairs in found.items()
    ]
    return report.Table(header, rows)


def check_disk(directory: Path, rows: int) -> None:
    """Raises SystemExit where there is not enough room for so much history."""
    free, needed = shutil.disk_usage(directory).free, rows * BYTES_A_ROW
    if free < needed:
        raise SystemExit(
            f"{rows:,} rows of history need {needed / 2**30:.0f} GB in {directory}, free are {free / 2**30:.0f}"
        )


def report_devices(options: argparse.Namespace) -> None:
    conditions = report.Conditions.now()
    daemons = measure_daemon(options.sizes, options.messages, options.rounds)
    with EmbeddedPostgres(SETTINGS) as server, psycopg.connect(server.dsn, autocommit=True) as admin:
        stores = uvloop.run(measure_database(admin, options))
        version = admin.info.parameter_status("server_version")
    note = (
        f"Medians of {options.rounds} rounds and their range, by turns. Daemon: {options.messages:,} messages a round, "
        "from the codec to the acknowledgement, without network and database, in a new process; by how much its memory "
        f"grew. Store: {options.rows:,} rows a round, or one of each device, in batches of 5,000; all have a live row."
    )
    table = devices_table(daemons, stores)
    report.publish("scale-devices", [table], [note], conditions.describe(version), options.write)


def report_history(options: argparse.Namespace) -> None:
    conditions = report.Conditions.now()
    minutes = max(1, options.history_rows // options.devices)
    with EmbeddedPostgres(SETTINGS) as server, psycopg.connect(server.dsn, autocommit=True) as admin:
        check_disk(server.directory, options.history_rows)
        found = uvloop.run(measure_history(admin, minutes, options))
        version = admin.info.parameter_status("server_version")
    table = history_table(found, minutes * options.devices)
    days = minutes / 1440
    note = (
        f"Medians of {options.rounds} rounds of {options.rows:,} rows and their range, by turns; all readings are new. "
        f"{options.devices:,} devices, each once a minute: the long history is {days:,.1f} days, a partition each."
    )
    report.publish("scale-history", [table], [note], conditions.describe(version), options.write)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.arguments(__doc__, rounds=7)
    add = parser.add_argument
    add("--part", choices=PARTS, help="only this")
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="DEVICES", help="of the fleets, smallest first")
    add("--messages", type=int, default=1_000_000, help="that the daemon takes in a round of each fleet")
    add("--rows", type=int, default=200_000, help="that the store writes in a round, or one of each device")
    add("--devices", type=int, default=20_000, help="of the fleet with the long history")
    add("--history-rows", type=int, default=100_000_000, help="how long it is")
    add_warm_up(parser)
    small = {"sizes": SMALL_SIZES, "messages": 20_000, "rows": 20_000, "history_rows": 200_000, "warm_up": 2}
    part = parser.parse_known_args(given)[0].part
    for name in [part] if part else PARTS:
        options = report.parse(parser, f"scale-{name}", given, **small)
    return options


def main() -> None:
    options = arguments()
    logs.configure("warning", "console")
    if options.part != "history":
        report_devices(options)
    if options.part != "devices":
        report_history(options)


if __name__ == "__main__":
    main()
