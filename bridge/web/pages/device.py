"""What the pages of vehicles and of chargers share: windows of time, readings as series, answers that are kept."""

import asyncio
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlencode

from fastapi import Request
from pydantic import BeforeValidator, Field

from bridge.topics import Kind
from bridge.web.parameters import Page, Window
from bridge.web.questions import Questions
from bridge.web.representation import Row, written
from bridge.web.site import Content

WINDOWS = {"6": "6 hours", "24": "24 hours", "168": "7 days", "720": "30 days"}
MOST_SESSIONS = 50
MOST_LETTERS = 10_000
# Readings are drawn one by one up to so many hours and so many; beyond that as means of buckets of so many seconds.
RAW_HOURS = 24
MOST_READINGS = 2_000
MOST_BUCKETS = 1_500
BUCKETS_S = (900, 3_600, 6 * 3_600, 86_400, 7 * 86_400)
# So many times the usual space between readings is a silence, and no line is drawn over it.
SILENCE = 3
# What costs much and can hardly change within a minute.
KEPT_S = 60.0
MOST_KEPT = 150
# Of a list on one page.
MOST_LISTED = 200


def _given(value: object) -> object:
    """What a form sends: an empty text where nothing was chosen."""
    return None if value == "" else value


Choice = Annotated[bool | None, BeforeValidator(_given)]


class Devices(Page):
    """Which devices."""

    limit: int = Field(100, ge=1, le=MOST_LISTED)
    online: Choice = None
    charging: Choice = None
    silent: Choice = None


