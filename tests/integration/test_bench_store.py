"""The benches of the store, of decoding and of scale still run, and measure what they say: few rows, generous bounds.

A guard, not a measurement: on a busy machine everything here is slow, but both sides of a ratio are.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import uvloop

from bridge.services import EmbeddedPostgres

CHECKOUT = Path(__file__).parents[2]
# The benches are scripts that import one another by their bare names.
sys.path.insert(0, str(CHECKOUT / "bench"))

import decode  # noqa: E402
import report  # noqa: E402
import scale  # noqa: E402
import store  # noqa: E402

SMALL = ["--small", "--rounds", "1"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    # The disk is no side of any ratio here, and to fill and copy databases takes most of the time.
    with EmbeddedPostgres({"fsync": "off"}) as running:
        yield running


@pytest.fixture(scope="module")
def admin(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def server(postgres: EmbeddedPostgres) -> Iterator[store.Server]:
    running = store.Server(postgres, store.Stream(5_000, store.START), store.REPEATED_MINUTES)
    yield running
    running.admin.close()


@pytest.mark.parametrize(("name", "least"), [("new", 0.15), ("duplicates", 0.05), ("late", 0.05)])
def test_the_store_is_not_far_behind_raw_copy(server: store.Server, name: str, least: float) -> None:
    variant = store.VARIANTS[name]
    rounds = uvloop.run(store.measure(server, variant, store.arguments(SMALL)))
    (found,) = rounds
    assert found.store.rows == found.raw.rows == 20_000
    assert min(*found.store, *found.raw) > 0
    assert store.ratio(rounds).median > least
    assert report.markdown(report.Table(store.HEADER, [store.line(variant, rounds)]))


def test_every_step_of_the_daemon_is_measured() -> None:
    found = decode.run(decode.arguments([*SMALL, "--messages", "6000", "--forms", "mixed", "cbor", "arrays"]))
    assert [(spent.messages, spent.readings) for spent in found.values()] == [
        (6_000, 6_000),
        (6_000, 6_000),
        (600, 6_000),
    ]
    for spent in found.values():
        assert all(spent.steps[step] > 0 for step in decode.STEPS)
    # The work of a message is shared by the readings in it, the work of a reading is not.
    assert found["arrays"].steps["codec"] < found["mixed"].steps["codec"]
    assert found["arrays"].microseconds("copy") > found["mixed"].microseconds("copy")


def test_more_devices_cost_the_daemon_no_multiple() -> None:
    few, many = (scale.serve(devices, 10_000).spent for devices in (1_000, 10_000))
    assert many.microseconds() < 3 * few.microseconds()


def test_the_database_is_measured_with_few_and_many_devices(admin: psycopg.Connection) -> None:
    options = scale.arguments([*SMALL, "--sizes", "100", "10000", "--rows", "10000"])
    stores = uvloop.run(scale.measure_database(admin, options))
    assert {devices: [cost.rows for cost in rounds] for devices, rounds in stores.items()} == {
        100: [10_000],
        10_000: [10_000],
    }
    (few,), (many,) = stores.values()
    assert many.seconds < 20 * few.seconds


def test_a_longer_history_does_not_make_the_store_slow(admin: psycopg.Connection) -> None:
    options = scale.arguments([*SMALL, "--devices", "1000", "--rows", "10000"])
    found = uvloop.run(scale.measure_history(admin, 100, options))
    assert set(found) == {scale.NEXT, scale.BEFORE}
    for (pair,) in found.values():
        assert pair.short.rows == pair.long.rows == 10_000
        assert pair.long.rate > pair.short.rate / 10
    assert report.markdown(scale.history_table(found, 100_000))
