"""How fast a backlog goes from the broker into the database, against raw COPY of the same rows into the same tables.

The daemon makes its persistent session and ends; the simulator publishes the backlog; then the daemon starts, and is
measured from the arrival of the first message until the last one is committed. The same rows are then read back from
the history tables, these emptied, and filled again by binary COPY over one connection: 5,000 rows a transaction, in the
order of arrival, both kinds in turn. Each turn has a Mosquitto and a database of its own.
"""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

import psycopg
from report import (
    NONE,
    Conditions,
    Side,
    Spread,
    Table,
    arguments,
    cpu_row,
    parse,
    progress,
    publish,
    rate_row,
    ratios,
    rounds_in_turn,
    spread,
)
from rig import SMALL, Books, Fleet, Rig, Sample, Turn, add_load, usage, wait_until

AIM_RATIO = 0.35
AIM_RATE = 40_000
BATCH = 5_000  # that of the daemon
KINDS = ("meter", "vehicle")
PROCESSES = ("daemon", "PostgreSQL", "Mosquitto")
READ = """
CREATE TEMPORARY TABLE {kind}_read AS SELECT * FROM {kind}_history;
CREATE INDEX ON {kind}_read (received_at);
ANALYZE {kind}_read
"""
# No two readings of one daemon are received at the same time.
BOUNDS = """
SELECT received_at
FROM (
    SELECT row_number() OVER (ORDER BY received_at) - 1 AS number, received_at
    FROM (SELECT received_at FROM meter_read UNION ALL SELECT received_at FROM vehicle_read)
)
WHERE number %% %(batch)s = 0
ORDER BY number
"""
FIRST = """
SELECT extract(epoch FROM min(received_at))
FROM (SELECT received_at FROM meter_history UNION ALL SELECT received_at FROM vehicle_history)
"""


class Round(NamedTuple):
    """`middle` is the rate between a tenth and nine tenths of the backlog."""

    drain: Side
    middle: float | None
    copy: Side


def measure(rig: Rig, messages: int, fleet: Fleet, rounds: int) -> list[Round]:
    done = []
    for number in range(1, rounds + 1):
        with rig.turn() as turn:
            drained, middle = drain(turn, messages, fleet)
            copied = copy(turn, messages)
        done.append(Round(drained, middle, copied))
        progress(f"round {number} of {rounds}: drained {drained.rate:,.0f}/s, raw COPY {copied.rate:,.0f}/s")
    return done


def drain(turn: Turn, messages: int, fleet: Fleet) -> tuple[Side, float | None]:
    """How the backlog was drained, and at what rate between a tenth and nine tenths of it."""
    turn.daemon().stop()
    turn.load(messages, fleet).finish(patience_s=60 + messages / 1_000)
    progress(f"{messages:,} messages wait in the broker")
    books = turn.books()
    used = usage({"PostgreSQL": turn.postgres_cpu, "Mosquitto": turn.broker_cpu})
    daemon = turn.daemon(ready=False)
    # After that it connects. Before it, it imports its modules, which is no work for messages.
    wait_until(lambda: daemon.events("daemon.started"), "the daemon begins", daemon)
    idle = daemon.cpu()
    samples = books.wait_for(messages)
    cpu = {"daemon": daemon.cpu() - idle, **used()}
    ended = time.time() - (time.monotonic() - samples[-1].at)
    daemon.stop()
    books.check(messages)
    with psycopg.connect(turn.dsn) as connection:
        seconds = ended - float(connection.execute(FIRST).fetchone()[0])
    return Side(messages, seconds, cpu), middle_rate(samples, messages)


def middle_rate(samples: list[Sample], messages: int) -> float | None:
    """Messages a second between a tenth and nine tenths of them; None where that took no time that can be seen."""
    begin, end = (next(s for s in samples if s.received >= share * messages) for share in (0.1, 0.9))
    return (end.received - begin.received) / (end.at - begin.at) if end.at > begin.at else None


