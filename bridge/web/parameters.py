"""What can be asked for: ids, windows of time, pages. Whatever is not among it is refused, with what would be right."""

import inspect
import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple

from fastapi import Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from bridge.topics import is_device_id

HOUR = timedelta(hours=1)
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})", re.IGNORECASE
)


def check_device_id(name: str) -> str:
    """The id; raises ValueError where no device can be called so."""
    if not is_device_id(name):
        raise ValueError("an id is 1 to 128 of A-Z a-z 0-9 . _ : -")
    return name


def parse_moment(text: object) -> datetime:
    """A time in UTC, from RFC 3339; raises ValueError."""
    if not isinstance(text, str) or not RFC_3339.fullmatch(text):
        raise ValueError(
            "a time is RFC 3339 with a zone, such as 2026-02-10T14:47:00Z or 2026-02-10T15:47:00%2B01:00 "
            "(+ is written %2B in an address)"
        )
    try:
        moment = datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("there is no such time") from None
    if moment < EARLIEST:
        raise ValueError("a time is not before 1970")
    return moment


DeviceId = Annotated[str, AfterValidator(check_device_id)]
VehicleInPath = Annotated[DeviceId, Path(description="The vehicle.", examples=["V1"])]
MeterInPath = Annotated[DeviceId, Path(description="The meter.", examples=["M1"])]
Moment = Annotated[datetime, BeforeValidator(parse_moment)]


class Asked(BaseModel):
    """Base of what a query may have."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Span(NamedTuple):
    """A window of time: since <= ts < until; without until it has no end."""

    since: datetime
    until: datetime | None
    hours: float


class Window(Asked):
    """Either the last hours, or since and until."""

    hours: float | None = Field(
        None, ge=1, le=8784, allow_inf_nan=False, description="So many hours up to now; left out: 24."
    )
    since: Moment | None = Field(
        None, description="From here on, RFC 3339 with a zone; instead of hours.", examples=["2026-02-10T00:00:00Z"]
    )
    until: Moment | None = Field(
        None, description="Up to here, not included; left out: no end.", examples=["2026-02-11T00:00:00Z"]
    )

    @model_validator(mode="after")
    def _one_way_or_the_other(self) -> "Window":
        if self.hours is not None and (self.since or self.until):
            raise ValueError("hours and since/until are two ways to say it: leave one out")
        if self.until and not self.since:
            raise ValueError("until needs a since")
        if self.since and self.until and self.since >= self.until:
            raise ValueError("since must be before until")
        return self

    def span(self, now: datetime | None = None, step_s: int = 1) -> Span:
        """The window. Hours end `now`; where that is not given they are open, as clocks may be a little ahead.

        Open hours move on by `step_s`, of which a minute has a whole number.
        """
        if self.since:
            end = self.until or now or datetime.now(UTC)
            return Span(self.since, self.until or now, (end - self.since) / HOUR)
        hours = 24.0 if self.hours is None else self.hours
        # In steps, so that the same question has the same answer for as long.
        moment = datetime.now(UTC).replace(microsecond=0)
        end = now or moment - timedelta(seconds=moment.second % step_s)
        return Span(end - hours * HOUR, now, hours)

    def described(self) -> str:
        """The window in words."""
        if self.since is None:
            return f"in last {24 if self.hours is None else self.hours:g} hours"
        since = f"{self.since:%Y-%m-%dT%H:%M:%SZ}"
        return f"between {since} and {self.until:%Y-%m-%dT%H:%M:%SZ}" if self.until else f"since {since}"


class Page(Asked):
    """Which part of a list."""

    limit: int = Field(100, ge=1, le=1000, description="At most so many items.")
    after: str = Field(
        "",
        max_length=256,
        pattern="^[!-~]*$",
        description="Where the page begins: take it from `next` of the one before.",
    )


class Route(APIRoute):
    """A route whose function takes the request, ids of its path, and a model of its whole query.

    FastAPI describes them, and pydantic alone checks them: what FastAPI does around that for each request costs more
    than all else that we do for it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        endpoint = self.endpoint
        _, *parameters = inspect.signature(endpoint).parameters.values()
        checks = {parameter.name: TypeAdapter(parameter.annotation).validate_python for parameter in parameters}

        async def answer(request: Request) -> Response:
            taken: dict[str, Any] = {}
            errors: list[Any] = []
            for name, check in checks.items():
                in_path = name in request.path_params
                place = ("path", name) if in_path else ("query",)
                try:
                    taken[name] = check(request.path_params[name] if in_path else dict(request.query_params))
                except ValidationError as refused:
                    errors += ({**error, "loc": (*place, *error["loc"])} for error in refused.errors())
            if errors:
                raise RequestValidationError(errors)
            response: Response = await endpoint(request, **taken)
            return response

        return answer
