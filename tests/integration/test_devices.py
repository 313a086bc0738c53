"""One connection per device against a real Mosquitto, with paho as the witness."""

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bridge.services import PrivateMosquitto
from simulator import devices as simulated
from simulator.connection import Broker, RefusedError
from simulator.devices import Devices, LimitError, allow_files, identify
from simulator.faults import FaultConfig, messages
from simulator.fleet import Fleet, FleetConfig
from simulator.messages import Link, Message
from simulator.run import Options, Summary, simulate
from tests.integration.witness import Witness, by_topic

START = datetime(2026, 2, 10, tzinfo=UTC)


def options_for(at: Any, root: str, count: int, devices: int = 20, **others: Any) -> Options:
    meters = devices // 2
    settings: dict[str, Any] = {
        "fleet": FleetConfig(start=START, meters=meters, vehicles=devices - meters, topic_root=root),
        "broker": Broker(host=at.host, port=at.port, connections=None),
        "speedup": None,
        "messages": count,
    }
    return Options(**settings | others)


def expected(options: Options) -> list[tuple[str, bytes]]:
    stream = (m for m in messages(Fleet(options.fleet), options.faults) if isinstance(m, Message))
    return [(m.topic, m.payload) for m in islice(stream, options.messages)]


def readings(root: str, count: int) -> list[Message]:
    fleet = Fleet(FleetConfig(start=START, meters=2, vehicles=2, topic_root=root))
    return [m for m in islice(messages(fleet, FaultConfig()), count) if isinstance(m, Message)]


@asynccontextmanager
async def four_devices(broker: Any, root: str, settled: list[tuple[int, int]]) -> AsyncIterator[Devices]:
    config = FleetConfig(start=START, meters=2, vehicles=2, topic_root=root)
    where = Broker(host=broker.host, port=broker.port, connections=None)
    identities = identify(where, root, config.meter_ids, config.vehicle_ids)
    async with Devices(where, identities, settle=lambda *said: settled.append(said)) as devices:
        await asyncio.wait_for(devices.ready(), 20)
        yield devices


