"""The ledger: what must become of every reading and message, on disk before the message is sent.

A ledger is a sequence of slots (`messages.SLOT_BYTES`): a HEADER and its BODY slots, then the entries of the
messages in the order in which they are sent, then END if the broker took all of them. Beside it lies
`<ledger>.acks`, one byte a message: what the broker answered. Both survive the kill of the process at any moment,
though not that of the machine. Nothing in them depends on when or where they are written.
"""

import errno
import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from simulator.messages import BODY_BYTES, SLOT_BYTES, Message, SlotType, body_slots

FORMAT = 1
"""The version of the format: in the magic, and as "format" in the header."""

MAGIC = b"wattbridge ledger %d\n" % FORMAT

HEADER_SLOT = struct.Struct("<20sI7xB")
"""magic, bytes of the JSON in the slots that follow, slot type."""

END_SLOT = struct.Struct("<I27xB")
"""number of messages, slot type."""

MESSAGES_MAX = 2**32 - 2**20
"""A slot has 32 bits for the number of its message. What is left free is for messages that are encoded ahead: the
ledger must be full before their numbers are."""

ACKS_STEP = 1 << 20
"""The map of acknowledgements grows by this many bytes, that is messages."""


class Outcome(IntEnum):
    """What the broker answered; 0 stands for no answer."""

    ACKNOWLEDGED = 1
    REFUSED = 2
    UNHEARD = 3
    """Acknowledged, but nobody is subscribed."""


class LedgerError(Exception):
    """A ledger that cannot be written or read, and what to do about it: one sentence for people."""


def acks_path(ledger: Path) -> Path:
    """Return where the acknowledgements of a ledger are."""
    return Path(f"{ledger}.acks")


