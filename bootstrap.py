"""Make `.venv` and install what Wattbridge needs to run: `python3 bootstrap.py demo` or `dev`.

Uses only the standard library, may be repeated and interrupted, and asks nothing. Exit code 0: everything is
in place; 1: something is missing that this program cannot install, and it has said what.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the people who need this message run an older one
    sys.exit(
        "Wattbridge needs Python 3.11 or newer; this is %d.%d. Choose another: make PYTHON=python3.12 ..."  # noqa: UP031
        % sys.version_info[:2]
    )

import collections
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / "unfinished"
# What is installed for `dev` contains everything that `demo` needs, in the same versions.
CONTAINS = {"demo": ["demo"], "dev": ["dev", "demo"]}
MOSQUITTO_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/local/sbin")
TAIL = 25


class BootstrapError(Exception):
    """Something is missing that has to be installed by a person; the message says what and how."""


def main() -> None:
    """Install for the purpose that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in CONTAINS:  # noqa: PLR2004 - the program and its argument
        sys.exit("usage: python3 bootstrap.py demo|dev")
    try:
        make_environment(sys.argv[1])
        if wants_mosquitto(sys.argv[1]):
            install_mosquitto(sys.argv[1])
    except BootstrapError as error:
        sys.exit(f"bootstrap: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbootstrap: interrupted; the next run starts over where needed")


# --- the virtual environment -------------------------------------------------------------------------------


def make_environment(purpose: str) -> None:
    """Bring `.venv` up to the lock file of `purpose`; return at once when it is."""
    if read(stamp(purpose)) == fingerprint(purpose) and not UNFINISHED.exists():
        return
    if not usable():
        create()
    UNFINISHED.touch()
    for other in CONTAINS["dev"]:
        stamp(other).unlink(missing_ok=True)
    install_locked(ROOT / "requirements" / f"{purpose}.txt")
    UNFINISHED.unlink()
    say("wattbridge itself")
    pip("--no-build-isolation", "--no-deps", "--editable", str(ROOT))
    for contained in CONTAINS[purpose]:
        stamp(contained).write_text(fingerprint(contained))
    done(f"ready: {VENV}")


def stamp(purpose: str) -> Path:
    """Return the file that says for which lock file `.venv` is complete."""
    return VENV / f"complete-{purpose}"


def fingerprint(purpose: str) -> str:
    """Return what `.venv` depends on: the interpreter and the place on one line, the pinned contents on the next."""
    contents = hashlib.sha256()
    for name in (f"requirements/{purpose}.txt", "pyproject.toml"):
        contents.update((ROOT / name).read_bytes())
    return f"{'.'.join(map(str, sys.version_info[:3]))} {VENV}\n{contents.hexdigest()}\n"


def read(path: Path) -> str:
    """Return the text of a file, empty when there is none."""
    return path.read_text() if path.is_file() else ""


def usable() -> bool:
    """Say whether `.venv` can be built upon: not left half-made, not moved, and of this Python version."""
    if UNFINISHED.exists() or not PYTHON.exists():
        return False
    for purpose in CONTAINS["dev"]:
        known = read(stamp(purpose))
        if known and known.splitlines()[0] != fingerprint(purpose).splitlines()[0]:
            return False
    probe = "import sys, pip; print(*sys.version_info[:3], sep='.')"
    reply = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=False)
    return reply.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def create() -> None:
    """Make an empty `.venv`, anew if there is one; Debian's Python first needs a package for that."""
    say("creating .venv")
    failure = venv()
    if failure and shutil.which("apt-get"):
        # Debian splits ensurepip off, one package for each version of Python.
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        say(f"installing {package}")
        apt_install(package)
        failure = venv()
    if failure:
        shutil.rmtree(VENV, ignore_errors=True)
        raise BootstrapError(
            f"{sys.executable} -m venv failed:\n{failure}\nInstall its venv package, or set PYTHON to another one."
        )


def venv() -> str:
    """Run `-m venv`; return its output if it failed, else an empty string."""
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    reply = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True, check=False)
    return "" if reply.returncode == 0 else (reply.stdout + reply.stderr).strip() or f"exit code {reply.returncode}"


