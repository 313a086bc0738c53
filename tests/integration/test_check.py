"""`wattbridge check` and the broker: what would lose messages is found out, and nothing is left there or disturbed."""

import contextlib
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mqtt5
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bridge.services import LeashedProcess, PrivateMosquitto
from tests.integration.harness import (
    PROGRAM,
    Address,
    BrokerProxy,
    Daemon,
    Listener,
    Publisher,
    Reply,
    StrictMosquitto,
    client,
    counters,
    environment,
    in_background,
    password_line,
    series,
    wait_for_received,
    wait_until,
    wattbridge_here,
)
from tests.integration.test_lifecycle import PLUGINS

CLIENT_ID = "test-check"
CHECK_ID = f"{CLIENT_ID}-check"
# No time to listen where nobody speaks.
BRIEFLY = ("--listen", "0.1s")
USER, PASSWORD = "bridge", "correct-horse"
Check = Callable[..., Reply]


class Row(NamedTuple):
    """One line of the report."""

    mark: str
    said: str


def row(reply: Reply, what: str) -> Row:
    """What is said about something, on however many lines."""
    rows: list[list[str]] = []
    for line in reply.out.splitlines():
        if not line.startswith("│"):
            continue
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells[1]:
            rows.append(cells)
        else:
            rows[-1][2] += f" {cells[2]}"
    ((mark, said),) = [(mark, said) for mark, name, said in rows if name == what]
    return Row(mark, said)


@pytest.fixture
def check(database: str, topic_root: str, tmp_path: Path) -> Check:
    """Checks a broker; settings are changes to the environment."""

    def run(broker: Address, *arguments: str, **settings: object) -> Reply:
        env = environment(database, broker, topic_root, CLIENT_ID, **settings)
        reply = wattbridge_here("check", *arguments, env=env, cwd=tmp_path)
        assert reply.err == ""
        return reply

    return run


@pytest.fixture
def own_topic(topic_root: str) -> str:
    return f"{topic_root}/bridge/{CHECK_ID}/status"


def session_present(broker: Address, client_id: str) -> bool:
    """Whether the broker has a session for this client; it has one afterwards, for a minute."""
    seen: list[bool] = []
    visitor = client(client_id)
    visitor.on_connect = lambda _client, _data, flags, *_: seen.append(flags.session_present)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 60
    visitor.connect(broker.host, broker.port, clean_start=False, properties=properties)
    visitor.loop_start()
    wait_until(lambda: seen, "an answer to the visitor")
    visitor.disconnect()
    visitor.loop_stop()
    return seen[0]


# --- the queue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "messages", "said"),
    [
        ("max_queued_messages 1000\nmax_inflight_messages 20", 1_500, "kept 1,000 of 1,500 messages of 128 bytes"),
        ("max_queued_messages 1", 1_500, "kept 1 of 1,500 messages"),
        ("max_queued_messages 5000", 5_001, "kept 5,000 of 5,001 messages"),
        # 157 times 128 bytes is the first that is not below the limit.
        ("max_queued_bytes 20000", 1_500, "kept 157 of 1,500 messages"),
    ],
    ids=["mosquitto-default", "one", "5000", "bytes"],
)
def test_a_queue_limit_is_a_problem(check: Check, config: str, messages: int, said: str) -> None:
    with PrivateMosquitto(config) as broker:
        reply = check(broker, "--messages", str(messages), *BRIEFLY)
    assert row(reply, "queue").mark == "problem"
    assert said in row(reply, "queue").said
    assert "max_queued_messages" in row(reply, "queue").said
    assert (reply.code, reply.out.count("problem")) == (1, 1)


def test_by_default_it_tries_more_than_mosquitto_keeps_by_default(check: Check) -> None:
    with PrivateMosquitto("max_queued_messages 1000") as broker:
        reply = check(broker, *BRIEFLY)
    assert "kept 1,000 of" in row(reply, "queue").said
    assert reply.code == 1


