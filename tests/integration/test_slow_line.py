"""A line to the broker that is slower than what waits there: the answers come late, and the daemon keeps waiting."""

from pathlib import Path
from random import Random

from tests.chaos.wire import Slowness, Wire
from tests.integration.harness import (
    Address,
    Daemon,
    Publisher,
    expected_history,
    meter_history,
    series,
    wait_for_received,
)


def test_what_comes_is_a_sign_of_life(database: str, broker: Address, topic_root: str, tmp_path: Path) -> None:
    """Mosquitto sends a whole window first, and after it what it answers to SUBSCRIBE and to a ping.

    Both took longer than the daemon waits: it hung up on a broker that was sending all the time, and had it all again.
    """
    readings = list(series(devices=50, readings=120))
    with Wire(broker, Random(1)) as wire:
        daemon = Daemon(
            database,
            wire,
            topic_root,
            tmp_path,
            mqtt__keep_alive_s=5,
            mqtt__connect_timeout_s=1,
            batch__max_readings=200,
        )
        with daemon:
            assert daemon.terminate() == 0
            with Publisher(broker, topic_root) as devices:
                devices.send_series(readings)
            wire.slow_down(Slowness(rate=150_000, jitter_s=0.0))
            daemon.start()
            wait_for_received(database, len(readings))
            assert daemon.events("mqtt.waiting") == []
            assert len(daemon.events("mqtt.connected")) == 1
            assert daemon.terminate() == 0
            (stopped,) = daemon.events("daemon.stopped")
            assert stopped["duplicate"] == 0
    assert meter_history(database) == expected_history(readings)
