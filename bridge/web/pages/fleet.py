"""/: the whole fleet, now and over 24 hours of closed quarter hours, and what in it loses too much."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request, Response

from bridge.config import Config
from bridge.web.figures import plain
from bridge.web.questions import FLEET_REMEMBERED_S, Questions
from bridge.web.representation import Row
from bridge.web.site import Content, Site

# How many of the worst are shown.
WORST = 10
MOST_FAULTS = 20
MOST_PAIRS = 12
QUARTERS_AN_HOUR = 4


def routes(site: Site, questions: Questions, config: Config) -> APIRouter:
    """The route, answered by `questions`."""
    router = APIRouter()

    @router.get("/")
    async def fleet(request: Request) -> Response:
        async def gather() -> Content:
            return await _gathered(questions, config.web.tariff)

        return await site.respond(request, "fleet.html", gather)

    return router


async def _gathered(questions: Questions, tariff: float | None) -> Content:
    def of_fleet(question: str, **parameters: object) -> Awaitable[Sequence[Row]]:
        return questions.ask(question, FLEET_REMEMBERED_S, **parameters)

    (closed,) = await questions.ask("closed")
    since, until = closed["since"], closed["until"]
    (now,), (day,), vehicles, chargers, faults, energy = await asyncio.gather(
        questions.ask("fleet_now"),
        of_fleet("fleet", since=since, until=until, hours=24.0),
        # The view has the window anyway; told so that no answer is given again once it has moved on.
        of_fleet("worst_vehicles", until=until, rows=WORST),
        of_fleet("worst_chargers", since=since, until=until, rows=WORST),
        of_fleet("faults", since=since, until=until, chargers=MOST_FAULTS),
        of_fleet(
            "energy",
            resolution="quarter_hour",
            meter=None,
            vehicle=None,
            begin=since,
            until=until,
            after=None,
            rows=1_000,
        ),
    )

    def cost(kwh: float | None) -> float | None:
        return None if kwh is None or tariff is None else kwh * tariff

    power = _power(energy, since, until, _known_until(now))
    return {
        "now": now,
        "day": day,
        "cost": cost,
        "vehicles": vehicles,
        "chargers": chargers,
        "found": {"vehicles": _found(vehicles), "chargers": _found(chargers)},
        "faults": [_charger(pairs) for _, pairs in groupby(faults, key=lambda pair: pair["meterId"])],
        "power": power,
        "said": _said(power),
    }


def _found(rows: Sequence[Row]) -> int:
    """How many there are of which these are the worst; each row has the number."""
    return rows[0]["found"] if rows else 0


def _charger(pairs: Iterable[Row]) -> Row:
    """A charger of the map, with the vehicles that charged there: those that it makes the case with come first."""
    rows = list(pairs)
    return {**rows[0], "pairs": rows[:MOST_PAIRS], "more": len(rows[MOST_PAIRS:])}


def _known_until(now: Row) -> datetime:
    """The newest time of which half of the devices have told: what is later is not less power, but still to come."""
    newest, delay = now["newestReceivedAt"], now["medianDelayS"]
    return newest - timedelta(seconds=delay) if newest and delay else datetime.max.replace(tzinfo=UTC)


def _power(energy: Sequence[Row], since: datetime, until: datetime, known_until: datetime) -> dict[str, Any]:
    """Mean power of each quarter hour; one without readings, or that is still to come, is a gap."""
    quarter = timedelta(hours=1) / QUARTERS_AN_HOUR
    by_start = {row["starts"].timestamp(): row for row in energy if row["starts"] + quarter <= known_until}
    starts = range(int(since.timestamp()), int(until.timestamp()), 3_600 // QUARTERS_AN_HOUR)

    def kw(name: str) -> list[float | None]:
        values = (by_start.get(start, {}).get(name) for start in starts)
        return [None if value is None else value * QUARTERS_AN_HOUR for value in values]

    return {
        "x": list(starts),
        "series": [
            {"label": "AC, by the meters", "unit": "kW", "values": kw("acConsumedKwh"), "kind": "area"},
            {"label": "DC, by the vehicles", "unit": "kW", "values": kw("dcDeliveredKwh"), "kind": "line"},
        ],
    }


def _said(power: dict[str, Any]) -> str:
    """The chart in words."""
    parts = []
    for series in power["series"]:
        known = [value for value in series["values"] if value is not None]
        parts.append(f"{series['label']} {plain(max(known))} kW at most" if known else f"{series['label']} nothing")
    return "; ".join(parts)
