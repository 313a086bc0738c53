"""Whether the dead letters are those of the ledger, for `wattbridge verify`."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from bridge.errors import WattbridgeError
from bridge.store import POSTGRES_EPOCH
from bridge.verify_report import (
    ALTERED,
    LONGEST_SHOWN,
    MISSING,
    REASON,
    REJECTED,
    SURPLUS,
    Check,
    Difference,
    Values,
    shortened,
)
from bridge.verify_rows import Devices, Kind, Reading, Snapshot, expected_values, moment, parse_moment, parse_reading
from simulator.truth import Letter, Rows


class FoundLetter(NamedTuple):
    """A row of dead_letter."""

    device_id: str
    topic: str
    reason: str
    payload: bytes


def fetch_letters(connection: Snapshot) -> list[FoundLetter]:
    """All dead letters. Raises WattbridgeError where another bridge keeps something else than payloads."""
    query = (
        "SELECT coalesce(device_id::text, ''), coalesce(topic::text, ''), coalesce(reason::text, ''), payload "
        "FROM dead_letter"
    )
    rows = connection.execute(query, binary=True)
    return [FoundLetter(device, topic, reason, _bytes(payload)) for device, topic, reason, payload in rows]


def _bytes(payload: object) -> bytes:
    if isinstance(payload, str):
        return payload.encode()
    if payload is None or isinstance(payload, bytes):
        return payload or b""
    raise WattbridgeError("dead_letter.payload must be bytea or text: a payload need not be JSON")


def check_letters(
    devices: Devices,
    expected: list[Letter],
    found: list[FoundLetter],
    history: Mapping[Kind, Rows],
    show: int,
) -> Check:
    """Compares. A letter too many with a reading that history must have was wrongly rejected."""
    # What is certain comes last, and stays where two are the same.
    left_over = {_identity(letter): letter for letter in sorted(expected, key=lambda one: one.certain)}
    check = Check("dead letters", len(left_over), len(found), show)
    extra: list[FoundLetter] = []
    for letter in found:
        exact = letter.topic, letter.reason, letter.payload
        must = left_over.pop(exact, None) or left_over.pop((*exact[:2], canonical(letter.payload)), None)
        if must is None:
            extra.append(letter)
        elif must.device_id and must.device_id != letter.device_id:
            check.add(_difference(ALTERED, must, letter))
    lost = [letter for letter in left_over.values() if letter.certain]
    check.expected -= len(left_over) - len(lost)

    lost, extra = _match_up(check, lambda one: (one.topic, canonical(one.payload)), lost, extra)
    rejected = [(letter, _wrongly_rejected(devices, letter, history)) for letter in extra]
    for letter, readings in rejected:
        if readings:
            check.add(_rejected_difference(devices, letter, readings))
    extra = [letter for letter, readings in rejected if not readings]
    lost, extra = _match_up(check, lambda one: (one.topic, one.reason), lost, extra)
    for must in sorted(lost, key=lambda one: one.number):
        check.add(_difference(MISSING, must, None))
    for letter in extra:
        check.add(_difference(SURPLUS, None, letter))
    return check


def of_fleet(devices: Devices, expected: list[Letter], found: list[FoundLetter]) -> list[FoundLetter]:
    """The dead letters of the ledger's devices, and those on topics that the ledger knows."""
    topics = {letter.topic for letter in expected}
    return [letter for letter in found if letter.device_id in devices.numbers or letter.topic in topics]


def _identity(letter: Letter) -> tuple[str, str, object]:
    """What makes two dead letters the same; a part may be written down again in other words."""
    return letter.topic, letter.reason, canonical(letter.payload) if letter.part else letter.payload


def canonical(payload: bytes) -> object:
    """A JSON value so that equal values are equal, however written; bytes where it is none."""
    try:
        return _frozen(json.loads(payload))
    except (ValueError, RecursionError):
        return payload


def _frozen(value: object, key: str = "") -> object:
    if isinstance(value, dict):
        return frozenset((name, _frozen(item, name)) for name, item in value.items())
    if isinstance(value, list):
        return ("array", *(_frozen(item) for item in value))
    if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return str(value), "no number"
    ts = parse_moment(value) if key == "timestamp" else None
    return value if ts is None else ("timestamp", ts)


def _match_up(
    check: Check,
    same: Callable[[Letter | FoundLetter], object],
    lost: list[Letter],
    extra: list[FoundLetter],
) -> tuple[list[Letter], list[FoundLetter]]:
    """Counts those that are alike but for one thing; returns the others."""
    waiting = defaultdict(list)
    for one in lost:
        waiting[same(one)].append(one)
    others = []
    for letter in extra:
        if alike := waiting[same(letter)]:
            must = alike.pop(0)
            check.add(_difference(ALTERED if must.reason == letter.reason else REASON, must, letter))
        else:
            others.append(letter)
    return [one for alike in waiting.values() for one in alike], others


def _wrongly_rejected(devices: Devices, letter: FoundLetter, history: Mapping[Kind, Rows]) -> list[Reading]:
    """The readings in a dead letter that history must have."""
    device = devices.numbers.get(letter.device_id)
    if device is None:
        return []
    said = _parsed(letter.payload)
    readings = [parse_reading(devices, device, item) for item in (said if isinstance(said, list) else [said])]
    kind = devices.kind(device)
    return [reading for reading in readings if reading and _is_in(kind, history[kind], reading)]


def _is_in(kind: Kind, rows: Rows, reading: Reading) -> bool:
    ts = reading.ts + POSTGRES_EPOCH
    start, end = np.searchsorted(rows.device, [reading.device, reading.device + 1])
    at = start + np.searchsorted(rows.ts[start:end], ts)
    if at == end or rows.ts[at] != ts:
        return False
    values = expected_values(kind, rows.part(slice(at, at + 1)))
    return all(column.item() == reading.values[name] for name, column in values.items())


def _rejected_difference(devices: Devices, letter: FoundLetter, readings: list[Reading]) -> Difference:
    first = readings[0]
    must: Values = {"history": "the reading" if len(readings) == 1 else f"{len(readings)} readings"}
    has: Values = {"reason": letter.reason, "topic": letter.topic, "payload": _payload_text(letter.payload)}
    return Difference(REJECTED, devices.ids[first.device], moment(first.ts), must, has)


def _difference(kind: str, must: Letter | None, has: FoundLetter | None) -> Difference:
    letter = must or has
    if letter is None:
        raise ValueError("a difference is about at least one letter")
    said = _parsed(letter.payload)
    ts = parse_moment(said.get("timestamp")) if isinstance(said, dict) else None
    expected, found = must and _values(must), has and _values(has)
    if must and expected:
        expected["message"] = must.number
        if not must.device_id:
            del expected["device_id"]
    return Difference(kind, letter.device_id or letter.topic, None if ts is None else moment(ts), expected, found)


def _values(letter: Letter | FoundLetter) -> Values:
    return {
        "device_id": letter.device_id,
        "topic": letter.topic,
        "reason": letter.reason,
        "payload": _payload_text(letter.payload),
    }


def _parsed(payload: bytes) -> object:
    """The JSON value, None where there is none; nested without end is garbage, too."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


def _payload_text(payload: bytes) -> str:
    try:
        text = payload[: 4 * LONGEST_SHOWN].decode()
    except UnicodeDecodeError:
        text = payload.hex(" ")
    return shortened(text)
