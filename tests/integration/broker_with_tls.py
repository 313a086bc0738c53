"""A Mosquitto that runs the configuration of mosquitto/, with certificates and passwords made by its scripts."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bridge.services import PrivateMosquitto, free_port

MOSQUITTO = Path(__file__).parents[2] / "mosquitto"
CERTIFICATES = MOSQUITTO / "certificates"
PASSWORDS = MOSQUITTO / "passwords"


class Place(NamedTuple):
    """Where one of its listeners is."""

    host: str
    port: int


class ProductionMosquitto(PrivateMosquitto):
    """Mosquitto with mosquitto/mosquitto.conf, of which only paths and ports are others, and `extra` lines at its top.

    `certificates` is a directory that the script has filled.
    """

    def __init__(self, certificates: Path, passwords: Path, extra: str = "") -> None:
        super().__init__()
        self._certificates = certificates
        self._passwords = passwords
        self.extra = extra
        self.crl = False

    @property
    def devices(self) -> Place:
        """The listener for devices with a certificate."""
        return Place(self.host, self.port)

    @property
    def services(self) -> Place:
        """The listener for the bridge."""
        return Place(self.host, self._services_port)

    @property
    def passwords(self) -> Place:
        """The listener for devices with a password, and for people."""
        return Place(self.host, self._passwords_port)

    def install(self) -> None:
        """Copies rules, passwords and certificates to where this Mosquitto may read them, as a deployment does."""
        for name in ("devices", "passwords", "services"):
            self._write(f"acl-{name}", (MOSQUITTO / "acl" / name).read_text())
        for name in ("server.crt", "server.key", "service-ca.crt", "device-ca.crt", "device-ca.crl"):
            if (file := self._certificates / name).exists():
                self._write(name, file.read_text())
        self._write("passwords", self._passwords.read_text())

    def _prepare(self) -> None:
        super()._prepare()
        self._services_port, self._passwords_port = free_port(), free_port()

    def _answers(self) -> bool:
        # The last of its listeners is open when all are; TLS errors of such a visit are not ours.
        try:
            socket.create_connection(self.passwords, timeout=1).close()
        except OSError:
            return False
        return True

    def _command(self) -> list[str | Path]:
        self.install()
        text = (MOSQUITTO / "mosquitto.conf").read_text()
        changes = {
            "listener 8883": f"listener {self.port} {self.host}",
            "listener 8884": f"listener {self._services_port} {self.host}",
            "listener 8885": f"listener {self._passwords_port} {self.host}",
            "/mosquitto/config/acl/": f"{self.directory}/acl-",
            "/mosquitto/config/": f"{self.directory}/",
            "/mosquitto/certs/": f"{self.directory}/",
            "/mosquitto/data/": f"{self.directory}/",
        } | ({"# crlfile /mosquitto/certs/device": f"crlfile {self.directory}/device"} if self.crl else {})
        # The longest first: a path may begin with another.
        for old in sorted(changes, key=len, reverse=True):
            if old not in text:
                raise AssertionError(f"mosquitto.conf has no {old}")
            text = text.replace(old, changes[old])
        return [super()._command()[0], "-c", self._write("mosquitto.conf", f"{self.extra}\n{text}")]


def certificates(directory: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the script on this directory."""
    command = [str(CERTIFICATES), *options, str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def passwords(file: Path, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the script on this file; `answer` is what it reads."""
    command = [sys.executable, str(PASSWORDS), str(file), *arguments]
    return subprocess.run(command, input=answer, capture_output=True, text=True, check=False, timeout=60)
