"""What is answered where there is nothing to answer: application/problem+json (RFC 9457), for every error alike."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import Response
from pydantic import BaseModel, Field

MEDIA_TYPE = "application/problem+json"
# What a client has sent is shown again, but not at any length.
LONGEST_SHOWN = 200


class Problem(BaseModel):
    """Why there is no answer."""

    type: str = Field(description="about:blank: the status says what kind of problem it is.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    path: str = Field(description="The path that was asked for.")
    message: str = Field(description="What is wrong and, where somebody can do something about it, what.")
    timestamp: datetime = Field(description="When.")


class ProblemError(Exception):
    """Ends a request with a problem instead of an answer."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


def respond(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The problem as a response."""
    problem = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "path": shortened(path),
        "message": message,
        "timestamp": datetime.now(UTC),
    }
    said = {"Cache-Control": "no-store"} | dict(headers or {})
    return Response(msgspec.json.encode(problem), status, said, MEDIA_TYPE)


def invalid(name: str, value: object, allowed: str) -> ProblemError:
    """The problem with one parameter."""
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{name} is {shortened(repr(value))}: {allowed}")


def explained(errors: Iterable[Mapping[str, Any]], known: Iterable[str]) -> str:
    """What is wrong with the parameters of a request, in one line; `known` are those that there are."""
    return "; ".join(_explained(errors, known))


def _explained(errors: Iterable[Mapping[str, Any]], known: Iterable[str]) -> Iterator[str]:
    for error in errors:
        _, *name = error["loc"]
        said = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            there_are = ", ".join(known) or "none"
            yield f"{shortened(name[0])}: there is no such parameter; there are {there_are}"
        elif name:
            yield f"{name[0]} is {shortened(repr(error['input']))}: {said}"
        else:
            yield said


def shortened(text: str) -> str:
    """The text, or its beginning where it is long."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
