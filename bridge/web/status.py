"""/v1/status, /v1/ingest, /v1/dead-letters: what devices and daemons are doing now."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from bridge.topics import Kind
from bridge.web.answers import DeadLetters, Ingest, Listed, MeterStatus, SilentDevice, VehicleStatus
from bridge.web.parameters import Asked, MeterInPath, Page, Route, VehicleInPath, check_device_id, parse_moment
from bridge.web.problems import ProblemError, invalid
from bridge.web.questions import Questions
from bridge.web.representation import ASK_AGAIN, Row, listed, page, single, written


class Devices(Page):
    """Which devices."""

    online: bool | None = Field(None, description="Only those whose status topic last said so.")
    charging: bool | None = Field(None, description="Only those that do, or do not.")
    silent: bool | None = Field(None, description="Only those that are, or are not (/v1/status/silent).")


class Silent(Page):
    """Which silent devices."""

    kind: Kind | None = Field(None, description="Only meters, or vehicles.")


def routes(questions: Questions) -> APIRouter:
    """The routes, answered by `questions`."""
    router = APIRouter(prefix="/v1", tags=["status"], route_class=Route)

    @router.get("/status/vehicle", response_model=Listed[VehicleStatus])
    async def vehicle_statuses(request: Request, asked: Annotated[Devices, Query()]) -> Response:
        """All vehicles, by id."""
        rows = await questions.ask("vehicle_statuses", rows=asked.limit + 1, **asked.model_dump(exclude={"limit"}))
        return page(request, VehicleStatus, rows, ASK_AGAIN, asked.limit, lambda row: str(row["vehicleId"]))

    @router.get("/status/meter", response_model=Listed[MeterStatus])
    async def meter_statuses(request: Request, asked: Annotated[Devices, Query()]) -> Response:
        """All meters, by id."""
        parameters = asked.model_dump(exclude={"limit"})
        rows = await questions.ask("meter_statuses", named=None, rows=asked.limit + 1, **parameters)
        return page(request, MeterStatus, rows, ASK_AGAIN, asked.limit, lambda row: str(row["meterId"]))

    @router.get(
        "/status/vehicle/{vehicle}", response_model=VehicleStatus, responses={404: {"description": "Unknown vehicle."}}
    )
    async def vehicle_status(request: Request, vehicle: VehicleInPath, _: Annotated[Asked, Query()]) -> Response:
        """What a vehicle is doing now."""
        row = _known("vehicle", vehicle, await questions.ask("vehicle_status", device=vehicle))
        return single(request, VehicleStatus, row, ASK_AGAIN)

    @router.get("/status/meter/{meter}", response_model=MeterStatus, responses={404: {"description": "Unknown meter."}})
    async def meter_status(request: Request, meter: MeterInPath, _: Annotated[Asked, Query()]) -> Response:
        """What a meter is doing now."""
        row = _known("meter", meter, await questions.ask("meter_status", device=meter))
        return single(request, MeterStatus, row, ASK_AGAIN)

    @router.get("/status/silent", response_model=Listed[SilentDevice])
    async def silent(request: Request, asked: Annotated[Silent, Query()]) -> Response:
        """Devices that have gone silent, the longest silence first."""
        after_received, after_kind, after_device = _after_silent(asked.after)
        rows = await questions.ask(
            "silent",
            kind=asked.kind,
            after_received=after_received,
            after_kind=after_kind,
            after_device=after_device,
            rows=asked.limit + 1,
        )
        return page(request, SilentDevice, rows, ASK_AGAIN, asked.limit, _silent_key)

    @router.get("/ingest", response_model=Listed[Ingest])
    async def ingest(request: Request, _: Annotated[Asked, Query()]) -> Response:
        """What became of every reading, by daemon."""
        return listed(request, Ingest, await questions.ask("ingest"), ASK_AGAIN)

    @router.get("/dead-letters", response_model=Listed[DeadLetters])
    async def dead_letters(request: Request, _: Annotated[Asked, Query()]) -> Response:
        """Dead letters by reason, the most frequent first."""
        return listed(request, DeadLetters, await questions.ask("dead_letters"), ASK_AGAIN)

    return router


def _known(kind: str, device: str, rows: Sequence[Row]) -> Row:
    if not rows:
        raise ProblemError(HTTPStatus.NOT_FOUND, f"there has been no reading of a {kind} {device}")
    return rows[0]


def _silent_key(row: Row) -> str:
    return f"{written(row['receivedAt'])}~{row['kind']}~{row['deviceId']}"


def _after_silent(after: str) -> tuple[datetime | None, str | None, str | None]:
    if not after:
        return None, None, None
    try:
        received, kind, device = after.split("~")
        return parse_moment(received), Kind(kind), check_device_id(device)
    except ValueError:
        raise invalid("after", after, "take it from `next` of the page before") from None
