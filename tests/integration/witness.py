"""An independent subscriber that notes what a broker was given."""

import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE_S = 30.0


class Witness:
    """A paho client with a persistent session that notes everything it is sent under a topic."""

    def __init__(self, host: str, port: int, root: str, *, username: str | None = None) -> None:
        self.received: list[tuple[str, bytes]] = []
        self._distinct: set[tuple[str, bytes]] = set()
        self._readings = 0
        self._changed = threading.Condition()
        self._root = root
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"witness-{uuid.uuid4().hex}", protocol=paho.MQTTv5
        )
        if username is not None:
            self._client.username_pw_set(username, username)
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

    @property
    def telemetry(self) -> list[tuple[str, bytes]]:
        """What came on topics of readings."""
        with self._changed:
            return [message for message in self.received if message[0].endswith("/telemetry")]

    def statuses(self) -> dict[str, list[bytes]]:
        """What each device said of itself, by its id."""
        said = defaultdict(list)
        with self._changed:
            for topic, payload in self.received:
                if topic.endswith("/status"):
                    said[topic.split("/")[-2]].append(payload)
        return said

    def wait_for(self, distinct: int) -> None:
        """Return when so many different messages are there, or patience has ended."""
        self.wait_until(lambda: len(self._distinct) >= distinct)

    def wait_for_telemetry(self, distinct: int) -> bool:
        """Return when so many different messages are there on topics of readings (true), or patience has ended."""
        return self.wait_until(lambda: self._readings >= distinct)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Return when the condition holds (true), or patience has ended (false)."""
        with self._changed:
            return self._changed.wait_for(condition, PATIENCE_S)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        client.subscribe(f"{self._root}/#", qos=1)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        with self._changed:
            said = (message.topic, bytes(message.payload))
            self.received.append(said)
            self._readings += said not in self._distinct and message.topic.endswith("/telemetry")
            self._distinct.add(said)
            self._changed.notify()


def by_topic(messages: list[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    """Group payloads by topic, each at its first occurrence."""
    grouped: dict[str, dict[bytes, None]] = defaultdict(dict)
    for topic, payload in messages:
        grouped[topic][payload] = None
    return {topic: list(payloads) for topic, payloads in grouped.items()}
