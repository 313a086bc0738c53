"""`wattbridge web` as a process, and how it is asked; a fleet that everything is asked about."""

import http.client
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.services import free_port
from tests.integration.harness import Daemon

NOWHERE = type("Nowhere", (), {"host": "127.0.0.1", "port": 1})()
PASSWORD = "only for tests"


class Answer(NamedTuple):
    """What was answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Web(Daemon):
    """`wattbridge web`; the program is started and read like the daemon. `asks` is its own way to the database."""

    def __init__(self, dsn: str, folder: Path, **settings: object) -> None:
        self.port = free_port()
        settings = {"web__listen": f"127.0.0.1:{self.port}", **settings}
        super().__init__(dsn, NOWHERE, "web", folder, ready=False, command="web", **settings)

    def start(self) -> None:
        super().start()
        self.wait_for_event("web.listening")

    def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, safe: str = "%/?=&~,"
    ) -> Answer:
        """One request over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, quote(path, safe + ":+"), headers=dict(headers or {}))
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """What JSON says; it must be an answer."""
        answer = self.ask(path)
        if answer.status != 200:
            raise AssertionError(f"{path}: {answer.status} {answer.body!r}")
        return answer.json()

    def pages(self, path: str) -> Iterator[list[dict[str, Any]]]:
        """The items of all pages, page by page."""
        following: str | None = path
        for _ in range(1_000):
            if following is None:
                return
            answer = self.get(following)
            yield answer["items"]
            following = answer["next"]
        raise AssertionError(f"{path}: no end of pages")


@contextmanager
def login(admin: str, dsn: str, *groups: str) -> Iterator[str]:
    """The DSN of a login role that is a member of these and nothing else."""
    name = sql.Identifier(f"web_{uuid.uuid4().hex[:12]}")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(PASSWORD)))
        for group in groups:
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), name))
        try:
            yield make_conninfo(dsn, user=name.as_string().strip('"'), password=PASSWORD)
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(name))


def quarter_hour_ago(hours: float) -> datetime:
    """A whole minute so long ago."""
    return datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(hours=hours)
