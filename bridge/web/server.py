"""The process: listens, answers until it is told to stop, and finishes what it has begun to answer."""

import asyncio
import contextlib
import signal
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
# A request whose head is longer is not read on; nor is one whose head is not there after so long.
LONGEST_HEAD = 65_536
REQUEST_S = 10.0


def run(config: Config) -> ExitCode:
    """Answers until SIGTERM or SIGINT. Raises WattbridgeError where it cannot listen."""
    web = config.web
    with listen("web.listen", web.address(), "end what listens there") as socket:
        host, port = socket.getsockname()[:2]
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
        server.run(sockets=[socket])
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
    """Neither reads the head of a request without an end, nor waits for it for ever."""

    _unread = 0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are Transports in all but the class.
        super().connection_made(cast("asyncio.Transport", transport))
        self._patience = self.loop.call_later(REQUEST_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > LONGEST_HEAD:
            self.transport.abort()
        elif self._unread and not self._patience:
            self._patience = self.loop.call_later(REQUEST_S, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._be_patient()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def _be_patient(self) -> None:
        if self._patience:
            self._patience.cancel()
            self._patience = None
