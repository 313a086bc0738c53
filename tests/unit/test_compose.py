import base64
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.main import get_command

from bridge.cli import app
from bridge.config import Config, load
from bridge.messages import Limits, decode_telemetry
from bridge.topics import Kind
from simulator.fleet import FleetConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LASTING = [name for name, service in SERVICES.items() if service["restart"] != "no"]
OURS = ["migrate", "bridge", "web", "simulator"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MOSQUITTO = (ROOT / "mosquitto" / "mosquitto.conf").read_text()


def make_secrets(place: Path, *options: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, place / "config" / "make_secrets.py", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": path},
    )


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """What `make secrets` needs, elsewhere."""
    for name in ("config/make_secrets.py", "mosquitto/certificates", "mosquitto/passwords", "docker-compose.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place in which the secrets have been made, and what was said."""
    place = tmp_path_factory.mktemp("made")
    for name in ("config/make_secrets.py", "mosquitto/certificates", "mosquitto/passwords", "docker-compose.yml"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    reply = make_secrets(place, "--host", "broker.example", "--host", "192.0.2.7")
    assert reply.returncode == 0, reply.stderr
    return place, reply.stdout + reply.stderr


@pytest.fixture
def made(made_once: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(made_once[0], tmp_path / "copy")


def passwords(place: Path) -> dict[str, str]:
    names = ("database_superuser", "database_owner", "database_bridge", "database_grafana", "database_web")
    files = ["own/operator", *names, "web_token", "grafana_admin", "simulated_devices"]
    return {Path(name).name: (place / "secrets" / name).read_text() for name in files}


def snapshot(place: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [place / ".env", *(path for path in (place / "secrets").rglob("*") if path.is_file())]
    return {
        str(file.relative_to(place)): (file.stat().st_mode, file.stat().st_mtime_ns, file.read_bytes())
        for file in files
    }


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def size(text: str) -> float:
    return float(text[:-1]) * {"m": 2**20, "g": 2**30}[text[-1]]


def mounted(service: dict[str, Any]) -> list[str]:
    """The files and directories of the host that a service sees, as in the file."""
    binds = [volume.rpartition(":")[0].rpartition(":")[0] for volume in service.get("volumes", []) if ":ro" in volume]
    secrets = [secret if isinstance(secret, str) else secret["source"] for secret in service.get("secrets", [])]
    return [*binds, *(COMPOSE["secrets"][name]["file"] for name in secrets)]


def found(source: str, place: Path) -> Path:
    """Where what is mounted is, with the secrets of `place`."""
    if source.startswith("${SECRETS"):
        return place / "secrets" / source.rpartition("}/")[2]
    assert source.startswith("./")
    return ROOT / source


# --- docker-compose.yml ---


def test_the_file_is_valid_by_the_compose_specification() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    reply = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert reply.returncode == 0, reply.stdout + reply.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["pids_limit"] <= 200
    assert size(service["mem_limit"]) <= 5 * 2**30
    options = service["logging"]["options"]
    assert size(options["max-size"]) * int(options["max-file"]) <= 100 * 2**20
    # Images of others start as root unless told otherwise; ours has its user inside.
    assert "user" in service or name in OURS
    assert service.get("user") not in {"root", "0"}


@pytest.mark.parametrize("name", LASTING)
def test_every_lasting_service_restarts_and_says_how_it_is(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    check = service["healthcheck"]
    assert check["test"]
    assert seconds(check["timeout"]) <= seconds(check["interval"]) <= 30


def test_only_migrate_ends_and_only_by_itself() -> None:
    assert [name for name in SERVICES if name not in LASTING] == ["migrate"]
    assert SERVICES["bridge"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_only_the_ports_for_devices_are_open_to_others() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"mosquitto", "web", "prometheus", "grafana"}
    open_to_others = [port for each in ports.values() for port in each if not port.startswith("127.0.0.1:")]
    assert [port.rpartition(":")[2] for port in open_to_others] == ["8883", "8885"]


def test_the_database_is_reached_by_those_who_need_it_alone() -> None:
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert {name for name, service in SERVICES.items() if "database" in service["networks"]} == {
        "postgres",
        "migrate",
        "bridge",
        "web",
        "grafana",
    }


def test_what_a_service_waits_for_is_on_a_network_with_it() -> None:
    for name, service in SERVICES.items():
        for other in service.get("depends_on", {}):
            if other != "migrate" and name != "simulator":
                assert set(service["networks"]) & set(SERVICES[other]["networks"]), (name, other)


@pytest.mark.parametrize("name", SERVICES)
def test_no_password_is_in_the_file(name: str) -> None:
    for key, value in SERVICES[name].get("environment", {}).items():
        if re.search("PASSWORD|SECRET|TOKEN|KEY", key):
            assert key.endswith("_FILE"), key
            assert value.startswith("/run/secrets/"), key
        if "://" in value:
            assert urlsplit(value).password is None, key
        assert not re.search("password=", value), key


def test_without_make_secrets_it_says_what_to_do() -> None:
    first = re.search(r"\$\{SECRETS[^}]*\}", "\n".join(line for line in TEXT.splitlines() if "#" not in line))
    assert first
    assert first[0] == '${SECRETS:?run "make secrets" first}'


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_has_an_exact_tag_and_can_be_another(name: str) -> None:
    image = SERVICES[name]["image"]
    match = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-([^}:]+):([^}]+)\}", image)
    assert match, image
    assert match[2] == "local" or re.search(r"\d", match[2]), image


def test_everything_that_is_mounted_exists(made_once: tuple[Path, str]) -> None:
    for name, service in SERVICES.items():
        for source in mounted(service):
            assert found(source, made_once[0]).exists(), (name, source)


def test_everybody_in_a_container_can_read_what_is_mounted(made_once: tuple[Path, str]) -> None:
    secrets = [source for service in SERVICES.values() for source in mounted(service) if "SECRETS" in source]
    assert secrets
    for source in secrets:
        path = found(source, made_once[0])
        for each in (path, *path.rglob("*")):
            assert each.stat().st_mode & 0o777 == (0o755 if each.is_dir() else 0o644), each


def test_no_container_sees_a_certificate_authority_or_the_passwords_of_others(made_once: tuple[Path, str]) -> None:
    own = [file.read_bytes() for file in (made_once[0] / "secrets" / "own").glob("*-ca.key")]
    assert len(own) == 2
    for service in SERVICES.values():
        for source in mounted(service):
            if "SECRETS" not in source:
                continue
            path = found(source, made_once[0])
            for each in (path, *path.rglob("*")):
                assert each.is_dir() or each.read_bytes() not in own, each
    assert "database_superuser" not in SERVICES["bridge"]["secrets"] + SERVICES["migrate"]["secrets"]
    assert "database_owner" not in SERVICES["bridge"]["secrets"]


def test_every_secret_is_somebodys() -> None:
    used = {source for service in SERVICES.values() for source in mounted(service)}
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} <= used


def test_every_volume_is_somebodys() -> None:
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume[0] not in ".$"
    }
    assert used == set(COMPOSE["volumes"])


def configured(service: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the program in the container is told, with the secrets of `place`."""
    monkeypatch.chdir(place)
    secrets = {path.rpartition("/")[2] for path in mounted(service)}
    for key, value in service["environment"].items():
        if "/run/secrets/" in value:
            assert Path(value).name in secrets, f"{key} is not mounted"
        monkeypatch.setenv(key, value.replace("/run/secrets", str(place / "secrets")))
    return load()


@pytest.mark.parametrize("name", ["migrate", "bridge", "web"])
def test_the_environment_is_a_configuration(
    name: str, made_once: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(SERVICES[name], made_once[0], monkeypatch)
    assert config.database.password.get_secret_value()
    assert name != "bridge" or config.mqtt.tls.enabled


def test_the_pages_are_for_this_machine_and_for_who_has_the_token(
    made_once: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    web = SERVICES["web"]
    config = configured(web, made_once[0], monkeypatch).web
    assert config.token.get_secret_value() == passwords(made_once[0])["web_token"].strip()
    assert web["ports"] == [f"127.0.0.1:${{WEB_PORT:-9465}}:{config.address()[1]}"]
    # From another container, which comes by its name.
    assert config.open
    assert f'HTTPConnection("127.0.0.1", {config.address()[1]}, ' in web["healthcheck"]["test"][-1]


def test_the_pages_ask_the_bridge_for_its_rates(made_once: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    listen = re.search(r"WATTBRIDGE_HEALTH__LISTEN=\S+:(\d+)$", DOCKERFILE, re.MULTILINE)
    assert listen
    assert configured(SERVICES["web"], made_once[0], monkeypatch).web.daemons == f"bridge:{listen[1]}"
    assert {"database", "monitoring"} == set(SERVICES["web"]["networks"]) <= set(SERVICES["bridge"]["networks"])


def test_the_pages_cannot_write_unless_they_are_told_to(
    made_once: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    web = SERVICES["web"]
    assert web["secrets"] == ["database_web", "web_token"]
    assert not configured(web, made_once[0], monkeypatch).web.replay.dsn.get_secret_value()
    (told,) = (each for each in documented("web") if "secrets" in each)
    with_replay = {
        "environment": web["environment"] | told["environment"],
        "secrets": web["secrets"] + told["secrets"],
    }
    replay = configured(with_replay, made_once[0], monkeypatch).web.replay
    assert replay.dsn.get_secret_value() == SERVICES["bridge"]["environment"]["WATTBRIDGE_DATABASE__DSN"]
    assert replay.password.get_secret_value() == passwords(made_once[0])["database_bridge"].strip()


def test_the_database_is_shown_every_password_that_it_sets() -> None:
    script = (ROOT / "config" / "postgresql" / "roles.sql").read_text()
    read = set(re.findall(r"/run/secrets/(\w+)", script))
    assert read == set(SERVICES["postgres"]["secrets"]) - {"database_superuser"}


def test_all_that_answer_have_time_to_finish() -> None:
    assert seconds(SERVICES["bridge"]["stop_grace_period"]) > Config().shutdown_deadline_s
    assert seconds(SERVICES["web"]["stop_grace_period"]) > Config().web.timeout_s + 2


def test_the_broker_gets_what_its_configuration_counts_on() -> None:
    queue = re.search(r"^max_queued_messages (\d+)$", MOSQUITTO, re.MULTILINE)
    assert queue
    # By its comment a message that waits takes 0.5 kB.
    assert size(SERVICES["mosquitto"]["mem_limit"]) >= int(queue[1]) * 500 * 1.2
    connections = [int(number) for number in re.findall(r"^max_connections (\d+)$", MOSQUITTO, re.MULTILINE)]
    assert len(connections) == len(re.findall(r"^listener ", MOSQUITTO, re.MULTILINE))
    assert SERVICES["mosquitto"]["ulimits"]["nofile"] > sum(connections)


def test_the_broker_finds_its_files_where_its_configuration_says(made_once: tuple[Path, str]) -> None:
    targets = {
        volume.split(":")[-2]: found(volume.rpartition(":")[0].rpartition(":")[0], made_once[0])
        for volume in SERVICES["mosquitto"]["volumes"]
        if ":ro" in volume
    }
    targets["/mosquitto/config/passwords"] = made_once[0] / "secrets" / "mosquitto_passwords"
    named = re.findall(r"^(?:\w+file|\w+_file) (/\S+)$", MOSQUITTO, re.MULTILINE)
    assert len(named) > 5
    for path in named:
        here = [place / Path(path).relative_to(target) for target, place in targets.items() if path.startswith(target)]
        assert here, f"nothing is mounted for {path}"
        assert here[0].exists(), path


def test_the_simulator_knows_its_options() -> None:
    command = get_command(app).commands["simulate"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    given = [argument.partition("=")[0] for argument in SERVICES["simulator"]["command"][1:]]
    assert set(given) <= known


# --- the documents ---


@pytest.mark.parametrize("document", ["mosquitto/README.md", "docs/compose.md"])
def test_every_payload_in_the_documents_is_a_reading(document: str) -> None:
    text = (ROOT / document).read_text().replace("\\\n", "")
    published = re.findall(r"^mosquitto_pub .*$", text, re.MULTILINE)
    assert published or document != "mosquitto/README.md"
    for command in published:
        arguments = shlex.split(command)
        topic, payload = (arguments[arguments.index(option) + 1] for option in ("-t", "-m"))
        _, _, kind, device_id, last = topic.split("/")
        assert last == "telemetry"
        moment = 1_770_734_844_841_000
        assert len(decode_telemetry(Kind(kind), device_id, payload.encode(), None, moment, Limits())) == 1
    # None is told in another way than by a command that publishes it.
    assert len(re.findall(r"kwh(?:ConsumedAc|DeliveredDc)", text)) == len(published)


def documented(pattern: str) -> list[dict[str, Any]]:
    """What docs/compose.md overrides of the services that match."""
    text = (ROOT / "docs/compose.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    services = [item for block in blocks for item in yaml.safe_load(block)["services"].items()]
    return [service for name, service in services if re.fullmatch(pattern, name)]


def test_the_group_of_several_bridges_is_no_name_that_one_could_guess() -> None:
    environments = [service.get("environment", {}) for service in documented(".*")]
    groups = [each["WATTBRIDGE_MQTT__SHARE_GROUP"] for each in environments if "WATTBRIDGE_MQTT__SHARE_GROUP" in each]
    assert groups == ["${SHARE_GROUP:?missing in .env}"] * 2


# --- Dockerfile ---


def test_both_stages_have_the_base_that_the_compose_file_names() -> None:
    named = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert named
    assert SERVICES["bridge"]["build"]["args"]["PYTHON_IMAGE"] == f"${{PYTHON_IMAGE:-{named[1]}}}"
    assert re.search(r":\d+\.\d+\.\d+-", named[1]), "an exact version"
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2


def test_the_image_is_not_root_and_takes_only_what_is_locked() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == ["10001:10001"]
    installs = re.findall(r"pip.* install (.*?)(?: \\)?$", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 3
    assert all("--require-hashes" in options or "--no-deps --no-index" in options for options in installs)


def test_the_image_has_what_the_pages_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=]", each)[0] for each in project["optional-dependencies"]["web"]}
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE)
    assert needed <= set(locked)
    assert f"EXPOSE 9464 {Config().web.address()[1]}\n" in DOCKERFILE


def test_the_image_is_built_from_nothing_but_the_source() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line[0] == "!"}
    assert named == {
        "LICENSE", "README.md", "pyproject.toml", "requirements/run.txt", "requirements/build.txt",
        "bridge", "simulator", "sql",
    }  # fmt: skip
    assert all((ROOT / name).exists() for name in named)


# --- config/make_secrets.py ---


def test_nobody_but_the_owner_gets_in(made_once: tuple[Path, str]) -> None:
    place, _ = made_once
    assert (place / "secrets").stat().st_mode & 0o777 == 0o700
    assert (place / ".env").stat().st_mode & 0o777 == 0o600
    for key in (place / "secrets" / "own").rglob("*.key"):
        assert key.stat().st_mode & 0o777 == 0o600, key


def test_passwords_are_long_and_all_different(made_once: tuple[Path, str]) -> None:
    made = passwords(made_once[0]).values()
    assert len(set(made)) == len(made)
    for password in made:
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", password)
        # Not one letter again and again.
        assert len(set(password)) > math.log2(len(password))


def test_no_password_is_shown_or_in_the_environment_file(made_once: tuple[Path, str]) -> None:
    place, said = made_once
    shown = said + (place / ".env").read_text()
    assert not any(password.strip() in shown for password in passwords(place).values())


def test_the_environment_file_names_every_variable_of_the_compose_file_with_its_default(
    made_once: tuple[Path, str],
) -> None:
    lines = (made_once[0] / ".env").read_text().splitlines()
    used = set(re.findall(r"\$\{(\w+)", "\n".join(line.partition(" #")[0] for line in TEXT.splitlines())))
    named = {line.lstrip("# ").partition("=")[0] for line in lines if "=" in line}
    assert named == used | {"COMPOSE_PROJECT_NAME", "SHARE_GROUP"}
    group = next(line for line in lines if line.startswith("SHARE_GROUP"))
    assert re.fullmatch("SHARE_GROUP=bridges-[0-9a-f]{32}", group)
    assert [line for line in lines if line[0:1] not in {"", "#"}] == [
        "COMPOSE_PROJECT_NAME=wattbridge",
        "SECRETS=./secrets",
        group,
    ]
    assert "# POSTGRES_IMAGE=postgres:18" in lines


def test_the_simulated_devices_are_those_of_the_simulator(made_once: tuple[Path, str]) -> None:
    command = dict(argument.split("=", 1) for argument in SERVICES["simulator"]["command"][1:])
    fleet = FleetConfig(
        datetime(2026, 1, 1, tzinfo=UTC), meters=int(command["--meters"]), vehicles=int(command["--vehicles"])
    )
    lines = (made_once[0] / "secrets" / "mosquitto_passwords").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [*fleet.meter_ids, *fleet.vehicle_ids, "operator"]


def test_a_second_run_changes_nothing(made: Path) -> None:
    before = snapshot(made)
    reply = make_secrets(made)
    assert (reply.returncode, reply.stderr) == (0, "")
    assert reply.stdout == "secrets/ and .env are complete; what was there already has been kept\n"
    assert snapshot(made) == before


def test_what_is_missing_is_made_and_nothing_else(made: Path) -> None:
    before = snapshot(made)
    missing = {"secrets/grafana_admin", "secrets/bridge.key"}
    for name in missing:
        (made / name).unlink()
    assert make_secrets(made).returncode == 0
    after = snapshot(made)
    assert {name for name in after if after[name] != before[name]} == missing
    assert after["secrets/bridge.key"][2] == before["secrets/bridge.key"][2]
    assert after["secrets/grafana_admin"][2] != before["secrets/grafana_admin"][2]


def knows(place: Path, user: str, password: str) -> bool:
    """Whether the broker's copy has this user with this password."""
    lines = (place / "secrets" / "mosquitto_passwords").read_text().splitlines()
    line = next((line for line in lines if line.startswith(f"{user}:")), None)
    if not line:
        return False
    rounds, salt, digest = line.split("$")[2:]
    made = hashlib.pbkdf2_hmac("sha512", password.strip().encode(), base64.b64decode(salt), int(rounds))
    return made == base64.b64decode(digest)


def test_the_operator_has_a_password_that_the_broker_knows_and_no_container_sees(made: Path) -> None:
    operator = made / "secrets" / "own" / "operator"
    first = operator.read_text()
    assert operator.stat().st_mode & 0o777 == 0o600
    assert knows(made, "operator", first)
    # A new one, once it is gone; the same, where the password file is made anew.
    operator.unlink()
    assert make_secrets(made).returncode == 0
    second = operator.read_text()
    assert second != first
    assert knows(made, "operator", second)
    (made / "secrets" / "own" / "passwords").unlink()
    assert make_secrets(made).returncode == 0
    assert operator.read_text() == second
    assert knows(made, "operator", second)


def test_an_operator_who_was_removed_stays_so(made: Path) -> None:
    own = made / "secrets" / "own" / "passwords"
    subprocess.run([made / "mosquitto" / "passwords", own, "remove", "operator"], check=True, timeout=20)
    assert make_secrets(made).returncode == 0
    assert not knows(made, "operator", (made / "secrets" / "own" / "operator").read_text())


def test_a_new_device_reaches_the_running_broker(made: Path) -> None:
    mounted_file = made / "secrets" / "mosquitto_passwords"
    inode = mounted_file.stat().st_ino
    own = made / "secrets" / "own" / "passwords"
    subprocess.run(
        [made / "mosquitto" / "passwords", own, "add", "MTR-NEW"],
        input="a password of its own\n",
        text=True,
        check=True,
        timeout=20,
    )
    assert make_secrets(made).stdout.startswith("brought secrets/mosquitto_passwords up to date\n")
    assert "\nMTR-NEW:" in mounted_file.read_text()
    assert mounted_file.stat().st_ino == inode, "a container sees the file that it was started with"
    assert mounted_file.stat().st_mode & 0o777 == 0o644


def test_certificates_of_an_authority_of_ones_own_are_taken(fresh: Path, made_once: tuple[Path, str]) -> None:
    theirs = made_once[0] / "secrets" / "own"
    own = fresh / "secrets" / "own"
    (own / "services").mkdir(parents=True)
    # No key of an authority is needed where all certificates come from elsewhere.
    for name in ("service-ca.crt", "device-ca.crt", "server.crt", "server.key"):
        shutil.copy(theirs / name, own / name)
    for name in ("wattbridge.crt", "wattbridge.key", "health.crt", "health.key"):
        shutil.copy(theirs / "services" / name, own / "services" / name)
    reply = make_secrets(fresh, "--host", "broker.example")
    assert reply.returncode == 0, reply.stderr
    assert not list(own.glob("*-ca.key"))
    assert (fresh / "secrets" / "mosquitto" / "server.crt").read_bytes() == (theirs / "server.crt").read_bytes()


def test_a_name_that_the_certificate_lacks_is_told(made: Path) -> None:
    assert make_secrets(made, "--host", "broker.example", "--host", "192.0.2.7").returncode == 0
    before = snapshot(made)
    reply = make_secrets(made, "--host", "other.example")
    assert reply.returncode == 1
    assert "is not for other.example" in reply.stderr
    assert "certificates --replace secrets/own server mosquitto localhost other.example" in reply.stderr
    assert snapshot(made) == before


def test_a_run_that_failed_halfway_leaves_nothing_half_made_and_is_completed_later(fresh: Path) -> None:
    tools = fresh / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "mkdir", "mktemp", "rm", "mv", "chmod"):
        place = shutil.which(tool)
        assert place
        (tools / tool).symlink_to(place)
    (tools / "python3").symlink_to(sys.executable)
    reply = make_secrets(fresh, path=str(tools))
    assert reply.returncode == 1
    assert "openssl is not installed" in reply.stderr
    assert "Traceback" not in reply.stderr
    names = {file.name for file in (fresh / "secrets").rglob("*") if file.is_file()}
    assert names == {*passwords(fresh), "passwords", "operator"}
    before = passwords(fresh)
    assert make_secrets(fresh).returncode == 0
    assert passwords(fresh) == before
