"""How fast `wattbridge web` answers: a private PostgreSQL, a simulated fleet, keep-alive connections elsewhere.

The fleet is that of bench/analytics.py: --devices meters and as many vehicles with --days days of history, rolled up.
Each question is asked by one connection (how long does it take?) and by --connections at once (how many a second?).
Where it names a vehicle, each is named in its turn, so that an answer which is remembered for a second is asked for
again only where there are fewer vehicles than answers a second. CPU is that of the web process and of the whole
PostgreSQL server.
"""

import argparse
import asyncio
import itertools
import math
import random
import secrets
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psycopg
import report
import rig
import uvloop
from analytics import EPOCH, Source, Target
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.services import EmbeddedPostgres, LeashedProcess, free_port

READER = "bench_reader"
WARM_UP_S = 2.0


class Question(NamedTuple):
    """`{vehicle}` is the next vehicle each time."""

    name: str
    path: str


QUESTIONS = [
    Question("nothing (/livez)", "/livez"),
    Question("status of a vehicle", "/v1/status/vehicle/{vehicle}"),
    Question("performance of a vehicle", "/v1/analytics/performance/{vehicle}"),
    Question("performance of always the same", "/v1/analytics/performance/VEH-000001"),
    Question("100 vehicles, a page", "/v1/status/vehicle?after={vehicle}"),
    Question("fleet/inefficient", "/v1/analytics/fleet/inefficient"),
    Question("chargers, a page", "/v1/analytics/chargers"),
    Question("sessions of the fleet, 3 hours", "/v1/analytics/sessions?hours=3"),
    Question("fleet", "/v1/analytics/fleet"),
]


class Took(NamedTuple):
    """What a client has measured: seconds of each answer, bytes of the last one, and how long all of it took."""

    answers: list[float]
    size: int
    seconds: float


class Figures(NamedTuple):
    """One question, asked by so many connections at once."""

    took: Took
    web_cpu: float
    postgres_cpu: float

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        answers = sorted(self.took.answers)
        return answers[math.ceil(share * len(answers)) - 1] * 1_000

    @property
    def rate(self) -> float:
        return len(self.took.answers) / self.took.seconds

    def us(self, cpu: float) -> float:
        return cpu / len(self.took.answers) * 1e6


def client(port: int, path: str, vehicles: list[str], connections: int, seconds: float) -> Took:
    """In a process of its own: asks for so long over so many connections, each the next as soon as it has an answer."""
    return uvloop.run(ask(port, path, vehicles, connections, seconds))


async def ask(port: int, path: str, vehicles: list[str], connections: int, seconds: float) -> Took:
    answers: list[float] = []
    size = 0
    # The same order in each run, and none that any index has.
    turn = itertools.cycle(random.Random(1).sample(vehicles, len(vehicles)))  # noqa: S311
    began = time.perf_counter()

    async def connection() -> None:
        nonlocal size
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - began < seconds:
            target = path.replace("{vehicle}", next(turn))
            asked = time.perf_counter()
            writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            assert head.startswith("http/1.1 200 "), head
            size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            await reader.readexactly(size)
            answers.append(time.perf_counter() - asked)
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return Took(answers, size, time.perf_counter() - began)


def fill(dsn: str, options: argparse.Namespace) -> list[str]:
    """Fills the database; returns its vehicles."""
    now = datetime.now(UTC)
    target = Target(dsn, EPOCH)
    start = now.replace(second=0, microsecond=0) - timedelta(days=options.days)
    source = Source("fleet", options.devices, start, [target])
    with target.without_indexes():
        readings = source.fill(now)
    report.progress(f"{readings:,} readings; rollups")
    target.roll_up(now)
    target.meters.execute("VACUUM ANALYZE")
    source.fill(datetime.now(UTC))
    target.update_live(now - timedelta(minutes=3))
    target.roll_up(datetime.now(UTC))
    target.meters.close()
    target.vehicles.close()
    return source.vehicles


