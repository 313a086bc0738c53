"""The systemd units say what the daemon and its configuration mean by it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bridge.config import PREFIX, Config, _keys, _variable
from bridge.errors import ExitCode

FOLDER = Path(__file__).parents[2] / "config" / "systemd"
DAEMONS = {"wattbridge.service": "wattbridge.service", "wattbridge@.service": "wattbridge@1.service"}
WEB = "wattbridge-web.service"
UNITS = {**DAEMONS, WEB: WEB}
ANALYZE = shutil.which("systemd-analyze")
# Of 100, the less the better; the figure is in docs/operations.md.
EXPOSURE = 15

with_systemd = pytest.mark.skipif(ANALYZE is None, reason="there is no systemd-analyze here")


def text(unit: str) -> str:
    return (FOLDER / unit).read_text(encoding="utf-8")


def settings(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", text(unit), re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE
    return subprocess.run(
        [ANALYZE, *arguments], capture_output=True, text=True, check=False, timeout=60, env={"PATH": "/usr/bin:/bin"}
    )


@pytest.fixture(params=UNITS)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit as it is installed, but its program exists."""
    file = tmp_path / UNITS[request.param]
    program = Path(shutil.which("true") or "/bin/true")
    file.write_text(text(request.param).replace("/opt/wattbridge/bin/wattbridge", str(program)), encoding="utf-8")
    return file


@with_systemd
def test_systemd_understands_the_unit(installed: Path) -> None:
    done = analyze("verify", str(installed))
    # Of other units of this machine it may complain as well; of ours not a word, also not of keys it does not know.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "wattbridge" in line]
    assert (said, done.returncode) == ([], 0)


@with_systemd
def test_the_unit_is_hardened(installed: Path) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", str(installed))
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd before 250 cannot tell of files")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_variables_of_the_unit_are_keys_of_the_configuration(unit: str) -> None:
    told = [setting.partition("=")[0] for setting in settings(unit, "Environment")]
    assert f"{PREFIX}DATABASE__DSN_FILE" in told
    assert set(told) <= {f"{PREFIX}CONFIG"} | {_variable(key) for key in _keys(Config)}
    credentials = {setting.partition(":")[0] for setting in settings(unit, "LoadCredential")}
    assert set(re.findall(r"%d/(\w+)", text(unit))) == credentials


@pytest.mark.parametrize("unit", DAEMONS)
def test_systemd_is_as_patient_as_the_daemon(unit: str) -> None:
    defaults = Config()
    assert int(*settings(unit, "TimeoutStopSec")) > defaults.shutdown_deadline_s
    assert int(*settings(unit, "WatchdogSec")) > defaults.health.stalled_after_s
    assert settings(unit, "Type") == ["notify"]


def test_systemd_is_as_patient_as_the_pages() -> None:
    assert int(*settings(WEB, "TimeoutStopSec")) > Config().web.timeout_s + 2


def test_the_pages_are_shown_neither_the_login_nor_the_key_of_the_bridge() -> None:
    paths = {unit: {each.partition(":")[2] for each in settings(unit, "LoadCredential")} for unit in UNITS}
    assert not paths[WEB] & paths["wattbridge.service"]
    assert "WATTBRIDGE_WEB__TOKEN_FILE=%d/web_token" in settings(WEB, "Environment")


def test_the_pages_are_as_confined_as_the_daemon() -> None:
    def confinement(unit: str) -> set[str]:
        return {line for line in text(unit).partition("DynamicUser=")[2].splitlines() if line and line[0] != "#"}

    assert confinement(WEB) - confinement("wattbridge.service") == {"ProcSubset=pid"}
    assert confinement("wattbridge.service") <= confinement(WEB)


@pytest.mark.parametrize("unit", UNITS)
def test_only_what_no_restart_mends_is_not_started_again(unit: str) -> None:
    assert settings(unit, "Restart") == ["always"]
    assert settings(unit, "RestartPreventExitStatus") == [str(int(ExitCode.USAGE))]


def test_the_template_differs_only_where_it_says_why() -> None:
    one, template = (
        [line for line in text(unit).splitlines() if line and not line.startswith(("#", "Description"))]
        for unit in DAEMONS
    )
    assert [line for line in one if line not in template] == []
    assert [line for line in template if line not in one] == [
        "Environment=WATTBRIDGE_MQTT__CLIENT_ID=wattbridge-%i",
        "EnvironmentFile=/etc/wattbridge/workers.env",
        "Environment=WATTBRIDGE_HEALTH__LISTEN=127.0.0.1:946%i",
    ]


def test_each_instance_of_the_template_can_listen() -> None:
    (listen,) = [setting for setting in settings("wattbridge@.service", "Environment") if "LISTEN" in setting]
    for instance in "19":
        address = listen.partition("=")[2].replace("%i", instance)
        assert Config(health={"listen": address}).health.address() == ("127.0.0.1", 9460 + int(instance))
