"""What several daemons do together on a shared subscription: the sum of their rates, and the share of each.

Each daemon has a client id of its own and the same mqtt.share_group, all store into one database. Measured from the
moment the simulator begins to publish flat out until the last reading is committed; then that each is there once.
"""

import time
from typing import NamedTuple

import psycopg
from report import NONE, Conditions, Table, arguments, count, parse, progress, publish, ratios, rounds_in_turn, spread
from rig import SMALL, FailedError, Fleet, Rig, Turn, add_load

DAEMONS = (1, 2, 4)
GROUP = "bench"
RECEIVED = "SELECT received FROM ingest_counter ORDER BY instance"
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class Run(NamedTuple):
    """What one turn came to: how many messages each daemon received, CPU seconds of all daemons, what went wrong."""

    seconds: float
    received: list[int]
    cpu: float
    deadlocks: int
    retries: int

    @property
    def rate(self) -> float:
        """Of all together, messages a second."""
        return sum(self.received) / self.seconds

    @property
    def fairness(self) -> float:
        """The least share by the greatest."""
        return min(self.received) / max(self.received)

    @property
    def us(self) -> float:
        """CPU microseconds of the daemons a message."""
        return self.cpu / sum(self.received) * 1e6


Runs = dict[int, list[Run]]


def measure(rig: Rig, messages: int, fleet: Fleet, rounds: int, sizes: tuple[int, ...] = DAEMONS) -> Runs:
    """The runs of each number of daemons, the numbers in turn."""
    done: Runs = {size: [] for size in sizes}
    for number in range(1, rounds + 1):
        for size in sizes:
            with rig.turn() as turn:
                found = share(turn, size, messages, fleet)
            done[size].append(found)
            progress(f"round {number} of {rounds}: {size} daemons, {found.rate:,.0f}/s")
    return done


def share(turn: Turn, size: int, messages: int, fleet: Fleet) -> Run:
    daemons = [turn.daemon(f"worker-{number}", mqtt__share_group=GROUP) for number in range(size)]
    books = turn.books()
    load = turn.load(messages, fleet)
    idle = sum(daemon.cpu() for daemon in daemons)
    seconds = books.wait_for(messages)[-1].at - load.began
    cpu = sum(daemon.cpu() for daemon in daemons) - idle
    load.finish()
    for daemon in daemons:
        daemon.stop()
    books.check(messages)
    retries = sum(len(daemon.events("database.waiting")) for daemon in daemons)
    with psycopg.connect(turn.dsn) as connection:
        received = [row[0] for row in connection.execute(RECEIVED)]
        deadlocks = connection.execute(DEADLOCKS).fetchone()[0]
    if len(received) != size:
        raise FailedError(f"{len(received)} of {size} daemons received anything")
    return Run(seconds, received, cpu, deadlocks, retries)


def table(runs: Runs) -> Table:
    rows = []
    for size, found in runs.items():
        alone = zip(found, runs[min(runs)], strict=True)
        against = ratios(alone, lambda pair: pair[0].rate, lambda pair: pair[1].rate) if size != min(runs) else NONE
        rate, cpu = spread(run.rate for run in found), spread(run.us for run in found)
        wrong = count(sum(run.deadlocks for run in found)), count(sum(run.retries for run in found))
        fairness = spread(run.fairness for run in found)
        rows.append((str(size), rate.format("{:,.0f}"), str(against), str(fairness), cpu.format("{:.1f}"), *wrong))
    header = "daemons", "messages/s, sum", f"to {min(runs)}", "least : greatest share", "CPU, µs a message"
    return Table((*header, "deadlocks", "retries"), rows)


def main() -> None:
    parser = arguments(__doc__, 5)
    add_load(parser, messages=400_000)
    conditions, options = Conditions.now(), parse(parser, "workers", **SMALL)
    fleet = Fleet(options.meters, options.vehicles)
    began = time.monotonic()
    with Rig() as rig:
        runs = measure(rig, options.messages, fleet, options.rounds)
    method = (
        f"{count(options.messages)} messages flat out in each turn, {fleet}, QoS 1; all of them are in history exactly "
        f"once; {rounds_in_turn(options.rounds)}; deadlocks and retries are those of all rounds. All processes share "
        f"the cores. {time.monotonic() - began:.0f} s in all."
    )
    publish("workers", [table(runs)], [method], conditions.describe(rig.version, mosquitto=True), options.write)


if __name__ == "__main__":
    main()
