"""How long `wattbridge verify` takes, by step, and how much memory: a private PostgreSQL, a made-up ledger, a match.

The readings are half of them of meters; 10 million unless told otherwise. Twice: without rollups, and with all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg

from bridge.migrate import migrate
from bridge.services import EmbeddedPostgres
from bridge.store import COPY_HEADER, COPY_TRAILER, POSTGRES_EPOCH
from simulator.ledger import END_SLOT, LedgerWriter
from simulator.messages import SLOT_BYTES, Fate, SlotType

DEVICES = 5_000
START_MS = 1_767_225_600_000
SLOT = np.dtype(
    {
        "names": ["message", "device", "ts", "energy", "level", "temperature", "meter", "fate", "type"],
        "formats": ["<u4", "<u4", "<i8", "<i4", "<u2", "<i2", "<u4", "u1", "u1"],
        "offsets": [0, 4, 8, 16, 20, 22, 24, 28, 31],
        "itemsize": SLOT_BYTES,
    }
)
NAMES = {kind: [f"{kind}-{number:06d}" for number in range(1, DEVICES + 1)] for kind in ("MTR", "VEH")}
FINISH = """
INSERT INTO meter_live
SELECT DISTINCT ON (meter_id) meter_id, ts, kwh_ac, voltage, received_at
FROM meter_history ORDER BY meter_id, ts DESC;

INSERT INTO vehicle_live
SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at
FROM vehicle_history ORDER BY vehicle_id, ts DESC;

