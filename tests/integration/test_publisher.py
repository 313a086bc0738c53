"""The publisher against a real Mosquitto, with paho as the witness."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from math import inf
from typing import Any, Self

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bridge.services import PrivateMosquitto
from simulator.fleet import Fleet, FleetConfig
from simulator.publisher import Broker, RefusedError
from simulator.run import Options, Summary, simulate

START = datetime(2026, 2, 10, tzinfo=UTC)
PATIENCE_S = 30.0


class Witness:
    """An independent subscriber with a persistent session that notes everything it is sent."""

    def __init__(self, host: str, port: int, root: str) -> None:
        self.received: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._root = root
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"witness-{uuid.uuid4().hex}", protocol=paho.MQTTv5
        )
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 600
        self._client.connect(host, port, clean_start=False, properties=properties)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait_for(self, distinct: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(set(self.received)) >= distinct, PATIENCE_S)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        client.subscribe(f"{self._root}/#", qos=1)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        with self._changed:
            self.received.append((message.topic, bytes(message.payload)))
            self._changed.notify()


def options_for(host: str, port: int, root: str, messages: int, **others: Any) -> Options:
    settings: dict[str, Any] = {
        "fleet": FleetConfig(start=START, meters=25, vehicles=25, topic_root=root),
        "broker": Broker(host=host, port=port),
        "speedup": None,
        "messages": messages,
    }
    return Options(**settings | others)


def expected(options: Options) -> list[tuple[str, bytes]]:
    return [(m.topic, m.payload) for m in islice(Fleet(options.fleet), options.messages)]


def by_device(messages: list[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    """Group payloads by topic, each at its first occurrence."""
    grouped: dict[str, dict[bytes, None]] = defaultdict(dict)
    for topic, payload in messages:
        grouped[topic][payload] = None
    return {topic: list(payloads) for topic, payloads in grouped.items()}


def test_every_message_arrives_once_and_in_order(broker: Any, topic_root: str) -> None:
    options = options_for(broker.host, broker.port, topic_root, 5_000)
    progress: list[Summary] = []
    with Witness(broker.host, broker.port, topic_root) as witness:
        summary = asyncio.run(simulate(options, progress.append))
        witness.wait_for(5_000)
    assert (summary.published, summary.acknowledged, summary.resent, summary.unsent) == (5_000, 5_000, 0, 0)
    assert summary.complete
    assert summary.unheard == 0
    assert sorted(witness.received) == sorted(expected(options))
    assert by_device(witness.received) == by_device(expected(options))


def test_a_restart_of_the_broker_loses_nothing(topic_root: str) -> None:
    with PrivateMosquitto("max_inflight_messages 20") as broker:
        options = options_for(broker.host, broker.port, topic_root, 12_000, rate=4_000)
        events: list[str] = []

        async def run_over_a_restart() -> Summary:
            running = asyncio.create_task(simulate(options, on_event=events.append))
            for _ in range(2):
                await asyncio.sleep(0.7)
                await asyncio.to_thread(broker.stop)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(broker.start)
            return await running

        with Witness(broker.host, broker.port, topic_root) as witness:
            summary = asyncio.run(run_over_a_restart())
            witness.wait_for(12_000)
    assert (summary.published, summary.acknowledged) == (12_000, 12_000)
    assert by_device(witness.received) == by_device(expected(options))
    assert sum("waiting for the broker" in event for event in events) >= 2
    assert "connected" in events[-1]


def test_what_was_cut_off_in_flight_is_sent_again(topic_root: str) -> None:
    """A proxy swallows bytes and then cuts the line, which leaves a full window in flight."""
    with PrivateMosquitto() as broker, Witness(broker.host, broker.port, topic_root) as witness:
        summary, options = asyncio.run(_publish_through_cuts(broker, topic_root))
        witness.wait_for(3_000)
    assert (summary.published, summary.acknowledged) == (3_000, 3_000)
    assert summary.resent > 0
    assert len(witness.received) > 3_000
    assert by_device(witness.received) == by_device(expected(options))


async def _publish_through_cuts(broker: Any, topic_root: str) -> tuple[Summary, Options]:
    lines = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, quota: float) -> None:
        while data := await reader.read(256):
            if (quota := quota - len(data)) < 0:
                await asyncio.sleep(0.2)  # the other direction goes on
                return
            writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal lines
        lines += 1
        # Six lines break: first what the broker says gets lost, then what the publisher says, and so on.
        down = 400 * lines if lines in {1, 2, 5} else inf
        up = 20_000 * lines if lines in {3, 4, 6} else inf
        from_broker, to_broker = await asyncio.open_connection(broker.host, broker.port)
        tasks = {
            asyncio.create_task(pump(from_broker, writer, down)),
            asyncio.create_task(pump(reader, to_broker, up)),
        }
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for end in (writer, to_broker):
            end.close()
            with suppress(OSError):
                await end.wait_closed()

    server = await asyncio.start_server(relay, "127.0.0.1")
    async with server:
        host, port = server.sockets[0].getsockname()
        options = options_for(host, port, topic_root, 3_000)
        summary = await simulate(options)
        await asyncio.sleep(0.3)  # for the relays to end
    return summary, options


def test_a_broker_that_comes_late_is_waited_for(topic_root: str) -> None:
    with PrivateMosquitto() as broker:
        options = options_for(broker.host, broker.port, topic_root, 1_000)
        broker.stop()

        async def run_before_the_broker() -> Summary:
            running = asyncio.create_task(simulate(options))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(broker.start)
            return await running

        summary = asyncio.run(run_before_the_broker())
    assert (summary.published, summary.acknowledged, summary.unheard) == (1_000, 1_000, 1_000)


def test_a_refusal_for_good_ends_the_run(topic_root: str) -> None:
    with PrivateMosquitto("allow_anonymous false") as broker:
        options = options_for(broker.host, broker.port, topic_root, 10)
        with pytest.raises(RefusedError, match="not authorized"):
            asyncio.run(simulate(options))


def test_the_rate_is_kept_and_the_duration_ends_the_run(broker: Any, topic_root: str) -> None:
    options = options_for(broker.host, broker.port, topic_root, 10**6, rate=500, duration=2.0)
    summary = asyncio.run(simulate(options))
    assert summary.complete
    assert 800 < summary.published < 1_100


def test_the_speedup_is_kept(broker: Any, topic_root: str) -> None:
    summary = asyncio.run(simulate(options_for(broker.host, broker.port, topic_root, 10**6, speedup=300, duration=2.0)))
    assert summary.complete
    assert 500 < summary.simulated_s < 640


@pytest.mark.parametrize("pace", [{"speedup": None}, {"speedup": 1000.0}, {"rate": 100_000.0}])
def test_simulated_time_never_overtakes_the_clock(broker: Any, topic_root: str, pace: dict[str, float | None]) -> None:
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    fleet = FleetConfig(start=start, meters=200, vehicles=200, topic_root=topic_root)
    options = options_for(broker.host, broker.port, topic_root, 10**6, fleet=fleet, duration=1.5, **pace)
    summary = asyncio.run(simulate(options))
    assert summary.complete
    assert timedelta(0) <= datetime.now(UTC) - summary.simulated_until < timedelta(seconds=1)


def simulator(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "simulator", *map(str, arguments)]


def test_the_command_reports_json_and_ends_on_a_signal(broker: Any, topic_root: str) -> None:
    command = simulator("--port", broker.port, "--host", broker.host, "--topic-root", topic_root)
    with subprocess.Popen(
        [*command, "--speedup", "60", "--json"], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        last = json.loads(process.stdout.readlines()[-1])
    assert process.returncode == 0
    assert "final" not in first
    assert last["final"] is True
    assert last["published"] == last["acknowledged"] >= first["acknowledged"] > 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--speedup", "2", "--rate", "5"], "exclude"),
        (["--rate", "0"], "above 0"),
        (["--interval", "7s"], "divide a minute"),
        (["--for", "soon"], "30s"),
        (["--start", "2026-02-10"], "time zone"),
        (["--meters", "0", "--vehicles", "0"], "at least one"),
        (["--tls-ca", __file__], "no certificate"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], hint: str) -> None:
    done = subprocess.run(simulator(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert hint in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_broker_that_never_comes_exits_with_1(unused_tcp_port: int) -> None:
    command = simulator("--port", unused_tcp_port, "--for", "1s", "--flat-out", "--messages", 5)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "connection refused" in line
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in rest
