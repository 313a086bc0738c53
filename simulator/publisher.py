"""Brings messages to an MQTT 5 broker with QoS 1 and keeps each one until the broker has acknowledged it.

A few connections carry the whole fleet; the messages of one device always take the same one, so their
order holds. What a lost connection leaves unacknowledged is sent again, marked as a duplicate and in its
old order, before anything new. Memory is bounded by the habit of its user to `offer` a few hundred messages
and then wait for `room`.
"""

from collections.abc import Callable, Sequence
from uuid import uuid4

from simulator.connection import Broker, Identity
from simulator.messages import Link, Message
from simulator.pool import LIMIT, Pool


class Publisher(Pool):
    """A fleet behind a few connections."""

    def __init__(
        self,
        broker: Broker,
        on_event: Callable[[str], None] | None = None,
        settle: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare; a client id that is given gets a number where there are several connections."""
        count = broker.connections or 1
        name = broker.client_id or f"wattbridge-simulator-{uuid4().hex[:12]}"
        names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
        identities = [Identity(name, broker.username, broker.password) for name in names]
        # A window in flight and another one ready, for each.
        limit = min(2 * broker.window * count, LIMIT)
        super().__init__(broker, identities, on_event=on_event, settle=settle, limit=limit)

    def offer(self, messages: Sequence[Message]) -> None:
        """Take messages and send what the windows allow; await `room` before offering more."""
        connections = self._connections
        count = len(connections)
        for message in messages:
            connections[message.device % count].offer(message)
        self.counters.offered += len(messages)
        for connection in connections:
            connection.flush()

    def link(self, link: Link) -> None:
        """Do nothing: devices that share a connection do not lose it alone."""

    async def ready(self) -> None:
        """Return at once: a few connections are made in no time, or not soon at all."""
