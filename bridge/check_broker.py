"""What `wattbridge check` finds out about the broker, above all: which of its settings would lose messages."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from bridge.config import Config, Mqtt
from bridge.errors import Rejection
from bridge.messages import printable
from bridge.probe import (
    DROPPED,
    UPTIME,
    VERSION,
    VISIT_ERRORS,
    ForeignSessionError,
    Kept,
    Probe,
    Resumed,
    Traffic,
    Welcome,
    check_id,
)
from bridge.topics import Channel

MINUTE, HOUR, DAY = 60, 3_600, 86_400
FOR_EVER_S = 0xFFFF_FFFF
# A message to try the queue with: as large as those that were seen, within these bounds.
USUAL_SIZE, SMALLEST, LARGEST = 128, 8, 4_096
LIMITS = "Mosquitto: max_queued_messages, 1,000 unless set, and max_queued_bytes"
CANNOT_BE_SEEN = (
    "cannot be seen over MQTT: whether queues survive a restart of the broker (Mosquitto: persistence true; "
    "autosave_interval, 1,800 s unless set, is what a crash may cost), and whether it ends our session earlier than "
    "it says (Mosquitto: persistent_client_expiration)"
)

Seen = TypeVar("Seen")


class Finding(NamedTuple):
    """One line of the report; `fine` is None for what is only worth knowing."""

    what: str
    fine: bool | None
    said: str


class Effort(NamedTuple):
    """How long to listen to the telemetry, and with how many messages to try the queue; 0: not at all."""

    listen_s: float = 3.0
    messages: int = 1_500


class Unseen(NamedTuple):
    """Something that could not be observed."""

    why: str


async def findings(config: Config, effort: Effort, say: Callable[[str], None]) -> list[Finding]:
    """Looks at the broker as a client of its own: the session of a running daemon is left alone.

    `say` is told what is going on. Raises ConfigError where the TLS files are of no use.
    """
    probe = Probe(config.mqtt, own_status(config))
    try:
        return await _findings(probe, config, effort, say)
    finally:
        await probe.tidy()


async def _findings(probe: Probe, config: Config, effort: Effort, say: Callable[[str], None]) -> list[Finding]:
    mqtt = config.mqtt
    topics = config.topics.topics()
    telemetry, statuses = topics.filters(Channel.TELEMETRY), topics.filters(Channel.STATUS)
    place = f"{mqtt.host}:{mqtt.port}, {'TLS' if mqtt.tls.enabled else 'plain TCP'}"
    say("connecting to the broker")
    try:
        welcome = await probe.enter(telemetry, statuses)
    except ForeignSessionError:
        return [Finding("broker", True, f"{place}, MQTT 5"), _foreign(mqtt)]
    except VISIT_ERRORS as error:
        return [Finding("broker", False, f"{place}: {error}")]
    server = await _try(probe.server())
    found = [
        Finding("broker", True, f"{place}, MQTT 5{introduction(server)}"),
        Finding("subscriptions", True, f"granted at QoS 1: {', '.join(telemetry + statuses)}"),
        *_offers(welcome, mqtt),
    ]
    if not mqtt.session_expiry_s:
        said = "mqtt.session_expiry_s is 0: what is published while the daemon is away is lost"
        return [*found, Finding("session", False, said)]
    found.append(judge_session(mqtt.session_expiry_s, await _try(probe.resume())))
    say(f"listening to the fleet for {span(effort.listen_s)}")
    traffic = await _listen(probe, telemetry + statuses, effort)
    say(f"trying the queue with {effort.messages:,} messages")
    kept = await _queue(probe, config, effort, traffic)
    return [
        *found,
        judge_queue(kept),
        judge_outage(traffic, kept, shared=bool(mqtt.share_group)),
        judge_dropped(server),
        Finding("restart", None, CANNOT_BE_SEEN),
    ]


def own_status(config: Config) -> str:
    """The topic that only the check uses: as the bridge's own status, but with the check's client id."""
    return config.topics.bridge_status.replace("{client_id}", check_id(config.mqtt))


async def _try(looking: Awaitable[Seen]) -> Seen | Unseen:
    try:
        return await looking
    except VISIT_ERRORS as error:
        return Unseen(printable(str(error) or type(error).__name__))


async def _listen(probe: Probe, patterns: list[str], effort: Effort) -> Traffic | Unseen:
    return await _try(probe.listen(patterns, effort.listen_s)) if effort.listen_s else Unseen("--listen 0")


async def _queue(probe: Probe, config: Config, effort: Effort, traffic: Traffic | Unseen) -> Kept | Unseen:
    if not effort.messages:
        return Unseen("--messages 0")
    if not _is_ours_alone(config):
        return Unseen("topics.bridge_status is no topic of one bridge alone, such as …/bridge/{client_id}/status")
    size = USUAL_SIZE
    if isinstance(traffic, Traffic) and traffic.messages:
        size = min(max(round(traffic.size / traffic.messages), SMALLEST), LARGEST)
    return await _try(probe.queue(effort.messages, size))


def _is_ours_alone(config: Config) -> bool:
    """Whether neither the daemon nor a device uses the check's topic: then it may be filled with messages."""
    try:
        config.topics.topics().parse(own_status(config))
    except Rejection:
        return "{client_id}" in config.topics.bridge_status
    return False


def _foreign(mqtt: Mqtt) -> Finding:
    return Finding(
        "session",
        None,
        f"not tried: the broker has a session for {check_id(mqtt)} already, which was left as it is. It is of a check "
        "that was killed less than ten minutes ago, or the daemon's, because the broker gives its clients other ids "
        "(Mosquitto: use_username_as_clientid)",
    )


