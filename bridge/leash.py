"""Run a child process for a parent, and never let it outlive that parent.

A program that starts a database or a broker cannot clean up after itself when it is killed with SIGKILL.
So it starts this one in between, in a session of its own (a Ctrl-C in the terminal does not reach it), with
one end of a socket pair as standard input. When the parent ends, however it ends, the kernel closes the
other end: the leash reads end-of-file, stops the child, removes the directories it was told to, and exits.
That needs nothing but pipes, so it works the same on Linux and macOS.

    python leash.py [--once] [--remove DIRECTORY]... [--stop SIGNAL:SECONDS]...

Over the socket go JSON objects, one a line. From the parent:
    {"run": [program, argument, ...], "env": {...} | null, "cwd": str | null, "user": [uid, gid] | null}
    {"signal": number}                        to the child; SIGKILL to its whole process group
and back:
    {"pid": number} or {"error": text}        the answer to "run"
    {"exit": code}                            the child has ended; a negative code is the signal that ended it

One child at a time; without --once another may be run after it. The child gets the leash's own standard
output and error. This file imports only the standard library, so that it also runs with `python -I -S`.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_AFTER_KILL = 10.0
REMOVE_TRIES = 50


class Leash:
    """Serves one parent over `channel` until it, or with `once` the child, has ended."""

    def __init__(self, channel: socket.socket, stops: list[tuple[int, float]], *, once: bool) -> None:
        """`stops` are the signals that end the child, each with the seconds that it gets to obey."""
        self._channel = channel
        self._stops = stops
        self._once = once
        self._child: subprocess.Popen[bytes] | None = None
        self._reported = True
        self._ended = False

    def serve(self) -> None:
        """Return when there is nothing more to do for the parent; the child is then still to be stopped."""
        awake, alarm = socket.socketpair()
        alarm.setblocking(False)
        signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(ending, self._end)
        pending = b""
        while not self._ended:
            readable, _, _ = select.select([self._channel, awake], [], [])
            if awake in readable:
                awake.recv(4096)
                self._report_exit()
            if self._channel in readable:
                try:
                    chunk = self._channel.recv(65536)
                except ConnectionResetError:
                    return
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def stop(self) -> None:
        """End the child, politely at first, and then whatever is left of its process group."""
        if self._child is None:
            return
        for number, seconds in self._stops:
            if self._child.poll() is not None:
                break
            self._child.send_signal(number)
            # A child that a fault drill has stopped cannot obey before it runs again.
            self._child.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        self._kill_group()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_AFTER_KILL)

    def _end(self, _signal: int, _frame: FrameType | None) -> None:
        self._ended = True

    def _obey(self, order: dict[str, Any]) -> None:
        if "run" in order:
            self._run(order)
        elif "signal" in order and self._child is not None:
            if order["signal"] == signal.SIGKILL:
                self._kill_group()
            else:
                self._child.send_signal(order["signal"])

    def _run(self, order: dict[str, Any]) -> None:
        identity: dict[str, Any] = {}
        if order["user"]:
            uid, gid = order["user"]
            identity = {"user": uid, "group": gid, "extra_groups": []}
        try:
            self._child = subprocess.Popen(
                order["run"],
                stdin=subprocess.DEVNULL,
                env=order["env"],
                cwd=order["cwd"],
                process_group=0,
                **identity,
            )
        except OSError as error:
            self._say({"error": str(error)})
            self._ended = self._once
            return
        self._reported = False
        self._say({"pid": self._child.pid})
        if self._once:
            # The reader of the child's output waits for its end, which must not depend on the leash.
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)

    def _report_exit(self) -> None:
        if self._child is None or self._reported or self._child.poll() is None:
            return
        self._reported = True
        self._say({"exit": self._child.returncode})
        self._ended = self._ended or self._once

    def _kill_group(self) -> None:
        if self._child is not None:
            # PermissionError is what macOS says of a group that has only zombies left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")


def remove(directory: str) -> None:
    """Remove a directory tree, also while processes that are about to end still write in it."""
    for _ in range(REMOVE_TRIES):
        shutil.rmtree(directory, ignore_errors=True)
        if not Path(directory).exists():
            return
        time.sleep(0.1)
    print(f"leash: cannot remove {directory}", file=sys.stderr)


def stop_step(text: str) -> tuple[int, float]:
    """Read `SIGINT:15` as a signal number and the seconds that the child gets to obey it."""
    name, _, seconds = text.partition(":")
    return signal.Signals[name].value, float(seconds)


def main() -> None:
    """Hold a child on the leash for the parent at the other end of standard input."""
    parser = argparse.ArgumentParser(prog="leash", description=__doc__.partition("\n")[0])
    parser.add_argument("--once", action="store_true", help="exit when the first child has ended")
    parser.add_argument("--remove", action="append", default=[], metavar="DIRECTORY", help="remove this last")
    parser.add_argument(
        "--stop", action="append", default=[], type=stop_step, metavar="SIGNAL:SECONDS", help="how to end the child"
    )
    options = parser.parse_args()
    leash = Leash(socket.socket(fileno=0), options.stop or [(signal.SIGTERM, 10.0)], once=options.once)
    leash.serve()
    leash.stop()
    for directory in options.remove:
        remove(directory)


if __name__ == "__main__":
    main()
