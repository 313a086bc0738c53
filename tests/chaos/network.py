"""Cases 7 and 9 to 11: the network to the broker, a killed broker, two daemons together or against each other."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from bridge.errors import ExitCode
from tests.chaos.arena import PATIENCE_S, VERDICT, Case, FailedError, Outcome, Round
from tests.chaos.wire import Slowness, Way, Wire
from tests.integration.harness import Daemon, Publisher, one, wait_until

# The shortest there is. A ping is due every half of it, and missed half of it later.
KEEP_ALIVE_S = 5
CUTS = 3
# Where less is on the way than was to go through before the cut, it is cut after so long.
BURNING_S = 1.0
# Slower than the load, so that pings and their answers queue up behind readings.
SLOW = Slowness(rate=200_000, jitter_s=0.05)
SLOW_S = 4.0
# Two daemons in one group may commit a conflict before the reading that it contradicts, and a killed broker may forget
# that reading: then the conflict is what is stored, rightly. The ledger cannot know, so there is none.
NO_CONFLICTS = ("--all-faults", "--conflicts", "0")
GROUP = "drill"
# Says on its status topic that it is there, which `verify` does not ask for.
LAST = "LAST"
# About as long as the pauses between five takeovers are together.
TAKEOVERS_S = 6
# So many takeovers in a row end a daemon; each has made as many connections, and the winner one more.
MOST_CONNECTIONS = 12

LIVE = """
SELECT count(*) FROM {kind}_live AS live
FULL JOIN (SELECT DISTINCT ON ({kind}_id) * FROM {kind}_history ORDER BY {kind}_id, ts DESC) AS newest USING ({kind}_id)
WHERE (live.ts, {live}) IS DISTINCT FROM (newest.ts, {newest})
"""
VALUES = {"meter": ("kwh_ac", "voltage"), "vehicle": ("kwh_dc", "soc", "battery_temp", "meter_id")}


# --- 7: the network to the broker ----------------------------------------------------------------------------


def line_cut(drill: Round) -> Outcome:
    """Cut off several times, with RST or FIN, wherever in a packet: of readings, or of acknowledgements.

    Fewer than five times: hung up on so often in a row, each time soon, a daemon takes it for a rival of its name.
    """
    with Wire(drill.arena.broker, drill.chance) as wire:
        daemon = drill.daemon(broker=wire)
        with drill.fleet(seconds=drill.size.seconds + CUTS / 2):
            drill.wait_for_load()
            for number in range(1, CUTS + 1):
                drill.pause(most=0.3)
                way = drill.chance.choice(list(Way))
                size = drill.chance.randrange(1, {Way.TO_DAEMON: 50_000, Way.TO_BROKER: 1_000}[way])
                reset = drill.chance.random() < 0.5
                wire.cut_after(size, way, reset=reset)
                if not wire.was_cut.wait(BURNING_S):
                    wire.cut(reset=reset)
                with _back(drill, time.time()):
                    daemon.wait_for_events("mqtt.connected", number + 1)
        return drill.judge()


def line_dead(drill: Round) -> Outcome:
    """Half open: what is sent arrives nowhere, and neither end is told. Only a ping without an answer shows it.

    Takes as long as that. The broker has not noticed when we come back, so the session is taken over.
    """
    with Wire(drill.arena.broker, drill.chance) as wire:
        daemon = drill.daemon(broker=wire, mqtt__keep_alive_s=KEEP_ALIVE_S)
        with drill.load(rate=drill.size.rate // 2, seconds=drill.size.seconds + KEEP_ALIVE_S):
            began = time.time()
            wire.go_silent()
            noticed = daemon.wait_for_event("mqtt.waiting")
            if "did not answer a ping" not in noticed["reason"]:
                raise FailedError(f"it was not the ping that showed it: {noticed}")
            drill.figures["noticed s"] = _moment(noticed) - began
            drill.pause(most=0.5)
            with _back(drill, time.time()):
                wire.heal()
                daemon.wait_for_events("mqtt.connected", 2)
        if f"Client {daemon.client_id} already connected" not in _said_by_broker(drill):
            raise FailedError("the broker knew that the old connection was dead: no session was taken over")
        return drill.judge()


def line_slow(drill: Round) -> Outcome:
    """Too slow for the load, and cut once meanwhile: what arrives late is no reason to hang up."""
    with Wire(drill.arena.broker, drill.chance) as wire:
        daemon = drill.daemon(broker=wire, mqtt__keep_alive_s=KEEP_ALIVE_S, mqtt__connect_timeout_s=2)
        with drill.load(most=drill.size.seconds / 4):
            wire.slow_down(SLOW)
            drill.pause(most=SLOW_S / 2)
            wire.cut_after(drill.chance.randrange(1, 10_000), Way.TO_DAEMON, reset=True)
            time.sleep(SLOW_S)
            with drill.recovery():
                wire.slow_down(None)
        outcome = drill.judge()
        waited = daemon.events("mqtt.waiting")
        if len(waited) != 1:
            raise FailedError(f"cut once, but waited for the broker {len(waited)} times: {waited}")
    return outcome


# --- 9: the broker is killed ---------------------------------------------------------------------------------


def broker_killed(drill: Round) -> Outcome:
    """SIGKILL while the daemon keeps up. The session is on disk already, what came since then is not."""
    daemon = drill.daemon()
    save_session(drill)
    with drill.load(faults=NO_CONFLICTS):
        drill.arena.broker.kill()
        drill.pause(most=0.5)
        with drill.recovery():
            drill.arena.broker.start()
    daemon.wait_for_events("mqtt.connected", 2)
    return judge_loss(drill)


def broker_killed_with_backlog(drill: Round) -> Outcome:
    """SIGKILL while the daemon is away: all that has come since is with the broker alone."""
    daemon = drill.daemon()
    save_session(drill)
    with drill.load(faults=NO_CONFLICTS, most=drill.size.seconds / 4):
        daemon.terminate()
        drill.pause(most=drill.size.seconds / 2)
        drill.arena.broker.kill()
        drill.arena.broker.start()
        with drill.recovery():
            daemon.start()
    return judge_loss(drill)


def save_session(drill: Round) -> None:
    """Lets the broker write what it knows to disk, as it has done long ago where it has run for days."""
    saved = drill.arena.broker.directory / "mosquitto.db"
    before = saved.stat().st_mtime_ns if saved.exists() else 0
    drill.arena.broker.kill(signal.SIGUSR1)
    wait_until(lambda: saved.exists() and saved.stat().st_mtime_ns > before, "the broker has saved its sessions")


def judge_loss(drill: Round) -> Outcome:
    """What the broker had accepted and not written to disk is its loss: counted here, and no failure.

    All else must be right: nothing twice, nothing with other values, the counters true, live rows the newest there are.
    The daemon is subscribed again when this is called.
    """
    _wait_for_the_last(drill)
    outcome = drill.verdict(wait="0s")
    said = json.loads((drill.folder / VERDICT).read_text())
    rows = {check["check"]: check["counts"] for check in said["checks"]}
    wrong = sum(rows[name].get("altered", 0) for name in ("meter history", "vehicle history", "dead letters"))
    for kind, values in VALUES.items():
        live, newest = (", ".join(f"{side}.{value}" for value in values) for side in ("live", "newest"))
        wrong += one(drill.dsn, LIVE.format(kind=kind, live=live, newest=newest))
    outcome = outcome._replace(wrong=wrong)
    if outcome.duplicated or outcome.wrong:
        raise FailedError(f"more than lost: {outcome}; see {drill.folder / VERDICT}")
    drill.close_books()
    return outcome


# --- 10 and 11: two daemons ----------------------------------------------------------------------------------


def one_of_two_killed(drill: Round) -> Outcome:
    """SIGKILL of one member of a group: the other goes on, and what was dealt to the dead one waits for it."""
    return _one_of_two(drill, Daemon.kill)


def one_of_two_terminated(drill: Round) -> Outcome:
    """SIGTERM of one member: its session stays in the group, too."""

    def terminate(daemon: Daemon) -> None:
        if (code := daemon.terminate()) != 0:
            raise FailedError(f"a daemon ended with {code}:\n{daemon.log[-2_000:]}")

    return _one_of_two(drill, terminate)


def _one_of_two(drill: Round, end: Callable[[Daemon], object]) -> Outcome:
    first, _ = (drill.daemon(mqtt__share_group=GROUP) for _ in range(2))
    with drill.load(faults=NO_CONFLICTS):
        end(first)
        with drill.recovery():
            pass
        drill.pause(most=drill.size.seconds / 4)
        first.start()
    return drill.judge()


def same_name(drill: Round) -> Outcome:
    """Two daemons with one client id: after a few takeovers one of them ends and says why, the other goes on.

    They share the counters of one instance, so each counts what it has committed and finds what the other has as well.
    Over both the counters are true, and `verify` asks for that; the books of one alone do not balance.
    """
    first = drill.daemon()
    with drill.load(rate=drill.size.rate // 2, seconds=drill.size.seconds + TAKEOVERS_S, most=drill.size.seconds / 4):
        second = drill.daemon(client_id=first.client_id, ready=False)
        both = {first, second}
        ended = wait_until(lambda: {daemon for daemon in both if not daemon.running}, "one of them has ended")
        with drill.recovery():
            (loser,) = ended
            code = loser.wait()
        (winner,) = both - ended
    if code != ExitCode.REFUSED or "mqtt.client_id" not in loser.log:
        raise FailedError(f"the loser ended with {code}:\n{loser.log[-2_000:]}")
    outcome = drill.verdict()
    if outcome.lost or outcome.duplicated or outcome.wrong:
        raise FailedError(f"no clean verdict: {outcome}; see {drill.folder / VERDICT}")
    connections = sum(len(daemon.events("mqtt.connected")) for daemon in both)
    drill.figures["connections"] = connections
    if connections > MOST_CONNECTIONS:
        raise FailedError(f"{connections} connections until one of them gave way")
    if (code := winner.terminate()) != 0:
        raise FailedError(f"the winner ended with {code}:\n{winner.log[-2_000:]}")
    return outcome


@contextmanager
def _back(drill: Round, began: float) -> Iterator[None]:
    """Waits in the block until the daemon is connected again; takes the time from `began` to its first commit then.

    What it commits before that came over the old connection, and shows nothing. The longest of several counts.
    """
    before = drill.recovered_s or 0.0
    yield
    away = time.time() - began
    with drill.recovery():
        pass
    if drill.recovered_s is not None:
        drill.recovered_s = max(before, away + drill.recovered_s)


def _wait_for_the_last(drill: Round) -> None:
    """Waits until a message that is sent now has come: by then all has that was sent before, and was not lost."""
    with Publisher(drill.arena.broker, drill.root) as device:
        device.send("meter", LAST, b"online", channel="status")
        device.flush()
    said = "SELECT count(*) FROM device_presence WHERE device_id = %s"
    wait_until(lambda: one(drill.dsn, said, LAST), "the last message has come", PATIENCE_S)


def _moment(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def _said_by_broker(drill: Round) -> str:
    return (drill.arena.broker.directory / "server.log").read_text()


CASES = [
    Case("7a", "network to the broker: cut several times", line_cut),
    Case("7b", "network to the broker: half open", line_dead),
    Case("7c", "network to the broker: slow", line_slow),
    Case("9a", "Mosquitto: SIGKILL, the daemon keeps up", broker_killed),
    Case(
        "9b",
        "Mosquitto: SIGKILL with a backlog, saved every 1,000 changes",
        broker_killed_with_backlog,
        broker="autosave_on_changes true\nautosave_interval 1000",
    ),
    Case("10a", "two daemons in one group: SIGKILL of one", one_of_two_killed),
    Case("10b", "two daemons in one group: SIGTERM of one", one_of_two_terminated),
    Case("11", "two daemons with the same client id", same_name),
]
