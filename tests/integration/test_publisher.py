"""The publisher against a real Mosquitto, with paho as the witness."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from math import inf
from typing import Any

import mqtt5
import pytest

from bridge.services import PrivateMosquitto
from simulator.connection import Broker, RefusedError
from simulator.faults import FaultConfig, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.messages import Link, Message
from simulator.publisher import Publisher
from simulator.run import Options, Summary, simulate
from tests.integration.witness import Witness, by_topic

START = datetime(2026, 2, 10, tzinfo=UTC)


def options_for(host: str, port: int, root: str, messages: int, **others: Any) -> Options:
    settings: dict[str, Any] = {
        "fleet": FleetConfig(start=START, meters=25, vehicles=25, topic_root=root),
        "broker": Broker(host=host, port=port),
        "speedup": None,
        "messages": messages,
    }
    return Options(**settings | others)


def expected(options: Options) -> list[tuple[str, bytes]]:
    stream = messages(Fleet(options.fleet), options.faults)
    return [(m.topic, m.payload) for m in islice(stream, options.messages) if isinstance(m, Message)]


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
    assert by_topic(witness.received) == by_topic(expected(options))


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
    assert by_topic(witness.received) == by_topic(expected(options))
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
    assert by_topic(witness.received) == by_topic(expected(options))


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


def test_an_array_counts_as_its_readings(broker: Any, topic_root: str) -> None:
    faults = FaultConfig(outages=24.0)
    options = options_for(broker.host, broker.port, topic_root, 4_000, faults=faults)
    with Witness(broker.host, broker.port, topic_root) as witness:
        summary = asyncio.run(simulate(options))
        witness.wait_for(4_000)
    assert (summary.published, summary.acknowledged) == (4_000, 4_000)
    assert summary.readings == sum(payload.count(b'"timestamp"') for _, payload in witness.received) > 4_000


async def offer(publisher: Publisher, batch: list[Message]) -> None:
    async with publisher:
        publisher.offer(batch)
        await asyncio.wait_for(publisher.settled(), 20)


def readings(topic_root: str, count: int) -> list[Message]:
    fleet = Fleet(FleetConfig(start=START, meters=5, vehicles=5, topic_root=topic_root))
    return [m for m in islice(messages(fleet, FaultConfig()), count) if not isinstance(m, Link)]


def test_each_message_is_settled_once_by_what_the_broker_says(broker: Any, topic_root: str) -> None:
    settled: list[tuple[int, int]] = []
    publisher = Publisher(Broker(host=broker.host, port=broker.port), settle=lambda *said: settled.append(said))
    with Witness(broker.host, broker.port, f"{topic_root}/meter"):
        asyncio.run(offer(publisher, readings(topic_root, 100)))
    expected = {m.number: 1 if "/meter/" in m.topic else 3 for m in readings(topic_root, 100)}
    assert set(expected.values()) == {1, 3}
    assert sorted(settled) == sorted(expected.items())


def test_what_is_refused_or_acknowledged_twice_is_settled_once() -> None:
    """A broker that refuses every tenth message and says everything twice."""
    settled: list[tuple[int, int]] = []
    asyncio.run(_publish_to_a_stutterer(settled))
    assert sorted(settled) == [(number, 1 if number % 10 else 2) for number in range(500)]


async def _publish_to_a_stutterer(settled: list[tuple[int, int]]) -> None:
    numbers = {m.payload: m.number for m in readings("energy/v1", 500)}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        with suppress(ConnectionError):
            while chunk := await reader.read(65536):
                data += chunk
                while data:
                    try:
                        packet, size = mqtt5.read(memoryview(data))
                    except IndexError:
                        break
                    data = data[size:]
                    if isinstance(packet, mqtt5.ConnectPacket):
                        writer.write(mqtt5.ConnAckPacket(receive_max=7).write())
                    elif isinstance(packet, mqtt5.PublishPacket) and packet.packet_id:
                        refused = numbers[packet.payload] % 10 == 0
                        codes = mqtt5.PubAckReasonCode
                        reason = codes.QUOTA_EXCEEDED if refused else codes.SUCCESS
                        writer.write(2 * mqtt5.PubAckPacket(packet.packet_id, reason_code=reason).write())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        host, port = server.sockets[0].getsockname()
        publisher = Publisher(Broker(host=host, port=port), settle=lambda *said: settled.append(said))
        await offer(publisher, readings("energy/v1", 500))
        assert (publisher.counters.acknowledged, publisher.counters.refused) == (450, 50)
        await asyncio.sleep(0.1)  # for the server to see the end
