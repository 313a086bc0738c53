"""What the integration tests share: the daemon as a process, a publisher, a way to look, a connection to cut."""

import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar
from unittest import mock

import paho.mqtt.client as paho
import psycopg
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bridge.cli import main
from bridge.services import LeashedProcess, PrivateMosquitto, free_port

PROGRAM = Path(sysconfig.get_path("scripts")) / "wattbridge"
Seen = TypeVar("Seen")

PATIENCE_S = 40.0
POLL_S = 0.02


class Address(Protocol):
    """Where a broker listens."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


# --- waiting -----------------------------------------------------------------------------------------------


def wait_until(look: Callable[[], Seen], what: str, seconds: float = PATIENCE_S) -> Seen:
    """Looks until there is something true to see, and returns it; fails when the time is up."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what} (last seen: {seen!r})")
        time.sleep(POLL_S)
    return seen


def wait_for_equal(look: Callable[[], Any], expected: Any, seconds: float = PATIENCE_S) -> None:
    """Looks until it sees what is expected; fails with the last that it saw."""
    deadline = time.monotonic() + seconds
    while (seen := look()) != expected:
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {expected!r}, but {seen!r}")
        time.sleep(POLL_S)


# --- the program -------------------------------------------------------------------------------------------


def environment(dsn: str, broker: Address, root: str, client_id: str, **settings: object) -> dict[str, str]:
    """The environment of a wattbridge process; settings are named like `mqtt__keep_alive_s`."""
    values = {
        "database__dsn": dsn,
        "mqtt__host": broker.host,
        "mqtt__port": broker.port,
        "mqtt__client_id": client_id,
        "topics__telemetry": f"{root}/{{kind}}/{{device_id}}/telemetry",
        "topics__status": f"{root}/{{kind}}/{{device_id}}/status",
        "topics__bridge_status": f"{root}/bridge/{{client_id}}/status",
        **settings,
    }
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return inherited | {f"WATTBRIDGE_{name.upper()}": str(value) for name, value in values.items()}