@pytest.mark.parametrize("config", ["", "max_queued_messages 5000"], ids=["unlimited", "5000"])
def test_a_queue_that_keeps_all_is_fine(check: Check, config: str) -> None:
    with PrivateMosquitto(config) as broker:
        reply = check(broker, *BRIEFLY)
    assert row(reply, "queue").mark == "ok"
    assert "kept all of 1,500 messages" in row(reply, "queue").said
    assert (reply.code, reply.out.count("problem")) == (0, 0)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("", "does not let test-check-probe publish to {topic}: not authorized"),
        ("topic write {topic}", "does not deliver {topic} to us: its access rules withhold it"),
    ],
    ids=["publishing-refused", "withheld"],
)
def test_a_queue_that_cannot_be_tried_is_a_note(
    check: Check, topic_root: str, own_topic: str, rules: str, said: str
) -> None:
    """Mosquitto grants every subscription, whatever its access file says."""
    access = f"topic read {topic_root}/meter/#\ntopic read {topic_root}/vehicle/#\n{rules.format(topic=own_topic)}\n"
    with StrictMosquitto("acl_file access\nmax_queued_messages 10", {"access": access}) as broker:
        reply = check(broker, *BRIEFLY)
        assert not session_present(broker, CHECK_ID)
    assert row(reply, "queue").mark == "note"
    assert f"could not be observed: the broker {said.format(topic=own_topic)}" in row(reply, "queue").said
    # Nor is Mosquitto's own story for everybody.
    assert (row(reply, "dropped").mark, row(reply, "broker").mark) == ("note", "ok")
    assert "mosquitto version" not in reply.out
    assert (reply.code, reply.out.count("problem")) == (0, 0)


def test_a_status_topic_that_is_not_ours_alone_is_left_alone(check: Check, topic_root: str, broker: Address) -> None:
    for topic in (f"{topic_root}/bridge/status", f"{topic_root}/meter/{{client_id}}/status"):
        with Listener(broker, f"{topic_root}/#") as listener:
            reply = check(broker, *BRIEFLY, topics__bridge_status=topic)
            assert row(reply, "queue").mark == "note"
            assert "is no topic of one bridge alone" in row(reply, "queue").said
            assert reply.code == 0
            assert listener.messages == []


# --- the session -------------------------------------------------------------------------------------------


class Meddler(BrokerProxy):
    """A broker between us and Mosquitto that changes the first packet of each connection and of each answer."""

    def __init__(
        self,
        broker: Address,
        connect: Callable[[bytes], bytes] = lambda packet: packet,
        welcome: Callable[[mqtt5.ConnAckPacket], bytes] = lambda packet: packet.write(),
    ) -> None:
        self._connect, self._welcome = connect, welcome
        super().__init__(broker)

    def _forward(self, pair: tuple[socket.socket, socket.socket], muted: threading.Event) -> None:
        near, far = pair
        with contextlib.suppress(OSError):
            if first := near.recv(65_536):
                far.sendall(self._connect(first))
        super()._back((far, near), muted)

    def _back(self, pair: tuple[socket.socket, socket.socket], muted: threading.Event) -> None:
        near, far = pair
        with contextlib.suppress(OSError):
            if first := far.recv(65_536):
                packet, length = mqtt5.read(memoryview(first))
                assert isinstance(packet, mqtt5.ConnAckPacket)
                near.sendall(self._welcome(packet) + first[length:])
        super()._back(pair, muted)


def forget(connect: bytes) -> bytes:
    """The same CONNECT, but with Clean Start: what the broker had for this client is gone."""
    flags = connect.index(b"\x00\x04MQTT\x05") + 7
    return connect[:flags] + bytes([connect[flags] | 2]) + connect[flags + 1 :]


def promise(seconds: int, packet: mqtt5.ConnAckPacket) -> bytes:
    """The same CONNACK, but with a shorter Session Expiry Interval."""
    return mqtt5.ConnAckPacket(
        session_present=packet.session_present,
        reason_code=packet.reason_code,
        session_expiry_interval=seconds,
        receive_max=packet.receive_max,
    ).write()


def test_a_broker_that_forgets_sessions_is_a_problem(check: Check) -> None:
    with PrivateMosquitto() as broker, Meddler(broker, connect=forget) as forgetful:
        reply = check(forgetful, *BRIEFLY)
    assert row(reply, "session").mark == "problem"
    assert "forgot it at once" in row(reply, "session").said
    assert reply.code == 1


def test_a_session_that_the_broker_shortens_is_a_problem(check: Check) -> None:
    with PrivateMosquitto() as broker, Meddler(broker, welcome=partial(promise, 5_400)) as impatient:
        reply = check(impatient, *BRIEFLY)
        fitting = check(impatient, *BRIEFLY, mqtt__session_expiry_s=5_400)
    assert row(reply, "session").mark == "problem"
    assert "keeps it for 90 min at most, mqtt.session_expiry_s asks for 7 days" in row(reply, "session").said
    assert (reply.code, reply.out.count("problem")) == (1, 1)
    assert (row(fitting, "session").mark, fitting.code) == ("ok", 0)


