"""Whether history and live rows are what the ledger says, for `wattbridge verify`."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from bridge.errors import Reason
from bridge.store import POSTGRES_EPOCH
from bridge.verify_report import ALTERED, STALE, Check
from bridge.verify_rows import (
    Devices,
    Found,
    Kind,
    Pairs,
    Reading,
    add_lone,
    add_unlike,
    any_differs,
    differing,
    expected_row,
    found_row,
    pair,
    parse_reading,
)
from simulator.truth import Rows, Truth

Choices = Mapping[tuple[int, int], Sequence[Reading]]


def choices_in_doubt(devices: Devices, truth: Truth) -> Choices:
    """What else a row in doubt may say, by (device, ts): the conflicts that may have come before it."""
    choices = defaultdict(list)
    for letter in truth.letters:
        if letter.reason == Reason.CONFLICT and not letter.certain:
            reading = parse_reading(devices, devices.numbers[letter.device_id], json.loads(letter.payload))
            if reading:
                choices[reading.device, reading.ts].append(reading)
    return choices


def check_history(devices: Devices, expected: Rows, found: Found, choices: Choices, show: int) -> tuple[Check, Rows]:
    """Compares, and says which rows must be there now that the database has decided what was in doubt."""
    pairs = pair(expected.device, expected.ts - POSTGRES_EPOCH, found.device, found.ts)
    if not expected.certain.all():
        expected = _adopt(expected, found, pairs, choices)
    differs = differing(expected, found, pairs)
    certain = expected.certain[pairs.missing]
    check = Check(f"{found.kind.name} history", len(expected.ts) - int((~certain).sum()), len(found.ts), show)
    must, has = partial(expected_row, devices, found.kind, expected), partial(found_row, devices, found)
    add_lone(check, pairs._replace(missing=pairs.missing[certain]), must, has)
    add_unlike(check, ALTERED, any_differs(differs), differs, pairs, must, has)
    if not certain.all():
        stays = np.ones(len(expected.ts), np.bool_)
        stays[pairs.missing[~certain]] = False
        expected = expected.part(stays)
    return check, expected


def check_live(devices: Devices, history: Rows, found: Found, show: int) -> Check:
    """Compares with the newest reading of each device, of those that history must have."""
    newest = np.ones(len(history.ts), np.bool_)
    newest[:-1] = history.device[1:] != history.device[:-1]
    expected = history.part(newest)
    ts = expected.ts - POSTGRES_EPOCH
    pairs = pair(expected.device, np.zeros_like(ts), found.device, np.zeros_like(found.ts))
    stale = found.ts[pairs.found] < ts[pairs.expected]
    differs = {"ts": found.ts[pairs.found] != ts[pairs.expected]} | differing(expected, found, pairs)
    check = Check(f"{found.kind.name} live", len(expected.ts), len(found.ts), show)
    must, has = partial(expected_row, devices, found.kind, expected), partial(found_row, devices, found)
    add_lone(check, pairs, must, has)
    add_unlike(check, STALE, stale, differs, pairs, must, has)
    add_unlike(check, ALTERED, any_differs(differs) & ~stale, differs, pairs, must, has)
    return check


def _adopt(expected: Rows, found: Found, pairs: Pairs, choices: Choices) -> Rows:
    """Where several readings of one (device, ts) are in doubt, the database may have any: takes its word for it."""
    doubtful = any_differs(differing(expected, found, pairs)) & ~expected.certain[pairs.expected]
    adopted = expected.part(np.ones(len(expected.ts), np.bool_))  # a copy: the truth may be needed again
    for row, at in zip(pairs.expected[doubtful].tolist(), pairs.found[doubtful].tolist(), strict=True):
        for choice in choices.get((int(expected.device[row]), int(found.ts[at])), ()):
            if all(found.values[name][at] == value for name, value in choice.values.items()):
                _put(adopted, row, found.kind, choice)
    return adopted


def _put(rows: Rows, at: int, kind: Kind, reading: Reading) -> None:
    columns = (rows.energy, rows.level, rows.temperature)
    for column, name, scale in zip(columns, kind.columns, kind.scales, strict=False):
        column[at] = round(reading.values[name] * scale)
    rows.meter[at] = reading.values.get("meter_id", 0)
