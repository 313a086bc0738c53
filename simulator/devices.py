"""One MQTT connection per device, as in the field: its own client id, last will, status and credentials.

Thousands of them live in one process, so nothing here goes over all connections for a message or a tick.
"""

import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic

from simulator.connection import Broker, Identity
from simulator.messages import Link, Message
from simulator.pool import Pool

IN_FLIGHT = 5000
"""Messages that all devices together have on the way: enough to keep a broker busy, few enough to be answered soon."""

KEEP_ALIVE_S = 120
"""Long enough that a device that publishes every minute needs no pings."""

SPARE_FILES = 64
"""Open files besides the connections: standard streams, the ledger, the event loop, libraries."""

QUIET_S = 5.0
"""After a trouble was reported, the troubles of other devices are not for so long."""


PROGRESS_S = 1.0
"""How often is said how many are connected, until all are."""


class LimitError(Exception):
    """The operating system does not allow so many connections; the message says how to change that."""


def allow_files(connections: int) -> None:
    """Raise this process's limit of open files, where it must be, so that `connections` can be made.

    Raises:
        LimitError: the limit that only an administrator can raise is too low.
    """
    needed = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LimitError(
            f"{connections:,} connections need {needed:,} open files, and this shell allows {hard:,}; raise it with: "
            f"sudo prlimit --pid $$ --nofile={needed}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def fill(template: str, kind: str, device_id: str) -> str:
    """Return a template with `{kind}` and `{device_id}` filled in; other braces stay as they are."""
    return template.replace("{kind}", kind).replace("{device_id}", device_id)


def identify(broker: Broker, topic_root: str, meter_ids: Sequence[str], vehicle_ids: Sequence[str]) -> list[Identity]:
    """Return who the devices are to the broker, by their numbers: first the meters, then the vehicles."""
    devices = [("meter", device_id) for device_id in meter_ids] + [("vehicle", device_id) for device_id in vehicle_ids]
    root = topic_root.strip("/")
    return [
        Identity(
            client_id=fill(broker.client_id or "{device_id}", kind, device_id),
            username=None if broker.username is None else fill(broker.username, kind, device_id),
            password=None if broker.password is None else fill(broker.password, kind, device_id),
            status=f"{root}/{kind}/{device_id}/status",
            device_id=device_id,
        )
        for kind, device_id in devices
    ]


class Devices(Pool):
    """A fleet in which every device has its own connection; a message's `device` says whose it is."""

    def __init__(
        self,
        broker: Broker,
        identities: Sequence[Identity],
        on_event: Callable[[str], None] | None = None,
        settle: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare one connection for each identity; `allow_files` first."""
        broker = replace(broker, keep_alive_s=KEEP_ALIVE_S)
        super().__init__(broker, identities, on_event=on_event, settle=settle, limit=IN_FLIGHT)
        self._without_network: set[int] = set()
        self._quiet_until = 0.0
        self._next_progress = monotonic() + PROGRESS_S

    def offer(self, messages: Sequence[Message]) -> None:
        """Take messages and send what the windows allow; await `room` before offering more."""
        connections = self._connections
        without_network = self._without_network
        touched = set()
        for message in messages:
            device = message.device
            connections[device].offer(message)
            if device in without_network:
                self._held += 1
            else:
                touched.add(device)
        self.counters.offered += len(messages)
        for device in touched:
            connections[device].flush()

    def link(self, link: Link) -> None:
        """Cut a device's connection without a goodbye, or let it come back."""
        connection = self._connections[link.device]
        if link.up and link.device in self._without_network:
            self._without_network.remove(link.device)
            self._held -= connection.outstanding
            connection.restore()
        elif (
            not link.up
            and link.device not in self._without_network
            # Faster than connections come back, what they hold would grow without end.
            and (connection.accepted or self._held < IN_FLIGHT)
        ):
            self._without_network.add(link.device)
            self._held += connection.outstanding
            connection.cut()
        self._cut = len(self._without_network)

    async def ready(self) -> None:
        """Wait until every device has been connected."""
        await self._ready.wait()

    async def settled(self) -> None:
        """Give every device its network back, and wait until every message is acknowledged."""
        for device in list(self._without_network):
            self.link(Link(0, device, up=True))
        await super().settled()

    def entered(self) -> None:
        """Count a device that the broker has accepted, and say how far they are."""
        super().entered()
        total = len(self._connections)
        if not self._ready.is_set() and monotonic() > self._next_progress:
            self._next_progress = monotonic() + PROGRESS_S
            self._report(f"connecting to {self._broker}: {self.connected:,} of {total:,} devices")

    def troubled(self, trouble: str) -> None:
        """Report that a device lost its connection, or could not make it; one device speaks for all."""
        if self._complete or monotonic() > self._quiet_until:
            self._quiet_until = monotonic() + QUIET_S
            super().troubled(trouble)
        self._complete = False

    def _welcome(self) -> str:
        return f"{self.connected:,} devices connected to {self._broker}"
