"""How fast messages go from the devices into the database, against what the broker delivers to who throws them away.

One side is the daemon: from the moment the simulator begins to publish flat out at QoS 1 until the last reading is
committed in history and live tables. The other is `mosquitto_sub -q 1` alone, under the same load from the same
simulator: until it has received the last message. Both are connected before the load begins, with a persistent
session and a window (receive maximum) of 20,000. Each turn has a Mosquitto and a database of its own.
"""

import time
from typing import NamedTuple

from report import (
    Conditions,
    Side,
    Spread,
    Table,
    arguments,
    count,
    cpu_row,
    parse,
    progress,
    publish,
    rate_row,
    ratios,
    rounds_in_turn,
    spread,
)
from rig import SMALL, WINDOW, Fleet, Rig, Turn, add_load, find_mosquitto_sub, usage

AIM_RATIO = 0.9
AIM_CPU_US = 8.0
PROCESSES = ("daemon", "PostgreSQL", "Mosquitto", "simulator", "mosquitto_sub")


class Round(NamedTuple):
    bridge: Side
    alone: Side


def measure(rig: Rig, messages: int, fleet: Fleet, rounds: int) -> list[Round]:
    find_mosquitto_sub()  # it is missed now, rather than after the first turn
    done = []
    for number in range(1, rounds + 1):
        with rig.turn() as turn:
            bridge = through_the_bridge(turn, messages, fleet)
        with rig.turn() as turn:
            alone = to_mosquitto_sub(turn, messages, fleet)
        done.append(Round(bridge, alone))
        progress(f"round {number} of {rounds}: bridge {bridge.rate:,.0f}/s, mosquitto_sub {alone.rate:,.0f}/s")
    return done


def through_the_bridge(turn: Turn, messages: int, fleet: Fleet) -> Side:
    daemon, books = turn.daemon(), turn.books()
    load = turn.load(messages, fleet)
    used = usage(
        {"daemon": daemon.cpu, "PostgreSQL": turn.postgres_cpu, "Mosquitto": turn.broker_cpu, "simulator": load.cpu}
    )
    seconds = books.wait_for(messages, load.cpu)[-1].at - load.began
    cpu = used()
    load.finish()
    daemon.stop()
    books.check(messages)
    return Side(messages, seconds, cpu)


def to_mosquitto_sub(turn: Turn, messages: int, fleet: Fleet) -> Side:
    subscriber = turn.subscriber(messages)
    load = turn.load(messages, fleet)
    used = usage({"mosquitto_sub": subscriber.cpu, "Mosquitto": turn.broker_cpu, "simulator": load.cpu})

    def beside() -> None:
        subscriber.cpu()
        load.cpu()

    seconds = subscriber.wait(beside, patience_s=60 + messages / 1_000) - load.began
    cpu = used()
    load.finish()
    return Side(messages, seconds, cpu)


def tables(rounds: list[Round]) -> list[Table]:
    sides = ("bridge, committed", [r.bridge for r in rounds]), ("mosquitto_sub alone", [r.alone for r in rounds])
    return [
        Table(("side", "messages", "seconds", "messages/s"), [rate_row(name, done) for name, done in sides]),
        Table(("CPU, µs a message", *PROCESSES), [cpu_row(name, done, PROCESSES) for name, done in sides]),
    ]


def ratio(rounds: list[Round]) -> Spread:
    return ratios(rounds, lambda found: found.bridge.rate, lambda found: found.alone.rate)


def main() -> None:
    parser = arguments(__doc__, 5)
    add_load(parser, messages=400_000)
    conditions, options = Conditions.now(), parse(parser, "end_to_end", **SMALL)
    fleet = Fleet(options.meters, options.vehicles)
    began = time.monotonic()
    with Rig() as rig:
        rounds = measure(rig, options.messages, fleet, options.rounds)
    daemon = spread(found.bridge.us("daemon") for found in rounds).format("{:.1f}")
    result = (
        f"Ratio of the rates, bridge : mosquitto_sub: **{ratio(rounds)}** (aim ≥ {AIM_RATIO}). The daemon uses "
        f"**{daemon} µs** of CPU a message (aim ≤ {AIM_CPU_US:g} µs)."
    )
    method = (
        f"{fleet}, QoS 1; {rounds_in_turn(len(rounds))}; the ratio is taken within each round. Both sides have a "
        f"receive maximum of {count(WINDOW)}. All processes share the cores. {time.monotonic() - began:.0f} s in all."
    )
    publish(
        "end_to_end", tables(rounds), [result, method], conditions.describe(rig.version, mosquitto=True), options.write
    )


if __name__ == "__main__":
    main()
