"""How pages are written: from templates, as a whole, or as a stream of events that keeps an open page live.

Both come from the same address: who accepts text/event-stream gets the stream (https://html.spec.whatwg.org/#server-sent-events).
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from bridge.config import Config
from bridge.web import figures, problems
from bridge.web.assets import Assets
from bridge.web.problems import ProblemError
from bridge.web.representation import ASK_AGAIN

Content = Mapping[str, Any]
Gather = Callable[[], Awaitable[Content]]

EVENTS = "text/event-stream"
# How often an open page is looked at again; and what the browser waits before it comes back after the line was cut.
EVERY_S = 2.0
RETRY_MS = 3_000
# Each holds a connection. The API must still be reachable.
MOST_STREAMS = 200


class Site:
    """What the pages have in common."""

    def __init__(self, config: Config, assets: Assets) -> None:
        self._streams = 0
        self._looks: dict[str, asyncio.Task[str]] = {}
        self._stopping = asyncio.Event()
        self._templates = Environment(
            loader=PackageLoader("bridge.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= figures.FILTERS
        self._templates.globals |= {
            "asset": assets.address,
            "tariff": config.web.tariff,
            "price": _price(config.web.tariff),
            "currency": config.web.currency,
        }

    async def respond(self, request: Request, template: str, gather: Gather) -> Response:
        """The page that `template` makes of what is gathered; as events, its block `main` whenever that has changed.

        Raises ProblemError as `gather` does.
        """
        if EVENTS in request.headers.get("accept", ""):
            if self._streams >= MOST_STREAMS:
                said = f"{MOST_STREAMS} pages are kept live already: this one stands still"
                raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, said, {"Retry-After": "30"})
            # A proxy must not keep events back (nginx).
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self._events(request, template, gather), headers=headers, media_type=EVENTS)
        return self.page(request, template, await gather())

    def page(
        self,
        request: Request,
        template: str,
        content: Content,
        status: int = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A whole page."""
        text = self._templates.get_template(template).render(content, path=request.scope["path"])
        return HTMLResponse(text, status, {"Cache-Control": ASK_AGAIN} | dict(headers or {}))

    def refuse(self, request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
        """Why there is no answer: as a page for people, as a problem for programs."""
        if "text/html" not in request.headers.get("accept", "") or request.scope["path"].startswith("/v1/"):
            return problems.respond(request.scope["path"], status, message, headers)
        content = {"status": status, "title": HTTPStatus(status).phrase, "message": message}
        return self.page(request, "problem.html", content, status, {"Cache-Control": "no-store"} | dict(headers or {}))

    def stop(self) -> None:
        """Ends all streams soon."""
        self._stopping.set()

    async def _events(self, request: Request, template: str, gather: Gather) -> AsyncIterator[str]:
        self._streams += 1
        try:
            before = ""
            yield f"retry: {RETRY_MS}\n\n"
            while not self._stopping.is_set():
                try:
                    text = await self._look(request, template, gather)
                except ProblemError as problem:
                    yield event("trouble", problem.message)
                else:
                    # Also where nothing is new: the page shows when it was last known to be true.
                    now = f"{datetime.now(UTC):%H:%M:%S}"
                    yield event("unchanged", now) if text == before else event("changed", f"{now}\n{text}")
                    before = text
                try:
                    await asyncio.wait_for(self._stopping.wait(), EVERY_S)
                except TimeoutError:
                    continue
        finally:
            self._streams -= 1

    async def _look(self, request: Request, template: str, gather: Gather) -> str:
        """The block `main` as of a moment ago: of all who have the same page open, one looks for all."""
        address = f"{request.scope['path']}?{request.url.query}"
        look = self._looks.get(address)
        if look is None:
            look = self._looks[address] = asyncio.create_task(self._main(request, template, gather))
            look.add_done_callback(lambda done: self._looked(address, done))
        await asyncio.wait((look,))
        return look.result()

    def _looked(self, address: str, look: asyncio.Task[str]) -> None:
        # Asked for, as perhaps nobody is waiting for it any more.
        if look.cancelled() or look.exception():
            self._looks.pop(address, None)
        else:
            asyncio.get_running_loop().call_later(EVERY_S / 2, self._looks.pop, address, None)

    async def _main(self, request: Request, template: str, gather: Gather) -> str:
        found = self._templates.get_template(template)
        context = found.new_context({**await gather(), "path": request.scope["path"]})
        return "".join(found.blocks["main"](context))


def event(name: str, data: str) -> str:
    """An event as it is sent."""
    # To a browser all three end a line, in events as in pages; to Python there are more.
    lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", data))
    return f"event: {name}\n{lines}\n"


def _price(tariff: float | None) -> str:
    """Cents, and parts of them where there are any."""
    return "" if tariff is None else f"{tariff:.2f}" if round(tariff, 2) == tariff else f"{tariff:.6f}".rstrip("0")