def read_header(path: Path, content: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    """Return the header in the `content` of the ledger at `path`, and how many slots it takes. Raises LedgerError."""
    magic = content[: len(MAGIC)]
    if magic != MAGIC:
        family = MAGIC.rstrip(b"0123456789\n")
        if magic.startswith(family):
            raise LedgerError(
                f"{path} is a ledger of another format than {FORMAT}: read it with the version that wrote it"
            )
        raise LedgerError(f"{path} is no ledger of the simulator: it begins otherwise")
    if len(content) < SLOT_BYTES:
        raise LedgerError(f"{path} ends within its header: nothing was recorded in it")
    _, length, _ = HEADER_SLOT.unpack(content[:SLOT_BYTES])
    slots = 1 + -(-length // BODY_BYTES)
    if len(content) < slots * SLOT_BYTES:
        raise LedgerError(f"{path} ends within its header: nothing was recorded in it")
    body = b"".join(content[at : at + BODY_BYTES] for at in range(SLOT_BYTES, slots * SLOT_BYTES, SLOT_BYTES))
    try:
        header = json.loads(body[:length])
    except ValueError as error:
        raise LedgerError(f"the header of {path} is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise LedgerError(f"the header of {path} is damaged: it does not say format {FORMAT}")
    return header, slots


def read_acks(path: Path) -> bytes | None:
    """Return the acknowledgements of the ledger at `path`, None where there are none. Raises LedgerError."""
    try:
        return acks_path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero in the name
        return None
    except OSError as error:
        raise LedgerError(f"{acks_path(path)} cannot be read ({_reason(error)})") from error


class LedgerWriter:
    """Writes a new ledger; a context manager. `header` is what the run is made of, ready for JSON.

    Raises LedgerError where a file is in the way or cannot be made; nothing is left behind then.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        text = json.dumps({**header, "format": FORMAT}, sort_keys=True).encode()
        self._path = path
        self._messages = 0
        self._bytes = 0
        self._capacity = 0
        self._closed = False
        self._file = _create(path)
        try:
            self._acks_file = _create(acks_path(path))
        except LedgerError:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise
        try:
            self._acks = self._grown_acks()
            self._append(HEADER_SLOT.pack(MAGIC, len(text), SlotType.HEADER) + body_slots(text))
        except OSError as error:
            os.close(self._file)
            os.close(self._acks_file)
            path.unlink(missing_ok=True)
            acks_path(path).unlink(missing_ok=True)
            raise LedgerError(self._failure(error)) from error

    def __enter__(self) -> Self:
        """Return this writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, also after an error: what is recorded stays true."""
        self.close()

    def record(self, messages: Sequence[Message]) -> None:
        """Write what must become of `messages`, the next ones of the stream, in one go; send them after this.

        Raises LedgerError, and then nothing of them is in the ledger.
        """
        if not messages:
            return
        count = messages[-1].number + 1
        if count > MESSAGES_MAX:
            raise LedgerError(f"the ledger {self._path} is full with {self._messages:,} messages: begin another run")
        try:
            while count > self._capacity:
                self._acks = self._grown_acks()
            self._append(b"".join([message.entries for message in messages]))
        except OSError as error:
            raise LedgerError(f"{self._failure(error)}; the {self._messages:,} messages in it are whole") from error
        self._messages = count

    def settle(self, number: int, outcome: int) -> None:
        """Note what the broker answered to a recorded message; not after `close`."""
        self._acks[number] = outcome

    def close(self) -> None:
        """Close both files, with END where every message was acknowledged; again does nothing.

        The acknowledgements stay unless they say nothing more than END does.

        Raises:
            LedgerError: somebody has deleted the ledger meanwhile.
        """
        if self._closed:
            return
        self._closed = True
        answers = self._answers()
        self._acks.close()
        os.close(self._acks_file)
        # A full disk may have no room for END: then the acknowledgements stay, and say the same.
        with suppress(OSError):
            if answers <= {Outcome.ACKNOWLEDGED, Outcome.UNHEARD}:
                self._append(END_SLOT.pack(self._messages, SlotType.END))
                if Outcome.UNHEARD not in answers:
                    acks_path(self._path).unlink()
        deleted = os.fstat(self._file).st_nlink == 0
        os.close(self._file)
        if deleted:
            raise LedgerError(f"the ledger {self._path} was deleted while it was written: run the fleet again")

    def _answers(self) -> set[int]:
        """Return which answers, or 0 for none, the messages have got."""
        found: set[int] = set()
        for at in range(0, self._messages, ACKS_STEP):
            found.update(self._acks[at : min(at + ACKS_STEP, self._messages)])
        return found

    def _append(self, slots: bytes) -> None:
        """Add whole slots to the ledger, all of them or none. Raises OSError."""
        try:
            _write_all(self._file, slots, self._bytes)
        except OSError:
            # If this fails as well, the next write covers what is torn, and readers pass over it.
            with suppress(OSError):
                os.ftruncate(self._file, self._bytes)
            raise
        self._bytes += len(slots)

    def _grown_acks(self) -> mmap.mmap:
        """Return a map of more acknowledgements in place of the one so far, which stays if this raises OSError.

        The zeros are written and not left as a hole: a full disk is an error here, but a SIGBUS in `settle`.
        """
        try:
            _write_all(self._acks_file, bytes(ACKS_STEP), self._capacity)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._acks_file, self._capacity)
            raise
        grown = mmap.mmap(self._acks_file, self._capacity + ACKS_STEP)
        if self._capacity:
            self._acks.close()
        self._capacity += ACKS_STEP
        return grown

    def _failure(self, error: OSError) -> str:
        """Return what happened, and what to do about it."""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        advice = "make room, or name a file on another disk" if full else "name a file on another disk"
        return f"the ledger {self._path} cannot be written ({_reason(error)}): {advice}"


def _create(path: Path) -> int:
    """Return the descriptor of a new file that was not there before. Raises LedgerError."""
    try:
        if str(path) == "-" or path.is_dir():
            raise LedgerError(f"a ledger is a file, which {str(path)!r} is not: name a new one")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise LedgerError(f"{path} exists, and a ledger overwrites nothing: move it away or name a new file") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LedgerError(f"the ledger {path} has no directory to be in: make {path.parent} first") from error
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be made ({_reason(error)}): name another file") from error
    except ValueError as error:
        raise LedgerError(f"{str(path)!r} is no name of a file: name another one") from error


def _write_all(file: int, content: bytes, offset: int) -> None:
    """Write all of `content`, though the system may take it in pieces. Raises OSError."""
    written = os.pwrite(file, content, offset)
    while written < len(content):
        written += os.pwrite(file, memoryview(content)[written:], offset + written)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
