"""/v1/analytics: how efficiently vehicles and chargers work, and where the energy went."""

from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from bridge.web.answers import Charger, Energy, FleetSummary, InefficientVehicle, Listed, Session, VehiclePerformance
from bridge.web.parameters import DeviceId, Page, Route, Span, VehicleInPath, Window, check_device_id, parse_moment
from bridge.web.problems import ProblemError, invalid
from bridge.web.questions import FLEET_REMEMBERED_S, REMEMBERED_S, Questions
from bridge.web.representation import BRIEFLY, Row, kept_for, page, single, written

Finding = Literal["inefficient", "mapping or metering fault"]
Resolution = Literal["quarter_hour", "hour", "day"]


class Chargers(Window, Page):
    """Which chargers."""

    finding: Finding | None = Field(None, description="Only with this finding.")


class Sessions(Window, Page):
    """Which sessions."""

    vehicle: DeviceId | None = Field(None, description="Only of this vehicle; without, all of the fleet are computed.")
    meter: DeviceId | None = Field(None, description="Only at this meter.")


class EnergySeries(Window, Page):
    """Which energy."""

    resolution: Resolution = Field("hour", description="Length of a bucket; hours and days are those of the fleet.")
    vehicle: DeviceId | None = Field(None, description="DC energy of this vehicle.")
    meter: DeviceId | None = Field(None, description="AC energy of this meter; without both, all of the fleet.")


def routes(questions: Questions) -> APIRouter:
    """The routes, answered by `questions`."""
    router = APIRouter(prefix="/v1/analytics", tags=["analytics"], route_class=Route)

    @router.get(
        "/performance/{vehicle}",
        response_model=VehiclePerformance,
        responses={404: {"description": "No readings of it in the window."}},
    )
    async def vehicle_performance(
        request: Request, vehicle: VehicleInPath, window: Annotated[Window, Query()]
    ) -> Response:
        """How efficiently a vehicle charged, to this second."""
        since, until, hours = window.span()
        (row,) = await questions.ask("vehicle_performance", vehicle=vehicle, since=since, until=until, hours=hours)
        if not row["readings"]:
            raise ProblemError(HTTPStatus.NOT_FOUND, f"No charging data found {window.described()}")
        return single(request, VehiclePerformance, row, BRIEFLY)

    @router.get("/fleet", response_model=FleetSummary)
    async def fleet(request: Request, window: Annotated[Window, Query()]) -> Response:
        """The whole fleet. Hours end with the newest closed quarter hour, as in the view fleet_summary_24h."""
        (since, until, hours), cache = await closed(window)
        (row,) = await questions.ask("fleet", FLEET_REMEMBERED_S, since=since, until=until, hours=hours)
        return single(request, FleetSummary, row, cache)

    @router.get("/fleet/inefficient", response_model=Listed[InefficientVehicle])
    async def fleet_inefficient(request: Request, part: Annotated[Page, Query()]) -> Response:
        """Vehicles that lost too much in 24 hours of closed quarter hours, the worst first."""
        after_vehicle, after_ratio = _after_ratio(part.after)
        (_, until, _), cache = await closed(Window())
        rows = await questions.ask(
            "inefficient",
            FLEET_REMEMBERED_S,
            # The view has it anyway; told so that no answer is given again once the window has moved on.
            until=until,
            rows=part.limit + 1,
            after_vehicle=after_vehicle,
            after_ratio=after_ratio,
        )
        return page(
            request, InefficientVehicle, rows, cache, part.limit, lambda row: f"{row['vehicleId']}~{row['ratio']!r}"
        )

    @router.get("/chargers", response_model=Listed[Charger])
    async def chargers(request: Request, asked: Annotated[Chargers, Query()]) -> Response:
        """How efficiently vehicles charged at each meter. Hours end with the newest closed quarter hour."""
        (since, until, _), cache = await closed(asked)
        rows = await questions.ask(
            "chargers",
            FLEET_REMEMBERED_S,
            since=since,
            until=until,
            finding=asked.finding,
            after=asked.after,
            rows=asked.limit + 1,
        )
        window = {"since": since, "until": until}
        return page(request, Charger, rows, cache, asked.limit, lambda row: str(row["meterId"]), window)

    @router.get("/sessions", response_model=Listed[Session])
    async def sessions(request: Request, asked: Annotated[Sessions, Query()]) -> Response:
        """Charging sessions that overlap the window, by vehicle and time."""
        after_vehicle, after_started = _after_session(asked.after)
        step_s = _moves_by(asked.vehicle)
        since, until, _ = asked.span(step_s=step_s)
        rows = await questions.ask(
            "sessions",
            step_s,
            vehicle=asked.vehicle,
            meter=asked.meter,
            since=since,
            until=until,
            after_vehicle=after_vehicle,
            after_started=after_started,
            rows=asked.limit + 1,
        )
        window = {"since": since, "until": until}
        return page(request, Session, rows, BRIEFLY, asked.limit, _session_key, window)

    @router.get("/energy", response_model=Listed[Energy])
    async def energy(request: Request, asked: Annotated[EnergySeries, Query()]) -> Response:
        """Energy over time: of a meter, of a vehicle, or with neither of the whole fleet."""
        after = _after_moment(asked.after)
        step_s = _moves_by(asked.vehicle, asked.meter)
        since, until, _ = asked.span(step_s=step_s)
        rows = await questions.ask(
            "energy",
            step_s,
            resolution=asked.resolution,
            meter=asked.meter,
            vehicle=asked.vehicle,
            begin=max(since, after) if after else since,
            until=until,
            after=after,
            rows=asked.limit + 1,
        )
        window = {"since": since, "until": until}
        return page(request, Energy, rows, BRIEFLY, asked.limit, lambda row: written(row["starts"]), window)

    async def closed(window: Window) -> tuple[Span, str]:
        """The window up to the newest closed quarter hour, and how long the answer may be kept."""
        (now,) = await questions.ask("closed")
        span = window.span(now["until"])
        if span.hours <= 0:
            raise invalid("since", written(span.since), f"closed quarter hours end at {written(now['until'])} so far")
        return span, BRIEFLY if window.since else kept_for(now["standsFor"])

    return router


def _moves_by(*devices: str | None) -> int:
    """In steps of how many seconds a question moves on, given the devices that it is about: without any, the fleet."""
    return REMEMBERED_S if any(devices) else FLEET_REMEMBERED_S


def _session_key(row: Row) -> str:
    return f"{row['vehicleId']}~{written(row['started'])}"


def _after_session(after: str) -> tuple[str | None, datetime | None]:
    if not after:
        return None, None
    vehicle, _, started = after.partition("~")
    try:
        return check_device_id(vehicle), parse_moment(started)
    except ValueError:
        raise invalid("after", after, "take it from `next` of the page before") from None


def _after_ratio(after: str) -> tuple[str | None, float | None]:
    if not after:
        return None, None
    vehicle, _, ratio = after.partition("~")
    try:
        return check_device_id(vehicle), float(ratio)
    except ValueError:
        raise invalid("after", after, "take it from `next` of the page before") from None


def _after_moment(after: str) -> datetime | None:
    try:
        return parse_moment(after) if after else None
    except ValueError:
        raise invalid("after", after, "take it from `next` of the page before") from None
