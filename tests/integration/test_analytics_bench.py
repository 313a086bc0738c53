"""The bench of the analytics still runs, and measures what it says: with hardly any devices."""

import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SIZES = "--days 2 --devices 5 --long 1 --long-days 4 --fleet 5 --ingest 20 --quarter-hours 1 --repeats 3"
NO_DISK = "--set fsync=off"
QUERY = re.compile(r"^(\S.*?) +(history|day|fleet) +([\d,]+) +(\d+)((?: +[\d.]+){5})(?:  ≤ .*)?$")


def test_the_bench_measures_every_query_and_the_cost_of_rollups() -> None:
    command = [sys.executable, "bench/analytics.py", *SIZES.split(), *NO_DISK.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "not measured" not in done.stdout

    measured = {(found[1], found[2]): found for found in map(QUERY.match, done.stdout.splitlines()) if found}
    rows = {which: int(found[3].replace(",", "")) for which, found in measured.items()}
    assert all(int(found[4]) == 3 for found in measured.values()), done.stdout
    for which, found in measured.items():
        _, p50, p95, p99, longest = map(float, found[5].split())
        assert 0 < p50 <= p95 <= p99 <= longest, which
    assert rows["vehicle_performance of one vehicle, 24 h", "history"] == 1
    assert rows["vehicle_performance of one vehicle, 24 h", "day"] == 1
    assert rows["status of one meter", "history"] == rows["status of one vehicle", "history"] == 1
    assert rows["charging_sessions of one vehicle, since 30 days", "history"] > 1
    assert rows["charging_session of one vehicle, all there are", "history"] > 1
    assert rows["vehicle_performance_24h, all vehicles", "fleet"] == 5
    assert ("fleet_inefficient", "fleet") in rows

    # 20 meters and 20 vehicles for 15 minutes, and then 1 % more, which leave marks.
    assert "all on time: 600 readings, 0 marks" in done.stdout
    late = re.search(r"late by up to 6 h: (\d+) readings, (\d+) marks", done.stdout)
    assert late is not None, done.stdout
    assert int(late[1]) > 600
    assert int(late[2]) > 0
    assert len(re.findall(r"^  rollup +[\d.]+ s CPU", done.stdout, re.MULTILINE)) == 2
