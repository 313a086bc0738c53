"""What Prometheus reads of the daemon. Alone imports prometheus_client."""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import bridge
from bridge.config import Mqtt
from bridge.health import Watchdog
from bridge.histogram import Histogram
from bridge.maintenance import Maintenance
from bridge.messages import SECOND
from bridge.mqtt import Session
from bridge.pipeline import Pipeline

PREFIX = "wattbridge_"


class Metrics(Collector):
    """Asks those who do the work, when it is asked. What nobody knows yet is left out: a zero would be a lie.

    `unready` says why the bridge is not ready, empty: it is.
    """

    def __init__(
        self,
        mqtt: Mqtt,
        pipeline: Pipeline,
        session: Session,
        maintenance: Maintenance,
        watchdog: Watchdog,
        unready: Callable[[], Sequence[str]],
    ) -> None:
        self._mqtt = mqtt
        self._pipeline = pipeline
        self._session = session
        self._maintenance = maintenance
        self._watchdog = watchdog
        self._unready = unready
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All there is to read and its content type, in the format that the request accepts."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # It stumbles over versions that are none.
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Everything that is ours; about process and interpreter the library tells itself."""
        return chain(self._health(), self._books(), self._flow(), self._broker(), self._database())

    def _health(self) -> Iterator[Metric]:
        versions = [bridge.__version__, platform.python_version(), self._mqtt.client_id]
        info = GaugeMetricFamily(
            f"{PREFIX}build_info", "Which bridge this is; always 1.", labels=["version", "python", "client_id"]
        )
        info.add_metric(versions, 1)
        yield info
        yield _gauge("ready", "Whether the bridge is ready, as /readyz says.", not self._unready())
        standing = self._pipeline.standing()
        yield _gauge(
            "standstill_seconds", "For how long nothing was committed although something is held.", standing.still_s
        )
        yield _gauge("stalled", "Whether that is longer than health.stalled_after_s.", self._watchdog.stalls(standing))

    def _books(self) -> Iterator[Metric]:
        progress = self._pipeline.progress
        if progress.opened is not None:
            totals = progress.totals
            yield _counter("readings_received", "Readings received, over restarts, as committed.", totals.received)
            outcomes = CounterMetricFamily(
                f"{PREFIX}readings", "What became of them; adds up to those received.", labels=["outcome"]
            )
            for outcome in ("stored", "duplicate", "dead_lettered"):
                outcomes.add_metric([outcome], getattr(totals, outcome))
            yield outcomes
            yield _counter("status_messages", "Messages online and offline, over restarts.", totals.presence)
        yield _counter("deliveries", "MQTT messages that the broker delivered to this process.", progress.deliveries)
        yield _counter("readings_taken", "Readings and status messages decoded by this process.", progress.taken)
        yield _counter(
            "readings_given_back",
            "Of those, dropped without an acknowledgement: the broker delivers them again.",
            progress.given_back,
        )
        yield _counter("readings_refused", "Readings that the database refused: dead letters now.", progress.refused)
        yield _gauge(
            "readings_outstanding", "Readings and status messages held, not yet committed.", self._pipeline.outstanding
        )
        yield _gauge(
            "readings_unaccounted",
            "Taken, and neither given back, nor outstanding, nor counted by the database: 0.",
            self._pipeline.unaccounted,
        )
        yield _gauge("window_readings", "About as many may be outstanding.", self._mqtt.receive_maximum)

    def _flow(self) -> Iterator[Metric]:
        progress = self._pipeline.progress
        yield _histogram("batch_readings", "Readings and status messages of a batch.", progress.batch_readings)
        yield _histogram("commit_seconds", "From handing a batch to the database to its answer.", progress.commit_s)
        yield _histogram(
            "publish_to_commit_seconds",
            "From a reading's own timestamp, by the device's clock, to its commit.",
            progress.publish_to_commit_s,
        )
        if progress.committed_at is not None and progress.position is not None:
            yield _gauge("last_commit_timestamp_seconds", "When readings were committed last.", progress.committed_at)
            yield _gauge(
                "lag_seconds",
                "How far the median reading of that batch was behind the clock then.",
                progress.committed_at - progress.position / SECOND,
            )

    def _broker(self) -> Iterator[Metric]:
        session = self._session
        yield _gauge("broker_connected", "Whether we are connected and subscribed.", session.connected)
        yield _counter("broker_connections", "Connections that were accepted and subscribed.", session.connections)
        yield _counter(
            "broker_sessions_lost",
            "Connections at which the broker had forgotten our session, and what it kept for us.",
            session.sessions_lost,
        )
        yield _gauge("intake_paused", "Whether we have stopped reading from the broker for now.", session.paused)

    def _database(self) -> Iterator[Metric]:
        progress = self._pipeline.progress
        yield _gauge(
            "database_waiting", "Whether the last attempt failed, or none succeeded yet.", self._pipeline.waiting
        )
        retries = CounterMetricFamily(
            f"{PREFIX}database_retries", "Attempts that failed and were made again.", labels=["expected"]
        )
        for expected in (True, False):
            retries.add_metric([str(expected).lower()], progress.retries[expected])
        yield retries
        maintenance = self._maintenance
        yield _counter("maintenance_rounds", "Rounds of maintenance that came to their end.", maintenance.rounds)
        yield _counter("maintenance_failures", "Rounds that did not.", maintenance.failures)
        if extent := maintenance.extent:
            for name, what, moment in (
                ("rollups_complete_until", "Up to when the rollups are complete.", extent.complete_until),
                ("rollups_watermark", "Readings from before this time are late.", extent.late_before),
            ):
                if math.isfinite(moment):
                    yield _gauge(f"{name}_timestamp_seconds", what, moment / SECOND)
            yield _gauge("rollup_marks", "Quarter hours that late readings have marked to be made again.", extent.marks)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, what, value=float(value))


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, what, value=value)


def _histogram(name: str, what: str, histogram: Histogram) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, histogram.cumulative, strict=True))
    return HistogramMetricFamily(PREFIX + name, what, buckets=buckets, sum_value=histogram.total)