def _offers(welcome: Welcome, mqtt: Mqtt) -> list[Finding]:
    """What the broker says that it can do."""
    found = [
        Finding(
            "shared subscriptions", welcome.shared_subscriptions or not mqtt.share_group, mqtt.share_group or "not used"
        )
    ]
    if not welcome.retains:
        said = "the broker keeps none: it will refuse the daemon, whose status and last will are retained"
        found.append(Finding("retained messages", False, said))
    return found


def introduction(server: dict[str, str] | Unseen) -> str:
    """What the broker tells of its version and age, to be put behind its place."""
    if isinstance(server, Unseen):
        return ""
    version = printable(server.get(VERSION, ""), 80)
    uptime = _number(server.get(UPTIME))
    return (f", {version}" if version else "") + (f", up for {span(uptime)}" if uptime is not None else "")


def judge_session(asked_s: int, resumed: Resumed | Unseen) -> Finding:
    """Whether the broker keeps a session as long as it was asked to."""
    if isinstance(resumed, Unseen):
        return Finding("session", None, f"could not be observed: {resumed.why}")
    if not resumed.present:
        said = "the broker forgot it at once: what is published while the daemon is away is lost"
        return Finding("session", False, said)
    if resumed.granted_s < asked_s:
        said = (
            f"the broker keeps it for {span(resumed.granted_s)} at most, mqtt.session_expiry_s asks for "
            f"{span(asked_s)}: what is published in a longer absence is lost; bring the two together"
        )
        return Finding("session", False, said)
    return Finding("session", True, f"kept for {span(asked_s)} while the daemon is away; found again after a moment")


def judge_queue(kept: Kept | Unseen) -> Finding:
    """Whether the broker kept everything for a session that was away."""
    if isinstance(kept, Unseen):
        return Finding("queue", None, f"could not be observed: {kept.why}. It has a limit ({LIMITS})")
    tried = f"{kept.published:,} messages of {kept.size:,} bytes for a session that was away"
    if kept.kept == kept.published:
        return Finding("queue", True, f"the broker kept all of {tried}; more were not tried (--messages)")
    refused = "".join(f"; it refused {number:,}: {printable(said)}" for said, number in kept.refusals.items())
    return Finding("queue", False, f"the broker kept {kept.kept:,} of {tried}{refused}: raise its limit ({LIMITS})")


def judge_outage(traffic: Traffic | Unseen, kept: Kept | Unseen, *, shared: bool = False) -> Finding:
    """How long an absence of the daemon the queue survives, at the rate that was seen."""
    if isinstance(traffic, Unseen):
        return Finding("outage", None, f"the rate could not be observed: {traffic.why}")
    if not traffic.messages:
        said = f"no message came within {span(traffic.seconds)}: nothing to compute with (--listen 60s listens longer)"
        return Finding("outage", None, said)
    rate, size = traffic.messages / traffic.seconds, traffic.size / traffic.messages
    said = f"{_figure(rate)} messages/s of {size:,.0f} bytes came for {span(traffic.seconds)}"
    said += ", for all daemons of the group together" if shared else ""
    if isinstance(kept, Kept):
        more = ", and how many more are kept was not tried" if kept.kept == kept.published else ""
        said += f": {kept.kept:,} queued messages last {span(kept.kept / rate)}{more}"
    needed = rate * HOUR
    said += f"; an hour away needs {_figure(needed)} of them, {_bytes(needed * size)} of payload"
    return Finding("outage", None, said)


def judge_dropped(server: dict[str, str] | Unseen) -> Finding:
    """Whether the broker has dropped messages already."""
    if not isinstance(server, Unseen) and "mosquitto" in server.get(VERSION, "") and DROPPED not in server:
        # Seen with 2.0.11, which publishes $SYS values when they change, and retains them for 60 s.
        said = "it tells of none within the last minute (Mosquitto forgets the number a minute after it changed)"
        return Finding("dropped", None, said)
    if isinstance(server, Unseen) or (dropped := _number(server.get(DROPPED))) is None:
        why = f" ({server.why})" if isinstance(server, Unseen) else ""
        return Finding("dropped", None, f"could not be observed: the broker does not tell us {DROPPED}{why}")
    uptime = _number(server.get(UPTIME))
    since = "since its start" + (f" {span(uptime)} ago" if uptime is not None else "")
    if not dropped:
        return Finding("dropped", True, f"the broker has dropped no message {since}")
    said = f"the broker has dropped {dropped:,} messages {since}, of whichever client, also of a check like this one"
    return Finding("dropped", None, said)


def span(seconds: float) -> str:
    """A length of time for people, in the largest unit of which there are two."""
    if seconds == FOR_EVER_S:
        return "ever"
    for unit, length in (("days", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * length:
            return f"{_figure(seconds / length)} {unit}"
    return f"{_figure(seconds)} s"


def _figure(number: float) -> str:
    """Two digits that count, or all before the point where there are few."""
    if number >= 10_000:  # noqa: PLR2004
        magnitude = len(str(int(number))) - 2
        return f"{round(number, -magnitude):,.0f}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"  # noqa: PLR2004


def _bytes(size: float) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{_figure(size / length)} {unit}"
    return f"{_figure(size / 1e3)} kB"


def _number(said: str | None) -> int | None:
    """The number with which a text begins, such as `11 seconds`."""
    first = (said or "").partition(" ")[0]
    return int(first) if first.isascii() and first.isdigit() else None
