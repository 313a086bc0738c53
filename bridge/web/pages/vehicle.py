"""/vehicles, and of one vehicle what it does, how efficiently it charged, where, and how good its readings are."""

import asyncio
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from bridge.config import Config
from bridge.topics import Kind
from bridge.web.pages import device
from bridge.web.pages.device import Devices, Kept
from bridge.web.parameters import VehicleInPath, Window
from bridge.web.problems import ProblemError
from bridge.web.questions import Questions
from bridge.web.representation import Row
from bridge.web.site import Content, Site

HOUR_S = 3_600
# An hour is a point: of a year there would be too many.
MOST_EFFICIENCY_HOURS = 1_440


def routes(site: Site, questions: Questions, _: Config) -> APIRouter:
    """The routes, answered by `questions`."""
    router = APIRouter()
    kept = Kept(questions)

    @router.get("/vehicles")
    async def vehicles(request: Request, asked: Annotated[Devices, Query()]) -> Response:
        async def gather() -> Content:
            rows = await questions.ask("vehicle_statuses", rows=asked.limit + 1, **asked.model_dump(exclude={"limit"}))
            further = device.following(request, rows, asked.limit, "vehicleId")
            return {"vehicles": rows[: asked.limit], "asked": asked, "further": further}

        return await site.respond(request, "vehicles.html", gather)

    @router.get("/vehicles/{vehicle}")
    async def one(request: Request, vehicle: VehicleInPath, window: Annotated[Window, Query()]) -> Response:
        async def gather() -> Content:
            return await _gathered(questions, kept, vehicle, window)

        async def newest() -> object:
            return await questions.ask("vehicle_now", device=vehicle)

        return await site.respond(request, "vehicle.html", gather, newest)

    return router


async def _gathered(questions: Questions, kept: Kept, vehicle: str, window: Window) -> Content:
    found = await questions.ask("vehicle_now", device=vehicle)
    if not found:
        raise ProblemError(HTTPStatus.NOT_FOUND, f"there has been no reading of a vehicle {vehicle}")
    since, until, hours = window.span()
    now, span = found[0], {"since": since, "until": until}
    (performance,), sessions, drawn, by_hour, quality = await asyncio.gather(
        questions.ask("vehicle_performance", vehicle=vehicle, **span, hours=hours),
        questions.ask("newest_sessions", vehicle=vehicle, meter=None, **span, rows=device.MOST_SESSIONS),
        device.drawn(questions, kept, Kind.VEHICLE, vehicle, window),
        _efficiency(questions, kept, vehicle, window),
        device.quality(questions, kept, Kind.VEHICLE, vehicle),
    )
    return {
        "now": now | {"kw": device.power(now["kwhDc"], now["usualS"])},
        "performance": performance,
        "sessions": sessions,
        "readings": drawn,
        "charts": {
            "soc": drawn.chart("soc", "State of charge", "%", most=100),
            "power": drawn.chart("kw", "DC power", "kW"),
            "temperature": drawn.chart("batteryTemp", "Battery", "°C"),
        },
        "byHour": by_hour,
        **quality,
        **device.about(window),
    }


async def _efficiency(questions: Questions, kept: Kept, vehicle: str, window: Window) -> dict[str, Any] | None:
    """The chart of efficiency by hour; None where there would be too many hours."""
    since, until, hours = window.span()
    if hours > MOST_EFFICIENCY_HOURS:
        return None
    if hours <= device.RAW_HOURS:
        rows = await questions.ask("vehicle_efficiency", device=vehicle, since=since, until=until)
        span = (since, until or datetime.now(UTC))
    else:
        span = device.whole_buckets(window, HOUR_S)
        rows = await kept.ask("vehicle_efficiency", device=vehicle, since=span[0], until=span[1])
    return efficiency_by_hour(rows, span).chart("percent", "DC / AC", "%", most=110)


def efficiency_by_hour(hours: Sequence[Row], span: tuple[datetime, datetime]) -> device.Drawn:
    """A bar for each hour of the window; none where it was plugged in nowhere, or an efficiency means nothing."""
    known = {hour["starts"].timestamp(): hour["efficiency"] for hour in hours}
    # Hours of a time zone may begin at half past.
    past = next(iter(known), 0.0) % HOUR_S
    begin, end = (moment.timestamp() - past for moment in span)
    points: list[Row] = []
    # One more at either end: a bar stands around its hour, and would be cut.
    for number in range(math.floor(begin / HOUR_S) - 1, math.ceil(end / HOUR_S) + 1):
        start = number * HOUR_S + past
        ratio = known.get(start)
        points.append({"x": start + HOUR_S / 2, "percent": None if ratio is None else ratio * 100})
    return device.Drawn(points, "bars", HOUR_S)