class Kept:
    """Answers that are asked for once a minute, whoever looks: those about all of the fleet, or of months."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._answers: dict[tuple[object, ...], tuple[float, asyncio.Task[Sequence[Row]]]] = {}

    async def ask(self, question: str, **parameters: object) -> Sequence[Row]:
        """The rows of a statement, up to a minute old; others may be given the same. Raises ProblemError."""
        key = (question, *parameters.values())
        asked_at, answer = self._answers.get(key, (-KEPT_S, None))
        now = time.monotonic()
        if answer is None or now - asked_at > KEPT_S or (answer.done() and answer.exception()):
            answer = asyncio.create_task(self._questions.ask(question, **parameters))
            self._answers = {known: kept for known, kept in self._answers.items() if now - kept[0] <= KEPT_S}
            # Where there are too many, those that are kept stay kept: to drop one for each new one would help nobody.
            if len(self._answers) < MOST_KEPT or key in self._answers:
                self._answers[key] = (now, answer)
        # Whoever asked first may go away: the others wait on.
        return await asyncio.shield(answer)


class Drawn(NamedTuple):
    """Points of charts: seconds since 1970, and at each what is known by name; nothing in a silence."""

    points: Sequence[Row]
    # How charts.js draws it; and how long the buckets are of which these are means.
    kind: str = "line"
    bucket_s: int | None = None

    def chart(self, name: str, label: str, unit: str, most: float | None = None) -> dict[str, Any]:
        """What a chart shows of it: the data, with an axis from 0 to `most` where that is given; and that in words."""
        values = [None if (value := point.get(name)) is None else round(value, 4) for point in self.points]
        series = {"label": label, "unit": unit, "values": values, "kind": self.kind}
        return {
            "data": {
                "x": [point["x"] for point in self.points],
                "series": [series],
                "range": None if most is None else [0, most],
            },
            "said": in_words(values, unit),
            "known": any(value is not None for value in values),
        }


def in_words(values: Sequence[float | None], unit: str) -> str:
    """What a series shows, for those who cannot see it."""
    known = [value for value in values if value is not None]
    if not known:
        return "nothing is known"
    return f"from {min(known):g} to {max(known):g} {unit}, at last {known[-1]:g} {unit}"


def one_by_one(readings: Sequence[Row]) -> Drawn:
    """Readings as they came: with their power, and nothing where there was silence.

    Energy is of the time since the reading before. Over a silence it is taken to be of the usual time: the readings
    of the silence were sent, and are lost, or will still come.
    """
    times = [reading["timestamp"].timestamp() for reading in readings]
    spaces = [after - before for before, after in pairwise(times)]
    usual = median(spaces) if spaces else None
    points: list[Row] = []
    for reading, at, space in zip(readings, times, [None, *spaces], strict=False):
        over = space or usual
        if usual and space and space > SILENCE * usual:
            points.append({"x": at - usual})
            over = usual
        points.append({**reading, "x": at, "kw": power(reading["kwh"], over)})
    return Drawn(points)


def framed(drawn: Drawn, since: datetime, until: datetime) -> Drawn:
    """The same from the beginning to the end of the window, so that a silence there shows as well."""
    # By the minute: a chart that moved on each second would be sent each second.
    begin, end = (moment.replace(second=0, microsecond=0).timestamp() for moment in (since, until))
    points = list(drawn.points)
    if points and points[0]["x"] > begin:
        points.insert(0, {"x": begin})
    if points and points[-1]["x"] < end:
        points.append({"x": end})
    return drawn._replace(points=points)


def by_bucket(buckets: Sequence[Row], span: tuple[datetime, datetime], step: int) -> Drawn:
    """Means of buckets of so many seconds; nothing where a bucket has no readings, and after the last one."""
    by_start = {int(bucket["starts"]): bucket for bucket in buckets}
    begin, end = (int(moment.timestamp()) for moment in span)
    return Drawn([{**by_start.get(start, {}), "x": start} for start in range(begin, end + step, step)], "steps", step)


def power(kwh: float, seconds: float | None) -> float | None:
    """In kW, of the energy of so long; None where nobody knows how long."""
    return kwh * 3_600 / seconds if seconds else None


def step_for(hours: float) -> int:
    """How long buckets are, in seconds, so that there are not too many of them."""
    return next((step for step in BUCKETS_S if hours * 3_600 / step <= MOST_BUCKETS), BUCKETS_S[-1])


def whole_buckets(window: Window, step: int) -> tuple[datetime, datetime]:
    """From the first to the last bucket that lies wholly in the window and is over."""
    since, until, _ = window.span()
    now = datetime.now(UTC)
    first = math.ceil(since.timestamp() / step) * step
    last = math.floor(min(until or now, now).timestamp() / step) * step
    return datetime.fromtimestamp(first, UTC), datetime.fromtimestamp(max(first, last), UTC)


async def drawn(questions: Questions, kept: Kept, kind: Kind, device: str, window: Window) -> Drawn:
    """What a device sent in the window: its readings, or where those are too many their means."""
    since, until, hours = window.span()
    if hours <= RAW_HOURS:
        readings = await questions.ask(
            f"{kind.value}_readings", device=device, since=since, until=until, rows=MOST_READINGS + 1
        )
        if len(readings) <= MOST_READINGS:
            return framed(one_by_one(readings), since, until or datetime.now(UTC))
    step = step_for(hours)
    begin, end = whole_buckets(window, step)
    buckets = await kept.ask(f"{kind.value}_series", device=device, since=begin, until=end, step_s=step)
    return by_bucket(buckets, (begin, end), step)


async def quality(questions: Questions, kept: Kept, kind: Kind, device: str) -> Content:
    """How complete, punctual and right its readings were; rows of dead letters by reason."""
    rows, letters = await asyncio.gather(
        kept.ask("quality", device=device, kind=kind.value),
        questions.ask("letters_of", device=device, rows=MOST_LETTERS),
    )
    return {"quality": rows[0] if rows else None, "letters": letters, "mostLetters": MOST_LETTERS}


def about(window: Window) -> Content:
    """The window, as pages show it."""
    if window.since:
        moments = {"since": window.since, "until": window.until}
        query = {name: written(moment) for name, moment in moments.items() if moment}
        during = window.described()
    else:
        query = {"hours": f"{24 if window.hours is None else window.hours:g}"}
        during = f"in the last {WINDOWS.get(query['hours'], query['hours'] + ' hours')}"
    return {"choices": WINDOWS, "during": during, "chosen": query.get("hours", ""), "query": urlencode(query)}


def following(request: Request, rows: Sequence[Row], limit: int, name: str) -> str:
    """Where the list goes on behind its last row; empty: here it ends."""
    if len(rows) <= limit:
        return ""
    query = {key: value for key, value in request.query_params.items() if key != "after" and value}
    return f"{request.scope['path']}?{urlencode(query | {'after': rows[limit - 1][name]})}"
