"""The HTTP server for those who look after us: /livez, /readyz, /metrics. What they say is decided elsewhere."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bridge.errors import WattbridgeError

log = structlog.get_logger()

Send = Callable[[dict[str, Any]], Awaitable[None]]

PATHS = ("/livez", "/readyz", "/metrics")
# Beyond these the oldest connection is closed: descriptors belong to the data path.
MOST_CONNECTIONS = 64
# A connection that has not sent the head of a request within this time is closed.
REQUEST_S = 5.0


class Health:
    """Answers on `address` from its construction on.

    `unready` says why the bridge is not ready, empty: it is. `metrics` is asked with the Accept header of the request.
    Raises WattbridgeError where it cannot listen there.
    """

    def __init__(
        self,
        address: tuple[str, int],
        unready: Callable[[], Sequence[str]],
        metrics: Callable[[str], tuple[bytes, str]],
    ) -> None:
        self._unready = unready
        self._metrics = metrics
        self._socket = listen("health.listen", address, "leave it out (each daemon on a machine needs its own)")
        self._server = _Server(settings(self._answer, http=_Connection, lifespan="off", timeout_graceful_shutdown=1))

    async def run(self) -> None:
        """Answers until `stop`. Whatever fails in here ends the answers and nothing else."""
        try:
            await self._server.serve(sockets=[self._socket])
        except (Exception, SystemExit):
            log.exception("http.failed", meaning="no health checks any more; readings are taken as before")

    def stop(self) -> None:
        """Lets `run` end soon."""
        self._server.should_exit = True

    async def _answer(self, scope: Mapping[str, Any], _receive: object, send: Send) -> None:
        status, body, content_type = self._page(scope)
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _page(self, scope: Mapping[str, Any]) -> "Page":
        path = scope["path"]
        if path not in PATHS:
            return _said(HTTPStatus.NOT_FOUND, f"there are {', '.join(PATHS)}")
        if scope["method"] not in ("GET", "HEAD"):
            return _said(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        try:
            if path == "/metrics":
                accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
                return Page(HTTPStatus.OK, *self._metrics(accept.decode("latin-1")))
            reasons = self._unready() if path == "/readyz" else ()
        except Exception:
            log.exception("http.failed", path=path)
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR, "the log says what failed")
        if reasons:
            return _said(HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(reasons))
        return _said(HTTPStatus.OK, "ready" if path == "/readyz" else "alive")


class Page(NamedTuple):
    """An answer."""

    status: HTTPStatus
    body: bytes
    content_type: str


def _said(status: HTTPStatus, text: str) -> Page:
    return Page(status, f"{text}\n".encode(), "text/plain; charset=utf-8")


class _Server(uvicorn.Server):
    """Leaves the signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """Neither waits for ever for somebody's first request, nor lets the silent keep the others out."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.began = self.loop.time()
        # uvloop's transports are Transports in all but the class.
        super().connection_made(cast("asyncio.Transport", transport))
        if len(self.connections) > MOST_CONNECTIONS:
            everyone = cast("set[_Connection]", self.connections)
            min(everyone, key=lambda connection: connection.began).transport.abort()
        self.loop.call_later(REQUEST_S, self._lose_patience)

    def _lose_patience(self) -> None:
        # Not a request so far.
        if self.cycle is None:
            self.transport.abort()


def settings(app: Any, **more: Any) -> uvicorn.Config:  # noqa: ANN401 - uvicorn's own types
    """How a server of ours runs an ASGI application, and `more` of uvicorn's settings."""
    return uvicorn.Config(
        app,
        ws="none",
        interface="asgi3",
        # What strangers send is not worth a line in our log; what fails in here is logged by us.
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        **more,
    )


def listen(key: str, address: tuple[str, int], otherwise: str) -> socket.socket:
    """A socket that listens there. Raises WattbridgeError, with the key and what else to do, where it cannot."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise WattbridgeError(
            f"{key}: cannot listen on {host} port {port}: {error.strerror or error}; choose another address or port, "
            f"or {otherwise}"
        ) from None
