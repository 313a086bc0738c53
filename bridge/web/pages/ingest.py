"""/ingest: what becomes of readings, how quickly, and which were rejected and why; their replay where it is enabled."""

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import pairwise
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

import structlog
from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import AfterValidator, ValidationError

from bridge.config import Config
from bridge.deadletters import INSTANCE
from bridge.errors import Reason
from bridge.web import problems
from bridge.web.daemons import Daemons
from bridge.web.parameters import Asked, check_device_id, parse_moment
from bridge.web.problems import ProblemError, invalid
from bridge.web.questions import FLEET_REMEMBERED_S, REMEMBERED_S, Questions
from bridge.web.replay import Replays, Wanted
from bridge.web.representation import Row, written
from bridge.web.site import Content, Site

log = structlog.get_logger()

# How often counters and daemons are looked at, also while nobody looks at us; and how much of it is kept.
LOOK_S = 5.0
KEPT_S = 15 * 60.0
# A rate is that of about so long; where nobody looked for longer than a gap, there is none.
RATE_S = 10.0
GAP_S = 30.0
LETTERS = 50
# So much of a payload is shown.
SHOWN_BYTES = 4_096
HEX_COLUMNS = 16
LONGEST_FORM = 4_096
FORM = "application/x-www-form-urlencoded"
COUNTERS = ("received", "stored", "duplicate", "deadLettered")


class Sample(NamedTuple):
    """The counters of each daemon at a time (seconds since 1970, by the database's clock)."""

    at: float
    counters: Mapping[str, Row]


class Books:
    """The counters of the last quarter hour."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque()

    def note(self, rows: Sequence[Row]) -> Sample | None:
        """What was read just now; kept if it is not too soon after the one before."""
        if not rows:
            return None
        sample = Sample(rows[0]["askedAt"].timestamp(), {row["instance"]: row for row in rows})
        if not self.samples or sample.at - self.samples[-1].at >= LOOK_S * 0.9:
            self.samples.append(sample)
            while sample.at - self.samples[0].at > KEPT_S:
                self.samples.popleft()
        return sample

    def before(self, sample: Sample) -> Sample | None:
        """The one to compare with for what is going on now."""
        older = [kept for kept in self.samples if RATE_S <= sample.at - kept.at <= GAP_S]
        return older[-1] if older else None


def rates(before: Sample, after: Sample) -> dict[str, dict[str, float]]:
    """Readings a second of each daemon, by what became of them. Replays are no readings that arrive."""
    daemons = (before.counters.keys() & after.counters.keys()) - {INSTANCE}
    # Counters only grow: this is another database, or an older state of it.
    if any(after.counters[one][name] < before.counters[one][name] for one in daemons for name in COUNTERS):
        return {}
    seconds = after.at - before.at
    return {
        instance: {name: (row[name] - before.counters[instance][name]) / seconds for name in COUNTERS}
        for instance, row in after.counters.items()
        if instance in daemons
    }


def chart(samples: Sequence[Sample]) -> dict[str, Any]:
    """Rates of all daemons over time; where nobody looked for long is a gap."""

    def values(name: str) -> list[float | None]:
        found: list[float | None] = []
        for before, after in pairwise(samples):
            each = rates(before, after).values() if after.at - before.at <= GAP_S else ()
            found.append(sum(rate[name] for rate in each) if each else None)
        return found

    names = {
        "received": ("Received", "area"),
        "duplicate": ("Duplicate", "line"),
        "deadLettered": ("Dead letters", "line"),
    }
    return {
        "x": [round(sample.at) for sample in list(samples)[1:]],
        "series": [
            {"label": label, "unit": "/s", "values": values(name), "kind": kind}
            for name, (label, kind) in names.items()
        ],
    }


class Shown(NamedTuple):
    """A payload for people: its text, or its bytes in hexadecimal."""

    form: str
    text: str


def shown(beginning: bytes, *, whole: bool) -> Shown:
    """A payload as it can be shown; where it is not the whole one, a character may be cut at its end."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(beginning, whole)
    except UnicodeDecodeError:
        return Shown("hex", hex_dump(beginning))
    return Shown("text", visible(text, "\n\t"))


def visible(text: str, allowed: str = "") -> str:
    """The text with signs for what cannot be seen, or would change how the rest of it looks."""
    return "".join(
        character if character.isprintable() or character in allowed else f"⟨U+{ord(character):04X}⟩"
        for character in text
    )


