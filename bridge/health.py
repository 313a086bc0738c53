"""Whether the bridge does its work: a standstill, what it waits for, and what keeps it from being ready. Pure."""

from collections.abc import Iterator
from typing import NamedTuple


class Standing(NamedTuple):
    """Where the pipeline is at a moment: the facts that are judged.

    `still_s` is how long nothing was committed although something was held the whole time; zero where nothing is held.
    `writing` readings have been on their way to the database for `writing_s` seconds, and `failure` is what it said to
    the last attempt at them.
    """

    opened: bool
    outstanding: int
    still_s: float
    writing: int
    writing_s: float
    failure: str

    @property
    def waits_for(self) -> str:
        """What has to happen before anything moves."""
        if not self.opened:
            return f"the database: {self.failure or 'it has not answered yet'}"
        if not self.writing:
            return "a batch that is full or old enough"
        batch = f"a batch of {self.writing} readings that is being written since {self.writing_s:.0f} s"
        return f"{batch}; the last attempt: {self.failure}" if self.failure else batch


class Stall(NamedTuple):
    """The begin or the end of a standstill, and how long it has lasted."""

    began: bool
    lasted_s: float


class Watchdog:
    """Tells when a standstill begins and ends: nothing committed for `stalled_after_s`, although something is held."""

    def __init__(self, stalled_after_s: float) -> None:
        self._stalled_after_s = stalled_after_s
        self._began: float | None = None

    def stalls(self, standing: Standing) -> bool:
        """Whether this is a standstill."""
        return standing.outstanding > 0 and standing.still_s >= self._stalled_after_s

    def look(self, standing: Standing, now: float) -> Stall | None:
        """What has changed since the last look; None where nothing has."""
        if self.stalls(standing):
            if self._began is None:
                self._began = now - standing.still_s
                return Stall(began=True, lasted_s=standing.still_s)
        elif self._began is not None:
            ended = Stall(began=False, lasted_s=now - standing.still_s - self._began)
            self._began = None
            return ended
        return None

    def unready(self, standing: Standing, *, broker: str, stopping: bool) -> Iterator[str]:
        """Why the bridge is not ready, a line for each reason; `broker` says what is wrong there, empty: nothing."""
        if stopping:
            yield "stopping"
        if broker:
            yield broker
        if self.stalls(standing):
            yield (
                f"no progress for {standing.still_s:.0f} s with {standing.outstanding} outstanding; "
                f"waits for {standing.waits_for}"
            )
        elif not standing.opened:
            yield f"waits for {standing.waits_for}"