class Server:
    """`wattbridge web`, as a login that only reads."""

    def __init__(self, dsn: str, connections: int, folder: Path) -> None:
        self.port = free_port()
        env = rig.environment() | {
            "WATTBRIDGE_DATABASE__DSN": dsn,
            "WATTBRIDGE_WEB__LISTEN": f"127.0.0.1:{self.port}",
            "WATTBRIDGE_WEB__CONNECTIONS": str(connections),
            "WATTBRIDGE_WEB__TIMEOUT_S": "60",
        }
        self._process = LeashedProcess(
            [rig.PROGRAM, "web"], env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        rig.wait_until(self._answers, "listening")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def cpu(self) -> float:
        return rig.cpu_seconds(self._process.pid)

    def end(self) -> None:
        self._process.stop()


class Postgres:
    """The CPU of a whole server."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.postgres = server

    cpu = rig.Turn.postgres_cpu


def measure(
    server: Server, postgres: Postgres, pool: ProcessPoolExecutor, question: Question, vehicles: list[str], n: int,
    seconds: float,
) -> Figures:  # fmt: skip
    pool.submit(client, server.port, question.path, vehicles, n, min(seconds, WARM_UP_S)).result()
    used = rig.usage({"web": server.cpu, "postgres": postgres.cpu})
    took = pool.submit(client, server.port, question.path, vehicles, n, seconds).result()
    cpu = used()
    return Figures(took, cpu["web"], cpu["postgres"])


def row(question: Question, alone: Figures, many: Figures) -> tuple[str, ...]:
    return (
        question.name,
        report.count(many.took.size),
        *(f"{alone.quantile(share):.1f}" for share in (0.5, 0.95, 0.99)),
        report.count(many.rate),
        f"{many.quantile(0.95):.1f}",
        report.count(many.us(many.web_cpu)),
        report.count(many.us(many.postgres_cpu)),
    )


def arguments() -> argparse.Namespace:
    parser = report.arguments(__doc__, rounds=1)
    add = parser.add_argument
    add("--devices", type=int, default=2_000, help="meters, and vehicles (2,000)")
    add("--days", type=int, default=7, help="days of their history (7)")
    add("--connections", type=int, default=8, help="that ask at once (8)")
    add("--pool", type=int, default=4, help="connections to the database (4)")
    add("--seconds", type=float, default=10.0, help="that each question is asked (10)")
    return report.parse(parser, "web", devices=50, days=2, seconds=1.0)


def main() -> None:
    options = arguments()
    conditions = report.Conditions.now()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wattbridge-bench-")))
        postgres = stack.enter_context(EmbeddedPostgres(rig.SETTINGS))
        vehicles = fill(postgres.dsn, options)
        with psycopg.connect(postgres.dsn, autocommit=True) as admin:
            password = secrets.token_urlsafe(16)
            role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE wattbridge_reader")
            admin.execute(role.format(sql.Identifier(READER), sql.Literal(password)))
            version = admin.info.parameter_status("server_version")
        server = Server(make_conninfo(postgres.dsn, user=READER, password=password), options.pool, folder)
        stack.callback(server.end)
        pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        rows = []
        for question in QUESTIONS:
            report.progress(question.name)
            alone, many = (
                measure(server, Postgres(postgres), pool, question, vehicles, n, options.seconds)
                for n in (1, options.connections)
            )
            rows.append(row(question, alone, many))
    n = options.connections
    header = ["", "bytes", "p50 ms", "p95 ms", "p99 ms", f"a second ({n})", f"p95 ms ({n})", "web µs", "PostgreSQL µs"]
    note = (
        f"{options.devices:,} meters and {options.devices:,} vehicles with {options.days} days of history, "
        f"{options.pool} connections to the database; each vehicle in its turn. p50 to p99 over one connection; then "
        f"over {n} at once, with CPU of an answer. The client shares the cores."
    )
    report.publish("web", [report.Table(header, rows)], [note], conditions.describe(version), options.write)


if __name__ == "__main__":
    main()