def hex_dump(data: bytes) -> str:
    """Offset, bytes and what of them is ASCII, line by line."""
    lines = []
    for offset in range(0, len(data), HEX_COLUMNS):
        part = data[offset : offset + HEX_COLUMNS]
        ascii_part = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in part)  # noqa: PLR2004 - ASCII
        lines.append(f"{offset:06x}  {part.hex(' '):<{HEX_COLUMNS * 3 - 1}}  {ascii_part}")
    return "\n".join(lines)


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request that changes something comes from a page of ours, or from no page at all.

    A browser sends the token by itself, also for a form on somebody else's page.
    """
    if "sec-fetch-site" in headers:
        return headers["sec-fetch-site"] == "same-origin"
    # What is no browser sends neither, nor does it send anything by itself.
    return "origin" not in headers or urlsplit(headers["origin"]).netloc == headers.get("host")


def _device_or_none(name: str) -> str:
    return check_device_id(name) if name else name


def _reason_or_none(name: str) -> str:
    if name and name not in set(Reason):
        raise ValueError(f"a reason is one of {', '.join(Reason)}")
    return name


class Which(Asked):
    """Which dead letters; a form sends what is left out as empty."""

    reason: Annotated[str, AfterValidator(_reason_or_none)] = ""
    device: Annotated[str, AfterValidator(_device_or_none)] = ""

    def query(self) -> dict[str, str]:
        """As the query of an address has it."""
        return {name: value for name, value in (("reason", self.reason), ("device", self.device)) if value}


class Part(Which):
    """Which part of them."""

    after: str = ""


class Order(Which):
    """Which to replay."""

    letter: Annotated[str, Query(pattern="^([0-9a-f]{64})?$")] = ""


LetterId = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]


def routes(site: Site, questions: Questions, config: Config) -> APIRouter:
    """The routes, answered by `questions`; what is read in between is read while the application runs."""
    books = Books()
    daemons = Daemons(config.web.daemon_addresses)
    replays = Replays(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def look_at_books() -> None:
            books.note(await questions.ask("ingest_counters"))

        # Not at once at the books: somebody else may be waiting for the first connection.
        looking = [asyncio.create_task(_again(daemons.look, 0)), asyncio.create_task(_again(look_at_books, LOOK_S))]
        yield
        for task in looking:
            task.cancel()
        await asyncio.wait(looking)
        await replays.stop()
        daemons.close()

    router = APIRouter(lifespan=lifespan)

    @router.get("/ingest")
    async def ingest(request: Request, part: Annotated[Part, Query()]) -> Response:
        after = _after(part.after)

        async def gather() -> Content:
            content = {
                "daemons": daemons.reports(),
                "asked": part,
                "query": urlencode(part.query()),
                "reasons": list(Reason),
                "replay": replays.enabled,
            }
            try:
                found = await _gathered(questions, books, part, after)
            except ProblemError as problem:
                # While the database is away, what waits in the daemons is what one wants to see.
                if not config.web.daemons:
                    raise
                return {**content, "trouble": problem.message}
            return {**content, **found, "trouble": ""}

        return await site.respond(request, "ingest.html", gather)

    _route_letters(router, site, questions, replay=replays.enabled)
    _route_replays(router, site, questions, replays)
    return router


def _route_letters(router: APIRouter, site: Site, questions: Questions, *, replay: bool) -> None:
    @router.get("/ingest/letters/{letter}")
    async def one_letter(request: Request, letter: LetterId, _: Annotated[Asked, Query()]) -> Response:
        async def gather() -> Content:
            row = _known(await questions.ask("letter", id=letter, shown=SHOWN_BYTES))
            said = {name: visible(row[name] or "") for name in ("topic", "contentType", "detail")}
            payload = shown(row["beginning"], whole=row["payloadBytes"] <= SHOWN_BYTES)
            return {"letter": row | said, "payload": payload, "most": SHOWN_BYTES, "replay": replay}

        return await site.respond(request, "letter.html", gather)

    @router.get("/ingest/letters/{letter}/payload")
    async def payload(letter: LetterId, _: Annotated[Asked, Query()]) -> Response:
        row = _known(await questions.ask("letter_payload", id=letter))
        headers = {
            "Content-Disposition": f'attachment; filename="{letter[:12]}.bin"',
            "Cache-Control": "private, no-store",
        }
        return Response(row["payload"], headers=headers, media_type="application/octet-stream")


def _route_replays(router: APIRouter, site: Site, questions: Questions, replays: Replays) -> None:
    @router.get("/ingest/replay")
    async def about_replay(request: Request, which: Annotated[Which, Query()]) -> Response:
        async def gather() -> Content:
            letters = None
            if which.query():
                (counted,) = await questions.ask(
                    "letters_count", FLEET_REMEMBERED_S, reason=which.reason or None, device=which.device or None
                )
                letters = counted["letters"]
            asked = Wanted(reason=which.reason, device=which.device)
            return {"asked": asked, "letters": letters, "enabled": replays.enabled, "replay": None}

        return await site.respond(request, "replay.html", gather)

    @router.get("/ingest/replays/{name}")
    async def one_replay(request: Request, name: str, _: Annotated[Asked, Query()]) -> Response:
        async def gather() -> Content:
            replay = replays.find(name)
            if replay is None:
                said = "there has been no such replay since this process was started; the counters know what it did"
                raise ProblemError(HTTPStatus.NOT_FOUND, said)
            return {"replay": replay, "said": visible(replay.said, "\n"), "enabled": replays.enabled}

        return await site.respond(request, "replay.html", gather)

    # Else it is refused as everywhere: only GET and HEAD.
    if replays.enabled:

        @router.post("/ingest/replay")
        async def start_replay(request: Request) -> Response:
            if not same_origin(request.headers):
                said = "this came from another site's page: replay from the page of the dead letter"
                raise ProblemError(HTTPStatus.FORBIDDEN, said)
            order = await _order(request)
            replay = replays.start(Wanted(order.letter, order.reason, order.device))
            return RedirectResponse(f"/ingest/replays/{replay.name}", HTTPStatus.SEE_OTHER)


async def _again(look: Callable[[], Awaitable[object]], pause_s: float) -> None:
    """Looks again and again, whatever comes of it."""
    while True:
        await asyncio.sleep(pause_s)
        pause_s = LOOK_S
        try:
            await look()
        except ProblemError:
            # The log says so already, once.
            continue
        except Exception:
            log.exception("ingest.failed", meaning="the page has no rates for now")


async def _gathered(questions: Questions, books: Books, part: Part, after: tuple[datetime | None, str]) -> Content:
    """What the database says."""
    rows, (fleet,), summary, letters = await asyncio.gather(
        questions.ask("ingest_counters"),
        questions.ask("fleet_now"),
        questions.ask("dead_letters"),
        questions.ask(
            "letters",
            # With a reason that is rare it reads all of them.
            FLEET_REMEMBERED_S if part.query() else REMEMBERED_S,
            reason=part.reason or None,
            device=part.device or None,
            after_received=after[0],
            after_id=after[1],
            rows=LETTERS + 1,
        ),
    )
    now = books.note(rows)
    before = books.before(now) if now else None
    rate = rates(before, now) if before and now else {}
    following = None
    if len(letters) > LETTERS:
        last = letters[LETTERS - 1]
        behind = {"after": f"{written(last['receivedAt'])}~{last['id']}"}
        following = f"/ingest?{urlencode(part.query() | behind)}#letters"
    return {
        "counters": rows,
        "rates": rate,
        "rate": sum(each["received"] for each in rate.values()) if rate else None,
        "fleet": fleet,
        "summary": [row | {"exampleDetail": visible(row["exampleDetail"])} for row in summary],
        "letters": [row | {"detail": visible(row["detail"])} for row in letters[:LETTERS]],
        "following": following,
        "chart": chart(list(books.samples)),
        "since": datetime.fromtimestamp(books.samples[0].at, UTC) if books.samples else None,
    }


async def _order(request: Request) -> Order:
    """What a form orders. Raises ProblemError where it is none."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise ProblemError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a form is {FORM}")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_FORM:
            raise ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a form has at most {LONGEST_FORM} bytes")
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=10))
        return Order.model_validate(fields)
    except ValidationError as error:
        said = problems.explained(({**one, "loc": ("form", *one["loc"])} for one in error.errors()), Order.model_fields)
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, said) from None
    except ValueError:
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"this is not {FORM}") from None


def _known(rows: Sequence[Row]) -> Row:
    if not rows:
        raise ProblemError(
            HTTPStatus.NOT_FOUND, "there is no such dead letter: it was replayed or purged, or never was"
        )
    return rows[0]


def _after(after: str) -> tuple[datetime | None, str]:
    if not after:
        return None, ""
    received, _, letter = after.partition("~")
    try:
        return parse_moment(received), bytes.fromhex(letter).hex()
    except ValueError:
        raise invalid("after", after, "take it from the address of `Next`") from None
