"""A PostgreSQL that has part of its data directory on a disk of its own, which can be filled up."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from bridge.services import EmbeddedPostgres, LeashedProcess, ServiceError
from tests.integration.harness import wait_until

MEGABYTES = 256
BALLAST = "ballast"
STEPS = (1_048_576, 4_096)
# Unmounted when told to end, and so also when the process that holds the leash is killed.
HOLD = """
trap 'umount --lazy "$1"; exit 0' TERM
mount -t tmpfs -o "size=$2m,mode=700,uid=$3,gid=$4" tmpfs "$1" || exit 1
while :; do sleep 60 & wait; done
"""


class SmallDisk:
    """A disk in memory, mounted from `start` to `stop` at an empty folder."""

    def __init__(self, folder: Path, owner: tuple[int, int]) -> None:
        """Mounts it. Raises ServiceError where that is not possible."""
        self.folder = folder
        numbers = [str(number) for number in (MEGABYTES, *owner)]
        self._holder = LeashedProcess(["sh", "-c", HOLD, "sh", str(folder), *numbers])
        wait_until(lambda: folder.is_mount() or self._holder.poll() is not None, "a small disk is mounted")
        if not folder.is_mount():
            raise ServiceError(f"no tmpfs can be mounted at {folder}")

    def stop(self) -> None:
        """Unmounts it; what it held is gone."""
        self._holder.stop()

    def fill(self) -> None:
        """Takes all the room that there is at this moment; what becomes free later is to be taken again."""
        with (self.folder / BALLAST).open("ab") as ballast:
            for step in STEPS:
                while _grown(ballast.fileno(), step):
                    pass

    def clear(self) -> None:
        """Makes the room again."""
        (self.folder / BALLAST).unlink(missing_ok=True)


class CrampedPostgres(EmbeddedPostgres):
    """Its `part` of the data directory, databases or write-ahead log, is on a small disk."""

    def __init__(self, part: Literal["base", "pg_wal"], settings: Mapping[str, str]) -> None:
        super().__init__(settings)
        self._part = part
        self._disk: SmallDisk | None = None

    @property
    def disk(self) -> SmallDisk:
        """Where that part is."""
        if self._disk is None:
            raise ServiceError(f"{self.NAME} has not been started")
        return self._disk

    def close(self) -> None:
        """Stops the server and takes the disk away."""
        if self.running:
            self.stop("immediate")
        if self._disk:
            self._disk.stop()
        self._disk = None
        super().close()

    def _prepare(self) -> None:
        super()._prepare()
        place = self.directory / "data" / self._part
        aside = place.rename(place.with_name(f"{self._part}-initial"))
        place.mkdir()
        self._disk = SmallDisk(place, self._user or (os.geteuid(), os.getegid()))
        subprocess.run(["cp", "-a", f"{aside}/.", place], check=True)


def _grown(file: int, step: int) -> bool:
    """Whether the file could be made larger by so much."""
    try:
        os.posix_fallocate(file, os.fstat(file).st_size, step)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def lacking() -> str | None:
    """Why there can be no small disk on this machine."""
    if os.geteuid() != 0:
        return "only root may mount a small disk"
    with tempfile.TemporaryDirectory(prefix="wattbridge-disk-") as folder:
        try:
            SmallDisk(Path(folder), (0, 0)).stop()
        except ServiceError as error:
            return str(error)
    return None
