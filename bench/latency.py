"""How long it takes from the publication of a reading until it can be read in the live table, under a steady load.

The simulator publishes at a given rate. Besides, about every 50 ms, at a random phase, a probe meter publishes a
reading at QoS 1; another connection asks the database, with 1 ms of sleep in between, whether it can be seen. What is
measured is all of it: our publisher, the broker, the daemon, the commit, the look. The first 3 s do not count. Probes
are not held back where the one before has not come yet: a standstill is seen by all that fall into it.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count as numbers
from typing import NamedTuple

import paho.mqtt.client as paho
import psycopg
from paho.mqtt.enums import CallbackAPIVersion
from report import Conditions, Table, arguments, count, parse, progress, publish, rounds_in_turn, spread
from rig import PATIENCE_S, FailedError, Fleet, Rig, Turn, add_fleet, wait_until

AIM_P99_MS = 250
RATES = (333, 5_000)
PROBE_S = 0.05
LOOK_S = 0.001
WARM_UP_S = 3.0
VISIBLE = "SELECT meter_id, ts FROM meter_live WHERE meter_id = ANY(%s)"


class Run(NamedTuple):
    """What one turn came to: messages a second that the simulator really sent, and the milliseconds of each probe."""

    rate: float
    took: list[float]

    def percentile(self, quantile: float) -> float:
        """The smallest value that so large a share of the probes does not exceed."""
        return sorted(self.took)[math.ceil(quantile * len(self.took)) - 1]


Runs = dict[int, list[Run]]


def measure(rig: Rig, seconds: float, fleet: Fleet, rounds: int, rates: tuple[int, ...] = RATES) -> Runs:
    """The runs of each rate, the rates in turn."""
    done: Runs = {rate: [] for rate in rates}
    for number in range(1, rounds + 1):
        for rate in rates:
            with rig.turn() as turn:
                found = under_load(turn, rate, seconds, fleet)
            done[rate].append(found)
            progress(f"round {number} of {rounds}: {rate:,}/s, p99 {found.percentile(0.99):.0f} ms")
    return done


def under_load(turn: Turn, rate: int, seconds: float, fleet: Fleet) -> Run:
    daemon, books = turn.daemon(), turn.books()
    # A second more, so that no probe is sent without load.
    messages = int(rate * (WARM_UP_S + seconds + 1))
    load = turn.load(messages, fleet, rate)
    probes = Probes(turn)
    took = list(probes.run(load.began + WARM_UP_S, load.began + WARM_UP_S + seconds))
    if not load.running():
        raise FailedError(f"the load of {rate}/s ended before the last probe was seen")
    sent = load.finish()["rate"]
    books.wait_for(messages + probes.sent)
    daemon.stop()
    books.check(messages + probes.sent)
    return Run(sent, took)


class Probes:
    """Meters that publish a reading, and a look whether it is there. A meter has one reading under way at most."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._chance = random.Random(1)  # noqa: S311 - moments, no secrets
        self._names = (f"PROBE-{number}" for number in numbers())
        self._free: list[str] = []
        self._waiting: dict[str, tuple[datetime, float]] = {}
        self.sent = 0

    def run(self, since: float, until: float) -> Iterator[float]:
        """Sends probes from now `until` then, and yields the milliseconds of each that was sent after `since`."""
        due = time.monotonic()
        with connected(self._turn) as client, psycopg.connect(self._turn.dsn, autocommit=True) as connection:
            while self._waiting or due < until:
                if due < until and time.monotonic() >= due:
                    self._send(client)
                    due += self._chance.uniform(0.5, 1.5) * PROBE_S
                yield from (took * 1_000 for sent, took in self._look(connection) if sent >= since)
                time.sleep(LOOK_S)

    def _send(self, client: paho.Client) -> None:
        meter = self._free.pop() if self._free else next(self._names)
        moment = datetime.now(UTC)
        moment = moment.replace(microsecond=moment.microsecond // 1_000 * 1_000)
        reading = {"meterId": meter, "kwhConsumedAc": 0.5, "voltage": 230.0, "timestamp": moment.isoformat()}
        self._waiting[meter] = moment, time.monotonic()
        client.publish(f"energy/v1/meter/{meter}/telemetry", json.dumps(reading), qos=1)
        self.sent += 1

    def _look(self, connection: psycopg.Connection) -> Iterator[tuple[float, float]]:
        """When those were sent that can be seen now, and how long that took."""
        if not self._waiting:
            return
        visible = connection.execute(VISIBLE, ([*self._waiting],), prepare=True).fetchall()
        now = time.monotonic()
        for meter, ts in visible:
            moment, sent = self._waiting[meter]
            if ts == moment:
                del self._waiting[meter]
                self._free.append(meter)
                yield sent, now - sent
        if any(now - sent > PATIENCE_S for _, sent in self._waiting.values()):
            raise FailedError(f"not in the live table after {PATIENCE_S:g} s: {', '.join(self._waiting)}")


@contextmanager
def connected(turn: Turn) -> Iterator[paho.Client]:
    """A client with the broker of this turn, whose network runs beside us."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="probes", protocol=paho.MQTTv5)
    client.connect(turn.broker.host, turn.broker.port)
    client.loop_start()
    try:
        wait_until(client.is_connected, "the probes are connected")
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def table(runs: Runs) -> Table:
    rows = []
    for rate, found in runs.items():
        p50, p99 = (spread(run.percentile(quantile) for run in found).format("{:.0f}") for quantile in (0.5, 0.99))
        sent = spread(run.rate for run in found).format("{:,.0f}")
        probes = sum(len(run.took) for run in found)
        longest = max(max(run.took) for run in found)
        rows.append((f"{rate:,}/s", sent, count(probes), p50, p99, f"{longest:.0f}"))
    return Table(("load", "messages/s sent", "probes", "p50, ms", "p99, ms", "max, ms"), rows)


def main() -> None:
    parser = arguments(__doc__, 5)
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of probes at each rate (60)")
    add_fleet(parser)
    conditions, options = Conditions.now(), parse(parser, "latency", seconds=5, meters=500, vehicles=500)
    fleet = Fleet(options.meters, options.vehicles)
    with Rig() as rig:
        runs = measure(rig, options.seconds, fleet, options.rounds)
    method = (
        f"Publish → visible in `meter_live`; aim: p99 ≤ {AIM_P99_MS} ms. {fleet}, QoS 1, {options.seconds:g} s of "
        f"probes at each rate; {rounds_in_turn(options.rounds)}; max is that of all probes."
    )
    publish("latency", [table(runs)], [method], conditions.describe(rig.version, mosquitto=True), options.write)


if __name__ == "__main__":
    main()
