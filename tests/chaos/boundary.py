"""What a killed Mosquitto loses, by its settings. Unheard is what it took while it knew of no subscriber.

`python -m tests.chaos.boundary` prints the table, in about half an hour. It stands in docs/reliability.md. The drill
has two of these rows as cases 9a and 9b.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from tests.chaos.arena import DRILL, Arena, Outcome, Round
from tests.chaos.network import NO_CONFLICTS, judge_loss, save_session
from tests.integration.harness import wait_until

AFTER_S = 2.0
"""The fleet goes on for so long after the backlog is there; meanwhile the broker is killed."""
BUILDING_S = 300.0
"""The longest that a backlog may take."""
ACKNOWLEDGED = 1
"""In the map of answers beside the ledger, a byte for each message."""
FIGURES = ("rate", "taken", "unheard")
COLUMNS = (
    "Mosquitto", "daemon", "offered/s", "taken/s", "taken when killed", "of all, lost: median", "most", "unheard"
)  # fmt: skip


class Setting(NamedTuple):
    """How the broker is configured; `saved`: whether it has written to disk since the daemon first connected.

    `backlogs` are messages that wait in it for a daemon that is away; 0: the daemon is there and keeps up.
    """

    name: str
    config: str
    saved: bool = True
    backlogs: tuple[int, ...] = (0, 4_000, 40_000)
    rate: int = 4_000


SETTINGS = (
    Setting("`persistence false`", "persistence false", saved=False, backlogs=(0, 4_000)),
    Setting("`autosave_interval 300`, not saved yet", "", saved=False, backlogs=(0, 4_000)),
    Setting("`autosave_interval 300`", ""),
    Setting("`autosave_interval 1`", "autosave_interval 1"),
    Setting("`autosave_on_changes true`, `autosave_interval 1000`", "autosave_on_changes true\nautosave_interval 1000"),
    # It takes no more: the whole backlog is written for each change.
    Setting(
        "`autosave_on_changes true`, `autosave_interval 1`",
        "autosave_on_changes true\nautosave_interval 1",
        backlogs=(0, 400),
        rate=50,
    ),
)


def kill(drill: Round, setting: Setting, backlog: int) -> Outcome:
    """One kill of the broker, at a random moment under load."""
    daemon = drill.daemon()
    if setting.saved:
        save_session(drill)
    if backlog:
        daemon.terminate()
    before = backlog or setting.rate
    with drill.fleet(rate=setting.rate, messages=before + int(setting.rate * AFTER_S), faults=NO_CONFLICTS):
        wait_until(lambda: _taken(drill), "the fleet publishes")
        began, first = time.monotonic(), _taken(drill)
        wait_until(lambda: _taken(drill) >= before, f"{before} messages are taken", BUILDING_S)
        drill.figures["rate"] = (_taken(drill) - first) / (time.monotonic() - began)
        drill.pause(most=AFTER_S / 2)
        drill.arena.broker.kill()
        drill.figures["taken"] = _taken(drill)
        drill.arena.broker.start()
        if backlog:
            daemon.start()
    daemon.wait_for_events("mqtt.connected", 1 if backlog else 2)
    *_, summary = (drill.folder / "fleet.log").read_text().splitlines()
    drill.figures["unheard"] = json.loads(summary)["unheard"]
    return judge_loss(drill)


def _taken(drill: Round) -> int:
    """How many messages the broker has acknowledged, with a subscriber."""
    answers = drill.ledger.with_name(f"{drill.ledger.name}.acks")
    return answers.read_bytes().count(ACKNOWLEDGED) if answers.exists() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each setting and backlog as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.boundary", description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="kills for each line (default %(default)s)")
    parser.add_argument("--seed", default=secrets.token_hex(3), help="decides the moments; default: a random one")
    options = parser.parse_args(arguments)
    _say(f"{options.times} kills a line, seed {options.seed}\n")
    _say(f"| {' | '.join(COLUMNS)} |\n|---|---|{'--:|' * (len(COLUMNS) - 2)}")
    for setting in SETTINGS:
        with Arena(broker=setting.config) as arena, tempfile.TemporaryDirectory() as folder:
            for backlog in setting.backlogs:
                outcomes = []
                for number in range(options.times):
                    place = Path(folder) / f"{backlog}-{number}"
                    place.mkdir()
                    chance = Random(f"{options.seed}/{setting.name}/{backlog}/{number}")
                    with arena.database() as database, Round(arena, DRILL, chance, database, place) as drill:
                        outcomes.append(kill(drill, setting, backlog))
                _say(_line(setting, backlog, outcomes))
    return 0


def _line(setting: Setting, backlog: int, outcomes: Sequence[Outcome]) -> str:
    rate, taken, unheard = (median(outcome.figures[name] for outcome in outcomes) for name in FIGURES)
    lost = [outcome.lost for outcome in outcomes]
    numbers = (setting.rate, rate, taken, median(lost), max(lost), unheard)
    cells = (setting.name, "away" if backlog else "keeps up", *(f"{number:,.0f}" for number in numbers))
    return f"| {' | '.join(cells)} |"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is the output


if __name__ == "__main__":
    sys.exit(main())
