"""What the daemons say of themselves: /readyz and /metrics, asked every few seconds and compared over a minute."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "wattbridge_"
# One that does not answer is not waited for any longer.
TIMEOUT_S = 2.0
# Far more than a daemon has to say.
LONGEST = 1024 * 1024
# Rates and latencies are those of about so long.
COMPARED_S = 60.0
MOST_AT_ONCE = 16
SHARES = (0.5, 0.95, 0.99)
# Whatever keeps an answer from being one.
TROUBLES = (OSError, HTTPException, ValueError, OverflowError)

Buckets = Sequence[tuple[float, float]]


class Quantile(NamedTuple):
    """So many seconds; `beyond`: or more, the histogram has no larger bound."""

    seconds: float
    beyond: bool


class Scrape(NamedTuple):
    """What a daemon said at a time (of a clock that never jumps): figures and histograms by name."""

    at: float
    reasons: tuple[str, ...]
    client_id: str
    version: str
    values: dict[str, float]
    buckets: dict[str, Buckets]


class Report(NamedTuple):
    """What is known of a daemon; None: not known. `trouble` says why nothing is, `answered` when it last was."""

    address: str
    trouble: str
    answered: datetime | None
    client_id: str | None = None
    version: str | None = None
    reasons: tuple[str, ...] = ()
    compared_s: float | None = None
    deliveries_s: float | None = None
    outstanding: int | None = None
    window: int | None = None
    commit: Sequence[Quantile] = ()
    publish_to_commit: Sequence[Quantile] = ()
    lag_s: float | None = None
    broker_connected: bool | None = None
    database_waiting: bool | None = None
    intake_paused: bool | None = None
    complete_until: datetime | None = None
    marks: int | None = None


class Daemon:
    """One daemon and what it said within the last minute."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._trouble = "it has not been asked yet"
        self._answered: datetime | None = None
        self._scrapes: deque[Scrape] = deque()

    def note(self, answer: Scrape | str) -> None:
        """Takes what it said, or why there is nothing."""
        if isinstance(answer, str):
            self._trouble = answer
            return
        self._trouble = ""
        self._answered = datetime.now(UTC)
        if self._scrapes and restarted(self._scrapes[-1], answer):
            self._scrapes.clear()
        self._scrapes.append(answer)
        while answer.at - self._scrapes[0].at > COMPARED_S:
            self._scrapes.popleft()

    def report(self) -> Report:
        """What is known of it; of the time before it fell silent nothing but when that was."""
        if self._trouble:
            return Report(self._address, self._trouble, self._answered)
        first, last = self._scrapes[0], self._scrapes[-1]
        seconds = last.at - first.at
        values = last.values
        complete = values.get("rollups_complete_until_timestamp_seconds")
        return Report(
            address=self._address,
            trouble="",
            answered=self._answered,
            client_id=last.client_id,
            version=last.version,
            reasons=last.reasons,
            compared_s=seconds or None,
            deliveries_s=(values["deliveries_total"] - first.values["deliveries_total"]) / seconds if seconds else None,
            outstanding=_whole(values.get("readings_outstanding")),
            window=_whole(values.get("window_readings")),
            commit=_between(first, last, "commit_seconds"),
            publish_to_commit=_between(first, last, "publish_to_commit_seconds"),
            lag_s=values.get("lag_seconds"),
            broker_connected=_yes(values.get("broker_connected")),
            database_waiting=_yes(values.get("database_waiting")),
            intake_paused=_yes(values.get("intake_paused")),
            complete_until=None if complete is None else datetime.fromtimestamp(complete, UTC),
            marks=_whole(values.get("rollup_marks")),
        )


class Daemons:
    """All daemons that the configuration names."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._daemons = {address: Daemon(address) for address in addresses}
        # Threads of our own: however long these wait, nothing else waits for them.
        self._threads = ThreadPoolExecutor(min(MOST_AT_ONCE, len(addresses) or 1), "daemons")

    async def look(self) -> None:
        """Asks them all; one that does not answer is one that does not answer."""
        loop = asyncio.get_running_loop()
        answers = (loop.run_in_executor(self._threads, scrape, address) for address in self._daemons)
        for daemon, answer in zip(self._daemons.values(), await asyncio.gather(*answers), strict=True):
            daemon.note(answer)

    def reports(self) -> list[Report]:
        """What is known of each."""
        return [daemon.report() for daemon in self._daemons.values()]

    def close(self) -> None:
        """Asks no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def scrape(address: str, clock: Callable[[], float] = time.monotonic) -> Scrape | str:
    """What the daemon there says, or why there is nothing."""
    try:
        connection = HTTPConnection(address, timeout=TIMEOUT_S)
        try:
            status, said = _get(connection, "/readyz")
            reasons = () if status == HTTPStatus.OK else tuple(said.splitlines()) or (f"/readyz answers {status}",)
            status, said = _get(connection, "/metrics")
            at = clock()
        finally:
            connection.close()
        return f"/metrics answers {status}" if status != HTTPStatus.OK else parse(said, reasons, at)
    except TimeoutError:
        return f"it does not answer within {TIMEOUT_S:g} s"
    except TROUBLES as error:
        return f"it does not answer: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}"


def parse(text: str, reasons: tuple[str, ...], at: float) -> Scrape | str:
    """What a page of metrics says, or why it says nothing."""
    values: dict[str, float] = {}
    buckets: dict[str, list[tuple[float, float]]] = {}
    info: dict[str, str] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix(PREFIX)
                if name == sample.name:
                    continue
                if name == "build_info":
                    info = sample.labels
                elif name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    buckets.setdefault(name.removesuffix("_bucket"), []).append((bound, sample.value))
                elif not sample.labels:
                    values[name] = sample.value
    except (ValueError, KeyError):
        return "what it says are no metrics"
    if "deliveries_total" not in values or not info:
        return "what it says are not the metrics of a daemon of ours"
    return Scrape(at, reasons, info.get("client_id", ""), info.get("version", ""), values, dict(buckets))


def restarted(before: Scrape, after: Scrape) -> bool:
    """Whether it has begun to count anew in between."""
    counts = ("deliveries_total", "commit_seconds_count", "publish_to_commit_seconds_count")
    return any(after.values.get(name, 0) < before.values.get(name, 0) for name in counts)


def quantile(share: float, buckets: Buckets) -> Quantile | None:
    """The value that this share of the observations do not exceed, as Prometheus estimates it; None without any.

    `buckets` are upper ends, ascending, the last infinite, each with how many observations were no larger.
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    lower = below = 0.0
    for upper, count in buckets:
        if count >= rank:
            if math.isinf(upper):
                return Quantile(lower, beyond=True)
            part = (rank - below) / (count - below) if count > below else 1.0
            return Quantile(lower + (upper - lower) * part, beyond=False)
        lower, below = upper, count
    raise AssertionError


def _between(first: Scrape, last: Scrape, name: str) -> list[Quantile]:
    """Of what was observed between the two, the quantiles of SHARES; empty where nothing was."""
    before = dict(first.buckets.get(name, ()))
    observed = [(bound, count - before.get(bound, 0)) for bound, count in last.buckets.get(name, ())]
    found = (quantile(share, observed) for share in SHARES)
    return [estimate for estimate in found if estimate]


def _get(connection: HTTPConnection, path: str) -> tuple[int, str]:
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read(LONGEST + 1)
    if len(body) > LONGEST:
        raise ValueError(f"{path} is longer than {LONGEST} bytes")
    return response.status, body.decode()


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _yes(value: float | None) -> bool | None:
    return None if value is None else bool(value)