INSERT INTO ingest_counter
SELECT 'bench', n, n, 0, 0, 0, gen_random_uuid(), now()
FROM (SELECT (SELECT count(*) FROM meter_history) + (SELECT count(*) FROM vehicle_history) AS n) AS stored;
"""


def minute_of(kind: str, minute: int) -> np.ndarray:
    """The slots of one minute: each vehicle stays at a meter for three hours, then drives for one."""
    device = np.arange(DEVICES)
    random = np.random.default_rng((minute, kind == "VEH"))
    slots = np.zeros(DEVICES, SLOT)
    slots["message"] = minute * 2 * DEVICES + device + (DEVICES if kind == "VEH" else 0)
    slots["device"] = device + (DEVICES if kind == "VEH" else 0)
    slots["ts"] = START_MS + minute * 60_000 + device % 60 * 1_000
    slots["energy"] = random.integers(0, 2_000, DEVICES)
    slots["fate"], slots["type"] = Fate.STORED, SlotType.READING
    if kind == "MTR":
        slots["level"] = random.integers(2_200, 2_400, DEVICES)
    else:
        slots["level"] = random.integers(0, 10_001, DEVICES)
        slots["temperature"] = random.integers(100, 300, DEVICES)
        away = (minute + device) % 240 >= 180
        slots["meter"] = np.where(away, 0, (device + (minute + device) // 240) % DEVICES + 1)
    return slots


def write_ledger(path: Path, minutes: int) -> None:
    header = {
        "format": 1,
        "meters": DEVICES,
        "vehicles": DEVICES,
        "meter_ids": NAMES["MTR"],
        "vehicle_ids": NAMES["VEH"],
    }
    LedgerWriter(path, header | {"topic_root": "energy/v1"}).close()
    content = path.read_bytes()
    with path.open("wb") as file:
        file.write(content[:-SLOT_BYTES])
        for minute in range(minutes):
            file.write(minute_of("MTR", minute).tobytes() + minute_of("VEH", minute).tobytes())
        file.write(END_SLOT.pack(minutes * 2 * DEVICES, SlotType.END))


def copy_rows(kind: str, minutes: int) -> Iterator[bytes]:
    """The rows of binary COPY: with and without a meter they have different sizes."""
    values = [("kwh", ">f8"), ("level", ">f8"), *([("temperature", ">f8")] if kind == "VEH" else [])]
    fields = [("id", "S10"), ("ts", ">i8"), *values, *([("meter", "S10")] if kind == "VEH" else [])]
    fields += [("received_at", ">i8"), ("from_arrival", "?")]
    names, meters = np.array(NAMES[kind], "S10"), np.array(["", *NAMES["MTR"]], "S10")
    yield COPY_HEADER
    for minute in range(minutes):
        slots = minute_of(kind, minute)
        for plugged in (False, True):
            some = slots[(slots["meter"] > 0) == plugged]
            shape = [field if plugged or field[0] != "meter" else ("meter", "S0") for field in fields]
            record = [("fields", ">i2")]
            for name, form in shape:
                record += [(f"{name} length", ">i4")] + ([(name, form)] if form != "S0" else [])
            rows = np.zeros(len(some), record)
            rows["fields"] = len(fields)
            for name, form in shape:
                rows[f"{name} length"] = np.dtype(form).itemsize if form != "S0" else -1
            rows["id"] = names[some["device"] % DEVICES]
            rows["ts"] = rows["received_at"] = some["ts"] * 1_000 - POSTGRES_EPOCH
            rows["kwh"], rows["level"] = some["energy"] / 10_000, some["level"] / (10 if kind == "MTR" else 100)
            if kind == "VEH":
                rows["temperature"] = some["temperature"] / 10
            if plugged and kind == "VEH":
                rows["meter"] = meters[some["meter"]]
            yield rows.tobytes()
    yield COPY_TRAILER


def fill(dsn: str, minutes: int) -> None:
    migrate(dsn)
    days = [f"2026-01-{day:02d}" for day in range(1, minutes // 1_440 + 2)]
    with psycopg.connect(dsn, autocommit=True) as connection:
        for table, kind in (("meter_history", "MTR"), ("vehicle_history", "VEH")):
            connection.execute("SELECT ensure_history_partitions(%s::regclass, %s::date[])", (table, days))
            with connection.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN (FORMAT BINARY)") as copy:
                for rows in copy_rows(kind, minutes):
                    copy.write(rows)
        connection.execute(FINISH)
        connection.execute("VACUUM ANALYZE")


def roll_up(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT rollup_advance(max(ts) + interval '15 minutes') FROM meter_history")
        step = "SELECT complete_until < late_before OR marks_left > 0 FROM rollup_refresh()"
        while connection.execute(step).fetchone() != (False,):
            pass
        connection.execute("VACUUM ANALYZE")


def verify(ledger: Path, dsn: str) -> None:
    command = [Path(sys.executable).with_name("wattbridge"), "verify", ledger, "--json"]
    began = time.monotonic()
    env = os.environ | {"WATTBRIDGE_DATABASE__DSN": dsn}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        said = process.stdout.read()
        peak = peak_rss_mb(process)
    print(f"wattbridge verify: {time.monotonic() - began:.1f} s, peak RSS {peak:,.0f} MB")
    verdict = json.loads(said)
    print(f"{verdict['verdict']}, analytics {verdict['analytics']}")
    for step, seconds in verdict["seconds"].items():
        print(f"  {step:24} {seconds:7.2f} s", flush=True)
    assert verdict["match"], verdict["checks"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readings", type=int, nargs="?", default=10_000_000)
    minutes = parser.parse_args().readings // (2 * DEVICES)
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres() as server:
        ledger = Path(folder) / "fleet.ledger"
        began = time.monotonic()
        write_ledger(ledger, minutes)
        fill(server.dsn, minutes)
        print(f"filled in {time.monotonic() - began:.1f} s: {minutes * 2 * DEVICES:,} readings", flush=True)
        verify(ledger, server.dsn)
        began = time.monotonic()
        roll_up(server.dsn)
        print(f"rolled up in {time.monotonic() - began:.1f} s", flush=True)
        verify(ledger, server.dsn)


def peak_rss_mb(process: subprocess.Popen) -> float:
    """Waits for the end and returns the peak."""
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # it has been waited for
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