# How wide and how colourful the terminal of a command is.
TERMINAL = {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
# Commands that set up their process, its logs or signals.
SET_UP = {"run", "replay", "demo", "simulate"}


class Reply(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


def wattbridge(*arguments: str, env: dict[str, str], cwd: Path, answer: str = "", patience_s: float = 60.0) -> Reply:
    """Runs one command to its end; it must not show a traceback, whatever happens."""
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=env | TERMINAL,
        cwd=cwd,
        input=answer,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience_s,
    )
    if "Traceback" in done.stdout + done.stderr:
        raise AssertionError(f"a traceback from {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return Reply(done.returncode, done.stdout, done.stderr)


def wattbridge_here(*arguments: str, env: dict[str, str], cwd: Path, answer: str = "") -> Reply:
    """What `wattbridge` does, in this process: for tests that ask many commands what they say, at a tenth of the cost.

    Not for the commands that are SET_UP: what they do to a process would stay.
    """
    if SET_UP & {*arguments}:
        raise AssertionError(f"{' '.join(arguments)} needs a process of its own")
    given = io.TextIOWrapper(io.BytesIO(answer.encode()), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        mock.patch.dict(os.environ, env | TERMINAL, clear=True),
        mock.patch.object(sys, "argv", [str(PROGRAM), *arguments]),
        mock.patch.object(sys, "stdin", given),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Reply(int(ended.value.code or 0), *(stream.buffer.getvalue().decode() for stream in (out, err)))


class Daemon:
    """`wattbridge run` as a process. Leaving the `with` block kills it: a test that wants an orderly end says so.

    With `ready` a start waits until it is connected to both sides.
    """

    def __init__(
        self, dsn: str, broker: Address, root: str, folder: Path, *, ready: bool = True, **settings: object
    ) -> None:
        self._ready = ready
        self._command = str(settings.pop("command", "run"))
        self.client_id = str(settings.pop("client_id", f"test-{uuid.uuid4().hex}"))
        self.status_topic = f"{root}/bridge/{self.client_id}/status"
        self.env = environment(dsn, broker, root, self.client_id, **settings)
        self._folder = folder
        self._log = folder / f"{self.client_id}-{uuid.uuid4().hex[:8]}.log"
        self._start = self._read = 0
        self._events: list[dict[str, Any]] = []
        self._reading = threading.Lock()
        self._process: LeashedProcess | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._running.pid

    def start(self) -> None:
        """Starts it, for the first time or again."""
        self._start = self._read = self._log.stat().st_size if self._log.exists() else 0
        self._events = []
        with self._log.open("ab") as log:
            self._process = LeashedProcess(
                [PROGRAM, self._command], env=self.env, cwd=self._folder, stdout=log, stderr=log
            )
        if self._ready:
            self.wait_for_event("mqtt.connected")
            self.wait_for_event("database.connected")

    @property
    def running(self) -> bool:
        return self._running.poll() is None

    def signal(self, number: int) -> None:
        self._running.send_signal(number)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Waits for its own end; returns the exit code."""
        code = self._running.wait(seconds)
        self._running.stop()
        return code

    def terminate(self) -> int:
        """Asks it to end, and returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: no chance to say or finish anything."""
        self.signal(signal.SIGKILL)
        self.wait()

    @property
    def log(self) -> str:
        """Everything it has said since its last start."""
        with self._log.open(encoding="utf-8") as log:
            log.seek(self._start)
            return log.read()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What it has logged since its last start, whole lines only; all of it or one kind of event."""
        with self._reading, self._log.open("rb") as log:
            log.seek(self._read)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if line.startswith(b"{"):
                    self._events.append(json.loads(line))
            return [event for event in self._events if name in (None, event["event"])]

    def wait_for_event(self, name: str, **values: Any) -> dict[str, Any]:
        """Waits for an event that has these values."""

        def look() -> list[dict[str, Any]]:
            if (code := self._running.poll()) is not None:
                raise AssertionError(f"ended with {code} and no {name}:\n{self.log}")
            return [event for event in self.events(name) if values.items() <= event.items()]

        return wait_until(look, f"{name} {values} in the log")[0]

    def wait_for_events(self, name: str, number: int) -> None:
        """Waits until an event has happened so often since the last start."""
        wait_until(lambda: len(self.events(name)) >= number, f"{number} times {name} in the log")

    @property
    def _running(self) -> LeashedProcess:
        if not self._process:
            raise AssertionError("the daemon has not been started")
        return self._process


# --- the broker --------------------------------------------------------------------------------------------


class StrictMosquitto(PrivateMosquitto):
    """A Mosquitto of our own with files of its own; the configuration names them without a directory."""

    def __init__(self, config: str, files: Mapping[str, str]) -> None:
        super().__init__(config)
        self._files = files

    def _prepare(self) -> None:
        super()._prepare()
        for name, text in self._files.items():
            self._write(name, text)


def password_line(user: str, password: str) -> str:
    """A line of Mosquitto's password file, as mosquitto_passwd writes it: PBKDF2 with SHA-512."""
    rounds, salt = 101, os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)
    return f"{user}:$7${rounds}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}\n"


# --- the devices -------------------------------------------------------------------------------------------


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Runs `work` beside the block and waits for its end; its failure is the block's."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(work)
        yield
        running.result(PATIENCE_S)


class Publisher:
    """An independent MQTT 5 client that publishes; `flush` waits until the broker has everything."""

    def __init__(
        self,
        broker: Address,
        root: str,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: Path | None = None,
    ) -> None:
        self.root = root
        self._client = client(f"device-{uuid.uuid4().hex}")
        self._client.max_inflight_messages_set(2_000)
        if username:
            self._client.username_pw_set(username, password)
        if tls:
            self._client.tls_set(str(tls / "ca.crt"), str(tls / "client.crt"), str(tls / "client.key"))
        self._waiting: list[paho.MQTTMessageInfo] = []
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        wait_until(self._client.is_connected, "the publisher is connected")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(
        self,
        kind: str,
        device: str,
        payload: object,
        *,
        channel: str = "telemetry",
        qos: int = 1,
        retain: bool = False,
        content_type: str | None = None,
    ) -> None:
        """Publishes a payload: bytes as they are, anything else as JSON."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        properties = None
        if content_type:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = content_type
        topic = f"{self.root}/{kind}/{device}/{channel}"
        self._waiting.append(self._client.publish(topic, data, qos, retain, properties))

    def send_series(self, readings: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Publishes readings of meters, and waits until the broker has them."""
        for device, reading in readings:
            self.send("meter", device, reading)
        self.flush()

    def flush(self) -> None:
        """Waits until the broker has acknowledged everything (QoS 0: until it is sent)."""
        for info in self._waiting:
            info.wait_for_publish(PATIENCE_S)
            if not info.is_published():
                raise AssertionError("the broker did not take a publication")
        self._waiting.clear()


class Listener:
    """An independent MQTT 5 client with a persistent session that notes what it is sent; it need not acknowledge."""

    def __init__(self, broker: Address, *filters: str, client_id: str | None = None, acknowledge: bool = True) -> None:
        self.messages: list[paho.MQTTMessage] = []
        self._filters = filters
        self._subscribed = threading.Event()
        self._client = client(client_id or f"listener-{uuid.uuid4().hex}", manual_ack=not acknowledge)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self.messages.append(message)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 600
        properties.ReceiveMaximum = 65_535
        self._client.connect(broker.host, broker.port, clean_start=False, properties=properties)

    def __enter__(self) -> Self:
        self._client.loop_start()
        if self._filters and not self._subscribed.wait(PATIENCE_S):
            raise AssertionError("the listener was not subscribed")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def payloads(self) -> list[bytes]:
        return [bytes(message.payload) for message in self.messages]

    def _on_connect(self, connected: paho.Client, *_: object) -> None:
        if self._filters:
            connected.subscribe([(pattern, paho.SubscribeOptions(qos=1)) for pattern in self._filters])


def client(client_id: str, **options: Any) -> paho.Client:
    return paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, **options)


def now() -> datetime:
    """The time, in the milliseconds that devices speak."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1_000 * 1_000)


def rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def meter(device: str, moment: datetime, kwh: float = 0.5, voltage: float = 230.0) -> dict[str, Any]:
    """A meter's reading, as in the contract."""
    return {"meterId": device, "kwhConsumedAc": kwh, "voltage": voltage, "timestamp": rfc3339(moment)}


def vehicle(
    device: str, moment: datetime, kwh: float = 0.4, soc: float = 50.0, at: str | None = None
) -> dict[str, Any]:
    """A vehicle's reading, as in the contract."""
    reading = {
        "vehicleId": device,
        "soc": soc,
        "kwhDeliveredDc": kwh,
        "batteryTemp": 30.5,
        "timestamp": rfc3339(moment),
    }
    return reading | ({"meterId": at} if at else {})


def series(devices: int, readings: int, since: datetime | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Meter readings, one a minute and device, each with energy of its own; (device, reading) in order of time."""
    first = since or now() - timedelta(minutes=readings)
    for minute in range(readings):
        for number in range(devices):
            name = f"MTR-{number:04}"
            yield name, meter(name, first + timedelta(minutes=minute), kwh=(minute * devices + number) / 1_000)


# --- the database ------------------------------------------------------------------------------------------


@contextmanager
def cloned(admin: str, template: str) -> Iterator[str]:
    """The DSN of a database that is a copy of another one, to which nobody may be connected."""
    name = sql.Identifier(f"wattbridge_test_{uuid.uuid4().hex[:12]}")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(template)))
        try:
            yield make_conninfo(admin, dbname=name.as_string().strip('"'))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


class Counters(NamedTuple):
    """The books over all instances."""

    received: int
    stored: int
    duplicate: int
    dead_lettered: int
    presence: int


@contextmanager
def empty_database(admin: str) -> Iterator[str]:
    """The DSN of a database without a schema."""
    name = sql.Identifier(f"wattbridge_empty_{uuid.uuid4().hex[:12]}")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
        try:
            yield make_conninfo(admin, dbname=name.as_string().strip('"'))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def ask(dsn: str, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of a query, or an empty list for a statement that has none."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query, parameters or None)
        return cursor.fetchall() if cursor.description else []


def one(dsn: str, query: str, *parameters: object) -> Any:
    """The one value of the one row of a query."""
    ((value,),) = ask(dsn, query, *parameters)
    return value


def stored(dsn: str) -> int:
    """How many readings history has."""
    return one(dsn, "SELECT (SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history)")


def counters(dsn: str) -> Counters:
    query = "SELECT " + ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in Counters._fields)
    return Counters(*ask(dsn, f"{query} FROM ingest_counter")[0])


def letters(dsn: str) -> list[tuple[str, str, bytes]]:
    """Dead letters as (device, reason, payload), sorted."""
    return sorted(ask(dsn, "SELECT device_id, reason, payload FROM dead_letter"))


def wait_for_received(dsn: str, number: int, seconds: float = PATIENCE_S) -> Counters:
    """Waits until at least so many readings are accounted for."""
    wait_until(lambda: counters(dsn).received >= number, f"{number} received", seconds)
    return counters(dsn)


def check_books(dsn: str) -> Counters:
    """Fails unless the books balance, and say what is in the tables."""
    books = counters(dsn)
    if books.received != books.stored + books.duplicate + books.dead_lettered:
        raise AssertionError(f"the books do not balance: {books}")
    kept = one(dsn, "SELECT count(*) FROM dead_letter")
    if (books.stored, books.dead_lettered) != (stored(dsn), kept):
        raise AssertionError(f"{books}, but history has {stored(dsn)} and there are {kept} dead letters")
    return books


def meter_history(dsn: str) -> dict[tuple[str, datetime], float]:
    """The energy of every meter reading by (device, ts)."""
    return {(device, ts): kwh for device, ts, kwh in ask(dsn, "SELECT meter_id, ts, kwh_ac FROM meter_history")}


def expected_history(readings: Sequence[tuple[str, dict[str, Any]]]) -> dict[tuple[str, datetime], float]:
    """What `meter_history` must be after these readings."""
    return {
        (device, datetime.fromisoformat(reading["timestamp"])): reading["kwhConsumedAc"] for device, reading in readings
    }


# --- the network to the database ---------------------------------------------------------------------------

STARTUP_CODES = {80877103, 80877104}  # SSLRequest and GSSENCRequest: they have no type byte, and come before all else


class Proxy:
    """A TCP proxy to PostgreSQL that understands as much of the protocol as it takes to cut at a chosen moment.

    Frontend messages: https://www.postgresql.org/docs/current/protocol-message-formats.html
    """

    def __init__(self, dsn: str) -> None:
        parts = conninfo_to_dict(dsn)
        self._target = (str(parts.get("host", "127.0.0.1")), int(parts.get("port", 5432)))
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind(("127.0.0.1", free_port()))
        self._server.listen()
        port = self._server.getsockname()[1]
        self.dsn = make_conninfo(
            dsn, host="127.0.0.1", port=port, hostaddr="127.0.0.1", sslmode="disable", gssencmode="disable"
        )
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._threads: list[threading.Thread] = []
        self._refuse = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._wanted: tuple[str, bool] | None = None
        self.cut = threading.Event()
        self._closed = False
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._flowing.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._drop_all()
        for thread in self._threads:
            thread.join(5)

    def cut_before(self, command: str) -> None:
        """When the client says `command` next, the server does not hear it, and both lose the connection for good."""
        self._want(command, answer_only=False)

    def cut_answer(self, command: str) -> None:
        """When the client says `command` next, the server does it, and the client never learns of it."""
        self._want(command, answer_only=True)

    def refuse(self) -> None:
        """Ends all connections, and every new one at once."""
        self._refuse = True
        self._drop_all()

    def heal(self) -> None:
        """Lets everything through again."""
        self._wanted = None
        self._refuse = False
        self._flowing.set()

    def stall(self) -> None:
        """Holds everything in both directions; the connections stay."""
        self._flowing.clear()

    def _want(self, command: str, *, answer_only: bool) -> None:
        self.cut.clear()
        self._wanted = (command, answer_only)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if self._refuse:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            muted = threading.Event()
            with self._lock:
                self._pairs.add(pair)
            self._spawn(self._forward, pair, muted)
            self._spawn(self._back, pair, muted)

    def _forward(self, pair: tuple[socket.socket, socket.socket], muted: threading.Event) -> None:
        near, far = pair
        pending, started = b"", False
        with contextlib.suppress(OSError):
            while chunk := near.recv(65_536):
                self._flowing.wait()
                pending += chunk
                while frame := _frame(pending, started=started):
                    pending = pending[len(frame) :]
                    if not started:
                        started = int.from_bytes(frame[4:8], "big") not in STARTUP_CODES
                    elif self._wanted and _says(frame, self._wanted[0]):
                        _, answer_only = self._wanted
                        self._wanted = None
                        if not answer_only:
                            self._cut_for_good()
                            return
                        muted.set()
                    far.sendall(frame)
        self._drop(pair)

    def _back(self, pair: tuple[socket.socket, socket.socket], muted: threading.Event) -> None:
        near, far = pair
        with contextlib.suppress(OSError):
            while chunk := far.recv(65_536):
                self._flowing.wait()
                if muted.is_set():
                    # The server has answered, so it has done what it was told.
                    self._cut_for_good()
                    return
                near.sendall(chunk)
        self._drop(pair)

    def _cut_for_good(self) -> None:
        self.refuse()
        self.cut.set()

    def _drop_all(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


class BrokerProxy(Proxy):
    """A TCP proxy to a broker: what it carries means nothing to it, so it can only refuse, drop, stall and heal."""

    def __init__(self, broker: Address) -> None:
        super().__init__(make_conninfo(host=broker.host, port=broker.port))
        parts = conninfo_to_dict(self.dsn)
        self.host, self.port = str(parts["host"]), int(parts["port"] or 0)

    def drop(self) -> None:
        """Ends all connections; new ones are welcome."""
        self._drop_all()

    def _forward(self, pair: tuple[socket.socket, socket.socket], muted: threading.Event) -> None:
        self._back(pair[::-1], muted)


def _frame(data: bytes, *, started: bool) -> bytes:
    """The first whole message of what a PostgreSQL client sends, empty if there is none yet."""
    head = 1 if started else 0
    if len(data) < head + 4:
        return b""
    size = head + int.from_bytes(data[head : head + 4], "big")
    return data[:size] if len(data) >= size else b""


def _says(frame: bytes, command: str) -> bool:
    """Whether the message is CopyDone, or a query (simple or parsed) that starts with the command."""
    if command == "CopyDone":
        return frame[:1] == b"c"
    text = frame[5:]
    if frame[:1] == b"P":
        text = text.partition(b"\0")[2]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(b"--")]
    return frame[:1] in (b"Q", b"P") and bool(lines) and lines[0].lstrip().upper().startswith(command.encode())
