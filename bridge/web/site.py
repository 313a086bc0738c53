"""How pages are written: from templates, as a whole, or as a stream of events that keeps an open page live.

Both come from the same address: who accepts text/event-stream gets the stream (https://html.spec.whatwg.org/#server-sent-events).
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.types import Receive, Scope, Send

from bridge.config import Config
from bridge.web import figures, problems
from bridge.web.assets import Assets
from bridge.web.problems import ProblemError
from bridge.web.representation import ASK_AGAIN

Content = Mapping[str, Any]
Gather = Callable[[], Awaitable[Content]]
Fresh = Callable[[], Awaitable[object]]

EVENTS = "text/event-stream"
# How often an open page is looked at again; and what the browser waits before it comes back after the line was cut.
EVERY_S = 2.0
RETRY_MS = 3_000
# Where a look takes long: the browser takes a longer silence for the end of us.
SIGN_OF_LIFE_S = 8.0
# An open page is made anew at least so often, and takes at most about one of so many parts of the time.
LONGEST_S = 60.0
SELDOM = 5
# Each holds a connection. The API must still be reachable.
MOST_STREAMS = 200


class Site:
    """What the pages have in common."""

    def __init__(self, config: Config, assets: Assets) -> None:
        self._streams = 0
        self._looks: dict[str, asyncio.Task[Look]] = {}
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

    async def respond(self, request: Request, template: str, gather: Gather, fresh: Fresh | None = None) -> Response:
        """The page that `template` makes of what is gathered; as events, its block `main` whenever that has changed.

        What costs much to gather has a cheap `fresh` beside it: an open page is gathered again when that says something
        else than before, or a minute is over. Raises ProblemError as `gather` does.
        """
        if EVENTS in request.headers.get("accept", ""):
            # A proxy must not keep events back (nginx).
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            if request.scope.get("head"):
                return Response(headers=headers, media_type=EVENTS)
            if self._streams >= MOST_STREAMS:
                full = event("full", f"{MOST_STREAMS} pages are kept live already")
                return Response(full, headers=headers, media_type=EVENTS)
            self._streams += 1
            return _Stream(self, self._events(request, template, gather, fresh), headers=headers, media_type=EVENTS)
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

    def ended(self) -> None:
        """A stream has."""
        self._streams -= 1

    async def _events(self, request: Request, template: str, gather: Gather, fresh: Fresh | None) -> AsyncIterator[str]:
        shown = ""
        yield f"retry: {RETRY_MS}\n\n"
        while not self._stopping.is_set():
            looking = self._look(request, template, gather, fresh)
            while not (await asyncio.wait((looking,), timeout=SIGN_OF_LIFE_S))[0]:
                yield event("waiting", "")
            try:
                look = looking.result()
            except ProblemError as problem:
                yield event("trouble", problem.message)
            else:
                # Also where nothing is new: the page shows when it was last known to be true.
                at = f"{look.at:%H:%M:%S}"
                yield event("unchanged", at) if look.text == shown else event("changed", f"{at}\n{look.text}")
                shown = look.text
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), EVERY_S)

    def _look(self, request: Request, template: str, gather: Gather, fresh: Fresh | None) -> "asyncio.Task[Look]":
        """The block `main` as of a moment ago: of all who have the same page open, one looks for all."""
        address = f"{request.scope['path']}?{request.url.query}"
        looking = self._looks.get(address)
        if looking is None or (looking.done() and _over(looking)):
            before = looking.result() if looking and _fine(looking) else None
            looking = asyncio.create_task(self._looked(request, template, gather, fresh, before))
            self._looks[address] = looking
            # Perhaps nobody waits any more for how it went.
            looking.add_done_callback(_fine)
            # Those that nobody wants any more.
            for old in [old for old, done in self._looks.items() if done.done() and _over(done, LONGEST_S)]:
                del self._looks[old]
        return looking

    async def _looked(
        self, request: Request, template: str, gather: Gather, fresh: Fresh | None, before: "Look | None"
    ) -> "Look":
        began = time.monotonic()
        state = await fresh() if fresh else None
        at = datetime.now(UTC)
        if before and fresh and before.state == state and began - before.gathered < LONGEST_S:
            return before._replace(at=at, good_until=began + EVERY_S / 2)
        found = self._templates.get_template(template)
        context = found.new_context({**await gather(), "path": request.scope["path"]})
        text = "".join(found.blocks["main"](context))
        # What takes long is looked at seldom: pages that are open never take all of a core.
        now = time.monotonic()
        return Look(text, at, state, began, now + max(EVERY_S / 2, SELDOM * (now - began)))


class Look(NamedTuple):
    """A page as it was at a time; `gathered` and `good_until` by a clock that never jumps."""

    text: str
    at: datetime
    state: object
    gathered: float
    good_until: float


class _Stream(StreamingResponse):
    """Tells when it has ended, however it does."""

    def __init__(self, site: Site, events: AsyncIterator[str], headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(events, headers=headers, media_type=media_type)
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._site.ended()


def _fine(look: "asyncio.Task[Look]") -> bool:
    return look.done() and not look.cancelled() and not look.exception()


def _over(look: "asyncio.Task[Look]", more_s: float = 0.0) -> bool:
    """Whether a look that has ended is no longer good, for so long."""
    return not _fine(look) or time.monotonic() > look.result().good_until + more_s


def event(name: str, data: str) -> str:
    """An event as it is sent."""
    # To a browser all three end a line, in events as in pages; to Python there are more.
    lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", data))
    return f"event: {name}\n{lines}\n"


def _price(tariff: float | None) -> str:
    """Cents, and parts of them where there are any."""
    return "" if tariff is None else f"{tariff:.2f}" if round(tariff, 2) == tariff else f"{tariff:.6f}".rstrip("0")
