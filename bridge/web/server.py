"""The process: listens, answers until it is told to stop, and finishes what it has begun to answer."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import cast

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bridge.config import Config
from bridge.errors import ExitCode
from bridge.http import listen, settings
from bridge.web.app import create_app
from bridge.web.site import Site

log = structlog.get_logger()

# More at once are told to come back: descriptors end somewhere.
MOST_CONNECTIONS = 500
# A request whose head is longer is not read on; nor is one that is not there as a whole after so long.
LONGEST_HEAD = 65_536
REQUEST_S = 10.0
# Who does not read what was answered for so long is gone; until then no more than this is held for them by the system.
READ_S = 30.0
SEND_BUFFER = 256 * 1024


def run(config: Config) -> ExitCode:
    """Answers until SIGTERM or SIGINT. Raises WattbridgeError where it cannot listen."""
    web = config.web
    with listen("web.listen", web.address(), "end what listens there") as listening:
        host, port = listening.getsockname()[:2]
        log.info("web.listening", host=host, port=port, token=bool(web.token.get_secret_value()))
        if web.open and not web.token.get_secret_value():
            log.warning(
                "web.open",
                host=host,
                meaning="whoever can reach this address may read everything: set web.token, or listen on 127.0.0.1",
            )
        app = create_app(config)
        server = _Server(
            settings(
                app,
                http=_Connection,
                lifespan="on",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=int(web.timeout_s) + 2,
            )
        )
        server.site = app.state.site
        server.run(sockets=[listening])
    log.info("web.stopped")
    return ExitCode.OK


class _Server(uvicorn.Server):
    """Ends in order on a signal, and without raising it again; a second SIGINT does not wait for answers."""

    site: Site

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends what would go on for as long as somebody looks, and then the rest."""
        self.site.stop()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Connection(HttpToolsProtocol):
    """Waits neither for a request nor for its reader without an end."""

    _unread = 0
    _asking: asyncio.TimerHandle | None = None
    _telling: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are Transports in all but the class.
        super().connection_made(cast("asyncio.Transport", transport))
        line = self.transport.get_extra_info("socket")
        # The system would hold megabytes for who does not read, and what was sent to who is gone for a quarter hour.
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(READ_S * 1_000))
        self._asking = self.loop.call_later(REQUEST_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for patience in (self._asking, self._telling):
            if patience:
                patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > LONGEST_HEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        # From its first byte to the last one of its body.
        if not self._asking:
            self._asking = self.loop.call_later(REQUEST_S, self.transport.abort)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        if self._asking:
            self._asking.cancel()
            self._asking = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The transport holds enough that was not read."""
        self._telling = self.loop.call_later(READ_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """It was read."""
        if self._telling:
            self._telling.cancel()
            self._telling = None
        super().resume_writing()