def test_without_a_session_there_is_a_problem_and_nothing_to_try(check: Check, own_topic: str) -> None:
    with PrivateMosquitto() as broker, Listener(broker, own_topic) as listener:
        reply = check(broker, *BRIEFLY, mqtt__session_expiry_s=0)
        assert listener.messages == []
    assert row(reply, "session").mark == "problem"
    assert "session_expiry_s is 0" in row(reply, "session").said
    assert (reply.code, reply.out.count("problem")) == (1, 1)


def test_a_session_is_kept(check: Check) -> None:
    with PrivateMosquitto() as broker:
        reply = check(broker, *BRIEFLY)
    assert row(reply, "session") == ("ok", "kept for 7 days while the daemon is away; found again after a moment")


# --- the rate ----------------------------------------------------------------------------------------------


@contextmanager
def talking(broker: Address, topic_root: str, size: int) -> Iterator[None]:
    """A meter that does not stop talking, in payloads of this size; what is retained of it is no traffic."""
    over = threading.Event()

    def talk() -> None:
        with Publisher(broker, topic_root) as devices:
            while not over.wait(0.01):
                devices.send("meter", "MTR-1", b"x" * size, retain=True)
            devices.flush()

    with in_background(talk):
        try:
            yield
        finally:
            over.set()


def test_it_says_how_long_the_queue_lasts_at_the_rate_of_the_fleet(check: Check, topic_root: str) -> None:
    with PrivateMosquitto("max_queued_messages 700") as broker, talking(broker, topic_root, size=250):
        reply = check(broker, "--listen", "2s")
    assert "kept 700 of 1,500 messages of 250 bytes" in row(reply, "queue").said
    said = row(reply, "outage").said
    match = re.fullmatch(
        r"(\d+) messages/s of 250 bytes came for 2 s: 700 queued messages last ([\d.]+) (s|min); "
        r"an hour away needs ([\d,]+) of them, ([\d.]+) MB of payload",
        said,
    )
    assert match, said
    rate, lasting, needed, megabytes = (float(match[number].replace(",", "")) for number in (1, 2, 4, 5))
    assert 5 < rate <= 100
    assert lasting * (60 if match[3] == "min" else 1) == pytest.approx(700 / rate, rel=0.15)
    assert needed == pytest.approx(3_600 * rate, rel=0.05)
    assert megabytes == pytest.approx(needed * 250 / 1e6, rel=0.15)


def test_without_a_message_there_is_no_rate(check: Check, topic_root: str) -> None:
    with PrivateMosquitto() as broker:
        with Publisher(broker, topic_root) as devices:
            devices.send("meter", "MTR-1", b"of yesterday", retain=True)
            devices.flush()
        reply = check(broker, *BRIEFLY)
        assert "nothing to compute with" in row(reply, "outage").said
        assert "of 128 bytes" in row(reply, "queue").said
        reply = check(broker, "--listen", "0", "--messages", "0")
    assert row(reply, "outage") == ("note", "the rate could not be observed: --listen 0")
    assert row(reply, "queue").said.startswith("could not be observed: --messages 0")
    assert reply.code == 0


# --- what else the broker tells ----------------------------------------------------------------------------


def test_it_tells_what_the_broker_has_dropped(check: Check) -> None:
    with PrivateMosquitto("max_queued_messages 100\nsys_interval 1") as broker:
        reply = check(broker, *BRIEFLY)
        assert row(reply, "dropped").mark == "ok"
        assert "mosquitto version" in row(reply, "broker").said
        # The 1,400 of the check, which say nothing about the daemon: so it is a note.
        wait_until(lambda: "1,400" in row(check(broker, *BRIEFLY, "--messages", "0"), "dropped").said, "1,400 dropped")
        reply = check(broker, *BRIEFLY, "--messages", "0")
    assert row(reply, "dropped").mark == "note"
    assert reply.code == 0


def test_what_cannot_be_seen_is_said(check: Check, broker: Address) -> None:
    said = row(check(broker, *BRIEFLY), "restart")
    assert said.mark == "note"
    for setting in ("persistence true", "autosave_interval", "persistent_client_expiration"):
        assert setting in said.said


def test_a_broker_that_retains_nothing_is_a_problem_as_it_is_for_the_daemon(
    check: Check, database: str, topic_root: str, tmp_path: Path
) -> None:
    with PrivateMosquitto("retain_available false") as broker:
        reply = check(broker, *BRIEFLY)
        with Daemon(database, broker, topic_root, tmp_path, ready=False) as daemon:
            assert daemon.wait() == 3
    assert row(reply, "retained messages").mark == "problem"
    assert (reply.code, reply.out.count("problem")) == (1, 1)


