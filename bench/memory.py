"""How much memory the daemon takes: flat out, and while its database is away and messages go on coming.

One turn is a load as fast as the broker takes it. In the other the load goes on at a steady rate; the database is
stopped (immediate), stays away, comes back, and everything that has queued up is stored. The peak is the kernel's own
(VmHWM), over the life of the process; a daemon is started for each turn.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple

from report import Conditions, Table, arguments, count, parse, progress, publish, rounds_in_turn, spread
from rig import LOOK_S, SMALL, Daemon, FailedError, Fleet, Load, Rig, Turn, add_load

AIM_MB = 150
MB = 1_000_000
# Of load before the database goes away, and after it has come back.
AROUND_S = 5.0
EVERY_S = 1.0


class Run(NamedTuple):
    """What one turn came to: the peak in bytes, and the resident memory about every second, the first when ready."""

    messages: int
    peak: int
    resident: list[int]


class Runs(NamedTuple):
    flat_out: list[Run]
    outage: list[Run]


class Watch:
    """Notes the resident memory of a daemon, at most once a second."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.resident = [daemon.rss()]
        self._noted = time.monotonic()

    def look(self) -> None:
        if time.monotonic() - self._noted >= EVERY_S:
            self._noted = time.monotonic()
            self.resident.append(self._daemon.rss())

    def pause(self, seconds: float) -> None:
        """Looks for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            self.look()

    def run(self, messages: int) -> Run:
        """What it has come to, when everything is stored."""
        return Run(messages, self._daemon.peak_rss(), [*self.resident, self._daemon.rss()])


def measure(rig: Rig, messages: int, fleet: Fleet, rounds: int, outage_s: float, rate: int) -> Runs:
    runs = Runs([], [])
    for number in range(1, rounds + 1):
        with rig.turn() as turn:
            runs.flat_out.append(flat_out(turn, messages, fleet))
        progress(f"round {number} of {rounds}: flat out, peak {runs.flat_out[-1].peak / MB:.0f} MB")
        with rig.turn() as turn:
            runs.outage.append(outage(turn, outage_s, rate, fleet))
        progress(f"round {number} of {rounds}: outage, peak {runs.outage[-1].peak / MB:.0f} MB")
    return runs


def flat_out(turn: Turn, messages: int, fleet: Fleet) -> Run:
    daemon = turn.daemon()
    watch = Watch(daemon)
    return finish(turn, daemon, watch, turn.load(messages, fleet))


def outage(turn: Turn, seconds: float, rate: int, fleet: Fleet) -> Run:
    daemon = turn.daemon()
    watch = Watch(daemon)
    load = turn.load(int(rate * (seconds + 2 * AROUND_S)), fleet, rate)
    watch.pause(AROUND_S)
    turn.postgres.stop("immediate")
    progress(f"the database is away for {seconds:g} s")
    watch.pause(seconds)
    if not load.running() or not daemon.events("database.waiting"):
        raise FailedError("there was no load, or the daemon did not notice that the database was away")
    turn.postgres.start()
    return finish(turn, daemon, watch, load)


def finish(turn: Turn, daemon: Daemon, watch: Watch, load: Load) -> Run:
    books = turn.books()
    books.wait_for(load.messages, watch.look)
    run = watch.run(load.messages)
    load.finish()
    daemon.stop()
    books.check(load.messages)
    return run


def tables(runs: Runs, outage_s: float) -> list[Table]:
    turns = [("flat out", runs.flat_out), (f"outage of {outage_s:g} s", runs.outage)]
    peaks = [(name, count(done[0].messages), megabytes(run.peak for run in done)) for name, done in turns]
    course = [(name, *(f"{size / MB:.0f}" for size in tenths(done[-1].resident))) for name, done in turns]
    return [
        Table(("turn", "messages", "peak, MB"), peaks),
        Table(("MB at % of the time", *(str(share) for share in range(0, 101, 10))), course),
    ]


def tenths(samples: list[int]) -> list[int]:
    """Eleven of the samples, from the first to the last."""
    return [samples[round((len(samples) - 1) * share / 10)] for share in range(11)]


def megabytes(sizes: Iterable[int]) -> str:
    return spread(size / MB for size in sizes).format("{:.0f}")


def main() -> None:
    parser = arguments(__doc__, 1)
    add_load(parser, messages=1_000_000)
    parser.add_argument("--outage", type=float, default=600, metavar="S", help="how long the database is away (600)")
    parser.add_argument("--rate", type=int, default=5_000, metavar="N", help="messages a second meanwhile (5,000)")
    conditions, options = Conditions.now(), parse(parser, "memory", **SMALL, outage=5)
    fleet = Fleet(options.meters, options.vehicles)
    with Rig() as rig:
        runs = measure(rig, options.messages, fleet, options.rounds, options.outage, options.rate)
    method = (
        f"Resident memory of the daemon; aim: peak ≤ {AIM_MB} MB. {fleet}, QoS 1; {rounds_in_turn(options.rounds)}. "
        f"The outage: {options.rate:,} messages a second, {AROUND_S:g} s before, all through and {AROUND_S:g} s after "
        f"it; then until all of them are stored. The second table is the course of the last round."
    )
    shown = tables(runs, options.outage)
    publish("memory", shown, [method], conditions.describe(rig.version, mosquitto=True), options.write)


if __name__ == "__main__":
    main()
