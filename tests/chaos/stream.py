"""Cases 14, 15 and 17: what comes in is garbage, the clock jumps, and time passes."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from math import ceil
from statistics import median
from typing import NamedTuple

import psutil
import psycopg

from tests.chaos.arena import FAULTS, Case, FailedError, Fleet, Outcome, Round
from tests.chaos.clockless import Clockless, recently
from tests.chaos.noise import MARK, noise
from tests.integration.clock import WrongClock
from tests.integration.harness import Daemon, Publisher, ask, meter, now, one, wait_until

# As an operator has them, where the fault is no moment that has to hit a batch.
USUAL_BATCHES = {"batch__max_readings": 5_000, "batch__max_age_ms": 200}
OTHERS = "--allow-other-devices"

# --- 14: the poison storm ----------------------------------------------------------------------------------

# About as much garbage as readings, of every kind that the simulator knows.
STORM = (*FAULTS, "--malformed", "0.7", "--mismatches", "0.1", "--far-past", "0.1", "--far-future", "0.1")
LEAST_GARBAGE = 0.4


def poison_storm(drill: Round) -> Outcome:
    """Garbage at full speed, half of all that comes: each piece becomes the dead letter that it must be, and the good
    ones between are stored. At the same time somebody who knows no contract sends anything to anywhere."""
    drill.daemon(**USUAL_BATCHES)
    sounds = list(noise(drill.chance, drill.size.storm // 20))
    with (
        Publisher(drill.arena.broker, drill.root) as stranger,
        drill.fleet(*STORM, rate=0, messages=drill.size.storm, faults=()),
    ):
        for sound in sounds:
            stranger.send(
                sound.kind, sound.device, sound.payload, channel=sound.channel, content_type=sound.content_type
            )
        stranger.flush()
    expected = {(sound.topic(drill.root), sound.content_type, letter) for sound in sounds for letter in sound.letters}
    query = f"SELECT topic, content_type, payload FROM dead_letter WHERE topic LIKE '%/{MARK}-%'"
    wait_until(lambda: len(ask(drill.dsn, query)) >= len(expected), f"{len(expected)} dead letters of noise")
    outcome = drill.judge(OTHERS)
    if (found := set(ask(drill.dsn, query))) != expected:
        raise FailedError(f"noise: missing {list(expected - found)[:5]}, surplus {list(found - expected)[:5]}")

    ((letters, seconds),) = ask(
        drill.dsn,
        "SELECT count(*), extract(epoch FROM (SELECT max(updated_at) FROM ingest_counter) - min(received_at))::float8 "
        "FROM dead_letter",
    )
    if letters < LEAST_GARBAGE * drill.size.storm:
        raise FailedError(f"only {letters} of {drill.size.storm} messages were garbage")
    drill.figures |= {
        "dead letters": letters,
        "dead letters/s": letters / seconds,
        "readings and dead letters/s": drill.received() / seconds,
    }
    return outcome


# --- 15: the clock -----------------------------------------------------------------------------------------

FORWARD = (timedelta(hours=1), timedelta(days=1))
# Less than what a device's clock may be ahead of ours.
A_LITTLE_BACK = timedelta(minutes=-4)
FAR_BACK = timedelta(hours=-1)
DEVICES = 350
# Pings every 2.5 s; the broker drops whoever is silent for 7.5 s.
KEEP_ALIVE_S = 5
IDLE_S = 0.5
MOST_IDLE_CPU = 0.5
AHEAD_DAYS = 2
REPLAY_LIMITS = "[limits]\nmax_future_s = {seconds}\n"


def clock_jumps(drill: Round) -> Outcome:
    """The clock jumps to an hour and a day ahead and four minutes behind, in any order. Devices have clocks of their
    own, so history is what it would be. Those that have none get ours, and still lose nothing."""
    clock = WrongClock(drill.folder)
    daemon = drill.daemon(
        env=clock.env,
        mqtt__keep_alive_s=KEEP_ALIVE_S,
        maintenance__every_s=0.2,
        maintenance__partitions_ahead_days=AHEAD_DAYS,
    )
    messages = int(drill.size.rate * drill.size.seconds)
    jumps = [*FORWARD, A_LITTLE_BACK, timedelta()]
    drill.chance.shuffle(jumps)
    with drill.fleet("--start", recently(drill, messages, DEVICES)), Clockless(drill) as clockless:
        drill.wait_for_load()
        for jump in jumps:
            drill.pause(most=drill.size.seconds / len(jumps))
            clock.put(jump)
            clockless.wait_for(clock)
    clockless.wait_for_all()
    _check_quiet(drill, daemon, clock)
    clockless.check()
    return drill.judge(OTHERS)


def clock_behind(drill: Round) -> Outcome:
    """The clock is an hour behind for a while: good readings are from the future, and become dead letters. Once it is
    right again a replay brings them back, and what is really from the future stays where it is.

    Without the conflict fault: of two readings with the same time the first stays, and that one may be among the dead
    letters while the second is stored.
    """
    clock = WrongClock(drill.folder)
    daemon = drill.daemon(env=clock.env, mqtt__keep_alive_s=KEEP_ALIVE_S, maintenance__every_s=0.2)
    messages = int(drill.size.rate * drill.size.seconds)
    start = recently(drill, messages, DEVICES)
    with drill.fleet("--start", start, "--conflicts", "0"), Clockless(drill) as clockless:
        drill.wait_for_load()
        drill.pause(most=drill.size.seconds / 3)
        clock.put(FAR_BACK)
        wait_until(lambda: _from_the_future(drill), "readings are taken to be from the future")
        drill.pause(most=drill.size.seconds / 3)
        clock.put(timedelta())
    clockless.wait_for_all()
    clockless.check()
    _check_connected(daemon)
    rejected = _from_the_future(drill)
    limits = drill.folder / "replay.toml"
    limits.write_text(REPLAY_LIMITS.format(seconds=int(-FAR_BACK.total_seconds()) + 300))
    drill.command("dead-letters", "replay", "--reason", "timestamp_in_future", "--config", str(limits))
    if _from_the_future(drill):
        raise FailedError(f"{_from_the_future(drill)} good readings of {rejected} are still dead letters")
    drill.figures["replayed"] = rejected
    return drill.judge(OTHERS)


def _from_the_future(drill: Round) -> int:
    """How many readings have been rejected as of the future that are of no later than today."""
    return int(
        one(
            drill.dsn,
            "SELECT count(*) FROM dead_letter WHERE reason = 'timestamp_in_future' "
            "AND (convert_from(payload, 'UTF8')::jsonb ->> 'timestamp')::timestamptz < now() + '1 hour'",
        )
    )


def _check_quiet(drill: Round, daemon: Daemon, clock: WrongClock) -> None:
    """A clock that is a day ahead or an hour behind while nothing comes: neither watermark nor partitions follow it,
    nobody is busy, and the connections are those of the start. Raises FailedError."""
    clock.put(drill.chance.choice((FORWARD[-1], FAR_BACK)))
    followed = (
        "SELECT late_before >= date_bin('15 minutes', now() - late_after, 'epoch') "
        "FROM rollup_progress, analytics_setting"
    )
    wait_until(lambda: one(drill.dsn, followed), "the watermark has moved on")
    process = psutil.Process(daemon.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(IDLE_S)
    used = (sum(process.cpu_times()[:2]) - before) / IDLE_S
    if used > MOST_IDLE_CPU:
        raise FailedError(f"{used:.0%} of a core for nothing")
    if one(drill.dsn, "SELECT late_before > now() FROM rollup_progress"):
        raise FailedError(f"late_before is {one(drill.dsn, 'SELECT late_before FROM rollup_progress')}")
    last = one(drill.dsn, "SELECT max(day) - (now() AT TIME ZONE 'UTC')::date FROM history_days('-infinity') AS day")
    if last > AHEAD_DAYS:
        raise FailedError(f"there is a partition for {last} days ahead")
    _check_connected(daemon)


def _check_connected(daemon: Daemon) -> None:
    """Raises FailedError unless nothing was connected anew, and nothing gave reason to complain."""
    connected = [len(daemon.events(name)) for name in ("mqtt.connected", "database.connected")]
    complaints = [event for event in daemon.events() if event["level"] not in ("debug", "info")]
    if connected != [1, 1] or complaints:
        raise FailedError(f"connected {connected} times, and said {complaints[:3]}")


# --- 17: the soak ------------------------------------------------------------------------------------------

# So many that their time does not catch up with the clock: 23 hours at 6,000 devices a minute are 8 million messages.
SOAK_FLEET = ("--meters", "3000", "--vehicles", "3000")
PROBE = "PROBE-1"
PROBE_SEEN = "SELECT 1 FROM meter_live WHERE meter_id = %s AND ts = %s"
EVERY_S = 1.0
WARM_UP = 0.2
MOST_GROWTH = 1.2
MOST_GROWTH_BYTES = 20 * 1024 * 1024
MOST_MORE = 2
MOST_MORE_LATENCY = 3.0
LATENCY_LEEWAY_S = 0.2
# Millions of readings, and their analytics.
VERDICT_S = 900.0
MB = 1024 * 1024


class Sample(NamedTuple):
    """How the daemon is, and how long a reading takes from the publisher into the live table."""

    rss: int
    files: int
    threads: int
    latency_s: float


class Third(NamedTuple):
    """Samples summed up."""

    rss: float
    files: float
    threads: float
    p99_s: float


def soak(drill: Round) -> Outcome:
    """Nothing but load and the faults of devices, for long: what grows, grows here."""
    daemon = drill.daemon(**USUAL_BATCHES, log__report_every_s=1.0)
    rate, seconds = drill.size.soak_rate, drill.size.soak_s
    with drill.fleet(*SOAK_FLEET, rate=rate, messages=int(rate * seconds)) as fleet:
        drill.wait_for_load()
        samples = list(_samples(drill, daemon, fleet))
    kept = samples[ceil(len(samples) * WARM_UP) :]
    first, last = _third(kept[: len(kept) // 3]), _third(kept[-(len(kept) // 3) :])
    drill.figures |= {
        "samples": len(samples),
        "RSS MB": last.rss / MB,
        "RSS growth MB": (last.rss - first.rss) / MB,
        "files": last.files,
        "p99 s": last.p99_s,
        "p99 s at first": first.p99_s,
        "slowest commit s": max(said["slowest_commit_ms"] for said in daemon.events("daemon.progress")) / 1_000,
    }
    if complaints := list(_complaints(first, last)):
        raise FailedError("; ".join(complaints))
    return drill.judge(OTHERS, patience_s=VERDICT_S)


def _samples(drill: Round, daemon: Daemon, fleet: Fleet) -> Iterator[Sample]:
    """A sample a second while the fleet publishes."""
    process = psutil.Process(daemon.pid)
    with (
        Publisher(drill.arena.broker, drill.root) as publisher,
        psycopg.connect(drill.dsn, autocommit=True) as looking,
    ):
        while fleet.running:
            began = time.monotonic()
            moment = now()
            publisher.send("meter", PROBE, meter(PROBE, moment))
            wait_until(lambda at=moment: looking.execute(PROBE_SEEN, (PROBE, at)).fetchone(), "the probe is live")
            latency_s = time.monotonic() - began
            with process.oneshot():
                yield Sample(process.memory_info().rss, process.num_fds(), process.num_threads(), latency_s)
            time.sleep(max(0.0, began + EVERY_S - time.monotonic()))
        publisher.flush()


def _third(samples: Sequence[Sample]) -> Third:
    """Medians of what is there, and the latency that only one of a hundred exceeds."""
    latencies = sorted(sample.latency_s for sample in samples)
    return Third(
        rss=median(sample.rss for sample in samples),
        files=median(sample.files for sample in samples),
        threads=median(sample.threads for sample in samples),
        p99_s=latencies[ceil(len(latencies) * 0.99) - 1],
    )


def _complaints(first: Third, last: Third) -> Iterator[str]:
    """What is not as flat as it must be."""
    if last.rss > min(first.rss * MOST_GROWTH, first.rss + MOST_GROWTH_BYTES):
        yield f"memory grew from {first.rss / MB:.1f} MB to {last.rss / MB:.1f} MB"
    if last.files > first.files + MOST_MORE:
        yield f"open files grew from {first.files:g} to {last.files:g}"
    if last.threads > first.threads + MOST_MORE:
        yield f"threads grew from {first.threads:g} to {last.threads:g}"
    if last.p99_s > first.p99_s * MOST_MORE_LATENCY + LATENCY_LEEWAY_S:
        yield f"99 % of readings were live after {last.p99_s:.2f} s, and {first.p99_s:.2f} s at first"


CASES = [
    Case("14", "poison storm: half garbage, at full speed", poison_storm),
    Case("15a", "the daemon's clock jumps: an hour or a day ahead, 4 minutes behind", clock_jumps),
    Case("15b", "the daemon's clock is an hour behind for a while, then replay", clock_behind),
    Case("17", "soak: steady load with every fault of the devices", soak, alone=True, times=1),
]