async def until(devices: Devices, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await devices._change()


@pytest.fixture
def served() -> Iterator[Path]:
    """A directory that a server which runs as another user can read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="wattbridge-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_every_device_has_its_own_connection_and_says_online_first_and_offline_last(topic_root: str) -> None:
    with PrivateMosquitto() as broker:
        options = options_for(broker, topic_root, 400)
        with Witness(broker.host, broker.port, topic_root) as witness:
            summary = asyncio.run(simulate(options))
            witness.wait_for(440)
        names = re.findall(r"New client connected from \S+ as ((?:MTR|VEH)\S+)", log(broker))
        retained: list[tuple[str, bytes]] = []
        with Witness(broker.host, broker.port, topic_root) as late:
            late.wait_for(20)
            retained = late.received
    ids = options.fleet.meter_ids + options.fleet.vehicle_ids
    assert summary.complete
    assert sorted(names) == sorted(ids)
    assert sorted(witness.telemetry) == sorted(expected(options))
    assert by_topic(witness.telemetry) == by_topic(expected(options))
    of_device: dict[str, list[bytes]] = {}
    for topic, payload in witness.received:
        of_device.setdefault(topic.split("/")[-2], []).append(payload)
    assert sorted(of_device) == sorted(ids)
    for said in of_device.values():
        assert (said[0], said[-1]) == (b"online", b"offline")
        assert said.count(b"online") == said.count(b"offline") == 1
    kinds = {"MTR": "meter", "VEH": "vehicle"}
    assert sorted(retained) == sorted((f"{topic_root}/{kinds[i[:3]]}/{i}/status", b"offline") for i in ids)


def log(broker: PrivateMosquitto) -> str:
    return (broker.directory / "server.log").read_text()


def test_a_killed_simulator_leaves_the_last_wills(broker: Any, topic_root: str) -> None:
    command = [sys.executable, "-m", "simulator", "--host", broker.host, "--port", str(broker.port), "--meters", "5"]
    command += ["--vehicles", "5", "--topic-root", topic_root, "--connections", "per-device", "--json"]
    with Witness(broker.host, broker.port, topic_root) as witness:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert witness.wait_until(lambda: sum(payload == b"online" for _, payload in witness.received) == 10)
            process.send_signal(signal.SIGKILL)
        assert witness.wait_until(lambda: sum(payload == b"offline" for _, payload in witness.received) == 10)
    assert set(map(tuple, witness.statuses().values())) == {(b"online", b"offline")}


def test_a_device_without_network_is_offline_and_its_messages_come_later(broker: Any, topic_root: str) -> None:
    batch = readings(topic_root, 40)
    settled: list[tuple[int, int]] = []

    async def lose_and_regain(witness: Witness) -> None:
        async with four_devices(broker, topic_root, settled) as devices:
            devices.link(Link(0, 1, up=False))
            devices.link(Link(0, 1, up=False))
            assert await asyncio.to_thread(witness.wait_until, lambda: b"offline" in witness.statuses()["MTR-000002"])
            devices.offer(batch)
            await asyncio.wait_for(devices.room(), 5)
            witness_has_others = await asyncio.to_thread(
                witness.wait_until, lambda: len(witness.telemetry) == sum(m.device != 1 for m in batch)
            )
            assert witness_has_others
            assert not any("MTR-000002" in topic for topic, _ in witness.telemetry)
            await until(devices, lambda: devices.outstanding == 10)
            assert devices.waiting == sum(m.device == 1 for m in batch) == 10
            devices.link(Link(0, 1, up=True))
            await asyncio.wait_for(devices.settled(), 20)

    with Witness(broker.host, broker.port, topic_root) as witness:
        asyncio.run(lose_and_regain(witness))
        witness.wait_until(lambda: len(witness.statuses()["MTR-000002"]) == 4)
    assert witness.statuses()["MTR-000002"] == [b"online", b"offline", b"online", b"offline"]
    assert witness.statuses()["MTR-000001"] == [b"online", b"offline"]
    assert by_topic(witness.telemetry) == by_topic([(m.topic, m.payload) for m in batch])
    assert sorted(settled) == [(number, 1) for number in range(40)]


def test_messages_of_a_device_without_network_do_not_hold_up_the_others(broker: Any, topic_root: str) -> None:
    settled: list[tuple[int, int]] = []
    one, two = readings(topic_root, 2)

    async def pile_up() -> None:
        async with four_devices(broker, topic_root, settled) as devices:
            devices.link(Link(0, one.device, up=False))
            devices.offer([one._replace(number=number) for number in range(10_000)])
            await asyncio.wait_for(devices.room(), 5)
            devices.offer([two._replace(number=10_000)])
            await until(devices, lambda: bool(settled))
            assert settled == [(10_000, 3)]
            await asyncio.wait_for(devices.settled(), 20)  # which gives the network back

    asyncio.run(asyncio.wait_for(pile_up(), 40))
    assert len(settled) == len({number for number, _ in settled}) == 10_001


def test_what_was_on_the_way_when_the_network_went_is_sent_again(broker: Any, topic_root: str) -> None:
    batch = readings(topic_root, 400)
    settled: list[tuple[int, int]] = []

    async def flicker() -> int:
        async with four_devices(broker, topic_root, settled) as devices:
            for at in range(0, 400, 20):
                devices.offer(batch[at : at + 20])
                for device in range(4):
                    devices.link(Link(0, device, up=False))
                    devices.link(Link(0, device, up=True))
                await asyncio.sleep(0.005)
            await asyncio.wait_for(devices.settled(), 20)
            return devices.counters.resent

    with Witness(broker.host, broker.port, topic_root) as witness:
        assert asyncio.run(flicker()) > 0
        witness.wait_until(lambda: len(set(witness.telemetry)) == 400)
    assert by_topic(witness.telemetry) == by_topic([(m.topic, m.payload) for m in batch])
    assert sorted(settled) == [(number, 1) for number in range(400)]


def test_outages_of_the_stream_cut_connections_and_nothing_is_lost(topic_root: str) -> None:
    with PrivateMosquitto() as broker, Witness(broker.host, broker.port, topic_root) as witness:
        options = options_for(broker, topic_root, 5_000, rate=1_500, faults=FaultConfig(outages=24.0))
        must = expected(options)
        events: list[str] = []
        summary = asyncio.run(simulate(options, on_event=events.append))
        assert witness.wait_for_telemetry(len(set(must)))
        assert witness.wait_until(lambda: all(said[-1] == b"offline" for said in witness.statuses().values()))
        statuses = witness.statuses()
    assert summary.complete
    assert len(events) == 1  # who has no network is no trouble of the broker
    assert by_topic(witness.telemetry) == by_topic(must)
    assert sum(said.count(b"offline") for said in statuses.values()) > 60


def test_a_network_that_is_back_for_no_time_lets_nothing_through(broker: Any, topic_root: str) -> None:
    batch = readings(topic_root, 40)
    settled: list[tuple[int, int]] = []

    async def flicker(witness: Witness) -> tuple[int, int]:
        async with four_devices(broker, topic_root, settled) as devices:
            devices.link(Link(0, 1, up=False))
            await asyncio.sleep(0.1)
            devices.link(Link(0, 1, up=True))
            devices.link(Link(0, 1, up=False))
            devices.offer(batch)
            await asyncio.sleep(0.5)
            heard = {topic for topic, _ in witness.telemetry}
            assert len(heard) == 3
            assert not any("MTR-000002" in topic for topic in heard)
            await asyncio.wait_for(devices.settled(), 20)
            return devices._held, devices.outstanding

    with Witness(broker.host, broker.port, topic_root) as witness:
        left = asyncio.run(flicker(witness))
        witness.wait_for(40)
        assert witness.statuses()["MTR-000002"].count(b"online") == 2
    assert left == (0, 0)
    assert sorted(number for number, _ in settled) == list(range(40))


def test_outages_faster_than_connections_come_back_do_not_pile_up(
    broker: Any, topic_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fifth of what it is, so that a fifth of the messages is as many times more than may pile up.
    in_flight = simulated.IN_FLIGHT // 5
    monkeypatch.setattr(simulated, "IN_FLIGHT", in_flight)
    options = options_for(broker, topic_root, 8_000, devices=100, faults=FaultConfig(outages=200.0))
    most = 0

    def look(summary: Summary) -> None:
        nonlocal most
        most = max(most, summary.published + summary.unsent - summary.acknowledged)

    with Witness(broker.host, broker.port, topic_root):
        summary = asyncio.run(simulate(options, look))
    assert summary.complete
    assert most < 4 * in_flight


def test_300_devices_lose_nothing_when_the_broker_restarts(topic_root: str) -> None:
    with PrivateMosquitto() as broker:
        options = options_for(broker, topic_root, 6_000, devices=300, rate=3_000)
        events: list[str] = []

        async def run_over_a_restart() -> Summary:
            running = asyncio.create_task(simulate(options, on_event=events.append))
            await asyncio.sleep(1.0)
            await asyncio.to_thread(broker.stop)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(broker.start)
            return await running

        with Witness(broker.host, broker.port, topic_root) as witness:
            summary = asyncio.run(run_over_a_restart())
            assert witness.wait_for_telemetry(6_000)
            assert witness.wait_until(lambda: all(said[-1] == b"offline" for said in witness.statuses().values()))
    assert (summary.published, summary.acknowledged) == (6_000, 6_000)
    assert by_topic(witness.telemetry) == by_topic(expected(options))
    assert any("waiting for the broker" in event for event in events)
    assert "300 devices connected" in events[-1]
    assert len(events) < 10


def passwords(directory: Path, entries: dict[str, str]) -> str:
    """Write the password file of a Mosquitto, and return its configuration."""
    file = directory / "passwords"
    file.write_text("".join(f"{user}:{password}\n" for user, password in entries.items()))
    subprocess.run(["mosquitto_passwd", "-U", file], check=True, env=os.environ | {"PATH": "/usr/bin:/usr/local/bin"})
    file.chmod(0o644)
    return f"allow_anonymous false\npassword_file {file}"


def test_credentials_follow_a_template(served: Path, topic_root: str) -> None:
    users = {f"vehicle/VEH-00000{i}": f"secret of VEH-00000{i}" for i in (1, 2)}
    users |= {f"meter/MTR-00000{i}": f"secret of MTR-00000{i}" for i in (1, 2)}
    with PrivateMosquitto(passwords(served, users)) as broker:
        login = Broker(
            host=broker.host,
            port=broker.port,
            connections=None,
            client_id="{kind}-{device_id}",
            username="{kind}/{device_id}",
            password="secret of {device_id}",
        )
        summary = asyncio.run(simulate(options_for(broker, topic_root, 40, devices=4, broker=login)))
        said = log(broker)
    assert summary.complete
    for kind, device in (user.split("/") for user in users):
        assert re.search(rf"as {kind}-{device} .*u'{kind}/{device}'", said)


def test_wrong_credentials_of_one_device_end_the_run_and_name_it(served: Path, topic_root: str, tmp_path: Path) -> None:
    users = {"VEH-000001": "secret", "MTR-000001": "secret", "VEH-000002": "secret", "MTR-000002": "another"}
    with PrivateMosquitto(passwords(served, users)) as broker:
        login = Broker(host=broker.host, port=broker.port, connections=None, username="{device_id}", password="secret")
        options = options_for(broker, topic_root, 40, devices=4, broker=login, ledger=tmp_path / "ledger")
        with pytest.raises(RefusedError, match="MTR-000002: not authorized"):
            asyncio.run(simulate(options))
    assert not list(tmp_path.iterdir())


def test_two_thousand_devices_flat_out(broker: Any, topic_root: str) -> None:
    events: list[str] = []
    options = options_for(broker, topic_root, 20_000, devices=2_000)
    summary = asyncio.run(simulate(options, on_event=events.append))
    assert summary.complete
    assert (summary.published, summary.resent) == (20_000, 0)
    assert "2,000 devices connected" in events[-1]


def test_the_limit_of_open_files_is_raised_or_explained(unused_tcp_port: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulator", "--meters", "300", "--vehicles", "0", "--port", str(unused_tcp_port)]
    command += ["--connections", "per-device", "--ledger", str(tmp_path / "ledger")]

    def limited(soft: int, hard: int) -> list[str]:
        return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *command]

    low = subprocess.run(limited(100, 200), capture_output=True, text=True, check=False, timeout=30)
    assert low.returncode == 1
    assert "prlimit --pid $$ --nofile=364" in low.stderr
    assert "connect" not in low.stderr.replace("300 connections", "")
    assert not (tmp_path / "ledger").exists()
    with subprocess.Popen(limited(100, 400), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "connection refused" in process.stderr.readline()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert "Too many open files" not in process.stderr.read()


def test_no_limit_is_lowered() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    if before[1] != resource.RLIM_INFINITY:
        with pytest.raises(LimitError, match="sudo prlimit"):
            allow_files(before[1])
