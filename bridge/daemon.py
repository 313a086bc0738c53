"""The life of the daemon: start, run, stop in order."""

import asyncio
import gc
import os
import signal
import time

import structlog
import uvloop

import bridge
from bridge.config import Config
from bridge.errors import BrokerRefusedError, ExitCode
from bridge.health import Watchdog
from bridge.http import Health
from bridge.maintenance import Maintenance, Stream
from bridge.metrics import Metrics
from bridge.mqtt import Session
from bridge.pipeline import Pipeline
from bridge.store import Store
from bridge.supervisor import Supervisor
from bridge.topics import Channel

log = structlog.get_logger()

# Nothing on the data path leaves cycles behind, and tens of thousands of readings are alive at any time: to look
# through them after each 700 new ones was a seventh of all the CPU time.
OBJECTS_BETWEEN_COLLECTIONS = 50_000
# The watchdog looks at least this often.
LONGEST_LOOK_S = 1.0


def run(config: Config) -> ExitCode:
    """Runs until SIGTERM or SIGINT.

    Raises BrokerRefusedError where the broker does not let us in, WattbridgeError where health.listen is taken.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    return uvloop.run(Daemon(config).run())


class Daemon:
    """One session with the broker, one pipeline, one connection to the database, and one more for maintenance."""

    def __init__(self, config: Config) -> None:
        self._config = config
        topics = config.topics.topics()
        self._store = Store(config.database, instance=config.mqtt.client_id)
        self._pipeline = Pipeline(
            self._store,
            topics,
            config.limits,
            config.batch,
            window=config.mqtt.receive_maximum,
            max_outstanding_bytes=config.mqtt.max_outstanding_bytes,
        )
        self._session = Session(
            config.mqtt,
            telemetry=topics.filters(Channel.TELEMETRY),
            statuses=topics.filters(Channel.STATUS),
            own_status=config.topics.bridge_status.replace("{client_id}", config.mqtt.client_id),
            deliver=self._pipeline.receive,
            lost=self._pipeline.forget,
        )
        self._maintenance = Maintenance(config.database, config.maintenance, self._stream)
        self._watchdog = Watchdog(config.health.stalled_after_s)
        self._supervisor = Supervisor(os.environ)
        address = config.health.address()
        metrics = Metrics(config.mqtt, self._pipeline, self._session, self._maintenance, self._watchdog, self._unready)
        self._http = Health(address, self._unready, metrics.page) if address else None
        self._busy = time.monotonic()
        self._unaccounted = 0
        self._stop = asyncio.Event()
        self._refused: BrokerRefusedError | None = None

    async def run(self) -> ExitCode:
        """Start, main loop, stop: intake, batch, commit, acknowledge, disconnect, database."""
        self._install_signals()
        log.info("daemon.started", version=bridge.__version__, client_id=self._config.mqtt.client_id, pid=os.getpid())
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(self._pipeline.run(), name="writer")
            session = tasks.create_task(self._keep_session(), name="mqtt")
            reporter = tasks.create_task(self._report(), name="report")
            maintenance = tasks.create_task(self._maintenance.run(), name="maintenance")
            watch = tasks.create_task(self._watch(), name="watchdog")
            if self._http:
                tasks.create_task(self._http.run(), name="http")
                log.info("http.listening", address=self._config.health.listen)
            # Both sides are waited for, however long: nothing of the start is left to do.
            self._supervisor.ready(self._status())

            await self._stop.wait()

            self._supervisor.stopping()
            self._session.stop_intake()
            self._pipeline.drain()
            # Nothing held means nothing to wait for, even where the database has not answered yet.
            await asyncio.wait([writer], timeout=self._config.shutdown_deadline_s if self._pipeline.outstanding else 0)
            # Asked before the connection ends: then what nobody has begun to write is the broker's again.
            unfinished = self._pipeline.outstanding > 0
            await self._session.disconnect()
            if unfinished:
                # Not by cancelling: psycopg would first ask a database that may hang to cancel the statement.
                self._say("daemon.stopped", unfinished=True, refused=self._refused and str(self._refused))
                os._exit(ExitCode.DEADLINE)
            await self._maintenance.close()
            for task in (writer, session, reporter, maintenance, watch):
                task.cancel()
            if self._http:
                self._http.stop()
        await self._store.close()
        self._say("daemon.stopped", unfinished=False)
        if self._refused:
            raise self._refused
        return ExitCode.OK

    async def _keep_session(self) -> None:
        try:
            await self._session.run()
        except BrokerRefusedError as refusal:
            self._refused = refusal
            self._stop.set()

    async def _report(self) -> None:
        """Logs the counters now and then."""
        while True:
            await asyncio.sleep(self._config.log.report_every_s)
            self._say("daemon.progress")
            self._supervisor.status(self._status())
            self._pipeline.progress.slowest_commit_ms = 0.0

    async def _watch(self) -> None:
        """Says when nothing moves any more, and when it does again; feeds systemd's watchdog as long as it does."""
        patience_s = self._supervisor.patience_s or self._config.health.stalled_after_s
        pace = min(LONGEST_LOOK_S, self._config.health.stalled_after_s / 4, patience_s / 2)
        was_ready: bool | None = None
        while True:
            standing = self._pipeline.standing()
            stall = self._watchdog.look(standing, time.monotonic())
            if stall and stall.began:
                log.error(
                    "pipeline.stalled",
                    waits_for=standing.waits_for,
                    outstanding=standing.outstanding,
                    since_s=round(stall.lasted_s, 1),
                )
            elif stall:
                log.info("pipeline.moving", stood_s=round(stall.lasted_s, 1), outstanding=standing.outstanding)
            is_ready = not self._unready()
            if stall or is_ready != was_ready:
                self._supervisor.status(self._status())
                was_ready = is_ready
            if not self._watchdog.stalls(standing):
                self._supervisor.feed()
            await asyncio.sleep(pace)

    def _unready(self) -> list[str]:
        """Why we are not ready, a line for each reason."""
        standing = self._pipeline.standing()
        return list(self._watchdog.unready(standing, broker=self._session.trouble, stopping=self._stop.is_set()))

    def _status(self) -> str:
        """How we are, in a line for people."""
        totals = self._pipeline.progress.totals
        return (
            f"{'; '.join(self._unready()) or 'ready'}: {totals.stored:,} stored, {totals.duplicate:,} duplicate, "
            f"{totals.dead_lettered:,} dead-lettered, {self._pipeline.outstanding:,} outstanding"
        )

    def _stream(self) -> Stream:
        """Where the stream of readings is: quiet only where everything that came has been written."""
        now = time.monotonic()
        if not self._session.connected or self._pipeline.outstanding:
            self._busy = now
        progress = self._pipeline.progress
        return Stream(progress.position, quiet_s=now - max(self._busy, progress.moved))

    def _say(self, event: str, **more: object) -> None:
        progress = self._pipeline.progress
        books = {
            "taken": progress.taken,
            "given_back": progress.given_back,
            "outstanding": self._pipeline.outstanding,
            "unaccounted": self._pipeline.unaccounted,
        }
        # Said when it changes: after a takeover it stays as it is.
        if books["unaccounted"] not in (0, self._unaccounted):
            log.error("books.unbalanced", committed=progress.committed, **books)
        self._unaccounted = books["unaccounted"]
        log.info(
            event,
            connected=self._session.connected,
            deliveries=progress.deliveries,
            batches=progress.batches,
            **books,
            slowest_commit_ms=round(progress.slowest_commit_ms, 1),
            **progress.totals._asdict(),
            **more,
        )

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("daemon.quit", signal=number.name)
            os._exit(128 + number)
        log.info("daemon.stopping", signal=number.name, deadline_s=self._config.shutdown_deadline_s)
        self._stop.set()