def install_locked(lock: Path) -> None:
    """Install what the lock file pins, each file checked against its hashes, and show how far it is."""
    # A requirement starts at the beginning of a line; its hashes and comments are indented.
    total = len(re.findall(r"^\w\S*==", lock.read_text(), re.MULTILINE))
    seen = 0
    # The lock is complete, so pip has nothing to resolve.
    command = ["--require-hashes", "--no-deps", "--requirement", str(lock)]
    for line in stream_pip(*command):
        word, _, rest = line.strip().partition(" ")
        if word == "Ignoring":
            total -= 1
        elif word == "Collecting" or line.startswith("Requirement already satisfied"):
            seen += 1
            name = re.split(r"[=<>\[ ]", rest.removeprefix("already satisfied: "))[0]
            say(f"[{seen}/{total}] {name}", sparse=seen % 10 != 0 and seen != total)
        elif word == "Installing":
            say(f"[{total}/{total}] unpacking")


def pip(*arguments: str) -> None:
    """Run `pip install` without showing anything of it, unless it fails."""
    for _line in stream_pip(*arguments):
        pass


def stream_pip(*arguments: str) -> Iterator[str]:
    """Run `pip install` in `.venv`, yield its output line by line, raise BootstrapError with its end if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            tail.append(line)
            yield line
    if process.returncode != 0:
        raise BootstrapError(f"pip failed; its last words:\n{''.join(tail)}")


# --- the broker --------------------------------------------------------------------------------------------


def wants_mosquitto(purpose: str) -> bool:
    """Say whether Mosquitto is needed here: many tests start one of their own, also with services in Docker."""
    return purpose == "demo" or not os.environ.get("WATTBRIDGE_TEST_MQTT_URL")


def install_mosquitto(purpose: str) -> None:
    """Install Mosquitto if it is missing, for developers with its client, and leave no broker of its own running."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *MOSQUITTO_PLACES))
    programs = ["mosquitto"] if purpose == "demo" else ["mosquitto", "mosquitto_sub"]
    missing = [program for program in programs if not shutil.which(program, path=path)]
    if not missing:
        return
    say("installing mosquitto")
    if shutil.which("apt-get"):
        apt_install(*("mosquitto-clients" if program == "mosquitto_sub" else program for program in missing))
        # The package starts a broker on port 1883, which nobody asked for.
        if Path("/run/systemd/system").is_dir():
            subprocess.run([*as_root(), "systemctl", "disable", "--now", "mosquitto"], capture_output=True, check=False)
    elif shutil.which("brew"):
        run(["brew", "install", "mosquitto"])
    for program in missing:
        if not shutil.which(program, path=path):
            raise BootstrapError(
                f"the program `{program}` is missing; install Mosquitto 2.0 or newer (https://mosquitto.org/download/)"
            )
    done("mosquitto is installed; its own service is off")


def apt_install(*packages: str) -> None:
    """Install Debian packages without questions, as root or by a sudo that asks no password."""
    install = [
        *as_root(),
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        # Without systemd, this keeps the package's scripts from starting its service.
        "RUNLEVEL=1",
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=300",
        "install",
        "-y",
        "--no-install-recommends",
        *packages,
    ]
    first = subprocess.run(install, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if first.returncode != 0:
        # Most often the package lists are missing, as in a new container, or old.
        run([*as_root(), "apt-get", "update"])
        run(install)


def as_root() -> list[str]:
    """Return what to put before a command that needs root."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    if shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode == 0:
        return sudo
    raise BootstrapError(
        "a system package is missing and this user may not install it. Run once:\n"
        f"  sudo apt-get install python{sys.version_info.major}.{sys.version_info.minor}-venv mosquitto"
        " mosquitto-clients"
    )


def run(command: list[str]) -> None:
    """Run a command; if it fails, raise BootstrapError with the end of its output."""
    reply = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if reply.returncode != 0:
        tail = "\n".join(reply.stdout.splitlines()[-TAIL:])
        raise BootstrapError(f"`{' '.join(command)}` failed; its last words:\n{tail}")


# --- what a person sees ------------------------------------------------------------------------------------


def say(text: str, *, sparse: bool = False) -> None:
    """Show a step: on a terminal in place of the last one, elsewhere on a line of its own unless `sparse`."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif not sparse:
        print(text, flush=True)


def done(text: str) -> None:
    """Show a result that stays."""
    say(text)
    if sys.stdout.isatty():
        print()


if __name__ == "__main__":
    main()
