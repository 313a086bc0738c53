"""Dead letters' second chance: runs `wattbridge dead-letters replay` as a child, with a login that may write.

This process itself never has a connection that writes. A replay writes in transactions of its own and is safe to
repeat, so a child may be killed at any time.
"""

import asyncio
import os
import secrets
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

import structlog

from bridge.config import Config, Database
from bridge.web.problems import ProblemError

log = structlog.get_logger()

# The same program, from a checkout as well as from an installed wheel.
COMMAND = [sys.executable, "-c", "from bridge.cli import main; main()", "dead-letters", "replay"]
LONGEST_S = 600.0
# What is remembered of those that have ended, and how much of what each said.
MOST_REMEMBERED = 20
LONGEST_SHOWN = 4_000


class Wanted(NamedTuple):
    """Which dead letters: one by its id, or all that meet the conditions that are given."""

    letter: str = ""
    reason: str = ""
    device: str = ""

    def arguments(self) -> Sequence[str]:
        """As the command wants it."""
        if self.letter:
            return [self.letter]
        options = {"reason": self.reason, "device": self.device}
        # In one word: an id may begin with a dash. An empty one would mean all of them.
        return [f"--{name}={value}" for name, value in options.items() if value]


class Replay:
    """One run of the command: still going until it has ended."""

    def __init__(self, wanted: Wanted) -> None:
        self.name = secrets.token_hex(8)
        self.wanted = wanted
        self.began = datetime.now(UTC)
        self.ended: datetime | None = None
        self.fine = False
        self.said = ""

    def end(self, said: str, *, fine: bool) -> None:
        """It has ended and said this."""
        self.ended = datetime.now(UTC)
        self.fine = fine
        self.said = said
        (log.info if fine else log.warning)("replay.ended", replay=self.name, fine=fine, said=said)


class Replays:
    """Those of this process, one at a time."""

    def __init__(self, config: Config) -> None:
        self._login = config.web.replay
        self._replays: dict[str, Replay] = {}
        self._running: asyncio.Task[None] | None = None

    @property
    def enabled(self) -> bool:
        """Whether there is a login for it."""
        return bool(self._login.dsn.get_secret_value())

    def start(self, wanted: Wanted) -> Replay:
        """Begins one; the same that is still going is not begun again. Raises ProblemError while another one is."""
        if not wanted.arguments():
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY, "which dead letters: give a letter, a reason or a device"
            )
        going = next((replay for replay in self._replays.values() if not replay.ended), None)
        if going and going.wanted == wanted:
            return going
        if going:
            said = f"another replay is still going, at /ingest/replays/{going.name}: try again when it has ended"
            raise ProblemError(HTTPStatus.CONFLICT, said)
        replay = Replay(wanted)
        self._replays[replay.name] = replay
        while len(self._replays) > MOST_REMEMBERED:
            del self._replays[next(iter(self._replays))]
        log.info("replay.began", replay=replay.name, **wanted._asdict())
        self._running = asyncio.create_task(_run(replay, environment(self._login)))
        return replay

    def find(self, name: str) -> Replay | None:
        """The one of this name, if it is remembered."""
        return self._replays.get(name)

    async def stop(self) -> None:
        """Ends what is going."""
        if self._running:
            self._running.cancel()
            await asyncio.wait((self._running,))


def environment(login: Database) -> dict[str, str]:
    """What the child is told: all that we were, but for the login. Passwords are not for the command line.

    It reads the configuration anew, so what was corrected there since we have started counts.
    """
    database = {
        "DSN": login.dsn.get_secret_value(),
        "PASSWORD": login.password.get_secret_value(),
        # Those of the readers' login, were they in the file, would stand against ours.
        "DSN_FILE": "",
        "PASSWORD_FILE": "",
        "STATEMENT_TIMEOUT_S": str(login.statement_timeout_s),
    }
    return {
        **os.environ,
        "NO_COLOR": "1",
        **{f"WATTBRIDGE_DATABASE__{name}": value for name, value in database.items()},
    }


async def _run(replay: Replay, told: dict[str, str]) -> None:
    """Runs the child to its end, whichever that is."""
    try:
        said, fine = await _outcome(replay.wanted.arguments(), told)
        replay.end(said, fine=fine)
    except asyncio.CancelledError:
        replay.end("it was ended with this process: what it had replayed by then stays so", fine=False)
        raise
    except Exception:
        # Else it would be going on for ever.
        log.exception("replay.failed", replay=replay.name)
        replay.end("something failed in here; the log says what", fine=False)


async def _outcome(arguments: Sequence[str], told: dict[str, str]) -> tuple[str, bool]:
    """What the child said, and whether it ended well."""
    try:
        # A Ctrl-C in our terminal is for us; we then end it.
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *arguments, env=told, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
        )
    except (OSError, ValueError) as error:
        return f"it could not be started: {error}", False
    try:
        output, _ = await asyncio.wait_for(process.communicate(), LONGEST_S)
    except TimeoutError:
        return f"it was ended after {LONGEST_S:g} s: what it had replayed by then stays so", False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = output.decode(errors="replace").strip()[-LONGEST_SHOWN:]
    code = process.returncode or 0
    if code < 0:
        said = f"{said}\nit was ended by signal {-code}: what it had replayed by then stays so".strip()
    return said or f"it said nothing, and ended with {code}", code == 0
