"""A wall clock that is wrong."""

import mmap
import struct
from datetime import timedelta
from pathlib import Path

DOUBLE = struct.Struct("d")


class WrongClock:
    """The wall clock of a process that is started with `env`: right until told otherwise."""

    def __init__(self, folder: Path) -> None:
        file = folder / "wrong-clock"
        file.write_bytes(DOUBLE.pack(0.0))
        with file.open("r+b") as opened:
            self._off_by = mmap.mmap(opened.fileno(), DOUBLE.size)
        self.env = {"PYTHONPATH": str(Path(__file__).with_name("wrong_clock")), "WRONG_CLOCK": str(file)}
        self.off_by = timedelta()

    def put(self, off_by: timedelta) -> None:
        """Puts the clock forward or back, so that it is off by this."""
        self.off_by = off_by
        DOUBLE.pack_into(self._off_by, 0, off_by.total_seconds())
