"""How an answer is written: JSON or CSV, with an ETag, and how long it may be kept."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel

from bridge.web.problems import ProblemError

Row = dict[str, Any]

JSON, CSV = "application/json", "text/csv"
# What may be kept: nothing without asking again; a few seconds. Private: it may have taken a token to get it.
ASK_AGAIN = "private, no-cache"
BRIEFLY = "private, max-age=5"


def kept_for(seconds: float) -> str:
    """The Cache-Control of what stays the same for so long."""
    return f"private, max-age={max(0, int(seconds))}"


def single(request: Request, model: type[BaseModel], row: Row, cache: str) -> Response:
    """One thing."""
    return _respond(request, model, row, [row], cache)


def page(
    request: Request,
    model: type[BaseModel],
    rows: Sequence[Row],
    cache: str,
    limit: int,
    after: Callable[[Row], str],
    window: Mapping[str, datetime | None] | None = None,
) -> Response:
    """Part of a list: `rows` are at most `limit`, and one more where there are more to come.

    `after` names a row, for the next page to begin behind it. `window` is what that page is asked for in place of
    hours, so that all pages are about the same time.
    """
    shown = rows[:limit]
    following = None
    if len(rows) > limit:
        query = {name: value for name, value in request.query_params.items() if name != "after"}
        if window:
            query.pop("hours", None)
            query |= {name: written(moment) for name, moment in window.items() if moment}
        following = f"{request.scope['path']}?{urlencode(query | {'after': after(shown[-1])})}"
    return listed(request, model, shown, cache, following)


def listed(
    request: Request, model: type[BaseModel], rows: Sequence[Row], cache: str, following: str | None = None
) -> Response:
    """A list; `following` is where it goes on."""
    response = _respond(request, model, {"items": rows, "next": following}, rows, cache)
    if following:
        response.headers["Link"] = f'<{following}>; rel="next"'
    return response


def written(moment: datetime) -> str:
    """A time in UTC as JSON has it."""
    return moment.isoformat().replace("+00:00", "Z")


def _respond(request: Request, model: type[BaseModel], content: object, rows: Sequence[Row], cache: str) -> Response:
    media_type = _chosen(request.headers.get("accept", ""))
    body = msgspec.json.encode(content) if media_type == JSON else _csv(model, rows)
    tag = f'"{sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": cache}
    if _known(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


@lru_cache(maxsize=64)
def _chosen(accept: str) -> str:
    """The media type that the header likes best. Raises ProblemError where it likes none that there is."""
    liked = {JSON: -1.0, CSV: -1.0}
    closest = dict.fromkeys(liked, -1)
    for part in accept.lower().split(",") if accept.strip() else ["*/*"]:
        name, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((_quality(piece[2:]) for piece in parameters if piece.startswith("q=")), 1.0)
        for media_type in liked:
            # The closest match decides, wherever it stands.
            match = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
            if name in match and match.index(name) > closest[media_type]:
                closest[media_type], liked[media_type] = match.index(name), quality
    best = max(liked, key=lambda media_type: liked[media_type])
    if liked[best] <= 0:
        raise ProblemError(HTTPStatus.NOT_ACCEPTABLE, f"there is {JSON} and {CSV}")
    return best


def _quality(text: str) -> float:
    return float(text) if re.fullmatch(r"[01](\.[0-9]{0,3})?", text) else 0.0


def _known(header: str, tag: str) -> bool:
    return header == "*" or tag in {known.strip().removeprefix("W/") for known in header.split(",")}


def _csv(model: type[BaseModel], rows: Sequence[Row]) -> bytes:
    """RFC 4180, with a header of the names that JSON has."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([_cell(row[name]) for name in names] for row in rows)
    return file.getvalue().encode()


def _cell(value: object) -> object:
    match value:
        case bool():
            return str(value).lower()
        case datetime():
            return written(value)
        case list():
            return _text(" ".join(value))
        case str():
            return _text(value)
        case _:
            return value


def _text(text: str) -> str:
    # A spreadsheet would take it for a formula, and what devices say is anybody's.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
