"""The configuration of mosquitto/ on a real Mosquitto: who gets in, who may do what, and the tools beside it."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as paho
import pytest
import yaml
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from bridge.config import Config
from bridge.services import LeashedProcess
from tests.integration.broker_with_tls import (
    CERTIFICATES,
    MOSQUITTO,
    Place,
    ProductionMosquitto,
    certificates,
    passwords,
)
from tests.integration.harness import (
    Daemon,
    check_books,
    client,
    environment,
    letters,
    meter,
    now,
    vehicle,
    wait_for_received,
    wait_until,
    wattbridge_here,
)
from tests.integration.test_check import row

PASSWORD = "correct-horse-battery"
NOT_AUTHORIZED = "Not authorized"
# Names that the script refuses, in certificates that somebody got out of the device CA all the same.
HOSTILE = ("wattbridge", "+", "#", "a/b")


# --- certificates and passwords ----------------------------------------------------------------------------


def openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def forge(folder: Path, name: str, common_name: str, ca: str, since: datetime, until: datetime) -> None:
    """Signs a certificate without asking the script."""
    (folder / "forge.index").write_text("")
    (folder / "forge.conf").write_text(
        "[ca]\ndefault_ca = any\n[any]\ndatabase = forge.index\nnew_certs_dir = .\ndefault_md = sha256\n"
        "policy = anything\nrand_serial = yes\nunique_subject = no\n[anything]\ncommonName = supplied\n"
        "[req]\ndistinguished_name = anything\n[client]\nbasicConstraints = CA:FALSE\n"
    )
    request = ("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "forge.conf")
    subject = "/CN=" + common_name.replace("/", "\\/").replace("+", "\\+")
    openssl(folder, *request, "-subj", subject, "-keyout", f"{name}.key", "-out", "forge.csr")
    openssl(
        folder, "ca", "-batch", "-config", "forge.conf", "-extensions", "client", "-notext", "-cert", f"{ca}.crt",
        "-keyfile", f"{ca}.key", "-startdate", f"{since:%Y%m%d%H%M%SZ}", "-enddate", f"{until:%Y%m%d%H%M%SZ}",
        "-in", "forge.csr", "-out", f"{name}.crt",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All certificates, good and bad: {folder}/{name}.{crt,key}."""
    folder = tmp_path_factory.mktemp("certificates")
    for arguments in (
        ("ca",),
        ("server", "localhost", "127.0.0.1"),
        ("service", "wattbridge"),
        ("service", "health"),
        ("device", "MTR-1", "MTR-2", "VEH-1"),
    ):
        done = certificates(folder, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    today = datetime.now(UTC)
    valid, past = (
        (today - timedelta(days=1), today + timedelta(days=1)),
        (today - timedelta(days=9), today - timedelta(days=2)),
    )
    for name in HOSTILE:
        forge(folder, f"hostile-{HOSTILE.index(name)}", name, "device-ca", *valid)
    forge(folder, "named-operator", "operator", "device-ca", *valid)
    forge(folder, "expired-device", "MTR-1", "device-ca", *past)
    forge(folder, "expired-service", "wattbridge", "service-ca", *past)
    openssl(
        folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-config", "forge.conf", "-subj", "/CN=wattbridge", "-keyout", "self-signed.key", "-out", "self-signed.crt",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def password_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("passwords") / "passwords"
    assert passwords(file, "add", "MTR-9", "VEH-9", "operator", answer=f"{PASSWORD}\n").returncode == 0
    return file


@pytest.fixture(scope="module")
def production(folder: Path, password_file: Path) -> Iterator[ProductionMosquitto]:
    with ProductionMosquitto(folder, password_file) as running:
        yield running


# --- clients -----------------------------------------------------------------------------------------------


class Client:
    """An MQTT 5 client over TLS, connected or refused."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        certificate: str | None = None,
        *,
        user: str | None = None,
        password: str = PASSWORD,
        client_id: str = "",
        kept_s: int = 0,
        will: str | None = None,
    ) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.welcome: Properties | None = None
        self.session_present = False
        self.refused: ReasonCode | None = None
        self.lost: ReasonCode | None = None
        self._answers: dict[int, ReasonCode] = {}
        self._granted: dict[int, list[ReasonCode]] = {}
        self.mqtt = mqtt = client(client_id)
        files = (str(folder / f"{certificate}.{end}") for end in ("crt", "key")) if certificate else ()
        mqtt.tls_set(str(folder / "service-ca.crt"), *files)
        if user:
            mqtt.username_pw_set(user, password)
        if will:
            mqtt.will_set(will, b"offline", qos=1)
        mqtt.on_connect = self._on_connect
        mqtt.on_disconnect = self._on_disconnect
        mqtt.on_message = lambda _client, _data, message: self.messages.append((message.topic, bytes(message.payload)))
        mqtt.on_publish = lambda _client, _data, mid, reason, _: self._answers.__setitem__(mid, reason)
        mqtt.on_subscribe = lambda _client, _data, mid, reasons, _: self._granted.__setitem__(mid, reasons)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = kept_s
        # A refusal is the end, not the beginning of a series.
        mqtt._reconnect_on_failure = False
        mqtt.connect(place.host, place.port, keepalive=900, clean_start=not kept_s, properties=properties)
        mqtt.loop_start()
        wait_until(lambda: self.welcome or self.refused or self.lost, "an answer to CONNECT")

    def __enter__(self) -> Self:
        assert self.welcome, f"refused: {self.refused or self.lost}"
        return self

    def __exit__(self, *_: object) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """What the broker says to a message of QoS 1."""
        return self.publish_each([topic], payload, retain=retain)[topic]

    def publish_each(self, topics: Sequence[str], payload: bytes = b"x", *, retain: bool = False) -> dict[str, str]:
        """What the broker says to messages of QoS 1, by topic."""
        mids = {topic: self.mqtt.publish(topic, payload, 1, retain).mid for topic in topics}
        wait_until(lambda: set(mids.values()) <= set(self._answers) or self.lost, f"answers to {topics}")
        return {topic: str(self._answers.get(mid, f"disconnected: {self.lost}")) for topic, mid in mids.items()}

    def subscribe(self, *filters: str) -> list[str]:
        """What the broker says to a subscription at QoS 1."""
        _, mid = self.mqtt.subscribe([(pattern, paho.SubscribeOptions(qos=1)) for pattern in filters])
        assert mid is not None
        wait_until(lambda: mid in self._granted, f"an answer to {filters}")
        return [str(reason) for reason in self._granted[mid]]

    def vanish(self) -> None:
        """Ends the connection without a word."""
        connection = self.mqtt.socket()
        assert connection
        connection.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: self.lost, "the end")

    def _on_connect(
        self, _client: paho.Client, _data: object, flags: paho.ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self.refused = reason
        else:
            self.session_present = flags.session_present
            self.welcome = properties

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        self.lost = reason


@pytest.fixture
def bridge(production: ProductionMosquitto, folder: Path) -> Iterator[Client]:
    with Client(production.services, folder, "services/wattbridge", client_id="wattbridge-7") as connected:
        yield connected


@pytest.fixture
def operator(production: ProductionMosquitto, folder: Path) -> Iterator[Client]:
    with Client(production.passwords, folder, user="operator") as connected:
        connected.subscribe("energy/v1/#")
        yield connected


@pytest.fixture
def device(production: ProductionMosquitto, folder: Path) -> Iterator[Client]:
    with Client(production.devices, folder, "devices/MTR-1") as connected:
        yield connected


def own_topics(device_id: str) -> list[str]:
    return [f"energy/v1/{kind}/{device_id}/{what}" for kind in ("meter", "vehicle") for what in ("telemetry", "status")]


def seen_until(listener: Client, sender: Client, topic: str, what: str = "the mark") -> list[tuple[str, bytes]]:
    """What a listener was sent before a mark that the sender publishes now; the broker keeps the order."""
    assert not sender.publish(topic, b"mark").startswith("disconnected")
    wait_until(lambda: (topic, b"mark") in listener.messages, what)
    return listener.messages[: listener.messages.index((topic, b"mark"))]


# --- what devices may do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["certificate", "password"])
def test_a_device_writes_its_own_topics(
    production: ProductionMosquitto, folder: Path, operator: Client, way: str
) -> None:
    name = "VEH-1" if way == "certificate" else "VEH-9"
    connected = (
        Client(production.devices, folder, f"devices/{name}")
        if way == "certificate"
        else Client(production.passwords, folder, user=name)
    )
    with connected as device:
        assert set(device.publish_each(own_topics(name)).values()) == {"Success"}
    wait_until(lambda: operator.messages == [(topic, b"x") for topic in own_topics(name)], "what it wrote")


@pytest.mark.parametrize("way", ["certificate", "password", *HOSTILE])
def test_a_device_writes_nothing_else(
    production: ProductionMosquitto, folder: Path, operator: Client, device: Client, way: str
) -> None:
    foreign = [
        *own_topics("MTR-2"),
        "energy/v1/bridge/wattbridge/status",
        "energy/v1/bridge/MTR-1/status",
        "energy/v1/meter/MTR-1",
        "energy/v1/meter/MTR-1/telemetry/more",
        "energy/v1/meter//telemetry",
        "energy/v1/meter",
        "energy/v2/meter/MTR-1/telemetry",
        "MTR-1",
        "/energy/v1/meter/MTR-1/telemetry",
        "$share/bridges/energy/v1/meter/MTR-1/telemetry",
        "$SYS/broker/uptime",
        "$CONTROL/dynamic-security/v1",
    ]
    if way == "password":
        connected = Client(production.passwords, folder, user="MTR-9", client_id="MTR-2")
    elif way == "certificate":
        # Neither another user name nor another client id is of any use.
        connected = Client(production.devices, folder, "devices/VEH-1", user="MTR-2", client_id="MTR-2")
    else:
        connected = Client(production.devices, folder, f"hostile-{HOSTILE.index(way)}", user="MTR-2", client_id="MTR-2")
    with connected as hostile:
        assert hostile.publish_each(foreign, retain=True) == dict.fromkeys(foreign, NOT_AUTHORIZED)
    assert seen_until(operator, device, "energy/v1/meter/MTR-1/telemetry") == []


@pytest.mark.parametrize("way", ["MTR-2", *HOSTILE])
def test_what_a_device_subscribes_to_is_not_delivered(
    production: ProductionMosquitto, folder: Path, device: Client, way: str
) -> None:
    """Mosquitto grants the subscription all the same."""
    status = "energy/v1/meter/MTR-1/status"
    device.publish(status, b"online", retain=True)
    certificate = f"hostile-{HOSTILE.index(way)}" if way in HOSTILE else f"devices/{way}"
    filters = ["#", "energy/v1/#", "energy/v1/meter/+/telemetry", status, "$SYS/#", "$share/own/energy/v1/+/+/status"]
    with Client(production.devices, folder, certificate, kept_s=60) as curious:
        assert set(curious.subscribe(*filters)) == {"Granted QoS 1"}
        device.publish("energy/v1/meter/MTR-1/telemetry", b"while it is there")
        device.publish(status, b"online")
        # Its own words are not for it either. The answer comes after whatever was to be delivered.
        if not {"+", "#"} & {*way}:
            curious.publish(f"energy/v1/meter/{way}/telemetry")
        curious.subscribe("later")
        assert curious.messages == []
    device.publish("energy/v1/meter/MTR-1/telemetry", b"while it is away")
    with Client(production.devices, folder, certificate, kept_s=1) as curious:
        assert curious.session_present
        curious.subscribe("later")
        assert curious.messages == []
    device.publish(status, b"", retain=True)


def test_a_will_on_a_foreign_topic_is_not_sent(
    production: ProductionMosquitto, folder: Path, operator: Client, device: Client
) -> None:
    for topic in ("energy/v1/meter/MTR-1/status", "energy/v1/bridge/wattbridge/status", "energy/v1/meter/MTR-2/status"):
        with (
            contextlib.suppress(AssertionError),
            Client(production.devices, folder, "devices/MTR-2", will=topic) as dying,
        ):
            dying.vanish()
    wait_until(lambda: operator.messages, "the will on its own topic")
    assert seen_until(operator, device, "energy/v1/meter/MTR-1/telemetry") == [
        ("energy/v1/meter/MTR-2/status", b"offline")
    ]


def test_a_retained_message_of_another_stays(
    production: ProductionMosquitto, folder: Path, operator: Client, device: Client
) -> None:
    status = "energy/v1/meter/MTR-1/status"
    assert device.publish(status, b"online", retain=True) == "Success"
    with Client(production.devices, folder, "devices/MTR-2") as hostile:
        assert hostile.publish(status, b"", retain=True) == NOT_AUTHORIZED
    with Client(production.services, folder, "services/wattbridge") as later:
        later.subscribe(status)
        wait_until(lambda: later.messages == [(status, b"online")], "the retained status")
    device.publish(status, b"", retain=True)


def test_a_device_cannot_take_over_a_session_by_its_client_id(
    production: ProductionMosquitto, folder: Path, bridge: Client, device: Client
) -> None:
    for connected in (
        Client(production.devices, folder, "devices/MTR-2", client_id="wattbridge-7"),
        Client(production.passwords, folder, user="MTR-9", client_id="wattbridge-7"),
        Client(production.passwords, folder, user="VEH-9", client_id="MTR-1"),
    ):
        with connected:
            pass
    bridge.subscribe("energy/v1/meter/+/telemetry")
    assert seen_until(bridge, device, "energy/v1/meter/MTR-1/telemetry") == []
    assert (bridge.lost, device.lost) == (None, None)


def test_a_device_is_held_to_its_limits(production: ProductionMosquitto, folder: Path) -> None:
    with Client(production.devices, folder, "devices/MTR-2") as device:
        assert device.welcome
        assert device.welcome.ServerKeepAlive == 300
        assert device.welcome.MaximumQoS == 1
        size = device.welcome.MaximumPacketSize
        assert device.publish("energy/v1/meter/MTR-2/telemetry", b"x" * (size - 100)) != NOT_AUTHORIZED
        assert device.lost is None
        assert device.publish("energy/v1/meter/MTR-2/telemetry", b"x" * size).startswith("disconnected")
    with Client(production.passwords, folder, user="MTR-9") as device:
        device.mqtt.publish("energy/v1/meter/MTR-9/telemetry", b"x", 2)
        wait_until(lambda: device.lost, "the end of a device that speaks QoS 2")


def test_rights_that_are_taken_away_are_gone_at_once(folder: Path, password_file: Path) -> None:
    with (
        ProductionMosquitto(folder, password_file) as broker,
        Client(broker.devices, folder, "devices/MTR-2") as device,
    ):
        topic = "energy/v1/meter/MTR-2/telemetry"
        assert device.publish(topic) != NOT_AUTHORIZED
        with (broker.directory / "acl-devices").open("a") as rules:
            rules.write("user MTR-2\ntopic deny energy/v1/meter/MTR-2/#\n")
        reload(broker)
        assert device.publish(topic) == NOT_AUTHORIZED


# --- what services may do ----------------------------------------------------------------------------------


def test_the_bridge_reads_devices_and_writes_its_own_status_alone(
    bridge: Client, operator: Client, device: Client
) -> None:
    bridge.subscribe("#", "$SYS/broker/clients/#")
    foreign = [*own_topics("MTR-1"), *own_topics("wattbridge"), "energy/v1/bridge/status", "x", "$CONTROL/x"]
    assert set(bridge.publish_each(foreign).values()) == {NOT_AUTHORIZED}
    assert bridge.publish("energy/v1/bridge/wattbridge-7/status", b"online") == "Success"
    device.publish_each(own_topics("MTR-1"), b"of a device")
    expected = [
        ("energy/v1/bridge/wattbridge-7/status", b"online"),
        *((topic, b"of a device") for topic in own_topics("MTR-1")),
    ]
    assert seen_until(bridge, device, "energy/v1/vehicle/MTR-1/telemetry") == expected
    wait_until(lambda: operator.messages[: len(expected)] == expected, "what the operator sees")


def test_the_operator_reads_all_and_writes_nothing(operator: Client) -> None:
    operator.subscribe("$SYS/broker/version")
    wait_until(lambda: operator.messages, "the broker's version")
    assert operator.messages[0][1].startswith(b"mosquitto version")
    topics = [*own_topics("operator"), *own_topics("MTR-1"), "energy/v1/bridge/operator/status", "$CONTROL/x", "x"]
    assert operator.publish_each(topics) == dict.fromkeys(topics, NOT_AUTHORIZED)


def test_the_operator_cannot_take_the_session_of_the_bridge(folder: Path, password_file: Path) -> None:
    topic = "energy/v1/meter/MTR-1/telemetry"
    with (
        ProductionMosquitto(folder, password_file) as broker,
        Client(broker.devices, folder, "devices/MTR-1") as device,
    ):
        with Client(broker.services, folder, "services/wattbridge", client_id="wattbridge", kept_s=60) as bridge:
            bridge.subscribe("energy/v1/meter/+/telemetry")
        assert device.publish(topic, b"while it is away") == "Success"
        # To resume the session, and then to end it.
        for kept_s in (60, 0):
            with Client(broker.passwords, folder, user="operator", client_id="wattbridge", kept_s=kept_s) as thief:
                assert not thief.session_present
                assert thief.subscribe("later") == ["Granted QoS 1"]
                assert thief.messages == []
        with Client(broker.services, folder, "services/wattbridge", client_id="wattbridge", kept_s=60) as bridge:
            assert bridge.session_present
            with Client(broker.passwords, folder, user="operator", client_id="wattbridge"):
                assert seen_until(bridge, device, topic) == [(topic, b"while it is away")]
            assert bridge.lost is None


def test_a_device_with_the_name_of_the_operator_reads_nothing(folder: Path, password_file: Path) -> None:
    """Its name is the operator's client id, so it even gets the session that the operator left."""
    topic = "energy/v1/meter/MTR-1/telemetry"
    with (
        ProductionMosquitto(folder, password_file) as broker,
        Client(broker.devices, folder, "devices/MTR-1") as device,
    ):
        with Client(broker.passwords, folder, user="operator", kept_s=60) as operator:
            operator.subscribe("energy/v1/#", "$SYS/#")
        assert device.publish(topic, b"while the operator is away") == "Success"
        with Client(broker.devices, folder, "named-operator", kept_s=60) as hostile:
            assert hostile.session_present
            hostile.subscribe("energy/v1/#", "$SYS/#", topic)
            device.publish(topic, b"while it is there")
            hostile.subscribe("later")
            assert hostile.messages == []
            assert hostile.publish("energy/v1/bridge/wattbridge/status") == NOT_AUTHORIZED


def test_the_rules_of_the_operator_outlast_a_reload(folder: Path, password_file: Path) -> None:
    topic = "energy/v1/meter/MTR-1/telemetry"
    own = own_topics("operator")
    with (
        ProductionMosquitto(folder, password_file) as broker,
        Client(broker.devices, folder, "devices/MTR-1") as device,
    ):
        with Client(broker.passwords, folder, user="operator", kept_s=60) as operator:
            operator.subscribe("energy/v1/#")
            reload(broker)
            assert operator.publish_each(own) == dict.fromkeys(own, NOT_AUTHORIZED)
            assert seen_until(operator, device, topic) == []
        # Other than those of a user with a certificate, its rules also hold while it is away.
        reload(broker)
        assert device.publish(topic, b"while it is away") == "Success"
        with Client(broker.passwords, folder, user="operator", kept_s=60) as operator:
            assert operator.session_present
            assert operator.publish_each(own) == dict.fromkeys(own, NOT_AUTHORIZED)
            assert seen_until(operator, device, topic) == [(topic, b"while it is away")]


def test_a_session_that_is_left_over_is_ended_as_told(
    production: ProductionMosquitto, folder: Path, tmp_path: Path
) -> None:
    block = next(block for block in blocks("docs/compose.md") if "mosquitto_sub -i wattbridge " in block)
    command = block[block.index("mosquitto_sub") :]
    for old, new in {
        "-h localhost -p 8884": f"-h {production.services.host} -p {production.services.port} -W 5",
        "secrets/own": str(folder),
    }.items():
        assert old in command
        command = command.replace(old, new)
    left_over = {"certificate": "services/wattbridge", "client_id": "wattbridge", "kept_s": 60}
    with Client(production.services, folder, **left_over) as bridge:
        bridge.subscribe("energy/v1/meter/+/telemetry")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=20, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    with Client(production.services, folder, **left_over) as bridge:
        assert not bridge.session_present
        # Nothing is left for other tests.
        bridge.mqtt.disconnect()


def test_the_health_check_of_compose_is_answered(production: ProductionMosquitto, folder: Path) -> None:
    compose = yaml.safe_load((MOSQUITTO.parent / "docker-compose.yml").read_text())
    check = compose["services"]["mosquitto"]["healthcheck"]["test"]
    for old, new in {
        "-h localhost -p 8884": f"-h {production.services.host} -p {production.services.port}",
        "$$": "$",
        "/mosquitto/certs/health": str(folder / "services/health"),
        "/mosquitto/certs/": f"{folder}/",
    }.items():
        assert old in check
        check = check.replace(old, new)
    done = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("seconds\n")


def test_the_operator_looks_with_options_from_a_file(
    production: ProductionMosquitto, folder: Path, tmp_path: Path
) -> None:
    block = next(block for block in blocks("docs/compose.md") if "printf -- '-u operator" in block)
    (tmp_path / "secrets/own").mkdir(parents=True)
    (tmp_path / "secrets/own/operator").write_text(f"{PASSWORD}\n")
    shutil.copy(folder / "service-ca.crt", tmp_path / "secrets/own")
    for old, new in {
        "-h localhost -p 8885": f"-h {production.passwords.host} -p {production.passwords.port} -C 1 -W 5",
        "'energy/v1/#'": "'$SYS/broker/version'",
    }.items():
        assert old in block
        block = block.replace(old, new)
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-e"], input=block, capture_output=True, text=True, check=False, timeout=20, cwd=tmp_path, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("$SYS/broker/version mosquitto version")
    assert stat.S_IMODE((tmp_path / ".config/mosquitto_sub").stat().st_mode) == 0o600


def test_a_service_without_rules_writes_nothing(production: ProductionMosquitto, folder: Path) -> None:
    assert certificates(folder, "service", "somebody").returncode == 0
    with Client(production.services, folder, "services/somebody") as service:
        assert service.publish("energy/v1/bridge/somebody/status") == NOT_AUTHORIZED
        assert service.publish("energy/v1/meter/somebody/telemetry") == NOT_AUTHORIZED


def test_a_shared_subscription_deals_every_message_once(
    production: ProductionMosquitto, folder: Path, device: Client
) -> None:
    pattern = "$share/bridges/energy/v1/meter/+/telemetry"
    with (
        Client(production.services, folder, "services/wattbridge", client_id="wattbridge-1") as first,
        Client(production.services, folder, "services/wattbridge", client_id="wattbridge-2") as second,
    ):
        assert first.subscribe(pattern) == second.subscribe(pattern) == ["Granted QoS 1"]
        for number in range(10):
            assert device.publish("energy/v1/meter/MTR-1/telemetry", str(number).encode()) == "Success"
        wait_until(lambda: len(first.messages) + len(second.messages) == 10, "all ten")
        assert len(first.messages) == len(second.messages) == 5
        assert {payload for _, payload in first.messages + second.messages} == {str(n).encode() for n in range(10)}


def test_nothing_is_lost_while_the_bridge_is_away_and_the_broker_reloads_or_restarts(
    folder: Path, password_file: Path
) -> None:
    shared, alone = "energy/v1/vehicle/MTR-1/telemetry", "energy/v1/meter/MTR-1/telemetry"
    expected = []
    with ProductionMosquitto(folder, password_file) as broker:
        with Client(broker.services, folder, "services/wattbridge", client_id="wattbridge", kept_s=60) as bridge:
            bridge.subscribe("energy/v1/meter/+/telemetry", "$share/bridges/energy/v1/vehicle/+/telemetry")
        for moment in ("away", "reloaded", "restarted", "restarted and reloaded"):
            if moment == "restarted":
                broker.stop()
                broker.start()
            if "reloaded" in moment:
                reload(broker)
            with Client(broker.devices, folder, "devices/MTR-1") as device:
                # Mosquitto 2.0.11 forgets shared subscriptions when it restarts, until the bridge comes back.
                for topic in (alone,) if "restarted" in moment else (alone, shared):
                    assert device.publish(topic, moment.encode()) == "Success"
                    expected.append((topic, moment.encode()))
        with Client(broker.services, folder, "services/wattbridge", client_id="wattbridge", kept_s=60) as bridge:
            assert bridge.session_present
            wait_until(lambda: len(bridge.messages) >= len(expected), "what came meanwhile")
            assert bridge.messages == expected


def reload(broker: ProductionMosquitto) -> None:
    """SIGHUP, and back when the broker has read its files."""
    log = broker.directory / "server.log"
    before = log.read_text().count("Reloading config")
    broker.kill(signal.SIGHUP)
    wait_until(lambda: log.read_text().count("Reloading config") > before, "the reload")


# --- who gets in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listener", ["devices", "services", "passwords"])
def test_the_anonymous_are_refused(production: ProductionMosquitto, folder: Path, listener: str) -> None:
    refused = Client(getattr(production, listener), folder)
    assert refused.welcome is None
    if listener == "passwords":
        assert str(refused.refused) == NOT_AUTHORIZED


@pytest.mark.parametrize("listener", ["devices", "services", "passwords"])
def test_plain_text_is_refused(production: ProductionMosquitto, listener: str) -> None:
    connect = b"\x10\x10\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x03MTR"
    with socket.create_connection(getattr(production, listener), timeout=10) as plain:
        plain.sendall(connect)
        with contextlib.suppress(ConnectionResetError):
            # At most a TLS alert.
            assert plain.recv(100)[:1] in {b"", b"\x15"}
            assert plain.recv(100) == b""


@pytest.mark.parametrize(
    ("listener", "certificate"),
    [
        ("devices", "self-signed"),
        ("devices", "expired-device"),
        ("devices", "services/wattbridge"),
        ("services", "self-signed"),
        ("services", "expired-service"),
        ("services", "devices/MTR-1"),
        ("services", "hostile-0"),
    ],
)
def test_a_certificate_that_is_no_good_is_refused(
    production: ProductionMosquitto, folder: Path, listener: str, certificate: str
) -> None:
    refused = Client(getattr(production, listener), folder, certificate)
    assert refused.welcome is None


def handshake(place: Place, folder: Path, version: ssl.TLSVersion, ciphers: str = "ALL:@SECLEVEL=0") -> str | None:
    """The TLS version that both agree on."""
    context = ssl.create_default_context(cafile=folder / "service-ca.crt")
    context.load_cert_chain(folder / "devices/MTR-1.crt", folder / "devices/MTR-1.key")
    context.set_ciphers(ciphers)
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(place, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return connection.version()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(production: ProductionMosquitto, folder: Path) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version"):
        handshake(production.devices, folder, ssl.TLSVersion.TLSv1_1)
    with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure"):
        handshake(production.devices, folder, ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA256")
    assert handshake(production.devices, folder, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert handshake(production.devices, folder, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


@pytest.mark.parametrize(
    ("user", "password"), [("MTR-9", "guess"), ("MTR-9", ""), ("MTR-1", PASSWORD), ("wattbridge", PASSWORD)]
)
def test_a_wrong_password_is_refused(production: ProductionMosquitto, folder: Path, user: str, password: str) -> None:
    refused = Client(production.passwords, folder, user=user, password=password)
    assert str(refused.refused) == NOT_AUTHORIZED


def test_passwords_are_added_and_removed_while_the_broker_runs(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    passwords(file, "add", "MTR-9", answer=f"{PASSWORD}\n")
    with (
        ProductionMosquitto(folder, file) as broker,
        Client(broker.passwords, folder, user="MTR-9") as removed,
    ):
        shown = passwords(file, "add", "VEH-8").stdout.split()
        passwords(file, "remove", "MTR-9")
        broker.install()
        reload(broker)
        wait_until(lambda: removed.lost, "the end of the one who was removed")
        with Client(broker.passwords, folder, user=shown[0], password=shown[1]) as added:
            assert added.publish("energy/v1/vehicle/VEH-8/telemetry") == "No matching subscribers"


def test_a_revoked_certificate_is_refused_and_a_renewed_one_is_not(
    folder: Path, password_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "certificates"
    shutil.copytree(folder, own)
    assert certificates(own, "revoke", "device", "MTR-2").returncode == 0
    broker = ProductionMosquitto(own, password_file)
    broker.crl = True
    with broker:
        assert Client(broker.devices, own, "devices/MTR-2").welcome is None
        shutil.copy(own / "devices/MTR-1.crt", own / "stolen.crt")
        shutil.copy(own / "devices/MTR-1.key", own / "stolen.key")
        assert certificates(own, "device", "MTR-1", options=("--replace",)).returncode == 0
        with Client(broker.devices, own, "stolen"):
            pass
        # Also what it had before is revoked, and not what it gets afterwards.
        assert certificates(own, "revoke", "device", "MTR-1").returncode == 0
        assert certificates(own, "device", "MTR-1", options=("--replace",)).returncode == 0
        broker.install()
        reload(broker)
        assert Client(broker.devices, own, "stolen").welcome is None
        assert Client(broker.devices, own, "devices/MTR-2").welcome is None
        with Client(broker.devices, own, "devices/MTR-1"), Client(broker.devices, own, "devices/VEH-1"):
            pass


def test_the_broker_takes_a_renewed_certificate_without_a_restart(
    folder: Path, password_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "certificates"
    shutil.copytree(folder, own)

    def shown(broker: ProductionMosquitto) -> str:
        return ssl.get_server_certificate(broker.passwords, timeout=10)

    with ProductionMosquitto(own, password_file) as broker:
        before = shown(broker)
        assert certificates(own, "server", "localhost", "127.0.0.1", options=("--replace",)).returncode == 0
        broker.install()
        reload(broker)
        wait_until(lambda: shown(broker) != before, "the new certificate")
        with Client(broker.devices, own, "devices/MTR-1"):
            pass


# --- the daemon --------------------------------------------------------------------------------------------


def tls(folder: Path, certificate: str = "services/wattbridge", **settings: object) -> dict[str, object]:
    return {
        "mqtt__tls__enabled": True,
        "mqtt__tls__ca_file": folder / "service-ca.crt",
        "mqtt__tls__cert_file": folder / f"{certificate}.crt",
        "mqtt__tls__key_file": folder / f"{certificate}.key",
        "client_id": "wattbridge-1",
        **settings,
    }


def test_the_bridge_stores_what_devices_say_of_themselves(
    production: ProductionMosquitto, folder: Path, database: str, tmp_path: Path
) -> None:
    moment = now()
    with (
        Daemon(
            database, production.services, "energy/v1", tmp_path, **tls(folder, mqtt__share_group="bridges")
        ) as daemon,
        Client(production.passwords, folder, user="operator") as operator,
        Client(production.devices, folder, "devices/MTR-1") as device,
        Client(production.passwords, folder, user="VEH-9") as guest,
    ):
        operator.subscribe("energy/v1/bridge/+/status")
        wait_until(lambda: (daemon.status_topic, b"online") in operator.messages, "the bridge's own status")
        for name in ("MTR-2", "wattbridge"):
            assert say(guest, "meter", name, meter(name, moment)) == NOT_AUTHORIZED
            assert say(device, "meter", name, meter(name, moment)) == NOT_AUTHORIZED
        assert say(device, "meter", "MTR-1", meter("MTR-1", moment)) == "Success"
        assert say(guest, "vehicle", "VEH-9", vehicle("VEH-9", moment)) == "Success"
        wait_for_received(database, 2)
        assert daemon.terminate() == 0
        wait_until(lambda: (daemon.status_topic, b"offline") in operator.messages, "its goodbye")
        assert daemon.events("mqtt.waiting") == []
    assert check_books(database).stored == 2
    assert letters(database) == []


def say(sender: Client, kind: str, name: str, reading: dict[str, Any]) -> str:
    return sender.publish(f"energy/v1/{kind}/{name}/telemetry", json.dumps(reading).encode())


@pytest.mark.parametrize("certificate", ["expired-service", "devices/MTR-1"])
def test_with_a_certificate_that_is_no_good_it_ends_with_3_and_says_so(
    production: ProductionMosquitto, folder: Path, database: str, tmp_path: Path, certificate: str
) -> None:
    settings = tls(folder, certificate)
    with Daemon(database, production.services, "energy/v1", tmp_path, ready=False, **settings) as daemon:
        assert daemon.wait(10) == 3
    assert "does not accept our certificate, see mqtt.tls" in daemon.log
    assert "Traceback" not in daemon.log


def test_check_finds_everything_in_order(
    production: ProductionMosquitto, folder: Path, database: str, tmp_path: Path, device: Client
) -> None:
    settings = tls(folder)
    client_id = str(settings.pop("client_id"))
    env = environment(database, production.services, "energy/v1", client_id, **settings)
    reply = wattbridge_here("check", "--listen", "0.1s", env=env, cwd=tmp_path)
    assert reply.code == 0, reply.out
    assert reply.out.count("problem") == 0
    assert {what: row(reply, what).mark for what in ("broker", "subscriptions", "session", "queue")} == dict.fromkeys(
        ("broker", "subscriptions", "session", "queue"), "ok"
    )
    assert "the broker kept all of 1,500 messages" in row(reply, "queue").said
    # It may read the three numbers that tell of losses.
    assert "mosquitto version" in row(reply, "broker").said
    assert re.search("since its start|tells of none within the last minute", row(reply, "dropped").said)


# --- what the documents tell to type -----------------------------------------------------------------------


def blocks(document: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", (MOSQUITTO.parent / document).read_text(), re.MULTILINE | re.DOTALL)


def test_the_ten_commands_can_be_pasted_and_write_nothing_into_the_checkout(tmp_path: Path) -> None:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    shutil.copytree(MOSQUITTO, checkout / "mosquitto")
    home.mkdir()
    before = files(checkout)
    # As the user who runs the tests, to a place of its own, and without the last one, which is the broker.
    commands = blocks("mosquitto/README.md")[0].replace("-o mosquitto ", "").replace(" /mosquitto/", f" {home}/")
    *lines, last = commands.splitlines(keepends=True)
    assert last.startswith("mosquitto -c ")
    done = subprocess.run(
        ["bash", "-e"],
        # What reads the standard input swallows the lines after it, as in a terminal.
        input="".join(lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=checkout,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^operator \S{32}\nMTR-000002 \S{32}$", done.stdout, re.MULTILINE)
    assert files(checkout) == before
    assert set(files(home / "config")) == {
        "mosquitto.conf",
        "passwords",
        "acl/devices",
        "acl/passwords",
        "acl/services",
    }
    assert set(files(home / "certs")) == {"service-ca.crt", "device-ca.crt", "server.crt", "server.key"}


# --- the configuration file and the bridge's own -----------------------------------------------------------


def directives() -> dict[str, str]:
    lines = (MOSQUITTO / "mosquitto.conf").read_text().splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines if line and line[0] != "#")}


def test_the_broker_keeps_a_session_longer_than_the_bridge_asks_for() -> None:
    days = int(directives()["persistent_client_expiration"].removesuffix("d"))
    assert days * 86_400 > Config.model_validate({}).mqtt.session_expiry_s


def test_what_the_broker_takes_from_a_device_it_can_hand_to_the_bridge() -> None:
    # As much again would be enough for any topic and properties that the broker has to repeat.
    assert int(directives()["max_packet_size"]) <= Config.model_validate({}).mqtt.max_packet_size / 2


def test_every_secret_the_repository_names_is_a_path() -> None:
    for file in MOSQUITTO.rglob("*"):
        if file.is_file():
            assert "PRIVATE KEY" not in file.read_text()
            assert not re.search(r"\$7\$\d+\$\w{8}", file.read_text())


# --- the tool for certificates -----------------------------------------------------------------------------


@pytest.fixture
def authority(folder: Path, tmp_path: Path) -> Path:
    """A directory with the two authorities alone."""
    own = tmp_path / "authority"
    own.mkdir()
    for ca in ("service-ca", "device-ca"):
        for end in ("crt", "key"):
            shutil.copy(folder / f"{ca}.{end}", own / f"{ca}.{end}")
    return own


def files(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    keys = [folder / name for name in ("service-ca.key", "device-ca.key", "server.key", "devices/MTR-1.key")]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((folder / "devices").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "server.crt").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "arguments",
    [("ca",), ("server", "localhost"), ("service", "wattbridge"), ("device", "NEW-1", "MTR-1"), ("device", "MTR-1")],
)
def test_nothing_is_overwritten(folder: Path, arguments: tuple[str, ...]) -> None:
    before = files(folder)
    done = certificates(folder, *arguments)
    assert done.returncode == 1
    assert "left as it is" in done.stderr
    assert files(folder) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is no name"),
        ("a/b", "is no name"),
        ("+", "is no name"),
        ("#", "is no name"),
        ("a b", "is no name"),
        ("a\nb", "is no name"),
        ("ä", "is no name"),
        ("../x", "is no name"),
        ("x" * 65, "65 characters"),
        ("wattbridge", "reserved name"),
        ("wattbridge-1", "reserved name"),
        ("operator", "reserved name"),
    ],
)
def test_a_bad_device_name_makes_nothing(authority: Path, name: str, said: str) -> None:
    before = files(authority)
    done = certificates(authority, "device", "GOOD-1", name)
    assert done.returncode == 1
    assert said in done.stderr
    assert files(authority) == before


def test_every_good_device_name_has_a_certificate_with_that_name(authority: Path) -> None:
    names = ["x" * 64, "-a:b", ".A_b.c"]
    assert certificates(authority, "device", *names).returncode == 0
    listed = certificates(authority, "list").stdout.splitlines()
    assert {line.split()[1] for line in listed if line.startswith("device ")} == set(names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("device", "MTR-1"), "make it with"),
        (("server", "localhost"), "make it with"),
        (("list",), "there is no directory"),
        (("server", "not a host"), "neither a host name nor an IP address"),
        (("revoke", "device", "MTR-1"), "there is no devices/MTR-1.crt"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = certificates(tmp_path / "nothing", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_misuse_ends_with_2(tmp_path: Path) -> None:
    for options, arguments in (
        ((), ("mistake",)),
        ((), ("device",)),
        ((), ("service", "a", "b")),
        ((), ("revoke", "MTR-1")),
        (("--days", "0"), ("ca",)),
        (("--years", "1"), ("ca",)),
        (("--replace",), ("ca",)),
    ):
        done = certificates(tmp_path, *arguments, options=options)
        assert done.returncode == 2
        assert "--help" in done.stderr
    assert certificates(tmp_path, options=("--help",)).returncode == 0
    assert files(tmp_path) == {}


def test_a_certificate_does_not_outlive_its_ca(authority: Path) -> None:
    before = files(authority)
    done = certificates(authority, "device", "MTR-1", options=("--days", "4000"))
    assert done.returncode == 1
    assert "ends before these 4000 days" in done.stderr
    assert files(authority) == before


def test_list_tells_what_is_the_matter(authority: Path) -> None:
    certificates(authority, "device", "OLD-1", options=("--days", "20"))
    certificates(authority, "device", "GONE-1", "GOOD-1")
    certificates(authority, "revoke", "device", "GONE-1")
    said = certificates(authority, "list").stdout
    matters = {
        line.split()[1]: line.split("GMT")[1].strip() for line in said.splitlines() if line.startswith("device ")
    }
    assert matters == {"OLD-1": "ends within 30 days", "GONE-1": "revoked", "GOOD-1": "ok"}


def test_without_openssl_it_says_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, CERTIFICATES, tmp_path / "new", "ca"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "openssl is not installed" in done.stderr


@pytest.mark.parametrize("how", ["fails", "is interrupted"])
def test_nothing_half_made_stays(authority: Path, tmp_path: Path, how: str) -> None:
    """Its openssl makes the key, and then it goes wrong."""
    tools = tmp_path / "tools"
    tools.mkdir()
    wrong = "exit 1" if how == "fails" else f"touch {tmp_path}/waiting; exec sleep 0.2"
    (tools / "openssl").write_text(
        f'#!/bin/sh\n[ "$1" = req ] && {{ {wrong}; }}\nexec {shutil.which("openssl")} "$@"\n'
    )
    (tools / "openssl").chmod(0o755)
    before = files(authority)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    with LeashedProcess([CERTIFICATES, authority, "device", "MTR-1"], env=env, stderr=subprocess.DEVNULL) as process:
        if how == "is interrupted":
            wait_until((tmp_path / "waiting").exists, "openssl at work")
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == (1 if how == "fails" else 143)
    assert files(authority) == before
    assert not [path for path in authority.iterdir() if path.name.startswith(".new")]


# --- the tool for passwords --------------------------------------------------------------------------------


def test_a_password_file_is_as_mosquitto_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    assert passwords(file, "add", "MTR-1", answer="first\n").returncode == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert re.fullmatch(r"MTR-1:\$7\$\d+\$[A-Za-z0-9+/]{16}\$[A-Za-z0-9+/]{86}==\n", file.read_text())
    assert "first" not in file.read_text()


def test_users_are_added_changed_removed_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    shown = passwords(file, "add", "MTR-1", "MTR-2").stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["MTR-1", "MTR-2"]
    assert all(len(line.split()[1]) == 32 for line in shown)
    assert len({line.split()[1] for line in shown}) == 2
    first = file.read_text()
    assert passwords(file, "add", "MTR-1", answer="changed").stdout == ""
    assert [line.partition(":")[0] for line in file.read_text().splitlines()] == ["MTR-1", "MTR-2"]
    assert file.read_text().splitlines()[0] != first.splitlines()[0]
    assert file.read_text().splitlines()[1] == first.splitlines()[1]
    assert passwords(file, "remove", "MTR-1").returncode == 0
    assert passwords(file, "list").stdout == "MTR-2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["passwords"]


@pytest.mark.parametrize(
    "name", ["", "a:b", "a/b", "+", "#", "a b", "wattbridge", "wattbridge-2", "operator-2", "x" * 129]
)
def test_a_bad_user_name_changes_nothing(tmp_path: Path, name: str) -> None:
    file = tmp_path / "passwords"
    done = passwords(file, "add", "MTR-1", name, answer="secret\n")
    assert done.returncode == 1
    assert re.search("is no name|reserved name", done.stderr)
    assert not file.exists()


def test_an_unknown_user_and_a_missing_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    assert "No such file" in passwords(file, "list").stderr
    passwords(file, "add", "MTR-1", answer="secret\n")
    before = file.read_text()
    done = passwords(file, "remove", "MTR-1", "MTR-2")
    assert (done.returncode, "does not know MTR-2" in done.stderr) == (1, True)
    assert file.read_text() == before
    assert passwords(file, "mistake").returncode == 2
