"""What Python runs first in a process whose wall clock is wrong: time.time() is off by the seconds in a file.

The file named by WRONG_CLOCK is mapped, so a jump is seen at once. time.monotonic(), and with it every wait of the
event loop, is right, as it is where a machine's date is set. The bridge asks for the date by time.time() alone, but for
the timestamps of its log.
"""

import mmap
import os
import struct
import time
from pathlib import Path

_DOUBLE = struct.Struct("d")
_right_time = time.time

with Path(os.environ["WRONG_CLOCK"]).open("rb") as _file:
    _off_by = mmap.mmap(_file.fileno(), _DOUBLE.size, access=mmap.ACCESS_READ)


def _wrong_time() -> float:
    return _right_time() + _DOUBLE.unpack_from(_off_by)[0]


time.time = _wrong_time
time.time_ns = lambda: round(_wrong_time() * 1e9)
