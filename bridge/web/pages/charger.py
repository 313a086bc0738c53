"""/chargers, and of one charger what its meter reads, who charged there and how efficiently, and what is at fault."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator

from bridge.config import Config
from bridge.topics import Kind
from bridge.web.pages import device
from bridge.web.pages.device import Devices, Kept
from bridge.web.parameters import MeterInPath, Window
from bridge.web.problems import ProblemError
from bridge.web.questions import Questions
from bridge.web.representation import Row, written
from bridge.web.site import Content, Site

# The rollups have no voltage, and of more than this history is too much to read.
MOST_VOLTAGE_HOURS = 744
# How far back somebody may have named a charger whose meter never sent anything.
NAMED_WITHIN = timedelta(days=30)
MOST_PLUGGED = 20


class Chargers(Devices):
    """Which chargers."""

    finding: Annotated[
        Literal["any", "inefficient", "mapping or metering fault"] | None,
        BeforeValidator(lambda value: value or None),
    ] = None


def routes(site: Site, questions: Questions, _: Config) -> APIRouter:
    """The routes, answered by `questions`."""
    router = APIRouter()
    kept = Kept(questions)

    @router.get("/chargers")
    async def chargers(request: Request, asked: Annotated[Chargers, Query()]) -> Response:
        async def gather() -> Content:
            return await _listed(request, questions, kept, asked)

        return await site.respond(request, "chargers.html", gather)

    @router.get("/chargers/{meter}")
    async def one(request: Request, meter: MeterInPath, window: Annotated[Window, Query()]) -> Response:
        async def gather() -> Content:
            return await _gathered(questions, kept, meter, window)

        async def newest() -> object:
            plugged = await questions.ask("plugged_now", device=meter, rows=MOST_PLUGGED)
            return await questions.ask("meter_now", device=meter), plugged

        return await site.respond(request, "charger.html", gather, newest)

    return router


async def _listed(request: Request, questions: Questions, kept: Kept, asked: Chargers) -> Content:
    (closed,) = await questions.ask("closed")
    found = await kept.ask("findings", since=closed["since"], until=closed["until"])
    findings = {row["meterId"]: row["finding"] for row in found}
    parameters = asked.model_dump(exclude={"limit", "finding"})
    named = None
    if asked.finding:
        named = ",".join(meter for meter, finding in findings.items() if asked.finding in {"any", finding})
    rows = await questions.ask("meter_statuses", named=named, rows=asked.limit + 1, **parameters)
    return {
        "chargers": [row | {"finding": findings.get(row["meterId"])} for row in rows[: asked.limit]],
        "asked": asked,
        "further": device.following(request, rows, asked.limit, "meterId"),
        "until": closed["until"],
    }


async def _gathered(questions: Questions, kept: Kept, meter: str, window: Window) -> Content:
    found = await questions.ask("meter_now", device=meter)
    since, until, _ = window.span()
    span = {"since": since, "until": until}
    (performance,), vehicles, plugged, sessions = await asyncio.gather(
        questions.ask("charger_performance", device=meter, **span),
        questions.ask("charger_vehicles", device=meter, **span),
        questions.ask("plugged_now", device=meter, rows=MOST_PLUGGED),
        questions.ask("newest_sessions", vehicle=None, meter=meter, **span, rows=device.MOST_SESSIONS),
    )
    if not found and not vehicles and not plugged:
        past = until if until and until < datetime.now(UTC) else None
        if not await _named(kept, meter, past):
            days = f"{NAMED_WITHIN.days} days"
            when = f"the {days} before {written(past)}" if past else f"the last {days}"
            said = f"there has been no reading of a meter {meter}, and no vehicle named it in {when}"
            raise ProblemError(HTTPStatus.NOT_FOUND, said)
    (drawn, voltage), quality, fault = await asyncio.gather(
        _drawn(questions, kept, meter, window),
        device.quality(questions, kept, Kind.METER, meter),
        _fault(questions, kept, meter),
    )
    now = found[0] if found else None
    return {
        "meter": meter,
        "now": now and now | {"kw": device.power(now["kwhAc"], now["usualS"])},
        "plugged": plugged,
        "performance": performance,
        "vehicles": vehicles,
        "sessions": sessions,
        "readings": drawn,
        "charts": {
            "power": drawn.chart("kw", "AC power", "kW"),
            "voltage": voltage and voltage.chart("voltage", "Voltage", "V"),
        },
        "fault": fault,
        **quality,
        **device.about(window),
    }


async def _drawn(
    questions: Questions, kept: Kept, meter: str, window: Window
) -> tuple[device.Drawn, device.Drawn | None]:
    """What its meter sent, and the voltage of it; None where that would be too much to read."""
    drawn = await device.drawn(questions, kept, Kind.METER, meter, window)
    step = drawn.bucket_s
    if step is None:
        return drawn, drawn
    _, _, hours = window.span()
    if hours > MOST_VOLTAGE_HOURS:
        return drawn, None
    begin, end = device.whole_buckets(window, step)
    buckets = await kept.ask("meter_voltage", device=meter, since=begin, until=end, step_s=step)
    return drawn, device.by_bucket(buckets, (begin, end), step)


async def _fault(questions: Questions, kept: Kept, meter: str) -> dict[str, Any] | None:
    """Its part of the map of chargers at fault, of 24 hours of closed quarter hours; None where it is not on it."""
    (closed,) = await questions.ask("closed")
    span = {"since": closed["since"], "until": closed["until"]}
    # The map is of the whole fleet. Most chargers are not on it, and that is quickly known of one.
    (performance,) = await questions.ask("charger_performance", device=meter, **span)
    if performance["finding"] != "inefficient":
        return None
    pairs = [pair for pair in await kept.ask("all_faults", **span) if pair["meterId"] == meter]
    return on_map(pairs)


def on_map(pairs: Sequence[Row]) -> dict[str, Any] | None:
    """A charger of the map, with the vehicles that charged there, the least efficient first."""
    if not pairs:
        return None
    worst = sorted(pairs, key=lambda pair: (pair["efficiency"] is None, pair["efficiency"], pair["vehicleId"]))
    return {**pairs[0], "pairs": worst}


async def _named(kept: Kept, meter: str, until: datetime | None) -> bool:
    """Whether a vehicle was plugged in there lately, or in as long before `until`; the meter never sent anything."""
    # By the hour, as answers are kept.
    end = (until or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0)
    return bool(await kept.ask("charger_vehicles", device=meter, since=end - NAMED_WITHIN, until=until))