# --- nothing is left, nobody is disturbed ------------------------------------------------------------------


@pytest.mark.parametrize("config", ["", "max_queued_messages 10"], ids=["all-kept", "some-dropped"])
def test_it_leaves_nothing_with_the_broker(check: Check, topic_root: str, own_topic: str, config: str) -> None:
    with PrivateMosquitto(config) as broker:
        with Listener(broker, f"{topic_root}/#") as listener:
            check(broker, *BRIEFLY)
            # One message there and back, and then those of the test: on no other topic.
            wait_until(lambda: len(listener.messages) >= (1_501 if not config else 10), "the messages of the check")
            assert {message.topic for message in listener.messages} == {own_topic}
        with Listener(broker, f"{topic_root}/#", client_id="later") as later:
            with Publisher(broker, topic_root) as devices:
                devices.send("meter", "MTR-1", b"the only one")
                devices.flush()
            wait_until(lambda: later.messages, "the message of the device")
            assert later.payloads() == [b"the only one"]
        for client_id in (CHECK_ID, f"{CLIENT_ID}-probe"):
            assert not session_present(broker, client_id)


@pytest.mark.skipif(not PLUGINS, reason="this Mosquitto has no plugin that refuses subscriptions")
def test_it_leaves_nothing_where_the_subscription_is_refused(check: Check, topic_root: str) -> None:
    allowed = ("publishClientSend", "publishClientReceive", "unsubscribe")
    rules = {"defaultACLAccess": dict.fromkeys(allowed, True) | {"subscribe": False}}
    config = f"plugin {PLUGINS[0]}\nplugin_opt_config_file rules.json"
    with StrictMosquitto(config, {"rules.json": json.dumps(rules)}) as broker:
        reply = check(broker, *BRIEFLY)
        assert not session_present(broker, CHECK_ID)
    assert row(reply, "broker").mark == "problem"
    assert f"does not let {CHECK_ID} subscribe to {topic_root}/meter/+/telemetry" in row(reply, "broker").said
    assert reply.code == 1


def test_it_leaves_nothing_when_it_is_interrupted(
    database: str, topic_root: str, own_topic: str, tmp_path: Path
) -> None:
    """While its session is away, and the queue is being filled."""
    with PrivateMosquitto() as broker, Listener(broker, own_topic) as listener:
        env = environment(database, broker, topic_root, CLIENT_ID)
        arguments = ["check", "--listen", "0", "--messages", "100000"]
        with LeashedProcess([PROGRAM, *arguments], env=env, cwd=tmp_path) as process:
            wait_until(lambda: len(listener.messages) > 1_000, "the queue is being filled")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) != 0
        assert len(listener.messages) < 100_000
        assert not session_present(broker, CHECK_ID)


def test_a_session_that_is_there_already_is_left_as_it_is(
    database: str, check: Check, topic_root: str, tmp_path: Path
) -> None:
    """Here the broker names clients by their user: the check gets the daemon's session, with what waits in it."""
    passwords = password_line(USER, PASSWORD) + password_line("device", PASSWORD)
    config = "allow_anonymous false\npassword_file passwords\nuse_username_as_clientid true"
    login = {"mqtt__username": USER, "mqtt__password": PASSWORD}
    with (
        StrictMosquitto(config, {"passwords": passwords}) as broker,
        Daemon(database, broker, topic_root, tmp_path, **login) as daemon,
    ):
        assert daemon.terminate() == 0
        with Publisher(broker, topic_root, username="device", password=PASSWORD) as devices:
            devices.send_series(list(series(devices=5, readings=1)))
        reply = check(broker, *BRIEFLY, **login)
        daemon.start()
        wait_for_received(database, 5)
    assert row(reply, "session").mark == "note"
    assert f"has a session for {CHECK_ID} already" in row(reply, "session").said
    assert reply.code == 0


def test_it_takes_part_in_nothing_that_a_daemon_does(
    check: Check, database: str, broker: Address, topic_root: str, tmp_path: Path
) -> None:
    with Daemon(database, broker, topic_root, tmp_path, client_id=CLIENT_ID) as daemon:
        reply = check(broker, *BRIEFLY)
        assert (reply.code, row(reply, "queue").mark) == (0, "ok")
        assert daemon.events("mqtt.waiting") == []
        assert daemon.terminate() == 0
    assert counters(database) == (0, 0, 0, 0, 0)
