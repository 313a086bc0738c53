"""What Prometheus reads: true, complete, and in both of its formats."""

import http.client
import math
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import bridge
from bridge.services import PrivateMosquitto, free_port
from tests.integration.harness import (
    Address,
    Daemon,
    Proxy,
    Publisher,
    counters,
    meter,
    now,
    one,
    stored,
    vehicle,
    wait_for_equal,
    wait_for_received,
    wait_until,
)

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# By the conventions of Prometheus a name ends with its unit.
UNITS = ("_seconds", "_readings", "_total", "_info", "_bytes")
STATES = ("ready", "stalled", "broker_connected", "intake_paused", "database_waiting", "rollup_marks")
Samples = dict[str, float]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def metered(database: str, broker: Address, topic_root: str, tmp_path: Path, port: int) -> Iterator[Daemon]:
    with Daemon(database, broker, topic_root, tmp_path, health__listen=f"127.0.0.1:{port}") as running:
        yield running


def scrape(port: int, accept: str = "") -> tuple[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode(), response.headers["content-type"]
    finally:
        connection.close()


def samples(port: int) -> Samples:
    """Every sample, named as in the page, with its labels in the order of their names."""
    page, _ = scrape(port)
    found = {}
    for family in parse_text(page):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("wattbridge_")
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def wait_for_samples(port: int, **expected: float) -> Samples:
    def look() -> Samples | None:
        seen = samples(port)
        return seen if all(seen.get(name) == value for name, value in expected.items()) else None

    return wait_until(look, f"metrics {expected}")


def test_the_books_are_those_of_the_database(
    metered: Daemon, database: str, broker: Address, topic_root: str, port: int
) -> None:
    reading = meter("MTR-1", now())
    with Publisher(broker, topic_root) as devices:
        for _ in range(3):
            devices.send("meter", "MTR-1", reading)
        devices.send("vehicle", "VEH-1", [vehicle("VEH-1", now() - timedelta(minutes=n)) for n in range(4)])
        devices.send("meter", "MTR-1", {"kwhConsumedAc": -1, "voltage": 230})
        devices.send("meter", "MTR-2", "garbage")
        devices.flush()
    wait_for_received(database, 9)
    seen = wait_for_samples(port, readings_received_total=9)
    booked = counters(database)
    assert seen['readings_total{outcome="stored"}'] == booked.stored == 5
    assert seen['readings_total{outcome="duplicate"}'] == booked.duplicate == 2
    assert seen['readings_total{outcome="dead_lettered"}'] == booked.dead_lettered == 2
    assert seen["deliveries_total"] == 6
    assert seen["readings_taken_total"] == 9
    assert seen["batch_readings_sum"] == 9
    assert seen["batch_readings_count"] == seen["commit_seconds_count"] > 0
    assert 0 < seen["commit_seconds_sum"] < 60
    assert seen["readings_outstanding"] == seen["readings_unaccounted"] == seen["readings_given_back_total"] == 0
    assert seen["ready"] == seen["broker_connected"] == seen["broker_connections_total"] == 1
    assert seen["stalled"] == seen["database_waiting"] == seen["intake_paused"] == 0
    python = re.search(r'build_info\{client_id="(.*)",python="(.*)",version="(.*)"\}', "\n".join(seen))
    assert python
    assert python.group(3) == bridge.__version__
    # The restart of a daemon is no reset of these: they go on.
    assert metered.terminate() == 0
    metered.start()
    wait_for_samples(port, readings_received_total=9, deliveries_total=0)


def test_how_long_readings_took_is_counted_where_they_have_a_timestamp(
    metered: Daemon, database: str, broker: Address, topic_root: str, port: int
) -> None:
    assert "lag_seconds" not in samples(port)
    began = time.time()
    with Publisher(broker, topic_root) as devices:
        devices.send("meter", "MTR-1", [meter("MTR-1", now() - timedelta(seconds=100 + n)) for n in range(3)])
        devices.send("meter", "MTR-2", meter("MTR-2", now() + timedelta(seconds=60)))
        devices.send("meter", "MTR-3", {"kwhConsumedAc": 1, "voltage": 230})
        devices.flush()
    wait_for_received(database, 5)
    seen = wait_for_samples(port, readings_received_total=5)
    below = {bound: seen[f'publish_to_commit_seconds_bucket{{le="{bound}"}}'] for bound in ("0.05", "60.0", "300.0")}
    # The one from the future was just now; the one without a timestamp is not among them.
    assert below == {"0.05": 1, "60.0": 1, "300.0": 4}
    assert seen["publish_to_commit_seconds_count"] == 4
    assert 303 < seen["publish_to_commit_seconds_sum"] < 303 + 3 * (time.time() - began)
    assert seen["lag_seconds"] > -60
    assert began < seen["last_commit_timestamp_seconds"] < time.time()


def test_of_large_batches_some_readings_stand_for_all(
    metered: Daemon, database: str, broker: Address, topic_root: str, port: int
) -> None:
    since = now() - timedelta(hours=2)
    with Publisher(broker, topic_root) as devices:
        for number in range(2_000):
            devices.send("meter", "MTR-9", f"garbage {number}")
        devices.flush()
    wait_for_received(database, 2_000)
    # Of dead letters none, however large the batch.
    assert wait_for_samples(port, readings_received_total=2_000)["publish_to_commit_seconds_count"] == 0
    with Publisher(broker, topic_root) as devices:
        for number in range(4):
            name = f"MTR-{number}"
            devices.send("meter", name, [meter(name, since + timedelta(seconds=n)) for n in range(1_000)])
        devices.flush()
    wait_for_received(database, 6_000)
    seen = wait_for_samples(port, readings_received_total=6_000)
    assert math.isclose(seen["publish_to_commit_seconds_count"], 4_000, rel_tol=0.02)
    assert math.isclose(seen["publish_to_commit_seconds_sum"], 4_000 * (7_200 - 500), rel_tol=0.02)


def test_a_database_that_is_away_shows(
    proxy: Proxy, database: str, broker: Address, topic_root: str, tmp_path: Path, port: int
) -> None:
    proxy.refuse()
    settings = {"health__listen": f"127.0.0.1:{port}", "health__stalled_after_s": 0.5}
    with Daemon(proxy.dsn, broker, topic_root, tmp_path, ready=False, **settings) as daemon:
        daemon.wait_for_event("mqtt.connected")
        daemon.wait_for_event("database.waiting", attempt=2)
        with Publisher(broker, topic_root) as devices:
            devices.send("meter", "MTR-1", meter("MTR-1", now()))
            devices.flush()
        seen = wait_for_samples(port, stalled=1, readings_outstanding=1)
        assert seen["ready"] == 0
        assert seen["database_waiting"] == 1
        assert seen['database_retries_total{expected="true"}'] >= 2
        assert seen['database_retries_total{expected="false"}'] == 0
        assert seen["maintenance_failures_total"] >= 1
        assert seen["standstill_seconds"] >= 0.5
        # What the counters are nobody knows yet; a zero would look like a reset.
        assert not [name for name in seen if name.startswith(("readings_received", "readings_total", "status_mess"))]
        proxy.heal()
        wait_for_equal(lambda: stored(database), 1)
        seen = wait_for_samples(port, ready=1, stalled=0, database_waiting=0, readings_outstanding=0)
        assert seen["readings_received_total"] == 1


def test_a_broker_that_forgot_our_session_shows(database: str, topic_root: str, tmp_path: Path, port: int) -> None:
    with PrivateMosquitto() as own, Daemon(database, own, topic_root, tmp_path, health__listen=f"127.0.0.1:{port}"):
        assert samples(port)["broker_sessions_lost_total"] == 0
        own.kill()
        wait_for_samples(port, broker_connected=0, ready=0)
        own.start()
        wait_for_samples(port, broker_connected=1, broker_connections_total=2, broker_sessions_lost_total=1)


def test_the_rollups_show(database: str, broker: Address, topic_root: str, tmp_path: Path, port: int) -> None:
    settings = {"health__listen": f"127.0.0.1:{port}", "maintenance__every_s": 0.2}
    with Daemon(database, broker, topic_root, tmp_path, **settings):
        # With an empty history there is nothing to roll up; the watermark follows the clock all the same.
        seen = wait_until(lambda: "rollups_watermark_timestamp_seconds" in (s := samples(port)) and s, "a watermark")
        known = one(database, "SELECT extract(epoch FROM late_before)::float FROM rollup_progress")
        assert seen["rollups_watermark_timestamp_seconds"] == known
        assert seen["rollup_marks"] == 0
        assert seen["maintenance_rounds_total"] >= 1
        assert seen["maintenance_failures_total"] == 0


def test_both_formats_say_the_same_and_keep_to_the_conventions(metered: Daemon, port: int) -> None:
    wait_for_samples(port, rollup_marks=0)  # the last one to come
    page, content_type = scrape(port)
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parse_text(page)}
    page, content_type = scrape(port, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    same = {family.name: family for family in parse_openmetrics(page)}
    assert {name: family.type for name, family in same.items() if name.startswith("wattbridge_")} == {
        name: family.type for name, family in families.items() if name.startswith("wattbridge_")
    }
    for accept in ("text/plain;version=x", "application/openmetrics-text;version=abc", "*/*;q=nonsense", "é"):
        assert scrape(port, accept)[0].startswith("# HELP")
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_info"} <= families.keys()
    for name, family in families.items():
        assert family.documentation, name
        if name.startswith("wattbridge_") and name.removeprefix("wattbridge_") not in STATES:
            assert family.type == "counter" or name.endswith((*UNITS, "_outstanding", "_unaccounted")), name