def copy(turn: Turn, messages: int) -> Side:
    """Fills the history anew with what it holds."""
    with psycopg.connect(turn.dsn, autocommit=True) as connection:
        chunks = read_back(connection)
        connection.execute("TRUNCATE meter_history, vehicle_history")
        connection.execute("CHECKPOINT")
        used, began = usage({"PostgreSQL": turn.postgres_cpu}), time.monotonic()
        for chunk in chunks:
            with connection.transaction(), connection.cursor() as cursor:
                for kind, rows in zip(KINDS, chunk, strict=True):
                    with cursor.copy(f"COPY {kind}_history FROM STDIN (FORMAT BINARY)") as target:
                        target.write(rows)
        seconds, cpu = time.monotonic() - began, used()
    with Books(turn.dsn) as books:
        books.check(messages)  # as much is there as before, and the live tables were left alone
    return Side(messages, seconds, cpu)


def read_back(connection: psycopg.Connection) -> list[list[bytes]]:
    """The rows of the history in the order of their arrival, in chunks: those of meters, those of vehicles."""
    for kind in KINDS:
        connection.execute(READ.format(kind=kind))
    bounds = [row[0] for row in connection.execute(BOUNDS, {"batch": BATCH})]
    chunks = [
        [b"".join(rows(connection, kind, since, until)) for kind in KINDS]
        for since, until in zip(bounds, [*bounds[1:], "infinity"], strict=True)
    ]
    connection.execute("DROP TABLE meter_read, vehicle_read")
    return chunks


def rows(
    connection: psycopg.Connection, kind: str, since: datetime, until: datetime | str
) -> Iterator[bytes | bytearray | memoryview]:
    """A binary COPY stream of one kind, with header and trailer."""
    query = f"""
        COPY (SELECT * FROM {kind}_read WHERE received_at >= %s AND received_at < %s ORDER BY received_at)
        TO STDOUT (FORMAT BINARY)
    """  # noqa: S608 - one of our kinds
    with connection.cursor() as cursor, cursor.copy(query, (since, until)) as source:
        yield from source


def tables(rounds: list[Round]) -> list[Table]:
    drains, copies = [found.drain for found in rounds], [found.copy for found in rounds]
    middles = [found.middle for found in rounds if found.middle is not None]
    middle = spread(middles).format("{:,.0f}") if len(middles) == len(rounds) else NONE
    drained, copied = "backlog drained", "raw COPY of the same rows"
    return [
        Table(
            ("", "rows", "seconds", "rows/s", "rows/s, middle 80 %"),
            [(*rate_row(drained, drains), middle), (*rate_row(copied, copies), NONE)],
        ),
        Table(
            ("CPU, µs a row", *PROCESSES),
            [cpu_row(drained, drains, PROCESSES), cpu_row(copied, copies, PROCESSES)],
        ),
    ]


def ratio(rounds: list[Round]) -> Spread:
    return ratios(rounds, lambda found: found.drain.rate, lambda found: found.copy.rate)


def main() -> None:
    parser = arguments(__doc__, 5)
    add_load(parser, messages=1_000_000)
    conditions, options = Conditions.now(), parse(parser, "drain", **SMALL)
    fleet = Fleet(options.meters, options.vehicles)
    began = time.monotonic()
    with Rig() as rig:
        rounds = measure(rig, options.messages, fleet, options.rounds)
    result = (
        f"Ratio of the rates, drain : raw COPY: **{ratio(rounds)}** (aim ≥ {AIM_RATIO}), at "
        f"**{spread(found.drain.rate for found in rounds).format('{:,.0f}')}** messages a second (aim ≥ {AIM_RATE:,})."
    )
    method = (
        f"{fleet}, QoS 1; {rounds_in_turn(len(rounds))}; the ratio is taken within each round. "
        f"{time.monotonic() - began:.0f} s in all."
    )
    publish("drain", tables(rounds), [result, method], conditions.describe(rig.version, mosquitto=True), options.write)


if __name__ == "__main__":
    main()
