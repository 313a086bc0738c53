"""What systemd wants to know of a service, in the words of sd_notify(3). Without systemd nothing happens."""

import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger()


class Supervisor:
    """Says how we are over the datagram socket that `environment` names. That it cannot be reached is logged once.

    `patience_s` is the time after which systemd ends us if it hears no `feed`; None where it does not watch.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        # An @ stands for the NUL of an abstract socket.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._reachable = True
        self.patience_s = _patience(environment) if name else None

    def ready(self, status: str) -> None:
        """Start-up is complete."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """How we are, in a line for people."""
        self._send(f"STATUS={status}")

    def feed(self) -> None:
        """We are alive and do our work."""
        if self.patience_s:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """We are about to end."""
        self._send("STOPPING=1")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        message = "\n".join(" ".join(assignment.split("\n")) for assignment in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if self._reachable:
                log.warning("supervisor.unreachable", socket=self._address, reason=str(error))
            self._reachable = False
        else:
            self._reachable = True


def _patience(environment: Mapping[str, str]) -> float | None:
    """The supervisor's patience in seconds, where it is meant for this very process."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    meant = environment.get("WATCHDOG_PID") in (None, str(os.getpid()))
    return int(microseconds) / 1_000_000 if meant and microseconds.isdecimal() and int(microseconds) else None
