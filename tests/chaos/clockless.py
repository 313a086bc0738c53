"""Devices that have no clock of their own and rely on ours, and a fleet whose clocks say about now."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Self

from tests.chaos.arena import FailedError, Round
from tests.integration.clock import WrongClock
from tests.integration.harness import Publisher, ask, one, wait_until

# Enough that some readings are on their way whenever the clock jumps.
PACE_S = 0.01
DEVICES = 5


class Clockless:
    """Devices that send readings without timestamps, and go on- and offline, as long as the block lasts.

    Each reading has an energy of its own, so that none can pass for another.
    """

    def __init__(self, drill: Round) -> None:
        self._drill = drill
        self._sent = 0
        self._online = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure:
            raise self._failure

    def wait_for(self, clock: WrongClock) -> None:
        """Waits until a reading has arrived by this clock: the jump has been seen."""
        query = (
            "SELECT 1 FROM meter_history WHERE meter_id LIKE 'CLOCKLESS-%%' "
            "AND abs(extract(epoch FROM received_at - clock_timestamp() - %s)) < 1 LIMIT 1"
        )
        wait_until(lambda: ask(self._drill.dsn, query, clock.off_by), f"a reading arrives {clock.off_by} off")

    def wait_for_all(self) -> None:
        """Waits until all that was sent is there: then so is all that the broker was given before its end."""
        query = "SELECT count(*) FROM meter_history WHERE meter_id LIKE 'CLOCKLESS-%'"
        wait_until(lambda: one(self._drill.dsn, query) >= self._sent, f"{self._sent} readings without timestamp")

    def check(self) -> None:
        """Each reading has a row of its own, as of its arrival; what a device said last of itself is known.

        Raises FailedError.
        """
        rows, distinct, as_of_arrival = ask(
            self._drill.dsn,
            "SELECT count(*), count(DISTINCT kwh_ac), count(*) FILTER (WHERE ts_from_arrival AND ts = received_at) "
            "FROM meter_history WHERE meter_id LIKE 'CLOCKLESS-%'",
        )[0]
        if not rows == distinct == as_of_arrival == self._sent:
            raise FailedError(f"{self._sent} readings without timestamp, but {rows} rows, {distinct} different ones")
        states = ask(self._drill.dsn, "SELECT online FROM device_presence WHERE device_id LIKE 'CLOCKLESS-%'")
        if states != [(self._online,)] * DEVICES:
            raise FailedError(f"the devices said online = {self._online} last, but the table says {states}")

    def _send(self) -> None:
        try:
            with Publisher(self._drill.arena.broker, self._drill.root) as devices:
                while not self._ended.wait(PACE_S):
                    name = f"CLOCKLESS-{self._sent % DEVICES}"
                    devices.send("meter", name, {"kwhConsumedAc": self._sent / 10_000, "voltage": 230.0})
                    self._sent += 1
                    if self._sent % (2 * DEVICES) == 0:
                        self._say(devices, online=not self._online)
                devices.flush()
        except BaseException as failure:  # noqa: BLE001 - it is the failure of the block
            self._failure = failure

    def _say(self, devices: Publisher, *, online: bool) -> None:
        self._online = online
        for number in range(DEVICES):
            devices.send("meter", f"CLOCKLESS-{number}", b"online" if online else b"offline", channel="status")


def recently(drill: Round, messages: int, devices: int) -> str:
    """A start of the fleet's time from which so many messages reach close to now, but not up to it.

    A third more than their number says, as devices that are offline or silent make time pass faster; and as far from
    now that a clock that is 4 minutes behind takes those readings whose device is 4 minutes ahead.
    """
    took = timedelta(minutes=messages / devices * 4 / 3)
    return f"{datetime.now(UTC) - took - timedelta(minutes=5):%Y-%m-%dT%H:%MZ}"
