#!/usr/bin/env python3
"""Writes what docker-compose.yml needs and no repository may hold: .env, and secrets/ with passwords and certificates.

What exists is kept; only the copies for the containers are brought up to date. So it is run again after every change
by `mosquitto/passwords secrets/own/passwords …` or `mosquitto/certificates secrets/own …`. Needs bash and openssl.
"""

import argparse
import ipaddress
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECRETS = ROOT / "secrets"
# What no container sees: the certificate authorities, all certificates, the passwords of devices and of the operator.
OWN = SECRETS / "own"

# Passwords, each in a file of its own, by the names that they have in docker-compose.yml.
PASSWORDS = (
    "database_superuser",
    "database_owner",
    "database_bridge",
    "database_grafana",
    "database_web",
    "web_token",
    "grafana_admin",
    "simulated_devices",
)
# The devices of the profile "demo" by the names that the simulator gives them. They share one password.
SIMULATED = [f"{kind}-{number:06d}" for kind in ("MTR", "VEH") for number in range(1, 101)]

# Copies for the containers, from what is in OWN. Lists of revoked certificates only exist once one was revoked.
COPIES = {
    "mosquitto/server.crt": "server.crt",
    "mosquitto/server.key": "server.key",
    "mosquitto/service-ca.crt": "service-ca.crt",
    "mosquitto/service-ca.crl": "service-ca.crl",
    "mosquitto/device-ca.crt": "device-ca.crt",
    "mosquitto/device-ca.crl": "device-ca.crl",
    "mosquitto/health.crt": "services/health.crt",
    "mosquitto/health.key": "services/health.key",
    "mosquitto_passwords": "passwords",
    "broker_ca.crt": "service-ca.crt",
    "bridge.crt": "services/wattbridge.crt",
    "bridge.key": "services/wattbridge.key",
}

ENV = """\
# Made by `make secrets`, read by docker compose. Yours to change: it is not written again.
COMPOSE_PROJECT_NAME=wattbridge
SECRETS=./secrets
# Only for several bridges (docs/compose.md). A secret, the one in this file: with it a device could join the group.
SHARE_GROUP={group}

# What may be set besides, with the values that hold without it:
"""


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description="Makes .env and secrets/ for docker-compose.yml; keeps what exists.")
    parser.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name or an address under which devices reach the broker, for its certificate; may be repeated",
    )
    hosts = ["mosquitto", "localhost", *parser.parse_args().host]
    os.umask(0o077)
    # The users in the containers have other numbers than anybody here, and only root could give them files. So all may
    # read what is in this directory, and nobody but its owner gets into it: a container gets its files by mounts.
    for directory in (SECRETS, OWN, SECRETS / "mosquitto"):
        directory.mkdir(exist_ok=True)
    SECRETS.chmod(0o700)
    (SECRETS / "mosquitto").chmod(0o755)
    try:
        _passwords()
        _certificates(hosts)
        _copies()
    except OSError as error:
        sys.exit(f"secrets: {error}")
    if not (ROOT / ".env").exists():
        known = re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
        text = ENV.format(group=f"bridges-{secrets.token_hex(16)}")
        _write(ROOT / ".env", text + "".join(f"# {name}={value}\n" for name, value in dict(known).items()), 0o600)
    if strange := [host for host in hosts if not _is_for(host)]:
        sys.exit(
            f"secrets: the broker's certificate is not for {', '.join(strange)}. Make it anew, with all names:\n"
            f"  mosquitto/certificates --replace secrets/own server {' '.join(hosts)} && make secrets"
        )
    print("secrets/ and .env are complete; what was there already has been kept")


def _passwords() -> None:
    for name in PASSWORDS:
        if not (SECRETS / name).exists():
            _write(SECRETS / name, f"{secrets.token_urlsafe(32)}\n", 0o644)
    known, operator = OWN / "passwords", OWN / "operator"
    new = not known.exists()
    if new:
        given = (SECRETS / "simulated_devices").read_text(encoding="utf-8")
        _run("passwords", known, "add", *SIMULATED, told=given)
        print(f"made {known.relative_to(ROOT)} with {len(SIMULATED)} simulated devices")
    # Not whenever the broker does not know the operator: somebody may have removed it.
    if new or not operator.exists():
        password = operator.read_text(encoding="utf-8") if operator.exists() else f"{secrets.token_urlsafe(32)}\n"
        _run("passwords", known, "add", "operator", told=password)
        if not operator.exists():
            _write(operator, password, 0o600)


def _certificates(hosts: list[str]) -> None:
    for made, command in {
        "service-ca.crt": ["ca"],
        "server.crt": ["server", *hosts],
        "services/wattbridge.crt": ["service", "wattbridge"],
        "services/health.crt": ["service", "health"],
    }.items():
        if not (OWN / made).exists():
            _run("certificates", OWN, *command)
            print(f"made {(OWN / made).relative_to(ROOT)}")


def _copies() -> None:
    for name, source in COPIES.items():
        copy = SECRETS / name
        if not (OWN / source).exists():
            continue
        text = (OWN / source).read_text(encoding="utf-8")
        if not copy.exists():
            _write(copy, text, 0o644)
        elif copy.read_text(encoding="utf-8") != text:
            # Not a new file in its place: a running container would go on seeing the old one.
            copy.write_text(text, encoding="utf-8")
            print(f"brought {copy.relative_to(ROOT)} up to date")


def _write(file: Path, text: str, mode: int) -> None:
    """Makes the file, as a whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        new.chmod(mode)
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    print(f"made {file.relative_to(ROOT)}")


def _run(program: str, *arguments: str | Path, told: str = "") -> None:
    """Runs a program of mosquitto/, which says itself what is wrong."""
    command = [ROOT / "mosquitto" / program, *arguments]
    if subprocess.run(command, input=told, text=True, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"secrets: mosquitto/{program} could not do its part")


def _is_for(host: str) -> bool:
    """Whether the broker's certificate is for this name or address."""
    try:
        ipaddress.ip_address(host)
        asked = "-checkip"
    except ValueError:
        asked = "-checkhost"
    command = ["openssl", "x509", "-in", OWN / "server.crt", "-noout", asked, host]
    return "does match" in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
